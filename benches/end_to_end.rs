//! The demo's model and corpus through the engine: values alone, and values with gradients, of every layer.
//!
//! `cargo bench --bench end_to_end`. Throughput is tokens: criterion's `Kelem/s` is thousands of tokens a
//! second. Reading and tokenising are not in it. The model is tiny (D = 128), so this follows the engine's
//! own costs; `benches/peers` has a model of real size and somebody to compare with.

#![allow(clippy::unwrap_used, reason = "a bench that cannot start should stop")]

use std::fs;
use std::path::Path;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use gradlens::backend::Backend;
use gradlens::backend::cpu::Cpu;
use gradlens::engine::{Engine, EngineSpec, LossReduction};
use gradlens::model::op::Site;
use gradlens::model::{Config, Spec, Tensor, describe};
use gradlens::source::{Pass, PassSpec, Passes, TextSpec, Texts, Tokens};
use gradlens::stats::MomentSink;
use gradlens::weights::Checkpoint;

const STORIES: usize = 64;
const MAX_LENGTH: usize = 128;

/// What does not depend on the backend.
struct Demo {
    spec: Spec,
    tensors: Vec<Tensor>,
    passes: Vec<Pass>,
}

impl Demo {
    fn load() -> Self {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/demo");
        let path = folder.join("config.json");
        let config = Config::from_json(&fs::read_to_string(&path).unwrap(), &path).unwrap();
        let spec = describe(&config);
        let tensors = Checkpoint::open(&folder).unwrap().load(&spec.weights).unwrap();
        let texts = Texts::open(&TextSpec {
            dataset: folder.join("corpus.jsonl"),
            text_column: "text".into(),
            min_chars: 50,
            num_samples: STORIES,
        });
        let tokens = Tokens::open(&folder, MAX_LENGTH, config.vocab_size).unwrap();
        let pass = PassSpec { tokens_per_pass: 4096, batch_size: 1 };
        let passes = Passes::start(texts.unwrap(), tokens, pass).map(Result::unwrap).collect();
        Self { spec, tensors, passes }
    }

    fn tokens(&self) -> u64 {
        self.passes.iter().map(|pass| pass.ids.len() as u64).sum()
    }
}

/// The demo on one backend, named `device` in the report.
fn demo_on<B: Backend>(c: &mut Criterion, device: &str, backend: &B) {
    let demo = Demo::load();
    let mut group = c.benchmark_group(format!("demo/{device}"));
    group.sample_size(10).warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(5));
    group.throughput(Throughput::Elements(demo.tokens()));
    for (name, gradients) in [("values", false), ("gradients", true)] {
        let spec = EngineSpec {
            layers: (0..demo.spec.blocks.len()).collect(),
            sites: vec![Site::Mlp],
            gradients,
            loss_reduction: LossReduction::Sample,
            chunk_tokens: 1024,
            keep_from: 0,
            resident_layers: usize::MAX,
        };
        group.bench_function(name, |b| {
            b.iter(|| {
                let mut sink = MomentSink::new(&spec.widths(&demo.spec));
                let mut engine = Engine::new(backend, &demo.spec, &demo.tensors, spec.clone());
                for pass in &demo.passes {
                    engine.run(pass, &mut sink).unwrap();
                }
                sink.read(backend).unwrap()
            })
        });
    }
}

fn cpu(c: &mut Criterion) {
    demo_on(c, "cpu", &Cpu::<f32>::new());
}

criterion_group!(benches, cpu);
criterion_main!(benches);
