//! A dataset path → the files to read, in order, each opened as a stream of bytes.

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufRead, BufReader, Cursor};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use flate2::bufread::MultiGzDecoder;

use super::pages::Input;
use crate::error::{Context, Error, Result};
use crate::units::natural;

/// The kinds of file we read, as error messages list them.
pub(super) const KINDS: &str =
    ".parquet, .jsonl, .ndjson, .json or .txt, the last four also with .gz, or a folder of these";
const BUFFER_BYTES: usize = 1 << 16;

/// How the texts of a file are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// In a stream of bytes.
    Stream(Shape),
    /// In one column of a table.
    Parquet,
}

/// How a stream of bytes divides into texts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// One JSON value per line.
    JsonLines,
    /// One JSON array, or JSON values one after the other.
    Json,
    /// One text per line.
    Plain,
}

/// One file of the dataset, not yet open.
#[derive(Clone, Debug)]
pub(super) struct Part {
    /// What errors call it: its path, or the dataset that it is from and its path there.
    pub name: String,
    pub format: Format,
    gzip: bool,
    place: Place,
}

#[derive(Clone, Debug)]
enum Place {
    Disk(PathBuf),
    Memory(Cow<'static, [u8]>),
    /// Not on this machine yet.
    Elsewhere,
}

impl Part {
    /// A part that is in memory already; its `name` says the format.
    pub fn in_memory(name: &str, bytes: Cow<'static, [u8]>) -> Result<Self> {
        Self::at(name, Place::Memory(bytes))
    }

    /// The file `file` of the dataset `dataset`, which is still to be brought here.
    pub fn elsewhere(dataset: &str, file: &str) -> Result<Self> {
        Self::at(&format!("{dataset}: {file}"), Place::Elsewhere)
    }

    fn at(name: &str, place: Place) -> Result<Self> {
        let (format, gzip) = kind_of(name).ok_or_else(|| unknown_kind(name))?;
        Ok(Self { name: name.to_owned(), format, gzip, place })
    }

    /// The same part, which now is at `path`; the path's own ending does not matter.
    pub fn arrived(self, path: PathBuf) -> Self {
        Self { place: Place::Disk(path), ..self }
    }

    fn file(&self, path: &Path) -> Result<File> {
        File::open(path).map_err(|cause| Error::new("cannot open the dataset").at(&self.name).found(cause))
    }

    fn absent(&self) -> Error {
        Error::new("cannot open the dataset").at(&self.name).found("a file that was not fetched")
    }

    /// The part as it is stored, to be read here and there.
    pub fn input(&self) -> Result<Input> {
        Ok(match &self.place {
            Place::Disk(path) => Input::Disk(self.file(path)?),
            Place::Memory(Cow::Borrowed(bytes)) => Input::Memory(Bytes::from_static(bytes)),
            Place::Memory(Cow::Owned(bytes)) => Input::Memory(Bytes::from(bytes.clone())),
            Place::Elsewhere => return Err(self.absent()),
        })
    }

    /// The part's bytes, unpacked.
    pub fn open(&self) -> Result<Box<dyn BufRead + Send>> {
        let raw: Box<dyn BufRead + Send> = match &self.place {
            Place::Disk(path) => Box::new(BufReader::with_capacity(BUFFER_BYTES, self.file(path)?)),
            Place::Memory(Cow::Borrowed(bytes)) => Box::new(*bytes),
            Place::Memory(Cow::Owned(bytes)) => Box::new(Cursor::new(bytes.clone())),
            Place::Elsewhere => return Err(self.absent()),
        };
        let mut bytes: Box<dyn BufRead + Send> = match self.gzip {
            true => Box::new(BufReader::with_capacity(BUFFER_BYTES, MultiGzDecoder::new(raw))),
            false => raw,
        };
        // A byte-order mark is no part of the first text.
        let start = bytes.fill_buf().map_err(|cause| self.unreadable(cause, 1))?;
        if start.starts_with(b"\xEF\xBB\xBF") {
            bytes.consume(3);
        }
        Ok(bytes)
    }

    /// The error for a read that failed around `line` (from 1).
    pub fn unreadable(&self, cause: std::io::Error, line: u64) -> Error {
        let place = format!("{}, near line {line}", self.name);
        if self.gzip {
            return Error::new("the gzip data of the dataset is damaged")
                .at(place)
                .expected("a complete gzip file")
                .found(cause)
                .hint("copy or download the file again; `gzip -t FILE` tests it");
        }
        Error::new("cannot read the dataset").at(place).found(cause)
    }
}

/// The files behind `--dataset`: one file, or those of a folder in natural order (`part-2` before `part-10`).
pub(super) fn parts(dataset: &Path) -> Result<Vec<Part>> {
    let found = dataset.metadata().map_err(|cause| {
        Error::new("cannot read the dataset")
            .at_path(dataset)
            .expected(format!("--dataset: a file {KINDS}"))
            .found(cause)
    })?;
    if !found.is_dir() {
        let name = dataset.display().to_string();
        return Ok(vec![Part::at(&name, Place::Disk(dataset.to_owned()))?]);
    }
    let mut parts = Vec::new();
    let mut others = Vec::new();
    for entry in dataset.read_dir().context_path("cannot list the dataset's folder", dataset)? {
        let path = entry.context_path("cannot list the dataset's folder", dataset)?.path();
        let file = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        // Hidden files are other programs' leavings: `._a.jsonl`, `.ipynb_checkpoints`.
        match kind_of(&file) {
            Some((format, gzip)) if !file.starts_with('.') && path.is_file() => {
                parts.push(Part { name: path.display().to_string(), format, gzip, place: Place::Disk(path) });
            }
            _ => others.push(file),
        }
    }
    if parts.is_empty() {
        let found = if others.is_empty() { "an empty folder".into() } else { some_of(others) };
        return Err(Error::new("the dataset's folder has no file that can be read")
            .at_path(dataset)
            .expected(format!("files {KINDS}"))
            .found(found)
            .hint(CONVERT));
    }
    parts.sort_by(|a, b| natural(&a.name, &b.name));
    Ok(parts)
}

/// What to do about a format that is not read.
pub(super) const CONVERT: &str =
    "other formats: datasets.load_dataset(…, split=\"train\").to_parquet(\"corpus.parquet\") in Python";

/// The first eight names in natural order.
pub(super) fn some_of(mut names: Vec<String>) -> String {
    names.sort_by(|a, b| natural(a, b));
    let more = if names.len() > 8 { ", …" } else { "" };
    names.truncate(8);
    names.join(", ") + more
}

fn unknown_kind(name: &str) -> Error {
    let file = Path::new(name).file_name().map_or_else(|| name.into(), |file| file.to_string_lossy());
    Error::new("the dataset is of an unknown kind")
        .at(name)
        .expected(format!("a file {KINDS}"))
        .found(format!("{file:?}"))
        .hint(CONVERT)
}

/// Whether a file of this name is one of those that are read.
pub fn is_readable(name: &str) -> bool {
    kind_of(name).is_some()
}

/// The format that a file's name announces, and whether it is packed.
pub(super) fn kind_of(name: &str) -> Option<(Format, bool)> {
    let name = name.to_ascii_lowercase();
    let (stem, gzip) = name.strip_suffix(".gz").map_or((name.as_str(), false), |stem| (stem, true));
    let format = match stem.rsplit_once('.')?.1 {
        "jsonl" | "ndjson" => Format::Stream(Shape::JsonLines),
        "json" => Format::Stream(Shape::Json),
        "txt" => Format::Stream(Shape::Plain),
        // A packed one could not be read here and there.
        "parquet" if !gzip => Format::Parquet,
        _ => return None,
    };
    Some((format, gzip))
}

/// Reads up to and with the next newline into `line` (cleared first); `false` at the end.
pub(super) fn read_line(bytes: &mut dyn BufRead, line: &mut Vec<u8>) -> std::io::Result<bool> {
    line.clear();
    bytes.read_until(b'\n', line)?;
    let read = !line.is_empty();
    if line.ends_with(b"\n") {
        line.pop();
        if line.ends_with(b"\r") {
            line.pop();
        }
    }
    Ok(read)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_announce_formats() {
        assert_eq!(kind_of("a.jsonl"), Some((Format::Stream(Shape::JsonLines), false)));
        assert_eq!(kind_of("A.NDJSON.GZ"), Some((Format::Stream(Shape::JsonLines), true)));
        assert_eq!(kind_of("a.b.json.gz"), Some((Format::Stream(Shape::Json), true)));
        assert_eq!(kind_of("dir.x/a.txt"), Some((Format::Stream(Shape::Plain), false)));
        assert_eq!(kind_of("A-00000-of-00001.Parquet"), Some((Format::Parquet, false)));
        for other in ["a.parquet.gz", "a.arrow", "a", "jsonl", "a.gz", "a.csv.gz", ""] {
            assert_eq!(kind_of(other), None, "{other}");
        }
    }

    #[test]
    fn a_byte_order_mark_is_dropped() {
        let part = Part::in_memory("a.txt", Cow::Borrowed(b"\xEF\xBB\xBFx".as_slice())).unwrap();
        let mut all = Vec::new();
        std::io::Read::read_to_end(&mut part.open().unwrap(), &mut all).unwrap();
        assert_eq!(all, b"x");
    }
}
