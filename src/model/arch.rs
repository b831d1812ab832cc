//! THE table of architectures: the only place in which their names occur.
//!
//! A row is data. What distinguishes one decoder from another is a value in its row (a bias, a window, a
//! default, a tensor name), never a branch elsewhere: `config` fills a [`Config`](super::Config) from a row
//! and a `config.json`, and the description of the model reads the tensor names.
//!
//! Defaults are those of `configuration_*.py` in Hugging Face transformers 5.24: they apply when a key is
//! *absent*. Sizes (hidden size, layers, heads, …) have defaults there too; here a file must state them.

mod row;
mod tokenizers;

pub use row::{
    Architecture, Bias, Biases, Defaults, ExpertKeys, ExpertNames, Names, Softcaps, Window, Windowed,
};
#[cfg(test)]
pub(crate) use tokenizers::A_REBUILDING_CLASS;
pub use tokenizers::{Normalizer, Splitter, TokenizerClass, tokenizer_class};

/// The names used by most rows.
const NAMES: Names = Names {
    embed_tokens: "model.embed_tokens",
    attn_norm: "model.layers.{layer}.input_layernorm",
    q_proj: "model.layers.{layer}.self_attn.q_proj",
    k_proj: "model.layers.{layer}.self_attn.k_proj",
    v_proj: "model.layers.{layer}.self_attn.v_proj",
    q_norm: None,
    k_norm: None,
    o_proj: "model.layers.{layer}.self_attn.o_proj",
    attn_post_norm: None,
    mlp_norm: "model.layers.{layer}.post_attention_layernorm",
    gate_proj: "model.layers.{layer}.mlp.gate_proj",
    up_proj: "model.layers.{layer}.mlp.up_proj",
    down_proj: "model.layers.{layer}.mlp.down_proj",
    experts: None,
    mlp_post_norm: None,
    final_norm: "model.norm",
    lm_head: "lm_head",
};

/// With norms of query and key heads.
const QK_NORM_NAMES: Names = Names {
    q_norm: Some("model.layers.{layer}.self_attn.q_norm"),
    k_norm: Some("model.layers.{layer}.self_attn.k_norm"),
    ..NAMES
};

/// With norms before and after attention and MLP.
const POST_NORM_NAMES: Names = Names {
    attn_post_norm: Some("model.layers.{layer}.post_attention_layernorm"),
    mlp_norm: "model.layers.{layer}.pre_feedforward_layernorm",
    mlp_post_norm: Some("model.layers.{layer}.post_feedforward_layernorm"),
    ..NAMES
};

/// No projection has a bias.
const NO_BIAS: Biases = Biases { qkv: Bias::Never, out: Bias::Never, mlp: Bias::Never };

/// One key covers all four attention projections.
const ATTENTION_BIAS: Biases =
    Biases { qkv: Bias::Key("attention_bias"), out: Bias::Key("attention_bias"), mlp: Bias::Never };

/// The plainest decoder, from which each row says how it differs.
const PLAIN: Architecture = Architecture {
    model_type: "",
    classes: &[],
    biases: NO_BIAS,
    norm_offset: 0.0,
    scaled_embedding: false,
    attention_scalar: None,
    softcaps: None,
    window: None,
    local_rope: None,
    experts: None,
    activation_key: "hidden_act",
    defaults: DEFAULTS,
    names: NAMES,
};

/// The most frequent defaults.
const DEFAULTS: Defaults = Defaults {
    num_kv_heads: None,
    head_dim: None,
    rms_norm_eps: 1e-6,
    rope_theta: 1e4,
    max_position_embeddings: 32_768,
    activation: "silu",
    tie_word_embeddings: false,
};

/// Windows that have to be switched on, from some layer on.
const SWITCHED_WINDOW: Window = Window {
    by_layer_types: true,
    width: Some(4096),
    switch: Some("use_sliding_window"),
    layers: Windowed::From("max_window_layers", 28),
};

/// Every architecture the program knows.
pub static ARCHITECTURES: &[Architecture] = &[
    // Llama 2, 3.x, and what is saved in that form (Yi).
    Architecture {
        model_type: "llama",
        classes: &["LlamaForCausalLM"],
        biases: Biases { mlp: Bias::Key("mlp_bias"), ..ATTENTION_BIAS },
        defaults: Defaults { max_position_embeddings: 2048, ..DEFAULTS },
        ..PLAIN
    },
    // Mistral 7B, Zephyr, Mistral-Nemo. With `layer_types` transformers reads the file as "ministral", whose maths is
    // this row's with windows layer by layer.
    Architecture {
        model_type: "mistral",
        classes: &["MistralForCausalLM", "MinistralForCausalLM"],
        // The 4096 also holds where the key is absent: only `null` turns the window off.
        window: Some(Window { by_layer_types: true, width: Some(4096), switch: None, layers: Windowed::All }),
        defaults: Defaults { num_kv_heads: Some(8), max_position_embeddings: 131_072, ..DEFAULTS },
        ..PLAIN
    },
    // Mixtral 8×7B and 8×22B.
    Architecture {
        model_type: "mixtral",
        classes: &["MixtralForCausalLM"],
        window: Some(Window { by_layer_types: false, width: None, switch: None, layers: Windowed::All }),
        experts: Some(ExpertKeys {
            count: (&["num_local_experts", "num_experts"], 8),
            per_token: ("num_experts_per_tok", 2),
        }),
        defaults: Defaults {
            num_kv_heads: Some(8),
            rms_norm_eps: 1e-5,
            rope_theta: 1e6,
            max_position_embeddings: 131_072,
            ..DEFAULTS
        },
        names: Names {
            experts: Some(ExpertNames {
                router: ["model.layers.{layer}.block_sparse_moe.gate", "model.layers.{layer}.mlp.gate"],
                gate_proj: "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1",
                up_proj: "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3",
                down_proj: "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2",
                all_gate_up: "model.layers.{layer}.mlp.experts.gate_up_proj",
                all_down: "model.layers.{layer}.mlp.experts.down_proj",
            }),
            ..NAMES
        },
        ..PLAIN
    },
    // Qwen2 and Qwen2.5.
    Architecture {
        model_type: "qwen2",
        classes: &["Qwen2ForCausalLM"],
        biases: Biases { qkv: Bias::Always, ..NO_BIAS },
        window: Some(SWITCHED_WINDOW),
        defaults: Defaults { num_kv_heads: Some(32), ..DEFAULTS },
        ..PLAIN
    },
    // Qwen3, dense.
    Architecture {
        model_type: "qwen3",
        classes: &["Qwen3ForCausalLM"],
        biases: ATTENTION_BIAS,
        window: Some(SWITCHED_WINDOW),
        defaults: Defaults { num_kv_heads: Some(32), head_dim: Some(128), ..DEFAULTS },
        names: QK_NORM_NAMES,
        ..PLAIN
    },
    // Gemma 2.
    Architecture {
        model_type: "gemma2",
        classes: &["Gemma2ForCausalLM"],
        softcaps: Some(Softcaps {
            attention: Some(("attn_logit_softcapping", Some(50.0))),
            logits: ("final_logit_softcapping", Some(30.0)),
        }),
        window: Some(Window {
            by_layer_types: true,
            width: Some(4096),
            switch: None,
            layers: Windowed::AllButEvery { key: None, period: 2 },
        }),
        defaults: Defaults { max_position_embeddings: 8192, ..GEMMA_DEFAULTS },
        names: POST_NORM_NAMES,
        ..GEMMA
    },
    // Gemma 3, models of text alone.
    Architecture {
        model_type: "gemma3_text",
        classes: &["Gemma3ForCausalLM"],
        softcaps: Some(Softcaps { attention: None, logits: ("final_logit_softcapping", None) }),
        window: Some(Window {
            by_layer_types: true,
            width: Some(4096),
            switch: None,
            layers: Windowed::AllButEvery { key: Some("sliding_window_pattern"), period: 6 },
        }),
        local_rope: Some(("rope_local_base_freq", 1e4)),
        defaults: Defaults { rope_theta: 1e6, max_position_embeddings: 131_072, ..GEMMA_DEFAULTS },
        names: Names { q_norm: QK_NORM_NAMES.q_norm, k_norm: QK_NORM_NAMES.k_norm, ..POST_NORM_NAMES },
        ..GEMMA
    },
];

/// What Gemma 2 and 3 have in common.
const GEMMA: Architecture = Architecture {
    biases: ATTENTION_BIAS,
    norm_offset: 1.0,
    scaled_embedding: true,
    attention_scalar: Some(("query_pre_attn_scalar", 256.0)),
    activation_key: "hidden_activation",
    ..PLAIN
};

/// Their defaults.
const GEMMA_DEFAULTS: Defaults = Defaults {
    num_kv_heads: Some(4),
    head_dim: Some(256),
    activation: "gelu_pytorch_tanh",
    tie_word_embeddings: true,
    ..DEFAULTS
};

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

/// `path` (a field of [`Names`]) in `layer` (any number outside layers).
pub fn in_layer(path: &str, layer: usize) -> String {
    path.replace("{layer}", &layer.to_string())
}

/// Name of the weight of the module at `path` (a field of [`Names`]) in `layer` (any number outside layers).
pub fn weight(path: &str, layer: usize) -> String {
    in_layer(path, layer) + ".weight"
}

/// Name of the bias of the module at `path` (a field of [`Names`]) in `layer`.
pub fn bias(path: &str, layer: usize) -> String {
    in_layer(path, layer) + ".bias"
}

/// Name of the weight of the module at `path` (a field of [`ExpertNames`]) of an expert in `layer`.
pub fn expert_weight(path: &str, layer: usize, expert: usize) -> String {
    weight(&path.replace("{expert}", &expert.to_string()), layer)
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
        let experts = find("mixtral").unwrap().names.experts.as_ref().unwrap();
        let name = "model.layers.3.block_sparse_moe.experts.12.w2.weight";
        assert_eq!(expert_weight(experts.down_proj, 3, 12), name);
    }
}
