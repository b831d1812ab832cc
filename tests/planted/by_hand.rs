//! Gradients of attention and of the loss in plain loops, with a soft-cap's derivative or without it.

use gradlens::backend::Chunk;
use gradlens::model::op::Attention;

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Scores after the cap if there is one, and the derivative by which their gradient is multiplied: 1 unless `slope`.
fn capped(scores: impl Iterator<Item = f64>, cap: Option<f64>, slope: bool) -> (Vec<f64>, Vec<f64>) {
    let of = |score: f64| match cap {
        None => (score, 1.0),
        Some(cap) => {
            let tanh = (score / cap).tanh();
            (cap * tanh, if slope { 1.0 - tanh * tanh } else { 1.0 })
        }
    };
    scores.map(of).unzip()
}

fn softmax(scores: &[f64]) -> Vec<f64> {
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
    scores.iter().map(|s| (s - max).exp() / sum).collect()
}

/// dq, dk and dv. q `[N, H·Hd]`, k and v `[N, K·Hd]`, dout `[N, H·Hd]`
pub fn attend_backward(
    [q, k, v]: [&[f32]; 3],
    attention: &Attention,
    chunk: &Chunk,
    dout: &[f32],
    slope: bool,
) -> [Vec<f32>; 3] {
    let Attention { heads, kv_heads, head_dim, window, scale, softcap } = *attention;
    let mut gradients = [q, k, v].map(|x| vec![0f32; x.len()]);
    for rows in chunk.samples() {
        for (head, row) in (0..heads).flat_map(|head| rows.clone().map(move |row| (head, row))) {
            let own = (row * heads + head) * head_dim;
            let theirs = |seen: usize| (seen * kv_heads + head / (heads / kv_heads)) * head_dim;
            let seen = window.map_or(rows.start, |w| rows.start.max((row + 1).saturating_sub(w)))..row + 1;
            let scores =
                seen.clone().map(|j| scale * dot(&q[own..][..head_dim], &k[theirs(j)..][..head_dim]));
            let (scores, slopes) = capped(scores, softcap, slope);
            let p = softmax(&scores);
            let dp: Vec<f64> =
                seen.clone().map(|j| dot(&dout[own..][..head_dim], &v[theirs(j)..][..head_dim])).collect();
            let mean: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
            for (index, j) in seen.enumerate() {
                let ds = scale * p[index] * (dp[index] - mean) * slopes[index];
                for d in 0..head_dim {
                    let (own, theirs) = (own + d, theirs(j) + d);
                    gradients[0][own] += ds as f32 * k[theirs];
                    gradients[1][theirs] += ds as f32 * q[own];
                    gradients[2][theirs] += p[index] as f32 * dout[own];
                }
            }
        }
    }
    gradients
}

/// The gradient of Σ loss_scales[s]·nats[s] with respect to x·Wᵀ. `[N, V]`
pub fn loss_backward(logits: &[f32], softcap: Option<f64>, chunk: &Chunk, slope: bool) -> Vec<f32> {
    let vocab = logits.len() / chunk.num_tokens();
    let mut dlogits = vec![0.0; logits.len()];
    for (rows, loss_scale) in chunk.samples().zip(&chunk.loss_scales) {
        for row in rows.start..rows.end.max(1) - 1 {
            let z = logits[row * vocab..][..vocab].iter().map(|z| f64::from(*z));
            let (z, slopes) = capped(z, softcap, slope);
            for (id, (p, slope)) in softmax(&z).iter().zip(&slopes).enumerate() {
                let target = if id == chunk.ids[row + 1] as usize { 1.0 } else { 0.0 };
                dlogits[row * vocab + id] = (loss_scale * (p - target) * slope) as f32;
            }
        }
    }
    dlogits
}
