//! Faults planted one at a time in the models and ops of the CPU engine. The comparison with the goldens must notice each
//! of them, clearly: what it does not notice it does not test.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/golden.rs"]
#[allow(dead_code, reason = "what tests of other things need")]
mod golden;

#[path = "planted/by_hand.rs"]
mod by_hand;
#[path = "planted/faulty.rs"]
mod faulty;
#[path = "planted/models.rs"]
mod models;
#[path = "planted/taps.rs"]
mod taps;

use std::fmt;

use common::{relative_l2, tolerance};
use faulty::{Faulty, Mistake};
use golden::{Expected, Golden, everything, folder, load, mean, run_sites, settings, site_key, sites};
use gradlens::backend::Backend;
use gradlens::backend::cpu::Cpu;
use gradlens::engine::EngineSpec;
use gradlens::model::Spec;
use gradlens::model::op::Site;
use gradlens::stats::Direction;
use models::READINGS;
use taps::MISPLACED;

/// Relative L2 by which a fault must move some array at least: a hundred times the tolerance of the comparison.
const NOTICED: f64 = 1e-2;
const _: () = assert!(NOTICED >= 100.0 * tolerance::GOLDEN);

const NAMES: [&str; 4] = ["gemma2", "gemma3", "qwen3", "mixtral"];

/// How far one array is from the golden's.
#[derive(Clone, Copy)]
struct Distance {
    layer: usize,
    site: Site,
    direction: Direction,
    statistic: &'static str,
    error: f64,
}

impl fmt::Display for Distance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { layer, site, direction, statistic, error } = self;
        write!(f, "{error:8.1e} at layer {layer} {} {direction} {statistic}", site.name())
    }
}

fn largest(distances: impl IntoIterator<Item = Distance>) -> Distance {
    distances.into_iter().max_by(|a, b| a.error.total_cmp(&b.error)).unwrap()
}

/// A golden and what transformers computes of it.
struct Subject {
    golden: Golden,
    expected: Expected,
}

impl Subject {
    fn load(name: &str) -> Self {
        let (max_length, batch_size) = settings(name);
        let golden = load(name, "corpus.jsonl", max_length, 1 << 20, batch_size);
        Self { golden, expected: Expected::read(&folder(name).join("expected.safetensors")) }
    }

    /// The comparison of tests/goldens.rs: each statistic of each site and layer, of the model `spec` on `backend`.
    fn distances<B: Backend>(&mut self, backend: &B, spec: Spec) -> Vec<Distance> {
        let whole = std::mem::replace(&mut self.golden.spec, spec);
        let spec = EngineSpec { sites: sites(&self.golden), ..everything(&self.golden) };
        let (found, _) = run_sites(backend, &self.golden, spec);
        self.golden.spec = whole;
        let mut distances = Vec::new();
        for (&(layer, site), moments) in &found {
            for (direction, key) in
                [(Direction::Values, "values"), (Direction::Gradients, "gradients_sample")]
            {
                let m = moments.get(direction).unwrap();
                for (statistic, found) in [
                    ("mean", mean(&m.sum, m.count)),
                    ("mean_abs", mean(&m.sum_abs, m.count)),
                    ("max_abs", m.max_abs.clone()),
                ] {
                    let expected =
                        self.expected.get(&format!("layer_{layer}.{}.{statistic}", site_key(site, key)));
                    let error = relative_l2(&found, expected);
                    distances.push(Distance { layer, site, direction, statistic, error });
                }
            }
        }
        distances
    }
}

/// What is planted below is the difference to these runs, and nothing else.
#[test]
fn without_a_fault_the_goldens_are_met() {
    for name in NAMES {
        let mut subject = Subject::load(name);
        let whole = subject.golden.spec.clone();
        for mistake in [Mistake::None, Mistake::OwnLoops] {
            let most = largest(subject.distances(&Faulty::new(mistake), whole.clone()));
            println!("{name} {mistake:?}: {most}");
            assert!(most.error <= tolerance::GOLDEN, "{name} {mistake:?}: {most}");
        }
    }
}

#[test]
fn wrong_readings_of_a_model_are_noticed() {
    let mut missed = Vec::new();
    for name in NAMES {
        let mut subject = Subject::load(name);
        let whole = subject.golden.spec.clone();
        for reading in READINGS.iter().filter(|reading| reading.goldens.contains(&name)) {
            let planted = reading.plant.models(&whole);
            assert!(!planted.is_empty(), "{name} has no place for: {}", reading.name);
            let number = planted.len();
            let least = planted.into_iter().map(|(place, spec)| {
                let most = largest(subject.distances(&Cpu::<f32>::new(), spec));
                let what = format!("{name}: {} ({place})", reading.name);
                missed.extend((most.error <= reading.least).then(|| format!("{what}: {most}")));
                (most, place)
            });
            let (least, place) = least.min_by(|a, b| a.0.error.total_cmp(&b.0.error)).unwrap();
            println!("{name:8} {:60} {number:2} times, least {place:16} {least}", reading.name);
        }
    }
    assert!(missed.is_empty(), "not noticed: {missed:#?}");
}

/// Wrong ops, and whether values show them; gradients show all of them.
const MISTAKES: &[(Mistake, &[&str], bool)] = &[
    (Mistake::NoSlopeOfScores, &["gemma2"], false),
    (Mistake::NoSlopeOfLogits, &["gemma2"], false),
    (Mistake::NoGradientOfScores, &["mixtral"], false),
    (Mistake::NoGradientOfRouter, &["mixtral"], false),
    (Mistake::DiagonalOfRouter, &["mixtral"], false),
    (Mistake::NotRenormalised, &["mixtral"], true),
    (Mistake::NoScoreOnTheWayBack, &["mixtral"], false),
    (Mistake::OtherExpertsBackward, &["mixtral"], false),
    (Mistake::FirstExpertBackward, &["mixtral"], false),
    (Mistake::FirstRowLost, &["mixtral"], false),
    (Mistake::NoOffsetBackward, &["gemma2", "gemma3"], false),
    (Mistake::ConstantRms, &NAMES, false),
    (Mistake::NormLosesTheStream, &NAMES, false),
    (Mistake::LinearLosesTheOthers, &NAMES, false),
    (Mistake::NoGradientOfAttention, &NAMES, false),
    (Mistake::NoGradientOfMlp, &NAMES, false),
    (Mistake::NoGradientOfGate, &NAMES, false),
    (Mistake::OtherActivationBackward, &NAMES, false),
    (Mistake::WiderWindowBackward, &["gemma2", "gemma3"], false),
    (Mistake::RopeTurnsForwards, &NAMES, false),
];

#[test]
fn wrong_ops_are_noticed() {
    let mut missed = Vec::new();
    for name in NAMES {
        let mut subject = Subject::load(name);
        let whole = subject.golden.spec.clone();
        for &(mistake, _, in_values) in MISTAKES.iter().filter(|(_, goldens, _)| goldens.contains(&name)) {
            let distances = subject.distances(&Faulty::new(mistake), whole.clone());
            let (values, gradients): (Vec<Distance>, Vec<Distance>) =
                distances.into_iter().partition(|distance| distance.direction == Direction::Values);
            let [values, gradients] = [values, gradients].map(largest);
            println!("{name:8} {:30} {gradients}", format!("{mistake:?}"));
            let noticed = gradients.error > NOTICED;
            // A fault of the way back alone is where it was meant to be.
            let placed = if in_values { values.error > NOTICED } else { values.error <= tolerance::GOLDEN };
            if !noticed || !placed {
                missed.push(format!("{name}: {mistake:?}: {gradients}, {values}"));
            }
        }
    }
    assert!(missed.is_empty(), "not noticed: {missed:#?}");
}

/// A tap in the wrong place shows at its own site in every layer, in some of them clearly, and at no other site.
#[test]
fn misplaced_taps_are_noticed_at_their_site() {
    let mut missed = Vec::new();
    for name in NAMES {
        let mut subject = Subject::load(name);
        let whole = subject.golden.spec.clone();
        for tap in MISPLACED.iter().filter(|tap| tap.goldens.contains(&name)) {
            let mut spec = whole.clone();
            spec.blocks.iter_mut().for_each(|block| tap.misplace(block));
            let distances = subject.distances(&Cpu::<f32>::new(), spec);
            let what = format!("{name:8} {:10} {:40}", tap.site.name(), tap.name);
            let other = largest(distances.iter().filter(|d| d.site != tap.site).copied());
            missed.extend((other.error > tolerance::GOLDEN).then(|| format!("{what} elsewhere: {other}")));
            for (direction, moved) in [(Direction::Values, tap.values), (Direction::Gradients, tap.gradients)]
            {
                let own = distances.iter().filter(|d| d.site == tap.site && d.direction == direction);
                let of_layer = |layer| largest(own.clone().filter(|d| d.layer == layer).copied());
                let by_layer: Vec<Distance> = (0..whole.blocks.len()).map(of_layer).collect();
                let most = largest(by_layer.iter().copied());
                let as_meant = match moved {
                    true => {
                        println!("{what} {most}");
                        most.error > NOTICED && by_layer.iter().all(|d| d.error > 10.0 * tolerance::GOLDEN)
                    }
                    false => most.error <= tolerance::GOLDEN,
                };
                missed.extend((!as_meant).then(|| format!("{what} {most}")));
            }
        }
    }
    assert!(missed.is_empty(), "not as meant: {missed:#?}");
}
