//! RMSNorm: `kernels/norm.cu`.

use super::launch::{Launch, int};
use super::{Buf, Cuda, Format, Kernel, Real};
use crate::error::Result;

/// A norm besides its weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormSpec {
    /// Added to the mean of squares.
    pub eps: f32,
    /// Added to the weight: 1 for the norms that store w − 1, else 0.
    pub weight_offset: f32,
}

/// Which threads share a row.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Team {
    /// A block with the row in its registers.
    Block,
    /// This many neighbours of a warp.
    Lanes(i32),
    /// A block that reads the row twice.
    Any,
}

impl Team {
    /// The fastest for rows of `width`; `block_only`: the kernel has no `Lanes`.
    fn of(width: usize, block_only: bool) -> Self {
        match width {
            _ if !width.is_multiple_of(4) || width > 8192 => Self::Any,
            // Two groups of 4 elements per lane.
            _ if width <= 256 && !block_only => Self::Lanes(width.div_ceil(8).next_power_of_two() as i32),
            _ => Self::Block,
        }
    }

    /// A launch over `rows` rows of `width`, without arguments.
    fn launch(self, kernel: &Kernel, rows: usize, width: usize) -> Launch<'_> {
        match self {
            Self::Block => Launch::new(kernel, rows, 32 * width.div_ceil(512) as u32),
            Self::Lanes(lanes) => Launch::new(kernel, (rows * lanes as usize).div_ceil(256), 256),
            Self::Any => Launch::new(kernel, rows, 256),
        }
    }
}

/// Rows of a norm in `x` and their width, which is the weight's.
///
/// # Panics
///
/// The weight is not one row, or x has no whole number of norms in a row.
fn rows_of_norm(x: &Buf<f32>, weight: &Buf<f32>) -> (usize, usize) {
    let width = weight.width();
    assert!(weight.rows() == 1 && width > 0, "a norm's weight is one row");
    assert!(x.width().is_multiple_of(width), "rows of {} for norms of {width}", x.width());
    (x.rows() * (x.width() / width), width)
}

impl Cuda {
    /// The norm of each row of the weight's width (for a norm per head x has several in a row of its own);
    /// x `[N, k·width]`, weight `[1, width]` → `[N, k·width]`.
    ///
    /// # Errors
    ///
    /// The device's memory is exhausted, or the driver fails.
    ///
    /// # Panics
    ///
    /// The shapes do not match: the weight is not one row, or x has no whole number of norms in a row.
    pub fn norm<Y: Real>(&self, x: &Buf<f32>, weight: &Buf<f32>, spec: NormSpec) -> Result<Buf<Y>> {
        let (rows, width) = rows_of_norm(x, weight);
        let Team::Lanes(lanes) = Team::of(width, false) else {
            return self.norm_by_blocks(x, None::<(&Buf<f32>, &Buf<f32>)>, weight, spec);
        };
        let name = Y::FORMAT.pick("norm_forward_f32_lanes", "norm_forward_bf16_lanes");
        let kernel = self.kernel("norm.cu", name)?;
        let y = Buf::new(&self.device.memory, x.rows(), x.width())?;
        let launch = Team::Lanes(lanes)
            .launch(&kernel, rows, width)
            .arg("const float* x", x)
            .arg("const float* weight", weight)
            .arg("float weight_offset", spec.weight_offset)
            .arg("float eps", spec.eps)
            .arg("i64 rows", rows as i64)
            .arg("int width", int(width))
            .arg("int lanes", lanes)
            .arg(Y::FORMAT.pick("float* y", "bf16* y"), &y);
        // SAFETY: x and y are [rows, width], the weight [width].
        unsafe { launch.on(&self.device.compute) }?;
        Ok(y)
    }

    /// h = x + delta and the norm of h; all `[N, D]` but the weight, `[1, D]`.
    ///
    /// # Errors
    ///
    /// As [`Cuda::norm`].
    ///
    /// # Panics
    ///
    /// As there.
    pub fn add_norm<D: Real, Y: Real>(
        &self,
        x: &Buf<f32>,
        delta: &Buf<D>,
        weight: &Buf<f32>,
        spec: NormSpec,
    ) -> Result<(Buf<f32>, Buf<Y>)> {
        assert_eq!((delta.rows(), delta.width()), (x.rows(), x.width()), "delta has the shape of x");
        assert_eq!(x.width(), weight.width(), "a residual addition is not per head");
        let h = Buf::new(&self.device.memory, x.rows(), x.width())?;
        let y = self.norm_by_blocks(x, Some((delta, &h)), weight, spec)?;
        Ok((h, y))
    }

    /// `delta_h`: what is added before the norm, and where the sum goes.
    fn norm_by_blocks<D: Real, Y: Real>(
        &self,
        x: &Buf<f32>,
        delta_h: Option<(&Buf<D>, &Buf<f32>)>,
        weight: &Buf<f32>,
        spec: NormSpec,
    ) -> Result<Buf<Y>> {
        let (rows, width) = rows_of_norm(x, weight);
        let team = Team::of(width, true);
        let name = match (D::FORMAT, Y::FORMAT, team) {
            (Format::F32, Format::F32, Team::Any) => "norm_forward_f32_f32_any",
            (Format::F32, Format::F32, _) => "norm_forward_f32_f32_block",
            (Format::F32, Format::Bf16, Team::Any) => "norm_forward_f32_bf16_any",
            (Format::F32, Format::Bf16, _) => "norm_forward_f32_bf16_block",
            (Format::Bf16, Format::F32, Team::Any) => "norm_forward_bf16_f32_any",
            (Format::Bf16, Format::F32, _) => "norm_forward_bf16_f32_block",
            (Format::Bf16, Format::Bf16, Team::Any) => "norm_forward_bf16_bf16_any",
            (Format::Bf16, Format::Bf16, _) => "norm_forward_bf16_bf16_block",
        };
        let kernel = self.kernel("norm.cu", name)?;
        let y = Buf::new(&self.device.memory, x.rows(), x.width())?;
        let launch = team
            .launch(&kernel, rows, width)
            .arg("const float* x", x)
            .arg(D::FORMAT.pick("const float* delta", "const bf16* delta"), delta_h.map(|(delta, _)| delta))
            .arg("float* h", delta_h.map(|(_, h)| h))
            .arg("const float* weight", weight)
            .arg("float weight_offset", spec.weight_offset)
            .arg("float eps", spec.eps)
            .arg("int width", int(width))
            .arg(Y::FORMAT.pick("float* y", "bf16* y"), &y);
        // SAFETY: x, delta, h and y are [rows, width] where they are present, the weight [width].
        unsafe { launch.on(&self.device.compute) }?;
        Ok(y)
    }

    /// See [`crate::backend::Backend::norm_backward`]; shapes as in [`Cuda::norm`].
    ///
    /// # Errors
    ///
    /// As [`Cuda::norm`].
    ///
    /// # Panics
    ///
    /// As there.
    pub fn norm_backward<G: Real>(
        &self,
        x: &Buf<f32>,
        weight: &Buf<f32>,
        spec: NormSpec,
        dy: &Buf<G>,
        dx: Option<Buf<f32>>,
    ) -> Result<Buf<f32>> {
        let shape = (x.rows(), x.width());
        assert_eq!((dy.rows(), dy.width()), shape, "dy has the shape of x");
        let (rows, width) = rows_of_norm(x, weight);
        let team = Team::of(width, false);
        let name = match (G::FORMAT, team) {
            (Format::F32, Team::Block) => "norm_backward_f32_block",
            (Format::F32, Team::Lanes(_)) => "norm_backward_f32_lanes",
            (Format::F32, Team::Any) => "norm_backward_f32_any",
            (Format::Bf16, Team::Block) => "norm_backward_bf16_block",
            (Format::Bf16, Team::Lanes(_)) => "norm_backward_bf16_lanes",
            (Format::Bf16, Team::Any) => "norm_backward_bf16_any",
        };
        let kernel = self.kernel("norm.cu", name)?;
        // What the gradient holds so far is read where it is written.
        let (out, so_far) = match dx {
            Some(dx) => (dx, true),
            None => (Buf::new(&self.device.memory, shape.0, shape.1)?, false),
        };
        assert_eq!((out.rows(), out.width()), shape, "dx has the shape of x");
        let mut launch = team
            .launch(&kernel, rows, width)
            .arg("const float* x", x)
            .arg("const float* weight", weight)
            .arg("float weight_offset", spec.weight_offset)
            .arg("float eps", spec.eps);
        if let Team::Lanes(_) = team {
            launch = launch.arg("i64 rows", rows as i64);
        }
        launch = launch.arg("int width", int(width));
        if let Team::Lanes(lanes) = team {
            launch = launch.arg("int lanes", lanes);
        }
        let launch = launch
            .arg(G::FORMAT.pick("const float* dy", "const bf16* dy"), dy)
            .arg("const float* addend", so_far.then_some(&out))
            .arg("float* dx", &out);
        // SAFETY: x, dy and dx are [rows, width], the weight [width].
        unsafe { launch.on(&self.device.compute) }?;
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn teams() {
        for (width, with_lanes, block_only) in [
            (1, Team::Any, Team::Any),
            (4, Team::Lanes(1), Team::Block),
            (64, Team::Lanes(8), Team::Block),
            (100, Team::Lanes(16), Team::Block),
            (128, Team::Lanes(16), Team::Block),
            (256, Team::Lanes(32), Team::Block),
            (260, Team::Block, Team::Block),
            (8192, Team::Block, Team::Block),
            (5123, Team::Any, Team::Any),
            (8196, Team::Any, Team::Any),
        ] {
            assert_eq!((Team::of(width, false), Team::of(width, true)), (with_lanes, block_only), "{width}");
        }
    }
}
