//! The op list: what a model computes, as plain data.
//!
//! A block is a flat list of ops over numbered slots. Every slot is written once, by the op that names it
//! as `out`, so when the reversed walk reaches that op the slot's gradient is complete. Architectures
//! differ in values (a bias, a window, a scale) or in the ops present, never in types.

use super::Activation;

/// An activation of a block, `[N, width]`: an index into [`Block::widths`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot(pub usize);

/// A weight: an index into [`super::Spec::weights`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Weight(pub usize);

/// A named place in a block whose value or gradient can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Site {
    /// Output of `model.layers.i.mlp`, as a forward hook on that module sees it. `[N, D]`
    Mlp,
}

impl Site {
    /// The name users type and files carry.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mlp => "mlp",
        }
    }
}

/// Shape and mask of one attention op.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// H.
    pub heads: usize,
    /// K; query head h reads key/value head h / (H / K).
    pub kv_heads: usize,
    /// Hd.
    pub head_dim: usize,
    /// `Some(w)`: position i sees j with i − w < j ≤ i. `None`: every j ≤ i.
    pub window: Option<usize>,
    /// Factor of the scores before the softmax, 1/√Hd.
    pub scale: f64,
}

/// One operation. Its meaning stands here, once; the backends implement it forward and backward.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the fields are the operands of the formula above each variant")]
pub enum Op {
    /// `out[n] = table[ids[n]]`; table `[V, D]`.
    Embed { table: Weight, out: Slot },
    /// RMSNorm: `out = w ∘ x / √(mean(x²) + eps)`; w `[width]`.
    Norm { x: Slot, weight: Weight, eps: f64, out: Slot },
    /// `out = x Wᵀ + b`; W `[width(out), width(x)]`, b `[width(out)]`.
    Linear { x: Slot, weight: Weight, bias: Option<Weight>, out: Slot },
    /// Rotary embedding of each head, half-split as in Hugging Face: pairs (j, j + Hd/2).
    Rope { x: Slot, heads: usize, out: Slot },
    /// Causal softmax attention inside each sample; q `[N, H·Hd]`, k and v `[N, K·Hd]`, out `[N, H·Hd]`.
    Attend { q: Slot, k: Slot, v: Slot, attention: Attention, out: Slot },
    /// `out = act(gate) ∘ up`.
    Gate { gate: Slot, up: Slot, activation: Activation, out: Slot },
    /// `out = a + b`.
    Add { a: Slot, b: Slot, out: Slot },
    /// Shows `x`, and on the way back dL/dx, to whoever asked for the site.
    Tap { site: Site, x: Slot },
    /// Next-token cross-entropy of `x Wᵀ` in nats; W `[V, D]`.
    Loss { x: Slot, weight: Weight },
}

impl Op {
    /// Slots the op reads.
    pub fn inputs(&self) -> Vec<Slot> {
        match *self {
            Self::Embed { .. } => vec![],
            Self::Norm { x, .. }
            | Self::Linear { x, .. }
            | Self::Rope { x, .. }
            | Self::Tap { x, .. }
            | Self::Loss { x, .. } => vec![x],
            Self::Attend { q, k, v, .. } => vec![q, k, v],
            Self::Gate { gate, up, .. } => vec![gate, up],
            Self::Add { a, b, .. } => vec![a, b],
        }
    }

    /// Slot the op writes.
    pub fn output(&self) -> Option<Slot> {
        match *self {
            Self::Embed { out, .. }
            | Self::Norm { out, .. }
            | Self::Linear { out, .. }
            | Self::Rope { out, .. }
            | Self::Attend { out, .. }
            | Self::Gate { out, .. }
            | Self::Add { out, .. } => Some(out),
            Self::Tap { .. } | Self::Loss { .. } => None,
        }
    }

    /// Slots whose values the backward of this op reads. Linear ops need none: there are no weight
    /// gradients, so the adjoint of a linear map is all that is left of it.
    pub fn saved(&self) -> Vec<Slot> {
        match self {
            Self::Norm { .. } | Self::Attend { .. } | Self::Gate { .. } => self.inputs(),
            Self::Embed { .. }
            | Self::Linear { .. }
            | Self::Rope { .. }
            | Self::Add { .. }
            | Self::Tap { .. }
            | Self::Loss { .. } => vec![],
        }
    }
}

/// A list of ops over its own slots. Slot 0 is the input of a block.
#[derive(Clone, Debug, PartialEq)]
pub struct Block {
    /// In forward order.
    pub ops: Vec<Op>,
    /// Width of each slot.
    pub widths: Vec<usize>,
    /// The slot handed to the next block.
    pub output: Slot,
}

impl Block {
    /// The slot that holds the block's input.
    pub const INPUT: Slot = Slot(0);

    /// Index of the op that taps `site`.
    pub fn tap(&self, site: Site) -> Option<usize> {
        self.ops.iter().position(|op| matches!(op, Op::Tap { site: s, .. } if *s == site))
    }

    /// For each slot the index of the last op of `ops[..end]` that reads it (`None`: nobody does).
    pub fn last_uses(&self, end: usize) -> Vec<Option<usize>> {
        let mut last = vec![None; self.widths.len()];
        for (index, op) in self.ops[..end].iter().enumerate() {
            for slot in op.inputs() {
                last[slot.0] = Some(index);
            }
        }
        last
    }

    /// Index of the last op that writes a slot whose value a backward reads.
    pub fn last_saved(&self) -> Option<usize> {
        let saved = self.saved(0);
        self.ops.iter().rposition(|op| op.output().is_some_and(|slot| saved[slot.0]))
    }

    /// For each slot whether the backward of `ops[start..]` reads its value.
    pub fn saved(&self, start: usize) -> Vec<bool> {
        let mut saved = vec![false; self.widths.len()];
        for slot in self.ops[start..].iter().flat_map(Op::saved) {
            saved[slot.0] = true;
        }
        saved
    }
}
