//! Keys that would change the maths, and that an architecture supports only where its row reads them.
//!
//! transformers ignores most of them in the classes we know; a file that sets one was made for other code,
//! and computing something else in silence would be worse than an error.

use serde_json::Value;

use super::keys::{Keys, shown};
use crate::error::Result;
use crate::model::arch::Architecture;

/// The value at which a key changes nothing. Null always does nothing.
#[derive(Clone, Copy)]
enum Neutral {
    /// `false`, 0, "", [] or {}.
    Off,
    /// 1.
    One,
    /// `true`.
    True,
}

impl Neutral {
    fn accepts(self, value: &Value) -> bool {
        match (self, value) {
            (_, Value::Null) => true,
            (Self::Off, Value::Bool(flag)) => !flag,
            (Self::Off, Value::Number(x)) => x.as_f64() == Some(0.0),
            (Self::Off, Value::String(text)) => text.is_empty(),
            (Self::Off, Value::Array(list)) => list.is_empty(),
            (Self::Off, Value::Object(map)) => map.is_empty(),
            (Self::One, value) => value.as_f64() == Some(1.0),
            (Self::True, value) => value == &Value::Bool(true),
        }
    }

    fn shown(self) -> &'static str {
        match self {
            Self::Off => "no such key, null or false",
            Self::One => "no such key, null or 1",
            Self::True => "no such key, null or true",
        }
    }
}

const OTHER_MODEL: &str = "gradlens computes a plain decoder with a gated MLP; this model needs another one";

/// What the keys mean, the value at which they do nothing, the keys, a hint.
const REFUSED: &[(&str, Neutral, &[&str], &str)] = &[
    (
        "quantised weights",
        Neutral::Off,
        &["quantization_config", "compression_config"],
        "use the repository of the same model in bfloat16, float16 or float32",
    ),
    (
        "an encoder",
        Neutral::Off,
        &["is_encoder_decoder", "add_cross_attention"],
        "gradlens reads decoder-only models",
    ),
    (
        "a soft cap on logits",
        Neutral::Off,
        &["attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap", "attention_logit_cap"],
        OTHER_MODEL,
    ),
    (
        "a multiplier inside the model",
        Neutral::One,
        &[
            "embedding_multiplier",
            "residual_multiplier",
            "logits_scaling",
            "logit_scale",
            "lm_head_multiplier",
            "key_multiplier",
            "attention_in_multiplier",
            "attention_out_multiplier",
            "scale_emb",
            "scale_depth",
        ],
        OTHER_MODEL,
    ),
    ("scaled embeddings", Neutral::Off, &["scale_embedding", "rescale_embeddings"], OTHER_MODEL),
    // Their neutral value depends on the head dim, so that any value is refused.
    (
        "another scale of the attention scores",
        Neutral::Off,
        &["attention_multiplier", "query_pre_attn_scalar"],
        OTHER_MODEL,
    ),
    (
        "rotary embeddings on a part of each head",
        Neutral::One,
        &["partial_rotary_factor", "rotary_pct", "rotary_percent"],
        OTHER_MODEL,
    ),
    (
        "another position embedding",
        Neutral::Off,
        &[
            "alibi",
            "use_alibi",
            "rotary_dim",
            "rope_interleaved",
            "rope_interleave",
            "no_rope_layers",
            "no_rope_layer_interval",
        ],
        OTHER_MODEL,
    ),
    (
        "norms of queries and keys",
        Neutral::Off,
        &["use_qk_norm", "qk_norm", "qk_layernorm", "use_qk_layernorm"],
        OTHER_MODEL,
    ),
    (
        "another attention",
        Neutral::Off,
        &[
            "clip_qkv",
            "attention_chunk_size",
            "attn_temperature_tuning",
            "use_bidirectional_attention",
            "kv_lora_rank",
            "q_lora_rank",
            "multi_query",
            "gated_attn",
            "use_attention_gate",
        ],
        OTHER_MODEL,
    ),
    ("attention to later tokens", Neutral::True, &["is_causal"], "gradlens reads causal models"),
    (
        "attention and MLP side by side",
        Neutral::Off,
        &["parallel_attn", "use_parallel_residual", "parallel_residual"],
        OTHER_MODEL,
    ),
    (
        "a mixture of experts",
        Neutral::Off,
        &["num_local_experts", "num_experts", "n_routed_experts"],
        OTHER_MODEL,
    ),
    (
        "layers that differ from one another",
        Neutral::Off,
        &[
            "per_layer_config",
            "block_configs",
            "pruned_heads",
            "sliding_window_pattern",
            "rope_local_base_freq",
        ],
        OTHER_MODEL,
    ),
    (
        "other norms",
        Neutral::Off,
        &["norm_bias", "norm_after", "use_post_norm", "use_sandwich_norm"],
        OTHER_MODEL,
    ),
    (
        "other biases",
        Neutral::Off,
        &["qkv_bias", "attention_out_bias", "lm_head_bias", "use_bias", "add_bias_linear"],
        OTHER_MODEL,
    ),
];

/// Refuses the first key of the list that is set to something and that `row` does not read.
pub(super) fn check(keys: Keys<'_>, row: &Architecture) -> Result<()> {
    for (what, neutral, names, hint) in REFUSED {
        for name in names.iter().filter(|name| !row.reads(name)) {
            match keys.get(name) {
                Some(value) if !neutral.accepts(value) => {
                    return Err(keys
                        .error(format!("config.json asks for {what}, which is not supported"), name)
                        .expected(neutral.shown())
                        .found(shown(value))
                        .hint(hint));
                }
                _ => {}
            }
        }
    }
    Ok(())
}
