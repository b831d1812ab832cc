//! What a machine must be able to do: one trait, op methods in forward/backward pairs.
//!
//! **One rule for all backward ops: a backward adds into its input's gradient.** It is handed what the
//! gradient holds so far (`None`: nothing yet) and returns the sum, so the first contribution costs no
//! zeroing.
//!
//! Statistics are promised to be the same bytes for any pass and chunk size, so no op may let one sample's
//! numbers depend on its neighbours in the chunk.

pub mod cpu;
pub mod cuda;

use std::ops::Range;

use crate::error::Result;
use crate::model::op::Attention;
use crate::model::{Activation, Tensor};

/// Whole samples that run through a layer's ops together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chunk {
    /// Token ids of all samples, one after the other. `[N]`
    pub ids: Vec<u32>,
    /// Sample s is rows `cu_seqlens[s]..cu_seqlens[s + 1]`. `[B + 1]`
    pub cu_seqlens: Vec<usize>,
    /// Index of each sample in the corpus, from 0, among kept texts. `[B]`
    pub indices: Vec<u64>,
    /// Factor of each sample's summed token losses in L: 1/(T_s − 1) when L is a sample's mean. `[B]`
    pub loss_scales: Vec<f64>,
}

impl Chunk {
    /// N.
    pub fn num_tokens(&self) -> usize {
        self.ids.len()
    }

    /// B.
    pub fn num_samples(&self) -> usize {
        self.cu_seqlens.len() - 1
    }

    /// Rows of each sample.
    pub fn samples(&self) -> impl Iterator<Item = Range<usize>> + Clone {
        self.cu_seqlens.windows(2).map(|pair| pair[0]..pair[1])
    }

    /// Length of the longest sample.
    pub fn longest(&self) -> usize {
        self.samples().map(|rows| rows.len()).max().unwrap_or(0)
    }
}

/// Per-dimension sums over tokens, in float64.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Moments {
    /// Σ v. `[width]`
    pub sum: Vec<f64>,
    /// Σ |v|. `[width]`
    pub sum_abs: Vec<f64>,
    /// Σ v². `[width]`
    pub sum_sq: Vec<f64>,
    /// max |v|. `[width]`
    pub max_abs: Vec<f64>,
    /// Tokens counted.
    pub count: u64,
}

impl Moments {
    /// Nothing seen yet.
    pub fn new(width: usize) -> Self {
        let zeros = || vec![0.0; width];
        Self { sum: zeros(), sum_abs: zeros(), sum_sq: zeros(), max_abs: zeros(), count: 0 }
    }
}

/// A sample whose values are not all finite: its index in the chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NonFinite(pub usize);

/// A device with the ops of [`crate::model::op::Op`]. Buffers are `[rows, width]`, row-major.
///
/// Methods do not check shapes against each other for the user: the op list was built from a checked
/// configuration. A mismatch is a bug and may panic.
pub trait Backend {
    /// An activation, `[N, width]`.
    type Buf;
    /// A weight, where this backend wants it.
    type Weight;
    /// Rotary angles for a range of positions.
    type Rope;

    /// Makes a weight usable.
    fn load(&self, tensor: &Tensor) -> Result<Self::Weight>;
    /// Rotary angles for positions `0..positions`; `inv_freq` `[Hd/2]`.
    fn rope_table(&self, inv_freq: &[f32], positions: usize) -> Self::Rope;
    /// A copy of a buffer.
    fn copy(&self, x: &Self::Buf) -> Self::Buf;
    /// Bytes of one element of a buffer.
    fn element_bytes(&self) -> usize;

    /// Bytes that [`Backend::loss`] needs besides its arguments and result, for N = `tokens`.
    fn loss_workspace_bytes(&self, vocab_size: usize, hidden_size: usize, tokens: usize) -> u64;

    /// Bytes that [`Backend::linear`] and its backward need besides arguments and result, for N = `tokens` and
    /// an input of `width`.
    fn product_workspace_bytes(&self, width: usize, tokens: usize) -> u64;

    /// See [`crate::model::op::Op::Embed`]; → `[N, D]`.
    fn embed(&self, table: &Self::Weight, ids: &[u32]) -> Self::Buf;

    /// See [`crate::model::op::Op::Norm`]; x `[N, width]` → `[N, width]`.
    fn norm(&self, x: &Self::Buf, weight: &Self::Weight, eps: f64) -> Self::Buf;
    /// dx += r·(w∘dy) − x·r³·⟨w∘dy, x⟩/width with r = 1/√(mean(x²) + eps), per row.
    fn norm_backward(
        &self,
        x: &Self::Buf,
        weight: &Self::Weight,
        eps: f64,
        dy: &Self::Buf,
        dx: Option<Self::Buf>,
    ) -> Self::Buf;

    /// See [`crate::model::op::Op::Linear`]; x `[N, in]`, weight `[out, in]` → `[N, out]`.
    fn linear(&self, x: &Self::Buf, weight: &Self::Weight, bias: Option<&Self::Weight>) -> Self::Buf;
    /// dx += dy·W; dy `[N, out]` → `[N, in]`.
    fn linear_backward(&self, weight: &Self::Weight, dy: &Self::Buf, dx: Option<Self::Buf>) -> Self::Buf;

    /// See [`crate::model::op::Op::Rope`]; x `[N, heads·Hd]` → the same shape.
    fn rope(&self, x: &Self::Buf, heads: usize, table: &Self::Rope, chunk: &Chunk) -> Self::Buf;
    /// dx += the rotation by the negated angle of dy.
    fn rope_backward(
        &self,
        dy: &Self::Buf,
        heads: usize,
        table: &Self::Rope,
        chunk: &Chunk,
        dx: Option<Self::Buf>,
    ) -> Self::Buf;

    /// See [`crate::model::op::Op::Attend`].
    fn attend(&self, qkv: [&Self::Buf; 3], attention: &Attention, chunk: &Chunk) -> Self::Buf;
    /// With P = softmax(scale·q·kᵀ) and dP = dout·vᵀ: dS = P∘(dP − ⟨P, dP⟩);
    /// dq += scale·dS·k, dk += scale·dSᵀ·q, dv += Pᵀ·dout.
    fn attend_backward(
        &self,
        qkv: [&Self::Buf; 3],
        attention: &Attention,
        chunk: &Chunk,
        dout: &Self::Buf,
        dqkv: [Option<Self::Buf>; 3],
    ) -> [Self::Buf; 3];

    /// See [`crate::model::op::Op::Gate`].
    fn gate(&self, gate: &Self::Buf, up: &Self::Buf, activation: Activation) -> Self::Buf;
    /// dgate += dout∘up∘act'(gate), dup += dout∘act(gate).
    fn gate_backward(
        &self,
        gate: &Self::Buf,
        up: &Self::Buf,
        activation: Activation,
        dout: &Self::Buf,
        dgate_dup: [Option<Self::Buf>; 2],
    ) -> [Self::Buf; 2];

    /// See [`crate::model::op::Op::Add`].
    fn add(&self, a: &Self::Buf, b: &Self::Buf) -> Self::Buf;
    /// dx += dy, the backward of each operand of an addition.
    fn add_backward(&self, dy: &Self::Buf, dx: Option<Self::Buf>) -> Self::Buf;

    /// See [`crate::model::op::Op::Loss`]: nats of each sample, summed over its T_s − 1 targets `[B]`, and
    /// `dx = Σ_s loss_scales[s]·d nats[s]/dx`, `[N, D]`, zero in each sample's last row, when `want_gradient`.
    fn loss(
        &self,
        x: &Self::Buf,
        weight: &Self::Weight,
        chunk: &Chunk,
        want_gradient: bool,
    ) -> (Vec<f64>, Option<Self::Buf>);

    /// Adds the rows of each sample in `samples` (ranges of rows) to `into`. Each sample is summed by
    /// itself in float64 before it is added, so the result is the same for any cut into chunks.
    fn moments(&self, x: &Self::Buf, samples: &[Range<usize>], into: &mut Moments) -> Result<(), NonFinite>;
}
