//! The op list: what a model computes, as plain data.
//!
//! A block is a flat list of ops over numbered slots. Every slot is written once, by the op that names it
//! as `out`, so when the reversed walk reaches that op the slot's gradient is complete. Architectures
//! differ in values (a bias, a window, a scale) or in the ops present, never in types.

use std::convert::Infallible;
use std::fmt::Debug;

use super::Activation;

/// An activation of a block, `[N, width]`: an index into [`Block::widths`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot(pub usize);

/// A weight: an index into [`super::Spec::weights`], or into [`super::Program::weights`] once a backend has lowered
/// the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Weight(pub usize);

/// A named place in a block whose value or gradient can be read, in the order of a table for users.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Site {
    /// Output of `model.layers.i.mlp`, as a forward hook on that module sees it. `[N, D]`
    Mlp,
    /// What the MLP adds to the residual stream: its output, after the norm that follows it in some models. `[N, D]`
    MlpOut,
    /// Input of the down-projection. `[N, I]`
    MlpHidden,
    /// What attention adds to the residual stream, after the norm that follows it in some models. `[N, D]`
    AttnOut,
    /// The residual stream before the block. `[N, D]`
    ResidPre,
    /// The residual stream between attention and MLP. `[N, D]`
    ResidMid,
    /// The residual stream after the block. `[N, D]`
    ResidPost,
}

impl Site {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Mlp,
        Self::MlpOut,
        Self::MlpHidden,
        Self::AttnOut,
        Self::ResidPre,
        Self::ResidMid,
        Self::ResidPost,
    ];

    /// The name users type and files carry.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mlp => "mlp",
            Self::MlpOut => "mlp_out",
            Self::MlpHidden => "mlp_hidden",
            Self::AttnOut => "attn_out",
            Self::ResidPre => "resid_pre",
            Self::ResidMid => "resid_mid",
            Self::ResidPost => "resid_post",
        }
    }

    /// The site of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|site| site.name() == name)
    }
}

/// An RMSNorm besides its weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RmsNorm {
    /// Added to the mean square.
    pub eps: f64,
    /// Added to the stored weight: 1 where w − 1 is stored, else 0.
    pub offset: f64,
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
    /// Factor of the scores, mostly 1/√Hd.
    pub scale: f64,
    /// `Some(c)`: scaled scores s become c·tanh(s/c) before the softmax.
    pub softcap: Option<f64>,
}

/// An op of a backend's own, which stands for several neighbouring ops of a block.
pub trait Fused: Clone + Debug {
    /// Slots it reads.
    fn inputs(&self) -> Vec<Slot>;
    /// Slots it writes, some of them only where a backward or a site wants them.
    fn outputs(&self) -> Vec<Slot>;
    /// Slots whose values its backward reads.
    fn saved(&self) -> Vec<Slot>;
    /// Weights it reads.
    fn weights(&self) -> Vec<Weight>;
    /// The sites that it shows on its way, in forward order.
    fn taps(&self) -> Vec<Site>;
}

/// No fused ops.
impl Fused for Infallible {
    fn inputs(&self) -> Vec<Slot> {
        match *self {}
    }
    fn outputs(&self) -> Vec<Slot> {
        match *self {}
    }
    fn saved(&self) -> Vec<Slot> {
        match *self {}
    }
    fn weights(&self) -> Vec<Weight> {
        match *self {}
    }
    fn taps(&self) -> Vec<Site> {
        match *self {}
    }
}

/// One operation. Its meaning stands here, once; the backends implement it forward and backward. `F`: what a backend
/// makes of several.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the fields are the operands of the formula above each variant")]
pub enum Op<F = Infallible> {
    /// `out[n] = scale · table[ids[n]]`; table `[V, D]`.
    Embed { table: Weight, scale: f64, out: Slot },
    /// RMSNorm: `out = (w + offset) ∘ x / √(mean(x²) + eps)` over each run of as many neighbours in a row as w has
    /// elements: all of the row, or each head of it.
    Norm { x: Slot, weight: Weight, norm: RmsNorm, out: Slot },
    /// `out = x Wᵀ + b`; W `[width(out), width(x)]`, b `[width(out)]`.
    Linear { x: Slot, weight: Weight, bias: Option<Weight>, out: Slot },
    /// Rotary embedding of each head, half-split as in Hugging Face: pairs (j, j + Hd/2), with the frequencies
    /// [`super::Spec::inv_freq`]`[table]`.
    Rope { x: Slot, heads: usize, table: usize, out: Slot },
    /// Causal softmax attention inside each sample; q `[N, H·Hd]`, k and v `[N, K·Hd]`, out `[N, H·Hd]`.
    Attend { q: Slot, k: Slot, v: Slot, attention: Attention, out: Slot },
    /// `out = act(gate) ∘ up`.
    Gate { gate: Slot, up: Slot, activation: Activation, out: Slot },
    /// Chooses experts: of each row of logits `[N, E]` the k largest (of equal ones the first), whose softmax is `out`
    /// `[N, k]`. The chosen of a token stand in the order of their numbers, here and in what follows.
    Route { logits: Slot, top_k: usize, out: Slot },
    /// The rows of x `[N, D]`, each once for every expert that its token chose, sorted by expert, then by token:
    /// `out` `[N·k, D]`, as `[N, k·D]` among the slots.
    Dispatch { x: Slot, out: Slot },
    /// `out = x Wₑᵀ` for rows x `[N·k, in]` in the order of [`Op::Dispatch`], where e is the row's expert.
    ExpertLinear { x: Slot, weights: Vec<Weight>, out: Slot },
    /// `out[n] = Σⱼ scores[n, j] · (the row of x that is token n's for its j-th expert)`, in that order.
    Combine { x: Slot, scores: Slot, out: Slot },
    /// `out = a + b`.
    Add { a: Slot, b: Slot, out: Slot },
    /// Shows `x`, and on the way back dL/dx, to whoever asked for the site.
    Tap { site: Site, x: Slot },
    /// Next-token cross-entropy of `z = x Wᵀ` in nats, with a soft-cap c of `c·tanh(z/c)`; W `[V, D]`.
    Loss { x: Slot, weight: Weight, softcap: Option<f64> },
    /// Several of the above in one.
    Fused(F),
}

impl<F: Fused> Op<F> {
    /// Slots the op reads.
    pub fn inputs(&self) -> Vec<Slot> {
        match *self {
            Self::Fused(ref fused) => fused.inputs(),
            Self::Embed { .. } => vec![],
            Self::Norm { x, .. }
            | Self::Linear { x, .. }
            | Self::Rope { x, .. }
            | Self::Dispatch { x, .. }
            | Self::ExpertLinear { x, .. }
            | Self::Tap { x, .. }
            | Self::Loss { x, .. } => vec![x],
            Self::Route { logits, .. } => vec![logits],
            Self::Combine { x, scores, .. } => vec![x, scores],
            Self::Attend { q, k, v, .. } => vec![q, k, v],
            Self::Gate { gate, up, .. } => vec![gate, up],
            Self::Add { a, b, .. } => vec![a, b],
        }
    }

    /// Slots the op writes.
    pub fn outputs(&self) -> Vec<Slot> {
        match *self {
            Self::Fused(ref fused) => fused.outputs(),
            Self::Embed { out, .. }
            | Self::Norm { out, .. }
            | Self::Linear { out, .. }
            | Self::Rope { out, .. }
            | Self::Attend { out, .. }
            | Self::Gate { out, .. }
            | Self::Route { out, .. }
            | Self::Dispatch { out, .. }
            | Self::ExpertLinear { out, .. }
            | Self::Combine { out, .. }
            | Self::Add { out, .. } => vec![out],
            Self::Tap { .. } | Self::Loss { .. } => vec![],
        }
    }

    /// Weights the op reads.
    pub fn weights(&self) -> Vec<Weight> {
        match *self {
            Self::Fused(ref fused) => fused.weights(),
            Self::Embed { table: weight, .. } | Self::Norm { weight, .. } | Self::Loss { weight, .. } => {
                vec![weight]
            }
            Self::Linear { weight, bias, .. } => std::iter::once(weight).chain(bias).collect(),
            Self::ExpertLinear { ref weights, .. } => weights.clone(),
            Self::Rope { .. }
            | Self::Attend { .. }
            | Self::Gate { .. }
            | Self::Route { .. }
            | Self::Dispatch { .. }
            | Self::Combine { .. }
            | Self::Add { .. }
            | Self::Tap { .. } => vec![],
        }
    }

    /// Sites that the op shows.
    pub fn taps(&self) -> Vec<Site> {
        match self {
            Self::Tap { site, .. } => vec![*site],
            Self::Fused(fused) => fused.taps(),
            _ => vec![],
        }
    }

    /// Slots whose values the backward of this op reads. Linear ops need none: there are no weight
    /// gradients, so the adjoint of a linear map is all that is left of it. What [`Op::Route`] chose is kept with the
    /// state of the block.
    pub fn saved(&self) -> Vec<Slot> {
        match self {
            Self::Fused(fused) => fused.saved(),
            Self::Norm { .. } | Self::Attend { .. } | Self::Gate { .. } | Self::Combine { .. } => {
                self.inputs()
            }
            Self::Route { .. } => self.outputs(),
            Self::Embed { .. }
            | Self::Linear { .. }
            | Self::Rope { .. }
            | Self::Dispatch { .. }
            | Self::ExpertLinear { .. }
            | Self::Add { .. }
            | Self::Tap { .. }
            | Self::Loss { .. } => vec![],
        }
    }
}

/// A list of ops over its own slots. Slot 0 is the input of a block.
#[derive(Clone, Debug, PartialEq)]
pub struct Block<F = Infallible> {
    /// In forward order.
    pub ops: Vec<Op<F>>,
    /// Width of each slot.
    pub widths: Vec<usize>,
    /// The slot handed to the next block.
    pub output: Slot,
}

impl Block {
    /// The slot that holds the block's input.
    pub const INPUT: Slot = Slot(0);
}

impl<F: Fused> Block<F> {
    /// Index of the op that shows `site`.
    pub fn tap(&self, site: Site) -> Option<usize> {
        self.ops.iter().position(|op| op.taps().contains(&site))
    }

    /// Index of the first op that shows one of these sites.
    pub fn first_tap(&self, sites: &[Site]) -> Option<usize> {
        self.ops.iter().position(|op| op.taps().iter().any(|site| sites.contains(site)))
    }

    /// Index of the last op that shows one of these sites.
    pub fn last_tap(&self, sites: &[Site]) -> Option<usize> {
        self.ops.iter().rposition(|op| op.taps().iter().any(|site| sites.contains(site)))
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
        self.ops.iter().rposition(|op| op.outputs().iter().any(|slot| saved[slot.0]))
    }

    /// For each slot whether the backward of `ops[start..]` reads its value.
    pub fn saved(&self, start: usize) -> Vec<bool> {
        let mut saved = vec![false; self.widths.len()];
        for slot in self.ops[start..].iter().flat_map(Op::saved) {
            saved[slot.0] = true;
        }
        saved
    }

    /// For each slot whether `ops[start..]` read it.
    pub fn read(&self, start: usize) -> Vec<bool> {
        let mut read = vec![false; self.widths.len()];
        for slot in self.ops[start..].iter().flat_map(Op::inputs) {
            read[slot.0] = true;
        }
        read
    }

    /// Weights the block reads, each once.
    pub fn weights(&self) -> Vec<Weight> {
        let mut weights: Vec<Weight> = self.ops.iter().flat_map(Op::weights).collect();
        weights.sort_unstable();
        weights.dedup();
        weights
    }
}

impl Block {
    /// The same over the ops of a backend that has fused ones, with the taps of `sites` alone.
    pub fn widen<F: Fused>(&self, sites: &[Site]) -> Block<F> {
        let wanted = |op: &&Op| match op {
            Op::Tap { site, .. } => sites.contains(site),
            _ => true,
        };
        Block {
            ops: self.ops.iter().filter(wanted).map(Op::widen).collect(),
            widths: self.widths.clone(),
            output: self.output,
        }
    }

    /// Width of what `site` shows; `None` where the block has no such place.
    pub fn site_width(&self, site: Site) -> Option<usize> {
        self.ops.iter().find_map(|op| match op {
            Op::Tap { site: own, x } if *own == site => Some(self.widths[x.0]),
            _ => None,
        })
    }
}

impl Op {
    /// The same among the ops of a backend that has fused ones.
    pub fn widen<F: Fused>(&self) -> Op<F> {
        match *self {
            Self::Embed { table, scale, out } => Op::Embed { table, scale, out },
            Self::Norm { x, weight, norm, out } => Op::Norm { x, weight, norm, out },
            Self::Linear { x, weight, bias, out } => Op::Linear { x, weight, bias, out },
            Self::Rope { x, heads, table, out } => Op::Rope { x, heads, table, out },
            Self::Attend { q, k, v, attention, out } => Op::Attend { q, k, v, attention, out },
            Self::Gate { gate, up, activation, out } => Op::Gate { gate, up, activation, out },
            Self::Route { logits, top_k, out } => Op::Route { logits, top_k, out },
            Self::Dispatch { x, out } => Op::Dispatch { x, out },
            Self::ExpertLinear { x, ref weights, out } => {
                Op::ExpertLinear { x, weights: weights.clone(), out }
            }
            Self::Combine { x, scores, out } => Op::Combine { x, scores, out },
            Self::Add { a, b, out } => Op::Add { a, b, out },
            Self::Tap { site, x } => Op::Tap { site, x },
            Self::Loss { x, weight, softcap } => Op::Loss { x, weight, softcap },
            Self::Fused(ref none) => match *none {},
        }
    }
}
