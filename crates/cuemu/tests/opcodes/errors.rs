//! What is not known is an error that says what and where.

use super::support::module;
use cuemu::ptx::translate;

fn error(code: &str) -> String {
    let body = format!(
        ".reg .b32 %r<4>; .reg .b64 %rd<4>; .reg .b16 %h<3>; .reg .f32 %f<8>; .reg .pred %p<3>;\n.shared .align 8 .b8 m[8];\n{code}"
    );
    translate(&module("", &body)).expect_err(code).to_string()
}

#[test]
fn names_instruction_kernel_and_line() {
    assert_eq!(
        error("xyz.b32 %r0,   %r1;"),
        "PTX line 8, kernel k: instruction not known to the emulator: `xyz.b32 %r0, %r1;`"
    );
}

#[test]
fn unknown_modifiers() {
    for code in [
        "add.sat.u32 %r0, %r1, %r2;",
        "fma.rn.relu.f32 %f0, %f1, %f2, %f3;",
        "min.xorsign.abs.f32 %f0, %f1, %f2;",
        "ld.global.v3.u32 %r0, [%rd0];",
        "ld.shared::cluster.u32 %r0, [%r1];",
        "cvt.rn.satfinite.e4m3x2.f32 %h0, %f1, %f2;",
        "cvt.rn.satfinite.f16.f32 %h0, %f1;",
        "lop3.or.b32 %r0|%p1, %r1, %r2, %r3, 1, %p0;",
        "prmt.b32.f4e %r0, %r1, %r2, %r3;",
        "atom.global.add.noftz.f16x2 %r0, [%rd0], %r1;",
        "atom.global.v2.f32.add %f0, [%rd0], %f1;",
        "barrier.cluster.arrive;",
        "mapa.shared::cluster.u32 %r0, %r1, 0;",
        "mbarrier.test_wait.shared.b64 %p0, [m], %rd0;",
        "mbarrier.arrive.shared::cluster.b64 _, [%r0];",
        "mbarrier.arrive_drop.shared.b64 %rd0, [m];",
        "fence.proxy.tensormap::generic.acquire.gpu [%rd0], 128;",
        "cp.async.cg.shared.global [m], [%rd0], 8;",
        "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [m], [%rd0, {%r0}], [m], %h0;",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%rd0], [m], %r0;",
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r0}, {%r0}, {%r0}, {%r0};",
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%f0}, {%r0}, {%r0}, {%f0};",
        "wgmma.mma_async.sync.aligned.m64n8k16.f16.f16.f16 {%r0, %r1}, %rd0, %rd1, %p0, 1, 1, 0, 0;",
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f0, %f1}, %rd0, %rd1, %p0, 1, 1, 0, 0;",
        "shfl.bfly.b32 %r0, %r1, 1, 31;",
        "isspacep.global %p0, %rd0;",
        "mul.lo.f32 %f0, %f1, %f2;",
        "sin.rn.f32 %f0, %f1;",
    ] {
        let message = error(code);
        assert!(message.starts_with("PTX line 8, kernel k: "), "{message}");
        assert!(message.contains(&code[..20]), "{message}");
    }
}

#[test]
fn wrong_operands() {
    for (code, what) in [
        ("add.u32 %r0, %r1;", "operand 3 is missing"),
        ("add.u32 %r0, %r1, %r2, %r3;", "operand 4 is not known"),
        ("add.u32 %r0, %r1, %nothing;", "`%nothing` is not known"),
        ("add.u32 %r0, %r1, %f1;", ""),
        ("mov.u32 %r0, %dynamic_nothing;", "is not known"),
        ("bra NOWHERE;", "no label `NOWHERE`"),
        ("{ INNER: } bra INNER;", "no label `INNER`"),
        ("call.uni printf, (%r0);", "has no body in this module"),
        ("add.f64 %f0, %f1, %f2;", "32 bits are used as 64 bits"),
        ("or.pred %p0, %p1, %r0;", "a predicate and a number are mixed"),
    ] {
        if what.is_empty() {
            continue;
        }
        let message = error(code);
        assert!(message.contains(what), "{message}");
    }
}

#[test]
fn wrong_modules() {
    for (text, what) in [
        (".version 8.0 .target sm_90\n.address_size 32", "64-bit"),
        (".nothing 5;", "`.nothing`"),
        (".visible .entry k() { add.u32", "ends in the middle"),
        (".visible .entry k() .reqnctapercluster 2, 1, 1 { ret; }", "clusters"),
        (".global .u64 p = generic(x);", "initialiser"),
        (".visible .entry k(.param .u64 a) { .reg .b128 %q; ret; }", "register type"),
    ] {
        let message = translate(text).expect_err(text).to_string();
        assert!(message.contains(what), "{message}");
    }
}

#[test]
fn table_of_kernels() {
    let text = translate(
        ".version 8.4\n.visible .entry one(.param .u64 a, .param .align 64 .b8 map[128], .param .f32 x)
         .maxntid 64, 2, 1 .minnctapersm 1 { .shared .align 16 .b8 m[20]; .shared .align 8 .b8 n[8]; .reg .b32 %r;
         mov.u32 %r, m; mov.u32 %r, n; ret; }
         .visible .entry two() .reqntid 32 { .reg .b32 %r; .shared .align 4 .b8 m[4]; mov.u32 %r, m;
         { .shared .align 4 .b8 m[4]; mov.u32 %r, m; } ret; }",
    )
    .unwrap();
    assert!(text.contains("{\"one\", entry_one, 3, sizes_one, 128, 32},"), "{text}");
    assert!(text.contains("{\"two\", entry_two, 0, sizes_two, 32, 8},"), "{text}");
    assert!(text.contains("sizes_one[] = {8, 128, 4, 0}"), "{text}");
    assert!(text.contains("cuemu_kernel_count = 2"), "{text}");
}
