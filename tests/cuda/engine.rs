//! Whole models on the device: every golden, fused and op by op.

use std::collections::BTreeMap;
use std::fs;

use gradlens::backend::Moments;
use gradlens::backend::cuda::{CudaLower, Format};
use gradlens::engine::{EngineSpec, LossReduction, Totals};
use gradlens::stats::LayerMoments;

use super::common::{relative_l2, tolerance};
use super::golden::{Expected, GOLDENS, Golden, everything, folder, load, mean, run_on, settings};
use super::machine::{Machine, machine};

const FUSED: CudaLower = CudaLower { format: Format::F32, fuse: true };

/// A golden whole in one pass.
fn golden(name: &str) -> Golden {
    let (max_length, batch_size) = settings(name);
    load(name, "corpus.jsonl", max_length, 1 << 20, batch_size)
}

fn run(
    machine: &Machine,
    golden: &Golden,
    lower: CudaLower,
    spec: EngineSpec,
) -> (BTreeMap<usize, LayerMoments>, Totals) {
    run_on(&machine.backend(lower), golden, spec)
}

/// Relative error of each array, by its name in the golden.
fn errors(layers: &BTreeMap<usize, LayerMoments>, expected: &Expected) -> BTreeMap<String, f64> {
    let mut errors = BTreeMap::new();
    for (layer, moments) in layers {
        for (key, m) in [("values", &moments.values), ("gradients_sample", &moments.gradients)] {
            let m: &Moments = m.as_ref().unwrap();
            let arrays = [
                ("mean", mean(&m.sum, m.count)),
                ("mean_abs", mean(&m.sum_abs, m.count)),
                ("max_abs", m.max_abs.clone()),
            ];
            for (stat, found) in arrays {
                let name = format!("layer_{layer}.{key}.{stat}");
                let error = relative_l2(&found, expected.get(&name));
                errors.insert(name, error);
            }
        }
    }
    errors
}

/// float32 through our kernels is float32: as near the golden as the CPU engine has to be, fused and op by op.
#[test]
fn goldens_in_float32() {
    let Some(machine) = machine() else { return };
    for name in GOLDENS {
        let golden = golden(name);
        let expected = Expected::read(&folder(name).join("expected.safetensors"));
        for fuse in [true, false] {
            let lower = CudaLower { fuse, ..FUSED };
            let (layers, totals) = run(&machine, &golden, lower, everything(&golden));
            for (array, error) in errors(&layers, &expected) {
                assert!(error <= tolerance::GOLDEN, "{name} {array}, fused {fuse}: relative error {error:e}");
            }
            let loss = expected.get("loss_nats");
            assert!((totals.loss_nats.unwrap() / loss[0] - 1.0).abs() < 1e-5, "{name} loss");
            assert_eq!(totals.targets as f64, loss[1], "{name} targets");
        }
    }
}

#[test]
fn loss_reductions() {
    let Some(machine) = machine() else { return };
    let name = "llama3";
    let golden = golden(name);
    let expected = Expected::read(&folder(name).join("expected.safetensors"));
    for reduction in [LossReduction::Batch, LossReduction::Token] {
        let spec = EngineSpec { loss_reduction: reduction, ..everything(&golden) };
        let (layers, _) = run(&machine, &golden, FUSED, spec);
        for (layer, moments) in &layers {
            let m = moments.gradients.as_ref().unwrap();
            let array = format!("layer_{layer}.gradients_{}.mean_abs", reduction.name());
            let error = relative_l2(&mean(&m.sum_abs, m.count), expected.get(&array));
            assert!(error <= tolerance::GOLDEN, "{array}: relative error {error:e}");
        }
    }
}

/// bfloat16 is as near the float64 golden as PyTorch's bfloat16 is (bfloat16.json of each golden), or nearer: its
/// residual stream is rounded after each layer, ours is not.
#[test]
fn goldens_in_bfloat16() {
    let Some(machine) = machine() else { return };
    let mut logs = Vec::new();
    for name in GOLDENS {
        let golden = golden(name);
        let expected = Expected::read(&folder(name).join("expected.safetensors"));
        let theirs: BTreeMap<String, f64> =
            serde_json::from_slice(&fs::read(folder(name).join("bfloat16.json")).unwrap()).unwrap();
        for fuse in [true, false] {
            let lower = CudaLower { format: Format::Bf16, fuse };
            let (layers, _) = run(&machine, &golden, lower, everything(&golden));
            let errors = errors(&layers, &expected);
            let ratios = errors.iter().map(|(array, error)| (array, error / theirs[array]));
            let worst = ratios.clone().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
            let mean = ratios.clone().map(|(_, ratio)| ratio.ln()).sum::<f64>() / errors.len() as f64;
            println!(
                "{name:<14} fused {fuse:<5} geomean {:.3}, worst {:.3} ({})",
                mean.exp(),
                worst.1,
                worst.0
            );
            assert!(mean.exp() <= 1.0, "{name}, fused {fuse}: {:.3} times the error of PyTorch", mean.exp());
            assert!(
                worst.1 <= 1.2,
                "{name} {}, fused {fuse}: {:.3} times the error of PyTorch",
                worst.0,
                worst.1
            );
            logs.extend(ratios.map(|(_, ratio)| ratio.ln()));
        }
    }
    println!("all: geomean {:.3}", (logs.iter().sum::<f64>() / logs.len() as f64).exp());
}

/// Chunks, recomputation, weights that come layer by layer, parts of a run: the same bytes.
#[test]
fn results_do_not_depend_on_how_the_work_is_cut() {
    let Some(machine) = machine() else { return };
    for (name, format) in [("qwen2_window", Format::F32), ("llama3", Format::Bf16)] {
        let golden = golden(name);
        let lower = CudaLower { format, fuse: true };
        let base = everything(&golden);
        let layers = golden.spec.blocks.len();
        let (all, totals) = run(&machine, &golden, lower, base.clone());
        for (chunk_tokens, keep_from, resident_layers) in
            [(40, 0, layers), (1, layers, layers), (90, 1, 0), (200, 2, 1)]
        {
            let spec = EngineSpec { chunk_tokens, keep_from, resident_layers, ..base.clone() };
            let (found, found_totals) = run(&machine, &golden, lower, spec);
            assert!(found == all, "{name}: other bytes with chunks of {chunk_tokens}");
            assert_eq!(found_totals.loss_nats, totals.loss_nats);
        }
        for (wanted, gradients) in
            [(vec![1], true), (vec![0, 2], true), (vec![2], false), (vec![0, 1], false)]
        {
            let spec = EngineSpec { layers: wanted.clone(), gradients, ..base.clone() };
            let (found, _) = run(&machine, &golden, lower, spec);
            assert_eq!(found.keys().copied().collect::<Vec<_>>(), wanted);
            for (layer, moments) in &found {
                assert!(moments.values == all[layer].values, "{name} {wanted:?}: other values");
                let same = moments.gradients == all[layer].gradients;
                assert!(if gradients { same } else { moments.gradients.is_none() }, "{name} {wanted:?}");
            }
        }
    }
}

/// As much as one test can: the whole engine under every schedule.
#[test]
fn models_give_the_same_bytes_under_all_schedules() {
    let Some(machine) = machine() else { return };
    for (name, format) in [("qwen2", Format::F32), ("mistral", Format::Bf16)] {
        let golden = load(name, "corpus.jsonl", 24, 1 << 20, 1);
        let backend = machine.backend(CudaLower { format, fuse: true });
        machine.same_under_all_schedules(|| run_on(&backend, &golden, everything(&golden)).0);
    }
}
