//! What is printed at the end of a run: one screen. What is kept for `runtime_output.txt` alone.

use std::path::Path;

use crate::dir::{Dir, LAYER, Run};
use crate::files::{Npz, json, set_element};

/// A qwen2 of so many layers, all with the weights of the tiny model's last one.
fn with_layers(layers: usize) -> Dir {
    let dir = Dir::with("qwen2");
    let config = dir
        .read("model/config.json")
        .replace("\"num_hidden_layers\": 4", &format!("\"num_hidden_layers\": {layers}"));
    assert!(config.contains(&format!(": {layers}")), "{config}");
    dir.write("model/config.json", config);
    grow(&dir.path("model/model.safetensors"), layers);
    dir
}

/// Adds layers to the checkpoint.
fn grow(path: &Path, layers: usize) {
    let bytes = std::fs::read(path).unwrap();
    let old = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors = Vec::new();
    for (name, view) in old.tensors() {
        if let Some(rest) = name.strip_prefix("model.layers.3.") {
            tensors.extend(
                (4..layers).map(|layer| (format!("model.layers.{layer}.{rest}"), old.tensor(&name).unwrap())),
            );
        }
        tensors.push((name, view));
    }
    let grown = safetensors::serialize(tensors, None).unwrap();
    std::fs::write(path, grown).unwrap();
}

/// The layers of the rows of the table that follows `quantity`.
fn rows(text: &str, quantity: &str) -> Vec<usize> {
    let table = text.split(&format!("{quantity}\n")).nth(1).unwrap_or_default();
    let lines = table.lines().skip(1).map(|line| line.split_whitespace().next()?.parse().ok());
    lines.map_while(|layer| layer).collect()
}

#[track_caller]
fn check_screen(run: &Run) {
    let lines = run.stdout.lines();
    run.check(lines.clone().count() <= 50, "one screen");
    let wide = lines.filter(|line| line.chars().count() > 100);
    // Paths are as long as they are.
    let wide: Vec<_> = wide.filter(|line| !line.contains("esults")).collect();
    run.check(wide.is_empty(), &format!("no wider than a hundred columns: {wide:?}"));
}

const GRADIENTS: &str = "gradients at mlp of the sample loss, nats per unit";

#[test]
fn twenty_four_layers_fit_one_screen() {
    let dir = with_layers(24);
    let args = format!("{LAYER} --aggregate_by gradients --aggregation_mode both --num_samples 6");
    let run = dir.ok(&format!("{args} --save_outputs"));
    check_screen(&run);
    assert_eq!(rows(&run.stdout, GRADIENTS), (0..24).collect::<Vec<_>>());
    assert!(rows(&run.stdout, "values at mlp").is_empty(), "nobody asked for them");
    let kept = std::fs::read_to_string(dir.made(".").join("runtime_output.txt")).unwrap();
    for quantity in ["values at mlp", GRADIENTS] {
        assert_eq!(rows(&kept, quantity), (0..24).collect::<Vec<_>>(), "{kept}");
    }
}

#[test]
fn of_many_layers_some_are_shown() {
    let dir = with_layers(40);
    let args = format!("{LAYER} --num_samples 3");
    let run = dir.ok(&format!("{args} --save_outputs"));
    check_screen(&run);
    let every_2nd: Vec<usize> = (0..40).step_by(2).chain([39]).collect();
    assert_eq!(rows(&run.stdout, "values at mlp"), every_2nd);
    run.out("\n(every 2nd of 40 layers, and the last; runtime_output.txt has all)\n");
    let kept = std::fs::read_to_string(dir.made(".").join("runtime_output.txt")).unwrap();
    let last = kept.rfind("values at mlp\n").unwrap();
    assert_eq!(rows(&kept[last..], "values at mlp"), (0..40).collect::<Vec<_>>());
    // Without that file all of them are printed.
    let run = dir.ok(&args);
    assert_eq!(rows(&run.stdout, "values at mlp"), (0..40).collect::<Vec<_>>());
    run.check(!run.stdout.contains("every 2nd"), "all are there");
}

#[test]
fn the_demo_shows_both_tables() {
    let run = Dir::new().ok("demo --num_samples 8");
    // Dimensions, then SAE features: a screen each.
    for (number, part) in run.stdout.split("texts   ").skip(1).enumerate() {
        let lines = part.lines().count();
        run.check(lines <= 50 && number < 2, &format!("one screen: {lines}"));
        let wide = part.lines().find(|line| line.chars().count() > 100 && !line.contains("esults"));
        run.check(wide.is_none(), &format!("no wider than a hundred columns: {wide:?}"));
    }
    for quantity in ["values at mlp", GRADIENTS] {
        assert_eq!(rows(&run.stdout, quantity), (0..6).collect::<Vec<_>>());
    }
    assert_eq!(rows(&run.stdout, "where the first of these features fire most").len(), 12);
}

/// A first token that the MLP answers with far more than all others: its embedding points where the MLP looks.
#[test]
fn an_attention_sink_is_said_and_recorded() {
    let dir = Dir::with("llama3");
    let args = format!("{LAYER} --save_outputs --num_samples 8");
    let plain = dir.ok(&format!("{args} --output_dir plain"));
    plain.check(!plain.stderr.contains("attention sink"), "there is none yet");
    let bos = json(&dir.path("model/config.json"))["bos_token_id"].as_u64().unwrap() as usize;
    let weights = std::fs::read_dir(dir.path("model")).unwrap().map(|entry| entry.unwrap().path());
    let weights: Vec<_> =
        weights.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).collect();
    let set = |tensor: &str, index: usize, value: f32| {
        let holds = |path: &&std::path::PathBuf| {
            let bytes = std::fs::read(path).unwrap();
            safetensors::SafeTensors::deserialize(&bytes).unwrap().tensor(tensor).is_ok()
        };
        set_element(
            weights.iter().filter(|path| !path.ends_with("expected.safetensors")).find(holds).unwrap(),
            tensor,
            index,
            value,
        );
    };
    set("model.embed_tokens.weight", bos * 48, 1000.0);
    set("model.layers.1.post_attention_layernorm.weight", 0, 100.0);
    let run = dir.ok(&format!("{args} --output_dir sink"));
    run.err("warning: attention sink: in layer 1 position 0 holds ");

    let folder = dir.made("sink");
    let share = json(&folder.join("metadata.json"))["run_info"]["position_0_share"].clone();
    let mut raw = Npz::open(&folder.join("statistics.npz"));
    for layer in 0..3 {
        let [part, whole] = ["sum_abs_position_0", "sum_abs"]
            .map(|sums| raw.f64(&format!("layer_{layer}.mlp.values.{sums}")).iter().sum::<f64>());
        let share = share[format!("layer_{layer}")].as_f64().unwrap();
        assert!((share / (part / whole) - 1.0).abs() < 1e-14, "{share}, {part} of {whole}");
        run.out(&format!("  {:.1}%  ", 100.0 * share));
        assert!(layer != 1 || share > 0.2, "{share}");
    }
}

/// Progress alone: results, warnings and errors stay. (`interrupt` runs for long enough to see that progress goes.)
#[test]
fn quiet_takes_nothing_else_away() {
    let dir = Dir::with("yi");
    let loud = dir.ok(&format!("{LAYER} --num_samples 1000"));
    let quiet = dir.ok(&format!("{LAYER} --num_samples 1000 --quiet"));
    assert_eq!(quiet.stderr, loud.stderr);
    quiet.err("warning: nothing will be saved").out("values at mlp\n").out("FINAL TIMING SUMMARY\n");
    let none = "layer --model_name model --dataset none.jsonl --save_outputs --quiet";
    dir.refuse(1, none, &["cannot read the dataset"]);
    dir.ok("demo --num_samples 2 --quiet").out("values at mlp\n");
}
