//! A pass with one layer's site replaced at a time: the layers below run once, and from each wanted layer a branch runs
//! the rest of the model, forward and backward, through the same walks.

use std::rc::Rc;

use super::forward::Keep;
use super::pass::Stream;
use super::tiers::Stage;
use super::{Engine, PassRun, State, backward, forward};
use crate::backend::{Chunk, SaeBackend, Scope};
use crate::error::Result;
use crate::model::op::{Op, Site, Slot};
use crate::source::Pass;
use crate::stats::{Direction, Sink, Splice, Tap};

/// Looks away: a branch shows nothing but the gradient at its site.
struct Nobody;

impl<B: SaeBackend> Sink<B> for Nobody {
    fn push(&mut self, _: &B, _: Tap, _: &Chunk, _: &B::Buf) -> Result<()> {
        Ok(())
    }
}

impl<B: SaeBackend> Engine<'_, B> {
    /// For each wanted layer, by itself: runs the rest of the model with what `splice` puts in the place of the site's
    /// value, and shows it the gradient there. The model's own loss is computed too. Needs an engine
    /// for gradients.
    ///
    /// # Errors
    /// As [`Engine::run`].
    pub fn run_spliced(&mut self, pass: &Pass, splice: &mut dyn Splice<B>) -> Result<PassRun<B>> {
        let layers = self.model.program.blocks.len();
        let (mut run, ropes, mut streams) = self.begin(pass)?;
        let mut before = Stage::Embed;
        for layer in 0..layers {
            let wanted = self.spec.layers.contains(&layer);
            self.turn(&mut before, Stage::Layer(layer), Some(above(layer, layers)))?;
            let started = self.backend.mark()?;
            if wanted {
                self.branch(&ropes, layer, &mut streams, splice, &mut run, &mut before)?;
            } else {
                for stream in &mut streams {
                    self.layer_forward(&ropes, layer, stream, None, &mut Nobody)?;
                }
            }
            run.visits.push((layer, started, self.backend.mark()?));
            self.keep_up(&run)?;
        }
        self.turn(&mut before, Stage::Head, None)?;
        for stream in &mut streams {
            run.count_targets((*stream.chunk).as_ref());
            run.nats.extend(self.head(&ropes, stream, false)?);
        }
        self.model.leave(self.backend, before, None)?;
        Ok(run)
    }

    /// Runs `layer`, whose site is wanted, for all streams, and the branch of each.
    fn branch(
        &mut self,
        ropes: &[B::Rope],
        layer: usize,
        streams: &mut [Stream<B>],
        splice: &mut dyn Splice<B>,
        run: &mut PassRun<B>,
        before: &mut Stage,
    ) -> Result<()> {
        let layers = self.model.program.blocks.len();
        let place = self.site(layer);
        let tap = place.0;
        let mut own = Vec::with_capacity(streams.len());
        let mut branches = Vec::with_capacity(streams.len());
        for stream in streams.iter_mut() {
            let (state, branch) = self.fork(ropes, layer, place, stream, splice)?;
            own.push(state);
            branches.push(branch);
        }
        for upper in layer + 1..layers {
            self.turn(before, Stage::Layer(upper), Some(above(upper, layers)))?;
            for branch in &mut branches {
                self.layer_forward(ropes, upper, branch, Some(0), &mut Nobody)?;
            }
        }
        self.turn(before, Stage::Head, Some(Stage::Layer(layers - 1)))?;
        for branch in &mut branches {
            let nats = self.head(ropes, branch, true)?;
            run.spliced_nats.extend(nats.map(|nats| (layer, nats)));
        }
        for upper in (layer + 1..layers).rev() {
            self.turn(before, Stage::Layer(upper), Some(Stage::Layer(upper - 1)))?;
            for branch in &mut branches {
                self.layer_backward(ropes, upper, branch, &mut Nobody)?;
            }
        }
        self.turn(before, Stage::Layer(layer), Some(above(layer, layers)))?;
        let block = &self.model.program.blocks[layer];
        let end = block.ops.len();
        for branch in &mut branches {
            self.interrupt.check()?;
            let Some(mut state) = branch.saved[layer].take() else { continue };
            let scope = Scope { weights: &self.model.weights, ropes, chunk: &*branch.chunk };
            state.grads[block.output.0] = branch.residual.take();
            backward(self.backend, &scope, block, tap..end, &mut state, &mut |site, dx| {
                let shown = Tap { layer, site, direction: Direction::Gradients };
                splice.push(self.backend, shown, (*branch.chunk).as_ref(), dx)
            })?;
        }
        for (stream, mut state) in streams.iter_mut().zip(own) {
            let scope = Scope { weights: &self.model.weights, ropes, chunk: &*stream.chunk };
            let nobody = &mut |_, _: &B::Buf| Ok(());
            forward(self.backend, &scope, block, tap + 1..end, Keep::Output, &mut state, nobody)?;
            stream.residual = state.slots[block.output.0].take();
        }
        Ok(())
    }

    /// The op that taps the one wanted site of `layer`, and what it shows.
    ///
    /// # Panics
    /// The layer has no such op: the plan asked for a site that the model lacks.
    fn site(&self, layer: usize) -> (usize, Site, Slot) {
        let block = &self.model.program.blocks[layer];
        match block.first_tap(&self.spec.sites).map(|index| (index, &block.ops[index])) {
            Some((index, &Op::Tap { site, x })) => (index, site, x),
            _ => panic!("layer {layer} has no op of its own that taps the site"),
        }
    }

    /// Runs `layer` up to its site: the state there, and a branch that has gone on to the layer's end with what `splice`
    /// put in the site's place.
    fn fork(
        &self,
        ropes: &[B::Rope],
        layer: usize,
        (tap, site, slot_of_site): (usize, Site, Slot),
        stream: &mut Stream<B>,
        splice: &mut dyn Splice<B>,
    ) -> Result<(State<B>, Stream<B>)> {
        self.interrupt.check()?;
        let block = &self.model.program.blocks[layer];
        let (slots, end) = (block.widths.len(), block.ops.len());
        let scope = Scope { weights: &self.model.weights, ropes, chunk: &*stream.chunk };
        let mut state = State::new(slots, stream.residual.take());
        let shown = Tap { layer, site, direction: Direction::Values };
        let nobody = &mut |_, _: &B::Buf| Ok(());
        forward(self.backend, &scope, block, 0..tap + 1, Keep::Rest, &mut state, nobody)?;
        let mut other = State::new(slots, None);
        for (slot, (from, to)) in state.slots.iter().zip(&mut other.slots).enumerate() {
            let Some(value) = from else { continue };
            *to = Some(match slot == slot_of_site.0 {
                true => splice.replace(self.backend, shown, (*stream.chunk).as_ref(), value)?,
                false => self.backend.copy(value)?,
            });
        }
        forward(self.backend, &scope, block, tap + 1..end, Keep::For(tap), &mut other, nobody)?;
        let residual = other.slots[block.output.0].take();
        let mut saved: Vec<Option<State<B>>> = stream.saved.iter().map(|_| None).collect();
        saved[layer] = Some(other);
        Ok((state, Stream { chunk: Rc::clone(&stream.chunk), residual, saved }))
    }
}

/// The stage that a forward walk enters after `layer`.
fn above(layer: usize, layers: usize) -> Stage {
    if layer + 1 < layers { Stage::Layer(layer + 1) } else { Stage::Head }
}
