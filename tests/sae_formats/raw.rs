//! An SAE's numbers before they are written, what libraries compute with them, and the comparison.

use std::path::Path;

use gradlens::error::Result;
use gradlens::weights::sae::{LlamaScopeConvention, Sae, SaeOptions, open};

use crate::common::Random;
use crate::reference;
use crate::write::Array;

/// Sizes of all SAEs here: dimensions and features.
pub const D: usize = 6;
pub const F: usize = 20;

/// Weights that float32 and bfloat16 hold exactly.
pub struct Raw {
    /// `[F][D]`
    pub encoder: Vec<Vec<f64>>,
    /// `[F][D]`, with norms far from 1.
    pub decoder: Vec<Vec<f64>>,
    pub encoder_bias: Vec<f64>,
    pub decoder_bias: Vec<f64>,
    /// Positive. `[F]`
    pub threshold: Vec<f64>,
    /// Others of F.
    pub gate: Vec<f64>,
    pub magnitude: Vec<f64>,
}

impl Raw {
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut some = |n: usize, scale: f64| -> Vec<f64> {
            random.normals(n).into_iter().map(|x| half::bf16::from_f64(x * scale).to_f64()).collect()
        };
        let mut rows = |scale: f64| -> Vec<Vec<f64>> { (0..F).map(|_| some(D, scale)).collect() };
        let (encoder, decoder) = (rows(0.6), rows(0.8));
        Self {
            encoder,
            decoder,
            encoder_bias: some(F, 0.3),
            decoder_bias: some(D, 0.5),
            threshold: some(F, 0.4).into_iter().map(f64::abs).collect(),
            gate: some(F, 0.5),
            magnitude: some(F, 0.5),
        }
    }

    /// Matrices as they are saved: `[F, D]` or `[D, F]`.
    pub fn encoder(&self, features_first: bool) -> Array {
        matrix(&self.encoder, features_first)
    }

    pub fn decoder(&self, features_first: bool) -> Array {
        matrix(&self.decoder, features_first)
    }

    /// x W_encᵀ
    pub fn product(&self, x: &[f64]) -> Vec<f64> {
        self.encoder.iter().map(|row| row.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
    }

    /// x W_encᵀ + b_enc
    pub fn hidden(&self, x: &[f64]) -> Vec<f64> {
        self.product(x).into_iter().zip(&self.encoder_bias).map(|(z, b)| z + b).collect()
    }

    /// x − b_dec
    pub fn centred(&self, x: &[f64]) -> Vec<f64> {
        x.iter().zip(&self.decoder_bias).map(|(x, b)| x - b).collect()
    }

    /// f W_dec + b_dec
    pub fn decode(&self, f: &[f64]) -> Vec<f64> {
        let at = |d: usize| f.iter().zip(&self.decoder).map(|(f, row)| f * row[d]).sum::<f64>();
        (0..D).map(|d| at(d) + self.decoder_bias[d]).collect()
    }

    /// ‖W_dec[j]‖
    pub fn norms(&self) -> Vec<f64> {
        self.decoder.iter().map(|row| row.iter().map(|w| w * w).sum::<f64>().sqrt()).collect()
    }
}

fn matrix(rows: &[Vec<f64>], features_first: bool) -> Array {
    match features_first {
        true => Array::new(&[F, D], &rows.concat()),
        false => {
            let at = |i: usize| rows[i % F][i / F];
            Array::new(&[D, F], &(0..F * D).map(at).collect::<Vec<_>>())
        }
    }
}

pub fn vector(values: &[f64]) -> Array {
    Array::new(&[values.len()], values)
}

pub fn scalar(value: f64) -> Array {
    Array::new(&[], &[value])
}

pub fn relu(h: &[f64]) -> Vec<f64> {
    h.iter().map(|h| h.max(0.0)).collect()
}

/// f = h where h > θ
pub fn above(h: &[f64], threshold: &[f64]) -> Vec<f64> {
    h.iter().zip(threshold).map(|(h, t)| if h > t { h.max(0.0) } else { 0.0 }).collect()
}

/// The k largest, where positive.
pub fn top(h: &[f64], k: usize) -> Vec<f64> {
    let mut sorted = h.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    h.iter().map(|h| if *h >= sorted[k - 1] { h.max(0.0) } else { 0.0 }).collect()
}

pub fn times(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a * b).collect()
}

pub fn over(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a / b).collect()
}

pub fn scaled(a: &[f64], s: f64) -> Vec<f64> {
    a.iter().map(|a| a * s).collect()
}

/// Opens with the defaults.
pub fn read(path: &Path) -> Result<Sae> {
    open(path, &SaeOptions::default())
}

/// Opens with a scale.
pub fn read_scaled(path: &Path, scale: f64) -> Result<Sae> {
    open(path, &SaeOptions { norm_scale: Some(scale), ..SaeOptions::default() })
}

/// Opens as SAELens does.
pub fn read_as_saelens(path: &Path) -> Result<Sae> {
    let convention = LlamaScopeConvention::Saelens;
    open(path, &SaeOptions { llamascope_convention: convention, ..SaeOptions::default() })
}

/// Compares features and reconstructions of 50 tokens with those of `expected`.
#[track_caller]
pub fn check(sae: &Sae, expected: impl Fn(&[f64]) -> (Vec<f64>, Vec<f64>)) {
    let mut random = Random::new(99);
    let (mut fired, mut silent) = (0, 0);
    assert_eq!((sae.weights.num_features(), sae.weights.width()), (F, D));
    for _ in 0..50 {
        let x: Vec<f64> = random.normals(D).into_iter().map(|x| 1.5 * x + 0.4).collect();
        let (f, y) = expected(&x);
        let features = reference::encode(&sae.weights, &x);
        let near = |a: f64, b: f64| (a - b).abs() <= 2e-6 * (1.0 + b.abs());
        for (at, (a, b)) in features.iter().zip(&f).enumerate() {
            assert!(near(*a, *b), "feature {at}: {a}, expected {b}");
            assert_eq!(*a > 0.0, *b > 0.0, "feature {at}: {a}, expected {b}");
            *(if *b > 0.0 { &mut fired } else { &mut silent }) += 1;
        }
        for (at, (a, b)) in reference::decode(&sae.weights, &x, &features).iter().zip(&y).enumerate() {
            assert!(near(*a, *b), "dimension {at}: {a}, expected {b}");
        }
    }
    assert!(fired >= 50 && silent >= 50, "{fired} fired, {silent} did not: that shows nothing");
}

/// What `error` says must have these parts and a place.
#[track_caller]
pub fn says(result: Result<Sae>, parts: &[&str]) {
    let error = result.unwrap_err().to_string();
    for part in parts.iter().chain(&["\n  where:    "]) {
        assert!(error.contains(part), "{part:?} is not in:\n{error}");
    }
}
