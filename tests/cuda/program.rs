//! The program itself on the stand-in driver: what a user types.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use ndarray_npy::NpzReader;

use super::common::{relative_l2, tolerance};
use super::faults::is_child;
use super::machine::runs_here;

/// `gradlens` with these arguments in `folder`, on emulated devices of 4 GiB.
fn gradlens(folder: &Path, arguments: &[&str]) -> Output {
    command(folder, arguments).output().unwrap()
}

fn command(folder: &Path, arguments: &[&str]) -> Command {
    let (name, value) = cuemu::launcher::library_path().unwrap();
    let cache = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_gradlens"));
    command.args(arguments).current_dir(folder).env(name, value).env("GRADLENS_CUDA_CODE", "ptx");
    command.env("GRADLENS_CACHE", cache);
    command
}

fn succeeds(folder: &Path, arguments: &[&str]) -> String {
    let output = gradlens(folder, arguments);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {text}");
    String::from_utf8(output.stdout).unwrap()
}

/// The arrays of one direction and statistic, layer after layer.
fn arrays(folder: &Path, stat: &str) -> Vec<f64> {
    let mut found = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let of_dimensions = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with("layer_");
    let path = found.find(of_dimensions).unwrap().join("statistics.npz");
    let mut npz = NpzReader::new(fs::File::open(path).unwrap()).unwrap();
    let mut names: Vec<String> = npz.names().unwrap();
    names.retain(|name| name.trim_end_matches(".npy").ends_with(stat));
    names.sort_unstable();
    assert!(!names.is_empty(), "{stat}");
    names
        .iter()
        .flat_map(|name| {
            let array: ndarray::Array1<f64> = npz.by_name(name).unwrap();
            array.to_vec()
        })
        .collect()
}

fn demo(device: &[&str]) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let arguments = [&["demo", "--num_samples", "12", "--output_dir", "."], device].concat();
    let text = succeeds(folder.path(), &arguments);
    (folder, text)
}

#[test]
fn the_demo_is_that_of_the_cpu() {
    if is_child() || !runs_here() {
        return;
    }
    let (cpu, _) = demo(&["--device", "cpu"]);
    for (device, bound) in [
        (&["--device", "cuda", "--dtype", "float32"][..], 1e-5),
        // Of a trained model: its activations are rounded to 2⁻⁹ many times over.
        (&["--device", "auto"], 1e-2),
    ] {
        let (cuda, text) = demo(device);
        assert!(text.contains("loss"), "{text}");
        for stat in ["values.sum_abs", "gradients.sum_abs", "gradients.sum"] {
            let (found, wanted) = (arrays(cuda.path(), stat), arrays(cpu.path(), stat));
            // A signed sum's own size is what cancellation left of it: against that of magnitudes.
            let size = arrays(cpu.path(), &format!("{}_abs", stat.trim_end_matches("_abs")));
            let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
            let difference = norm(&mut found.iter().zip(&wanted).map(|(found, wanted)| found - wanted));
            let error = difference / norm(&mut size.iter().copied());
            assert!(error <= bound, "{device:?} {stat}: relative error {error:e}");
            assert!(error > 0.0, "{device:?} {stat}: not computed by the device");
        }
    }
}

/// Passes are dealt out to devices, and weights come layer by layer where memory is short: the same bytes.
#[test]
fn devices_and_their_memory_change_no_byte() {
    if is_child() || !runs_here() {
        return;
    }
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/qwen2");
    let corpus = format!("{model}/corpus.jsonl");
    let base = [
        &["layer", "--save_outputs", "--model_name", model, "--dataset", &corpus, "--min_chars", "0"][..],
        &["--aggregate_by", "gradients", "--max_length", "32", "--output_dir", "."],
    ]
    .concat();
    let run_with = |more: &[&str], rules: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        let passes: &[&str] =
            if more.contains(&"--tokens_per_pass") { &[] } else { &["--tokens_per_pass", "64"] };
        let text = succeeds(folder.path(), &[&base[..], passes, more, rules].concat());
        let all = ["values.sum", "values.sum_abs", "values.sum_sq", "gradients.sum", "gradients.max_abs"];
        let dry = more.contains(&"--dry_run");
        (if dry { vec![] } else { all.map(|stat| arrays(folder.path(), stat)).to_vec() }, text)
    };
    let run = |more: &[&str]| run_with(more, &[]);
    let (one, _) = run(&["--device", "cuda:0"]);
    for more in [
        &["--device", "cuda:1"][..],
        &["--device", "cuda:0,cuda:1"],
        // Which everything at once does not fit.
        &["--device", "cuda:0", "--device_memory", "0.00045"],
        &["--device", "cuda:0", "--tokens_per_pass", "150"],
        &["--device", "cuda:1,cuda:0", "--tokens_per_pass", "40", "--device_memory", "0.0004"],
    ] {
        assert!(run(more).0 == one, "other bytes with {more:?}");
    }
    let (_, text) = run(&["--device", "cuda", "--device_memory", "0.00045", "--dry_run"]);
    assert!(text.contains("of 4 layers stay, the others come for each pass"), "{text}");
    // With rules for tokens too, of which one is measured before the run, on one device for all.
    let (ruled, text) = run_with(&["--device", "cuda:0"], &RULES);
    assert!(text.contains("--max_norm_ratio 1.3   ") && ruled != one, "{text}");
    for more in [
        &["--device", "cuda:0,cuda:1"][..],
        &["--device", "cuda:1", "--tokens_per_pass", "150"],
        &["--device", "cuda:1,cuda:0", "--tokens_per_pass", "40", "--device_memory", "0.0004"],
    ] {
        assert!(run_with(more, &RULES).0 == ruled, "other bytes with rules and {more:?}");
    }
}

/// A mixture whose layers come one by one, on one device and on two, however long its passes: the same bytes.
#[test]
fn devices_and_their_memory_change_no_byte_of_a_mixture() {
    if is_child() || !runs_here() {
        return;
    }
    let run = |more: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        let base = ["--save_outputs", "--output_dir", ".", "--aggregate_by", "gradients"];
        let small = small("mixtral");
        let arguments = small.iter().map(String::as_str).chain(base).chain(more.iter().copied());
        let text = succeeds(folder.path(), &arguments.collect::<Vec<_>>());
        let all = ["values.sum", "values.sum_sq", "gradients.sum", "gradients.max_abs"];
        let dry = more.contains(&"--dry_run");
        (if dry { vec![] } else { all.map(|stat| arrays(folder.path(), stat)).to_vec() }, text)
    };
    let (one, _) = run(&["--tokens_per_pass", "1000", "--device", "cuda:0"]);
    let streamed = ["--tokens_per_pass", "40", "--device_memory", "0.00063", "--device"];
    for devices in ["cuda:1", "cuda:0,cuda:1"] {
        let more = [&streamed[..], &[devices]].concat();
        assert!(run(&more).0 == one, "other bytes with {more:?}");
        let (_, text) = run(&[&more[..], &["--dry_run"]].concat());
        assert!(text.contains("(0 of 3 layers stay, the others come for each pass)"), "{text}");
    }
}

/// `layer` with the first samples of a golden.
fn small(model: &str) -> Vec<String> {
    let model = format!("{}/tests/goldens/{model}", env!("CARGO_MANIFEST_DIR"));
    let corpus = format!("{model}/corpus.jsonl");
    let arguments = ["layer", "--model_name", &model, "--dataset", &corpus, "--min_chars", "0"];
    let short = ["--max_length", "20", "--num_samples", "4"];
    arguments.into_iter().chain(short).map(String::from).collect()
}

/// Every rule for tokens.
const RULES: [&str; 8] =
    ["--position_stride", "2", "--skip_first", "1", "--skip_special", "all", "--max_norm_ratio", "1.3"];

/// The tokens that count are those of the CPU.
#[test]
fn the_same_tokens_count() {
    if is_child() || !runs_here() {
        return;
    }
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/mistral");
    let corpus = format!("{model}/corpus.jsonl");
    let run = |device: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        let base = ["layer", "--save_outputs", "--model_name", model, "--dataset", &corpus, "--aggregate_by"];
        let more = ["gradients", "--output_dir", "."];
        let text = succeeds(folder.path(), &[&base[..], &more, &RULES, device].concat());
        let said = text.split_once("tokens left out").unwrap().1.split_once("\n\n").unwrap().0.to_owned();
        (["values.sum", "gradients.sum", "gradients.sum_abs"].map(|stat| arrays(folder.path(), stat)), said)
    };
    let (wanted, wanted_said) = run(&["--device", "cpu"]);
    let (found, said) = run(&["--device", "cuda", "--dtype", "float32"]);
    // A token at the limit may be on either side of it: in this corpus none is.
    assert_eq!(said, wanted_said);
    for (found, wanted) in found.iter().zip(&wanted) {
        let error = relative_l2(found, wanted);
        assert!(error > 0.0 && error <= tolerance::GOLDEN, "relative error {error:e}");
    }
}

/// What the plan says fits does fit: the budget is kept to the byte, whatever is asked.
#[test]
fn a_plan_that_fits_is_kept() {
    if is_child() || !runs_here() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/qwen2");
    let corpus = format!("{model}/corpus.jsonl");
    let mut refused = 0;
    let ruled = [&["--aggregate_by", "gradients"][..], &RULES].concat();
    let asked: [&[&str]; 5] = [
        &ruled,
        &["--aggregate_by", "gradients"],
        &["--aggregate_by", "gradients", "--dtype", "float32", "--layers", "1,2"],
        &["--aggregate_by", "values"],
        &["--aggregate_by", "values", "--layers", "0"],
    ];
    for asked in asked {
        for budget in ["0.0002", "0.0004", "0.0006", "0.00065", "0.0007", "0.001"] {
            let base = [
                "layer",
                "--model_name",
                model,
                "--dataset",
                &corpus,
                "--min_chars",
                "0",
                "--max_length",
                "32",
            ];
            let output = gradlens(
                folder.path(),
                &[&base[..], asked, &["--device", "cuda", "--device_memory", budget]].concat(),
            );
            let text = String::from_utf8_lossy(&output.stderr);
            if output.status.success() {
                continue;
            }
            refused += 1;
            assert!(text.contains("too little memory"), "{asked:?} in {budget} GiB: {text}");
            assert!(text.contains("layer by layer") && text.contains("--device_memory"), "{text}");
        }
    }
    assert!((1..25).contains(&refused), "{refused} of 30 are refused");
}

/// The same of what is not one product after another: experts, norms behind products, norms of heads, sites inside the MLP.
#[test]
fn a_plan_that_fits_is_kept_by_other_models() {
    if is_child() || !runs_here() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let asked: [(&str, &[&str]); 5] = [
        ("mixtral", &["--aggregate_by", "gradients"]),
        ("mixtral", &["--aggregate_by", "values", "--site", "resid_mid,mlp", "--dtype", "float32"]),
        ("gemma2", &["--aggregate_by", "gradients", "--site", "mlp_out,attn_out"]),
        ("gemma3", &["--aggregate_by", "gradients", "--site", "mlp_hidden,resid_post"]),
        ("qwen3", &["--aggregate_by", "gradients", "--site", "resid_pre", "--layers", "1,2"]),
    ];
    for (model, asked) in asked {
        // From budgets that are refused: the least that is accepted, and half as much again.
        let mut accepted = 0;
        for eighth in 0..=24 {
            let budget = format!("{}", 0.0002 * f64::powf(2.0, f64::from(eighth) / 8.0));
            let device = ["--device", "cuda", "--device_memory", &budget, "--tokens_per_pass", "40"];
            let small = small(model);
            let arguments = small.iter().map(String::as_str).chain(asked.iter().copied()).chain(device);
            let arguments: Vec<&str> = arguments.collect();
            let planned = gradlens(folder.path(), &[&arguments[..], &["--dry_run"]].concat());
            if !planned.status.success() {
                assert!(accepted == 0, "{model} {asked:?}: more is refused");
                continue;
            }
            accepted += 1;
            if [1, 5].contains(&accepted) {
                succeeds(folder.path(), &arguments);
            }
        }
        assert!((5..=24).contains(&accepted), "{model} {asked:?}: {accepted} of 25 budgets are accepted");
    }
}

/// Between chunks, on all devices: the program stops and leaves nothing behind.
#[test]
fn ctrl_c_on_two_devices() {
    if is_child() || !runs_here() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/qwen2");
    let corpus = fs::read_to_string(format!("{model}/corpus.jsonl")).unwrap();
    fs::write(folder.path().join("long.jsonl"), corpus.repeat(1000)).unwrap();
    let arguments = [
        &[
            "layer",
            "--save_outputs",
            "--output_dir",
            "results",
            "--model_name",
            model,
            "--dataset",
            "long.jsonl",
        ][..],
        &["--num_samples", "10000", "--tokens_per_pass", "64", "--device", "cuda:0,cuda:1"],
    ];
    let mut command = command(folder.path(), &arguments.concat());
    let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut text = String::new();
    while !text.contains("computing") {
        assert!(said.read_line(&mut text).unwrap() > 0, "{text}");
    }
    let sent = Command::new("kill").args(["-s", "INT", &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    said.read_to_string(&mut text).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{text}");
    assert!(text.contains("error: interrupted\n  found:    ") && !text.contains("panicked"), "{text}");
    let left = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
    assert_eq!(left.collect::<Vec<_>>(), ["long.jsonl"]);
}

/// A device that cannot be used is no reason to fail where nobody asked for it, but one to speak.
#[test]
fn auto_without_a_compiler_stays_on_the_cpu() {
    if is_child() || !runs_here() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/qwen2");
    let corpus = format!("{model}/corpus.jsonl");
    let run = |more: &[&str]| {
        let base = ["layer", "--dry_run", "--model_name", model, "--dataset", &corpus];
        let mut command = command(folder.path(), &[&base[..], more].concat());
        command.env("GRADLENS_NVRTC", folder.path()).output().unwrap()
    };
    let output = run(&[]);
    let (said, plan) = (String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success() && plan.contains("device       cpu"), "{said}{plan}");
    assert!(
        said.contains("warning: computing on the CPU, though cuda:0") && said.contains("NVRTC"),
        "{said}"
    );
    for asked in [&["--device", "cuda"][..], &["--dtype", "bfloat16"], &["--device_memory", "1"]] {
        let output = run(asked);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("error: NVRTC"), "{asked:?}: {said}");
    }
}

#[test]
fn devices_that_are_not_there() {
    if is_child() || !runs_here() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for (device, message) in [
        ("cuda:7", "no such CUDA device"),
        ("cuda:0,cuda:0", "do not go together"),
        ("cuda:0,cpu", "do not go together"),
        ("tpu", "no such device"),
    ] {
        let output = gradlens(folder.path(), &["demo", "--device", device]);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains(message), "{device}: {text}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "{device} left something behind");
    }
}
