//! Statistics of what the walks show: the [`Sink`] they push to, which tokens count, and per-dimension sums.

mod moments;
mod norms;
mod policy;
mod sae;

pub use moments::{LayerMoments, MomentSink, SiteMoments, position_0_share};
pub use norms::NormSink;
pub use policy::{NormRule, SkipSpecial, Skipped, TokenPolicy};
pub use sae::{Example, LayerFeatures, SaeSink, SaeSpec};

use std::fmt;

use crate::backend::{Backend, Chunk};
use crate::error::{Error, Result};
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

/// What a run is asked for, of dimensions or of SAE features.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Quantity {
    /// v: an activation.
    Values,
    /// dL/dv.
    Gradients,
    /// v·dL/dv of SAE features: to first order what L would lose without the feature.
    Attribution,
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Values => "values",
            Self::Gradients => "gradients",
            Self::Attribution => "attribution",
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

/// A value or gradient that cannot be added up, in this sample of the corpus.
fn not_finite(tap: Tap, sample: u64) -> Error {
    Error::new(format!("not a finite number in the {} at site {}", tap.direction, tap.site.name()))
        .at(format!("layer {}, sample {sample} (counted from 0 among the kept texts)", tap.layer))
        .expected("finite values everywhere")
        .found("NaN or infinity")
        .hint("look for NaN in the checkpoint's weights, or an overflow of a half-precision checkpoint")
}

/// Receives what the walks show. The walks know no statistics; a sink knows no model.
pub trait Sink<B: Backend> {
    /// Takes in one chunk at one tap. For a tap, chunks come in corpus order. `x` `[N, width]`
    ///
    /// # Errors
    /// A NaN or an infinity, with its layer and sample.
    fn push(&mut self, backend: &B, tap: Tap, chunk: &Chunk, x: &B::Buf) -> Result<()>;
}

/// A sink that puts something else in the place of a site's value.
pub trait Splice<B: Backend>: Sink<B> {
    /// Takes in `x`, `[N, width]`, the site's value, and says what the rest of the model is to see instead. Its gradient
    /// is pushed afterwards: for a tap, that of each chunk in corpus order.
    ///
    /// # Errors
    /// The device's.
    fn replace(&mut self, backend: &B, tap: Tap, chunk: &Chunk, x: &B::Buf) -> Result<B::Buf>;
}
