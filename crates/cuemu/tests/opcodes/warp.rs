//! Operations of a whole warp.

use super::support::{Buffer, can_run, launch, module};

/// Runs `code`, which makes `%r` of `%lane` and `%a` (the lane's number squared), with one warp.
fn lanes(code: &str) -> Vec<u32> {
    let body = format!(
        ".reg .b64 %rd0; .reg .b32 %r, %lane, %a; .reg .pred %p; ld.param.u64 %rd0, [out];
         mov.u32 %lane, %laneid; mad.wide.u32 %rd0, %lane, 4, %rd0; mul.lo.u32 %a, %lane, %lane;
         {{ {code} }} st.global.u32 [%rd0], %r;"
    );
    let result = Buffer::new(128);
    launch(&module(".param .u64 out", &body), 1, 32, &[result.address()]);
    result.read()
}

fn expect(code: &str, expected: impl Fn(u32) -> u32) {
    if can_run() {
        assert_eq!(lanes(code), (0..32).map(expected).collect::<Vec<_>>(), "`{code}`");
    }
}

#[test]
fn shuffles() {
    expect("shfl.sync.bfly.b32 %r, %a, 5, 31, -1;", |i| (i ^ 5).pow(2));
    expect("shfl.sync.idx.b32 %r, %a, 7, 31, 0xffffffff;", |_| 49);
    // Segments of 8 lanes: c holds 32 - 8 in its second byte.
    expect("shfl.sync.down.b32 %r|%p, %a, 3, 0x181f, -1; @!%p mov.u32 %r, 1000;", |i| {
        if i % 8 + 3 < 8 { (i + 3).pow(2) } else { 1000 }
    });
    expect("shfl.sync.up.b32 %r|%p, %a, 1, 0, -1; selp.u32 %r, %r, 500, %p;", |i| {
        if i == 0 { 500 } else { (i - 1).pow(2) }
    });
    expect(
        ".reg .f32 f; cvt.rn.f32.u32 f, %a; shfl.sync.bfly.b32 f, f, 1, 31, -1; cvt.rzi.u32.f32 %r, f;",
        |i| (i ^ 1).pow(2),
    );
}

#[test]
fn votes() {
    expect("setp.gt.u32 %p, %a, 100; vote.sync.ballot.b32 %r, %p, -1;", |_| !0 << 11);
    expect("setp.gt.u32 %p, %a, 900; vote.sync.any.pred %p, %p, -1; selp.u32 %r, 1, 0, %p;", |_| 1);
    expect("setp.gt.u32 %p, %a, 0; vote.sync.all.pred %p, %p, -1; selp.u32 %r, 1, 0, %p;", |_| 0);
    expect("setp.gt.u32 %p, %a, 2000; vote.sync.uni.pred %p, %p, -1; selp.u32 %r, 1, 0, %p;", |_| 1);
    expect("setp.gt.u32 %p, %a, 2000; vote.sync.all.pred %p, !%p, -1; selp.u32 %r, 1, 0, %p;", |_| 1);
    // Which lanes are active together is nobody's promise; this one is.
    expect(".reg .b32 t; activemask.b32 t; mov.u32 %r, %lanemask_eq; and.b32 %r, %r, t;", |i| 1 << i);
    expect("bar.warp.sync -1; mov.u32 %r, 3;", |_| 3);
}

#[test]
fn matches_and_reductions() {
    expect(".reg .b32 t; and.b32 t, %lane, 3; match.any.sync.b32 %r, t, -1;", |i| 0x1111_1111 << (i & 3));
    expect(".reg .b64 t; cvt.u64.u32 t, %a; match.all.sync.b64 %r|%p, t, -1; selp.u32 %r, 9, %r, %p;", |_| 0);
    expect("match.all.sync.b32 %r|%p, 5, -1; selp.u32 %r, %r, 0, %p;", |_| u32::MAX);
    expect("redux.sync.add.u32 %r, %a, -1;", |_| (0..32_u32).map(|i| i * i).sum());
    expect(".reg .b32 t; sub.u32 t, 10, %lane; redux.sync.min.s32 %r, t, -1;", |_| 21_u32.wrapping_neg());
    expect(".reg .b32 t; sub.u32 t, 10, %lane; redux.sync.max.u32 %r, t, -1;", |_| u32::MAX);
    expect("redux.sync.xor.b32 %r, %a, -1;", |_| (0..32_u32).fold(0, |x, i| x ^ (i * i)));
}

#[test]
fn election() {
    expect("elect.sync %r|%p, -1; @%p add.u32 %r, %r, 100;", |i| if i == 0 { 100 } else { 0 });
    expect("mov.u32 %r, 5; elect.sync _|%p, -1; @%p mov.u32 %r, 6;", |i| if i == 0 { 6 } else { 5 });
}
