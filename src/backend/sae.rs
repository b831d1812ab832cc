//! What a backend must be able to do with sparse autoencoders: add up features over tokens, without ever holding more
//! than a tile of the `[N, F]` matrix, and put a reconstruction in a site's place.

use std::ops::Range;

use super::{Backend, Moments, NonFinite};
use crate::error::Result;
use crate::model::sae::SaeWeights;

/// Which rows of a chunk are looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Positions {
    /// Of each sample, in the order of the chunk; of some perhaps none.
    pub samples: Vec<SampleRows>,
}

/// Which rows of one sample are looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SampleRows {
    /// Index in the corpus, among kept texts.
    pub sample: u64,
    /// All rows of the sample in the chunk.
    pub all: Range<usize>,
    /// Those that are looked at: ascending, none of them empty, with rows between them that are not.
    pub runs: Vec<Range<usize>>,
}

impl SampleRows {
    /// The chosen rows.
    pub fn rows(&self) -> impl Iterator<Item = usize> + use<'_> {
        self.runs.iter().cloned().flatten()
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.runs.iter().map(|run| run.len() as u64).sum()
    }
}

impl Positions {
    /// Rows looked at in samples of at least `shortest` tokens.
    pub fn count(&self, shortest: usize) -> u64 {
        self.samples.iter().filter(|rows| rows.all.len() >= shortest).map(SampleRows::count).sum()
    }
}

/// Which features a gradient counts for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum SaeGradient {
    /// Every feature, also where it does not fire: dL/df is defined there too
    All,
    /// Only where f > 0; zero elsewhere
    Active,
}

impl SaeGradient {
    /// The name users type.
    pub fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Active => "active",
        }
    }
}

/// Where a feature was largest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Index of the sample in the corpus, among kept texts.
    pub sample: u64,
    /// Token in the sample, from 0.
    pub position: u32,
}

/// Sums of feature activations f ≥ 0.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FeatureValues {
    /// `sum_abs` equals `sum`: no activation is negative. `max_abs` is the largest activation. `[F]`
    pub moments: Moments,
    /// Tokens at which f > 0. `[F]`
    pub fired: Vec<u64>,
    /// The first token at which f was largest, where it fired. `[F]`
    pub max_at: Vec<Place>,
}

/// Per-feature sums of one SAE.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FeatureSums {
    /// Of f.
    pub values: Option<FeatureValues>,
    /// Of dL/df. A sample with a single token has no loss and is not counted.
    pub gradients: Option<Moments>,
    /// Of f·dL/df, counted like gradients.
    pub attribution: Option<Moments>,
}

/// How well an SAE reconstructs what it is given.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fit {
    /// Tokens.
    pub tokens: u64,
    /// Features that fired, over all tokens.
    pub fired: u64,
    /// Σ ‖x − x̂‖².
    pub residual: f64,
    /// Σ x. `[D]`
    pub sum: Vec<f64>,
    /// Σ ‖x‖².
    pub sum_sq: f64,
}

impl Fit {
    /// Fraction of variance unexplained, Σ‖x − x̂‖²/Σ‖x − x̄‖²: 0 is perfect, 1 no better than the mean. `None`: there
    /// is no variance, as of a single token.
    pub fn fvu(&self) -> Option<f64> {
        let mean_sq: f64 = self.sum.iter().map(|sum| sum * sum).sum::<f64>() / self.tokens as f64;
        let variance = self.sum_sq - mean_sq;
        // What cancellation leaves of equal tokens is no variance.
        (self.tokens > 1 && variance > 1e-9 * self.sum_sq).then(|| self.residual / variance)
    }

    /// Features that fire on a token, on average. `None`: there were no tokens.
    pub fn l0(&self) -> Option<f64> {
        (self.tokens > 0).then(|| self.fired as f64 / self.tokens as f64)
    }
}

/// A backend that knows SAEs. `x` and `dx` are values and gradients at the SAE's site, `[N, D]`.
pub trait SaeBackend: Backend {
    /// A copy.
    fn copy(&self, x: &Self::Buf) -> Result<Self::Buf>;

    /// Adds the tokens at `at` to those of `into`'s sums that are there (`Some`, of F features): to `values` where `x`
    /// is given, to `gradients` where `dx` is, to `attribution` where both are. [`SaeGradient::Active`] needs both, and
    /// so does an SAE that normalises.
    /// Sums do not depend on how samples are cut into chunks.
    ///
    /// Returns the first sample (its number in `at`) with a value that is not finite.
    fn features(
        &self,
        sae: &SaeWeights,
        at: &Positions,
        x: Option<&Self::Buf>,
        dx: Option<&Self::Buf>,
        gradient: SaeGradient,
        into: &mut FeatureSums,
    ) -> Result<Result<(), NonFinite>>;

    /// `x` with the reconstruction x̂ in the rows at `at`. Adds those tokens to `values`, as [`SaeBackend::features`]
    /// does, and, but for position 0 of each sample, to `fit`, where these are given.
    ///
    /// Returns the first sample (its number in `at`) with a value that is not finite instead.
    fn reconstruct(
        &self,
        sae: &SaeWeights,
        at: &Positions,
        x: &Self::Buf,
        values: Option<&mut FeatureValues>,
        fit: Option<&mut Fit>,
    ) -> Result<Result<Self::Buf, NonFinite>>;

    /// `into[d] += Σ_t v_t[d]` and `count` over the tokens at `at` of samples of at least two tokens, where v is `dx`
    /// times the factor that undoing the SAE's normalisation has: Σ dL/df is one product of W_dec with it, see
    /// [`SaeBackend::decode_gradient`]. `x` is needed where the SAE normalises. `into` is of D.
    fn add_output_gradients(
        &self,
        sae: &SaeWeights,
        at: &Positions,
        x: Option<&Self::Buf>,
        dx: &Self::Buf,
        into: &mut Moments,
    ) -> Result<Result<(), NonFinite>>;

    /// decoder_scale ∘ (W_dec v), in float64. v `[D]` → `[F]`
    fn decode_gradient(&self, sae: &SaeWeights, v: &[f64]) -> Result<Vec<f64>>;

    /// Bytes that these methods need at most besides arguments and results, for N = `tokens`.
    fn sae_workspace_bytes(&self, sae: &SaeWeights, tokens: usize) -> u64;
}
