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
mod lower;
mod sae;

use std::ops::Range;

pub use lower::{Appetite, Lower};
pub use sae::{FeatureSums, FeatureValues, Fit, Place, Positions, SaeBackend, SaeGradient, SampleRows};

use crate::error::Result;
use crate::model::op::{Attention, RmsNorm, Site, Weight};
use crate::model::{Activation, Packing, Tensor};

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

impl AsRef<Chunk> for Chunk {
    fn as_ref(&self) -> &Self {
        self
    }
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
    /// What is left of Σ v, Σ |v| and Σ v² below their last digits, where sums over parts are to be added. `[width]` or
    /// empty: nothing.
    pub low: [Vec<f64>; 3],
}

impl Moments {
    /// Nothing seen yet.
    pub fn new(width: usize) -> Self {
        let zeros = || vec![0.0; width];
        Self { sum: zeros(), sum_abs: zeros(), sum_sq: zeros(), max_abs: zeros(), ..Self::default() }
    }

    /// Adds the sums over other tokens, of which nothing is lost until [`Moments::round`].
    pub fn add(&mut self, more: &Self) {
        let width = self.sum.len();
        for (index, (sums, more_sums)) in
            [(&mut self.sum, &more.sum), (&mut self.sum_abs, &more.sum_abs), (&mut self.sum_sq, &more.sum_sq)]
                .into_iter()
                .enumerate()
        {
            let low = &mut self.low[index];
            low.resize(width, 0.0);
            let more_low = more.low[index].iter().copied().chain(std::iter::repeat(0.0));
            for (((sum, low), more), more_low) in sums.iter_mut().zip(low).zip(more_sums).zip(more_low) {
                // Knuth's TwoSum: next + left is exactly sum + more.
                let next = *sum + more;
                let part = next - *sum;
                let left = (*sum - (next - part)) + (more - part);
                *low += left + more_low;
                *sum = next;
            }
        }
        self.max_abs.iter_mut().zip(&more.max_abs).for_each(|(max, more)| *max = max.max(*more));
        self.count += more.count;
    }

    /// Rounds each sum once.
    pub fn round(&mut self) {
        for (sums, low) in [&mut self.sum, &mut self.sum_abs, &mut self.sum_sq].into_iter().zip(&mut self.low)
        {
            sums.iter_mut().zip(low.drain(..)).for_each(|(sum, low)| *sum += low);
        }
    }
}

/// A sample whose values are not all finite: its index in the chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NonFinite(pub usize);

/// Weights by their number in [`crate::model::Program::weights`], as far as they are loaded.
pub struct Weights<W>(pub Vec<Option<W>>);

impl<W> Weights<W> {
    /// A weight.
    ///
    /// # Panics
    /// It is not loaded: a block runs without having been entered.
    pub fn get(&self, weight: Weight) -> &W {
        match &self.0[weight.0] {
            Some(loaded) => loaded,
            None => panic!("weight {} is not loaded", weight.0),
        }
    }
}

/// What the ops of a block share.
pub struct Scope<'a, B: Backend + ?Sized> {
    /// Loaded weights, those of the block among them.
    pub weights: &'a Weights<B::Weight>,
    /// Rotary angles for all positions of the chunk, in the order of [`crate::model::Spec::inv_freq`].
    pub ropes: &'a [B::Rope],
    /// The samples.
    pub chunk: &'a B::Chunk,
}

/// Called with the site and the value or gradient there.
pub type OnTap<'a, Buf> = &'a mut dyn FnMut(Site, &Buf) -> Result<()>;

/// A device with the ops of [`crate::model::op::Op`]. Buffers are `[rows, width]`, row-major.
///
/// A device may still be busy when a method returns; what it computed is known after [`Backend::read_moments`],
/// [`Backend::is_finite`] and [`Backend::nats`]. Methods fail where memory runs out or the device does.
///
/// Methods do not check shapes against each other for the user: the op list was built from a checked
/// configuration. A mismatch is a bug and may panic.
pub trait Backend: Lower {
    /// An activation, `[N, width]`.
    type Buf;
    /// A weight, where this backend wants it.
    type Weight;
    /// Room for a weight.
    type Room;
    /// Rotary angles for a range of positions.
    type Rope;
    /// A chunk, where this backend wants it.
    type Chunk: AsRef<Chunk>;
    /// Per-dimension sums where this backend adds them up.
    type Moments;
    /// Whether values that were added up were finite, once it is known.
    type Finite;
    /// Which experts each token of a chunk goes to.
    type Routes;
    /// Nats of each sample, once they are known.
    type Nats;
    /// A moment in the device's work.
    type Mark;

    /// The moment at which everything asked for so far is done.
    fn mark(&self) -> Result<Self::Mark>;
    /// Waits for a moment.
    fn wait(&self, mark: &Self::Mark) -> Result<()>;
    /// Seconds between two moments, after waiting for them.
    fn seconds_between(&self, from: &Self::Mark, to: &Self::Mark) -> Result<f64>;

    /// Makes room for a weight, which [`Backend::load`] fills: work that is asked for between the two need not wait
    /// for the weight.
    fn room(&self, tensors: &[&Tensor]) -> Result<Self::Room>;
    /// Makes a weight of tensors usable by all work that is asked for from now on.
    fn load(&self, room: Self::Room, tensors: &[&Tensor], packing: Packing) -> Result<Self::Weight>;
    /// Takes a chunk to where its ops need it.
    fn place(&self, chunk: Chunk) -> Result<Self::Chunk>;
    /// Rotary angles for positions `0..positions`; `inv_freq` `[Hd/2]`.
    fn rope_table(&self, inv_freq: &[f32], positions: usize) -> Result<Self::Rope>;

    /// See [`crate::model::op::Op::Embed`]; → `[N, D]`.
    fn embed(&self, table: &Self::Weight, scale: f64, chunk: &Self::Chunk) -> Result<Self::Buf>;

    /// See [`crate::model::op::Op::Norm`]; x `[N, k·width]` → the same shape.
    fn norm(&self, x: &Self::Buf, weight: &Self::Weight, norm: RmsNorm) -> Result<Self::Buf>;
    /// dx += r·(w∘dy) − x·r³·⟨w∘dy, x⟩/width with r = 1/√(mean(x²) + eps), per run; w with its offset.
    fn norm_backward(
        &self,
        x: &Self::Buf,
        weight: &Self::Weight,
        norm: RmsNorm,
        dy: &Self::Buf,
        dx: Option<Self::Buf>,
    ) -> Result<Self::Buf>;

    /// See [`crate::model::op::Op::Linear`]; x `[N, in]`, weight `[out, in]` → `[N, out]`.
    fn linear(&self, x: &Self::Buf, weight: &Self::Weight, bias: Option<&Self::Weight>) -> Result<Self::Buf>;
    /// dx += dy·W; dy `[N, out]` → `[N, in]`.
    fn linear_backward(
        &self,
        weight: &Self::Weight,
        dy: &Self::Buf,
        dx: Option<Self::Buf>,
    ) -> Result<Self::Buf>;

    /// See [`crate::model::op::Op::Rope`]; x `[N, heads·Hd]` → the same shape.
    fn rope(&self, x: &Self::Buf, heads: usize, table: &Self::Rope, chunk: &Self::Chunk)
    -> Result<Self::Buf>;
    /// dx += the rotation by the negated angle of dy.
    fn rope_backward(
        &self,
        dy: &Self::Buf,
        heads: usize,
        table: &Self::Rope,
        chunk: &Self::Chunk,
        dx: Option<Self::Buf>,
    ) -> Result<Self::Buf>;

    /// See [`crate::model::op::Op::Attend`].
    fn attend(&self, qkv: [&Self::Buf; 3], attention: &Attention, chunk: &Self::Chunk) -> Result<Self::Buf>;
    /// With P = softmax(scale·q·kᵀ) and dP = dout·vᵀ: dS = P∘(dP − ⟨P, dP⟩), with a soft-cap c of scores s times
    /// 1 − (s/c)²; dq += scale·dS·k, dk += scale·dSᵀ·q, dv += Pᵀ·dout.
    fn attend_backward(
        &self,
        qkv: [&Self::Buf; 3],
        attention: &Attention,
        chunk: &Self::Chunk,
        dout: &Self::Buf,
        dqkv: [Option<Self::Buf>; 3],
    ) -> Result<[Self::Buf; 3]>;

    /// See [`crate::model::op::Op::Gate`].
    fn gate(&self, gate: &Self::Buf, up: &Self::Buf, activation: Activation) -> Result<Self::Buf>;
    /// dgate += dout∘up∘act'(gate), dup += dout∘act(gate).
    fn gate_backward(
        &self,
        gate: &Self::Buf,
        up: &Self::Buf,
        activation: Activation,
        dout: &Self::Buf,
        dgate_dup: [Option<Self::Buf>; 2],
    ) -> Result<[Self::Buf; 2]>;

    /// See [`crate::model::op::Op::Route`]; logits `[N, E]` → `[N, k]`.
    fn route(&self, logits: &Self::Buf, top_k: usize) -> Result<(Self::Buf, Self::Routes)>;
    /// `dlogits[n, e] += sⱼ·(dsⱼ − Σᵢ sᵢ·dsᵢ)` where e is n's j-th expert. `experts`: E.
    fn route_backward(
        &self,
        scores: &Self::Buf,
        routes: &Self::Routes,
        dscores: &Self::Buf,
        experts: usize,
        dlogits: Option<Self::Buf>,
    ) -> Result<Self::Buf>;

    /// See [`crate::model::op::Op::Dispatch`].
    fn dispatch(&self, x: &Self::Buf, routes: &Self::Routes) -> Result<Self::Buf>;
    /// `dx[n]` += the sum of the rows of dy that are token n's, in the order of their experts.
    fn dispatch_backward(
        &self,
        dy: &Self::Buf,
        routes: &Self::Routes,
        dx: Option<Self::Buf>,
    ) -> Result<Self::Buf>;

    /// See [`crate::model::op::Op::ExpertLinear`]; one weight per expert, `[out, in]`, or what [`Lower::lower`] has made
    /// of them.
    fn expert_linear(
        &self,
        x: &Self::Buf,
        weights: &[&Self::Weight],
        routes: &Self::Routes,
    ) -> Result<Self::Buf>;
    /// dx += dy·Wₑ, row by row.
    fn expert_linear_backward(
        &self,
        weights: &[&Self::Weight],
        routes: &Self::Routes,
        dy: &Self::Buf,
        dx: Option<Self::Buf>,
    ) -> Result<Self::Buf>;

    /// See [`crate::model::op::Op::Combine`].
    fn combine(&self, x: &Self::Buf, scores: &Self::Buf, routes: &Self::Routes) -> Result<Self::Buf>;
    /// `dx[row of (n, j)] += scores[n, j]·dout[n]`, `dscores[n, j] += ⟨x[row of (n, j)], dout[n]⟩`.
    fn combine_backward(
        &self,
        x: &Self::Buf,
        scores: &Self::Buf,
        routes: &Self::Routes,
        dout: &Self::Buf,
        dx_dscores: [Option<Self::Buf>; 2],
    ) -> Result<[Self::Buf; 2]>;

    /// See [`crate::model::op::Op::Add`].
    fn add(&self, a: &Self::Buf, b: &Self::Buf) -> Result<Self::Buf>;
    /// dx += dy, the backward of each operand of an addition.
    fn add_backward(&self, dy: &Self::Buf, dx: Option<Self::Buf>) -> Result<Self::Buf>;

    /// See [`crate::model::op::Op::Loss`]: nats of each sample, summed over its T_s − 1 targets `[B]`, and
    /// `dx = Σ_s loss_scales[s]·d nats[s]/dx`, `[N, D]`, zero in each sample's last row, when `want_gradient`.
    fn loss(
        &self,
        x: &Self::Buf,
        weight: &Self::Weight,
        softcap: Option<f64>,
        chunk: &Self::Chunk,
        want_gradient: bool,
    ) -> Result<(Self::Nats, Option<Self::Buf>)>;
    /// The nats, after waiting for them. `[B]`
    fn nats(&self, nats: Self::Nats) -> Result<Vec<f64>>;

    /// Runs a fused op on the slots of its block. Of its outputs, those are written that `wanted` names; where that
    /// is not what a tap shows, nothing need be shown. `routes`: what the block's router chose, if it has.
    fn fused(
        &self,
        op: &Self::Fused,
        scope: &Scope<'_, Self>,
        wanted: &[bool],
        slots: &mut [Option<Self::Buf>],
        routes: Option<&Self::Routes>,
        on_tap: OnTap<'_, Self::Buf>,
    ) -> Result<()>;
    /// Takes the gradients of a fused op's outputs and adds to those of its inputs.
    fn fused_backward(
        &self,
        op: &Self::Fused,
        scope: &Scope<'_, Self>,
        slots: &[Option<Self::Buf>],
        grads: &mut [Option<Self::Buf>],
        routes: Option<&Self::Routes>,
        on_tap: OnTap<'_, Self::Buf>,
    ) -> Result<()>;

    /// Sums over nothing yet.
    fn new_moments(&self, width: usize) -> Result<Self::Moments>;
    /// Adds the rows of each range in `samples`, a sample or a run of its rows, to `into`. Each is summed by itself, so
    /// the result is the same for any cut into chunks.
    fn moments(
        &self,
        x: &Self::Buf,
        samples: &[Range<usize>],
        into: &mut Self::Moments,
    ) -> Result<Self::Finite>;
    /// Whether the values were finite, after waiting for them; if not, the first sample with one that is not.
    fn is_finite(&self, finite: Self::Finite) -> Result<Result<(), NonFinite>>;
    /// The sums, after waiting for them.
    fn read_moments(&self, moments: &Self::Moments) -> Result<Moments>;

    /// ‖x‖₂ of each row, summed in float64, after waiting for it: a row's does not depend on the others. x `[N, width]`
    /// → `[N]`
    fn row_norms(&self, x: &Self::Buf) -> Result<Vec<f64>>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_of_parts_are_those_of_the_whole() {
        // Each value disappears in the sum before it.
        let values = [1.0, 2f64.powi(-60), -2f64.powi(-58), 2f64.powi(60), 3.0, -2f64.powi(60)];
        let over = |values: &[f64]| {
            let mut sums = Moments::new(1);
            for &value in values {
                let mut one = Moments { sum: vec![value], count: 1, ..Moments::new(1) };
                (one.sum_abs, one.sum_sq, one.max_abs) = (vec![value.abs()], vec![0.0], vec![value.abs()]);
                sums.add(&one);
            }
            sums
        };
        for cut in 0..=values.len() {
            let (first, second) = values.split_at(cut);
            let mut sums = over(first);
            sums.add(&over(second));
            sums.round();
            assert_eq!(sums.sum, [4.0], "cut at {cut}");
            assert_eq!((sums.max_abs[0], sums.count), (2f64.powi(60), 6));
            assert!(sums.low.iter().all(Vec::is_empty));
        }
    }
}
