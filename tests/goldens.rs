//! Every golden checkpoint from its folder to its statistics, against Hugging Face transformers.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/golden.rs"]
mod golden;

use std::collections::BTreeMap;
use std::fs;

use common::{relative_l2, tolerance};
use golden::{
    Expected, GOLDENS, Golden, everything, folder, load, mean, run_on, run_sites, settings, site_key, sites,
};
use gradlens::backend::cpu::{Cpu, Element};
use gradlens::engine::{EngineSpec, LossReduction, Totals};
use gradlens::model::op::Site;
use gradlens::stats::{Direction, LayerMoments, SiteMoments};
use serde_json::Value;

fn run<T: Element>(golden: &Golden, spec: EngineSpec) -> (BTreeMap<usize, LayerMoments>, Totals) {
    run_on(&Cpu::<T>::new(), golden, spec)
}

fn compare(what: &str, found: &[f64], expected: &[f64]) {
    let error = relative_l2(found, expected);
    assert!(error <= tolerance::GOLDEN, "{what}: relative L2 {error:e}");
}

fn check_sites(name: &str, direction: Direction, key: &str, sites: &SiteMoments, expected: &Expected) {
    for (&(layer, site), moments) in sites {
        let m = moments.get(direction).unwrap();
        let at = |stat: &str| format!("layer_{layer}.{}.{stat}", site_key(site, key));
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

/// A site that a model lost would be compared nowhere.
#[test]
fn models_have_the_sites_of_their_goldens() {
    for name in GOLDENS {
        let golden = load(name, "corpus.jsonl", settings(name).0, 1 << 20, 1);
        let expected = Expected::read(&folder(name).join("expected.safetensors"));
        for (layer, site) in
            (0..golden.spec.blocks.len()).flat_map(|layer| Site::ALL.map(|site| (layer, site)))
        {
            let there = expected.has(&format!("layer_{layer}.{}.mean", site_key(site, "values")));
            assert_eq!(golden.spec.site_width(layer, site).is_some(), there, "{name} {layer} {site:?}");
        }
        assert!(!expected.has(&format!("layer_{}.values.mean", golden.spec.blocks.len())), "{name}: layers");
    }
}

#[test]
fn statistics_are_those_of_transformers() {
    for name in GOLDENS {
        let (max_length, batch_size) = settings(name);
        let expected = Expected::read(&folder(name).join("expected.safetensors"));
        let golden = load(name, "corpus.jsonl", max_length, 1 << 20, batch_size);
        for reduction in [LossReduction::Sample, LossReduction::Batch, LossReduction::Token] {
            // Goldens hold other sites under one reduction.
            let sites = if reduction == LossReduction::Sample { sites(&golden) } else { vec![Site::Mlp] };
            let spec = EngineSpec { loss_reduction: reduction, sites, ..everything(&golden) };
            // The fastest kernels of this machine, and those that every machine has.
            for cpu in [Cpu::<f32>::new(), Cpu::with_multiply_adds()] {
                let (sites, totals) = run_sites(&cpu, &golden, spec.clone());
                assert_eq!(sites.len(), spec.layers.len() * spec.sites.len());
                let key = format!("gradients_{}", reduction.name());
                check_sites(name, Direction::Gradients, &key, &sites, &expected);
                check_sites(name, Direction::Values, "values", &sites, &expected);
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
    for name in ["qwen2", "mistral", "mixtral", "gemma2"] {
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

/// Fewer layers or sites, or values alone, give the bytes of the full run.
#[test]
fn parts_of_a_run_are_parts_of_its_result() {
    for name in ["qwen2_window", "llama3", "mixtral", "gemma3"] {
        let (max_length, _) = settings(name);
        let golden = load(name, "corpus.jsonl", max_length, 1 << 20, 1);
        let everywhere = EngineSpec { sites: sites(&golden), ..everything(&golden) };
        let cpu = Cpu::<f32>::new();
        let (all, _) = run_sites(&cpu, &golden, everywhere.clone());
        let two = vec![Site::AttnOut, Site::ResidMid];
        for (layers, sites, gradients) in [
            (vec![1], vec![Site::Mlp], true),
            (vec![0, 2], two.clone(), true),
            (vec![2], vec![Site::ResidPre], true),
            (vec![1, 2], vec![Site::ResidPost], true),
            (vec![0, 1, 2], everywhere.sites.clone(), false),
            (vec![1], vec![Site::ResidPre], false),
            (vec![0, 1], two.clone(), false),
        ] {
            // Kept and computed again.
            for keep_from in [0, golden.spec.blocks.len()] {
                let spec = EngineSpec {
                    layers: layers.clone(),
                    sites: sites.clone(),
                    gradients,
                    keep_from,
                    ..everywhere.clone()
                };
                let (some, totals) = run_sites(&cpu, &golden, spec);
                let places = layers.iter().flat_map(|&layer| sites.iter().map(move |&site| (layer, site)));
                assert_eq!(some.keys().copied().collect::<Vec<_>>(), places.collect::<Vec<_>>());
                assert_eq!(totals.loss_nats.is_some(), gradients);
                for (place, moments) in &some {
                    assert_eq!(moments.values, all[place].values, "{name} {place:?}");
                    assert_eq!(moments.gradients.is_some(), gradients);
                    if gradients {
                        assert_eq!(moments.gradients, all[place].gradients, "{name} {place:?}");
                    }
                }
            }
        }
    }
}
