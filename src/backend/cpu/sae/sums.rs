//! Adding up a tile's features over tokens, in float64 and in the order of the corpus: token by token, so that
//! no cut of samples into chunks changes a sum.

use std::ops::Range;

use super::super::Element;
use super::tokens::Chosen;
use crate::backend::{FeatureValues, Moments, Place};

/// Features that are added up side by side, in registers.
const LANES: usize = 32;

/// The part of [`Moments`] for a tile's features.
pub(super) struct TileMoments<'a> {
    sum: &'a mut [f64],
    sum_abs: &'a mut [f64],
    sum_sq: &'a mut [f64],
    max_abs: &'a mut [f64],
}

/// The part of [`FeatureValues`] for a tile's features. Σ|f| is not kept: see [`finish_values`].
pub(super) struct TileValues<'a> {
    sum: &'a mut [f64],
    sum_sq: &'a mut [f64],
    max: &'a mut [f64],
    fired: &'a mut [u64],
    max_at: &'a mut [Place],
}

/// Cuts a slice at ascending ranges that lie side by side.
fn cut<'a, V>(mut slice: &'a mut [V], tiles: &[Range<usize>]) -> impl Iterator<Item = &'a mut [V]> {
    tiles.iter().map(move |tile| {
        let (part, rest) = std::mem::take(&mut slice).split_at_mut(tile.len());
        slice = rest;
        part
    })
}

impl<'a> TileMoments<'a> {
    /// One for each tile; `None`s where there are no sums.
    pub fn cut(moments: Option<&'a mut Moments>, tiles: &[Range<usize>]) -> Vec<Option<Self>> {
        let Some(Moments { sum, sum_abs, sum_sq, max_abs, .. }) = moments else {
            return tiles.iter().map(|_| None).collect();
        };
        cut(sum, tiles)
            .zip(cut(sum_abs, tiles))
            .zip(cut(sum_sq, tiles))
            .zip(cut(max_abs, tiles))
            .map(|(((sum, sum_abs), sum_sq), max_abs)| Some(Self { sum, sum_abs, sum_sq, max_abs }))
            .collect()
    }

    /// Adds one value of a feature.
    #[inline(always)]
    pub fn add<T: Element>(&mut self, feature: usize, value: T) {
        let value = value.as_f64();
        self.sum[feature] += value;
        self.sum_abs[feature] += value.abs();
        self.sum_sq[feature] += value * value;
        self.max_abs[feature] = self.max_abs[feature].max(value.abs());
    }

    /// Adds all rows of `values`, `[rows, tile]`, each times its feature's `scale`. Returns the first row with a
    /// value that is not finite.
    #[inline(always)]
    pub fn add_rows<T: Element>(&mut self, values: &[T], scale: &[T]) -> Option<usize> {
        let mut bad = None;
        let whole = self.sum.len() / LANES * LANES;
        for from in (0..whole).step_by(LANES) {
            bad = first(bad, self.add_lanes::<T, LANES>(values, scale, from));
        }
        for from in whole..self.sum.len() {
            bad = first(bad, self.add_lanes::<T, 1>(values, scale, from));
        }
        bad
    }

    #[inline(always)]
    fn add_lanes<T: Element, const N: usize>(
        &mut self,
        values: &[T],
        scale: &[T],
        from: usize,
    ) -> Option<usize> {
        let lanes = from..from + N;
        let [mut sum, mut sum_abs, mut sum_sq] = [[0f64; N]; 3];
        sum.copy_from_slice(&self.sum[lanes.clone()]);
        sum_abs.copy_from_slice(&self.sum_abs[lanes.clone()]);
        sum_sq.copy_from_slice(&self.sum_sq[lanes.clone()]);
        let mut factor = [T::zero(); N];
        factor.copy_from_slice(&scale[lanes.clone()]);
        let mut max = [T::zero(); N];
        for row in values.chunks_exact(self.sum.len()) {
            let Some(row) = row[from..].first_chunk::<N>() else { break };
            for j in 0..N {
                let value = row[j] * factor[j];
                let (magnitude, wide) = (value.abs(), value.as_f64());
                sum[j] += wide;
                sum_abs[j] += wide.abs();
                sum_sq[j] += wide * wide;
                max[j] = if magnitude > max[j] { magnitude } else { max[j] };
            }
        }
        self.sum[lanes.clone()].copy_from_slice(&sum);
        self.sum_abs[lanes.clone()].copy_from_slice(&sum_abs);
        self.sum_sq[lanes.clone()].copy_from_slice(&sum_sq);
        let maxima = self.max_abs[lanes.clone()].iter_mut().zip(max);
        maxima.for_each(|(to, max)| *to = to.max(max.as_f64()));
        let finite = sum_abs.iter().all(|sum| sum.is_finite());
        // A product with its scale may be beyond the numbers where the value is not.
        (!finite).then(|| bad_row(values, self.sum.len(), lanes).unwrap_or(0))
    }
}

impl<'a> TileValues<'a> {
    /// One for each tile; `None`s where there are no sums.
    pub fn cut(values: Option<&'a mut FeatureValues>, tiles: &[Range<usize>]) -> Vec<Option<Self>> {
        let Some(FeatureValues { moments, fired, max_at }) = values else {
            return tiles.iter().map(|_| None).collect();
        };
        cut(&mut moments.sum, tiles)
            .zip(cut(&mut moments.sum_sq, tiles))
            .zip(cut(&mut moments.max_abs, tiles))
            .zip(cut(fired, tiles))
            .zip(cut(max_at, tiles))
            .map(|((((sum, sum_sq), max), fired), max_at)| Some(Self { sum, sum_sq, max, fired, max_at }))
            .collect()
    }

    /// Adds one activation of a feature, at a place after all before.
    #[inline(always)]
    pub fn add<T: Element>(&mut self, feature: usize, value: T, place: Place) {
        let value = value.as_f64();
        self.sum[feature] += value;
        self.sum_sq[feature] += value * value;
        self.fired[feature] += u64::from(value > 0.0);
        if value > self.max[feature] {
            (self.max[feature], self.max_at[feature]) = (value, place);
        }
    }

    /// Adds rows `first_row`… of activations, `[rows, tile]`. Returns the first of them (from 0) with a value that
    /// is not finite.
    #[inline(always)]
    pub fn add_rows<T: Element>(&mut self, f: &[T], first_row: usize, chosen: &Chosen) -> Option<usize> {
        let mut bad = None;
        let whole = self.sum.len() / LANES * LANES;
        for from in (0..whole).step_by(LANES) {
            bad = first(bad, self.add_lanes::<T, LANES>(f, first_row, chosen, from));
        }
        for from in whole..self.sum.len() {
            bad = first(bad, self.add_lanes::<T, 1>(f, first_row, chosen, from));
        }
        bad
    }

    #[inline(always)]
    fn add_lanes<T: Element, const N: usize>(
        &mut self,
        f: &[T],
        first_row: usize,
        chosen: &Chosen,
        from: usize,
    ) -> Option<usize> {
        let lanes = from..from + N;
        let [mut sum, mut sum_sq] = [[0f64; N]; 2];
        sum.copy_from_slice(&self.sum[lanes.clone()]);
        sum_sq.copy_from_slice(&self.sum_sq[lanes.clone()]);
        let mut max = [T::zero(); N];
        let [mut max_row, mut fired] = [[0u32; N]; 2];
        for (row, values) in f.chunks_exact(self.sum.len()).enumerate() {
            let Some(values) = values[from..].first_chunk::<N>() else { break };
            for j in 0..N {
                let wide = values[j].as_f64();
                sum[j] += wide;
                sum_sq[j] += wide * wide;
                fired[j] += u32::from(values[j] > T::zero());
                let larger = values[j] > max[j];
                max[j] = if larger { values[j] } else { max[j] };
                max_row[j] = if larger { row as u32 } else { max_row[j] };
            }
        }
        self.sum[lanes.clone()].copy_from_slice(&sum);
        self.sum_sq[lanes.clone()].copy_from_slice(&sum_sq);
        for j in 0..N {
            self.fired[from + j] += u64::from(fired[j]);
            if max[j].as_f64() > self.max[from + j] {
                self.max[from + j] = max[j].as_f64();
                self.max_at[from + j] = chosen.places[first_row + max_row[j] as usize];
            }
        }
        let finite = sum.iter().all(|sum| sum.is_finite());
        (!finite).then(|| bad_row(f, self.sum.len(), lanes)).flatten()
    }
}

/// What the sums over all values leave to do: no activation is negative.
pub(super) fn finish_values(values: &mut FeatureValues, count: u64) {
    values.moments.sum_abs.copy_from_slice(&values.moments.sum);
    values.moments.count += count;
}

/// The smaller of two rows that may not be.
pub(super) fn first(a: Option<usize>, b: Option<usize>) -> Option<usize> {
    a.into_iter().chain(b).min()
}

/// The first row with a value that is not finite in these columns.
#[cold]
fn bad_row<T: Element>(values: &[T], width: usize, columns: Range<usize>) -> Option<usize> {
    let finite = |row: &[T]| row[columns.clone()].iter().all(|value| value.is_finite());
    values.chunks_exact(width).position(|row| !finite(row))
}
