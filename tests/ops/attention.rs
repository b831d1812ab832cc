//! Attention.

use gradlens::backend::Backend;
use gradlens::backend::cpu::Cpu;
use gradlens::model::op::Attention;

use super::common::{Random, relative_l2};
use super::{LENGTHS, check, chunk, dot};

/// Attention of all samples by its definition.
fn by_definition(qkv: [&[f64]; 3], lengths: &[usize], a: &Attention) -> Vec<f64> {
    let [q, k, v] = qkv;
    let (hd, group) = (a.head_dim, a.heads / a.kv_heads);
    let (q_width, kv_width) = (a.heads * hd, a.kv_heads * hd);
    let mut out = vec![0.0; q.len()];
    let mut start = 0;
    for &length in lengths {
        for h in 0..a.heads {
            let kv = h / group * hd;
            for i in 0..length {
                let q = &q[(start + i) * q_width + h * hd..][..hd];
                let seen: Vec<usize> = (0..=i).filter(|&j| a.window.is_none_or(|w| i - j < w)).collect();
                let scores: Vec<f64> = seen
                    .iter()
                    .map(|j| a.scale * dot(q, &k[(start + j) * kv_width + kv..][..hd]))
                    .map(|s| a.softcap.map_or(s, |cap| cap * (s / cap).tanh()))
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let scores: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                let total: f64 = scores.iter().sum();
                for (j, score) in seen.iter().zip(&scores) {
                    for d in 0..hd {
                        out[(start + i) * q_width + h * hd + d] +=
                            score / total * v[(start + j) * kv_width + kv + d];
                    }
                }
            }
        }
        start += length;
    }
    out
}

#[test]
fn attend() {
    let cpu = Cpu::<f64>::new();
    for lengths in LENGTHS {
        let shapes = [
            (4, 2, None, None),
            (2, 2, Some(3), Some(0.8)),
            (3, 1, Some(1), None),
            (2, 1, Some(65), None),
            (2, 1, None, Some(1.3)),
        ];
        for (heads, kv_heads, window, softcap) in shapes {
            let chunk = chunk(lengths, 10, 4);
            let attention = Attention { heads, kv_heads, head_dim: 4, window, scale: 0.7, softcap };
            let n = chunk.num_tokens();
            let mut random = Random::new(4);
            let widths = [heads * 4, kv_heads * 4, kv_heads * 4];
            let inputs = widths.map(|w| random.normals(n * w));
            let c = random.normals(n * widths[0]);
            let bufs = |inputs: &[Vec<f64>; 3]| [0, 1, 2].map(|i| cpu.from_slice(&inputs[i], widths[i]));
            let run = |inputs: &[Vec<f64>; 3]| {
                let b = bufs(inputs);
                cpu.attend([&b[0], &b[1], &b[2]], &attention, &chunk).unwrap().to_vec()
            };
            let expected = by_definition([&inputs[0], &inputs[1], &inputs[2]], lengths, &attention);
            assert!(relative_l2(&run(&inputs), &expected) < 1e-12, "{lengths:?} {window:?}");
            let b = bufs(&inputs);
            let dout = cpu.from_slice(&c, widths[0]);
            let qkv = [&b[0], &b[1], &b[2]];
            let backward = |before| cpu.attend_backward(qkv, &attention, &chunk, &dout, before).unwrap();
            let gradients = backward([None, None, None]).map(|g| g.to_vec());
            let again = backward([0, 1, 2].map(|i| Some(cpu.from_slice(&gradients[i], widths[i]))));
            for i in 0..3 {
                let doubled: Vec<f64> = gradients[i].iter().map(|g| 2.0 * g).collect();
                assert!(relative_l2(&again[i], &doubled) < 1e-12);
                check(
                    &format!("attention input {i} {lengths:?} {window:?}"),
                    &inputs[i],
                    &gradients[i],
                    |x| {
                        let mut moved = inputs.clone();
                        moved[i] = x.to_vec();
                        dot(&run(&moved), &c)
                    },
                );
            }
        }
    }
}

/// Scores whose exponentials are no numbers.
#[test]
fn with_large_scores() {
    let cpu = Cpu::<f64>::new();
    let (lengths, width) = ([5, 9], 4);
    let chunk = chunk(&lengths, 10, 4);
    let mut random = Random::new(12);
    let [q, k, v] = [3000.0, 1.0, 1.0]
        .map(|scale| -> Vec<f64> { random.normals(14 * width).into_iter().map(|x| scale * x).collect() });
    let bufs = [&q, &k, &v].map(|x| cpu.from_slice(x, width));
    let qkv = [&bufs[0], &bufs[1], &bufs[2]];
    for softcap in [None, Some(900.0)] {
        let attention =
            Attention { heads: 1, kv_heads: 1, head_dim: width, window: None, scale: 1.0, softcap };
        let expected = by_definition([&q, &k, &v], &lengths, &attention);
        let out = cpu.attend(qkv, &attention, &chunk).unwrap();
        assert!(relative_l2(&out, &expected) < 1e-10, "{softcap:?}");
        let gradients = cpu.attend_backward(qkv, &attention, &chunk, &out, [None, None, None]).unwrap();
        assert!(gradients.iter().all(|gradient| gradient.iter().all(|g| g.is_finite())), "{softcap:?}");
    }
}
