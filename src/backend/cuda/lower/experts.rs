//! Experts: their weights become one, their products two for all of them.

use super::{Fuse, Fused};
use crate::model::Packing;
use crate::model::op::{Op, Slot, Weight};

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
