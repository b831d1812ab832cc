//! One safetensors file: eight bytes of header length, a JSON header, then the tensors' bytes.
//!
//! The header is read here rather than by the `safetensors` crate, whose checks are as strict but whose errors
//! name neither the tensor nor the size that was expected. The rules are the format's own (README of the
//! safetensors repository): no length is trusted, every byte of the file belongs to exactly one tensor.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;

use ::safetensors::tensor::{Dtype, TensorInfo};
use serde::de::{Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use super::mapped::{Bytes, map, refuse_pointer};
use crate::error::{Error, Result};

/// Largest header that is read, in bytes: the limit of the format.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Bytes of the header's length.
const LENGTH_BYTES: usize = 8;

/// A tensor as the header describes it.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Where its bytes lie, counted from the start of the file.
    pub range: Range<usize>,
}

/// A file with its header checked.
pub(super) struct Shard {
    pub bytes: Bytes,
    pub tensors: BTreeMap<String, Entry>,
}

impl Shard {
    /// Maps the file at `path` and checks its header. Nothing else of the file is read.
    pub fn open(path: &Path) -> Result<Self> {
        Self::parse(path, map(path)?)
    }

    /// Checks the header of a file that is in memory; `place` is its name in errors.
    pub fn parse(place: &Path, bytes: Bytes) -> Result<Self> {
        let tensors = parse((*bytes).as_ref()).map_err(|error| error.at_path(place))?;
        Ok(Self { bytes, tensors })
    }
}

fn broken(what: impl fmt::Display) -> Error {
    Error::new(format!("a safetensors file is damaged: {what}"))
        .hint("the download may be incomplete: fetch the file again")
}

fn parse(file: &[u8]) -> Result<BTreeMap<String, Entry>> {
    refuse_pointer(file, "a safetensors file")?;
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(broken("it has no header")
            .expected(format_args!("at least {LENGTH_BYTES} bytes"))
            .found(format_args!("{} bytes", file.len())));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        return Err(broken("the length of its header is impossible, or it is another format")
            .expected(format_args!("at most {MAX_HEADER_BYTES} bytes"))
            .found(format_args!("{length} bytes")));
    }
    let (header, data) =
        usize::try_from(length).ok().and_then(|length| rest.split_at_checked(length)).ok_or_else(|| {
            broken("it ends inside its header")
                .expected(format_args!("{} bytes or more", length + LENGTH_BYTES as u64))
                .found(format_args!("{} bytes", file.len()))
        })?;
    let tensors = read_header(header).map_err(|cause| broken("its header cannot be read").found(cause))?;
    place(tensors, file.len() - data.len(), data.len())
}

/// The tensors of a header in the order of their bytes.
fn read_header(header: &[u8]) -> serde_json::Result<Vec<(String, TensorInfo)>> {
    struct Header;
    impl<'de> Visitor<'de> for Header {
        type Value = Vec<(String, TensorInfo)>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object of tensors")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut tensors = Vec::new();
            while let Some(name) = map.next_key::<String>()? {
                if name == "__metadata__" {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
                let info = map
                    .next_value()
                    .map_err(|cause| A::Error::custom(format_args!("tensor {}: {cause}", cut(&name))))?;
                tensors.push((name, info));
            }
            Ok(tensors)
        }
    }

    let mut reader = serde_json::Deserializer::from_slice(header);
    let mut tensors = reader.deserialize_map(Header)?;
    reader.end()?;
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    Ok(tensors)
}

/// Checks that the tensors, in order, cover `data_bytes` bytes without holes or overlaps, and that each has
/// the bytes its shape needs. `start` is the offset of the data in the file.
fn place(
    tensors: Vec<(String, TensorInfo)>,
    start: usize,
    data_bytes: usize,
) -> Result<BTreeMap<String, Entry>> {
    let end = tensors.last().map_or(0, |(_, info)| info.data_offsets.1);
    if end != data_bytes {
        let what = match tensors.iter().find(|(_, info)| info.data_offsets.1 > data_bytes) {
            Some((name, _)) => format!("it ends inside tensor {}", cut(name)),
            None => "it has bytes after its last tensor".to_owned(),
        };
        return Err(broken(what)
            .expected(format_args!("{} bytes", start as u128 + end as u128))
            .found(format_args!("{} bytes", start + data_bytes)));
    }
    let mut placed = BTreeMap::new();
    let mut next = 0;
    for (name, TensorInfo { dtype, shape, data_offsets: (from, to) }) in tensors {
        if from != next || to < from || to > data_bytes {
            return Err(broken(format_args!("tensor {} lies in the wrong place", cut(&name)))
                .expected(format_args!("bytes from {next} on, within the {data_bytes} bytes of data"))
                .found(format_args!("bytes {from} to {to}")));
        }
        next = to;
        let bits = shape.iter().try_fold(dtype.bitsize(), |bits, &length| bits.checked_mul(length));
        if bits.is_none_or(|bits| bits % 8 != 0 || bits / 8 != to - from) {
            return Err(broken(format_args!("tensor {} has the wrong number of bytes", cut(&name)))
                .expected(format_args!("those of {shape:?} in {dtype:?}"))
                .found(format_args!("{} bytes", to - from)));
        }
        if placed.contains_key(&name) {
            return Err(broken(format_args!("tensor {} is there twice", cut(&name))));
        }
        placed.insert(name, Entry { dtype, shape, range: start + from..start + to });
    }
    Ok(placed)
}

/// A name as a message shows it: quoted, and cut when it is absurdly long.
pub(super) fn cut(name: &str) -> String {
    let short: String = name.chars().take(120).collect();
    if short.len() < name.len() { format!("`{short}…`") } else { format!("`{short}`") }
}
