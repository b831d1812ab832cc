//! Tiny models of every architecture whose values at a site can be moved, token by token.

use std::collections::BTreeMap;
use std::path::Path;

use gradlens::backend::Chunk;
use gradlens::backend::cpu::{Buf, Cpu};
use gradlens::engine::{Engine, EngineSpec, LossReduction};
use gradlens::error::Result;
use gradlens::model::op::{Op, Site, Slot, Weight};
use gradlens::model::{Config, Dtype, Spec, Tensor, WeightSpec, describe};
use gradlens::source::Pass;
use gradlens::stats::{Direction, Sink, Tap};

use super::common::{Random, random_weights, rename, tensor, tiny_config};

/// Lengths of the samples: longer than the windows, ragged, one of a single token.
pub const LENGTHS: [usize; 5] = [9, 1, 6, 2, 14];
pub const TOKENS: usize = 32;
pub const VOCAB: usize = 40;
/// A power of two, so that it is exact in the table's float32.
pub const STEP: f64 = 1.0 / 131_072.0;

pub struct Case {
    pub model_type: &'static str,
    /// What the case is for, laid over the tiny configuration.
    pub keys: &'static str,
    /// The same without it: the test must notice.
    pub without: &'static str,
}

/// Three rotary frequencies of which one is kept, one blended, one divided.
const LLAMA3: &str = r#", "head_dim": 6, "rope_scaling": {"rope_type": "llama3", "factor": 4.0,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 40}"#;

pub const CASES: &[Case] = &[
    // Grouped queries; without: each query head has its own keys.
    Case {
        model_type: "llama",
        keys: r#", "head_dim": 4"#,
        without: r#", "head_dim": 4, "num_key_value_heads": 4"#,
    },
    Case { model_type: "llama", keys: LLAMA3, without: r#", "head_dim": 6"# },
    Case {
        model_type: "llama",
        keys: r#", "head_dim": 6, "attention_bias": true, "mlp_bias": true"#,
        without: r#", "head_dim": 6"#,
    },
    Case {
        model_type: "llama",
        keys: r#", "head_dim": 6, "rope_scaling": {"rope_type": "linear", "factor": 3.0}"#,
        without: r#", "head_dim": 6"#,
    },
    Case {
        model_type: "mistral",
        keys: r#", "head_dim": 4, "sliding_window": 3, "num_key_value_heads": 1"#,
        without: r#", "head_dim": 4, "sliding_window": 4, "num_key_value_heads": 1"#,
    },
    // Biases of q, k and v, a window from layer 1 on, a tied head.
    Case {
        model_type: "qwen2",
        keys: r#", "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": true,
            "use_sliding_window": true, "sliding_window": 4, "max_window_layers": 1"#,
        without: r#", "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": false,
            "use_sliding_window": true, "sliding_window": 4, "max_window_layers": 1"#,
    },
    // Experts, one of them for each token or all but one.
    Case {
        model_type: "mixtral",
        keys: r#", "head_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 2"#,
        without: r#", "head_dim": 4, "num_local_experts": 4, "num_experts_per_tok": 1"#,
    },
    Case {
        model_type: "mixtral",
        keys: r#", "head_dim": 4, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 3"#,
        without: r#", "head_dim": 4, "num_local_experts": 3, "num_experts_per_tok": 3, "sliding_window": 3"#,
    },
    Case {
        model_type: "qwen3",
        keys: r#", "head_dim": 6, "attention_bias": true"#,
        without: r#", "head_dim": 6, "attention_bias": true, "rope_theta": 10.0"#,
    },
    // Both soft-caps, an even layer with a window and an odd one without.
    Case {
        model_type: "gemma2",
        keys: r#", "head_dim": 4, "query_pre_attn_scalar": 3, "sliding_window": 3,
            "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0"#,
        without: r#", "head_dim": 4, "query_pre_attn_scalar": 3, "sliding_window": 3,
            "attn_logit_softcapping": null, "final_logit_softcapping": 2.0"#,
    },
    Case {
        model_type: "gemma2",
        keys: r#", "head_dim": 6, "query_pre_attn_scalar": 6, "final_logit_softcapping": 1.5"#,
        without: r#", "head_dim": 6, "query_pre_attn_scalar": 6, "final_logit_softcapping": null"#,
    },
    // Two rotary bases, and norms of query and key heads.
    Case {
        model_type: "gemma3_text",
        keys: r#", "head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 4, "sliding_window_pattern": 2,
            "rope_local_base_freq": 10.0"#,
        without: r#", "head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 4, "sliding_window_pattern": 2,
            "rope_local_base_freq": 100.0"#,
    },
    Case {
        model_type: "qwen2",
        keys: r#", "num_attention_heads": 6, "num_key_value_heads": 3, "use_sliding_window": true,
            "sliding_window": 4, "max_window_layers": 2"#,
        without: r#", "num_attention_heads": 6, "num_key_value_heads": 3, "use_sliding_window": true,
            "sliding_window": 4, "max_window_layers": 3"#,
    },
];

/// A model of which the values at one site can be moved.
pub struct Movable {
    pub spec: Spec,
    pub tensors: Vec<Tensor>,
    /// By layer, the weight that holds its offsets. [V, width]
    pub offsets: Vec<Weight>,
    /// Of the site.
    pub width: usize,
    site: Site,
}

impl Movable {
    /// A model that can be moved at `site`; `None` where it has no such place.
    pub fn at(site: Site, model_type: &str, keys: &str) -> Option<Self> {
        let text = tiny_config(model_type, &format!(r#", "vocab_size": {VOCAB}{keys}"#));
        let config = Config::from_json(&text, Path::new("config.json")).unwrap();
        let mut spec = describe(&config);
        let mut tensors: Vec<Tensor> = spec.weights.iter().flat_map(|w| drawn(&spec, w)).collect();
        let width = spec.site_width(0, site)?;
        let shape = vec![VOCAB, width];
        let mut offsets = Vec::new();
        for block in &mut spec.blocks {
            let table = Weight(tensors.len());
            spec.weights.push(WeightSpec { name: "offsets".into(), shape: shape.clone(), elsewhere: None });
            tensors.push(tensor(Dtype::F32, &shape, &vec![0.0; VOCAB * width]));
            offsets.push(table);
            // x → x + offsets, for the tap and for all that follows.
            let at = block.tap(site).unwrap();
            let Op::Tap { x, .. } = block.ops[at] else { unreachable!() };
            let (offset, moved) = (Slot(block.widths.len()), Slot(block.widths.len() + 1));
            block.widths.extend([width; 2]);
            block.ops[at..].iter_mut().for_each(|op| rename(op, x, moved));
            if block.output == x {
                block.output = moved;
            }
            let ops = [Op::Embed { table, scale: 1.0, out: offset }, Op::Add { a: x, b: offset, out: moved }];
            block.ops.splice(at..at, ops);
        }
        Some(Self { spec, tensors, offsets, width, site })
    }

    /// The same at the output of the MLP, which every model has.
    pub fn new(model_type: &str, keys: &str) -> Self {
        Self::at(Site::Mlp, model_type, keys).unwrap()
    }

    /// What a run of all layers is asked for.
    pub fn all_layers(&self) -> EngineSpec {
        EngineSpec { sites: vec![self.site], ..all_layers() }
    }

    /// Runs all samples; what the site shows, and the loss in nats over all targets.
    pub fn run(&self, spec: EngineSpec) -> (Shown, f64) {
        let cpu = Cpu::<f64>::new();
        let mut shown = Shown::at(self.site);
        let mut engine = Engine::new(&cpu, &self.spec, &self.tensors, spec);
        let run = engine.run(&pass(), &mut shown).unwrap();
        (shown, run.settle(&cpu).unwrap().nats.unwrap().iter().sum())
    }

    /// The loss with element (row, dimension) of a layer's site moved.
    pub fn loss_moved(&mut self, layer: usize, row: usize, dimension: usize, by: f64) -> f64 {
        let mut values = vec![0.0; VOCAB * self.width];
        values[pass().ids[row] as usize * self.width + dimension] = by;
        let index = self.offsets[layer].0;
        let moved = tensor(Dtype::F32, &[VOCAB, self.width], &values);
        let still = std::mem::replace(&mut self.tensors[index], moved);
        // The last layer alone: the loss needs no backward.
        let (_, loss) = self.run(EngineSpec { layers: vec![2], ..self.all_layers() });
        self.tensors[index] = still;
        loss
    }
}

/// The tensor of one weight, drawn by its name: two models differ in nothing but what their configurations say.
fn drawn(spec: &Spec, weight: &WeightSpec) -> Vec<Tensor> {
    let seed = weight.name.bytes().fold(5, |seed: u64, byte| seed.wrapping_mul(31) + u64::from(byte));
    random_weights(&Spec { weights: vec![weight.clone()], ..spec.clone() }, Dtype::F32, seed)
}

/// Values and gradients of one site, row after row. [N, width]
#[derive(PartialEq)]
pub struct Shown {
    site: Site,
    pub rows: BTreeMap<(usize, Direction), Vec<f64>>,
}

impl Shown {
    pub fn at(site: Site) -> Self {
        Self { site, rows: BTreeMap::new() }
    }

    pub fn gradient(&self, layer: usize) -> &[f64] {
        &self.rows[&(layer, Direction::Gradients)]
    }

    pub fn values(&self, layer: usize) -> &[f64] {
        &self.rows[&(layer, Direction::Values)]
    }
}

impl Sink<Cpu<f64>> for Shown {
    fn push(&mut self, _: &Cpu<f64>, tap: Tap, _: &Chunk, x: &Buf<f64>) -> Result<()> {
        assert_eq!(tap.site, self.site);
        self.rows.entry((tap.layer, tap.direction)).or_default().extend_from_slice(x);
        Ok(())
    }
}

pub fn all_layers() -> EngineSpec {
    EngineSpec {
        layers: vec![0, 1, 2],
        sites: vec![Site::Mlp],
        gradients: true,
        loss_reduction: LossReduction::Token,
        chunk_tokens: 1000,
        keep_from: 0,
        resident_layers: usize::MAX,
    }
}

/// Samples of [`LENGTHS`]; every token id at most once, so that each position can be moved by itself.
pub fn pass() -> Pass {
    let mut ids: Vec<u32> = (0..VOCAB as u32).collect();
    let mut random = Random::new(3);
    for i in (1..VOCAB).rev() {
        ids.swap(i, random.below(i + 1));
    }
    ids.truncate(TOKENS);
    let mut cu_seqlens = vec![0];
    for length in LENGTHS {
        cu_seqlens.push(cu_seqlens.last().unwrap() + length);
    }
    assert_eq!(cu_seqlens.last(), Some(&TOKENS));
    let targets: Vec<u64> = LENGTHS.iter().map(|length| *length as u64 - 1).collect();
    // Batches of two samples, the last one alone.
    let batch_targets = (0..LENGTHS.len()).map(|s| targets[s / 2 * 2..].iter().take(2).sum()).collect();
    Pass { ids, cu_seqlens, samples: (0..LENGTHS.len() as u64).collect(), batch_targets }
}

/// The sample of each row.
pub fn sample_of_row() -> Vec<usize> {
    LENGTHS.iter().enumerate().flat_map(|(sample, length)| vec![sample; *length]).collect()
}
