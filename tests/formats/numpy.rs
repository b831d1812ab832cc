//! NumPy reads what we write. Runs where `GRADLENS_PYTHON` names a Python that has NumPy.

use crate::record::{record, spec};
use gradlens::output::{Log, Target, write};
use gradlens::transform::{AggregationMode, NormaliseMode};
use std::process::Command;
use tempfile::tempdir;

#[test]
fn numpy_rereads_everything() {
    let Some(python) = std::env::var_os("GRADLENS_PYTHON") else {
        eprintln!("skipped: set GRADLENS_PYTHON to a Python with NumPy to have the files re-read");
        return;
    };
    let root = tempdir().expect("a temporary folder");
    let archive = root.path().join("elsewhere.npz");
    for (mode, normalise, power, consolidated) in [
        (AggregationMode::MeanAbs, NormaliseMode::SumAbs, None, None),
        (AggregationMode::Both, NormaliseMode::All, Some(2.0), Some(archive.as_path())),
    ] {
        let mut target = Target::prepare(&spec(root.path(), consolidated)).expect("a writable folder");
        write(&mut target, &mut record(mode, normalise, power)).expect("a writable folder");
        let delivered = target.finish(&Log::silent()).expect("a writable folder");
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/numpy/reread.py");
        let output = Command::new(&python)
            .args(["-W", "error", script])
            .arg(delivered.folder.expect("a folder was asked for"))
            .arg(delivered.consolidated.expect("there is always an archive"))
            .output()
            .expect("GRADLENS_PYTHON can be run");
        let said =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        eprint!("{said}");
    }
}
