//! The tokenizer classes of the known architectures, part of the one table.

/// How text is cut into words before byte-pair merging, for a tokenizer class that ignores tokenizer.json's own rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Splitter {
    /// Spaces become `▁`, one is put in front; nothing is cut. `legacy` in tokenizer_config.json puts one after
    /// every special token too, where `knows_legacy`.
    Metaspace {
        /// Whether the class reads the `legacy` switch.
        knows_legacy: bool,
    },
    /// Cut by this pattern, then each byte becomes a printable character.
    PatternThenBytes(&'static str),
    /// GPT-2's pattern, then each byte becomes a printable character.
    Bytes,
    /// Cut after each space.
    Spaces,
}

/// What happens to the text first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Normalizer {
    /// Nothing.
    Keep,
    /// Unicode composition (NFC).
    Compose,
    /// Spaces become `▁`.
    Underline,
}

/// A tokenizer class of transformers (5.x) that takes vocabulary, merges and post-processor from tokenizer.json
/// but builds everything else itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenizerClass {
    /// Its name in tokenizer_config.json, without `Fast`.
    pub name: &'static str,
    /// What it does to the text first.
    pub normalizer: Normalizer,
    /// How it cuts the text.
    pub splitter: Splitter,
    /// `add_prefix_space` where the configuration does not say.
    pub prefix_space: bool,
    /// Consecutive unknown characters are one unknown token.
    pub fuse_unk: bool,
    /// Unknown characters become their bytes' tokens `<0x..>`.
    pub byte_fallback: bool,
    /// The model is told the unknown token; without it unknown characters vanish.
    pub names_unk: bool,
    /// The post-processor is replaced by one that adds the bos token.
    pub forces_bos: bool,
    /// Special tokens take no spaces beside them, whatever the files say.
    pub plain_specials: bool,
    /// Special tokens it has where the configuration does not name them.
    pub specials: &'static [(&'static str, &'static str)],
}

const SPM_SPECIALS: &[(&str, &str)] = &[("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")];
const END: &str = "<|endoftext|>";

/// The tokenizer classes that rebuild themselves. Every other class takes tokenizer.json as it stands.
const TOKENIZER_CLASSES: &[TokenizerClass] = &[
    TokenizerClass {
        name: "LlamaTokenizer",
        normalizer: Normalizer::Keep,
        splitter: Splitter::Metaspace { knows_legacy: true },
        prefix_space: true,
        fuse_unk: true,
        byte_fallback: true,
        names_unk: false,
        forces_bos: false,
        plain_specials: false,
        specials: SPM_SPECIALS,
    },
    TokenizerClass {
        name: "CodeLlamaTokenizer",
        normalizer: Normalizer::Keep,
        splitter: Splitter::Metaspace { knows_legacy: false },
        prefix_space: true,
        fuse_unk: true,
        byte_fallback: true,
        names_unk: true,
        forces_bos: true,
        plain_specials: false,
        specials: &[
            SPM_SPECIALS[0],
            SPM_SPECIALS[1],
            SPM_SPECIALS[2],
            ("prefix_token", "▁<PRE>"),
            ("middle_token", "▁<MID>"),
            ("suffix_token", "▁<SUF>"),
            ("eot_token", "▁<EOT>"),
            ("fill_token", "<FILL_ME>"),
        ],
    },
    TokenizerClass {
        name: "GemmaTokenizer",
        normalizer: Normalizer::Underline,
        splitter: Splitter::Spaces,
        prefix_space: false,
        fuse_unk: true,
        byte_fallback: true,
        names_unk: true,
        forces_bos: false,
        plain_specials: false,
        specials: &[
            ("bos_token", "<bos>"),
            ("eos_token", "<eos>"),
            ("unk_token", "<unk>"),
            ("pad_token", "<pad>"),
            ("mask_token", "<mask>"),
        ],
    },
    TokenizerClass {
        name: "Qwen2Tokenizer",
        normalizer: Normalizer::Compose,
        splitter: Splitter::PatternThenBytes(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        prefix_space: false,
        fuse_unk: false,
        byte_fallback: false,
        names_unk: false,
        forces_bos: false,
        plain_specials: true,
        specials: &[("eos_token", END), ("unk_token", END), ("pad_token", END)],
    },
    TokenizerClass {
        name: "GPT2Tokenizer",
        normalizer: Normalizer::Keep,
        splitter: Splitter::Bytes,
        prefix_space: false,
        fuse_unk: false,
        byte_fallback: false,
        names_unk: false,
        forces_bos: false,
        plain_specials: false,
        specials: &[("bos_token", END), ("eos_token", END), ("unk_token", END)],
    },
];

/// `model_type` of config.json → the tokenizer class transformers registers for it (`None`: tokenizer.json as it
/// stands), and whether that class wins over the one that tokenizer_config.json names.
const MODEL_TOKENIZERS: &[(&str, Option<&str>, bool)] = &[
    ("mistral", None, false),
    ("mixtral", None, false),
    ("qwen2", Some("Qwen2Tokenizer"), true),
    ("qwen2_moe", Some("Qwen2Tokenizer"), false),
    ("qwen3", Some("Qwen2Tokenizer"), false),
    ("qwen3_moe", Some("Qwen2Tokenizer"), false),
    ("gemma", Some("GemmaTokenizer"), false),
    ("gemma2", Some("GemmaTokenizer"), false),
    ("gemma3", Some("GemmaTokenizer"), false),
    ("gemma3_text", Some("GemmaTokenizer"), false),
    ("phi3", None, true),
    ("stablelm", None, false),
    ("code_llama", Some("CodeLlamaTokenizer"), false),
    ("gpt2", Some("GPT2Tokenizer"), false),
];

/// The class that transformers' AutoTokenizer would build for a folder with a tokenizer.json, or `None` where it
/// takes that file as it stands.
///
/// `class` is `tokenizer_class` of tokenizer_config.json (or else of config.json), `byte_level` whether
/// tokenizer.json mentions `"ByteLevel"`, `own_code` whether tokenizer_config.json points at a Python file.
pub fn tokenizer_class(
    class: Option<&str>,
    model_type: Option<&str>,
    byte_level: bool,
    own_code: bool,
) -> Option<&'static TokenizerClass> {
    fn bare(name: &str) -> &str {
        name.strip_suffix("Fast").unwrap_or(name)
    }
    let named = |name: &str| TOKENIZER_CLASSES.iter().find(|known| known.name == bare(name));
    let row = MODEL_TOKENIZERS.iter().find(|row| Some(row.0) == model_type);
    match (class, row) {
        // Some byte-level vocabularies call themselves by the name of a class that would cut them at `▁`.
        (Some(class), row)
            if !own_code
                && byte_level
                && bare(class) == "LlamaTokenizer"
                && !row.is_some_and(|&(_, _, wins)| wins) =>
        {
            None
        }
        (Some(class), Some(&(_, registered, wins))) if !own_code && registered != Some(bare(class)) => {
            registered.and_then(|registered| named(if wins { registered } else { class }))
        }
        (Some(class), _) => named(class),
        (None, Some(&(_, registered, _))) => registered.and_then(named),
        (None, None) => None,
    }
}

/// A class that puts a space in front of texts, for tests elsewhere, which know no names.
#[cfg(test)]
pub(crate) const A_REBUILDING_CLASS: &str = "LlamaTokenizerFast";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokenizer_classes_are_those_of_autotokenizer() {
        // tokenizer_class, model_type, "ByteLevel" in tokenizer.json, own code: what transformers 5.24 builds.
        for (class, model_type, byte_level, own_code, expected) in [
            (Some("LlamaTokenizer"), Some("llama"), false, false, Some("LlamaTokenizer")),
            (Some("LlamaTokenizerFast"), Some("llama"), false, false, Some("LlamaTokenizer")),
            (Some("LlamaTokenizerFast"), Some("llama"), true, false, None),
            (Some("LlamaTokenizerFast"), Some("qwen2"), true, false, Some("Qwen2Tokenizer")),
            (Some("LlamaTokenizer"), Some("qwen2"), true, true, Some("LlamaTokenizer")),
            (Some("LlamaTokenizer"), Some("mistral"), false, false, None),
            (Some("LlamaTokenizer"), Some("mixtral"), false, false, None),
            (Some("LlamaTokenizer"), Some("gemma2"), false, false, Some("LlamaTokenizer")),
            (Some("PreTrainedTokenizerFast"), Some("llama"), true, false, None),
            (Some("PreTrainedTokenizerFast"), Some("qwen3"), true, false, None),
            (Some("PreTrainedTokenizerFast"), Some("qwen2"), true, false, Some("Qwen2Tokenizer")),
            (Some("TokenizersBackend"), Some("gemma2"), false, false, None),
            (Some("Qwen2TokenizerFast"), Some("qwen3"), true, false, Some("Qwen2Tokenizer")),
            (Some("GemmaTokenizerFast"), Some("gemma2"), false, false, Some("GemmaTokenizer")),
            (Some("LlamaTokenizer"), Some("phi3"), false, false, None),
            (None, Some("llama"), false, false, None),
            (None, Some("qwen2"), true, false, Some("Qwen2Tokenizer")),
            (None, None, false, false, None),
            (Some("CodeLlamaTokenizer"), None, false, false, Some("CodeLlamaTokenizer")),
        ] {
            let found = tokenizer_class(class, model_type, byte_level, own_code).map(|class| class.name);
            assert_eq!(found, expected, "{class:?} {model_type:?} {byte_level} {own_code}");
        }
    }
}
