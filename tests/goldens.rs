//! Every golden checkpoint from its folder to its statistics, against Hugging Face transformers.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use common::{relative_l2, tolerance};
use gradlens::backend::cpu::{Cpu, Element};
use gradlens::engine::{Engine, EngineSpec, LossReduction, Model, Totals};
use gradlens::model::{Config, Spec, Tensor, describe};
use gradlens::source::{Pass, PassSpec, Passes, TextSpec, Texts, Tokens};
use gradlens::stats::{LayerMoments, MomentSink};
use gradlens::weights::Checkpoint;
use safetensors::SafeTensors;
use serde_json::Value;

const GOLDENS: &[&str] = &["qwen2", "qwen2_window", "llama3", "llama_linear", "mistral", "zephyr", "yi"];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

/// Expected arrays by name.
struct Expected(BTreeMap<String, Vec<f64>>);

impl Expected {
    fn read(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let read = |view: safetensors::tensor::TensorView<'_>| -> Vec<f64> {
            let data = view.data();
            match view.dtype() {
                safetensors::Dtype::F64 => {
                    data.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
                }
                safetensors::Dtype::F32 => data
                    .chunks_exact(4)
                    .map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap())))
                    .collect(),
                safetensors::Dtype::I64 => {
                    data.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f64).collect()
                }
                other => panic!("{other:?}"),
            }
        };
        Self(file.tensors().into_iter().map(|(name, view)| (name, read(view))).collect())
    }

    fn get(&self, name: &str) -> &[f64] {
        self.0.get(name).unwrap_or_else(|| panic!("no {name} in the golden"))
    }
}

struct Golden {
    spec: Spec,
    tensors: Vec<Tensor>,
    passes: Vec<Pass>,
}

fn load(name: &str, corpus: &str, max_length: usize, tokens_per_pass: usize, batch_size: usize) -> Golden {
    let folder = folder(name);
    let path = folder.join("config.json");
    let config = Config::from_json(&fs::read_to_string(&path).unwrap(), &path).unwrap();
    let spec = describe(&config);
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let tensors = checkpoint.load(&spec.weights).unwrap();
    assert!(checkpoint.unused(&spec.weights).is_empty());
    let texts = Texts::open(&TextSpec {
        dataset: folder.join(corpus),
        text_column: "text".into(),
        min_chars: 0,
        num_samples: 1000,
    })
    .unwrap();
    let tokens = Tokens::open(&folder, max_length, config.vocab_size).unwrap();
    let passes = Passes::start(texts, tokens, PassSpec { tokens_per_pass, batch_size });
    Golden { spec, tensors, passes: passes.map(Result::unwrap).collect() }
}

fn run<T: Element>(golden: &Golden, spec: EngineSpec) -> (BTreeMap<usize, LayerMoments>, Totals) {
    run_on(&Cpu::<T>::new(), golden, spec)
}

fn run_on<T: Element>(
    cpu: &Cpu<T>,
    golden: &Golden,
    spec: EngineSpec,
) -> (BTreeMap<usize, LayerMoments>, Totals) {
    let model = Model::load(cpu, golden.spec.clone(), &golden.tensors).unwrap();
    let mut sink = MomentSink::new(&spec.layers, golden.spec.hidden_size);
    let mut engine = Engine::new(cpu, &model, spec);
    for pass in &golden.passes {
        engine.run(pass, &mut sink).unwrap();
    }
    let totals = engine.totals().clone();
    (sink.layers().clone(), totals)
}

fn mean(sums: &[f64], count: u64) -> Vec<f64> {
    sums.iter().map(|s| s / count as f64).collect()
}

fn everything(golden: &Golden) -> EngineSpec {
    EngineSpec {
        layers: (0..golden.spec.blocks.len()).collect(),
        gradients: true,
        loss_reduction: LossReduction::Sample,
        chunk_tokens: 1024,
        keep_from: 0,
    }
}

fn settings(name: &str) -> (usize, usize) {
    let json: Value = serde_json::from_slice(&fs::read(folder(name).join("expected.json")).unwrap()).unwrap();
    let get = |key: &str| json[key].as_u64().unwrap() as usize;
    (get("max_length"), get("batch_size"))
}

fn compare(what: &str, found: &[f64], expected: &[f64]) {
    let error = relative_l2(found, expected);
    assert!(error <= tolerance::GOLDEN, "{what}: relative L2 {error:e}");
}

fn check_layers(
    name: &str,
    key: &str,
    layers: &BTreeMap<usize, LayerMoments>,
    pick: impl Fn(&LayerMoments) -> &gradlens::backend::Moments,
    expected: &Expected,
) {
    for (layer, moments) in layers {
        let m = pick(moments);
        let at = |stat: &str| format!("layer_{layer}.{key}.{stat}");
        for (stat, found) in [
            ("mean", mean(&m.sum, m.count)),
            ("mean_abs", mean(&m.sum_abs, m.count)),
            ("max_abs", m.max_abs.clone()),
        ] {
            compare(&format!("{name} {}", at(stat)), &found, expected.get(&at(stat)));
        }
    }
}

#[test]
fn token_ids_are_those_of_transformers() {
    for name in GOLDENS {
        let (max_length, _) = settings(name);
        let golden = load(name, "corpus.jsonl", max_length, 1 << 20, 1);
        let expected = Expected::read(&folder(name).join("expected.safetensors"));
        let ids: Vec<f64> = golden.passes.iter().flat_map(|p| &p.ids).map(|&id| f64::from(id)).collect();
        assert_eq!(ids, expected.get("ids"), "{name}");
        let cu: Vec<f64> = golden.passes[0].cu_seqlens.iter().map(|&n| n as f64).collect();
        assert_eq!(cu, expected.get("cu_seqlens"), "{name}");
    }
}

#[test]
fn statistics_are_those_of_transformers() {
    for name in GOLDENS {
        let (max_length, batch_size) = settings(name);
        let expected = Expected::read(&folder(name).join("expected.safetensors"));
        let golden = load(name, "corpus.jsonl", max_length, 1 << 20, batch_size);
        for reduction in [LossReduction::Sample, LossReduction::Batch, LossReduction::Token] {
            let spec = EngineSpec { loss_reduction: reduction, ..everything(&golden) };
            // The fastest kernels of this machine, and those that every machine has.
            for cpu in [Cpu::<f32>::new(), Cpu::with_multiply_adds()] {
                let (layers, totals) = run_on(&cpu, &golden, spec.clone());
                let key = format!("gradients_{}", reduction.name());
                check_layers(name, &key, &layers, |m| m.gradients.as_ref().unwrap(), &expected);
                check_layers(name, "values", &layers, |m| m.values.as_ref().unwrap(), &expected);
                let loss = expected.get("loss_nats");
                assert!((totals.loss_nats.unwrap() / loss[0] - 1.0).abs() < 1e-5, "{name} loss");
                assert_eq!(totals.targets as f64, loss[1], "{name} targets");
            }
        }
    }
}

/// On texts that fill `max_length`, `batch` reduction is the algorithm of the scripts this program replaces.
#[test]
fn batch_reduction_is_the_scripts_algorithm() {
    let json: Value =
        serde_json::from_slice(&fs::read(folder("qwen2").join("expected.json")).unwrap()).unwrap();
    let max_length = json["scripts"]["max_length"].as_u64().unwrap() as usize;
    let expected = Expected::read(&folder("qwen2").join("expected_scripts.safetensors"));
    let golden = load("qwen2", "full.jsonl", max_length, 1 << 20, 4);
    assert!(golden.passes[0].cu_seqlens.windows(2).all(|p| p[1] - p[0] == max_length));
    let spec = EngineSpec { loss_reduction: LossReduction::Batch, ..everything(&golden) };
    let (layers, _) = run::<f32>(&golden, spec);
    for (layer, moments) in &layers {
        for (key, m) in [("values", &moments.values), ("gradients", &moments.gradients)] {
            let m = m.as_ref().unwrap();
            for (stat, sums) in [("mean", &m.sum), ("mean_abs", &m.sum_abs)] {
                let name = format!("layer_{layer}.{key}.{stat}");
                let error = relative_l2(&mean(sums, m.count), expected.get(&name));
                assert!(error <= 1e-5, "{name}: {error:e}");
            }
        }
    }
}

/// The same bytes for any pass size, chunk size, number of threads, and kept or recomputed activations.
#[test]
fn results_do_not_depend_on_how_the_work_is_cut() {
    for name in ["qwen2", "mistral"] {
        let (max_length, batch_size) = settings(name);
        let golden = load(name, "corpus.jsonl", max_length, 1 << 20, batch_size);
        for reduction in [LossReduction::Sample, LossReduction::Batch] {
            let base = EngineSpec { loss_reduction: reduction, ..everything(&golden) };
            let (reference, reference_totals) = run::<f32>(&golden, base.clone());
            let layers = golden.spec.blocks.len();
            for (tokens_per_pass, chunk_tokens, keep_from, threads) in
                [(1, 1, 0, 1), (100, 40, layers, 3), (1 << 20, 90, 1, 2), (150, 1024, 2, 4)]
            {
                let golden = load(name, "corpus.jsonl", max_length, tokens_per_pass, batch_size);
                let spec = EngineSpec { chunk_tokens, keep_from, ..base.clone() };
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let (layers, totals) = pool.install(|| run::<f32>(&golden, spec));
                assert_eq!(totals.loss_nats, reference_totals.loss_nats, "{name} loss");
                for (layer, moments) in &layers {
                    assert_eq!(moments.values, reference[layer].values, "{name} layer {layer} values");
                    assert_eq!(
                        moments.gradients, reference[layer].gradients,
                        "{name} layer {layer} gradients"
                    );
                }
            }
        }
    }
}

/// Fewer layers, or values alone, give the bytes of the full run.
#[test]
fn parts_of_a_run_are_parts_of_its_result() {
    for name in ["qwen2_window", "llama3"] {
        let (max_length, _) = settings(name);
        let golden = load(name, "corpus.jsonl", max_length, 1 << 20, 1);
        let (all, _) = run::<f32>(&golden, everything(&golden));
        for (layers, gradients) in
            [(vec![1], true), (vec![0, 2], true), (vec![2], true), (vec![0, 1, 2], false), (vec![1], false)]
        {
            let (some, totals) =
                run::<f32>(&golden, EngineSpec { layers: layers.clone(), gradients, ..everything(&golden) });
            assert_eq!(some.keys().copied().collect::<Vec<_>>(), layers);
            assert_eq!(totals.loss_nats.is_some(), gradients);
            for (layer, moments) in &some {
                assert_eq!(moments.values, all[layer].values);
                assert_eq!(moments.gradients.is_some(), gradients);
                if gradients {
                    assert_eq!(moments.gradients, all[layer].gradients);
                }
            }
        }
    }
}
