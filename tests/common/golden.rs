//! The golden checkpoints: tiny models of each architecture, with what transformers computes for them.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use gradlens::backend::Backend;
use gradlens::engine::{Engine, EngineSpec, LossReduction, Totals};
use gradlens::model::op::Site;
use gradlens::model::{Config, Spec, Tensor, describe};
use gradlens::source::{Pass, PassSpec, Passes, TextSpec, Texts, Tokens};
use gradlens::stats::{LayerMoments, MomentSink, SiteMoments, TokenPolicy};
use gradlens::weights::Checkpoint;
use safetensors::SafeTensors;
use serde_json::Value;

pub const GOLDENS: &[&str] = &[
    "qwen2",
    "qwen2_window",
    "llama3",
    "llama_linear",
    "mistral",
    "zephyr",
    "yi",
    "mixtral",
    "mixtral_fused",
    "qwen3",
    "gemma2",
    "gemma3",
];

/// The repository: where the tests were built, or, for tests that are carried to another machine, where this variable says.
pub fn repository() -> PathBuf {
    env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

pub fn folder(name: &str) -> PathBuf {
    repository().join("tests/goldens").join(name)
}

/// Expected arrays by name.
pub struct Expected(BTreeMap<String, Vec<f64>>);

impl Expected {
    pub fn read(path: &Path) -> Self {
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

    #[allow(dead_code, reason = "what only the comparison of everything needs")]
    #[allow(dead_code, reason = "one of the tests that share this file asks")]
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    pub fn get(&self, name: &str) -> &[f64] {
        self.0.get(name).unwrap_or_else(|| panic!("no {name} in the golden"))
    }
}

pub struct Golden {
    pub spec: Spec,
    pub tensors: Vec<Tensor>,
    pub passes: Vec<Pass>,
}

pub fn load(
    name: &str,
    corpus: &str,
    max_length: usize,
    tokens_per_pass: usize,
    batch_size: usize,
) -> Golden {
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

/// All passes on one backend, whose sums go on from pass to pass: of `mlp`, by layer.
pub fn run_on<B: Backend>(
    backend: &B,
    golden: &Golden,
    spec: EngineSpec,
) -> (BTreeMap<usize, LayerMoments>, Totals) {
    run_counting(backend, golden, spec, TokenPolicy::default())
}

/// The same, of the tokens that `policy` leaves.
pub fn run_counting<B: Backend>(
    backend: &B,
    golden: &Golden,
    spec: EngineSpec,
    policy: TokenPolicy,
) -> (BTreeMap<usize, LayerMoments>, Totals) {
    let (sites, totals) = run_sites_counting(backend, golden, spec, policy);
    let mlp = sites.into_iter().filter(|((_, site), _)| *site == Site::Mlp);
    (mlp.map(|((layer, _), moments)| (layer, moments)).collect(), totals)
}

/// Every wanted site.
pub fn run_sites<B: Backend>(backend: &B, golden: &Golden, spec: EngineSpec) -> (SiteMoments, Totals) {
    run_sites_counting(backend, golden, spec, TokenPolicy::default())
}

/// The same, of the tokens that `policy` leaves.
pub fn run_sites_counting<B: Backend>(
    backend: &B,
    golden: &Golden,
    spec: EngineSpec,
    policy: TokenPolicy,
) -> (SiteMoments, Totals) {
    let sink = MomentSink::new(&spec.widths(&golden.spec));
    let mut sink = sink.counting(policy, spec.gradients);
    let mut engine = Engine::new(backend, &golden.spec, &golden.tensors, spec);
    let mut totals = Totals::default();
    for pass in &golden.passes {
        let run = engine.run(pass, &mut sink).unwrap();
        totals.add(&run.settle(backend).unwrap());
    }
    (sink.read(backend).unwrap(), totals)
}

pub fn mean(sums: &[f64], count: u64) -> Vec<f64> {
    sums.iter().map(|s| s / count as f64).collect()
}

/// The sites that a model has.
pub fn sites(golden: &Golden) -> Vec<Site> {
    Site::ALL.into_iter().filter(|site| golden.spec.site_width(0, *site).is_some()).collect()
}

/// What a golden calls the statistics of a site, without its layer.
pub fn site_key(site: Site, key: &str) -> String {
    if site == Site::Mlp { key.to_owned() } else { format!("{}.{key}", site.name()) }
}

/// `mlp` of all layers.
pub fn everything(golden: &Golden) -> EngineSpec {
    EngineSpec {
        layers: (0..golden.spec.blocks.len()).collect(),
        sites: vec![Site::Mlp],
        gradients: true,
        loss_reduction: LossReduction::Sample,
        chunk_tokens: 1024,
        keep_from: 0,
        resident_layers: usize::MAX,
    }
}

pub fn settings(name: &str) -> (usize, usize) {
    let json: Value = serde_json::from_slice(&fs::read(folder(name).join("expected.json")).unwrap()).unwrap();
    let get = |key: &str| json[key].as_u64().unwrap() as usize;
    (get("max_length"), get("batch_size"))
}
