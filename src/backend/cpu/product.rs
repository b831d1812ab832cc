//! Products with stored weights: which kernel, and both operands in the form it reads.
//!
//! Where the processor has a tile unit, float32 products run there on exact bf16 parts ([`super::amx`]);
//! elsewhere, and for float64, weights are widened and multiplied by float multiply-adds. Either way a weight
//! is laid out tile by tile inside the product, in a scratch buffer that stays in the cache.

use std::ops::Range;

use super::amx;
use super::matmul::{Mat, MatMut, matmul};
use super::{Buf, Cpu, Element};
use crate::model::{Dtype, Tensor};

/// Fewest rows of a left operand: below, the `gemm` crate takes paths whose rounding depends on the number
/// of rows, and a sample's numbers would depend on its neighbours. Smaller inputs are padded.
pub(super) const MIN_ROWS: usize = 72;

/// The left operand `[rows, depth]`.
pub(super) enum Left<'a, T> {
    /// As it is.
    Plain(Mat<'a, T>),
    /// In bf16 parts.
    Parts(amx::Left<'a>),
}

impl<T> Left<'_, T> {
    /// Rows.
    pub(super) fn rows(&self) -> usize {
        match self {
            Self::Plain(left) => left.shape().0,
            Self::Parts(left) => left.rows(),
        }
    }

    /// Some of the rows, from a multiple of 32 on.
    pub(super) fn part(&self, rows: Range<usize>) -> Left<'_, T> {
        match self {
            Self::Plain(left) => Left::Plain(left.part(rows, 0..left.shape().1)),
            Self::Parts(left) => Left::Parts(left.part(rows)),
        }
    }
}

/// The right operand `[depth, cols]`, made from a stored weight.
pub(super) enum Right<'a, T> {
    /// Widened.
    Plain(Mat<'a, T>),
    /// In bf16 parts.
    Parts(amx::Right<'a>),
}

/// dst = left·right, or dst += left·right when `add`. Runs on the calling thread.
pub(super) fn product<T: Element>(
    dst: &mut MatMut<'_, T>,
    left: &Left<'_, T>,
    right: &Right<'_, T>,
    add: bool,
) {
    match (left, right) {
        (&Left::Plain(left), &Right::Plain(right)) => matmul(dst, left, right, T::one(), add),
        (Left::Parts(left), Right::Parts(right)) => {
            let (shape, (ptr, row_stride)) = (dst.shape(), dst.raw());
            // SAFETY: dst owns these rows and columns; parts exist for float32 only, so T is f32.
            unsafe { amx::multiply(left, right, ptr.cast(), shape, row_stride, add) }
        }
        _ => unreachable!("one Cpu lays out both operands for the same kernel"),
    }
}

impl<T: Element> Cpu<T> {
    /// `x` with at least [`MIN_ROWS`] rows, or `None` if it has them or does not need them: on the tile unit a
    /// row's rounding never depends on the others.
    pub(super) fn padded(&self, x: &Buf<T>) -> Option<Buf<T>> {
        self.padded_part(x, 0..x.rows)
    }

    /// The same of some rows of `x`.
    pub(super) fn padded_part(&self, x: &Buf<T>, rows: Range<usize>) -> Option<Buf<T>> {
        (self.tiles.is_none() && rows.len() < MIN_ROWS).then(|| {
            let part = &x[rows.start * x.width..rows.end * x.width];
            let mut padded = self.zeros(MIN_ROWS, x.width);
            padded[..part.len()].copy_from_slice(part);
            padded
        })
    }

    /// Drops the rows that [`Cpu::padded`] added.
    pub(super) fn truncated(mut x: Buf<T>, rows: usize) -> Buf<T> {
        x.rows = rows;
        x
    }

    /// Memory for [`Cpu::left`].
    pub(super) fn left_space(&self, rows: usize, depth: usize) -> Buf<T> {
        self.alloc(1, self.left_space_elements(rows, depth))
    }

    /// Elements of [`Cpu::left_space`]: none where the left operand is read as it is.
    pub(super) fn left_space_elements(&self, rows: usize, depth: usize) -> usize {
        if self.tiles.is_some() {
            return amx::Left::space(rows, depth);
        }
        0
    }

    /// `x` `[rows, depth]` as a left operand.
    pub(super) fn left<'a>(
        &self,
        x: &'a [T],
        rows: usize,
        depth: usize,
        space: &'a mut Buf<T>,
    ) -> Left<'a, T> {
        if let Some(tiles) = self.tiles {
            let (x, space) = (bytemuck::cast_slice(&x[..rows * depth]), bytemuck::cast_slice_mut(space));
            return Left::Parts(amx::Left::new(tiles, x, rows, depth, space));
        }
        Left::Plain(Mat::new(x, rows, depth))
    }

    /// Memory for a right operand.
    pub(super) fn right_space(&self, dtype: Dtype, depth: usize, cols: usize) -> Buf<T> {
        self.alloc(1, self.right_space_elements(dtype, depth, cols))
    }

    /// Elements of [`Cpu::right_space`].
    pub(super) fn right_space_elements(&self, dtype: Dtype, depth: usize, cols: usize) -> usize {
        if self.tiles.is_some() {
            return amx::Right::space(dtype, depth, cols);
        }
        depth * cols
    }

    /// Rows `rows` of a stored matrix `[_, depth]`, transposed: the product is x·Wᵀ.
    pub(super) fn right_of_rows<'a>(
        &self,
        matrix: &'a Tensor,
        rows: Range<usize>,
        space: &'a mut Buf<T>,
    ) -> Right<'a, T> {
        let depth = matrix.shape[1];
        if let Some(tiles) = self.tiles {
            let stored = amx::Stored { bytes: matrix.bytes(), dtype: matrix.dtype, width: depth };
            return Right::Parts(amx::Right::from_rows(tiles, stored, rows, bytemuck::cast_slice_mut(space)));
        }
        let bytes = row_bytes(matrix, rows.clone());
        if let Some(stored) = T::stored(matrix.dtype, bytes) {
            return Right::Plain(Mat::new(stored, rows.len(), depth).t());
        }
        self.vectorised(
            #[inline(always)]
            || T::widen(matrix.dtype, bytes, &mut space[..rows.len() * depth]),
        );
        Right::Plain(Mat::new(space, rows.len(), depth).t())
    }

    /// Rows `rows` and columns `cols` of a stored matrix: the product is x·W.
    pub(super) fn right_of_columns<'a>(
        &self,
        matrix: &Tensor,
        rows: Range<usize>,
        cols: Range<usize>,
        space: &'a mut Buf<T>,
    ) -> Right<'a, T> {
        let width = matrix.shape[1];
        let bytes = row_bytes(matrix, rows.clone());
        if let Some(tiles) = self.tiles {
            let stored = amx::Stored { bytes, dtype: matrix.dtype, width };
            return Right::Parts(amx::Right::from_columns(
                tiles,
                stored,
                cols,
                bytemuck::cast_slice_mut(space),
            ));
        }
        let size = matrix.dtype.size_bytes();
        self.vectorised(
            #[inline(always)]
            || {
                for (out, bytes) in space.chunks_exact_mut(cols.len()).zip(bytes.chunks_exact(width * size)) {
                    T::widen(matrix.dtype, &bytes[cols.start * size..cols.end * size], out);
                }
            },
        );
        Right::Plain(Mat::new(space, rows.len(), cols.len()))
    }

    /// A stored vector, widened.
    pub(super) fn widen_vector(&self, vector: &Tensor) -> Buf<T> {
        let mut out = self.alloc(1, vector.len());
        self.vectorised(
            #[inline(always)]
            || T::widen(vector.dtype, vector.bytes(), &mut out),
        );
        out
    }
}

/// The bytes of whole rows of a stored matrix.
pub(super) fn row_bytes(matrix: &Tensor, rows: Range<usize>) -> &[u8] {
    let row = matrix.shape[1] * matrix.dtype.size_bytes();
    &matrix.bytes()[rows.start * row..rows.end * row]
}
