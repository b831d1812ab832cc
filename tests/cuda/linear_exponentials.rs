//! What the loss needs of logits, plain and soft-capped, where the product computes them. Plain logits are those of the
//! plain product, bit for bit; what is made of them is compared with float64.

use std::f64::consts::LOG2_E;

use cuemu::launcher::Sanitizer;
use gradlens::backend::cuda::Buf;
use gradlens::backend::cuda::linear::Tile;
use gradlens::backend::cuda::loss::{Strips, Targets};

use super::faults::{self, Fault, WRONG};
use super::linear::{BY_THREADS, Operand, tiles};
use super::linear_fused::{Layer, UNIT, check};
use super::machine::{Machine, Random, machine, relative_error};

/// What these tests must notice.
pub const FAULTS: &[Fault] = &[
    fault("powers without the slope of the soft-cap", "return fmaf(-part, part, 1.f);", "return 1.f;"),
    fault("the slope with the other sign", "return fmaf(-part, part, 1.f);", "return fmaf(part, part, 1.f);"),
    fault(
        "capped where the target is, and nowhere else",
        "if (softcap > 0.f) {  // the same in all threads",
        "if (softcap > 0.f && (u32)wanted < 64) {",
    ),
    fault(
        "one quarter of a strip is not capped",
        "      for (int i = 0; i < QUADS; i++)\n        z[i] = make_float4(soft_capped",
        "      for (int i = 0; i < QUADS - 1; i++)\n        z[i] = make_float4(soft_capped",
    ),
    fault(
        "sums of powers times the slope",
        "sum += (e.x + e.y) + (e.z + e.w);",
        "sum += ((e.x + e.y) + (e.z + e.w)) * slope_of_soft_cap(z[i].x, inverse);",
    ),
    fault(
        "the slope of plain logits",
        "      if (softcap > 0.f)\n        z[i] = make_float4(e.x",
        "      if (softcap == 0.f)\n        z[i] = make_float4(e.x",
    ),
    fault("half the argument of tanh", "2.f * LOG2E * inverse * x", "LOG2E * inverse * x"),
];

const fn fault(name: &'static str, from: &'static str, to: &'static str) -> Fault {
    Fault {
        name,
        file: "epilogue.cuh",
        from,
        to,
        test: "linear_exponentials::soft_caps_match_float64",
        build: Sanitizer::None,
        reports: WRONG,
    }
}

/// A logit as the product gives it → as the loss takes it, and the slope there.
fn capped(x: f64, softcap: Option<f32>) -> (f64, f64) {
    softcap.map_or((x, 1.0), |cap| {
        let cap = f64::from(cap);
        (cap * (x / cap).tanh(), (x / cap).cosh().powi(-2))
    })
}

/// Powers, and exponents, sums and logits at targets.
type Found<A> = (Vec<A>, [Vec<f32>; 3]);

impl<A: Operand> Layer<A> {
    pub fn exponentials(
        &self,
        machine: &Machine,
        tile: Tile,
        targets: &[i32],
        softcap: Option<f32>,
    ) -> Found<A> {
        let targets = Buf::from_host(&machine.cuda.device.memory, targets, 1).unwrap();
        let found =
            machine.cuda.linear_exponentials_with(tile, &self.x, &self.weight, &targets, softcap).unwrap();
        // Those without a target are nobody's.
        let written: Vec<f32> = targets
            .to_host()
            .unwrap()
            .iter()
            .enumerate()
            .filter(|(_, target)| **target >= 0)
            .flat_map(|(row, _)| found.target_logits.elements(row..row + 1).to_host().unwrap())
            .collect();
        let [exponents, sums] = [&found.exponents, &found.sums].map(|buf| buf.to_host().unwrap());
        (found.powers.to_host().unwrap(), [exponents, sums, written])
    }

    pub fn check_exponentials(
        &self,
        machine: &Machine,
        tile: Tile,
        targets: &[i32],
        softcap: Option<f32>,
        (powers, [exponents, sums, target_logits]): &Found<A>,
    ) {
        let plain = self.sums(machine, tile, false);
        let z: Vec<(f64, f64)> = plain.iter().map(|z| capped((*z).into(), softcap)).collect();
        // As kernels/epilogue.cuh says; and what the square of z / cap and 1 less it add.
        let error = |z: f64| match softcap {
            None => 0.0,
            Some(_) if A::ROUNDING == 0.0 => 8.0 * UNIT * z.abs(),
            Some(cap) => 12.0 * UNIT * f64::from(cap),
        };
        let slope_error = |z: f64| match softcap {
            None => 0.0,
            Some(cap) => 2.0 * z.abs() / f64::from(cap).powi(2) * error(z) + 6.0 * UNIT,
        };
        let what = format!("exponentials {} by {tile:?}, soft-cap {softcap:?}", self.what);
        let width = self.weight.rows();
        let strips = width.div_ceil(64);
        let strip_of = |i: usize| i / width * strips + i % width / 64;
        assert_eq!(
            (powers.len(), exponents.len(), sums.len()),
            (z.len(), z.len() / width * strips, exponents.len())
        );
        let mut largest = vec![f64::NEG_INFINITY; exponents.len()];
        let mut totals = vec![0.0; exponents.len()];
        for (i, (z, _)) in z.iter().enumerate() {
            let strip = strip_of(i);
            largest[strip] = largest[strip].max(z * LOG2_E);
            totals[strip] += (z * LOG2_E - f64::from(exponents[strip])).exp2();
        }
        for (strip, k) in exponents.iter().enumerate() {
            let (k, largest) = (f64::from(*k), largest[strip]);
            let off = largest.abs() * 2.0 * UNIT + error(largest / LOG2_E) * LOG2_E;
            let near = k == k.round() && (largest - k).abs() <= 0.5 + off;
            assert!(near, "{what}, strip {strip}: an exponent of {k} instead of {largest}, rounded");
        }
        // The argument is rounded to a unit of itself, the power to a few.
        check(powers, &what, |i| {
            let (z, slope) = z[i];
            let argument = z * LOG2_E - f64::from(exponents[strip_of(i)]);
            let power = argument.exp2();
            let off = (4.0 + 2.0 * argument.abs()) * UNIT + error(z);
            let off_slope = slope_error(z) + UNIT * slope;
            (power * slope, power * (off * slope + off_slope) + f64::from(f32::MIN_POSITIVE))
        });
        // Sixteen additions and up to 64 powers, of which only the large ones count.
        check(sums, &format!("sums of {what}"), |strip| {
            let largest = error(largest[strip].abs() / LOG2_E);
            (totals[strip], totals[strip] * (16.0 * UNIT + 2.0 * largest))
        });
        let wanted = (0..).zip(targets).filter(|(_, target)| **target >= 0);
        let wanted: Vec<usize> = wanted.map(|(row, target)| row * width + *target as usize).collect();
        if softcap.is_none() {
            let wanted: Vec<f32> = wanted.iter().map(|at| plain[*at]).collect();
            assert!(*target_logits == wanted, "{what}: other logits instead of {wanted:?}");
        } else {
            assert_eq!(target_logits.len(), wanted.len());
            check(target_logits, &format!("logits at targets of {what}"), |n| {
                let z = z[wanted[n]].0;
                (z, error(z))
            });
        }
    }
}

/// None, the first, the last, and others.
pub fn targets(rows: usize, width: usize) -> Vec<i32> {
    let of = |row: usize| match row % 4 {
        0 => width - 1 - row * 37 % width,
        1 => row * 101 % width,
        2 => width - 1,
        _ => usize::MAX,
    };
    (0..rows).map(|row| i32::try_from(of(row)).unwrap_or(-1)).collect()
}

/// Far above the logits, among them, far below.
const SOFTCAPS: [f32; 3] = [300.0, 30.0, 1.7];

fn match_float64<A: Operand>(machine: &Machine) {
    let of_tile = |tile: Tile, sizes: [usize; 3]| {
        let layer = Layer::<A>::new(machine, sizes, 16.0);
        let targets = targets(sizes[0], sizes[2]);
        for softcap in SOFTCAPS {
            let found = layer.exponentials(machine, tile, &targets, Some(softcap));
            layer.check_exponentials(machine, tile, &targets, Some(softcap), &found);
        }
    };
    for tile in tiles::<A>(machine) {
        for sizes in [[1, 8, 8], [70, 72, 136], [3, 16, 63], [5, 8, 129]] {
            of_tile(tile, sizes);
        }
    }
    of_tile(Tile::Unaligned, [3, 5, 67]);
}

#[test]
fn soft_caps_match_float64() {
    let Some(machine) = machine() else { return };
    match_float64::<half::bf16>(&machine);
    match_float64::<f32>(&machine);
}

#[test]
fn soft_caps_give_the_same_bits_under_all_schedules() {
    let Some(machine) = machine() else { return };
    let tile = if faults::is_planted() { Tile::Unaligned } else { BY_THREADS[0] };
    let layer = Layer::<half::bf16>::new(&machine, [5, 8, 72], 16.0);
    let targets = targets(5, 72);
    let found = machine.same_under_all_schedules(|| layer.exponentials(&machine, tile, &targets, Some(20.0)));
    layer.check_exponentials(&machine, tile, &targets, Some(20.0), &found);
}

fn over_their_range<A: Operand>(machine: &Machine) {
    let memory = &machine.cuda.device.memory;
    let far = [87.0, 1e4, 1e20, 3e38].into_iter().flat_map(|v: f32| [v, -v]);
    let near = (-100..=100).map(|i| i as f32 * 0.2);
    let values: Vec<f32> = near.chain(far).chain([0.0, -0.0, 1e-30]).collect();
    let x: Vec<A> = values.iter().flat_map(|v| [*v, 0.0, 0.0, 0.0].map(A::of)).collect();
    let mut layer = Layer::<A>::new(machine, [1, 4, 3], 1.0);
    layer.x = Buf::from_host(memory, &x, 4).unwrap();
    // Logits of half of it and of 0, and one between.
    let weight = [0.5, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.25, 0.0, 0.0, 0.0].map(A::of);
    layer.weight = Buf::from_host(memory, &weight, 4).unwrap();
    layer.what = format!("any logits in {}", A::NAME);
    let targets = targets(values.len(), 3);
    for softcap in SOFTCAPS {
        let found = layer.exponentials(machine, Tile::Unaligned, &targets, Some(softcap));
        assert!(found.0.iter().all(|e| (*e).into().is_finite()), "soft-cap {softcap}");
        layer.check_exponentials(machine, Tile::Unaligned, &targets, Some(softcap), &found);
    }
}

/// Far above the cap a logit is the cap, and no number becomes NaN.
#[test]
fn soft_caps_over_their_range() {
    let Some(machine) = machine() else { return };
    over_their_range::<half::bf16>(&machine);
    over_their_range::<f32>(&machine);
}

/// −ln softmax of the capped logits at `target`.
fn nats(x: &[f64], target: usize, softcap: Option<f32>) -> f64 {
    let z: Vec<f64> = x.iter().map(|x| capped(*x, softcap).0).collect();
    let top = z.iter().fold(f64::NEG_INFINITY, |top, z| top.max(*z));
    top + z.iter().map(|z| (z - top).exp()).sum::<f64>().ln() - z[target]
}

fn whole_loss<A: Operand>(machine: &Machine, softcap: Option<f32>) {
    let (rows, width) = (6, 129);
    let memory = &machine.cuda.device.memory;
    let layer = Layer::<A>::new(machine, [rows, 16, width], 6.0);
    let ids = targets(rows, width);
    let scales: Vec<f32> = Random::new(5).f32(rows).iter().map(|v| v * 0.2 + 0.5).collect();
    let on_device = Buf::from_host(memory, &ids, rows).unwrap();
    let of_rows = Buf::from_host(memory, &scales, rows).unwrap();
    let mut found = machine.cuda.linear_exponentials(&layer.x, &layer.weight, &on_device, softcap).unwrap();
    let mut losses = Buf::new(memory, 1, rows).unwrap();
    let strips = Strips { exponents: &found.exponents, sums: &found.sums };
    let of_targets = Targets { ids: &on_device, logits: &found.target_logits, scales: &of_rows };
    machine.cuda.loss_finish(&mut found.powers, strips, of_targets, &mut losses, softcap, true).unwrap();
    let (losses, gradient) = (losses.to_host().unwrap(), found.powers.to_host().unwrap());

    let x: Vec<f64> = layer.sums(machine, Tile::Unaligned, false).iter().map(|x| (*x).into()).collect();
    let mut wanted = vec![0.0; rows * width];
    for (row, x) in x.chunks_exact(width).enumerate() {
        let Ok(target) = usize::try_from(ids[row]) else { continue };
        let of_row = nats(x, target, softcap);
        let what = format!("{} with soft-cap {softcap:?}, row {row}", layer.what);
        let near = (f64::from(losses[row]) - of_row).abs() <= 1e-5 * of_row.abs().max(1.0);
        assert!(near, "{what}: a loss of {} instead of {of_row}", losses[row]);
        for column in 0..width {
            let moved = |by: f64| {
                let mut x = x.to_vec();
                x[column] += by;
                nats(&x, target, softcap)
            };
            wanted[row * width + column] = (moved(1e-4) - moved(-1e-4)) / 2e-4 * f64::from(scales[row]);
        }
    }
    let error = relative_error(gradient.iter().map(|v| (*v).into()), &wanted);
    println!("gradient of {} with soft-cap {softcap:?}: relative error {error:.1e}", layer.what);
    assert!(error <= 5e-6 + 2.0 * A::ROUNDING, "{}, {softcap:?}: relative error {error:e}", layer.what);
}

/// The loss and its gradient by the logits before the cap, which float64 finds from differences of the loss.
#[test]
fn soft_capped_loss_has_the_gradient_of_its_differences() {
    let Some(machine) = machine() else { return };
    for softcap in [None, Some(30.0), Some(4.0)] {
        whole_loss::<half::bf16>(&machine, softcap);
        whole_loss::<f32>(&machine, softcap);
    }
}
