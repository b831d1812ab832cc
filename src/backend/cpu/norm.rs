//! RMSNorm, forward and backward.

use rayon::prelude::*;

use super::element::store;
use super::{Buf, Cpu, Element};
use crate::model::Tensor;
use crate::model::op::RmsNorm;

/// Elements of one task, at least: so that scheduling costs nothing.
const TASK: usize = 1 << 12;

/// Σ a·b with sixteen running sums, added at the end in a fixed order: the compiler may use any vector
/// width without changing the result.
#[inline(always)]
pub(super) fn dot<T: Element>(a: &[T], b: &[T]) -> T {
    let mut sums = [T::zero(); 16];
    let (a_blocks, b_blocks) = (a.chunks_exact(16), b.chunks_exact(16));
    let tail: T = a_blocks.remainder().iter().zip(b_blocks.remainder()).map(|(&a, &b)| a * b).sum();
    for (a, b) in a_blocks.zip(b_blocks) {
        for lane in 0..16 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    sums.iter().fold(tail, |total, &sum| total + sum)
}

impl<T: Element> Cpu<T> {
    /// The weight with its offset, and the elements of a task: whole runs.
    fn norm_weight(&self, weight: &Tensor, norm: RmsNorm) -> (Buf<T>, usize) {
        let mut weight = self.widen_vector(weight);
        if norm.offset != 0.0 {
            weight.iter_mut().for_each(|w| *w += T::of(norm.offset));
        }
        let task = TASK.next_multiple_of(weight.len());
        (weight, task)
    }

    pub(super) fn norm_forward(&self, x: &Buf<T>, weight: &Tensor, norm: RmsNorm) -> Buf<T> {
        let (weight, task) = self.norm_weight(weight, norm);
        let width = weight.len();
        let mut out = self.alloc(x.rows, x.width);
        out.par_chunks_mut(task).zip(x.par_chunks(task)).for_each(|(out, x)| {
            self.vectorised(
                #[inline(always)]
                || {
                    for (y, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                        let r = reciprocal_rms(x, norm.eps);
                        for j in 0..width {
                            y[j] = weight[j] * (x[j] * r);
                        }
                    }
                },
            );
        });
        out
    }

    pub(super) fn norm_adjoint(
        &self,
        x: &Buf<T>,
        weight: &Tensor,
        norm: RmsNorm,
        dy: &Buf<T>,
        dx: Option<Buf<T>>,
    ) -> Buf<T> {
        let (weight, task) = self.norm_weight(weight, norm);
        let width = weight.len();
        let add = dx.is_some();
        let mut dx = dx.unwrap_or_else(|| self.alloc(x.rows, x.width));
        dx.par_chunks_mut(task).zip(x.par_chunks(task)).zip(dy.par_chunks(task)).for_each(|((dx, x), dy)| {
            let mut scaled = vec![T::zero(); width];
            self.vectorised(
                #[inline(always)]
                || {
                    let rows = x.chunks_exact(width).zip(dy.chunks_exact(width));
                    for (dx, (x, dy)) in dx.chunks_exact_mut(width).zip(rows) {
                        let r = reciprocal_rms(x, norm.eps);
                        for j in 0..width {
                            scaled[j] = weight[j] * dy[j];
                        }
                        let along = dot(&scaled, x) * r * r / T::of(width as f64);
                        for j in 0..width {
                            store(&mut dx[j], r * (scaled[j] - x[j] * along), add);
                        }
                    }
                },
            );
        });
        dx
    }
}

#[inline(always)]
fn reciprocal_rms<T: Element>(x: &[T], eps: f64) -> T {
    (dot(x, x) / T::of(x.len() as f64) + T::of(eps)).sqrt().recip()
}
