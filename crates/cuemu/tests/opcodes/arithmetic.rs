//! Sums, products and quotients of integers.

use super::support::{Case, Out, check, integers};

#[test]
fn sums_and_extremes() {
    let cases: &[Case] = &[
        ("add.s32 %r, %a, %b;", |x| Out::R(x.r(0).wrapping_add(x.r(1)))),
        ("add.u32 %r, %a, -7;", |x| Out::R(x.r(0).wrapping_sub(7))),
        ("add.s64 %l, %la, %lb;", |x| Out::L(x.l(0).wrapping_add(x.l(1)))),
        ("add.s16 %h, %ha, %hb;", |x| Out::H(x.h(0).wrapping_add(x.h(1)))),
        ("add.sat.s32 %r, %a, %b;", |x| Out::R(x.s(0).saturating_add(x.s(1)) as u32)),
        ("sub.sat.s32 %r, %a, %b;", |x| Out::R(x.s(0).saturating_sub(x.s(1)) as u32)),
        ("sub.u32 %r, %a, %b;", |x| Out::R(x.r(0).wrapping_sub(x.r(1)))),
        ("sub.s64 %l, %la, %lb;", |x| Out::L(x.l(0).wrapping_sub(x.l(1)))),
        ("min.s32 %r, %a, %b;", |x| Out::R(x.s(0).min(x.s(1)) as u32)),
        ("min.u32 %r, %a, %b;", |x| Out::R(x.r(0).min(x.r(1)))),
        ("max.s64 %l, %la, %lb;", |x| Out::L(x.sl(0).max(x.sl(1)) as u64)),
        ("max.u64 %l, %la, %lb;", |x| Out::L(x.l(0).max(x.l(1)))),
        ("max.s16 %h, %ha, %hb;", |x| Out::H((x.h(0) as i16).max(x.h(1) as i16) as u16)),
        ("abs.s32 %r, %a;", |x| Out::R(x.s(0).wrapping_abs() as u32)),
        ("abs.s64 %l, %la;", |x| Out::L(x.sl(0).wrapping_abs() as u64)),
        ("neg.s32 %r, %a;", |x| Out::R(x.s(0).wrapping_neg() as u32)),
        ("neg.s64 %l, %la;", |x| Out::L(x.sl(0).wrapping_neg() as u64)),
        ("sad.u32 %r, %a, %b, %c;", |x| Out::R(x.r(0).abs_diff(x.r(1)).wrapping_add(x.r(2)))),
        ("sad.s32 %r, %a, %b, %c;", |x| Out::R(x.s(0).abs_diff(x.s(1)).wrapping_add(x.r(2)))),
    ];
    check(cases, &integers(600));
}

#[test]
fn products() {
    let cases: &[Case] = &[
        ("mul.lo.s32 %r, %a, %b;", |x| Out::R(x.r(0).wrapping_mul(x.r(1)))),
        ("mul.lo.u64 %l, %la, %lb;", |x| Out::L(x.l(0).wrapping_mul(x.l(1)))),
        ("mul.lo.u16 %h, %ha, %hb;", |x| Out::H(x.h(0).wrapping_mul(x.h(1)))),
        ("mul.hi.s32 %r, %a, %b;", |x| Out::R((i64::from(x.s(0)) * i64::from(x.s(1)) >> 32) as u32)),
        ("mul.hi.u32 %r, %a, %b;", |x| Out::R((u64::from(x.r(0)) * u64::from(x.r(1)) >> 32) as u32)),
        ("mul.hi.u64 %l, %la, %lb;", |x| Out::L((u128::from(x.l(0)) * u128::from(x.l(1)) >> 64) as u64)),
        ("mul.hi.s64 %l, %la, %lb;", |x| Out::L((i128::from(x.sl(0)) * i128::from(x.sl(1)) >> 64) as u64)),
        ("mul.wide.s32 %l, %a, %b;", |x| Out::L((i64::from(x.s(0)) * i64::from(x.s(1))) as u64)),
        ("mul.wide.u32 %l, %a, %b;", |x| Out::L(u64::from(x.r(0)) * u64::from(x.r(1)))),
        ("mul.wide.u16 %r, %ha, %hb;", |x| Out::R(u32::from(x.h(0)) * u32::from(x.h(1)))),
        ("mul.wide.s16 %r, %ha, %hb;", |x| {
            Out::R((i32::from(x.h(0) as i16) * i32::from(x.h(1) as i16)) as u32)
        }),
        ("mad.lo.s32 %r, %a, %b, %c;", |x| Out::R(x.r(0).wrapping_mul(x.r(1)).wrapping_add(x.r(2)))),
        ("mad.hi.u32 %r, %a, %b, %c;", |x| {
            Out::R(((u64::from(x.r(0)) * u64::from(x.r(1)) >> 32) as u32).wrapping_add(x.r(2)))
        }),
        ("mad.wide.s32 %l, %a, %b, %lc;", |x| {
            Out::L((i64::from(x.s(0)) * i64::from(x.s(1))).wrapping_add(x.sl(2)) as u64)
        }),
        ("mad.wide.u16 %r, %ha, %hb, %c;", |x| {
            Out::R((u32::from(x.h(0)) * u32::from(x.h(1))).wrapping_add(x.r(2)))
        }),
        ("mad.lo.s64 %l, %la, %lb, %lc;", |x| Out::L(x.l(0).wrapping_mul(x.l(1)).wrapping_add(x.l(2)))),
        ("mul24.lo.u32 %r, %a, %b;", |x| Out::R((x.r(0) & 0xFF_FFFF).wrapping_mul(x.r(1) & 0xFF_FFFF))),
        ("mul24.hi.s32 %r, %a, %b;", |x| {
            Out::R((i64::from(x.s(0) << 8 >> 8) * i64::from(x.s(1) << 8 >> 8) >> 16) as u32)
        }),
        ("mad24.lo.s32 %r, %a, %b, %c;", |x| {
            Out::R((x.s(0) << 8 >> 8).wrapping_mul(x.s(1) << 8 >> 8).wrapping_add(x.s(2)) as u32)
        }),
        ("dp4a.s32.u32 %r, %a, %b, %c;", |x| {
            let (a, b) = (x.r(0).to_le_bytes(), x.r(1).to_le_bytes());
            let sum: i32 = (0..4).map(|i| i32::from(a[i] as i8) * i32::from(b[i])).sum();
            Out::R(x.r(2).wrapping_add(sum as u32))
        }),
    ];
    check(cases, &integers(600));
}

#[test]
fn quotients() {
    let cases: &[Case] = &[
        ("div.s32 %r, %a, %b;", |x| {
            Out::R(if x.s(1) == 0 { u32::MAX } else { x.s(0).wrapping_div(x.s(1)) as u32 })
        }),
        ("div.u32 %r, %a, %b;", |x| Out::R(x.r(0).checked_div(x.r(1)).unwrap_or(u32::MAX))),
        ("rem.s32 %r, %a, %b;", |x| {
            Out::R(if x.s(1) == 0 { x.r(0) } else { x.s(0).wrapping_rem(x.s(1)) as u32 })
        }),
        ("rem.u64 %l, %la, %lb;", |x| Out::L(x.l(0).checked_rem(x.l(1)).unwrap_or(x.l(0)))),
        ("div.s64 %l, %la, %lb;", |x| {
            Out::L(if x.sl(1) == 0 { u64::MAX } else { x.sl(0).wrapping_div(x.sl(1)) as u64 })
        }),
        ("div.u16 %h, %ha, 10;", |x| Out::H(x.h(0) / 10)),
    ];
    check(cases, &integers(600));
}

#[test]
fn carries() {
    fn wide(x: &super::support::Input, i: usize, j: usize) -> u128 {
        u128::from(x.l(i)) | u128::from(x.l(j)) << 64
    }
    let cases: &[Case] = &[
        (".reg .b64 t; add.cc.u64 t, %la, %lb; addc.u64 %l, %lb, %lc;", |x| {
            Out::L((wide(x, 0, 1).wrapping_add(wide(x, 1, 2)) >> 64) as u64)
        }),
        (".reg .b64 t; sub.cc.u64 t, %la, %lb; subc.u64 %l, %lb, %lc;", |x| {
            Out::L((wide(x, 0, 1).wrapping_sub(wide(x, 1, 2)) >> 64) as u64)
        }),
        (".reg .b32 t; add.cc.u32 t, %a, %b; addc.cc.u32 t, %b, %c; addc.u32 %r, 0, 0;", |x| {
            let (low, carry) = x.r(0).overflowing_add(x.r(1));
            let _ = low;
            Out::R((u64::from(x.r(1)) + u64::from(x.r(2)) + u64::from(carry) >> 32) as u32)
        }),
        (".reg .b32 t; sub.cc.u32 t, %a, %b; subc.cc.u32 t, %b, %c; subc.u32 %r, 0, 0;", |x| {
            let borrow = i64::from(x.r(0) < x.r(1));
            Out::R(if i64::from(x.r(1)) - i64::from(x.r(2)) - borrow < 0 { u32::MAX } else { 0 })
        }),
        (".reg .b32 t; mad.lo.cc.u32 t, %a, %b, %c; madc.hi.u32 %r, %a, %b, 0;", |x| {
            Out::R((u64::from(x.r(0)) * u64::from(x.r(1)) + u64::from(x.r(2)) >> 32) as u32)
        }),
        // The carry of a difference says that nothing was borrowed.
        (".reg .b64 t; sub.cc.u64 t, %la, %lb; addc.u32 %r, 0, 0;", |x| Out::R(u32::from(x.l(0) >= x.l(1)))),
        // Without .cc the carry stays as it is.
        (".reg .b32 t; add.cc.u32 t, %a, %b; addc.u32 t, -1, -1; addc.u32 %r, 0, 0;", |x| {
            Out::R(u32::from(x.r(0).checked_add(x.r(1)).is_none()))
        }),
    ];
    check(cases, &integers(600));
}
