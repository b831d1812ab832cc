//! f16 and bf16: conversions and arithmetic, rounded once.

use super::support::{Case, Input, Out, Random, check, singles};

/// A format of 16 bits by the size of its mantissa and its exponent range.
struct Format {
    mantissa: i32,
    lowest: i32,
    highest: i32,
}

const F16: Format = Format { mantissa: 10, lowest: -14, highest: 15 };
const BF16: Format = Format { mantissa: 7, lowest: -126, highest: 127 };

impl Format {
    fn widen(&self, bits: u16) -> f64 {
        let sign = if bits >> 15 == 1 { -1.0 } else { 1.0 };
        let exponent = i32::from(bits & 0x7FFF) >> self.mantissa;
        let fraction = f64::from(i32::from(bits) & ((1 << self.mantissa) - 1));
        let unit = 2_f64.powi(self.lowest - self.mantissa);
        if exponent == 0 {
            return sign * fraction * unit;
        }
        if exponent > self.highest - self.lowest + 1 {
            return if fraction == 0.0 { sign * f64::INFINITY } else { f64::NAN };
        }
        sign * (fraction + f64::from(1 << self.mantissa)) * unit * 2_f64.powi(exponent - 1)
    }

    /// To the nearest, ties to even; `exact` has to be exact.
    fn narrow(&self, exact: f64) -> u16 {
        if exact.is_nan() {
            return 0x7FFF;
        }
        let sign = u16::from(exact.is_sign_negative()) << 15;
        let size = exact.abs();
        let infinity = i64::from(self.highest - self.lowest + 2) << self.mantissa;
        // The spacing of representable numbers near `size`; sizes beyond the largest become infinity.
        let exponent = (((size.to_bits() >> 52) as i32) - 1023).clamp(self.lowest, self.highest);
        let steps = (size / 2_f64.powi(exponent - self.mantissa)).round_ties_even().min(1e6) as i64;
        sign | ((i64::from(exponent - self.lowest) << self.mantissa) + steps).min(infinity) as u16
    }
}

/// One operation on both halves.
fn both(x: &Input, f: impl Fn(u16, u16, u16) -> u16) -> Out {
    let half = |i: usize, high: bool| if high { (x.r(i) >> 16) as u16 } else { x.h(i) };
    let result = |high| f(half(0, high), half(1, high), half(2, high));
    Out::R(u32::from(result(false)) | u32::from(result(true)) << 16)
}

fn relu(a: f32) -> f64 {
    if a < 0.0 { 0.0 } else { f64::from(a) }
}

#[test]
fn from_singles() {
    let cases: &[Case] = &[
        ("cvt.rn.bf16.f32 %h, %fa;", |x| Out::H(BF16.narrow(f64::from(x.f(0))))),
        ("cvt.rn.f16.f32 %h, %fa;", |x| Out::H(F16.narrow(f64::from(x.f(0))))),
        ("cvt.rz.bf16.f32 %h, %fa;", |x| {
            Out::H(if x.f(0).is_nan() { 0x7FFF } else { (x.r(0) >> 16) as u16 })
        }),
        ("cvt.rn.relu.bf16.f32 %h, %fa;", |x| Out::H(BF16.narrow(relu(x.f(0))) & 0x7FFF)),
        ("cvt.rn.bf16x2.f32 %r, %fa, %fb;", |x| {
            let [high, low] = [0, 1].map(|i| u32::from(BF16.narrow(f64::from(x.f(i)))));
            Out::R(high << 16 | low)
        }),
        ("cvt.rn.f16x2.f32 %r, %fa, %fb;", |x| {
            let [high, low] = [0, 1].map(|i| u32::from(F16.narrow(f64::from(x.f(i)))));
            Out::R(high << 16 | low)
        }),
    ];
    check(cases, &singles(1500));
}

/// Pairs of halves: any pattern, near-ones and the special ones.
fn patterns(count: usize) -> Vec<Input> {
    let mut random = Random(5);
    const SPECIAL: [u64; 8] = [0, 0x8000, 0x3C00, 0x3F80, 0x7C00, 0xFF80, 0x7FFF, 1];
    let mut half = || match random.next() % 4 {
        0 => SPECIAL[(random.next() % 8) as usize],
        1 => 0x3C00 + random.next() % 0x500,
        _ => random.next() & 0xFFFF,
    };
    (0..count).map(|_| Input { raw: [0; 3].map(|_| half() | half() << 16) }).collect()
}

#[test]
fn to_others() {
    let cases: &[Case] = &[
        ("cvt.f32.bf16 %f, %ha;", |x| Out::F(BF16.widen(x.h(0)) as f32)),
        ("cvt.f32.f16 %f, %ha;", |x| Out::F(F16.widen(x.h(0)) as f32)),
        ("cvt.f64.f16 %d, %ha;", |x| Out::D(F16.widen(x.h(0)))),
        ("cvt.rn.bf16.f16 %h, %ha;", |x| Out::H(BF16.narrow(F16.widen(x.h(0))))),
        ("cvt.rzi.s32.f16 %r, %ha;", |x| Out::R(F16.widen(x.h(0)) as i32 as u32)),
        ("cvt.rn.f16.s32 %h, %a;", |x| Out::H(F16.narrow(f64::from(x.s(0))))),
        ("setp.lt.bf16 %p, %ha, %hb;", |x| Out::P(BF16.widen(x.h(0)) < BF16.widen(x.h(1)))),
        ("setp.gtu.f16 %p, %ha, %hb;", |x| Out::P(!(F16.widen(x.h(0)) <= F16.widen(x.h(1))))),
    ];
    check(cases, &patterns(1500));
}

#[test]
fn arithmetic() {
    // Sums and products of two bf16 or f16 need at most 53 bits here, but for the rarest exponents.
    let cases: &[Case] = &[
        ("add.rn.f16 %h, %ha, %hb;", |x| Out::H(F16.narrow(F16.widen(x.h(0)) + F16.widen(x.h(1))))),
        ("sub.f16 %h, %ha, %hb;", |x| Out::H(F16.narrow(F16.widen(x.h(0)) - F16.widen(x.h(1))))),
        ("mul.bf16 %h, %ha, %hb;", |x| Out::H(BF16.narrow(BF16.widen(x.h(0)) * BF16.widen(x.h(1))))),
        ("fma.rn.f16 %h, %ha, %hb, %hc;", |x| {
            Out::H(F16.narrow(F16.widen(x.h(0)) * F16.widen(x.h(1)) + F16.widen(x.h(2))))
        }),
        ("neg.bf16 %h, %ha;", |x| Out::H(x.h(0) ^ 0x8000)),
        ("abs.f16 %h, %ha;", |x| Out::H(x.h(0) & 0x7FFF)),
        ("mul.rn.f16x2 %r, %a, %b;", |x| both(x, |a, b, _| F16.narrow(F16.widen(a) * F16.widen(b)))),
        ("add.rn.bf16x2 %r, %a, %b;", |x| both(x, |a, b, _| BF16.narrow(BF16.widen(a) + BF16.widen(b)))),
        ("fma.rn.bf16x2 %r, %a, %b, %c;", |x| {
            both(x, |a, b, c| BF16.narrow(BF16.widen(a).mul_add(BF16.widen(b), BF16.widen(c))))
        }),
        ("neg.f16x2 %r, %a;", |x| both(x, |a, _, _| a ^ 0x8000)),
        ("max.bf16x2 %r, %a, %b;", |x| {
            both(x, |a, b, _| {
                let (wide_a, wide_b) = (BF16.widen(a), BF16.widen(b));
                if wide_a == wide_b { a & b } else { BF16.narrow(wide_a.max(wide_b)) }
            })
        }),
        ("ex2.approx.ftz.bf16 %h, %ha;", |x| Out::H(BF16.narrow(BF16.widen(x.h(0)).exp2()))),
        ("tanh.approx.f16x2 %r, %a;", |x| both(x, |a, _, _| F16.narrow(F16.widen(a).tanh()))),
    ];
    check(cases, &patterns(1500));
}
