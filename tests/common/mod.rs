//! Shared by the integration tests: seeded numbers, tiny models, the tolerances, error measures.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::sync::Arc;

use gradlens::model::op::{Op, Slot};
use gradlens::model::{Dtype, Spec, Tensor};

/// Tolerances and where they come from. None may be loosened without a reason in the commit.
pub mod tolerance {
    /// Float64 backward against central differences with step 1e-5: truncation h²·f''' ≈ 1e-10 and
    /// rounding ε/h ≈ 2e-11, relative, with room for the conditioning of a whole model.
    pub const FINITE_DIFFERENCES: f64 = 1e-6;
    /// Float32 engine against the float64 reference: ε·√(depth of sums) ≈ 6e-8·√(5000) ≈ 4e-6, through a
    /// few layers.
    pub const GOLDEN: f64 = 1e-4;
}

/// A small generator (xorshift64*) with a fixed seed: tests need variety, not quality.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// Roughly normal with standard deviation 1.
    pub fn normal(&mut self) -> f64 {
        let mut uniform = || (self.next() >> 11) as f64 / (1u64 << 53) as f64;
        (0..12).map(|_| uniform()).sum::<f64>() - 6.0
    }

    pub fn normals(&mut self, n: usize) -> Vec<f64> {
        (0..n).map(|_| self.normal()).collect()
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

/// A tensor that owns its bytes.
pub fn tensor(dtype: Dtype, shape: &[usize], values: &[f64]) -> Tensor {
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|&v| match dtype {
            Dtype::F32 => (v as f32).to_le_bytes().to_vec(),
            Dtype::F16 => half::f16::from_f64(v).to_le_bytes().to_vec(),
            Dtype::BF16 => half::bf16::from_f64(v).to_le_bytes().to_vec(),
        })
        .collect();
    let len = bytes.len();
    Tensor::new(dtype, shape.to_vec(), Arc::new(bytes), 0..len).unwrap()
}

/// Random weights for every tensor of a spec; norm weights around 1.
pub fn random_weights(spec: &Spec, dtype: Dtype, seed: u64) -> Vec<Tensor> {
    let mut random = Random::new(seed);
    spec.weights
        .iter()
        .map(|w| {
            let n: usize = w.shape.iter().product();
            let scale = match w.shape.len() {
                2 => 1.5 / (w.shape[1] as f64).sqrt(),
                _ => 0.3,
            };
            let shift = if w.name.contains("norm") { 1.0 } else { 0.0 };
            let values: Vec<f64> = random.normals(n).iter().map(|v| v * scale + shift).collect();
            tensor(dtype, &w.shape, &values)
        })
        .collect()
}

/// Lets an op read another slot.
pub fn rename(op: &mut Op, from: Slot, to: Slot) {
    let inputs: Vec<&mut Slot> = match op {
        Op::Embed { .. } => vec![],
        Op::Norm { x, .. }
        | Op::Linear { x, .. }
        | Op::Rope { x, .. }
        | Op::Dispatch { x, .. }
        | Op::ExpertLinear { x, .. }
        | Op::Route { logits: x, .. }
        | Op::Tap { x, .. }
        | Op::Loss { x, .. } => vec![x],
        Op::Attend { q, k, v, .. } => vec![q, k, v],
        Op::Gate { gate: a, up: b, .. } | Op::Combine { x: a, scores: b, .. } | Op::Add { a, b, .. } => {
            vec![a, b]
        }
        Op::Fused(none) => match *none {},
    };
    inputs.into_iter().filter(|slot| **slot == from).for_each(|slot| *slot = to);
}

/// ‖a − b‖ / ‖b‖.
pub fn relative_l2(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| a - b));
    difference / norm(&mut b.iter().copied()).max(f64::MIN_POSITIVE)
}

/// A configuration small enough for central differences, as the text of its config.json.
pub fn tiny_config(model_type: &str, extra: &str) -> String {
    format!(
        r#"{{"model_type": "{model_type}", "hidden_size": 12, "intermediate_size": 20,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": 30, "rms_norm_eps": 1e-5, "rope_theta": 100.0,
            "max_position_embeddings": 128, "tie_word_embeddings": false{extra}}}"#
    )
}
