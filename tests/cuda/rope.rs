//! Rotary position embeddings against float64.

use std::panic::{AssertUnwindSafe, catch_unwind};

use cuemu::launcher::Sanitizer;
use gradlens::backend::cuda::Buf;
use gradlens::backend::cuda::rope::{Pairs, Rotation};
use half::bf16;

use super::elementwise::{EPSILON, Number, assert_near, assert_same, numbers};
use super::faults::{Fault, WRONG};
use super::machine::{Machine, Random, machine};

/// What these tests must notice.
pub const FAULTS: &[Fault] = &[
    Fault {
        name: "turned the other way",
        file: "common.cuh",
        from: "fmaf(a, cos, -__fmul_rn(b, sin))",
        to: "fmaf(a, cos, __fmul_rn(b, sin))",
        test: "rope::rotation",
        build: Sanitizer::None,
        reports: WRONG,
    },
    Fault {
        name: "the second of a pair from the turned first",
        file: "common.cuh",
        from: "b = fmaf(b, cos, __fmul_rn(a, sin));\n  a = turned;",
        to: "a = turned;\n  b = fmaf(b, cos, __fmul_rn(a, sin));",
        test: "rope::rotation",
        build: Sanitizer::None,
        reports: WRONG,
    },
    Fault {
        name: "neighbours instead of halves",
        file: "rope.cu",
        from: "T* pair = x + 2 * head * pairs + (NEIGHBOURS ? 2 * j : j);",
        to: "T* pair = x + 2 * head * pairs + (NEIGHBOURS ? 2 * j : j ^ 1);",
        test: "rope::rotation",
        build: Sanitizer::None,
        reports: &["instead of", "relative error", "other bytes under", "out of bounds global"],
    },
    Fault {
        name: "the adjoint turns forward",
        file: "rope.cu",
        from: "rotate(a[k], b[k], c[i].value(k), sign * s[i].value(k))",
        to: "rotate(a[k], b[k], c[i].value(k), s[i].value(k))",
        test: "rope::rotation",
        build: Sanitizer::None,
        reports: WRONG,
    },
    Fault {
        name: "the row's number for its position",
        file: "rope.cu",
        from: "(i64)positions[place.row] * pairs",
        to: "place.row * pairs",
        test: "rope::rotation",
        build: Sanitizer::None,
        reports: &["instead of", "out of bounds global"],
    },
    Fault {
        name: "a group past the last head",
        file: "rope.cu",
        from: "if (start + i * lanes < items) store_4(x + column",
        to: "if (start + i * lanes <= items) store_4(x + column",
        test: "rope::rotation",
        build: Sanitizer::None,
        reports: WRONG,
    },
    Fault {
        name: "rows past the last one",
        file: "rope.cu",
        from: "if (place.row >= rows) return;",
        to: "",
        test: "rope::rotation",
        build: Sanitizer::Address,
        reports: &["out of bounds global", "AddressSanitizer"],
    },
    Fault {
        name: "neighbours with the next pair's angle",
        file: "rope.cu",
        from: "rotate(v[2], v[3], c[i].y, sign * s[i].y);",
        to: "rotate(v[2], v[3], c[i].x, sign * s[i].x);",
        test: "rope::rotation",
        build: Sanitizer::None,
        reports: WRONG,
    },
    Fault {
        name: "neighbours turned the other way",
        file: "rope.cu",
        from: "rotate(v[0], v[1], c[i].x, sign * s[i].x);",
        to: "rotate(v[0], v[1], c[i].x, -sign * s[i].x);",
        test: "rope::rotation",
        build: Sanitizer::None,
        reports: WRONG,
    },
    Fault {
        name: "neighbours past the last head",
        file: "rope.cu",
        from: "if (start + i * lanes < items) store_4(x + 4",
        to: "if (start + i * lanes <= items) store_4(x + 4",
        test: "rope::rotation",
        build: Sanitizer::None,
        reports: WRONG,
    },
    Fault {
        name: "groups that two threads turn",
        file: "rope.cu",
        from: "item = start + i * lanes, head",
        to: "item = start + i * (lanes > 8 ? lanes - 1 : lanes), head",
        test: "rope::rotation",
        build: Sanitizer::Thread,
        reports: &["ThreadSanitizer: data race"],
    },
];

/// Some heads of wider rows.
#[derive(Clone, Copy, Debug)]
struct Shape {
    tokens: usize,
    /// Those that turn.
    heads: usize,
    pairs: usize,
    width: usize,
}

fn inv_freq(pairs: usize) -> Vec<f32> {
    (0..pairs).map(|j| 10_000.0_f64.powf(-(j as f64) / pairs as f64) as f32).collect()
}

/// Wanted values, and for each the size that its error scales with.
fn reference<A: Number>(
    x: &[A],
    positions: &[i32],
    shape: Shape,
    layout: Pairs,
    sign: f64,
) -> (Vec<f64>, Vec<f64>) {
    let Shape { heads, pairs, width, .. } = shape;
    let mut wanted: Vec<f64> = x.iter().map(|x| x.wide()).collect();
    let mut size = vec![0.0; x.len()];
    let freq = inv_freq(pairs);
    for (row, position) in positions.iter().enumerate() {
        for head in 0..heads {
            for (j, freq) in freq.iter().enumerate() {
                let angle = f64::from(*position as f32 * freq);
                let (sin, cos) = (sign * angle.sin(), angle.cos());
                let start = row * width + 2 * head * pairs;
                let (first, second) = match layout {
                    Pairs::Halves => (start + j, start + j + pairs),
                    Pairs::Neighbours => (start + 2 * j, start + 2 * j + 1),
                };
                let (a, b) = (wanted[first], wanted[second]);
                wanted[first] = a * cos - b * sin;
                wanted[second] = b * cos + a * sin;
                size[first] = (a * cos).abs() + (b * sin).abs();
                size[second] = (b * cos).abs() + (a * sin).abs();
            }
        }
    }
    (wanted, size)
}

fn check<A: Number>(machine: &Machine, shape: Shape, layout: Pairs, direction: Rotation) {
    let Shape { tokens, heads, pairs, width } = shape;
    let cuda = &machine.cuda;
    let memory = &cuda.device.memory;
    let x: Vec<A> = numbers(&mut Random::new((tokens * width + pairs) as u64), tokens * width);
    // Samples of seven tokens; the last row has the table's last position.
    let last = 500;
    let positions: Vec<i32> =
        (1..=tokens as i32).map(|n| if n as usize == tokens { last } else { (n - 1) % 7 }).collect();
    let table = cuda.rope_table(&inv_freq(pairs), last as usize + 1).unwrap();
    let positions_device = Buf::from_host(memory, &positions, tokens).unwrap();
    let out = machine.same_under_all_schedules(|| {
        let mut x = Buf::from_host(memory, &x, width).unwrap();
        cuda.rope_in_place(&mut x, heads, layout, &table, &positions_device, direction).unwrap();
        x.to_host().unwrap()
    });
    let what = format!("{} {shape:?} {layout:?} {direction:?}", A::NAME);
    let sign = if direction == Rotation::Forward { 1.0 } else { -1.0 };
    let (wanted, size) = reference(&x, &positions, shape, layout, sign);
    // Roundings of cosine or sine, of one product, of the sum; and of a bfloat16 element. What did not turn is exact.
    let element = if A::ROUNDING > EPSILON { A::ROUNDING } else { 0.0 };
    let bound =
        |i: usize| if size[i] == 0.0 { 0.0 } else { 3.1 * EPSILON * size[i] + wanted[i].abs() * element };
    assert_near(&out, &wanted, bound, &what);

    // The last row on its own: another place, no neighbours.
    let row = Buf::from_host(memory, &x, width).unwrap().view(tokens - 1..tokens);
    let position = Buf::from_host(memory, &[last], 1).unwrap();
    cuda.rope_in_place(&mut row.view(0..1), heads, layout, &table, &position, direction).unwrap();
    assert_same(
        &row.to_host().unwrap(),
        &out[(tokens - 1) * width..],
        &format!("{what}, its last row alone"),
    );
}

#[test]
fn rotation() {
    let Some(machine) = machine() else { return };
    // (tokens, heads, pairs, width): one pair, rows of one thread; odd heads; aligned heads in rows that are not; a
    // part of a warp, two groups a thread and not all of them; the same over a block; two turns of a block. Neighbours share
    // a row by twice as many threads.
    let shapes =
        [(300, 1, 1, 2), (5, 2, 3, 18), (5, 1, 4, 10), (9, 3, 32, 320), (3, 9, 64, 1408), (2, 40, 64, 6144)];
    for (tokens, heads, pairs, width) in shapes {
        // Under ThreadSanitizer threads are what costs.
        if machine.affordable(2 * tokens * heads * pairs) {
            let shape = Shape { tokens, heads, pairs, width };
            for layout in [Pairs::Halves, Pairs::Neighbours] {
                check::<f32>(&machine, shape, layout, Rotation::Forward);
                check::<bf16>(&machine, shape, layout, Rotation::Backward);
            }
        }
    }
    let shape = Shape { tokens: 9, heads: 2, pairs: 16, width: 64 };
    for layout in [Pairs::Halves, Pairs::Neighbours] {
        check::<f32>(&machine, shape, layout, Rotation::Backward);
        check::<bf16>(&machine, shape, layout, Rotation::Forward);
    }
}

#[test]
fn heads_must_fit_and_rows_have_positions() {
    let Some(machine) = machine() else { return };
    let cuda = &machine.cuda;
    let memory = &cuda.device.memory;
    let table = cuda.rope_table(&inv_freq(4), 3).unwrap();
    assert_eq!((table.pairs(), table.positions()), (4, 3));
    let refused = |heads: usize, positions: &[i32]| {
        let mut x = Buf::from_host(memory, &[1.0_f32; 40], 20).unwrap();
        let positions = Buf::from_host(memory, positions, positions.len()).unwrap();
        let rotate =
            || cuda.rope_in_place(&mut x, heads, Pairs::Halves, &table, &positions, Rotation::Forward);
        catch_unwind(AssertUnwindSafe(rotate)).is_err()
    };
    assert!(!refused(2, &[0, 2]));
    assert!(!refused(0, &[0, 2]));
    assert!(refused(3, &[0, 2]));
    assert!(refused(2, &[0]) && refused(2, &[0, 1, 2]));
}
