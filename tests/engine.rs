//! Whole models in float64: the gradient shown at the mlp site of every layer against central differences of the
//! total loss, for every row of the table of architectures.
//!
//! The op list is data, so "this value, a little changed" is an op more: each block gets a table of offsets, one row
//! per token, that is added to the mlp output right before its tap. Every position has a token id of its own, so
//! one element of the table moves one element of the site.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;

use common::{Random, random_weights, relative_l2, tensor, tiny_config, tolerance};
use gradlens::backend::Chunk;
use gradlens::backend::cpu::{Buf, Cpu};
use gradlens::engine::{Engine, EngineSpec, LossReduction};
use gradlens::error::{Kind, Result};
use gradlens::interrupt::Interrupt;
use gradlens::model::arch::ARCHITECTURES;
use gradlens::model::op::{Op, Site, Slot, Weight};
use gradlens::model::{Config, Dtype, Spec, Tensor, WeightSpec, describe};
use gradlens::source::Pass;
use gradlens::stats::{Direction, Sink, Splice, Tap};

/// Lengths of the samples: longer than the windows, ragged, one of a single token.
const LENGTHS: [usize; 5] = [9, 1, 6, 2, 14];
const TOKENS: usize = 32;
const VOCAB: usize = 40;
/// A power of two, so that it is exact in the table's float32.
const STEP: f64 = 1.0 / 131_072.0;

struct Case {
    model_type: &'static str,
    /// What the case is for, laid over the tiny configuration.
    keys: &'static str,
    /// The same without it: the test must notice.
    without: &'static str,
}

/// Three rotary frequencies of which one is kept, one blended, one divided.
const LLAMA3: &str = r#", "head_dim": 6, "rope_scaling": {"rope_type": "llama3", "factor": 4.0,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 40}"#;

const CASES: &[Case] = &[
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
    Case {
        model_type: "qwen2",
        keys: r#", "num_attention_heads": 6, "num_key_value_heads": 3, "use_sliding_window": true,
            "sliding_window": 4, "max_window_layers": 2"#,
        without: r#", "num_attention_heads": 6, "num_key_value_heads": 3, "use_sliding_window": true,
            "sliding_window": 4, "max_window_layers": 3"#,
    },
];

/// A model whose mlp outputs can be moved.
struct Movable {
    spec: Spec,
    tensors: Vec<Tensor>,
    /// By layer, the weight that holds its offsets. [V, D]
    offsets: Vec<Weight>,
}

impl Movable {
    fn new(model_type: &str, keys: &str) -> Self {
        let text = tiny_config(model_type, &format!(r#", "vocab_size": {VOCAB}{keys}"#));
        let config = Config::from_json(&text, Path::new("config.json")).unwrap();
        let mut spec = describe(&config);
        let mut tensors: Vec<Tensor> = spec.weights.iter().flat_map(|w| drawn(&spec, w)).collect();
        let shape = vec![VOCAB, spec.hidden_size];
        let mut offsets = Vec::new();
        for block in &mut spec.blocks {
            let weight = Weight(tensors.len());
            spec.weights.push(WeightSpec { name: "offsets".into(), shape: shape.clone() });
            tensors.push(tensor(Dtype::F32, &shape, &vec![0.0; VOCAB * shape[1]]));
            offsets.push(weight);
            // mlp → mlp + offsets, for the tap and for all that follows.
            let at = block.tap(Site::Mlp).unwrap();
            let Op::Tap { x: mlp, .. } = block.ops[at] else { unreachable!() };
            let (offset, moved) = (Slot(block.widths.len()), Slot(block.widths.len() + 1));
            block.widths.extend([shape[1]; 2]);
            for op in &mut block.ops[at..] {
                match op {
                    Op::Tap { x, .. } => *x = moved,
                    Op::Add { a, b, .. } => {
                        for slot in [a, b] {
                            *slot = if *slot == mlp { moved } else { *slot };
                        }
                    }
                    other => panic!("{other:?} after the mlp"),
                }
            }
            let ops = [Op::Embed { table: weight, out: offset }, Op::Add { a: mlp, b: offset, out: moved }];
            block.ops.splice(at..at, ops);
        }
        Self { spec, tensors, offsets }
    }

    /// Runs all samples; what the sites show, and the loss in nats over all targets.
    fn run(&self, spec: EngineSpec) -> (Shown, f64) {
        let cpu = Cpu::<f64>::new();
        let mut shown = Shown::default();
        let mut engine = Engine::new(&cpu, &self.spec, &self.tensors, spec);
        let run = engine.run(&pass(), &mut shown).unwrap();
        (shown, run.settle(&cpu).unwrap().nats.unwrap().iter().sum())
    }

    /// The loss with element (row, dimension) of a layer's mlp output moved.
    fn loss_moved(&mut self, layer: usize, row: usize, dimension: usize, by: f64) -> f64 {
        let d = self.spec.hidden_size;
        let mut values = vec![0.0; VOCAB * d];
        values[pass().ids[row] as usize * d + dimension] = by;
        let index = self.offsets[layer].0;
        let moved = tensor(Dtype::F32, &[VOCAB, d], &values);
        let still = std::mem::replace(&mut self.tensors[index], moved);
        // The last layer alone: the loss needs no backward.
        let (_, loss) = self.run(EngineSpec { layers: vec![2], ..all_layers() });
        self.tensors[index] = still;
        loss
    }
}

/// The tensor of one weight, drawn by its name: two models differ in nothing but what their configurations say.
fn drawn(spec: &Spec, weight: &WeightSpec) -> Vec<Tensor> {
    let seed = weight.name.bytes().fold(5, |seed: u64, byte| seed.wrapping_mul(31) + u64::from(byte));
    random_weights(&Spec { weights: vec![weight.clone()], ..spec.clone() }, Dtype::F32, seed)
}

/// Values and gradients of the mlp site, row after row. [N, D]
#[derive(Default, PartialEq)]
struct Shown(BTreeMap<(usize, Direction), Vec<f64>>);

impl Shown {
    fn gradient(&self, layer: usize) -> &[f64] {
        &self.0[&(layer, Direction::Gradients)]
    }
}

impl Sink<Cpu<f64>> for Shown {
    fn push(&mut self, _: &Cpu<f64>, tap: Tap, _: &Chunk, x: &Buf<f64>) -> Result<()> {
        assert_eq!(tap.site, Site::Mlp);
        self.0.entry((tap.layer, tap.direction)).or_default().extend_from_slice(x);
        Ok(())
    }
}

fn all_layers() -> EngineSpec {
    EngineSpec {
        layers: vec![0, 1, 2],
        gradients: true,
        loss_reduction: LossReduction::Token,
        chunk_tokens: 1000,
        keep_from: 0,
        resident_layers: usize::MAX,
    }
}

/// Samples of [`LENGTHS`]; every token id at most once, so that each position can be moved by itself.
fn pass() -> Pass {
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
fn sample_of_row() -> Vec<usize> {
    LENGTHS.iter().enumerate().flat_map(|(sample, length)| vec![sample; *length]).collect()
}

/// (row, dimension) of the places that are compared: every row, and every dimension somewhere.
fn places(d: usize) -> Vec<(usize, usize)> {
    (0..TOKENS).flat_map(|row| [(row, (5 * row) % d), (row, (7 * row + 1) % d)]).collect()
}

#[test]
fn every_architecture_has_a_case() {
    for row in ARCHITECTURES {
        assert!(CASES.iter().any(|case| case.model_type == row.model_type), "{}", row.model_type);
    }
}

#[test]
fn gradients_are_central_differences() {
    for Case { model_type, keys, without } in CASES {
        let mut model = Movable::new(model_type, keys);
        let other = Movable::new(model_type, without).run(all_layers()).0;
        let (shown, _) = model.run(all_layers());
        let d = model.spec.hidden_size;
        for layer in 0..3 {
            let (mut exact, mut numeric, mut of_other) = (vec![], vec![], vec![]);
            for (row, dimension) in places(d) {
                let mut at = |by: f64| model.loss_moved(layer, row, dimension, by);
                numeric.push((at(STEP) - at(-STEP)) / (2.0 * STEP));
                exact.push(shown.gradient(layer)[row * d + dimension]);
                of_other.push(other.gradient(layer)[row * d + dimension]);
            }
            let error = relative_l2(&exact, &numeric);
            assert!(error <= tolerance::FINITE_DIFFERENCES, "{model_type}{keys} layer {layer}: {error:e}");
            // Were the feature ignored, the comparison would see it.
            let distance = relative_l2(&of_other, &numeric);
            assert!(distance > 1e-3, "{model_type}{keys} layer {layer}: not tested, {distance:e}");
        }
    }
}

/// Nothing reaches from one sample into another, and last tokens and one-token samples have no gradient.
#[test]
fn gradients_are_zero_where_nothing_is_predicted() {
    for Case { model_type, keys, .. } in CASES {
        let model = Movable::new(model_type, keys);
        let d = model.spec.hidden_size;
        let (shown, _) = model.run(all_layers());
        let samples = sample_of_row();
        for layer in 0..3 {
            for (row, gradient) in shown.gradient(layer).chunks(d).enumerate() {
                let last = samples.get(row + 1) != Some(&samples[row]);
                assert_eq!(gradient.iter().all(|g| *g == 0.0), last, "{model_type} layer {layer} row {row}");
            }
        }
    }
}

/// The reductions differ by a factor of each sample, and by nothing else.
#[test]
fn reductions_scale_the_gradients_of_each_sample() {
    let pass = pass();
    for Case { model_type, keys, .. } in CASES {
        let model = Movable::new(model_type, keys);
        let d = model.spec.hidden_size;
        let (plain, loss) = model.run(all_layers());
        for loss_reduction in [LossReduction::Sample, LossReduction::Batch] {
            let (shown, same_loss) = model.run(EngineSpec { loss_reduction, ..all_layers() });
            assert_eq!(loss, same_loss, "the reported loss is in nats over all targets");
            for layer in 0..3 {
                let expected: Vec<f64> = plain
                    .gradient(layer)
                    .iter()
                    .enumerate()
                    .map(|(at, gradient)| {
                        let sample = sample_of_row()[at / d];
                        gradient
                            / match loss_reduction {
                                LossReduction::Sample => (LENGTHS[sample] - 1).max(1) as f64,
                                _ => pass.batch_targets[sample] as f64,
                            }
                    })
                    .collect();
                let error = relative_l2(shown.gradient(layer), &expected);
                assert!(error < 1e-13, "{model_type} {} layer {layer}: {error:e}", loss_reduction.name());
            }
        }
    }
}

/// Kept or computed again, in one chunk or in many: the same bits at every token.
#[test]
fn the_way_of_working_shows_nowhere() {
    for Case { model_type, keys, .. } in CASES {
        let model = Movable::new(model_type, keys);
        let (expected, loss) = model.run(all_layers());
        for (keep_from, chunk_tokens) in [(3, 1000), (0, 1), (3, 1), (1, 16), (2, 10)] {
            let (shown, same_loss) = model.run(EngineSpec { keep_from, chunk_tokens, ..all_layers() });
            assert!(shown == expected, "{model_type}: kept from {keep_from}, chunks of {chunk_tokens}");
            assert!((loss - same_loss).abs() <= 1e-12 * loss, "{model_type}: {loss} {same_loss}");
        }
        for layers in [vec![0], vec![1, 2], vec![2]] {
            let (shown, _) = model.run(EngineSpec { layers: layers.clone(), ..all_layers() });
            for layer in layers {
                assert!(shown.gradient(layer) == expected.gradient(layer), "{model_type} layer {layer}");
            }
        }
    }
}

/// Asks to stop when it is shown the `left`-th chunk.
struct Stops {
    interrupt: Interrupt,
    left: usize,
}

impl Sink<Cpu<f64>> for Stops {
    fn push(&mut self, _: &Cpu<f64>, _: Tap, _: &Chunk, _: &Buf<f64>) -> Result<()> {
        assert!(!self.interrupt.requested(), "a chunk more is worked on");
        self.left -= 1;
        if self.left == 0 {
            self.interrupt.request();
        }
        Ok(())
    }
}

/// On either way, in every layer: the chunk at work is the last one.
#[test]
fn an_interruption_stops_between_chunks() {
    let model = Movable::new(CASES[0].model_type, CASES[0].keys);
    let cpu = Cpu::<f64>::new();
    // A chunk for each sample, in three layers, forward and backward; after the last one nothing is left to stop.
    let chunks = LENGTHS.len() * 3 * 2;
    for left in 1..chunks {
        let interrupt = Interrupt::new();
        let spec = EngineSpec { chunk_tokens: 1, ..all_layers() };
        let mut engine =
            Engine::new(&cpu, &model.spec, &model.tensors, spec).interruptible(interrupt.clone());
        let error = engine.run(&pass(), &mut Stops { interrupt, left }).err().unwrap();
        assert_eq!(error.kind(), Kind::Interrupted { exit_code: 130 }, "chunk {left}");
    }
}

/// Moves every row of a site by what its token id says.
struct Moved {
    /// `[V, D]`
    by: Vec<f64>,
    shown: Shown,
}

impl Sink<Cpu<f64>> for Moved {
    fn push(&mut self, cpu: &Cpu<f64>, tap: Tap, chunk: &Chunk, x: &Buf<f64>) -> Result<()> {
        self.shown.push(cpu, tap, chunk, x)
    }
}

impl Splice<Cpu<f64>> for Moved {
    fn replace(&mut self, cpu: &Cpu<f64>, tap: Tap, chunk: &Chunk, x: &Buf<f64>) -> Result<Buf<f64>> {
        self.shown.push(cpu, tap, chunk, x)?;
        let d = x.len() / chunk.ids.len();
        let by = chunk.ids.iter().flat_map(|&id| &self.by[id as usize * d..][..d]);
        let moved: Vec<f64> = x.iter().zip(by).map(|(x, by)| x + by).collect();
        Ok(cpu.from_slice(&moved, d))
    }
}

/// A spliced run is, layer by layer, a run of the model whose site is moved there and nowhere else.
#[test]
fn a_spliced_layer_is_a_moved_one() {
    let cpu = Cpu::<f64>::new();
    for Case { model_type, keys, .. } in CASES {
        let mut model = Movable::new(model_type, keys);
        let d = model.spec.hidden_size;
        let mut random = Random::new(11);
        // Exact in the table's float32.
        let by: Vec<f64> = (0..VOCAB * d).map(|_| random.below(65) as f64 / 64.0 - 0.5).collect();
        let (plain, loss) = model.run(all_layers());
        for (layers, keep_from, chunk_tokens) in
            [(vec![0, 1, 2], 0, 1000), (vec![0, 2], 3, 10), (vec![1], 2, 1)]
        {
            let spec = EngineSpec { layers: layers.clone(), keep_from, chunk_tokens, ..all_layers() };
            let mut splice = Moved { by: by.clone(), shown: Shown::default() };
            let mut engine = Engine::new(&cpu, &model.spec, &model.tensors, spec);
            let totals = engine.run_spliced(&pass(), &mut splice).unwrap().settle(&cpu).unwrap();
            let own: f64 = totals.nats.unwrap().iter().sum();
            assert!((own - loss).abs() <= 1e-12 * loss, "{model_type}: the model's own loss, {own} {loss}");
            assert!(totals.spliced_nats.keys().copied().eq(layers.iter().copied()));
            for layer in layers {
                let values = &splice.shown.0[&(layer, Direction::Values)];
                assert!(
                    *values == plain.0[&(layer, Direction::Values)],
                    "{model_type} layer {layer}: values"
                );
                let index = model.offsets[layer].0;
                let still =
                    std::mem::replace(&mut model.tensors[index], tensor(Dtype::F32, &[VOCAB, d], &by));
                let (expected, moved_loss) = model.run(all_layers());
                model.tensors[index] = still;
                let error = relative_l2(splice.shown.gradient(layer), expected.gradient(layer));
                assert!(error < 1e-12, "{model_type} layer {layer}: {error:e}");
                let spliced: f64 = totals.spliced_nats[&layer].iter().sum();
                assert!((spliced - moved_loss).abs() <= 1e-12 * loss, "{model_type} layer {layer}: loss");
                // Were the layer not moved, or another one, the comparison would see it.
                let distance = relative_l2(plain.gradient(layer), expected.gradient(layer));
                assert!(
                    distance > 1e-3 && (moved_loss - loss).abs() > 1e-4 * loss,
                    "{model_type}: {distance:e}"
                );
            }
        }
    }
}
