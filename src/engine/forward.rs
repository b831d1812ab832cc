//! The forward walk: a block's op list from the first op to the last.

use std::ops::Range;

use super::State;
use crate::backend::{Backend, OnTap, Scope};
use crate::error::Result;
use crate::model::op::{Block, Op, Slot};

/// What a forward walk leaves behind for the way back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Nothing but the block's output.
    Output,
    /// The output and the input.
    Input,
    /// The output and every value that the backward of the ops from this index on reads.
    For(usize),
    /// Every value that the ops after the walked ones read.
    Rest,
}

/// Runs `block.ops[ops]` on `state`. A slot is freed after its last use unless `keep` wants it.
///
/// # Errors
/// The device's, and those of `on_tap`.
///
/// # Panics
/// If a slot that an op reads is empty: the op list or the range is wrong.
pub fn forward<B: Backend>(
    backend: &B,
    scope: &Scope<'_, B>,
    block: &Block<B::Fused>,
    ops: Range<usize>,
    keep: Keep,
    state: &mut State<B>,
    on_tap: OnTap<'_, B::Buf>,
) -> Result<()> {
    let last_uses = block.last_uses(ops.end);
    let saved = match keep {
        Keep::Output => vec![false; block.widths.len()],
        Keep::Input => (0..block.widths.len()).map(|slot| slot == Block::INPUT.0).collect(),
        Keep::For(start) => block.saved(start),
        Keep::Rest => block.read(ops.end),
    };
    // What a fused op has to write: what is read by an op to come, on either way, or by the next block.
    let whole = ops.end == block.ops.len();
    let wanted: Vec<bool> = (0..block.widths.len())
        .map(|slot| saved[slot] || last_uses[slot].is_some() || (whole && slot == block.output.0))
        .collect();
    let Scope { weights, rope, chunk } = *scope;
    let weight = |number| weights.get(number);
    for (index, op) in block.ops.iter().enumerate().take(ops.end).skip(ops.start) {
        if let Op::Fused(fused) = op {
            backend.fused(fused, scope, &wanted, &mut state.slots, on_tap)?;
            release(state, op, index, &last_uses, &saved);
            continue;
        }
        let slots = &state.slots;
        let get = |slot: Slot| match &slots[slot.0] {
            Some(buf) => buf,
            None => panic!("op {index} ({op:?}) reads an empty slot"),
        };
        let (out, value) = match *op {
            Op::Fused(_) => continue,
            Op::Embed { table, out } => (out, backend.embed(weight(table), chunk)?),
            Op::Norm { x, weight: w, eps, out } => (out, backend.norm(get(x), weight(w), eps)?),
            Op::Linear { x, weight: w, bias, out } => {
                (out, backend.linear(get(x), weight(w), bias.map(weight))?)
            }
            Op::Rope { x, heads, out } => (out, backend.rope(get(x), heads, rope, chunk)?),
            Op::Attend { q, k, v, attention, out } => {
                (out, backend.attend([get(q), get(k), get(v)], &attention, chunk)?)
            }
            Op::Gate { gate, up, activation, out } => (out, backend.gate(get(gate), get(up), activation)?),
            Op::Add { a, b, out } => (out, backend.add(get(a), get(b))?),
            Op::Tap { site, x } => {
                on_tap(site, get(x))?;
                release(state, op, index, &last_uses, &saved);
                continue;
            }
            Op::Loss { x, weight: w } => {
                // The backward of the loss is computed with it: both need the same logits.
                let (nats, dx) = backend.loss(get(x), weight(w), chunk, keep != Keep::Output)?;
                state.nats = Some(nats);
                state.grads[x.0] = dx;
                release(state, op, index, &last_uses, &saved);
                continue;
            }
        };
        state.slots[out.0] = Some(value);
        release(state, op, index, &last_uses, &saved);
    }
    Ok(())
}

fn release<B: Backend>(
    state: &mut State<B>,
    op: &Op<B::Fused>,
    index: usize,
    last_uses: &[Option<usize>],
    saved: &[bool],
) {
    for Slot(slot) in op.inputs() {
        if last_uses[slot] == Some(index) && !saved[slot] {
            state.slots[slot] = None;
        }
    }
}
