//! Readers and editors of the files that runs take and make, independent of the program's own.

use std::collections::BTreeMap;
use std::fs;
use std::io::Cursor;
use std::path::Path;

use ndarray::{Array0, Array1};
use ndarray_npy::NpzReader;
use serde_json::Value;

/// An `.npy` of version 1.0: its header and the bytes after it.
pub fn npy(path: &Path) -> (String, Vec<u8>) {
    let bytes = fs::read(path).unwrap();
    assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00", "{}", path.display());
    let length = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    let header = String::from_utf8(bytes[10..10 + length].to_vec()).unwrap();
    (header.trim().to_owned(), bytes[10 + length..].to_vec())
}

/// The values of a float32 `.npy` of one dimension of length `d`.
pub fn npy_f32(path: &Path, d: usize) -> Vec<f32> {
    let (header, data) = npy(path);
    assert_eq!(header, format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({d},), }}"));
    assert_eq!(data.len(), 4 * d);
    data.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

/// An `.npz`.
pub struct Npz(NpzReader<Cursor<Vec<u8>>>);

impl Npz {
    pub fn open(path: &Path) -> Self {
        Self(NpzReader::new(Cursor::new(fs::read(path).unwrap())).unwrap())
    }

    /// Sorted.
    pub fn keys(&mut self) -> Vec<String> {
        let mut keys = self.0.names().unwrap();
        keys.sort();
        keys
    }

    pub fn f32(&mut self, key: &str) -> Vec<f32> {
        self.0.by_name::<ndarray::OwnedRepr<f32>, ndarray::Ix1>(key).unwrap().to_vec()
    }

    pub fn f64(&mut self, key: &str) -> Vec<f64> {
        let array: Array1<f64> = self.0.by_name(key).unwrap();
        array.to_vec()
    }

    pub fn count(&mut self, key: &str) -> i64 {
        let array: Array0<i64> = self.0.by_name(key).unwrap();
        array.into_scalar()
    }
}

pub fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The keys of a JSON object, in the file's order.
pub fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

/// The names in a folder, sorted.
pub fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Name → bytes of the results that may depend on nothing but the model, the texts and what is asked.
pub fn numbers(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    names(folder)
        .into_iter()
        .filter(|name| name.ends_with(".npy") || name == "statistics.npz")
        .map(|name| (name.clone(), fs::read(folder.join(&name)).unwrap()))
        .collect()
}

/// Rewrites the header of a safetensors file.
pub fn edit_header(path: &Path, edit: impl FnOnce(&mut Value)) {
    let bytes = fs::read(path).unwrap();
    let data = start_of_data(&bytes);
    let mut header: Value = serde_json::from_slice(&bytes[8..data]).unwrap();
    edit(&mut header);
    let header = serde_json::to_vec(&header).unwrap();
    let length = (header.len() as u64).to_le_bytes();
    fs::write(path, [&length[..], &header, &bytes[data..]].concat()).unwrap();
}

fn start_of_data(bytes: &[u8]) -> usize {
    8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize
}

/// Puts `value` at `index` of a float32, float16 or bfloat16 tensor.
pub fn set_element(path: &Path, tensor: &str, index: usize, value: f32) {
    let mut bytes = fs::read(path).unwrap();
    let data = start_of_data(&bytes);
    let header: Value = serde_json::from_slice(&bytes[8..data]).unwrap();
    let start = data + header[tensor]["data_offsets"][0].as_u64().unwrap() as usize;
    let element = match header[tensor]["dtype"].as_str().unwrap() {
        "F32" => value.to_le_bytes().to_vec(),
        "F16" => half::f16::from_f32(value).to_le_bytes().to_vec(),
        "BF16" => half::bf16::from_f32(value).to_le_bytes().to_vec(),
        other => panic!("{other}"),
    };
    let start = start + index * element.len();
    bytes[start..start + element.len()].copy_from_slice(&element);
    fs::write(path, bytes).unwrap();
}
