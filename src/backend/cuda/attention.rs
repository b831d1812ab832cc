//! Causal attention inside each sample: `kernels/attention.cu`, `kernels/attention_backward.cu` and
//! `kernels/attention_any.cu`, whose maths `kernels/attention.cuh` states.

mod kernels;

use std::cmp::Reverse;

use kernels::{Kernels, Step, TILE_ROWS};

use super::element::SampleTile;
use super::launch::{Launch, int};
use super::{Buf, Cuda, Kernel, Real};
use crate::error::Result;

/// The widest head.
const MAX_HEAD_DIM: usize = 256;
/// q, k and v have fewer columns: kernels count a tile's elements by 32 bits.
const MAX_WIDTH: usize = 1 << 24;

/// Attention of one layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionSpec {
    /// H
    pub heads: usize,
    /// K, a divisor of H: query head h reads key/value head h / (H / K).
    pub kv_heads: usize,
    /// Hd
    pub head_dim: usize,
    /// A position sees itself and the `window - 1` positions before it; `None`: all before it.
    pub window: Option<usize>,
    /// Factor of q·k, above 0.
    pub scale: f32,
    /// c > 0 of c · tanh(s / c), which bounds the scores.
    pub softcap: Option<f32>,
}

impl AttentionSpec {
    /// Columns of q, k and v together.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Columns of the output.
    pub fn out_width(&self) -> usize {
        self.heads * self.head_dim
    }

    fn check(&self) {
        let Self { heads, kv_heads, head_dim, window, scale, softcap } = *self;
        assert!(kv_heads > 0 && heads > 0 && heads.is_multiple_of(kv_heads), "heads of {self:?}");
        assert!((1..=MAX_HEAD_DIM).contains(&head_dim), "head dim of {self:?}");
        assert!(self.qkv_width() < MAX_WIDTH, "heads of {self:?}");
        assert!(window != Some(0), "a window of no positions");
        assert!(scale > 0.0, "scale of {self:?}");
        assert!(softcap.is_none_or(|cap| cap > 0.0), "soft-cap of {self:?}");
    }

    /// The arguments that all kernels share.
    fn arguments<'a>(&self, kernels: Kernels, launch: Launch<'a>) -> Launch<'a> {
        let launch = launch.arg("int heads", int(self.heads)).arg("int kv_heads", int(self.kv_heads));
        let launch = match kernels.take_head_dim() {
            true => launch.arg("int head_dim", int(self.head_dim)),
            false => launch,
        };
        launch
            .arg("int window", self.window.map_or(i32::MAX, |window| window.min(i32::MAX as usize) as i32))
            .arg("float scale", self.scale)
            .arg("float softcap", self.softcap.unwrap_or(0.0))
    }
}

/// The work of one chunk, on the device: which 64 rows of which sample, the longest first. It serves all layers,
/// forward and backward.
pub struct AttentionWork {
    /// `[tiles, 1]`
    tiles: Buf<SampleTile>,
    /// N
    rows: usize,
}

/// Tiles of samples that start and end at `cu_seqlens`. A tile's cost grows with its number, windows or not, so
/// this order is right for all layers.
fn tiles(cu_seqlens: &[usize]) -> Vec<SampleTile> {
    let of_sample = |ends: &[usize]| {
        let (first_row, rows) = (ends[0], ends[1] - ends[0]);
        (0..rows.div_ceil(TILE_ROWS)).map(move |tile| SampleTile {
            first_row: int(first_row),
            rows: int(rows),
            tile: int(tile),
        })
    };
    let mut tiles: Vec<_> = cu_seqlens.windows(2).flat_map(of_sample).collect();
    tiles.sort_by_key(|tile| Reverse(tile.tile));
    tiles
}

impl AttentionWork {
    /// A launch over the tiles of so many heads, without arguments.
    fn launch<'a>(
        &self,
        kernels: Kernels,
        step: Step,
        kernel: &'a Kernel,
        heads: usize,
    ) -> Result<Launch<'a>> {
        let bytes = kernels.shared_bytes(step);
        kernel.allow_shared_bytes(bytes)?;
        let blocks = self.tiles.rows() * heads * kernels.blocks(step);
        let _ = int(blocks);
        Ok(Launch::new(kernel, blocks, kernels.threads()).shared_bytes(bytes))
    }
}

impl Cuda {
    /// The work of a chunk whose samples start and end at `cu_seqlens`, from 0 to N. Samples may be empty.
    ///
    /// # Errors
    ///
    /// The device's memory is exhausted, or the driver fails.
    ///
    /// # Panics
    ///
    /// `cu_seqlens` does not start at 0, decreases, or ends above 2³¹ - 1.
    pub fn attention_work(&self, cu_seqlens: &[usize]) -> Result<AttentionWork> {
        assert!(cu_seqlens.first() == Some(&0) && cu_seqlens.is_sorted(), "samples {cu_seqlens:?}");
        let rows = cu_seqlens.last().copied().unwrap_or(0);
        let tiles = Buf::from_host(&self.device.memory, &tiles(cu_seqlens), 1)?;
        Ok(AttentionWork { tiles, rows })
    }

    /// Causal attention inside each sample: qkv `[N, (H + 2K)·Hd]`, the heads of q, then k, then v → the output
    /// `[N, H·Hd]`, and ln Σ exp(score) of each row and head `[N, H]`, which the backward needs.
    ///
    /// # Errors
    ///
    /// The device's memory is exhausted, the kernels cannot be had, or the driver refuses the launch.
    ///
    /// # Panics
    ///
    /// The shapes do not match, heads are no multiple of the key/value heads, the head dim is larger than 256, or
    /// scale, window or soft-cap is not above 0.
    pub fn attention_forward<A: Real>(
        &self,
        qkv: &Buf<A>,
        spec: &AttentionSpec,
        work: &AttentionWork,
    ) -> Result<(Buf<A>, Buf<f32>)> {
        spec.check();
        assert_eq!((qkv.rows(), qkv.width()), (work.rows, spec.qkv_width()), "q, k and v of {spec:?}");
        let out = Buf::new(&self.device.memory, qkv.rows(), spec.out_width())?;
        let lse = Buf::new(&self.device.memory, qkv.rows(), spec.heads)?;
        let kernels = Kernels::of::<A>(spec.head_dim);
        let (file, name) = kernels.entry(Step::Forward);
        let kernel = self.kernel(file, name)?;
        let launch = work
            .launch(kernels, Step::Forward, &kernel, spec.heads)?
            .arg(A::FORMAT.pick("const float* qkv", "const bf16* qkv"), qkv)
            .arg("const SampleTile* tiles", &work.tiles);
        let launch = spec
            .arguments(kernels, launch)
            .arg(A::FORMAT.pick("float* out", "bf16* out"), &out)
            .arg("float* lse", &lse);
        // SAFETY: the shapes were compared; tiles lie in the N rows, and grid and memory are those of the kernel.
        unsafe { launch.on(&self.device.compute) }?;
        Ok((out, lse))
    }

    /// The gradient of qkv, `[N, (H + 2K)·Hd]`, from that of the output, `[N, H·Hd]`. `out` and `lse`: what
    /// [`Cuda::attention_forward`] returned.
    ///
    /// # Errors
    ///
    /// As [`Cuda::attention_forward`].
    ///
    /// # Panics
    ///
    /// As there.
    pub fn attention_backward<A: Real>(
        &self,
        qkv: &Buf<A>,
        out: &Buf<A>,
        lse: &Buf<f32>,
        dout: &Buf<A>,
        spec: &AttentionSpec,
        work: &AttentionWork,
    ) -> Result<Buf<A>> {
        spec.check();
        assert_eq!((qkv.rows(), qkv.width()), (work.rows, spec.qkv_width()), "q, k and v of {spec:?}");
        for (of, buf) in [("output", out), ("output gradient", dout)] {
            assert_eq!((buf.rows(), buf.width()), (work.rows, spec.out_width()), "{of} of {spec:?}");
        }
        assert_eq!((lse.rows(), lse.width()), (work.rows, spec.heads), "lse of {spec:?}");
        let dqkv = Buf::new(&self.device.memory, qkv.rows(), qkv.width())?;
        let delta = Buf::<f32>::new(&self.device.memory, qkv.rows(), spec.heads)?;
        let kernels = Kernels::of::<A>(spec.head_dim);
        let [dq_kernel, dkv_kernel] = [Step::Dq, Step::Dkv].map(|step| {
            let (file, name) = kernels.entry(step);
            self.kernel(file, name)
        });
        let (dq_kernel, dkv_kernel) = (dq_kernel?, dkv_kernel?);
        let dqkv_pointer = A::FORMAT.pick("float* dqkv", "bf16* dqkv");
        let dq = work
            .launch(kernels, Step::Dq, &dq_kernel, spec.heads)?
            .arg(A::FORMAT.pick("const float* qkv", "const bf16* qkv"), qkv)
            .arg(A::FORMAT.pick("const float* out", "const bf16* out"), out)
            .arg("const float* lse", lse)
            .arg(A::FORMAT.pick("const float* dout", "const bf16* dout"), dout)
            .arg("const SampleTile* tiles", &work.tiles);
        let dq = spec.arguments(kernels, dq).arg("float* delta", &delta).arg(dqkv_pointer, &dqkv);
        let dkv = work
            .launch(kernels, Step::Dkv, &dkv_kernel, spec.kv_heads)?
            .arg(A::FORMAT.pick("const float* qkv", "const bf16* qkv"), qkv)
            .arg("const float* lse", lse)
            .arg(A::FORMAT.pick("const float* dout", "const bf16* dout"), dout)
            .arg("const float* delta", &delta)
            .arg("const SampleTile* tiles", &work.tiles);
        let dkv = spec.arguments(kernels, dkv).arg(dqkv_pointer, &dqkv);
        // SAFETY: the shapes were compared; tiles lie in the N rows, and grid and memory are those of the kernels.
        unsafe {
            dq.on(&self.device.compute)?;
            dkv.on(&self.device.compute)?;
        }
        Ok(dqkv)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_cover_all_rows_longest_work_first() {
        let found = tiles(&[0, 1, 1, 66, 194, 195]);
        let found: Vec<_> = found.iter().map(|tile| (tile.first_row, tile.rows, tile.tile)).collect();
        assert_eq!(found, [(1, 65, 1), (66, 128, 1), (0, 1, 0), (1, 65, 0), (66, 128, 0), (194, 1, 0)]);
        assert!(tiles(&[0]).is_empty() && tiles(&[0, 0, 0]).is_empty());
        assert_eq!(tiles(&(0..=5000).collect::<Vec<_>>()).len(), 5000);
    }
}
