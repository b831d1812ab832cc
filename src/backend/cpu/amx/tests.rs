//! Every test passes without checking anything where the processor has no tile unit.

use half::{bf16, f16};

use super::*;
use crate::model::Dtype;

const DTYPES: [Dtype; 3] = [Dtype::BF16, Dtype::F16, Dtype::F32];

/// A repeatable source of numbers.
struct Source(u64);

impl Source {
    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Near-normal: a sum of uniform numbers with variance 1.
    fn normal(&mut self) -> f32 {
        (0..12).map(|_| (self.bits() >> 40) as f32 / (1u64 << 24) as f32).sum::<f32>() - 6.0
    }

    fn normals(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.normal()).collect()
    }
}

/// A stored [rows, width] matrix that starts at an odd address, and its values.
struct Weight {
    bytes: Vec<u8>,
    values: Vec<f32>,
    dtype: Dtype,
    width: usize,
}

impl Weight {
    fn new(dtype: Dtype, values: &[f32], width: usize) -> Self {
        let (mut bytes, mut stored) = (vec![0xff], Vec::new());
        for &value in values {
            match dtype {
                Dtype::BF16 => {
                    bytes.extend(bf16::from_f32(value).to_le_bytes());
                    stored.push(bf16::from_f32(value).to_f32());
                }
                Dtype::F16 => {
                    bytes.extend(f16::from_f32(value).to_le_bytes());
                    stored.push(f16::from_f32(value).to_f32());
                }
                Dtype::F32 => {
                    bytes.extend(value.to_le_bytes());
                    stored.push(value);
                }
            }
        }
        let offset = 1 + bytes.as_ptr().addr() % 2;
        bytes.splice(..1, vec![0xff; offset]);
        Self { bytes, values: stored, dtype, width }
    }

    fn stored(&self) -> Stored<'_> {
        let start = self.bytes.len() - self.values.len() * self.dtype.size_bytes();
        Stored { bytes: &self.bytes[start..], dtype: self.dtype, width: self.width }
    }

    fn rows(&self) -> usize {
        self.values.len() / self.width
    }

    /// Weight between output column `col` and depth `k`.
    fn get(&self, forward: bool, col: usize, k: usize) -> f64 {
        f64::from(if forward { self.values[col * self.width + k] } else { self.values[k * self.width + col] })
    }
}

/// Memory as a pool would return it: full of old values and not aligned.
fn dirty(len: usize) -> Vec<f32> {
    vec![f32::NAN; len + 3]
}

/// x·Wᵀ (`forward`) or x·W for the output columns `cols`, written into or added to `dst`.
fn product(
    amx: Amx,
    x: &[f32],
    rows: usize,
    weight: &Weight,
    forward: bool,
    cols: std::ops::Range<usize>,
    dst: &mut [f32],
    row_stride: usize,
    add: bool,
) {
    let depth = if forward { weight.width } else { weight.rows() };
    let mut left_space = dirty(Left::space(rows, depth));
    let mut right_space = dirty(Right::space(weight.dtype, depth, cols.len()));
    let count = cols.len();
    let left = Left::new(amx, x, rows, depth, &mut left_space[3..]);
    let right = if forward {
        Right::from_rows(amx, weight.stored(), cols, &mut right_space[3..])
    } else {
        Right::from_columns(amx, weight.stored(), cols, &mut right_space[3..])
    };
    assert!(rows == 0 || (rows - 1) * row_stride + count <= dst.len());
    // SAFETY: dst is exclusively borrowed and has these rows, as just checked.
    unsafe { multiply(&left, &right, dst.as_mut_ptr(), (left.rows, right.cols), row_stride, add) };
}

/// The same over all columns, as a fresh [rows, cols].
fn whole(amx: Amx, x: &[f32], rows: usize, weight: &Weight, forward: bool) -> Vec<f32> {
    let cols = if forward { weight.rows() } else { weight.width };
    let mut out = vec![f32::NAN; rows * cols];
    product(amx, x, rows, weight, forward, 0..cols, &mut out, cols, false);
    out
}

#[track_caller]
fn check(amx: Amx, dtype: Dtype, forward: bool, [rows, depth, cols]: [usize; 3], add: bool) {
    let mut source = Source(0x9e37_79b9 + (rows * 10_007 + depth * 101 + cols) as u64);
    let x = source.normals(rows * depth);
    let width = if forward { depth } else { cols };
    let weight = Weight::new(dtype, &source.normals(depth * cols), width);
    // Columns outside the destination must not change.
    let stride = cols + 5;
    let before = source.normals(rows * stride);
    let mut after = before.clone();
    product(amx, &x, rows, &weight, forward, 0..cols, &mut after[2..], stride, add);
    for (row, x) in x.chunks_exact(depth).enumerate() {
        for col in 0..cols {
            let old = f64::from(before[row * stride + 2 + col]);
            let terms = || (0..depth).map(|k| f64::from(x[k]) * weight.get(forward, col, k));
            let expected = terms().sum::<f64>() + if add { old } else { 0.0 };
            let size = terms().map(f64::abs).sum::<f64>() + old.abs();
            let error = (f64::from(after[row * stride + 2 + col]) - expected).abs();
            let what = format!("{dtype:?} {forward} [{rows}, {depth}, {cols}] add {add}: {row}, {col}");
            assert!(error <= 3.0 * f64::from(f32::EPSILON) * size, "{what}: {error:e} of {size:e}");
        }
        let outside =
            |all: &[f32]| [&all[row * stride..][..2], &all[row * stride + 2 + cols..][..3]].concat();
        assert_eq!(outside(&after), outside(&before));
    }
}

#[test]
fn every_size_is_right() {
    let Some(amx) = Amx::get() else { return };
    for dtype in DTYPES {
        for forward in [true, false] {
            for n in 1..=70 {
                check(amx, dtype, forward, [n, 67, 37], n % 2 == 0);
                check(amx, dtype, forward, [37, n, 67], n % 2 == 1);
                check(amx, dtype, forward, [67, 37, n], n % 2 == 0);
                check(amx, dtype, forward, [n, n, n], n % 2 == 1);
            }
            // One, two and three runs of steps.
            for depth in [1023, 1024, 1025, 2080] {
                check(amx, dtype, forward, [64, depth, 64], false);
                check(amx, dtype, forward, [33, depth, 65], true);
            }
        }
    }
}

/// With one weight of 1 the sum of an element's parts is the element.
#[test]
fn the_left_operand_is_split_exactly() {
    let Some(amx) = Amx::get() else { return };
    let mut source = Source(7);
    let mut x = vec![f32::MAX, f32::MIN, f32::MAX.next_down(), 0.0, 1.0, f32::EPSILON];
    // Any bits of a number whose last part is not subnormal.
    let any = std::iter::repeat_with(|| f32::from_bits(source.bits() as u32));
    x.extend(any.filter(|x| x.is_finite() && x.abs() > 2f32.powi(-102)).take(100_000));
    for dtype in DTYPES {
        assert_eq!(whole(amx, &x, x.len(), &Weight::new(dtype, &[1.0], 1), true), x);
    }
}

/// Every stored element times 1, in both layouts.
#[test]
fn weights_are_split_exactly() {
    let Some(amx) = Amx::get() else { return };
    let f16s: Vec<f32> = (0..=u16::MAX).map(|bits| f16::from_bits(bits).to_f32()).collect();
    let bf16s: Vec<f32> = (0..=u16::MAX).map(|bits| bf16::from_bits(bits).to_f32()).collect();
    let mut source = Source(8);
    let f32s: Vec<f32> = (0..100_000).map(|_| f32::from_bits(source.bits() as u32)).collect();
    for (dtype, values) in [(Dtype::F16, f16s), (Dtype::BF16, bf16s), (Dtype::F32, f32s)] {
        let smallest = if dtype == Dtype::F32 { 2f32.powi(-102) } else { f32::MIN_POSITIVE };
        let keep = |x: &f32| x.is_finite() && (*x == 0.0 || x.abs() >= smallest);
        let values: Vec<f32> = values.into_iter().filter(keep).collect();
        for forward in [true, false] {
            let width = if forward { 1 } else { values.len() };
            let weight = Weight::new(dtype, &values, width);
            assert_eq!(weight.values, values);
            assert_eq!(whole(amx, &[1.0], 1, &weight, forward), values, "{dtype:?}");
        }
    }
}

#[test]
fn a_row_does_not_depend_on_others() {
    let Some(amx) = Amx::get() else { return };
    let mut source = Source(3);
    let (rows, depth, cols) = (100, 1500, 70);
    let x = source.normals(rows * depth);
    for (dtype, forward) in DTYPES.into_iter().flat_map(|dtype| [(dtype, true), (dtype, false)]) {
        let weight = Weight::new(dtype, &source.normals(depth * cols), if forward { depth } else { cols });
        let all = whole(amx, &x, rows, &weight, forward);
        for (first, last) in [(0, 1), (5, 6), (31, 33), (0, 99), (17, 100)] {
            let some = whole(amx, &x[first * depth..last * depth], last - first, &weight, forward);
            assert_eq!(some, all[first * cols..last * cols], "{dtype:?} rows {first} to {last}");
        }
        for (first, last) in [(0, 1), (15, 17), (3, 70), (69, 70)] {
            let mut some = vec![0.0; rows * cols];
            product(amx, &x, rows, &weight, forward, first..last, &mut some[first..], cols, false);
            for (some, all) in some.chunks_exact(cols).zip(all.chunks_exact(cols)) {
                assert_eq!(some[first..last], all[first..last], "{dtype:?} columns {first} to {last}");
            }
        }
        // Adding to zeros goes another way through memory.
        let mut added = vec![0.0; rows * cols];
        product(amx, &x, rows, &weight, forward, 0..cols, &mut added, cols, true);
        assert_eq!(added, all);
    }
}

#[test]
fn threads_do_not_matter() {
    let Some(amx) = Amx::get() else { return };
    let mut source = Source(4);
    let (rows, depth) = (700, 300);
    let x = source.normals(rows * depth);
    let weight = Weight::new(Dtype::BF16, &source.normals(depth * 40), depth);
    let [one, four] = [1, 4].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| whole(amx, &x, rows, &weight, true))
    });
    assert_eq!(one, four);
}

#[test]
fn what_is_not_finite_stays_in_its_row() {
    let Some(amx) = Amx::get() else { return };
    let mut source = Source(5);
    let (rows, depth, cols) = (40, 100, 40);
    let clean = source.normals(rows * depth);
    // A NaN whose upper half alone reads infinity.
    let hidden = f32::from_bits(0x7f80_0001);
    for bad in [f32::NAN, hidden, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = clean.clone();
        x[33 * depth + 77] = bad;
        for (dtype, forward) in DTYPES.into_iter().flat_map(|dtype| [(dtype, true), (dtype, false)]) {
            let values: Vec<f32> = source.normals(depth * cols).iter().map(|w| w.abs() + 0.1).collect();
            let weight = Weight::new(dtype, &values, if forward { depth } else { cols });
            let expected = whole(amx, &clean, rows, &weight, forward);
            let out = whole(amx, &x, rows, &weight, forward);
            for (row, (out, expected)) in out.chunks(cols).zip(expected.chunks(cols)).enumerate() {
                if row != 33 {
                    assert_eq!(out, expected);
                } else if bad.is_nan() {
                    assert!(out.iter().all(|y| y.is_nan()));
                } else if dtype == Dtype::BF16 {
                    assert!(out.iter().all(|&y| y == bad));
                } else {
                    assert!(out.iter().all(|y| !y.is_finite()));
                }
            }
        }
    }
    for bad in [f32::NAN, f32::INFINITY] {
        for dtype in DTYPES {
            let mut values = source.normals(depth * cols);
            values[7 * depth + 50] = bad;
            let out = whole(amx, &clean, rows, &Weight::new(dtype, &values, depth), true);
            for (index, y) in out.iter().enumerate() {
                assert_eq!(y.is_finite(), index % cols != 7, "{dtype:?} {bad}");
            }
        }
    }
}

/// Relative L2 error of each row, in the mean; float32 multiply-adds make 4e-7 of normal numbers.
#[test]
fn errors_are_those_of_float32() {
    let Some(amx) = Amx::get() else { return };
    let (rows, depth, cols) = (8, 4864, 24);
    for (dtype, wild) in DTYPES.into_iter().flat_map(|dtype| [(dtype, false), (dtype, true)]) {
        let mut source = Source(6);
        let mut x = source.normals(rows * depth);
        if wild {
            x.iter_mut().for_each(|x| *x *= 10f32.powf((source.bits() % 4000) as f32 / 100.0 - 20.0));
        }
        let weight = Weight::new(dtype, &source.normals(depth * cols), depth);
        let out = whole(amx, &x, rows, &weight, true);
        for (x, out) in x.chunks_exact(depth).zip(out.chunks_exact(cols)) {
            let (mut error, mut size) = (0.0, 0.0);
            for (col, &y) in out.iter().enumerate() {
                let exact: f64 = (0..depth).map(|k| f64::from(x[k]) * weight.get(true, col, k)).sum();
                error += (f64::from(y) - exact).powi(2);
                size += exact * exact;
            }
            let error = (error / size).sqrt();
            assert!(error < 5e-7, "{dtype:?} wild {wild}: {error:e}");
        }
    }
}

#[test]
fn empty_operands_are_allowed() {
    let Some(amx) = Amx::get() else { return };
    let weight = Weight::new(Dtype::BF16, &[1.0; 6], 2);
    assert!(whole(amx, &[], 0, &weight, true).is_empty());
    product(amx, &[1.0, 2.0], 1, &weight, true, 1..1, &mut [], 0, false);
}
