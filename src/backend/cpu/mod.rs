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
mod element;
mod elementwise;
mod linear;
mod loss;
mod matmul;
mod moments;
mod norm;
mod product;
mod rope;

use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

pub use element::Element;
pub use rope::RopeTable;

use super::{Backend, Chunk, Moments, NonFinite};
use crate::error::Result;
use crate::model::op::Attention;
use crate::model::{Activation, Tensor};

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

/// Freed buffers, kept for the next op: fresh memory costs a page fault per 4 KiB.
struct Pool<T>(Mutex<Free<T>>);

/// What a [`Pool`] holds, in elements.
struct Free<T> {
    buffers: Vec<Vec<T>>,
    /// Elements of all buffers here.
    free: usize,
    /// Elements of all buffers handed out, now and at most.
    in_use: usize,
    peak: usize,
    /// Free elements that are kept in any case.
    slack: usize,
}

/// 256 MB of float32: the slots of a block come in a handful of sizes, and all of them should stay.
const SLACK: usize = 1 << 26;

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Self::new(SLACK)
    }
}

impl<T> Pool<T> {
    fn new(slack: usize) -> Self {
        Self(Mutex::new(Free { buffers: Vec::new(), free: 0, in_use: 0, peak: 0, slack }))
    }

    /// The smallest free vector of at least `len` elements that wastes at most an eighth: buffers live long,
    /// and the plan counts on their size. Without one the caller allocates, and free buffers are given back,
    /// the largest first, while the whole exceeds what was ever in use by more than a quarter (or the slack):
    /// ragged passes ask for new sizes each time, and the old ones must not pile up.
    fn take(&self, len: usize) -> Option<Vec<T>> {
        let mut pool = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |data: &Vec<T>| data.len() >= len && data.len() - len <= len / 8;
        let best = pool.buffers.iter().enumerate().filter(|(_, data)| fits(data));
        if let Some((index, _)) = best.min_by_key(|(_, data)| data.len()) {
            let best = pool.buffers.swap_remove(index);
            pool.free -= best.len();
            pool.in_use += best.len();
            pool.peak = pool.peak.max(pool.in_use);
            return Some(best);
        }
        pool.in_use += len;
        pool.peak = pool.peak.max(pool.in_use);
        let most = pool.peak + pool.slack.max(pool.peak / 4);
        if pool.free + pool.in_use > most {
            pool.buffers.sort_unstable_by_key(Vec::len);
            while pool.free + pool.in_use > most
                && let Some(data) = pool.buffers.pop()
            {
                pool.free -= data.len();
            }
        }
        None
    }

    fn give(&self, data: Vec<T>) {
        let mut pool = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pool.in_use -= data.len();
        pool.free += data.len();
        pool.buffers.push(data);
    }
}

/// An activation, row-major `[rows, width]`; dereferences to its elements.
pub struct Buf<T> {
    /// At least rows·width elements; what lies beyond is not part of the buffer.
    data: Vec<T>,
    rows: usize,
    width: usize,
    pool: Arc<Pool<T>>,
}

impl<T> Buf<T> {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.width
    }
}

impl<T> Deref for Buf<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.data[..self.rows * self.width]
    }
}

impl<T> DerefMut for Buf<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.data[..self.rows * self.width]
    }
}

impl<T> Drop for Buf<T> {
    fn drop(&mut self) {
        let data = std::mem::take(&mut self.data);
        if !data.is_empty() {
            self.pool.give(data);
        }
    }
}

impl<T: Element> Backend for Cpu<T> {
    type Buf = Buf<T>;
    type Weight = Tensor;
    type Rope = RopeTable<T>;

    fn load(&self, tensor: &Tensor) -> Result<Tensor> {
        Ok(tensor.clone())
    }

    fn rope_table(&self, inv_freq: &[f32], positions: usize) -> RopeTable<T> {
        RopeTable::new(inv_freq, positions)
    }

    fn copy(&self, x: &Buf<T>) -> Buf<T> {
        self.from_slice(x, x.width)
    }

    fn element_bytes(&self) -> usize {
        size_of::<T>()
    }

    fn loss_workspace_bytes(&self, vocab_size: usize, hidden_size: usize, tokens: usize) -> u64 {
        loss::workspace_elements(vocab_size, hidden_size, tokens) * size_of::<T>() as u64
    }

    fn product_workspace_bytes(&self, width: usize, tokens: usize) -> u64 {
        self.left_space_elements(tokens, width) as u64 * size_of::<T>() as u64
    }

    fn embed(&self, table: &Tensor, ids: &[u32]) -> Buf<T> {
        self.embed_rows(table, ids)
    }

    fn norm(&self, x: &Buf<T>, weight: &Tensor, eps: f64) -> Buf<T> {
        self.norm_forward(x, weight, eps)
    }

    fn norm_backward(
        &self,
        x: &Buf<T>,
        weight: &Tensor,
        eps: f64,
        dy: &Buf<T>,
        dx: Option<Buf<T>>,
    ) -> Buf<T> {
        self.norm_adjoint(x, weight, eps, dy, dx)
    }

    fn linear(&self, x: &Buf<T>, weight: &Tensor, bias: Option<&Tensor>) -> Buf<T> {
        self.linear_forward(x, weight, bias)
    }

    fn linear_backward(&self, weight: &Tensor, dy: &Buf<T>, dx: Option<Buf<T>>) -> Buf<T> {
        self.linear_adjoint(weight, dy, dx)
    }

    fn rope(&self, x: &Buf<T>, heads: usize, table: &RopeTable<T>, chunk: &Chunk) -> Buf<T> {
        self.rotate(x, heads, table, chunk, false, None)
    }

    fn rope_backward(
        &self,
        dy: &Buf<T>,
        heads: usize,
        table: &RopeTable<T>,
        chunk: &Chunk,
        dx: Option<Buf<T>>,
    ) -> Buf<T> {
        self.rotate(dy, heads, table, chunk, true, dx)
    }

    fn attend(&self, qkv: [&Buf<T>; 3], attention: &Attention, chunk: &Chunk) -> Buf<T> {
        self.attend_forward(qkv, attention, chunk)
    }

    fn attend_backward(
        &self,
        qkv: [&Buf<T>; 3],
        attention: &Attention,
        chunk: &Chunk,
        dout: &Buf<T>,
        dqkv: [Option<Buf<T>>; 3],
    ) -> [Buf<T>; 3] {
        self.attend_adjoint(qkv, attention, chunk, dout, dqkv)
    }

    fn gate(&self, gate: &Buf<T>, up: &Buf<T>, activation: Activation) -> Buf<T> {
        self.gate_forward(gate, up, activation)
    }

    fn gate_backward(
        &self,
        gate: &Buf<T>,
        up: &Buf<T>,
        activation: Activation,
        dout: &Buf<T>,
        dgate_dup: [Option<Buf<T>>; 2],
    ) -> [Buf<T>; 2] {
        self.gate_adjoint(gate, up, activation, dout, dgate_dup)
    }

    fn add(&self, a: &Buf<T>, b: &Buf<T>) -> Buf<T> {
        self.sum(a, b)
    }

    fn add_backward(&self, dy: &Buf<T>, dx: Option<Buf<T>>) -> Buf<T> {
        match dx {
            None => self.copy(dy),
            Some(mut dx) => {
                self.add_into(&mut dx, dy);
                dx
            }
        }
    }

    fn loss(
        &self,
        x: &Buf<T>,
        weight: &Tensor,
        chunk: &Chunk,
        want_gradient: bool,
    ) -> (Vec<f64>, Option<Buf<T>>) {
        self.cross_entropy(x, weight, chunk, want_gradient)
    }

    fn moments(&self, x: &Buf<T>, samples: &[Range<usize>], into: &mut Moments) -> Result<(), NonFinite> {
        self.add_moments(x, samples, into)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ragged_sizes_do_not_pile_up() {
        let cpu = Cpu::<f32> { pool: Arc::new(Pool::new(0)), ..Cpu::with_multiply_adds() };
        for n in (100..4000).rev().step_by(7) {
            let _two = [cpu.alloc(n, 1), cpu.alloc(n, 1)];
        }
        let pool = cpu.pool.0.lock().unwrap();
        let held: usize = pool.buffers.iter().map(Vec::len).sum();
        assert_eq!((pool.in_use, pool.free), (0, held));
        assert!(held <= 10_000, "{held} elements are held, of which 8,000 were ever in use");
    }

    #[test]
    fn a_freed_buffer_serves_the_next_of_its_size() {
        let cpu = Cpu::<f32>::new();
        let first = cpu.alloc(10, 10).as_ptr();
        assert_eq!(cpu.alloc(5, 19).as_ptr(), first);
        assert_ne!(cpu.alloc(5, 10).rows(), 10);
    }
}
