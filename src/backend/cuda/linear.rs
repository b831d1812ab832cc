//! Linear layers on the tensor cores: which kernel for which shape, and its launch.
//!
//! All kernels of one file add in the same order, and which file is taken depends on the layer's widths alone:
//! an output's bits do not depend on how many other rows there are.

mod tile;

use half::bf16;
pub use tile::{Direction, Shape, Tile};

use super::Cuda;
use super::element::Real;
use super::launch::{Launch, TensorMap, int};
use super::memory::Buf;
use super::tensor_map::Swizzle;
use crate::error::Result;

/// in and out are smaller: the kernels' own limit.
const MAX_FEATURES: usize = 1 << 24;

impl Shape {
    /// Of the product with a layer's weight, `[out, in]`, for so many rows.
    fn of(rows: usize, weight: &Buf<bf16>) -> Self {
        Self { rows, in_features: weight.width(), out_features: weight.rows() }
    }
}

/// What a product is made of besides the weight: each with its declaration, which differs by direction.
struct Operands<'a, T> {
    left: &'a Buf<bf16>,
    left_pointer: &'static str,
    left_map: &'static str,
    added: Option<&'a Buf<f32>>,
    added_pointer: &'static str,
    result: &'a Buf<T>,
    result_pointer: &'static str,
}

impl Cuda {
    /// y = x · weightᵀ + bias. x `[N, in]` · weight `[out, in]` · bias `[1, out]` → y `[N, out]`
    ///
    /// # Errors
    ///
    /// The device's memory is exhausted, the kernels cannot be had, or the driver refuses the launch.
    ///
    /// # Panics
    ///
    /// The shapes do not match, or in or out are 0 or not below 2²⁴.
    pub fn linear_forward<Y: Real>(
        &self,
        x: &Buf<bf16>,
        weight: &Buf<bf16>,
        bias: Option<&Buf<f32>>,
    ) -> Result<Buf<Y>> {
        let tile = Tile::choose(&self.device.info, Direction::Forward, Shape::of(x.rows(), weight));
        self.linear_forward_with(tile, x, weight, bias)
    }

    /// [`Cuda::linear_forward`] by a kernel of the caller's choice.
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// # Panics
    ///
    /// As there, or the kernel cannot read such rows ([`Tile::reads`]).
    pub fn linear_forward_with<Y: Real>(
        &self,
        tile: Tile,
        x: &Buf<bf16>,
        weight: &Buf<bf16>,
        bias: Option<&Buf<f32>>,
    ) -> Result<Buf<Y>> {
        let shape = Shape::of(x.rows(), weight);
        assert_eq!(x.width(), shape.in_features, "a linear layer's input and weight");
        let bias_size = (1, shape.out_features);
        assert!(bias.is_none_or(|bias| (bias.rows(), bias.width()) == bias_size), "a linear layer's bias");
        let y = Buf::new(&self.device.memory, shape.rows, shape.out_features)?;
        let operands = Operands {
            left: x,
            left_pointer: "const bf16* x",
            left_map: "const TensorMap x",
            added: bias,
            added_pointer: "const float* bias",
            result: &y,
            result_pointer: Y::FORMAT.pick("float* y", "bf16* y"),
        };
        self.product(tile, Direction::Forward, shape, weight, operands)?;
        Ok(y)
    }

    /// dx += dy · weight, in place; `None`: there is nothing so far.
    /// dy `[N, out]` · weight `[out, in]` → dx `[N, in]`
    ///
    /// # Errors
    ///
    /// As [`Cuda::linear_forward`].
    ///
    /// # Panics
    ///
    /// As there.
    pub fn linear_backward(
        &self,
        dy: &Buf<bf16>,
        weight: &Buf<bf16>,
        dx: Option<Buf<f32>>,
    ) -> Result<Buf<f32>> {
        let tile = Tile::choose(&self.device.info, Direction::Backward, Shape::of(dy.rows(), weight));
        self.linear_backward_with(tile, dy, weight, dx)
    }

    /// [`Cuda::linear_backward`] by a kernel of the caller's choice.
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// # Panics
    ///
    /// As there, or the kernel cannot read such rows ([`Tile::reads`]).
    pub fn linear_backward_with(
        &self,
        tile: Tile,
        dy: &Buf<bf16>,
        weight: &Buf<bf16>,
        dx: Option<Buf<f32>>,
    ) -> Result<Buf<f32>> {
        let Some(dx) = dx else { return self.linear_backward_as_with(tile, dy, weight, None) };
        self.product_backward(tile, dy, weight, Some(&dx), &dx)?;
        Ok(dx)
    }

    /// dy · weight + addend as a tensor of its own, rounded once.
    /// dy `[N, out]` · weight `[out, in]` · addend `[N, in]` → `[N, in]`
    ///
    /// # Errors
    ///
    /// As [`Cuda::linear_forward`].
    ///
    /// # Panics
    ///
    /// As there.
    pub fn linear_backward_as<X: Real>(
        &self,
        dy: &Buf<bf16>,
        weight: &Buf<bf16>,
        addend: Option<&Buf<f32>>,
    ) -> Result<Buf<X>> {
        let tile = Tile::choose(&self.device.info, Direction::Backward, Shape::of(dy.rows(), weight));
        self.linear_backward_as_with(tile, dy, weight, addend)
    }

    /// [`Cuda::linear_backward_as`] by a kernel of the caller's choice.
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// # Panics
    ///
    /// As there, or the kernel cannot read such rows ([`Tile::reads`]).
    pub fn linear_backward_as_with<X: Real>(
        &self,
        tile: Tile,
        dy: &Buf<bf16>,
        weight: &Buf<bf16>,
        addend: Option<&Buf<f32>>,
    ) -> Result<Buf<X>> {
        let dx = Buf::new(&self.device.memory, dy.rows(), weight.width())?;
        self.product_backward(tile, dy, weight, addend, &dx)?;
        Ok(dx)
    }

    fn product_backward<X: Real>(
        &self,
        tile: Tile,
        dy: &Buf<bf16>,
        weight: &Buf<bf16>,
        addend: Option<&Buf<f32>>,
        dx: &Buf<X>,
    ) -> Result<()> {
        let shape = Shape::of(dy.rows(), weight);
        let size = (shape.rows, shape.in_features);
        assert_eq!(dy.width(), shape.out_features, "a linear layer's output gradient and weight");
        assert!(
            addend.is_none_or(|addend| (addend.rows(), addend.width()) == size),
            "a linear layer's input gradient so far"
        );
        let operands = Operands {
            left: dy,
            left_pointer: "const bf16* dy",
            left_map: "const TensorMap dy",
            added: addend,
            added_pointer: "const float* addend",
            result: dx,
            result_pointer: X::FORMAT.pick("float* dx", "bf16* dx"),
        };
        self.product(tile, Direction::Backward, shape, weight, operands)
    }

    /// The callers have compared the operands' sizes with the shape.
    fn product<T: Real>(
        &self,
        tile: Tile,
        direction: Direction,
        shape: Shape,
        weight: &Buf<bf16>,
        operands: Operands<T>,
    ) -> Result<()> {
        let Shape { rows, in_features, out_features } = shape;
        let limits = 1..MAX_FEATURES;
        assert!(
            limits.contains(&in_features) && limits.contains(&out_features),
            "a layer's sizes: {shape:?}"
        );
        assert!(tile.reads(direction, shape), "{tile:?} cannot read the rows of {shape:?}");
        let tiles = tile.count(direction, shape);
        // Kernels number tiles, and rows to the end of the last tile, by int.
        let _ = (int(tiles), int(rows.next_multiple_of(tile.size().0)));
        if tiles == 0 {
            return Ok(());
        }
        let (file, name) = tile.entry::<T>(direction);
        let kernel = self.kernel(file, name)?;
        let Operands { left, left_pointer, left_map, added, added_pointer, result, result_pointer } =
            operands;
        let launch = if tile.has_maps() {
            kernel.allow_shared_bytes(tile.shared_bytes())?;
            let weight_rows = match direction {
                Direction::Forward => tile.size().1,
                Direction::Backward => 64,
            };
            let blocks = tiles.min(self.device.info.multiprocessors as usize);
            Launch::new(&kernel, blocks, tile.threads())
                .arg(left_map, TensorMap::of(left, tile.size().0 as u32, Swizzle::B128)?)
                .arg("const TensorMap weight", TensorMap::of(weight, weight_rows as u32, Swizzle::B128)?)
        } else {
            Launch::new(&kernel, tiles, tile.threads())
                .arg(left_pointer, left)
                .arg("const bf16* weight", weight)
        };
        let launch = launch
            .shared_bytes(tile.shared_bytes())
            .arg(added_pointer, added)
            .arg(result_pointer, result)
            .arg("int rows", int(rows))
            .arg("int in_features", int(in_features))
            .arg("int out_features", int(out_features));
        // SAFETY: all shapes were compared, and the kernel can read rows that start where these do.
        unsafe { launch.on(&self.device.compute) }
    }
}
