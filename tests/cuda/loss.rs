//! The finish of the cross-entropy against float64, from what a product would leave.

use std::f64::consts::LOG2_E;
use std::panic::{AssertUnwindSafe, catch_unwind};

use cuemu::launcher::Sanitizer;
use gradlens::backend::cuda::Buf;
use gradlens::backend::cuda::loss::{STRIP, Strips, Targets};
use half::bf16;

use super::elementwise::{EPSILON, Number, assert_near, assert_same};
use super::faults::{Fault, WRONG};
use super::machine::{Machine, Random, machine};

/// What these tests must notice.
pub const FAULTS: &[Fault] = &[
    Fault {
        name: "missing barrier before the target's column",
        file: "loss.cu",
        from: "__syncthreads();  // loss: the target's column is scaled like the others",
        to: "",
        test: "loss::finish",
        build: Sanitizer::Thread,
        reports: &["ThreadSanitizer: data race"],
    },
    Fault {
        name: "missing barrier before the target's column, without a sanitizer",
        file: "loss.cu",
        from: "__syncthreads();  // loss: the target's column is scaled like the others",
        to: "",
        test: "loss::finish",
        build: Sanitizer::None,
        reports: WRONG,
    },
    Fault {
        name: "missing barrier in the largest exponent",
        file: "loss.cu",
        from: "__syncthreads();  // loss: the warps' largest exponents are written",
        to: "",
        test: "loss::finish",
        build: Sanitizer::Thread,
        reports: &["ThreadSanitizer: data race"],
    },
    Fault {
        name: "both reductions in the same scratch",
        file: "loss.cu",
        from: "block_sum<WARPS>(total, of_warps[1])",
        to: "block_sum<WARPS>(total, of_warps[0])",
        test: "loss::finish",
        build: Sanitizer::Thread,
        reports: &["ThreadSanitizer: data race"],
    },
    Fault {
        name: "exponents of strips ignored",
        file: "loss.cu",
        from: "exp2f(k[i] - top) * factor);",
        to: "factor);",
        test: "loss::finish",
        build: Sanitizer::None,
        reports: WRONG,
    },
    Fault {
        name: "one strip too far, one by one",
        file: "loss.cu",
        from: "if (s < strips) k[i] = exponents[s];",
        to: "if (s < strips) k[i] = exponents[s + 1];",
        test: "loss::finish",
        build: Sanitizer::None,
        reports: &["instead of", "out of bounds global"],
    },
    Fault {
        name: "past the end of the vocabulary",
        file: "loss.cu",
        from: "if (j + 32 < vocab) row[j + 32] =",
        to: "if (j < vocab) row[j + 32] =",
        test: "loss::finish",
        build: Sanitizer::None,
        reports: &["instead of", "other bytes under", "out of bounds global"],
    },
    Fault {
        name: "past the end of the vocabulary, with a sanitizer",
        file: "loss.cu",
        from: "if (j < vocab) *(uint4*)(row + j) =",
        to: "if (j <= vocab) *(uint4*)(row + j) =",
        test: "loss::finish",
        build: Sanitizer::Address,
        reports: &["out of bounds global", "AddressSanitizer"],
    },
    Fault {
        name: "rows without a target keep what they hold",
        file: "loss.cu",
        from: "if (gradient) clear_row(e, vocab);",
        to: "",
        test: "loss::finish",
        build: Sanitizer::None,
        reports: WRONG,
    },
    Fault {
        name: "a target that is no column",
        file: "loss.cu",
        from: "if (target < 0) {",
        to: "if (target < -1) {",
        test: "loss::finish",
        build: Sanitizer::None,
        reports: &["instead of", "other bytes under", "out of bounds global"],
    },
    Fault {
        name: "the scale is lost",
        file: "loss.cu",
        from: "scale_row(e, exponents, top, scale / total, vocab, strips);",
        to: "scale_row(e, exponents, top, 1.f / total, vocab, strips);",
        test: "loss::finish",
        build: Sanitizer::None,
        reports: WRONG,
    },
    Fault {
        name: "the target is not subtracted",
        file: "loss.cu",
        from: "expm1f(-of_row)",
        to: "expf(-of_row)",
        test: "loss::finish",
        build: Sanitizer::None,
        reports: WRONG,
    },
    Fault {
        name: "the target without the slope of the soft-cap",
        file: "loss.cu",
        from: "fmaf(-part, part, 1.f));",
        to: "1.f);",
        test: "loss::finish",
        build: Sanitizer::None,
        reports: WRONG,
    },
    Fault {
        name: "the slope of the soft-cap with the other sign",
        file: "loss.cu",
        from: "fmaf(-part, part, 1.f));",
        to: "fmaf(part, part, 1.f));",
        test: "loss::finish",
        build: Sanitizer::None,
        reports: WRONG,
    },
    Fault {
        name: "sums that lose their last bits",
        file: "loss.cu",
        from: "(first.low + second.low)",
        to: "0.f",
        test: "loss::finish",
        build: Sanitizer::None,
        reports: WRONG,
    },
    Fault {
        name: "the gradient although nobody asked",
        file: "loss.cu",
        from: "if (!gradient) return;",
        to: "",
        test: "loss::finish",
        build: Sanitizer::None,
        reports: WRONG,
    },
];

/// Rows of logits, soft-capped or not, and what a product would leave of them.
struct Case<A> {
    vocab: usize,
    softcap: Option<f32>,
    logits: Vec<f32>,
    targets: Vec<i32>,
    scales: Vec<f32>,
    e: Vec<A>,
    exponents: Vec<f32>,
    sums: Vec<f32>,
}

impl<A: Number> Case<A> {
    /// Rows of every kind in turn: common; sure and right; without an idea; of hugely different strips; far below
    /// zero; sure and wrong; without a target, where everything is NaN.
    fn new(rows: usize, vocab: usize, softcap: Option<f32>) -> Self {
        let mut random = Random::new((rows * vocab) as u64);
        let mut case = Self {
            vocab,
            softcap,
            logits: Vec::new(),
            targets: Vec::new(),
            scales: Vec::new(),
            e: Vec::new(),
            exponents: Vec::new(),
            sums: Vec::new(),
        };
        for row in 0..rows {
            let kind = row % 7;
            let target = (random.uniform() * vocab as f32) as usize % vocab;
            let (factor, offset) = match kind {
                2 => (0.0, 3.3),
                3 => (90.0, 0.0),
                4 => (4.0, -80.0),
                _ => (4.0, 10.0),
            };
            let mut logits: Vec<f32> = random.f32(vocab).iter().map(|z| z * factor + offset).collect();
            match kind {
                1 => logits[target] += 20.0,
                5 => logits[(target + vocab / 2) % vocab] += 40.0,
                6 => logits.fill(f32::NAN),
                _ => {}
            }
            if let Some(cap) = softcap {
                logits.iter_mut().for_each(|z| *z = cap * (*z / cap).tanh());
            }
            for strip in logits.chunks(STRIP) {
                let top = strip.iter().fold(f64::NEG_INFINITY, |top, z| top.max(f64::from(*z) * LOG2_E));
                // Whole numbers in every other row.
                let k = if row % 2 == 0 { top.ceil() } else { top + 0.3 } as f32;
                let k = if kind == 6 { f32::NAN } else { k };
                let values = strip.iter().map(|z| (f64::from(*z) * LOG2_E - f64::from(k)).exp2());
                let of_caps = strip.iter().map(|z| slope(*z, softcap));
                case.e
                    .extend(values.clone().zip(of_caps).map(|(value, slope)| A::of((value * slope) as f32)));
                case.sums.push(values.sum::<f64>() as f32);
                case.exponents.push(k);
            }
            case.logits.extend(logits);
            case.targets.push(if kind == 6 { -1 } else { target as i32 });
            case.scales.push(random.uniform() - 0.3);
        }
        case
    }

    /// These rows alone.
    fn row(&self, row: usize) -> Self {
        let strips = self.vocab.div_ceil(STRIP);
        let of_strips = |values: &[f32]| values[row * strips..][..strips].to_vec();
        Self {
            vocab: self.vocab,
            softcap: self.softcap,
            logits: self.logits[row * self.vocab..][..self.vocab].to_vec(),
            targets: vec![self.targets[row]],
            scales: vec![self.scales[row]],
            e: self.e[row * self.vocab..][..self.vocab].to_vec(),
            exponents: of_strips(&self.exponents),
            sums: of_strips(&self.sums),
        }
    }

    /// nats, and what becomes of e.
    fn run(&self, machine: &Machine, gradient: bool) -> (Vec<f32>, Vec<A>) {
        let memory = &machine.cuda.device.memory;
        let rows = self.targets.len();
        let row = |values: &[f32]| Buf::from_host(memory, values, rows).unwrap();
        let mut e = Buf::from_host(memory, &self.e, self.vocab).unwrap();
        let [exponents, sums] = [&self.exponents, &self.sums]
            .map(|values| Buf::from_host(memory, values, self.vocab.div_ceil(STRIP)).unwrap());
        let of_targets: Vec<f32> = (0..rows).map(|row| self.target_logit(row)).collect();
        let ids = Buf::from_host(memory, &self.targets, rows).unwrap();
        let (logits, scales) = (row(&of_targets), row(&self.scales));
        let all = Buf::new(memory, rows + 3, 1).unwrap();
        let mut nats = all.view(2..rows + 2);
        let strips = Strips { exponents: &exponents, sums: &sums };
        let targets = Targets { ids: &ids, logits: &logits, scales: &scales };
        machine.cuda.loss_finish(&mut e, strips, targets, &mut nats, self.softcap, gradient).unwrap();
        (nats.to_host().unwrap(), e.to_host().unwrap())
    }

    fn target_logit(&self, row: usize) -> f32 {
        usize::try_from(self.targets[row]).map_or(f32::NAN, |target| self.logits[row * self.vocab + target])
    }

    /// Compares with float64; the largest part of a bound on nats that was used.
    fn check(&self, nats: &[f32], e: &[A], what: &str) -> f64 {
        let mut used = 0.0_f64;
        let strips = self.vocab.div_ceil(STRIP);
        for (row, e) in e.chunks_exact(self.vocab).enumerate() {
            let what = format!("{what} row {row}");
            let Ok(target) = usize::try_from(self.targets[row]) else {
                assert_near(&nats[row..=row], &[0.0], |_| 0.0, &what);
                assert_near(e, &vec![0.0; self.vocab], |_| 0.0, &what);
                continue;
            };
            let z: Vec<f64> =
                self.logits[row * self.vocab..][..self.vocab].iter().map(|z| (*z).into()).collect();
            let scale = f64::from(self.scales[row]);
            let top = z.iter().fold(f64::NEG_INFINITY, |top, z| top.max(*z));
            let log_sum = top + z.iter().map(|z| (z - top).exp()).sum::<f64>().ln();
            let wanted_nats = log_sum - z[target];
            // Additions: of a thread, of a warp, of the warps; powers; the rounding of `sums`.
            let additions = strips.div_ceil(256) + 5.min(strips.next_power_of_two().ilog2() as usize);
            let additions = additions + strips.div_ceil(32).min(8) - 1;
            let of_total = (additions + 4 + 1) as f64 * EPSILON;
            let of_nats = of_total + EPSILON * (1.0 + wanted_nats.abs());
            assert_near(&nats[row..=row], &[wanted_nats], |_| of_nats, &format!("{what}, nats"));
            used = used.max((f64::from(nats[row]) - wanted_nats).abs() / of_nats);

            let p: Vec<f64> = z.iter().map(|z| (z - log_sum).exp()).collect();
            let mut wanted: Vec<f64> = p.iter().map(|p| p * scale).collect();
            let slopes =
                self.logits[row * self.vocab..][..self.vocab].iter().map(|z| slope(*z, self.softcap));
            let slopes: Vec<f64> = slopes.collect();
            wanted.iter_mut().zip(&slopes).for_each(|(wanted, slope)| *wanted *= slope);
            // p − 1 as minus the others.
            let others: f64 =
                z.iter().enumerate().filter(|(j, _)| *j != target).map(|(_, z)| (z - log_sum).exp()).sum();
            wanted[target] = -others * scale * slopes[target];
            let exponents = &self.exponents[row * strips..][..strips];
            let largest = exponents.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
            let bound = |j: usize| {
                if j == target {
                    let of_slope = if self.softcap.is_some() { 4.0 * EPSILON } else { 0.0 };
                    let relative = p[j] * of_nats + others * (A::ROUNDING + 3.0 * EPSILON);
                    return scale.abs() * (relative * slopes[j] + others * of_slope);
                }
                let apart = f64::from(largest - exponents[j / STRIP]);
                let relative = of_total + (8.0 + apart) * EPSILON + 2.01 * A::ROUNDING;
                wanted[j].abs() * relative + scale.abs() * f64::from(f32::MIN_POSITIVE)
            };
            assert_near(e, &wanted, bound, &what);
        }
        used
    }
}

/// dz/dx of a logit z = c·tanh(x/c).
fn slope(z: f32, softcap: Option<f32>) -> f64 {
    softcap.map_or(1.0, |cap| 1.0 - (f64::from(z) / f64::from(cap)).powi(2))
}

fn check<A: Number>(machine: &Machine, rows: usize, vocab: usize, softcap: Option<f32>, all_schedules: bool) {
    let case = Case::<A>::new(rows, vocab, softcap);
    let run = || case.run(machine, true);
    let (nats, e) = if all_schedules { machine.same_under_all_schedules(run) } else { run() };
    let what = format!("{} {rows}x{vocab}, soft-cap {softcap:?}", A::NAME);
    let used = case.check(&nats, &e, &what);
    println!("{what}: nats used at most {used:.2} of their bound");

    let alone = 1 % rows;
    let (its_nats, its_e) = case.row(alone).run(machine, false);
    assert_same(&its_nats, &nats[alone..=alone], &format!("{what}, a row alone without a gradient"));
    assert_same(&its_e, &case.row(alone).e, &format!("{what}, what is left without a gradient"));
    let (_, its_e) = case.row(alone).run(machine, true);
    assert_same(&its_e, &e[alone * vocab..][..vocab], &format!("{what}, a row alone"));
}

/// One column; a strip and its neighbours; several rounds of loads of a block, with and without a remainder.
#[test]
fn finish() {
    let Some(machine) = machine() else { return };
    let shapes =
        [(8, 1), (7, 63), (3, 64), (2, 129), (8, 65), (9, 200), (8, 1000), (1, 1608), (3, 4099), (2, 17_000)];
    // Under ThreadSanitizer threads are what costs.
    for (rows, vocab) in shapes.into_iter().filter(|(rows, vocab)| machine.affordable(256 * rows + vocab)) {
        for softcap in [None, Some(30.0), Some(7.3)] {
            check::<f32>(&machine, rows, vocab, softcap, true);
            check::<bf16>(&machine, rows, vocab, softcap, true);
        }
    }
}

/// More strips than a block has threads, with and without a remainder.
#[test]
fn large_vocabularies() {
    let Some(machine) = machine() else { return };
    for vocab in [262_144, 256_001] {
        check::<f32>(&machine, 6, vocab, None, false);
        check::<bf16>(&machine, 7, vocab, Some(30.0), false);
    }
}

#[test]
fn shapes_must_match() {
    let Some(machine) = machine() else { return };
    let cuda = &machine.cuda;
    let memory = &cuda.device.memory;
    let refused_with = |softcap: Option<f32>, strips: usize, targets: usize, losses: usize| {
        let mut e = Buf::from_host(memory, &[1.0_f32; 130], 65).unwrap();
        let of_strips = Buf::from_host(memory, &vec![1.0_f32; 2 * strips], strips).unwrap();
        let ids = Buf::from_host(memory, &vec![0; targets], targets).unwrap();
        let of_targets = Buf::from_host(memory, &vec![1.0_f32; targets], targets).unwrap();
        let mut nats = Buf::new(memory, 1, losses).unwrap();
        let finish = || {
            let strips = Strips { exponents: &of_strips, sums: &of_strips };
            let targets = Targets { ids: &ids, logits: &of_targets, scales: &of_targets };
            cuda.loss_finish(&mut e, strips, targets, &mut nats, softcap, true)
        };
        catch_unwind(AssertUnwindSafe(finish)).is_err()
    };
    let refused = |strips, targets, losses| refused_with(None, strips, targets, losses);
    assert!(!refused(2, 2, 2));
    assert!(refused(1, 2, 2) && refused(2, 1, 2) && refused(2, 2, 3));
    assert!(!refused_with(Some(30.0), 2, 2, 2));
    for cap in [0.0, -30.0, f32::NAN, f32::INFINITY] {
        assert!(refused_with(Some(cap), 2, 2, 2), "a soft-cap of {cap}");
    }
}
