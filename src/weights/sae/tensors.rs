//! The tensors of an SAE's file, whatever its container, with their shapes checked.

use std::path::{Path, PathBuf};

use ::safetensors::tensor::Dtype;

use crate::error::{Error, Result};
use crate::model::Dtype as Kind;
use crate::model::sae::FeatureMatrix;
use crate::weights::mapped::Bytes;
use crate::weights::npz::NpzFile;
use crate::weights::safetensors::{Shard, cut};
use crate::weights::stored::{Element, Stored};
use crate::weights::torch_zip::TorchFile;

/// How many names a message lists.
const NAMED: usize = 12;

/// An open file of tensors.
pub(super) struct Tensors {
    pub path: PathBuf,
    source: Source,
    /// Goes before every name that is asked for.
    prefix: &'static str,
}

enum Source {
    Safetensors(Shard),
    Torch(TorchFile),
    Npz(NpzFile),
}

impl Tensors {
    /// A safetensors file.
    pub fn safetensors(path: &Path) -> Result<Self> {
        Ok(Self { path: path.to_owned(), source: Source::Safetensors(Shard::open(path)?), prefix: "" })
    }

    /// A file that `torch.save` wrote; `nested` are the names of dicts that the state dict may lie in.
    pub fn torch(path: &Path, nested: &[&'static str]) -> Result<Self> {
        Ok(Self::of_torch(path, TorchFile::open(path)?, nested))
    }

    /// The same of a file that is in memory; `path` is its name in errors.
    pub fn torch_bytes(path: &Path, bytes: Bytes, nested: &[&'static str]) -> Result<Self> {
        Ok(Self::of_torch(path, TorchFile::from_bytes(path, bytes)?, nested))
    }

    fn of_torch(path: &Path, file: TorchFile, nested: &[&'static str]) -> Self {
        let holds = |prefix: &str| file.names().any(|name| name.starts_with(prefix));
        let prefix = nested.iter().copied().find(|prefix| holds(prefix)).unwrap_or_default();
        Self { path: path.to_owned(), source: Source::Torch(file), prefix }
    }

    /// An `.npz` file.
    pub fn npz(path: &Path) -> Result<Self> {
        Ok(Self { path: path.to_owned(), source: Source::Npz(NpzFile::open(path)?), prefix: "" })
    }

    /// The tensors' names, without the prefix.
    pub fn names(&self) -> Vec<&str> {
        let all: Vec<&str> = match &self.source {
            Source::Safetensors(shard) => shard.tensors.keys().map(String::as_str).collect(),
            Source::Torch(file) => file.names().collect(),
            Source::Npz(file) => file.names().collect(),
        };
        all.into_iter().filter_map(|name| name.strip_prefix(self.prefix)).collect()
    }

    /// Whether there is a tensor `name`.
    pub fn has(&self, name: &str) -> bool {
        self.names().contains(&name)
    }

    /// The first of `names` that is there; else the first of them.
    pub fn either<'a>(&self, names: &[&'a str]) -> &'a str {
        names.iter().copied().find(|name| self.has(name)).or(names.first().copied()).unwrap_or_default()
    }

    /// The shape of tensor `name`. Nothing is unpacked for it.
    pub fn shape(&self, name: &str) -> Result<Option<Vec<usize>>> {
        Ok(match &self.source {
            Source::Npz(file) => file.header(name)?.map(|header| header.shape),
            _ if !self.has(name) => None,
            _ => Some(self.get(name)?.shape),
        })
    }

    /// A tensor.
    fn get(&self, name: &str) -> Result<Stored> {
        let full = format!("{}{name}", self.prefix);
        let found = match &self.source {
            Source::Safetensors(Shard { tensors, bytes }) => match tensors.get(&full) {
                None => None,
                Some(entry) => {
                    let element = match entry.dtype {
                        Dtype::F64 => Element::F64,
                        Dtype::F32 => Element::F32,
                        Dtype::F16 => Element::F16,
                        Dtype::BF16 => Element::BF16,
                        Dtype::I64 => Element::I64,
                        Dtype::I32 => Element::I32,
                        Dtype::BOOL => Element::Bool,
                        other => return Err(self.wrong(name, "floats", format!("{other:?}"))),
                    };
                    Stored::row_major(element, entry.shape.clone(), bytes, entry.range.clone())
                }
            },
            Source::Torch(file) => file.get(&full).cloned(),
            Source::Npz(file) => file.get(&full)?,
        };
        found.ok_or_else(|| self.missing(name))
    }

    fn missing(&self, name: &str) -> Error {
        Error::new("an SAE's file lacks a tensor")
            .at_path(&self.path)
            .expected(cut(name))
            .found(list(&self.names()))
            .hint("is it complete, and of the kind that its configuration says?")
    }

    fn wrong(&self, name: &str, expected: impl std::fmt::Display, found: String) -> Error {
        Error::new(format!("tensor {} of an SAE is not what it should be", cut(name)))
            .at_path(&self.path)
            .expected(expected)
            .found(found)
    }

    /// A matrix `[F, D]`, or `[D, F]` where not `features_first`.
    pub fn matrix(&self, name: &str, features_first: bool) -> Result<FeatureMatrix> {
        let stored = self.get(name)?;
        let expected = if features_first { "floats [F, D]" } else { "floats [D, F]" };
        let wrong = || self.wrong(name, expected, format!("{:?} in {}", stored.shape, stored.element.name()));
        if stored.shape.len() != 2 || stored.len() == 0 {
            return Err(wrong());
        }
        let (tensor, transposed) = stored.plane().ok_or_else(wrong)??;
        Ok(FeatureMatrix { tensor, features_first: features_first != transposed })
    }

    /// The encoder and, of the same F and D, the decoder.
    pub fn matrices(
        &self,
        (encoder, encoder_first): (&str, bool),
        (decoder, decoder_first): (&str, bool),
    ) -> Result<(FeatureMatrix, FeatureMatrix)> {
        // Shapes first: what does not fit is not unpacked.
        let of = |name: &str, first: bool| -> Result<[usize; 2]> {
            match self.shape(name)?.ok_or_else(|| self.missing(name))?.as_slice() {
                &[rows, columns] if first => Ok([rows, columns]),
                &[rows, columns] => Ok([columns, rows]),
                other => Err(self.wrong(name, "a matrix", format!("{other:?}"))),
            }
        };
        let ([features, width], there) = (of(encoder, encoder_first)?, of(decoder, decoder_first)?);
        if there != [features, width] {
            let expected = if decoder_first { [features, width] } else { [width, features] };
            let found = if decoder_first { there } else { [there[1], there[0]] };
            return Err(self
                .wrong(decoder, format_args!("{expected:?}, as {} says", cut(encoder)), format!("{found:?}"))
                .hint(
                    "an SAE gives back what it is given. A transcoder, which gives another module's output or another \
                     width, cannot be used here",
                ));
        }
        Ok((self.matrix(encoder, encoder_first)?, self.matrix(decoder, decoder_first)?))
    }

    /// A vector of `len` finite numbers.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f64>> {
        if let Some(shape) = self.shape(name)?.filter(|shape| *shape != [len]) {
            return Err(self.wrong(name, format_args!("[{len}]"), format!("{shape:?}")));
        }
        let values: Vec<f64> = self.get(name)?.line().collect();
        match values.iter().position(|value| !value.is_finite()) {
            Some(at) => Err(self
                .wrong(name, "finite numbers", format!("{} at index {at}", values[at]))
                .hint("the SAE's training diverged, or the file is damaged")),
            None => Ok(values),
        }
    }

    /// A number that lies beside the dict of the tensors, where that is one of several.
    pub fn beside(&self, name: &str) -> Option<f64> {
        match &self.source {
            Source::Torch(file) if !self.prefix.is_empty() => file.numbers.get(name).copied(),
            _ => None,
        }
    }

    /// A number: a tensor of one element, or a plain number of a pickle.
    pub fn number(&self, name: &str) -> Result<Option<f64>> {
        if let Source::Torch(file) = &self.source
            && let Some(number) = file.numbers.get(&format!("{}{name}", self.prefix))
        {
            return Ok(Some(*number));
        }
        match self.shape(name)?.as_deref() {
            None => Ok(None),
            Some([] | [1]) => Ok(self.get(name)?.line().next()),
            Some(shape) => Err(self.wrong(name, "one number", format!("{shape:?}"))),
        }
    }
}

/// The first few names, in a message.
pub(super) fn list(names: &[&str]) -> String {
    if names.is_empty() {
        return "no tensors".to_owned();
    }
    let mut some: Vec<String> = names.iter().take(NAMED).map(|name| cut(name)).collect();
    if names.len() > NAMED {
        some.push(format!("and {} more", names.len() - NAMED));
    }
    some.join(", ")
}

/// float32s of what was computed in float64.
pub(super) fn narrow(values: Vec<f64>) -> Vec<f32> {
    values.into_iter().map(|value| value as f32).collect()
}

/// ‖W_j‖₂ of each feature's row. `[F]`
pub(super) fn norms(matrix: &FeatureMatrix) -> Vec<f64> {
    use half::{bf16, f16};
    use rayon::prelude::*;

    fn squares<const N: usize>(matrix: &FeatureMatrix, read: impl Fn([u8; N]) -> f32 + Sync) -> Vec<f64> {
        let (features, width) = (matrix.num_features(), matrix.width());
        let square = |value: f32| f64::from(value) * f64::from(value);
        let (elements, _) = matrix.tensor.bytes().as_chunks::<N>();
        if matrix.features_first {
            let rows = elements.par_chunks(width.max(1));
            return rows.map(|row| row.iter().map(|bytes| square(read(*bytes))).sum()).collect();
        }
        // A block of columns at a time: its sums stay in cache, and each adds up in the order of the rows.
        const BLOCK: usize = 2048;
        let mut sums = vec![0f64; features];
        sums.par_chunks_mut(BLOCK).enumerate().for_each(|(block, sums)| {
            for row in elements.chunks_exact(features) {
                let columns = row[block * BLOCK..].iter().zip(&mut *sums);
                columns.for_each(|(bytes, sum)| *sum += square(read(*bytes)));
            }
        });
        sums
    }

    let squares = match matrix.tensor.dtype {
        Kind::F32 => squares(matrix, f32::from_le_bytes),
        Kind::F16 => squares(matrix, |bytes| f16::from_le_bytes(bytes).to_f32()),
        Kind::BF16 => squares(matrix, |bytes| bf16::from_le_bytes(bytes).to_f32()),
    };
    squares.into_iter().map(f64::sqrt).collect()
}
