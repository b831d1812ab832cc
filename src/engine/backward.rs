//! The backward walk: a block's op list from the last op to the first.

use std::ops::Range;

use super::{Model, OnTap, State};
use crate::backend::{Backend, Chunk};
use crate::error::Result;
use crate::model::op::{Block, Op, Slot};

/// Walks `block.ops[ops]` in reverse. `state.grads` holds dL/d of the slots written last; each op takes
/// the gradient of its output and adds to those of its inputs. Saved values are freed on the way.
///
/// A slot is written once, so its gradient is complete when the walk reaches the op that wrote it.
///
/// # Panics
/// If a saved value or a gradient is missing: the op list or the range is wrong.
pub fn backward<B: Backend>(
    backend: &B,
    model: &Model<B>,
    rope: &B::Rope,
    block: &Block,
    ops: Range<usize>,
    chunk: &Chunk,
    state: &mut State<B>,
    on_tap: OnTap<'_, B>,
) -> Result<()> {
    let weight = |weight: crate::model::op::Weight| &model.weights[weight.0];
    for (index, op) in block.ops.iter().enumerate().take(ops.end).skip(ops.start).rev() {
        let State { slots, grads, .. } = state;
        let missing = |what: &str| -> ! { panic!("op {index} ({op:?}) misses a {what}") };
        let value = |slot: Slot| slots[slot.0].as_ref().unwrap_or_else(|| missing("saved value"));
        let mut grad_of = |slot: Slot| grads[slot.0].take();
        match *op {
            Op::Tap { site, x } => {
                on_tap(site, grads[x.0].as_ref().unwrap_or_else(|| missing("gradient")))?;
            }
            // The loss put its gradient in place on the way forward; token ids have none.
            Op::Loss { .. } | Op::Embed { .. } => {}
            Op::Norm { x, weight: w, eps, out } => {
                let dy = grad_of(out).unwrap_or_else(|| missing("gradient"));
                let dx = grad_of(x);
                grads[x.0] = Some(backend.norm_backward(value(x), weight(w), eps, &dy, dx));
            }
            Op::Linear { x, weight: w, out, .. } => {
                let dy = grad_of(out).unwrap_or_else(|| missing("gradient"));
                let dx = grad_of(x);
                grads[x.0] = Some(backend.linear_backward(weight(w), &dy, dx));
            }
            Op::Rope { x, heads, out } => {
                let dy = grad_of(out).unwrap_or_else(|| missing("gradient"));
                let dx = grad_of(x);
                grads[x.0] = Some(backend.rope_backward(&dy, heads, rope, chunk, dx));
            }
            Op::Attend { q, k, v, ref attention, out } => {
                let dy = grad_of(out).unwrap_or_else(|| missing("gradient"));
                let before = [q, k, v].map(&mut grad_of);
                let qkv = [q, k, v].map(value);
                let after = backend.attend_backward(qkv, attention, chunk, &dy, before);
                for (slot, grad) in [q, k, v].into_iter().zip(after) {
                    grads[slot.0] = Some(grad);
                }
            }
            Op::Gate { gate, up, activation, out } => {
                let dy = grad_of(out).unwrap_or_else(|| missing("gradient"));
                let before = [gate, up].map(&mut grad_of);
                let after = backend.gate_backward(value(gate), value(up), activation, &dy, before);
                for (slot, grad) in [gate, up].into_iter().zip(after) {
                    grads[slot.0] = Some(grad);
                }
            }
            Op::Add { a, b, out } => {
                let dy = grad_of(out).unwrap_or_else(|| missing("gradient"));
                let db = grad_of(b);
                grads[b.0] = Some(backend.add_backward(&dy, db));
                // The last operand takes the buffer over where it can.
                grads[a.0] = Some(match grads[a.0].take() {
                    None => dy,
                    some => backend.add_backward(&dy, some),
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
