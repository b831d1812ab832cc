//! What a plan counts is what a run takes: never less, and not much more.

use std::fs;

use gradlens::backend::Lower;
use gradlens::backend::cuda::{CudaLower, Format};
use gradlens::engine::{Engine, EngineSpec, PassRun};
use gradlens::model::op::Site;
use gradlens::model::{Config, describe};
use gradlens::plan::memory::{self, Demand, Memory};
use gradlens::stats::{MomentSink, TokenPolicy};
use serde_json::Value;

use super::golden::{Golden, everything, load, repository, sites};
use super::machine::{Machine, machine};

/// Most tokens of a sample.
const MAX_LENGTH: usize = 20;
/// A plan counts at most so many times what is taken.
const MOST: f64 = 1.6;

fn planned(
    golden: &Golden,
    lower: CudaLower,
    asked: &EngineSpec,
    budget_bytes: u64,
    tokens: usize,
) -> Memory {
    let demand = Demand {
        spec: &golden.spec,
        engine: asked,
        head_dim: 16,
        tokens_per_pass: Some(tokens),
        max_length: MAX_LENGTH,
        max_positions: 1 << 20,
        num_samples: 1000,
        slow_weights: false,
        budget_bytes,
        choice_bytes: 0,
        features: None,
    };
    memory::plan(&lower, &demand)
}

/// Runs as the program does and says how many bytes were in use at most.
fn taken(machine: &Machine, golden: &Golden, lower: CudaLower, asked: EngineSpec) -> u64 {
    let backend = machine.backend(lower);
    let (widths, gradients) = (asked.widths(&golden.spec), asked.gradients);
    let mut engine = Engine::new(&backend, &golden.spec, &golden.tensors, asked);
    let mut before: Option<(PassRun<_>, MomentSink<_>)> = None;
    let settle = |before: Option<(PassRun<_>, MomentSink<_>)>| {
        if let Some((run, mut sink)) = before {
            sink.read(&backend).unwrap();
            PassRun::settle(run, &backend).unwrap();
        }
    };
    engine.load().unwrap();
    for pass in golden.passes.iter().take(2) {
        let mut sink = MomentSink::new(&widths).counting(TokenPolicy::default(), gradients);
        let run = engine.run(pass, &mut sink).unwrap();
        settle(before.replace((run, sink)));
    }
    settle(before);
    backend.cuda().device.memory.peak_bytes()
}

/// What is asked of a model: which way, where, of which layers.
fn asked(golden: &Golden) -> Vec<EngineSpec> {
    let base = everything(golden);
    let all = sites(golden);
    let others: Vec<Site> = all.iter().copied().filter(|site| *site != Site::MlpHidden).collect();
    let of = |gradients, sites: &[Site]| EngineSpec { gradients, sites: sites.to_vec(), ..base.clone() };
    vec![
        of(true, &[Site::Mlp]),
        of(true, &all),
        of(true, &others),
        EngineSpec { layers: vec![1], ..of(true, &[Site::AttnOut]) },
        of(false, &[Site::Mlp]),
        of(false, &all),
        EngineSpec { layers: vec![0, 1], ..of(false, &[Site::ResidMid]) },
    ]
}

/// Both types, both directions, sites inside fused ops and between them, everything kept on the device and as little
/// as can be.
#[test]
fn a_plan_counts_what_a_run_takes() {
    let Some(machine) = machine() else { return };
    let mut wrong = Vec::new();
    let mut check = |golden: &Golden, name: &str, lower, asked: &EngineSpec, budget, tokens| {
        let memory = planned(golden, lower, asked, budget, tokens);
        let Memory { chunk_tokens, keep_from, resident_layers, .. } = memory;
        let spec = EngineSpec { chunk_tokens, keep_from, resident_layers, ..asked.clone() };
        let taken = taken(&machine, golden, lower, spec);
        let ratio = memory.total_bytes() as f64 / taken as f64;
        let (format, sites) = (lower.format, &asked.sites);
        let line = format!("{ratio:.3} {name} {format:?} gradients {} {sites:?}: {memory}", asked.gradients);
        println!("{line}, takes {taken} bytes");
        if !(1.0..MOST).contains(&ratio) {
            wrong.push(line);
        }
    };
    for name in ["qwen2", "mixtral", "gemma2", "gemma3", "qwen3"] {
        let golden = load(name, "corpus.jsonl", MAX_LENGTH, 40, 1);
        for format in [Format::Bf16, Format::F32] {
            let lower = CudaLower { format, fuse: true };
            // float32 converts nothing: half as many will do.
            for asked in asked(&golden).into_iter().step_by(format.pick(2, 1)) {
                let budgets: &[u64] = if asked.gradients { &[1 << 40, 0] } else { &[0] };
                budgets.iter().for_each(|&budget| check(&golden, name, lower, &asked, budget, 40));
            }
        }
    }
    // Several chunks of a pass, each with padded rows of its own.
    let golden = load("mixtral", "corpus.jsonl", MAX_LENGTH, 1 << 20, 1);
    let lower = CudaLower { format: Format::Bf16, fuse: true };
    for budget in [1 << 20, 0] {
        check(&golden, "mixtral", lower, &everything(&golden), budget, 300);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Mixtral-8x7B in bfloat16: rows that are nobody's, up to 127 for each expert and one tile, take 150 MB of work and 84 MB
/// of what a layer keeps of a chunk.
#[test]
fn padded_rows_of_a_large_mixture() {
    let path = repository().join("tests/config/published.json");
    let published: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let of_name = |model: &&Value| model["name"] == "mistralai/Mixtral-8x7B-v0.1";
    let model = published.as_array().unwrap().iter().find(of_name).unwrap();
    let spec = describe(&Config::from_json(&model["config"].to_string(), &path).unwrap());
    let golden = Golden { spec, tensors: Vec::new(), passes: Vec::new() };
    let asked = EngineSpec { layers: vec![0], ..everything(&golden) };
    let lower = CudaLower { format: Format::Bf16, fuse: true };
    let block = &lower.lower(&golden.spec, &asked.usages(&golden.spec)).blocks[1];
    let rows = 9 * 127;
    // Gate and up in bfloat16, and what the experts give in float32.
    let saved = lower.slot_bytes(block, 0).into_iter().zip(block.saved(0));
    let kept: u64 = saved.filter(|(_, saved)| *saved).map(|(bytes, _)| bytes).sum();
    let wanted = rows * (2 * 2 * 14_336 + 4 * 4096);
    assert!((wanted..wanted + 10_000).contains(&kept), "{kept} bytes are kept");
    // At the experts on the way back: gate and up, their gradients, those of what goes in and comes out.
    let wanted = rows * 2 * (2 * 2 * 14_336 + 2 * 4096);
    let work = planned(&golden, lower, &asked, 0, 1).workspace_bytes;
    let tokens = planned(&golden, lower, &asked, 1 << 40, 8192).workspace_bytes;
    println!("{kept} kept, {work} for one token, {tokens} for 8192");
    assert!((wanted..wanted + (16 << 20)).contains(&work), "{work} bytes of work on next to nothing");
}
