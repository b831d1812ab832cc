//! Tensor cores and asynchronous copies: a tile product through each chain of instructions.

use super::support::{Buffer, Random, can_run, launch_as, module};
use cuemu::driver::Schedule;

/// Small integers as bf16: products and sums of them are exact.
fn small(count: usize, seed: u64) -> (Vec<f32>, Vec<u16>) {
    let mut random = Random(seed);
    let values: Vec<f32> = (0..count).map(|_| (random.next() % 9) as f32 - 4.0).collect();
    let bits = values.iter().map(|v| (v.to_bits() >> 16) as u16).collect();
    (values, bits)
}

/// `a [m, k] · bᵀ [n, k]`
fn product(a: &[f32], b: &[f32], m: usize, n: usize, k: usize) -> Vec<f32> {
    let at = |i: usize, j: usize| (0..k).map(|l| a[i * k + l] * b[j * k + l]).sum();
    (0..m * n).map(|i| at(i / n, i % n)).collect()
}

fn schedules() -> [Schedule; 3] {
    [
        Schedule::default(),
        Schedule { policy: Schedule::REVERSE, async_mode: Schedule::EAGER, ..Schedule::default() },
        Schedule { policy: Schedule::RANDOM, async_mode: Schedule::MIXED, seed: 7, ..Schedule::default() },
    ]
}

/// A 16×16 and an 8×16 tile: cp.async → ldmatrix → mma → global.
#[test]
fn copy_load_multiply() {
    if !can_run() {
        return;
    }
    let ptx = module(
        ".param .u64 a, .param .u64 b, .param .u64 d",
        ".shared .align 128 .b8 sa[512]; .shared .align 128 .b8 sb[256];
         .reg .b64 %rd<8>; .reg .b32 %r<24>; .reg .f32 %f<8>; .reg .pred %p;
         ld.param.u64 %rd0, [a]; ld.param.u64 %rd1, [b]; ld.param.u64 %rd2, [d]; mov.u32 %r0, %laneid;
         mul.wide.u32 %rd3, %r0, 16; add.s64 %rd4, %rd0, %rd3; add.s64 %rd5, %rd1, %rd3;
         mov.u32 %r1, sa; mad.lo.u32 %r2, %r0, 16, %r1; mov.u32 %r3, sb; mad.lo.u32 %r4, %r0, 16, %r3;
         cp.async.cg.shared.global.L2::128B [%r2], [%rd4], 16;
         setp.lt.u32 %p, %r0, 16; @%p cp.async.ca.shared::cta.global [%r4], [%rd5], 16, 16;
         cp.async.commit_group; cp.async.wait_group 0; bar.warp.sync -1;
         and.b32 %r5, %r0, 15; shr.u32 %r6, %r0, 4; mad.lo.u32 %r7, %r5, 32, %r1; mad.lo.u32 %r7, %r6, 16, %r7;
         ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r8, %r9, %r10, %r11}, [%r7];
         and.b32 %r5, %r0, 7; shr.u32 %r6, %r0, 3; and.b32 %r6, %r6, 1;
         mad.lo.u32 %r7, %r5, 32, %r3; mad.lo.u32 %r7, %r6, 16, %r7;
         ldmatrix.sync.aligned.m8n8.x2.shared::cta.b16 {%r12, %r13}, [%r7+0];
         mov.f32 %f4, 0f3F800000;
         mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f0, %f1, %f2, %f3}, {%r8, %r9, %r10, %r11},
           {%r12, %r13}, {%f4, %f4, %f4, %f4};
         shr.u32 %r14, %r0, 2; and.b32 %r15, %r0, 3; mul.wide.u32 %rd6, %r14, 32; mad.wide.u32 %rd6, %r15, 8, %rd6;
         add.s64 %rd6, %rd6, %rd2; st.global.v2.f32 [%rd6], {%f0, %f1}; st.global.v2.f32 [%rd6+256], {%f2, %f3};",
    );
    let ((a, a_bits), (b, b_bits)) = (small(256, 1), small(128, 2));
    let expected: Vec<f32> = product(&a, &b, 16, 8, 16).into_iter().map(|v| v + 1.0).collect();
    for schedule in schedules() {
        let (a, b, d) = (Buffer::from(&a_bits), Buffer::from(&b_bits), Buffer::new(512));
        launch_as(&ptx, 1, 32, 0, &[a.address(), b.address(), d.address()], schedule).unwrap();
        assert_eq!(d.read::<f32>(), expected);
    }
}

/// m16n8k8 of tf32, operands straight from global memory.
#[test]
fn tf32() {
    if !can_run() {
        return;
    }
    let ptx = module(
        ".param .u64 a, .param .u64 b, .param .u64 d",
        ".reg .b64 %rd<8>; .reg .b32 %r<24>; .reg .f32 %f<16>;
         ld.param.u64 %rd0, [a]; ld.param.u64 %rd1, [b]; ld.param.u64 %rd2, [d]; mov.u32 %r0, %laneid;
         shr.u32 %r1, %r0, 2; and.b32 %r2, %r0, 3; mad.lo.u32 %r3, %r1, 8, %r2; mul.wide.u32 %rd3, %r3, 4;
         add.s64 %rd4, %rd0, %rd3; add.s64 %rd5, %rd1, %rd3;
         ld.global.f32 %f0, [%rd4]; ld.global.f32 %f1, [%rd4+256]; ld.global.f32 %f2, [%rd4+16]; ld.global.f32 %f3, [%rd4+272];
         ld.global.f32 %f4, [%rd5]; ld.global.f32 %f5, [%rd5+16];
         cvt.rna.tf32.f32 %r4, %f0; cvt.rna.tf32.f32 %r5, %f1; cvt.rna.tf32.f32 %r6, %f2; cvt.rna.tf32.f32 %r7, %f3;
         mov.f32 %f6, 0f00000000;
         mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f8, %f9, %f10, %f11}, {%r4, %r5, %r6, %r7},
           {%f4, %f5}, {%f6, %f6, %f6, %f6};
         mul.wide.u32 %rd6, %r1, 32; mad.wide.u32 %rd6, %r2, 8, %rd6; add.s64 %rd6, %rd6, %rd2;
         st.global.v2.f32 [%rd6], {%f8, %f9}; st.global.v2.f32 [%rd6+256], {%f10, %f11};",
    );
    let ((a, _), (b, _)) = (small(128, 3), small(64, 4));
    let (given_a, given_b, d) = (Buffer::from(&a), Buffer::from(&b), Buffer::new(512));
    launch_as(&ptx, 1, 32, 0, &[given_a.address(), given_b.address(), d.address()], Schedule::default())
        .unwrap();
    assert_eq!(d.read::<f32>(), product(&a, &b, 16, 8, 8));
}

/// stmatrix undoes ldmatrix, and transposes with `.trans` on one side.
#[test]
fn matrix_store() {
    if !can_run() {
        return;
    }
    for (load, store, transposed) in [("", "", false), (".trans", ".trans", false), (".trans", "", true)] {
        let ptx = module(
            ".param .u64 in, .param .u64 out",
            &format!(
                ".shared .align 128 .b8 m[512]; .reg .b64 %rd<4>; .reg .b32 %r<16>;
                 ld.param.u64 %rd0, [in]; ld.param.u64 %rd1, [out]; mov.u32 %r0, %laneid; mul.wide.u32 %rd2, %r0, 16;
                 add.s64 %rd0, %rd0, %rd2; add.s64 %rd1, %rd1, %rd2; mov.u32 %r1, m; mad.lo.u32 %r2, %r0, 16, %r1;
                 ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd0]; st.shared.v4.b32 [%r2], {{%r4, %r5, %r6, %r7}};
                 bar.warp.sync -1;
                 ldmatrix.sync.aligned.m8n8.x4{load}.shared.b16 {{%r4, %r5, %r6, %r7}}, [%r2];
                 bar.warp.sync -1;
                 stmatrix.sync.aligned.m8n8.x4{store}.shared.b16 [%r2], {{%r4, %r5, %r6, %r7}};
                 bar.warp.sync -1;
                 ld.shared.v4.b32 {{%r8, %r9, %r10, %r11}}, [%r2]; st.global.v4.b32 [%rd1], {{%r8, %r9, %r10, %r11}};"
            ),
        );
        let values: Vec<u16> = (0..256).collect();
        let (given, result) = (Buffer::from(&values), Buffer::new(512));
        launch_as(&ptx, 1, 32, 0, &[given.address(), result.address()], Schedule::default()).unwrap();
        let place = |i: usize| if transposed { i & !63 | (i & 7) << 3 | i >> 3 & 7 } else { i };
        let expected: Vec<u16> = (0..256).map(|i| values[place(i)]).collect();
        assert_eq!(result.read::<u16>(), expected, "{load} {store}");
    }
}

/// Bulk copies there and back, with an mbarrier and a bulk group.
#[test]
fn bulk_copies() {
    if !can_run() {
        return;
    }
    let ptx = module(
        ".param .u64 in, .param .u64 out",
        ".shared .align 128 .b8 m[256]; .shared .align 8 .b64 full; .reg .b64 %rd<5>; .reg .b32 %r<6>; .reg .pred %p<3>;
         ld.param.u64 %rd0, [in]; ld.param.u64 %rd1, [out]; mov.u32 %r0, %tid.x; mov.u32 %r1, m; mov.u32 %r2, full;
         setp.ne.u32 %p0, %r0, 0; @%p0 bra WAIT_FOR_INIT;
         mbarrier.init.shared::cta.b64 [%r2], 1; fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;
         WAIT_FOR_INIT: bar.sync 0;
         @%p0 bra WAIT;
         mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 256;
         cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd0], 256, [%r2];
         WAIT: { .reg .pred done; W: mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%r2], 0;
           @done bra D; bra W; D: }
         mad.lo.u32 %r3, %r0, 4, %r1; ld.shared.u32 %r4, [%r3]; add.u32 %r4, %r4, 1; st.shared.u32 [%r3], %r4;
         fence.proxy.async.shared::cta; bar.sync 0;
         @%p0 bra END;
         cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r1], 256; cp.async.bulk.commit_group;
         cp.async.bulk.wait_group.read 0; cp.async.bulk.wait_group 0; mbarrier.inval.shared.b64 [full];
         END:",
    );
    let values: Vec<u32> = (0..64).map(|i| i * i).collect();
    for schedule in schedules() {
        let (given, result) = (Buffer::from(&values), Buffer::new(256));
        launch_as(&ptx, 1, 64, 0, &[given.address(), result.address()], schedule).unwrap();
        assert_eq!(result.read::<u32>(), values.iter().map(|v| v + 1).collect::<Vec<_>>());
    }
}

/// m64n8k16 with A in registers and B in shared memory (no swizzle), twice into the same accumulators.
#[test]
fn warpgroup_multiply() {
    if !can_run() {
        return;
    }
    let ptx = module(
        ".param .u64 a, .param .u64 b, .param .u64 d",
        ".shared .align 128 .b8 sb[256]; .reg .b64 %rd<10>; .reg .b32 %r<16>; .reg .f32 %f<4>; .reg .pred %p<3>;
         ld.param.u64 %rd0, [a]; ld.param.u64 %rd1, [b]; ld.param.u64 %rd2, [d]; mov.u32 %r0, %tid.x;
         // B [8, 16] as two 8×8 core matrices, one after the other: row r, half h at h · 128 + r · 16.
         setp.ge.u32 %p0, %r0, 16; @%p0 bra LOADED;
         shr.u32 %r1, %r0, 1; and.b32 %r2, %r0, 1; mul.wide.u32 %rd3, %r0, 16; add.s64 %rd3, %rd3, %rd1;
         ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd3]; mov.u32 %r3, sb; mad.lo.u32 %r3, %r2, 128, %r3;
         mad.lo.u32 %r3, %r1, 16, %r3; st.shared.v4.b32 [%r3], {%r4, %r5, %r6, %r7};
         LOADED: fence.proxy.async; bar.sync 0;
         // Row (t / 32) · 16 + lane / 4 (+ 8), columns 2 (t % 4) (+ 8).
         shr.u32 %r1, %r0, 5; and.b32 %r2, %r0, 31; shr.u32 %r3, %r2, 2; mad.lo.u32 %r1, %r1, 16, %r3;
         and.b32 %r2, %r0, 3; mul.wide.u32 %rd3, %r1, 32; mad.wide.u32 %rd3, %r2, 4, %rd3; add.s64 %rd3, %rd3, %rd0;
         ld.global.b32 %r4, [%rd3]; ld.global.b32 %r5, [%rd3+256]; ld.global.b32 %r6, [%rd3+16]; ld.global.b32 %r7, [%rd3+272];
         // Descriptor: address, and 128 bytes (8 units) from one core matrix to the next along K.
         mov.u32 %r8, sb; shr.u32 %r8, %r8, 4; cvt.u64.u32 %rd4, %r8; or.b64 %rd4, %rd4, 0x0000001000080000;
         setp.ne.u32 %p1, 0, 0; setp.ne.u32 %p2, 1, 0;
         wgmma.fence.sync.aligned;
         wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, {%r4, %r5, %r6, %r7}, %rd4, %p1, 1, 1, 0;
         wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, {%r4, %r5, %r6, %r7}, %rd4, %p2, -1, -1, 0;
         wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
         mul.wide.u32 %rd5, %r1, 32; mad.wide.u32 %rd5, %r2, 8, %rd5; add.s64 %rd5, %rd5, %rd2;
         st.global.v2.f32 [%rd5], {%f0, %f1}; st.global.v2.f32 [%rd5+256], {%f2, %f3};",
    );
    let ((a, a_bits), (b, b_bits)) = (small(1024, 5), small(128, 6));
    let expected: Vec<f32> = product(&a, &b, 64, 8, 16).into_iter().map(|v| 2.0 * v).collect();
    for schedule in schedules() {
        let (a, b, d) = (Buffer::from(&a_bits), Buffer::from(&b_bits), Buffer::new(64 * 8 * 4));
        launch_as(&ptx, 1, 128, 0, &[a.address(), b.address(), d.address()], schedule).unwrap();
        assert_eq!(d.read::<f32>(), expected);
    }
}

/// `cuemu::TensorMap` of a matrix of f32, as the driver writes it.
fn tensor_map(base: &Buffer, rows: u64, columns: u64, box_rows: u16, box_columns: u16) -> [u64; 16] {
    let mut map = [0; 16];
    map[0] = 0x7061_6d72_6f73_6e74;
    map[1] = base.address();
    map[2..7].copy_from_slice(&[columns, rows, 1, 1, 1]);
    map[7] = columns * 4;
    map[11] = u64::from(box_columns) | u64::from(box_rows) << 16 | 1 << 32 | 1 << 48;
    // The fifth box size, 4 bytes an element, rank 2, no swizzle, zeros outside.
    map[12] = 1 | 4 << 16 | 2 << 24;
    map
}

/// A box that reaches beyond the matrix, read and written back: what lies outside is zero, and not written.
#[test]
fn tensor_copies() {
    if !can_run() {
        return;
    }
    let ptx = module(
        ".param .u64 from, .param .u64 to, .param .u64 out",
        ".shared .align 128 .b8 m[128]; .shared .align 8 .b64 full; .reg .b64 %rd<5>; .reg .b32 %r<8>;
         .reg .f32 %f<3>; .reg .pred %p<3>;
         ld.param.u64 %rd0, [from]; ld.param.u64 %rd1, [to]; ld.param.u64 %rd2, [out]; mov.u32 %r0, %tid.x;
         mov.u32 %r1, m; mov.u32 %r2, full; setp.ne.u32 %p0, %r0, 0; setmaxnreg.dec.sync.aligned.u32 40;
         prefetch.tensormap [%rd0]; @%p0 bra READY;
         mbarrier.init.shared.b64 [%r2], 1; fence.mbarrier_init.release.cluster;
         mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r2], 128;
         mov.u32 %r3, 12; mov.u32 %r4, 6;
         cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [m], [%rd0, {%r3, %r4}], [%r2];
         mbarrier.arrive.release.cta.shared::cta.b64 %rd3, [%r2];
         READY: bar.sync 0;
         AGAIN: mbarrier.test_wait.parity.shared::cta.b64 %p1, [%r2], 0; @!%p1 bra AGAIN;
         mad.lo.u32 %r5, %r0, 4, %r1; ld.shared.f32 %f0, [%r5];
         mul.wide.u32 %rd4, %r0, 4; add.s64 %rd4, %rd4, %rd2; st.global.f32 [%rd4], %f0;
         add.f32 %f0, %f0, 0f3F800000; st.shared.f32 [%r5], %f0;
         fence.proxy.async.shared::cta; bar.sync 0; @%p0 bra END;
         cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1, {12, 6}], [%r1];
         cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
         END:",
    );
    let values: Vec<f32> = (0..16 * 8).map(|i| i as f32).collect();
    for schedule in schedules() {
        let (from, to, out) = (Buffer::from(&values), Buffer::from(&[0_f32; 128]), Buffer::new(128));
        // Boxes of 4 rows and 8 columns, the last two rows and four columns of them inside.
        let maps = [&from, &to].map(|buffer| Buffer::from(&tensor_map(buffer, 8, 16, 4, 8)));
        let parameters = [maps[0].address(), maps[1].address(), out.address()];
        launch_as(&ptx, 1, 32, 0, &parameters, schedule).unwrap();
        let inside = |row: usize, column: usize| row < 8 && column < 16;
        let read = (0..32).map(|i| (6 + i / 8, 12 + i % 8));
        let expected: Vec<f32> =
            read.map(|(r, c)| if inside(r, c) { (16 * r + c) as f32 } else { 0.0 }).collect();
        assert_eq!(out.read::<f32>(), expected);
        let written = |i: usize| if i / 16 >= 6 && i % 16 >= 12 { i as f32 + 1.0 } else { 0.0 };
        assert_eq!(to.read::<f32>(), (0..128).map(written).collect::<Vec<_>>());
    }
}

/// cp.async that arrives at an mbarrier, with a source shorter than the copy and one that is ignored.
#[test]
fn copies_that_arrive() {
    if !can_run() {
        return;
    }
    let ptx = module(
        ".param .u64 in, .param .u64 out",
        ".shared .align 128 .b8 m[1536]; .shared .align 8 .b64 full; .reg .b64 %rd<5>; .reg .b32 %r<12>; .reg .pred %p<3>;
         ld.param.u64 %rd0, [in]; ld.param.u64 %rd1, [out]; mov.u32 %r0, %tid.x; mov.u32 %r1, m; mov.u32 %r2, full;
         setp.ne.u32 %p0, %r0, 0; @!%p0 mbarrier.init.shared::cta.b64 [%r2], 32; bar.sync 0;
         mul.wide.u32 %rd2, %r0, 16; add.s64 %rd2, %rd2, %rd0; mad.lo.u32 %r3, %r0, 16, %r1;
         mov.u32 %r4, 8; setp.lt.u32 %p1, %r0, 16;
         cp.async.cg.shared.global [%r3], [%rd2], 16, %r4;
         cp.async.ca.shared.global [%r3+512], [%rd2], 16, %p1;
         cp.async.ca.shared.global [%r3+1024], [%rd2+8], 8; cp.async.ca.shared.global.L2::64B [%r3+1032], [%rd2], 4;
         cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r2];
         W: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0, 1000; @!%p2 bra W;
         ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r3]; ld.shared.b32 %r8, [%r3+524];
         ld.shared.b32 %r9, [%r3+1028]; ld.shared.b32 %r10, [%r3+1032]; cp.async.wait_all;
         mul.wide.u32 %rd3, %r0, 32; add.s64 %rd3, %rd3, %rd1;
         st.global.v4.b32 [%rd3], {%r4, %r5, %r6, %r7}; st.global.v4.b32 [%rd3+16], {%r8, %r9, %r10, %r0};",
    );
    let values: Vec<u32> = (1..=128).collect();
    for schedule in schedules() {
        let (given, out) = (Buffer::from(&values), Buffer::new(1024));
        launch_as(&ptx, 1, 32, 0, &[given.address(), out.address()], schedule).unwrap();
        for (thread, got) in out.read::<u32>().chunks(8).enumerate() {
            let word = |i: usize| values[4 * thread + i];
            let ignored = if thread < 16 { 0 } else { word(3) };
            assert_eq!(
                got,
                [word(0), word(1), 0, 0, ignored, word(3), word(0), thread as u32],
                "thread {thread}"
            );
        }
    }
}
