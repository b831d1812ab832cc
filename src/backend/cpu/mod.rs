//! The CPU backend: the oracle every other backend is checked against, and an engine of its own.
//!
//! Generic over the element type: `Cpu<f32>` runs jobs, `Cpu<f64>` checks gradients against central
//! differences. Weights stay where they lie (a mapped file); a matrix product converts the tile it is about
//! to multiply, which stays in the cache, so no converted copy of a weight ever exists.
//!
//! Results do not depend on the number of threads, nor on how samples are cut into chunks: every output
//! element is computed by one task, in an order fixed by shapes of the model and of the sample alone.

#[cfg_attr(not(all(target_arch = "x86_64", target_os = "linux")), path = "amx/absent.rs")]
mod amx;
mod attention;
mod buf;
mod element;
mod elementwise;
mod linear;
mod loss;
mod matmul;
mod moe;
mod moments;
mod norm;
mod product;
mod rope;
mod sae;

use std::convert::Infallible;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use rayon::prelude::*;

pub use buf::Buf;
use buf::Pool;
pub use element::Element;
pub use moe::Routes;
pub use rope::RopeTable;

use super::{Appetite, Backend, Chunk, Lower, Moments, NonFinite, OnTap, Scope};
use crate::error::Result;
use crate::model::op::{Attention, Block, RmsNorm};
use crate::model::{Activation, Packing, Program, Spec, Tensor, Usage};

/// Tokens of a pass where the weights do not fit the memory: each pass reads all of them from the disk.
const TOKENS_PER_STREAMED_PASS: usize = 4096;
/// Tokens of a chunk, and of a pass where the weights fit the memory, of values and of gradients: weights are laid out
/// anew for each chunk, so a larger pass would only touch more memory. Gradients keep much for each token. Measured with
/// gradients of a 0.5B shape, 2 cores, 8 and 32 samples of 128 tokens: passes of 512 tokens 258 and 265 tokens/s,
/// of 1,024 tokens 233 and 277, of 4,096 tokens 195.
const CHUNK_TOKENS: [usize; 2] = [1024, 512];

/// Elements of one task of a copy.
const COPIED: usize = 1 << 16;

/// The CPU as a device, with its recycled buffers. `T` is the type of all activations and sums in ops.
pub struct Cpu<T> {
    pool: Arc<Pool<T>>,
    /// Compiles a closure for the instruction sets of this machine.
    simd: pulp::Arch,
    /// The processor's tile unit, if products with stored weights run there.
    tiles: Option<amx::Amx>,
}

/// A closure for [`Cpu::vectorised`]. Called as `FnMut`: as `FnOnce`, which `pulp` takes, it would be called through a
/// function that the compiler may leave where it is.
struct Inlined<F>(F);

impl<R, F: FnMut() -> R> pulp::WithSimd for Inlined<F> {
    type Output = R;

    #[inline(always)]
    fn with_simd<S: pulp::Simd>(mut self, _: S) -> R {
        (self.0)()
    }
}

/// The instruction sets of this processor that matter here, and whether its tile unit is used.
pub fn features() -> Vec<&'static str> {
    let mut found = vec![std::env::consts::ARCH];
    #[cfg(target_arch = "x86_64")]
    {
        let sets = [
            ("AVX2", std::arch::is_x86_feature_detected!("avx2")),
            ("FMA", std::arch::is_x86_feature_detected!("fma")),
            ("AVX-512", std::arch::is_x86_feature_detected!("avx512f")),
        ];
        found.extend(sets.into_iter().filter(|(_, there)| *there).map(|(name, _)| name));
    }
    if amx::Amx::get().is_some() {
        found.push(if Cpu::<f32>::new().tiles.is_some() { "AMX" } else { "AMX (off: GRADLENS_AMX)" });
    }
    found
}

impl<T: Element> Cpu<T> {
    /// A device that uses rayon's current thread pool and the fastest kernels of this processor. The
    /// environment variable `GRADLENS_AMX=off` leaves out the tile unit.
    pub fn new() -> Self {
        Self {
            tiles: amx::Amx::get()
                .filter(|_| T::IS_F32 && std::env::var_os("GRADLENS_AMX").is_none_or(|value| value != "off")),
            ..Self::with_multiply_adds()
        }
    }

    /// The same without the tile unit: every product by float multiply-adds.
    pub fn with_multiply_adds() -> Self {
        Self { pool: Arc::default(), simd: pulp::Arch::new(), tiles: None }
    }

    /// Runs a closure compiled for the instruction sets of this machine. It must be written `#[inline(always)] || …`, and
    /// so must be what it calls: a function that is not inlined is compiled for the least machine.
    fn vectorised<R>(&self, run: impl FnMut() -> R) -> R {
        self.simd.dispatch(Inlined(run))
    }

    /// A buffer with unspecified contents.
    fn alloc(&self, rows: usize, width: usize) -> Buf<T> {
        let len = rows * width;
        let data = self.pool.take(len).unwrap_or_else(|| vec![T::zero(); len]);
        Buf { data, rows, width, pool: Arc::clone(&self.pool) }
    }

    /// A buffer of zeros.
    fn zeros(&self, rows: usize, width: usize) -> Buf<T> {
        let mut buf = self.alloc(rows, width);
        buf.fill(T::zero());
        buf
    }

    /// Makes a buffer from row-major values. `[rows, width]`
    pub fn from_slice(&self, values: &[T], width: usize) -> Buf<T> {
        let mut buf = self.alloc(values.len() / width, width);
        let blocks = buf.par_chunks_mut(COPIED).zip(values.par_chunks(COPIED));
        blocks.for_each(|(to, from)| to.copy_from_slice(from));
        buf
    }
}

impl<T: Element> Default for Cpu<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Element> Lower for Cpu<T> {
    type Fused = Infallible;

    fn lower(&self, spec: &Spec, usages: &[Usage]) -> Program<Infallible> {
        Program::unfused(spec, usages)
    }

    fn appetite(&self, spec: &Spec, gradients: bool) -> Appetite {
        // An expert sees a part of the tokens; so that it has as many rows to multiply, or half of them at least.
        let chunk_tokens = CHUNK_TOKENS[usize::from(gradients)] * (spec.experts_per_choice() / 2).max(1);
        Appetite {
            chunk_tokens,
            least_chunk_tokens: chunk_tokens,
            pass_tokens: chunk_tokens,
            streamed_pass_tokens: TOKENS_PER_STREAMED_PASS,
        }
    }

    fn slot_bytes(&self, block: &Block, tokens: usize) -> Vec<u64> {
        block.widths.iter().map(|width| (width * tokens * size_of::<T>()) as u64).collect()
    }

    fn gradient_bytes(&self, block: &Block, tokens: usize) -> Vec<u64> {
        self.slot_bytes(block, tokens)
    }

    fn weight_bytes(&self, _: &[&[usize]]) -> u64 {
        0
    }

    fn temporary_bytes(&self, _: &Block, _: usize, _: usize) -> [u64; 2] {
        [0, 0]
    }

    fn placed_bytes(&self) -> u64 {
        0
    }

    fn statistics_bytes(&self, _: &[usize], _: bool, _: usize, _: usize) -> u64 {
        0
    }

    fn rope_bytes(&self, _: usize, _: usize) -> u64 {
        0
    }

    fn loss_workspace_bytes(&self, spec: &Spec, tokens: usize) -> u64 {
        let elements =
            loss::workspace_elements(spec.vocab_size, spec.hidden_size, spec.has_capped_logits(), tokens);
        elements * size_of::<T>() as u64
    }

    fn product_workspace_bytes(&self, width: usize, tokens: usize) -> u64 {
        self.left_space_elements(tokens, width) as u64 * size_of::<T>() as u64
    }
}

impl<T: Element> Backend for Cpu<T> {
    type Buf = Buf<T>;
    type Weight = Tensor;
    type Room = ();
    type Rope = RopeTable<T>;
    type Chunk = Chunk;
    type Moments = Moments;
    type Routes = Routes;
    type Finite = Result<(), NonFinite>;
    type Nats = Vec<f64>;
    type Mark = Instant;

    fn mark(&self) -> Result<Instant> {
        Ok(Instant::now())
    }

    fn wait(&self, _: &Instant) -> Result<()> {
        Ok(())
    }

    fn seconds_between(&self, from: &Instant, to: &Instant) -> Result<f64> {
        Ok(to.duration_since(*from).as_secs_f64())
    }

    fn room(&self, _: &[&Tensor]) -> Result<()> {
        Ok(())
    }

    fn load(&self, (): (), tensors: &[&Tensor], _: Packing) -> Result<Tensor> {
        // Nothing is packed here: each weight is one tensor.
        Ok(tensors[0].clone())
    }

    fn place(&self, chunk: Chunk) -> Result<Chunk> {
        Ok(chunk)
    }

    fn rope_table(&self, inv_freq: &[f32], positions: usize) -> Result<RopeTable<T>> {
        Ok(RopeTable::new(inv_freq, positions))
    }

    fn embed(&self, table: &Tensor, scale: f64, chunk: &Chunk) -> Result<Buf<T>> {
        Ok(self.embed_rows(table, scale, &chunk.ids))
    }

    fn norm(&self, x: &Buf<T>, weight: &Tensor, norm: RmsNorm) -> Result<Buf<T>> {
        Ok(self.norm_forward(x, weight, norm))
    }

    fn norm_backward(
        &self,
        x: &Buf<T>,
        weight: &Tensor,
        norm: RmsNorm,
        dy: &Buf<T>,
        dx: Option<Buf<T>>,
    ) -> Result<Buf<T>> {
        Ok(self.norm_adjoint(x, weight, norm, dy, dx))
    }

    fn linear(&self, x: &Buf<T>, weight: &Tensor, bias: Option<&Tensor>) -> Result<Buf<T>> {
        Ok(self.linear_forward(x, weight, bias))
    }

    fn linear_backward(&self, weight: &Tensor, dy: &Buf<T>, dx: Option<Buf<T>>) -> Result<Buf<T>> {
        Ok(self.linear_adjoint(weight, dy, dx))
    }

    fn rope(&self, x: &Buf<T>, heads: usize, table: &RopeTable<T>, chunk: &Chunk) -> Result<Buf<T>> {
        Ok(self.rotate(x, heads, table, chunk, false, None))
    }

    fn rope_backward(
        &self,
        dy: &Buf<T>,
        heads: usize,
        table: &RopeTable<T>,
        chunk: &Chunk,
        dx: Option<Buf<T>>,
    ) -> Result<Buf<T>> {
        Ok(self.rotate(dy, heads, table, chunk, true, dx))
    }

    fn attend(&self, qkv: [&Buf<T>; 3], attention: &Attention, chunk: &Chunk) -> Result<Buf<T>> {
        Ok(self.attend_forward(qkv, attention, chunk))
    }

    fn attend_backward(
        &self,
        qkv: [&Buf<T>; 3],
        attention: &Attention,
        chunk: &Chunk,
        dout: &Buf<T>,
        dqkv: [Option<Buf<T>>; 3],
    ) -> Result<[Buf<T>; 3]> {
        Ok(self.attend_adjoint(qkv, attention, chunk, dout, dqkv))
    }

    fn gate(&self, gate: &Buf<T>, up: &Buf<T>, activation: Activation) -> Result<Buf<T>> {
        Ok(self.gate_forward(gate, up, activation))
    }

    fn gate_backward(
        &self,
        gate: &Buf<T>,
        up: &Buf<T>,
        activation: Activation,
        dout: &Buf<T>,
        dgate_dup: [Option<Buf<T>>; 2],
    ) -> Result<[Buf<T>; 2]> {
        Ok(self.gate_adjoint(gate, up, activation, dout, dgate_dup))
    }

    fn route(&self, logits: &Buf<T>, top_k: usize) -> Result<(Buf<T>, Routes)> {
        Ok(self.choose(logits, top_k))
    }

    fn route_backward(
        &self,
        scores: &Buf<T>,
        routes: &Routes,
        dscores: &Buf<T>,
        experts: usize,
        dlogits: Option<Buf<T>>,
    ) -> Result<Buf<T>> {
        Ok(self.choose_adjoint(scores, routes, dscores, experts, dlogits))
    }

    fn dispatch(&self, x: &Buf<T>, routes: &Routes) -> Result<Buf<T>> {
        Ok(self.gather(x, routes))
    }

    fn dispatch_backward(&self, dy: &Buf<T>, routes: &Routes, dx: Option<Buf<T>>) -> Result<Buf<T>> {
        Ok(self.gather_adjoint(dy, routes, dx))
    }

    fn expert_linear(&self, x: &Buf<T>, weights: &[&Tensor], routes: &Routes) -> Result<Buf<T>> {
        Ok(self.expert_forward(x, weights, routes))
    }

    fn expert_linear_backward(
        &self,
        weights: &[&Tensor],
        routes: &Routes,
        dy: &Buf<T>,
        dx: Option<Buf<T>>,
    ) -> Result<Buf<T>> {
        Ok(self.expert_adjoint(weights, routes, dy, dx))
    }

    fn combine(&self, x: &Buf<T>, scores: &Buf<T>, routes: &Routes) -> Result<Buf<T>> {
        Ok(self.combine_rows(x, scores, routes))
    }

    fn combine_backward(
        &self,
        x: &Buf<T>,
        scores: &Buf<T>,
        routes: &Routes,
        dout: &Buf<T>,
        dx_dscores: [Option<Buf<T>>; 2],
    ) -> Result<[Buf<T>; 2]> {
        Ok(self.combine_adjoint(x, scores, routes, dout, dx_dscores))
    }

    fn add(&self, a: &Buf<T>, b: &Buf<T>) -> Result<Buf<T>> {
        Ok(self.sum(a, b))
    }

    fn add_backward(&self, dy: &Buf<T>, dx: Option<Buf<T>>) -> Result<Buf<T>> {
        match dx {
            None => Ok(self.from_slice(dy, dy.width)),
            Some(mut dx) => {
                self.add_into(&mut dx, dy);
                Ok(dx)
            }
        }
    }

    fn loss(
        &self,
        x: &Buf<T>,
        weight: &Tensor,
        softcap: Option<f64>,
        chunk: &Chunk,
        want_gradient: bool,
    ) -> Result<(Vec<f64>, Option<Buf<T>>)> {
        Ok(self.cross_entropy(x, weight, softcap, chunk, want_gradient))
    }

    fn nats(&self, nats: Vec<f64>) -> Result<Vec<f64>> {
        Ok(nats)
    }

    fn fused(
        &self,
        op: &Infallible,
        _: &Scope<'_, Self>,
        _: &[bool],
        _: &mut [Option<Buf<T>>],
        _: Option<&Routes>,
        _: OnTap<'_, Buf<T>>,
    ) -> Result<()> {
        match *op {}
    }

    fn fused_backward(
        &self,
        op: &Infallible,
        _: &Scope<'_, Self>,
        _: &[Option<Buf<T>>],
        _: &mut [Option<Buf<T>>],
        _: Option<&Routes>,
        _: OnTap<'_, Buf<T>>,
    ) -> Result<()> {
        match *op {}
    }

    fn new_moments(&self, width: usize) -> Result<Moments> {
        Ok(Moments::new(width))
    }

    fn moments(
        &self,
        x: &Buf<T>,
        samples: &[Range<usize>],
        into: &mut Moments,
    ) -> Result<Result<(), NonFinite>> {
        Ok(self.add_moments(x, samples, into))
    }

    fn is_finite(&self, finite: Result<(), NonFinite>) -> Result<Result<(), NonFinite>> {
        Ok(finite)
    }

    fn read_moments(&self, moments: &Moments) -> Result<Moments> {
        Ok(moments.clone())
    }

    fn row_norms(&self, x: &Buf<T>) -> Result<Vec<f64>> {
        Ok(self.norms_of_rows(x))
    }
}
