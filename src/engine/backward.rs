//! The backward walk: a block's op list from the last op to the first.

use std::ops::Range;

use super::State;
use crate::backend::{Backend, OnTap, Scope};
use crate::error::Result;
use crate::model::op::{Block, Op, Slot};

/// Walks `block.ops[ops]` in reverse. `state.grads` holds dL/d of the slots written last; each op takes
/// the gradient of its output and adds to those of its inputs. Saved values are freed on the way.
///
/// A slot is written once, so its gradient is complete when the walk reaches the op that wrote it.
///
/// # Errors
/// The device's, and those of `on_tap`.
///
/// # Panics
/// If a saved value or a gradient is missing: the op list or the range is wrong.
pub fn backward<B: Backend>(
    backend: &B,
    scope: &Scope<'_, B>,
    block: &Block<B::Fused>,
    ops: Range<usize>,
    state: &mut State<B>,
    on_tap: OnTap<'_, B::Buf>,
) -> Result<()> {
    let Scope { weights, ropes, chunk } = *scope;
    let weight = |number| weights.get(number);
    for (index, op) in block.ops.iter().enumerate().take(ops.end).skip(ops.start).rev() {
        let State { slots, grads, routes, .. } = &mut *state;
        let chosen = || routes.as_ref().unwrap_or_else(|| panic!("op {index} ({op:?}) misses the routes"));
        let missing = |what: &str| -> ! { panic!("op {index} ({op:?}) misses a {what}") };
        let value = |slot: Slot| slots[slot.0].as_ref().unwrap_or_else(|| missing("saved value"));
        match *op {
            Op::Fused(ref fused) => {
                backend.fused_backward(fused, scope, slots, grads, routes.as_ref(), on_tap)?;
            }
            Op::Tap { site, x } => {
                on_tap(site, grads[x.0].as_ref().unwrap_or_else(|| missing("gradient")))?;
            }
            // The loss put its gradient in place on the way forward; token ids have none.
            Op::Loss { .. } | Op::Embed { .. } => {}
            Op::Norm { x, weight: w, norm, out } => {
                let dy = grads[out.0].take().unwrap_or_else(|| missing("gradient"));
                let dx = grads[x.0].take();
                grads[x.0] = Some(backend.norm_backward(value(x), weight(w), norm, &dy, dx)?);
            }
            Op::Linear { x, weight: w, out, .. } => {
                let dy = grads[out.0].take().unwrap_or_else(|| missing("gradient"));
                let dx = grads[x.0].take();
                grads[x.0] = Some(backend.linear_backward(weight(w), &dy, dx)?);
            }
            Op::Rope { x, heads, table, out } => {
                let dy = grads[out.0].take().unwrap_or_else(|| missing("gradient"));
                let dx = grads[x.0].take();
                grads[x.0] = Some(backend.rope_backward(&dy, heads, &ropes[table], chunk, dx)?);
            }
            Op::Attend { q, k, v, ref attention, out } => {
                let dy = grads[out.0].take().unwrap_or_else(|| missing("gradient"));
                let before = [q, k, v].map(|slot| grads[slot.0].take());
                let qkv = [q, k, v].map(value);
                let after = backend.attend_backward(qkv, attention, chunk, &dy, before)?;
                for (slot, grad) in [q, k, v].into_iter().zip(after) {
                    grads[slot.0] = Some(grad);
                }
            }
            Op::Gate { gate, up, activation, out } => {
                let dy = grads[out.0].take().unwrap_or_else(|| missing("gradient"));
                let before = [gate, up].map(|slot| grads[slot.0].take());
                let after = backend.gate_backward(value(gate), value(up), activation, &dy, before)?;
                for (slot, grad) in [gate, up].into_iter().zip(after) {
                    grads[slot.0] = Some(grad);
                }
            }
            Op::Route { out, logits, .. } => {
                let dy = grads[out.0].take().unwrap_or_else(|| missing("gradient"));
                let (dx, experts) = (grads[logits.0].take(), block.widths[logits.0]);
                grads[logits.0] = Some(backend.route_backward(value(out), chosen(), &dy, experts, dx)?);
            }
            Op::Dispatch { x, out } => {
                let dy = grads[out.0].take().unwrap_or_else(|| missing("gradient"));
                let dx = grads[x.0].take();
                grads[x.0] = Some(backend.dispatch_backward(&dy, chosen(), dx)?);
            }
            Op::ExpertLinear { x, weights: ref ws, out } => {
                let dy = grads[out.0].take().unwrap_or_else(|| missing("gradient"));
                let dx = grads[x.0].take();
                let ws: Vec<_> = ws.iter().map(|&number| weight(number)).collect();
                grads[x.0] = Some(backend.expert_linear_backward(&ws, chosen(), &dy, dx)?);
            }
            Op::Combine { x, scores, out } => {
                let dy = grads[out.0].take().unwrap_or_else(|| missing("gradient"));
                let before = [x, scores].map(|slot| grads[slot.0].take());
                let after = backend.combine_backward(value(x), value(scores), chosen(), &dy, before)?;
                for (slot, grad) in [x, scores].into_iter().zip(after) {
                    grads[slot.0] = Some(grad);
                }
            }
            Op::Add { a, b, out } => {
                let dy = grads[out.0].take().unwrap_or_else(|| missing("gradient"));
                let db = grads[b.0].take();
                grads[b.0] = Some(backend.add_backward(&dy, db)?);
                // The last operand takes the buffer over where it can.
                grads[a.0] = Some(match grads[a.0].take() {
                    None => dy,
                    some => backend.add_backward(&dy, some)?,
                });
            }
        }
        for slot in op.saved() {
            let read_later = block.ops[ops.start..index].iter().any(|op| op.saved().contains(&slot));
            if !read_later {
                state.slots[slot.0] = None;
            }
        }
    }
    Ok(())
}
