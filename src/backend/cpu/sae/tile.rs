//! Tiles of an SAE's matrices: products with all features of a tile, and the rows of single ones.

use std::ops::Range;

use super::super::matmul::{MatMut, even_ranges};
use super::super::product::{Left, product};
use super::super::{Buf, Cpu, Element};
use crate::model::sae::FeatureMatrix;

/// Most tokens of a block, in units of [`UNIT`]: with a tile's 256 features, a block of products stays in the
/// second-level cache until it is added up.
const BLOCK_UNITS: usize = 32;
/// Rows of a block of the tile unit.
const UNIT: usize = 32;

/// Ranges of rows, one product each.
pub(super) fn row_blocks(rows: usize) -> impl Iterator<Item = Range<usize>> {
    even_ranges(rows.div_ceil(UNIT), BLOCK_UNITS)
        .map(move |units| units.start * UNIT..rows.min(units.end * UNIT))
}

impl<T: Element> Cpu<T> {
    /// Features of each task.
    pub(super) fn sae_tiles(&self, matrix: &FeatureMatrix) -> Vec<Range<usize>> {
        self.column_ranges(matrix.num_features(), matrix.width())
    }

    /// Hands over left·Wᵀ for the features of a tile, block by block of rows in ascending order: the rows, and
    /// their products `[rows, tile]`. `left` may have rows beyond `count`, which are left out.
    pub(super) fn sae_products(
        &self,
        matrix: &FeatureMatrix,
        left: &Left<'_, T>,
        count: usize,
        tile: Range<usize>,
        mut on_block: impl FnMut(Range<usize>, &mut [T]),
    ) {
        let (width, features) = (matrix.width(), tile.len());
        let mut space = self.right_space(matrix.tensor.dtype, width, features);
        let right = match matrix.features_first {
            true => self.right_of_rows(&matrix.tensor, tile, &mut space),
            false => self.right_of_columns(&matrix.tensor, 0..width, tile, &mut space),
        };
        let blocks: Vec<Range<usize>> = row_blocks(left.rows()).collect();
        let most = blocks.iter().map(|rows| rows.len()).max().unwrap_or(0);
        let mut products = self.alloc(most, features);
        for rows in blocks {
            let mut out = MatMut::new(&mut products, rows.len(), features);
            product(&mut out, &left.part(rows.clone()), &right, false);
            let real = rows.start..rows.end.min(count);
            on_block(real.clone(), &mut products[..real.len() * features]);
        }
    }

    /// Columns `cols` of the rows of a tile's features, widened, `[tile, cols]`.
    pub(super) fn sae_feature_rows(
        &self,
        matrix: &FeatureMatrix,
        tile: Range<usize>,
        cols: Range<usize>,
    ) -> Buf<T> {
        /// Columns that are widened before they are written along rows.
        const COLUMNS: usize = 16;
        let mut out = self.alloc(tile.len(), cols.len());
        let (bytes, dtype) = (matrix.tensor.bytes(), matrix.tensor.dtype);
        let stored = |row: usize, within: &Range<usize>| {
            let start = row * matrix.tensor.shape[1];
            &bytes[(start + within.start) * dtype.size_bytes()..(start + within.end) * dtype.size_bytes()]
        };
        self.vectorised(
            #[inline(always)]
            || {
                if matrix.features_first {
                    for (feature, out) in tile.clone().zip(out.chunks_exact_mut(cols.len())) {
                        T::widen(dtype, stored(feature, &cols), out);
                    }
                    return;
                }
                let features = tile.len();
                let mut columns = vec![T::zero(); COLUMNS * features];
                for (index, first) in cols.clone().step_by(COLUMNS).enumerate() {
                    let some = first..cols.end.min(first + COLUMNS);
                    for (column, to) in some.clone().zip(columns.chunks_exact_mut(features)) {
                        T::widen(dtype, stored(column, &tile), to);
                    }
                    for (feature, out) in out.chunks_exact_mut(cols.len()).enumerate() {
                        let out = &mut out[index * COLUMNS..][..some.len()];
                        out.iter_mut()
                            .enumerate()
                            .for_each(|(j, out)| *out = columns[j * features + feature]);
                    }
                }
            },
        );
        out
    }
}
