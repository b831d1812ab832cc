//! Which kernels for which heads.

use crate::backend::cuda::element::{Format, Real};

/// Rows of a tile: `TILE_ROWS` of the kernels.
pub(super) const TILE_ROWS: usize = 64;

/// What a kernel computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Forward,
    Dq,
    Dkv,
}

/// A set of three kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kernels {
    /// On the tensor cores, for bfloat16 heads of exactly this many columns.
    Exact(u32),
    /// By multiply-adds, for heads of up to 64, 128 or 256 columns.
    Any(Format, u32),
}

impl Kernels {
    /// For heads of `head_dim` columns, at most 256.
    pub(super) fn of<A: Real>(head_dim: usize) -> Self {
        match (A::FORMAT, head_dim) {
            (Format::Bf16, 16 | 32 | 64 | 80 | 96 | 128 | 256) => Self::Exact(head_dim as u32),
            (Format::F32, ..=64) => Self::Any(A::FORMAT, 64),
            (_, ..=128) => Self::Any(A::FORMAT, 128),
            _ => Self::Any(A::FORMAT, 256),
        }
    }

    /// Whether the head dim is an argument.
    pub(super) fn take_head_dim(self) -> bool {
        matches!(self, Self::Any(..))
    }

    /// File and name.
    pub(super) fn entry(self, step: Step) -> (&'static str, &'static str) {
        let (files, names) = match self {
            Self::Any(format, width) => (["attention_any.cu"; 3], any_names(format, width)),
            Self::Exact(head_dim) => {
                (["attention.cu", "attention_backward.cu", "attention_backward.cu"], exact_names(head_dim))
            }
        };
        (files[step as usize], names[step as usize])
    }

    /// Threads of a block.
    pub(super) fn threads(self) -> u32 {
        match self {
            Self::Exact(_) => 128,
            Self::Any(..) => 256,
        }
    }

    /// Blocks for a tile of one head (forward and dq) or key/value head.
    pub(super) fn blocks(self, step: Step) -> usize {
        match (self, step) {
            (Self::Exact(256), Step::Dkv) => 2,
            (Self::Exact(_), _) => 1,
            (Self::Any(_, width), _) => TILE_ROWS / any_rows(width) as usize,
        }
    }

    /// Dynamic shared memory of a block.
    pub(super) fn shared_bytes(self, step: Step) -> u32 {
        match self {
            // Own rows, and two stages of two tensors' rows of the other side.
            Self::Exact(head_dim) => {
                let others = match (head_dim, step) {
                    (..=64, _) => 64,
                    (256, Step::Dq | Step::Dkv) => 16,
                    _ => 32,
                };
                let row = 2 * head_dim;
                match step {
                    Step::Forward => (64 + 4 * others) * row,
                    Step::Dq => (2 * 64 + 4 * others) * row,
                    Step::Dkv => (2 * 64 + 4 * others) * row + 4 * others * 4,
                }
            }
            Self::Any(_, width) => {
                let (row, own) = (4 * (width + 4), any_rows(width));
                let others = if width == 256 && step == Step::Dkv { 16 } else { 32 };
                let weights = own * 4 * (others + 4);
                match step {
                    Step::Forward => (own + others) * row + weights,
                    Step::Dq => (2 * own + others) * row + weights,
                    Step::Dkv => 2 * ((own + others) * row + weights),
                }
            }
        }
    }
}

/// Rows of the result that a block of `attention_any.cu` computes.
fn any_rows(width: u32) -> u32 {
    match width {
        64 => 64,
        128 => 32,
        _ => 16,
    }
}

/// By [`Step`].
fn any_names(format: Format, width: u32) -> [&'static str; 3] {
    match (format, width) {
        (Format::F32, 64) => {
            ["attention_any_forward_f32_64", "attention_any_dq_f32_64", "attention_any_dkv_f32_64"]
        }
        (Format::F32, 128) => {
            ["attention_any_forward_f32_128", "attention_any_dq_f32_128", "attention_any_dkv_f32_128"]
        }
        (Format::F32, _) => {
            ["attention_any_forward_f32_256", "attention_any_dq_f32_256", "attention_any_dkv_f32_256"]
        }
        (Format::Bf16, 128) => {
            ["attention_any_forward_bf16_128", "attention_any_dq_bf16_128", "attention_any_dkv_bf16_128"]
        }
        (Format::Bf16, _) => {
            ["attention_any_forward_bf16_256", "attention_any_dq_bf16_256", "attention_any_dkv_bf16_256"]
        }
    }
}

/// By [`Step`].
fn exact_names(head_dim: u32) -> [&'static str; 3] {
    match head_dim {
        16 => ["attention_forward_16", "attention_dq_16", "attention_dkv_16"],
        32 => ["attention_forward_32", "attention_dq_32", "attention_dkv_32"],
        64 => ["attention_forward_64", "attention_dq_64", "attention_dkv_64"],
        80 => ["attention_forward_80", "attention_dq_80", "attention_dkv_80"],
        96 => ["attention_forward_96", "attention_dq_96", "attention_dkv_96"],
        128 => ["attention_forward_128", "attention_dq_128", "attention_dkv_128"],
        _ => ["attention_forward_256", "attention_dq_256", "attention_dkv_256"],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn kernels_of_heads() {
        assert_eq!(Kernels::of::<f32>(64), Kernels::Any(Format::F32, 64));
        assert_eq!(Kernels::of::<f32>(65), Kernels::Any(Format::F32, 128));
        assert_eq!(Kernels::of::<f32>(129), Kernels::Any(Format::F32, 256));
        assert_eq!(Kernels::of::<bf16>(24), Kernels::Any(Format::Bf16, 128));
        assert_eq!(Kernels::of::<bf16>(130), Kernels::Any(Format::Bf16, 256));
        assert_eq!(Kernels::of::<bf16>(80), Kernels::Exact(80));
    }

    #[test]
    fn shared_memory_fits_where_there_are_99_kib() {
        for head_dim in 1..=256 {
            for kernels in [Kernels::of::<f32>(head_dim), Kernels::of::<bf16>(head_dim)] {
                for step in [Step::Forward, Step::Dq, Step::Dkv] {
                    assert!(kernels.shared_bytes(step) <= 99 << 10, "{kernels:?} {step:?}");
                    let name = kernels.entry(step).1;
                    assert!(name.ends_with(&head_dim.to_string()) || kernels.take_head_dim(), "{name}");
                }
            }
        }
    }
}
