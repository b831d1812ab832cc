//! The linear op, forward and backward, over tiles of output columns.

use std::ops::Range;

use rayon::prelude::*;

use super::matmul::{MatMut, even_ranges};
use super::product::product;
use super::{Buf, Cpu, Element};
use crate::model::Tensor;

/// Most columns of an output tile such that the weight tile (`depth` × columns) stays in the cache. With
/// multiply-adds, 128 to 256 columns run as fast as one call on a float32 matrix (276–318 against 284–320
/// GFLOP/s on 2 cores with AVX-512), while widening a whole layer first costs 10–25 %.
fn tile_columns(depth: usize) -> usize {
    ((1 << 19) / depth.max(1)).clamp(128, 256)
}

impl<T: Element> Cpu<T> {
    /// Ranges of output columns, one task each. The tile unit computes whole blocks of 32 columns and reads
    /// the left operand once per task, so it wants wider tasks: with 128 columns it loses a fifth.
    pub(super) fn column_ranges(&self, cols: usize, depth: usize) -> Vec<Range<usize>> {
        let (unit, most) = if self.tiles.is_some() { (32, 256 / 32) } else { (1, tile_columns(depth)) };
        let in_columns = |range: Range<usize>| range.start * unit..cols.min(range.end * unit);
        even_ranges(cols.div_ceil(unit), most).map(in_columns).collect()
    }

    pub(super) fn linear_forward(&self, x: &Buf<T>, weight: &Tensor, bias: Option<&Tensor>) -> Buf<T> {
        if let Some(padded) = self.padded(x) {
            return Self::truncated(self.linear_forward(&padded, weight, bias), x.rows);
        }
        let (width, out_width) = (x.width, weight.shape[0]);
        let mut out = self.alloc(x.rows, out_width);
        let bias = bias.map(|bias| self.widen_vector(bias));
        let mut space = self.left_space(x.rows, width);
        let left = self.left(x, x.rows, width, &mut space);
        let ranges = self.column_ranges(out_width, width);
        let tiles = MatMut::new(&mut out, x.rows, out_width).split_columns(ranges.iter().cloned());
        tiles.into_par_iter().zip(ranges).with_max_len(1).for_each(|(mut tile, range)| {
            let mut space = self.right_space(weight.dtype, width, range.len());
            let right = self.right_of_rows(weight, range.clone(), &mut space);
            product(&mut tile, &left, &right, false);
            if let Some(bias) = &bias {
                for row in 0..tile.shape().0 {
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
        let mut space = self.left_space(dy.rows, out_width);
        let left = self.left(dy, dy.rows, out_width, &mut space);
        let ranges = self.column_ranges(width, out_width);
        let tiles = MatMut::new(&mut dx, dy.rows, width).split_columns(ranges.iter().cloned());
        tiles.into_par_iter().zip(ranges).with_max_len(1).for_each(|(mut tile, range)| {
            let mut space = self.right_space(weight.dtype, out_width, range.len());
            let right = self.right_of_columns(weight, 0..out_width, range, &mut space);
            product(&mut tile, &left, &right, add);
        });
        dx
    }
}
