//! Logic, shifts, fields and permutations.

use super::support::{Case, Out, check, integers};

#[test]
fn logic() {
    let cases: &[Case] = &[
        ("and.b32 %r, %a, %b;", |x| Out::R(x.r(0) & x.r(1))),
        ("or.b64 %l, %la, %lb;", |x| Out::L(x.l(0) | x.l(1))),
        ("xor.b16 %h, %ha, %hb;", |x| Out::H(x.h(0) ^ x.h(1))),
        ("and.pred %p, %pa, %pb;", |x| Out::P(x.p(0) & x.p(1))),
        ("or.pred %p, %pa, !%pb;", |x| Out::P(x.p(0) | !x.p(1))),
        ("xor.pred %p, %pa, %pb;", |x| Out::P(x.p(0) ^ x.p(1))),
        ("not.pred %p, %pa;", |x| Out::P(!x.p(0))),
        ("not.b32 %r, %a;", |x| Out::R(!x.r(0))),
        ("not.b16 %h, %ha;", |x| Out::H(!x.h(0))),
        ("cnot.b32 %r, %a;", |x| Out::R(u32::from(x.r(0) == 0))),
        ("lop3.b32 %r, %a, %b, %c, 0xCA;", |x| Out::R(x.r(0) & x.r(1) | !x.r(0) & x.r(2))),
        ("lop3.b32 %r, %a, %b, %c, 150;", |x| Out::R(x.r(0) ^ x.r(1) ^ x.r(2))),
        ("selp.b32 %r, %a, %b, %pc;", |x| Out::R(if x.p(2) { x.r(0) } else { x.r(1) })),
        ("selp.f64 %d, %da, 0d3FF0000000000000, !%pc;", |x| Out::D(if x.p(2) { 1.0 } else { x.d(0) })),
        ("slct.b32.s32 %r, %a, %b, %c;", |x| Out::R(if x.s(2) >= 0 { x.r(0) } else { x.r(1) })),
    ];
    check(cases, &integers(300));
}

#[test]
fn shifts() {
    fn shl(a: u32, n: u32) -> u32 {
        a.checked_shl(n).unwrap_or(0)
    }
    let cases: &[Case] = &[
        ("shl.b32 %r, %a, %b;", |x| Out::R(shl(x.r(0), x.r(1)))),
        ("shl.b64 %l, %la, %b;", |x| Out::L(x.l(0).checked_shl(x.r(1)).unwrap_or(0))),
        ("shl.b16 %h, %ha, %b;", |x| Out::H(x.h(0).checked_shl(x.r(1)).unwrap_or(0))),
        ("shr.u32 %r, %a, %b;", |x| Out::R(x.r(0).checked_shr(x.r(1)).unwrap_or(0))),
        ("shr.s32 %r, %a, %b;", |x| Out::R((x.s(0) >> x.r(1).min(31)) as u32)),
        ("shr.s64 %l, %la, %b;", |x| Out::L((x.sl(0) >> x.r(1).min(63)) as u64)),
        ("shr.s16 %h, %ha, %b;", |x| Out::H((x.h(0) as i16 >> x.r(1).min(15)) as u16)),
        ("shf.l.wrap.b32 %r, %a, %b, %c;", |x| {
            Out::R(((u64::from(x.r(1)) << 32 | u64::from(x.r(0))) << (x.r(2) & 31) >> 32) as u32)
        }),
        ("shf.r.wrap.b32 %r, %a, %b, %c;", |x| {
            Out::R(((u64::from(x.r(1)) << 32 | u64::from(x.r(0))) >> (x.r(2) & 31)) as u32)
        }),
        ("shf.l.clamp.b32 %r, %a, %b, %c;", |x| {
            Out::R(((u64::from(x.r(1)) << 32 | u64::from(x.r(0))) << x.r(2).min(32) >> 32) as u32)
        }),
        ("shf.r.clamp.b32 %r, %a, %b, %c;", |x| {
            Out::R(((u64::from(x.r(1)) << 32 | u64::from(x.r(0))) >> x.r(2).min(32)) as u32)
        }),
    ];
    check(cases, &integers(600));
}

#[test]
fn fields() {
    let cases: &[Case] = &[
        ("popc.b32 %r, %a;", |x| Out::R(x.r(0).count_ones())),
        ("popc.b64 %r, %la;", |x| Out::R(x.l(0).count_ones())),
        ("clz.b32 %r, %a;", |x| Out::R(x.r(0).leading_zeros())),
        ("clz.b64 %r, %la;", |x| Out::R(x.l(0).leading_zeros())),
        ("brev.b32 %r, %a;", |x| Out::R(x.r(0).reverse_bits())),
        ("brev.b64 %l, %la;", |x| Out::L(x.l(0).reverse_bits())),
        ("bfind.u32 %r, %a;", |x| Out::R(31_u32.wrapping_sub(x.r(0).leading_zeros()))),
        ("bfind.shiftamt.u32 %r, %a;", |x| {
            Out::R(if x.r(0) == 0 { u32::MAX } else { x.r(0).leading_zeros() })
        }),
        ("bfind.s64 %r, %la;", |x| {
            let a = if x.sl(0) < 0 { !x.l(0) } else { x.l(0) };
            Out::R(63_u32.wrapping_sub(a.leading_zeros()))
        }),
        ("bfe.u32 %r, %a, %b, %c;", |x| {
            let (position, length) = (x.r(1) & 255, x.r(2) & 255);
            let field = x.r(0).checked_shr(position).unwrap_or(0);
            Out::R(if length >= 32 { field } else { field & ((1 << length) - 1) })
        }),
        ("bfe.s32 %r, %a, %b, %c;", |x| {
            let (position, length) = (x.r(1) & 255, x.r(2) & 255);
            // Bits beyond the register are its sign.
            let field = i64::from(x.s(0)) >> position.min(63);
            Out::R(if length == 0 {
                0
            } else if length >= 32 {
                field as u32
            } else {
                (field << (64 - length) >> (64 - length)) as u32
            })
        }),
        ("bfe.u64 %l, %la, 7, 40;", |x| Out::L(x.l(0) >> 7 & ((1 << 40) - 1))),
        ("bfi.b32 %r, %a, %b, 5, 9;", |x| Out::R(x.r(1) & !(0x1FF << 5) | (x.r(0) & 0x1FF) << 5)),
        ("bfi.b64 %l, %la, %lb, 32, 32;", |x| Out::L(x.l(1) & 0xFFFF_FFFF | x.l(0) << 32)),
        ("bmsk.clamp.b32 %r, %a, %b;", |x| {
            let ones = if x.r(1) >= 32 { u32::MAX } else { (1 << x.r(1)) - 1 };
            Out::R(ones.checked_shl(x.r(0)).unwrap_or(0))
        }),
        ("prmt.b32 %r, %a, %b, 0x5410;", |x| Out::R(x.r(0) & 0xFFFF | x.r(1) << 16)),
        ("prmt.b32 %r, %a, %b, %c;", |x| {
            let bytes = (u64::from(x.r(1)) << 32 | u64::from(x.r(0))).to_le_bytes();
            let pick = |i: u32| {
                let nibble = x.r(2) >> (4 * i) & 15;
                let byte = bytes[(nibble & 7) as usize];
                if nibble & 8 == 0 { byte } else { ((byte as i8) >> 7) as u8 }
            };
            Out::R(u32::from_le_bytes([pick(0), pick(1), pick(2), pick(3)]))
        }),
    ];
    check(cases, &integers(600));
}

#[test]
fn comparisons() {
    let cases: &[Case] = &[
        ("setp.lt.s32 %p, %a, %b;", |x| Out::P(x.s(0) < x.s(1))),
        ("setp.lt.u32 %p, %a, %b;", |x| Out::P(x.r(0) < x.r(1))),
        ("setp.hs.u64 %p, %la, %lb;", |x| Out::P(x.l(0) >= x.l(1))),
        ("setp.ge.s64 %p, %la, %lb;", |x| Out::P(x.sl(0) >= x.sl(1))),
        ("setp.eq.b16 %p, %ha, %hb;", |x| Out::P(x.h(0) == x.h(1))),
        ("setp.le.s16 %p, %ha, %hb;", |x| Out::P(x.h(0) as i16 <= x.h(1) as i16)),
        ("setp.ls.u32 %p, %a, 32;", |x| Out::P(x.r(0) <= 32)),
        ("setp.ne.and.b32 %p, %a, %b, %pc;", |x| Out::P(x.r(0) != x.r(1) && x.p(2))),
        ("setp.gt.or.s32 %p, %a, %b, !%pc;", |x| Out::P(x.s(0) > x.s(1) || !x.p(2))),
        (".reg .pred q; setp.gt.xor.s32 q|%p, %a, %b, %pc;", |x| Out::P(!(x.s(0) > x.s(1)) ^ x.p(2))),
        (".reg .pred q; setp.lt.s32 %p|q, %a, %b; or.pred %p, %p, q;", |_| Out::P(true)),
        ("set.lt.u32.s32 %r, %a, %b;", |x| Out::R(if x.s(0) < x.s(1) { u32::MAX } else { 0 })),
        ("set.gt.and.f32.u32 %f, %a, %b, %pc;", |x| Out::F(f32::from(u8::from(x.r(0) > x.r(1) && x.p(2))))),
    ];
    check(cases, &integers(600));
}
