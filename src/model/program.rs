//! A model as a backend runs it: op lists that may hold fused ops, and weights that may be packed together.

use super::Spec;
use super::op::{Block, Fused, Weight};

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
    /// Row 0 of the first, row 0 of the second, row 1 of the first, and so forth. Two tensors of one shape.
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
    /// Whether anybody looks at its taps; if not, they may be left out.
    pub tapped: bool,
    /// A walk may start or end before the op of this index: no fused op spans it.
    pub boundary: Option<usize>,
}

impl<F: Fused> Program<F> {
    /// The op lists as they are.
    pub fn unfused(spec: &Spec) -> Self {
        let whole = |number| Packed { parts: vec![Weight(number)], packing: Packing::Stacked };
        Self {
            embed: spec.embed.widen(),
            blocks: spec.blocks.iter().map(Block::widen).collect(),
            head: spec.head.widen(),
            weights: (0..spec.weights.len()).map(whole).collect(),
        }
    }
}
