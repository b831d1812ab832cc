//! Sum, Σ|v|, Σv² and max|v| of every dimension at every wanted tap.

use std::collections::BTreeMap;

use super::policy::{Selection, Skipped, TokenPolicy};
use super::{Direction, Sink, Tap, not_finite};
use crate::backend::{Backend, Chunk, Moments};
use crate::error::Result;
use crate::model::op::Site;

/// Sums of one site of one layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerMoments {
    /// Of the values.
    pub values: Option<Moments>,
    /// Of the gradients; a sample with a single token has no loss and counts nowhere.
    pub gradients: Option<Moments>,
    /// Of the values at position 0 of each counted sample alone.
    pub values_at_0: Option<Moments>,
    /// Of the gradients there.
    pub gradients_at_0: Option<Moments>,
    /// Tokens that are not counted.
    pub skipped: Skipped,
}

impl LayerMoments {
    /// Adds the sums of later samples.
    pub fn add(&mut self, more: &Self) {
        let Self { values, gradients, values_at_0, gradients_at_0, skipped } = more;
        self.skipped.add(skipped);
        for (sums, more) in [
            (&mut self.values, values),
            (&mut self.gradients, gradients),
            (&mut self.values_at_0, values_at_0),
            (&mut self.gradients_at_0, gradients_at_0),
        ] {
            match (sums, more) {
                (Some(sums), Some(more)) => sums.add(more),
                (sums, more) => *sums = sums.take().or_else(|| more.clone()),
            }
        }
    }

    /// Rounds sums that parts were added to.
    pub fn round(&mut self) {
        let Self { values, gradients, values_at_0, gradients_at_0, .. } = self;
        let all = [values, gradients, values_at_0, gradients_at_0];
        all.into_iter().flatten().for_each(Moments::round);
    }

    /// The sums of one direction, if they were collected.
    pub fn get(&self, direction: Direction) -> Option<&Moments> {
        match direction {
            Direction::Values => self.values.as_ref(),
            Direction::Gradients => self.gradients.as_ref(),
        }
    }

    /// The sums over position 0 of each counted sample, if they were collected.
    pub fn at_0(&self, direction: Direction) -> Option<&Moments> {
        match direction {
            Direction::Values => self.values_at_0.as_ref(),
            Direction::Gradients => self.gradients_at_0.as_ref(),
        }
    }

    /// [`position_0_share`] of one direction, where position 0 was counted.
    pub fn position_0_share(&self, direction: Direction) -> Option<f64> {
        position_0_share(self.at_0(direction)?, self.get(direction)?)
    }
}

/// Which part of Σ|v|, over all dimensions and counted tokens, position 0 holds; `None` where it was not counted. Many
/// models dump what they have no use for on the first token: then one position per sample decides the mean.
pub fn position_0_share(at_0: &Moments, all: &Moments) -> Option<f64> {
    let [part, whole] = [at_0, all].map(|moments| moments.sum_abs.iter().sum::<f64>());
    (at_0.count > 0).then(|| if whole == 0.0 { 0.0 } else { part / whole })
}

/// Sums by layer and site.
pub type SiteMoments = BTreeMap<(usize, Site), LayerMoments>;

/// Collects [`Moments`] at the wanted sites, where the backend adds them up.
pub struct MomentSink<B: Backend> {
    sites: BTreeMap<(usize, Site), State<B>>,
    selection: Selection,
    /// What is to be found finite: where, the sample of each run of rows that was added, what the backend will say of them.
    checks: Vec<(Tap, Vec<u64>, B::Finite)>,
}

/// What is known of one site.
struct State<B: Backend> {
    width: usize,
    /// Of values and of gradients.
    sums: [Option<Pair<B>>; 2],
}

/// Sums over all tokens that count, and over those of them at position 0.
type Pair<B> = [<B as Backend>::Moments; 2];

impl<B: Backend> MomentSink<B> {
    /// For these sites, by layer and site, with the width of each. Every token counts.
    pub fn new(widths: &BTreeMap<(usize, Site), usize>) -> Self {
        let state = |(&place, &width)| (place, State { width, sums: [None, None] });
        let selection = Selection::new(TokenPolicy::default(), false);
        Self { sites: widths.iter().map(state).collect(), selection, checks: Vec::new() }
    }

    /// The tokens that `policy` leaves; `gradients`: whether they are shown after the values.
    pub fn counting(self, policy: TokenPolicy, gradients: bool) -> Self {
        Self { selection: Selection::new(policy, gradients), ..self }
    }

    /// Waits for what was shown so far.
    ///
    /// # Errors
    /// A NaN or an infinity, with its layer and sample; a device that failed.
    pub fn check(&mut self, backend: &B) -> Result<()> {
        for (tap, indices, finite) in self.checks.drain(..) {
            let Err(bad) = backend.is_finite(finite)? else { continue };
            return Err(not_finite(tap, indices[bad.0]));
        }
        Ok(())
    }

    /// The sums so far, after waiting for them.
    ///
    /// # Errors
    /// As [`MomentSink::check`].
    pub fn read(&mut self, backend: &B) -> Result<SiteMoments> {
        self.check(backend)?;
        let read = |pair: &Option<Pair<B>>, index: usize| -> Result<Option<Moments>> {
            pair.as_ref().map(|pair| backend.read_moments(&pair[index])).transpose()
        };
        let site = |(&place, state): (&(usize, Site), &State<B>)| {
            let [values, gradients] = &state.sums;
            let moments = LayerMoments {
                values: read(values, 0)?,
                gradients: read(gradients, 0)?,
                values_at_0: read(values, 1)?,
                gradients_at_0: read(gradients, 1)?,
                skipped: self.selection.skipped(place.0, place.1),
            };
            Ok((place, moments))
        };
        self.sites.iter().map(site).collect()
    }
}

impl<B: Backend> Sink<B> for MomentSink<B> {
    fn push(&mut self, backend: &B, tap: Tap, chunk: &Chunk, x: &B::Buf) -> Result<()> {
        let Some(state) = self.sites.get_mut(&(tap.layer, tap.site)) else { return Ok(()) };
        let (pair, shortest, positions) = match tap.direction {
            Direction::Values => (&mut state.sums[0], 1, self.selection.of_values(backend, tap, chunk, x)?),
            Direction::Gradients => (&mut state.sums[1], 2, self.selection.of_gradients(tap, chunk)),
        };
        let new = || backend.new_moments(state.width);
        let [all, at_0] = match pair {
            Some(pair) => pair,
            None => pair.insert([new()?, new()?]),
        };
        let counted = positions.samples.iter().filter(|sample| sample.all.len() >= shortest);
        let (mut runs, mut indices, mut firsts) = (Vec::new(), Vec::new(), Vec::new());
        for sample in counted {
            firsts
                .extend(sample.rows().next().filter(|row| *row == sample.all.start).map(|row| row..row + 1));
            indices.extend(sample.runs.iter().map(|_| sample.sample));
            runs.extend_from_slice(&sample.runs);
        }
        let finite = backend.moments(x, &runs, all)?;
        // What is finite in all is so in its first rows.
        drop(backend.moments(x, &firsts, at_0)?);
        self.checks.push((tap, indices, finite));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;

    #[test]
    fn position_0_is_counted_besides() {
        let cpu = Cpu::<f64>::new();
        let mut sink = MomentSink::new(&BTreeMap::from([((3, Site::Mlp), 2)]));
        // Samples of 2, 1 and 3 tokens.
        let chunk = Chunk {
            ids: vec![0; 6],
            cu_seqlens: vec![0, 2, 3, 6],
            indices: vec![0, 1, 2],
            loss_scales: vec![0.0; 3],
        };
        let rows = [8.0, -8.0, 1.0, 0.0, 4.0, 4.0, -8.0, 8.0, 0.5, 0.5, 1.0, 1.0];
        let x = cpu.from_slice(&rows, 2);
        for direction in [Direction::Values, Direction::Gradients] {
            sink.push(&cpu, Tap { layer: 3, site: Site::Mlp, direction }, &chunk, &x).unwrap();
        }
        let layer = &sink.read(&cpu).unwrap()[&(3, Site::Mlp)];
        let values = layer.at_0(Direction::Values).unwrap();
        assert_eq!((values.sum_abs.as_slice(), values.count), ([20.0, 20.0].as_slice(), 3));
        assert_eq!(layer.get(Direction::Values).unwrap().sum_abs, [22.5, 21.5]);
        assert_eq!(layer.position_0_share(Direction::Values), Some(40.0 / 44.0));
        // The sample of a single token has no gradient.
        let gradients = layer.at_0(Direction::Gradients).unwrap();
        assert_eq!((gradients.sum_abs.as_slice(), gradients.count), ([16.0, 16.0].as_slice(), 2));
        assert_eq!(layer.position_0_share(Direction::Gradients), Some(32.0 / 36.0));
    }
}
