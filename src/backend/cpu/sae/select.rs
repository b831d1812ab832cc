//! Activations that compare features with each other: the best k of a token, or the best of each of its groups.
//!
//! Tiles of features come in any order, from any thread. What a token keeps is a set under a total order (larger h
//! first, of equals the lower index), so it does not depend on them.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use super::super::product::Left;
use super::super::{Cpu, Element};
use super::encode::Constants;
use super::sums::first;
use crate::model::sae::SaeWeights;

/// How features of a token compete.
#[derive(Clone, Copy)]
pub(super) enum Contest {
    /// The k best of all.
    All { k: usize },
    /// The best of each group of so many neighbours.
    Groups { size: usize },
}

/// A feature that may be kept. The better one is less: a heap has the worst on top.
#[derive(Clone, Copy, PartialEq)]
struct Candidate<T> {
    h: T,
    feature: u32,
}

impl<T: Element> Eq for Candidate<T> {}

impl<T: Element> Ord for Candidate<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        // No candidate is NaN.
        let by_size = other.h.partial_cmp(&self.h).unwrap_or(Ordering::Equal);
        by_size.then(self.feature.cmp(&other.feature))
    }
}

impl<T: Element> PartialOrd for Candidate<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// What one token keeps.
struct Kept<T> {
    heap: Mutex<BinaryHeap<Candidate<T>>>,
    /// Bits of the h below which nothing is kept any more.
    least: AtomicU64,
}

impl<T: Element> Kept<T> {
    fn new() -> Self {
        Self { heap: Mutex::default(), least: AtomicU64::new(f64::NEG_INFINITY.to_bits()) }
    }

    /// Offers `h` of the features from `first` on.
    #[inline(always)]
    fn offer(&self, k: usize, h: &[T], first: usize) {
        /// Features that are compared with the least at once.
        const GROUP: usize = 32;
        let mut least = T::of(f64::from_bits(self.least.load(Relaxed)));
        let mut heap = None;
        for (start, group) in (first..).step_by(GROUP).zip(h.chunks(GROUP)) {
            if !group.iter().fold(false, |any, &h| any | (h >= least)) {
                continue;
            }
            let heap = heap.get_or_insert_with(|| self.heap.lock().unwrap_or_else(PoisonError::into_inner));
            for (feature, &h) in (start..).zip(group) {
                // NaN is at least nothing.
                if h >= least {
                    let candidate = Candidate { h, feature: feature as u32 };
                    if heap.len() < k {
                        heap.push(candidate);
                    } else if let Some(mut worst) = heap.peek_mut()
                        && candidate < *worst
                    {
                        *worst = candidate;
                    }
                    if heap.len() == k
                        && let Some(worst) = heap.peek()
                    {
                        least = worst.h;
                    }
                }
            }
        }
        if heap.is_some() {
            self.least.store(least.as_f64().to_bits(), Relaxed);
        }
    }
}

impl<T: Element> Cpu<T> {
    /// The features of each token that are kept and have f > 0, sorted by number, and the first row with an h that
    /// is not finite. `left` has x̃ of `count` tokens.
    pub(super) fn sae_select(
        &self,
        sae: &SaeWeights,
        contest: Contest,
        left: &Left<'_, T>,
        count: usize,
    ) -> (Vec<Vec<(u32, T)>>, Option<usize>) {
        match contest {
            Contest::All { k } => {
                let kept: Vec<Kept<T>> = (0..count).map(|_| Kept::new()).collect();
                let bad = self.sae_contests(
                    sae,
                    left,
                    count,
                    #[inline(always)]
                    |row, h, first| kept[row].offer(k, h, first),
                );
                let candidates = kept.into_par_iter().map(|kept| {
                    let heap = kept.heap.into_inner().unwrap_or_else(PoisonError::into_inner);
                    fired(heap.into_iter())
                });
                (candidates.collect(), bad)
            }
            Contest::Groups { size } => {
                let groups = sae.num_features() / size;
                let none = Candidate { h: T::neg_infinity(), feature: u32::MAX };
                let kept: Vec<Mutex<Vec<Candidate<T>>>> =
                    (0..count).map(|_| Mutex::new(vec![none; groups])).collect();
                let bad = self.sae_contests(
                    sae,
                    left,
                    count,
                    #[inline(always)]
                    |row, h, first| {
                        let mut kept = kept[row].lock().unwrap_or_else(PoisonError::into_inner);
                        let mut start = 0;
                        while start < h.len() {
                            let group = (first + start) / size;
                            let end = h.len().min((group + 1) * size - first);
                            let best = &mut kept[group];
                            for (feature, &h) in (first + start..).zip(&h[start..end]) {
                                let candidate = Candidate { h, feature: feature as u32 };
                                if h > best.h || (h == best.h && candidate < *best) {
                                    *best = candidate;
                                }
                            }
                            start = end;
                        }
                    },
                );
                let candidates = kept
                    .into_iter()
                    .map(|kept| fired(kept.into_inner().unwrap_or_else(PoisonError::into_inner).into_iter()));
                (candidates.collect(), bad)
            }
        }
    }

    /// Hands over h of every token and tile: row, `[tile]`, first feature.
    fn sae_contests(
        &self,
        sae: &SaeWeights,
        left: &Left<'_, T>,
        count: usize,
        offer: impl Fn(usize, &[T], usize) + Sync,
    ) -> Option<usize> {
        let of_tile = |tile: Range<usize>| {
            let constants = Constants::<T>::new(sae, tile.clone());
            let mut bad = None;
            self.sae_products(&sae.encoder, left, count, tile.clone(), |rows, z| {
                self.vectorised(
                    #[inline(always)]
                    || {
                        constants.pre_activations(z);
                        for (row, h) in rows.clone().zip(z.chunks_exact(tile.len())) {
                            if !h.iter().fold(true, |finite, h| finite & h.is_finite()) {
                                bad = first(bad, Some(row));
                            }
                            offer(row, h, tile.start);
                        }
                    },
                );
            });
            bad
        };
        self.sae_tiles(&sae.encoder).into_par_iter().with_max_len(1).filter_map(of_tile).min()
    }
}

/// Those with f > 0, by number.
fn fired<T: Element>(candidates: impl Iterator<Item = Candidate<T>>) -> Vec<(u32, T)> {
    let mut fired: Vec<(u32, T)> = candidates.filter(|c| c.h > T::zero()).map(|c| (c.feature, c.h)).collect();
    fired.sort_unstable_by_key(|(feature, _)| *feature);
    fired
}
