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
    /// The same once more: the output has been handed on long ago.
    Again(usize),
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
    let mut saved = match keep {
        Keep::Output => vec![false; block.widths.len()],
        Keep::Input => (0..block.widths.len()).map(|slot| slot == Block::INPUT.0).collect(),
        Keep::For(start) | Keep::Again(start) => block.saved(start),
        Keep::Rest => block.read(ops.end),
    };
    // The next block reads it.
    saved[block.output.0] |= ops.end == block.ops.len() && !matches!(keep, Keep::Again(_));
    // What a fused op has to write: what is read by an op to come, on either way, or by the next block.
    let wanted: Vec<bool> =
        saved.iter().zip(&last_uses).map(|(saved, last_use)| *saved || last_use.is_some()).collect();
    let Scope { weights, ropes, chunk } = *scope;
    let weight = |number| weights.get(number);
    for (index, op) in block.ops.iter().enumerate().take(ops.end).skip(ops.start) {
        if let Op::Fused(fused) = op {
            backend.fused(fused, scope, &wanted, &mut state.slots, state.routes.as_ref(), on_tap)?;
            release(state, op, index, &last_uses, &saved);
            continue;
        }
        let slots = &state.slots;
        let get = |slot: Slot| match &slots[slot.0] {
            Some(buf) => buf,
            None => panic!("op {index} ({op:?}) reads an empty slot"),
        };
        let routes = || match &state.routes {
            Some(routes) => routes,
            None => panic!("op {index} ({op:?}) goes by routes that nobody chose"),
        };
        let (out, value) = match *op {
            Op::Fused(_) => continue,
            Op::Embed { table, scale, out } => (out, backend.embed(weight(table), scale, chunk)?),
            Op::Norm { x, weight: w, norm, out } => (out, backend.norm(get(x), weight(w), norm)?),
            Op::Linear { x, weight: w, bias, out } => {
                (out, backend.linear(get(x), weight(w), bias.map(weight))?)
            }
            Op::Rope { x, heads, table, out } => (out, backend.rope(get(x), heads, &ropes[table], chunk)?),
            Op::Attend { q, k, v, attention, out } => {
                (out, backend.attend([get(q), get(k), get(v)], &attention, chunk)?)
            }
            Op::Gate { gate, up, activation, out } => (out, backend.gate(get(gate), get(up), activation)?),
            Op::Route { logits, top_k, out } => {
                let (scores, routes) = backend.route(get(logits), top_k)?;
                state.routes = Some(routes);
                (out, scores)
            }
            Op::Dispatch { x, out } => (out, backend.dispatch(get(x), routes())?),
            Op::ExpertLinear { x, weights: ref ws, out } => {
                let ws: Vec<_> = ws.iter().map(|&number| weight(number)).collect();
                (out, backend.expert_linear(get(x), &ws, routes())?)
            }
            Op::Combine { x, scores, out } => (out, backend.combine(get(x), get(scores), routes())?),
            Op::Add { a, b, out } => (out, backend.add(get(a), get(b))?),
            Op::Tap { site, x } => {
                on_tap(site, get(x))?;
                release(state, op, index, &last_uses, &saved);
                continue;
            }
            Op::Loss { x, weight: w, softcap } => {
                // The backward of the loss is computed with it: both need the same logits.
                let (nats, dx) = backend.loss(get(x), weight(w), softcap, chunk, keep != Keep::Output)?;
                state.nats = Some(nats);
                state.grads[x.0] = dx;
                release(state, op, index, &last_uses, &saved);
                continue;
            }
        };
        state.slots[out.0] = Some(value);
        release(state, op, index, &last_uses, &saved);
    }
    if keep == Keep::Input {
        state.routes = None;
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
