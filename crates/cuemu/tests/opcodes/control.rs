//! Branches, calls, scopes, special registers, barriers.

use super::support::{Buffer, Case, Out, can_run, check, integers, launch, launch_as, module};
use cuemu::driver::Schedule;

#[test]
fn branches() {
    let cases: &[Case] = &[
        ("mov.u32 %r, 1; @%pa bra DONE; mov.u32 %r, 2; DONE:", |x| Out::R(if x.p(0) { 1 } else { 2 })),
        // The same label in another scope, and a loop.
        (
            ".reg .pred q; mov.u32 %r, 0; DONE: add.u32 %r, %r, 3; setp.lt.u32 q, %r, 10; @q bra.uni DONE;",
            |_| Out::R(12),
        ),
        ("mov.u32 %r, %a; @!%pa mov.u32 %r, %b;", |x| Out::R(if x.p(0) { x.r(0) } else { x.r(1) })),
        (
            ".reg .b32 i; and.b32 i, %a, 3; mov.u32 %r, 9; ts: .branchtargets L0, L1, L2, L1; brx.idx i, ts;
             L0: mov.u32 %r, 10; bra END; L1: mov.u32 %r, 11; bra END; L2: mov.u32 %r, 12; END:",
            |x| Out::R([10, 11, 12, 11][x.r(0) as usize & 3]),
        ),
        // A register of an inner scope hides the outer one, and nothing else.
        ("mov.u32 %r, 1; { .reg .b32 %r; mov.u32 %r, 2; } add.u32 %r, %r, 1;", |_| Out::R(2)),
    ];
    check(cases, &integers(100));
}

#[test]
fn calls() {
    if !can_run() {
        return;
    }
    let ptx = ".version 8.4\n.target sm_90a\n.address_size 64
        .func (.param .b32 result) triangle(.param .b32 n);
        .func (.param .align 8 .b8 result[16]) swap(.param .align 8 .b8 pair[16]) {
         .reg .b64 %rd<2>; ld.param.b64 %rd0, [pair]; ld.param.b64 %rd1, [pair+8];
         st.param.b64 [result], %rd1; st.param.b64 [result+8], %rd0; ret; }
        .func (.param .b32 result) triangle(.param .b32 n) {
         .reg .b32 %r<4>; .reg .pred %p; ld.param.u32 %r0, [n]; setp.eq.u32 %p, %r0, 0; @%p bra ZERO;
         sub.u32 %r1, %r0, 1;
         { .param .b32 p0; st.param.b32 [p0], %r1; .param .b32 r0; call.uni (r0), triangle, (p0);
           ld.param.b32 %r2, [r0]; }
         add.u32 %r2, %r2, %r0; st.param.b32 [result], %r2; ret;
         ZERO: st.param.b32 [result], %r0; ret; }
        .func store(.param .b64 place, .param .f32 value) {
         .reg .b64 %rd0; .reg .f32 %f0; ld.param.u64 %rd0, [place]; ld.param.f32 %f0, [value];
         st.global.f32 [%rd0], %f0; ret; }
        .visible .entry k(.param .u64 out) {
         .reg .b64 %rd<8>; .reg .b32 %r<8>;
         ld.param.u64 %rd0, [out];
         { .param .b32 p0; st.param.b32 [p0+0], 10; .param .b32 r0; call (r0), triangle, (p0); ld.param.b32 %r0, [r0+0]; }
         st.global.u32 [%rd0], %r0;
         { .param .b64 p0; st.param.b64 [p0], %rd0; .param .b32 p1; st.param.b32 [p1], 0f40A00000;
           add.s64 %rd1, %rd0, 4; st.param.b64 [p0], %rd1; call.uni store, (p0, p1); }
         { .param .align 8 .b8 p0[16]; st.param.v2.b64 [p0], {7, 8}; .param .align 8 .b8 r0[16];
           call.uni (r0), swap, (p0); ld.param.b64 %rd2, [r0]; }
         st.global.u64 [%rd0+8], %rd2;
         ret; }";
    let result = Buffer::new(16);
    launch(ptx, 1, 1, &[result.address()]);
    assert_eq!(result.read::<u32>(), [55, 5_f32.to_bits(), 8, 0]);
}

#[test]
fn special_registers() {
    if !can_run() {
        return;
    }
    let names = [
        "%tid.x",
        "%ntid.x",
        "%ctaid.x",
        "%nctaid.x",
        "%laneid",
        "%warpid",
        "%nwarpid",
        "%lanemask_eq",
        "%lanemask_lt",
        "%lanemask_le",
        "%lanemask_gt",
        "%lanemask_ge",
        "%clusterid.x",
        "%cluster_nctaid.x",
        "%cluster_ctarank",
        "WARP_SZ",
    ];
    let mut body = format!(
        ".reg .b64 %rd<2>; .reg .b32 %r<3>; ld.param.u64 %rd0, [out]; mov.u32 %r0, %ctaid.x; mov.u32 %r1, %tid.x;
         mad.lo.u32 %r0, %r0, 48, %r1; mad.wide.u32 %rd0, %r0, {}, %rd0; mov.u64 %rd1, %clock64;",
        names.len() * 4
    );
    for (i, name) in names.iter().enumerate() {
        body += &format!("mov.u32 %r2, {name}; st.global.u32 [%rd0+{}], %r2;", i * 4);
    }
    let result = Buffer::new(2 * 48 * names.len() * 4);
    launch(&module(".param .u64 out", &body), 2, 48, &[result.address()]);
    for (i, got) in result.read::<u32>().chunks(names.len()).enumerate() {
        let (thread, block) = (i as u32 % 48, i as u32 / 48);
        let lane = thread % 32;
        let (eq, lt) = (1_u32 << lane, (1_u32 << lane) - 1);
        let expected =
            [thread, 48, block, 2, lane, thread / 32, 2, eq, lt, eq | lt, !(eq | lt), !lt, block, 1, 0, 32];
        assert_eq!(got, expected, "thread {thread} of block {block}");
    }
}

#[test]
fn barriers() {
    if !can_run() {
        return;
    }
    // Warp 0 arrives at barrier 1, warp 1 waits there; all count, vote, and wait for all.
    let ptx = module(
        ".param .u64 out",
        ".shared .align 4 .b8 m[4]; .reg .b64 %rd<2>; .reg .b32 %r<8>; .reg .pred %p<6>;
         ld.param.u64 %rd0, [out]; mov.u32 %r0, %tid.x; mad.wide.u32 %rd0, %r0, 16, %rd0;
         setp.ge.u32 %p0, %r0, 32; @%p0 bra SECOND;
         setp.eq.u32 %p1, %r0, 5; @%p1 st.shared.u32 [m], 77; membar.cta; bar.arrive 1, 64; bra JOIN;
         SECOND: bar.sync 1, 64; ld.shared.u32 %r1, [m]; st.global.u32 [%rd0], %r1;
         JOIN: barrier.sync.aligned 0; fence.acq_rel.gpu;
         setp.lt.u32 %p2, %r0, 40; bar.red.popc.u32 %r2, 0, %p2; st.global.u32 [%rd0+4], %r2;
         bar.red.and.pred %p3, 2, 64, %p2; selp.u32 %r3, 1, 0, %p3; st.global.u32 [%rd0+8], %r3;
         barrier.cta.red.or.pred %p4, 0, !%p2; selp.u32 %r4, 1, 0, %p4; st.global.u32 [%rd0+12], %r4;
         nanosleep.u32 20; griddepcontrol.wait;",
    );
    let result = Buffer::from(&[0_u32; 256]);
    launch(&ptx, 1, 64, &[result.address()]);
    for (thread, got) in result.read::<u32>().chunks(4).enumerate() {
        assert_eq!(got, [if thread < 32 { 0 } else { 77 }, 40, 0, 1], "thread {thread}");
    }
}

#[test]
fn trap_names_the_line() {
    if !can_run() {
        return;
    }
    let ptx =
        module("", ".loc 1 42 5, function_name $L__x, inlined_at 1 7 3\ntrap;") + ".file 1 \"some.cu\"\n";
    let error = launch_as(&ptx, 1, 1, 0, &[], Schedule::default()).unwrap_err();
    assert!(error.contains("some.cu:42") || error.contains("some.cu") && error.contains("42"), "{error}");
}
