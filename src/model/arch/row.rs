//! What a row of the table of architectures says.

/// One architecture.
#[derive(Debug)]
pub struct Architecture {
    /// `model_type` of `config.json`.
    pub model_type: &'static str,
    /// Accepted entries of `architectures`: the classes with a language-model head.
    pub classes: &'static [&'static str],
    /// Which projections have a bias.
    pub biases: Biases,
    /// Added to the stored weight of every norm: 1 where w − 1 is stored.
    pub norm_offset: f64,
    /// Whether embeddings are multiplied by √D.
    pub scaled_embedding: bool,
    /// Key of a number q, and its default, where attention scores are divided by √q and not by √Hd.
    pub attention_scalar: Option<(&'static str, f64)>,
    /// Soft-caps, where there can be some.
    pub softcaps: Option<Softcaps>,
    /// Sliding-window attention; `None` when no layer can have a window.
    pub window: Option<Window>,
    /// Key of the rotary base of layers with a window, and its default, where it is not that of the others.
    pub local_rope: Option<(&'static str, f64)>,
    /// A mixture of experts in the place of the MLP.
    pub experts: Option<ExpertKeys>,
    /// Key of the nonlinearity of the MLP.
    pub activation_key: &'static str,
    /// Values of absent keys.
    pub defaults: Defaults,
    /// Names of the tensors in a checkpoint.
    pub names: Names,
}

impl Architecture {
    /// Whether `key`, which changes the maths of some model, is read for this one.
    pub fn reads(&self, key: &str) -> bool {
        let Self { attention_scalar, softcaps, window, local_rope, experts, .. } = self;
        let period = match window {
            Some(Window { layers: Windowed::AllButEvery { key, .. }, .. }) => *key,
            _ => None,
        };
        let softcaps = softcaps.iter().flat_map(|caps| caps.attention.into_iter().chain([caps.logits]));
        let softcaps = softcaps.map(|(key, _)| key);
        let experts = experts.iter().flat_map(|keys| keys.count.0.iter().copied().chain([keys.per_token.0]));
        let others = [attention_scalar.map(|(key, _)| key), local_rope.map(|(key, _)| key), period];
        others.into_iter().flatten().chain(softcaps).chain(experts).any(|read| read == key)
    }
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

/// Keys of the soft-caps and their defaults; null means none.
#[derive(Debug)]
pub struct Softcaps {
    /// Of attention scores; `None` where transformers does not read it.
    pub attention: Option<(&'static str, Option<f64>)>,
    /// Of the logits.
    pub logits: (&'static str, Option<f64>),
}

/// How the attention windows of the layers follow from `config.json`.
///
/// `sliding_window: null` means no window.
#[derive(Debug)]
pub struct Window {
    /// Whether `layer_types` decides layer by layer where the file has it; else it must say the same.
    pub by_layer_types: bool,
    /// Width in tokens when `sliding_window` is absent; `None`: no window then.
    pub width: Option<usize>,
    /// Boolean key without which there is no window at all; absent means off.
    pub switch: Option<&'static str>,
    /// Which layers have one.
    pub layers: Windowed,
}

/// Which layers have a window where `layer_types` does not say.
#[derive(Debug)]
pub enum Windowed {
    /// Every one.
    All,
    /// Those from the one on that this key names; absent: this one.
    From(&'static str, usize),
    /// All but every `period`-th, counted from 1.
    AllButEvery {
        /// Key of the period, where there is one.
        key: Option<&'static str>,
        /// Its default.
        period: usize,
    },
}

/// Keys of the experts' numbers, and their defaults.
#[derive(Debug)]
pub struct ExpertKeys {
    /// E; any of the names.
    pub count: (&'static [&'static str], usize),
    /// Experts that each token goes to.
    pub per_token: (&'static str, usize),
}

/// Values of absent keys.
#[derive(Debug)]
pub struct Defaults {
    /// K; `None` means H. (`num_key_value_heads: null` always means H.)
    pub num_kv_heads: Option<usize>,
    /// Hd; `None` means D/H. (`head_dim: null` always means that.)
    pub head_dim: Option<usize>,
    /// Added to the mean square in every RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Longest sample, in tokens.
    pub max_position_embeddings: usize,
    /// Nonlinearity of the MLP.
    pub activation: &'static str,
    /// Whether the output head is the embedding table.
    pub tie_word_embeddings: bool,
}

/// Module paths in a checkpoint; `{layer}` stands for the layer number from 0. [`super::weight`] and [`super::bias`]
/// make tensor names of them.
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
    /// Norm of each query head, weight `[Hd]`.
    pub q_norm: Option<&'static str>,
    /// Norm of each key head, weight `[Hd]`.
    pub k_norm: Option<&'static str>,
    /// Attention's output projection, weight `[D, H·Hd]`.
    pub o_proj: &'static str,
    /// Norm of what attention adds to the residual stream, weight `[D]`.
    pub attn_post_norm: Option<&'static str>,
    /// Norm before the MLP, weight `[D]`.
    pub mlp_norm: &'static str,
    /// Gate projection (through the nonlinearity), weight `[I, D]`.
    pub gate_proj: &'static str,
    /// Up projection, weight `[I, D]`.
    pub up_proj: &'static str,
    /// Down projection, weight `[D, I]`.
    pub down_proj: &'static str,
    /// What stands in the place of these three in a mixture of experts.
    pub experts: Option<ExpertNames>,
    /// Norm of what the MLP adds to the residual stream, weight `[D]`.
    pub mlp_post_norm: Option<&'static str>,
    /// Norm after the last layer, weight `[D]`.
    pub final_norm: &'static str,
    /// Output head, weight `[V, D]`; absent when tied to the embedding table.
    pub lm_head: &'static str,
}

/// Names of a mixture of experts; `{expert}` stands for the number of the expert from 0. Each is stored in one of two
/// ways.
#[derive(Debug, PartialEq)]
pub struct ExpertNames {
    /// The router, weight `[E, D]`, in either way.
    pub router: [&'static str; 2],
    /// An expert's gate projection, weight `[I, D]`.
    pub gate_proj: &'static str,
    /// An expert's up projection, weight `[I, D]`.
    pub up_proj: &'static str,
    /// An expert's down projection, weight `[D, I]`.
    pub down_proj: &'static str,
    /// Tensor of all experts' gate projections, each followed by its up projection, `[E, 2I, D]`.
    pub all_gate_up: &'static str,
    /// Tensor of all experts' down projections, `[E, D, I]`.
    pub all_down: &'static str,
}
