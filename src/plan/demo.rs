//! The demo's model, tokenizer and corpus, embedded so that `gradlens demo` works wherever the program does.

use super::Plan;
use super::checkpoint::ModelFiles;

impl Plan {
    /// Whether this is the plan of `gradlens demo`, which explains more than other runs do.
    pub fn is_demo(&self) -> bool {
        matches!(self.files, ModelFiles::Embedded(_))
    }
}

/// A checkpoint and a corpus inside the program.
#[derive(Clone, Copy, Debug)]
pub struct Embedded {
    /// What stands for a folder in messages and metadata.
    pub name: &'static str,
    /// config.json.
    pub config: &'static str,
    /// tokenizer.json.
    pub tokenizer: &'static [u8],
    /// tokenizer_config.json.
    pub tokenizer_config: &'static [u8],
    /// model.safetensors.
    pub weights: &'static [u8],
    /// Name of the corpus file; its ending tells the format.
    pub corpus_name: &'static str,
    /// The corpus.
    pub corpus: &'static [u8],
}

/// See `assets/demo/README.md`.
pub const DEMO: Embedded = Embedded {
    name: "demo",
    config: include_str!("../../assets/demo/config.json"),
    tokenizer: include_bytes!("../../assets/demo/tokenizer.json"),
    tokenizer_config: include_bytes!("../../assets/demo/tokenizer_config.json"),
    weights: include_bytes!("../../assets/demo/model.safetensors"),
    corpus_name: "corpus.jsonl",
    corpus: include_bytes!("../../assets/demo/corpus.jsonl"),
};
