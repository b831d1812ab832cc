//! f32 and f64.

use super::support::{Case, Out, check, doubles, singles};

fn total_min(a: f32, b: f32) -> f32 {
    if a == b { if a.is_sign_negative() { a } else { b } } else { a.min(b) }
}

#[test]
fn single_arithmetic() {
    let cases: &[Case] = &[
        ("add.f32 %f, %fa, %fb;", |x| Out::F(x.f(0) + x.f(1))),
        ("add.rn.ftz.f32 %f, %fa, 0f3F800000;", |x| Out::F(x.f(0) + 1.0)),
        ("sub.f32 %f, %fa, %fb;", |x| Out::F(x.f(0) - x.f(1))),
        ("mul.rn.f32 %f, %fa, %fb;", |x| Out::F(x.f(0) * x.f(1))),
        ("fma.rn.f32 %f, %fa, %fb, %fc;", |x| Out::F(x.f(0).mul_add(x.f(1), x.f(2)))),
        ("mad.rn.f32 %f, %fa, %fb, %fc;", |x| Out::F(x.f(0).mul_add(x.f(1), x.f(2)))),
        ("mul.f32 %f, %fa, %fb; add.f32 %f, %f, %fc;", |x| Out::F(x.f(0) * x.f(1) + x.f(2))),
        ("div.rn.f32 %f, %fa, %fb;", |x| Out::F(x.f(0) / x.f(1))),
        ("div.full.f32 %f, %fa, %fb;", |x| Out::F(x.f(0) / x.f(1))),
        ("rcp.approx.ftz.f32 %f, %fa;", |x| Out::F(1.0 / x.f(0))),
        ("sqrt.rn.f32 %f, %fa;", |x| Out::F(x.f(0).sqrt())),
        ("abs.f32 %f, %fa;", |x| Out::F(x.f(0).abs())),
        ("neg.f32 %f, %fa;", |x| Out::F(-x.f(0))),
        ("add.sat.f32 %f, %fa, %fb;", |x| Out::F((x.f(0) + x.f(1)).clamp(0.0, 1.0).max(0.0) + 0.0)),
        ("fma.rn.sat.f32 %f, %fa, %fb, %fc;", |x| {
            Out::F(x.f(0).mul_add(x.f(1), x.f(2)).clamp(0.0, 1.0).max(0.0) + 0.0)
        }),
        ("min.f32 %f, %fa, %fb;", |x| Out::F(total_min(x.f(0), x.f(1)))),
        ("max.f32 %f, %fa, %fb;", |x| Out::F(-total_min(-x.f(0), -x.f(1)))),
        ("min.NaN.f32 %f, %fa, %fb;", |x| {
            Out::F(if x.f(0).is_nan() || x.f(1).is_nan() { f32::NAN } else { total_min(x.f(0), x.f(1)) })
        }),
        ("max.NaN.f32 %f, %fa, %fb;", |x| {
            Out::F(if x.f(0).is_nan() || x.f(1).is_nan() { f32::NAN } else { -total_min(-x.f(0), -x.f(1)) })
        }),
        ("copysign.f32 %f, %fa, %fb;", |x| Out::F(x.f(1).copysign(x.f(0)))),
        ("testp.finite.f32 %p, %fa;", |x| Out::P(x.f(0).is_finite())),
        ("testp.infinite.f32 %p, %fa;", |x| Out::P(x.f(0).is_infinite())),
        ("testp.number.f32 %p, %fa;", |x| Out::P(!x.f(0).is_nan())),
        ("testp.notanumber.f32 %p, %fa;", |x| Out::P(x.f(0).is_nan())),
        ("testp.normal.f32 %p, %fa;", |x| Out::P(x.f(0).is_normal())),
        ("testp.subnormal.f32 %p, %fa;", |x| Out::P(x.f(0).is_subnormal())),
    ];
    check(cases, &singles(1500));
}

/// Whether `got` is `exact` rounded down or up to f32.
fn directed(exact: f64, up: bool) -> f32 {
    let nearest = exact as f32;
    let wrong = if up { f64::from(nearest) < exact } else { f64::from(nearest) > exact };
    match (wrong, up) {
        (false, _) => nearest,
        (true, true) => nearest.next_up(),
        (true, false) => nearest.next_down(),
    }
}

#[test]
fn directed_rounding() {
    // Products are exact in f64, sums of such close exponents too.
    let cases: &[Case] = &[
        ("mul.rm.f32 %f, %fa, %fb;", |x| Out::F(directed(f64::from(x.f(0)) * f64::from(x.f(1)), false))),
        ("mul.rp.f32 %f, %fa, %fb;", |x| Out::F(directed(f64::from(x.f(0)) * f64::from(x.f(1)), true))),
        ("mul.rz.f32 %f, %fa, %fb;", |x| {
            let exact = f64::from(x.f(0)) * f64::from(x.f(1));
            Out::F(directed(exact, exact < 0.0))
        }),
        ("add.rp.f32 %f, %fa, %fb;", |x| Out::F(directed(f64::from(x.f(0)) + f64::from(x.f(1)), true))),
        ("sub.rm.f32 %f, %fa, %fb;", |x| Out::F(directed(f64::from(x.f(0)) - f64::from(x.f(1)), false))),
        ("cvt.rm.f32.f64 %f, %da;", |x| Out::F(directed(x.d(0), false))),
        ("cvt.rp.f32.s32 %f, %a;", |x| Out::F(directed(f64::from(x.s(0)), true))),
    ];
    let inputs: Vec<_> = singles(1500)
        .into_iter()
        .filter(|x| (0..2).all(|i| x.f(i).is_normal() && (1e-9..1e9).contains(&x.f(i).abs())))
        .collect();
    check(cases, &inputs);
}

#[test]
fn double_arithmetic() {
    let cases: &[Case] = &[
        ("add.f64 %d, %da, %db;", |x| Out::D(x.d(0) + x.d(1))),
        ("sub.rn.f64 %d, %da, %db;", |x| Out::D(x.d(0) - x.d(1))),
        ("mul.f64 %d, %da, %db;", |x| Out::D(x.d(0) * x.d(1))),
        ("div.rn.f64 %d, %da, %db;", |x| Out::D(x.d(0) / x.d(1))),
        ("fma.rn.f64 %d, %da, %db, %dc;", |x| Out::D(x.d(0).mul_add(x.d(1), x.d(2)))),
        ("rcp.rn.f64 %d, %da;", |x| Out::D(1.0 / x.d(0))),
        ("sqrt.rn.f64 %d, %da;", |x| Out::D(x.d(0).sqrt())),
        ("abs.f64 %d, %da;", |x| Out::D(x.d(0).abs())),
        ("neg.f64 %d, %da;", |x| Out::D(-x.d(0))),
        ("setp.gtu.f64 %p, %da, %db;", |x| Out::P(!(x.d(0) <= x.d(1)))),
        ("copysign.f64 %d, %da, %db;", |x| Out::D(x.d(1).copysign(x.d(0)))),
    ];
    check(cases, &doubles(600));
}

#[test]
fn single_comparisons() {
    let cases: &[Case] = &[
        ("setp.eq.f32 %p, %fa, %fb;", |x| Out::P(x.f(0) == x.f(1))),
        ("setp.ne.f32 %p, %fa, %fb;", |x| Out::P(x.f(0) < x.f(1) || x.f(0) > x.f(1))),
        ("setp.lt.ftz.f32 %p, %fa, %fb;", |x| Out::P(x.f(0) < x.f(1))),
        ("setp.le.f32 %p, %fa, %fb;", |x| Out::P(x.f(0) <= x.f(1))),
        ("setp.gt.f32 %p, %fa, %fb;", |x| Out::P(x.f(0) > x.f(1))),
        ("setp.ge.f32 %p, %fa, %fb;", |x| Out::P(x.f(0) >= x.f(1))),
        ("setp.equ.f32 %p, %fa, %fb;", |x| Out::P(!(x.f(0) < x.f(1) || x.f(0) > x.f(1)))),
        ("setp.neu.f32 %p, %fa, %fb;", |x| Out::P(x.f(0) != x.f(1))),
        ("setp.ltu.f32 %p, %fa, %fb;", |x| Out::P(!(x.f(0) >= x.f(1)))),
        ("setp.leu.f32 %p, %fa, %fb;", |x| Out::P(!(x.f(0) > x.f(1)))),
        ("setp.gtu.f32 %p, %fa, %fb;", |x| Out::P(!(x.f(0) <= x.f(1)))),
        ("setp.geu.f32 %p, %fa, %fb;", |x| Out::P(!(x.f(0) < x.f(1)))),
        ("setp.num.f32 %p, %fa, %fb;", |x| Out::P(!x.f(0).is_nan() && !x.f(1).is_nan())),
        ("setp.nan.f32 %p, %fa, %fb;", |x| Out::P(x.f(0).is_nan() || x.f(1).is_nan())),
        (".reg .pred q; setp.lt.and.f32 q|%p, %fa, %fb, %pc;", |x| Out::P(!(x.f(0) < x.f(1)) && x.p(2))),
        ("set.ltu.f32.f32 %f, %fa, %fb;", |x| Out::F(f32::from(u8::from(!(x.f(0) >= x.f(1)))))),
        ("slct.f32.f32 %f, %fa, %fb, %fc;", |x| Out::F(if x.f(2) >= 0.0 { x.f(0) } else { x.f(1) })),
    ];
    check(cases, &singles(1500));
}

/// Functions are those of the C library, which Rust calls too.
#[test]
fn functions() {
    let cases: &[Case] = &[
        ("ex2.approx.ftz.f32 %f, %fa;", |x| Out::F(x.f(0).exp2())),
        ("lg2.approx.f32 %f, %fa;", |x| Out::F(x.f(0).log2())),
        ("sin.approx.f32 %f, %fa;", |x| Out::F(x.f(0).sin())),
        ("cos.approx.f32 %f, %fa;", |x| Out::F(x.f(0).cos())),
        ("tanh.approx.f32 %f, %fa;", |x| Out::F(x.f(0).tanh())),
        ("rsqrt.approx.f32 %f, %fa;", |x| Out::F(1.0 / x.f(0).sqrt())),
    ];
    check(cases, &singles(600));
}
