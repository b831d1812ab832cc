//! How many tokens go through the model together, and which layers keep what their backward needs.

use crate::backend::Backend;
use crate::model::Spec;
use crate::model::op::{Block, Site};

/// Tokens of a pass where the weights do not fit the memory: each pass reads all of them from the disk.
const TOKENS_PER_STREAMED_PASS: usize = 4096;
/// Tokens of a chunk on the CPU, and of a pass where the weights fit the memory: they are laid out anew for each
/// chunk, so a larger pass would only touch more memory. Gradients keep much for each token. Measured with
/// gradients of a 0.5B shape, 2 cores, 8 and 32 samples of 128 tokens: passes of 512 tokens 258 and 265 tokens/s,
/// of 1,024 tokens 233 and 277, of 4,096 tokens 195.
const CHUNK_TOKENS: [usize; 2] = [1024, 512];

/// What a run takes, in bytes, and how it was made to fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    /// N at most.
    pub tokens_per_pass: usize,
    /// Tokens of a chunk at most, but for a longer sample.
    pub chunk_tokens: usize,
    /// Layers from this one on keep what their backward needs; wanted layers below compute it again.
    pub keep_from: usize,
    /// Residual stream and kept activations of a full pass.
    pub activation_bytes: u64,
    /// Slots of one block for one chunk, and the loss.
    pub workspace_bytes: u64,
    /// What both were to stay below.
    pub budget_bytes: u64,
}

/// What is asked of the engine, as far as memory goes.
#[derive(Clone, Debug)]
pub struct Demand<'a> {
    /// The model.
    pub spec: &'a Spec,
    /// Wanted layers, ascending.
    pub layers: &'a [usize],
    /// Whether gradients are wanted.
    pub gradients: bool,
    /// `--tokens_per_pass`.
    pub tokens_per_pass: Option<usize>,
    /// `--max_length`: no sample is longer, and a sample is never cut.
    pub max_length: usize,
    /// Longest sample the model was made for, in tokens.
    pub max_positions: usize,
    /// `--num_samples`: a pass never holds more.
    pub num_samples: usize,
    /// Bytes of the weights, which are mapped.
    pub weight_bytes: u64,
    /// Bytes that are free for weights and activations.
    pub free_bytes: u64,
    /// Bytes activations may take.
    pub budget_bytes: u64,
}

/// Chooses the pass size and the layers that keep their activations. Where even the smallest choice does not
/// fit the budget it is made all the same: the budget is a wish, the bytes are printed.
pub fn plan<B: Backend>(backend: &B, demand: &Demand<'_>) -> Memory {
    let spec = demand.spec;
    let element = backend.element_bytes() as u64;
    // A sample is hardly longer than the model was made for, whatever the user allows.
    let longest = demand.max_length.min(demand.max_positions);
    let needed = longest.saturating_mul(demand.num_samples);
    let chunk_tokens = CHUNK_TOKENS[usize::from(demand.gradients)];
    let chunk = chunk_tokens.max(longest).min(needed.max(1));
    let widest = spec.blocks.iter().flat_map(|block| &block.widths).copied().max().unwrap_or(0);
    let loss = if demand.gradients {
        backend.loss_workspace_bytes(spec.vocab_size, spec.hidden_size, chunk)
    } else {
        0
    };
    let workspace_bytes = chunk as u64 * element * peak_width(spec, demand.gradients)
        + backend.product_workspace_bytes(widest, chunk)
        + loss;
    let budget = demand.budget_bytes.saturating_sub(workspace_bytes);

    let first = demand.layers.first().copied().unwrap_or(0);
    // Layers whose backward runs whole: those above the lowest wanted one.
    let backward = if demand.gradients { first + 1..spec.blocks.len() } else { 0..0 };
    let width = spec.hidden_size as u64;
    let kept = |layer: usize| kept_width(&spec.blocks[layer]);
    let bytes = |tokens: usize, keep_from: usize| {
        let widths: u64 = backward.clone().map(|l| if l < keep_from { width } else { kept(l) }).sum();
        tokens as u64 * element * (widths + width)
    };
    // The smallest pass that is worth it: shrink before giving up kept activations only where the inputs
    // of the layers alone do not fit.
    let all_recompute = backward.end;
    let streamed = demand.weight_bytes > demand.free_bytes;
    let default = if streamed { TOKENS_PER_STREAMED_PASS } else { chunk_tokens };
    let mut tokens = demand.tokens_per_pass.unwrap_or(default).max(1);
    if demand.tokens_per_pass.is_none() {
        while tokens > chunk_tokens && bytes(tokens.min(needed), all_recompute) > budget {
            tokens /= 2;
        }
    }
    let full_pass = tokens.max(longest).min(needed.max(1));
    let keep_from = (backward.start..=all_recompute)
        .find(|&keep_from| bytes(full_pass, keep_from) <= budget)
        .unwrap_or(all_recompute);
    Memory {
        tokens_per_pass: tokens,
        chunk_tokens,
        keep_from,
        activation_bytes: bytes(full_pass, keep_from),
        workspace_bytes,
        budget_bytes: demand.budget_bytes,
    }
}

/// Elements per token that a block keeps for its backward.
fn kept_width(block: &Block) -> u64 {
    let saved = block.saved(0);
    block.widths.iter().zip(saved).filter(|(_, saved)| *saved).map(|(&width, _)| width as u64).sum()
}

/// Most elements per token that the slots of one block hold at a time, values and gradients.
fn peak_width(spec: &Spec, gradients: bool) -> u64 {
    let peak = |block: &Block| {
        let mut end = block.ops.len();
        if !gradients {
            end = block.tap(Site::Mlp).map_or(end, |tap| tap + 1);
        }
        let last = block.last_uses(end);
        let live = |index: usize| -> u64 {
            let alive = |slot: usize| written(block, slot) <= index && last[slot].is_some_and(|l| l >= index);
            (0..block.widths.len()).filter(|&s| alive(s)).map(|s| block.widths[s] as u64).sum()
        };
        let forward = (0..end).map(live).max().unwrap_or(0);
        // On the way back the saved values stay and the widest gradients pass by: those of an op's inputs
        // and output.
        let grads =
            block.ops.iter().map(|op| op.inputs().iter().map(|s| block.widths[s.0] as u64).sum::<u64>());
        let backward = kept_width(block) + 2 * grads.max().unwrap_or(0);
        if gradients { forward.max(backward) } else { forward }
    };
    spec.blocks.iter().map(peak).max().unwrap_or(0)
}

/// Index of the op that writes a slot; 0 for the block's input.
fn written(block: &Block, slot: usize) -> usize {
    block.ops.iter().position(|op| op.output().is_some_and(|out| out.0 == slot)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::model::{Config, describe};

    fn spec() -> Spec {
        let text = format!(
            r#"{{"model_type": "{}", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 8,
            "num_attention_heads": 4, "vocab_size": 100, "rms_norm_eps": 1e-5}}"#,
            crate::model::arch::ARCHITECTURES[0].model_type
        );
        describe(&Config::from_json(&text, "config.json".as_ref()).unwrap())
    }

    fn demand(spec: &Spec, budget_bytes: u64) -> Demand<'_> {
        Demand {
            spec,
            layers: &[2, 5],
            gradients: true,
            tokens_per_pass: None,
            max_length: 128,
            max_positions: 2048,
            num_samples: 1_000_000,
            weight_bytes: 2,
            free_bytes: 1,
            budget_bytes,
        }
    }

    #[test]
    fn a_large_budget_keeps_everything_and_a_small_one_nothing() {
        let (spec, cpu) = (spec(), Cpu::<f32>::new());
        let large = plan(&cpu, &demand(&spec, 1 << 40));
        assert_eq!((large.tokens_per_pass, large.keep_from), (TOKENS_PER_STREAMED_PASS, 3));
        // h, h', q, k, v, gate, up of layers 3 to 7, and the residual stream.
        let kept = 64 * 5 + 2 * 256;
        assert_eq!(large.activation_bytes, 4 * 4096 * (5 * kept + 64));
        let small = plan(&cpu, &demand(&spec, 0));
        assert_eq!((small.tokens_per_pass, small.keep_from), (512, 8));
        assert_eq!(small.activation_bytes, 4 * 512 * (5 * 64 + 64));
        let budget = large.activation_bytes + large.workspace_bytes - 1;
        let middle = plan(&cpu, &demand(&spec, budget));
        assert_eq!((middle.tokens_per_pass, middle.keep_from), (TOKENS_PER_STREAMED_PASS, 4));
    }

    #[test]
    fn weights_that_fit_make_small_passes() {
        let (spec, cpu) = (spec(), Cpu::<f32>::new());
        let memory = plan(&cpu, &Demand { weight_bytes: 1, ..demand(&spec, 1 << 40) });
        assert_eq!((memory.tokens_per_pass, memory.keep_from), (512, 3));
        let memory = plan(&cpu, &Demand { tokens_per_pass: Some(77), ..demand(&spec, 1 << 40) });
        assert_eq!(memory.tokens_per_pass, 77);
    }

    #[test]
    fn values_keep_nothing_but_the_residual_stream() {
        let (spec, cpu) = (spec(), Cpu::<f32>::new());
        let memory = plan(&cpu, &Demand { gradients: false, ..demand(&spec, 1 << 40) });
        assert_eq!(memory.activation_bytes, 4 * 4096 * 64);
        let few = plan(&cpu, &Demand { gradients: false, num_samples: 2, ..demand(&spec, 1 << 40) });
        assert_eq!(few.activation_bytes, 4 * 256 * 64);
    }
}
