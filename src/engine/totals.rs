//! What passes add up besides the statistics in a sink.

use std::collections::BTreeMap;

use crate::backend::{Backend, Chunk};
use crate::error::Result;
use crate::source::Pass;

/// What a run adds up.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// Tokens that went through the model.
    pub tokens: u64,
    /// Samples that did.
    pub samples: u64,
    /// Index in the corpus of the sample after the last one.
    pub end_of_samples: u64,
    /// Nats over all targets; `None` unless the loss was computed.
    pub loss_nats: Option<f64>,
    /// The same with one layer's site replaced, by that layer.
    pub spliced_nats: BTreeMap<usize, f64>,
    /// Next tokens predicted.
    pub targets: u64,
    /// Forward, backward and statistics of each layer, seconds. `[L]`
    pub layer_s: Vec<f64>,
}

impl Totals {
    /// Takes in a pass; passes come in corpus order.
    pub fn add(&mut self, pass: &PassTotals) {
        self.tokens += pass.tokens;
        self.samples += pass.samples;
        self.end_of_samples = pass.end_of_samples;
        self.targets += pass.targets;
        if let Some(nats) = &pass.nats {
            // One by one: the sum must not depend on the cut into chunks and passes.
            let total = self.loss_nats.get_or_insert(0.0);
            nats.iter().for_each(|nats| *total += nats);
        }
        for (&layer, nats) in &pass.spliced_nats {
            let total = self.spliced_nats.entry(layer).or_default();
            nats.iter().for_each(|nats| *total += nats);
        }
        self.layer_s.resize(pass.layer_s.len(), 0.0);
        self.layer_s.iter_mut().zip(&pass.layer_s).for_each(|(total, seconds)| *total += seconds);
    }
}

/// What one pass adds.
#[derive(Clone, Debug, Default)]
pub struct PassTotals {
    /// Tokens.
    pub tokens: u64,
    /// Samples.
    pub samples: u64,
    /// As in [`Totals`].
    pub end_of_samples: u64,
    /// Nats of each sample, if the loss was computed.
    pub nats: Option<Vec<f64>>,
    /// The same by layer whose site was replaced.
    pub spliced_nats: BTreeMap<usize, Vec<f64>>,
    /// Next tokens predicted.
    pub targets: u64,
    /// As in [`Totals`]. `[L]`
    pub layer_s: Vec<f64>,
}

/// A pass that was asked for; the device may still be at it.
pub struct PassRun<B: Backend> {
    pub(super) tokens: u64,
    pub(super) samples: u64,
    pub(super) end_of_samples: u64,
    pub(super) targets: u64,
    /// Of each chunk; none where the loss is not computed.
    pub(super) nats: Vec<B::Nats>,
    /// (layer, of a chunk) with that layer's site replaced.
    pub(super) spliced_nats: Vec<(usize, B::Nats)>,
    /// (layer, start, end) of each visit to a layer.
    pub(super) visits: Vec<(usize, B::Mark, B::Mark)>,
    pub(super) layers: usize,
}

impl<B: Backend> PassRun<B> {
    /// Nothing asked for yet.
    pub(super) fn new(pass: &Pass, layers: usize) -> Self {
        Self {
            tokens: pass.ids.len() as u64,
            samples: pass.samples.len() as u64,
            end_of_samples: pass.samples.last().map_or(0, |last| last + 1),
            targets: 0,
            nats: Vec::new(),
            spliced_nats: Vec::new(),
            visits: Vec::new(),
            layers,
        }
    }

    /// Counts the next tokens that a chunk predicts.
    pub(super) fn count_targets(&mut self, chunk: &Chunk) {
        self.targets += chunk.samples().map(|rows| rows.len().saturating_sub(1) as u64).sum::<u64>();
    }

    /// Waits for the pass.
    ///
    /// # Errors
    /// The device failed.
    pub fn settle(mut self, backend: &B) -> Result<PassTotals> {
        let mut layer_s = vec![0.0; self.layers];
        let mut nats = None;
        for chunk in self.nats.drain(..) {
            nats.get_or_insert_with(Vec::new).extend(backend.nats(chunk)?);
        }
        let mut spliced_nats: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
        for (layer, chunk) in self.spliced_nats.drain(..) {
            spliced_nats.entry(layer).or_default().extend(backend.nats(chunk)?);
        }
        for (layer, start, end) in &self.visits {
            layer_s[*layer] += backend.seconds_between(start, end)?;
        }
        let Self { tokens, samples, end_of_samples, targets, .. } = self;
        Ok(PassTotals { tokens, samples, end_of_samples, nats, spliced_nats, targets, layer_s })
    }
}
