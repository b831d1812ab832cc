//! The CPU backend with one op wrong.

use std::convert::Infallible;
use std::ops::Range;
use std::time::Instant;

use gradlens::backend::cpu::{Buf, Cpu, RopeTable, Routes};
use gradlens::backend::{Appetite, Backend, Chunk, Lower, Moments, NonFinite, OnTap, Scope};
use gradlens::error::Result;
use gradlens::model::op::{Attention, Block, RmsNorm};
use gradlens::model::{Activation, Packing, Program, Spec, Tensor, Usage};

use super::by_hand;

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mistake {
    /// Nothing.
    None,
    /// Nothing, but the gradients of attention and loss are computed by the loops in which the next two are planted.
    OwnLoops,
    /// A soft-cap of attention scores has the derivative 1.
    NoSlopeOfScores,
    /// A soft-cap of logits has the derivative 1.
    NoSlopeOfLogits,
    /// Scores have no gradient.
    NoGradientOfScores,
    /// Logits of the router have no gradient.
    NoGradientOfRouter,
    /// The softmax of the chosen experts' logits has the derivative of its diagonal alone.
    DiagonalOfRouter,
    /// Scores are the softmax over all experts.
    NotRenormalised,
    /// What comes back from an expert is not multiplied by its score.
    NoScoreOnTheWayBack,
    /// On the way back two experts exchange their weights.
    OtherExpertsBackward,
    /// The gradient of a token is that of its first expert.
    FirstExpertBackward,
    /// the first of the rows sorted by expert gives no gradient.
    FirstRowLost,
    /// The backward of a norm takes the stored weight as it is.
    NoOffsetBackward,
    /// The backward of a norm holds the root mean square for a constant.
    ConstantRms,
    /// What a norm's input has for a gradient so far is lost: the residual stream's.
    NormLosesTheStream,
    /// What a linear op's input has for a gradient so far is lost: the other projections'.
    LinearLosesTheOthers,
    /// Nothing comes back through attention.
    NoGradientOfAttention,
    /// Nothing comes back through the MLP's gate.
    NoGradientOfMlp,
    /// On the way back each position sees one more.
    WiderWindowBackward,
    /// Queries and keys turn forwards on the way back.
    RopeTurnsForwards,
    /// The derivative of the other activation.
    OtherActivationBackward,
    /// The value of the gate has no gradient.
    NoGradientOfGate,
}

pub struct Faulty {
    cpu: Cpu<f32>,
    mistake: Mistake,
}

impl Faulty {
    pub fn new(mistake: Mistake) -> Self {
        Self { cpu: Cpu::new(), mistake }
    }

    fn has(&self, mistake: Mistake) -> bool {
        self.mistake == mistake
    }

    fn zeros_like(&self, x: &Buf<f32>) -> Buf<f32> {
        self.cpu.from_slice(&vec![0.0; x.len()], x.width())
    }

    /// `into` plus `values`.
    fn add_to(&self, into: Option<Buf<f32>>, values: &[f32], width: usize) -> Result<Buf<f32>> {
        self.cpu.add_backward(&self.cpu.from_slice(values, width), into)
    }
}

/// Methods that are the CPU's.
macro_rules! as_it_is {
    ($(fn $name:ident($($argument:ident: $type:ty),* $(,)?) -> $out:ty;)*) => {
        $(fn $name(&self, $($argument: $type),*) -> $out {
            self.cpu.$name($($argument),*)
        })*
    };
}

impl Lower for Faulty {
    type Fused = Infallible;

    as_it_is! {
        fn lower(spec: &Spec, usages: &[Usage]) -> Program<Infallible>;
        fn appetite(spec: &Spec, gradients: bool) -> Appetite;
        fn slot_bytes(block: &Block, tokens: usize) -> Vec<u64>;
        fn gradient_bytes(block: &Block, tokens: usize) -> Vec<u64>;
        fn weight_bytes(shapes: &[&[usize]]) -> u64;
        fn temporary_bytes(block: &Block, index: usize, tokens: usize) -> [u64; 2];
        fn placed_bytes() -> u64;
        fn statistics_bytes(widths: &[usize], gradients: bool, chunks: usize, tokens: usize) -> u64;
        fn rope_bytes(pairs: usize, positions: usize) -> u64;
        fn loss_workspace_bytes(spec: &Spec, tokens: usize) -> u64;
        fn product_workspace_bytes(width: usize, tokens: usize) -> u64;
    }
}

type Activations = Buf<f32>;
type Given = Option<Buf<f32>>;

impl Backend for Faulty {
    type Buf = Buf<f32>;
    type Weight = Tensor;
    type Room = ();
    type Rope = RopeTable<f32>;
    type Chunk = Chunk;
    type Moments = Moments;
    type Routes = Routes;
    type Finite = std::result::Result<(), NonFinite>;
    type Nats = Vec<f64>;
    type Mark = Instant;

    as_it_is! {
        fn mark() -> Result<Instant>;
        fn wait(mark: &Instant) -> Result<()>;
        fn seconds_between(from: &Instant, to: &Instant) -> Result<f64>;
        fn room(tensors: &[&Tensor]) -> Result<()>;
        fn load(room: (), tensors: &[&Tensor], packing: Packing) -> Result<Tensor>;
        fn place(chunk: Chunk) -> Result<Chunk>;
        fn rope_table(inv_freq: &[f32], positions: usize) -> Result<RopeTable<f32>>;
        fn embed(table: &Tensor, scale: f64, chunk: &Chunk) -> Result<Activations>;
        fn norm(x: &Activations, weight: &Tensor, norm: RmsNorm) -> Result<Activations>;
        fn linear(x: &Activations, weight: &Tensor, bias: Option<&Tensor>) -> Result<Activations>;
        fn rope(x: &Activations, heads: usize, table: &RopeTable<f32>, chunk: &Chunk) -> Result<Activations>;
        fn attend(qkv: [&Activations; 3], attention: &Attention, chunk: &Chunk) -> Result<Activations>;
        fn gate(gate: &Activations, up: &Activations, activation: Activation) -> Result<Activations>;
        fn dispatch(x: &Activations, routes: &Routes) -> Result<Activations>;
        fn expert_linear(x: &Activations, weights: &[&Tensor], routes: &Routes) -> Result<Activations>;
        fn combine(x: &Activations, scores: &Activations, routes: &Routes) -> Result<Activations>;
        fn add(a: &Activations, b: &Activations) -> Result<Activations>;
        fn add_backward(dy: &Activations, dx: Given) -> Result<Activations>;
        fn nats(nats: Vec<f64>) -> Result<Vec<f64>>;
        fn new_moments(width: usize) -> Result<Moments>;
        fn moments(
            x: &Activations,
            samples: &[Range<usize>],
            into: &mut Moments,
        ) -> Result<std::result::Result<(), NonFinite>>;
        fn is_finite(
            finite: std::result::Result<(), NonFinite>,
        ) -> Result<std::result::Result<(), NonFinite>>;
        fn read_moments(moments: &Moments) -> Result<Moments>;
        fn row_norms(x: &Activations) -> Result<Vec<f64>>;
    }

    fn norm_backward(
        &self,
        x: &Activations,
        weight: &Tensor,
        norm: RmsNorm,
        dy: &Activations,
        dx: Given,
    ) -> Result<Activations> {
        match self.mistake {
            Mistake::NoOffsetBackward => {
                self.cpu.norm_backward(x, weight, RmsNorm { offset: 0.0, ..norm }, dy, dx)
            }
            Mistake::ConstantRms => {
                // The same norm of dy, times rms(dy) / rms(x).
                let runs = x.chunks(weight.len()).zip(dy.chunks(weight.len()));
                let rms = |run: &[f32]| {
                    let squares: f64 = run.iter().map(|v| f64::from(*v).powi(2)).sum();
                    (squares / weight.len() as f64 + norm.eps).sqrt()
                };
                let scales = runs.map(|(x, dy)| rms(dy) / rms(x));
                let normed = self.cpu.norm(dy, weight, norm)?;
                let scaled: Vec<f32> = normed
                    .chunks(weight.len())
                    .zip(scales)
                    .flat_map(|(run, scale)| run.iter().map(move |v| (f64::from(*v) * scale) as f32))
                    .collect();
                self.add_to(dx, &scaled, x.width())
            }
            Mistake::NormLosesTheStream => self.cpu.norm_backward(x, weight, norm, dy, None),
            _ => self.cpu.norm_backward(x, weight, norm, dy, dx),
        }
    }

    fn linear_backward(&self, weight: &Tensor, dy: &Activations, dx: Given) -> Result<Activations> {
        self.cpu.linear_backward(weight, dy, dx.filter(|_| !self.has(Mistake::LinearLosesTheOthers)))
    }

    fn rope_backward(
        &self,
        dy: &Activations,
        heads: usize,
        table: &RopeTable<f32>,
        chunk: &Chunk,
        dx: Given,
    ) -> Result<Activations> {
        match self.mistake {
            Mistake::RopeTurnsForwards => self.cpu.add_backward(&self.cpu.rope(dy, heads, table, chunk)?, dx),
            _ => self.cpu.rope_backward(dy, heads, table, chunk, dx),
        }
    }

    fn attend_backward(
        &self,
        qkv: [&Activations; 3],
        attention: &Attention,
        chunk: &Chunk,
        dout: &Activations,
        dqkv: [Given; 3],
    ) -> Result<[Activations; 3]> {
        let gradients = match self.mistake {
            Mistake::OwnLoops | Mistake::NoSlopeOfScores => {
                let slope = self.has(Mistake::OwnLoops);
                by_hand::attend_backward(qkv.map(|x| &**x), attention, chunk, dout, slope)
            }
            Mistake::NoGradientOfAttention => qkv.map(|x| vec![0.0; x.len()]),
            Mistake::WiderWindowBackward => {
                let wider = Attention { window: attention.window.map(|w| w + 1), ..*attention };
                return self.cpu.attend_backward(qkv, &wider, chunk, dout, dqkv);
            }
            _ => return self.cpu.attend_backward(qkv, attention, chunk, dout, dqkv),
        };
        let [q, k, v] = [0, 1, 2].map(|i| (&gradients[i], qkv[i].width()));
        let [dq, dk, dv] = dqkv;
        Ok([self.add_to(dq, q.0, q.1)?, self.add_to(dk, k.0, k.1)?, self.add_to(dv, v.0, v.1)?])
    }

    fn gate_backward(
        &self,
        gate: &Activations,
        up: &Activations,
        activation: Activation,
        dout: &Activations,
        dgate_dup: [Given; 2],
    ) -> Result<[Activations; 2]> {
        let other = match activation {
            Activation::Silu => Activation::GeluTanh,
            Activation::GeluTanh => Activation::Silu,
        };
        match self.mistake {
            Mistake::OtherActivationBackward => self.cpu.gate_backward(gate, up, other, dout, dgate_dup),
            Mistake::NoGradientOfMlp => {
                self.cpu.gate_backward(gate, up, activation, &self.zeros_like(dout), dgate_dup)
            }
            Mistake::NoGradientOfGate => {
                let [_, dup] = self.cpu.gate_backward(gate, up, activation, dout, dgate_dup)?;
                Ok([self.zeros_like(gate), dup])
            }
            _ => self.cpu.gate_backward(gate, up, activation, dout, dgate_dup),
        }
    }

    fn route(&self, logits: &Activations, top_k: usize) -> Result<(Activations, Routes)> {
        let (mut scores, routes) = self.cpu.route(logits, top_k)?;
        if self.has(Mistake::NotRenormalised) {
            for (scores, logits) in scores.chunks_mut(top_k).zip(logits.chunks(logits.width())) {
                let mut exponentials: Vec<f32> = logits.iter().map(|z| z.exp()).collect();
                exponentials.sort_unstable_by(|a, b| b.total_cmp(a));
                let part = exponentials[..top_k].iter().sum::<f32>() / exponentials.iter().sum::<f32>();
                scores.iter_mut().for_each(|score| *score *= part);
            }
        }
        Ok((scores, routes))
    }

    fn route_backward(
        &self,
        scores: &Activations,
        routes: &Routes,
        dscores: &Activations,
        experts: usize,
        dlogits: Given,
    ) -> Result<Activations> {
        match self.mistake {
            Mistake::NoGradientOfRouter => {
                self.cpu.route_backward(scores, routes, &self.zeros_like(dscores), experts, dlogits)
            }
            Mistake::DiagonalOfRouter => {
                // δ·(s∘ds / δ − Σ s∘ds) is s∘ds but for terms of δ.
                const DELTA: f32 = 1.0 / (1 << 20) as f32;
                let deltas = vec![DELTA; scores.len()];
                let products: Vec<f32> =
                    scores.iter().zip(&**dscores).map(|(s, ds)| s * ds / DELTA).collect();
                let [deltas, products] =
                    [deltas, products].map(|values| self.cpu.from_slice(&values, scores.width()));
                self.cpu.route_backward(&deltas, routes, &products, experts, dlogits)
            }
            _ => self.cpu.route_backward(scores, routes, dscores, experts, dlogits),
        }
    }

    fn dispatch_backward(&self, dy: &Activations, routes: &Routes, dx: Given) -> Result<Activations> {
        match self.mistake {
            Mistake::FirstExpertBackward => {
                // Of the rows of a token the first: a combination with the scores 1 and 0.
                let top_k = dy.rows() / self.cpu.dispatch_backward(dy, routes, None)?.rows();
                let first = |pair: usize| if pair.is_multiple_of(top_k) { 1.0 } else { 0.0 };
                let scores: Vec<f32> = (0..dy.rows()).map(first).collect();
                let first = self.cpu.combine(dy, &self.cpu.from_slice(&scores, top_k), routes)?;
                self.cpu.add_backward(&first, dx)
            }
            Mistake::FirstRowLost => {
                let mut most = self.cpu.from_slice(dy, dy.width());
                most[..dy.width()].fill(0.0);
                self.cpu.dispatch_backward(&most, routes, dx)
            }
            _ => self.cpu.dispatch_backward(dy, routes, dx),
        }
    }

    fn expert_linear_backward(
        &self,
        weights: &[&Tensor],
        routes: &Routes,
        dy: &Activations,
        dx: Given,
    ) -> Result<Activations> {
        let mut weights = weights.to_vec();
        if self.has(Mistake::OtherExpertsBackward) {
            weights.swap(0, 1);
        }
        self.cpu.expert_linear_backward(&weights, routes, dy, dx)
    }

    fn combine_backward(
        &self,
        x: &Activations,
        scores: &Activations,
        routes: &Routes,
        dout: &Activations,
        dx_dscores: [Given; 2],
    ) -> Result<[Activations; 2]> {
        match self.mistake {
            Mistake::NoGradientOfScores => {
                let [dx, _] = self.cpu.combine_backward(x, scores, routes, dout, dx_dscores)?;
                Ok([dx, self.zeros_like(scores)])
            }
            Mistake::NoScoreOnTheWayBack => {
                let ones = self.cpu.from_slice(&vec![1.0; scores.len()], scores.width());
                self.cpu.combine_backward(x, &ones, routes, dout, dx_dscores)
            }
            _ => self.cpu.combine_backward(x, scores, routes, dout, dx_dscores),
        }
    }

    fn loss(
        &self,
        x: &Activations,
        weight: &Tensor,
        softcap: Option<f64>,
        chunk: &Chunk,
        want_gradient: bool,
    ) -> Result<(Vec<f64>, Given)> {
        let (nats, dx) = self.cpu.loss(x, weight, softcap, chunk, want_gradient)?;
        if want_gradient && matches!(self.mistake, Mistake::OwnLoops | Mistake::NoSlopeOfLogits) {
            let logits = self.cpu.linear(x, weight, None)?;
            let slope = self.has(Mistake::OwnLoops);
            let dlogits = by_hand::loss_backward(&logits, softcap, chunk, slope);
            let dlogits = self.cpu.from_slice(&dlogits, logits.width());
            return Ok((nats, Some(self.cpu.linear_backward(weight, &dlogits, None)?)));
        }
        Ok((nats, dx))
    }

    fn fused(
        &self,
        op: &Infallible,
        _: &Scope<'_, Self>,
        _: &[bool],
        _: &mut [Given],
        _: Option<&Routes>,
        _: OnTap<'_, Activations>,
    ) -> Result<()> {
        match *op {}
    }

    fn fused_backward(
        &self,
        op: &Infallible,
        _: &Scope<'_, Self>,
        _: &[Given],
        _: &mut [Given],
        _: Option<&Routes>,
        _: OnTap<'_, Activations>,
    ) -> Result<()> {
        match *op {}
    }
}
