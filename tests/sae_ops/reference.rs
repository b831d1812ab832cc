//! The SAE of `model/sae.rs` by its formulas, in float64 and one loop after the other.

use gradlens::backend::cpu::Element;
use gradlens::backend::{Positions, SampleRows};
use gradlens::model::Dtype;
use gradlens::model::sae::{FeatureMatrix, InputNorm, SaeActivation, SaeWeights};

use crate::common::{Random, tensor};

/// A random SAE whose vectors are all there. `dtype` is that of the matrices.
pub fn random_sae(
    seed: u64,
    (features, width): (usize, usize),
    activation: SaeActivation,
    norm: InputNorm,
    features_first: bool,
    dtype: Dtype,
) -> SaeWeights {
    let mut random = Random::new(seed);
    let mut vector = |n: usize, scale: f64, shift: f64| -> Vec<f32> {
        random.normals(n).into_iter().map(|v| (v * scale + shift) as f32).collect()
    };
    let input_bias = Some(vector(width, 0.3, 0.0));
    let encoder_scale = Some(vector(features, 0.1, 1.0));
    let encoder_bias = vector(features, 0.5, -0.5);
    let decoder_scale = Some(vector(features, 0.2, 1.0));
    let decoder_bias = vector(width, 0.3, 0.1);
    let mut matrix = |scale: f64| {
        let values: Vec<f64> = random.normals(features * width).into_iter().map(|v| v * scale).collect();
        let shape = if features_first { [features, width] } else { [width, features] };
        FeatureMatrix { tensor: tensor(dtype, &shape, &values), features_first }
    };
    let scale = 1.0 / (width as f64).sqrt();
    let [encoder, decoder] = [matrix(scale), matrix(scale)];
    SaeWeights {
        encoder,
        decoder,
        norm,
        input_bias,
        encoder_scale,
        encoder_bias,
        activation,
        decoder_scale,
        decoder_bias,
    }
}

/// Element [feature, dimension] of every feature.
pub fn rows_of(matrix: &FeatureMatrix) -> Vec<Vec<f64>> {
    let mut stored = vec![0f64; matrix.tensor.len()];
    f64::widen(matrix.tensor.dtype, matrix.tensor.bytes(), &mut stored);
    let (features, width) = (matrix.num_features(), matrix.width());
    let at = |f: usize, d: usize| if matrix.features_first { f * width + d } else { d * features + f };
    (0..features).map(|f| (0..width).map(|d| stored[at(f, d)]).collect()).collect()
}

/// What happens to one token.
pub struct Token {
    /// f. `[F]`
    pub f: Vec<f64>,
    /// Distance of each feature from where it would start or stop to fire. `[F]`
    pub margin: Vec<f64>,
    /// Of denorm.
    pub factor: f64,
    /// x̂. `[D]`
    pub decoded: Vec<f64>,
}

pub struct Reference {
    pub sae: SaeWeights,
    pub encoder: Vec<Vec<f64>>,
    pub decoder: Vec<Vec<f64>>,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

impl Reference {
    pub fn new(sae: &SaeWeights) -> Self {
        Self { sae: sae.clone(), encoder: rows_of(&sae.encoder), decoder: rows_of(&sae.decoder) }
    }

    /// (mean, scale, factor)
    fn norm(&self, x: &[f64]) -> (f64, f64, f64) {
        let d = x.len() as f64;
        match self.sae.norm {
            InputNorm::None => (0.0, 1.0, 1.0),
            InputNorm::RescaleToSqrtD => {
                let length = dot(x, x).sqrt();
                (0.0, d.sqrt() / length, length / d.sqrt())
            }
            InputNorm::LayerNorm => {
                let mean = x.iter().sum::<f64>() / d;
                let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (d - 1.0);
                (mean, 1.0 / (variance.sqrt() + 1e-5), variance.sqrt())
            }
        }
    }

    /// x̂ of f.
    pub fn decode(&self, f: &[f64], factor: f64, mean: f64) -> Vec<f64> {
        (0..self.sae.width())
            .map(|d| {
                let sum: f64 = (0..f.len()).map(|j| f[j] * self.decoder_scale(j) * self.decoder[j][d]).sum();
                (sum + f64::from(self.sae.decoder_bias[d])) * factor + mean
            })
            .collect()
    }

    pub fn decoder_scale(&self, feature: usize) -> f64 {
        self.sae.decoder_scale.as_ref().map_or(1.0, |scale| f64::from(scale[feature]))
    }

    pub fn token(&self, x: &[f64]) -> Token {
        let (mean, scale, factor) = self.norm(x);
        let bias = |d: usize| self.sae.input_bias.as_ref().map_or(0.0, |bias| f64::from(bias[d]));
        let input: Vec<f64> = (0..x.len()).map(|d| (x[d] - mean) * scale - bias(d)).collect();
        let z: Vec<f64> = self.encoder.iter().map(|row| dot(row, &input)).collect();
        let h: Vec<f64> = (0..z.len())
            .map(|j| {
                let scale = self.sae.encoder_scale.as_ref().map_or(1.0, |scale| f64::from(scale[j]));
                z[j] * scale + f64::from(self.sae.encoder_bias[j])
            })
            .collect();
        let (f, margin) = self.activate(&z, &h);
        let decoded = self.decode(&f, factor, mean);
        Token { f, margin, factor, decoded }
    }

    fn activate(&self, z: &[f64], h: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let n = h.len();
        let mut f = vec![0.0; n];
        let mut margin: Vec<f64> = h.iter().map(|h| h.abs()).collect();
        // Keeps `k` of the features in `group`.
        let mut keep = |group: std::ops::Range<usize>, k: usize| {
            let mut order: Vec<usize> = group.collect();
            order.sort_by(|&a, &b| h[b].total_cmp(&h[a]).then(a.cmp(&b)));
            for (rank, &j) in order.iter().enumerate() {
                let rival = if rank < k { order.get(k) } else { order.get(k - 1) };
                margin[j] = rival.map_or(margin[j], |&rival| margin[j].min((h[j] - h[rival]).abs()));
                if rank < k {
                    f[j] = h[j].max(0.0);
                }
            }
        };
        match &self.sae.activation {
            SaeActivation::Relu => (0..n).for_each(|j| f[j] = h[j].max(0.0)),
            SaeActivation::JumpRelu { threshold } => {
                for j in 0..n {
                    let threshold = f64::from(threshold[j]);
                    f[j] = if h[j] > threshold && h[j] > 0.0 { h[j] } else { 0.0 };
                    margin[j] = margin[j].min((h[j] - threshold).abs());
                }
            }
            SaeActivation::TopK { k } => keep(0..n, *k),
            SaeActivation::GroupMax { k } => {
                (0..*k).for_each(|group| keep(group * (n / k)..(group + 1) * (n / k), 1));
            }
            SaeActivation::Gated { gate_bias } => {
                for j in 0..n {
                    let gate = z[j] + f64::from(gate_bias[j]);
                    f[j] = if gate > 0.0 { h[j].max(0.0) } else { 0.0 };
                    margin[j] = margin[j].min(gate.abs());
                }
            }
        }
        (f, margin)
    }

    /// dL/df of one token with dL/dx̂ = `g`.
    pub fn gradient(&self, factor: f64, g: &[f64]) -> Vec<f64> {
        (0..self.decoder.len()).map(|j| dot(&self.decoder[j], g) * factor * self.decoder_scale(j)).collect()
    }
}

/// Of samples with these lengths, one after the other, positions `first`, `first + stride`, …; corpus numbers from 10 on.
pub fn positions(lengths: &[usize], stride: usize, first: usize) -> Positions {
    let mut end = 0;
    let samples = lengths.iter().zip(10..).map(|(length, sample)| {
        end += length;
        let all = end - length..end;
        let from = all.start + first;
        let runs = match stride {
            1 => (from < end).then_some(from..end).into_iter().collect(),
            _ => (from..end).step_by(stride).map(|row| row..row + 1).collect(),
        };
        SampleRows { sample, all, runs }
    });
    Positions { samples: samples.collect() }
}
