//! Rotary frequencies, rounded as Hugging Face transformers rounds them.

use std::f64::consts::PI;

use super::{Rope, RopeScaling};

impl Rope {
    /// Angle per position of each pair (j, j + Hd/2), in radians: θ^(−2j/Hd), then scaled. `[Hd/2]`
    ///
    /// Checkpoints were trained with, and transformers computes with, float32 frequencies; at position
    /// 100,000 their rounding is a visible angle. So each is rounded to float32 here, at the steps where
    /// `transformers/modeling_rope_utils.py` rounds.
    pub fn inv_freq(&self, head_dim: usize) -> Vec<f32> {
        (0..head_dim / 2)
            .map(|j| {
                let exponent = (2 * j) as f32 / head_dim as f32;
                let base = 1.0 / self.theta.powf(f64::from(exponent)) as f32;
                self.scaling.apply(base)
            })
            .collect()
    }

    /// Angle of each pair at each of the positions `0..positions`, in radians, rounded to float32 as transformers
    /// does. `inv_freq`: [`Rope::inv_freq`]. `[positions, Hd/2]`
    pub fn angles(inv_freq: &[f32], positions: usize) -> impl Iterator<Item = f64> {
        let angle = |position: usize, freq: f32| f64::from(position as f32 * freq);
        (0..positions).flat_map(move |position| inv_freq.iter().map(move |&freq| angle(position, freq)))
    }
}

impl RopeScaling {
    fn apply(&self, base: f32) -> f32 {
        match *self {
            Self::None => base,
            Self::Linear { factor } => base / factor as f32,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                let wavelength = 2.0 * PI / f64::from(base);
                if wavelength > original_max_position / low_freq_factor {
                    return base / factor as f32;
                }
                if wavelength < original_max_position / high_freq_factor {
                    return base;
                }
                let smooth = (original_max_position / wavelength - low_freq_factor)
                    / (high_freq_factor - low_freq_factor);
                ((1.0 - smooth) * f64::from(base) / factor + smooth * f64::from(base)) as f32
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_frequencies() {
        let rope = Rope { theta: 10_000.0, scaling: RopeScaling::None };
        let freq = rope.inv_freq(4);
        assert_eq!(freq, [1.0, 0.01]);
        let rope = Rope { theta: 10_000.0, scaling: RopeScaling::Linear { factor: 4.0 } };
        assert_eq!(rope.inv_freq(4), [0.25, 0.0025]);
    }

    #[test]
    fn llama3_has_three_regions() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position: 8192.0,
        };
        let plain = Rope { theta: 500_000.0, scaling: RopeScaling::None }.inv_freq(128);
        let scaled = Rope { theta: 500_000.0, scaling }.inv_freq(128);
        let ratios: Vec<f32> = plain.iter().zip(&scaled).map(|(a, b)| a / b).collect();
        assert_eq!(ratios[0], 1.0);
        assert_eq!(ratios[63], 8.0);
        assert!(ratios.iter().any(|&r| r > 1.01 && r < 7.99));
        assert!(ratios.windows(2).all(|w| w[0] <= w[1] + 1e-6));
    }
}
