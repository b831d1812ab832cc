//! `.npy`: one array with a header that says its type and shape (NumPy format version 1.0), byte for byte what
//! `np.save` writes.
//!
//! The header is written here and not by ndarray-npy, which leaves out NumPy's trailing comma and knows no object type.

use crate::error::{Context, Result};
use ndarray_npy::{WriteNpyError, WriteNpyExt};
use std::io::Write;

/// An array that can be written, borrowed from whoever computed it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Array<'a> {
    /// float32, `[D]`
    F32(&'a [f32]),
    /// float64, `[D]`
    F64(&'a [f64]),
    /// Counts, written as float64, `[F]`
    Counts(&'a [u64]),
    /// int64, a scalar: shape `()`
    I64(i64),
}

impl WriteNpyExt for Array<'_> {
    fn write_npy<W: Write>(&self, mut writer: W) -> Result<(), WriteNpyError> {
        let mut bytes = match *self {
            Self::F32(values) => header("<f4", &format!("({},)", values.len())),
            Self::F64(values) => header("<f8", &format!("({},)", values.len())),
            Self::Counts(counts) => header("<f8", &format!("({},)", counts.len())),
            Self::I64(_) => header("<i8", "()"),
        };
        match *self {
            Self::F32(values) => values.iter().for_each(|value| bytes.extend(value.to_le_bytes())),
            Self::F64(values) => values.iter().for_each(|value| bytes.extend(value.to_le_bytes())),
            Self::Counts(counts) => {
                counts.iter().for_each(|&count| bytes.extend((count as f64).to_le_bytes()));
            }
            Self::I64(value) => bytes.extend(value.to_le_bytes()),
        }
        writer.write_all(&bytes)?;
        Ok(writer.flush()?)
    }
}

/// Magic, version 1.0, length of the text, the text padded with spaces so that the data begins at byte 128.
/// `descr` is the type (`<f4`) and `shape` a Python tuple; both are short, so one length fits all.
pub(super) fn header(descr: &str, shape: &str) -> Vec<u8> {
    const TEXT_BYTES: u8 = 118;
    let text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}");
    let mut header = b"\x93NUMPY\x01\x00".to_vec();
    header.extend([TEXT_BYTES, 0]);
    header.extend(format!("{text:<width$}\n", width = usize::from(TEXT_BYTES) - 1).bytes());
    header
}

/// The whole `.npy` file of `array`, as bytes.
pub fn bytes(array: Array) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    array.write_npy(&mut bytes).context("an array could not be written as .npy")?;
    Ok(bytes)
}
