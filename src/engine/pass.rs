//! The pass loop: a pass goes through layer after layer, and inside a layer its chunks go one by one.

use std::time::Instant;

use super::forward::Keep;
use super::{Model, State, backward, forward};
use crate::backend::{Backend, Chunk};
use crate::error::Result;
use crate::interrupt::Interrupt;
use crate::model::op::{Block, Site};
use crate::source::Pass;
use crate::stats::{Direction, Sink, Tap};

/// What the gradient of a token is the gradient of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum LossReduction {
    /// The mean next-token loss of the token's own sample: independent of the batch size.
    Sample,
    /// The mean over all targets of a batch of `batch_size` consecutive samples.
    Batch,
    /// The plain sum of token losses.
    Token,
}

impl LossReduction {
    /// The name users type.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sample => "sample",
            Self::Batch => "batch",
            Self::Token => "token",
        }
    }

    /// Factor of a sample's summed token losses; `targets` are its own, `batch_targets` its batch's.
    fn scale(self, targets: usize, batch_targets: u64) -> f64 {
        let denominator = match self {
            Self::Sample => targets as f64,
            Self::Batch => batch_targets as f64,
            Self::Token => 1.0,
        };
        // A sample without targets has no loss to scale.
        if targets == 0 { 0.0 } else { denominator.recip() }
    }
}

/// What the engine is asked for and how it may go about it. Only `layers`, `gradients` and
/// `loss_reduction` change results.
#[derive(Clone, Debug)]
pub struct EngineSpec {
    /// Layers whose `mlp` site is wanted, ascending, not empty.
    pub layers: Vec<usize>,
    /// Whether gradients are wanted besides values.
    pub gradients: bool,
    /// Loss that is differentiated.
    pub loss_reduction: LossReduction,
    /// Tokens of a chunk (a longer sample is a chunk by itself).
    pub chunk_tokens: usize,
    /// Layers from this one on keep what their backward needs; those below compute it again.
    pub keep_from: usize,
}

/// What a run adds up besides the statistics in the sink.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// Tokens that went through the model.
    pub tokens: u64,
    /// Samples that did.
    pub samples: u64,
    /// Nats over all targets; `None` unless the loss was computed.
    pub loss_nats: Option<f64>,
    /// Next tokens predicted.
    pub targets: u64,
    /// Forward, backward and statistics of each layer, seconds. `[L]`
    pub layer_s: Vec<f64>,
}

/// Runs passes through a model.
pub struct Engine<'a, B: Backend> {
    backend: &'a B,
    model: &'a Model<B>,
    spec: EngineSpec,
    totals: Totals,
    interrupt: Interrupt,
}

/// One chunk's way through a pass.
struct Stream<B: Backend> {
    chunk: Chunk,
    /// The residual stream, later its gradient; `[N, D]`. `None` only while a block holds it.
    residual: Option<B::Buf>,
    /// Per layer what its backward needs.
    saved: Vec<Option<State<B>>>,
}

impl<'a, B: Backend> Engine<'a, B> {
    /// An engine for `model`.
    pub fn new(backend: &'a B, model: &'a Model<B>, spec: EngineSpec) -> Self {
        let totals = Totals { layer_s: vec![0.0; model.spec.blocks.len()], ..Totals::default() };
        Self { backend, model, spec, totals, interrupt: Interrupt::new() }
    }

    /// With `interrupt`, which is looked at before each chunk of each layer.
    pub fn interruptible(mut self, interrupt: Interrupt) -> Self {
        self.interrupt = interrupt;
        self
    }

    /// What has been added up so far.
    pub fn totals(&self) -> &Totals {
        &self.totals
    }

    /// One forward and, if gradients are wanted, one backward of all samples of `pass`; every wanted layer
    /// is shown to `sink`.
    ///
    /// # Errors
    /// Whatever the sink refuses (a NaN), and an interruption. Sums are then incomplete.
    pub fn run(&mut self, pass: &Pass, sink: &mut dyn Sink<B>) -> Result<()> {
        let (Some(&first), Some(&last)) = (self.spec.layers.first(), self.spec.layers.last()) else {
            return Ok(());
        };
        let chunks = cut(pass, &self.spec);
        let longest = chunks.iter().map(Chunk::longest).max().unwrap_or(0);
        let rope = self.backend.rope_table(&self.model.spec.inv_freq, longest);
        let layers = self.model.spec.blocks.len();
        let mut streams: Vec<Stream<B>> = chunks
            .into_iter()
            .map(|chunk| {
                let mut state = State::new(1, None);
                self.forward(&rope, &self.model.spec.embed, 1, &chunk, Keep::Output, &mut state, None)?;
                let saved = (0..layers).map(|_| None).collect();
                Ok(Stream { chunk, residual: state.slots[0].take(), saved })
            })
            .collect::<Result<_>>()?;
        self.totals.tokens += pass.ids.len() as u64;
        self.totals.samples += streams.iter().map(|s| s.chunk.num_samples() as u64).sum::<u64>();

        let end = if self.spec.gradients { layers } else { last + 1 };
        for layer in 0..end {
            let started = Instant::now();
            for stream in &mut streams {
                self.layer_forward(&rope, layer, stream, sink)?;
            }
            self.totals.layer_s[layer] += started.elapsed().as_secs_f64();
        }
        if !self.spec.gradients {
            return Ok(());
        }
        for stream in &mut streams {
            self.head(&rope, stream)?;
        }
        for layer in (first..layers).rev() {
            let started = Instant::now();
            for stream in &mut streams {
                self.layer_backward(&rope, layer, stream, sink)?;
            }
            self.totals.layer_s[layer] += started.elapsed().as_secs_f64();
        }
        Ok(())
    }

    /// First op whose backward a layer runs: the lowest wanted layer stops at its tap, where
    /// dL/d(mlp output) is the gradient of the residual stream. Layers below run none (`None`).
    fn backward_start(&self, layer: usize) -> Option<usize> {
        let first = *self.spec.layers.first()?;
        match layer {
            l if !self.spec.gradients || l < first => None,
            l if l == first => self.model.spec.blocks[l].tap(Site::Mlp),
            _ => Some(0),
        }
    }

    fn layer_forward(
        &mut self,
        rope: &B::Rope,
        layer: usize,
        stream: &mut Stream<B>,
        sink: &mut dyn Sink<B>,
    ) -> Result<()> {
        let block = &self.model.spec.blocks[layer];
        let backward = self.backward_start(layer);
        let recompute = layer < self.spec.keep_from && backward == Some(0);
        let input = match recompute {
            true => stream.residual.as_ref().map(|x| self.backend.copy(x)),
            false => stream.residual.take(),
        };
        let mut state = State::new(block.widths.len(), input);
        let keep = match backward {
            Some(start) if !recompute => Keep::For(start),
            _ => Keep::Output,
        };
        // Without gradients the last wanted layer ends at its tap: nothing reads its output.
        let stop = !self.spec.gradients && Some(&layer) == self.spec.layers.last();
        let end =
            if stop { block.tap(Site::Mlp).map_or(block.ops.len(), |tap| tap + 1) } else { block.ops.len() };
        let tap = Tap { layer, site: Site::Mlp, direction: Direction::Values };
        self.forward(rope, block, end, &stream.chunk, keep, &mut state, Some((tap, sink)))?;
        let output = state.slots[block.output.0].take();
        if recompute {
            state.slots[Block::INPUT.0] = std::mem::replace(&mut stream.residual, output);
        } else {
            stream.residual = output;
        }
        if backward.is_some() {
            stream.saved[layer] = Some(state);
        }
        Ok(())
    }

    /// Loss, and the gradient of the residual stream after the last layer.
    fn head(&mut self, rope: &B::Rope, stream: &mut Stream<B>) -> Result<()> {
        let block = &self.model.spec.head;
        let chunk = &stream.chunk;
        let mut state = State::new(block.widths.len(), stream.residual.take());
        self.forward(rope, block, block.ops.len(), chunk, Keep::For(0), &mut state, None)?;
        // One by one: the sum must not depend on the cut into chunks.
        let total = self.totals.loss_nats.get_or_insert(0.0);
        state.nats.iter().for_each(|nats| *total += nats);
        self.totals.targets += chunk.samples().map(|rows| rows.len().saturating_sub(1) as u64).sum::<u64>();
        let ops = 0..block.ops.len();
        backward(self.backend, self.model, rope, block, ops, chunk, &mut state, &mut |_, _| Ok(()))?;
        stream.residual = state.grads[Block::INPUT.0].take();
        Ok(())
    }

    fn layer_backward(
        &mut self,
        rope: &B::Rope,
        layer: usize,
        stream: &mut Stream<B>,
        sink: &mut dyn Sink<B>,
    ) -> Result<()> {
        let block = &self.model.spec.blocks[layer];
        let (Some(start), Some(mut state)) = (self.backward_start(layer), stream.saved[layer].take()) else {
            return Ok(());
        };
        if layer < self.spec.keep_from && start == 0 {
            // As far as the last value that the way back reads: the down-projection is not computed again.
            let end = block.last_saved().map_or(0, |op| op + 1);
            self.forward(rope, block, end, &stream.chunk, Keep::For(0), &mut state, None)?;
        }
        self.interrupt.check()?;
        state.grads[block.output.0] = stream.residual.take();
        let tap = Tap { layer, site: Site::Mlp, direction: Direction::Gradients };
        let (backend, model, chunk) = (self.backend, self.model, &stream.chunk);
        backward(backend, model, rope, block, start..block.ops.len(), chunk, &mut state, &mut |_, x| {
            sink.push(backend, tap, chunk, x)
        })?;
        stream.residual = state.grads[Block::INPUT.0].take();
        Ok(())
    }

    /// The forward walk over `block.ops[..end]`, showing its tap to a sink if one is given.
    fn forward(
        &self,
        rope: &B::Rope,
        block: &Block,
        end: usize,
        chunk: &Chunk,
        keep: Keep,
        state: &mut State<B>,
        show: Option<(Tap, &mut dyn Sink<B>)>,
    ) -> Result<()> {
        self.interrupt.check()?;
        let mut show = show;
        forward(
            self.backend,
            self.model,
            rope,
            block,
            0..end,
            chunk,
            keep,
            state,
            &mut |_, x| match &mut show {
                Some((tap, sink)) => sink.push(self.backend, *tap, chunk, x),
                None => Ok(()),
            },
        )
    }
}

/// Cuts a pass into chunks of whole samples, greedily in order.
fn cut(pass: &Pass, spec: &EngineSpec) -> Vec<Chunk> {
    let mut chunks: Vec<Chunk> = Vec::new();
    for (sample, pair) in pass.cu_seqlens.windows(2).enumerate() {
        let (start, end) = (pair[0], pair[1]);
        let fits = chunks.last().is_some_and(|c| c.num_tokens() + end - start <= spec.chunk_tokens);
        if !fits {
            chunks.push(Chunk { cu_seqlens: vec![0], ..Chunk::default() });
        }
        let Some(chunk) = chunks.last_mut() else { continue };
        chunk.ids.extend_from_slice(&pass.ids[start..end]);
        chunk.cu_seqlens.push(chunk.ids.len());
        chunk.indices.push(pass.samples[sample]);
        let targets = (end - start).saturating_sub(1);
        chunk.loss_scales.push(spec.loss_reduction.scale(targets, pass.batch_targets[sample]));
    }
    chunks
}
