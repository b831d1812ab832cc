//! `gradlens sae`: what a run over SAE features writes and says.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::dir::Dir;
use crate::files::{self, Npz, keys, names, npy_f32};

/// A run over every token of the golden model's corpus.
pub const SAE: &str = "sae --model_name model --dataset model/corpus.jsonl --min_chars 0";
pub const BATCH_TOPK: &str = "saes/mlp_out_layer_{layer}/trainer_0";

pub fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/sae")
}

pub fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// A folder with the golden model, and a golden's SAEs as `saes`.
pub fn with(case: &str) -> Dir {
    let dir = Dir::with("qwen2");
    copy(&goldens().join(case), &dir.path("saes"));
    dir
}

/// The array `name` of a golden's expectations.
fn expected(case: &str, name: &str) -> Vec<f64> {
    let bytes = fs::read(goldens().join(case).join("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let data = file.tensor(name).unwrap().data().to_vec();
    data.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
}

#[track_caller]
fn near(found: &[f32], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    let difference: f64 = found.iter().zip(expected).map(|(f, e)| (f64::from(*f) - e).powi(2)).sum();
    let size: f64 = expected.iter().map(|e| e * e).sum();
    assert!(difference <= 1e-8 * size, "relative L2 {:e}", (difference / size).sqrt());
}

/// Every format through the program: its files are found, its site is told, its flags are understood.
#[test]
fn every_format_is_found_and_read() {
    for entry in fs::read_dir(goldens()).unwrap().map(|entry| entry.unwrap().path()) {
        if !entry.is_dir() {
            continue;
        }
        let case = entry.file_name().unwrap().to_str().unwrap().to_owned();
        let dir = with(&case);
        let about = files::json(&entry.join("expected.json"));
        let flags: Vec<&str> =
            about["arguments"].as_array().unwrap().iter().map(|a| a.as_str().unwrap()).collect();
        let pattern = format!("saes/{}", about["sae"].as_str().unwrap());
        // By the pattern of one layer's folder, and as what lies below a folder.
        for (sae, output) in [(pattern.as_str(), "by_pattern"), ("saes", "by_search")] {
            let max_length = files::json(&dir.path("model/expected.json"))["max_length"].clone();
            let args = format!(
                "{SAE} --sae {sae} {} --max_length {max_length} --normalize_gradients none --save_outputs --output_dir {output}",
                flags.join(" ")
            );
            dir.ok(&args);
            let folder = dir.made_sae(output);
            let metadata = files::json(&folder.join("metadata.json"));
            assert_eq!(metadata["run_info"]["site"], about["site"], "{case}");
            let mut archive = Npz::open(&folder.join("consolidated_results.npz"));
            for layer in [1, 3] {
                let found = archive.f32(&format!("layer_{layer}_mean_abs"));
                near(&found, &expected(&case, &format!("layer_{layer}.values.mean")));
                let of_layer = &metadata["run_info"]["sae"]["layers"][format!("layer_{layer}")];
                let fvu = about[format!("layer_{layer}")]["fvu"].as_f64().unwrap();
                assert!((of_layer["fvu"].as_f64().unwrap() / fvu - 1.0).abs() < 1e-4, "{case} {of_layer}");
            }
        }
    }
}

#[test]
fn a_run_writes_every_file() {
    let dir = with("dl_batchtopk");
    let flags = "--aggregate_by attribution --aggregation_mode both --normalize_gradients none";
    let run = dir.ok(&format!("{SAE} --sae {BATCH_TOPK} {flags} --save_outputs --output_dir out"));
    let folder = dir.made_sae("out");
    let start = "sae_features_model_model_num_samples_500_batch_size_4_layers_1_3_";
    assert!(folder.file_name().unwrap().to_str().unwrap().starts_with(start), "{}", folder.display());
    let records = [
        "consolidated_results.npz",
        "examples.jsonl",
        "metadata.json",
        "runtime_output.txt",
        "statistics.npz",
        "timing_stats.json",
        "timing_summary.txt",
    ];
    let arrays = ["layer_1_mean", "layer_1_mean_abs", "layer_3_mean", "layer_3_mean_abs"];
    let mut wanted: BTreeSet<String> = records.iter().map(|name| (*name).to_owned()).collect();
    wanted.extend(arrays.iter().map(|name| format!("{name}_gradients.npy")));
    assert_eq!(names(&folder).into_iter().collect::<BTreeSet<_>>(), wanted);

    let mut raw = Npz::open(&folder.join("statistics.npz"));
    let mut wanted = BTreeSet::new();
    for layer in [1, 3] {
        for quantity in ["values", "gradients", "attribution"] {
            for sums in ["sum", "sum_abs", "sum_sq", "max_abs", "count"] {
                wanted.insert(format!("layer_{layer}.mlp.{quantity}.{sums}"));
            }
        }
        wanted.insert(format!("layer_{layer}.mlp.values.fired"));
    }
    assert_eq!(raw.keys().into_iter().collect::<BTreeSet<_>>(), wanted);
    let count = raw.count("layer_1.mlp.attribution.count") as f64;
    let sums = raw.f64("layer_1.mlp.attribution.sum_abs");
    let means: Vec<f32> = sums.iter().map(|sum| (sum / count) as f32).collect();
    assert_eq!(npy_f32(&folder.join("layer_1_mean_abs_gradients.npy"), 100), means);

    // A line for each feature that fired, where it was largest.
    let [fired, max] = ["fired", "max_abs"].map(|what| raw.f64(&format!("layer_3.mlp.values.{what}")));
    let text = fs::read_to_string(folder.join("examples.jsonl")).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of_layer: Vec<&Value> = lines.iter().filter(|line| line["layer"] == 3).collect();
    assert_eq!(of_layer.len(), fired.iter().filter(|fired| **fired > 0.0).count());
    let corpus = dir.read("model/corpus.jsonl");
    let texts: Vec<Value> = corpus.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let mut shown = 0;
    for line in of_layer {
        let feature = line["feature"].as_u64().unwrap() as usize;
        assert_eq!(line["fired"].as_f64().unwrap(), fired[feature]);
        assert!((line["max"].as_f64().unwrap() / max[feature] - 1.0).abs() < 1e-12);
        let parts = ["before", "token", "after"].map(|part| line[part].as_str().unwrap());
        let source = texts[line["sample"].as_u64().unwrap() as usize]["text"].as_str().unwrap();
        let joined = parts.concat();
        // Others may be cut, or normalised by the tokenizer.
        if joined.is_ascii() {
            assert!(source.contains(&joined), "{joined:?} in {source:?}");
            shown += 1;
        }
    }
    assert!(shown > 50, "{shown}");

    let metadata = files::json(&folder.join("metadata.json"));
    assert_eq!(metadata["analysis_config"]["aggregate_by"], "attribution");
    assert_eq!(metadata["dimension_info"], json!({"layer_1": 100, "layer_3": 100}));
    let info = &metadata["run_info"];
    assert_eq!(info["mean_equals_mean_abs"], false);
    let sae = &info["sae"];
    assert_eq!(keys(sae), ["saes", "revision", "gradient", "splice", "position_stride", "layers"]);
    assert_eq!([&sae["gradient"], &sae["splice"]], ["all", "error"]);
    assert_eq!(sae["layers"]["layer_1"]["family"], "dictionary_learning BatchTopKSAE");
    assert!(metadata["timing_stats"]["sae_loading"].is_number());
    run.out("how the SAEs fit");
    run.out("where the first of these features fire most");
    run.out("as feature:value");
}

#[test]
fn values_have_one_mean() {
    let dir = with("dl_batchtopk");
    dir.ok(&format!("{SAE} --sae {BATCH_TOPK} --aggregation_mode both --save_outputs --output_dir out"));
    let folder = dir.made_sae("out");
    let mut archive = Npz::open(&folder.join("consolidated_results.npz"));
    assert_eq!(archive.f32("layer_1_mean"), archive.f32("layer_1_mean_abs"));
    assert_eq!(files::json(&folder.join("metadata.json"))["run_info"]["mean_equals_mean_abs"], true);
}

/// Signed means need no products, and are the same.
#[test]
fn signed_means_alone() {
    let dir = with("dl_batchtopk");
    for (mode, output) in [("mean", "alone"), ("both", "both")] {
        dir.ok(&format!(
            "{SAE} --sae {BATCH_TOPK} --aggregate_by gradients --aggregation_mode {mode} --normalize_gradients none \
             --save_outputs --output_dir {output}"
        ));
    }
    let of = |output: &str| npy_f32(&dir.made_sae(output).join("layer_1_mean_gradients.npy"), 100);
    near(&of("alone"), &of("both").into_iter().map(f64::from).collect::<Vec<_>>());
    let mut raw = Npz::open(&dir.made_sae("alone").join("statistics.npz"));
    assert_eq!(raw.keys()[..2], ["layer_1.mlp.gradients.count", "layer_1.mlp.gradients.sum"]);
}

#[test]
fn a_replaced_site_says_what_it_costs() {
    let dir = with("dl_batchtopk");
    let flags =
        "--aggregate_by gradients --sae_splice replace --position_stride 4 --save_outputs --output_dir out";
    let run = dir.ok(&format!("{SAE} --sae {BATCH_TOPK} {flags}"));
    run.out("loss with x̂ in the place of x");
    let sae = &files::json(&dir.made_sae("out").join("metadata.json"))["run_info"]["sae"];
    assert_eq!([&sae["splice"], &sae["position_stride"]], [&json!("replace"), &json!(4)]);
    let loss = sae["layers"]["layer_3"]["spliced_loss_nats_per_token"].as_f64().unwrap();
    assert!(loss > 1.0 && loss < 20.0, "{loss}");
}

#[test]
fn the_plan_says_what_saes_take() {
    let dir = with("lens_topk");
    let run = dir.ok(&format!("{SAE} --sae saes --layers 3 --aggregate_by gradients --dry_run"));
    run.out("SAEs         saes: SAELens");
    run.out("96 features; ");
    run.out("layers       1 of 4: 3");
    run.out("SAE features ");
}
