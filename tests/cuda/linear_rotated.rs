//! q, k and v from one product whose epilogue turns the heads of q and k. The sums themselves are those of the plain
//! product, bit for bit; what is made of them is compared with the same float32 operations and with float64.

use std::panic::{AssertUnwindSafe, catch_unwind};

use cuemu::launcher::Sanitizer;
use gradlens::backend::cuda::Buf;
use gradlens::backend::cuda::linear::Tile;
use gradlens::backend::cuda::rope::{Pairs, RopeTable, Rotation};
use half::bf16;

use super::faults::{self, Fault, WRONG};
use super::linear::{BY_THREADS, Operand, tiles};
use super::machine::{Machine, Random, machine};

/// Half a unit of float32 in the last place, relative.
const UNIT: f64 = 1.0 / 16_777_216.0;
const MMA: &str = "linear_rotated::mma_sync_gives_the_same_bits_under_all_schedules";

/// What these tests must notice.
pub const FAULTS: &[Fault] = &[
    Fault {
        name: "turned the other way",
        file: "epilogue.cuh",
        from: "rotate(v.x, v.y, angle.cos.x, angle.sin.x)",
        to: "rotate(v.x, v.y, angle.cos.x, -angle.sin.x)",
        test: MMA,
        build: Sanitizer::None,
        reports: WRONG,
    },
    Fault {
        name: "cosine and sine swapped",
        file: "epilogue.cuh",
        from: "rotate(v.z, v.w, angle.cos.y, angle.sin.y)",
        to: "rotate(v.z, v.w, angle.sin.y, angle.cos.y)",
        test: MMA,
        build: Sanitizer::None,
        reports: WRONG,
    },
    Fault {
        name: "the angle of the pair before",
        file: "epilogue.cuh",
        from: "rotate(v.z, v.w, angle.cos.y, angle.sin.y)",
        to: "rotate(v.z, v.w, angle.cos.x, angle.sin.x)",
        test: MMA,
        build: Sanitizer::None,
        reports: WRONG,
    },
    Fault {
        name: "the position of another row",
        file: "epilogue.cuh",
        from: "(i64)positions[row] * pairs",
        to: "(i64)positions[row ^ 1] * pairs",
        test: MMA,
        build: Sanitizer::None,
        reports: &["instead of", "out of bounds global"],
    },
    Fault {
        name: "the row's number for its position",
        file: "epilogue.cuh",
        from: "(i64)positions[row] * pairs",
        to: "(i64)row * pairs",
        test: MMA,
        build: Sanitizer::None,
        reports: &["instead of", "out of bounds global"],
    },
    Fault {
        name: "the angle of the first head for all of them",
        file: "epilogue.cuh",
        from: "(u32)column / 2 % (u32)pairs",
        to: "(u32)column / 2",
        test: MMA,
        build: Sanitizer::None,
        reports: &["instead of", "out of bounds global"],
    },
    Fault {
        name: "turned past the last head",
        file: "epilogue.cuh",
        from: "return column < rotated;",
        to: "return column <= rotated;",
        test: MMA,
        build: Sanitizer::None,
        reports: WRONG,
    },
    Fault {
        name: "values turned with the last keys",
        file: "epilogue.cuh",
        from: "if (turns(column)) rotate(",
        to: "rotate(",
        test: MMA,
        build: Sanitizer::None,
        reports: WRONG,
    },
    Fault {
        name: "rounded before it turns",
        file: "epilogue.cuh",
        from: "if (turns(column)) rotate(",
        to: "v.y = to_float(from_float<A>(v.y));\n    if (turns(column)) rotate(",
        test: MMA,
        build: Sanitizer::None,
        reports: WRONG,
    },
];

/// A layer of which the first heads turn.
#[derive(Clone, Copy, Debug)]
struct Shape {
    rows: usize,
    inputs: usize,
    outputs: usize,
    heads: usize,
    pairs: usize,
}

impl Shape {
    const fn new([rows, inputs, outputs]: [usize; 3], heads: usize, head_dim: usize) -> Self {
        Self { rows, inputs, outputs, heads, pairs: head_dim / 2 }
    }
}

struct Layer<A> {
    shape: Shape,
    x: Buf<A>,
    weight: Buf<A>,
    bias: Buf<f32>,
    positions: Buf<i32>,
    inv_freq: Vec<f32>,
    table: RopeTable,
}

impl<A: Operand> Layer<A> {
    /// Rows from `first` on of [`Layer::new`]'s.
    fn rows_from(machine: &Machine, shape: Shape, first: usize) -> Self {
        let Shape { rows, inputs, outputs, pairs, .. } = shape;
        let mut random = Random::new((rows * 31 + inputs * 7 + outputs) as u64);
        let memory = &machine.cuda.device.memory;
        let x: Vec<A> = random.f32(rows * inputs).iter().map(|v| A::of(v * 4.0)).collect();
        // Samples of eleven tokens, starting with the fourth; the last row has the table's last position.
        let last = 40;
        let position = |row: usize| if row + 1 == rows { last } else { (row as i32 + 3) % 11 };
        let positions: Vec<i32> = (first..rows).map(position).collect();
        let inv_freq: Vec<f32> = (0..pairs).map(|j| 100.0_f32.powf(-(j as f32) / pairs as f32)).collect();
        Self {
            shape: Shape { rows: rows - first, ..shape },
            x: Buf::from_host(memory, &x, inputs).unwrap().view(first..rows),
            weight: Buf::from_host(memory, &A::random(&mut random, outputs * inputs), inputs).unwrap(),
            bias: Buf::from_host(memory, &random.f32(outputs), outputs).unwrap(),
            positions: Buf::from_host(memory, &positions, rows - first).unwrap(),
            table: machine.cuda.rope_table(&inv_freq, last as usize + 1).unwrap(),
            inv_freq,
        }
    }

    fn new(machine: &Machine, shape: Shape) -> Self {
        Self::rows_from(machine, shape, 0)
    }

    fn rotated(&self, machine: &Machine, tile: Tile, bias: bool) -> Vec<A> {
        let bias = bias.then_some(&self.bias);
        let Self { x, weight, table, positions, .. } = self;
        let heads = self.shape.heads;
        let out = machine.cuda.linear_rotated_with(tile, x, weight, bias, heads, table, positions).unwrap();
        assert_eq!((out.rows(), out.width()), (self.shape.rows, self.shape.outputs));
        out.to_host().unwrap()
    }

    /// Against the plain product's float32 sums, turned here: in float32 to the bit, where columns do not turn too, and
    /// in float64 within the roundings of cosine or sine, of one product and of the sum.
    fn check(&self, machine: &Machine, tile: Tile, found: &[A], bias: bool) {
        let Shape { outputs, heads, pairs, .. } = self.shape;
        let given = bias.then_some(&self.bias);
        let sums: Buf<f32> = machine.cuda.linear_forward_with(tile, &self.x, &self.weight, given).unwrap();
        let (sums, positions) = (sums.to_host().unwrap(), self.positions.to_host().unwrap());
        assert_eq!(found.len(), sums.len());
        for (i, (found, sum)) in found.iter().zip(&sums).enumerate() {
            let (row, column) = (i / outputs, i % outputs);
            let what = format!("{:?} in {} by {tile:?}, row {row}, column {column}", self.shape, A::NAME);
            let wide: f64 = (*found).into();
            if column >= 2 * heads * pairs {
                assert!(*found == A::of(*sum), "{what}: {wide} instead of {sum}, which does not turn");
                continue;
            }
            let angle = f64::from(positions[row] as f32 * self.inv_freq[column / 2 % pairs]);
            let (sin, cos) = (angle.sin() as f32, angle.cos() as f32);
            let other = sums[row * outputs + (column ^ 1)];
            let sin = if column % 2 == 0 { -sin } else { sin };
            let exact = sum.mul_add(cos, other * sin);
            assert!(*found == A::of(exact), "{what}: {wide} instead of {exact}, rounded once");
            let sign = if column % 2 == 0 { -1.0 } else { 1.0 };
            let (a, b) = (f64::from(*sum) * angle.cos(), sign * f64::from(other) * angle.sin());
            let (turned, size) = (a + b, a.abs() + b.abs());
            let tolerance = 3.1 * UNIT * size;
            let tolerance = tolerance + A::ROUNDING * (turned.abs() + tolerance) * 1.001;
            assert!((wide - turned).abs() <= tolerance, "{what}: {wide} instead of {turned} ± {tolerance:e}");
        }
    }
}

/// Heads that end inside a tile, at its edge and past it, on rows that end inside one; rows of no whole vectors; all
/// columns turn, and none.
const SHAPES: [Shape; 8] = [
    Shape::new([1, 8, 8], 1, 8),
    Shape::new([130, 72, 136], 5, 20),
    Shape::new([66, 200, 264], 3, 64),
    Shape::new([70, 40, 33], 2, 16),
    Shape::new([3, 16, 63], 5, 12),
    Shape::new([5, 8, 129], 1, 128),
    Shape::new([5, 72, 128], 2, 64),
    Shape::new([5, 8, 40], 0, 4),
];

fn matches_float64<A: Operand>(machine: &Machine) {
    for tile in tiles::<A>(machine) {
        for (index, shape) in SHAPES.into_iter().enumerate() {
            let layer = Layer::<A>::new(machine, shape);
            let bias = index % 3 != 0;
            layer.check(machine, tile, &layer.rotated(machine, tile, bias), bias);
        }
    }
    for shape in
        [Shape::new([1, 1, 4], 1, 4), Shape::new([66, 67, 65], 4, 16), Shape::new([2, 3, 130], 5, 24)]
    {
        let layer = Layer::<A>::new(machine, shape);
        layer.check(machine, Tile::Unaligned, &layer.rotated(machine, Tile::Unaligned, true), true);
    }
}

#[test]
fn heads_match_float64() {
    let Some(machine) = machine() else { return };
    matches_float64::<bf16>(&machine);
    matches_float64::<f32>(&machine);
}

/// More stages than a ring has slots, and heads that end inside a tile. A process with a planted fault takes the first
/// tile.
fn same_bits<A: Operand>(machine: &Machine, wanted: &[Tile]) {
    let wanted = if faults::is_planted() { &wanted[..1] } else { wanted };
    for tile in tiles::<A>(machine).into_iter().filter(|tile| wanted.contains(tile)) {
        if tile != wanted[0] && !machine.affordable(66 * 264) {
            continue;
        }
        for shape in [Shape::new([66, 264, 72], 3, 20), Shape::new([5, 8, 7], 1, 4)] {
            let layer = Layer::<A>::new(machine, shape);
            let found = machine.same_under_all_schedules(|| layer.rotated(machine, tile, true));
            layer.check(machine, tile, &found, true);
        }
    }
}

#[test]
fn mma_sync_gives_the_same_bits_under_all_schedules() {
    let Some(machine) = machine() else { return };
    same_bits::<bf16>(&machine, &BY_THREADS);
}

#[test]
fn wgmma_gives_the_same_bits_under_all_schedules() {
    let Some(machine) = machine() else { return };
    same_bits::<bf16>(&machine, &[Tile::Narrow, Tile::Wide]);
}

#[test]
fn ffma_gives_the_same_bits_under_all_schedules() {
    let Some(machine) = machine() else { return };
    same_bits::<f32>(&machine, &BY_THREADS);
}

/// The first is nobody's neighbour, the last rows lie elsewhere in a tile: the same bits. And those of the product, the
/// rotation and the rounding one after the other.
fn bits_do_not_depend_on_other_rows<A: Operand>(machine: &Machine, family: &[Tile]) {
    let (shape, first) = (Shape::new([150, 72, 200], 5, 36), 77);
    let [all, last] = [0, first].map(|first| Layer::<A>::rows_from(machine, shape, first));
    let mut found = Vec::new();
    for &tile in family.iter().filter(|tile| tiles::<A>(machine).contains(tile)) {
        let out = all.rotated(machine, tile, true);
        assert!(last.rotated(machine, tile, true) == out[first * 200..], "{tile:?}");
        let mut y: Buf<f32> =
            machine.cuda.linear_forward_with(tile, &all.x, &all.weight, Some(&all.bias)).unwrap();
        let (table, positions) = (&all.table, &all.positions);
        machine
            .cuda
            .rope_in_place(&mut y, shape.heads, Pairs::Neighbours, table, positions, Rotation::Forward)
            .unwrap();
        let apart: Buf<A> = machine.cuda.cast(&y).unwrap();
        assert!(apart.to_host().unwrap() == out, "{tile:?}, in three steps");
        found.push(out);
    }
    assert!(found.windows(2).all(|pair| pair[0] == pair[1]), "{family:?}");
}

#[test]
fn bits_of_a_row_do_not_depend_on_other_rows_or_the_tile() {
    let Some(machine) = machine() else { return };
    bits_do_not_depend_on_other_rows::<bf16>(&machine, &BY_THREADS);
    bits_do_not_depend_on_other_rows::<bf16>(&machine, &[Tile::Narrow, Tile::Wide]);
    bits_do_not_depend_on_other_rows::<f32>(&machine, &BY_THREADS);
}

#[test]
fn heads_must_fit_and_be_whole_vectors() {
    let Some(machine) = machine() else { return };
    let refused = |heads: usize, head_dim: usize, positions: usize| {
        let layer = Layer::<f32>::new(&machine, Shape::new([2, 4, 20], heads, head_dim));
        let positions = Buf::from_host(&machine.cuda.device.memory, &vec![0; positions], positions).unwrap();
        let Layer { x, weight, table, .. } = &layer;
        let product = || machine.cuda.linear_rotated(x, weight, None, heads, table, &positions).map(drop);
        catch_unwind(AssertUnwindSafe(product)).is_err()
    };
    assert!(!refused(2, 8, 2) && !refused(5, 4, 2));
    assert!(refused(3, 8, 2) && refused(2, 6, 2));
    assert!(refused(2, 8, 1) && refused(2, 8, 3));
}
