//! Sparse autoencoders, over tiles of features.
//!
//! A task multiplies all tokens with the features of one tile, block by block, and adds each block up while it is in
//! the cache: no more than that block of the `[N, F]` matrix exists. Where few activations are not zero, what is
//! computed for each of them ([`encode::Codes`]) is one row of W_dec: gradients and reconstructions cost little beside
//! the encoder.

mod encode;
mod reconstruct;
mod select;
mod sums;
mod tile;
mod tokens;

use std::ops::Range;

use rayon::prelude::*;

use super::matmul::{Mat, MatMut, matmul};
use super::product::{Left, MIN_ROWS};
use super::{Buf, Cpu, Element};
use crate::backend::{
    FeatureSums, FeatureValues, Fit, Moments, NonFinite, Positions, SaeBackend, SaeGradient,
};
use crate::error::Result;
use crate::model::sae::{SaeActivation, SaeWeights};
use encode::{Code, Codes, Constants, scale_of};
use select::Contest;
use sums::{TileMoments, TileValues, finish_values, first};
use tokens::Chosen;

/// How the features of an SAE compete, if they do.
fn contest(sae: &SaeWeights) -> Option<Contest> {
    match sae.activation {
        SaeActivation::TopK { k } => Some(Contest::All { k }),
        SaeActivation::GroupMax { k } => Some(Contest::Groups { size: sae.num_features() / k }),
        _ => None,
    }
}

/// Sums of features that fire, for one tile.
struct Firing<'a> {
    values: Option<TileValues<'a>>,
    /// Of [`SaeGradient::Active`].
    gradients: Option<TileMoments<'a>>,
    attribution: Option<TileMoments<'a>>,
}

impl<T: Element> Cpu<T> {
    /// Σ over all features and tokens of `scale ∘ (g' W_decᵀ)`.
    fn sae_add_gradients(
        &self,
        sae: &SaeWeights,
        left: &Left<'_, T>,
        count: usize,
        into: &mut Moments,
    ) -> Option<usize> {
        let tiles = self.sae_tiles(&sae.decoder);
        let sums = TileMoments::cut(Some(into), &tiles);
        let of_tile = |(tile, sums): (Range<usize>, Option<TileMoments<'_>>)| {
            let mut sums = sums?;
            let scale = scale_of::<T>(sae.decoder_scale.as_deref(), tile.clone());
            let mut bad = None;
            self.sae_products(&sae.decoder, left, count, tile, |rows, products| {
                let found = self.vectorised(
                    #[inline(always)]
                    || sums.add_rows(products, &scale),
                );
                bad = first(bad, found.map(|row| rows.start + row));
            });
            bad
        };
        tiles.into_par_iter().zip(sums).with_max_len(1).filter_map(of_tile).min()
    }

    /// The sums of one tile whose features decide one by one.
    fn sae_add_firing(
        &self,
        sae: &SaeWeights,
        left: &Left<'_, T>,
        chosen: &Chosen,
        gradients: Option<&Buf<T>>,
        tile: Range<usize>,
        mut sums: Firing<'_>,
    ) -> Option<usize> {
        let mut codes = gradients.map(|_| Codes::new(tile.len()));
        let bad = self.sae_encode(sae, left, chosen, tile.clone(), sums.values.as_mut(), codes.as_mut());
        match (codes, gradients) {
            (Some(codes), Some(gradients)) => {
                first(bad, self.sae_add_code_gradients(sae, &codes, gradients, tile, &mut sums))
            }
            _ => bad,
        }
    }

    /// The activations of one tile whose features decide one by one, added to `values` and to `codes`.
    fn sae_encode(
        &self,
        sae: &SaeWeights,
        left: &Left<'_, T>,
        chosen: &Chosen,
        tile: Range<usize>,
        mut values: Option<&mut TileValues<'_>>,
        mut codes: Option<&mut Codes<T>>,
    ) -> Option<usize> {
        let constants = Constants::<T>::new(sae, tile.clone());
        let mut bad = None;
        self.sae_products(&sae.encoder, left, chosen.len(), tile.clone(), |rows, z| {
            self.vectorised(
                #[inline(always)]
                || {
                    constants.activations(z);
                    if let Some(values) = &mut values {
                        let found = values.add_rows(z, rows.start, chosen);
                        bad = first(bad, found.map(|row| rows.start + row));
                    }
                    if let Some(codes) = &mut codes {
                        codes.push_rows(z);
                    }
                },
            );
        });
        bad
    }

    /// Adds the values of features that are known.
    fn sae_add_code_values(&self, tokens: &[Vec<(u32, T)>], chosen: &Chosen, values: &mut FeatureValues) {
        let all = 0..values.fired.len();
        for values in TileValues::cut(Some(values), &[all]).iter_mut().flatten() {
            for (features, &place) in tokens.iter().zip(&chosen.places) {
                features.iter().for_each(|&(feature, f)| values.add(feature as usize, f, place));
            }
        }
    }

    /// Adds dL/df and f·dL/df of a tile's features where f > 0. `gradients` are g', `[M, D]`.
    fn sae_add_code_gradients(
        &self,
        sae: &SaeWeights,
        codes: &Codes<T>,
        gradients: &Buf<T>,
        tile: Range<usize>,
        sums: &mut Firing<'_>,
    ) -> Option<usize> {
        if codes.fired() == 0 {
            return None;
        }
        let (width, features) = (gradients.width, tile.len());
        let scale = scale_of::<T>(sae.decoder_scale.as_deref(), tile.clone());
        let decoder = self.sae_feature_rows(&sae.decoder, tile, 0..width);
        let products = self.sae_dense_products(codes, gradients, Mat::new(&decoder, features, width).t());
        let mut products = products.chunks_exact(features);
        let mut bad = None;
        self.vectorised(
            #[inline(always)]
            || {
                let mut add = |row: usize, feature: usize, f: T, along: T| {
                    let value = along * scale[feature];
                    if let Some(sums) = &mut sums.gradients {
                        sums.add(feature, value);
                    }
                    if let Some(sums) = &mut sums.attribution {
                        sums.add(feature, f * value);
                    }
                    if !(f * value).is_finite() {
                        bad = first(bad, Some(row));
                    }
                };
                for (row, (code, gradient)) in codes.rows().zip(gradients.chunks_exact(width)).enumerate() {
                    match code {
                        Code::Few(entries) => {
                            for &(feature, f) in entries {
                                let feature = feature as usize;
                                let weights = &decoder[feature * width..][..width];
                                add(row, feature, f, super::norm::dot(gradient, weights));
                            }
                        }
                        Code::Many(f) => {
                            let values = products.next().into_iter().flatten().zip(f).enumerate();
                            for (feature, (&along, &f)) in values.filter(|(_, (_, f))| **f != T::zero()) {
                                add(row, feature, f, along);
                            }
                        }
                    }
                }
            },
        );
        bad
    }

    /// Of the rows with many features: g'·W, one below the other.
    fn sae_dense_products(&self, codes: &Codes<T>, gradients: &Buf<T>, weights: Mat<'_, T>) -> Buf<T> {
        let (depth, cols) = weights.shape();
        let rows = codes.many_rows();
        let count = if rows.is_empty() { 0 } else { rows.len().max(MIN_ROWS) };
        let mut left = self.zeros(count, depth);
        for (to, &row) in left.chunks_exact_mut(depth).zip(rows) {
            to.copy_from_slice(&gradients[row * depth..][..depth]);
        }
        let mut products = self.alloc(count, cols);
        if count > 0 {
            let mut out = MatMut::new(&mut products, count, cols);
            matmul(&mut out, Mat::new(&left, count, depth), weights, T::one(), false);
        }
        products
    }

    /// What is added where features fire: values, active gradients, attribution.
    fn sae_firing(
        &self,
        sae: &SaeWeights,
        chosen: &Chosen,
        left: &Left<'_, T>,
        gradients: Option<&Buf<T>>,
        mut values: Option<&mut FeatureValues>,
        active: Option<&mut Moments>,
        attribution: Option<&mut Moments>,
    ) -> Option<usize> {
        let tiles = self.sae_tiles(&sae.encoder);
        let (tokens, mut bad) = match contest(sae) {
            Some(contest) => {
                let (tokens, bad) = self.sae_select(sae, contest, left, chosen.len());
                if let Some(values) = values.take() {
                    self.sae_add_code_values(&tokens, chosen, values);
                }
                (Some(tokens), bad)
            }
            None => (None, None),
        };
        if tokens.is_none() || gradients.is_some() {
            let sums = TileValues::cut(values, &tiles)
                .into_iter()
                .zip(TileMoments::cut(active, &tiles))
                .zip(TileMoments::cut(attribution, &tiles))
                .map(|((values, gradients), attribution)| Firing { values, gradients, attribution })
                .collect::<Vec<_>>();
            let of_tile = |(tile, mut sums): (Range<usize>, Firing<'_>)| match (&tokens, gradients) {
                (None, gradients) => self.sae_add_firing(sae, left, chosen, gradients, tile, sums),
                (Some(tokens), Some(gradients)) => {
                    let codes = Codes::of_tile(tokens, tile.clone());
                    self.sae_add_code_gradients(sae, &codes, gradients, tile, &mut sums)
                }
                (Some(_), None) => None,
            };
            let found = tiles.into_par_iter().zip(sums).with_max_len(1).filter_map(of_tile).min();
            bad = first(bad, found);
        }
        bad
    }
}

impl<T: Element> SaeBackend for Cpu<T> {
    fn copy(&self, x: &Buf<T>) -> Result<Buf<T>> {
        Ok(self.from_slice(x, x.width))
    }

    fn features(
        &self,
        sae: &SaeWeights,
        at: &Positions,
        x: Option<&Buf<T>>,
        dx: Option<&Buf<T>>,
        gradient: SaeGradient,
        into: &mut FeatureSums,
    ) -> Result<std::result::Result<(), NonFinite>> {
        let chosen = Chosen::new(at);
        let (count, width) = (chosen.len(), sae.width());
        if count == 0 {
            return Ok(Ok(()));
        }
        let active = gradient == SaeGradient::Active;
        let FeatureSums { values, gradients, attribution } = into;
        let values = values.as_mut().filter(|_| x.is_some());
        let gradients = gradients.as_mut().filter(|_| dx.is_some());
        let attribution = attribution.as_mut().filter(|_| x.is_some() && dx.is_some());
        assert!(!(active && gradients.is_some() && x.is_none()), "active gradients need the SAE's input");
        let counted = at.count(2);
        let mut bad = None;

        let output_gradients = match dx {
            Some(dx) if gradients.is_some() || attribution.is_some() => {
                let gathered = self.sae_output_gradients(sae, &chosen, x, dx);
                bad = first(bad, gathered.bad);
                Some(gathered.values)
            }
            _ => None,
        };
        let (mut all_gradients, mut active_gradients) = match active {
            true => (None, gradients),
            false => (gradients, None),
        };
        if let (Some(into), Some(output_gradients)) = (&mut all_gradients, &output_gradients) {
            let rows = output_gradients.rows;
            let mut space = self.left_space(rows, width);
            let left = self.left(output_gradients, rows, width, &mut space);
            bad = first(bad, self.sae_add_gradients(sae, &left, count, into));
            into.count += counted;
        }
        let at_codes = active_gradients.is_some() || attribution.is_some();
        if let Some(x) = x
            && (values.is_some() || at_codes)
        {
            let (inputs, _) = self.sae_inputs(sae, &chosen, x);
            bad = first(bad, inputs.bad);
            let rows = inputs.values.rows;
            let mut space = self.left_space(rows, width);
            let left = self.left(&inputs.values, rows, width, &mut space);
            let output_gradients = output_gradients.as_ref().filter(|_| at_codes);
            let mut values = values;
            let mut attribution = attribution;
            let found = self.sae_firing(
                sae,
                &chosen,
                &left,
                output_gradients,
                values.as_deref_mut(),
                active_gradients.as_deref_mut(),
                attribution.as_deref_mut(),
            );
            bad = first(bad, found);
            if let Some(values) = values {
                finish_values(values, at.count(1));
            }
            active_gradients.into_iter().chain(attribution).for_each(|sums| sums.count += counted);
        }
        Ok(chosen.finite(bad))
    }

    fn reconstruct(
        &self,
        sae: &SaeWeights,
        at: &Positions,
        x: &Buf<T>,
        values: Option<&mut FeatureValues>,
        fit: Option<&mut Fit>,
    ) -> Result<std::result::Result<Buf<T>, NonFinite>> {
        Ok(self.sae_reconstruct(sae, at, x, values, fit))
    }

    fn add_output_gradients(
        &self,
        sae: &SaeWeights,
        at: &Positions,
        x: Option<&Buf<T>>,
        dx: &Buf<T>,
        into: &mut Moments,
    ) -> Result<std::result::Result<(), NonFinite>> {
        let chosen = Chosen::new(at);
        if chosen.len() == 0 {
            return Ok(Ok(()));
        }
        let gathered = self.sae_output_gradients(sae, &chosen, x, dx).values;
        let mut end = 0;
        let samples: Vec<Range<usize>> = at
            .samples
            .iter()
            .map(|rows| {
                let start = end;
                end += rows.count() as usize;
                start..end
            })
            .collect();
        let counted = into.count + at.count(2);
        let finite = self.add_moments(&gathered, &samples, into);
        into.count = counted;
        Ok(finite)
    }

    fn decode_gradient(&self, sae: &SaeWeights, v: &[f64]) -> Result<Vec<f64>> {
        Ok(self.sae_decode_gradient(sae, v))
    }

    fn sae_workspace_bytes(&self, sae: &SaeWeights, tokens: usize) -> u64 {
        self.sae_workspace(sae, tokens)
    }
}
