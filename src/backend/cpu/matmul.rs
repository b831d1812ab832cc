//! Strided views of matrices, and their product by float multiply-adds (the `gemm` crates).

use std::marker::PhantomData;
use std::ops::Range;

use super::Element;

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
        // Wrapping, because the start of an empty part may lie outside the slice; it is then not read.
        let ptr = self.ptr.wrapping_add(rows.start * self.row_stride + cols.start * self.col_stride);
        Self { ptr, rows: rows.len(), cols: cols.len(), ..self }
    }

    /// Rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
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
        // Wrapping, because the start of an empty part may lie outside the slice; it is then not touched.
        let ptr = self.ptr.wrapping_add(rows.start * self.row_stride + cols.start);
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

    /// First element, and the distance between rows.
    pub fn raw(&mut self) -> (*mut T, usize) {
        (self.ptr, self.row_stride)
    }

    /// Rows and columns.
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
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
    for (index, depth) in even_ranges(k, MAX_DEPTH).enumerate() {
        let (lhs, rhs) = (lhs.part(0..m, depth.clone()), rhs.part(depth.clone(), 0..n));
        // The kernels want a destination with contiguous columns: they are given dstᵀ = rhsᵀ·lhsᵀ.
        // SAFETY: the three views are inside live slices with these shapes and strides, dst is exclusively
        // borrowed, and the kernel is the one for T.
        unsafe {
            T::gemm_fn()(
                n,
                m,
                depth.len(),
                dst.ptr,
                dst.row_stride as isize,
                1,
                add || index > 0,
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
}

/// Longest chain of multiply-adds. The `gemm` crate cuts longer ones by the size of the first-level cache, so
/// that two processors with the same instructions would round differently; up to here it cuts none.
pub(super) const MAX_DEPTH: usize = 512;

/// Cuts `0..n` into the fewest ranges of at most `most`, equally long but for one element: a narrow last
/// tile would take the `gemm` crate's paths for tiny products, which round differently.
pub(super) fn even_ranges(n: usize, most: usize) -> impl Iterator<Item = Range<usize>> + Clone {
    let count = n.div_ceil(most);
    (0..count).map(move |i| i * n / count..(i + 1) * n / count)
}
