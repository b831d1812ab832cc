//! RMSNorm, forward and backward.

use rayon::prelude::*;

use super::element::store;
use super::{Buf, Cpu, Element};
use crate::model::Tensor;

/// Rows of one task: a few thousand elements, so that scheduling costs nothing.
const ROWS: usize = 8;

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
    pub(super) fn norm_forward(&self, x: &Buf<T>, weight: &Tensor, eps: f64) -> Buf<T> {
        let width = x.width;
        let weight = self.widen_vector(weight);
        let mut out = self.alloc(x.rows, width);
        out.par_chunks_mut(ROWS * width).zip(x.par_chunks(ROWS * width)).for_each(|(out, x)| {
            self.vectorised(
                #[inline(always)]
                || {
                    for (y, x) in out.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
                        let r = reciprocal_rms(x, eps);
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
        eps: f64,
        dy: &Buf<T>,
        dx: Option<Buf<T>>,
    ) -> Buf<T> {
        let width = x.width;
        let weight = self.widen_vector(weight);
        let add = dx.is_some();
        let mut dx = dx.unwrap_or_else(|| self.alloc(x.rows, width));
        let rows = ROWS * width;
        dx.par_chunks_mut(rows).zip(x.par_chunks(rows)).zip(dy.par_chunks(rows)).for_each(|((dx, x), dy)| {
            let mut scaled = vec![T::zero(); width];
            self.vectorised(
                #[inline(always)]
                || {
                    let rows = x.chunks_exact(width).zip(dy.chunks_exact(width));
                    for (dx, (x, dy)) in dx.chunks_exact_mut(width).zip(rows) {
                        let r = reciprocal_rms(x, eps);
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
