//! The ops of a mixture of experts.

use gradlens::backend::Backend;
use gradlens::backend::cpu::{Cpu, Routes};
use gradlens::model::{Dtype, Tensor};

use super::common::{Random, relative_l2, tensor};
use super::{adds, check, dot};

/// Tokens, experts, experts per token. Few rows and more than the matrix product takes; one expert; all of them.
const SHAPES: [(usize, usize, usize); 5] = [(1, 4, 2), (9, 4, 2), (400, 4, 3), (7, 1, 1), (5, 3, 3)];

/// Logits, of which the expert 1 of 4 is hardly ever among the largest; those of the last token have no exponentials.
fn logits(tokens: usize, experts: usize) -> Vec<f64> {
    let mut logits = Random::new(1).normals(tokens * experts);
    logits.iter_mut().skip(1).step_by(experts).for_each(|z| *z -= if experts == 4 { 9.0 } else { 0.0 });
    logits[(tokens - 1) * experts..].iter_mut().for_each(|z| *z += 1000.0);
    logits
}

/// For each token its experts, ascending, and their scores.
fn chosen(logits: &[f64], experts: usize, k: usize) -> Vec<(Vec<usize>, Vec<f64>)> {
    let of = |row: &[f64]| {
        let mut order: Vec<usize> = (0..experts).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        let mut own = order[..k].to_vec();
        own.sort_unstable();
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = row.iter().map(|z| (z - max).exp()).sum();
        let p: Vec<f64> = own.iter().map(|&e| (row[e] - max).exp() / total).collect();
        let kept: f64 = p.iter().sum();
        (own, p.iter().map(|p| p / kept).collect())
    };
    logits.chunks(experts).map(of).collect()
}

fn routes(cpu: &Cpu<f64>, tokens: usize, experts: usize, k: usize) -> Routes {
    cpu.route(&cpu.from_slice(&logits(tokens, experts), experts), k).unwrap().1
}

#[test]
fn route() {
    let cpu = Cpu::<f64>::new();
    for (tokens, experts, k) in SHAPES {
        let z = logits(tokens, experts);
        let run = |z: &[f64]| cpu.route(&cpu.from_slice(z, experts), k).unwrap();
        let (scores, routes) = run(&z);
        let expected: Vec<f64> = chosen(&z, experts, k).into_iter().flat_map(|(_, p)| p).collect();
        assert!(relative_l2(&scores, &expected) < 1e-14);
        let c = Random::new(2).normals(tokens * k);
        let dscores = cpu.from_slice(&c, k);
        let dz = adds(&cpu, "route", experts, |dz| {
            cpu.route_backward(&scores, &routes, &dscores, experts, dz).unwrap()
        });
        match k {
            // The only score of a token is always 1.
            1 => assert!(dz.iter().all(|dz| *dz == 0.0)),
            _ => check("route", &z, &dz, |z| dot(&run(z).0, &c)),
        }
    }
}

/// From rows of tokens to rows of tokens, each through its experts: against loops over tokens.
#[test]
fn through_experts() {
    let cpu = Cpu::<f64>::new();
    for (tokens, experts, k) in SHAPES {
        for dtype in [Dtype::F32, Dtype::BF16] {
            let (width, out) = (7, 5);
            let mut random = Random::new(3);
            let weights: Vec<Tensor> =
                (0..experts).map(|_| tensor(dtype, &[out, width], &random.normals(out * width))).collect();
            let weights: Vec<&Tensor> = weights.iter().collect();
            let (x, c) = (random.normals(tokens * width), random.normals(tokens * out));
            let scores = random.normals(tokens * k);
            let routes = routes(&cpu, tokens, experts, k);
            let run = |x: &[f64], scores: &[f64]| {
                let rows = cpu.dispatch(&cpu.from_slice(x, width), &routes).unwrap();
                let rows = cpu.expert_linear(&rows, &weights, &routes).unwrap();
                cpu.combine(&rows, &cpu.from_slice(scores, k), &routes).unwrap().to_vec()
            };
            let wide = |weight: &Tensor| {
                use gradlens::backend::cpu::Element;
                let mut wide = vec![0f64; out * width];
                f64::widen(dtype, weight.bytes(), &mut wide);
                wide
            };
            let mut expected = vec![0.0; tokens * out];
            for (token, (own, _)) in chosen(&logits(tokens, experts), experts, k).iter().enumerate() {
                for (j, &expert) in own.iter().enumerate() {
                    let w = wide(weights[expert]);
                    for o in 0..out {
                        let y = dot(&x[token * width..][..width], &w[o * width..][..width]);
                        expected[token * out + o] += scores[token * k + j] * y;
                    }
                }
            }
            assert!(relative_l2(&run(&x, &scores), &expected) < 1e-13, "{tokens} {experts} {k}");

            let rows = cpu.dispatch(&cpu.from_slice(&x, width), &routes).unwrap();
            let y = cpu.expert_linear(&rows, &weights, &routes).unwrap();
            let (score_buf, dout) = (cpu.from_slice(&scores, k), cpu.from_slice(&c, out));
            let combine = |before| cpu.combine_backward(&y, &score_buf, &routes, &dout, before).unwrap();
            let dscores = adds(&cpu, "scores", k, |ds| combine([None, ds]).into_iter().nth(1).unwrap());
            let dy = adds(&cpu, "rows", out, |dy| combine([dy, None]).into_iter().next().unwrap());
            check("scores", &scores, &dscores, |scores| dot(&run(&x, scores), &c));
            let dy = cpu.from_slice(&dy, out);
            let drows = adds(&cpu, "experts", width, |dx| {
                cpu.expert_linear_backward(&weights, &routes, &dy, dx).unwrap()
            });
            let drows = cpu.from_slice(&drows, width);
            let dx = adds(&cpu, "dispatch", width, |dx| cpu.dispatch_backward(&drows, &routes, dx).unwrap());
            check("x", &x, &dx, |x| dot(&run(x, &scores), &c));
        }
    }
}

/// A token's numbers must not depend on the tokens beside it.
#[test]
fn tokens_do_not_depend_on_their_neighbours() {
    alone_and_together(&Cpu::new());
    alone_and_together(&Cpu::with_multiply_adds());
}

fn alone_and_together(cpu: &Cpu<f32>) {
    let (tokens, experts, k, width, out) = (300, 4, 2, 600, 130);
    let mut random = Random::new(5);
    let narrow = |values: Vec<f64>| values.into_iter().map(|v| v as f32).collect::<Vec<f32>>();
    let weights: Vec<Tensor> =
        (0..experts).map(|_| tensor(Dtype::BF16, &[out, width], &random.normals(out * width))).collect();
    let weights: Vec<&Tensor> = weights.iter().collect();
    let (x, z) = (narrow(random.normals(tokens * width)), narrow(logits(tokens, experts)));
    let so_far = narrow(random.normals(tokens * width));
    let run = |from: usize, to: usize| {
        let part = |values: &[f32], width: usize| cpu.from_slice(&values[from * width..to * width], width);
        let (scores, routes) = cpu.route(&part(&z, experts), k).unwrap();
        let rows = cpu.dispatch(&part(&x, width), &routes).unwrap();
        let y = cpu.expert_linear(&rows, &weights, &routes).unwrap();
        let out = cpu.combine(&y, &scores, &routes).unwrap();
        // Adding to what is there must not depend on them either.
        let before = cpu.dispatch(&part(&so_far, width), &routes).unwrap();
        let drows = cpu.expert_linear_backward(&weights, &routes, &y, Some(before)).unwrap();
        let dx = cpu.dispatch_backward(&drows, &routes, None).unwrap();
        (out.to_vec(), dx.to_vec())
    };
    let (all, all_dx) = run(0, tokens);
    for (from, to) in [(0, 1), (5, 12), (17, 188), (100, 300)] {
        let (some, some_dx) = run(from, to);
        assert_eq!(some, all[from * out..to * out], "{from}..{to}");
        assert_eq!(some_dx, all_dx[from * width..to * width], "{from}..{to} backward");
    }
}
