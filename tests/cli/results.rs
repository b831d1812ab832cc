//! Which files a run writes, what they are called, and what is in them.

use std::collections::BTreeSet;
use std::path::Path;

use crate::dir::{Dir, LAYER, Run};
use crate::files::{Npz, json, keys, names, npy_f32};

/// The files beside the `.npy` arrays.
const RECORDS: [&str; 6] = [
    "consolidated_results.npz",
    "metadata.json",
    "runtime_output.txt",
    "statistics.npz",
    "timing_stats.json",
    "timing_summary.txt",
];

/// Checks that a folder's name is `{start}_{YYYYmmdd_HHMMSS}`.
#[track_caller]
fn check_name(folder: &Path, start: &str) {
    let name = folder.file_name().unwrap().to_str().unwrap();
    let time = name.strip_prefix(start).unwrap_or_else(|| panic!("{name} does not begin with {start}"));
    let shape: String = time.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    assert_eq!(shape, "_00000000_000000", "{name}");
}

/// Checks that the folder holds these `.npy` files (named without `_gradients.npy`), the records, and nothing else.
#[track_caller]
fn check_files(folder: &Path, stems: impl IntoIterator<Item = String>) {
    let arrays = stems.into_iter().map(|stem| format!("{stem}_gradients.npy"));
    let expected: BTreeSet<String> = arrays.chain(RECORDS.map(str::to_owned)).collect();
    assert_eq!(names(folder).into_iter().collect::<BTreeSet<_>>(), expected);
}

fn stems(layers: impl IntoIterator<Item = usize>, variants: &[&str]) -> Vec<String> {
    layers.into_iter().flat_map(|l| variants.iter().map(move |v| format!("layer_{l}_{v}"))).collect()
}

/// `runtime_output.txt` holds what was shown: stdout's lines in their order, and stderr's in theirs.
#[track_caller]
fn check_runtime_output(run: &Run, folder: &Path) {
    let text = std::fs::read_to_string(folder.join("runtime_output.txt")).unwrap();
    let mut lines: Vec<&str> = text.lines().collect();
    for stream in [&run.stderr, &run.stdout] {
        let mut at = 0;
        for line in stream.lines() {
            let found = lines[at..].iter().position(|kept| *kept == line);
            run.check(found.is_some(), &format!("runtime_output.txt must hold {line:?}:\n{text}"));
            at += found.unwrap();
            lines.remove(at);
        }
    }
    run.check(lines.is_empty(), &format!("runtime_output.txt holds more than was shown: {lines:?}"));
}

#[test]
fn demo_writes_every_file() {
    let dir = Dir::new();
    let run = dir.ok("demo --num_samples 12");
    assert!(run.stderr.is_empty(), "{}", run.stderr);
    assert_eq!(names(&dir.path(".")), ["gradlens_demo"]);
    let folder = dir.made("gradlens_demo");
    check_name(&folder, "layer_activations_model_demo_num_samples_12_batch_size_4_layers_0to5");
    let arrays = stems(0..6, &["mean", "mean_abs"]);
    check_files(&folder, arrays.clone());
    // The second part, over SAE features.
    let features = dir.made_sae("gradlens_demo");
    check_name(&features, "sae_features_model_demo_num_samples_12_batch_size_4_layers_0to5");

    // Every array is in the archive too, and is what the raw sums say.
    let mut archive = Npz::open(&folder.join("consolidated_results.npz"));
    let with_metadata: Vec<String> = arrays.iter().cloned().chain(["metadata".to_owned()]).collect();
    assert_eq!(archive.keys(), with_metadata);
    let mut raw = Npz::open(&folder.join("statistics.npz"));
    for layer in 0..6 {
        let count = raw.count(&format!("layer_{layer}.mlp.gradients.count")) as f64;
        assert!(count > 500.0, "{count}");
        for (variant, sums) in [("mean", "sum"), ("mean_abs", "sum_abs")] {
            let stem = format!("layer_{layer}_{variant}");
            let values = npy_f32(&folder.join(format!("{stem}_gradients.npy")), 128);
            assert!(values.iter().any(|v| *v != 0.0) && values.iter().all(|v| v.is_finite()));
            assert_eq!(archive.f32(&stem), values);
            let sums = raw.f64(&format!("layer_{layer}.mlp.gradients.{sums}"));
            assert_eq!(sums.iter().map(|sum| (sum / count) as f32).collect::<Vec<_>>(), values);
        }
    }
}

#[test]
fn statistics_hold_both_directions_of_a_gradients_run() {
    let dir = Dir::with("qwen2");
    let counts = json(&dir.path("model/expected.json"));
    for (by, directions) in [("values", &["values"][..]), ("gradients", &["gradients", "values"])] {
        let max_length = &counts["max_length"];
        let flags = format!("--layers 1,3 --max_length {max_length} --aggregate_by {by}");
        dir.ok(&format!("{LAYER} --save_outputs --output_dir {by} {flags}"));
        let folder = dir.made(by);
        // The files are called `_gradients` for values too: downstream code looks for that.
        check_files(&folder, stems([1, 3], &["mean_abs"]));
        let mut expected = BTreeSet::new();
        for layer in [1, 3] {
            for direction in directions {
                for sums in ["sum", "sum_abs", "sum_sq", "max_abs", "count", "sum_abs_position_0"] {
                    expected.insert(format!("layer_{layer}.mlp.{direction}.{sums}"));
                }
            }
        }
        let mut raw = Npz::open(&folder.join("statistics.npz"));
        assert_eq!(raw.keys().into_iter().collect::<BTreeSet<_>>(), expected);
        // The corpus has a text of one token: it has values, and no gradient.
        for direction in directions {
            let count = raw.count(&format!("layer_1.mlp.{direction}.count"));
            assert_eq!(count, counts[format!("{direction}_count")].as_i64().unwrap());
        }
        let max = raw.f64("layer_1.mlp.values.max_abs");
        let rms = raw.f64("layer_1.mlp.values.sum_sq");
        let count = raw.count("layer_1.mlp.values.count") as f64;
        let at_0 = raw.f64("layer_1.mlp.values.sum_abs_position_0");
        let all = raw.f64("layer_1.mlp.values.sum_abs");
        assert!(at_0.iter().zip(&all).all(|(at_0, all)| 0.0 < *at_0 && at_0 < all));
        assert!(max.iter().zip(&rms).all(|(max, sq)| max * max >= sq / count && *max > 0.0));
    }
}

#[test]
fn metadata_has_the_contracts_keys() {
    let dir = Dir::with("qwen2");
    let flags = "--aggregation_mode both --normalize_gradients both --power 0.5 --layers 0,2 --num_samples 6";
    dir.ok(&format!(
        "{LAYER} --save_outputs --aggregate_by gradients --max_length 40 --batch_size 3 {flags}"
    ));
    let folder = dir.made(".");
    let metadata = json(&folder.join("metadata.json"));
    let sections = "experiment_info analysis_config timing_stats per_layer_timing layer_statistics \
        dimension_info loading_instructions run_info";
    assert_eq!(keys(&metadata), sections.split_whitespace().collect::<Vec<_>>());
    let info = &metadata["experiment_info"];
    assert_eq!(keys(info), ["model_name", "num_samples", "batch_size", "max_length", "device", "timestamp"]);
    assert_eq!(info["model_name"], "model");
    assert_eq!(
        (&info["num_samples"], &info["batch_size"], &info["max_length"]),
        (&6.into(), &3.into(), &40.into())
    );
    assert_eq!(
        metadata["analysis_config"],
        serde_json::json!({
            "layers": [0, 2], "aggregation_mode": "both", "normalization_mode": "both",
            "aggregate_by": "gradients", "power": 0.5,
        })
    );
    assert_eq!(metadata["dimension_info"], serde_json::json!({"layer_0": 48, "layer_2": 48}));
    for aggregation in ["mean", "mean_abs"] {
        for norm in ["norm_sum", "norm_sum_abs"] {
            let statistics = &metadata["layer_statistics"]["layer_2"][aggregation][norm];
            assert_eq!(keys(statistics), ["mean", "std", "max", "sum_abs"]);
        }
        // What the normalisations are for: Σv = D, and Σ|v| = D.
        let of = |norm: &str, what: &str| {
            metadata["layer_statistics"]["layer_0"][aggregation][norm][what].as_f64().unwrap()
        };
        assert!((of("norm_sum", "mean") - 1.0).abs() < 1e-5);
        assert!((of("norm_sum_abs", "sum_abs") - 48.0).abs() < 1e-4);
    }
    let timing = json(&folder.join("timing_stats.json"));
    assert_eq!(timing["overall"], metadata["timing_stats"]);
    assert_eq!(timing["per_layer"], metadata["per_layer_timing"]);
    for name in ["model_loading", "dataset_preparation", "total_runtime"] {
        assert!(timing["overall"][name].as_f64().unwrap() >= 0.0, "{name}");
    }
    for name in ["gradient_computation", "save_data", "total"] {
        assert!(timing["per_layer"]["2"][name].as_f64().unwrap() > 0.0, "{name}");
    }
    let summary = std::fs::read_to_string(folder.join("timing_summary.txt")).unwrap();
    assert!(summary.starts_with("FINAL TIMING SUMMARY\n"), "{summary}");
    assert!(summary.contains("\nDETAILED PER-LAYER TIMING\n"), "{summary}");
}

#[test]
fn the_folders_name_says_what_was_asked() {
    let dir = Dir::with("qwen2");
    std::fs::create_dir(dir.path("org")).unwrap();
    std::fs::rename(dir.path("model"), dir.path("org/tiny-0.1")).unwrap();
    let run = dir
        .ok("layer --model_name org/tiny-0.1 --dataset org/tiny-0.1/corpus.jsonl --layers 0-1,3 --power 2 \
         --num_samples 7 --batch_size 2 --save_outputs --output_dir made/here");
    let folder = dir.made("made/here");
    check_name(
        &folder,
        "layer_activations_model_org_tiny-0.1_num_samples_7_batch_size_2_layers_0to1_3_power_2.0",
    );
    let name = folder.file_name().unwrap().to_str().unwrap();
    run.out(&format!("Results saved to: made/here/{name}\n"));
    run.out(&format!("Consolidated results: made/here/{name}/consolidated_results.npz\n"));
    check_runtime_output(&run, &folder);
}

#[test]
fn several_normalisations_are_named() {
    let dir = Dir::with("llama3");
    for (flag, mode, variants) in [
        ("--normalize_gradients", "both", &["mean_norm_sum", "mean_norm_sum_abs"][..]),
        ("--normalize_gradients", "all", &["mean_norm_none", "mean_norm_sum", "mean_norm_sum_abs"]),
        ("--normalize_mode", "all", &["mean_norm_none", "mean_norm_sum", "mean_norm_sum_abs"]),
        ("--normalize_mode", "none", &["mean"]),
    ] {
        let parent = format!("{}_{mode}", flag.trim_start_matches('-'));
        dir.ok(&format!(
            "{LAYER} --save_outputs --output_dir {parent} --aggregation_mode mean {flag} {mode}"
        ));
        let folder = dir.made(&parent);
        check_files(&folder, stems(0..3, variants));
        assert_eq!(json(&folder.join("metadata.json"))["analysis_config"]["normalization_mode"], mode);
        let archive = Npz::open(&folder.join("consolidated_results.npz")).keys();
        assert_eq!(archive.len(), 3 * variants.len() + 1);
        assert!(stems(0..3, variants).iter().all(|stem| archive.contains(stem)), "{archive:?}");
    }
}

#[test]
fn both_aggregations() {
    let dir = Dir::with("llama3");
    dir.ok(&format!("{LAYER} --save_outputs --aggregation_mode both --layers 2"));
    check_files(&dir.made("."), stems([2], &["mean", "mean_abs"]));
}

/// power after aggregation, normalisation after power; of a list the first.
#[test]
fn power_is_applied_before_the_normalisation() {
    let dir = Dir::with("zephyr");
    let run = dir
        .ok(&format!("{LAYER} --save_outputs --aggregation_mode both --power 0.5,1.0,2.0 --num_samples 10"));
    run.out("Multiple power values provided: [0.5, 1.0, 2.0]\nUsing first power value: 0.5\n");
    let folder = dir.made(".");
    check_name(&folder, "layer_activations_model_model_num_samples_10_batch_size_4_layers_0to2_power_0.5");
    check_runtime_output(&run, &folder);
    let mut raw = Npz::open(&folder.join("statistics.npz"));
    let count = raw.count("layer_1.mlp.values.count") as f64;
    for (variant, sums) in [("mean", "sum"), ("mean_abs", "sum_abs")] {
        let powered: Vec<f64> = raw
            .f64(&format!("layer_1.mlp.values.{sums}"))
            .iter()
            .map(|sum| (sum / count).abs().sqrt().copysign(*sum))
            .collect();
        let total: f64 = powered.iter().map(|v| v.abs()).sum();
        let values = npy_f32(&folder.join(format!("layer_1_{variant}_gradients.npy")), 48);
        for (value, powered) in values.iter().zip(powered) {
            let expected = powered * 48.0 / total;
            assert!((f64::from(*value) - expected).abs() <= 1e-7 * expected.abs().max(1.0), "{variant}");
        }
    }
    let single = dir.ok(&format!("{LAYER} --power 2"));
    single.check(!single.stdout.contains("power value"), "one power needs no words");
}

#[test]
fn consolidated_alone() {
    let dir = Dir::with("yi");
    let before = dir.listing();
    for (given, made) in [("run", "run.npz"), ("other.npz", "other.npz")] {
        let run = dir.ok(&format!("{LAYER} --save_consolidated {given} --num_samples 10 --layers 0,2"));
        run.out(&format!("Consolidated results: {made}\n"));
        run.check(!run.stderr.contains("nothing will be saved"), "something is saved");
        assert_eq!(Npz::open(&dir.path(made)).keys(), ["layer_0_mean_abs", "layer_2_mean_abs", "metadata"]);
    }
    assert_eq!(dir.listing().len(), before.len() + 2, "{:?}", dir.listing());

    // With a folder too, the archive goes where it is sent.
    dir.ok(&format!("{LAYER} --save_consolidated run --save_outputs"));
    let files = names(&dir.made("."));
    assert!(files.contains(&"statistics.npz".into()), "{files:?}");
    assert!(!files.contains(&"consolidated_results.npz".into()), "{files:?}");
}

#[test]
fn nothing_saved_is_said_before_and_the_table_comes_all_the_same() {
    let dir = Dir::with("qwen2");
    let before = dir.listing();
    let run = dir.ok(&format!("{LAYER} --aggregate_by gradients --num_samples 6"));
    run.check(
        run.stderr.starts_with("warning: nothing will be saved: add --save_outputs or --save_consolidated"),
        "the warning comes first",
    );
    let table = run.stdout.split("gradients at mlp of the sample loss, nats per unit\n").nth(1);
    let mut lines = table.unwrap_or_default().lines();
    let title = lines.next().unwrap_or_default();
    run.check(title.trim_start().starts_with("layer  tokens"), "the table has a title");
    for layer in 0..4 {
        let line = lines.next().unwrap_or_default();
        run.check(line.trim_start().starts_with(&format!("{layer} ")), &format!("layer {layer}"));
    }
    run.check(!run.stdout.contains("values at mlp"), "no values in a gradients run");
    run.out("nats per token, perplexity ").out("FINAL TIMING SUMMARY\n").out("texts   6 read, 6 kept");
    assert_eq!(dir.listing(), before);

    let values = dir.ok(&format!("{LAYER} --aggregate_by values"));
    values.out("values at mlp\n");
    values.check(!values.stdout.contains("gradients at mlp"), "no gradients in a values run");
    values.check(!values.stdout.contains("nats per token"), "no loss in a values run");
}

#[test]
fn fewer_texts_than_asked() {
    let dir = Dir::with("qwen2");
    let run = dir.ok(&format!("{LAYER} --save_outputs --num_samples 1000"));
    run.err("warning: the dataset has 11 texts to keep, fewer than the 1,000 asked for");
    let folder = dir.made(".");
    check_name(&folder, "layer_activations_model_model_num_samples_1000_batch_size_4_layers_0to3");
    let info = &json(&folder.join("metadata.json"))["experiment_info"];
    assert_eq!((&info["num_samples"], &info["num_samples_used"]), (&1000.into(), &11.into()));
    check_runtime_output(&run, &folder);
}

#[test]
fn a_max_length_beyond_the_model_is_said() {
    let dir = Dir::with("llama3");
    dir.ok(&format!("{LAYER} --max_length 513")).err("warning: --max_length 513 is beyond the 512 positions");
    let run = dir.ok(&format!("{LAYER} --max_length 512"));
    run.check(!run.stderr.contains("beyond"), "512 positions are 512");
}
