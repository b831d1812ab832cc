//! Files that `torch.save` writes: a zip archive with one pickle (`data.pkl`) that describes tensors and a member
//! (`data/0`) for the elements of each. The members are not compressed: tensors are views of the mapped file.

use std::collections::BTreeMap;
use std::path::Path;

use super::archive::Archive;
use super::mapped::{Bytes, map};
use super::pickle::{Pickle, Tensor, Value};
use super::safetensors::cut;
use super::stored::{Element, Stored};
use crate::error::{Error, Result};

/// Largest pickle that is read, in bytes. A state dict's has about 200 bytes a tensor.
const MAX_PICKLE_BYTES: u64 = 16 << 20;
/// Dicts inside dicts that are looked into.
const MAX_DEPTH: usize = 6;
/// Entries of all dicts. A dict may be there many times at the cost of two bytes each.
const MAX_ENTRIES: usize = 100_000;
/// Begins the pickles of PyTorch before version 1.6: protocol 2 and a magic number.
const OLD: &[u8] = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";

/// What a file holds: entries of dicts inside dicts are named like attributes, `ae.encoder.weight`.
#[derive(Default)]
pub(super) struct TorchFile {
    tensors: BTreeMap<String, Stored>,
    /// Numbers that are no tensors.
    pub numbers: BTreeMap<String, f64>,
}

impl TorchFile {
    /// Opens the file at `path`. Nothing in it is executed.
    ///
    /// # Errors
    /// It is damaged, of an old kind, or asks for what is not allowed; a tensor outside its storage.
    pub fn open(path: &Path) -> Result<Self> {
        Self::from_bytes(path, map(path)?)
    }

    /// Opens a file that is in memory; `path` is its name in errors.
    pub fn from_bytes(path: &Path, bytes: Bytes) -> Result<Self> {
        let data = (*bytes).as_ref();
        if data.starts_with(OLD) || (data.first() == Some(&0x80) && !data.starts_with(b"PK")) {
            return Err(Error::new("a file of PyTorch is of an old kind that is not read")
                .at_path(path)
                .expected("the zip archive that PyTorch writes since version 1.6")
                .found("a bare pickle, of which nothing was run")
                .hint("save it again in Python: torch.save(torch.load(path, weights_only=True), path)"));
        }
        let archive = Archive::from_bytes(path, bytes)?;
        Self::from_archive(&archive).map_err(|error| error.at_path(path))
    }

    fn from_archive(archive: &Archive) -> Result<Self> {
        let other = |found: &str| {
            Error::new("a zip archive is no file of tensors from PyTorch")
                .expected("one data.pkl, with the tensors' elements in data/")
                .found(found)
        };
        let mut folders = archive.names().filter_map(|name| name.strip_suffix("data.pkl"));
        let folder = match (folders.next(), folders.next()) {
            (Some(folder), None) if folder.is_empty() || folder.ends_with('/') => folder.to_owned(),
            (None, _) => return Err(other("no data.pkl")),
            _ => return Err(other("several")),
        };
        if archive.names().any(|name| name.strip_prefix(&*folder).is_some_and(|rest| rest == "constants.pkl"))
        {
            return Err(other("a TorchScript program"));
        }
        let order = archive.small(&format!("{folder}byteorder"), 16)?;
        if order.is_some_and(|order| order.trim_ascii() != b"little") {
            return Err(other("elements in big-endian order"));
        }
        let pickle = archive.small(&format!("{folder}data.pkl"), MAX_PICKLE_BYTES)?.unwrap_or_default();
        let pickle = Pickle::read(&pickle)?;
        if !matches!(pickle.value(pickle.root), Value::Dict(_)) {
            return Err(Error::new("a file of PyTorch holds no dict of tensors")
                .expected("a state_dict")
                .found("something else")
                .hint("save the state_dict() in Python: torch.save(model.state_dict(), path)"));
        }
        let mut reader =
            Reader { pickle: &pickle, archive, folder: &folder, entries: 0, file: Self::default() };
        reader.dict("", pickle.root, 0)?;
        Ok(reader.file)
    }

    /// The tensors' names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// A tensor.
    pub fn get(&self, name: &str) -> Option<&Stored> {
        self.tensors.get(name)
    }
}

struct Reader<'a> {
    pickle: &'a Pickle<'a>,
    archive: &'a Archive,
    folder: &'a str,
    entries: usize,
    file: TorchFile,
}

impl Reader<'_> {
    fn dict(&mut self, prefix: &str, number: usize, depth: usize) -> Result<()> {
        let pickle = self.pickle;
        let Value::Dict(entries) = pickle.value(number) else { return Ok(()) };
        for (key, number) in entries {
            self.entries += 1;
            if self.entries > MAX_ENTRIES {
                return Err(Error::new("a file of PyTorch holds more than can be right")
                    .expected(format_args!("at most {MAX_ENTRIES} entries of dicts")));
            }
            // Optimisers number their parameters.
            let Value::Str(key) = pickle.value(*key) else { continue };
            let name = format!("{prefix}{key}");
            match pickle.value(*number) {
                Value::Dict(_) if depth < MAX_DEPTH => self.dict(&format!("{name}."), *number, depth + 1)?,
                Value::Tensor(tensor) => {
                    let tensor = self.tensor(&name, tensor)?;
                    self.file.tensors.insert(name, tensor);
                }
                Value::Int(value) => drop(self.file.numbers.insert(name, *value as f64)),
                Value::Float(value) => drop(self.file.numbers.insert(name, *value)),
                _ => {}
            }
        }
        Ok(())
    }

    fn tensor(&self, name: &str, tensor: &Tensor) -> Result<Stored> {
        let Tensor { storage, offset, shape, strides } = tensor;
        let element = match storage.element {
            "Float" => Element::F32,
            "Half" => Element::F16,
            "BFloat16" => Element::BF16,
            "Double" => Element::F64,
            "Long" => Element::I64,
            "Int" => Element::I32,
            _ => Element::Bool,
        };
        let wrong = |found: String| {
            Error::new(format!("tensor {} of a file of PyTorch is damaged", cut(name)))
                .expected("elements that lie in the file")
                .found(found)
                .hint("the download may be incomplete: fetch the file again")
        };
        let member = format!("{}data/{}", self.folder, storage.key);
        let range = self.archive.stored(&member).ok_or_else(|| {
            let state = if self.archive.size(&member).is_some() { "is compressed" } else { "is not there" };
            wrong(format!("{} {state}", cut(&member)))
        })?;
        let bytes = storage.len.checked_mul(element.bytes()).filter(|bytes| *bytes <= range.len());
        let bytes = bytes.ok_or_else(|| {
            wrong(format!("{} bytes for {} elements of {}", range.len(), storage.len, element.name()))
        })?;
        let range = range.start..range.start + bytes;
        Stored::new(element, shape.clone(), strides.clone(), *offset, self.archive.bytes(), range).ok_or_else(
            || {
                wrong(format!(
                    "shape {shape:?}, strides {strides:?} from {offset} on, in {} elements",
                    storage.len
                ))
            },
        )
    }
}
