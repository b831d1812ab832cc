//! What must not change a result by a single bit, and what must change it.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;

use crate::dir::{Dir, LAYER};
use crate::files::{json, numbers};

type Numbers = BTreeMap<String, Vec<u8>>;

/// Runs with `flags` and takes the results.
#[track_caller]
fn results(dir: &Dir, args: &str, flags: &str) -> Numbers {
    let mut number = 0;
    let parent = loop {
        number += 1;
        let parent = format!("results_{number}");
        if !dir.path(&parent).exists() {
            break parent;
        }
    };
    dir.ok(&format!("{args} --save_outputs --output_dir {parent} {flags}"));
    numbers(&dir.made(&parent))
}

#[track_caller]
fn check_same(found: &Numbers, expected: &Numbers, what: &str) {
    assert!(!expected.is_empty());
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{what}");
    for (name, bytes) in expected {
        assert!(&found[name] == bytes, "{name} differs with {what}");
    }
}

/// Every way of cutting the work, all of them together last.
const CUTS: [&str; 12] = [
    "",
    "--batch_size 1",
    "--batch_size 7",
    "--tokens_per_pass 1",
    "--tokens_per_pass 100",
    "--tokens_per_pass 1000000",
    "--threads 1",
    "--threads 3",
    "--memory 0.000001",
    "--memory 0.0003",
    "--device cpu --dtype float32",
    "--memory 0.000001 --tokens_per_pass 150 --threads 5 --batch_size 100",
];

#[test]
fn gradients_do_not_depend_on_how_the_work_is_cut() {
    for golden in ["qwen2", "mistral"] {
        let dir = Dir::with(golden);
        let args =
            format!("{LAYER} --aggregate_by gradients --aggregation_mode both --normalize_gradients all");
        let expected = results(&dir, &args, "");
        for cut in CUTS {
            check_same(&results(&dir, &args, cut), &expected, cut);
        }
    }
}

#[test]
fn values_do_not_depend_on_how_the_work_is_cut() {
    let dir = Dir::with("llama_linear");
    let expected = results(&dir, LAYER, "");
    for cut in CUTS {
        check_same(&results(&dir, LAYER, cut), &expected, cut);
    }
}

#[test]
fn values_are_the_same_beside_gradients() {
    let dir = Dir::with("zephyr");
    let archive = |by: &str| {
        dir.ok(&format!("{LAYER} --save_outputs --output_dir {by} --aggregate_by {by}"));
        crate::files::Npz::open(&dir.made(by).join("statistics.npz"))
    };
    let (mut alone, mut beside) = (archive("values"), archive("gradients"));
    for layer in 0..3 {
        for sums in ["sum", "sum_abs", "sum_sq", "max_abs", "sum_abs_position_0"] {
            let key = format!("layer_{layer}.mlp.values.{sums}");
            assert_eq!(alone.f64(&key), beside.f64(&key), "{key}");
        }
    }
}

#[test]
fn fewer_layers_are_part_of_the_whole() {
    let dir = Dir::with("qwen2_window");
    for by in ["values", "gradients"] {
        let args = format!("{LAYER} --aggregate_by {by}");
        let all = results(&dir, &args, "");
        check_same(&results(&dir, &args, "--layers 0-3"), &all, "--layers 0-3");
        for layers in ["0", "3", "1,2", "0-1,3"] {
            let some = results(&dir, &args, &format!("--layers {layers}"));
            for (name, bytes) in some.iter().filter(|(name, _)| name.ends_with(".npy")) {
                assert!(&all[name] == bytes, "{name} differs with --layers {layers} of {by}");
            }
        }
    }
}

#[test]
fn the_batch_loss_depends_on_the_batch_size_and_on_nothing_else() {
    let dir = Dir::with("yi");
    let args = format!("{LAYER} --aggregate_by gradients --loss_reduction batch");
    let of_four = results(&dir, &args, "--batch_size 4");
    let of_three = results(&dir, &args, "--batch_size 3");
    for (name, bytes) in &of_four {
        assert!(&of_three[name] != bytes, "{name} must depend on the batch size");
    }
    for cut in CUTS.into_iter().filter(|cut| !cut.contains("batch_size")) {
        check_same(&results(&dir, &args, &format!("{cut} --batch_size 3")), &of_three, cut);
    }
    // A batch of one sample is that sample.
    let sample = results(&dir, &format!("{LAYER} --aggregate_by gradients"), "");
    check_same(&results(&dir, &args, "--batch_size 1"), &sample, "batches of one");
    // And the three losses are three.
    let token = results(&dir, &format!("{LAYER} --aggregate_by gradients"), "--loss_reduction token");
    assert!(token["statistics.npz"] != sample["statistics.npz"]);
    assert!(token["statistics.npz"] != of_three["statistics.npz"]);
}

#[test]
fn the_demo_is_the_same_every_time() {
    let dir = Dir::new();
    let mut all = Vec::new();
    for (parent, threads) in [("a", 1), ("b", 2), ("c", 2)] {
        dir.ok(&format!("demo --num_samples 30 --output_dir {parent} --threads {threads}"));
        all.push(numbers(&dir.made(parent)));
    }
    check_same(&all[1], &all[0], "two threads");
    check_same(&all[2], &all[1], "a second run");
}

fn gzip(text: &str) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(text.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

/// The same texts in every form that is read.
#[test]
fn results_do_not_depend_on_the_form_of_the_dataset() {
    let dir = Dir::with("qwen2");
    let texts: Vec<String> = dir
        .read("model/corpus.jsonl")
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .map(|row| row["text"].as_str().unwrap().replace('\n', " "))
        .collect();
    let rows = |column: &str, texts: &[String]| -> String {
        let row = |text| serde_json::json!({"id": 7, column: text}).to_string() + "\n";
        texts.iter().map(row).collect()
    };
    let array = format!("[{}]", rows("text", &texts).trim_end().replace('\n', ",\n"));
    dir.write("plain.txt", texts.join("\n"));
    dir.write("dos.txt", texts.join("\r\n") + "\r\n");
    dir.write("plain.txt.gz", gzip(&texts.join("\n")));
    dir.write("rows.jsonl", rows("text", &texts));
    dir.write("rows.jsonl.gz", gzip(&rows("text", &texts)));
    dir.write("rows.ndjson", rows("text", &texts));
    dir.write("other.jsonl", rows("body", &texts));
    dir.write("array.json", &array);
    dir.write("array.json.gz", gzip(&array));
    dir.write("strings.json", serde_json::to_string_pretty(&texts).unwrap());
    // Parts in the order of their numbers; what is no text is passed over.
    dir.write("folder/part-10.txt", texts[8..].join("\n"));
    dir.write("folder/part-2.json", format!("[{}]", rows("text", &texts[3..8]).trim().replace('\n', ",")));
    dir.write("folder/part-1.jsonl.gz", gzip(&rows("text", &texts[..3])));
    dir.write("folder/README.md", "about the texts");
    dir.write("folder/.hidden.jsonl", "{");

    let args = "layer --model_name model --aggregate_by gradients";
    let expected = results(&dir, args, "--dataset plain.txt");
    for dataset in [
        "dos.txt",
        "plain.txt.gz",
        "rows.jsonl",
        "rows.jsonl.gz",
        "rows.ndjson",
        "other.jsonl --text_column body",
        "array.json",
        "array.json.gz",
        "strings.json",
        "folder",
        "folder/",
    ] {
        check_same(&results(&dir, args, &format!("--dataset {dataset}")), &expected, dataset);
    }
    // The comparison can fail: one text less is seen.
    let fewer = results(&dir, args, "--dataset rows.jsonl --num_samples 10");
    assert!(fewer["statistics.npz"] != expected["statistics.npz"]);
}

#[test]
fn samples_are_counted_after_the_filter() {
    let dir = Dir::with("qwen2");
    let corpus = dir.read("model/corpus.jsonl");
    let short = "{\"text\": \"short\"}\n";
    dir.write("mixed.jsonl", corpus.lines().map(|line| format!("{short}{line}\n")).collect::<String>());
    let plain = results(&dir, LAYER, "--num_samples 5");
    let args = "layer --model_name model --dataset mixed.jsonl";
    check_same(&results(&dir, args, "--num_samples 5"), &plain, "short texts between");
    let kept = results(&dir, args, "--num_samples 5 --min_chars 0");
    assert!(kept["statistics.npz"] != plain["statistics.npz"], "--min_chars 0 keeps them");
}

/// What says how the run went is no part of the promise, but says so.
#[test]
fn the_record_says_how_the_work_was_cut() {
    let dir = Dir::with("yi");
    dir.ok(&format!("{LAYER} --save_outputs --threads 2 --tokens_per_pass 77 --batch_size 9"));
    let metadata = json(Path::new(&dir.made(".").join("metadata.json")));
    assert_eq!(metadata["run_info"]["threads"], 2);
    assert_eq!(metadata["run_info"]["tokens_per_pass"], 77);
    assert_eq!(metadata["experiment_info"]["batch_size"], 9);
}
