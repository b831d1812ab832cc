//! `.npz`: a zip archive of `.npy` arrays. Those that are not compressed are views of the mapped file.

use std::io::Read;
use std::path::Path;

use super::archive::Archive;
use super::safetensors::cut;
use super::stored::{Element, Stored};
use crate::error::{Error, Result};

/// Largest header of an array that is read, in bytes; NumPy's own has 128.
const MAX_HEADER_BYTES: usize = 1 << 16;

/// An open `.npz`.
#[derive(Debug)]
pub(super) struct NpzFile {
    archive: Archive,
}

/// What comes before an array's elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub element: Element,
    pub fortran: bool,
    pub shape: Vec<usize>,
    /// Of the header.
    pub bytes: usize,
}

impl NpzFile {
    /// Opens the file at `path`: its directory, no array.
    ///
    /// # Errors
    /// It is no zip archive.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self { archive: Archive::open(path)? })
    }

    /// Names of the arrays: those of the members without `.npy`.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.archive.names().filter_map(|name| name.strip_suffix(".npy"))
    }

    /// The header of array `name`.
    ///
    /// # Errors
    /// It is no header, or of elements that are no numbers, or does not fit the array's size.
    pub fn header(&self, name: &str) -> Result<Option<Header>> {
        let member = format!("{name}.npy");
        let Some(size) = self.archive.size(&member) else { return Ok(None) };
        let Some(reader) = self.archive.reader(&member) else { return Ok(None) };
        let mut start = Vec::new();
        let wrong = |found: String| {
            Error::new(format!("array {} of an .npz file is damaged", cut(name)))
                .at_path(&self.archive.path)
                .found(found)
                .hint("the download may be incomplete: fetch the file again")
        };
        reader
            .take(MAX_HEADER_BYTES as u64)
            .read_to_end(&mut start)
            .map_err(|cause| wrong(cause.to_string()))?;
        let header = header(&start).map_err(wrong)?;
        let count = header.shape.iter().try_fold(header.element.bytes(), |n, &d| n.checked_mul(d));
        match count.and_then(|bytes| bytes.checked_add(header.bytes)) {
            Some(bytes) if bytes as u64 == size => Ok(Some(header)),
            _ => Err(wrong(format!("{:?} in {} and {size} bytes", header.shape, header.element.name()))),
        }
    }

    /// Array `name`.
    ///
    /// # Errors
    /// As [`NpzFile::header`], or it cannot be unpacked.
    pub fn get(&self, name: &str) -> Result<Option<Stored>> {
        let Some(header) = self.header(name)? else { return Ok(None) };
        let member = format!("{name}.npy");
        let (bytes, range) = match self.archive.stored(&member) {
            Some(range) => (self.archive.bytes().clone(), range),
            None => {
                let bytes = self.archive.unpacked(&member)?;
                let all = 0..(*bytes).as_ref().len();
                (bytes, all)
            }
        };
        let range = range.start + header.bytes..range.end;
        let shape = match header.fortran {
            true => header.shape.iter().rev().copied().collect(),
            false => header.shape.clone(),
        };
        let stored = Stored::row_major(header.element, shape, &bytes, range);
        Ok(stored.map(|stored| if header.fortran { stored.reversed() } else { stored }))
    }
}

/// Reads the header at the start of an array; the error says what is wrong with it.
pub(super) fn header(start: &[u8]) -> Result<Header, String> {
    let rest = start.strip_prefix(b"\x93NUMPY").ok_or("it does not begin like one")?;
    let (length, text_at) = match *rest {
        [1, _, a, b, ..] => (usize::from(u16::from_le_bytes([a, b])), 10),
        [2 | 3, _, a, b, c, d, ..] => (u32::from_le_bytes([a, b, c, d]) as usize, 12),
        _ => return Err("its version is unknown".into()),
    };
    let bytes = text_at + length;
    let text = start.get(text_at..bytes).ok_or("it ends inside its header")?;
    let text = std::str::from_utf8(text).map_err(|_| "its header is no text")?;
    let descr = field(text, "descr")?;
    let descr =
        descr.strip_prefix(['\'', '"']).and_then(|text| text.split(['\'', '"']).next()).unwrap_or("other");
    let element = match descr {
        "<f8" => Element::F64,
        "<f4" => Element::F32,
        "<f2" => Element::F16,
        "<i8" => Element::I64,
        "<i4" => Element::I32,
        "|b1" => Element::Bool,
        other => return Err(format!("elements of type {}, which is not read", cut(other))),
    };
    let order = field(text, "fortran_order")?;
    let fortran = match (order.starts_with("True"), order.starts_with("False")) {
        (true, _) => true,
        (_, true) => false,
        _ => return Err("its header does not say the order of elements".into()),
    };
    let tuple = field(text, "shape")?;
    let inside =
        tuple.strip_prefix('(').and_then(|text| text.split_once(')')).ok_or("its header has no shape")?.0;
    let numbers = inside.split(',').map(str::trim).filter(|number| !number.is_empty());
    let shape =
        numbers.map(|number| number.parse().map_err(|_| "its shape is none")).collect::<Result<_, _>>()?;
    Ok(Header { element, fortran, shape, bytes })
}

/// What follows `'name':` in the text of a Python dict.
fn field<'a>(text: &'a str, name: &str) -> Result<&'a str, String> {
    let after = ['\'', '"'].iter().find_map(|quote| {
        let key = format!("{quote}{name}{quote}");
        text.split_once(&key)?.1.trim_start().strip_prefix(':')
    });
    after.map(str::trim_start).ok_or_else(|| format!("its header has no {name}"))
}
