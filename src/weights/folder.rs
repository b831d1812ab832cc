//! Which files of a model's folder hold its weights.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::fs;
use std::io::Read;
use std::path::{Component, Path};

use serde::Deserialize;

use super::safetensors::cut;
use crate::error::{Context, Error, Result};

/// The only file of a small checkpoint. It goes before an index, as in transformers.
pub const SINGLE: &str = "model.safetensors";
/// The table of a sharded checkpoint.
const INDEX: &str = "model.safetensors.index.json";
/// Largest index that is read, in bytes; that of a model with 10^5 tensors has a tenth of it.
const MAX_INDEX_BYTES: u64 = 100_000_000;

/// The file that stands for a checkpoint's weights among those that `has` knows: the only one, or the index of
/// several.
pub fn entry(has: impl Fn(&str) -> bool) -> Option<&'static str> {
    [SINGLE, INDEX].into_iter().find(|name| has(name))
}

/// The names of the files behind an [`entry`] that lies in `folder`.
///
/// # Errors
/// An index that is none.
pub fn shards(folder: &Path, entry: &str) -> Result<Vec<String>> {
    if entry != INDEX {
        return Ok(vec![entry.to_owned()]);
    }
    let files: BTreeSet<String> = read_index(&folder.join(INDEX))?.into_values().collect();
    Ok(files.into_iter().collect())
}

/// What a folder holds.
pub(super) enum Layout {
    /// One file of this name.
    Single(&'static str),
    /// Tensor name → file name, every one a plain name inside the folder.
    Sharded(BTreeMap<String, String>),
}

/// Looks into `folder`.
pub(super) fn look(folder: &Path) -> Result<Layout> {
    if !folder.is_dir() {
        return Err(Error::new("there is no such model folder")
            .at_path(folder)
            .expected("a folder with config.json and safetensors files")
            .found(if folder.exists() { "a file" } else { "nothing" }));
    }
    // `symlink_metadata`, because a dangling link deserves its own message at opening.
    match entry(|name| folder.join(name).symlink_metadata().is_ok()) {
        Some(SINGLE) => Ok(Layout::Single(SINGLE)),
        Some(index) => read_index(&folder.join(index)).map(Layout::Sharded),
        None => {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            Err(no_weights(
                folder.display(),
                entries.filter_map(|entry| entry.file_name().into_string().ok()),
            ))
        }
    }
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }

    let what = "cannot read the index of a sharded checkpoint";
    let about = fs::metadata(path).context_path(what, path)?;
    if !about.is_file() || about.len() > MAX_INDEX_BYTES {
        return Err(Error::new(what)
            .at_path(path)
            .expected(format_args!("a file of at most {MAX_INDEX_BYTES} bytes"))
            .found(if about.is_file() { format!("{} bytes", about.len()) } else { "no file".to_owned() }));
    }
    let mut text = Vec::new();
    // The limit again: the file may have grown since.
    fs::File::open(path)
        .and_then(|file| file.take(MAX_INDEX_BYTES).read_to_end(&mut text))
        .context_path(what, path)?;
    let Index { weight_map } = serde_json::from_slice(&text)
        .context_path("the index of a sharded checkpoint is not what it should be", path)
        .map_err(|error| {
            error
                .expected("JSON with a weight_map of tensor names to file names")
                .hint("the download may be incomplete: fetch the file again")
        })?;
    let outside = |file: &str| {
        let mut parts = Path::new(file).components();
        !matches!((parts.next(), parts.next()), (Some(Component::Normal(name)), None) if name == file)
    };
    if let Some((tensor, file)) = weight_map.iter().find(|(_, file)| outside(file)) {
        return Err(Error::new("the index of a sharded checkpoint names a file outside its folder")
            .at_path(path)
            .expected("a plain file name")
            .found(format_args!("{} for tensor {}", cut(file), cut(tensor))));
    }
    if weight_map.is_empty() {
        return Err(Error::new("the index of a sharded checkpoint lists no tensor").at_path(path));
    }
    Ok(weight_map)
}

/// Whether a file of this name may hold weights, of a kind that can be read or not.
fn may_hold_weights(name: &str) -> bool {
    const ENDINGS: &[&str] = &["safetensors", "index.json", "bin", "pt", "pth", "gguf", "h5", "msgpack"];
    ENDINGS.iter().any(|ending| name.ends_with(&format!(".{ending}")))
}

/// Whether a folder holds no file of weights at all, not even one that cannot be read.
pub fn is_bare(folder: &Path) -> bool {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name()).all(|name| !may_hold_weights(&name.to_string_lossy()))
}

/// The error for a place without safetensors, with advice after the names of what is there instead.
pub fn no_weights(place: impl Display, names: impl Iterator<Item = String>) -> Error {
    let weights: BTreeSet<String> =
        names.filter(|name| may_hold_weights(name) && !name.ends_with(".json")).collect();
    let any = |ending: &str| weights.iter().any(|name| name.ends_with(ending));
    let hint = if weights.iter().any(|name| name.starts_with("model-") && name.ends_with(".safetensors")) {
        "these look like shards: fetch model.safetensors.index.json too"
    } else if any("adapter_model.safetensors") {
        "this is an adapter: merge it into its base model and save that"
    } else if any(".bin") || any(".pt") || any(".pth") {
        "convert once in Python: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
    } else if any(".gguf") {
        "gguf files are quantised: use the model's original repository"
    } else {
        "fetch the model's safetensors files"
    };
    let mut found: Vec<String> = weights.iter().take(10).cloned().collect();
    if weights.len() > found.len() {
        found.push(format!("and {} more", weights.len() - found.len()));
    }
    Error::new("the model has no weights that can be read")
        .at(place)
        .expected(format_args!("{SINGLE}, or {INDEX} with its shards"))
        .found(if found.is_empty() { "neither, nor any other weights".to_owned() } else { found.join(", ") })
        .hint(hint)
}
