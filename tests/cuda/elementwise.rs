//! Embedding lookup, sums, the gate and copies of columns, against float64 or exactly.

use std::panic::{AssertUnwindSafe, catch_unwind};

use gradlens::backend::cuda::{Activation, Buf, Real};
use half::bf16;

use super::machine::{Machine, Random, machine};

/// An element type on the host.
pub trait Number: Real + PartialEq {
    /// Unit roundoff.
    const ROUNDING: f64;
    fn of(value: f32) -> Self;
    fn wide(self) -> f64;
}

impl Number for f32 {
    const ROUNDING: f64 = EPSILON;
    fn of(value: f32) -> Self {
        value
    }
    fn wide(self) -> f64 {
        self.into()
    }
}

impl Number for bf16 {
    const ROUNDING: f64 = 1.0 / 256.0;
    fn of(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn wide(self) -> f64 {
        self.to_f64()
    }
}

/// Unit roundoff of float32.
pub const EPSILON: f64 = 1.0 / (1 << 24) as f64;

pub fn numbers<T: Number>(random: &mut Random, len: usize) -> Vec<T> {
    random.f32(len).into_iter().map(T::of).collect()
}

/// Every element within its own bound.
pub fn assert_near<T: Number>(found: &[T], wanted: &[f64], bound: impl Fn(usize) -> f64, what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    for (index, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        let (error, bound) = ((found.wide() - wanted).abs(), bound(index));
        assert!(error <= bound, "{what} [{index}]: {} instead of {wanted}, bound {bound:e}", found.wide());
    }
}

/// Every element exactly.
pub fn assert_same<T: Number>(found: &[T], wanted: &[T], what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    for (index, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        assert!(found == wanted, "{what} [{index}]: {} instead of {}", found.wide(), wanted.wide());
    }
}

fn check_embed<A: Number>(machine: &Machine, tokens: usize, width: usize, scale: f32) {
    let cuda = &machine.cuda;
    let memory = &cuda.device.memory;
    let vocab = 7;
    let values: Vec<A> = numbers(&mut Random::new((tokens * width) as u64), vocab * width);
    // The last id among them: one past a row of the table is past its end.
    let ids: Vec<u32> = (0..tokens).map(|n| (5 * n as u32 + 6) % vocab as u32).collect();
    let table = Buf::from_host(memory, &values, width).unwrap();
    let device_ids = Buf::from_host(memory, &ids, tokens).unwrap();
    let out = machine
        .same_under_all_schedules(|| cuda.embed(&table, &device_ids, scale).unwrap().to_host().unwrap());
    let rows = ids.iter().flat_map(|id| &values[*id as usize * width..][..width]);
    let wanted: Vec<f32> = rows.map(|value| value.wide() as f32 * scale).collect();
    assert_same(&out, &wanted, &format!("embed {} {tokens}x{width} times {scale}", A::NAME));
}

/// Rows of one thread, of a part of a warp, of a block with another turn; with and without a remainder; rows that do
/// not fill the last block.
#[test]
fn embed() {
    let Some(machine) = machine() else { return };
    let shapes = [(1, 1), (300, 2), (9, 5), (70, 6), (37, 64), (5, 900), (2, 2052), (1, 1029)];
    for (tokens, width) in shapes.into_iter().filter(|(n, width)| machine.affordable(n * width)) {
        for scale in [1.0, (width as f32).sqrt() + 0.1] {
            check_embed::<f32>(&machine, tokens, width, scale);
            check_embed::<bf16>(&machine, tokens, width, scale);
        }
    }
    let cuda = &machine.cuda;
    let table = Buf::from_host(&cuda.device.memory, &[1.0_f32; 8], 8).unwrap();
    let no_ids = Buf::from_host(&cuda.device.memory, &[], 0).unwrap();
    assert!(
        catch_unwind(AssertUnwindSafe(|| cuda.embed(&table, &no_ids, 1.0))).is_err(),
        "ids without a row"
    );
}

/// Shapes of whole buffers, and whether they are views that start one row (so at any alignment) into their memory.
const SHAPES: [(usize, usize, bool); 7] = [
    (1, 1, false),
    (1, 3, true),
    (2, 2, false),
    (3, 5, true),
    (5, 64, false),
    (3, 341, false),
    (4, 512, true),
];

/// On the device; as a view with a row of NaN before it.
fn upload<T: Number>(machine: &Machine, values: &[T], width: usize, view: bool) -> Buf<T> {
    let before = vec![T::of(f32::NAN); if view { width } else { 0 }];
    let all = [before.as_slice(), values].concat();
    let buf = Buf::from_host(&machine.cuda.device.memory, &all, width).unwrap();
    buf.view(usize::from(view)..buf.rows())
}

fn affordable_shapes(machine: &Machine) -> impl Iterator<Item = (usize, usize, bool)> {
    SHAPES.into_iter().filter(|(rows, width, _)| machine.affordable(rows * width))
}

#[test]
fn add() {
    let Some(machine) = machine() else { return };
    let cuda = &machine.cuda;
    for (rows, width, view) in affordable_shapes(&machine) {
        let mut random = Random::new((rows + width) as u64);
        let (a, b) = (random.f32(rows * width), random.f32(rows * width));
        let wanted: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
        let [b_device, a_device] = [&b, &a].map(|values| upload(&machine, values, width, view));
        let (out, in_place) = machine.same_under_all_schedules(|| {
            let out = cuda.add(&a_device, &b_device).unwrap().to_host().unwrap();
            let mut a = upload(&machine, &a, width, view);
            cuda.add_in_place(&mut a, &b_device).unwrap();
            (out, a.to_host().unwrap())
        });
        assert_same(&out, &wanted, &format!("sum {rows}x{width}"));
        assert_same(&in_place, &wanted, &format!("sum in place {rows}x{width}"));
    }
}

/// silu and its derivative.
fn silu(g: f64) -> (f64, f64) {
    let sigmoid = 1.0 / (1.0 + (-g).exp());
    (g * sigmoid, sigmoid * (1.0 + g * (1.0 - sigmoid)))
}

fn check_gate_forward<A: Number>(machine: &Machine, rows: usize, width: usize, view: bool) {
    let cuda = &machine.cuda;
    let mut random = Random::new((3 * rows + width) as u64);
    let gate: Vec<f32> = random.f32(rows * width).iter().map(|g| 9.0 * g).collect();
    let up = random.f32(rows * width);
    let [gate_device, up_device] = [&gate, &up].map(|values| upload(machine, values, width, view));
    let out = machine.same_under_all_schedules(|| {
        cuda.gate::<A>(&gate_device, &up_device, Activation::Silu).unwrap().to_host().unwrap()
    });
    let wanted: Vec<f64> = gate.iter().zip(&up).map(|(g, u)| silu(f64::from(*g)).0 * f64::from(*u)).collect();
    // 12 for the activation, 1 for the product, and the rounding of the element.
    let bound = |index: usize| wanted[index].abs() * (13.0 * EPSILON + A::ROUNDING);
    assert_near(&out, &wanted, bound, &format!("gate {} {rows}x{width} view {view}", A::NAME));
}

#[test]
fn gate_forward() {
    let Some(machine) = machine() else { return };
    for (rows, width, view) in affordable_shapes(&machine) {
        check_gate_forward::<f32>(&machine, rows, width, view);
        check_gate_forward::<bf16>(&machine, rows, width, view);
    }
}

#[test]
fn gate_backward() {
    let Some(machine) = machine() else { return };
    let cuda = &machine.cuda;
    let cases = [[true, false], [false, true], [true, true], [false, false]];
    for ((rows, width, view), so_far) in affordable_shapes(&machine).zip(cases.into_iter().cycle()) {
        let mut random = Random::new((5 * rows + width) as u64);
        let gate: Vec<f32> = random.f32(rows * width).iter().map(|g| 9.0 * g).collect();
        let [up, dout, to_gate, to_up] = [(); 4].map(|()| random.f32(rows * width));
        let [gate_device, up_device, dout_device] =
            [&gate, &up, &dout].map(|values| upload(&machine, values, width, view));
        let [dgate, dup] = machine.same_under_all_schedules(|| {
            let base = [(&to_gate, so_far[0]), (&to_up, so_far[1])]
                .map(|(values, there)| there.then(|| upload(&machine, values, width, view)));
            let gradients =
                cuda.gate_backward(&gate_device, &up_device, Activation::Silu, &dout_device, base);
            gradients.unwrap().map(|gradient| gradient.to_host().unwrap())
        });
        let wide = |values: &[f32], index: usize| f64::from(values[index]);
        let check = |found: &[f32], base: Option<&[f32]>, more: &dyn Fn(usize) -> (f64, f64), what: &str| {
            let base = |index: usize| base.map_or(0.0, |base| wide(base, index));
            let wanted: Vec<f64> = (0..found.len()).map(|index| base(index) + more(index).0).collect();
            // 12 for the activation, 2 for the products; 1 for the sum.
            let bound = |index: usize| (14.0 * more(index).1 + wanted[index].abs()) * EPSILON;
            assert_near(found, &wanted, bound, &format!("{what} {rows}x{width} view {view} {so_far:?}"));
        };
        // A term of the gradient, and the size that its error scales with: act' is a sum of two.
        let of_gate = |index: usize| {
            let (g, factor) = (wide(&gate, index), wide(&dout, index) * wide(&up, index));
            let sigmoid = 1.0 / (1.0 + (-g).exp());
            (factor * silu(g).1, factor.abs() * (sigmoid + (g * sigmoid * (1.0 - sigmoid)).abs()))
        };
        let of_up = |index: usize| {
            let term = wide(&dout, index) * silu(wide(&gate, index)).0;
            (term, term.abs())
        };
        check(&dgate, so_far[0].then_some(to_gate.as_slice()), &of_gate, "dgate");
        check(&dup, so_far[1].then_some(to_up.as_slice()), &of_up, "dup");
    }
}

/// Where an element lies in its memory, and so whether it is done with its neighbours, changes no bit.
#[test]
fn alignment_changes_no_bit() {
    let Some(machine) = machine() else { return };
    let cuda = &machine.cuda;
    let (rows, width) = (3, 67);
    let mut random = Random::new(8);
    let gate: Vec<f32> = random.f32(rows * width).iter().map(|g| 20.0 * g).collect();
    let [up, dout, base] = [(); 3].map(|()| random.f32(rows * width));
    let run = |view: bool| {
        let [gate, up, dout, base] =
            [&gate, &up, &dout, &base].map(|values| upload(&machine, values, width, view));
        let out = cuda.gate::<f32>(&gate, &up, Activation::Silu).unwrap().to_host().unwrap();
        let [dgate, dup] =
            cuda.gate_backward(&gate, &up, Activation::Silu, &dout, [Some(base), None]).unwrap();
        [out, dgate.to_host().unwrap(), dup.to_host().unwrap()]
    };
    let (aligned, apart) = (run(false), run(true));
    assert!(aligned == apart, "other bits where rows are not aligned");
}

/// Copies `columns` of rows of `from` into rows of `to`, from `first` on; then adds them there.
#[derive(Clone, Copy)]
struct Columns {
    rows: usize,
    from: usize,
    start: usize,
    columns: usize,
    to: usize,
    first: usize,
}

fn check_columns<F: Number, T: Number>(machine: &Machine, case: Columns) {
    let Columns { rows, from, start, columns, to, first } = case;
    let cuda = &machine.cuda;
    let mut random = Random::new((rows * from + to + columns) as u64);
    let source: Vec<F> = numbers(&mut random, rows * from);
    let target: Vec<T> = numbers(&mut random, rows * to);
    let sums: Vec<f32> = random.f32(rows * to);
    let source_device = upload(machine, &source, from, false);
    let (copied, added) = machine.same_under_all_schedules(|| {
        let mut copied = upload(machine, &target, to, false);
        cuda.copy_columns(&source_device, start..start + columns, &mut copied, first).unwrap();
        let mut added = upload(machine, &sums, to, false);
        cuda.add_columns(&source_device, start..start + columns, &mut added, first).unwrap();
        (copied.to_host().unwrap(), added.to_host().unwrap())
    });
    let (mut wanted, mut wanted_sums) = (target, sums);
    for row in 0..rows {
        for column in 0..columns {
            let (at, value) = (row * to + first + column, source[row * from + start + column].wide() as f32);
            wanted[at] = T::of(value);
            wanted_sums[at] += value;
        }
    }
    let what = format!("{columns} columns of {} {rows}x{from} {start} to {} x{to} {first}", F::NAME, T::NAME);
    assert_same(&copied, &wanted, &format!("copy of {what}"));
    assert_same(&added, &wanted_sums, &format!("sum of {what}"));
}

#[test]
fn columns() {
    let Some(machine) = machine() else { return };
    // (rows, from, start, columns, to, first): aligned; each of the five not; one element; long rows.
    let cases = [
        (37, 64, 16, 20, 96, 64),
        (5, 63, 16, 32, 96, 64),
        (5, 64, 18, 32, 96, 64),
        (5, 64, 16, 31, 96, 64),
        (5, 64, 16, 32, 97, 64),
        (5, 64, 16, 32, 96, 62),
        (3, 1, 0, 1, 1, 0),
        (70, 12, 4, 8, 8, 0),
        (2, 2060, 4, 2052, 2056, 4),
        (1, 1029, 0, 1029, 1029, 0),
    ];
    for (rows, from, start, columns, to, first) in cases {
        if machine.affordable(100 * columns) {
            let case = Columns { rows, from, start, columns, to, first };
            check_columns::<f32, f32>(&machine, case);
            check_columns::<f32, bf16>(&machine, case);
            check_columns::<bf16, f32>(&machine, case);
            check_columns::<bf16, bf16>(&machine, case);
        }
    }
}

#[test]
fn cast_and_what_columns_refuse() {
    let Some(machine) = machine() else { return };
    let cuda = &machine.cuda;
    let values = Random::new(1).f32(3 * 5);
    let x = upload(&machine, &values, 5, false);
    let rounded: Vec<bf16> = values.iter().map(|value| bf16::from_f32(*value)).collect();
    let narrow: Buf<bf16> = cuda.cast(&x).unwrap();
    assert_same(&narrow.to_host().unwrap(), &rounded, "narrowed");
    let wide: Buf<f32> = cuda.cast(&narrow).unwrap();
    assert_same(&wide.to_host().unwrap(), &rounded.iter().map(|v| v.to_f32()).collect::<Vec<_>>(), "widened");
    let empty: Buf<f32> = cuda.cast(&x.view(1..1)).unwrap();
    assert_eq!((empty.rows(), empty.width()), (0, 5));

    let refused = |source: &Buf<f32>, columns: std::ops::Range<usize>, first: usize| {
        let mut target = upload(&machine, &values, 5, false);
        catch_unwind(AssertUnwindSafe(|| cuda.copy_columns(source, columns, &mut target, first))).is_err()
    };
    assert!(!refused(&x, 1..3, 3));
    assert!(refused(&x, 1..6, 0) && refused(&x, 1..3, 4) && refused(&x.view(0..2), 0..1, 0));
    let overlap = || cuda.add_columns(&x.view(0..2), 0..1, &mut x.view(1..3), 1);
    assert!(catch_unwind(AssertUnwindSafe(overlap)).is_err(), "columns within one buffer");
    assert!(cuda.add_columns(&x.view(0..1), 0..1, &mut x.view(1..2), 1).is_ok());
}
