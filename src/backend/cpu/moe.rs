//! A mixture of experts: which expert each token goes to, rows sorted by expert, products with each expert's weight.

use std::ops::Range;

use rayon::prelude::*;

use super::element::store;
use super::matmul::MatMut;
use super::norm::dot;
use super::product::{Left, Right, product};
use super::{Buf, Cpu, Element};
use crate::model::Tensor;

/// Rows of one task of a copy.
const ROWS: usize = 8;

/// Makes the right operand of some columns from a weight, in a buffer for it.
type RightOf<'f, T> = dyn for<'a> Fn(&'a Tensor, Range<usize>, &'a mut Buf<T>) -> Right<'a, T> + Sync + 'f;

/// Which experts the tokens of a chunk go to. A *pair* is a token and one of its experts: pair n·k + j is token n's
/// j-th.
pub struct Routes {
    top_k: usize,
    /// Rows of each expert among those sorted by expert. `[E]`
    experts: Vec<Range<usize>>,
    /// Row of each pair. `[N·k]`
    rows: Vec<usize>,
    /// Pair of each row. `[N·k]`
    pairs: Vec<usize>,
}

impl Routes {
    /// `chosen`: the expert of each pair.
    fn new(chosen: &[usize], top_k: usize, experts: usize) -> Self {
        let mut counts = vec![0; experts];
        chosen.iter().for_each(|&expert| counts[expert] += 1);
        let mut end = 0;
        let ranges: Vec<Range<usize>> = counts
            .iter()
            .map(|count| {
                end += count;
                end - count..end
            })
            .collect();
        let mut next: Vec<usize> = ranges.iter().map(|range| range.start).collect();
        let mut pairs = vec![0; chosen.len()];
        let row = |(pair, &expert): (usize, &usize)| {
            let row = next[expert];
            next[expert] += 1;
            pairs[row] = pair;
            row
        };
        let rows = chosen.iter().enumerate().map(row).collect();
        Self { top_k, experts: ranges, rows, pairs }
    }
}

/// The k largest of a row, ascending; of equal ones the first.
fn largest<T: Element>(logits: &[T], k: usize, chosen: &mut Vec<usize>) {
    let start = chosen.len();
    for _ in 0..k {
        let free = (0..logits.len()).filter(|expert| !chosen[start..].contains(expert));
        // A comparison that is false for NaN: the first free one then stays.
        let best = free.reduce(|best, expert| if logits[expert] > logits[best] { expert } else { best });
        chosen.extend(best);
    }
    chosen[start..].sort_unstable();
}

impl<T: Element> Cpu<T> {
    pub(super) fn choose(&self, logits: &Buf<T>, top_k: usize) -> (Buf<T>, Routes) {
        let experts = logits.width;
        let mut chosen = Vec::with_capacity(logits.rows * top_k);
        let mut scores = self.alloc(logits.rows, top_k);
        for (scores, logits) in scores.chunks_exact_mut(top_k).zip(logits.chunks_exact(experts)) {
            let start = chosen.len();
            largest(logits, top_k, &mut chosen);
            let own = &chosen[start..];
            let max =
                own.iter().fold(T::neg_infinity(), |max, &e| if logits[e] > max { logits[e] } else { max });
            for (score, &expert) in scores.iter_mut().zip(own) {
                *score = (logits[expert] - max).fast_exp();
            }
            let norm = scores.iter().copied().sum::<T>().recip();
            scores.iter_mut().for_each(|score| *score = *score * norm);
        }
        (scores, Routes::new(&chosen, top_k, experts))
    }

    pub(super) fn choose_adjoint(
        &self,
        scores: &Buf<T>,
        routes: &Routes,
        dscores: &Buf<T>,
        experts: usize,
        dlogits: Option<Buf<T>>,
    ) -> Buf<T> {
        let mut dlogits = dlogits.unwrap_or_else(|| self.zeros(scores.rows, experts));
        let k = routes.top_k;
        let expert_of = |row: usize| routes.experts.partition_point(|rows| rows.end <= row);
        for token in 0..scores.rows {
            let pairs = token * k..(token + 1) * k;
            let mean = dot(&scores[pairs.clone()], &dscores[pairs.clone()]);
            for pair in pairs {
                let expert = expert_of(routes.rows[pair]);
                dlogits[token * experts + expert] += scores[pair] * (dscores[pair] - mean);
            }
        }
        dlogits
    }

    pub(super) fn gather(&self, x: &Buf<T>, routes: &Routes) -> Buf<T> {
        let width = x.width;
        let mut out = self.alloc(routes.pairs.len(), width);
        out.par_chunks_mut(width).zip(&routes.pairs).with_min_len(ROWS).for_each(|(out, pair)| {
            let token = pair / routes.top_k;
            out.copy_from_slice(&x[token * width..][..width]);
        });
        out
    }

    pub(super) fn gather_adjoint(&self, dy: &Buf<T>, routes: &Routes, dx: Option<Buf<T>>) -> Buf<T> {
        let (width, k) = (dy.width, routes.top_k);
        let add = dx.is_some();
        let mut dx = dx.unwrap_or_else(|| self.alloc(routes.rows.len() / k, width));
        let tokens = dx.par_chunks_mut(width).zip(routes.rows.par_chunks(k));
        tokens.with_min_len(ROWS).for_each(|(dx, rows)| {
            self.vectorised(
                #[inline(always)]
                || {
                    for (index, row) in rows.iter().enumerate() {
                        let dy = &dy[row * width..][..width];
                        dx.iter_mut().zip(dy).for_each(|(dx, &dy)| store(dx, dy, add || index > 0));
                    }
                },
            );
        });
        dx
    }

    pub(super) fn combine_rows(&self, x: &Buf<T>, scores: &Buf<T>, routes: &Routes) -> Buf<T> {
        let (width, k) = (x.width, routes.top_k);
        let mut out = self.alloc(scores.rows, width);
        let tokens = out.par_chunks_mut(width).zip(routes.rows.par_chunks(k)).zip(scores.par_chunks(k));
        tokens.with_min_len(ROWS).for_each(|((out, rows), scores)| {
            self.vectorised(
                #[inline(always)]
                || {
                    for (index, (row, &score)) in rows.iter().zip(scores).enumerate() {
                        let x = &x[row * width..][..width];
                        out.iter_mut().zip(x).for_each(|(out, &x)| store(out, score * x, index > 0));
                    }
                },
            );
        });
        out
    }

    pub(super) fn combine_adjoint(
        &self,
        x: &Buf<T>,
        scores: &Buf<T>,
        routes: &Routes,
        dout: &Buf<T>,
        [dx, dscores]: [Option<Buf<T>>; 2],
    ) -> [Buf<T>; 2] {
        let (width, k) = (x.width, routes.top_k);
        let add = [dx.is_some(), dscores.is_some()];
        let mut dx = dx.unwrap_or_else(|| self.alloc(x.rows, width));
        let mut dscores = dscores.unwrap_or_else(|| self.alloc(scores.rows, k));
        dx.par_chunks_mut(width).zip(&routes.pairs).with_min_len(ROWS).for_each(|(dx, &pair)| {
            let dout = &dout[pair / k * width..][..width];
            self.vectorised(
                #[inline(always)]
                || dx.iter_mut().zip(dout).for_each(|(dx, &dout)| store(dx, scores[pair] * dout, add[0])),
            );
        });
        dscores.par_iter_mut().zip(&routes.rows).enumerate().with_min_len(ROWS).for_each(
            |(pair, (dscore, row))| {
                let (x, dout) = (&x[row * width..][..width], &dout[pair / k * width..][..width]);
                let along = self.vectorised(
                    #[inline(always)]
                    || dot(x, dout),
                );
                store(dscore, along, add[1]);
            },
        );
        [dx, dscores]
    }

    pub(super) fn expert_forward(&self, x: &Buf<T>, weights: &[&Tensor], routes: &Routes) -> Buf<T> {
        let mut out = self.alloc(x.rows, weights[0].shape[0]);
        self.by_expert(x, weights, routes, &mut out, false, &|weight, range, space| {
            self.right_of_rows(weight, range, space)
        });
        out
    }

    pub(super) fn expert_adjoint(
        &self,
        weights: &[&Tensor],
        routes: &Routes,
        dy: &Buf<T>,
        dx: Option<Buf<T>>,
    ) -> Buf<T> {
        let (depth, columns) = (dy.width, weights[0].shape[1]);
        let add = dx.is_some();
        let mut dx = dx.unwrap_or_else(|| self.alloc(dy.rows, columns));
        self.by_expert(dy, weights, routes, &mut dx, add, &|weight, range, space| {
            self.right_of_columns(weight, 0..depth, range, space)
        });
        dx
    }

    /// out = x·B, or out += x·B when `add`, where B is made of the weight of each row's expert: its columns, by `right`.
    fn by_expert(
        &self,
        x: &Buf<T>,
        weights: &[&Tensor],
        routes: &Routes,
        out: &mut Buf<T>,
        add: bool,
        right: &RightOf<'_, T>,
    ) {
        let (depth, columns) = (x.width, out.width);
        let groups: Vec<(&Tensor, Range<usize>)> = weights
            .iter()
            .zip(&routes.experts)
            .filter(|(_, rows)| !rows.is_empty())
            .map(|(weight, rows)| (*weight, rows.clone()))
            .collect();
        // Few rows are padded, and computed aside.
        let aside = |from: &Buf<T>| -> Vec<Option<Buf<T>>> {
            groups.iter().map(|(_, rows)| self.padded_part(from, rows.clone())).collect()
        };
        let (padded, mut outs) = (aside(x), aside(out));
        let rows_of =
            |group: usize| padded[group].as_ref().map_or(groups[group].1.len(), |padded| padded.rows);
        let mut spaces: Vec<Buf<T>> =
            (0..groups.len()).map(|group| self.left_space(rows_of(group), depth)).collect();
        let lefts: Vec<Left<'_, T>> = spaces
            .iter_mut()
            .enumerate()
            .map(|(group, space)| match &padded[group] {
                Some(padded) => self.left(padded, padded.rows, depth, space),
                None => {
                    let rows = &groups[group].1;
                    self.left(&x[rows.start * depth..rows.end * depth], rows.len(), depth, space)
                }
            })
            .collect();
        let (rows, ranges) = (out.rows, self.column_ranges(columns, depth));
        let own = MatMut::new(out, rows, columns).split_rows(groups.iter().map(|(_, rows)| rows.clone()));
        let mut tasks = Vec::with_capacity(groups.len() * ranges.len());
        for (group, (own, aside)) in own.into_iter().zip(&mut outs).enumerate() {
            let whole = match aside {
                Some(aside) => MatMut::new(aside, rows_of(group), columns),
                None => own,
            };
            let tiles = whole.split_columns(ranges.iter().cloned());
            tasks.extend(tiles.into_iter().zip(&ranges).map(|(tile, range)| (group, tile, range.clone())));
        }
        tasks.into_par_iter().with_max_len(1).for_each(|(group, mut tile, range)| {
            let weight = groups[group].0;
            let mut space = self.right_space(weight.dtype, depth, range.len());
            product(&mut tile, &lefts[group], &right(weight, range, &mut space), add);
        });
        for ((_, rows), aside) in groups.iter().zip(&outs) {
            if let Some(aside) = aside {
                let len = rows.len() * columns;
                out[rows.start * columns..rows.end * columns].copy_from_slice(&aside[..len]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_sorted_by_expert_then_token() {
        let cpu = Cpu::<f32>::new();
        // Of equal logits the first is taken; expert 1 gets nothing.
        let logits = [3.0, 0.0, 3.0, 3.0, 0.0, -1.0, 2.0, 1.0, 5.0, -9.0, 4.0, 4.5];
        let (scores, routes) = cpu.choose(&cpu.from_slice(&logits, 4), 2);
        assert_eq!(routes.experts, [0..2, 2..2, 2..4, 4..6]);
        assert_eq!(routes.pairs, [0, 4, 1, 2, 3, 5]);
        assert_eq!(routes.rows, [0, 2, 3, 4, 1, 5]);
        assert_eq!(scores[..2], [0.5, 0.5]);
        let high = 1.0 / (1.0 + (-1f32).exp());
        assert!((scores[2] - high).abs() < 1e-6 && (scores[2] + scores[3] - 1.0).abs() < 1e-6);
    }
}
