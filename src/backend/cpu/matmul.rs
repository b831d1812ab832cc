//! Matrix products: strided views over the `gemm` crate, and the linear op built on them.

use std::marker::PhantomData;
use std::ops::Range;

use rayon::prelude::*;

use super::{Buf, Cpu, Element};
use crate::model::Tensor;

/// A read-only strided matrix. Every element lies inside the slice it was made from.
pub(super) struct Mat<'a, T> {
    ptr: *const T,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
    life: PhantomData<&'a [T]>,
}

impl<T> Clone for Mat<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Mat<'_, T> {}

// SAFETY: a Mat is a shared slice with another way to index it.
unsafe impl<T: Sync> Send for Mat<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Mat<'_, T> {}

impl<'a, T> Mat<'a, T> {
    /// Row-major `[rows, width]`.
    pub fn new(data: &'a [T], rows: usize, width: usize) -> Self {
        assert!(rows * width <= data.len(), "matrix [{rows}, {width}] over {} elements", data.len());
        Self { ptr: data.as_ptr(), rows, cols: width, row_stride: width, col_stride: 1, life: PhantomData }
    }

    /// The part with these rows and columns.
    pub fn part(self, rows: Range<usize>, cols: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        assert!(cols.start <= cols.end && cols.end <= self.cols, "columns {cols:?} of {}", self.cols);
        // SAFETY: the first element of the part lies inside the slice, or the part is empty and at its end.
        let ptr = unsafe { self.ptr.add(rows.start * self.row_stride + cols.start * self.col_stride) };
        Self { ptr, rows: rows.len(), cols: cols.len(), ..self }
    }

    /// The transpose: the same elements.
    pub fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// A writable matrix with contiguous rows. Two of them never share an element.
pub(super) struct MatMut<'a, T> {
    ptr: *mut T,
    rows: usize,
    cols: usize,
    row_stride: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: a MatMut owns its elements exclusively, like a mutable slice.
unsafe impl<T: Send> Send for MatMut<'_, T> {}

impl<'a, T> MatMut<'a, T> {
    /// Row-major `[rows, width]`.
    pub fn new(data: &'a mut [T], rows: usize, width: usize) -> Self {
        assert!(rows * width <= data.len(), "matrix [{rows}, {width}] over {} elements", data.len());
        Self { ptr: data.as_mut_ptr(), rows, cols: width, row_stride: width, life: PhantomData }
    }

    /// The part with these rows and columns, borrowed.
    pub fn part(&mut self, rows: Range<usize>, cols: Range<usize>) -> MatMut<'_, T> {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        assert!(cols.start <= cols.end && cols.end <= self.cols, "columns {cols:?} of {}", self.cols);
        // SAFETY: the first element of the part lies inside the slice, or the part is empty and at its end.
        let ptr = unsafe { self.ptr.add(rows.start * self.row_stride + cols.start) };
        MatMut { ptr, rows: rows.len(), cols: cols.len(), row_stride: self.row_stride, life: PhantomData }
    }

    /// Cuts into the given ranges of rows, which must be ascending and disjoint.
    pub fn split_rows(mut self, ranges: impl Iterator<Item = Range<usize>>) -> Vec<MatMut<'a, T>> {
        let mut end = 0;
        ranges
            .map(|rows| {
                assert!(rows.start >= end, "row ranges overlap");
                end = rows.end;
                let cols = 0..self.cols;
                self.part(rows, cols).extend_life()
            })
            .collect()
    }

    /// Cuts into the given ranges of columns, which must be ascending and disjoint.
    pub fn split_columns(mut self, ranges: impl Iterator<Item = Range<usize>>) -> Vec<MatMut<'a, T>> {
        let mut end = 0;
        ranges
            .map(|cols| {
                assert!(cols.start >= end, "column ranges overlap");
                end = cols.end;
                let rows = 0..self.rows;
                self.part(rows, cols).extend_life()
            })
            .collect()
    }

    /// Only for the two splits above: they consume the parent and their parts are disjoint, so each part
    /// may live as long as the parent would have.
    fn extend_life<'b>(self) -> MatMut<'b, T> {
        MatMut {
            ptr: self.ptr,
            rows: self.rows,
            cols: self.cols,
            row_stride: self.row_stride,
            life: PhantomData,
        }
    }

    /// One row.
    pub fn row(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.rows);
        // SAFETY: the row lies inside the slice this matrix was made from, and no other MatMut has it.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(row * self.row_stride), self.cols) }
    }
}

/// dst = scale·lhs·rhs, or dst += scale·lhs·rhs when `add`. Runs on the calling thread.
///
/// Each output element is one chain of fused multiply-adds over k in ascending order, cut into blocks of k
/// that depend on k alone, provided dst has more than 64 rows or is the same shape each time (for smaller
/// ones the crate has other paths).
pub(super) fn matmul<T: Element>(
    dst: &mut MatMut<'_, T>,
    lhs: Mat<'_, T>,
    rhs: Mat<'_, T>,
    scale: T,
    add: bool,
) {
    let (m, n, k) = (dst.rows, dst.cols, lhs.cols);
    assert!(
        lhs.rows == m && rhs.cols == n && rhs.rows == k,
        "matmul [{m}, {n}] = [{}, {k}]·[{}, {}]",
        lhs.rows,
        rhs.rows,
        rhs.cols
    );
    // The kernels want a destination with contiguous columns: they are given dstᵀ = rhsᵀ·lhsᵀ.
    // SAFETY: the three views are inside live slices with these shapes and strides, dst is exclusively
    // borrowed, and the kernel is the one for T.
    unsafe {
        T::gemm_fn()(
            n,
            m,
            k,
            dst.ptr,
            dst.row_stride as isize,
            1,
            add,
            rhs.ptr,
            rhs.row_stride as isize,
            rhs.col_stride as isize,
            lhs.ptr,
            lhs.row_stride as isize,
            lhs.col_stride as isize,
            T::one(),
            scale,
            false,
            false,
            false,
            gemm_common::Parallelism::None,
        );
    }
}

/// Fewest rows of a matrix product: below, the `gemm` crate takes paths whose rounding depends on the
/// number of rows, and a sample's numbers would depend on its neighbours. Smaller inputs are padded.
const MIN_ROWS: usize = 72;

/// Most columns of an output tile such that the widened weight tile (`depth` × columns) stays in the cache.
/// 128 to 256 columns run as fast as one call on a float32 matrix (measured: 276–318 against 284–320
/// GFLOP/s on 2 cores with AVX-512), while widening a whole layer first costs 10–25 %.
fn tile_columns(depth: usize) -> usize {
    ((1 << 19) / depth.max(1)).clamp(128, 256)
}

/// Cuts `0..n` into the fewest ranges of at most `most`, equally long but for one element: a narrow last
/// tile would take the `gemm` crate's paths for tiny products, which round differently.
pub(super) fn even_ranges(n: usize, most: usize) -> impl Iterator<Item = Range<usize>> + Clone {
    let count = n.div_ceil(most);
    (0..count).map(move |i| i * n / count..(i + 1) * n / count)
}

impl<T: Element> Cpu<T> {
    /// Rows `rows` of a stored `[_, width]` matrix, widened.
    pub(super) fn widen_rows(&self, matrix: &Tensor, rows: Range<usize>, width: usize) -> Buf<T> {
        let mut out = self.alloc(rows.len(), width);
        let row_bytes = width * matrix.dtype.size_bytes();
        let bytes = &matrix.bytes()[rows.start * row_bytes..rows.end * row_bytes];
        self.simd.dispatch(|| T::widen(matrix.dtype, bytes, &mut out));
        out
    }

    /// Columns `cols` of a stored `[rows, width]` matrix, widened. `[rows, cols.len()]`
    fn widen_columns(&self, matrix: &Tensor, cols: Range<usize>, width: usize) -> Buf<T> {
        let rows = matrix.len() / width;
        let mut out = self.alloc(rows, cols.len());
        let size = matrix.dtype.size_bytes();
        let bytes = matrix.bytes();
        self.simd.dispatch(|| {
            for (row, out) in out.chunks_exact_mut(cols.len()).enumerate() {
                let start = (row * width + cols.start) * size;
                T::widen(matrix.dtype, &bytes[start..start + cols.len() * size], out);
            }
        });
        out
    }

    /// A stored vector, widened.
    pub(super) fn widen_vector(&self, vector: &Tensor) -> Buf<T> {
        self.widen_rows(vector, 0..1, vector.len())
    }

    /// `x` with at least `MIN_ROWS` rows, or `None` if it has them already.
    pub(super) fn padded(&self, x: &Buf<T>) -> Option<Buf<T>> {
        (x.rows < MIN_ROWS).then(|| {
            let mut padded = self.zeros(MIN_ROWS, x.width);
            padded[..x.len()].copy_from_slice(x);
            padded
        })
    }

    /// Drops the rows that `padded` added.
    fn truncated(mut x: Buf<T>, rows: usize) -> Buf<T> {
        x.rows = rows;
        x
    }

    pub(super) fn linear_forward(&self, x: &Buf<T>, weight: &Tensor, bias: Option<&Tensor>) -> Buf<T> {
        if let Some(padded) = self.padded(x) {
            return Self::truncated(self.linear_forward(&padded, weight, bias), x.rows);
        }
        let (width, out_width) = (x.width, weight.shape[0]);
        let mut out = self.alloc(x.rows, out_width);
        let bias = bias.map(|bias| self.widen_vector(bias));
        let lhs = Mat::new(x, x.rows, width);
        let ranges: Vec<_> = even_ranges(out_width, tile_columns(width)).collect();
        let tiles = MatMut::new(&mut out, x.rows, out_width).split_columns(ranges.iter().cloned());
        tiles.into_par_iter().zip(ranges).with_max_len(1).for_each(|(mut tile, range)| {
            let weight = self.widen_rows(weight, range.clone(), width);
            matmul(&mut tile, lhs, Mat::new(&weight, range.len(), width).t(), T::one(), false);
            if let Some(bias) = &bias {
                for row in 0..tile.rows {
                    tile.row(row).iter_mut().zip(&bias[range.clone()]).for_each(|(y, &b)| *y += b);
                }
            }
        });
        out
    }

    pub(super) fn linear_adjoint(&self, weight: &Tensor, dy: &Buf<T>, dx: Option<Buf<T>>) -> Buf<T> {
        if let Some(padded) = self.padded(dy) {
            let dx = dx.map(|dx| self.padded(&dx).unwrap_or(dx));
            return Self::truncated(self.linear_adjoint(weight, &padded, dx), dy.rows);
        }
        let (out_width, width) = (dy.width, weight.shape[1]);
        let add = dx.is_some();
        let mut dx = dx.unwrap_or_else(|| self.alloc(dy.rows, width));
        let lhs = Mat::new(dy, dy.rows, out_width);
        let ranges: Vec<_> = even_ranges(width, tile_columns(out_width)).collect();
        let tiles = MatMut::new(&mut dx, dy.rows, width).split_columns(ranges.iter().cloned());
        tiles.into_par_iter().zip(ranges).with_max_len(1).for_each(|(mut tile, range)| {
            let weight = self.widen_columns(weight, range.clone(), width);
            matmul(&mut tile, lhs, Mat::new(&weight, out_width, range.len()), T::one(), add);
        });
        dx
    }
}
