//! Every op of the CPU backend in float64 against central differences, and its forward against a plain
//! loop, over one table of ragged shapes.

#![allow(clippy::unwrap_used)]

#[path = "ops/attention.rs"]
mod attention;
mod common;
#[path = "ops/moe.rs"]
mod moe;

use common::{Random, relative_l2, tensor, tolerance};
use gradlens::backend::cpu::{Buf, Cpu};
use gradlens::backend::{Backend, Chunk, Moments};
use gradlens::model::op::RmsNorm;
use gradlens::model::{Activation, Dtype};

/// Lengths of the samples of a chunk: one token, none, more than an attention block, fewer rows in all
/// than the matrix product takes.
const LENGTHS: &[&[usize]] = &[&[1], &[3, 1, 5], &[2, 0, 70, 1, 9], &[130]];

fn chunk(lengths: &[usize], vocab: usize, seed: u64) -> Chunk {
    let mut random = Random::new(seed);
    let mut cu_seqlens = vec![0];
    for length in lengths {
        cu_seqlens.push(cu_seqlens.last().unwrap() + length);
    }
    let n = *cu_seqlens.last().unwrap();
    let ids = (0..n).map(|_| random.below(vocab) as u32).collect();
    let loss_scales = (0..lengths.len()).map(|s| 0.5 + s as f64).collect();
    Chunk { ids, cu_seqlens, indices: (0..lengths.len() as u64).collect(), loss_scales }
}

/// Compares `gradient` with central differences of `loss` around `x`, at up to 60 places.
fn check(what: &str, x: &[f64], gradient: &[f64], loss: impl Fn(&[f64]) -> f64) {
    let step = 1e-5;
    let stride = (x.len() / 60).max(1);
    let (mut exact, mut numeric) = (vec![], vec![]);
    for i in (0..x.len()).step_by(stride) {
        let at = |offset: f64| {
            let mut moved = x.to_vec();
            moved[i] += offset;
            loss(&moved)
        };
        numeric.push((at(step) - at(-step)) / (2.0 * step));
        exact.push(gradient[i]);
    }
    let error = relative_l2(&exact, &numeric);
    assert!(error <= tolerance::FINITE_DIFFERENCES, "{what}: {error:e}");
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Runs `backward(None)` and `backward(Some(start))` and checks that the second is the first plus start.
fn adds(
    cpu: &Cpu<f64>,
    what: &str,
    width: usize,
    backward: impl Fn(Option<Buf<f64>>) -> Buf<f64>,
) -> Vec<f64> {
    let fresh = backward(None).to_vec();
    let start = Random::new(99).normals(fresh.len());
    let summed = backward(Some(cpu.from_slice(&start, width)));
    let expected: Vec<f64> = fresh.iter().zip(&start).map(|(a, b)| a + b).collect();
    assert!(relative_l2(&summed, &expected) < 1e-14, "{what} does not add");
    fresh
}

#[test]
fn norm() {
    let cpu = Cpu::<f64>::new();
    // Runs of `width`, several in a row, and a weight that is stored less 1.
    for (rows, width, runs, offset) in [(1, 5, 1, 0.0), (3, 16, 1, 1.0), (11, 37, 1, 0.0), (3, 6, 4, 1.0)] {
        let norm = RmsNorm { eps: 1e-3, offset };
        let mut random = Random::new(1);
        let size = rows * runs * width;
        let (x, c) = (random.normals(size), random.normals(size));
        let w = random.normals(width);
        let weight = tensor(Dtype::F32, &[width], &w);
        let w: Vec<f64> = w.iter().map(|&v| f64::from(v as f32) + offset).collect();
        let run = |x: &[f64]| cpu.norm(&cpu.from_slice(x, runs * width), &weight, norm).unwrap().to_vec();
        let expected: Vec<f64> = x
            .chunks(width)
            .flat_map(|x| {
                let rms = (dot(x, x) / width as f64 + 1e-3).sqrt();
                x.iter().zip(&w).map(move |(x, w)| x / rms * w).collect::<Vec<_>>()
            })
            .collect();
        assert!(relative_l2(&run(&x), &expected) < 1e-14);
        let (xb, dy) = (cpu.from_slice(&x, runs * width), cpu.from_slice(&c, runs * width));
        let dx =
            adds(&cpu, "norm", runs * width, |dx| cpu.norm_backward(&xb, &weight, norm, &dy, dx).unwrap());
        check("norm", &x, &dx, |x| dot(&run(x), &c));
    }
}

#[test]
fn linear() {
    let cpu = Cpu::<f64>::new();
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
        for (rows, width, out) in [(1, 7, 5), (3, 600, 300), (80, 9, 520), (71, 33, 1), (72, 1, 65)] {
            let mut random = Random::new(2);
            let (x, c) = (random.normals(rows * width), random.normals(rows * out));
            let weight = tensor(dtype, &[out, width], &random.normals(out * width));
            let bias = tensor(dtype, &[out], &random.normals(out));
            let mut w = vec![0f64; out * width];
            let mut b = vec![0f64; out];
            use gradlens::backend::cpu::Element;
            f64::widen(dtype, weight.bytes(), &mut w);
            f64::widen(dtype, bias.bytes(), &mut b);
            let run =
                |x: &[f64]| cpu.linear(&cpu.from_slice(x, width), &weight, Some(&bias)).unwrap().to_vec();
            let expected: Vec<f64> = x
                .chunks(width)
                .flat_map(|x| (0..out).map(|o| dot(x, &w[o * width..][..width]) + b[o]).collect::<Vec<_>>())
                .collect();
            assert!(relative_l2(&run(&x), &expected) < 1e-13, "{dtype} {rows} {width} {out}");
            let dy = cpu.from_slice(&c, out);
            let dx = adds(&cpu, "linear", width, |dx| cpu.linear_backward(&weight, &dy, dx).unwrap());
            check("linear", &x, &dx, |x| dot(&run(x), &c));
        }
    }
}

#[test]
fn rope() {
    let cpu = Cpu::<f64>::new();
    for lengths in LENGTHS {
        let chunk = chunk(lengths, 10, 3);
        let (heads, head_dim) = (3, 6);
        let width = heads * head_dim;
        let freq = [1.0f32, 0.3, 0.01];
        let table = cpu.rope_table(&freq, chunk.longest()).unwrap();
        let mut random = Random::new(3);
        let (x, c) = (random.normals(chunk.num_tokens() * width), random.normals(chunk.num_tokens() * width));
        let run = |x: &[f64]| cpu.rope(&cpu.from_slice(x, width), heads, &table, &chunk).unwrap().to_vec();
        // Positions start anew in each sample; pairs are (j, j + Hd/2).
        let mut expected = vec![0.0; x.len()];
        for (position, row) in chunk.samples().flat_map(Iterator::enumerate) {
            for (head, j) in (0..heads).flat_map(|head| (0..3).map(move |j| (head, j))) {
                let (first, second) =
                    (row * width + head * head_dim + j, row * width + head * head_dim + j + 3);
                let angle = f64::from(position as f32 * freq[j]);
                expected[first] = x[first] * angle.cos() - x[second] * angle.sin();
                expected[second] = x[second] * angle.cos() + x[first] * angle.sin();
            }
        }
        assert!(relative_l2(&run(&x), &expected) < 1e-14, "{lengths:?}");
        let dy = cpu.from_slice(&c, width);
        let dx = adds(&cpu, "rope", width, |dx| cpu.rope_backward(&dy, heads, &table, &chunk, dx).unwrap());
        check("rope", &x, &dx, |x| dot(&run(x), &c));
    }
}

#[test]
fn gate() {
    let cpu = Cpu::<f64>::new();
    let mut random = Random::new(5);
    let (g, u, c) = (random.normals(77), random.normals(77), random.normals(77));
    let silu: fn(f64) -> f64 = |g| g / (1.0 + (-g).exp());
    let gelu_tanh: fn(f64) -> f64 = |g| {
        let inner = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3));
        0.5 * g * (1.0 + inner.tanh())
    };
    for (activation, by_definition) in [(Activation::Silu, silu), (Activation::GeluTanh, gelu_tanh)] {
        gate_of(&cpu, activation, by_definition, [&g, &u, &c]);
        // Where an exponential is no number: the gate is open or shut.
        let ends: [f64; 6] = [-2000.0, -100.0, -0.0, 0.0, 100.0, 2000.0];
        let narrow = Cpu::<f32>::new();
        let (g, ones) = (narrow.from_slice(&ends.map(|g| g as f32), 6), narrow.from_slice(&[1.0; 6], 6));
        let out = narrow.gate(&g, &ones, activation).unwrap();
        let [dg, du] = narrow.gate_backward(&g, &ones, activation, &ones, [None, None]).unwrap();
        for (index, end) in ends.into_iter().enumerate() {
            let (open, slope) = (end.max(0.0), if end == 0.0 { 0.5 } else { f64::from(end > 0.0) });
            for (found, expected) in [(&out, open), (&du, open), (&dg, slope)] {
                assert!((f64::from(found[index]) - expected).abs() < 1e-6 * end.abs().max(1.0), "{end}");
            }
        }
    }
}

fn gate_of(cpu: &Cpu<f64>, activation: Activation, by_definition: fn(f64) -> f64, [g, u, c]: [&[f64]; 3]) {
    let run = |g: &[f64], u: &[f64]| {
        cpu.gate(&cpu.from_slice(g, 7), &cpu.from_slice(u, 7), activation).unwrap().to_vec()
    };
    let expected: Vec<f64> = g.iter().zip(u).map(|(g, u)| by_definition(*g) * u).collect();
    assert!(relative_l2(&run(g, u), &expected) < 1e-14);
    let (gb, ub, dout) = (cpu.from_slice(g, 7), cpu.from_slice(u, 7), cpu.from_slice(c, 7));
    let backward = |before| cpu.gate_backward(&gb, &ub, activation, &dout, before).unwrap();
    let [dg, du] = backward([None, None]).map(|d| d.to_vec());
    check("gate", g, &dg, |g| dot(&run(g, u), c));
    check("up", u, &du, |u| dot(&run(g, u), c));
    let [dg2, du2] = backward([Some(cpu.from_slice(&dg, 7)), Some(cpu.from_slice(&du, 7))]);
    for (twice, once) in [(&dg2, &dg), (&du2, &du)] {
        let doubled: Vec<f64> = once.iter().map(|g| 2.0 * g).collect();
        assert!(relative_l2(twice, &doubled) < 1e-14);
    }
}

#[test]
fn add() {
    let cpu = Cpu::<f64>::new();
    let (a, b) = (cpu.from_slice(&[1.0, 2.0], 2), cpu.from_slice(&[10.0, 20.0], 2));
    assert_eq!(&*cpu.add(&a, &b).unwrap(), [11.0, 22.0]);
    assert_eq!(adds(&cpu, "add", 2, |dx| cpu.add_backward(&a, dx).unwrap()), [1.0, 2.0]);
}

#[test]
fn loss() {
    let cpu = Cpu::<f64>::new();
    // A vocabulary of several tiles, whose last one is narrow.
    let of = |l| [(l, 10, None, 1.0), (l, 257, Some(2.5), 1.0), (l, 600, None, 1.0), (l, 300, None, 500.0)];
    // The last are logits whose exponentials are no numbers.
    for (lengths, vocab, softcap, scale) in LENGTHS.iter().flat_map(of) {
        let chunk = chunk(lengths, vocab, 6);
        let width = 5;
        let n = chunk.num_tokens();
        let mut random = Random::new(6);
        let x: Vec<f64> = random.normals(n * width).into_iter().map(|x| scale * x).collect();
        let w: Vec<f64> = random.normals(vocab * width).iter().map(|&v| f64::from(v as f32)).collect();
        let weight = tensor(Dtype::F32, &[vocab, width], &w);
        let run = |x: &[f64]| cpu.loss(&cpu.from_slice(x, width), &weight, softcap, &chunk, true).unwrap();
        let (nats, dx) = run(&x);
        for (s, rows) in chunk.samples().enumerate() {
            let expected: f64 = (rows.start..rows.end.max(1) - 1)
                .filter(|_| !rows.is_empty())
                .map(|r| {
                    let z = (0..vocab).map(|j| dot(&x[r * width..][..width], &w[j * width..][..width]));
                    let z: Vec<f64> =
                        z.map(|z| softcap.map_or(z, |cap: f64| cap * (z / cap).tanh())).collect();
                    let max = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let lse = max + z.iter().map(|z| (z - max).exp()).sum::<f64>().ln();
                    lse - z[chunk.ids[r + 1] as usize]
                })
                .sum();
            assert!((nats[s] - expected).abs() < 1e-10 * expected.abs().max(1.0), "{} {expected}", nats[s]);
        }
        let dx = dx.unwrap();
        if chunk.samples().any(|rows| rows.len() > 1) {
            check("loss", &x, &dx, |x| dot(&run(x).0, &chunk.loss_scales));
        }
        for rows in chunk.samples().filter(|rows| !rows.is_empty()) {
            assert!(dx[(rows.end - 1) * width..rows.end * width].iter().all(|&d| d == 0.0));
        }
        let (same, none) = cpu.loss(&cpu.from_slice(&x, width), &weight, softcap, &chunk, false).unwrap();
        assert!(same == nats && none.is_none());
    }
}

#[test]
fn embed() {
    let cpu = Cpu::<f32>::new();
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        let table = tensor(dtype, &[3, 2], &[0.0, 0.5, 1.0, 1.5, 2.0, 2.5]);
        let chunk = Chunk { ids: vec![2, 0, 2], ..Chunk::default() };
        assert_eq!(&*cpu.embed(&table, 1.0, &chunk).unwrap(), [2.0, 2.5, 0.0, 0.5, 2.0, 2.5]);
        assert_eq!(&*cpu.embed(&table, 3.0, &chunk).unwrap(), [6.0, 7.5, 0.0, 1.5, 6.0, 7.5]);
    }
}

#[test]
fn moments_add_up_and_name_the_bad_sample() {
    let cpu = Cpu::<f32>::new();
    let width = 300;
    let mut random = Random::new(7);
    let mut values: Vec<f32> = random.normals(6 * width).iter().map(|&v| v as f32).collect();
    let mut sums = Moments::new(width);
    let x = cpu.from_slice(&values, width);
    cpu.moments(&x, &[0..2, 2..2, 3..6], &mut sums).unwrap().unwrap();
    assert_eq!(sums.count, 5);
    for j in [0, 127, 128, 299] {
        let column = |row: usize| f64::from(values[row * width + j]);
        let counted = [0, 1, 3, 4, 5].map(column);
        assert!((sums.sum[j] - counted.iter().sum::<f64>()).abs() < 1e-12);
        assert!((sums.sum_abs[j] - counted.iter().map(|v| v.abs()).sum::<f64>()).abs() < 1e-12);
        assert!((sums.sum_sq[j] - counted.iter().map(|v| v * v).sum::<f64>()).abs() < 1e-12);
        assert_eq!(sums.max_abs[j], counted.iter().fold(0.0, |m: f64, v| m.max(v.abs())));
    }
    values[4 * width + 260] = f32::NAN;
    let x = cpu.from_slice(&values, width);
    let bad = cpu.moments(&x, &[0..2, 2..3, 3..6], &mut Moments::new(width)).unwrap().unwrap_err();
    assert_eq!(bad.0, 2);
    values[width] = f32::INFINITY;
    let x = cpu.from_slice(&values, width);
    let bad = cpu.moments(&x, &[0..2, 2..3, 3..6], &mut Moments::new(width)).unwrap().unwrap_err();
    assert_eq!(bad.0, 0);
}

/// A row's result must not depend on how many rows stand beside it: statistics are the same bytes for any
/// cut into chunks.
#[test]
fn rows_do_not_depend_on_their_neighbours() {
    rows_alone_and_together(&Cpu::new());
    rows_alone_and_together(&Cpu::with_multiply_adds());
}

fn rows_alone_and_together(cpu: &Cpu<f32>) {
    // Deeper than a block of the matrix product, narrow and wide.
    for (width, out) in [(20, 64), (896, 64), (896, 600), (2000, 33), (4864, 130)] {
        let mut random = Random::new(8);
        let rows = 300;
        let x: Vec<f32> = random.normals(rows * width).iter().map(|&v| v as f32).collect();
        let weight = tensor(Dtype::BF16, &[out, width], &random.normals(out * width));
        let back = tensor(Dtype::BF16, &[width, out], &random.normals(out * width));
        let forward = cpu.linear(&cpu.from_slice(&x, width), &weight, None).unwrap();
        let backward = cpu.linear_backward(&back, &cpu.from_slice(&x, width), None).unwrap();
        for (start, end) in [(0, 1), (5, 12), (17, 88), (200, 300), (7, 71), (7, 72), (7, 80)] {
            let part = cpu.from_slice(&x[start * width..end * width], width);
            assert_eq!(
                &*cpu.linear(&part, &weight, None).unwrap(),
                &forward[start * out..end * out],
                "{width} {out}"
            );
            let part = cpu.linear_backward(&back, &part, None).unwrap();
            assert_eq!(&*part, &backward[start * out..end * out], "{width} {out} backward");
        }
    }
}
