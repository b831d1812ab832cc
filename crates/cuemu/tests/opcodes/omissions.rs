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
