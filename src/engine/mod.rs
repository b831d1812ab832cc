//! The engine: walks over the op lists, the tiers that weights come from, and the pass loop that brings every layer
//! past every token once.

mod backward;
mod forward;
mod pass;
mod splice;
mod tiers;
mod totals;

pub use backward::backward;
pub use forward::{Keep, forward};
pub use pass::{Engine, EngineSpec, LossReduction};
pub use totals::{PassRun, PassTotals, Totals};

use crate::backend::Backend;

/// The slots of one block for one chunk: values on the way forward, gradients on the way back.
pub struct State<B: Backend> {
    /// Value of each slot, as long as somebody still needs it.
    pub slots: Vec<Option<B::Buf>>,
    /// dL/d slot, as far as the reversed walk has summed it.
    pub grads: Vec<Option<B::Buf>>,
    /// What the block's [`crate::model::op::Op::Route`] chose.
    pub routes: Option<B::Routes>,
    /// Nats of each sample, summed over its targets; filled by the loss op. `[B]`
    pub nats: Option<B::Nats>,
}

impl<B: Backend> State<B> {
    /// A state whose input slot holds `input`.
    pub fn new(num_slots: usize, input: Option<B::Buf>) -> Self {
        let mut slots: Vec<_> = (0..num_slots).map(|_| None).collect();
        slots[0] = input;
        Self { slots, grads: (0..num_slots).map(|_| None).collect(), routes: None, nats: None }
    }
}
