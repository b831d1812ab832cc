//! Experts: their weights become one, their products two for all of them; and what their rows take besides.

use super::{CudaLower, Fuse, Fused};
use crate::backend::Lower;
use crate::backend::cuda::moe::Routing;
use crate::model::Packing;
use crate::model::op::{Block, Op, Slot, Weight};

impl Fuse<'_> {
    /// The op with all experts' weights stacked in one, if it has experts.
    pub(super) fn stacked(&mut self, op: Op<Fused>) -> Op<Fused> {
        match op {
            Op::ExpertLinear { x, weights, out } => {
                Op::ExpertLinear { x, weights: vec![self.pack(&weights, Packing::Stacked)], out }
            }
            other => other,
        }
    }

    /// Gate, up, gating, down of rows that are sorted by expert.
    pub(super) fn gated_experts(&mut self, at: usize, widths: &mut Vec<usize>) -> Option<usize> {
        let [
            Op::ExpertLinear { x, weights: gates, out: gate },
            Op::ExpertLinear { x: xu, weights: ups, out: up },
            Op::Gate { gate: gate_in, up: up_in, activation, out: hidden },
            Op::ExpertLinear { x: hidden_in, weights: downs, out },
        ] = self.window(at, 4)?
        else {
            return None;
        };
        let matches = x == xu && (gate, up, hidden) == (gate_in, up_in, hidden_in);
        let alone = [gate, up, hidden].into_iter().all(|slot| self.reads(*slot) == 1) && self.reads(*x) == 2;
        if !matches || !alone {
            return None;
        }
        let pairs: Vec<Weight> = gates.iter().zip(ups).flat_map(|(gate, up)| [*gate, *up]).collect();
        let (x, activation, out, downs) = (*x, *activation, *out, downs.clone());
        let gate_up = Slot(widths.len());
        widths.push(widths[gate.0] + widths[up.0]);
        let gate_up_weight = self.pack(&pairs, Packing::Interleaved);
        let weight = self.pack(&downs, Packing::Stacked);
        let fused = Fused::GatedExperts { x, gate_up_weight, activation, gate_up, weight, out };
        self.ops.push(Op::Fused(fused));
        Some(4)
    }
}

/// Bytes of the rows of `block` that belong to no token: each expert's begin at a tile of their own. Of all slots with
/// such rows, of their gradients and of what the ops need besides.
pub(super) fn padding_bytes(lower: &CudaLower, block: &Block<Fused>) -> u64 {
    let Some((experts, top_k)) = block.ops.iter().find_map(|op| match *op {
        Op::Route { logits, top_k, .. } => Some((block.widths[logits.0], top_k)),
        _ => None,
    }) else {
        return 0;
    };
    let mut sorted = vec![false; block.widths.len()];
    let mut temporary = 0;
    for (index, op) in block.ops.iter().enumerate() {
        let of_rows = match op {
            Op::Dispatch { .. } => true,
            Op::ExpertLinear { x, .. } | Op::Gate { gate: x, .. } => sorted[x.0],
            Op::Fused(Fused::GatedExperts { .. }) => true,
            _ => false,
        };
        if of_rows {
            op.outputs().iter().for_each(|slot| sorted[slot.0] = true);
            temporary += lower.temporary_bytes(block, index).into_iter().sum::<u64>();
        }
    }
    let slots = lower.slot_bytes(block);
    let slots: u64 =
        slots.iter().zip(&sorted).filter(|(_, sorted)| **sorted).map(|(bytes, _)| *bytes as u64).sum();
    // Values, and gradients of at most the same size or float32.
    let row_bytes = (3 * slots + temporary).div_ceil(top_k as u64);
    row_bytes * Routing::rows_for(0, top_k, experts) as u64
}
