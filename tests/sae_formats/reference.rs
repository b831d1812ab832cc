//! What `crate::model::sae` says an SAE computes, one number at a time in float64.

use gradlens::model::sae::{FeatureMatrix, InputNorm, SaeActivation, SaeWeights};
use gradlens::model::{Dtype, Tensor};
use half::{bf16, f16};

fn value(tensor: &Tensor, at: usize) -> f64 {
    let bytes = tensor.bytes();
    match tensor.dtype {
        Dtype::F32 => f64::from(f32::from_le_bytes(bytes[4 * at..4 * at + 4].try_into().unwrap())),
        Dtype::F16 => f64::from(f16::from_le_bytes(bytes[2 * at..2 * at + 2].try_into().unwrap())),
        Dtype::BF16 => f64::from(bf16::from_le_bytes(bytes[2 * at..2 * at + 2].try_into().unwrap())),
    }
}

/// Feature f's entry for dimension d.
pub fn entry(matrix: &FeatureMatrix, f: usize, d: usize) -> f64 {
    let (features, width) = (matrix.num_features(), matrix.width());
    assert!(f < features && d < width);
    value(&matrix.tensor, if matrix.features_first { f * width + d } else { d * features + f })
}

fn at(values: &Option<Vec<f32>>, index: usize, default: f64) -> f64 {
    values.as_ref().map_or(default, |values| f64::from(values[index]))
}

/// The features of one token.
pub fn encode(sae: &SaeWeights, x: &[f64]) -> Vec<f64> {
    let width = sae.width();
    let (scale, shift, _) = norm(sae, x);
    let x: Vec<f64> = (0..width).map(|d| (x[d] - shift) * scale - at(&sae.input_bias, d, 0.0)).collect();
    let z: Vec<f64> =
        (0..sae.num_features()).map(|f| (0..width).map(|d| x[d] * entry(&sae.encoder, f, d)).sum()).collect();
    let h: Vec<f64> = z
        .iter()
        .enumerate()
        .map(|(f, z)| z * at(&sae.encoder_scale, f, 1.0) + f64::from(sae.encoder_bias[f]))
        .collect();
    let best = |from: usize, to: usize| -> usize {
        (from..to).fold(from, |best, f| if h[f] > h[best] { f } else { best })
    };
    let fires: Vec<bool> = match &sae.activation {
        SaeActivation::Relu => vec![true; h.len()],
        SaeActivation::JumpRelu { threshold } => {
            h.iter().zip(threshold).map(|(h, t)| *h > f64::from(*t)).collect()
        }
        SaeActivation::TopK { k } => {
            let mut order: Vec<usize> = (0..h.len()).collect();
            order.sort_by(|a, b| h[*b].total_cmp(&h[*a]).then(a.cmp(b)));
            (0..h.len()).map(|f| order[..*k].contains(&f)).collect()
        }
        SaeActivation::GroupMax { k } => {
            let size = h.len() / k;
            (0..h.len()).map(|f| best(f / size * size, (f / size + 1) * size) == f).collect()
        }
        SaeActivation::Gated { gate_bias } => {
            z.iter().zip(gate_bias).map(|(z, bias)| z + f64::from(*bias) > 0.0).collect()
        }
    };
    h.iter().zip(fires).map(|(h, fires)| if fires { h.max(0.0) } else { 0.0 }).collect()
}

/// The reconstruction of the token `x` from its features.
pub fn decode(sae: &SaeWeights, x: &[f64], f: &[f64]) -> Vec<f64> {
    let (_, shift, back) = norm(sae, x);
    let scaled: Vec<f64> = f.iter().enumerate().map(|(j, f)| f * at(&sae.decoder_scale, j, 1.0)).collect();
    let y = |d: usize| -> f64 { (0..f.len()).map(|j| scaled[j] * entry(&sae.decoder, j, d)).sum() };
    (0..sae.width()).map(|d| (y(d) + f64::from(sae.decoder_bias[d])) * back + shift).collect()
}

/// Factor, offset and the factor back.
fn norm(sae: &SaeWeights, x: &[f64]) -> (f64, f64, f64) {
    let width = x.len() as f64;
    match sae.norm {
        InputNorm::None => (1.0, 0.0, 1.0),
        InputNorm::RescaleToSqrtD => {
            let norm = x.iter().map(|x| x * x).sum::<f64>().sqrt();
            (width.sqrt() / norm, 0.0, norm / width.sqrt())
        }
        InputNorm::LayerNorm => {
            let mean = x.iter().sum::<f64>() / width;
            let sigma = (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (width - 1.0)).sqrt();
            (1.0 / (sigma + 1e-5), mean, sigma)
        }
    }
}
