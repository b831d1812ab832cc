//! From products to activations, and the few of them that are not zero.

use std::ops::Range;

use super::super::Element;
use crate::model::sae::{SaeActivation, SaeWeights};

/// What a tile's features are computed with.
pub(super) struct Constants<T> {
    scale: Vec<T>,
    bias: Vec<T>,
    /// A feature does not fire at or below it; at least 0.
    limit: Vec<T>,
    gate_bias: Option<Vec<T>>,
}

impl<T: Element> Constants<T> {
    pub fn new(sae: &SaeWeights, tile: Range<usize>) -> Self {
        let widened = |vector: &[f32]| vector[tile.clone()].iter().map(|&v| T::of_f32(v)).collect();
        let (limit, gate_bias) = match &sae.activation {
            SaeActivation::JumpRelu { threshold } => {
                (threshold[tile.clone()].iter().map(|&limit| T::of_f32(limit.max(0.0))).collect(), None)
            }
            SaeActivation::Gated { gate_bias } => (vec![T::zero(); tile.len()], Some(widened(gate_bias))),
            _ => (vec![T::zero(); tile.len()], None),
        };
        Self {
            scale: scale_of(sae.encoder_scale.as_deref(), tile.clone()),
            bias: widened(&sae.encoder_bias),
            limit,
            gate_bias,
        }
    }

    /// From z to h, in place. `[rows, tile]`
    #[inline(always)]
    pub fn pre_activations(&self, z: &mut [T]) {
        for row in z.chunks_exact_mut(self.bias.len()) {
            for ((z, &scale), &bias) in row.iter_mut().zip(&self.scale).zip(&self.bias) {
                *z = *z * scale + bias;
            }
        }
    }

    /// From z to f where features decide one by one, in place. `[rows, tile]`. NaN fires: it must not be lost.
    #[inline(always)]
    pub fn activations(&self, z: &mut [T]) {
        for row in z.chunks_exact_mut(self.bias.len()) {
            let vectors = self.scale.iter().zip(&self.bias).zip(&self.limit);
            match &self.gate_bias {
                None => {
                    for (z, ((&scale, &bias), &limit)) in row.iter_mut().zip(vectors) {
                        let h = *z * scale + bias;
                        *z = if h <= limit { T::zero() } else { h };
                    }
                }
                Some(gate_bias) => {
                    for ((z, ((&scale, &bias), &limit)), &gate_bias) in
                        row.iter_mut().zip(vectors).zip(gate_bias)
                    {
                        let h = *z * scale + bias;
                        let silent = h <= limit || *z + gate_bias <= T::zero();
                        *z = if silent { T::zero() } else { h };
                    }
                }
            }
        }
    }
}

/// A tile's part of a vector of factors that may be left out.
pub(super) fn scale_of<T: Element>(scale: Option<&[f32]>, tile: Range<usize>) -> Vec<T> {
    match scale {
        Some(scale) => scale[tile].iter().map(|&scale| T::of_f32(scale)).collect(),
        None => vec![T::one(); tile.len()],
    }
}

/// Of a tile's features, as many as one in so many fire in a row with many. That is for each row to decide: a sum must
/// not depend on the others. A product with all features takes as long as an eighth of them one by one.
const MANY: usize = 8;

/// One row of [`Codes`].
pub(super) enum Code<'a, T> {
    /// Feature, from the tile's start, and activation.
    Few(&'a [(u32, T)]),
    /// All activations. `[tile]`
    Many(&'a [T]),
}

impl<T: Element> Code<'_, T> {
    /// Features that are not zero.
    pub fn fired(&self) -> usize {
        match self {
            Self::Few(entries) => entries.len(),
            Self::Many(f) => f.iter().filter(|f| **f != T::zero()).count(),
        }
    }
}

/// The activations of a tile's features that are not zero, row by row.
pub(super) struct Codes<T> {
    /// Features in the tile.
    features: usize,
    /// Activations that are not zero.
    fired: usize,
    /// End of each row in `few`.
    ends: Vec<usize>,
    few: Vec<(u32, T)>,
    many_rows: Vec<usize>,
    many: Vec<T>,
}

impl<T: Element> Codes<T> {
    pub fn new(features: usize) -> Self {
        let (ends, few, many_rows, many) = Default::default();
        Self { features, fired: 0, ends, few, many_rows, many }
    }

    /// Adds rows of activations, `[rows, tile]`.
    #[inline(always)]
    pub fn push_rows(&mut self, f: &[T]) {
        let rows = f.len() / self.features;
        for (index, row) in f.chunks_exact(self.features).enumerate() {
            let fired = row.iter().map(|&f| u32::from(f != T::zero())).sum::<u32>() as usize;
            self.fired += fired;
            if fired * MANY > self.features {
                // Where one has many, all may: no more than that is reserved.
                self.many.reserve_exact((rows - index) * self.features);
                self.many_rows.push(self.ends.len());
                self.many.extend_from_slice(row);
            } else if fired > 0 {
                for (first, values) in (0..).step_by(GROUP).zip(row.chunks(GROUP)) {
                    if values.iter().fold(false, |any, &f| any | (f != T::zero())) {
                        let fired = (first..).zip(values).filter(|(_, f)| **f != T::zero());
                        self.few.extend(fired.map(|(feature, &f)| (feature, f)));
                    }
                }
            }
            self.ends.push(self.few.len());
        }
    }

    /// The part of each token's features, sorted by number, that lies in a tile.
    pub fn of_tile(tokens: &[Vec<(u32, T)>], tile: Range<usize>) -> Self {
        let mut codes = Self::new(tile.len());
        for features in tokens {
            let from = features.partition_point(|(feature, _)| (*feature as usize) < tile.start);
            let inside = features[from..].iter().take_while(|(feature, _)| (*feature as usize) < tile.end);
            codes.few.extend(inside.map(|(feature, f)| (feature - tile.start as u32, *f)));
            codes.ends.push(codes.few.len());
        }
        codes.fired = codes.few.len();
        codes
    }

    /// The rows in order.
    pub fn rows(&self) -> impl Iterator<Item = Code<'_, T>> {
        let starts = std::iter::once(0).chain(self.ends.iter().copied());
        let mut many = self.many_rows.iter().zip(self.many.chunks_exact(self.features)).peekable();
        starts.zip(&self.ends).enumerate().map(move |(row, (start, &end))| {
            match many.next_if(|(many_row, _)| **many_row == row) {
                Some((_, f)) => Code::Many(f),
                None => Code::Few(&self.few[start..end]),
            }
        })
    }

    /// Multiplies each activation by its feature's factor.
    pub fn scale(&mut self, scale: &[T]) {
        self.few.iter_mut().for_each(|(feature, f)| *f = *f * scale[*feature as usize]);
        for row in self.many.chunks_exact_mut(self.features) {
            row.iter_mut().zip(scale).for_each(|(f, &scale)| *f = *f * scale);
        }
    }

    /// Activations that are not zero.
    pub fn fired(&self) -> usize {
        self.fired
    }

    /// Numbers of the rows with many.
    pub fn many_rows(&self) -> &[usize] {
        &self.many_rows
    }

    /// All activations of these rows. `[many_rows, tile]`
    pub fn many(&self) -> &[T] {
        &self.many
    }
}

/// Features that are looked at together: nearly always none of them fires.
const GROUP: usize = 32;
