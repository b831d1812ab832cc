//! What the walks of one block hold at a time, as `engine` takes them.

use crate::backend::Lower;
use crate::engine::EngineSpec;
use crate::model::op::{Block, Fused, Op, Slot};
use crate::model::{Program, Spec};

/// Most chunks that a pass is cut into: as many as their size asks for, but more where the next sample, of at most
/// `longest` tokens, did not fit in. Two neighbours are together as large as the cut wants one to be.
pub(super) fn chunks(tokens: usize, chunk_tokens: usize, longest: usize) -> usize {
    let most = chunk_tokens.max(1);
    let even = tokens.div_ceil(most).max(1);
    match even {
        1 => 1,
        _ if longest >= most => 2 * even,
        _ => even.max(tokens.div_ceil(most - longest + 1)).min(2 * even),
    }
}

/// Bytes that a block keeps of a chunk for the backward of its ops from `start` on.
pub(super) fn kept_bytes<L: Lower>(backend: &L, block: &Block<L::Fused>, start: usize, tokens: usize) -> u64 {
    let bytes = backend.slot_bytes(block, tokens);
    bytes.iter().zip(block.saved(start)).filter(|(_, saved)| *saved).map(|(&bytes, _)| bytes).sum()
}

/// Most bytes that the slots of one block hold at a time for a chunk, values and gradients, and what its ops need
/// besides.
pub(super) fn peak_bytes<L: Lower>(
    backend: &L,
    program: &Program<L::Fused>,
    engine: &EngineSpec,
    tokens: usize,
) -> u64 {
    let visited = engine.visited_layers(program.blocks.len());
    let last_layer = engine.layers.last().copied();
    let peak = |(layer, block): (usize, &Block<L::Fused>)| {
        let walks = Walks::of(backend, block, engine.gradients, tokens);
        let last = block.last_tap(&engine.sites).filter(|_| !engine.gradients && Some(layer) == last_layer);
        walks.peak_bytes(last.map_or(block.ops.len(), |tap| tap + 1), 0)
    };
    program.blocks[..visited].iter().enumerate().map(peak).max().unwrap_or(0)
}

/// The same of the head.
pub(super) fn head_bytes<L: Lower>(
    backend: &L,
    spec: &Spec,
    program: &Program<L::Fused>,
    tokens: usize,
) -> u64 {
    let loss = backend.loss_workspace_bytes(spec, tokens);
    Walks::of(backend, &program.head, true, tokens).peak_bytes(program.head.ops.len(), loss)
}

/// One block's walks with a chunk, as the engine takes them.
struct Walks<'a, L: Lower> {
    backend: &'a L,
    block: &'a Block<L::Fused>,
    gradients: bool,
    tokens: usize,
    /// Of each slot's value and gradient.
    values: Vec<u64>,
    dvalues: Vec<u64>,
    /// Index of the op that writes each slot, if one does.
    written: Vec<Option<usize>>,
    /// Index of the first op whose backward reads each slot.
    saved: Vec<Option<usize>>,
    /// Index of the last op that adds to each slot's gradient.
    added: Vec<Option<usize>>,
}

impl<'a, L: Lower> Walks<'a, L> {
    fn of(backend: &'a L, block: &'a Block<L::Fused>, gradients: bool, tokens: usize) -> Self {
        let (values, dvalues) = (backend.slot_bytes(block, tokens), backend.gradient_bytes(block, tokens));
        let slots = 0..block.widths.len();
        let saved = |slot: usize| block.ops.iter().position(|op| op.saved().contains(&Slot(slot)));
        let adds = |op: &Op<L::Fused>| !matches!(op, Op::Tap { .. });
        let added =
            |slot: usize| block.ops.iter().rposition(|op| adds(op) && op.inputs().contains(&Slot(slot)));
        Self {
            backend,
            block,
            gradients,
            tokens,
            values,
            dvalues,
            written: slots.clone().map(|slot| written(block, slot)).collect(),
            saved: slots.clone().map(saved).collect(),
            added: slots.map(added).collect(),
        }
    }

    /// The most at a time of ops up to `end`, and of all on the way back; `loss`: what the loss needs besides its
    /// argument and result.
    fn peak_bytes(&self, end: usize, loss: u64) -> u64 {
        let last = self.block.last_uses(end);
        let forward = (0..end).map(|index| {
            let [temporary, _] = self.backend.temporary_bytes(self.block, index, self.tokens);
            let loss = match self.block.ops[index] {
                Op::Loss { x, .. } => loss + self.dvalues[x.0],
                _ => 0,
            };
            self.held_bytes(index, &last, end) + temporary + loss
        });
        let backward = (0..self.block.ops.len()).map(|index| {
            let [_, temporary] = self.backend.temporary_bytes(self.block, index, self.tokens);
            self.held_back_bytes(index) + temporary
        });
        let forward = forward.max().unwrap_or(0);
        if self.gradients { forward.max(backward.max().unwrap_or(0)) } else { forward }
    }

    /// Values that are there while op `index` runs: from their writer to their last reader, or kept; what nobody reads,
    /// while it is written, unless a fused op leaves it out.
    fn held_bytes(&self, index: usize, last: &[Option<usize>], end: usize) -> u64 {
        let held = |slot: usize| {
            let Some(from) = self.written[slot].filter(|from| *from <= index) else { return false };
            let kept = self.gradients && self.saved[slot].is_some();
            let handed_on = end == self.block.ops.len() && slot == self.block.output.0;
            let alone = from == index && !matches!(self.block.ops[index], Op::Fused(_));
            kept || handed_on || alone || last[slot].is_some_and(|last| last >= index)
        };
        (0..self.values.len()).filter(|&slot| held(slot)).map(|slot| self.values[slot]).sum()
    }

    /// On the way back: values that this op or one below reads, and gradients from the first op that adds to them to
    /// the op that wrote their slot.
    fn held_back_bytes(&self, index: usize) -> u64 {
        let of = |slot: usize| {
            let Some(from) = self.written[slot] else { return 0 };
            let value = self.saved[slot].is_some_and(|saved| saved <= index);
            let handed_down = slot == self.block.output.0 || self.added[slot].is_some_and(|op| op >= index);
            let gradient = from <= index && handed_down;
            u64::from(value) * self.values[slot] + u64::from(gradient) * self.dvalues[slot]
        };
        (0..self.values.len()).map(of).sum()
    }
}

/// Index of the op that writes a slot; 0 for the block's input, `None` for a slot that fusing has left out.
fn written<F: Fused>(block: &Block<F>, slot: usize) -> Option<usize> {
    let writes = |op: &Op<F>| op.outputs().iter().any(|out| out.0 == slot);
    if slot == Block::INPUT.0 { Some(0) } else { block.ops.iter().position(writes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_chunks_are_full_together() {
        assert_eq!(chunks(0, 128, 1), 1);
        assert_eq!(chunks(8192, 8192, 2048), 1);
        assert_eq!(chunks(16_384, 8192, 1), 2);
        assert_eq!(chunks(16_384, 8192, 128), 3);
        assert_eq!(chunks(16_384, 8192, 8192), 4);
    }
}
