//! x̂, and what is computed with whole rows of W_dec.

use std::ops::Range;

use rayon::prelude::*;

use super::super::matmul::{MatMut, even_ranges};
use super::super::{Buf, Cpu, Element};
use super::encode::{Codes, scale_of};
use super::sums::{TileValues, finish_values};
use super::tokens::{Chosen, TokenNorm};
use super::{contest, tile};
use crate::backend::{FeatureValues, Fit, Positions};
use crate::model::sae::{FeatureMatrix, SaeActivation, SaeWeights};

/// Columns of x̂ that a task adds up at a time, in registers.
const COLUMNS: usize = 64;
/// Least tiles that are encoded before they are decoded: their activations, at worst all of them, are held.
const BAND: usize = 16;

/// Tiles that are encoded before they are decoded.
fn band() -> usize {
    BAND.max(2 * rayon::current_num_threads())
}

impl<T: Element> Cpu<T> {
    pub(super) fn sae_reconstruct(
        &self,
        sae: &SaeWeights,
        at: &Positions,
        x: &Buf<T>,
        mut values: Option<&mut FeatureValues>,
        fit: Option<&mut Fit>,
    ) -> Buf<T> {
        let mut out = self.from_slice(x, x.width);
        let chosen = Chosen::new(at);
        let (count, width) = (chosen.len(), x.width);
        if count == 0 {
            return out;
        }
        let (inputs, norms) = self.sae_inputs(sae, &chosen, x);
        let rows = inputs.values.rows;
        let mut space = self.left_space(rows, width);
        let left = self.left(&inputs.values, rows, width, &mut space);
        let tokens = contest(sae).map(|contest| self.sae_select(sae, contest, &left, count).0);
        let tiles = self.sae_tiles(&sae.encoder);
        let mut decoded = self.zeros(count, width);
        let mut fired = 0;
        {
            // Where features are known, their values are added at once.
            let by_tile = match (&tokens, values.as_deref_mut()) {
                (Some(tokens), Some(values)) => {
                    self.sae_add_code_values(tokens, &chosen, values);
                    None
                }
                (_, values) => values,
            };
            let mut sums = TileValues::cut(by_tile, &tiles);
            for (tiles, sums) in tiles.chunks(band()).zip(sums.chunks_mut(band())) {
                let of_tile = |(tile, sums): (&Range<usize>, &mut Option<TileValues<'_>>)| {
                    let mut codes = match &tokens {
                        Some(tokens) => Codes::of_tile(tokens, tile.clone()),
                        None => {
                            let mut codes = Codes::new();
                            self.sae_encode(
                                sae,
                                &left,
                                &chosen,
                                tile.clone(),
                                sums.as_mut(),
                                Some(&mut codes),
                            );
                            codes
                        }
                    };
                    if sae.decoder_scale.is_some() {
                        codes.scale(&scale_of::<T>(sae.decoder_scale.as_deref(), tile.clone()));
                    }
                    codes
                };
                let codes: Vec<Codes<T>> = tiles.par_iter().zip(sums).with_max_len(1).map(of_tile).collect();
                let counted = |codes: &Codes<T>| -> u64 {
                    let rows = codes.rows().zip(&chosen.places).filter(|(_, place)| place.position > 0);
                    rows.map(|(entries, _)| entries.len() as u64).sum()
                };
                fired += codes.iter().map(counted).sum::<u64>();
                self.sae_decode(&sae.decoder, tiles, &codes, &mut decoded);
            }
        }
        if let Some(values) = values {
            finish_values(values, at.count(1));
        }
        self.sae_finish(sae, &norms, &mut decoded);
        if let Some(fit) = fit {
            fit.fired += fired;
            self.sae_add_fit(&chosen, x, &decoded, fit);
        }
        for (&row, decoded) in chosen.rows.iter().zip(decoded.chunks_exact(width)) {
            out[row * width..][..width].copy_from_slice(decoded);
        }
        out
    }

    /// `into` += f·W_dec of these tiles, feature by feature.
    fn sae_decode(
        &self,
        decoder: &FeatureMatrix,
        tiles: &[Range<usize>],
        codes: &[Codes<T>],
        into: &mut Buf<T>,
    ) {
        let (rows, width) = (into.rows, into.width);
        let ranges: Vec<Range<usize>> = even_ranges(width, COLUMNS).collect();
        let parts = MatMut::new(into, rows, width).split_columns(ranges.iter().cloned());
        parts.into_par_iter().zip(ranges).with_max_len(1).for_each(|(mut part, cols)| {
            for (tile, codes) in tiles.iter().zip(codes).filter(|(_, codes)| codes.len() > 0) {
                let weights = self.sae_feature_rows(decoder, tile.clone(), cols.clone());
                self.simd.dispatch(|| {
                    for (row, entries) in codes.rows().enumerate().filter(|(_, entries)| !entries.is_empty())
                    {
                        let mut sums = [T::zero(); COLUMNS];
                        let out = part.row(row);
                        sums[..out.len()].copy_from_slice(out);
                        for &(feature, f) in entries {
                            let weights = &weights[feature as usize * cols.len()..][..cols.len()];
                            match weights.first_chunk::<COLUMNS>() {
                                Some(weights) => (0..COLUMNS).for_each(|j| sums[j] += f * weights[j]),
                                None => sums.iter_mut().zip(weights).for_each(|(sum, &w)| *sum += f * w),
                            }
                        }
                        out.copy_from_slice(&sums[..out.len()]);
                    }
                });
            }
        });
    }

    /// Adds the decoder's bias and undoes the norms, in place.
    fn sae_finish(&self, sae: &SaeWeights, norms: &[TokenNorm], decoded: &mut Buf<T>) {
        let width = decoded.width;
        decoded.par_chunks_exact_mut(width).zip(norms).for_each(|(decoded, norm)| {
            let (factor, mean) = (T::of(norm.factor), T::of(norm.mean));
            for (out, &bias) in decoded.iter_mut().zip(&sae.decoder_bias) {
                *out = (*out + T::of_f32(bias)) * factor + mean;
            }
        });
    }

    /// Position 0 of a sample is left out: many models dump there what they have no use for.
    fn sae_add_fit(&self, chosen: &Chosen, x: &Buf<T>, decoded: &Buf<T>, fit: &mut Fit) {
        let width = x.width;
        fit.sum.resize(width, 0.0);
        let rows = chosen.rows.iter().zip(&chosen.places).zip(decoded.chunks_exact(width));
        for ((&row, _), decoded) in rows.filter(|((_, place), _)| place.position > 0) {
            fit.tokens += 1;
            let x = &x[row * width..][..width];
            let (mut residual, mut sum_sq) = (0.0, 0.0);
            for ((sum, x), decoded) in fit.sum.iter_mut().zip(x).zip(decoded) {
                let (x, left) = (x.as_f64(), x.as_f64() - decoded.as_f64());
                *sum += x;
                sum_sq += x * x;
                residual += left * left;
            }
            fit.residual += residual;
            fit.sum_sq += sum_sq;
        }
    }

    pub(super) fn sae_decode_gradient(&self, sae: &SaeWeights, v: &[f64]) -> Vec<f64> {
        let wide = Cpu::<f64>::with_multiply_adds();
        let mut out = vec![0.0; sae.num_features()];
        /// Features of a task.
        const FEATURES: usize = 128;
        out.par_chunks_mut(FEATURES).enumerate().for_each(|(block, out)| {
            let tile = block * FEATURES..block * FEATURES + out.len();
            let rows = wide.sae_feature_rows(&sae.decoder, tile.clone(), 0..v.len());
            let scale = scale_of::<f64>(sae.decoder_scale.as_deref(), tile);
            self.simd.dispatch(|| {
                for ((out, row), scale) in out.iter_mut().zip(rows.chunks_exact(v.len())).zip(scale) {
                    *out = super::super::norm::dot(row, v) * scale;
                }
            });
        });
        out
    }

    pub(super) fn sae_workspace(&self, sae: &SaeWeights, tokens: usize) -> u64 {
        let (width, features) = (sae.width(), sae.num_features());
        let threads = rayon::current_num_threads();
        let rows = tokens.max(super::super::product::MIN_ROWS);
        let tile = self.sae_tiles(&sae.encoder).iter().map(|tile| tile.len()).max().unwrap_or(0);
        let block = tile::row_blocks(rows).map(|rows| rows.len()).max().unwrap_or(0);
        // x̃ and g' (before and after padding), x̂, and the left operand of each.
        let per_chunk = 3 * rows * width + 2 * self.left_space_elements(rows, width);
        // The weight tile, as it is multiplied and as rows; products; constants.
        let right = self
            .right_space_elements(sae.encoder.tensor.dtype, width, tile)
            .max(self.right_space_elements(sae.decoder.tensor.dtype, width, tile));
        let per_thread = right + tile * width + 16 * tile + block * tile + 6 * tile;
        let entry = size_of::<(u32, T)>();
        let codes = match sae.activation {
            SaeActivation::TopK { k } | SaeActivation::GroupMax { k } => 3 * k * entry + 128,
            // All features of a band may fire, and a growing vector is twice as long.
            _ => 3 * band().max(threads) * tile.min(features) * entry,
        };
        ((per_chunk + threads * per_thread) * size_of::<T>() + rows * (codes + 128)) as u64
    }
}
