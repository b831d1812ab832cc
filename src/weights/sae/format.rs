//! Which format a folder holds.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};

/// Who saved an SAE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// saprmarks/dictionary_learning: `ae.pt`, `config.json`.
    DictionaryLearning,
    /// EleutherAI/sparsify: `sae.safetensors`, `cfg.json`.
    Sparsify,
    /// SAELens: `sae_weights.safetensors`, `cfg.json`.
    SaeLens,
    /// Gemma Scope: `params.npz`.
    GemmaScope1,
    /// Gemma Scope 2: `params.safetensors`, `config.json`.
    GemmaScope2,
    /// Llama Scope: `checkpoints/final.safetensors`, `hyperparams.json`.
    LlamaScope,
    /// llamascopium and Llama Scope R1: `sae_weights.safetensors`, `config.json`. Not read.
    Llamascopium,
    /// Qwen-Scope: `layer3.sae.pt`. Not read.
    QwenScope,
    /// Transcoders of circuit-tracer: `layer_3.safetensors`. Not read.
    CircuitTracer,
}

/// Files of weights that say by their name what they are.
pub(super) const AE: &str = "ae.pt";
pub(super) const SPARSIFY: &str = "sae.safetensors";
pub(super) const SAE_WEIGHTS: &str = "sae_weights.safetensors";
pub(super) const GEMMA_1: &str = "params.npz";
pub(super) const GEMMA_2: &str = "params.safetensors";
pub(super) const LLAMA_FINAL: &str = "checkpoints/final.safetensors";
/// Configurations.
pub(super) const CFG: &str = "cfg.json";
pub(super) const CONFIG: &str = "config.json";
pub(super) const HYPERPARAMS: &str = "hyperparams.json";

/// What is looked for, in a message.
pub const KNOWN: &str = "ae.pt and config.json (dictionary_learning), sae.safetensors and cfg.json (sparsify), \
    sae_weights.safetensors and cfg.json (SAELens), params.npz (Gemma Scope), params.safetensors and config.json \
    (Gemma Scope 2), or hyperparams.json and checkpoints/final.safetensors (Llama Scope)";
/// How many names a message lists.
const NAMED: usize = 15;

impl Format {
    /// By the names of a folder's files, those in `checkpoints/` among them.
    pub(super) fn of(names: &BTreeSet<&str>) -> Option<Self> {
        let has = |name: &str| names.contains(name);
        let numbered = |start: &str, end: &str| {
            let number = |name: &str| {
                let number = name.strip_prefix(start).and_then(|name| name.strip_suffix(end));
                number.is_some_and(|number| {
                    !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
                })
            };
            names.iter().any(|name| number(name))
        };
        Some(match () {
            () if has(SPARSIFY) => Self::Sparsify,
            () if has(SAE_WEIGHTS) && (has(CFG) || !has(CONFIG)) => Self::SaeLens,
            () if has(HYPERPARAMS) || has(LLAMA_FINAL) => Self::LlamaScope,
            () if has(SAE_WEIGHTS) => Self::Llamascopium,
            () if has(GEMMA_2) => Self::GemmaScope2,
            () if has(GEMMA_1) => Self::GemmaScope1,
            () if has(AE) => Self::DictionaryLearning,
            () if numbered("layer", ".sae.pt") => Self::QwenScope,
            () if numbered("layer_", ".safetensors") => Self::CircuitTracer,
            () => return None,
        })
    }

    /// The files of an SAE of this format, weights first. The configuration is last.
    pub(super) fn files(self) -> &'static [&'static str] {
        match self {
            Self::DictionaryLearning => &[AE, CONFIG],
            Self::Sparsify => &[SPARSIFY, CFG],
            Self::SaeLens => &[SAE_WEIGHTS, CFG],
            Self::GemmaScope1 => &[GEMMA_1],
            Self::GemmaScope2 => &[GEMMA_2, CONFIG],
            Self::LlamaScope => &[LLAMA_FINAL, HYPERPARAMS],
            Self::Llamascopium => &[SAE_WEIGHTS, CONFIG],
            Self::QwenScope | Self::CircuitTracer => &[],
        }
    }
}

/// The format of the SAE that lies in `folder` itself, by the names of its files; `None` where there is none.
///
/// # Errors
/// The folder cannot be read.
pub fn recognise(folder: &Path) -> Result<Option<Format>> {
    let names = names(folder)?;
    Ok(Format::of(&names.iter().map(String::as_str).collect()))
}

/// The names of what lies in `folder`, and below `checkpoints/` in it.
pub(super) fn names(folder: &Path) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    let what = "cannot read a folder";
    for entry in std::fs::read_dir(folder).context_path(what, folder)? {
        names.extend(entry.context_path(what, folder)?.file_name().into_string());
    }
    if folder.join(LLAMA_FINAL).exists() {
        names.insert(LLAMA_FINAL.to_owned());
    }
    Ok(names)
}

/// The format, the folder and the file of weights of the SAE at `path`, a folder or a file.
pub(super) fn locate(path: &Path) -> Result<(Format, PathBuf, PathBuf)> {
    if path.is_dir() {
        let names = names(path)?;
        let format =
            Format::of(&names.iter().map(String::as_str).collect()).ok_or_else(|| unknown(path, &names))?;
        let file = format.files().first().map_or_else(|| path.to_owned(), |name| path.join(name));
        return Ok((format, path.to_owned(), file));
    }
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let folder = path.parent().unwrap_or(Path::new(""));
    if !path.exists() {
        return Err(Error::new("there is no such SAE")
            .at_path(path)
            .expected("a folder, or a file of weights")
            .found(match names(folder) {
                Ok(names) => format!("in its parent: {}", list(&names)),
                Err(_) => "nothing, nor its parent".to_owned(),
            }));
    }
    let up = || folder.parent().unwrap_or(Path::new(""));
    let (format, folder) = match name {
        SPARSIFY => (Format::Sparsify, folder),
        GEMMA_2 => (Format::GemmaScope2, folder),
        HYPERPARAMS => (Format::LlamaScope, folder),
        _ if path.ends_with(LLAMA_FINAL) => (Format::LlamaScope, up()),
        SAE_WEIGHTS | CFG | CONFIG => {
            return locate(if folder.as_os_str().is_empty() { Path::new(".") } else { folder });
        }
        _ if name.ends_with(".npz") => (Format::GemmaScope1, folder),
        _ if name.ends_with(".sae.pt") => (Format::QwenScope, folder),
        _ if name.ends_with(".pt") || name.ends_with(".pth") => (Format::DictionaryLearning, folder),
        _ => return Err(unknown(path, &BTreeSet::from([name.to_owned()]))),
    };
    Ok((format, folder.to_owned(), path.to_owned()))
}

fn unknown(place: &Path, names: &BTreeSet<String>) -> Error {
    Error::new("no SAE of a known format is here")
        .at_path(place)
        .expected(KNOWN)
        .found(list(names))
        .hint("name the folder of one SAE, or one with such folders below it")
}

fn list(names: &BTreeSet<String>) -> String {
    if names.is_empty() {
        return "nothing".to_owned();
    }
    let mut some: Vec<String> = names.iter().take(NAMED).cloned().collect();
    if names.len() > NAMED {
        some.push(format!("and {} more", names.len() - NAMED));
    }
    some.join(", ")
}
