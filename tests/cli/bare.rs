//! A dry run of config.json alone: what a model takes, and where it would fit.

use std::fs;

use serde_json::Value;

use crate::dir::Dir;
use crate::help::row;

/// A folder that holds nothing but the configuration of a published model.
fn bare(name: &str) -> Dir {
    let dir = Dir::new();
    let models: Value = serde_json::from_str(include_str!("../config/published.json")).unwrap();
    let model = models.as_array().unwrap().iter().find(|model| model["name"] == name).unwrap();
    dir.write("model/config.json", model["config"].to_string());
    dir
}

const DRY: &str = "layer --model_name model --device cpu --dry_run";

#[test]
fn a_mixture_of_experts() {
    let dir = bare("mistralai/Mixtral-8x7B-v0.1");
    // There is no network, so the texts are not known either.
    let run = dir.ok(DRY);
    run.err("the texts are not known");
    let row = |name| row(&run.stdout, name);
    assert_eq!(row("parameters"), "46,702,792,704, of which 12,879,925,248 are active for a token");
    assert_eq!(row("a layer"), "1,451,270,144 parameters, 2.7 GiB in bfloat16");
    assert_eq!(row("weights"), "87.0 GiB in bfloat16, none of them here");
    assert!(row("shape").contains("MLP 14336 in each of 8 experts, 2 for each token"), "{}", row("shape"));
    // 2·(12.88 G − embedding, head and norms), and the head: 25.23 + 0.26.
    let work = "up to 25.235 GFLOP per token forward; of gradients 25.497 forward and up to as much backward";
    assert_eq!(row("work"), work);
    let fits: Vec<&str> = run.stdout.lines().filter(|line| line.contains(" GB, bfloat16: ")).collect();
    assert!(fits[0].contains("24 GB, bfloat16: ") && fits[0].contains(" of 32 layers stay"), "{fits:?}");
    assert!(fits[1].contains("80 GB, bfloat16: ") && fits[1].contains(" of 32 layers stay"), "{fits:?}");
    assert!(fits[2].contains("141 GB, bfloat16: all weights stay"), "{fits:?}");
    // Of values of the first layers no more is asked.
    dir.ok(&format!("{DRY} --layers 0,1")).out("24 GB, bfloat16: all weights stay");
}

#[test]
fn small_and_large_models() {
    for (name, parameters, fits) in [
        ("google/gemma-2-2b", "2,614,341,888", ["all weights stay", "all weights stay", "all weights stay"]),
        ("01-ai/Yi-34B", "34,388,917,248", [" of 60 layers stay", " of 60 layers stay", "all weights stay"]),
    ] {
        let dir = bare(name);
        let run = dir.ok(&format!("{DRY} --aggregate_by gradients"));
        assert_eq!(row(&run.stdout, "parameters"), parameters);
        let shown = run.stdout.lines().filter(|line| line.contains(" GB, bfloat16: "));
        assert!(shown.zip(fits).all(|(shown, fits)| shown.contains(fits)), "{}", run.stdout);
    }
    let gemma = bare("google/gemma-2-2b").ok(DRY);
    gemma.out("scores capped at 50; logits capped at 30");
}

/// Enough for a dry run and for nothing else.
#[test]
fn weights_are_missed_where_they_are_needed() {
    let dir = bare("Qwen/Qwen3-0.6B");
    dir.write("texts.txt", "A text that is long enough to be kept, which takes more than fifty characters.");
    let run = "layer --model_name model --device cpu --dataset texts.txt";
    dir.refuse(1, run, &["no weights that can be read", "model.safetensors"]);
    dir.ok(&format!("{run} --dry_run")).out("1 texts read, 1 kept");
    let doctor = dir.run("doctor --model_name model --device cpu --dataset texts.txt");
    doctor.check(doctor.code == Some(1), "the job cannot run");
    doctor.out("with these flags cannot run here");
    // Files that may be weights are not passed over.
    fs::write(dir.path("model/pytorch_model.bin"), "x").unwrap();
    dir.refuse(1, &format!("{run} --dry_run"), &["no weights that can be read", "pytorch_model.bin"]);
}
