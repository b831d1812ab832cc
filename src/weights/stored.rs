//! A tensor as some container describes it: any element type, any strides, where it lies.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};

use super::mapped::{Bytes, or_full, temporary};
use crate::error::Result;
use crate::model::{Dtype, Tensor};

/// Matrices of up to so many bytes are copied into memory and not into a file, where they must be copied.
const SMALL_BYTES: usize = 1 << 20;

/// Storage type of an element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element {
    F64,
    F32,
    F16,
    BF16,
    I64,
    I32,
    Bool,
}

impl Element {
    /// Bytes of one.
    pub fn bytes(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Bool => 1,
        }
    }

    /// As PyTorch calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F64 => "float64",
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
            Self::I64 => "int64",
            Self::I32 => "int32",
            Self::Bool => "bool",
        }
    }

    /// The type of [`Tensor`]s that hold it unchanged.
    fn dtype(self) -> Option<Dtype> {
        match self {
            Self::F32 => Some(Dtype::F32),
            Self::F16 => Some(Dtype::F16),
            Self::BF16 => Some(Dtype::BF16),
            _ => None,
        }
    }

    pub fn is_float(self) -> bool {
        matches!(self, Self::F64 | Self::F32 | Self::F16 | Self::BF16)
    }

    /// The number at the start of `bytes`, which are enough.
    fn read(self, bytes: &[u8]) -> f64 {
        fn first<const N: usize>(bytes: &[u8]) -> [u8; N] {
            bytes.first_chunk().copied().unwrap_or([0; N])
        }
        match self {
            Self::F64 => f64::from_le_bytes(first(bytes)),
            Self::F32 => f64::from(f32::from_le_bytes(first(bytes))),
            Self::F16 => f64::from(f16::from_le_bytes(first(bytes))),
            Self::BF16 => f64::from(bf16::from_le_bytes(first(bytes))),
            // Counts; nothing here is past 2^53.
            Self::I64 => i64::from_le_bytes(first(bytes)) as f64,
            Self::I32 => f64::from(i32::from_le_bytes(first(bytes))),
            Self::Bool => f64::from(u8::from(first::<1>(bytes) != [0])),
        }
    }
}

/// A tensor whose elements are known to lie inside its bytes.
#[derive(Clone)]
pub(super) struct Stored {
    pub element: Element,
    pub shape: Vec<usize>,
    /// Elements from one index to the next, per dimension.
    strides: Vec<usize>,
    bytes: Bytes,
    /// Of the first element, in `bytes`.
    start: usize,
}

impl Stored {
    /// The elements of `bytes[range]` from number `offset` on. `None` where they would not all lie there, or where
    /// they are more than the bytes hold (an expanded tensor: its copy would need memory that nothing bounds).
    pub fn new(
        element: Element,
        shape: Vec<usize>,
        strides: Vec<usize>,
        offset: usize,
        bytes: &Bytes,
        range: Range<usize>,
    ) -> Option<Self> {
        (**bytes).as_ref().get(range.clone())?;
        let size = element.bytes();
        let there = range.len() / size;
        let count = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
        if strides.len() != shape.len() || count > there {
            return None;
        }
        if count > 0 {
            let steps = shape.iter().zip(&strides);
            let last = steps
                .map(|(d, stride)| (d - 1).checked_mul(*stride))
                .try_fold(offset, |n, d| n.checked_add(d?))?;
            if last >= there {
                return None;
            }
        }
        let start = range.start + if count > 0 { offset * size } else { 0 };
        Some(Self { element, shape, strides, bytes: Arc::clone(bytes), start })
    }

    /// Exactly the elements of `bytes[range]`, row-major.
    pub fn row_major(
        element: Element,
        shape: Vec<usize>,
        bytes: &Bytes,
        range: Range<usize>,
    ) -> Option<Self> {
        let mut strides = vec![1usize; shape.len()];
        for at in (1..shape.len()).rev() {
            strides[at - 1] = strides[at].saturating_mul(shape[at].max(1));
        }
        let count = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
        if count.checked_mul(element.bytes()) != Some(range.len()) {
            return None;
        }
        Self::new(element, shape, strides, 0, bytes, range)
    }

    /// The same elements with the dimensions in reverse order: Fortran's.
    pub fn reversed(mut self) -> Self {
        self.shape.reverse();
        self.strides.reverse();
        self
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// The element at `offset` elements from the first.
    fn at(&self, offset: usize) -> f64 {
        let from = self.start + offset * self.element.bytes();
        self.element.read((*self.bytes).as_ref().get(from..).unwrap_or_default())
    }

    /// The elements of a tensor of at most one dimension.
    pub fn line(&self) -> impl Iterator<Item = f64> + '_ {
        let stride = self.strides.first().copied().unwrap_or(0);
        (0..self.len()).map(move |index| self.at(index * stride))
    }

    /// A matrix of two dimensions, row-major, and whether that is its transpose. Nothing is copied where rows or
    /// columns lie one after the other in a type that [`Tensor`]s have. `None`: no matrix of floats.
    pub fn plane(&self) -> Option<Result<(Tensor, bool)>> {
        let (&[rows, columns], &[down, right]) = (self.shape.as_slice(), self.strides.as_slice()) else {
            return None;
        };
        if !self.element.is_float() {
            return None;
        }
        // A step along a dimension of one element is never made: its stride says nothing.
        let is = |length: usize, stride: usize, wanted: usize| length <= 1 || stride == wanted;
        let row_major = is(columns, right, 1) && is(rows, down, columns);
        let transposed = !row_major && is(rows, down, 1) && is(columns, right, rows);
        let shape = if transposed { vec![columns, rows] } else { vec![rows, columns] };
        if let (Some(dtype), true) = (self.element.dtype(), row_major || transposed) {
            let range = self.start..self.start + self.len() * self.element.bytes();
            return Tensor::new(dtype, shape, Arc::clone(&self.bytes), range)
                .map(|tensor| Ok((tensor, transposed)));
        }
        let (strides, sizes) = match transposed {
            true => ([right, down], [columns, rows]),
            false => ([down, right], [rows, columns]),
        };
        Some(self.copy(strides, sizes).map(|tensor| (tensor, transposed)))
    }

    /// A row-major copy, in float32 where the elements are float64.
    fn copy(&self, [down, right]: [usize; 2], [rows, columns]: [usize; 2]) -> Result<Tensor> {
        let size = self.element.bytes();
        let dtype = self.element.dtype().unwrap_or(Dtype::F32);
        let all = (*self.bytes).as_ref();
        let row = |row: usize, out: &mut Vec<u8>| {
            out.clear();
            for column in 0..columns {
                let from = self.start + (row * down + column * right) * size;
                let bytes = all.get(from..from + size).unwrap_or_default();
                match self.element {
                    Element::F64 => out.extend((self.element.read(bytes) as f32).to_le_bytes()),
                    _ => out.extend(bytes),
                }
            }
        };
        let total = rows * columns * dtype.size_bytes();
        let mut line = Vec::new();
        let bytes: Bytes = if total <= SMALL_BYTES {
            let mut out = Vec::with_capacity(total);
            (0..rows).for_each(|at| {
                row(at, &mut line);
                out.extend(&line);
            });
            Arc::new(out)
        } else {
            temporary(|file| {
                (0..rows).try_for_each(|at| {
                    row(at, &mut line);
                    or_full(std::io::Write::write_all(file, &line))
                })
            })?
        };
        Tensor::new(dtype, vec![rows, columns], bytes, 0..total)
            .ok_or_else(|| crate::error::Error::new("a matrix could not be copied"))
    }
}
