//! What a backend makes of a model, and what that takes.

use crate::model::op::{Block, Fused};
use crate::model::{Program, Spec, Usage};

/// How many tokens a backend likes to work on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appetite {
    /// Tokens of a chunk.
    pub chunk_tokens: usize,
    /// Tokens of a chunk at least, where memory is short.
    pub least_chunk_tokens: usize,
    /// Tokens of a pass where all weights stay where they are used.
    pub pass_tokens: usize,
    /// Tokens of a pass that brings weights from a slower place.
    pub streamed_pass_tokens: usize,
}

/// What a backend makes of a model, and what that takes: known before a device is opened.
pub trait Lower {
    /// Its own ops, each of which stands for several.
    type Fused: Fused;

    /// The op lists as this backend runs them; `usages` has one entry per layer.
    fn lower(&self, spec: &Spec, usages: &[Usage]) -> Program<Self::Fused>;

    /// The sizes that are fast for a model, if memory allows.
    fn appetite(&self, spec: &Spec, gradients: bool) -> Appetite;

    /// Bytes of each slot's value for a chunk of N = `tokens`; for none what is there however few they are.
    fn slot_bytes(&self, block: &Block<Self::Fused>, tokens: usize) -> Vec<u64>;

    /// The same of each slot's gradient.
    fn gradient_bytes(&self, block: &Block<Self::Fused>, tokens: usize) -> Vec<u64>;

    /// Bytes that a loaded weight takes besides the tensors where they lie; `shapes` are those of its parts.
    fn weight_bytes(&self, shapes: &[&[usize]]) -> u64;

    /// Bytes that the op `block.ops[index]` needs besides its slots and their gradients, forward and backward.
    fn temporary_bytes(&self, block: &Block<Self::Fused>, index: usize, tokens: usize) -> [u64; 2];

    /// Bytes of a placed chunk, and of what is known of its loss, for each token of a pass.
    fn placed_bytes(&self) -> u64;

    /// Bytes of the statistics of taps of these widths, of all passes under way, each of so many chunks of `tokens`.
    fn statistics_bytes(&self, widths: &[usize], gradients: bool, chunks: usize, tokens: usize) -> u64;

    /// Bytes of the rotary angles of so many pairs and positions.
    fn rope_bytes(&self, pairs: usize, positions: usize) -> u64;

    /// Bytes that [`super::Backend::loss`] needs besides its arguments and result, for N = `tokens`.
    fn loss_workspace_bytes(&self, spec: &Spec, tokens: usize) -> u64;

    /// Bytes that [`super::Backend::linear`] and its backward need besides arguments and result, for N = `tokens` and
    /// an input of `width`.
    fn product_workspace_bytes(&self, width: usize, tokens: usize) -> u64;
}
