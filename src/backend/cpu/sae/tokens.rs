//! The tokens that an SAE looks at, gathered and normalised.

use rayon::prelude::*;

use super::super::{Buf, Cpu, Element};
use crate::backend::{NonFinite, Place, Positions};
use crate::model::sae::{InputNorm, SaeWeights};

/// Chosen tokens, in corpus order. M is their number.
pub(super) struct Chosen {
    /// Row in the chunk. `[M]`
    pub rows: Vec<usize>,
    /// Number of the sample in the chunk. `[M]`
    pub samples: Vec<usize>,
    /// `[M]`
    pub places: Vec<Place>,
}

impl Chosen {
    pub fn new(at: &Positions) -> Self {
        let mut chosen = Self { rows: Vec::new(), samples: Vec::new(), places: Vec::new() };
        for (number, of) in at.samples.iter().enumerate() {
            for row in of.rows() {
                chosen.rows.push(row);
                chosen.samples.push(number);
                chosen.places.push(Place { sample: of.sample, position: (row - of.all.start) as u32 });
            }
        }
        chosen
    }

    /// M.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// What is said of the first of these rows with a value that is not finite.
    pub fn finite(&self, bad: Option<usize>) -> Result<(), NonFinite> {
        bad.map_or(Ok(()), |row| Err(NonFinite(self.samples[row])))
    }
}

/// How the norm of an SAE maps one token: x̃ = (x − mean)·scale before the input bias, denorm(y) = y·factor + mean.
#[derive(Clone, Copy)]
pub(super) struct TokenNorm {
    pub mean: f64,
    pub scale: f64,
    pub factor: f64,
}

impl TokenNorm {
    pub fn of<T: Element>(norm: InputNorm, x: &[T]) -> Self {
        let width = x.len() as f64;
        match norm {
            InputNorm::None => Self { mean: 0.0, scale: 1.0, factor: 1.0 },
            InputNorm::RescaleToSqrtD => {
                let length = x.iter().map(|x| x.as_f64() * x.as_f64()).sum::<f64>().sqrt();
                Self { mean: 0.0, scale: width.sqrt() / length, factor: length / width.sqrt() }
            }
            InputNorm::LayerNorm => {
                let mean = x.iter().map(|x| x.as_f64()).sum::<f64>() / width;
                let squares: f64 = x.iter().map(|x| (x.as_f64() - mean) * (x.as_f64() - mean)).sum();
                let deviation = (squares / (width - 1.0)).sqrt();
                Self { mean, scale: 1.0 / (deviation + 1e-5), factor: deviation }
            }
        }
    }
}

/// Rows gathered from a chunk.
pub(super) struct Gathered<T> {
    /// `[M, D]`, with rows of zeros below where products want more.
    pub values: Buf<T>,
    /// The first row, from 0 to M − 1, with a value that is not finite.
    pub bad: Option<usize>,
}

impl<T: Element> Cpu<T> {
    /// x̃ of the chosen tokens, and their norms.
    pub(super) fn sae_inputs(
        &self,
        sae: &SaeWeights,
        chosen: &Chosen,
        x: &Buf<T>,
    ) -> (Gathered<T>, Vec<TokenNorm>) {
        let width = x.width;
        let token = |row: usize| &x[chosen.rows[row] * width..][..width];
        let norms: Vec<TokenNorm> =
            (0..chosen.len()).into_par_iter().map(|row| TokenNorm::of(sae.norm, token(row))).collect();
        let gathered = self.sae_gather(chosen, width, |row, out| {
            let TokenNorm { mean, scale, .. } = norms[row];
            let (mean, scale) = (T::of(mean), T::of(scale));
            out.iter_mut().zip(token(row)).for_each(|(out, &x)| *out = (x - mean) * scale);
            if let Some(bias) = &sae.input_bias {
                out.iter_mut().zip(bias).for_each(|(out, &bias)| *out = *out - T::of_f32(bias));
            }
        });
        (gathered, norms)
    }

    /// The gradients of the chosen tokens, times the factor of `denorm`. `x` is read where the SAE normalises.
    pub(super) fn sae_output_gradients(
        &self,
        sae: &SaeWeights,
        chosen: &Chosen,
        x: Option<&Buf<T>>,
        dx: &Buf<T>,
    ) -> Gathered<T> {
        let width = dx.width;
        self.sae_gather(chosen, width, |row, out| {
            let range = chosen.rows[row] * width..(chosen.rows[row] + 1) * width;
            let factor = match (sae.norm, x) {
                (InputNorm::None, _) => T::one(),
                (norm, Some(x)) => T::of(TokenNorm::of(norm, &x[range.clone()]).factor),
                (norm, None) => panic!("gradients of an SAE with {norm:?} need its input"),
            };
            out.iter_mut().zip(&dx[range]).for_each(|(out, &dx)| *out = dx * factor);
        })
    }

    fn sae_gather(
        &self,
        chosen: &Chosen,
        width: usize,
        fill: impl Fn(usize, &mut [T]) + Sync,
    ) -> Gathered<T> {
        let mut values = self.alloc(chosen.len(), width);
        let bad = values
            .par_chunks_exact_mut(width)
            .enumerate()
            .filter_map(|(row, out)| {
                let finite = self.vectorised(
                    #[inline(always)]
                    || {
                        fill(row, out);
                        out.iter().fold(true, |finite, value| finite & value.is_finite())
                    },
                );
                (!finite).then_some(row)
            })
            .min();
        Gathered { values: self.padded(&values).unwrap_or(values), bad }
    }
}
