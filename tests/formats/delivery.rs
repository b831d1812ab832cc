//! Folders are complete or not there; wrong paths fail before any work is done.

use crate::record::{listing, record, spec};
use gradlens::error::Result;
use gradlens::output::{Delivered, Log, OutputSpec, RunRecord, Target, write};
use gradlens::transform::{AggregationMode, NormaliseMode};
use std::fs;
use std::path::Path;
use tempfile::tempdir;

fn small() -> RunRecord<'static> {
    record(AggregationMode::MeanAbs, NormaliseMode::SumAbs, None)
}

fn deliver(spec: &OutputSpec, record: &mut RunRecord) -> Result<Delivered> {
    let log = Log::silent();
    log.note("hello");
    let mut target = Target::prepare(spec)?;
    write(&mut target, record)?;
    target.finish(&log)
}

const NAME: &str =
    "layer_activations_model_org_tiny_num_samples_5_batch_size_4_layers_0_7_power_2.0_20250102_030405";

#[test]
fn the_folder_has_every_file() {
    let root = tempdir().expect("a temporary folder");
    let mut record = record(AggregationMode::Both, NormaliseMode::Both, None);
    let delivered = deliver(&spec(root.path(), None), &mut record).expect("a writable folder");
    let folder = delivered.folder.expect("a folder was asked for");
    assert_eq!(folder, root.path().join(NAME));
    assert_eq!(delivered.consolidated, Some(folder.join("consolidated_results.npz")));
    assert_eq!(listing(root.path()), [NAME]);
    assert_eq!(
        listing(&folder),
        [
            "consolidated_results.npz",
            "layer_0_mean_abs_norm_sum_abs_gradients.npy",
            "layer_0_mean_abs_norm_sum_gradients.npy",
            "layer_0_mean_norm_sum_abs_gradients.npy",
            "layer_0_mean_norm_sum_gradients.npy",
            "layer_7_mean_abs_norm_sum_abs_gradients.npy",
            "layer_7_mean_abs_norm_sum_gradients.npy",
            "layer_7_mean_norm_sum_abs_gradients.npy",
            "layer_7_mean_norm_sum_gradients.npy",
            "metadata.json",
            "runtime_output.txt",
            "statistics.npz",
            "timing_stats.json",
            "timing_summary.txt"
        ]
    );
    let said = fs::read_to_string(folder.join("runtime_output.txt")).expect("the log");
    assert!(said.starts_with("hello\nResults saved to: "), "{said}");
    let times = fs::read_to_string(folder.join("timing_stats.json")).expect("the times");
    assert!(times.contains("save_data") && times.contains("\"total\""), "{times}");
}

#[cfg(unix)]
#[test]
fn delivered_files_are_not_private() {
    use std::os::unix::fs::PermissionsExt;
    let root = tempdir().expect("a temporary folder");
    // What the user's umask gives to things made the plain way.
    let (file, folder) = (root.path().join("plain"), root.path().join("plain_folder"));
    fs::write(&file, "").expect("a file");
    fs::create_dir(&folder).expect("a folder");
    let mode = |path: &Path| fs::metadata(path).expect("it is there").permissions().mode();

    let delivered =
        deliver(&spec(root.path(), Some(&root.path().join("r.npz"))), &mut small()).expect("writable");
    assert_eq!(mode(&delivered.folder.expect("a folder")), mode(&folder));
    assert_eq!(mode(&delivered.consolidated.expect("an archive")), mode(&file));
}

#[test]
fn a_name_that_is_taken_gets_a_number() {
    let root = tempdir().expect("a temporary folder");
    let spec = spec(root.path(), None);
    for suffix in ["", "_2", "_3"] {
        let delivered = deliver(&spec, &mut small()).expect("a writable folder");
        assert_eq!(delivered.folder, Some(root.path().join(format!("{NAME}{suffix}"))));
    }
    assert_eq!(listing(root.path()).len(), 3);
}

#[test]
fn the_consolidated_archive_goes_where_it_is_sent() {
    let root = tempdir().expect("a temporary folder");
    // `np.savez` adds the ending, and so do we, also after another one.
    let both = spec(root.path(), Some(&root.path().join("run.v2")));
    let delivered = deliver(&both, &mut small()).expect("a writable folder");
    assert_eq!(delivered.consolidated, Some(root.path().join("run.v2.npz")));
    let folder = delivered.folder.expect("a folder was asked for");
    assert!(!listing(&folder).contains(&"consolidated_results.npz".to_owned()));
    assert!(listing(&folder).contains(&"statistics.npz".to_owned()));

    let alone = OutputSpec { save_outputs: false, output_dir: root.path().join("unused"), ..both };
    let before = listing(root.path());
    let delivered = deliver(&alone, &mut small()).expect("an archive that is there is replaced");
    assert_eq!(delivered, Delivered { folder: None, consolidated: Some(root.path().join("run.v2.npz")) });
    assert_eq!(listing(root.path()), before);
}

#[test]
fn nothing_asked_nothing_written() {
    let root = tempdir().expect("a temporary folder");
    let spec = OutputSpec { save_outputs: false, ..spec(&root.path().join("new"), None) };
    assert_eq!(deliver(&spec, &mut small()).expect("nothing to fail"), Delivered::default());
    assert!(listing(root.path()).is_empty());
}

#[test]
fn a_run_that_fails_leaves_nothing() {
    let root = tempdir().expect("a temporary folder");
    let mut target = Target::prepare(&spec(&root.path().join("a/b"), Some(&root.path().join("r.npz"))))
        .expect("folders are made as needed");
    assert!(root.path().join("a/b").is_dir());
    write(&mut target, &mut small()).expect("a writable folder");
    drop(target);
    assert!(listing(root.path()).is_empty(), "{:?}", listing(root.path()));
}

#[test]
fn a_failed_write_names_the_final_file_and_leaves_nothing() {
    let root = tempdir().expect("a temporary folder");
    let mut record = small();
    record.statistics.push(record.statistics[0].clone());
    let error = deliver(&spec(&root.path().join("new"), None), &mut record).expect_err("a key used twice");
    assert!(error.to_string().contains("layer_0.mlp.gradients.sum"), "{error}");
    assert!(listing(root.path()).is_empty());

    let target = Target::prepare(&spec(root.path(), None)).expect("a writable folder");
    target.write("metadata.json", b"{}").expect("the first of its name");
    let error = target.write("metadata.json", b"{}").expect_err("a name can be used once").to_string();
    assert!(error.contains(&format!("{NAME}/metadata.json")) && error.contains("found:"), "{error}");
}

#[test]
fn folders_that_others_use_stay() {
    let root = tempdir().expect("a temporary folder");
    let target = Target::prepare(&spec(&root.path().join("a/b"), None)).expect("folders are made as needed");
    fs::write(root.path().join("a/theirs"), "x").expect("a writable folder");
    drop(target);
    assert_eq!(listing(root.path()), ["a"]);
    assert_eq!(listing(&root.path().join("a")), ["theirs"]);
}

/// What `Target::prepare` says about a wrong path; nothing may be left behind.
fn refusal(root: &Path, spec: &OutputSpec) -> String {
    let before = listing(root);
    let error = Target::prepare(spec).expect_err("a path that cannot be used").to_string();
    assert_eq!(listing(root), before);
    for part in ["where:", "expected:", "found:", "hint:"] {
        assert!(error.contains(part), "{part} is missing in {error}");
    }
    error
}

#[test]
fn wrong_paths_are_refused_first() {
    let root = tempdir().expect("a temporary folder");
    let root = root.path();
    fs::write(root.join("file"), "x").expect("a writable folder");
    let with = |output_dir: &str, consolidated: Option<&str>| {
        spec(&root.join(output_dir), consolidated.map(|path| root.join(path)).as_deref())
    };

    assert!(refusal(root, &with("file", None)).contains("not a folder"));
    assert!(refusal(root, &with("file/below", None)).contains("--output_dir"));
    assert!(refusal(root, &with("new/x", Some("missing/r.npz"))).contains("nothing of that name"));
    assert!(refusal(root, &with("new", Some("file/r.npz"))).contains("a file of that name"));
    for folder in [".", "./", "x/..", "x/", "x.npz/"] {
        assert!(refusal(root, &with("", Some(folder))).contains("over a folder"), "{folder}");
    }
    fs::create_dir(root.join("taken.npz")).expect("a writable folder");
    assert!(refusal(root, &with("", Some("taken"))).contains("over a folder"));

    let long = OutputSpec { folder_name: "x".repeat(251), ..with("", None) };
    assert!(refusal(root, &long).contains("251 bytes"));
}

#[cfg(target_os = "linux")]
#[test]
fn folders_that_cannot_be_written_are_refused_first() {
    // /proc takes no files from anyone, root included.
    let root = tempdir().expect("a temporary folder");
    let error = refusal(root.path(), &spec(Path::new("/proc"), None));
    assert!(error.contains("--output_dir"), "{error}");
    let error = refusal(root.path(), &spec(root.path(), Some(Path::new("/proc/r.npz"))));
    assert!(error.contains("--save_consolidated"), "{error}");
}
