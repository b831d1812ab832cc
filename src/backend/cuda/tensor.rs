//! An activation or a weight in either format.

use half::bf16;

use super::{Buf, Cuda, Format};
use crate::error::Result;

/// `[rows, width]`, row-major, on the device.
pub enum Tensor {
    /// float32
    F32(Buf<f32>),
    /// bfloat16
    Bf16(Buf<bf16>),
}

/// Runs `$body` with `$buf` as the typed buffer of a [`Tensor`].
macro_rules! typed {
    ($tensor:expr, $buf:ident => $body:expr) => {
        match $tensor {
            $crate::backend::cuda::Tensor::F32($buf) => $body,
            $crate::backend::cuda::Tensor::Bf16($buf) => $body,
        }
    };
}
pub(super) use typed;

impl From<Buf<f32>> for Tensor {
    fn from(buf: Buf<f32>) -> Self {
        Self::F32(buf)
    }
}

impl From<Buf<bf16>> for Tensor {
    fn from(buf: Buf<bf16>) -> Self {
        Self::Bf16(buf)
    }
}

impl Tensor {
    /// N.
    pub fn rows(&self) -> usize {
        typed!(self, buf => buf.rows())
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        typed!(self, buf => buf.width())
    }

    /// Which.
    pub fn format(&self) -> Format {
        match self {
            Self::F32(_) => Format::F32,
            Self::Bf16(_) => Format::Bf16,
        }
    }

    /// The values as float32, after waiting for them. `[rows, width]`
    ///
    /// # Errors
    /// The driver fails.
    pub fn to_host(&self) -> Result<Vec<f32>> {
        match self {
            Self::F32(buf) => buf.to_host(),
            Self::Bf16(buf) => Ok(buf.to_host()?.into_iter().map(bf16::to_f32).collect()),
        }
    }

    /// The same rows and values, sharing the memory.
    pub(super) fn share(&self) -> Self {
        match self {
            Self::F32(buf) => Self::F32(buf.share()),
            Self::Bf16(buf) => Self::Bf16(buf.share()),
        }
    }

    /// As float32; shares the memory where it is that already.
    pub(super) fn wide(&self, cuda: &Cuda) -> Result<Buf<f32>> {
        match self {
            Self::F32(buf) => Ok(buf.share()),
            Self::Bf16(buf) => cuda.cast(buf),
        }
    }

    /// As float32, in memory of its own.
    pub(super) fn wide_copy(&self, cuda: &Cuda) -> Result<Buf<f32>> {
        match self {
            Self::F32(buf) => buf.duplicate(&cuda.device.memory),
            Self::Bf16(buf) => cuda.cast(buf),
        }
    }

    /// In `format`; shares the memory where it is that already.
    pub(super) fn to(&self, format: Format, cuda: &Cuda) -> Result<Self> {
        match (self, format) {
            (Self::F32(buf), Format::Bf16) => Ok(Self::Bf16(cuda.cast(buf)?)),
            (Self::Bf16(buf), Format::F32) => Ok(Self::F32(cuda.cast(buf)?)),
            _ => Ok(self.share()),
        }
    }
}
