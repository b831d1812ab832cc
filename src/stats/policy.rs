//! Which tokens are counted. Those that are not still take part in attention and in the loss.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use super::Tap;
use crate::backend::{Backend, Chunk, Positions, SampleRows};
use crate::error::Result;
use crate::model::op::Site;
use crate::source::Specials;

/// Which tokens statistics leave out for what they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum SkipSpecial {
    /// None: all are counted
    #[default]
    None,
    /// The token that starts texts (BOS), wherever it stands
    Bos,
    /// Every special token of the tokenizer
    All,
}

impl SkipSpecial {
    /// The name users type.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Bos => "bos",
            Self::All => "all",
        }
    }
    /// The ids that it leaves out, ascending.
    pub fn ids(self, specials: &Specials) -> Vec<u32> {
        match self {
            Self::None => Vec::new(),
            Self::Bos => specials.bos.into_iter().collect(),
            Self::All => specials.all.clone(),
        }
    }
}

/// The rules, in the order in which a token is looked at: it is left out by the first that it breaks.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenPolicy {
    /// Distance between the positions that count, from position 0 of each sample.
    pub stride: usize,
    /// Positions below this one are left out.
    pub first: usize,
    /// Ids of tokens that are left out, ascending.
    pub special: Vec<u32>,
    /// Tokens that stand out are left out.
    pub norms: Option<NormRule>,
}

/// A token is left out where its value is this much longer than the median.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NormRule {
    /// R: the largest norm that counts, in medians.
    pub ratio: f64,
    /// Of each layer and site.
    pub medians: BTreeMap<(usize, Site), f64>,
}

impl Default for TokenPolicy {
    /// Every token counts.
    fn default() -> Self {
        Self { stride: 1, first: 0, special: Vec::new(), norms: None }
    }
}

/// Tokens that each rule left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Skipped {
    /// Between the positions that count.
    pub stride: u64,
    /// At the start of samples.
    pub first: u64,
    /// For what they are.
    pub special: u64,
    /// For their norms.
    pub norms: u64,
}

impl Skipped {
    /// Adds those among other tokens.
    pub fn add(&mut self, more: &Self) {
        let Self { stride, first, special, norms } = more;
        self.stride += stride;
        self.first += first;
        self.special += special;
        self.norms += norms;
    }

    /// By any rule.
    pub fn total(&self) -> u64 {
        self.stride + self.first + self.special + self.norms
    }
}

impl TokenPolicy {
    /// Whether every token counts.
    pub fn counts_all(&self) -> bool {
        *self == Self::default()
    }

    /// The rows that count. `longest`: the norm of each row, and the largest that counts.
    pub(super) fn select(&self, chunk: &Chunk, longest: Option<(&[f64], f64)>) -> (Positions, Skipped) {
        let mut skipped = Skipped::default();
        let all_count = self.counts_all();
        let stands_out =
            // What is not finite is counted, so that it is found.
            |row: usize| longest.is_some_and(|(norms, most)| norms[row].is_finite() && norms[row] > most);
        let sample = |(&sample, all): (&u64, Range<usize>)| {
            if all_count {
                return SampleRows { sample, all: all.clone(), runs: vec![all] };
            }
            let mut runs: Vec<Range<usize>> = Vec::new();
            for row in all.clone() {
                let position = row - all.start;
                let rule = if !position.is_multiple_of(self.stride) {
                    &mut skipped.stride
                } else if position < self.first {
                    &mut skipped.first
                } else if self.special.binary_search(&chunk.ids[row]).is_ok() {
                    &mut skipped.special
                } else if stands_out(row) {
                    &mut skipped.norms
                } else {
                    match runs.last_mut() {
                        Some(run) if run.end == row => run.end += 1,
                        _ => runs.push(row..row + 1),
                    }
                    continue;
                };
                *rule += 1;
            }
            SampleRows { sample, all, runs }
        };
        let samples = chunk.indices.iter().zip(chunk.samples()).map(sample).collect();
        (Positions { samples }, skipped)
    }
}

/// A policy at work: what it chooses of each chunk that is shown, values first.
pub(super) struct Selection {
    policy: TokenPolicy,
    /// Whether the gradients of what is shown are shown later.
    gradients: bool,
    /// Where norms decide: what was chosen of chunks whose gradients are to come.
    waiting: BTreeMap<(usize, Site), VecDeque<Positions>>,
    skipped: BTreeMap<(usize, Site), Skipped>,
}

impl Selection {
    /// `gradients`: whether they are shown after the values.
    pub fn new(policy: TokenPolicy, gradients: bool) -> Self {
        Self { policy, gradients, waiting: BTreeMap::new(), skipped: BTreeMap::new() }
    }

    /// The rows of the values `x` that count.
    ///
    /// # Errors
    /// The device's.
    pub fn of_values<B: Backend>(
        &mut self,
        backend: &B,
        tap: Tap,
        chunk: &Chunk,
        x: &B::Buf,
    ) -> Result<Positions> {
        let place = (tap.layer, tap.site);
        let limit = self.policy.norms.as_ref().and_then(|rule| Some(rule.ratio * rule.medians.get(&place)?));
        let norms = limit.map(|limit| Ok((backend.row_norms(x)?, limit))).transpose()?;
        let longest = norms.as_ref().map(|(norms, limit)| (norms.as_slice(), *limit));
        let (positions, skipped) = self.policy.select(chunk, longest);
        self.skipped.entry(place).or_default().add(&skipped);
        if norms.is_some() && self.gradients {
            self.waiting.entry(place).or_default().push_back(positions.clone());
        }
        Ok(positions)
    }

    /// The same rows, of the gradients.
    pub fn of_gradients(&mut self, tap: Tap, chunk: &Chunk) -> Positions {
        let waiting = self.waiting.get_mut(&(tap.layer, tap.site)).and_then(VecDeque::pop_front);
        waiting.unwrap_or_else(|| self.policy.select(chunk, None).0)
    }

    /// What was left out of the values of a layer and site.
    pub fn skipped(&self, layer: usize, site: Site) -> Skipped {
        self.skipped.get(&(layer, site)).copied().unwrap_or_default()
    }
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
