//! Mistakes in the wrappers' text, each of which makes its cases come out otherwise.

use super::super::faults::is_child;
use super::super::machine::{Machine, machine_with};
use super::{Case, common, difference, hopper, sources};

struct Mistake {
    name: &'static str,
    file: &'static str,
    from: &'static str,
    to: &'static str,
    /// Cases that must notice it, each on its own.
    cases: &'static [&'static str],
}

const MISTAKES: &[Mistake] = &[
    Mistake {
        name: "rounding toward zero",
        file: "common.cuh",
        from: "cvt.rn.bf16.f32",
        to: "cvt.rz.bf16.f32",
        cases: &["from_float_bf16"],
    },
    Mistake {
        name: "halves of a pair swapped",
        file: "common.cuh",
        from: r#": "f"(high), "f"(low));"#,
        to: r#": "f"(low), "f"(high));"#,
        cases: &["pack_bf16"],
    },
    Mistake {
        name: "a logarithm for a power",
        file: "common.cuh",
        from: "ex2.approx.ftz.f32",
        to: "lg2.approx.ftz.f32",
        cases: &["approximate"],
    },
    Mistake {
        name: "a root for a reciprocal",
        file: "common.cuh",
        from: "rcp.approx.ftz.f32",
        to: "sqrt.approx.ftz.f32",
        cases: &["approximate"],
    },
    Mistake {
        name: "a step of the warp's sum lost",
        file: "common.cuh",
        from: "for (int lanes = 16; lanes > 0;",
        to: "for (int lanes = 8; lanes > 0;",
        cases: &["warp_sum", "block_sum_1", "block_sum_8"],
    },
    Mistake {
        name: "source size of cp.async lost",
        file: "common.cuh",
        from: "[%0], [%1], 16, %2;",
        to: "[%0], [%1], 16;",
        cases: &["cp_async_16"],
    },
    Mistake {
        name: "source size of cp.async of 4 bytes lost",
        file: "common.cuh",
        from: "[%0], [%1], 4, %2;",
        to: "[%0], [%1], 4;",
        cases: &["cp_async_4"],
    },
    Mistake {
        name: "one group more may be under way",
        file: "common.cuh",
        from: r#"::"n"(LEFT) : "memory");"#,
        to: r#"::"n"(LEFT + 1) : "memory");"#,
        cases: &["cp_async_16", "cp_async_wait"],
    },
    Mistake {
        name: ".trans lost",
        file: "common.cuh",
        from: "x4.trans.shared",
        to: "x4.shared",
        cases: &["ldmatrix_x4_trans"],
    },
    Mistake {
        name: "B's halves swapped",
        file: "common.cuh",
        from: r#""r"(b0), "r"(b1)"#,
        to: r#""r"(b1), "r"(b0)"#,
        cases: &["mma_bf16"],
    },
    Mistake {
        name: "A's quarters swapped",
        file: "common.cuh",
        from: r#""r"(a[1]), "r"(a[2])"#,
        to: r#""r"(a[2]), "r"(a[1])"#,
        cases: &["mma_bf16"],
    },
    Mistake {
        name: "neighbours swapped",
        file: "common.cuh",
        from: "odd ? left0 : right0",
        to: "odd ? right0 : left0",
        cases: &["gather_quad"],
    },
    Mistake {
        name: "column and row of a box swapped",
        file: "hopper.cuh",
        from: "{%3, %4}",
        to: "{%4, %3}",
        cases: &["copy_box", "barriers", "wgmma_128_transposed_adds"],
    },
    Mistake {
        name: "an arrival that expects no bytes",
        file: "hopper.cuh",
        from: r#"mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" ::"r"(barrier),"#,
        to: r#"mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(barrier),"#,
        cases: &["copy_box"],
    },
    Mistake {
        name: "64 bytes of swizzle named, K-major",
        file: "hopper.cuh",
        from: "(u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)1 << 62;",
        to: "(u64)1 << 16 | (u64)(1024 >> 4) << 32 | (u64)2 << 62;",
        cases: &["operands", "wgmma_128_overwrites", "wgmma_256_transposed_adds"],
    },
    Mistake {
        name: "steps of an MN-major operand swapped",
        file: "hopper.cuh",
        from: "(u64)(output_step >> 4) << 16 | (u64)(1024 >> 4) << 32",
        to: "(u64)(1024 >> 4) << 16 | (u64)(output_step >> 4) << 32",
        cases: &["operands", "wgmma_128_transposed_adds"],
    },
    Mistake {
        name: "steps of the depth too short",
        file: "hopper.cuh",
        from: "constexpr int K_MAJOR_STEP = 32 / 16;",
        to: "constexpr int K_MAJOR_STEP = 16 / 16;",
        cases: &["wgmma_128_overwrites"],
    },
    Mistake {
        name: "transposition lost",
        file: "hopper.cuh",
        from: "%128, %129, p, 1, 1, 0, %131; }",
        to: "%128, %129, p, 1, 1, 0, 0; }",
        cases: &["wgmma_256_transposed_overwrites"],
    },
    Mistake {
        name: "accumulation the wrong way round",
        file: "hopper.cuh",
        from: "setp.ne.b32 p, %66, 0;",
        to: "setp.eq.b32 p, %66, 0;",
        cases: &["wgmma_128_overwrites", "wgmma_128_adds"],
    },
];

/// The kernels with a mistake, where they are emulated: a GPU may hang on some.
fn machine_with_mistake(Mistake { file, from, to, .. }: &Mistake) -> Option<Machine> {
    machine_with(sources().with(file, from, to).unwrap()).filter(Machine::emulated)
}

#[test]
fn mistakes_are_noticed() {
    if is_child() {
        return;
    }
    let all: Vec<Case> = common::cases().into_iter().chain(hopper::cases()).collect();
    let mut unnoticed = Vec::new();
    for mistake in MISTAKES {
        let Some(mut machine) = machine_with_mistake(mistake) else { return };
        for wanted in mistake.cases {
            let case = all.iter().find(|case| case.name == *wanted).unwrap();
            if case.at.file == hopper::FILE && !hopper::runs_on(&machine) {
                continue;
            }
            // It is still a program: what is noticed is what it does.
            machine.cuda.kernel(case.at.file, case.at.entry).unwrap();
            let outcome = case.outcome(&machine);
            let how = match &outcome {
                Ok(found) => difference(found, &case.expected),
                Err(error) => error.to_string(),
            };
            let what = format!("{}, by {wanted}", mistake.name);
            println!("{what}: {how}");
            match outcome {
                Ok(found) if found == case.expected => unnoticed.push(what),
                Ok(_) => {}
                Err(_) => {
                    // A device on which a kernel failed runs no other.
                    drop(machine);
                    let Some(fresh) = machine_with_mistake(mistake) else { return };
                    machine = fresh;
                }
            }
        }
    }
    assert!(unnoticed.is_empty(), "not noticed: {}", unnoticed.join("; "));
}
