//! Every SAE format and class, from its files to its statistics, against the libraries that define them.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/golden.rs"]
#[allow(dead_code, reason = "what only tests of whole models need")]
mod golden;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use common::{relative_l2, tolerance};
use golden::{Expected, Golden, load, mean, repository, settings};
use gradlens::backend::cpu::Cpu;
use gradlens::backend::{Moments, Place, SaeGradient};
use gradlens::engine::{Engine, EngineSpec, LossReduction, Totals};
use gradlens::model::op::Site;
use gradlens::stats::{LayerFeatures, Quantity, SaeSink, SaeSpec, TokenPolicy};
use gradlens::weights::sae::{self, LlamaScopeConvention, SaeOptions};
use serde_json::Value;

/// A folder of `tests/goldens/sae`.
struct Case {
    name: String,
    folder: PathBuf,
    about: Value,
    expected: Expected,
}

impl Case {
    fn all() -> Vec<Self> {
        let root = repository().join("tests/goldens/sae");
        let entries = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path());
        let mut folders: Vec<PathBuf> = entries.filter(|path| path.is_dir()).collect();
        folders.sort();
        assert!(folders.len() >= 27, "{folders:?}");
        folders.into_iter().map(Self::open).collect()
    }

    fn open(folder: PathBuf) -> Self {
        let name = folder.file_name().unwrap().to_str().unwrap().to_owned();
        let about = serde_json::from_slice(&fs::read(folder.join("expected.json")).unwrap()).unwrap();
        let expected = Expected::read(&folder.join("expected.safetensors"));
        Self { name, folder, about, expected }
    }

    fn named(name: &str) -> Self {
        Self::open(repository().join("tests/goldens/sae").join(name))
    }

    /// What a run with the case's flags asks for.
    fn spec(&self, quantity: Quantity, gradient: SaeGradient) -> SaeSpec {
        let mut options = SaeOptions::default();
        let arguments: Vec<&str> =
            self.about["arguments"].as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect();
        for pair in arguments.chunks(2) {
            match pair {
                ["--sae_norm_scale", scale] => options.norm_scale = Some(scale.parse().unwrap()),
                ["--llamascope_convention", "saelens"] => {
                    options.llamascope_convention = LlamaScopeConvention::Saelens;
                }
                other => panic!("{other:?}"),
            }
        }
        let pattern = self.about["sae"].as_str().unwrap();
        let open = |layer: usize| {
            let path = self.folder.join(pattern.replace("{layer}", &layer.to_string()));
            let sae = sae::open(&path, &options).unwrap();
            assert_eq!(sae.about.layer, Some(layer), "{}", self.name);
            assert_eq!(sae.weights.num_features() as u64, self.about["features"].as_u64().unwrap());
            (layer, sae.weights)
        };
        SaeSpec { saes: [1, 3].map(open).into(), quantity, gradient, signed_sums_alone: false }
    }
}

struct Run {
    layers: BTreeMap<usize, LayerFeatures>,
    totals: Totals,
}

/// How the model is run.
#[derive(Clone, Copy)]
struct How {
    spliced: bool,
    reduction: LossReduction,
    chunk_tokens: usize,
    stride: usize,
}

const ERROR: How = How { spliced: false, reduction: LossReduction::Sample, chunk_tokens: 1024, stride: 1 };
const REPLACE: How = How { spliced: true, ..ERROR };

fn run(cpu: &Cpu<f32>, golden: &Golden, spec: SaeSpec, how: How) -> Run {
    let engine = EngineSpec {
        layers: spec.saes.keys().copied().collect(),
        sites: vec![Site::Mlp],
        gradients: spec.gradients(),
        loss_reduction: how.reduction,
        chunk_tokens: how.chunk_tokens,
        keep_from: 0,
        resident_layers: usize::MAX,
    };
    let mut engine = Engine::new(cpu, &golden.spec, &golden.tensors, engine);
    let policy = TokenPolicy { stride: how.stride, ..TokenPolicy::default() };
    let mut sink = SaeSink::new(spec).counting(policy);
    let mut totals = Totals::default();
    for pass in &golden.passes {
        let run = match how.spliced {
            true => engine.run_spliced(pass, &mut sink).unwrap(),
            false => engine.run(pass, &mut sink).unwrap(),
        };
        totals.add(&run.settle(cpu).unwrap());
    }
    Run { layers: sink.take(cpu).unwrap(), totals }
}

/// The samples of the golden model, in passes of so many tokens.
fn samples(tokens_per_pass: usize) -> Golden {
    let (max_length, _) = settings("qwen2");
    load("qwen2", "corpus.jsonl", max_length, tokens_per_pass, 1)
}

#[track_caller]
fn compare(what: &str, found: &[f64], expected: &[f64], most: f64) {
    let error = relative_l2(found, expected);
    assert!(error <= most, "{what}: relative L2 {error:e}");
}

/// mean and mean |.| of gradients or attribution.
#[track_caller]
fn check_means(case: &Case, key: &str, found: &Moments) {
    assert_eq!(found.count, case.about["gradients_count"].as_u64().unwrap(), "{} {key}", case.name);
    for (stat, sums) in [("mean", &found.sum), ("mean_abs", &found.sum_abs)] {
        let key = format!("{key}.{stat}");
        let found = mean(sums, found.count);
        compare(&format!("{} {key}", case.name), &found, case.expected.get(&key), tolerance::GOLDEN);
    }
}

fn check_values(case: &Case, layer: usize, found: &LayerFeatures) {
    let values = found.sums.values.as_ref().unwrap();
    let at = |stat: &str| format!("layer_{layer}.values.{stat}");
    let what = |stat: &str| format!("{} {}", case.name, at(stat));
    assert_eq!(values.moments.count, case.about["values_count"].as_u64().unwrap(), "{}", case.name);
    let f = mean(&values.moments.sum, values.moments.count);
    compare(&what("mean"), &f, case.expected.get(&at("mean")), tolerance::GOLDEN);
    assert_eq!(values.moments.sum, values.moments.sum_abs);
    let expected = case.expected.get(&at("sum_sq"));
    compare(&what("sum_sq"), &values.moments.sum_sq, expected, tolerance::GOLDEN);
    compare(&what("max"), &values.moments.max_abs, case.expected.get(&at("max")), tolerance::GOLDEN);
    let fired: Vec<f64> = values.fired.iter().map(|&fired| fired as f64).collect();
    assert_eq!(fired, case.expected.get(&at("fired")), "{}", what("fired"));
    for (feature, place) in case.expected.get(&at("max_at")).chunks(2).enumerate() {
        // −1: never fires; −2: two tokens are too near each other to say.
        if place[0] >= 0.0 {
            let place = Place { sample: place[0] as u64, position: place[1] as u32 };
            assert_eq!(values.max_at[feature], place, "{} feature {feature}", what("max_at"));
            assert_eq!(found.examples[feature].place, place);
            assert_eq!(found.examples[feature].tokens()[1].len(), 1);
        }
    }
}

fn check_fit(case: &Case, layer: usize, found: &LayerFeatures) {
    let expected = &case.about[format!("layer_{layer}")];
    let of = |key: &str| expected[key].as_f64().unwrap();
    assert_eq!(found.fit.tokens, case.about["fit_tokens"].as_u64().unwrap());
    let [fvu, l0] = [found.fit.fvu(), found.fit.l0()].map(Option::unwrap);
    assert!((fvu / of("fvu") - 1.0).abs() < 1e-4, "{} FVU {fvu}", case.name);
    assert!((l0 / of("l0") - 1.0).abs() < 1e-6, "{} L0 {l0}", case.name);
}

/// The fastest kernels of this machine, and those that every machine has.
fn kernels() -> [Cpu<f32>; 2] {
    [Cpu::new(), Cpu::with_multiply_adds()]
}

#[test]
fn values_and_fit_are_the_libraries() {
    let golden = samples(1 << 20);
    for case in Case::all() {
        for cpu in kernels() {
            let run = run(&cpu, &golden, case.spec(Quantity::Values, SaeGradient::All), ERROR);
            for (layer, found) in &run.layers {
                check_values(&case, *layer, found);
                check_fit(&case, *layer, found);
            }
        }
    }
}

#[test]
fn gradients_and_attribution_are_the_libraries() {
    let golden = samples(1 << 20);
    for case in Case::all() {
        for cpu in kernels() {
            let all = run(&cpu, &golden, case.spec(Quantity::Gradients, SaeGradient::All), ERROR);
            let active = run(&cpu, &golden, case.spec(Quantity::Gradients, SaeGradient::Active), ERROR);
            let attribution = run(&cpu, &golden, case.spec(Quantity::Attribution, SaeGradient::All), ERROR);
            for layer in [1, 3] {
                let key = |what: &str| format!("layer_{layer}.{what}");
                let gradients = |run: &Run| run.layers[&layer].sums.gradients.clone().unwrap();
                check_means(&case, &key("gradients"), &gradients(&all));
                check_means(&case, &key("gradients"), &gradients(&attribution));
                check_means(&case, &key("gradients_active"), &gradients(&active));
                let found = attribution.layers[&layer].sums.attribution.as_ref().unwrap();
                check_means(&case, &key("attribution"), found);
                for run in [&all, &active, &attribution] {
                    check_values(&case, layer, &run.layers[&layer]);
                    check_fit(&case, layer, &run.layers[&layer]);
                }
            }
        }
    }
}

#[test]
fn a_replaced_site_is_the_libraries() {
    let golden = samples(1 << 20);
    let cpu = Cpu::new();
    for case in Case::all() {
        let run = run(&cpu, &golden, case.spec(Quantity::Attribution, SaeGradient::All), REPLACE);
        for layer in [1, 3] {
            let sums = &run.layers[&layer].sums;
            let key = |what: &str| format!("layer_{layer}.replace.{what}");
            check_means(&case, &key("gradients"), sums.gradients.as_ref().unwrap());
            check_means(&case, &key("attribution"), sums.attribution.as_ref().unwrap());
            check_values(&case, layer, &run.layers[&layer]);
            let nats = case.about[format!("layer_{layer}")]["replace_nats"].as_f64().unwrap();
            let found = run.totals.spliced_nats[&layer];
            assert!((found / nats - 1.0).abs() < 1e-5, "{} layer {layer}: {found} nats", case.name);
        }
    }
}

/// Nothing but Σ dL/dx is kept of the whole corpus.
#[test]
fn signed_sums_alone_are_the_same() {
    let golden = samples(64);
    for case in Case::all() {
        let mut spec = case.spec(Quantity::Gradients, SaeGradient::All);
        spec.signed_sums_alone = true;
        let run = run(&Cpu::new(), &golden, spec, ERROR);
        for (layer, found) in &run.layers {
            let found_sums = found.sums.gradients.as_ref().unwrap();
            assert!(found.sums.values.is_none() && found_sums.sum_abs.is_empty());
            let key = format!("layer_{layer}.gradients.mean");
            let found_mean = mean(&found_sums.sum, found_sums.count);
            let what = format!("{} {key}", case.name);
            compare(&what, &found_mean, case.expected.get(&key), tolerance::GOLDEN);
            assert!(found.fit.tokens > 0);
        }
    }
}

#[test]
fn every_third_position() {
    let golden = samples(1 << 20);
    let case = Case::named("dl_batchtopk");
    for (how, prefix) in [(ERROR, ""), (REPLACE, "replace.")] {
        let spec = case.spec(Quantity::Attribution, SaeGradient::All);
        let run = run(&Cpu::new(), &golden, spec, How { stride: 3, ..how });
        for (layer, LayerFeatures { sums, .. }) in &run.layers {
            for (what, sums) in [("gradients", &sums.gradients), ("attribution", &sums.attribution)] {
                let sums = sums.as_ref().unwrap();
                for (stat, found) in [("mean", &sums.sum), ("mean_abs", &sums.sum_abs)] {
                    let key = format!("layer_{layer}.stride_3.{prefix}{what}.{stat}");
                    compare(&key, &mean(found, sums.count), case.expected.get(&key), tolerance::GOLDEN);
                }
            }
        }
    }
}

/// The Python script's own algorithm: every 4th position replaced, L the mean over a batch of 4.
#[test]
fn the_scripts_numbers() {
    let case = Case::named("dl_batchtopk");
    let scripts = &case.about["scripts"];
    let of = |key: &str| scripts[key].as_u64().unwrap() as usize;
    let golden = load("qwen2", "full.jsonl", of("max_length"), 1 << 20, of("batch_size"));
    let expected = Expected::read(&case.folder.join("expected_scripts.safetensors"));
    let spec = case.spec(Quantity::Gradients, SaeGradient::All);
    let stride = of("position_stride");
    let how = How { reduction: LossReduction::Batch, stride, ..REPLACE };
    let run = run(&Cpu::new(), &golden, spec, how);
    for (layer, LayerFeatures { sums, .. }) in &run.layers {
        let values = &sums.values.as_ref().unwrap().moments;
        for (what, sums) in [("values", values), ("gradients", sums.gradients.as_ref().unwrap())] {
            assert_eq!(sums.count, scripts["tokens"].as_u64().unwrap());
            for (stat, found) in [("mean", &sums.sum), ("mean_abs", &sums.sum_abs)] {
                let key = format!("layer_{layer}.{what}.{stat}");
                compare(&key, &mean(found, sums.count), expected.get(&key), 1e-5);
            }
        }
    }
}

/// The same bytes for any cut into passes and chunks.
#[test]
fn cuts_show_nowhere() {
    let (whole, cut) = (samples(1 << 20), samples(40));
    for name in ["dl_batchtopk", "dl_topk", "lens_jumprelu_layer_norm", "sparsify_groupmax", "dl_gated"] {
        let case = Case::named(name);
        for (quantity, gradient) in [
            (Quantity::Values, SaeGradient::All),
            (Quantity::Gradients, SaeGradient::All),
            (Quantity::Attribution, SaeGradient::Active),
        ] {
            for how in [ERROR, REPLACE] {
                if how.spliced && quantity == Quantity::Values {
                    continue;
                }
                let of = |golden: &Golden, chunk_tokens| {
                    let spec = case.spec(quantity, gradient);
                    run(&Cpu::new(), golden, spec, How { chunk_tokens, ..how }).layers
                };
                let expected = of(&whole, 1024);
                for chunk_tokens in [1024, 64, 1] {
                    for golden in [&whole, &cut] {
                        let found = of(golden, chunk_tokens);
                        for (layer, found) in &found {
                            let expected = &expected[layer];
                            assert!(found.sums == expected.sums, "{name} {quantity} {gradient:?}");
                            assert!(found.fit == expected.fit, "{name} {quantity} {gradient:?}");
                            assert!(found.examples == expected.examples);
                        }
                    }
                }
            }
        }
    }
}
