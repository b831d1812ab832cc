//! `cvt` and `mov`.

use super::support::{Case, Out, check, doubles, integers, singles};

#[test]
fn between_integers() {
    let cases: &[Case] = &[
        ("cvt.u64.u32 %l, %a;", |x| Out::L(u64::from(x.r(0)))),
        ("cvt.s64.s32 %l, %a;", |x| Out::L(i64::from(x.s(0)) as u64)),
        ("cvt.s32.s16 %r, %ha;", |x| Out::R(i32::from(x.h(0) as i16) as u32)),
        ("cvt.u32.u16 %r, %ha;", |x| Out::R(u32::from(x.h(0)))),
        ("cvt.u16.u32 %h, %a;", |x| Out::H(x.r(0) as u16)),
        ("cvt.s32.s8 %r, %a;", |x| Out::R(i32::from(x.r(0) as i8) as u32)),
        ("cvt.u32.u8 %r, %a;", |x| Out::R(u32::from(x.r(0) as u8))),
        ("cvt.u8.u32 %h, %a;", |x| Out::H(u16::from(x.r(0) as u8))),
        ("cvt.u32.u64 %r, %la;", |x| Out::R(x.l(0) as u32)),
        ("cvt.sat.s8.s32 %r, %a;", |x| Out::R(i32::from(x.s(0).clamp(-128, 127) as i8) as u32)),
        ("cvt.sat.u16.s32 %h, %a;", |x| Out::H(x.s(0).clamp(0, 65535) as u16)),
        ("cvt.sat.u32.s64 %r, %la;", |x| Out::R(x.sl(0).clamp(0, i64::from(u32::MAX)) as u32)),
        ("mov.b64 {%r, _}, %la;", |x| Out::R(x.l(0) as u32)),
        ("mov.b64 {_, %r}, %da;", |x| Out::R((x.l(0) >> 32) as u32)),
        ("mov.b64 %l, {%a, %b};", |x| Out::L(u64::from(x.r(0)) | u64::from(x.r(1)) << 32)),
        ("mov.b64 %d, {%a, %b};", |x| Out::L(u64::from(x.r(0)) | u64::from(x.r(1)) << 32).as_double()),
        ("mov.b32 %r, {%ha, %hb};", |x| Out::R(u32::from(x.h(0)) | u32::from(x.h(1)) << 16)),
        ("mov.b64 %l, {%ha, %hb, %hc, %ha};", |x| {
            Out::L((0..4).map(|i| u64::from(x.h(i % 3)) << (16 * i)).fold(0, |a, b| a | b))
        }),
        ("mov.f32 %f, %fa;", |x| Out::F(x.f(0))),
        ("mov.b32 %r, %fa;", |x| Out::R(x.r(0))),
        ("mov.b32 %f, %a;", |x| Out::F(x.f(0))),
        ("mov.pred %p, %pa;", |x| Out::P(x.p(0))),
        ("mov.u32 %r, -5;", |_| Out::R(5_u32.wrapping_neg())),
        ("mov.u64 %l, 0xFFFFFFFFFFFFFFFF;", |_| Out::L(u64::MAX)),
        ("mov.s64 %l, -9223372036854775808;", |_| Out::L(1 << 63)),
        ("mov.b32 %r, 0f3F800000;", |_| Out::R(0x3F80_0000)),
        ("mov.f32 %f, 1.5;", |_| Out::F(1.5)),
        ("mov.f64 %d, -0.25;", |_| Out::D(-0.25)),
        ("mov.u32 %r, 0x1fU;", |_| Out::R(31)),
        ("mov.u32 %r, 017;", |_| Out::R(15)),
        ("mov.u32 %r, 0b101;", |_| Out::R(5)),
    ];
    check(cases, &integers(300));
}

impl Out {
    fn as_double(self) -> Self {
        match self {
            Self::L(bits) => Self::D(f64::from_bits(bits)),
            other => other,
        }
    }
}

#[test]
fn integers_to_floats() {
    let cases: &[Case] = &[
        ("cvt.rn.f32.s32 %f, %a;", |x| Out::F(x.s(0) as f32)),
        ("cvt.rn.f32.u32 %f, %a;", |x| Out::F(x.r(0) as f32)),
        ("cvt.rn.f32.s64 %f, %la;", |x| Out::F(x.sl(0) as f32)),
        ("cvt.rn.f32.u64 %f, %la;", |x| Out::F(x.l(0) as f32)),
        ("cvt.rn.f64.s32 %d, %a;", |x| Out::D(f64::from(x.s(0)))),
        ("cvt.rn.f64.u64 %d, %la;", |x| Out::D(x.l(0) as f64)),
        ("cvt.rn.f32.s16 %f, %ha;", |x| Out::F(f32::from(x.h(0) as i16))),
        ("cvt.rn.f32.u8 %f, %ha;", |x| Out::F(f32::from(x.h(0) as u8))),
        ("cvt.rz.f32.u32 %f, %a;", |x| {
            let nearest = x.r(0) as f32;
            Out::F(if f64::from(nearest) > f64::from(x.r(0)) { nearest.next_down() } else { nearest })
        }),
    ];
    check(cases, &integers(600));
}

#[test]
fn singles_to_others() {
    let cases: &[Case] = &[
        ("cvt.rzi.s32.f32 %r, %fa;", |x| Out::R(x.f(0) as i32 as u32)),
        ("cvt.rzi.u32.f32 %r, %fa;", |x| Out::R(x.f(0) as u32)),
        ("cvt.rni.s32.f32 %r, %fa;", |x| Out::R(x.f(0).round_ties_even() as i32 as u32)),
        ("cvt.rmi.s32.f32 %r, %fa;", |x| Out::R(x.f(0).floor() as i32 as u32)),
        ("cvt.rpi.ftz.s32.f32 %r, %fa;", |x| Out::R(x.f(0).ceil() as i32 as u32)),
        ("cvt.rzi.s16.f32 %h, %fa;", |x| Out::H(x.f(0) as i16 as u16)),
        ("cvt.rzi.u8.f32 %h, %fa;", |x| Out::H(u16::from(x.f(0) as u8))),
        ("cvt.rzi.s64.f32 %l, %fa;", |x| {
            Out::L(if x.f(0).is_nan() { 1 << 63 } else { x.f(0) as i64 as u64 })
        }),
        ("cvt.rni.f32.f32 %f, %fa;", |x| Out::F(x.f(0).round_ties_even())),
        ("cvt.rzi.f32.f32 %f, %fa;", |x| Out::F(x.f(0).trunc())),
        ("cvt.rmi.f32.f32 %f, %fa;", |x| Out::F(x.f(0).floor())),
        ("cvt.rpi.f32.f32 %f, %fa;", |x| Out::F(x.f(0).ceil())),
        ("cvt.sat.f32.f32 %f, %fa;", |x| Out::F(if x.f(0) > 0.0 { x.f(0).min(1.0) } else { 0.0 })),
        ("cvt.f64.f32 %d, %fa;", |x| Out::D(f64::from(x.f(0)))),
        ("cvt.rna.tf32.f32 %r, %fa;", |x| {
            let bits = x.r(0);
            Out::R(if x.f(0).is_finite() { (bits + 0x1000) & !0x1FFF } else { bits })
        }),
    ];
    check(cases, &singles(1500));
}

#[test]
fn doubles_to_others() {
    let cases: &[Case] = &[
        ("cvt.rn.f32.f64 %f, %da;", |x| Out::F(x.d(0) as f32)),
        ("cvt.rzi.s64.f64 %l, %da;", |x| {
            Out::L(if x.d(0).is_nan() { 1 << 63 } else { x.d(0) as i64 as u64 })
        }),
        ("cvt.rzi.s32.f64 %r, %da;", |x| {
            Out::R(if x.d(0).is_nan() { 1 << 31 } else { x.d(0) as i32 as u32 })
        }),
        ("cvt.rzi.u32.f64 %r, %da;", |x| Out::R(if x.d(0).is_nan() { 1 << 31 } else { x.d(0) as u32 })),
        ("cvt.rzi.u64.f64 %l, %da;", |x| Out::L(if x.d(0).is_nan() { 1 << 63 } else { x.d(0) as u64 })),
        ("cvt.rzi.u16.f64 %h, %da;", |x| Out::H(if x.d(0).is_nan() { 1 << 15 } else { x.d(0) as u16 })),
        ("cvt.rni.f64.f64 %d, %da;", |x| Out::D(x.d(0).round_ties_even())),
    ];
    check(cases, &doubles(600));
}
