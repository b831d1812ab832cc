//! `config.json` → [`Config`]: every value the maths needs, under one name whatever the file's generation.

/// The nonlinearity of the gated MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x·σ(x), called `silu` or `swish`.
    Silu,
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
    /// Rotary embeddings.
    pub rope: Rope,
    /// Per layer: `Some(w)` lets position i attend to j with i − w < j ≤ i; `None` to every j ≤ i. [L]
    pub windows: Vec<Option<usize>>,
    /// q, k and v projections have a bias.
    pub qkv_bias: bool,
    /// The attention's output projection has a bias.
    pub out_bias: bool,
    /// The three MLP projections have a bias.
    pub mlp_bias: bool,
    /// The output head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Longest sample the model was made for, in tokens, if the file says.
    pub max_position_embeddings: Option<usize>,
    /// Nonlinearity of the MLP.
    pub activation: Activation,
}
