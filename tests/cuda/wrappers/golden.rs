//! What a GPU gave, one file a wrapper: `<name>.bin.gz`, a line of JSON that says where it comes from, then the
//! words, little-endian. `zcat <name>.bin.gz | head -1` shows the line.

use std::env;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;

use super::super::machine::Machine;
use crate::golden::repository;

const RECORD: &str = "GRADLENS_TEST_RECORD";

/// Where a golden comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Origin {
    name: String,
    card: String,
    compute_capability: (i32, i32),
    /// Year, month, day (UTC).
    date: String,
    words: usize,
}

#[derive(Debug, PartialEq)]
pub struct Golden {
    origin: Origin,
    pub words: Vec<u32>,
}

impl Golden {
    /// Which card, when.
    pub fn origin(&self) -> String {
        format!("{} ({})", self.origin.card, self.origin.date)
    }

    fn read_from(path: &Path) -> Option<Self> {
        let mut bytes = Vec::new();
        GzDecoder::new(File::open(path).ok()?).read_to_end(&mut bytes).unwrap();
        let line = bytes.iter().position(|byte| *byte == b'\n').unwrap();
        let origin: Origin = serde_json::from_slice(&bytes[..line]).unwrap();
        let words = bytes[line + 1..].chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap()));
        let golden = Self { words: words.collect(), origin };
        assert_eq!(golden.words.len(), golden.origin.words, "{}: is cut", path.display());
        Some(golden)
    }

    fn write_to(&self, path: &Path) {
        let mut file = GzEncoder::new(File::create(path).unwrap(), Compression::best());
        writeln!(file, "{}", serde_json::to_string(&self.origin).unwrap()).unwrap();
        let bytes: Vec<u8> = self.words.iter().flat_map(|word| word.to_le_bytes()).collect();
        file.write_all(&bytes).unwrap();
        file.finish().unwrap();
    }
}

fn path(name: &str) -> PathBuf {
    repository().join("tests/cuda/wrappers").join(format!("{name}.bin.gz"))
}

/// The golden of a wrapper. `None`: none was recorded yet.
pub fn read(name: &str) -> Option<Golden> {
    Golden::read_from(&path(name))
}

/// Keeps what a GPU gave, where the environment asks for it ([`RECORD`]).
pub fn record_if_asked(machine: &Machine, name: &str, words: &[u32]) {
    if env::var_os(RECORD).is_none() {
        return;
    }
    assert!(
        !machine.emulated(),
        "{RECORD} keeps what hardware gives: GRADLENS_TEST_GPU=1 on a machine with a GPU"
    );
    let info = &machine.cuda.device.info;
    let origin = Origin {
        name: name.to_owned(),
        card: info.name.clone(),
        compute_capability: info.compute_capability,
        date: OffsetDateTime::now_utc().date().to_string(),
        words: words.len(),
    };
    let path = path(name);
    Golden { origin, words: words.to_vec() }.write_to(&path);
    println!("recorded {}", path.display());
}

#[test]
fn what_is_kept_is_what_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.bin.gz");
    assert_eq!(Golden::read_from(&path), None);
    let words: Vec<u32> = (0..1000_u32).map(|i| i.wrapping_mul(0x0a0b_0c0d)).collect();
    let origin = Origin {
        name: "a".to_owned(),
        card: "NVIDIA of the test".to_owned(),
        compute_capability: (9, 0),
        date: "2026-01-31".to_owned(),
        words: words.len(),
    };
    let golden = Golden { origin, words };
    golden.write_to(&path);
    assert_eq!(Golden::read_from(&path).unwrap(), golden);
    assert_eq!(golden.origin(), "NVIDIA of the test (2026-01-31)");
    fs::remove_file(&path).unwrap();
    assert_eq!(Golden::read_from(&path), None);
}
