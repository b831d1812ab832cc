//! `python/layer_gradient_analysis.py`: it runs the program, and loads what that saved. Runs where `GRADLENS_PYTHON`
//! names a Python that has NumPy.
#![allow(clippy::unwrap_used)]

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use dir::{Dir, LAYER, Run};

#[path = "cli/dir.rs"]
#[allow(dead_code, reason = "the tests of the command line use the rest")]
mod dir;

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/python/layer_gradient_analysis.py");
const SAE_SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/python/sae_gradient_analysis.py");
const PROGRAM: &str = env!("CARGO_BIN_EXE_gradlens");
/// The flags of a run on the golden, after the command.
const FLAGS: &str = "--model_name model --dataset model/corpus.jsonl --save_outputs --output_dir results";

fn python() -> Option<OsString> {
    let python = env::var_os("GRADLENS_PYTHON");
    if python.is_none() {
        eprintln!("skipped: set GRADLENS_PYTHON to a Python with NumPy to have the Python module tested");
    }
    python
}

/// Runs `script` with `flags` and `more`; GRADLENS_BIN is `program`.
fn script(dir: &Dir, script: &Path, program: &str, flags: &str, more: &[&str]) -> Option<Run> {
    let mut command = dir.command(python()?);
    command.arg("-I").arg(script).args(flags.split_whitespace()).args(more);
    Some(dir.finish(command.env("GRADLENS_BIN", program).env("PATH", dir.path("bin"))))
}

/// Runs Python `code` with the module on its path; `results` is what `load_results` made of `path`.
#[track_caller]
fn load(dir: &Dir, path: &Path, code: &str) -> Option<Run> {
    let mut command = dir.command(python()?);
    let before = "import sys; sys.path.insert(0, sys.argv[1]); sys.dont_write_bytecode = True\n\
                  from layer_gradient_analysis import load_results\nresults = load_results(sys.argv[2])\n";
    command.args(["-W", "error", "-c", &format!("{before}{code}")]);
    Some(dir.finish(command.arg(Path::new(SCRIPT).parent().unwrap()).arg(path)))
}

#[test]
fn the_script_runs_the_program_with_its_flags() {
    let dir = Dir::with("qwen2");
    // Quotes, blanks and empty arguments are the shell's: what it made of them must arrive as it is.
    let more = ["--layers", "0,3", "--normalize_mode", "both"];
    let Some(run) = script(&dir, Path::new(SCRIPT), PROGRAM, FLAGS, &more) else { return };
    run.check(run.code == Some(0), "must succeed");
    let direct = dir.run_with(&format!("{LAYER} --save_outputs --output_dir direct"), &more);
    direct.check(direct.code == Some(0), "must succeed");
    let read = |parent: &str, name: &str| fs::read(dir.made(parent).join(name)).unwrap();
    for layer in [0, 3] {
        let name = format!("layer_{layer}_mean_abs_norm_sum_gradients.npy");
        assert_eq!(read("results", &name), read("direct", &name));
    }
    assert!(!dir.made("results").join("layer_1_mean_abs_norm_sum_gradients.npy").exists());
}

#[test]
fn the_script_for_saes_runs_the_other_command() {
    let dir = Dir::with("qwen2");
    let saes = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/goldens/sae/dl_batchtopk/mlp_out_layer_{layer}/trainer_0"
    );
    let more = ["--sae", saes, "--layers", "3"];
    // Not isolated: it takes what it shares with the other file from beside itself.
    let Some(python) = python() else { return };
    let mut command = dir.command(python);
    command.arg(SAE_SCRIPT).args(FLAGS.split_whitespace()).args(more);
    command.env("GRADLENS_BIN", PROGRAM).env("PYTHONDONTWRITEBYTECODE", "1");
    let run = dir.finish(&mut command);
    run.check(run.code == Some(0), "must succeed");
    let folder = dir.made_sae("results");
    let code = "
import sae_gradient_analysis
assert sae_gradient_analysis.load_results is load_results
array = results['data']['layer_3_mean_abs']
assert array.shape == (100,) and array.dtype == 'float32', array
assert results['metadata']['dimension_sizes'] == {3: 100}
assert results['metadata']['sae']['layers']['layer_3']['features'] == 100
";
    let Some(run) = load(&dir, &folder, code) else { return };
    run.check(run.code == Some(0), "must load");
}

#[test]
fn the_exit_code_is_the_programs() {
    let dir = Dir::with("qwen2");
    for (flags, more, code) in [
        ("--help", vec![], 0),
        ("--no_such_flag", vec![], 2),
        ("--model_name model --dataset model/corpus.jsonl", vec!["--layers", ""], 2),
        ("--model_name nowhere/at/all --dataset model/corpus.jsonl", vec![], 1),
    ] {
        let Some(run) = script(&dir, Path::new(SCRIPT), PROGRAM, flags, &more) else { return };
        let direct = dir.run_with(&format!("layer {flags}"), &more);
        run.check(run.code == Some(code) && direct.code == run.code, &format!("must end with {code}"));
        assert_eq!((&run.stdout, &run.stderr), (&direct.stdout, &direct.stderr));
    }
}

#[test]
fn a_missing_program_is_said() {
    let dir = Dir::with("qwen2");
    // A copy with no target folder beside it.
    fs::create_dir(dir.path("python")).unwrap();
    let copy = dir.path("python/layer_gradient_analysis.py");
    fs::copy(SCRIPT, &copy).unwrap();
    for (program, says) in [
        ("nowhere/gradlens", vec!["GRADLENS_BIN=nowhere/gradlens", "unset it"]),
        ("model/config.json", vec!["GRADLENS_BIN=model/config.json"]),
        ("", vec!["target/release/gradlens", "gradlens on PATH", "cargo build --release", "GRADLENS_BIN"]),
    ] {
        let Some(run) = script(&dir, &copy, program, FLAGS, &[]) else { return };
        run.check(run.code == Some(1), "must end with 1");
        run.check(run.stderr.starts_with("error: the program gradlens was not found"), "must say what");
        for text in says {
            run.err(text);
        }
        run.check(!run.stderr.contains("Traceback"), "a message, not a traceback");
    }
}

/// Beside the file first, and on PATH where there is none.
#[cfg(unix)]
#[test]
fn the_program_is_found_without_being_named() {
    use std::os::unix::fs::symlink;

    let dir = Dir::with("qwen2");
    fs::create_dir(dir.path("python")).unwrap();
    let copy = dir.path("python/layer_gradient_analysis.py");
    fs::copy(SCRIPT, &copy).unwrap();
    fs::create_dir(dir.path("bin")).unwrap();
    symlink(PROGRAM, dir.path("bin/gradlens")).unwrap();
    let Some(run) = script(&dir, &copy, "", "--help", &[]) else { return };
    run.check(run.code == Some(0), "must find it on PATH");
    run.out("Usage: gradlens layer");
    fs::create_dir_all(dir.path("target/release")).unwrap();
    // What is built beside the file wins, and what it is called with is seen.
    let built = dir.path("target/release/gradlens");
    fs::write(&built, "#!/bin/sh\necho built \"$@\"\nexit 7\n").unwrap();
    make_executable(&built);
    let Some(run) = script(&dir, &copy, "", "--layers 0", &["a b", ""]) else { return };
    run.check(run.code == Some(7) && run.stdout == "built layer --layers 0 a b \n", "must be the built one");
    // A file that the system cannot run is an error of ours as well.
    fs::write(&built, "no program").unwrap();
    let Some(run) = script(&dir, &copy, "", "--layers 0", &[]) else { return };
    run.check(run.code == Some(1) && run.stderr.starts_with("error: "), "must say that it cannot be run");
}

#[cfg(unix)]
fn make_executable(path: &Path) {
    use std::os::unix::fs::PermissionsExt;

    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// The results of a run over two layers, in its folder.
fn results(dir: &Dir) -> PathBuf {
    dir.ok(&format!(
        "{LAYER} --layers 1,3 --aggregation_mode both --normalize_mode all --aggregate_by gradients --power 2 \
         --save_outputs --output_dir results"
    ));
    dir.made("results")
}

#[test]
fn an_archive_and_its_folder_load_alike() {
    let dir = Dir::with("qwen2");
    let folder = results(&dir);
    let code = "
data, metadata = results['data'], results['metadata']
assert set(results) == {'data', 'metadata'}
assert set(data) == {f'layer_{i}_{a}_norm_{n}' for i in (1, 3) for a in ('mean', 'mean_abs')
                     for n in ('none', 'sum', 'sum_abs')}, list(data)
assert all(array.shape == (48,) and array.dtype == 'float32' for array in data.values())
assert abs(abs(data['layer_3_mean_norm_sum_abs']).sum() - 48) < 1e-3
assert metadata['dimension_sizes'] == {1: 48, 3: 48} and metadata['layers'] == [1, 3], metadata
assert metadata['power'] == 2.0 and metadata['aggregate_by'] == 'gradients'
print(sorted(metadata.items()))
import hashlib
print({key: hashlib.sha256(array.tobytes()).hexdigest() for key, array in sorted(data.items())})";
    let archive = folder.join("consolidated_results.npz");
    let Some(of_archive) = load(&dir, &archive, code) else { return };
    let of_folder = load(&dir, &folder, code).unwrap();
    fs::remove_file(&archive).unwrap();
    let of_files = load(&dir, &folder, code).unwrap();
    for run in [&of_archive, &of_folder, &of_files] {
        run.check(run.code == Some(0) && run.stderr.is_empty(), "must load");
    }
    assert!(of_archive.stdout.contains("layer_1_mean_abs_norm_sum"), "{}", of_archive.stdout);
    assert_eq!(of_archive.stdout, of_folder.stdout);
    assert_eq!(of_archive.stdout, of_files.stdout);
}

#[test]
fn what_is_no_result_is_refused() {
    let dir = Dir::with("qwen2");
    let folder = results(&dir);
    dir.write("damaged.npz", "no archive");
    dir.write("empty/x", "");
    for (path, kind, says) in [
        (dir.path("nowhere"), "FileNotFoundError", "nowhere"),
        (dir.path("empty"), "FileNotFoundError", "consolidated_results.npz"),
        (dir.path("model"), "FileNotFoundError", "metadata.json"),
        (dir.path("model/config.json"), "ValueError", "config.json is not a results archive"),
        (dir.path("damaged.npz"), "ValueError", "damaged.npz is not a results archive"),
        (folder.join("statistics.npz"), "ValueError", "'metadata'"),
    ] {
        let Some(run) = load(&dir, &path, "") else { return };
        let last = run.stderr.lines().last().unwrap_or_default();
        run.check(run.code == Some(1) && last.starts_with(kind) && last.contains(says), "must be refused");
    }
}
