//! The pass loop: a pass goes through layer after layer, and inside a layer its chunks go one by one.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::forward::Keep;
use super::tiers::{Model, Stage};
use super::{PassRun, State, backward, forward};
use crate::backend::{Backend, Chunk, Scope};
use crate::error::Result;
use crate::interrupt::Interrupt;
use crate::model::op::{Block, Op, Site};
use crate::model::{Boundary, Spec, Tensor, Usage};
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

/// What the engine is asked for and how it may go about it. Only `layers`, `sites`, `gradients` and
/// `loss_reduction` change results.
#[derive(Clone, Debug)]
pub struct EngineSpec {
    /// Layers whose sites are wanted, ascending, not empty.
    pub layers: Vec<usize>,
    /// Sites wanted of each of them, not empty.
    pub sites: Vec<Site>,
    /// Whether gradients are wanted besides values.
    pub gradients: bool,
    /// Loss that is differentiated.
    pub loss_reduction: LossReduction,
    /// Tokens of a chunk (a longer sample is a chunk by itself).
    pub chunk_tokens: usize,
    /// Layers from this one on keep what their backward needs; those below compute it again.
    pub keep_from: usize,
    /// Layers below this one keep their weights on the device; those from it on bring them for each visit.
    pub resident_layers: usize,
}

impl EngineSpec {
    /// Layers whose forward runs, of so many: all for gradients, else those up to the last wanted one.
    pub fn visited_layers(&self, layers: usize) -> usize {
        if self.gradients { layers } else { self.layers.last().map_or(0, |last| last + 1).min(layers) }
    }

    /// Width of what is shown of each wanted site of a model.
    pub fn widths(&self, spec: &Spec) -> BTreeMap<(usize, Site), usize> {
        let places = self.layers.iter().flat_map(|&layer| self.sites.iter().map(move |&site| (layer, site)));
        places.filter_map(|place| Some((place, spec.site_width(place.0, place.1)?))).collect()
    }

    /// What a run asks of each layer.
    pub fn usages(&self, spec: &Spec) -> Vec<Usage> {
        let usage = |layer: usize| {
            let wanted = self.layers.contains(&layer);
            let first = self.gradients && self.layers.first() == Some(&layer);
            let last = !self.gradients && self.layers.last() == Some(&layer);
            // The way back ends before the lowest tap; the way forward, of values alone, behind the highest.
            let shown: Vec<Site> = spec.blocks[layer].ops.iter().flat_map(Op::taps).collect();
            let mut shown = shown.into_iter().filter(|site| self.sites.contains(site));
            let boundary = match (first, last) {
                (true, _) => shown.next().map(Boundary::Before),
                (_, true) => shown.next_back().map(Boundary::After),
                _ => None,
            };
            Usage { sites: if wanted { self.sites.clone() } else { Vec::new() }, boundary }
        };
        (0..spec.blocks.len()).map(usage).collect()
    }
}

/// Layers that a device may be behind what it was asked for.
const AHEAD: usize = 2;

/// Runs passes through a model.
pub struct Engine<'a, B: Backend> {
    pub(super) backend: &'a B,
    pub(super) model: Model<B>,
    inv_freq: Vec<Vec<f32>>,
    pub(super) spec: EngineSpec,
    pub(super) interrupt: Interrupt,
}

/// One chunk's way through a pass.
pub(super) struct Stream<B: Backend> {
    /// Shared with what branches off.
    pub chunk: Rc<B::Chunk>,
    /// The residual stream, later its gradient; `[N, D]`. `None` only while a block holds it.
    pub residual: Option<B::Buf>,
    /// Per layer what its backward needs.
    pub saved: Vec<Option<State<B>>>,
}

/// A pass before its first layer.
type Begun<B> = (PassRun<B>, Vec<<B as Backend>::Rope>, Vec<Stream<B>>);

impl<'a, B: Backend> Engine<'a, B> {
    /// An engine for the model of `spec`, whose tensors are in the order of `spec.weights`. Weights are loaded when a
    /// pass first needs them.
    pub fn new(backend: &'a B, spec: &Spec, tensors: &[Tensor], engine: EngineSpec) -> Self {
        let program = backend.lower(spec, &engine.usages(spec));
        let visited = engine.visited_layers(program.blocks.len());
        let model = Model::new(program, tensors, engine.resident_layers, visited, engine.gradients);
        Self { backend, model, inv_freq: spec.inv_freq.clone(), spec: engine, interrupt: Interrupt::new() }
    }

    /// With `interrupt`, which is looked at before each chunk of each layer.
    pub fn interruptible(mut self, interrupt: Interrupt) -> Self {
        self.interrupt = interrupt;
        self
    }

    /// Loads the weights that stay, which otherwise come when a pass first needs them.
    ///
    /// # Errors
    /// The device has no room for them, or fails.
    pub fn load(&mut self) -> Result<()> {
        self.model.load_resident(self.backend, &self.interrupt)
    }

    /// One forward and, if gradients are wanted, one backward of all samples of `pass`; every wanted layer
    /// is shown to `sink`. The device may still be at it on return.
    ///
    /// # Errors
    /// What the device and the sink refuse, and an interruption. Sums are then incomplete.
    pub fn run(&mut self, pass: &Pass, sink: &mut dyn Sink<B>) -> Result<PassRun<B>> {
        let layers = self.model.program.blocks.len();
        let Some(&first) = self.spec.layers.first() else { return Ok(PassRun::new(pass, layers)) };
        let (mut run, ropes, mut streams) = self.begin(pass)?;
        let end = self.spec.visited_layers(layers);
        let mut before = Stage::Embed;
        for layer in 0..end {
            let stage = Stage::Layer(layer);
            let next = match layer + 1 {
                next if next < end => Some(Stage::Layer(next)),
                _ => self.spec.gradients.then_some(Stage::Head),
            };
            self.turn(&mut before, stage, next)?;
            let started = self.backend.mark()?;
            for stream in &mut streams {
                self.layer_forward(&ropes, layer, stream, self.backward_start(layer), sink)?;
            }
            run.visits.push((layer, started, self.backend.mark()?));
            self.keep_up(&run)?;
        }
        if !self.spec.gradients {
            self.model.leave(self.backend, before, None)?;
            return Ok(run);
        }
        let above = |layer: usize| (layer > first).then(|| Stage::Layer(layer - 1));
        self.turn(&mut before, Stage::Head, above(layers))?;
        for stream in &mut streams {
            run.count_targets((*stream.chunk).as_ref());
            run.nats.extend(self.head(&ropes, stream, true)?);
        }
        for layer in (first..layers).rev() {
            self.turn(&mut before, Stage::Layer(layer), above(layer))?;
            let started = self.backend.mark()?;
            for stream in &mut streams {
                self.layer_backward(&ropes, layer, stream, sink)?;
            }
            run.visits.push((layer, started, self.backend.mark()?));
            self.keep_up(&run)?;
        }
        self.model.leave(self.backend, before, None)?;
        Ok(run)
    }

    /// Cuts a pass into chunks and brings each as far as the first layer.
    pub(super) fn begin(&mut self, pass: &Pass) -> Result<Begun<B>> {
        let run = PassRun::new(pass, self.model.program.blocks.len());
        let chunks = cut(pass, &self.spec);
        let longest = chunks.iter().map(Chunk::longest).max().unwrap_or(0);
        let rope = |inv_freq: &Vec<f32>| self.backend.rope_table(inv_freq, longest);
        let ropes: Vec<B::Rope> = self.inv_freq.iter().map(rope).collect::<Result<_>>()?;
        self.model.enter(self.backend, Stage::Embed, Some(Stage::Layer(0)))?;
        let mut streams = Vec::with_capacity(chunks.len());
        for chunk in chunks {
            self.interrupt.check()?;
            streams.push(self.embed(&ropes, chunk)?);
        }
        Ok((run, ropes, streams))
    }

    /// Waits until the device is at most [`AHEAD`] layers behind: enough to keep it busy, and little to wait for when
    /// somebody asks to stop.
    pub(super) fn keep_up(&self, run: &PassRun<B>) -> Result<()> {
        let mark = run.visits.len().checked_sub(1 + AHEAD).map(|visit| &run.visits[visit].2);
        mark.map_or(Ok(()), |mark| self.backend.wait(mark))
    }

    /// From one stage to the next: its weights, and room for those of the stage after it.
    pub(super) fn turn(&mut self, before: &mut Stage, stage: Stage, next: Option<Stage>) -> Result<()> {
        self.model.leave(self.backend, *before, Some(stage))?;
        *before = stage;
        self.model.enter(self.backend, stage, next)
    }

    /// First op whose backward a layer runs: the lowest wanted layer stops at its lowest tap. Layers below run none
    /// (`None`).
    pub(super) fn backward_start(&self, layer: usize) -> Option<usize> {
        let first = *self.spec.layers.first()?;
        match layer {
            l if !self.spec.gradients || l < first => None,
            l if l == first => self.model.program.blocks[l].first_tap(&self.spec.sites),
            _ => Some(0),
        }
    }

    fn embed(&self, ropes: &[B::Rope], chunk: Chunk) -> Result<Stream<B>> {
        let chunk = self.backend.place(chunk)?;
        let mut state = State::new(1, None);
        let block = &self.model.program.embed;
        let scope = Scope { weights: &self.model.weights, ropes, chunk: &chunk };
        forward(self.backend, &scope, block, 0..block.ops.len(), Keep::Output, &mut state, &mut |_, _| {
            Ok(())
        })?;
        let saved = self.model.program.blocks.iter().map(|_| None).collect();
        Ok(Stream { chunk: Rc::new(chunk), residual: state.slots[0].take(), saved })
    }

    /// `backward`: the first op whose backward will run, if any.
    pub(super) fn layer_forward(
        &self,
        ropes: &[B::Rope],
        layer: usize,
        stream: &mut Stream<B>,
        backward: Option<usize>,
        sink: &mut dyn Sink<B>,
    ) -> Result<()> {
        self.interrupt.check()?;
        let block = &self.model.program.blocks[layer];
        let keep = match backward {
            None => Keep::Output,
            Some(0) if layer < self.spec.keep_from => Keep::Input,
            Some(start) => Keep::For(start),
        };
        let mut state = State::new(block.widths.len(), stream.residual.take());
        // Without gradients the last wanted layer ends at its last tap: nothing reads its output.
        let stop = !self.spec.gradients && Some(&layer) == self.spec.layers.last();
        let last = block.last_tap(&self.spec.sites).filter(|_| stop);
        let end = last.map_or(block.ops.len(), |tap| tap + 1);
        let scope = Scope { weights: &self.model.weights, ropes, chunk: &*stream.chunk };
        forward(self.backend, &scope, block, 0..end, keep, &mut state, &mut |site, x| {
            let tap = Tap { layer, site, direction: Direction::Values };
            sink.push(self.backend, tap, (*stream.chunk).as_ref(), x)
        })?;
        stream.residual = state.slots[block.output.0].take();
        if backward.is_some() {
            stream.saved[layer] = Some(state);
        }
        Ok(())
    }

    /// Loss, and if wanted the gradient of the residual stream after the last layer.
    pub(super) fn head(
        &self,
        ropes: &[B::Rope],
        stream: &mut Stream<B>,
        want_gradient: bool,
    ) -> Result<Option<B::Nats>> {
        self.interrupt.check()?;
        let block = &self.model.program.head;
        let scope = Scope { weights: &self.model.weights, ropes, chunk: &*stream.chunk };
        let mut state = State::new(block.widths.len(), stream.residual.take());
        let ops = 0..block.ops.len();
        let keep = if want_gradient { Keep::For(0) } else { Keep::Output };
        forward(self.backend, &scope, block, ops.clone(), keep, &mut state, &mut |_, _| Ok(()))?;
        let nats = state.nats.take();
        if !want_gradient {
            return Ok(nats);
        }
        backward(self.backend, &scope, block, ops, &mut state, &mut |_, _| Ok(()))?;
        stream.residual = state.grads[Block::INPUT.0].take();
        Ok(nats)
    }

    pub(super) fn layer_backward(
        &self,
        ropes: &[B::Rope],
        layer: usize,
        stream: &mut Stream<B>,
        sink: &mut dyn Sink<B>,
    ) -> Result<()> {
        let block = &self.model.program.blocks[layer];
        let (Some(start), Some(mut state)) = (self.backward_start(layer), stream.saved[layer].take()) else {
            return Ok(());
        };
        let scope = Scope { weights: &self.model.weights, ropes, chunk: &*stream.chunk };
        if layer < self.spec.keep_from && start == 0 {
            self.interrupt.check()?;
            // As far as the last value that the way back reads: the down-projection is not computed again.
            let end = block.last_saved().map_or(0, |op| op + 1);
            forward(self.backend, &scope, block, 0..end, Keep::Again(0), &mut state, &mut |_, _| Ok(()))?;
        }
        self.interrupt.check()?;
        state.grads[block.output.0] = stream.residual.take();
        backward(self.backend, &scope, block, start..block.ops.len(), &mut state, &mut |site, x| {
            let tap = Tap { layer, site, direction: Direction::Gradients };
            sink.push(self.backend, tap, (*stream.chunk).as_ref(), x)
        })?;
        stream.residual = state.grads[Block::INPUT.0].take();
        Ok(())
    }
}

/// Cuts a pass into chunks of whole samples, in order: as few as the longest chunk allows, of about the same size.
fn cut(pass: &Pass, spec: &EngineSpec) -> Vec<Chunk> {
    let most = spec.chunk_tokens.max(1);
    let even = pass.ids.len().div_ceil(pass.ids.len().div_ceil(most).max(1));
    let mut chunks: Vec<Chunk> = Vec::new();
    for (sample, pair) in pass.cu_seqlens.windows(2).enumerate() {
        let (start, end) = (pair[0], pair[1]);
        let fits = |chunk: &Chunk| chunk.num_tokens() < even && chunk.num_tokens() + end - start <= most;
        if !chunks.last().is_some_and(fits) {
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
