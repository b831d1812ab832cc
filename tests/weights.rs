//! Checkpoints: what opens, what is refused and how it is said, and that no bytes make it panic.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use gradlens::model::{Dtype, WeightSpec};
use gradlens::weights::Checkpoint;
use proptest::prelude::*;
use safetensors::Dtype as Stored;
use safetensors::tensor::{TensorView, serialize};

/// A safetensors file of zeros but for the first byte of each tensor, which is its number.
fn file(tensors: &[(&str, Stored, &[usize])]) -> Vec<u8> {
    let data: Vec<Vec<u8>> = tensors
        .iter()
        .enumerate()
        .map(|(i, (_, dtype, shape))| {
            let mut bytes = vec![0; shape.iter().product::<usize>() * dtype.bitsize() / 8];
            bytes.iter_mut().take(1).for_each(|b| *b = i as u8);
            bytes
        })
        .collect();
    let views = tensors.iter().zip(&data).map(|((name, dtype, shape), bytes)| {
        (name.to_string(), TensorView::new(*dtype, shape.to_vec(), bytes).unwrap())
    });
    serialize(views, None).unwrap()
}

/// A safetensors file with this header and this many zero bytes of data.
fn raw(header: &str, data_bytes: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data_bytes, 0);
    bytes
}

fn spec(name: &str, shape: &[usize]) -> WeightSpec {
    WeightSpec { name: name.into(), shape: shape.into(), elsewhere: None }
}

fn from_bytes(bytes: Vec<u8>) -> Result<Checkpoint, String> {
    Checkpoint::from_bytes("embedded", bytes.leak()).map_err(|error| error.to_string())
}

fn open(folder: &Path) -> Result<Checkpoint, String> {
    Checkpoint::open(folder).map_err(|error| error.to_string())
}

fn assert_says(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "{word:?} is not in: {message}");
    }
}

/// A checkpoint of two shards in a new folder.
fn sharded() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| fs::write(folder.path().join(name), bytes).unwrap();
    write("a.safetensors", &file(&[("x.weight", Stored::BF16, &[2, 3]), ("y.weight", Stored::F32, &[4])]));
    write("b.safetensors", &file(&[("z.weight", Stored::F16, &[5])]));
    write(
        "model.safetensors.index.json",
        br#"{"metadata": {"total_size": 38}, "weight_map": {
            "x.weight": "a.safetensors", "y.weight": "a.safetensors", "z.weight": "b.safetensors"}}"#,
    );
    folder
}

#[test]
fn one_file() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = file(&[("a.weight", Stored::F32, &[2, 3]), ("b.weight", Stored::BF16, &[3])]);
    fs::write(folder.path().join("model.safetensors"), &bytes).unwrap();
    for checkpoint in [open(folder.path()).unwrap(), from_bytes(bytes.clone()).unwrap()] {
        assert_eq!(checkpoint.total_bytes(), 24 + 6);
        let specs = [spec("b.weight", &[3]), spec("a.weight", &[2, 3]), spec("b.weight", &[3])];
        let tensors = checkpoint.load(&specs).unwrap();
        assert_eq!(tensors.len(), 3);
        assert_eq!((tensors[0].dtype, &tensors[0].shape[..]), (Dtype::BF16, &[3][..]));
        assert_eq!(tensors[0].bytes(), tensors[2].bytes());
        assert_eq!((tensors[1].dtype, tensors[1].len()), (Dtype::F32, 6));
        assert_eq!((tensors[0].bytes()[0], tensors[1].bytes()[0]), (1, 0));
        // Views outlive the checkpoint.
        drop(checkpoint);
        assert_eq!(tensors[1].bytes().len(), 24);
    }
}

#[test]
fn shards() {
    let folder = sharded();
    let checkpoint = open(folder.path()).unwrap();
    assert_eq!(checkpoint.total_bytes(), 12 + 16 + 10);
    let specs = [spec("z.weight", &[5]), spec("x.weight", &[2, 3]), spec("y.weight", &[4])];
    let dtypes: Vec<Dtype> = checkpoint.load(&specs).unwrap().iter().map(|tensor| tensor.dtype).collect();
    assert_eq!(dtypes, [Dtype::F16, Dtype::BF16, Dtype::F32]);
    assert!(checkpoint.unused(&specs).is_empty());
    assert!(format!("{checkpoint:?}").contains("2 files, 3 tensors"));
}

/// The hub's cache: a snapshot's files are links to blobs elsewhere.
#[cfg(unix)]
#[test]
fn hub_snapshot_of_links() {
    let shards = sharded();
    let cache = tempfile::tempdir().unwrap();
    let (blobs, snapshot) = (cache.path().join("blobs"), cache.path().join("snapshots/0123"));
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    for (i, name) in
        ["a.safetensors", "b.safetensors", "model.safetensors.index.json"].into_iter().enumerate()
    {
        fs::copy(shards.path().join(name), blobs.join(i.to_string())).unwrap();
        std::os::unix::fs::symlink(format!("../../blobs/{i}"), snapshot.join(name)).unwrap();
    }
    assert_eq!(open(&snapshot).unwrap().total_bytes(), 38);
    // A blob that has not arrived.
    fs::remove_file(blobs.join("1")).unwrap();
    assert_says(&open(&snapshot).unwrap_err(), &["b.safetensors", "No such file", "incomplete"]);
}

#[test]
fn all_misfits_in_one_message() {
    let checkpoint = from_bytes(file(&[
        ("good", Stored::F32, &[2]),
        ("shape", Stored::F16, &[2, 3]),
        ("dtype", Stored::I64, &[4]),
    ]))
    .unwrap();
    let mut specs =
        vec![spec("good", &[2]), spec("shape", &[3, 2]), spec("dtype", &[4]), spec("missing", &[7])];
    let message = checkpoint.load(&specs).unwrap_err().to_string();
    assert_says(
        &message,
        &[
            "3 of 4 tensors",
            "embedded",
            "shape: expected [3, 2], found [2, 3] in float16",
            "dtype: expected [4], found [4] in I64, which is not supported",
            "missing: expected [7], found nothing",
        ],
    );
    assert!(!message.contains("good"));
    specs.extend((0..30).map(|i| spec(&format!("m{i}"), &[1])));
    let message = checkpoint.load(&specs).unwrap_err().to_string();
    assert_says(&message, &["33 of 34", "m6:", "and 23 more"]);
    assert!(!message.contains("m7:"));
}

#[test]
fn other_prefix_is_recognised() {
    for there in ["layers.0.mlp.up_proj.weight", "base.model.layers.0.mlp.up_proj.weight"] {
        let checkpoint =
            from_bytes(file(&[(there, Stored::F32, &[1]), ("weight", Stored::F32, &[1])])).unwrap();
        let message =
            checkpoint.load(&[spec("model.layers.0.mlp.up_proj.weight", &[1])]).unwrap_err().to_string();
        assert_says(&message, &[there, "another prefix"]);
    }
}

#[test]
fn leftovers() {
    let checkpoint = from_bytes(file(&[
        ("model.embed_tokens.weight", Stored::F32, &[1]),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", Stored::F32, &[1]),
        ("lm_head.weight", Stored::F32, &[1]),
        ("model.layers.0.self_attn.q_proj.bias", Stored::I64, &[1]),
    ]))
    .unwrap();
    let specs = [spec("model.embed_tokens.weight", &[1])];
    assert_eq!(checkpoint.load(&specs).unwrap().len(), 1);
    assert_eq!(checkpoint.unused(&specs), ["model.layers.0.self_attn.q_proj.bias"]);
}

#[test]
fn folders_without_safetensors() {
    let folder = tempfile::tempdir().unwrap();
    let expect = |words: &[&str]| assert_says(&open(folder.path()).unwrap_err(), words);
    expect(&["neither", "model.safetensors.index.json", "hint:"]);
    for (name, hint) in [
        ("model.gguf", "quantised"),
        ("pytorch_model.bin", "save_pretrained(folder)"),
        ("adapter_model.safetensors", "merge"),
        ("model-00001-of-00002.safetensors", "index.json too"),
    ] {
        fs::write(folder.path().join(name), b"x").unwrap();
        expect(&[name, hint]);
    }
    assert_says(&open(&folder.path().join("no")).unwrap_err(), &["no such model folder", "nothing"]);
    assert_says(&open(&folder.path().join("model.gguf")).unwrap_err(), &["no such model folder", "a file"]);
    fs::write(folder.path().join("model.safetensors"), b"").unwrap();
    expect(&["model.safetensors", "no header", "0 bytes"]);
    fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    fs::create_dir(folder.path().join("model.safetensors")).unwrap();
    expect(&["model.safetensors", "something else"]);
}

#[test]
fn damaged_indices() {
    let folder = sharded();
    let index = folder.path().join("model.safetensors.index.json");
    let with = |text: &str| {
        fs::write(&index, text).unwrap();
        let message = open(folder.path()).unwrap_err();
        assert_says(&message, &["where:"]);
        message
    };
    assert_says(&with("{"), &["index", "index.json", "JSON with a weight_map"]);
    assert_says(&with("[]"), &["weight_map"]);
    assert_says(&with("{}"), &["weight_map"]);
    assert_says(&with(r#"{"weight_map": {"x": 3}}"#), &["weight_map"]);
    assert_says(&with(r#"{"weight_map": {}}"#), &["lists no tensor"]);
    assert_says(
        &with(r#"{"weight_map": {"x.weight": "c.safetensors"}}"#),
        &["c.safetensors", "No such file"],
    );
    assert_says(
        &with(r#"{"weight_map": {"z.weight": "a.safetensors"}}"#),
        &["a.safetensors", "tensor `z.weight`", "no tensor of this name"],
    );
    for outside in ["../a.safetensors", "/etc/passwd", "s/a.safetensors", "./a.safetensors", "a/", "..", ""] {
        let message = with(&format!(r#"{{"weight_map": {{"x.weight": "{outside}"}}}}"#));
        assert_says(&message, &["outside its folder", "`x.weight`", outside]);
    }
}

#[test]
fn damaged_files() {
    let good = file(&[("first", Stored::F32, &[4]), ("second", Stored::F16, &[4])]);
    let says = |bytes: Vec<u8>, words: &[&str]| {
        let message = from_bytes(bytes).unwrap_err();
        assert_says(&message, words);
        assert_says(&message, &["where:    embedded", "hint:"]);
    };
    for cut in 0..good.len() {
        assert!(from_bytes(good[..cut].to_vec()).is_err(), "cut to {cut} bytes");
    }
    says(vec![], &["no header", "0 bytes"]);
    says(good[..20].to_vec(), &["ends inside its header", "20 bytes"]);
    says(good[..good.len() - 1].to_vec(), &["ends inside tensor `second`"]);
    says(good[..good.len() - 9].to_vec(), &["ends inside tensor `first`"]);
    says([&good[..], &[0]].concat(), &["bytes after its last tensor"]);
    says(b"<!DOCTYPE html><html></html>".to_vec(), &["header is impossible"]);
    says(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n".to_vec(), &["git lfs pull"]);
    says(u64::MAX.to_le_bytes().to_vec(), &["header is impossible"]);
    says(raw("{", 0), &["header cannot be read", "EOF"]);
    says(raw("[]", 0), &["header cannot be read"]);
    says(raw("{} x", 0), &["header cannot be read"]);
    says(raw("\u{0}", 0), &["header cannot be read"]);
    says(raw(r#"{"t": 3}"#, 0), &["tensor `t`"]);
    says(raw(r#"{"t": {"dtype": "F33", "shape": [], "data_offsets": [0, 4]}}"#, 4), &["tensor `t`", "F33"]);
    says(raw(r#"{"t": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}"#, 4), &["tensor `t`"]);

    let two = |shape: &str, first: &str, second: &str, data_bytes| {
        let header = format!(
            r#"{{"__metadata__": {{"format": "pt"}}, "t": {{"dtype": "F16", "shape": {shape}, "data_offsets": {first}}},
            "u": {{"dtype": "F32", "shape": [1], "data_offsets": {second}}}}}"#
        );
        raw(&header, data_bytes)
    };
    assert_eq!(from_bytes(two("[2]", "[4, 8]", "[0, 4]", 8)).unwrap().total_bytes(), 8);
    says(two("[2]", "[0, 4]", "[0, 4]", 4), &["wrong place", "from 4 on"]);
    says(two("[2]", "[0, 4]", "[2, 6]", 6), &["tensor `u`", "wrong place"]);
    says(two("[2]", "[0, 4]", "[5, 9]", 9), &["tensor `u`", "wrong place"]);
    says(two("[2]", "[1, 5]", "[5, 9]", 9), &["tensor `t`", "wrong place"]);
    says(two("[2]", "[4, 0]", "[0, 4]", 0), &["tensor `u`"]);
    says(two("[3]", "[0, 4]", "[4, 8]", 8), &["tensor `t`", "number of bytes", "[3] in F16"]);
    let most = "18446744073709551615";
    says(two(&format!("[{most}, {most}]"), "[0, 4]", "[4, 8]", 8), &["tensor `t`", "number of bytes"]);
    says(two("[2]", "[0, 4]", &format!("[4, {most}]"), 8), &["ends inside tensor `u`"]);
    says(two("[2]", &format!("[{most}, {most}]"), "[0, 4]", 4), &["ends inside tensor `t`"]);
    let twice = r#"{"t": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
                    "t": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}"#;
    says(raw(twice, 2), &["tensor `t` is there twice"]);
    let deep = "[".repeat(100_000);
    says(raw(&format!("{{\"__metadata__\": {deep}"), 0), &["header cannot be read"]);
    says(raw(&format!("{{\"t\": {deep}"), 0), &["header cannot be read"]);
}

/// Reads everything the file says it holds, whatever that is.
fn read_all(checkpoint: &Checkpoint) -> usize {
    let names: Vec<WeightSpec> = checkpoint.unused(&[]).iter().map(|name| spec(name, &[2, 3])).collect();
    match checkpoint.load(&names) {
        Ok(tensors) => {
            tensors.iter().map(|t| t.bytes().iter().map(|&byte| usize::from(byte)).sum::<usize>()).sum()
        }
        Err(error) => error.to_string().len(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1000) })]

    #[test]
    fn random_bytes_do_not_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        header in r#"[\[\]{}:,"a-c0-9]{0,80}"#,
        data_bytes in 0usize..16,
    ) {
        let _ = from_bytes(bytes).map(|checkpoint| read_all(&checkpoint));
        let _ = from_bytes(raw(&header, data_bytes)).map(|checkpoint| read_all(&checkpoint));
    }

    #[test]
    fn mutated_files_do_not_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        digits in prop::collection::vec((any::<prop::sample::Index>(), 0u8..10), 0..4),
        cut in any::<prop::sample::Index>(),
        keep in any::<bool>(),
    ) {
        let mut bytes = file(&[("aa.b", Stored::F32, &[2, 3]), ("b", Stored::BF16, &[7]), ("c", Stored::I8, &[1])]);
        for (index, byte) in changes {
            let at = index.index(bytes.len());
            bytes[at] = byte;
        }
        // Numbers exchanged for numbers get past the JSON parser.
        let places: Vec<usize> = (0..bytes.len()).filter(|&i| bytes[i].is_ascii_digit()).collect();
        for (index, digit) in digits {
            if !places.is_empty() {
                bytes[places[index.index(places.len())]] = b'0' + digit;
            }
        }
        if !keep {
            bytes.truncate(cut.index(bytes.len()));
        }
        let _ = from_bytes(bytes).map(|checkpoint| read_all(&checkpoint));
    }
}

proptest! {
    // Fewer, because each one writes a folder.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(50) })]

    #[test]
    fn random_indices_do_not_panic(
        text in r#"[\[\]{}:,"a-c0-9]{0,80}"#,
        names in prop::collection::vec((".{0,6}", "[./a-c]{0,6}|a\\.safetensors"), 0..4),
    ) {
        let folder = sharded();
        let index = folder.path().join("model.safetensors.index.json");
        fs::write(&index, text).unwrap();
        prop_assert!(open(folder.path()).is_err());
        let map: serde_json::Map<String, serde_json::Value> =
            names.into_iter().map(|(tensor, file)| (tensor, file.into())).collect();
        fs::write(&index, serde_json::json!({ "weight_map": map }).to_string()).unwrap();
        let _ = open(folder.path()).map(|checkpoint| read_all(&checkpoint));
    }
}
