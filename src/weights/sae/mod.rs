//! Sparse autoencoders as their makers save them: every format becomes one [`SaeWeights`].
//!
//! A format is a folder with weights and a JSON configuration. Matrices stay where they lie, as views of mapped files;
//! what a format folds into them is folded into vectors here, in float64. The files must not be written to or truncated
//! while an [`Sae`] of them lives.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::ValueEnum;

use crate::error::{Error, Result};
use crate::model::sae::SaeWeights;
pub use find::{Found, enumerate, enumerate_listing, files_of};
pub use format::{Format, KNOWN, recognise};

mod config;
mod dictionary_learning;
mod find;
mod format;
mod gemma_scope;
mod layers;
mod llama_scope;
mod saelens;
mod sparsify;
mod tensors;

/// What a user can say about an SAE that its files do not.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SaeOptions {
    /// √D / mean‖x‖₂ over the training data: the factor of the input for SAEs that were trained on normalised
    /// activations without saying how (SAELens: `expected_average_only_in`). Positive.
    pub norm_scale: Option<f64>,
    /// What a feature's value means, for Llama Scope.
    pub llamascope_convention: LlamaScopeConvention,
}

/// Llama Scope's SAEs are read in more than one way: features differ in scale, and some fire in one that do not in the
/// other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LlamaScopeConvention {
    /// As its makers do: decoder rows have norm 1, and a feature fires where its value is above the threshold
    #[default]
    Native,
    /// As SAELens and Neuronpedia do: the norms of decoder rows are ignored
    Saelens,
}

impl LlamaScopeConvention {
    /// As the command line and the metadata say it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Saelens => "saelens",
        }
    }
}

/// One SAE, checked.
#[derive(Clone, Debug)]
pub struct Sae {
    /// What it computes.
    pub weights: SaeWeights,
    /// What its files say of it.
    pub about: About,
}

/// What an SAE's files say of it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct About {
    /// Library or release, and class: `dictionary_learning BatchTopKSAE`.
    pub family: String,
    /// The file of the weights.
    pub path: PathBuf,
    /// The site as the files call it: `mlp_out_layer_11`, `layers.10.mlp`, `blocks.8.hook_mlp_out`,
    /// `model.layers.3.post_feedforward_layernorm.output`.
    pub hook: Option<String>,
    /// The layer, from the configuration or else from the hook or the path.
    pub layer: Option<usize>,
    /// The model it was trained on.
    pub model_name: Option<String>,
    /// Features that should fire on a token: k.
    pub expected_l0: Option<f64>,
    /// Whether it was trained without the first token of texts (BOS), on which its features mean nothing.
    pub without_bos: bool,
    /// Which of several conventions its values follow, where there are several.
    pub convention: Option<String>,
    /// Whole sentences to tell the user.
    pub notes: Vec<String>,
}

/// Reads the SAE in a folder, or of a file of weights in it. Headers and vectors are read, and the decoder where its
/// norms are needed.
///
/// # Errors
/// It is no SAE of a known format, or one that gives no features of the kind described in [`crate::model::sae`]
/// (transcoders); files are missing or damaged; shapes do not fit; a vector is not finite.
pub fn open(path: &Path, options: &SaeOptions) -> Result<Sae> {
    let (format, folder, file) = format::locate(path)?;
    let mut sae = match format {
        Format::DictionaryLearning => dictionary_learning::open(&file),
        Format::Sparsify => sparsify::open(&folder),
        Format::SaeLens => saelens::open(&folder, options),
        Format::GemmaScope1 => gemma_scope::open_first(&file),
        Format::GemmaScope2 => gemma_scope::open_second(&folder),
        Format::LlamaScope => llama_scope::open(&folder, options.llamascope_convention),
        Format::Llamascopium | Format::QwenScope | Format::CircuitTracer => {
            Err(refusal(format, &folder).unwrap_or_else(|| refused(&folder, "it is not read")))
        }
    }?;
    // What the user said must not be dropped in silence.
    if options.norm_scale.is_some() && format != Format::SaeLens {
        sae.about.notes.push(UNUSED_SCALE.to_owned());
    }
    if options.llamascope_convention != LlamaScopeConvention::Native && format != Format::LlamaScope {
        sae.about
            .notes
            .push("--llamascope_convention changes nothing: this SAE is not of Llama Scope.".to_owned());
    }
    Ok(sae)
}

/// For SAEs that say how their input is scaled, or that it is not.
const UNUSED_SCALE: &str = "--sae_norm_scale changes nothing: this SAE does not ask for a scale.";

/// The error for a format that is known and not read; `None` for the others. `folder` need not be there.
pub fn refusal(format: Format, folder: &Path) -> Option<Error> {
    match format {
        Format::Llamascopium => Some(llama_scope::refuse_later(folder)),
        Format::QwenScope => Some(
            refused(folder, "Qwen-Scope's SAEs keep negative features: they have top-k without ReLU")
                .hint("features are taken to be positive here; use an SAE of another family"),
        ),
        Format::CircuitTracer => Some(transcoder(folder, "circuit-tracer's files are transcoders")),
        _ => None,
    }
}

/// Reads an SAE of dictionary_learning that is in memory: `ae.pt` and `config.json`. `file` stands for the former in
/// errors and in [`About`].
///
/// # Errors
/// As [`open`].
pub fn from_bytes(file: &Path, weights: &'static [u8], config: &[u8]) -> Result<Sae> {
    dictionary_learning::from_bytes(file, Arc::new(weights), config)
}

/// The error for an SAE that was recognised but cannot be used, and why.
fn refused(place: &Path, why: impl std::fmt::Display) -> Error {
    Error::new(format!("an SAE cannot be used: {why}")).at_path(place)
}

/// The error for a transcoder.
fn transcoder(place: &Path, why: impl std::fmt::Display) -> Error {
    refused(place, why).expected("an SAE, which reconstructs its own input").hint(
        "a transcoder computes a module's output from the module's input, so its features are not those of the value \
         that it would be given here: use an SAE of that output",
    )
}

/// The last folder in `path` that names a layer, and that layer.
fn named_in(path: &Path) -> Option<(String, usize)> {
    let names = path.components().rev().filter_map(|part| part.as_os_str().to_str());
    names.filter_map(|name| Some((name.to_owned(), layers::number(name)?))).next()
}
