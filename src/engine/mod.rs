//! The engine: walks over the op lists, and the pass loop that brings every layer past every token once.

mod backward;
mod forward;
mod pass;

pub use backward::backward;
pub use forward::{Keep, forward};
pub use pass::{Engine, EngineSpec, LossReduction, Totals};

use crate::backend::Backend;
use crate::error::Result;
use crate::model::op::Site;
use crate::model::{Spec, Tensor};

/// A model on a backend: what to compute and the weights to compute with.
pub struct Model<B: Backend> {
    /// The op lists.
    pub spec: Spec,
    /// By [`crate::model::op::Weight`] number.
    pub weights: Vec<B::Weight>,
}

impl<B: Backend> Model<B> {
    /// Hands the tensors (in the order of `spec.weights`) to the backend.
    pub fn load(backend: &B, spec: Spec, tensors: &[Tensor]) -> Result<Self> {
        let weights = tensors.iter().map(|tensor| backend.load(tensor)).collect::<Result<_>>()?;
        Ok(Self { spec, weights })
    }
}

/// The slots of one block for one chunk: values on the way forward, gradients on the way back.
pub struct State<B: Backend> {
    /// Value of each slot, as long as somebody still needs it.
    pub slots: Vec<Option<B::Buf>>,
    /// dL/d slot, as far as the reversed walk has summed it.
    pub grads: Vec<Option<B::Buf>>,
    /// Nats of each sample, summed over its targets; filled by the loss op. `[B]`
    pub nats: Vec<f64>,
}

impl<B: Backend> State<B> {
    /// A state whose input slot holds `input`.
    pub fn new(num_slots: usize, input: Option<B::Buf>) -> Self {
        let mut slots: Vec<_> = (0..num_slots).map(|_| None).collect();
        slots[0] = input;
        Self { slots, grads: (0..num_slots).map(|_| None).collect(), nats: vec![] }
    }
}

/// Called with the site and the value or gradient there.
pub type OnTap<'a, B> = &'a mut dyn FnMut(Site, &<B as Backend>::Buf) -> Result<()>;
