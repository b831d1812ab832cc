//! Per-dimension sums against float64.

use cuemu::launcher::Sanitizer;
use std::ops::Range;

use gradlens::backend::cuda::{Buf, Real};
use gradlens::backend::{Moments, NonFinite};

use super::faults::{Fault, WRONG};
use super::machine::{Machine, Random, machine};

/// What these tests must notice.
pub const FAULTS: &[Fault] = &[
    Fault {
        name: "missing barrier",
        file: "stats.cu",
        from: "__syncthreads();  // stats: the warps' sums are written",
        to: "",
        test: "stats::moments",
        build: Sanitizer::Thread,
        reports: &["ThreadSanitizer: data race"],
    },
    Fault {
        name: "a plain minimum for the atomic one",
        file: "stats.cu",
        from: "atomicMin(non_finite, index)",
        to: "*non_finite = min(*non_finite, index)",
        test: "stats::the_first_sample_that_is_not_finite_is_named",
        build: Sanitizer::Thread,
        reports: &["ThreadSanitizer: data race"],
    },
    Fault {
        name: "one row too many in a segment",
        file: "stats.cu",
        from: "int rows = segment.rows - start;",
        to: "int rows = segment.rows - start + 1;",
        test: "stats::moments",
        build: Sanitizer::None,
        reports: &["instead of", "out of bounds global read"],
    },
    Fault {
        name: "what an addition loses is forgotten",
        file: "stats.cu",
        from: "left += (total - (next - part)) + (value - part);",
        to: "left += 0. * part;",
        test: "stats::sums_keep_what_additions_lose",
        build: Sanitizer::None,
        reports: WRONG,
    },
    Fault {
        name: "a lane's part of a norm is lost",
        file: "stats.cu",
        from: "for (int lanes = 16; lanes > 0; lanes >>= 1) sum +=",
        to: "for (int lanes = 8; lanes > 0; lanes >>= 1) sum +=",
        test: "stats::norms_of_rows",
        build: Sanitizer::None,
        reports: WRONG,
    },
];

/// Samples with rows between them that are not counted; lengths below, at and above those of a warp's eight
/// rows, of a round of the four warps and of a segment.
const SAMPLES: [Range<usize>; 8] = [0..1, 1..8, 10..43, 43..171, 171..300, 300..301, 310..333, 333..600];

fn values<T: Real>(width: usize, of: fn(f32) -> T) -> Vec<T> {
    Random::new(width as u64).f32(SAMPLES[7].end * width).into_iter().map(of).collect()
}

/// Sums of `samples`, handed over in calls of so many samples each.
fn sums<T: Real>(machine: &Machine, values: &[T], width: usize, calls: &[usize]) -> Moments {
    let cuda = &machine.cuda;
    let mut moments = cuda.new_moments(width).unwrap();
    let mut left = &SAMPLES[..];
    for &count in calls {
        let (samples, rest) = left.split_at(count);
        left = rest;
        // A chunk of its own, in which the samples lie elsewhere.
        let (start, end) = (samples[0].start, samples[count - 1].end);
        let x = Buf::from_host(&cuda.device.memory, &values[start * width..end * width], width).unwrap();
        let samples: Vec<_> = samples.iter().map(|rows| rows.start - start..rows.end - start).collect();
        cuda.add_moments(&x, &samples, &mut moments).unwrap().wait().unwrap().unwrap();
    }
    moments.to_host().unwrap()
}

fn check<T: Real>(machine: &Machine, width: usize, of: fn(f32) -> T, wide: fn(&T) -> f64) {
    let values = values(width, of);
    let found = machine.same_under_all_schedules(|| sums(machine, &values, width, &[8]));
    let mut wanted = Moments::new(width);
    for row in SAMPLES.into_iter().flatten() {
        for column in 0..width {
            let value = wide(&values[row * width + column]);
            wanted.sum[column] += value;
            wanted.sum_abs[column] += value.abs();
            wanted.sum_sq[column] += value * value;
            wanted.max_abs[column] = wanted.max_abs[column].max(value.abs());
        }
        wanted.count += 1;
    }
    let what = format!("{} {width}", T::NAME);
    assert_eq!(found.count, wanted.count);
    // Eight roundings between a value and its sum, one more in its square.
    let rounding = 9.0 * 2f64.powi(-24);
    for column in 0..width {
        let (abs, sq) = (wanted.sum_abs[column], wanted.sum_sq[column]);
        for (found, wanted, scale) in [
            (found.sum[column], wanted.sum[column], abs),
            (found.sum_abs[column], abs, abs),
            (found.sum_sq[column], sq, sq),
        ] {
            let error = (found - wanted).abs() / scale;
            assert!(error <= rounding, "{what} [{column}]: relative error {error:e}, {found} {wanted}");
        }
    }
    assert_eq!(found.max_abs, wanted.max_abs, "{what}");
    for calls in [&[1; 8][..], &[3, 4, 1]] {
        assert!(sums(machine, &values, width, calls) == found, "{what}: other bytes in calls of {calls:?}");
    }
}

#[test]
fn moments() {
    let Some(machine) = machine() else { return };
    for width in [1, 7, 64, 100, 264, 515].into_iter().filter(|width| machine.affordable(16 * width)) {
        check(&machine, width, |value| value, |value| f64::from(*value));
        check(&machine, width, half::bf16::from_f32, |value| value.to_f64());
    }
}

/// Many short samples: more segments than are summed at a time.
#[test]
fn many_samples() {
    let Some(machine) = machine() else { return };
    let (cuda, width, count) = (&machine.cuda, 8, 600);
    let values: Vec<f32> = (0..2 * count * width).map(|index| (index % 97) as f32).collect();
    let x = Buf::from_host(&cuda.device.memory, &values, width).unwrap();
    let samples: Vec<_> = (0..count).map(|sample| 2 * sample..2 * sample + 2).collect();
    let mut moments = cuda.new_moments(width).unwrap();
    cuda.add_moments(&x, &samples, &mut moments).unwrap().wait().unwrap().unwrap();
    let found = moments.to_host().unwrap();
    for column in 0..width {
        let of_column = || values.iter().skip(column).step_by(width).map(|value| f64::from(*value));
        // Integers: exact.
        assert_eq!(found.sum[column], of_column().sum::<f64>());
        assert_eq!(found.sum_sq[column], of_column().map(|value| value * value).sum::<f64>());
    }
    let x = {
        let mut values = values;
        values[2 * 599 * width + 3] = f32::NAN;
        values[2 * 300 * width] = f32::INFINITY;
        Buf::from_host(&cuda.device.memory, &values, width).unwrap()
    };
    let found = cuda.add_moments(&x, &samples, &mut moments).unwrap().wait().unwrap();
    assert_eq!(found, Err(NonFinite(300)));
}

#[test]
fn the_first_sample_that_is_not_finite_is_named() {
    let Some(machine) = machine() else { return };
    let cuda = &machine.cuda;
    let samples = [0..130, 130..150, 150..290];
    for width in [136, 7] {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for (rows, wanted) in
                [(&[129][..], Some(0)), (&[149, 131], Some(1)), (&[289, 279], Some(2)), (&[291], None)]
            {
                let mut values = Random::new(9).f32(292 * width);
                for (index, row) in rows.iter().enumerate() {
                    values[row * width + (width - 1) * (index % 2)] = bad;
                }
                let narrow: Vec<_> = values.iter().copied().map(half::bf16::from_f32).collect();
                let mut moments = cuda.new_moments(width).unwrap();
                let x = Buf::from_host(&cuda.device.memory, &values, width).unwrap();
                let found = cuda.add_moments(&x, &samples, &mut moments).unwrap().wait().unwrap();
                assert_eq!(found.err(), wanted.map(NonFinite), "{width} {bad} {rows:?}");
                let x = Buf::from_host(&cuda.device.memory, &narrow, width).unwrap();
                let found = cuda.add_moments(&x, &samples, &mut moments).unwrap().wait().unwrap();
                assert_eq!(found.err(), wanted.map(NonFinite), "{width} {bad} {rows:?}");
            }
        }
    }
}

#[test]
fn nothing_to_add() {
    let Some(machine) = machine() else { return };
    let cuda = &machine.cuda;
    let x = Buf::from_host(&cuda.device.memory, &[1.0_f32; 8], 4).unwrap();
    let mut moments = cuda.new_moments(4).unwrap();
    for samples in [vec![], vec![1..1, 2..2]] {
        cuda.add_moments(&x, &samples, &mut moments).unwrap().wait().unwrap().unwrap();
    }
    let mut found = moments.to_host().unwrap();
    found.round();
    assert_eq!(found, Moments::new(4));
}

/// What disappears in a float64 sum of large numbers is kept beside it.
#[test]
fn sums_keep_what_additions_lose() {
    let Some(machine) = machine() else { return };
    let cuda = &machine.cuda;
    let large = 2f32.powi(60);
    let values = [large, 1.0, 3.0, -large];
    let sum = |calls: &[&[usize]]| {
        let x = Buf::from_host(&cuda.device.memory, &values, 1).unwrap();
        let mut moments = cuda.new_moments(1).unwrap();
        for rows in calls {
            let samples: Vec<_> = rows.iter().map(|row| *row..row + 1).collect();
            cuda.add_moments(&x, &samples, &mut moments).unwrap().wait().unwrap().unwrap();
        }
        let mut found = moments.to_host().unwrap();
        found.round();
        found.sum[0]
    };
    for found in [sum(&[&[0, 1, 2, 3]]), sum(&[&[0], &[1, 2], &[3]])] {
        assert_eq!(found, 4.0, "{found} instead of 4");
    }
}

/// Each row's, whatever stands beside it.
#[test]
fn norms_of_rows() {
    let Some(machine) = machine() else { return };
    fn check<T: Real>(machine: &Machine, width: usize, of: fn(f32) -> T, wide: fn(&T) -> f64) {
        const ROWS: usize = 11;
        let cuda = &machine.cuda;
        let values: Vec<T> = Random::new(3).f32(ROWS * width).into_iter().map(of).collect();
        let norms = |rows: Range<usize>| {
            let values = &values[rows.start * width..rows.end * width];
            let x = Buf::from_host(&cuda.device.memory, values, width).unwrap();
            cuda.row_norms(&x).unwrap()
        };
        let found = machine.same_under_all_schedules(|| norms(0..ROWS));
        for (row, (found, values)) in found.iter().zip(values.chunks(width)).enumerate() {
            let wanted = values.iter().map(|value| wide(value) * wide(value)).sum::<f64>().sqrt();
            let error = (found / wanted - 1.0).abs();
            assert!(error <= 1e-13, "{width} [{row}]: {found} instead of {wanted}");
            assert!(norms(row..row + 1) == [*found], "{width} [{row}]: another norm beside other rows");
        }
    }
    for width in [1, 7, 32, 100, 515] {
        check(&machine, width, |value| value, |value| f64::from(*value));
        check(&machine, width, half::bf16::from_f32, |value| value.to_f64());
    }
    // Squares leave float32, and no row at all.
    let x = Buf::from_host(&machine.cuda.device.memory, &[3e30_f32, 4e30, f32::NAN, 1.0], 2).unwrap();
    let found = machine.cuda.row_norms(&x).unwrap();
    assert!((found[0] / 5e30 - 1.0).abs() < 1e-6 && found[1].is_nan(), "{found:?}");
    let nothing = Buf::from_host(&machine.cuda.device.memory, &[0_f32; 0], 2).unwrap();
    assert!(machine.cuda.row_norms(&nothing).unwrap().is_empty());
}
