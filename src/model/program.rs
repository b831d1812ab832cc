//! A model as a backend runs it: op lists that may hold fused ops, and weights that may be packed together.

use super::Spec;
use super::op::{Block, Fused, Site, Weight};

/// How the tensors of one loaded weight lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// One after the other: rows of the first, then of the second, and so forth; a lone tensor as it is.
    Stacked,
    /// Stacked, and in the first `rows` rows, heads of `head_dim` each, rotary pairs made neighbours: row 2j of a head is
    /// its row j, row 2j + 1 its row j + Hd/2. No head lies in two tensors.
    StackedPairs {
        /// Hd, an even number.
        head_dim: usize,
        /// A multiple of it.
        rows: usize,
    },
    /// Tensors of one shape, two by two, pair after pair: row 0 of the first, row 0 of the second, row 1 of the first, and so
    /// forth.
    Interleaved,
}

/// One weight as a backend wants it loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    /// Tensors it is made of, by number in [`Spec::weights`].
    pub parts: Vec<Weight>,
    /// How they lie.
    pub packing: Packing,
}

/// The op lists of a [`Spec`], lowered; what they mean has not changed.
#[derive(Clone, Debug)]
pub struct Program<F> {
    /// Token ids → the residual stream.
    pub embed: Block<F>,
    /// One per layer. `[L]`
    pub blocks: Vec<Block<F>>,
    /// Residual stream → loss.
    pub head: Block<F>,
    /// What [`Weight`] numbers in these blocks stand for.
    pub weights: Vec<Packed>,
}

/// What will be asked of a layer's block, as far as that limits what may be fused.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// The sites that somebody looks at; the taps of others are left out.
    pub sites: Vec<Site>,
    /// Where a walk may start or end: no fused op spans it.
    pub boundary: Option<Boundary>,
}

/// A place between two ops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Boundary {
    /// Before the tap of a site.
    Before(Site),
    /// After it.
    After(Site),
}

impl Boundary {
    /// Index in `block` of the op behind it.
    pub fn index<F: Fused>(self, block: &Block<F>) -> Option<usize> {
        match self {
            Self::Before(site) => block.tap(site),
            Self::After(site) => block.tap(site).map(|tap| tap + 1),
        }
    }
}

impl<F: Fused> Program<F> {
    /// The op lists as they are, with the taps that somebody looks at; `usages` has one entry per layer.
    pub fn unfused(spec: &Spec, usages: &[Usage]) -> Self {
        let whole = |number| Packed { parts: vec![Weight(number)], packing: Packing::Stacked };
        Self {
            embed: spec.embed.widen(&[]),
            blocks: spec.blocks.iter().zip(usages).map(|(block, usage)| block.widen(&usage.sites)).collect(),
            head: spec.head.widen(&[]),
            weights: (0..spec.weights.len()).map(whole).collect(),
        }
    }
}
