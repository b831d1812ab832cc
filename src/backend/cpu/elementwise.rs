//! Embedding lookup, the gate of the MLP, and additions.

use rayon::prelude::*;

use super::element::store;
use super::{Buf, Cpu, Element};
use crate::model::{Activation, Tensor};

/// Elements of one task.
const BLOCK: usize = 1 << 14;

/// act(x) and act'(x).
#[inline(always)]
fn activate<T: Element>(activation: Activation, x: T) -> (T, T) {
    match activation {
        Activation::Silu => {
            let sigmoid = (T::one() + (-x).fast_exp()).recip();
            (x * sigmoid, sigmoid * (T::one() + x * (T::one() - sigmoid)))
        }
        // x·(1 + tanh u)/2 = x·σ(2u) with 2u = a·(x + b·x³).
        Activation::GeluTanh => {
            let (a, b) = (T::of(1.595_769_121_605_730_8), T::of(0.044_715));
            let square = x * x;
            let sigmoid = (T::one() + (-(a * x * (T::one() + b * square))).fast_exp()).recip();
            let inner = a * (T::one() + T::of(3.0) * b * square);
            (x * sigmoid, sigmoid * (T::one() + x * (T::one() - sigmoid) * inner))
        }
    }
}

impl<T: Element> Cpu<T> {
    pub(super) fn embed_rows(&self, table: &Tensor, scale: f64, ids: &[u32]) -> Buf<T> {
        let width = table.shape[1];
        let row_bytes = width * table.dtype.size_bytes();
        let bytes = table.bytes();
        let mut out = self.alloc(ids.len(), width);
        for (out, &id) in out.chunks_exact_mut(width).zip(ids) {
            let start = id as usize * row_bytes;
            T::widen(table.dtype, &bytes[start..start + row_bytes], out);
        }
        if scale != 1.0 {
            out.iter_mut().for_each(|x| *x = *x * T::of(scale));
        }
        out
    }

    pub(super) fn gate_forward(&self, gate: &Buf<T>, up: &Buf<T>, activation: Activation) -> Buf<T> {
        let mut out = self.alloc(gate.rows, gate.width);
        let inputs = gate.par_chunks(BLOCK).zip(up.par_chunks(BLOCK));
        out.par_chunks_mut(BLOCK).zip(inputs).for_each(|(out, (gate, up))| {
            self.vectorised(
                #[inline(always)]
                || {
                    for ((out, &gate), &up) in out.iter_mut().zip(gate).zip(up) {
                        *out = activate(activation, gate).0 * up;
                    }
                },
            );
        });
        out
    }

    pub(super) fn gate_adjoint(
        &self,
        gate: &Buf<T>,
        up: &Buf<T>,
        activation: Activation,
        dout: &Buf<T>,
        [dgate, dup]: [Option<Buf<T>>; 2],
    ) -> [Buf<T>; 2] {
        let add = [dgate.is_some(), dup.is_some()];
        let [mut dgate, mut dup] =
            [dgate, dup].map(|d| d.unwrap_or_else(|| self.alloc(gate.rows, gate.width)));
        let inputs = gate.par_chunks(BLOCK).zip(up.par_chunks(BLOCK)).zip(dout.par_chunks(BLOCK));
        let outputs = dgate.par_chunks_mut(BLOCK).zip(dup.par_chunks_mut(BLOCK));
        outputs.zip(inputs).for_each(|((dgate, dup), ((gate, up), dout))| {
            self.vectorised(
                #[inline(always)]
                || {
                    for i in 0..gate.len() {
                        let (value, slope) = activate(activation, gate[i]);
                        store(&mut dgate[i], dout[i] * up[i] * slope, add[0]);
                        store(&mut dup[i], dout[i] * value, add[1]);
                    }
                },
            );
        });
        [dgate, dup]
    }

    /// a + b.
    pub(super) fn sum(&self, a: &Buf<T>, b: &Buf<T>) -> Buf<T> {
        let mut out = self.alloc(a.rows, a.width);
        let inputs = a.par_chunks(BLOCK).zip(b.par_chunks(BLOCK));
        out.par_chunks_mut(BLOCK).zip(inputs).for_each(|(out, (a, b))| {
            self.vectorised(
                #[inline(always)]
                || {
                    for ((out, &a), &b) in out.iter_mut().zip(a).zip(b) {
                        *out = a + b;
                    }
                },
            );
        });
        out
    }

    /// into += x.
    pub(super) fn add_into(&self, into: &mut Buf<T>, x: &Buf<T>) {
        into.par_chunks_mut(BLOCK).zip(x.par_chunks(BLOCK)).for_each(|(into, x)| {
            self.vectorised(
                #[inline(always)]
                || {
                    for (into, &x) in into.iter_mut().zip(x) {
                        *into += x;
                    }
                },
            );
        });
    }
}
