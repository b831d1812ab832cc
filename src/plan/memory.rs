//! How many tokens go through the model together, which layers keep what their backward needs, and which keep their
//! weights on the device.

mod walks;

use std::fmt;

use super::saes::SaeNeeds;
use crate::backend::{Appetite, Lower};
use crate::engine::EngineSpec;
use crate::model::op::{Block, Weight};
use crate::model::{Program, Spec};
use crate::units::size;
use walks::{chunks, head_bytes, kept_bytes, peak_bytes};

/// What a run takes, in bytes, and how it was made to fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    /// N at most.
    pub tokens_per_pass: usize,
    /// Tokens of a chunk at most, but for a longer sample.
    pub chunk_tokens: usize,
    /// Layers from this one on keep what their backward needs; wanted layers below compute it again.
    pub keep_from: usize,
    /// Layers below this one keep their weights on the device.
    pub resident_layers: usize,
    /// Weights on the device at a time.
    pub weight_bytes: u64,
    /// Residual stream and kept activations of a full pass.
    pub activation_bytes: u64,
    /// Slots of one block for one chunk, and the loss.
    pub workspace_bytes: u64,
    /// What these were to stay below.
    pub budget_bytes: u64,
}

impl Memory {
    /// Tells the engine.
    pub(super) fn set(&self, engine: &mut EngineSpec) {
        engine.chunk_tokens = self.chunk_tokens;
        engine.keep_from = self.keep_from;
        engine.resident_layers = self.resident_layers;
    }

    /// What all of it takes.
    pub fn total_bytes(&self) -> u64 {
        self.weight_bytes + self.activation_bytes + self.workspace_bytes
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [weights, activations, workspace] =
            [self.weight_bytes, self.activation_bytes, self.workspace_bytes].map(size);
        let tokens = self.chunk_tokens;
        write!(
            f,
            "{weights} for weights, {activations} for activations, {workspace} for work on {tokens} tokens at a time"
        )
    }
}

/// What is asked of the engine, as far as memory goes.
#[derive(Clone, Debug)]
pub struct Demand<'a> {
    /// The model.
    pub spec: &'a Spec,
    /// Layers, and whether gradients are wanted.
    pub engine: &'a EngineSpec,
    /// Hd.
    pub head_dim: usize,
    /// `--tokens_per_pass`.
    pub tokens_per_pass: Option<usize>,
    /// `--max_length`: no sample is longer, and a sample is never cut.
    pub max_length: usize,
    /// Longest sample the model was made for, in tokens.
    pub max_positions: usize,
    /// `--num_samples`: a pass never holds more.
    pub num_samples: usize,
    /// Whether weights that the backend leaves where they are come from a slow place: a disk that memory cannot cache.
    pub slow_weights: bool,
    /// Bytes the run may take.
    pub budget_bytes: u64,
    /// What choosing tokens takes for each token of a chunk, in bytes.
    pub choice_bytes: u64,
    /// What SAEs take, if there are any.
    pub features: Option<&'a SaeNeeds>,
}

/// Chooses the pass size, the layers that keep their weights, and those that keep their activations. Where even the
/// smallest choice does not fit the budget it is made all the same: the caller decides whether that is an error.
pub fn plan<L: Lower>(backend: &L, demand: &Demand<'_>) -> Memory {
    let spec = demand.spec;
    let program = backend.lower(spec, &demand.engine.usages(spec));
    let gradients = demand.engine.gradients;
    let layers = program.blocks.len();
    // A sample is hardly longer than the model was made for, whatever the user allows.
    let longest = demand.max_length.min(demand.max_positions);
    let needed = longest.saturating_mul(demand.num_samples).max(1);
    let Appetite { mut chunk_tokens, least_chunk_tokens, pass_tokens, streamed_pass_tokens } =
        backend.appetite(spec, gradients);
    if let Some(tokens) = demand.tokens_per_pass {
        chunk_tokens = chunk_tokens.min(tokens);
    }
    let widest = spec.blocks.iter().flat_map(|block| &block.widths).copied().max().unwrap_or(0);
    let widths: Vec<usize> = demand.engine.widths(spec).into_values().collect();
    let pairs = spec.inv_freq.iter().map(Vec::len).sum();
    let longest_pass = demand.tokens_per_pass.unwrap_or(pass_tokens.max(streamed_pass_tokens));
    let longest_pass = longest_pass.max(longest).min(needed);
    let of_chunk = |chunk_tokens: usize| chunk_tokens.max(longest).min(needed);
    let workspace = |chunk_tokens: usize| {
        let chunk = of_chunk(chunk_tokens);
        let chunks = chunks(longest_pass, chunk_tokens, longest);
        let blocks = peak_bytes(backend, &program, demand.engine, chunk);
        let head = match gradients {
            true => head_bytes(backend, spec, &program, chunk),
            false => 0,
        };
        let model = match demand.features {
            None => blocks.max(head),
            // What branches off a layer goes through the head while the layer waits.
            Some(needs) => blocks + head + needs.sums_bytes + needs.workspace_bytes(chunk),
        };
        backend.statistics_bytes(&widths, gradients, chunks, chunk)
            + backend.rope_bytes(pairs, longest)
            + model
            + backend.product_workspace_bytes(widest, chunk)
            + chunk as u64 * demand.choice_bytes
    };

    let first = demand.engine.layers.first().copied().unwrap_or(0);
    // The lowest wanted layer's backward ends at its lowest tap; where that is its first op, it runs whole like those above.
    let start = program.blocks[first].first_tap(&demand.engine.sites).unwrap_or(0);
    let whole = if start == 0 { first } else { first + 1 };
    let backward = if gradients { whole..layers } else { 0..0 };
    let residual = backend.slot_bytes(&program.embed, 1)[0];
    let per_token =
        residual + backend.placed_bytes() + demand.features.map_or(0, |needs| needs.bytes_per_token);
    // Bytes of a pass in chunks of so many tokens if its layers from `keep_from` on keep what their backward needs.
    let activations = |tokens: usize, keep_from: usize, chunk_tokens: usize| {
        let chunks = chunks(tokens, chunk_tokens, longest) as u64;
        let kept = |layer: usize, start: usize| {
            let of = |tokens: usize| kept_bytes(backend, &program.blocks[layer], start, tokens);
            of(tokens) + (chunks - 1) * of(0)
        };
        let inputs = backward.clone().filter(|layer| *layer < keep_from).count() as u64 * residual;
        let kept_whole: u64 = backward.clone().filter(|layer| *layer >= keep_from).map(|l| kept(l, 0)).sum();
        let lowest = if gradients && start > 0 { kept(first, start) } else { 0 };
        tokens as u64 * (inputs + per_token) + kept_whole + lowest
    };
    let all_recompute = backward.end;

    let weights = WeightBytes::of(backend, spec, &program, demand.engine);
    let least_pass = demand.tokens_per_pass.unwrap_or(1);
    let least = |chunk_tokens: usize| {
        let pass = least_pass.max(of_chunk(chunk_tokens)).min(needed);
        workspace(chunk_tokens) + activations(pass, all_recompute, chunk_tokens)
    };
    while chunk_tokens > least_chunk_tokens
        && least(chunk_tokens) + weights.on_device(0) > demand.budget_bytes
    {
        chunk_tokens /= 2;
    }
    let workspace_bytes = workspace(chunk_tokens);
    let least = least(chunk_tokens);
    let resident_layers = weights.resident_layers(demand.budget_bytes.saturating_sub(least));
    let weight_bytes = weights.on_device(resident_layers);
    let budget = demand.budget_bytes.saturating_sub(workspace_bytes + weight_bytes);

    // The smallest pass that is worth it: shrink before giving up kept activations only where the inputs
    // of the layers alone do not fit.
    let streamed = demand.slow_weights || resident_layers < demand.engine.visited_layers(layers);
    let default = if streamed { streamed_pass_tokens } else { pass_tokens };
    let mut tokens = demand.tokens_per_pass.unwrap_or(default).max(1);
    if demand.tokens_per_pass.is_none() {
        while tokens > chunk_tokens && activations(tokens.min(needed), all_recompute, chunk_tokens) > budget {
            tokens /= 2;
        }
    }
    let full_pass = tokens.max(longest).min(needed);
    let keep_from = (backward.start..=all_recompute)
        .find(|&keep_from| activations(full_pass, keep_from, chunk_tokens) <= budget)
        .unwrap_or(all_recompute);
    Memory {
        tokens_per_pass: tokens,
        chunk_tokens,
        keep_from,
        resident_layers,
        weight_bytes,
        activation_bytes: activations(full_pass, keep_from, chunk_tokens),
        workspace_bytes,
        budget_bytes: demand.budget_bytes,
    }
}

/// What the weights take where a backend copies them.
struct WeightBytes {
    embed: u64,
    layers: Vec<u64>,
    head: u64,
    all: u64,
}

impl WeightBytes {
    fn of<L: Lower>(backend: &L, spec: &Spec, program: &Program<L::Fused>, engine: &EngineSpec) -> Self {
        let each: Vec<u64> = program
            .weights
            .iter()
            .map(|packed| {
                let shapes: Vec<&[usize]> =
                    packed.parts.iter().map(|part| spec.weights[part.0].shape.as_slice()).collect();
                backend.weight_bytes(&shapes)
            })
            .collect();
        let of = |block: &Block<L::Fused>| block.weights().iter().map(|weight| each[weight.0]).sum::<u64>();
        let visited = &program.blocks[..engine.visited_layers(program.blocks.len())];
        let head = if engine.gradients { of(&program.head) } else { 0 };
        let mut all: Vec<Weight> = visited.iter().chain([&program.embed]).flat_map(Block::weights).collect();
        all.extend(if engine.gradients { program.head.weights() } else { Vec::new() });
        all.sort_unstable();
        all.dedup();
        Self {
            embed: of(&program.embed),
            layers: visited.iter().map(of).collect(),
            head,
            all: all.iter().map(|weight| each[weight.0]).sum(),
        }
    }

    /// Weights on the device at a time if so many layers keep theirs: where not all do, two stages besides.
    fn on_device(&self, resident_layers: usize) -> u64 {
        if resident_layers >= self.layers.len() {
            return self.all;
        }
        let (resident, streamed) = self.layers.split_at(resident_layers);
        let stages: Vec<u64> =
            [self.embed].into_iter().chain(streamed.iter().copied()).chain([self.head]).collect();
        let pair = stages.windows(2).map(|pair| pair[0] + pair[1]).max().unwrap_or(0);
        resident.iter().sum::<u64>() + pair
    }

    /// As many as fit `budget`.
    fn resident_layers(&self, budget: u64) -> usize {
        (0..=self.layers.len()).rev().find(|&layers| self.on_device(layers) <= budget).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::engine::LossReduction;
    use crate::model::op::Site;
    use crate::model::{Config, describe};

    fn spec() -> Spec {
        let text = format!(
            r#"{{"model_type": "{}", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 8,
            "num_attention_heads": 4, "vocab_size": 100, "rms_norm_eps": 1e-5}}"#,
            crate::model::arch::ARCHITECTURES[0].model_type
        );
        describe(&Config::from_json(&text, "config.json".as_ref()).unwrap())
    }

    /// Of the CPU for weights that do not fit its memory.
    const STREAMED: usize = 4096;

    fn engine(gradients: bool) -> EngineSpec {
        EngineSpec {
            layers: vec![2, 5],
            sites: vec![Site::Mlp],
            gradients,
            loss_reduction: LossReduction::Sample,
            chunk_tokens: 0,
            keep_from: 0,
            resident_layers: 0,
        }
    }

    fn demand<'a>(spec: &'a Spec, engine: &'a EngineSpec, budget_bytes: u64) -> Demand<'a> {
        Demand {
            spec,
            engine,
            head_dim: 16,
            tokens_per_pass: None,
            max_length: 128,
            max_positions: 2048,
            num_samples: 1_000_000,
            choice_bytes: 0,
            slow_weights: true,
            budget_bytes,
            features: None,
        }
    }

    #[test]
    fn a_large_budget_keeps_everything_and_a_small_one_nothing() {
        let (spec, cpu) = (spec(), Cpu::<f32>::new());
        let large = plan(&cpu, &demand(&spec, &engine(true), 1 << 40));
        assert_eq!((large.tokens_per_pass, large.keep_from), (STREAMED, 3));
        // h, h', q, k, v, gate, up of layers 3 to 7, and the residual stream.
        let kept = 64 * 5 + 2 * 256;
        assert_eq!(large.activation_bytes, 4 * 4096 * (5 * kept + 64));
        let small = plan(&cpu, &demand(&spec, &engine(true), 0));
        assert_eq!((small.tokens_per_pass, small.keep_from), (512, 8));
        assert_eq!(small.activation_bytes, 4 * 512 * (5 * 64 + 64));
        let budget = large.activation_bytes + large.workspace_bytes - 1;
        let middle = plan(&cpu, &demand(&spec, &engine(true), budget));
        assert_eq!((middle.tokens_per_pass, middle.keep_from), (STREAMED, 4));
    }

    #[test]
    fn weights_that_fit_make_small_passes() {
        let (spec, cpu) = (spec(), Cpu::<f32>::new());
        let memory = plan(&cpu, &Demand { slow_weights: false, ..demand(&spec, &engine(true), 1 << 40) });
        assert_eq!((memory.tokens_per_pass, memory.keep_from), (512, 3));
        let memory =
            plan(&cpu, &Demand { tokens_per_pass: Some(77), ..demand(&spec, &engine(true), 1 << 40) });
        assert_eq!(memory.tokens_per_pass, 77);
    }

    #[test]
    fn values_keep_nothing_but_the_residual_stream() {
        let (spec, cpu) = (spec(), Cpu::<f32>::new());
        let memory = plan(&cpu, &demand(&spec, &engine(false), 1 << 40));
        assert_eq!(memory.activation_bytes, 4 * 4096 * 64);
        let few = plan(&cpu, &Demand { num_samples: 2, ..demand(&spec, &engine(false), 1 << 40) });
        assert_eq!(few.activation_bytes, 4 * 256 * 64);
    }
}
