//! Which tokens count: flags, what is said of them, and what the files record.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::dir::{Dir, LAYER};
use crate::files::{self, Npz};
use crate::sae::{SAE, with};

/// `metadata.json` below a run's folder, of what a run adds to the contract.
fn run_info(dir: &Dir, parent: &str) -> Value {
    files::json(&dir.made(parent).join("metadata.json"))["run_info"].clone()
}

#[test]
fn every_token_counts_unless_asked() {
    let dir = Dir::with("mistral");
    let run = dir.ok(&format!("{LAYER} --save_outputs --output_dir out"));
    run.check(!run.stdout.contains("left out"), "there is nothing to say");
    let info = run_info(&dir, "out");
    assert_eq!(
        info["token_policy"],
        json!({
            "position_stride": 1, "skip_first": 0, "skip_special": "none", "special_ids": [], "max_norm_ratio": null,
            "median_norms": null,
            "tokens_skipped": {"position_stride": 0, "skip_first": 0, "skip_special": 0, "max_norm_ratio": null},
        })
    );
    let mut raw = Npz::open(&dir.made("out").join("statistics.npz"));
    assert_eq!(raw.count("layer_0.mlp.values.count"), info["tokens"].as_i64().unwrap());
    let plan = dir.ok(&format!("{LAYER} --dry_run"));
    plan.check(!plan.stdout.contains("\ncounted "), "there is nothing to say");
}

/// The counts of metadata, of the screen and of the statistics are one story.
#[test]
fn what_each_rule_leaves_out_is_recorded() {
    let dir = Dir::with("mistral");
    let rules = "--skip_special bos --max_norm_ratio 1.2 --skip_first 2 --position_stride 3";
    let run = dir.ok(&format!("{LAYER} --aggregate_by gradients --save_outputs --output_dir out {rules}"));
    let info = run_info(&dir, "out");
    let policy = &info["token_policy"];
    let asked = |key: &str| &policy[key];
    assert_eq!([asked("position_stride"), asked("skip_first")], [&json!(3), &json!(2)]);
    assert_eq!([asked("skip_special"), asked("max_norm_ratio")], [&json!("bos"), &json!(1.2)]);
    assert_eq!(asked("special_ids").as_array().unwrap().len(), 1);
    let skipped = &policy["tokens_skipped"];
    let count = |value: &Value| value.as_i64().unwrap();
    let same_everywhere: i64 =
        ["position_stride", "skip_first", "skip_special"].map(|rule| count(&skipped[rule])).iter().sum();
    // BOS stands at position 0 alone, which a rule before has left out.
    assert_eq!(skipped["skip_special"], 0);
    let mut raw = Npz::open(&dir.made("out").join("statistics.npz"));
    for layer in info["position_0_share"].as_object().unwrap().keys() {
        let norms = count(&skipped["max_norm_ratio"][layer]);
        let counted = raw.count(&format!("{layer}.mlp.values.count"));
        assert!(norms > 0 && counted > 0, "{layer}: {norms} {counted}");
        assert_eq!(same_everywhere + norms + counted, count(&info["tokens"]), "{layer}");
        // A sample of one token counts nowhere: its position is left out.
        assert_eq!(raw.count(&format!("{layer}.mlp.gradients.count")), counted);
        assert!(policy["median_norms"][layer].as_f64().unwrap() > 0.0);
        assert!(raw.f64(&format!("{layer}.mlp.values.sum_abs_position_0")).iter().all(|sum| *sum == 0.0));
    }
    run.out("tokens left out of the statistics, each by the first rule that it breaks\n");
    run.out(&format!("--position_stride 3    {}\n", skipped["position_stride"]));
    run.out(&format!("--skip_first 2         {}\n", skipped["skip_first"]));
    run.out("--skip_special bos     0\n--max_norm_ratio 1.2   ");
    run.out(" of each layer\n");
    let timing = files::json(&dir.made("out").join("timing_stats.json"));
    assert!(timing["overall"]["calibration"].as_f64().unwrap() > 0.0);
    let plan = dir.ok(&format!("{LAYER} --dry_run {rules}"));
    plan.out(
        "\ncounted      every 3rd position, but not the first 2 positions, BOS, norms above 1.2 medians of the layer\n",
    );
}

#[test]
fn special_tokens_are_left_out_wherever_they_stand() {
    let dir = Dir::with("mistral");
    let count = |flags: &str| {
        let parent = flags.replace([' ', '-'], "_");
        dir.ok(&format!("{LAYER} --save_outputs --output_dir out{parent} {flags}"));
        let info = run_info(&dir, &format!("out{parent}"));
        let mut raw = Npz::open(&dir.made(&format!("out{parent}")).join("statistics.npz"));
        let skipped = info["token_policy"]["tokens_skipped"].clone();
        assert_eq!(raw.count("layer_0.mlp.values.count"), {
            let left_out: i64 =
                ["skip_first", "skip_special"].map(|rule| skipped[rule].as_i64().unwrap()).iter().sum();
            info["tokens"].as_i64().unwrap() - left_out
        });
        (info["texts_kept"].as_i64().unwrap(), skipped["skip_special"].as_i64().unwrap())
    };
    // One in front of each text, and one that a text spells out.
    let (kept, bos) = count("--skip_special bos");
    assert_eq!(bos, kept + 1);
    assert_eq!(count("--skip_special bos --skip_first 1").1, 1);
    assert!(count("--skip_special all").1 >= kept);
}

/// Medians are of the first 64 samples, however they are packed; so is everything else.
#[test]
fn cuts_show_nowhere() {
    let dir = Dir::with("mistral");
    let corpus = dir.read("model/corpus.jsonl");
    dir.write("many.jsonl", corpus.repeat(9));
    let all = "--dataset many.jsonl --aggregate_by gradients --skip_special all --max_norm_ratio 1.1 --skip_first 1 \
               --position_stride 2 --save_outputs --output_dir";
    let run = |parent: &str, flags: &str| {
        dir.ok(&format!("layer --model_name model {all} {parent} {flags}"));
        let folder = dir.made(parent);
        (files::numbers(&folder), run_info(&dir, parent)["token_policy"].clone())
    };
    let expected: (BTreeMap<_, _>, Value) = run("first", "");
    assert!(run_info(&dir, "first")["texts_kept"].as_i64().unwrap() > 80);
    for (number, flags) in
        ["--tokens_per_pass 1", "--tokens_per_pass 1000000", "--threads 1 --memory 0.000001"]
            .iter()
            .enumerate()
    {
        let found = run(&format!("cut_{number}"), flags);
        assert_eq!(found.1, expected.1, "{flags}");
        assert!(found.0 == expected.0, "{flags}: other bytes");
    }
    let medians = |policy: &Value| policy["median_norms"].clone();
    assert_eq!(medians(&run("first_64", "--num_samples 64").1), medians(&expected.1));
    assert_ne!(medians(&run("first_63", "--num_samples 63").1), medians(&expected.1));
    // Values alone are measured against the same.
    let values = all.replace("gradients", "values");
    dir.ok(&format!("layer --model_name model {values} values"));
    assert_eq!(run_info(&dir, "values")["token_policy"], expected.1);
}

#[test]
fn flags_that_make_no_sense() {
    let dir = Dir::with("qwen2");
    let run = |flags: &str| format!("{LAYER} {flags}");
    dir.refuse(2, &run("--position_stride 0"), &["--position_stride", "1 or more"]);
    for ratio in ["0", "-1", "nan", "inf"] {
        let flags = format!("--max_norm_ratio {ratio}");
        dir.refuse(2, &run(&flags), &["--max_norm_ratio", "a finite number above 0"]);
    }
    dir.refuse_by_clap(&run("--max_norm_ratio ten"), &["--max_norm_ratio", "'ten'"]);
    dir.refuse_by_clap(&run("--skip_special eos"), &["none, bos, all"]);
    dir.refuse_by_clap(&run("--skip_first=-1"), &["--skip_first"]);
    let says =
        ["no position is left to count", "--skip_first", "not the first 40 positions", "--max_length 40"];
    dir.refuse(2, &run("--max_length 40 --skip_first 40"), &says);
    let says = ["no position is left to count", "--skip_first and --position_stride", "every 20th position"];
    dir.refuse(2, &run("--max_length 40 --skip_first 21 --position_stride 20"), &says);
    let doctor = dir.run(&run("--skip_first 200").replacen("layer", "doctor", 1));
    doctor.check(doctor.code == Some(2), "no job");
    doctor.err("no position is left to count");
}

/// What leaves no token is refused at the end, with the rules that took them.
#[test]
fn rules_that_leave_nothing() {
    let dir = Dir::with("qwen2");
    let says =
        ["the rules leave no token to count", "left out by --max_norm_ratio 0.0001", "values of layer 0"];
    dir.refuse(1, &format!("{LAYER} --max_norm_ratio 0.0001 --save_outputs"), &says);
    dir.write("short.jsonl", "{\"text\": \"a few words\"}\n");
    let short = "layer --model_name model --dataset short.jsonl --min_chars 0 --save_outputs";
    dir.refuse(
        1,
        &format!("{short} --skip_first 100"),
        &["left out by --skip_first 100", "the rules leave no token"],
    );
    let says =
        ["left out by --skip_first 100", "the first 1 samples, whose median norm --max_norm_ratio asks for"];
    dir.refuse(1, &format!("{short} --skip_first 100 --max_norm_ratio 3"), &says);
    // What is left may have values alone.
    dir.write("one.jsonl", "{\"text\": \"x\"}\n{\"text\": \"<|im_start|><|im_end|>\"}\n");
    let one = "layer --model_name model --dataset one.jsonl --min_chars 0 --skip_special all --save_outputs";
    dir.ok(&format!("{one} --output_dir values"));
    let says = ["gradients of layer 0", "3 tokens: 2 left out by --skip_special all, 1 without a gradient"];
    dir.refuse(1, &format!("{one} --aggregate_by gradients"), &says);
}

#[test]
fn a_tokenizer_without_bos_is_said() {
    let dir = Dir::with("qwen2");
    let warning = "--skip_special bos leaves nothing out: the tokenizer has no token that starts texts (BOS)";
    dir.ok(&format!("{LAYER} --skip_special bos")).err(warning);
    dir.ok(&format!("{LAYER} --skip_special bos --dry_run")).err(warning);
    let run = dir.ok(&format!("{LAYER} --skip_special all"));
    run.check(!run.stderr.contains("leaves nothing out"), "it has special tokens");
}

/// SAEs that know no first token.
#[test]
fn saes_without_the_first_token() {
    let warning = "were trained without the first token of texts (BOS)";
    for (case, sae) in [("gemma_scope", "saes"), ("llama_scope", "saes")] {
        let dir = with(case);
        let run = |flags: &str| dir.ok(&format!("{SAE} --sae {sae} --dry_run {flags}"));
        run("")
            .err(warning)
            .err("position 0 of each sample is counted all the same: --skip_first 1 leaves it out");
        // This tokenizer has no BOS.
        run("--skip_special bos").err(warning);
        let silent = run("--skip_first 1");
        silent.check(!silent.stderr.contains(warning), "it is left out");
    }
    // One that has.
    let dir = with("gemma_scope");
    let mistral = Dir::with("mistral");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        dir.write(&format!("model/{file}"), mistral.read(&format!("model/{file}")));
    }
    for (flags, said) in [("", true), ("--skip_special bos", false), ("--skip_special all", false)] {
        let run = dir.ok(&format!("{SAE} --sae saes --dry_run {flags}"));
        run.check(run.stderr.contains(warning) == said, flags);
    }
    let dir = with("dl_batchtopk");
    let run = dir.ok(&format!("{SAE} --sae saes --dry_run"));
    run.check(!run.stderr.contains(warning), "they know it");
}

/// Features and dimensions of a run leave out the same tokens.
#[test]
fn features_and_dimensions_count_the_same_tokens() {
    let dir = with("dl_batchtopk");
    let rules =
        "--skip_first 1 --max_norm_ratio 1.1 --position_stride 2 --layers 1,3 --save_outputs --output_dir";
    let run = dir.ok(&format!("{SAE} --sae saes --aggregate_by attribution {rules} features"));
    run.out("--max_norm_ratio 1.1   ");
    dir.ok(&format!("{} --min_chars 0 {rules} dimensions", LAYER));
    let features = files::json(&dir.made_sae("features").join("metadata.json"))["run_info"].clone();
    let dimensions = run_info(&dir, "dimensions");
    assert_eq!(features["token_policy"], dimensions["token_policy"]);
    assert_eq!(features["sae"]["position_stride"], 2);
    let mut sums = [dir.made_sae("features"), dir.made("dimensions")]
        .map(|folder| Npz::open(&folder.join("statistics.npz")));
    let [of_features, of_dimensions] = &mut sums;
    for layer in [1, 3] {
        let key = format!("layer_{layer}.mlp.values.count");
        assert_eq!(of_features.count(&key), of_dimensions.count(&key));
    }
}
