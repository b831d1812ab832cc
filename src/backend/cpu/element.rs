//! The two element types, and how a stored weight becomes one.

use std::iter::Sum;
use std::ops::AddAssign;

use bytemuck::Pod;
use half::f16;
use half::slice::HalfFloatSliceExt;
use num_traits::Float;

use crate::model::Dtype;

/// A kernel of the `gemm` crates: m, n, k, (dst, column stride, row stride), read dst?, lhs with strides, rhs
/// with strides, alpha, beta, three conjugations, parallelism.
pub type GemmFn<T> = unsafe fn(
    usize,
    usize,
    usize,
    *mut T,
    isize,
    isize,
    bool,
    *const T,
    isize,
    isize,
    *const T,
    isize,
    isize,
    T,
    T,
    bool,
    bool,
    bool,
    gemm_common::Parallelism,
);

/// Type of activations and of sums inside an op: `f32`, or `f64` for the oracle.
pub trait Element: Float + AddAssign + Sum + Pod + Default + Send + Sync {
    /// Whether this is `f32`.
    const IS_F32: bool;

    /// Nearest value.
    fn of(value: f64) -> Self;
    /// As float64, exactly.
    fn as_f64(self) -> f64;
    /// eˣ in a form the compiler can vectorise, correct to two units in the last place.
    fn fast_exp(self) -> Self;
    /// tanh x in a form the compiler can vectorise, to an absolute error of two units in the last place of 1, and to a
    /// relative one of as much where |x| is small.
    fn fast_tanh(self) -> Self;
    /// The element closest to a float32 (exact for both types).
    fn of_f32(value: f32) -> Self;

    /// The matrix product of the `gemm` crates for this type: dst = alpha·dst + beta·lhs·rhs, each operand
    /// with its column and row stride. The destination's row stride must be 1.
    fn gemm_fn() -> GemmFn<Self>;

    /// Stored elements as they lie, where that is how this type lies in memory.
    fn stored(dtype: Dtype, bytes: &[u8]) -> Option<&[Self]> {
        let as_is = Self::IS_F32 && dtype == Dtype::F32 && cfg!(target_endian = "little");
        bytemuck::try_cast_slice(bytes).ok().filter(|_| as_is)
    }

    /// Widens stored elements, exactly. `bytes` holds `out.len()` elements of `dtype`, little-endian.
    #[inline(always)]
    fn widen(dtype: Dtype, bytes: &[u8], out: &mut [Self]) {
        match dtype {
            Dtype::BF16 => {
                for (out, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *out = Self::of_f32(f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16));
                }
            }
            Dtype::F16 => {
                // 64 at a time through `half`, which uses the machine's conversion instructions.
                let mut halves = [f16::ZERO; 64];
                let mut wide = [0f32; 64];
                for (out, bytes) in out.chunks_mut(64).zip(bytes.chunks(128)) {
                    let n = out.len();
                    for (half, b) in halves.iter_mut().zip(bytes.chunks_exact(2)) {
                        *half = f16::from_le_bytes([b[0], b[1]]);
                    }
                    halves[..n].convert_to_f32_slice(&mut wide[..n]);
                    for (out, &value) in out.iter_mut().zip(&wide) {
                        *out = Self::of_f32(value);
                    }
                }
            }
            Dtype::F32 => {
                for (out, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                    *out = Self::of_f32(f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
                }
            }
        }
    }
}

/// `*into += value` or, where nothing is there yet, `*into = value`: the rule of every backward op.
#[inline(always)]
pub(super) fn store<T: Element>(into: &mut T, value: T, add: bool) {
    *into = if add { *into + value } else { value };
}

impl Element for f64 {
    const IS_F32: bool = false;

    fn of(value: f64) -> Self {
        value
    }
    fn as_f64(self) -> f64 {
        self
    }
    fn of_f32(value: f32) -> Self {
        f64::from(value)
    }
    fn fast_exp(self) -> Self {
        self.exp()
    }
    fn fast_tanh(self) -> Self {
        self.tanh()
    }
    fn gemm_fn() -> GemmFn<Self> {
        gemm_f64::gemm::f64::get_gemm_fn()
    }
}

impl Element for f32 {
    const IS_F32: bool = true;

    #[inline(always)]
    fn of(value: f64) -> Self {
        value as f32
    }
    #[inline(always)]
    fn as_f64(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn of_f32(value: f32) -> Self {
        value
    }

    fn gemm_fn() -> GemmFn<Self> {
        gemm_f32::gemm::f32::get_gemm_fn()
    }

    /// eˣ = 2ⁿ·eʳ with n = round(x/ln 2), |r| ≤ ln 2 / 2, and eʳ by its Taylor polynomial of degree 7
    /// (truncation error 2e-9 relative). Below −86.6 the result is held at 2.5e-38, so that no step is
    /// subnormal, and above 88.7 at 3.3e38; NaN stays NaN.
    #[inline(always)]
    fn fast_exp(self) -> Self {
        // Adding and subtracting 1.5·2²³ rounds to an integer, which then stands in the low bits.
        const ROUND: f32 = 12_582_912.0;
        const LN2_HIGH: f32 = 0.693_359_4;
        const LN2_LOW: f32 = -2.121_944_4e-4;
        // Comparisons, not min/max: those would turn NaN into a number.
        let x = if self < -86.6 { -86.6 } else { self };
        let x = if x > 88.7 { 88.7 } else { x };
        let shifted = x * std::f32::consts::LOG2_E + ROUND;
        let n = shifted - ROUND;
        let r = x - n * LN2_HIGH - n * LN2_LOW;
        let mut p = 1.0 / 5040.0;
        for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            p = p * r + c;
        }
        // n ≤ 128 and 2¹²⁸ is not a float32: multiply by 2ⁿ⁻¹ and then by 2.
        let bits = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32) + 126;
        p * f32::from_bits((bits << 23) as u32) * 2.0
    }

    /// (1 − t)/(1 + t) with t = e^(−2|x|), and where that would cancel the Taylor polynomial of degree 9.
    #[inline(always)]
    fn fast_tanh(self) -> Self {
        let x = self.abs();
        let t = (-2.0 * x).fast_exp();
        let far = (1.0 - t) / (1.0 + t);
        let square = x * x;
        let mut p = 62.0 / 2835.0;
        for c in [-17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0, 1.0] {
            p = p * square + c;
        }
        (if x < 0.25 { x * p } else { far }).copysign(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_right_to_two_ulp() {
        let mut x = -86.6f32;
        while x < 88.6 {
            let exact = f64::from(x).exp();
            let error = (f64::from(x.fast_exp()) - exact).abs() / exact;
            assert!(error < 2.0 * f64::from(f32::EPSILON), "{x}: {error:e}");
            x += 0.000_37 * (1.0 + x.abs());
        }
        assert_eq!(0f32.fast_exp(), 1.0);
        assert!(f32::NAN.fast_exp().is_nan());
        assert!(f32::NEG_INFINITY.fast_exp() < 3e-38);
        assert!(f32::INFINITY.fast_exp() > 3e38);
    }

    #[test]
    fn tanh_is_right_to_two_ulp_of_one() {
        let mut x = 1e-6f32;
        while x < 100.0 {
            let exact = f64::from(x).tanh();
            for x in [x, -x] {
                let error = (f64::from(x.fast_tanh()) - exact.copysign(f64::from(x))).abs();
                let most = 2.0 * f64::from(f32::EPSILON) * if x.abs() < 0.25 { exact } else { 1.0 };
                assert!(error < most, "{x}: {error:e}");
            }
            x *= 1.000_37;
        }
        assert_eq!(0f32.fast_tanh(), 0.0);
        assert!(f32::NAN.fast_tanh().is_nan());
        assert_eq!([f32::INFINITY.fast_tanh(), f32::NEG_INFINITY.fast_tanh()], [1.0, -1.0]);
    }

    #[test]
    fn widening_is_exact() {
        let values = [0.0f32, -1.5, 3.140625, 65504.0, f32::INFINITY];
        for n in [1, 5, 64, 65, 200] {
            let source: Vec<f32> = (0..n).map(|i| values[i % values.len()]).collect();
            let halves: Vec<u8> = source.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect();
            let brains: Vec<u8> =
                source.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect();
            let mut out = vec![0f64; n];
            f64::widen(Dtype::F16, &halves, &mut out);
            assert_eq!(out, source.iter().map(|&v| f64::from(v)).collect::<Vec<_>>());
            f64::widen(Dtype::BF16, &brains, &mut out);
            let expected: Vec<f64> =
                source.iter().map(|&v| f64::from(half::bf16::from_f32(v).to_f32())).collect();
            assert_eq!(out, expected);
        }
    }
}
