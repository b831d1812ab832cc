//! What the program says about itself, and about a plan.

use crate::dir::{Dir, LAYER};

/// Flags of the two scripts that concern layers, then those that the program adds.
const FLAGS: &str = "--model_name --num_samples --batch_size --max_length --save_outputs --layers --device \
    --aggregate_by --aggregation_mode --power --normalize_gradients --normalize_mode --save_consolidated \
    --dataset --text_column --min_chars --loss_reduction --output_dir --dry_run --dtype --threads \
    --tokens_per_pass --memory --quiet --revision --dataset_config --dataset_split --dataset_revision \
    --site --position_stride --skip_first --skip_special --max_norm_ratio";

/// Flags of `sae` alone.
const SAE_FLAGS: &str =
    "--sae --sae_revision --sae_gradient --sae_splice --sae_norm_scale --llamascope_convention";

#[test]
fn help_names_the_commands() {
    let dir = Dir::new();
    let run = dir.ok("--help");
    for text in [
        "Usage: gradlens <COMMAND>",
        "\n  layer ",
        "\n  sae ",
        "\n  fetch ",
        "\n  doctor ",
        "\n  demo ",
        "--version",
    ] {
        run.out(text);
    }
    run.check(run.stderr.is_empty(), "help is no error");
    let version = dir.ok("--version").stdout;
    assert_eq!(version, format!("gradlens {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn help_of_layer_explains_every_flag() {
    let dir = Dir::new();
    for args in ["layer --help", "layer -h", "help layer"] {
        let run = dir.ok(args);
        for flag in FLAGS.split_whitespace() {
            run.out(&format!("      {flag}"));
        }
        for text in ["Qwen/Qwen2.5-0.5B", "mean_abs", "sum_abs", "\nOutput:\n", "\nMachine:\n"] {
            run.out(text);
        }
    }
    let run = dir.ok("sae --help");
    for flag in FLAGS.split_whitespace().chain(SAE_FLAGS.split_whitespace()) {
        run.out(&format!("      {flag}"));
    }
    run.out("attribution");
    let run = dir.ok("demo --help");
    for flag in ["--output_dir", "--num_samples", "--threads", "--quiet"] {
        run.out(flag);
    }
    let run = dir.ok("fetch --help");
    for flag in
        ["--model_name", "--revision", "--dataset", "--dataset_split", "--num_samples", "--sae", "--quiet"]
    {
        run.out(flag);
    }
    let run = dir.ok("doctor --help");
    for flag in ["--model_name", "--dataset"] {
        run.out(flag);
    }
    assert!(dir.listing().is_empty());
}

#[test]
fn no_command_shows_the_usage() {
    let run = Dir::new().run("");
    run.check(run.code == Some(2) && run.stdout.is_empty(), "no command is a usage error");
    run.err("Usage: gradlens <COMMAND>");
}

/// The text of the row that `name` begins.
pub fn row<'a>(stdout: &'a str, name: &str) -> &'a str {
    let line = stdout.lines().find(|line| line.get(..13).is_some_and(|start| start.trim() == name));
    line.unwrap_or_else(|| panic!("no row {name} in\n{stdout}"))[name.len()..].trim()
}

#[test]
fn dry_run_prints_the_plan_and_writes_nothing() {
    let dir = Dir::with("qwen2");
    let before = dir.listing();
    let run = dir.ok(&format!(
        "{LAYER} --dry_run --save_outputs --output_dir results --num_samples 8 --layers 0-1,3 --power 2 --threads 3"
    ));
    let row = |name| row(&run.stdout, name);
    assert_eq!(row("model"), "model (qwen2)");
    assert_eq!(row("parameters"), "100,400");
    assert_eq!(row("weights"), "196.1 KiB as bfloat16, mapped");
    assert_eq!(row("shape"), "4 layers, hidden size 48, MLP 96, 6 heads (2 key/value) of 8, vocabulary 412");
    assert_eq!(row("attention"), "full causal; rotary base 1000000");
    assert_eq!(row("layers"), "3 of 4: 0-1,3");
    assert_eq!(row("statistics"), "values at mlp, mean_abs, power 2, normalised by sum_abs");
    assert_eq!(row("texts"), "model/corpus.jsonl, up to 8 with more than 50 characters, cut to 128 tokens");
    assert_eq!(row("device"), "cpu, 3 threads, float32");
    // The residual stream of 8 samples of 128 tokens, 48 float32 each.
    assert!(row("memory").starts_with("activations 192.0 KiB, workspace "), "{}", run.stdout);
    assert!(row("memory").contains("(budget "), "{}", run.stdout);
    let output = row("output");
    assert!(
        output.starts_with(
            "results/layer_activations_model_model_num_samples_8_batch_size_4_layers_0to1_3_power_2.0_"
        ),
        "{output}"
    );
    assert_eq!(row("dataset"), "8 texts read, 8 kept, 0 too short");
    assert!(run.stderr.is_empty(), "{}", run.stderr);
    assert_eq!(dir.listing(), before);
}

#[test]
fn dry_run_of_gradients_says_what_is_kept() {
    let dir = Dir::with("qwen2_window");
    let args = format!("{LAYER} --dry_run --aggregate_by gradients --loss_reduction batch");
    let run = dir.ok(&args);
    let attention = row(&run.stdout, "attention");
    assert!(attention.starts_with("causal, in a window of 6 in 2 layers"), "{attention}");
    assert!(row(&run.stdout, "weights").ends_with(" as float32, mapped"), "{}", run.stdout);
    assert!(row(&run.stdout, "statistics").starts_with("gradients of the batch loss at mlp"));
    assert!(row(&run.stdout, "pass").ends_with("; activations kept"), "{}", run.stdout);
    assert_eq!(row(&run.stdout, "output"), "nothing is saved");
    let little = dir.ok(&format!("{args} --memory 0.000001"));
    assert!(row(&little.stdout, "pass").ends_with("; activations computed again"), "{}", little.stdout);
    assert!(row(&little.stdout, "memory").ends_with("(budget 1.0 KiB)"), "{}", little.stdout);
}

/// It is there to find what would stop the real run.
#[test]
fn dry_run_finds_what_would_stop_the_run() {
    let dir = Dir::with("qwen2");
    dir.write("file", "x");
    dir.refuse(1, &format!("{LAYER} --dry_run --save_outputs --output_dir file"), &["--output_dir"]);
    dir.refuse(1, &format!("{LAYER} --dry_run --min_chars 5000"), &["no text of the dataset is long enough"]);
    dir.refuse(1, &format!("{LAYER} --dry_run --text_column body"), &["column"]);
    std::fs::remove_file(dir.path("model/tokenizer.json")).unwrap();
    dir.refuse(1, &format!("{LAYER} --dry_run"), &["tokenizer.json"]);
}
