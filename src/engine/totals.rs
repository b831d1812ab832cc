//! What passes add up besides the statistics in a sink.

use crate::backend::Backend;
use crate::error::Result;

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
    /// Of each chunk, if the loss is computed.
    pub(super) nats: Option<Vec<B::Nats>>,
    /// (layer, start, end) of each visit to a layer.
    pub(super) visits: Vec<(usize, B::Mark, B::Mark)>,
    pub(super) layers: usize,
}

impl<B: Backend> PassRun<B> {
    /// Waits for the pass.
    ///
    /// # Errors
    /// The device failed.
    pub fn settle(mut self, backend: &B) -> Result<PassTotals> {
        let mut layer_s = vec![0.0; self.layers];
        let mut nats = None;
        for chunk in self.nats.take().into_iter().flatten() {
            nats.get_or_insert_with(Vec::new).extend(backend.nats(chunk)?);
        }
        for (layer, start, end) in &self.visits {
            layer_s[*layer] += backend.seconds_between(start, end)?;
        }
        let Self { tokens, samples, end_of_samples, targets, .. } = self;
        Ok(PassTotals { tokens, samples, end_of_samples, nats, targets, layer_s })
    }
}
