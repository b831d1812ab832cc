//! Linear + next-token cross-entropy, forward and backward in one op.
//!
//! The logits of at most [`MAX_LOGITS`] elements' worth of rows exist at a time, in tiles of the
//! vocabulary. A tile keeps e = exp(z − m) with its own row maximum m, so each logit is exponentiated once:
//! when all tiles are done, the row's log-sum-exp L turns e into the probability by one factor exp(m − L).

use std::ops::Range;

use rayon::prelude::*;

use super::matmul::{MatMut, even_ranges};
use super::product::{Left, product, row_bytes};
use super::{Buf, Cpu, Element};
use crate::backend::Chunk;
use crate::model::Tensor;

/// Most logits that exist at a time: 160 MB of float32.
const MAX_LOGITS: usize = 40 << 20;
/// Most rows of one block; more would not make the products faster.
const MAX_ROWS: usize = 512;
/// Most vocabulary entries of a tile.
const TILE: usize = 256;
/// Partial sums of the gradient, each over a range of the vocabulary. A constant, so that the result does
/// not depend on the number of threads.
const PARTS: usize = 16;

/// Rows of a block: their logits stay below [`MAX_LOGITS`].
fn block_rows(vocab_size: usize) -> usize {
    (MAX_LOGITS / vocab_size).clamp(1, MAX_ROWS)
}

/// Elements that [`Cpu::cross_entropy`] allocates for N = `tokens`: logits (and slopes of the soft-cap), gathered rows,
/// partial sums.
pub(super) fn workspace_elements(vocab_size: usize, hidden_size: usize, softcap: bool, tokens: usize) -> u64 {
    let rows = block_rows(vocab_size).min(tokens) as u64;
    rows * ((1 + u64::from(softcap)) * vocab_size as u64 + (1 + PARTS as u64) * hidden_size as u64)
}

/// A row with a target: row of the chunk, target id, its sample, and the sample's loss scale.
struct Target {
    row: usize,
    id: usize,
    sample: usize,
    scale: f64,
}

/// Exponentials of one vocabulary tile.
struct Tile<T> {
    vocab: Range<usize>,
    /// exp(z − max), `[rows, vocab.len()]`.
    exp: Buf<T>,
    /// With a soft-cap the derivative of z with respect to x·w, if it is wanted.
    slope: Option<Buf<T>>,
    /// Largest logit of each row. `[rows]`
    max: Vec<T>,
    /// Σ exp(z − max) of each row. `[rows]`
    sum: Vec<T>,
}

impl<T: Element> Cpu<T> {
    pub(super) fn cross_entropy(
        &self,
        x: &Buf<T>,
        weight: &Tensor,
        softcap: Option<f64>,
        chunk: &Chunk,
        want_gradient: bool,
    ) -> (Vec<f64>, Option<Buf<T>>) {
        let targets: Vec<Target> = chunk
            .samples()
            .enumerate()
            .flat_map(|(sample, rows)| {
                let scale = chunk.loss_scales[sample];
                (rows.start..rows.end.max(rows.start + 1) - 1).map(move |row| (row, sample, scale))
            })
            .map(|(row, sample, scale)| Target { row, id: chunk.ids[row + 1] as usize, sample, scale })
            .collect();
        let mut nats = vec![0.0; chunk.num_samples()];
        let mut dx = want_gradient.then(|| self.zeros(x.rows, x.width));
        for block in targets.chunks(block_rows(weight.shape[0])) {
            self.cross_entropy_block(x, weight, softcap, block, &mut nats, dx.as_mut());
        }
        (nats, dx)
    }

    fn cross_entropy_block(
        &self,
        x: &Buf<T>,
        weight: &Tensor,
        softcap: Option<f64>,
        targets: &[Target],
        nats: &mut [f64],
        dx: Option<&mut Buf<T>>,
    ) {
        let width = x.width;
        let mut gathered = self.alloc(targets.len(), width);
        for (out, target) in gathered.chunks_exact_mut(width).zip(targets) {
            out.copy_from_slice(&x[target.row * width..][..width]);
        }
        let x = self.padded(&gathered).unwrap_or(gathered);
        let ranges: Vec<Range<usize>> = even_ranges(weight.shape[0], TILE).collect();
        let mut space = self.left_space(x.rows, width);
        let left = self.left(&x, x.rows, width, &mut space);
        let mut tiles: Vec<Tile<T>> = ranges
            .into_par_iter()
            .with_max_len(1)
            .map(|vocab| self.exponentials(&left, x.rows, weight, vocab, softcap, dx.is_some()))
            .collect();

        let mut log_sums = Vec::with_capacity(targets.len());
        let mut w = vec![T::zero(); width];
        for (row, target) in targets.iter().enumerate() {
            let max = tiles.iter().fold(f64::NEG_INFINITY, |max, tile| max.max(tile.max[row].as_f64()));
            let sum: f64 =
                tiles.iter().map(|tile| tile.sum[row].as_f64() * (tile.max[row].as_f64() - max).exp()).sum();
            let log_sum = max + sum.ln();
            log_sums.push(log_sum);
            // ⟨x, w_target⟩ again, in one dot product: the tile holds only its exponential.
            T::widen(weight.dtype, row_bytes(weight, target.id..target.id + 1), &mut w);
            let logit = super::norm::dot(&x[row * width..][..width], &w);
            let logit = softcap.map_or(logit, |cap| T::of(cap) * (logit * T::of(cap.recip())).fast_tanh());
            nats[target.sample] += log_sum - logit.as_f64();
        }
        if let Some(dx) = dx {
            let gradient = self.cross_entropy_gradient(&x, weight, targets, &mut tiles, &log_sums);
            for (target, from) in targets.iter().zip(gradient.chunks_exact(width)) {
                dx[target.row * width..][..width].copy_from_slice(from);
            }
        }
    }

    fn exponentials(
        &self,
        x: &Left<'_, T>,
        rows: usize,
        weight: &Tensor,
        vocab: Range<usize>,
        softcap: Option<f64>,
        slopes: bool,
    ) -> Tile<T> {
        let columns = vocab.len();
        let mut exp = self.alloc(rows, columns);
        let mut space = self.right_space(weight.dtype, weight.shape[1], columns);
        let right = self.right_of_rows(weight, vocab.clone(), &mut space);
        product(&mut MatMut::new(&mut exp, rows, columns), x, &right, false);
        let slope = softcap.and_then(|cap| self.soften(&mut exp, cap, slopes));
        let mut max = vec![T::neg_infinity(); rows];
        let mut sum = vec![T::zero(); rows];
        self.vectorised(
            #[inline(always)]
            || {
                for (row, z) in exp.chunks_exact_mut(columns).enumerate() {
                    // Sixteen running maxima and sums: the compiler may use any vector width for them.
                    let mut tops = [T::neg_infinity(); 16];
                    for z in z.chunks(16) {
                        for (&z, top) in z.iter().zip(&mut tops) {
                            *top = if z > *top { z } else { *top };
                        }
                    }
                    let top = tops.iter().fold(T::neg_infinity(), |max, &z| if z > max { z } else { max });
                    let mut lanes = [T::zero(); 16];
                    for z in z.chunks_mut(16) {
                        for (z, lane) in z.iter_mut().zip(&mut lanes) {
                            *z = (*z - top).fast_exp();
                            *lane += *z;
                        }
                    }
                    max[row] = top;
                    sum[row] = lanes.iter().copied().sum();
                }
            },
        );
        Tile { vocab, exp, slope, max, sum }
    }

    /// Σ over the vocabulary of (p − onehot)·scale·W, with a soft-cap times its derivative, `[rows, D]`.
    fn cross_entropy_gradient(
        &self,
        x: &Buf<T>,
        weight: &Tensor,
        targets: &[Target],
        tiles: &mut [Tile<T>],
        log_sums: &[f64],
    ) -> Buf<T> {
        let (rows, width) = (x.rows, x.width);
        let per_part = tiles.len().div_ceil(PARTS);
        let parts: Vec<Buf<T>> = tiles
            .par_chunks_mut(per_part)
            .with_max_len(1)
            .map(|tiles| {
                let mut part = self.alloc(rows, width);
                for (index, tile) in tiles.iter_mut().enumerate() {
                    let columns = tile.vocab.len();
                    self.vectorised(
                        #[inline(always)]
                        || {
                            let dlogits = tile.exp.chunks_exact_mut(columns);
                            for (row, (dlogits, target)) in dlogits.zip(targets).enumerate() {
                                let factor = (tile.max[row].as_f64() - log_sums[row]).exp() * target.scale;
                                let factor = T::of(factor);
                                dlogits.iter_mut().for_each(|e| *e = *e * factor);
                                if tile.vocab.contains(&target.id) {
                                    let z = &mut dlogits[target.id - tile.vocab.start];
                                    *z = *z - T::of(target.scale);
                                }
                            }
                            if let Some(slope) = &tile.slope {
                                tile.exp.iter_mut().zip(slope.iter()).for_each(|(z, &slope)| *z = *z * slope);
                            }
                        },
                    );
                    let mut space =
                        [self.left_space(rows, columns), self.right_space(weight.dtype, columns, width)];
                    let [left_space, right_space] = &mut space;
                    let left = self.left(&tile.exp, rows, columns, left_space);
                    let right = self.right_of_columns(weight, tile.vocab.clone(), 0..width, right_space);
                    product(&mut MatMut::new(&mut part, rows, width), &left, &right, index > 0);
                }
                part
            })
            .collect();
        let mut parts = parts.into_iter();
        let Some(mut total) = parts.next() else { return self.zeros(rows, width) };
        for part in parts {
            self.add_into(&mut total, &part);
        }
        total
    }
}
