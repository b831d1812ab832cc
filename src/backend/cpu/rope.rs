//! Rotary position embeddings: each pair (j, j + Hd/2) of a head turns by `position·inv_freq[j]`.

use rayon::prelude::*;

use super::element::store;
use super::{Buf, Cpu, Element};
use crate::backend::Chunk;
use crate::model::Rope;

/// Cosine and sine of the angle of every pair at every position.
pub struct RopeTable<T> {
    /// (cos, sin), `[positions, Hd/2]`.
    angles: Vec<(T, T)>,
    /// Hd/2.
    pairs: usize,
}

impl<T: Element> RopeTable<T> {
    /// Positions `0..positions`.
    pub(super) fn new(inv_freq: &[f32], positions: usize) -> Self {
        let angles = Rope::angles(inv_freq, positions).map(|angle| (T::of(angle.cos()), T::of(angle.sin())));
        Self { angles: angles.collect(), pairs: inv_freq.len() }
    }
}

impl<T: Element> Cpu<T> {
    /// Rotation of every head of every row; by the negated angle (which is the adjoint) when `backward`.
    /// Adds to `into` if given.
    pub(super) fn rotate(
        &self,
        x: &Buf<T>,
        heads: usize,
        table: &RopeTable<T>,
        chunk: &Chunk,
        backward: bool,
        into: Option<Buf<T>>,
    ) -> Buf<T> {
        let pairs = table.pairs;
        let width = heads * 2 * pairs;
        let add = into.is_some();
        let mut out = into.unwrap_or_else(|| self.alloc(x.rows, width));
        let sign = if backward { -T::one() } else { T::one() };
        let positions: Vec<usize> = chunk.samples().flat_map(|rows| 0..rows.len()).collect();
        let rows = out.par_chunks_mut(width).zip(x.par_chunks(width)).zip(&positions);
        rows.with_min_len(16).for_each(|((out, x), &position)| {
            let angles = &table.angles[position * pairs..][..pairs];
            // Not `vectorised`: inlined it was measured slower, because the pairs of a head lie apart.
            self.simd.dispatch(|| {
                for (out, x) in out.chunks_exact_mut(2 * pairs).zip(x.chunks_exact(2 * pairs)) {
                    let ((out_a, out_b), (a, b)) = (out.split_at_mut(pairs), x.split_at(pairs));
                    for j in 0..pairs {
                        let (cos, sin) = (angles[j].0, angles[j].1 * sign);
                        store(&mut out_a[j], a[j] * cos - b[j] * sin, add);
                        store(&mut out_b[j], b[j] * cos + a[j] * sin, add);
                    }
                }
            });
        });
        out
    }
}
