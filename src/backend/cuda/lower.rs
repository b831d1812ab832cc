//! Which neighbouring ops become one of our own: pattern by pattern over the op list.
//!
//! | ops | fused |
//! |---|---|
//! | three linear maps of one input, rotation of the first two | one product, rotated in its epilogue |
//! | attention | the same over the one buffer, keeping what its backward needs |
//! | gate, up, gating, down (and what follows it) | two products, gating and its derivative in their epilogues |
//! | experts' gate, up, gating, down | the same two products with every expert's rows at once |
//! | linear, (tap,) residual addition | one product with the addition in its epilogue |

mod bytes;
mod experts;

use super::Format;
use super::element::SampleTile;
use super::loss::STRIP;
use super::rope::Pairs;
use super::stats::{SUMS_BYTES, check_bytes, partials_bytes};
use crate::backend::{Appetite, Lower};
use crate::model::op::{self, Attention, Block, Op, Site, Slot, Weight};
use crate::model::{Activation, Packed, Packing, Program, Spec, Usage};
use bytes::Sizes;

/// What a product is added to in its epilogue.
#[derive(Clone, Debug, PartialEq)]
pub struct Residual {
    /// The residual stream before.
    pub x: Slot,
    /// The residual stream after.
    pub sum: Slot,
    /// The sites that the product itself is shown at.
    pub taps: Vec<Site>,
}

/// Ops of this backend's own.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the fields are the operands of the formula above each variant")]
pub enum Fused {
    /// `out = x Wᵀ + b` with q, k and v in one row, of which the first `heads` heads are rotated. Where their pairs are
    /// neighbours, the rows of W and b are packed so; attention does not see in which order q and k both lie.
    LinearRope {
        x: Slot,
        weight: Weight,
        bias: Option<Weight>,
        heads: usize,
        table: usize,
        pairs: Pairs,
        out: Slot,
    },
    /// Attention of such rows; `lse` `[N, H]`, the logarithm of each softmax's denominator, is for the backward.
    Attend { qkv: Slot, attention: Attention, out: Slot, lse: Slot },
    /// `out = x Wᵀ + b`, `sum = residual + out`; `out` is written where it is tapped.
    LinearAdd { x: Slot, weight: Weight, bias: Option<Weight>, out: Slot, residual: Residual },
    /// `out = act(x Gᵀ) ∘ (x Uᵀ) Dᵀ` with the rows of G and U interleaved, and the residual addition if there is one;
    /// `gate_up` is for the backward.
    GatedMlp {
        x: Slot,
        gate_up_weight: Weight,
        gate_up_bias: Option<Weight>,
        activation: Activation,
        gate_up: Slot,
        weight: Weight,
        bias: Option<Weight>,
        out: Slot,
        residual: Option<Residual>,
    },
    /// The same for rows sorted by expert, with each row's expert's matrices: all experts' are stacked in one weight.
    GatedExperts {
        x: Slot,
        gate_up_weight: Weight,
        activation: Activation,
        gate_up: Slot,
        weight: Weight,
        out: Slot,
    },
}

impl op::Fused for Fused {
    fn inputs(&self) -> Vec<Slot> {
        match self {
            Self::LinearRope { x, .. } | Self::GatedExperts { x, .. } => vec![*x],
            Self::Attend { qkv, .. } => vec![*qkv],
            Self::LinearAdd { x, residual, .. } => vec![*x, residual.x],
            Self::GatedMlp { x, residual, .. } => {
                [*x].into_iter().chain(residual.as_ref().map(|r| r.x)).collect()
            }
        }
    }

    fn outputs(&self) -> Vec<Slot> {
        let product = |out: Slot, residual: Option<&Residual>| -> Vec<Slot> {
            let shown = residual.is_none_or(|residual| !residual.taps.is_empty()).then_some(out);
            shown.into_iter().chain(residual.map(|residual| residual.sum)).collect()
        };
        match self {
            Self::LinearRope { out, .. } => vec![*out],
            Self::Attend { out, lse, .. } => vec![*out, *lse],
            Self::GatedExperts { gate_up, out, .. } => vec![*gate_up, *out],
            Self::LinearAdd { out, residual, .. } => product(*out, Some(residual)),
            Self::GatedMlp { gate_up, out, residual, .. } => {
                [*gate_up].into_iter().chain(product(*out, residual.as_ref())).collect()
            }
        }
    }

    fn saved(&self) -> Vec<Slot> {
        match self {
            Self::LinearRope { .. } | Self::LinearAdd { .. } => vec![],
            Self::Attend { qkv, out, lse, .. } => vec![*qkv, *out, *lse],
            Self::GatedMlp { gate_up, .. } | Self::GatedExperts { gate_up, .. } => vec![*gate_up],
        }
    }

    fn weights(&self) -> Vec<Weight> {
        match self {
            Self::Attend { .. } => vec![],
            Self::LinearRope { weight, bias, .. } | Self::LinearAdd { weight, bias, .. } => {
                [*weight].into_iter().chain(*bias).collect()
            }
            Self::GatedExperts { gate_up_weight, weight, .. } => vec![*gate_up_weight, *weight],
            Self::GatedMlp { gate_up_weight, gate_up_bias, weight, bias, .. } => {
                [*gate_up_weight, *weight].into_iter().chain(*gate_up_bias).chain(*bias).collect()
            }
        }
    }

    fn taps(&self) -> Vec<Site> {
        match self {
            Self::LinearRope { .. } | Self::Attend { .. } | Self::GatedExperts { .. } => Vec::new(),
            Self::LinearAdd { residual, .. } => residual.taps.clone(),
            Self::GatedMlp { residual, .. } => {
                residual.as_ref().map(|residual| residual.taps.clone()).unwrap_or_default()
            }
        }
    }
}

/// How this backend lowers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaLower {
    /// Of weights and of what products read.
    pub format: Format,
    /// Whether ops are fused; without it each runs by itself, for comparison.
    pub fuse: bool,
}

/// Rows of logits that exist at a time make at most so many elements.
const MAX_LOGITS: usize = 1 << 28;

/// Rows of logits that exist at a time.
pub(super) fn logit_rows(vocab_size: usize) -> usize {
    (MAX_LOGITS / vocab_size.max(1)).clamp(128, 8192) / 128 * 128
}

impl Lower for CudaLower {
    type Fused = Fused;

    fn lower(&self, spec: &Spec, usages: &[Usage]) -> Program<Fused> {
        let mut program = Program::unfused(spec, usages);
        let mut packed = Vec::new();
        for (block, usage) in program.blocks.iter_mut().zip(usages) {
            let boundary = usage.boundary.and_then(|boundary| boundary.index(block));
            let first = spec.weights.len();
            let fuse = self.fuse;
            *block = Fuse { fuse, block, boundary, ops: Vec::new(), packed: &mut packed, first }.run();
        }
        program.weights.extend(packed);
        program
    }

    fn appetite(&self, _: &Spec, gradients: bool) -> Appetite {
        // Large enough to fill any device, small enough that what a pass keeps leaves room for the model.
        Appetite {
            chunk_tokens: 8192,
            least_chunk_tokens: 128,
            pass_tokens: 16_384,
            streamed_pass_tokens: if gradients { 32_768 } else { 65_536 },
        }
    }

    fn slot_bytes(&self, block: &Block<Fused>, tokens: usize) -> Vec<u64> {
        Sizes::new(self, block, tokens).value_bytes()
    }

    fn gradient_bytes(&self, block: &Block<Fused>, tokens: usize) -> Vec<u64> {
        Sizes::new(self, block, tokens).gradient_bytes()
    }

    fn weight_bytes(&self, shapes: &[&[usize]]) -> u64 {
        let bytes = |shape: &&[usize]| {
            let elements = shape.iter().map(|&size| size as u64).product::<u64>();
            elements * if shape.len() == 1 { 4 } else { self.format.pick(4, 2) }
        };
        shapes.iter().map(bytes).sum()
    }

    fn temporary_bytes(&self, block: &Block<Fused>, index: usize, tokens: usize) -> [u64; 2] {
        Sizes::new(self, block, tokens).temporary_bytes(index)
    }

    fn placed_bytes(&self) -> u64 {
        // Id, position, target and scale, a tile of attention at most, and nats, of the pass before too.
        4 * 4 + size_of::<SampleTile>() as u64 + 2 * 4
    }

    fn statistics_bytes(&self, widths: &[usize], gradients: bool, chunks: usize, tokens: usize) -> u64 {
        // A pass is read back while the next one runs.
        let passes = if gradients { 2 } else { 1 } * 2;
        let (all, widest) = (widths.iter().sum::<usize>(), widths.iter().max().copied().unwrap_or(0));
        // Of all tokens and of those at position 0.
        let sums = 2 * all * SUMS_BYTES;
        let checks = widths.len() * chunks * check_bytes(tokens);
        (passes * (sums + checks) + widest * partials_bytes(tokens)) as u64
    }

    fn rope_bytes(&self, pairs: usize, positions: usize) -> u64 {
        8 * (pairs * positions) as u64
    }

    fn loss_workspace_bytes(&self, spec: &Spec, tokens: usize) -> u64 {
        let vocab_size = spec.vocab_size;
        let rows = logit_rows(vocab_size).min(tokens) as u64;
        let strips = vocab_size.div_ceil(STRIP) as u64;
        rows * (self.format.pick(4, 2) * vocab_size as u64 + 8 * strips + 4)
    }

    fn product_workspace_bytes(&self, _: usize, _: usize) -> u64 {
        0
    }
}

/// One block being fused.
struct Fuse<'a> {
    fuse: bool,
    block: &'a Block<Fused>,
    /// The op before which a walk may start or end.
    boundary: Option<usize>,
    ops: Vec<Op<Fused>>,
    /// Weights made of several tensors, of all blocks so far; numbered from `first` on.
    packed: &'a mut Vec<Packed>,
    first: usize,
}

impl Fuse<'_> {
    fn run(mut self) -> Block<Fused> {
        let mut widths = self.block.widths.clone();
        let mut at = 0;
        while at < self.block.ops.len() {
            at += self.step(at, &mut widths);
        }
        Block { ops: self.ops, widths, output: self.block.output }
    }

    /// Ops from `at` on that may become one: none of the others reads a slot that is written inside, the boundary and
    /// the end are respected.
    fn window(&self, at: usize, len: usize) -> Option<&[Op<Fused>]> {
        let window = self.block.ops.get(at..at + len)?;
        let split = self.boundary.is_some_and(|boundary| at < boundary && boundary < at + len);
        (!split).then_some(window)
    }

    /// How often a slot is read.
    fn reads(&self, slot: Slot) -> usize {
        self.block.ops.iter().flat_map(Op::inputs).filter(|input| *input == slot).count()
    }

    fn pack(&mut self, parts: &[Weight], packing: Packing) -> Weight {
        self.packed.push(Packed { parts: parts.to_vec(), packing });
        Weight(self.first + self.packed.len() - 1)
    }

    /// Biases of a packed product: all of its parts have one, or none.
    fn pack_biases(&mut self, biases: &[Option<Weight>], packing: Packing) -> Option<Option<Weight>> {
        let there: Vec<Weight> = biases.iter().flatten().copied().collect();
        match there.len() {
            0 => Some(None),
            len if len == biases.len() => Some(Some(self.pack(&there, packing))),
            _ => None,
        }
    }

    /// Adds what stands at `at` to the list; how many ops that was.
    fn step(&mut self, at: usize, widths: &mut Vec<usize>) -> usize {
        let fused = self.fuse.then(|| {
            let pattern = self.attention(at, widths).or_else(|| self.gated(at, widths));
            pattern.or_else(|| self.gated_experts(at, widths)).or_else(|| self.addition(at))
        });
        fused.flatten().unwrap_or_else(|| {
            let op = self.stacked(self.block.ops[at].clone());
            self.ops.push(op);
            1
        })
    }

    /// q, k, v, two rotations, attention.
    fn attention(&mut self, at: usize, widths: &mut Vec<usize>) -> Option<usize> {
        let &[
            Op::Linear { x, weight: wq, bias: bq, out: q },
            Op::Linear { x: xk, weight: wk, bias: bk, out: k },
            Op::Linear { x: xv, weight: wv, bias: bv, out: v },
            Op::Rope { x: q_in, heads, table, out: q_out },
            Op::Rope { x: k_in, heads: kv_heads, table: k_table, out: k_out },
            Op::Attend { q: q_read, k: k_read, v: v_read, attention, out },
        ] = self.window(at, 6)?
        else {
            return None;
        };
        let matches = x == xk
            && x == xv
            && (q, k, table) == (q_in, k_in, k_table)
            && (q_out, k_out, v) == (q_read, k_read, v_read);
        let alone =
            [q, k, v, q_out, k_out].into_iter().all(|slot| self.reads(slot) == 1) && self.reads(x) == 3;
        if !matches || !alone {
            return None;
        }
        let (heads, head_dim) = (heads + kv_heads, attention.head_dim);
        // The product's epilogue turns two neighbouring pairs of a head at a time.
        let (pairs, packing) = if head_dim.is_multiple_of(4) {
            (Pairs::Neighbours, Packing::StackedPairs { head_dim, rows: heads * head_dim })
        } else {
            (Pairs::Halves, Packing::Stacked)
        };
        let bias = self.pack_biases(&[bq, bk, bv], packing)?;
        let weight = self.pack(&[wq, wk, wv], packing);
        let qkv = Slot(widths.len());
        widths.push(widths[q.0] + widths[k.0] + widths[v.0]);
        let lse = Slot(widths.len());
        widths.push(attention.heads);
        self.ops.push(Op::Fused(Fused::LinearRope { x, weight, bias, heads, table, pairs, out: qkv }));
        self.ops.push(Op::Fused(Fused::Attend { qkv, attention, out, lse }));
        Some(6)
    }

    /// Gate, up, gating, down, and the residual addition if nothing stands between.
    fn gated(&mut self, at: usize, widths: &mut Vec<usize>) -> Option<usize> {
        let &[
            Op::Linear { x, weight: wg, bias: bg, out: gate },
            Op::Linear { x: xu, weight: wu, bias: bu, out: up },
            Op::Gate { gate: gate_in, up: up_in, activation, out: hidden },
            Op::Linear { x: hidden_in, weight, bias, out },
        ] = self.window(at, 4)?
        else {
            return None;
        };
        let matches = x == xu && (gate, up, hidden) == (gate_in, up_in, hidden_in);
        let alone = [gate, up, hidden].into_iter().all(|slot| self.reads(slot) == 1) && self.reads(x) == 2;
        if !matches || !alone {
            return None;
        }
        let gate_up_bias = self.pack_biases(&[bg, bu], Packing::Interleaved)?;
        let gate_up_weight = self.pack(&[wg, wu], Packing::Interleaved);
        let gate_up = Slot(widths.len());
        widths.push(widths[gate.0] + widths[up.0]);
        let (residual, len) =
            self.residual(at, 4, out).map_or((None, 4), |(residual, len)| (Some(residual), len));
        self.ops.push(Op::Fused(Fused::GatedMlp {
            x,
            gate_up_weight,
            gate_up_bias,
            activation,
            gate_up,
            weight,
            bias,
            out,
            residual,
        }));
        Some(len)
    }

    /// A linear map that is added to the residual stream.
    fn addition(&mut self, at: usize) -> Option<usize> {
        let &[Op::Linear { x, weight, bias, out }] = self.window(at, 1)? else { return None };
        let (residual, len) = self.residual(at, 1, out)?;
        // The gradient of x is written, not added to.
        if self.reads(x) != 1 {
            return None;
        }
        self.ops.push(Op::Fused(Fused::LinearAdd { x, weight, bias, out, residual }));
        Some(len)
    }

    /// The taps and the addition behind a product of `len` ops at `at`, and how many ops that makes.
    fn residual(&self, at: usize, len: usize, out: Slot) -> Option<(Residual, usize)> {
        let tapped = |op: &Op<Fused>| match *op {
            Op::Tap { site, x } if x == out => Some(site),
            _ => None,
        };
        let taps: Vec<Site> = self.block.ops[at + len..].iter().map_while(tapped).collect();
        let add = at + len + taps.len();
        let &Op::Add { a, b, out: sum } = self.block.ops.get(add)? else { return None };
        self.window(at, add + 1 - at)?;
        let alone = b == out && a != out && self.reads(out) == 1 + taps.len();
        alone.then_some((Residual { x: a, sum, taps }, add + 1 - at))
    }
}
