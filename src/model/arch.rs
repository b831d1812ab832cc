//! THE table of architectures: the only place in which their names occur.
//!
//! A row is data. What distinguishes one decoder from another is a value in its row (a bias, a window, a
//! default, a tensor name), never a branch elsewhere: `config` fills a [`Config`](super::Config) from a row
//! and a `config.json`, and the description of the model reads the tensor names.
//!
//! Defaults are those of `configuration_*.py` in Hugging Face transformers 5.23: they apply when a key is
//! *absent*. Sizes (hidden size, layers, heads, …) have defaults there too; here a file must state them.

mod tokenizers;

#[cfg(test)]
pub(crate) use tokenizers::A_REBUILDING_CLASS;
pub use tokenizers::{Normalizer, Splitter, TokenizerClass, tokenizer_class};

/// One architecture.
#[derive(Debug)]
pub struct Architecture {
    /// `model_type` of `config.json`.
    pub model_type: &'static str,
    /// Accepted entries of `architectures`: the classes with a language-model head.
    pub classes: &'static [&'static str],
    /// Which projections have a bias.
    pub biases: Biases,
    /// Sliding-window attention; `None` when no layer can have a window.
    pub window: Option<Window>,
    /// Values of absent keys.
    pub defaults: Defaults,
    /// Names of the tensors in a checkpoint.
    pub names: Names,
}

/// Which projections have a bias.
#[derive(Debug)]
pub struct Biases {
    /// The q, k and v projections.
    pub qkv: Bias,
    /// The attention's output projection.
    pub out: Bias,
    /// The three MLP projections.
    pub mlp: Bias,
}

/// Whether a projection has a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bias {
    /// In every model of the architecture.
    Always,
    /// In none.
    Never,
    /// As this boolean key says; absent means no.
    Key(&'static str),
}

/// How the attention windows of the layers follow from `config.json`.
///
/// `layer_types` decides layer by layer where the file has it. Otherwise layer l has a window when the switch
/// (if there is one) is on and l is not below the first layer. `sliding_window: null` means no window.
#[derive(Debug)]
pub struct Window {
    /// Width in tokens when `sliding_window` is absent.
    pub width: usize,
    /// Boolean key without which there is no window at all; absent means off.
    pub switch: Option<&'static str>,
    /// Key of the first layer with a window, and its default. `None`: every layer has one.
    pub first_layer: Option<(&'static str, usize)>,
}

/// Values of absent keys.
#[derive(Debug)]
pub struct Defaults {
    /// K; `None` means H. (`num_key_value_heads: null` always means H.)
    pub num_kv_heads: Option<usize>,
    /// Added to the mean square in every RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Longest sample, in tokens.
    pub max_position_embeddings: usize,
    /// Nonlinearity of the MLP.
    pub hidden_act: &'static str,
    /// Whether the output head is the embedding table.
    pub tie_word_embeddings: bool,
}

/// Module paths in a checkpoint; `{layer}` stands for the layer number from 0. [`weight`] and [`bias`] make
/// tensor names of them.
#[derive(Debug, PartialEq)]
pub struct Names {
    /// Embedding table, weight `[V, D]`.
    pub embed_tokens: &'static str,
    /// Norm before attention, weight `[D]`.
    pub attn_norm: &'static str,
    /// Query projection, weight `[H·Hd, D]`.
    pub q_proj: &'static str,
    /// Key projection, weight `[K·Hd, D]`.
    pub k_proj: &'static str,
    /// Value projection, weight `[K·Hd, D]`.
    pub v_proj: &'static str,
    /// Attention's output projection, weight `[D, H·Hd]`.
    pub o_proj: &'static str,
    /// Norm before the MLP, weight `[D]`.
    pub mlp_norm: &'static str,
    /// Gate projection (through the nonlinearity), weight `[I, D]`.
    pub gate_proj: &'static str,
    /// Up projection, weight `[I, D]`.
    pub up_proj: &'static str,
    /// Down projection, weight `[D, I]`.
    pub down_proj: &'static str,
    /// Norm after the last layer, weight `[D]`.
    pub final_norm: &'static str,
    /// Output head, weight `[V, D]`; absent when tied to the embedding table.
    pub lm_head: &'static str,
}

/// The names used by all rows so far.
const NAMES: Names = Names {
    embed_tokens: "model.embed_tokens",
    attn_norm: "model.layers.{layer}.input_layernorm",
    q_proj: "model.layers.{layer}.self_attn.q_proj",
    k_proj: "model.layers.{layer}.self_attn.k_proj",
    v_proj: "model.layers.{layer}.self_attn.v_proj",
    o_proj: "model.layers.{layer}.self_attn.o_proj",
    mlp_norm: "model.layers.{layer}.post_attention_layernorm",
    gate_proj: "model.layers.{layer}.mlp.gate_proj",
    up_proj: "model.layers.{layer}.mlp.up_proj",
    down_proj: "model.layers.{layer}.mlp.down_proj",
    final_norm: "model.norm",
    lm_head: "lm_head",
};

/// Every architecture the program knows.
pub static ARCHITECTURES: &[Architecture] = &[
    // Llama 2, 3.x, and what is saved in that form (Yi).
    Architecture {
        model_type: "llama",
        classes: &["LlamaForCausalLM"],
        // One key covers all four attention projections.
        biases: Biases {
            qkv: Bias::Key("attention_bias"),
            out: Bias::Key("attention_bias"),
            mlp: Bias::Key("mlp_bias"),
        },
        window: None,
        defaults: Defaults {
            num_kv_heads: None,
            rms_norm_eps: 1e-6,
            rope_theta: 1e4,
            max_position_embeddings: 2048,
            hidden_act: "silu",
            tie_word_embeddings: false,
        },
        names: NAMES,
    },
    // Mistral 7B, Zephyr. With `layer_types` transformers reads the file as "ministral", whose maths is this
    // row's with windows layer by layer.
    Architecture {
        model_type: "mistral",
        classes: &["MistralForCausalLM", "MinistralForCausalLM"],
        biases: Biases { qkv: Bias::Never, out: Bias::Never, mlp: Bias::Never },
        // The 4096 also holds where the key is absent: only `null` turns the window off.
        window: Some(Window { width: 4096, switch: None, first_layer: None }),
        defaults: Defaults {
            num_kv_heads: Some(8),
            rms_norm_eps: 1e-6,
            rope_theta: 1e4,
            max_position_embeddings: 131_072,
            hidden_act: "silu",
            tie_word_embeddings: false,
        },
        names: NAMES,
    },
    // Qwen2 and Qwen2.5.
    Architecture {
        model_type: "qwen2",
        classes: &["Qwen2ForCausalLM"],
        biases: Biases { qkv: Bias::Always, out: Bias::Never, mlp: Bias::Never },
        window: Some(Window {
            width: 4096,
            switch: Some("use_sliding_window"),
            first_layer: Some(("max_window_layers", 28)),
        }),
        defaults: Defaults {
            num_kv_heads: Some(32),
            rms_norm_eps: 1e-6,
            rope_theta: 1e4,
            max_position_embeddings: 32_768,
            hidden_act: "silu",
            tie_word_embeddings: false,
        },
        names: NAMES,
    },
];

/// Tensors, by the end of their name, that checkpoints hold and nobody needs to ask for: rotary frequencies
/// saved by old versions (they follow from the configuration), and the head, which is unasked-for when it is
/// tied to the embedding table or the run stops before it.
pub const UNNEEDED: &[&str] = &["rotary_emb.inv_freq", "lm_head.weight"];

/// The row of `model_type`.
pub fn find(model_type: &str) -> Option<&'static Architecture> {
    ARCHITECTURES.iter().find(|row| row.model_type == model_type)
}

/// The known values of `model_type`, for messages: `a, b, c`.
pub fn known() -> String {
    ARCHITECTURES.iter().map(|row| row.model_type).collect::<Vec<_>>().join(", ")
}

/// Name of the weight of the module at `path` (a field of [`Names`]) in `layer` (any number outside layers).
pub fn weight(path: &str, layer: usize) -> String {
    format!("{}.weight", path.replace("{layer}", &layer.to_string()))
}

/// Name of the bias of the module at `path` (a field of [`Names`]) in `layer`.
pub fn bias(path: &str, layer: usize) -> String {
    format!("{}.bias", path.replace("{layer}", &layer.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_distinct_and_found() {
        for row in ARCHITECTURES {
            assert_eq!(ARCHITECTURES.iter().filter(|r| r.model_type == row.model_type).count(), 1);
            assert!(std::ptr::eq(find(row.model_type).unwrap(), row));
            assert!(known().contains(row.model_type));
        }
        assert!(find("").is_none());
    }

    #[test]
    fn names_are_filled_in() {
        let names = &find("llama").unwrap().names;
        assert_eq!(weight(names.down_proj, 31), "model.layers.31.mlp.down_proj.weight");
        assert_eq!(bias(names.q_proj, 0), "model.layers.0.self_attn.q_proj.bias");
        assert_eq!(weight(names.embed_tokens, 0), "model.embed_tokens.weight");
        assert_eq!(weight(names.lm_head, 0), "lm_head.weight");
    }
}
