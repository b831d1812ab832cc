//! Loads, stores, atomics, and the spaces.

use super::support::{Buffer, Case, Out, can_run, check, integers, launch, launch_as, module};
use cuemu::driver::Schedule;

/// Narrow loads extend, narrow stores cut: through local, shared and generic memory.
#[test]
fn sizes() {
    let cases: &[Case] = &[
        (".local .align 8 .b8 m[8]; st.local.b64 [m], %la; ld.local.s8 %r, [m+1];", |x| {
            Out::R(i32::from((x.l(0) >> 8) as i8) as u32)
        }),
        (".local .align 8 .b8 m[8]; st.local.b64 [m], %la; ld.local.u8 %h, [m+7];", |x| {
            Out::H(u16::from((x.l(0) >> 56) as u8))
        }),
        (".local .align 8 .b8 m[8]; st.local.b64 [m], %la; ld.local.s16 %r, [m+6];", |x| {
            Out::R(i32::from((x.l(0) >> 48) as i16) as u32)
        }),
        (
            ".local .align 8 .b8 m[8]; st.local.b64 [m], %la; st.local.u8 [m+2], %b; ld.local.u64 %l, [m];",
            |x| Out::L(x.l(0) & !0xFF_0000 | u64::from(x.r(1) as u8) << 16),
        ),
        (
            ".local .align 8 .b8 m[16]; .reg .b64 t<3>; st.local.v2.b32 [m+8], {%a, %b};
             mov.u64 t0, m; cvta.local.u64 t1, t0; ld.v2.f32 {_, %f}, [t1+8];",
            |x| Out::F(x.f(1)),
        ),
        (
            ".local .align 8 .b8 m[16]; .reg .b64 t0; mov.u64 t0, m; add.s64 t0, t0, 4;
             st.local.f32 [t0+-4], %fa; ld.local.b32 %r, [m];",
            |x| Out::R(x.r(0)),
        ),
    ];
    check(cases, &integers(100));
}

#[test]
fn vectors_volatile_and_hints() {
    if !can_run() {
        return;
    }
    let ptx = module(
        ".param .u64 in, .param .u64 out",
        ".reg .b64 %rd<4>; .reg .b32 %r<8>; .reg .b16 %h<4>; .reg .f32 %f<4>; .reg .f64 %d<2>;
         ld.param.u64 %rd0, [in]; ld.param.u64 %rd1, [out]; cvta.to.global.u64 %rd0, %rd0;
         ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%r0, %r1, %r2, %r3}, [%rd0];
         st.global.v4.b32 [%rd1], {%r3, %r2, %r1, %r0};
         ld.global.v4.u16 {%h0, %h1, %h2, %h3}, [%rd0+16];
         st.global.v2.b16 [%rd1+16], {%h3, %h0};
         ld.volatile.global.f32 %f0, [%rd0+24]; st.relaxed.gpu.global.f32 [%rd1+20], %f0;
         ld.acquire.sys.b32 %r4, [%rd0+28]; st.release.gpu.b32 [%rd1+24], %r4;
         ld.global.cs.v2.f64 {%d0, %d1}, [%rd0+32]; st.global.wt.v2.f64 [%rd1+32], {%d1, %d0};
         prefetch.global.L2 [%rd0]; createpolicy.fractional.L2::evict_first.b64 %rd2, 1.0;
         ld.global.L2::cache_hint.u32 %r5, [%rd0+4], %rd2; st.global.u32 [%rd1+28], %r5;",
    );
    let given = Buffer::from(&(1..=12).collect::<Vec<u32>>());
    let result = Buffer::new(48);
    launch(&ptx, 1, 1, &[given.address(), result.address()]);
    let second_and_fifth = 5; // halves of words 5 and 6: 5 0 6 0
    assert_eq!(result.read::<u32>(), [4, 3, 2, 1, second_and_fifth << 16, 7, 8, 2, 11, 12, 9, 10]);
}

#[test]
fn atomics() {
    if !can_run() {
        return;
    }
    // 64 threads each apply every operation; slot 15 counts how often exch and cas saw what they should.
    let ptx = module(
        ".param .u64 out",
        ".reg .b64 %rd<6>; .reg .b32 %r<8>; .reg .f32 %f<2>; .reg .f64 %d<2>; .reg .pred %p;
         ld.param.u64 %rd0, [out]; mov.u32 %r0, %tid.x; cvt.u64.u32 %rd1, %r0;
         atom.global.add.u32 %r1, [%rd0], %r0;
         red.global.add.u64 [%rd0+8], %rd1;
         red.relaxed.gpu.global.add.f32 [%rd0+16], 0f3F000000;
         red.global.add.f64 [%rd0+24], 0d3FE0000000000000;
         red.global.max.s32 [%rd0+32], %r0;
         red.global.min.s32 [%rd0+36], %r0;
         red.global.max.u32 [%rd0+40], %r0;
         red.global.and.b32 [%rd0+44], %r0;
         red.global.or.b32 [%rd0+48], %r0;
         red.global.xor.b32 [%rd0+52], %r0;
         atom.global.inc.u32 %r2, [%rd0+56], 9;
         atom.global.dec.u32 %r2, [%rd0+60], 9;
         atom.acq_rel.gpu.global.exch.b64 %rd2, [%rd0+64], %rd1;
         atom.global.cas.b32 %r3, [%rd0+72], %r0, 1000;
         setp.eq.u32 %p, %r3, %r0; @%p red.global.add.s32 [%rd0+76], 1;
         atom.global.min.u64 %rd3, [%rd0+80], %rd1;
         @!%p atom.add.s32 %r4, [%rd0+88], -1;
         atom.cas.b64 %rd4, [%rd0+96], %rd1, 77;",
    );
    let mut start = [0_u32; 26];
    start[8] = i32::MIN as u32;
    start[9] = i32::MAX as u32;
    start[11] = u32::MAX;
    start[18] = 40;
    start[20] = u32::MAX;
    start[21] = u32::MAX;
    start[24] = 63;
    let values = Buffer::from(&start);
    launch(&ptx, 1, 64, &[values.address()]);
    let got = values.read::<u32>();
    let sum = 63 * 32;
    assert_eq!(got[0], sum);
    assert_eq!(got[2..4], [sum, 0]);
    assert_eq!(f32::from_bits(got[4]), 32.0);
    assert_eq!(got[6..8], [0, 32_f64.to_bits().wrapping_shr(32) as u32]);
    assert_eq!(got[8..14], [63, 0, 63, 0, 63, (0..64).fold(0, |a, b| a ^ b)]);
    assert_eq!(got[14..16], [64 % 10, 10 - 64 % 10]);
    assert!(got[16] < 64 && got[17] == 0);
    assert_eq!(got[18..20], [1000, 1]);
    assert_eq!(got[20..22], [0, 0]);
    assert_eq!(got[22], 63_u32.wrapping_neg());
    assert_eq!(got[24..26], [77, 0]);
}

#[test]
fn shared_memory() {
    if !can_run() {
        return;
    }
    // Static, module-scope and dynamic variables; addresses by symbol, by register and generic.
    let ptx = ".version 8.4\n.target sm_90a\n.address_size 64
        .shared .align 16 .b8 table[256]; .extern .shared .align 16 .b8 dynamic[];
        .visible .entry k(.param .u64 out) .maxntid 64, 1, 1 {
         .shared .align 4 .f32 single;
         .reg .b64 %rd<8>; .reg .b32 %r<12>; .reg .f32 %f<3>; .reg .pred %p;
         ld.param.u64 %rd0, [out]; mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 2;
         mov.u32 %r2, table; add.s32 %r2, %r2, %r1; st.shared.u32 [%r2], %r0;
         setp.eq.u32 %p, %r0, 0; @%p st.shared.f32 [single], 0f40400000;
         mov.u64 %rd1, dynamic; cvta.shared.u64 %rd2, %rd1; cvt.u64.u32 %rd3, %r1; add.s64 %rd2, %rd2, %rd3;
         st.u32 [%rd2], %r1;
         bar.sync 0;
         xor.b32 %r3, %r1, 252; mov.u32 %r4, table; add.s32 %r4, %r4, %r3; ld.shared.u32 %r5, [%r4];
         cvta.to.shared.u64 %rd4, %rd2; cvt.u32.u64 %r6, %rd4; ld.shared.u32 %r7, [%r6];
         ld.shared.f32 %f0, [single]; cvt.rzi.u32.f32 %r8, %f0;
         bar.sync 0; atom.shared.add.u32 %r9, [table+4], 1;
         add.u32 %r5, %r5, %r7; add.u32 %r5, %r5, %r8;
         add.s64 %rd5, %rd0, %rd3; st.global.u32 [%rd5], %r5;
         ret; }";
    let result = Buffer::new(256);
    launch_as(ptx, 1, 64, 256, &[result.address()], Schedule::default()).unwrap();
    let expected: Vec<u32> = (0..64).map(|i| (63 - i) + 4 * i + 3).collect();
    assert_eq!(result.read::<u32>(), expected);
}

#[test]
fn module_variables() {
    if !can_run() {
        return;
    }
    let ptx = ".version 8.4\n.target sm_90a\n.address_size 64
        .global .align 4 .b8 bytes[8] = {1, 0, 0, 0, 2}; .const .align 4 .f32 third[2] = {0f3F800000, 0f40000000};
        .global .align 8 .u64 count = 40;
        .visible .entry k(.param .u64 out) {
         .reg .b64 %rd<8>; .reg .b32 %r<8>; .reg .f32 %f<3>;
         ld.param.u64 %rd0, [out];
         mov.u64 %rd1, bytes; ld.global.nc.u32 %r0, [%rd1+4]; st.global.u32 [%rd0], %r0;
         ld.const.f32 %f0, [third+4]; st.global.f32 [%rd0+4], %f0;
         cvta.global.u64 %rd2, %rd1; ld.u32 %r1, [%rd2]; st.global.u32 [%rd0+8], %r1;
         ld.global.u64 %rd3, [count]; add.s64 %rd3, %rd3, 2; st.global.u64 [count], %rd3;
         ld.global.u32 %r2, [count]; st.global.u32 [%rd0+12], %r2;
         ret; }";
    let result = Buffer::new(16);
    launch(ptx, 1, 1, &[result.address()]);
    assert_eq!(result.read::<u32>(), [2, 2_f32.to_bits(), 1, 42]);
}

#[test]
fn stray_accesses_are_found() {
    if !can_run() {
        return;
    }
    for (code, what) in [
        ("ld.global.u32 %r0, [%rd0+16];", "beyond the allocation"),
        ("ld.global.v4.u32 {%r0, %r0, %r0, %r0}, [%rd0+4];", "not aligned"),
        ("st.u32 [%rd0+-4], 0;", "before the allocation"),
        ("atom.global.add.u32 %r0, [%rd0+2], 1;", "not aligned"),
        ("ld.shared.u32 %r0, [%r1+1000000];", "beyond shared memory"),
    ] {
        let body =
            format!(".reg .b64 %rd0; .reg .b32 %r<2>; mov.u32 %r1, 0; ld.param.u64 %rd0, [out]; {code}");
        let buffer = Buffer::from(&[0_u32; 4]);
        let ptx = module(".param .u64 out", &body);
        let result = launch_as(&ptx, 1, 1, 0, &[buffer.address()], Schedule::default());
        assert!(result.is_err(), "{what}: `{code}`");
    }
}
