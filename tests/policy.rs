//! Which tokens count, on golden models: against what every token gives by itself, and that no cut of the work shows.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/golden.rs"]
#[allow(dead_code, reason = "what only tests of whole models need")]
mod golden;

use std::collections::BTreeMap;

use golden::{Golden, everything, load, repository, run_counting, settings};
use gradlens::backend::cpu::{Buf, Cpu};
use gradlens::backend::{Chunk, FeatureSums, Moments, Positions, SaeBackend, SaeGradient, SampleRows};
use gradlens::engine::{Engine, EngineSpec};
use gradlens::error::Result;
use gradlens::model::op::Site;
use gradlens::model::sae::SaeWeights;
use gradlens::source::Pass;
use gradlens::stats::{
    Direction, LayerFeatures, LayerMoments, NormRule, NormSink, Quantity, SaeSink, SaeSpec, Sink, Skipped,
    Tap, TokenPolicy,
};
use gradlens::weights::sae::{self, SaeOptions};

/// All rows that were shown.
#[derive(Default)]
struct Shown(BTreeMap<(usize, Direction), Vec<f32>>);

impl Sink<Cpu<f32>> for Shown {
    fn push(&mut self, _: &Cpu<f32>, tap: Tap, _: &Chunk, x: &Buf<f32>) -> Result<()> {
        self.0.entry((tap.layer, tap.direction)).or_default().extend_from_slice(x);
        Ok(())
    }
}

impl Shown {
    /// Values and gradients of every token of a golden whose samples are one pass.
    fn of(cpu: &Cpu<f32>, golden: &Golden) -> Self {
        let mut shown = Self::default();
        let mut engine = Engine::new(cpu, &golden.spec, &golden.tensors, everything(golden));
        let [pass] = &golden.passes[..] else { panic!("more than one pass") };
        engine.run(pass, &mut shown).unwrap();
        shown
    }

    fn row(&self, layer: usize, direction: Direction, row: usize, width: usize) -> &[f32] {
        &self.0[&(layer, direction)][row * width..][..width]
    }

    fn norm(&self, layer: usize, row: usize, width: usize) -> f64 {
        let values = self.row(layer, Direction::Values, row, width);
        values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt()
    }
}

/// `name`'s corpus in passes of so many tokens.
fn open(name: &str, tokens_per_pass: usize) -> Golden {
    let (max_length, _) = settings(name);
    load(name, "corpus.jsonl", max_length, tokens_per_pass, 1)
}

/// Every rule on, with the medians of the first samples. Some token of each sample is special.
fn policy(cpu: &Cpu<f32>, golden: &Golden, special: Vec<u32>, ratio: f64) -> TokenPolicy {
    let mut policy = TokenPolicy { stride: 2, first: 1, special, norms: None };
    let mut sink = NormSink::new(&policy);
    let spec = EngineSpec { gradients: false, ..everything(golden) };
    let mut engine = Engine::new(cpu, &golden.spec, &golden.tensors, spec);
    golden.passes.iter().for_each(|pass| drop(engine.run(pass, &mut sink).unwrap()));
    policy.norms = Some(NormRule { ratio, medians: sink.medians().unwrap() });
    policy
}

/// Ids that occur at positions which the rules before leave.
fn some_ids(golden: &Golden) -> Vec<u32> {
    let pass = &golden.passes[0];
    let rows = pass.cu_seqlens.windows(2).map(|pair| pair[0] + 4);
    let mut ids: Vec<u32> = rows.filter_map(|row| pass.ids.get(row).copied()).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Sums over rows, one by one.
fn sums(rows: impl Iterator<Item = Vec<f64>>, width: usize) -> Moments {
    let mut sums = Moments::new(width);
    for row in rows {
        for (index, value) in row.into_iter().enumerate() {
            sums.sum[index] += value;
            sums.sum_abs[index] += value.abs();
            sums.sum_sq[index] += value * value;
            sums.max_abs[index] = sums.max_abs[index].max(value.abs());
        }
        sums.count += 1;
    }
    sums
}

#[track_caller]
fn check(found: &Moments, wanted: &Moments, what: &str) {
    assert_eq!(found.count, wanted.count, "{what}");
    assert_eq!(found.max_abs, wanted.max_abs, "{what}");
    for (index, scale) in wanted.sum_abs.iter().enumerate() {
        for (found, wanted, scale) in [
            (found.sum[index], wanted.sum[index], *scale),
            (found.sum_abs[index], wanted.sum_abs[index], *scale),
            (found.sum_sq[index], wanted.sum_sq[index], wanted.sum_sq[index]),
        ] {
            assert!((found - wanted).abs() <= 1e-12 * scale, "{what} [{index}]: {found} instead of {wanted}");
        }
    }
}

/// Why a token is left out, said anew: position in its sample, id, norm and limit.
fn reason(policy: &TokenPolicy, position: usize, id: u32, norm: f64, limit: f64) -> Option<usize> {
    let broken = [
        !position.is_multiple_of(policy.stride),
        position < policy.first,
        policy.special.contains(&id),
        norm > limit,
    ];
    broken.iter().position(|broken| *broken)
}

/// Rows that count in a layer, by sample, and how many each rule left out.
fn counted(
    policy: &TokenPolicy,
    shown: &Shown,
    pass: &Pass,
    layer: usize,
    width: usize,
) -> (Vec<Vec<usize>>, [u64; 4]) {
    let rule = policy.norms.as_ref().unwrap();
    // The median over what the other rules leave, here by sorting anew.
    let of_sample = |pair: &[usize]| -> Vec<(usize, usize)> {
        (pair[0]..pair[1]).map(|row| (row, row - pair[0])).collect()
    };
    let samples: Vec<Vec<(usize, usize)>> = pass.cu_seqlens.windows(2).map(of_sample).collect();
    let why = |row: usize, position: usize, limit: f64| {
        reason(policy, position, pass.ids[row], shown.norm(layer, row, width), limit)
    };
    let mut norms: Vec<f64> = samples
        .iter()
        .flatten()
        .filter(|(row, position)| why(*row, *position, f64::INFINITY).is_none())
        .map(|(row, _)| shown.norm(layer, *row, width))
        .collect();
    norms.sort_by(f64::total_cmp);
    let median = (norms[norms.len() / 2] + norms[(norms.len() - 1) / 2]) / 2.0;
    let found = rule.medians[&(layer, Site::Mlp)];
    assert!((found / median - 1.0).abs() < 1e-12, "layer {layer}: median {found} instead of {median}");
    let mut left_out = [0; 4];
    let mut rows = Vec::new();
    for sample in &samples {
        let mut of_sample = Vec::new();
        for (row, position) in sample {
            match why(*row, *position, rule.ratio * found) {
                Some(rule) => left_out[rule] += 1,
                None => of_sample.push(*row),
            }
        }
        rows.push(of_sample);
    }
    (rows, left_out)
}

#[test]
fn sums_are_those_of_the_tokens_that_count() {
    let cpu = Cpu::<f32>::new();
    for name in ["qwen2", "mistral", "zephyr"] {
        let golden = open(name, 1 << 20);
        let width = golden.spec.hidden_size;
        let pass = &golden.passes[0];
        let shown = Shown::of(&cpu, &golden);
        let policy = policy(&cpu, &golden, some_ids(&golden), 1.1);
        let (layers, _) = run_counting(&cpu, &golden, everything(&golden), policy.clone());
        for (layer, found) in &layers {
            let (samples, left_out) = counted(&policy, &shown, pass, *layer, width);
            let Skipped { stride, first, special, norms } = found.skipped;
            assert_eq!([stride, first, special, norms], left_out, "{name} layer {layer}");
            assert!(left_out.iter().all(|count| *count > 0), "{name} layer {layer}: {left_out:?}");
            for direction in [Direction::Values, Direction::Gradients] {
                let shortest = if direction == Direction::Values { 1 } else { 2 };
                let rows = samples
                    .iter()
                    .zip(pass.cu_seqlens.windows(2))
                    .filter(|(_, pair)| pair[1] - pair[0] >= shortest);
                let rows = rows.flat_map(|(rows, _)| rows.iter().copied());
                let wide = |row: usize| -> Vec<f64> {
                    shown.row(*layer, direction, row, width).iter().map(|v| f64::from(*v)).collect()
                };
                let what = format!("{name} layer {layer} {direction}");
                let wanted = sums(rows.map(wide), width);
                assert!(wanted.count > 0, "{what}");
                check(found.get(direction).unwrap(), &wanted, &what);
                assert_eq!(found.at_0(direction).unwrap(), &Moments::new(width), "{what}: position 0");
            }
        }
    }
}

/// Position 0 of those samples alone at which it counts.
#[test]
fn position_0_is_counted_where_it_is_left() {
    let cpu = Cpu::<f32>::new();
    let golden = open("qwen2", 1 << 20);
    let width = golden.spec.hidden_size;
    let pass = &golden.passes[0];
    let shown = Shown::of(&cpu, &golden);
    let special = vec![pass.ids[0]];
    let policy = TokenPolicy { special: special.clone(), ..TokenPolicy::default() };
    let (layers, _) = run_counting(&cpu, &golden, everything(&golden), policy);
    for (layer, found) in &layers {
        let starts =
            pass.cu_seqlens.windows(2).map(|pair| pair[0]).filter(|row| pass.ids[*row] != special[0]);
        let wide =
            |row| shown.row(*layer, Direction::Values, row, width).iter().map(|v| f64::from(*v)).collect();
        let wanted = sums(starts.map(wide), width);
        assert!(wanted.count > 0 && wanted.count < pass.samples.len() as u64);
        check(found.at_0(Direction::Values).unwrap(), &wanted, &format!("layer {layer}"));
    }
}

/// The same bytes for any pass size, chunk size, number of threads, and kept or recomputed activations.
#[test]
fn cuts_show_nowhere() {
    let cpu = Cpu::<f32>::new();
    for name in ["qwen2", "mistral"] {
        let whole = open(name, 1 << 20);
        let special = some_ids(&whole);
        let expected_policy = policy(&cpu, &whole, special.clone(), 1.1);
        let base = everything(&whole);
        let all = |layers: &BTreeMap<usize, LayerMoments>| layers.clone();
        let expected = all(&run_counting(&cpu, &whole, base.clone(), expected_policy.clone()).0);
        for (tokens_per_pass, chunk_tokens, keep_from, threads) in
            [(1, 1, 0, 1), (100, 40, 4, 3), (1 << 20, 90, 1, 2), (150, 1024, 2, 4)]
        {
            let golden = open(name, tokens_per_pass);
            let spec = EngineSpec { chunk_tokens, keep_from, ..base.clone() };
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let found = pool.install(|| {
                let policy = policy(&cpu, &golden, special.clone(), 1.1);
                assert_eq!(policy, expected_policy, "{name}: other medians");
                run_counting(&cpu, &golden, spec, policy).0
            });
            assert!(
                found == expected,
                "{name}: other bytes in passes of {tokens_per_pass}, chunks of {chunk_tokens}"
            );
            let values = EngineSpec { chunk_tokens, gradients: false, ..base.clone() };
            let alone = run_counting(&cpu, &golden, values, expected_policy.clone()).0;
            for (layer, alone) in alone {
                assert_eq!(
                    (&alone.values, alone.skipped),
                    (&expected[&layer].values, expected[&layer].skipped)
                );
            }
        }
    }
}

/// The golden SAEs of layers 1 and 3 of `qwen2`.
fn saes() -> BTreeMap<usize, SaeWeights> {
    let folder = repository().join("tests/goldens/sae/dl_batchtopk");
    let open = |layer: usize| {
        let path = folder.join(format!("mlp_out_layer_{layer}/trainer_0"));
        (layer, sae::open(&path, &SaeOptions::default()).unwrap().weights)
    };
    [1, 3].map(open).into()
}

fn features(
    cpu: &Cpu<f32>,
    golden: &Golden,
    how: (Quantity, SaeGradient, bool),
    policy: &TokenPolicy,
    chunk_tokens: usize,
) -> BTreeMap<usize, LayerFeatures> {
    let (quantity, gradient, spliced) = how;
    let spec = SaeSpec { saes: saes(), quantity, gradient, signed_sums_alone: false };
    let engine =
        EngineSpec { layers: vec![1, 3], gradients: spec.gradients(), chunk_tokens, ..everything(golden) };
    let mut engine = Engine::new(cpu, &golden.spec, &golden.tensors, engine);
    let mut sink = SaeSink::new(spec).counting(policy.clone());
    for pass in &golden.passes {
        match spliced {
            true => drop(engine.run_spliced(pass, &mut sink).unwrap()),
            false => drop(engine.run(pass, &mut sink).unwrap()),
        }
    }
    sink.take(cpu).unwrap()
}

const HOW: [(Quantity, SaeGradient, bool); 5] = [
    (Quantity::Values, SaeGradient::All, false),
    (Quantity::Gradients, SaeGradient::All, false),
    (Quantity::Gradients, SaeGradient::Active, false),
    (Quantity::Attribution, SaeGradient::All, false),
    (Quantity::Attribution, SaeGradient::All, true),
];

/// Features are added up over the same tokens as dimensions, to the byte.
#[test]
fn features_are_those_of_the_tokens_that_count() {
    let cpu = Cpu::<f32>::new();
    let golden = open("qwen2", 1 << 20);
    let (width, pass) = (golden.spec.hidden_size, &golden.passes[0]);
    let shown = Shown::of(&cpu, &golden);
    let policy = policy(&cpu, &golden, some_ids(&golden), 1.1);
    let found = features(&cpu, &golden, HOW[3], &policy, 1 << 20);
    for (layer, sae) in saes() {
        let (samples, left_out) = counted(&policy, &shown, pass, layer, width);
        let of_sample = |((rows, pair), sample): ((Vec<usize>, &[usize]), &u64)| SampleRows {
            sample: *sample,
            all: pair[0]..pair[1],
            runs: rows.into_iter().map(|row| row..row + 1).collect(),
        };
        let samples = samples.into_iter().zip(pass.cu_seqlens.windows(2)).zip(&pass.samples).map(of_sample);
        let at = Positions { samples: samples.collect() };
        let [x, dx] = [Direction::Values, Direction::Gradients]
            .map(|direction| cpu.from_slice(&shown.0[&(layer, direction)], width));
        let mut wanted =
            features(&cpu, &golden, HOW[3], &TokenPolicy::default(), 1 << 20).remove(&layer).unwrap();
        wanted.sums = empty(&wanted.sums);
        cpu.features(&sae, &at, Some(&x), Some(&dx), SaeGradient::All, &mut wanted.sums).unwrap().unwrap();
        let found = &found[&layer];
        assert!(found.sums == wanted.sums, "layer {layer}");
        let Skipped { stride, first, special, norms } = found.skipped;
        assert_eq!([stride, first, special, norms], left_out);
        assert_eq!(found.fit.tokens, at.count(1), "all of them are checked");
    }
}

/// Sums of the same kinds over nothing.
fn empty(sums: &FeatureSums) -> FeatureSums {
    let mut empty = sums.clone();
    let nothing = |moments: &mut Moments| *moments = Moments::new(moments.sum.len());
    empty.gradients.iter_mut().chain(&mut empty.attribution).for_each(nothing);
    if let Some(values) = &mut empty.values {
        nothing(&mut values.moments);
        values.fired.fill(0);
        values.max_at.fill(Default::default());
    }
    empty
}

#[test]
fn cuts_show_nowhere_in_features() {
    let cpu = Cpu::<f32>::new();
    let whole = open("qwen2", 1 << 20);
    let policy = policy(&cpu, &whole, some_ids(&whole), 1.1);
    for how in HOW {
        let expected = features(&cpu, &whole, how, &policy, 1 << 20);
        assert!(expected.values().all(|layer| layer.skipped.norms > 0));
        for (tokens_per_pass, chunk_tokens) in [(1, 1), (40, 64), (1 << 20, 64), (1 << 20, 1)] {
            let found = features(&cpu, &open("qwen2", tokens_per_pass), how, &policy, chunk_tokens);
            assert!(
                found == expected,
                "{how:?}: other bytes in passes of {tokens_per_pass}, chunks of {chunk_tokens}"
            );
        }
    }
}
