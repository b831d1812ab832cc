//! Statistics of what the walks show: the [`Sink`] they push to, and per-dimension sums.

mod moments;

pub use moments::{LayerMoments, MomentSink};

use std::fmt;

use crate::backend::{Backend, Chunk};
use crate::error::Result;
use crate::model::op::Site;

/// Whether a site shows its value (forward) or dL/d value (backward).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// The activation itself.
    Values,
    /// The gradient of the loss with respect to it.
    Gradients,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Values => "values",
            Self::Gradients => "gradients",
        })
    }
}

/// Where in the model a buffer comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tap {
    /// Layer, from 0.
    pub layer: usize,
    /// Place in the layer's block.
    pub site: Site,
    /// Value or gradient.
    pub direction: Direction,
}

/// Receives what the walks show. The walks know no statistics; a sink knows no model.
pub trait Sink<B: Backend> {
    /// Takes in one chunk at one tap. For a tap, chunks come in corpus order. `x` `[N, width]`
    ///
    /// # Errors
    /// A NaN or an infinity, with its layer and sample.
    fn push(&mut self, backend: &B, tap: Tap, chunk: &Chunk, x: &B::Buf) -> Result<()>;
}
