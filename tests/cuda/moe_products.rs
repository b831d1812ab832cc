//! Products of rows by their experts' weights: the bits of the product of each expert's rows alone, which has tests of
//! its own. And a whole mixture, forward and backward, against float64.

use std::panic::{AssertUnwindSafe, catch_unwind};

use gradlens::backend::cuda::linear::{Direction, Shape, Tile};
use gradlens::backend::cuda::moe::Routing;
use gradlens::backend::cuda::{Activation, Buf};
use half::bf16;

use super::faults;
use super::linear::{BY_THREADS, Operand, tiles};
use super::machine::{Machine, Random, machine, relative_error};
use super::moe::{Case, case};

/// 140 tokens on the first expert, two tiles of 128; none on the second; the others on two more, of which one has rows
/// for half a tile.
const UNEVEN: [usize; 4] = [140, 0, 99, 41];

/// A layer's experts and their rows.
struct Experts<A> {
    routing: Routing,
    /// Rows of each expert.
    rows: Vec<std::ops::Range<usize>>,
    /// `[R, in]` or `[R, out]`, NaN in rows that are nobody's.
    left: Buf<A>,
    /// `[E·out, in]`
    weight: Buf<A>,
    shape: Shape,
}

/// Logits by which so many tokens choose each expert: every token the first, and one of the others.
fn uneven_logits() -> Vec<f32> {
    let others = (1..UNEVEN.len()).flat_map(|expert| std::iter::repeat_n(expert, UNEVEN[expert]));
    let mut second: Vec<usize> = others.collect();
    // Not in the order of the tokens.
    let count = second.len();
    (0..count).for_each(|n| second.swap(n, n * 61 % count));
    let logits = |second: usize| {
        [3.0, -9.0, -2.0, -2.5].into_iter().enumerate().map(move |(e, v)| if e == second { 1.0 } else { v })
    };
    second.into_iter().flat_map(logits).collect()
}

impl<A: Operand> Experts<A> {
    fn new(machine: &Machine, direction: Direction, [in_features, out_features]: [usize; 2]) -> Self {
        let (cuda, memory) = (&machine.cuda, &machine.cuda.device.memory);
        let logits = Buf::from_host(memory, &uneven_logits(), UNEVEN.len()).unwrap();
        let (_, routing) = cuda.route(&logits, 2).unwrap();
        let mut start = 0;
        let of = |count: &usize| {
            let rows = start..start + count;
            start = rows.end.next_multiple_of(128);
            rows
        };
        let rows: Vec<_> = UNEVEN.iter().map(of).collect();
        let shape = Shape { rows: routing.rows(), in_features, out_features };
        let mut random = Random::new((in_features * 7 + out_features) as u64);
        let width = if direction == Direction::Forward { in_features } else { out_features };
        let left = left(&mut random, &routing, width);
        let weight = A::random(&mut random, UNEVEN.len() * out_features * in_features);
        Self {
            left: Buf::from_host(memory, &left, width).unwrap(),
            weight: Buf::from_host(memory, &weight, in_features).unwrap(),
            routing,
            rows,
            shape,
        }
    }

    /// What somebody's rows hold.
    fn of_tokens<T: Operand>(&self, all: &Buf<T>) -> Vec<T> {
        let all = |rows: &std::ops::Range<usize>| all.view(rows.clone()).to_host().unwrap();
        self.rows.iter().flat_map(all).collect()
    }

    /// The same product, expert by expert.
    fn each<T: Operand>(&self, product: impl Fn(usize, &Buf<A>, &Buf<A>) -> Buf<T>) -> Vec<T> {
        let out = self.shape.out_features;
        let of = |(expert, rows): (usize, &std::ops::Range<usize>)| {
            let weight = self.weight.view(expert * out..(expert + 1) * out);
            product(expert, &self.left.view(rows.clone()), &weight).to_host().unwrap()
        };
        self.rows.iter().enumerate().flat_map(of).collect()
    }
}

/// Random rows, NaN where they are nobody's.
fn left<A: Operand>(random: &mut Random, routing: &Routing, width: usize) -> Vec<A> {
    let slots = routing.slots.to_host().unwrap();
    let row = |slot: &i32| if *slot < 0 { vec![A::NAN; width] } else { A::random(random, width) };
    slots.iter().flat_map(row).collect()
}

fn assert_bits<T: Operand>(found: &[T], wanted: &[T], what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    let other = found.iter().zip(wanted).position(|(found, wanted)| found != wanted);
    if let Some(at) = other {
        let (found, wanted): (f64, f64) = (found[at].into(), wanted[at].into());
        panic!("{what} [{at}]: {found} instead of {wanted}");
    }
}

/// All four products by one kernel, as far as it reads such rows.
fn check<A: Operand>(machine: &Machine, tile: Tile, [hidden, inner]: [usize; 2], all_schedules: bool) {
    let cuda = &machine.cuda;
    let what = |operation: &str| format!("{operation} {hidden} {inner} {} by {tile:?}", A::NAME);
    let reads = |experts: &Experts<A>, direction| tile.reads_experts(A::FORMAT, direction, experts.shape);

    let down = Experts::<A>::new(machine, Direction::Forward, [inner, hidden]);
    if reads(&down, Direction::Forward) {
        let run = || {
            let y =
                cuda.experts_forward_with::<A, f32>(tile, &down.left, &down.weight, &down.routing).unwrap();
            down.of_tokens(&y)
        };
        let found = if all_schedules { machine.same_under_all_schedules(run) } else { run() };
        let wanted = down.each(|_, x, weight| cuda.linear_forward_with(tile, x, weight, None).unwrap());
        assert_bits(&found, &wanted, &what("forward"));
    }

    let gates = Experts::<A>::new(machine, Direction::Forward, [hidden, 2 * inner]);
    let activation = Activation::Silu;
    let (left, weight, routing) = (&gates.left, &gates.weight, &gates.routing);
    let (gate_up, _) =
        cuda.experts_gated_with(Tile::Unaligned, left, weight, routing, activation, true).unwrap();
    let gate_up = gate_up.unwrap();
    if reads(&gates, Direction::Forward) {
        let run = || {
            let (parts, out) =
                cuda.experts_gated_with(tile, left, weight, routing, activation, true).unwrap();
            [gates.of_tokens(&parts.unwrap()), gates.of_tokens(&out)]
        };
        let found = if all_schedules { machine.same_under_all_schedules(run) } else { run() };
        let gated = |x: &Buf<A>, weight: &Buf<A>| {
            cuda.linear_gated_with(tile, x, weight, None, activation, true).unwrap()
        };
        assert_bits(&found[0], &gates.each(|_, x, weight| gated(x, weight).0.unwrap()), &what("gates"));
        assert_bits(&found[1], &gates.each(|_, x, weight| gated(x, weight).1), &what("gated"));
    }

    let back = Experts::<A>::new(machine, Direction::Backward, [hidden, 2 * inner]);
    if reads(&back, Direction::Backward) {
        let run = || {
            let dx =
                cuda.experts_backward_with::<A, f32>(tile, &back.left, &back.weight, &back.routing).unwrap();
            back.of_tokens(&dx)
        };
        let found = if all_schedules { machine.same_under_all_schedules(run) } else { run() };
        let wanted = back.each(|_, dy, weight| cuda.linear_backward_as_with(tile, dy, weight, None).unwrap());
        assert_bits(&found, &wanted, &what("backward"));
    }

    let behind = Experts::<A>::new(machine, Direction::Backward, [inner, hidden]);
    if reads(&behind, Direction::Backward) {
        let (dy, weight, routing) = (&behind.left, &behind.weight, &behind.routing);
        let run = || {
            let gradient =
                cuda.experts_gated_backward_with(tile, dy, weight, routing, &gate_up, activation).unwrap();
            behind.of_tokens(&gradient)
        };
        let found = if all_schedules { machine.same_under_all_schedules(run) } else { run() };
        let wanted = behind.each(|expert, dy, weight| {
            let gate_up = gate_up.view(behind.rows[expert].clone());
            cuda.linear_gated_backward_with(tile, dy, weight, &gate_up, activation).unwrap()
        });
        assert_bits(&found, &wanted, &what("gated backward"));
    }
}

/// Widths (of the model, inside an expert): several tiles of columns of which the last ends, depths that end inside a
/// stage, and those that all kernels read. A process with a planted fault takes the first two tiles.
fn each_expert_by_its_weight<A: Operand>(machine: &Machine, wanted: &[Tile]) {
    let wanted = if faults::is_planted() { &wanted[..2] } else { wanted };
    for tile in tiles::<A>(machine).into_iter().filter(|tile| wanted.contains(tile)) {
        check::<A>(machine, tile, [136, 72], false);
        check::<A>(machine, tile, [192, 32], false);
    }
    // None of them but one reads such rows.
    if wanted.contains(&Tile::Unaligned) {
        check::<A>(machine, Tile::Unaligned, [13, 9], false);
    }
}

#[test]
fn mma_sync_multiplies_each_row_by_its_experts_weight() {
    let Some(machine) = machine() else { return };
    each_expert_by_its_weight::<bf16>(&machine, &BY_THREADS);
}

#[test]
fn wgmma_multiplies_each_row_by_its_experts_weight() {
    let Some(machine) = machine() else { return };
    each_expert_by_its_weight::<bf16>(&machine, &[Tile::Narrow, Tile::Wide]);
}

#[test]
fn ffma_multiplies_each_row_by_its_experts_weight() {
    let Some(machine) = machine() else { return };
    each_expert_by_its_weight::<f32>(&machine, &BY_THREADS);
}

#[test]
fn products_of_experts_under_all_schedules() {
    let Some(machine) = machine() else { return };
    check::<bf16>(&machine, Tile::Large, [64, 40], true);
    check::<f32>(&machine, Tile::Small, [64, 40], true);
    if tiles::<bf16>(&machine).contains(&Tile::Narrow) {
        check::<bf16>(&machine, Tile::Narrow, [64, 40], true);
    }
}

/// A mixture of gated layers: experts' weights `[E·2·I, D]` and `[E·D, I]`.
struct Mixture {
    case: Case,
    hidden: usize,
    inner: usize,
    gates: Vec<f32>,
    down: Vec<f32>,
}

/// What goes in, and the gradient of what comes out.
#[derive(Clone)]
struct Tokens {
    /// `[N, E]`
    logits: Vec<f32>,
    /// `[N, D]`
    x: Vec<f32>,
    /// `[N, D]`
    dout: Vec<f32>,
}

impl Mixture {
    fn new(case: Case, hidden: usize, inner: usize) -> Self {
        let mut random = Random::new(9);
        let [gates, down] = [2, 1].map(|parts| random.f32(case.experts * parts * inner * hidden));
        Self { case, hidden, inner, gates, down }
    }

    fn tokens(&self, seed: u64) -> Tokens {
        let Case { tokens, experts, .. } = self.case;
        let mut random = Random::new(seed);
        let [x, dout] = [(); 2].map(|()| random.f32(tokens * self.hidden));
        Tokens { logits: random.f32(tokens * experts), x, dout }
    }

    /// out, dx, dlogits by the kernels, operands in `A`.
    fn run<A: Operand>(&self, machine: &Machine, tokens: &Tokens) -> [Vec<f32>; 3] {
        let (cuda, memory, act) = (&machine.cuda, &machine.cuda.device.memory, Activation::Silu);
        let on_device = |values: &[f32], width: usize| {
            let values: Vec<A> = values.iter().map(|v| A::of(*v)).collect();
            Buf::from_host(memory, &values, width).unwrap()
        };
        let [x, gates] = [&tokens.x, &self.gates].map(|values| on_device(values, self.hidden));
        let down = on_device(&self.down, self.inner);
        let logits = Buf::from_host(memory, &tokens.logits, self.case.experts).unwrap();
        let dout = Buf::from_host(memory, &tokens.dout, self.hidden).unwrap();

        let (scores, routing) = cuda.route(&logits, self.case.top_k).unwrap();
        let rows = cuda.dispatch(&x, &routing).unwrap();
        let (gate_up, hidden) = cuda.experts_gated(&rows, &gates, &routing, act, true).unwrap();
        let y: Buf<f32> = cuda.experts_forward(&hidden, &down, &routing).unwrap();
        let out = cuda.combine(&y, &scores, &routing).unwrap();

        let (dy, dscores) = cuda.combine_backward::<f32, A>(&y, &scores, &routing, &dout).unwrap();
        let gate_up = gate_up.unwrap();
        let dgate_up = cuda.experts_gated_backward(&dy, &down, &routing, &gate_up, act).unwrap();
        let drows: Buf<f32> = cuda.experts_backward(&dgate_up, &gates, &routing).unwrap();
        let dx = cuda.dispatch_backward(&drows, &routing, None).unwrap();
        let dlogits = cuda.route_backward(&scores, &routing, &dscores, None).unwrap();
        [out, dx, dlogits].map(|buf| buf.to_host().unwrap())
    }

    /// One token's output in float64; `chosen`: its experts.
    fn token(&self, chosen: &[usize], logits: &[f64], x: &[f64]) -> Vec<f64> {
        let (hidden, inner) = (self.hidden, self.inner);
        let dot =
            |weights: &[f32], x: &[f64]| weights.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum::<f64>();
        let total: f64 = chosen.iter().map(|expert| logits[*expert].exp()).sum();
        let mut out = vec![0.0; hidden];
        for expert in chosen {
            let gates = &self.gates[expert * 2 * inner * hidden..][..2 * inner * hidden];
            let part = |row: usize| dot(&gates[row * hidden..][..hidden], x);
            let act = |i: usize| part(2 * i) / (1.0 + (-part(2 * i)).exp()) * part(2 * i + 1);
            let h: Vec<f64> = (0..inner).map(act).collect();
            let down = &self.down[expert * hidden * inner..][..hidden * inner];
            let score = logits[*expert].exp() / total;
            out.iter_mut()
                .enumerate()
                .for_each(|(d, out)| *out += score * dot(&down[d * inner..][..inner], &h));
        }
        out
    }

    /// out, and the gradients of ⟨out, dout⟩ by differences.
    fn wanted(&self, tokens: &Tokens) -> [Vec<f64>; 3] {
        let (experts, hidden) = (self.case.experts, self.hidden);
        let [mut out, mut dx, mut dlogits] = [const { Vec::new() }; 3];
        for n in 0..self.case.tokens {
            let wide = |values: &[f32], width: usize| -> Vec<f64> {
                values[n * width..][..width].iter().map(|v| f64::from(*v)).collect()
            };
            let (logits, x) = (wide(&tokens.logits, experts), wide(&tokens.x, hidden));
            let dout = wide(&tokens.dout, hidden);
            let mut chosen: Vec<usize> = (0..experts).collect();
            chosen.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
            chosen.truncate(self.case.top_k);
            out.extend(self.token(&chosen, &logits, &x));
            let loss = |logits: &[f64], x: &[f64]| {
                let out = self.token(&chosen, logits, x);
                out.iter().zip(&dout).map(|(out, dout)| out * dout).sum::<f64>()
            };
            const STEP: f64 = 1e-5;
            let slope = |values: &[f64], at: usize, loss: &dyn Fn(&[f64]) -> f64| {
                let [up, down] = [STEP, -STEP].map(|step| {
                    let mut values = values.to_vec();
                    values[at] += step;
                    loss(&values)
                });
                (up - down) / (2.0 * STEP)
            };
            dx.extend((0..hidden).map(|d| slope(&x, d, &|x| loss(&logits, x))));
            dlogits.extend((0..experts).map(|e| slope(&logits, e, &|logits| loss(logits, &x))));
        }
        [out, dx, dlogits]
    }
}

#[test]
fn a_mixture_matches_float64() {
    let Some(machine) = machine() else { return };
    for (sizes, hidden, inner) in [([9, 4, 2, 0], 12, 20), ([7, 3, 3, 0], 7, 5), ([6, 5, 1, 0], 16, 8)] {
        let mixture = Mixture::new(case(sizes), hidden, inner);
        let tokens = mixture.tokens(3);
        let found = mixture.run::<f32>(&machine, &tokens);
        let names = ["out", "dx", "dlogits"];
        for ((found, wanted), name) in found.iter().zip(mixture.wanted(&tokens)).zip(names) {
            // With one expert a score is 1, whatever the logits.
            if name == "dlogits" && sizes[2] == 1 {
                assert!(found.iter().all(|v| *v == 0.0), "{found:?} instead of zeros");
                continue;
            }
            let error = relative_error(found.iter().map(|v| f64::from(*v)), &wanted);
            assert!(error < 3e-6, "relative error of {name}, {sizes:?}: {error}");
        }
    }
}

fn bits_do_not_depend_on_other_tokens<A: Operand>(machine: &Machine) {
    let all = Mixture::new(case([150, 3, 2, 0]), 64, 24);
    let tokens = all.tokens(5);
    let found = all.run::<A>(machine, &tokens);
    let first = 77;
    let last = Tokens {
        logits: tokens.logits[first * 3..].to_vec(),
        x: tokens.x[first * 64..].to_vec(),
        dout: tokens.dout[first * 64..].to_vec(),
    };
    let some = Mixture { case: case([150 - first, 3, 2, 0]), ..all };
    let widths = [64, 64, 3];
    for ((all, alone), width) in found.iter().zip(some.run::<A>(machine, &last)).zip(widths) {
        assert!(all[first * width..] == alone, "other bits of {} without other tokens", A::NAME);
    }
}

#[test]
fn bits_of_a_token_do_not_depend_on_other_tokens() {
    let Some(machine) = machine() else { return };
    bits_do_not_depend_on_other_tokens::<f32>(&machine);
    bits_do_not_depend_on_other_tokens::<bf16>(&machine);
}

#[test]
fn a_kernel_that_cannot_read_the_rows_is_not_launched() {
    let Some(machine) = machine() else { return };
    let refused = |tile: Tile, sizes: [usize; 2]| {
        let experts = Experts::<bf16>::new(&machine, Direction::Backward, sizes);
        let Experts { routing, left, weight, .. } = &experts;
        let product = || machine.cuda.experts_backward_with::<bf16, f32>(tile, left, weight, routing);
        catch_unwind(AssertUnwindSafe(product)).is_err()
    };
    assert!(refused(Tile::Large, [7, 64]) && !refused(Tile::Large, [8, 40]));
    if tiles::<bf16>(&machine).contains(&Tile::Narrow) {
        assert!(refused(Tile::Narrow, [8, 40]) && !refused(Tile::Narrow, [8, 64]));
    }
    let Experts { routing, left, weight, .. } = Experts::<bf16>::new(&machine, Direction::Forward, [8, 9]);
    let fewer = |left: &Buf<bf16>, weight: &Buf<bf16>| {
        let product = || machine.cuda.experts_forward::<bf16, f32>(left, weight, &routing);
        catch_unwind(AssertUnwindSafe(product)).is_err()
    };
    assert!(
        fewer(&left.view(0..128), &weight) && fewer(&left, &weight.view(0..35)) && !fewer(&left, &weight)
    );
}
