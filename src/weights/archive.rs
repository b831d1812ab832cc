//! Zip archives of arrays (`.npz`, PyTorch's files): where each member lies in the mapped file.

use std::collections::BTreeMap;
use std::io::{Cursor, Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flate2::Crc;
use flate2::read::DeflateDecoder;
use zip::{CompressionMethod, ZipArchive};

use super::mapped::{Bytes, map, or_full, temporary};
use super::safetensors::cut;
use crate::error::{Context, Error, Result};
use crate::units::size;

/// Bytes that begin a zip archive.
const MAGIC: &[u8] = b"PK\x03\x04";
/// Above this size a member must not be [`MAX_RATIO`] times smaller packed: nothing trained is.
const LARGE_BYTES: u64 = 1 << 30;
const MAX_RATIO: u64 = 100;
/// Members of up to this size are unpacked into memory.
const SMALL_BYTES: u64 = 1 << 20;

/// A member.
#[derive(Clone, Debug)]
pub(super) struct Member {
    /// Of its bytes as they lie in the file.
    range: Range<usize>,
    /// Not compressed.
    stored: bool,
    /// Unpacked, as the archive says.
    size: u64,
    crc32: u32,
}

/// An archive whose directory has been read.
pub(super) struct Archive {
    pub path: PathBuf,
    bytes: Bytes,
    members: BTreeMap<String, Member>,
}

impl Archive {
    /// Maps the file at `path` and reads its directory.
    ///
    /// # Errors
    /// It is no zip archive, or a broken one; a member that is encrypted or lies outside.
    pub fn open(path: &Path) -> Result<Self> {
        Self::from_bytes(path, map(path)?)
    }

    /// Reads the directory of a file that is in memory; `path` is its name in errors.
    pub fn from_bytes(path: &Path, bytes: Bytes) -> Result<Self> {
        let broken = |found: String| broken().at_path(path).found(found);
        let data = (*bytes).as_ref();
        if !data.starts_with(MAGIC) {
            return Err(broken("a file that does not begin like one".to_owned()).expected("a zip archive"));
        }
        // The crate reserves at most a few hundred bytes for each byte before the directory.
        let mut zip = ZipArchive::new(Cursor::new(data)).map_err(|cause| broken(cause.to_string()))?;
        let mut members = BTreeMap::new();
        for index in 0..zip.len() {
            let member = zip.by_index_raw(index).map_err(|cause| broken(cause.to_string()))?;
            if member.is_dir() {
                continue;
            }
            let name = member.name().to_owned();
            let stored = match member.compression() {
                CompressionMethod::Stored => true,
                CompressionMethod::Deflated => false,
                other => return Err(broken(format!("{} compressed with {other}", cut(&name)))),
            };
            if member.encrypted() {
                return Err(broken(format!("{} is encrypted", cut(&name))));
            }
            let (from, packed, size) = (member.data_start(), member.compressed_size(), member.size());
            let range = from
                .checked_add(packed)
                .filter(|to| *to <= data.len() as u64 && (!stored || packed == size))
                .map(|to| from as usize..to as usize)
                .ok_or_else(|| broken(format!("{} lies outside the file", cut(&name))))?;
            members.insert(name, Member { range, stored, size, crc32: member.crc32() });
        }
        Ok(Self { path: path.to_owned(), bytes, members })
    }

    /// Members in the order of their names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.members.keys().map(String::as_str)
    }

    /// Where member `name` lies in [`Archive::bytes`], if it is not compressed.
    pub fn stored(&self, name: &str) -> Option<Range<usize>> {
        self.members.get(name).filter(|member| member.stored).map(|member| member.range.clone())
    }

    /// The whole file.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Size of member `name` when unpacked, as the archive says.
    pub fn size(&self, name: &str) -> Option<u64> {
        self.members.get(name).map(|member| member.size)
    }

    /// A reader of member `name`, unpacked; never more bytes than the archive says.
    pub fn reader(&self, name: &str) -> Option<Box<dyn Read + '_>> {
        let member = self.members.get(name)?;
        let packed = (*self.bytes).as_ref().get(member.range.clone())?;
        Some(match member.stored {
            true => Box::new(packed),
            false => Box::new(DeflateDecoder::new(packed).take(member.size)),
        })
    }

    /// A compressed member unpacked into a temporary file.
    ///
    /// # Errors
    /// What it holds is not what the archive says, or there is no space.
    pub fn unpacked(&self, name: &str) -> Result<Bytes> {
        let broken = |found: String| broken().at_path(&self.path).found(format!("{}: {found}", cut(name)));
        let member = self.members.get(name).ok_or_else(|| broken("it is not there".to_owned()))?;
        if member.size > LARGE_BYTES && member.size / MAX_RATIO > member.range.len() as u64 {
            let packed = member.range.len() as u64;
            return Err(broken(format!("{} packed into {}", size(member.size), size(packed)))
                .expected("weights, which do not pack like this"));
        }
        let mut crc = Crc::new();
        let mut unpack = |out: &mut dyn Write| {
            let mut reader = self.reader(name).ok_or_else(|| broken("it is not there".to_owned()))?;
            let mut block = vec![0; 1 << 18];
            let mut left = member.size;
            while left > 0 {
                let read = reader.read(&mut block).map_err(|cause| broken(cause.to_string()))?;
                if read == 0 {
                    return Err(broken(format!("it ends {left} bytes early")));
                }
                crc.update(&block[..read]);
                or_full(out.write_all(&block[..read]))?;
                left -= read as u64;
            }
            Ok(())
        };
        let bytes: Bytes = if member.size <= SMALL_BYTES {
            let mut out = Vec::new();
            unpack(&mut out)?;
            Arc::new(out)
        } else {
            temporary(|file| unpack(file))?
        };
        match crc.sum() == member.crc32 {
            true => Ok(bytes),
            false => Err(broken("its checksum is wrong".to_owned())),
        }
    }

    /// The whole of a small member, unpacked; at most `limit` bytes.
    pub fn small(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        let Some(reader) = self.reader(name) else { return Ok(None) };
        if self.size(name).is_some_and(|size| size > limit) {
            return Err(broken()
                .at_path(&self.path)
                .expected(format_args!("at most {limit} bytes of {}", cut(name))));
        }
        let mut out = Vec::new();
        reader.take(limit).read_to_end(&mut out).context_path(BROKEN, &self.path)?;
        Ok(Some(out))
    }
}

const BROKEN: &str = "a zip archive of weights cannot be read";

fn broken() -> Error {
    Error::new(BROKEN).hint("the download may be incomplete: fetch the file again")
}

impl std::fmt::Debug for Archive {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Archive({}, {} members)", self.path.display(), self.members.len())
    }
}
