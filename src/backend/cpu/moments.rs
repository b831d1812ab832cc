//! Per-dimension sums over the rows of each sample, and norms of rows, in float64.

use std::ops::Range;

use rayon::prelude::*;

use super::{Buf, Cpu, Element};
use crate::backend::{Moments, NonFinite};

/// Dimensions of one task.
const COLUMNS: usize = 128;

impl<T: Element> Cpu<T> {
    pub(super) fn add_moments(
        &self,
        x: &Buf<T>,
        samples: &[Range<usize>],
        into: &mut Moments,
    ) -> Result<(), NonFinite> {
        let width = x.width;
        let bad = into
            .sum
            .par_chunks_mut(COLUMNS)
            .zip(into.sum_abs.par_chunks_mut(COLUMNS))
            .zip(into.sum_sq.par_chunks_mut(COLUMNS))
            .zip(into.max_abs.par_chunks_mut(COLUMNS))
            .enumerate()
            .filter_map(|(block, (((sum, sum_abs), sum_sq), max_abs))| {
                let columns = block * COLUMNS..block * COLUMNS + sum.len();
                self.vectorised(
                    #[inline(always)]
                    || {
                        let mut bad = None;
                        for (index, rows) in samples.iter().enumerate() {
                            let [mut s, mut s_abs, mut s_sq] = [[0f64; COLUMNS]; 3];
                            for row in rows.clone() {
                                let values = &x[row * width + columns.start..row * width + columns.end];
                                for (j, &value) in values.iter().enumerate() {
                                    let value = value.as_f64();
                                    s[j] += value;
                                    s_abs[j] += value.abs();
                                    s_sq[j] += value * value;
                                    max_abs[j] =
                                        if value.abs() > max_abs[j] { value.abs() } else { max_abs[j] };
                                }
                            }
                            for j in 0..columns.len() {
                                sum[j] += s[j];
                                sum_abs[j] += s_abs[j];
                                sum_sq[j] += s_sq[j];
                            }
                            if bad.is_none() && s_abs.iter().any(|s| !s.is_finite()) {
                                bad = Some(index);
                            }
                        }
                        bad
                    },
                )
            })
            .min();
        into.count += samples.iter().map(|rows| rows.len() as u64).sum::<u64>();
        bad.map_or(Ok(()), |sample| Err(NonFinite(sample)))
    }

    /// ‖x‖₂ of each row, in float64.
    pub(super) fn norms_of_rows(&self, x: &Buf<T>) -> Vec<f64> {
        /// Sums of a row that are added up side by side.
        const LANES: usize = 8;
        let of_row = |row: &[T]| {
            self.vectorised(
                #[inline(always)]
                || {
                    let mut sums = [0f64; LANES];
                    let (whole, rest) = row.as_chunks::<LANES>();
                    for values in whole {
                        for (sum, value) in sums.iter_mut().zip(values) {
                            *sum += value.as_f64() * value.as_f64();
                        }
                    }
                    for (sum, value) in sums.iter_mut().zip(rest) {
                        *sum += value.as_f64() * value.as_f64();
                    }
                    sums.iter().sum::<f64>().sqrt()
                },
            )
        };
        x.par_chunks_exact(x.width).map(of_row).collect()
    }
}
