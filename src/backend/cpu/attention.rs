//! Causal attention inside each sample, forward and backward.
//!
//! Scores of a block of query rows are materialised against the keys they can see, so each row's softmax is
//! computed whole. The backward computes them again: nothing but q, k and v is saved. One task is one
//! (sample, key/value head), so dk and dv are summed over the query heads in a fixed order.

use std::ops::Range;

use rayon::prelude::*;

use super::matmul::{Mat, MatMut, matmul};
use super::{Buf, Cpu, Element};
use crate::backend::Chunk;
use crate::model::op::Attention;

/// Query rows of a block.
const ROWS: usize = 64;

/// Rows `queries` of a sample and the keys `keys` that at least one of them sees.
struct Block {
    queries: Range<usize>,
    keys: Range<usize>,
}

/// First key that `row` sees.
fn first_key(row: usize, window: Option<usize>) -> usize {
    window.map_or(0, |window| (row + 1).saturating_sub(window))
}

fn blocks(length: usize, window: Option<usize>) -> impl Iterator<Item = Block> {
    (0..length).step_by(ROWS).map(move |start| {
        let end = length.min(start + ROWS);
        Block { queries: start..end, keys: first_key(start, window)..end }
    })
}

/// Turns the scores of a block `[queries, keys]` into probabilities, zero where a row does not see a key.
#[inline(always)]
fn softmax<T: Element>(scores: &mut [T], block: &Block, window: Option<usize>) {
    for (row, scores) in block.queries.clone().zip(scores.chunks_exact_mut(block.keys.len())) {
        let seen = first_key(row, window) - block.keys.start..row + 1 - block.keys.start;
        scores[..seen.start].fill(T::zero());
        scores[seen.end..].fill(T::zero());
        let seen = &mut scores[seen];
        // A comparison that is false for NaN keeps it out of the maximum, but its exponential stays NaN.
        let max = seen.iter().fold(T::neg_infinity(), |max, &s| if s > max { s } else { max });
        for s in seen.iter_mut() {
            *s = (*s - max).fast_exp();
        }
        let norm = seen.iter().copied().sum::<T>().recip();
        for s in seen.iter_mut() {
            *s = *s * norm;
        }
    }
}

/// Query, key and value rows of one sample, and one key/value head's columns of the latter two.
struct Task<'a, T> {
    rows: Range<usize>,
    kv_head: usize,
    /// The query heads that read this key/value head.
    heads: Range<usize>,
    qkv: [Mat<'a, T>; 3],
    attention: Attention,
}

impl<'a, T: Element> Task<'a, T> {
    /// In the order of samples, then key/value heads.
    fn all(qkv: [&'a Buf<T>; 3], attention: &Attention, chunk: &Chunk) -> Vec<Self> {
        let group = attention.heads / attention.kv_heads;
        chunk
            .samples()
            .flat_map(|rows| (0..attention.kv_heads).map(move |kv_head| (rows.clone(), kv_head)))
            .map(|(rows, kv_head)| Self {
                rows,
                kv_head,
                heads: kv_head * group..(kv_head + 1) * group,
                qkv: qkv.map(|x| Mat::new(x, x.rows, x.width)),
                attention: *attention,
            })
            .collect()
    }

    /// Columns of a head.
    fn columns(&self, head: usize) -> Range<usize> {
        head * self.attention.head_dim..(head + 1) * self.attention.head_dim
    }

    /// Rows of the sample, as rows of the chunk.
    fn in_chunk(&self, rows: &Range<usize>) -> Range<usize> {
        self.rows.start + rows.start..self.rows.start + rows.end
    }

    fn q(&self, block: &Block, head: usize) -> Mat<'a, T> {
        self.qkv[0].part(self.in_chunk(&block.queries), self.columns(head))
    }

    fn k(&self, block: &Block) -> Mat<'a, T> {
        self.qkv[1].part(self.in_chunk(&block.keys), self.columns(self.kv_head))
    }

    fn v(&self, block: &Block) -> Mat<'a, T> {
        self.qkv[2].part(self.in_chunk(&block.keys), self.columns(self.kv_head))
    }
}

impl<T: Element> Cpu<T> {
    /// P of a block, row-major `[queries, keys]`, and where there is a soft-cap and `slopes` are wanted, the derivative
    /// of capped scores with respect to plain ones.
    fn probabilities(
        &self,
        task: &Task<'_, T>,
        block: &Block,
        head: usize,
        slopes: bool,
    ) -> (Buf<T>, Option<Buf<T>>) {
        let (queries, keys) = (block.queries.len(), block.keys.len());
        let mut scores = self.alloc(queries, keys);
        let scale = T::of(task.attention.scale);
        let mut out = MatMut::new(&mut scores, queries, keys);
        matmul(&mut out, task.q(block, head), task.k(block).t(), scale, false);
        let slopes = task.attention.softcap.and_then(|cap| self.soften(&mut scores, cap, slopes));
        self.vectorised(
            #[inline(always)]
            || softmax(&mut scores, block, task.attention.window),
        );
        (scores, slopes)
    }

    /// s → c·tanh(s/c), and if wanted its derivative 1 − tanh²(s/c).
    pub(super) fn soften(&self, s: &mut Buf<T>, cap: f64, slopes: bool) -> Option<Buf<T>> {
        let (cap, inverse) = (T::of(cap), T::of(cap.recip()));
        let mut slope = slopes.then(|| self.alloc(s.rows, s.width));
        self.vectorised(
            #[inline(always)]
            || match &mut slope {
                None => s.iter_mut().for_each(|s| *s = cap * (*s * inverse).fast_tanh()),
                Some(slope) => {
                    for (s, slope) in s.iter_mut().zip(slope.iter_mut()) {
                        let t = (*s * inverse).fast_tanh();
                        (*s, *slope) = (cap * t, T::one() - t * t);
                    }
                }
            },
        );
        slope
    }

    pub(super) fn attend_forward(&self, qkv: [&Buf<T>; 3], attention: &Attention, chunk: &Chunk) -> Buf<T> {
        let [q, ..] = qkv;
        let mut out = self.alloc(q.rows, q.width);
        let group_width = attention.heads / attention.kv_heads * attention.head_dim;
        let outs = split(&mut out, chunk, group_width);
        Task::all(qkv, attention, chunk).into_par_iter().zip(outs).for_each(|(task, mut out)| {
            for (index, head) in task.heads.clone().enumerate() {
                let columns = task.columns(index);
                for block in blocks(task.rows.len(), attention.window) {
                    let (p, _) = self.probabilities(&task, &block, head, false);
                    let mut out = out.part(block.queries.clone(), columns.clone());
                    let p = Mat::new(&p, block.queries.len(), block.keys.len());
                    matmul(&mut out, p, task.v(&block), T::one(), false);
                }
            }
        });
        out
    }

    pub(super) fn attend_adjoint(
        &self,
        qkv: [&Buf<T>; 3],
        attention: &Attention,
        chunk: &Chunk,
        dout: &Buf<T>,
        [dq, dk, dv]: [Option<Buf<T>>; 3],
    ) -> [Buf<T>; 3] {
        let [q, k, v] = qkv;
        let add_dq = dq.is_some();
        let mut dq = dq.unwrap_or_else(|| self.alloc(q.rows, q.width));
        let mut dk = dk.unwrap_or_else(|| self.zeros(k.rows, k.width));
        let mut dv = dv.unwrap_or_else(|| self.zeros(v.rows, v.width));
        let group_width = attention.heads / attention.kv_heads * attention.head_dim;
        let dqs = split(&mut dq, chunk, group_width);
        let dks = split(&mut dk, chunk, attention.head_dim);
        let dvs = split(&mut dv, chunk, attention.head_dim);
        let douts = Mat::new(dout, dout.rows, dout.width);
        let scale = T::of(attention.scale);
        let outputs = dqs.into_par_iter().zip(dks).zip(dvs);
        Task::all(qkv, attention, chunk).into_par_iter().zip(outputs).for_each(
            |(task, ((mut dq, mut dk), mut dv))| {
                for (index, head) in task.heads.clone().enumerate() {
                    let columns = task.columns(index);
                    for block in blocks(task.rows.len(), attention.window) {
                        let (queries, keys) = (block.queries.len(), block.keys.len());
                        let dout = douts.part(task.in_chunk(&block.queries), task.columns(head));
                        let (p, slopes) = self.probabilities(&task, &block, head, true);
                        let p_view = Mat::new(&p, queries, keys);
                        let head_columns = 0..attention.head_dim;
                        let mut dv = dv.part(block.keys.clone(), head_columns.clone());
                        matmul(&mut dv, p_view.t(), dout, T::one(), true);
                        let mut ds = self.alloc(queries, keys);
                        matmul(
                            &mut MatMut::new(&mut ds, queries, keys),
                            dout,
                            task.v(&block).t(),
                            T::one(),
                            false,
                        );
                        self.vectorised(
                            #[inline(always)]
                            || {
                                for (ds, p) in ds.chunks_exact_mut(keys).zip(p.chunks_exact(keys)) {
                                    let mean = super::norm::dot(ds, p);
                                    for (ds, &p) in ds.iter_mut().zip(p) {
                                        *ds = p * (*ds - mean);
                                    }
                                }
                                if let Some(slopes) = &slopes {
                                    ds.iter_mut()
                                        .zip(slopes.iter())
                                        .for_each(|(ds, &slope)| *ds = *ds * slope);
                                }
                            },
                        );
                        let ds = Mat::new(&ds, queries, keys);
                        let mut dq = dq.part(block.queries.clone(), columns.clone());
                        matmul(&mut dq, ds, task.k(&block), scale, add_dq);
                        let mut dk = dk.part(block.keys.clone(), head_columns);
                        matmul(&mut dk, ds.t(), task.q(&block, head), scale, true);
                    }
                }
            },
        );
        [dq, dk, dv]
    }
}

/// One part per sample and per `width` columns, in the order of [`Task::all`].
fn split<'a, T: Element>(x: &'a mut Buf<T>, chunk: &Chunk, width: usize) -> Vec<MatMut<'a, T>> {
    let (rows, cols) = (x.rows, x.width);
    let samples = MatMut::new(x, rows, cols).split_rows(chunk.samples());
    samples
        .into_iter()
        .flat_map(|sample| {
            sample.split_columns((0..cols).step_by(width).map(move |start| start..start + width))
        })
        .collect()
}
