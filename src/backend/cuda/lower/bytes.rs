//! What the slots of a block take for a chunk, and what each of its ops takes besides: conversions, rows that are
//! packed or computed once more, products before they are gated. Rows of experts are counted as their routing has
//! them, with those that are nobody's.

use super::{CudaLower, Fused};
use crate::backend::cuda::moe::Routing;
use crate::backend::cuda::rope::Pairs;
use crate::model::op::{Block, Fused as _, Op, Slot};

/// Bytes of float32.
const WIDE: u64 = 4;
/// Bytes of a segment of statistics, of which a token has one at most.
const SEGMENT_BYTES: u64 = 8;

/// A block at work on a chunk.
pub(super) struct Sizes<'a> {
    block: &'a Block<Fused>,
    tokens: u64,
    /// Bytes of an element as products read it.
    narrow: u64,
    /// k and E, if there are experts.
    experts: Option<(usize, usize)>,
    /// By slot: elements, bytes of one, bytes of one of its gradient.
    elements: Vec<u64>,
    values: Vec<u64>,
    gradients: Vec<u64>,
}

impl<'a> Sizes<'a> {
    pub(super) fn new(lower: &CudaLower, block: &'a Block<Fused>, tokens: usize) -> Self {
        let narrow = lower.format.pick(WIDE, 2);
        let experts = block.ops.iter().find_map(|op| match *op {
            Op::Route { logits, top_k, .. } => Some((top_k, block.widths[logits.0])),
            _ => None,
        });
        let elements = block.widths.iter().map(|&width| (width * tokens) as u64).collect();
        let all = vec![WIDE; block.widths.len()];
        let (values, gradients) = (all.clone(), all);
        let mut sizes = Self { block, tokens: tokens as u64, narrow, experts, elements, values, gradients };
        sizes.sort_rows();
        sizes.narrow_values();
        sizes.narrow_gradients();
        sizes
    }

    /// Slots whose rows are the experts'.
    fn sort_rows(&mut self) {
        let Some((top_k, experts)) = self.experts else { return };
        let rows = Routing::most_rows(self.tokens as usize, top_k, experts);
        let mut sorted = vec![false; self.elements.len()];
        for op in &self.block.ops {
            let of_rows = match op {
                Op::Dispatch { .. } | Op::ExpertLinear { .. } | Op::Fused(Fused::GatedExperts { .. }) => true,
                Op::Gate { gate, .. } => sorted[gate.0],
                _ => false,
            };
            for Slot(out) in op.outputs().into_iter().filter(|_| of_rows) {
                sorted[out] = true;
                self.elements[out] = (self.block.widths[out] / top_k * rows) as u64;
            }
        }
    }

    /// What products read.
    fn narrow_values(&mut self) {
        for op in &self.block.ops {
            let slot = match op {
                Op::Norm { out, .. } | Op::Attend { out, .. } | Op::Gate { out, .. } => out,
                Op::Fused(Fused::LinearRope { out, .. } | Fused::Attend { out, .. }) => out,
                Op::Dispatch { out, .. } => out,
                Op::Fused(Fused::GatedMlp { gate_up, .. } | Fused::GatedExperts { gate_up, .. }) => gate_up,
                _ => continue,
            };
            self.values[slot.0] = self.narrow;
        }
    }

    /// Fused ops write the gradient of what they alone read as products read it, and so does the experts' sum.
    fn narrow_gradients(&mut self) {
        for op in &self.block.ops {
            let slot = match op {
                Op::Fused(
                    Fused::LinearRope { x, .. }
                    | Fused::LinearAdd { x, .. }
                    | Fused::GatedMlp { x, .. }
                    | Fused::GatedExperts { x, .. },
                ) => x,
                Op::Fused(Fused::Attend { qkv, .. }) => qkv,
                Op::Combine { x, .. } if self.readers(*x) == 1 => x,
                _ => continue,
            };
            self.gradients[slot.0] = self.narrow;
        }
    }

    /// How many ops add to the gradient of a slot.
    fn readers(&self, slot: Slot) -> usize {
        let ops = self.block.ops.iter().filter(|op| !matches!(op, Op::Tap { .. }));
        ops.flat_map(Op::inputs).filter(|input| *input == slot).count()
    }

    /// Of each slot's value; of the scores with the routing that they came with.
    pub(super) fn value_bytes(&self) -> Vec<u64> {
        let mut bytes: Vec<u64> = self.elements.iter().zip(&self.values).map(|(n, size)| n * size).collect();
        for op in &self.block.ops {
            if let Op::Route { out, .. } = op {
                bytes[out.0] += self.routing_bytes();
            }
        }
        bytes
    }

    /// Of each slot's gradient.
    pub(super) fn gradient_bytes(&self) -> Vec<u64> {
        self.elements.iter().zip(&self.gradients).map(|(n, size)| n * size).collect()
    }

    /// The arrays of a [`Routing`].
    fn routing_bytes(&self) -> u64 {
        let Some((top_k, experts)) = self.experts else { return 0 };
        let rows = Routing::most_rows(self.tokens as usize, top_k, experts) as u64;
        4 * (self.tokens * top_k as u64 + rows + rows / 64 + 2)
    }

    /// Of an op, forward and backward.
    pub(super) fn temporary_bytes(&self, index: usize) -> [u64; 2] {
        let op = &self.block.ops[index];
        let [forward, backward] = self.of_op(op);
        let shown = if op.taps().is_empty() { 0 } else { SEGMENT_BYTES * self.tokens };
        // Routes stay as long as the state of the block.
        let besides = shown + self.routing_bytes();
        [forward + besides, backward + besides]
    }

    fn of_op(&self, op: &Op<Fused>) -> [u64; 2] {
        let narrow = self.narrow;
        let n = |slot: &Slot| self.elements[slot.0];
        // A slot's value, or its gradient, in a type of `to` bytes where it is of another.
        let value_as = |slot: &Slot, to: u64| if self.values[slot.0] == to { 0 } else { to * n(slot) };
        let gradient_as = |slot: &Slot, to: u64| if self.gradients[slot.0] == to { 0 } else { to * n(slot) };
        // What is computed by itself where there is a gradient to add it to.
        let added = |slot: &Slot| if self.readers(*slot) > 1 { WIDE * n(slot) } else { 0 };
        match op {
            Op::Embed { .. } | Op::Tap { .. } | Op::Loss { .. } => [0, 0],
            Op::Add { a, b, .. } => [value_as(a, WIDE) + value_as(b, WIDE), 0],
            Op::Norm { x, .. } => [value_as(x, WIDE); 2],
            Op::Linear { x, out, .. } => [value_as(x, narrow), gradient_as(out, narrow)],
            Op::Rope { x, .. } => [0, added(x)],
            Op::Attend { q, k, v, attention, out } => {
                let qkv = narrow * (n(q) + n(k) + n(v));
                let sums = WIDE * self.tokens * attention.heads as u64;
                // Once more forward; then ⟨dout, out⟩ of each head, and the three gradients in one.
                [qkv + sums, 2 * qkv + narrow * n(out) + 2 * sums + gradient_as(out, narrow)]
            }
            Op::Gate { gate, up, out, .. } => {
                let parts = value_as(gate, WIDE) + value_as(up, WIDE);
                [parts, parts + gradient_as(out, WIDE)]
            }
            Op::Route { logits, .. } => {
                let counts = 4 * (self.tokens / 256 + 3) * self.block.widths[logits.0] as u64;
                [value_as(logits, WIDE) + counts, 0]
            }
            Op::Dispatch { x, .. } => [value_as(x, narrow), 0],
            Op::ExpertLinear { x, out, .. } => [value_as(x, narrow), gradient_as(out, narrow) + added(x)],
            Op::Combine { x, scores, out } => {
                [0, value_as(x, WIDE) + gradient_as(out, WIDE) + added(x) + added(scores)]
            }
            Op::Fused(fused) => self.of_fused(fused),
        }
    }

    fn of_fused(&self, fused: &Fused) -> [u64; 2] {
        let narrow = self.narrow;
        let n = |slot: &Slot| self.elements[slot.0];
        // What a product is, shown before it is added.
        let shown = |out: &Slot| if fused.taps().is_empty() { 0 } else { WIDE * n(out) };
        // A gradient as products read it; that of the residual stream is float32.
        let operand = |out: &Slot| if self.gradients[out.0] == narrow { 0 } else { narrow * n(out) };
        let rounded = |out: &Slot| if narrow == WIDE { 0 } else { narrow * n(out) };
        match fused {
            // The rows before they are rotated and rounded.
            Fused::LinearRope { pairs: Pairs::Halves, out, .. } => [WIDE * n(out), 0],
            Fused::LinearRope { pairs: Pairs::Neighbours, .. } => [0, 0],
            // The denominators; ⟨dout, out⟩ of each head.
            Fused::Attend { out, lse, .. } => [WIDE * n(lse), WIDE * n(lse) + operand(out)],
            Fused::LinearAdd { out, .. } => [shown(out), rounded(out)],
            // The gated product; the gradients of gate and up.
            Fused::GatedMlp { gate_up, out, .. } => {
                [narrow * n(gate_up) / 2 + shown(out), narrow * n(gate_up) + rounded(out)]
            }
            Fused::GatedExperts { gate_up, out, .. } => {
                [narrow * n(gate_up) / 2, narrow * n(gate_up) + operand(out)]
            }
        }
    }
}
