//! Small writers of the containers, independent of the readers: zip archives, what `torch.save` writes, `.npz`,
//! safetensors.

use std::io::Write as _;
use std::path::Path;

use flate2::write::DeflateEncoder;
use flate2::{Compression, Crc};
use half::{bf16, f16};

/// Element types of the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    F64,
    F32,
    F16,
    BF16,
    I64,
    I32,
}

impl Kind {
    /// As PyTorch, safetensors and NumPy call it.
    fn names(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::F64 => ("Double", "F64", "<f8"),
            Self::F32 => ("Float", "F32", "<f4"),
            Self::F16 => ("Half", "F16", "<f2"),
            Self::BF16 => ("BFloat16", "BF16", "|V2"),
            Self::I64 => ("Long", "I64", "<i8"),
            Self::I32 => ("Int", "I32", "<i4"),
        }
    }

    fn bytes(self, value: f64) -> Vec<u8> {
        match self {
            Self::F64 => value.to_le_bytes().to_vec(),
            Self::F32 => (value as f32).to_le_bytes().to_vec(),
            Self::F16 => f16::from_f64(value).to_le_bytes().to_vec(),
            Self::BF16 => bf16::from_f64(value).to_le_bytes().to_vec(),
            Self::I64 => (value as i64).to_le_bytes().to_vec(),
            Self::I32 => (value as i32).to_le_bytes().to_vec(),
        }
    }
}

/// A tensor to write.
#[derive(Clone, Debug)]
pub struct Array {
    pub kind: Kind,
    pub shape: Vec<usize>,
    /// Row-major where not given.
    pub strides: Option<Vec<usize>>,
    pub offset: usize,
    /// Elements of the storage in its order.
    pub storage: Vec<f64>,
}

impl Array {
    /// Row-major float32s.
    pub fn new(shape: &[usize], values: &[f64]) -> Self {
        assert_eq!(shape.iter().product::<usize>(), values.len());
        Self { kind: Kind::F32, shape: shape.to_vec(), strides: None, offset: 0, storage: values.to_vec() }
    }

    pub fn kind(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }

    /// The same matrix with its columns one after the other, as `x.T.clone().T` or `np.asfortranarray` have it.
    pub fn columns(mut self) -> Self {
        let (rows, columns) = (self.shape[0], self.shape[1]);
        let at = |i: usize| self.storage[i % rows * columns + i / rows];
        self.storage = (0..rows * columns).map(at).collect();
        self.strides = Some(vec![1, rows]);
        self
    }

    /// The same matrix as every second element of a storage that begins three elements later.
    pub fn spread(mut self) -> Self {
        let columns = self.shape[1];
        self.storage =
            std::iter::repeat_n(9e9, 3).chain(self.storage.iter().flat_map(|value| [*value, -9e9])).collect();
        self.offset = 3;
        self.strides = Some(vec![2 * columns, 2]);
        self
    }

    fn strides(&self) -> Vec<usize> {
        let products = |at: usize| self.shape[at + 1..].iter().product();
        self.strides.clone().unwrap_or_else(|| (0..self.shape.len()).map(products).collect())
    }

    fn data(&self) -> Vec<u8> {
        self.storage.iter().flat_map(|value| self.kind.bytes(*value)).collect()
    }
}

/// A zip archive of (name, bytes, whether to deflate).
pub fn zip(members: &[(String, Vec<u8>, bool)]) -> Vec<u8> {
    zip_of(members, false)
}

/// The same with the fields of 64 bits that archives of more than 4 GiB have, where `large`.
pub fn zip_of(members: &[(String, Vec<u8>, bool)], large: bool) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, bytes, deflate) in members {
        let mut crc = Crc::new();
        crc.update(bytes);
        let packed = match deflate {
            true => {
                let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
                encoder.write_all(bytes).unwrap();
                encoder.finish().unwrap()
            }
            false => bytes.clone(),
        };
        let start = out.len();
        let short = |number: usize| if large { u32::MAX } else { number as u32 };
        let mut common = vec![45, 0, 0, 0, if *deflate { 8 } else { 0 }, 0, 0, 0, 0x21, 0];
        for number in [crc.sum(), short(packed.len()), short(bytes.len())] {
            common.extend(number.to_le_bytes());
        }
        common.extend((name.len() as u16).to_le_bytes());
        let long = |numbers: &[usize]| -> Vec<u8> {
            let mut field = vec![1, 0, 8 * numbers.len() as u8, 0];
            field.extend(numbers.iter().flat_map(|number| (*number as u64).to_le_bytes()));
            if large { field } else { Vec::new() }
        };
        let (near, far) = (long(&[bytes.len(), packed.len()]), long(&[bytes.len(), packed.len(), start]));
        out.extend(b"PK\x03\x04");
        out.extend(&common);
        out.extend((near.len() as u16).to_le_bytes());
        out.extend(name.bytes());
        out.extend(near);
        out.extend(packed);
        directory.extend(b"PK\x01\x02\x14\x00");
        directory.extend(&common);
        directory.extend((far.len() as u16).to_le_bytes());
        directory.extend([0; 10]);
        directory.extend(short(start).to_le_bytes());
        directory.extend(name.bytes());
        directory.extend(far);
    }
    let (start, length, count) = (out.len(), directory.len(), members.len());
    out.extend(directory);
    if large {
        let end = out.len() as u64;
        out.extend(b"PK\x06\x06\x2c\0\0\0\0\0\0\0\x2d\0\x2d\0\0\0\0\0\0\0\0\0");
        out.extend([count, count, length, start].iter().flat_map(|number| (*number as u64).to_le_bytes()));
        out.extend(b"PK\x06\x07\0\0\0\0");
        out.extend(end.to_le_bytes());
        out.extend([1, 0, 0, 0]);
    }
    let (start, length, count) = match large {
        true => (u32::MAX, u32::MAX, u16::MAX),
        false => (start as u32, length as u32, count as u16),
    };
    out.extend(b"PK\x05\x06\0\0\0\0");
    out.extend(count.to_le_bytes());
    out.extend(count.to_le_bytes());
    out.extend(length.to_le_bytes());
    out.extend(start.to_le_bytes());
    out.extend([0, 0]);
    out
}

/// An entry of a pickled dict.
#[derive(Clone, Debug)]
pub enum Item {
    Tensor(Array),
    Number(i64),
    Float(f64),
    Dict(Vec<(String, Item)>),
}

/// The pickle of a dict, and the storages that it names.
pub fn pickle(entries: &[(String, Item)]) -> (Vec<u8>, Vec<Vec<u8>>) {
    let (mut out, mut storages) = (b"\x80\x02".to_vec(), Vec::new());
    push_dict(&mut out, entries, &mut storages);
    out.push(b'.');
    (out, storages)
}

fn push_str(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.bytes());
}

fn push_int(out: &mut Vec<u8>, number: usize) {
    match number {
        0..=255 => out.extend([b'K', number as u8]),
        256..=65_535 => {
            out.push(b'M');
            out.extend((number as u16).to_le_bytes());
        }
        _ => {
            out.push(b'J');
            out.extend((number as u32).to_le_bytes());
        }
    }
}

fn push_dict(out: &mut Vec<u8>, entries: &[(String, Item)], storages: &mut Vec<Vec<u8>>) {
    out.extend(b"}(");
    for (name, item) in entries {
        push_str(out, name);
        match item {
            Item::Dict(entries) => push_dict(out, entries, storages),
            Item::Number(number) => {
                out.push(b'J');
                out.extend((*number as i32).to_le_bytes());
            }
            Item::Float(number) => {
                out.push(b'G');
                out.extend(number.to_be_bytes());
            }
            Item::Tensor(array) => push_tensor(out, array, storages),
        }
    }
    out.push(b'u');
}

/// As `torch.save` writes it: `_rebuild_tensor_v2(storage, offset, shape, strides, False, OrderedDict())`.
fn push_tensor(out: &mut Vec<u8>, array: &Array, storages: &mut Vec<Vec<u8>>) {
    out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
    push_str(out, "storage");
    out.extend(format!("ctorch\n{}Storage\n", array.kind.names().0).bytes());
    push_str(out, &storages.len().to_string());
    push_str(out, "cpu");
    push_int(out, array.storage.len());
    out.extend(b"tQ");
    push_int(out, array.offset);
    for tuple in [&array.shape, &array.strides()] {
        out.push(b'(');
        tuple.iter().for_each(|number| push_int(out, *number));
        out.push(b't');
    }
    out.extend(b"\x89ccollections\nOrderedDict\n)RtR");
    storages.push(array.data());
}

/// A file of `torch.save` around a pickle.
pub fn torch_archive(pickle: Vec<u8>, storages: Vec<Vec<u8>>) -> Vec<u8> {
    zip(&torch_members(pickle, storages))
}

/// The members of a file of `torch.save`.
pub fn torch_members(pickle: Vec<u8>, storages: Vec<Vec<u8>>) -> Vec<(String, Vec<u8>, bool)> {
    let mut members = vec![("ae/data.pkl".to_owned(), pickle, false)];
    members.push(("ae/byteorder".to_owned(), b"little".to_vec(), false));
    let data = storages.into_iter().enumerate();
    members.extend(data.map(|(at, bytes)| (format!("ae/data/{at}"), bytes, false)));
    members.push(("ae/version".to_owned(), b"3\n".to_vec(), false));
    members
}

/// What `torch.save` writes of a state dict.
pub fn torch(entries: &[(String, Item)]) -> Vec<u8> {
    let (pickle, storages) = pickle(entries);
    torch_archive(pickle, storages)
}

/// A state dict of tensors.
pub fn tensors(entries: &[(&str, Array)]) -> Vec<(String, Item)> {
    entries.iter().map(|(name, array)| ((*name).to_owned(), Item::Tensor(array.clone()))).collect()
}

/// A safetensors file.
pub fn safetensors(entries: &[(&str, Array)]) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, array) in entries {
        assert!(array.strides.is_none(), "safetensors are row-major");
        let bytes = array.data();
        let ends = [data.len(), data.len() + bytes.len()];
        let info =
            serde_json::json!({"dtype": array.kind.names().1, "shape": array.shape, "data_offsets": ends});
        header.insert((*name).to_owned(), info);
        data.extend(bytes);
    }
    let header = serde_json::Value::from(header).to_string();
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.bytes());
    out.extend(data);
    out
}

/// A `.npy` file. A matrix by columns is in Fortran order.
pub fn npy(array: &Array) -> Vec<u8> {
    let shape: Vec<String> = array.shape.iter().map(|length| format!("{length},")).collect();
    let order = if array.strides.is_some() { "True" } else { "False" };
    let descr = array.kind.names().2;
    let text = format!("{{'descr': '{descr}', 'fortran_order': {order}, 'shape': ({}), }}", shape.join(" "));
    let mut out = b"\x93NUMPY\x01\x00".to_vec();
    out.extend((118u16).to_le_bytes());
    out.extend(format!("{text:<117}\n").bytes());
    out.extend(array.data());
    out
}

/// An `.npz` file.
pub fn npz(entries: &[(&str, Array)], deflate: bool) -> Vec<u8> {
    zip(&npz_members(entries, deflate))
}

/// The members of an `.npz` file.
pub fn npz_members(entries: &[(&str, Array)], deflate: bool) -> Vec<(String, Vec<u8>, bool)> {
    entries.iter().map(|(name, array)| (format!("{name}.npy"), npy(array), deflate)).collect()
}

/// Writes `bytes` to `folder/name`, with the folders above.
pub fn put(folder: &Path, name: &str, bytes: impl AsRef<[u8]>) {
    let path = folder.join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, bytes).unwrap();
}

/// Writes JSON.
pub fn put_json(folder: &Path, name: &str, json: &serde_json::Value) {
    put(folder, name, json.to_string());
}
