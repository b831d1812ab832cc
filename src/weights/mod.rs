//! A checkpoint on disk as views over memory-mapped files: names → [`Tensor`]s, nothing copied.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::model::arch;
use crate::model::{Dtype, Tensor, WeightSpec};
use folder::Layout;
pub use folder::{SINGLE, entry, is_bare, no_weights, shards};
use mapped::Bytes;
use safetensors::{Entry, Shard, cut};

mod archive;
mod folder;
mod mapped;
mod npz;
mod pickle;
pub mod sae;
mod safetensors;
mod stored;
mod torch_zip;

/// How many wrong tensors or leftovers a message names.
const NAMED: usize = 10;

/// A model's weights, opened and checked, not yet read.
///
/// The files must not be written to or truncated while a `Checkpoint` or any [`Tensor`] of it lives: they are
/// mapped, so the change would show in the numbers or kill the process.
pub struct Checkpoint {
    /// The folder, or the name of embedded data.
    place: PathBuf,
    shards: Vec<Bytes>,
    /// Name → number in `shards`, and where in it.
    tensors: BTreeMap<String, (usize, Entry)>,
}

impl Checkpoint {
    /// Opens the checkpoint in `folder`: `model.safetensors`, or `model.safetensors.index.json` with every
    /// shard it names. Only headers are read.
    ///
    /// # Errors
    /// No safetensors in the folder; a file that is missing, truncated or otherwise damaged; an index that is
    /// no index, leaves the folder, or names a tensor its shard does not hold.
    pub fn open(folder: &Path) -> Result<Self> {
        let mut checkpoint = Self { place: folder.to_owned(), shards: Vec::new(), tensors: BTreeMap::new() };
        match folder::look(folder)? {
            Layout::Single(name) => checkpoint.add_all(Shard::open(&folder.join(name))?),
            Layout::Sharded(index) => checkpoint.add_listed(folder, index)?,
        }
        Ok(checkpoint)
    }

    /// A checkpoint of one safetensors file in memory; `name` stands for it in errors.
    ///
    /// # Errors
    /// The data are damaged.
    pub fn from_bytes(name: &str, bytes: &'static [u8]) -> Result<Self> {
        let place = PathBuf::from(name);
        let shard = Shard::parse(&place, Arc::new(bytes))?;
        let mut checkpoint = Self { place, shards: Vec::new(), tensors: BTreeMap::new() };
        checkpoint.add_all(shard);
        Ok(checkpoint)
    }

    fn add_all(&mut self, shard: Shard) {
        let number = self.shards.len();
        self.shards.push(shard.bytes);
        self.tensors.extend(shard.tensors.into_iter().map(|(name, entry)| (name, (number, entry))));
    }

    /// Adds the tensors of an index from the shards it says. What else the shards hold is not the model's.
    fn add_listed(&mut self, folder: &Path, index: BTreeMap<String, String>) -> Result<()> {
        let mut by_file: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (tensor, file) in index {
            by_file.entry(file).or_default().push(tensor);
        }
        for (file, tensors) in by_file {
            let path = folder.join(&file);
            let mut shard = Shard::open(&path)?;
            let number = self.shards.len();
            for tensor in tensors {
                let Some(entry) = shard.tensors.remove(&tensor) else {
                    return Err(Error::new("a shard lacks a tensor that the index says it holds")
                        .at_path(&path)
                        .expected(format_args!("tensor {}", cut(&tensor)))
                        .found("no tensor of this name")
                        .hint("index and shards are of different downloads: fetch the model again"));
                };
                self.tensors.insert(tensor, (number, entry));
            }
            self.shards.push(shard.bytes);
        }
        Ok(())
    }

    /// The tensors of `specs`, in their order. A name may be asked for twice; the bytes are shared.
    ///
    /// # Errors
    /// All tensors that are missing, have another shape, or are not float32, float16 or bfloat16, in one
    /// message that names the first few.
    pub fn load(&self, specs: &[WeightSpec]) -> Result<Vec<Tensor>> {
        let mut tensors = Vec::with_capacity(specs.len());
        let mut problems = Vec::new();
        for spec in specs {
            match self.find(spec) {
                Ok(tensor) => tensors.push(tensor),
                Err(found) => problems.push((spec, found)),
            }
        }
        if problems.is_empty() {
            return Ok(tensors);
        }
        let mut lines: Vec<String> = problems
            .iter()
            .take(NAMED)
            .map(|(spec, found)| match &spec.elsewhere {
                None => format!("{}: expected {:?}, found {found}", spec.name, spec.shape),
                Some(elsewhere) => format!(
                    "{} (or {}): expected {:?} (or {:?}), found {found}",
                    spec.name, elsewhere.name, spec.shape, elsewhere.shape
                ),
            })
            .collect();
        if problems.len() > NAMED {
            lines.push(format!("and {} more", problems.len() - NAMED));
        }
        let error = Error::new(format!(
            "the checkpoint does not fit the model: {} of {} tensors are missing or different",
            problems.len(),
            specs.len()
        ))
        .at_path(&self.place)
        .expected("float32, float16 or bfloat16 tensors of the names and shapes that config.json implies")
        .found(lines.join("\n"));
        Err(match problems.iter().take(NAMED).find_map(|(spec, _)| {
            let elsewhere = spec.elsewhere.as_ref().and_then(|elsewhere| self.other_prefix(&elsewhere.name));
            self.other_prefix(&spec.name).or(elsewhere)
        }) {
            Some(name) => error.hint(format_args!(
                "the checkpoint has a tensor {}: its names have another prefix. Save it again from a causal \
                 language model: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)",
                cut(name)
            )),
            None => error.hint("check that config.json and the weights are of the same model"),
        })
    }

    /// The tensor of `spec`, or what is there instead.
    fn find(&self, spec: &WeightSpec) -> Result<Tensor, String> {
        let (name, shape, first) = match &spec.elsewhere {
            Some(elsewhere) if !self.tensors.contains_key(&spec.name) => {
                (&elsewhere.name, &elsewhere.shape, elsewhere.first)
            }
            _ => (&spec.name, &spec.shape, 0),
        };
        let (shard, entry) = self.tensors.get(name).ok_or("nothing")?;
        let dtype = match entry.dtype {
            ::safetensors::Dtype::F32 => Some(Dtype::F32),
            ::safetensors::Dtype::F16 => Some(Dtype::F16),
            ::safetensors::Dtype::BF16 => Some(Dtype::BF16),
            _ => None,
        };
        dtype
            .filter(|_| entry.shape == *shape)
            .zip(self.shards.get(*shard))
            .and_then(|(dtype, bytes)| {
                Tensor::new(dtype, entry.shape.clone(), Arc::clone(bytes), entry.range.clone())
            })
            .and_then(|tensor| tensor.part(first, &spec.shape))
            .ok_or_else(|| match name == &spec.name {
                true => format!("{:?} in {}", entry.shape, dtype_name(dtype, entry)),
                false => format!(
                    "{name} of {:?} in {}, and not of {shape:?}",
                    entry.shape,
                    dtype_name(dtype, entry)
                ),
            })
    }

    /// A tensor of the checkpoint whose name is `wanted` but for a prefix.
    fn other_prefix(&self, wanted: &str) -> Option<&str> {
        let longer =
            |long: &str, short: &str| long.strip_suffix(short).is_some_and(|rest| rest.ends_with('.'));
        // `weight` alone is the end of every name: a prefix is only meant where a module is left.
        let names = self.tensors.keys().filter(|name| name.contains('.'));
        names.map(String::as_str).find(|name| longer(name, wanted) || longer(wanted, name))
    }

    /// The names of the checkpoint's tensors that are not in `specs`, sorted, without those that are known to
    /// be superfluous (saved rotary frequencies, a tied head). The model is computed without them: a plan
    /// should mention them, because biases or adapters may be among them.
    pub fn unused(&self, specs: &[WeightSpec]) -> Vec<&str> {
        let mut asked = HashSet::new();
        for spec in specs {
            // Where there is one under its own name, another is left over.
            let elsewhere = spec.elsewhere.as_ref().filter(|_| !self.tensors.contains_key(&spec.name));
            asked.insert(elsewhere.map_or(spec.name.as_str(), |elsewhere| elsewhere.name.as_str()));
        }
        let superfluous = |name: &str| arch::UNNEEDED.iter().any(|ending| name.ends_with(ending));
        self.tensors
            .keys()
            .map(String::as_str)
            .filter(|name| !asked.contains(name) && !superfluous(name))
            .collect()
    }

    /// Size of all tensors as stored, in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|(_, entry)| entry.range.len() as u64).sum()
    }
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (files, tensors) = (self.shards.len(), self.tensors.len());
        write!(f, "Checkpoint({}, {files} files, {tensors} tensors)", self.place.display())
    }
}

fn dtype_name(dtype: Option<Dtype>, entry: &Entry) -> String {
    dtype.map_or_else(|| format!("{:?}, which is not supported", entry.dtype), |dtype| dtype.to_string())
}
