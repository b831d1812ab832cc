//! Files that are cut, changed or not what they claim: an error that says so, whatever the format.

use std::path::{Path, PathBuf};

use serde_json::json;
use tempfile::TempDir;

use crate::raw::{Raw, above, check, read, says, vector};
use crate::write::{
    Array, Kind, npy, npz, npz_members, pickle, put, put_json, safetensors, tensors, torch, torch_archive,
    torch_members, zip, zip_of,
};

/// Kinds of containers.
pub const CONTAINERS: usize = 6;

/// A folder of the given kind of container, and its file of weights.
pub fn folder(raw: &Raw, container: usize) -> (TempDir, PathBuf) {
    let entries = [
        ("W_enc", raw.encoder(false)),
        ("b_enc", vector(&raw.encoder_bias)),
        ("W_dec", raw.decoder(true)),
        ("b_dec", vector(&raw.decoder_bias)),
        ("threshold", vector(&raw.threshold)),
    ];
    let (pickle, storages) = pickle(&tensors(&entries));
    let (name, bytes) = match container {
        0 => ("ae.pt", torch_archive(pickle, storages)),
        1 => ("ae.pt", zip_of(&torch_members(pickle, storages), true)),
        2 => ("params.npz", npz(&entries, false)),
        3 => ("params.npz", npz(&entries, true)),
        4 => ("params.npz", zip_of(&npz_members(&entries, true), true)),
        _ => ("sae_weights.safetensors", safetensors(&entries)),
    };
    let root = tempfile::tempdir().unwrap();
    put(root.path(), name, bytes);
    if container == CONTAINERS - 1 {
        put_json(
            root.path(),
            "cfg.json",
            &json!({"architecture": "jumprelu", "apply_b_dec_to_input": false}),
        );
    }
    let file = root.path().join(name);
    (root, file)
}

/// Containers do not change what is in them.
#[test]
fn every_container_is_read() {
    let raw = Raw::new(7);
    for container in 0..CONTAINERS {
        let (root, _) = folder(&raw, container);
        check(&read(root.path()).unwrap(), |x| {
            let f = above(&raw.hidden(x), &raw.threshold);
            (f.clone(), raw.decode(&f))
        });
    }
}

#[test]
fn vectors_must_be_finite_and_fit() {
    for (name, change, parts) in [
        ("b_enc", vector(&[f64::NAN; 20]), &["`b_enc`", "finite numbers", "NaN at index 0"][..]),
        ("b_dec", vector(&[f64::INFINITY; 6]), &["`b_dec`", "inf at index 0"]),
        ("b_enc", vector(&[0.0; 19]), &["`b_enc`", "[20]", "[19]"]),
        ("b_dec", vector(&[0.0; 20]), &["`b_dec`", "[6]", "[20]"]),
        ("b_enc", Array::new(&[20, 1], &[0.0; 20]), &["`b_enc`", "[20]", "[20, 1]"]),
        ("W_enc", Array::new(&[120], &[0.0; 120]), &["`W_enc`", "a matrix", "[120]"]),
        ("W_enc", Array::new(&[0, 20], &[]), &["`W_dec`", "[20, 0]"]),
        (
            "W_dec",
            Array::new(&[20, 5], &[0.0; 100]),
            &["`W_dec`", "[20, 6], as `W_enc` says", "[20, 5]", "transcoder"],
        ),
        ("W_enc", Array::new(&[6, 20], &[1.0; 120]).kind(Kind::I32), &["`W_enc`", "floats [D, F]", "int32"]),
    ] {
        let raw = Raw::new(1);
        let mut entries = [
            ("W_enc", raw.encoder(false)),
            ("b_enc", vector(&raw.encoder_bias)),
            ("W_dec", raw.decoder(true)),
            ("b_dec", vector(&raw.decoder_bias)),
            ("threshold", vector(&raw.threshold)),
        ];
        entries.iter_mut().filter(|(other, _)| *other == name).for_each(|entry| entry.1 = change.clone());
        let root = tempfile::tempdir().unwrap();
        put_json(root.path(), "a/cfg.json", &json!({"architecture": "jumprelu"}));
        put(root.path(), "a/sae_weights.safetensors", safetensors(&entries));
        put(root.path(), "b/ae.pt", torch(&tensors(&entries)));
        put(root.path(), "c/params.npz", npz(&entries, true));
        for folder in ["a", "b", "c"] {
            says(read(&root.path().join(folder)), parts);
        }
    }
}

#[test]
fn files_that_are_cut() {
    for (root, file) in (0..CONTAINERS).map(|container| folder(&Raw::new(2), container)) {
        let whole = std::fs::read(&file).unwrap();
        assert!(read(root.path()).is_ok(), "{}", file.display());
        for keep in [0, 1, 4, 30, whole.len() / 2, whole.len() - 30, whole.len() - 1] {
            std::fs::write(&file, &whole[..keep]).unwrap();
            says(read(root.path()), &["hint: "]);
        }
        std::fs::write(&file, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
            .unwrap();
        says(read(root.path()), &["Git LFS pointer", "hint: run `git lfs pull`"]);
        std::fs::write(&file, "<html>404</html>").unwrap();
        says(read(root.path()), &["hint: "]);
        std::fs::remove_file(&file).unwrap();
        std::fs::create_dir(&file).unwrap();
        says(read(&file.parent().unwrap().join(file.file_name().unwrap())), &[]);
    }
}

#[test]
fn configurations_that_are_none() {
    let (root, _) = folder(&Raw::new(3), CONTAINERS - 1);
    for text in ["", "[]", "{", "{\"k\": 1,}", "null", "{\"architecture\": 7}", &"[".repeat(100_000)] {
        put(root.path(), "cfg.json", text);
        says(read(root.path()), &["cfg.json", "expected"]);
    }
    put(root.path(), "cfg.json", "version https://git-lfs.github.com/spec/v1\n");
    says(read(root.path()), &["Git LFS pointer"]);
    std::fs::remove_file(root.path().join("cfg.json")).unwrap();
    std::fs::create_dir(root.path().join("cfg.json")).unwrap();
    says(read(root.path()), &["cfg.json"]);
}

fn archive(root: &Path, members: &[(&str, Vec<u8>, bool)]) {
    let members: Vec<_> =
        members.iter().map(|(name, bytes, pack)| ((*name).to_owned(), bytes.clone(), *pack)).collect();
    put(root, "params.npz", zip(&members));
}

#[test]
fn arrays_with_impossible_headers() {
    let root = tempfile::tempdir().unwrap();
    let header = |text: &str| {
        let mut out = b"\x93NUMPY\x01\x00".to_vec();
        out.extend((text.len() as u16).to_le_bytes());
        out.extend(text.bytes());
        out
    };
    let good = "{'descr': '<f4', 'fortran_order': False, 'shape': (6, 20), }\n";
    for (bytes, part) in [
        (vec![], "does not begin like one"),
        (b"\x93NUMPY\x09\x00\x00\x00".to_vec(), "version"),
        (b"\x93NUMPY\x01\x00\xff\xff{}".to_vec(), "ends inside its header"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}".to_vec(), "ends inside its header"),
        (header("{}"), "no descr"),
        (header(&good.replace("<f4", ">f4")), "`>f4`, which is not read"),
        (header(&good.replace("<f4", "|O")), "`|O`, which is not read"),
        (header(&good.replace("False", "0")), "order"),
        (header(&good.replace("(6, 20)", "6")), "no shape"),
        (header(&good.replace("20)", "-20)")), "shape"),
        (header(good), "[6, 20] in float32"),
        (header(&good.replace("6, 20", "4294967296, 4294967296, 4294967296")), "float32"),
    ] {
        for deflate in [false, true] {
            archive(root.path(), &[("W_enc.npy", bytes.clone(), deflate)]);
            says(read(root.path()), &["`W_enc`", "is damaged", part, "hint: "]);
        }
    }
    // Newer versions of the header, and another way to write it.
    let raw = Raw::new(4);
    let array = npy(&raw.encoder(false));
    let text = "{\"fortran_order\":False,\"descr\":\"<f4\",\"shape\":(6,20)}\n";
    let mut other = b"\x93NUMPY\x03\x00".to_vec();
    other.extend((text.len() as u32).to_le_bytes());
    other.extend(text.bytes());
    other.extend(&array[128..]);
    archive(root.path(), &[("W_enc.npy", other, true)]);
    says(read(root.path()), &["lacks a tensor", "`W_dec`", "`W_enc`"]);
}

/// Members that unpack to something else than the directory says, or are packed in ways that are not read.
#[test]
fn archives_that_lie() {
    let raw = Raw::new(5);
    let (root, file) = folder(&raw, 3);
    let whole = std::fs::read(&file).unwrap();
    let name = |bytes: &[u8], from: usize| {
        from + bytes[from..].windows(4).position(|window| window == b"PK\x01\x02").unwrap()
    };
    let entry = name(&whole, 0);
    for (at, value, part) in [
        (10, 12, "compressed with"),
        (8, 1, "encrypted"),
        (16, whole[entry + 16] ^ 1, "checksum"),
        (42, 7, "zip archive of weights cannot be read"),
        (23, 0x7f, "outside the file"),
    ] {
        let mut bytes = whole.clone();
        bytes[entry + at] = value;
        std::fs::write(&file, bytes).unwrap();
        says(read(root.path()), &["zip archive of weights cannot be read", part, "hint: "]);
    }
    // A stream that is no deflate.
    let mut bytes = whole.clone();
    let start = 30 + "W_enc.npy".len();
    bytes[start..start + 40].fill(0xff);
    std::fs::write(&file, bytes).unwrap();
    says(read(root.path()), &["W_enc"]);
}

/// 20 GiB of zeros in some kilobytes: nothing of it is unpacked.
#[test]
fn zip_bombs_stay_packed() {
    let root = tempfile::tempdir().unwrap();
    let mut start = b"\x93NUMPY\x01\x00\x76\x00".to_vec();
    let shape = "{'descr': '<f4', 'fortran_order': False, 'shape': (5120, 1048576), }";
    start.extend(format!("{shape:<117}\n").bytes());
    start.resize(1 << 20, 0);
    let size: u64 = 128 + 4 * 5120 * (1 << 20);
    let mut bytes = zip(&["W_enc.npy", "W_dec.npy"].map(|name| (name.to_owned(), start.clone(), true)));
    // zip64 is needed for such a size: without, the directory holds its lower half, which is wrong.
    let size = (size as u32).to_le_bytes();
    let places: Vec<usize> =
        (0..bytes.len() - 4).filter(|at| &bytes[*at..at + 4] == b"PK\x01\x02").map(|at| at + 24).collect();
    places.iter().for_each(|at| bytes[*at..at + 4].copy_from_slice(&size));
    put(root.path(), "params.npz", &bytes);
    says(read(root.path()), &["`W_enc`", "is damaged", "[5120, 1048576] in float32"]);

    // A size that does fit, 2 GiB.
    let text = shape.replace("5120", "512");
    start.splice(10..128, format!("{text:<117}\n").bytes());
    let mut bytes = zip(&["W_enc.npy", "W_dec.npy"].map(|name| {
        let array = if name == "W_dec.npy" {
            let text = text.replace("(512, 1048576)", "(1048576, 512)");
            [&start[..10], format!("{text:<117}\n").as_bytes(), &start[128..]].concat()
        } else {
            start.clone()
        };
        (name.to_owned(), array, true)
    }));
    let size = (128u32 + 4 * 512 * (1 << 20)).to_le_bytes();
    let places: Vec<usize> =
        (0..bytes.len() - 4).filter(|at| &bytes[*at..at + 4] == b"PK\x01\x02").map(|at| at + 24).collect();
    places.iter().for_each(|at| bytes[*at..at + 4].copy_from_slice(&size));
    put(root.path(), "params.npz", &bytes);
    says(
        read(root.path()),
        &["zip archive of weights cannot be read", "2.0 GiB packed into", "do not pack like this"],
    );
}

/// A member of PyTorch's that is packed: its bytes could not be a view.
#[test]
fn foreign_archives() {
    let root = tempfile::tempdir().unwrap();
    let raw = Raw::new(6);
    let (pickle, storages) = pickle(&tensors(&[("encoder.weight", raw.encoder(true))]));
    let member = |name: &str, bytes: &[u8], deflate: bool| (name.to_owned(), bytes.to_vec(), deflate);
    let cases = [
        (
            vec![member("ae/data.pkl", &pickle, false), member("ae/data/0", &storages[0], true)],
            "is compressed",
        ),
        (vec![member("a.txt", b"", false)], "no data.pkl"),
        (vec![member("a/data.pkl", b"", false), member("b/data.pkl", b"", false)], "several"),
        (vec![member("a/data.pkl", &pickle, false), member("a/constants.pkl", b"", false)], "TorchScript"),
        (vec![member("a/data.pkl", &pickle, false), member("a/byteorder", b"big", false)], "big-endian"),
    ];
    for (members, part) in cases {
        put(root.path(), "ae.pt", zip(&members));
        says(read(root.path()), &[part]);
    }
    // Before version 1.6 of PyTorch.
    put(root.path(), "ae.pt", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.");
    says(read(root.path()), &["of an old kind", "hint: save it again in Python"]);
}
