//! Kernels that leave something out which a GPU may forgive, beside those that may.

use super::support::{Buffer, can_run, launch_as, module};
use cuemu::driver::Schedule;

fn schedules() -> [Schedule; 4] {
    let random = Schedule { policy: Schedule::RANDOM, async_mode: Schedule::MIXED, ..Schedule::default() };
    [
        Schedule::default(),
        Schedule { policy: Schedule::REVERSE, async_mode: Schedule::EAGER, ..Schedule::default() },
        Schedule { seed: 3, ..random },
        Schedule { seed: 4, ..random },
    ]
}

/// 64 threads that wait, with `wait`, for two copies of 256 bytes, each with an mbarrier, and add them up.
fn two_copies(wait: &str) -> String {
    module(
        ".param .u64 in, .param .u64 out",
        &format!(
            ".shared .align 128 .b8 m[512]; .shared .align 8 .b64 first; .shared .align 8 .b64 second;
             .reg .b64 %rd<5>; .reg .b32 %r<8>; .reg .pred %p<4>;
             ld.param.u64 %rd0, [in]; ld.param.u64 %rd1, [out]; mov.u32 %r0, %tid.x; setp.ne.u32 %p0, %r0, 0;
             @%p0 bra READY;
             mbarrier.init.shared::cta.b64 [first], 1; mbarrier.init.shared::cta.b64 [second], 1;
             fence.mbarrier_init.release.cluster;
             READY: bar.sync 0; @%p0 bra WAIT; mov.u32 %r1, m; mov.u32 %r2, first; mov.u32 %r3, second;
             mbarrier.arrive.expect_tx.shared::cta.b64 _, [first], 256;
             cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd0], 256, [%r2];
             mbarrier.arrive.expect_tx.shared::cta.b64 _, [second], 256;
             cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1+256], [%rd0+256], 256, [%r3];
             WAIT: {wait}
             mov.u32 %r1, m; mad.lo.u32 %r1, %r0, 4, %r1; ld.shared.u32 %r2, [%r1]; ld.shared.u32 %r3, [%r1+256];
             add.u32 %r2, %r2, %r3; mul.wide.u32 %rd2, %r0, 4; add.s64 %rd2, %rd2, %rd1; st.global.u32 [%rd2], %r2;"
        ),
    )
}

fn runs(ptx: &str, schedule: Schedule) -> Result<(), String> {
    let values: Vec<u32> = (0..128).map(|i| i * i).collect();
    let (given, result) = (Buffer::from(&values), Buffer::new(256));
    launch_as(ptx, 1, 64, 0, &[given.address(), result.address()], schedule)?;
    let expected: Vec<u32> = (0..64).map(|i| values[i] + values[i + 64]).collect();
    if result.read::<u32>() == expected { Ok(()) } else { Err("other values".to_owned()) }
}

#[test]
fn a_try_wait_may_say_no() {
    if !can_run() {
        return;
    }
    let once = "mbarrier.try_wait.parity.shared::cta.b64 %p1, [first], 0;
        mbarrier.try_wait.parity.shared::cta.b64 %p2, [second], 0;";
    let looped = "A: mbarrier.try_wait.parity.shared::cta.b64 %p1, [first], 0; @!%p1 bra A;
        B: mbarrier.try_wait.parity.shared::cta.b64 %p2, [second], 0; @!%p2 bra B;";
    let in_turns = format!("A: {once} and.pred %p3, %p1, %p2; @!%p3 bra A;");
    for schedule in schedules() {
        assert!(runs(&two_copies(once), schedule).is_err(), "{schedule:?}");
        assert_eq!(runs(&two_copies(looped), schedule), Ok(()), "{schedule:?}");
        assert_eq!(runs(&two_copies(&in_turns), schedule), Ok(()), "{schedule:?}");
    }
    // A phase that never ends is told all the same.
    let stuck = "A: mbarrier.try_wait.parity.shared::cta.b64 %p1, [first], 1; @!%p1 bra A;
        B: mbarrier.try_wait.parity.shared::cta.b64 %p2, [second], 0; @!%p2 bra B;
        C: mbarrier.try_wait.parity.shared::cta.b64 %p2, [second], 1; @!%p2 bra C;";
    for schedule in schedules() {
        let failure = runs(&two_copies(stuck), schedule).unwrap_err();
        assert!(failure.contains("deadlock") && failure.contains("mbarrier wait"), "{failure}");
    }
}

/// A kernel of one warpgroup: `F` wgmma.fence, `Z` a product, `A` one that adds to it, `Y`/`B` the same with
/// other accumulators, `C` commit, `W` wait for all, `1` for all but one, `X` a change of the accumulators.
fn products(steps: &str) -> String {
    const PRODUCT: &str = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16";
    let mut body = String::from(
        ".shared .align 128 .b8 sb[256]; .reg .b64 %rd<2>; .reg .b32 %r<8>; .reg .f32 %f<8>; .reg .pred %p<2>;
         mov.u32 %r0, sb; shr.u32 %r0, %r0, 4; cvt.u64.u32 %rd0, %r0; or.b64 %rd0, %rd0, 0x0000001000080000;
         mov.u32 %r4, 0; setp.ne.u32 %p0, 0, 0; setp.ne.u32 %p1, 1, 0;",
    );
    for step in steps.chars() {
        let product = |accumulators: &str, adds: &str| {
            format!("{PRODUCT} {{{accumulators}}}, {{%r4, %r4, %r4, %r4}}, %rd0, {adds}, 1, 1, 0;\n")
        };
        body += &match step {
            'F' => "wgmma.fence.sync.aligned;\n".to_owned(),
            'Z' => product("%f0, %f1, %f2, %f3", "%p0"),
            'A' => product("%f0, %f1, %f2, %f3", "%p1"),
            'Y' => product("%f4, %f5, %f6, %f7", "%p0"),
            'B' => product("%f4, %f5, %f6, %f7", "%p1"),
            'C' => "wgmma.commit_group.sync.aligned;\n".to_owned(),
            'W' => "wgmma.wait_group.sync.aligned 0;\n".to_owned(),
            '1' => "wgmma.wait_group.sync.aligned 1;\n".to_owned(),
            _ => "mov.f32 %f1, 0f3F800000;\n".to_owned(),
        };
    }
    module("", &body)
}

#[test]
fn a_wgmma_needs_a_fence_after_its_registers_were_used() {
    if !can_run() {
        return;
    }
    for schedule in schedules() {
        for right in
            ["FZACW", "FZCACW", "FZCAC1ACW", "FZCWACW", "FZCWFZCW", "FZCWXFACW", "FZCYC1BCW", "XFZYCW"]
        {
            let outcome = launch_as(&products(right), 1, 128, 0, &[], schedule);
            assert_eq!(outcome, Ok(()), "{right} {schedule:?}");
        }
        for wrong in ["ZCW", "FZCWZCW", "FZCWXACW", "FZCWYCW", "FZCYC1ZCW"] {
            let failure = launch_as(&products(wrong), 1, 128, 0, &[], schedule).unwrap_err();
            assert!(failure.contains("wgmma without wgmma.fence"), "{wrong} {schedule:?}: {failure}");
        }
    }
}
