//! A sparse autoencoder (SAE), as every format is read:
//!
//! ```text
//! x̃ = norm(x) − input_bias
//! z = x̃ W_encᵀ                         W_enc [F, D]
//! h = encoder_scale ∘ z + encoder_bias
//! f = activation(z, h) ≥ 0              [N, F]
//! x̂ = denorm((decoder_scale ∘ f) W_dec + decoder_bias)
//! ```
//!
//! With g = dL/dx̂ this makes dL/df = decoder_scale ∘ (g' W_decᵀ), where g' is g times the factor that `denorm` has for
//! the token. Scales and offsets that a format folds into its matrices are vectors here, so the matrices stay where they
//! lie on disk.

use super::Tensor;

/// One SAE.
#[derive(Clone, Debug)]
pub struct SaeWeights {
    /// W_enc, one row per feature.
    pub encoder: FeatureMatrix,
    /// W_dec, one row per feature.
    pub decoder: FeatureMatrix,
    /// What is done to x first, and undone to x̂ last.
    pub norm: InputNorm,
    /// Subtracted from the normalised input. `[D]`
    pub input_bias: Option<Vec<f32>>,
    /// Factor of z; `None`: 1. `[F]`
    pub encoder_scale: Option<Vec<f32>>,
    /// `[F]`
    pub encoder_bias: Vec<f32>,
    /// From z and h to f.
    pub activation: SaeActivation,
    /// Factor of f on its way to x̂; `None`: 1. `[F]`
    pub decoder_scale: Option<Vec<f32>>,
    /// Added to the reconstruction before `denorm`. `[D]`
    pub decoder_bias: Vec<f32>,
}

impl SaeWeights {
    /// F.
    pub fn num_features(&self) -> usize {
        self.encoder.num_features()
    }

    /// D.
    pub fn width(&self) -> usize {
        self.encoder.width()
    }
}

/// A matrix with a row of D for each of F features, as it lies on disk.
#[derive(Clone, Debug)]
pub struct FeatureMatrix {
    /// `[F, D]` where `features_first`, else `[D, F]`.
    pub tensor: Tensor,
    /// Whether a feature's row is contiguous.
    pub features_first: bool,
}

impl FeatureMatrix {
    /// F.
    pub fn num_features(&self) -> usize {
        self.tensor.shape[usize::from(!self.features_first)]
    }

    /// D.
    pub fn width(&self) -> usize {
        self.tensor.shape[usize::from(self.features_first)]
    }
}

/// Per-token normalisation of an SAE's input.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum InputNorm {
    /// None.
    None,
    /// norm(x) = x·√D/‖x‖₂, denorm(y) = y·‖x‖₂/√D (SAELens: `constant_norm_rescale`).
    RescaleToSqrtD,
    /// norm(x) = (x − μ)/(σ + 1e-5), denorm(y) = y·σ + μ; σ with D − 1 (SAELens: `layer_norm`).
    LayerNorm,
}

/// How an SAE decides which features fire. All give f ≥ 0.
#[derive(Clone, Debug, PartialEq)]
pub enum SaeActivation {
    /// f = max(h, 0).
    Relu,
    /// f = h where h > θ and h > 0, else 0; θ `[F]`. BatchTopK with its learned threshold is this too.
    JumpRelu {
        /// θ. `[F]`
        threshold: Vec<f32>,
    },
    /// f = max(h, 0) of the k features with the largest h of a token; of equals the lower index.
    TopK {
        /// At least 1, at most F.
        k: usize,
    },
    /// f = max(h, 0) of the largest h in each of k groups of F/k neighbours; of equals the lower index.
    GroupMax {
        /// Divides F.
        k: usize,
    },
    /// f = max(h, 0) where z + gate_bias > 0, else 0.
    Gated {
        /// `[F]`
        gate_bias: Vec<f32>,
    },
}
