//! Sums of SAE features at the wanted layers, how well each SAE fits, and where each feature was largest.

use std::collections::{BTreeMap, VecDeque};

use super::policy::{Selection, Skipped, TokenPolicy};
use super::{Direction, Quantity, Sink, Splice, Tap};
use crate::backend::{
    Backend, Chunk, FeatureSums, FeatureValues, Fit, Moments, NonFinite, Place, Positions, SaeBackend,
    SaeGradient,
};
use crate::error::{Error, Result};
use crate::model::sae::{InputNorm, SaeWeights};

/// Tokens of each layer on which an SAE's reconstruction is checked.
const CHECKED_TOKENS: u64 = 4096;
/// Tokens of an [`Example`] before and after the one where the feature is largest.
const AROUND: [usize; 2] = [10, 5];
const WINDOW: usize = AROUND[0] + 1 + AROUND[1];

/// What is asked of the SAEs.
#[derive(Clone, Debug)]
pub struct SaeSpec {
    /// The SAE of each wanted layer.
    pub saes: BTreeMap<usize, SaeWeights>,
    /// What is wanted; values come with everything but signed means alone.
    pub quantity: Quantity,
    /// Which features gradients count for.
    pub gradient: SaeGradient,
    /// Of the gradients nothing but Σ dL/df: one product of W_dec with Σ dL/dx, and no encoding.
    pub signed_sums_alone: bool,
}

impl SaeSpec {
    /// Whether gradients are wanted.
    pub fn gradients(&self) -> bool {
        self.quantity != Quantity::Values
    }

    /// Bytes of the sums of an SAE of F = `features`.
    pub fn bytes(&self, features: usize) -> u64 {
        const MOMENTS: usize = 4 * size_of::<f64>();
        let values = MOMENTS + size_of::<u64>() + size_of::<Place>() + size_of::<Example>();
        let each = match self.quantity {
            // At the end one array is made.
            _ if self.signed_sums_alone => size_of::<f64>(),
            Quantity::Values => values,
            Quantity::Gradients => values + MOMENTS,
            Quantity::Attribution => values + 2 * MOMENTS,
        };
        (features * each) as u64
    }

    /// Whether f and dL/df are needed together, so that x waits for its gradient.
    fn both(&self) -> bool {
        self.gradients() && (self.gradient == SaeGradient::Active || self.quantity == Quantity::Attribution)
    }

    /// Whether values wait for their gradients.
    pub fn waits(&self, sae: &SaeWeights) -> bool {
        self.both() || (self.gradients() && sae.norm != InputNorm::None)
    }

    /// The sums of a layer, empty.
    fn sums(&self, features: usize) -> FeatureSums {
        let wanted = !self.signed_sums_alone;
        let moments = |there: bool| (there && wanted).then(|| Moments::new(features));
        FeatureSums {
            values: wanted.then(|| FeatureValues {
                moments: Moments::new(features),
                fired: vec![0; features],
                max_at: vec![Place::default(); features],
            }),
            gradients: moments(self.gradients()),
            attribution: moments(self.quantity == Quantity::Attribution),
        }
    }
}

/// Tokens around the one at which a feature was largest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Example {
    /// Where it was.
    pub place: Place,
    ids: [u32; WINDOW],
    len: u8,
    at: u8,
}

impl Example {
    /// `ids` are those of the sample.
    fn new(place: Place, ids: &[u32]) -> Self {
        let position = place.position as usize;
        let from = position.saturating_sub(AROUND[0]);
        let around = &ids[from..ids.len().min(position + 1 + AROUND[1])];
        let mut window = [0; WINDOW];
        window[..around.len()].copy_from_slice(around);
        Self { place, ids: window, len: around.len() as u8, at: (position - from) as u8 }
    }

    /// Ids of the tokens before it, of its own, and of those after it.
    pub fn tokens(&self) -> [&[u32]; 3] {
        let (before, rest) = self.ids[..usize::from(self.len)].split_at(usize::from(self.at));
        let (own, after) = rest.split_at(rest.len().min(1));
        [before, own, after]
    }
}

/// What one SAE adds up to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerFeatures {
    /// Per feature.
    pub sums: FeatureSums,
    /// Of the first tokens, position 0 of each sample left out.
    pub fit: Fit,
    /// Of each feature, if values are there; of one that never fired without tokens. `[F]`
    pub examples: Vec<Example>,
    /// Tokens that are not counted.
    pub skipped: Skipped,
}

/// Collects [`LayerFeatures`] at the layers that have an SAE.
pub struct SaeSink<B: Backend> {
    spec: SaeSpec,
    selection: Selection,
    layers: BTreeMap<usize, Layer<B>>,
}

struct Layer<B: Backend> {
    result: LayerFeatures,
    /// Σ dL/dx, where signed sums alone are wanted.
    output_gradients: Option<Moments>,
    /// Values that wait for their gradients, by chunk.
    waiting: VecDeque<B::Buf>,
    to_check: ToCheck,
}

/// Tokens that the reconstruction is still to be checked on.
struct ToCheck(u64);

impl ToCheck {
    /// The samples to check, and the others. Does not depend on how samples are cut into chunks.
    fn split(&mut self, mut at: Positions) -> (Positions, Positions) {
        let checked = at.samples.iter().take_while(|rows| {
            let go_on = self.0 > 0;
            self.0 = self.0.saturating_sub(rows.count());
            go_on
        });
        let rest = at.samples.split_off(checked.count());
        (at, Positions { samples: rest })
    }
}

impl<B: SaeBackend> SaeSink<B> {
    /// Nothing seen yet. Every token counts.
    pub fn new(spec: SaeSpec) -> Self {
        let layer = |(&layer, sae): (&usize, &SaeWeights)| {
            let features = sae.num_features();
            let sums = spec.sums(features);
            let examples = match sums.values {
                Some(_) => vec![Example::default(); features],
                None => Vec::new(),
            };
            let fit = Fit { sum: vec![0.0; sae.width()], ..Fit::default() };
            let state = Layer {
                result: LayerFeatures { sums, fit, examples, skipped: Skipped::default() },
                output_gradients: spec.signed_sums_alone.then(|| Moments::new(sae.width())),
                waiting: VecDeque::new(),
                to_check: ToCheck(CHECKED_TOKENS),
            };
            (layer, state)
        };
        let layers = spec.saes.iter().map(layer).collect();
        let selection = Selection::new(TokenPolicy::default(), false);
        Self { spec, selection, layers }
    }

    /// The tokens that `policy` leaves.
    pub fn counting(self, policy: TokenPolicy) -> Self {
        Self { selection: Selection::new(policy, self.spec.gradients()), ..self }
    }

    /// Hands out the sums, by layer; what comes after starts with none.
    ///
    /// # Errors
    /// The device's.
    pub fn take(&mut self, backend: &B) -> Result<BTreeMap<usize, LayerFeatures>> {
        let layer = |(layer, state): (usize, Layer<B>)| {
            let mut result = state.result;
            if let Some(v) = &state.output_gradients {
                let sum = backend.decode_gradient(&self.spec.saes[&layer], &v.sum)?;
                result.sums.gradients = Some(Moments { sum, count: v.count, ..Moments::default() });
            }
            Ok((layer, result))
        };
        std::mem::take(&mut self.layers).into_iter().map(layer).collect()
    }

    fn values(&mut self, backend: &B, tap: Tap, chunk: &Chunk, x: &B::Buf) -> Result<()> {
        let layer = tap.layer;
        let spec = &self.spec;
        let (Some(sae), Some(state)) = (spec.saes.get(&layer), self.layers.get_mut(&layer)) else {
            return Ok(());
        };
        let at = self.selection.of_values(backend, tap, chunk, x)?;
        let result = &mut state.result;
        result.skipped = self.selection.skipped(tap.layer, tap.site);
        let alone = !spec.both();
        let (checked, rest) = state.to_check.split(at);
        if !checked.samples.is_empty() {
            // What is encoded for the check is added up at once.
            let values = result.sums.values.as_mut().filter(|_| alone);
            let finite = backend.reconstruct(sae, &checked, x, values, Some(&mut result.fit))?;
            finite.map_err(|bad| not_finite(layer, "values", &checked, bad))?;
        }
        if alone && result.sums.values.is_some() && !rest.samples.is_empty() {
            let finite = backend.features(sae, &rest, Some(x), None, spec.gradient, &mut result.sums)?;
            finite.map_err(|bad| not_finite(layer, "values", &rest, bad))?;
        }
        if alone {
            result.find_examples(chunk);
        }
        if spec.waits(sae) {
            state.waiting.push_back(backend.copy(x)?);
        }
        Ok(())
    }

    fn gradients(&mut self, backend: &B, tap: Tap, chunk: &Chunk, dx: &B::Buf) -> Result<()> {
        let layer = tap.layer;
        let spec = &self.spec;
        let (Some(sae), Some(state)) = (spec.saes.get(&layer), self.layers.get_mut(&layer)) else {
            return Ok(());
        };
        let at = self.selection.of_gradients(tap, chunk);
        let x = state.waiting.pop_front();
        let result = &mut state.result;
        let finite = if let Some(sums) = &mut state.output_gradients {
            backend.add_output_gradients(sae, &at, x.as_ref(), dx, sums)?
        } else if spec.both() {
            let finite = backend.features(sae, &at, x.as_ref(), Some(dx), spec.gradient, &mut result.sums)?;
            result.find_examples(chunk);
            finite
        } else {
            // The values were added when they were shown.
            let values = result.sums.values.take();
            let finite = backend.features(sae, &at, x.as_ref(), Some(dx), spec.gradient, &mut result.sums);
            result.sums.values = values;
            finite?
        };
        let what = if spec.both() { "values or gradients" } else { "gradients" };
        finite.map_err(|bad| not_finite(layer, what, &at, bad))
    }
}

impl LayerFeatures {
    /// Features that fired at all, if values are there.
    pub fn num_fired(&self) -> Option<usize> {
        let values = self.sums.values.as_ref()?;
        Some(values.fired.iter().filter(|fired| **fired > 0).count())
    }

    /// Takes the tokens around what is largest in `chunk` of all that was seen.
    fn find_examples(&mut self, chunk: &Chunk) {
        let Some(values) = &self.sums.values else { return };
        let Some(&first) = chunk.indices.first() else { return };
        for ((example, &place), &fired) in self.examples.iter_mut().zip(&values.max_at).zip(&values.fired) {
            let new = fired > 0 && place.sample >= first && (example.len == 0 || example.place != place);
            if let Some(sample) = new.then(|| chunk.indices.binary_search(&place.sample).ok()).flatten() {
                let rows = chunk.cu_seqlens[sample]..chunk.cu_seqlens[sample + 1];
                *example = Example::new(place, &chunk.ids[rows]);
            }
        }
    }
}

impl<B: SaeBackend> Sink<B> for SaeSink<B> {
    fn push(&mut self, backend: &B, tap: Tap, chunk: &Chunk, x: &B::Buf) -> Result<()> {
        match tap.direction {
            Direction::Values => self.values(backend, tap, chunk, x),
            Direction::Gradients => self.gradients(backend, tap, chunk, x),
        }
    }
}

impl<B: SaeBackend> Splice<B> for SaeSink<B> {
    fn replace(&mut self, backend: &B, tap: Tap, chunk: &Chunk, x: &B::Buf) -> Result<B::Buf> {
        let spec = &self.spec;
        let (Some(sae), Some(state)) = (spec.saes.get(&tap.layer), self.layers.get_mut(&tap.layer)) else {
            return backend.copy(x);
        };
        let at = self.selection.of_values(backend, tap, chunk, x)?;
        let result = &mut state.result;
        result.skipped = self.selection.skipped(tap.layer, tap.site);
        let (checked, rest) = state.to_check.split(at);
        let mut replaced = None;
        for (at, fit) in [(checked, Some(&mut result.fit)), (rest, None)] {
            if at.samples.is_empty() {
                continue;
            }
            let values = result.sums.values.as_mut().filter(|_| !spec.both());
            let finite = backend.reconstruct(sae, &at, replaced.as_ref().unwrap_or(x), values, fit)?;
            replaced = Some(finite.map_err(|bad| not_finite(tap.layer, "values", &at, bad))?);
        }
        if !spec.both() {
            result.find_examples(chunk);
        }
        if spec.waits(sae) {
            state.waiting.push_back(backend.copy(x)?);
        }
        replaced.map_or_else(|| backend.copy(x), Ok)
    }
}

fn not_finite(layer: usize, what: &str, at: &Positions, NonFinite(number): NonFinite) -> Error {
    let sample = at.samples.get(number).map_or(0, |rows| rows.sample);
    let place = format!("layer {layer}, sample {sample} (counted from 0 among the kept texts)");
    Error::new(format!("not a finite number in the {what} of the SAE's features"))
        .at(place)
        .expected("finite values everywhere")
        .found("NaN or infinity")
        .hint("look for NaN in the weights of the model and of the SAE")
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;
    use crate::backend::SampleRows;

    #[test]
    #[allow(clippy::single_range_in_vec_init, reason = "samples with one run")]
    fn the_check_ends_between_samples() {
        let rows = |sample, all: Range<usize>, runs: &[Range<usize>]| SampleRows {
            sample,
            all,
            runs: runs.to_vec(),
        };
        // Three tokens of the first, one of the second, three of the third.
        let samples = vec![rows(7, 0..5, &[0..1, 3..5]), rows(8, 5..6, &[5..6]), rows(9, 6..12, &[8..11])];
        let at = Positions { samples };
        for (tokens, first, left) in [(0, 0, 0), (1, 1, 0), (3, 1, 0), (4, 2, 0), (5, 3, 0), (9, 3, 2)] {
            let mut to_check = ToCheck(tokens);
            let (checked, rest) = to_check.split(at.clone());
            assert_eq!([checked.samples.len(), rest.samples.len()], [first, 3 - first], "{tokens}");
            assert_eq!(to_check.0, left);
            assert_eq!([checked.samples, rest.samples].concat(), at.samples);
        }
    }
}
