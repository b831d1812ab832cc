//! Where weights live: on the device for the whole run, or brought there for each visit to their layer, the next
//! layer's while this one computes.

use crate::backend::{Backend, Weights};
use crate::error::Result;
use crate::interrupt::Interrupt;
use crate::model::op::{Block, Weight};
use crate::model::{Packed, Program, Tensor};

/// A part of the model whose weights come and go together, in the order of the forward walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Token ids → residual stream.
    Embed,
    /// A layer.
    Layer(usize),
    /// Residual stream → loss.
    Head,
}

/// A model on a backend: what to compute, and the weights as far as they are there.
pub struct Model<B: Backend> {
    pub program: Program<B::Fused>,
    pub weights: Weights<B::Weight>,
    tensors: Vec<Tensor>,
    /// By number: stays once it is loaded.
    stays: Vec<bool>,
    /// Room for the weights of the stage after this one.
    coming: Vec<(Weight, B::Room)>,
}

impl<B: Backend> Model<B> {
    /// Lays out the model, of which the first `visited` layers run, and the head where `head` says so. Layers below
    /// `resident_layers` keep their weights once they are loaded, and so do embedding and head if all layers do.
    pub fn new(
        program: Program<B::Fused>,
        tensors: &[Tensor],
        resident_layers: usize,
        visited: usize,
        head: bool,
    ) -> Self {
        let mut stays = vec![false; program.weights.len()];
        let mut stay = |block: &Block<B::Fused>| block.weights().iter().for_each(|w| stays[w.0] = true);
        program.blocks[..visited].iter().take(resident_layers).for_each(&mut stay);
        if resident_layers >= visited {
            stay(&program.embed);
        }
        if resident_layers >= visited && head {
            stay(&program.head);
        }
        let weights = Weights(program.weights.iter().map(|_| None).collect());
        Self { program, weights, tensors: tensors.to_vec(), stays, coming: Vec::new() }
    }

    fn block(&self, stage: Stage) -> &Block<B::Fused> {
        match stage {
            Stage::Embed => &self.program.embed,
            Stage::Layer(layer) => &self.program.blocks[layer],
            Stage::Head => &self.program.head,
        }
    }

    fn parts(&self, packed: &Packed) -> Vec<&Tensor> {
        packed.parts.iter().map(|part| &self.tensors[part.0]).collect()
    }

    /// Loads what `stage` needs and does not have yet, and makes room for what `next` will need, so that it can be
    /// loaded while `stage` computes.
    pub fn enter(&mut self, backend: &B, stage: Stage, next: Option<Stage>) -> Result<()> {
        self.load(backend)?;
        for weight in self.missing(stage) {
            self.bring(backend, weight)?;
        }
        for weight in next.map(|next| self.missing(next)).unwrap_or_default() {
            let room = backend.room(&self.parts(&self.program.weights[weight.0]))?;
            self.coming.push((weight, room));
        }
        Ok(())
    }

    /// Gives back what does not stay of `stage`, whose work has been asked for, and loads what the next stage needs.
    /// `next`: keeps what it shares.
    pub fn leave(&mut self, backend: &B, stage: Stage, next: Option<Stage>) -> Result<()> {
        self.load(backend)?;
        let shared = next.map(|next| self.block(next).weights()).unwrap_or_default();
        for weight in self.block(stage).weights() {
            if !self.stays[weight.0] && !shared.contains(&weight) {
                self.weights.0[weight.0] = None;
            }
        }
        Ok(())
    }

    /// Loads everything that stays, as long as nobody asks to stop.
    pub fn load_resident(&mut self, backend: &B, interrupt: &Interrupt) -> Result<()> {
        for number in 0..self.stays.len() {
            interrupt.check()?;
            if self.stays[number] && self.weights.0[number].is_none() {
                self.bring(backend, Weight(number))?;
            }
        }
        Ok(())
    }

    fn bring(&mut self, backend: &B, weight: Weight) -> Result<()> {
        let packed = &self.program.weights[weight.0];
        let parts = self.parts(packed);
        let loaded = backend.load(backend.room(&parts)?, &parts, packed.packing)?;
        self.weights.0[weight.0] = Some(loaded);
        Ok(())
    }

    /// Loads what there is room for.
    fn load(&mut self, backend: &B) -> Result<()> {
        for (weight, room) in std::mem::take(&mut self.coming) {
            let packed = &self.program.weights[weight.0];
            let loaded = backend.load(room, &self.parts(packed), packed.packing)?;
            self.weights.0[weight.0] = Some(loaded);
        }
        Ok(())
    }

    fn missing(&self, stage: Stage) -> Vec<Weight> {
        let mut weights = self.block(stage).weights();
        weights.retain(|weight| self.weights.0[weight.0].is_none());
        weights
    }
}
