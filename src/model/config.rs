//! `config.json` → [`Config`]: every value the maths needs, under one name whatever the file's generation.
//!
//! A file either means exactly what the program will compute, or it is refused: a key that would change the
//! maths is never ignored. Absent keys take the defaults of the architecture's row (see [`arch`]).

use std::path::Path;

use serde_json::Value;

use super::arch::{self, Architecture, Bias};
use crate::error::{Context, Error, Result};
use keys::{Keys, shown};

mod attention;
mod keys;
mod refused;
mod rope;
mod windows;

/// Largest D, I, V, H, K or Hd that is taken seriously; L·(products of them) then stays far inside 128 bits.
const MAX_SIZE: usize = 1 << 24;
/// Largest L.
const MAX_LAYERS: usize = 1 << 14;
/// Largest E.
const MAX_EXPERTS: usize = 1 << 10;
/// Largest number of tokens in a window or a context.
const MAX_TOKENS: usize = 1 << 31;
/// Largest number of tensors: a hundred times those of the largest model published.
const MAX_TENSORS: u128 = 1 << 21;
/// Largest number of weights: ten times the largest model published.
const MAX_PARAMETERS: u128 = 1 << 44;

/// The nonlinearity of the gated MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x·σ(x), called `silu` or `swish`.
    Silu,
    /// x·Φ(x) with Φ approximated by tanh, called `gelu_pytorch_tanh` or `gelu_new`.
    GeluTanh,
}

/// What files call the nonlinearities.
const ACTIVATIONS: &[(&str, Activation)] = &[
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("gelu_new", Activation::GeluTanh),
];

/// A mixture of experts in the place of the MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Experts {
    /// E.
    pub count: usize,
    /// Experts that each token goes to; at most E.
    pub per_token: usize,
}

/// How rotary position embeddings turn positions into angles.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Change of the frequencies for longer contexts.
    pub scaling: RopeScaling,
}

/// Change of the rotary frequencies for longer contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// None (`default`).
    None,
    /// `linear`: every frequency is divided by `factor`.
    Linear {
        /// Divisor of the frequencies.
        factor: f64,
    },
    /// `llama3`: long wavelengths are divided by `factor`, short ones kept, the middle interpolated.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original_max_position / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// Context length of pre-training, in tokens.
        original_max_position: f64,
    },
}

/// A decoder model's configuration, checked: sizes are non-zero and fit together.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The architecture's row name (`model_type` of the file).
    pub model_type: String,
    /// Names of the tensors in a checkpoint.
    pub names: &'static arch::Names,
    /// D.
    pub hidden_size: usize,
    /// I.
    pub intermediate_size: usize,
    /// L.
    pub num_layers: usize,
    /// H.
    pub num_heads: usize,
    /// K; divides H.
    pub num_kv_heads: usize,
    /// Hd; even.
    pub head_dim: usize,
    /// V.
    pub vocab_size: usize,
    /// Added to the mean square in every RMSNorm.
    pub rms_norm_eps: f64,
    /// Added to the stored weight of every norm.
    pub norm_offset: f64,
    /// Factor of the embeddings.
    pub embedding_scale: f64,
    /// Factor of attention scores.
    pub attention_scale: f64,
    /// Soft-cap of attention scores.
    pub attention_softcap: Option<f64>,
    /// Soft-cap of the logits.
    pub logit_softcap: Option<f64>,
    /// Rotary embeddings.
    pub rope: Rope,
    /// Those of layers with a window, where they differ.
    pub local_rope: Option<Rope>,
    /// Per layer: `Some(w)` lets position i attend to j with i − w < j ≤ i; `None` to every j ≤ i. `[L]`
    pub windows: Vec<Option<usize>>,
    /// q, k and v projections have a bias.
    pub qkv_bias: bool,
    /// The attention's output projection has a bias.
    pub out_bias: bool,
    /// The three MLP projections have a bias.
    pub mlp_bias: bool,
    /// The output head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Longest sample the model was made for, in tokens; the architecture's default if the file does not say.
    pub max_position_embeddings: usize,
    /// Nonlinearity of the MLP.
    pub activation: Activation,
    /// Experts, if the MLP is a mixture of them; each has an inner size of I.
    pub experts: Option<Experts>,
}

impl Config {
    /// Reads the text of a `config.json`; `place` is the file named in errors.
    ///
    /// Both generations are read: `rope_theta` + `rope_scaling` as found on the hub, and `rope_parameters` as
    /// written by transformers 5.
    ///
    /// # Errors
    /// Not JSON; an unknown architecture; a missing, impossible or contradictory value; a key that asks for
    /// something the program does not compute.
    pub fn from_json(text: &str, place: &Path) -> Result<Self> {
        let json: Value = serde_json::from_str(text).context_path("config.json is not JSON", place)?;
        let Value::Object(map) = &json else {
            return Err(Error::new("config.json is not a model configuration")
                .at_path(place)
                .expected("a JSON object")
                .found(shown(&json)));
        };
        let keys = Keys::new(map, place);
        let row = find_row(keys)?;
        refused::check(keys, row)?;

        let hidden_size = keys.size("hidden_size", MAX_SIZE)?;
        let intermediate_size = keys.size("intermediate_size", MAX_SIZE)?;
        let num_layers = keys.size("num_hidden_layers", MAX_LAYERS)?;
        let num_heads = keys.size("num_attention_heads", MAX_SIZE)?;
        let vocab_size = keys.size("vocab_size", MAX_SIZE)?;
        let max_position_embeddings = keys
            .count("max_position_embeddings", MAX_TOKENS)?
            .unwrap_or(row.defaults.max_position_embeddings);

        let head_dim = read_head_dim(keys, row, hidden_size, num_heads)?;
        let (rope, local_rope) = rope::read(keys, row, max_position_embeddings)?;
        let (attention_softcap, logit_softcap) = attention::read_softcaps(keys, row)?;
        let config = Self {
            model_type: row.model_type.to_owned(),
            names: &row.names,
            hidden_size,
            intermediate_size,
            num_layers,
            num_heads,
            num_kv_heads: read_kv_heads(keys, row, num_heads)?,
            head_dim,
            vocab_size,
            rms_norm_eps: keys.positive("rms_norm_eps")?.unwrap_or(row.defaults.rms_norm_eps),
            norm_offset: row.norm_offset,
            embedding_scale: if row.scaled_embedding { (hidden_size as f64).sqrt() } else { 1.0 },
            attention_scale: attention::read_scale(keys, row, head_dim)?,
            attention_softcap,
            logit_softcap,
            rope,
            local_rope,
            windows: windows::read(keys, row, num_layers)?,
            qkv_bias: read_bias(keys, row.biases.qkv, "attention_bias")?,
            out_bias: read_bias(keys, row.biases.out, "attention_out_bias")?,
            mlp_bias: read_bias(keys, row.biases.mlp, "mlp_bias")?,
            tie_word_embeddings: keys
                .flag("tie_word_embeddings")?
                .unwrap_or(row.defaults.tie_word_embeddings),
            max_position_embeddings,
            activation: read_activation(keys, row)?,
            experts: read_experts(keys, row)?,
        };
        config.check_total(place)?;
        Ok(config)
    }

    /// Refuses sizes that are possible one by one and absurd together, before anyone multiplies them.
    fn check_total(&self, place: &Path) -> Result<()> {
        let [d, i, v, l, h, k, hd, e] = [
            self.hidden_size,
            self.intermediate_size,
            self.vocab_size,
            self.num_layers,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.experts.map_or(1, |experts| experts.count),
        ]
        .map(|size| size as u128);
        // q and o, k and v, then gate, up and down of each expert; embedding and head. At most 2^14·2^75 weights.
        let total = l * (2 * d * h * hd + 2 * d * k * hd + 3 * d * i * e) + 2 * v * d;
        if total > MAX_PARAMETERS {
            return Err(Error::new("config.json describes an impossibly large model")
                .at_path(place)
                .expected(format_args!("at most {MAX_PARAMETERS} weights"))
                .found(format_args!("{total} weights")));
        }
        // Each has a name of its own.
        let tensors = l * (12 + 3 * e);
        if tensors > MAX_TENSORS {
            return Err(Error::new("config.json describes a model of impossibly many parts")
                .at_path(place)
                .expected(format_args!("at most {MAX_TENSORS} tensors"))
                .found(format_args!("{tensors} tensors")));
        }
        Ok(())
    }
}

/// The row of the file's architecture.
fn find_row(keys: Keys<'_>) -> Result<&'static Architecture> {
    // A wrapper's own sizes are elsewhere: say so before complaining about its type or about missing keys.
    for key in ["text_config", "llm_config", "language_config", "vision_config", "audio_config"] {
        if keys.has(key) {
            return Err(keys
                .error("config.json describes a model of several modalities, which is not supported", key)
                .expected(format_args!("a text model: {}", arch::known()))
                .found(keys.get("model_type").map_or("no model_type".to_owned(), shown))
                .hint("use a text-only model of the same family"));
        }
    }
    let expected = format!("one of {}", arch::known());
    let Some(model_type) = keys.text("model_type")? else {
        return Err(keys.missing("model_type", &expected));
    };
    let Some(row) = arch::find(model_type) else {
        return Err(keys
            .error("config.json names an unknown architecture", "model_type")
            .expected(expected)
            .found(format_args!("{model_type:?}"))
            .hint("gradlens reads decoder models with a gated MLP; a model of the same form can be a new row of src/model/arch.rs"));
    };
    let classes = keys.texts("architectures")?.unwrap_or_default();
    if !classes.is_empty() && !classes.iter().any(|class| row.classes.contains(class)) {
        return Err(keys
            .error(
                "config.json names a model class without a language-model head, or an unknown one",
                "architectures",
            )
            .expected(row.classes.join(" or "))
            .found(classes.join(", "))
            .hint("the loss needs a causal language model"));
    }
    Ok(row)
}

/// K: absent is the row's default, null is H.
fn read_kv_heads(keys: Keys<'_>, row: &Architecture, num_heads: usize) -> Result<usize> {
    let key = "num_key_value_heads";
    let (num_kv_heads, origin) = match (keys.get(key), row.defaults.num_kv_heads) {
        (None, Some(default)) => (default, " (the default, because the key is absent)"),
        _ => (keys.count_or_null(key, MAX_SIZE)?.unwrap_or(num_heads), ""),
    };
    if !num_heads.is_multiple_of(num_kv_heads) {
        return Err(keys
            .error("config.json has key/value heads that do not divide the query heads", key)
            .expected(format_args!("a divisor of num_attention_heads, {num_heads}"))
            .found(format_args!("{num_kv_heads}{origin}")));
    }
    Ok(num_kv_heads)
}

/// Hd: absent is the row's default, null is D/H.
fn read_head_dim(keys: Keys<'_>, row: &Architecture, hidden_size: usize, num_heads: usize) -> Result<usize> {
    let absent = keys.get("head_dim").is_none();
    let default = row.defaults.head_dim.filter(|_| absent);
    let head_dim = match keys.count_or_null("head_dim", MAX_SIZE)?.or(default) {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(num_heads) => hidden_size / num_heads,
        None => {
            return Err(keys
                .error(
                    "config.json names no head_dim, and the heads do not divide the hidden size",
                    "head_dim",
                )
                .expected(format_args!("num_attention_heads to divide hidden_size, {hidden_size}"))
                .found(num_heads));
        }
    };
    // Rotary embeddings turn pairs of dimensions.
    if !head_dim.is_multiple_of(2) {
        return Err(keys
            .error("config.json has an odd head dim, which rotary embeddings cannot turn", "head_dim")
            .expected("an even number")
            .found(head_dim));
    }
    Ok(head_dim)
}

/// Whether projections have a bias; `key` is what files call it, also where the architecture does not ask.
fn read_bias(keys: Keys<'_>, rule: Bias, key: &str) -> Result<bool> {
    let fixed = match rule {
        Bias::Key(key) => return Ok(keys.flag(key)?.unwrap_or(false)),
        Bias::Always => true,
        Bias::Never => false,
    };
    match keys.get(key).filter(|value| !value.is_null()) {
        Some(value) if *value != Value::Bool(fixed) => Err(keys
            .error("config.json contradicts its architecture about biases", key)
            .expected(format_args!("no such key or {fixed}"))
            .found(shown(value))),
        _ => Ok(fixed),
    }
}

fn read_activation(keys: Keys<'_>, row: &Architecture) -> Result<Activation> {
    let known = |name: &str| ACTIVATIONS.iter().find(|(known, _)| *known == name).map(|(_, known)| *known);
    let named = |key: &str, name: &str| {
        known(name).ok_or_else(|| {
            let known: Vec<&str> = ACTIVATIONS.iter().map(|(name, _)| *name).collect();
            keys.error("config.json names an activation that is not supported", key)
                .expected(format_args!("one of {}", known.join(", ")))
                .found(format_args!("{name:?}"))
        })
    };
    let key = row.activation_key;
    let activation = named(key, keys.text_or_null(key)?.unwrap_or(row.defaults.activation))?;
    // Some files say it under the usual key too, which is then not read.
    const USUAL: &str = "hidden_act";
    if key != USUAL
        && let Some(name) = keys.text_or_null(USUAL)?
        && known(name) != Some(activation)
    {
        return Err(keys
            .error("config.json contradicts itself about the activation", USUAL)
            .expected(format_args!("the same as {key}, or no such key"))
            .found(format_args!("{name:?}"))
            .hint(format_args!(
                "transformers reads {key} alone for this architecture; delete the other key"
            )));
    }
    Ok(activation)
}

/// E and the experts per token, where the architecture has some.
fn read_experts(keys: Keys<'_>, row: &Architecture) -> Result<Option<Experts>> {
    let Some(rule) = &row.experts else { return Ok(None) };
    let (names, default) = rule.count;
    let mut count = None;
    for key in names {
        let own = keys.count(key, MAX_EXPERTS)?;
        if count.is_some() && own.is_some() && own != count {
            return Err(keys
                .error("config.json contradicts itself about the number of experts", key)
                .expected(format_args!("the same number under {}, or one of them", names.join(" and ")))
                .found(own.unwrap_or_default()));
        }
        count = count.or(own);
    }
    let count = count.unwrap_or(default);
    let per_token = keys.count(rule.per_token.0, MAX_EXPERTS)?.unwrap_or(rule.per_token.1);
    if per_token > count {
        return Err(keys
            .error("config.json sends tokens to more experts than there are", rule.per_token.0)
            .expected(format_args!("at most {}, {count}", names[0]))
            .found(per_token));
    }
    Ok(Some(Experts { count, per_token }))
}
