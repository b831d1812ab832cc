//! `.npz`: a zip archive of deflated `.npy` files, as `np.savez_compressed` writes it.
//!
//! The same content gives the same bytes: entries keep the given order, and the zip crate is built without its clock,
//! so that every entry is dated 1980-01-01 (a test holds this).

use super::npy::{self, Array};
use super::pickle::{self, Value};
use crate::error::{Context, Error, Result};
use ndarray_npy::{NpzWriter, WriteNpyError, WriteNpyExt, WriteNpzError};
use std::io::{Cursor, Write};

/// The archive of `entries` (key, array) in their order and, last, `metadata` if there is one.
///
/// `np.load(path)[key]` gives each array; `np.load(path, allow_pickle=True)["metadata"]` is an object array of shape
/// (1,) whose `.item()` is the dict. Two equal keys are an error. The archive is made in memory: it holds one number
/// per layer, dimension and statistic, which is tens of megabytes for the largest models.
pub fn bytes<'a>(
    entries: impl IntoIterator<Item = (String, Array<'a>)>,
    metadata: Option<&Value>,
) -> Result<Vec<u8>> {
    let mut archive = NpzWriter::new_compressed(Cursor::new(Vec::new()));
    for (key, array) in entries {
        archive.add_array(key.as_str(), &array).map_err(|cause| not_added(&key, &cause))?;
    }
    if let Some(metadata) = metadata {
        archive.add_array("metadata", &Object(metadata)).map_err(|cause| not_added("metadata", &cause))?;
    }
    Ok(archive.finish().context("the .npz archive could not be finished")?.into_inner())
}

/// Memory does not refuse a write, so this is about the keys.
fn not_added(key: &str, cause: &WriteNpzError) -> Error {
    Error::new("an array could not be added to the .npz archive")
        .at(format!("key {key:?}"))
        .expected("keys that are all different")
        .found(cause)
        .hint("this is a fault in gradlens: please report it with the command line")
}

/// A NumPy object array of shape (1,). Its data is a pickle of the whole array instead of plain numbers.
struct Object<'a>(&'a Value);

impl WriteNpyExt for Object<'_> {
    fn write_npy<W: Write>(&self, mut writer: W) -> Result<(), WriteNpyError> {
        writer.write_all(&npy::header("|O", "(1,)"))?;
        writer.write_all(&pickle::object_array(self.0))?;
        Ok(writer.flush()?)
    }
}
