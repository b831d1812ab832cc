//! SAEs on the CPU backend against their formulas in float64, and what must not change any byte.

#![allow(clippy::unwrap_used)]

#[path = "sae_ops/check.rs"]
mod check;
mod common;
#[path = "sae_ops/reference.rs"]
mod reference;

use std::ops::Range;

use check::*;
use common::{relative_l2, tensor};
use gradlens::backend::cpu::Cpu;
use gradlens::backend::{
    FeatureSums, Fit, Moments, NonFinite, Place, Positions, SaeBackend, SaeGradient, SampleRows,
};
use gradlens::model::Dtype;
use gradlens::model::sae::{InputNorm, SaeActivation, SaeWeights};
use reference::{Reference, positions, random_sae, rows_of};

#[test]
fn every_kind_of_sae_is_its_formula() {
    let at = positions(&[5, 1, 0, 20, 3, 1], 1, 0);
    for activation in activations(SHAPE.0) {
        for norm in NORMS {
            for features_first in [true, false] {
                for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
                    let sae = random_sae(1, SHAPE, activation.clone(), norm, features_first, dtype);
                    let what = format!("{} {norm:?} {features_first} {dtype}", name(&activation));
                    check(&Cpu::<f64>::new(), &format!("{what} f64"), &sae, &at, FLOAT64);
                    check(&Cpu::<f32>::new(), &what, &sae, &at, FLOAT32);
                    check(&Cpu::<f32>::with_multiply_adds(), &what, &sae, &at, FLOAT32);
                }
            }
        }
    }
}

fn name(activation: &SaeActivation) -> String {
    format!("{activation:?}").chars().take_while(|c| *c != '[').collect()
}

#[test]
fn positions_are_strided_from_the_first() {
    for (lengths, stride, first) in
        [(&[9, 1, 30, 4][..], 4, 0), (&[9, 1, 30, 4], 3, 1), (&[1, 2], 1, 1), (&[3], 4, 0)]
    {
        let at = positions(lengths, stride, first);
        for activation in activations(SHAPE.0) {
            let sae = random_sae(2, SHAPE, activation, InputNorm::LayerNorm, true, Dtype::F32);
            check(&Cpu::<f64>::new(), &format!("{lengths:?} {stride} {first}"), &sae, &at, FLOAT64);
        }
    }
}

#[test]
fn vectors_may_be_left_out() {
    let at = positions(&[7, 2], 1, 0);
    let mut sae = random_sae(3, SHAPE, SaeActivation::Relu, InputNorm::None, true, Dtype::BF16);
    (sae.input_bias, sae.encoder_scale, sae.decoder_scale) = (None, None, None);
    check(&Cpu::<f64>::new(), "bare", &sae, &at, FLOAT64);
}

#[test]
fn shapes_of_all_sizes() {
    let at = positions(&[3, 8], 1, 0);
    for shape in [(1, 2), (5, 3), (33, 64), (256, 65), (257, 130), (1030, 16), (600, 700)] {
        for activation in [SaeActivation::Relu, SaeActivation::TopK { k: 1 }] {
            let sae = random_sae(4, shape, activation, InputNorm::RescaleToSqrtD, false, Dtype::F32);
            check(&Cpu::<f64>::new(), &format!("{shape:?}"), &sae, &at, FLOAT64);
        }
    }
}

#[test]
fn nothing_chosen_adds_nothing() {
    let cpu = Cpu::<f32>::new();
    let sae = random_sae(1, SHAPE, SaeActivation::Relu, InputNorm::None, true, Dtype::F32);
    let at = positions(&[2, 3], 1, 5);
    let [x, dx] = inputs(&at, SHAPE.1, 1).map(|v| buffer(&cpu, &v, SHAPE.1));
    let mut sums = all_sums(SHAPE.0);
    cpu.features(&sae, &at, Some(&x), Some(&dx), SaeGradient::Active, &mut sums).unwrap().unwrap();
    assert_eq!(sums, all_sums(SHAPE.0));
    assert_eq!(cpu.reconstruct(&sae, &at, &x, None, None).unwrap().unwrap()[..], x[..]);
    assert_eq!(cpu.copy(&x).unwrap()[..], x[..]);
}

#[test]
fn any_rows_of_a_sample() {
    // Of the samples all but the ends, nothing, the ends, one in the middle.
    let mut at = positions(&[6, 3, 5, 9], 1, 0);
    for (sample, runs) in [(0, &[(1, 5)][..]), (1, &[]), (2, &[(9, 11), (13, 14)]), (3, &[(18, 19)])] {
        at.samples[sample].runs = runs.iter().map(|&(start, end)| start..end).collect();
    }
    assert_eq!((at.count(1), at.count(6)), (8, 5));
    for activation in activations(SHAPE.0) {
        let sae = random_sae(3, SHAPE, activation, InputNorm::LayerNorm, true, Dtype::F32);
        check(&Cpu::<f64>::new(), "any rows", &sae, &at, FLOAT64);
    }
}

#[test]
fn cuts_into_chunks_change_no_byte() {
    // More than a block of tokens.
    let lengths = [300, 1, 700, 7, 90];
    let mut at = positions(&lengths, 1, 0);
    at.samples[2].runs = vec![301..640, 641..645, 700..1001];
    let [x, dx] = inputs(&at, SHAPE.1, 6);
    for cpu in [Cpu::<f32>::new(), Cpu::<f32>::with_multiply_adds()] {
        for activation in activations(SHAPE.0) {
            let sae = random_sae(7, SHAPE, activation, InputNorm::LayerNorm, true, Dtype::F32);
            let mut whole = nothing(SHAPE.0);
            let spliced = everything(&cpu, &sae, &at, [&x, &dx], &mut whole);
            for cut in [1, 2] {
                let mut parts = nothing(SHAPE.0);
                let mut parts_spliced = Vec::new();
                for samples in at.samples.chunks(cut) {
                    let (start, end) = (samples[0].all.start, samples.last().unwrap().all.end);
                    let moved = |rows: &Range<usize>| rows.start - start..rows.end - start;
                    let samples = samples.iter().map(|of| SampleRows {
                        sample: of.sample,
                        all: moved(&of.all),
                        runs: of.runs.iter().map(moved).collect(),
                    });
                    let at = Positions { samples: samples.collect() };
                    let rows = start * SHAPE.1..end * SHAPE.1;
                    let inputs = [&x[rows.clone()], &dx[rows]];
                    parts_spliced.extend(everything(&cpu, &sae, &at, inputs, &mut parts));
                }
                assert!(parts == whole, "{:?} in parts of {cut} samples", name(&sae.activation));
                assert!(parts_spliced == spliced, "{:?}: reconstruction", name(&sae.activation));
            }
        }
    }
}

#[test]
fn threads_change_no_byte() {
    let at = positions(&[80, 1, 40], 1, 0);
    let [x, dx] = inputs(&at, SHAPE.1, 8);
    for activation in activations(SHAPE.0) {
        let sae = random_sae(9, SHAPE, activation, InputNorm::None, false, Dtype::BF16);
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut sums = nothing(SHAPE.0);
                let spliced = everything(&Cpu::<f32>::new(), &sae, &at, [&x, &dx], &mut sums);
                (sums, spliced)
            })
        };
        let one = with(1);
        assert!(one == with(3) && one == with(2), "{}", name(&sae.activation));
    }
}

/// A smooth loss of x̂, and its gradient.
fn loss(decoded: &[f64]) -> f64 {
    decoded.iter().enumerate().map(|(d, x)| (x * (1.0 + d as f64 * 0.1)).sin()).sum()
}

fn loss_gradient(decoded: &[f64]) -> Vec<f64> {
    let at = |(d, x): (usize, &f64)| {
        let c = 1.0 + d as f64 * 0.1;
        c * (x * c).cos()
    };
    decoded.iter().enumerate().map(at).collect()
}

#[test]
fn gradients_are_finite_differences_of_a_loss_of_the_reconstruction() {
    let cpu = Cpu::<f64>::new();
    let (features, width) = (40, 13);
    for norm in NORMS {
        let sae = random_sae(11, (features, width), SaeActivation::Relu, norm, true, Dtype::F32);
        let reference = Reference::new(&sae);
        let at = positions(&[3], 1, 0);
        let [x, _] = inputs(&at, width, 12);
        let tokens: Vec<_> = x.chunks(width).map(|x| reference.token(x)).collect();
        let dx: Vec<f64> = tokens.iter().flat_map(|token| loss_gradient(&token.decoded)).collect();
        let mut sums = FeatureSums { gradients: Some(Moments::new(features)), ..FeatureSums::default() };
        let (x, dx) = (cpu.from_slice(&x, width), cpu.from_slice(&dx, width));
        cpu.features(&sae, &at, Some(&x), Some(&dx), SaeGradient::All, &mut sums).unwrap().unwrap();
        let sums = sums.gradients.unwrap().sum;
        let numeric: Vec<f64> = (0..features)
            .map(|j| {
                let moved = |step: f64| -> f64 {
                    let decoded = tokens.iter().enumerate().map(|(row, token)| {
                        let mut f = token.f.clone();
                        f[j] += step;
                        let mean = match norm {
                            InputNorm::LayerNorm => {
                                x[row * width..][..width].iter().sum::<f64>() / width as f64
                            }
                            _ => 0.0,
                        };
                        loss(&reference.decode(&f, token.factor, mean))
                    });
                    decoded.sum()
                };
                (moved(1e-5) - moved(-1e-5)) / 2e-5
            })
            .collect();
        let error = relative_l2(&sums, &numeric);
        assert!(error <= common::tolerance::FINITE_DIFFERENCES, "{norm:?}: {error:e}");
    }
}

/// Features that are equal in pairs, one of each in another tile.
fn twins(activation: SaeActivation) -> SaeWeights {
    let mut sae = random_sae(13, SHAPE, activation, InputNorm::None, true, Dtype::F32);
    let mut rows = rows_of(&sae.encoder);
    let half = SHAPE.0 / 2;
    for j in 0..half {
        rows[half + j] = rows[j].clone();
        sae.encoder_bias[half + j] = sae.encoder_bias[j];
        if let Some(scale) = &mut sae.encoder_scale {
            scale[half + j] = scale[j];
        }
    }
    sae.encoder.tensor = tensor(Dtype::F32, &[SHAPE.0, SHAPE.1], &rows.concat());
    sae
}

#[test]
fn of_equal_features_the_lower_index_fires() {
    // An odd k keeps one of two equals.
    for activation in [SaeActivation::TopK { k: 5 }, SaeActivation::TopK { k: 101 }] {
        let sae = twins(activation);
        // The fit leaves out positions 0.
        let at = positions(&[31, 5], 1, 1);
        check(&Cpu::<f64>::new(), "twins", &sae, &at, FLOAT64);
        let cpu = Cpu::<f32>::new();
        let [x, _] = inputs(&at, SHAPE.1, 5);
        let mut values = values_of(SHAPE.0);
        let mut fit = Fit::default();
        cpu.reconstruct(&sae, &at, &buffer(&cpu, &x, SHAPE.1), Some(&mut values), Some(&mut fit))
            .unwrap()
            .unwrap();
        let half = SHAPE.0 / 2;
        let count = |features: Range<usize>| values.fired[features].iter().sum::<u64>();
        // The feature without a twin may fire too.
        let (lower, upper) = (count(0..half), count(half..2 * half));
        assert!(lower > upper && lower - upper <= 34, "{lower} and {upper}");
        assert_eq!(lower + upper + count(2 * half..SHAPE.0), fit.fired);
        assert!((0..half).all(|j| values.fired[j] >= values.fired[half + j]));
    }
    // One group: of all twins the lower ones.
    let sae = twins(SaeActivation::GroupMax { k: 1 });
    check(&Cpu::<f64>::new(), "twins", &sae, &positions(&[30, 4], 1, 0), FLOAT64);
}

#[test]
fn the_first_of_equal_tokens_is_where_a_feature_is_largest() {
    let at = positions(&[2, 6, 3], 1, 0);
    let mut x = inputs(&positions(&[4], 1, 0), SHAPE.1, 15)[0].clone();
    x.extend(x.clone());
    x.extend(x[..3 * SHAPE.1].to_vec());
    for activation in activations(SHAPE.0) {
        let sae = random_sae(16, SHAPE, activation, InputNorm::None, true, Dtype::F32);
        let cpu = Cpu::<f32>::new();
        let mut sums = FeatureSums { values: Some(values_of(SHAPE.0)), ..FeatureSums::default() };
        for _ in 0..2 {
            let x = buffer(&cpu, &x, SHAPE.1);
            cpu.features(&sae, &at, Some(&x), None, SaeGradient::All, &mut sums).unwrap().unwrap();
        }
        let values = sums.values.unwrap();
        for j in 0..SHAPE.0 {
            let Place { sample, position } = values.max_at[j];
            match values.fired[j] {
                0 => assert_eq!(values.max_at[j], Place::default()),
                _ => assert!(sample == 10 || (sample == 11 && position < 2), "{sample} {position}"),
            }
        }
        assert_eq!(values.moments.count, 22);
    }
}

#[test]
fn nearly_all_features_may_fire() {
    let at = positions(&[40, 50], 1, 0);
    let mut sae = random_sae(17, SHAPE, SaeActivation::Relu, InputNorm::RescaleToSqrtD, true, Dtype::F32);
    sae.encoder_bias.iter_mut().for_each(|bias| *bias += 5.0);
    check(&Cpu::<f64>::new(), "dense", &sae, &at, FLOAT64);
    check(&Cpu::<f32>::new(), "dense", &sae, &at, FLOAT32);
}

#[test]
fn the_first_sample_that_is_not_finite_is_named() {
    let at = positions(&[3, 80, 2, 5], 1, 0);
    let [x, dx] = inputs(&at, SHAPE.1, 18);
    let spoil = |values: &[f64], row: usize, value: f64| {
        let mut values = values.to_vec();
        values[row * SHAPE.1 + 3] = value;
        values
    };
    for activation in activations(SHAPE.0) {
        let sae = random_sae(19, SHAPE, activation, InputNorm::None, true, Dtype::F32);
        for cpu in [Cpu::<f32>::new(), Cpu::<f32>::with_multiply_adds()] {
            let run = |x: &[f64], dx: &[f64], gradient| {
                let (x, dx) = (buffer(&cpu, x, SHAPE.1), buffer(&cpu, dx, SHAPE.1));
                cpu.features(&sae, &at, Some(&x), Some(&dx), gradient, &mut all_sums(SHAPE.0)).unwrap()
            };
            for gradient in [SaeGradient::All, SaeGradient::Active] {
                for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                    let two = spoil(&spoil(&x, 89, bad), 84, bad);
                    assert_eq!(run(&two, &dx, gradient), Err(NonFinite(2)), "x {bad}");
                    assert_eq!(run(&x, &spoil(&dx, 7, bad), gradient), Err(NonFinite(1)), "dx {bad}");
                    assert_eq!(run(&two, &spoil(&dx, 2, bad), gradient), Err(NonFinite(0)), "both {bad}");
                    let dx = buffer(&cpu, &spoil(&dx, 86, bad), SHAPE.1);
                    let mut into = Moments::new(SHAPE.1);
                    let found = cpu.add_output_gradients(&sae, &at, None, &dx, &mut into).unwrap();
                    assert_eq!(found, Err(NonFinite(3)));
                }
                // Finite, but its products are not.
                let mut large = x.clone();
                large[84 * SHAPE.1..85 * SHAPE.1].fill(3e38);
                assert_eq!(run(&large, &dx, gradient), Err(NonFinite(2)));
                assert_eq!(run(&x, &dx, gradient), Ok(()));
            }
        }
    }
}
