//! Linear layers: every kernel against float64, on shapes that end inside tiles and use each stage of the ring
//! more than once.

use std::panic::{AssertUnwindSafe, catch_unwind};

use gradlens::backend::cuda::launch::{Launch, TensorMap};
use gradlens::backend::cuda::linear::{Direction, Shape, Tile};
use gradlens::backend::cuda::tensor_map::Swizzle;
use gradlens::backend::cuda::{Buf, Format, Real};
use half::bf16;

use super::faults;
use super::machine::{Machine, Random, machine, relative_error};

/// What operands hold.
pub trait Operand: Real + PartialEq + Into<f64> {
    const NAN: Self;
    /// Half a unit in the last place of 1, relative to 1/2: what rounding costs where float32 costs nothing.
    const ROUNDING: f64;
    /// ‖error‖ / ‖result‖ of float32 sums of a thousand terms. Partial sums grow with the square root of the terms
    /// so far and each is rounded by 0.4·2⁻²⁴ of itself: together sqrt(1000 / 2) · 0.4 · 2⁻²⁴ < 2⁻²⁰.
    const RELATIVE: f64;
    fn random(random: &mut Random, len: usize) -> Vec<Self>;
    fn of(value: f32) -> Self;
}

impl Operand for f32 {
    const NAN: Self = Self::NAN;
    const ROUNDING: f64 = 0.0;
    const RELATIVE: f64 = 1e-6;
    fn random(random: &mut Random, len: usize) -> Vec<Self> {
        random.f32(len)
    }
    fn of(value: f32) -> Self {
        value
    }
}

impl Operand for bf16 {
    const NAN: Self = Self::NAN;
    const ROUNDING: f64 = 1.0 / 256.0;
    /// Tensor cores add in other orders and may keep fewer bits.
    const RELATIVE: f64 = 1.0 / 131_072.0;
    fn random(random: &mut Random, len: usize) -> Vec<Self> {
        random.bf16(len)
    }
    fn of(value: f32) -> Self {
        Self::from_f32(value)
    }
}

/// One layer's numbers.
struct Layer<A = bf16> {
    shape: Shape,
    /// `[N, in]` or `[N, out]`
    left: Vec<A>,
    /// `[out, in]`
    weight: Vec<A>,
    /// bias `[out]` or addend `[N, in]`
    added: Vec<f32>,
    direction: Direction,
}

impl<A: Operand> Layer<A> {
    fn new(direction: Direction, [rows, in_features, out_features]: [usize; 3]) -> Self {
        let mut random = Random::new((rows * 31 + in_features * 7 + out_features) as u64);
        let (width, added) = match direction {
            Direction::Forward => (in_features, out_features),
            Direction::Backward => (out_features, rows * in_features),
        };
        Self {
            shape: Shape { rows, in_features, out_features },
            left: A::random(&mut random, rows * width),
            weight: A::random(&mut random, out_features * in_features),
            added: random.f32(added),
            direction,
        }
    }

    /// Width of the left operand and of the result.
    fn widths(&self) -> (usize, usize) {
        let Shape { in_features, out_features, .. } = self.shape;
        match self.direction {
            Direction::Forward => (in_features, out_features),
            Direction::Backward => (out_features, in_features),
        }
    }

    /// The result in float64, and the sums of its terms' absolute values, which bound the rounding.
    fn wanted(&self, with_added: bool) -> (Vec<f64>, Vec<f64>) {
        let (depth, columns) = self.widths();
        let at = |row: usize, column: usize| {
            let weight = |k: usize| match self.direction {
                Direction::Forward => self.weight[column * depth + k],
                Direction::Backward => self.weight[k * columns + column],
            };
            let terms = (0..depth).map(|k| self.left[row * depth + k].into() * weight(k).into());
            let added = match self.direction {
                Direction::Forward => self.added[column],
                Direction::Backward => self.added[row * columns + column],
            };
            let added = if with_added { f64::from(added) } else { 0.0 };
            terms.fold((added, added.abs()), |(sum, size), term| (sum + term, size + term.abs()))
        };
        (0..self.shape.rows * columns).map(|i| at(i / columns, i % columns)).unzip()
    }

    /// The operands on the device: left, weight, and what is added.
    fn on_device(&self, machine: &Machine) -> (Buf<A>, Buf<A>, Buf<f32>) {
        let memory = &machine.cuda.device.memory;
        let (depth, columns) = self.widths();
        (
            Buf::from_host(memory, &self.left, depth).unwrap(),
            Buf::from_host(memory, &self.weight, self.shape.in_features).unwrap(),
            Buf::from_host(memory, &self.added, columns).unwrap(),
        )
    }

    /// Runs a kernel.
    fn run<Y: Real>(&self, machine: &Machine, tile: Tile, with_added: bool) -> Vec<Y> {
        let (left, weight, added) = self.on_device(machine);
        let given = with_added.then_some(&added);
        let result: Buf<Y> = match self.direction {
            Direction::Forward => machine.cuda.linear_forward_with(tile, &left, &weight, given),
            Direction::Backward => machine.cuda.linear_backward_as_with(tile, &left, &weight, given),
        }
        .unwrap();
        assert_eq!((result.rows(), result.width()), (self.shape.rows, self.widths().1));
        result.to_host().unwrap()
    }

    /// Runs a kernel that adds into the buffer of what is added.
    fn run_in_place(&self, machine: &Machine, tile: Tile) -> Vec<f32> {
        let (left, weight, added) = self.on_device(machine);
        let address = added.allocation().address();
        let sum = machine.cuda.linear_backward_with(tile, &left, &weight, Some(added)).unwrap();
        assert_eq!(sum.allocation().address(), address, "in place");
        sum.to_host().unwrap()
    }

    /// Compares each element with float64: float32 sums of depth terms lose at most depth + 1 roundings of the
    /// terms' absolute sum (in practice about the square root), a bfloat16 result another half unit.
    fn check<Y: Operand>(&self, tile: Tile, found: &[Y], with_added: bool) {
        let (wanted, sizes) = self.wanted(with_added);
        let roundings = f64::from(f32::EPSILON) * ((self.widths().0 as f64).sqrt() + 2.0);
        assert_eq!(found.len(), wanted.len());
        for (i, ((found, wanted), size)) in found.iter().zip(&wanted).zip(&sizes).enumerate() {
            let found: f64 = (*found).into();
            let tolerance = roundings * size + Y::ROUNDING * wanted.abs() * 1.01;
            let (row, column) = (i / self.widths().1, i % self.widths().1);
            assert!(
                (found - wanted).abs() <= tolerance,
                "{tile:?} {:?} {:?} to {} at {row}, {column}: {found} instead of {wanted} ± {tolerance}",
                self.direction,
                self.shape,
                Y::NAME
            );
        }
        assert!(relative_error(found.iter().map(|v| (*v).into()), &wanted) <= A::RELATIVE + Y::ROUNDING);
    }
}

/// Everything a kernel does on one shape.
fn check_all<A: Operand>(machine: &Machine, tile: Tile, sizes: [usize; 3]) {
    for direction in [Direction::Forward, Direction::Backward] {
        let layer = Layer::<A>::new(direction, sizes);
        for with_added in [true, false] {
            layer.check(tile, &layer.run::<f32>(machine, tile, with_added), with_added);
        }
        layer.check(tile, &layer.run::<bf16>(machine, tile, true), true);
        if direction == Direction::Backward {
            let separate = layer.run::<f32>(machine, tile, true);
            assert!(layer.run_in_place(machine, tile) == separate, "{tile:?} in place");
        }
    }
}

/// Those that there are for these operands.
pub fn tiles<A: Real>(machine: &Machine) -> Vec<Tile> {
    let hopper = A::FORMAT == Format::Bf16 && machine.cuda.device.info.compute_capability == (9, 0);
    let mut tiles = vec![Tile::Large, Tile::Small, Tile::Unaligned];
    tiles.extend([Tile::Narrow, Tile::Wide].into_iter().filter(|_| hopper));
    tiles
}

fn matches_float64<A: Operand>(machine: &Machine) {
    for tile in tiles::<A>(machine) {
        for sizes in [[1, 8, 8], [130, 264, 136], [70, 72, 264]] {
            check_all::<A>(machine, tile, sizes);
        }
    }
    // Three rows of tiles, several columns, and more stages than the ring has slots.
    for tile in tiles::<A>(machine).into_iter().filter(|tile| *tile != Tile::Unaligned) {
        let layer = Layer::<A>::new(Direction::Forward, [260, 456, 264]);
        layer.check(tile, &layer.run::<f32>(machine, tile, true), true);
    }
    for tile in tiles::<A>(machine) {
        let layer = Layer::<A>::new(Direction::Backward, [3, 64, 1000]);
        layer.check(tile, &layer.run::<f32>(machine, tile, true), true);
    }
}

#[test]
fn linear_matches_float64() {
    let Some(machine) = machine() else { return };
    matches_float64::<bf16>(&machine);
}

#[test]
fn linear_of_float32_matches_float64() {
    let Some(machine) = machine() else { return };
    matches_float64::<f32>(&machine);
}

fn of_any_width<A: Operand>(machine: &Machine) {
    for sizes in [[1, 1, 1], [3, 5, 7], [66, 201, 67]] {
        check_all::<A>(machine, Tile::Unaligned, sizes);
    }
    // Outputs whose rows do not start on a vector, from inputs whose rows do.
    for tile in tiles::<A>(machine) {
        for out_features in [33, 130] {
            let layer = Layer::<A>::new(Direction::Forward, [66, 40, out_features]);
            layer.check(tile, &layer.run::<f32>(machine, tile, true), true);
            layer.check(tile, &layer.run::<bf16>(machine, tile, true), true);
        }
    }
}

#[test]
fn linear_of_any_width() {
    let Some(machine) = machine() else { return };
    of_any_width::<bf16>(&machine);
    of_any_width::<f32>(&machine);
}

/// More stages than the ring has slots, and tiles that end. A process with a planted fault takes the first tile:
/// the code is the same.
fn same_bits<A: Operand>(machine: &Machine, wanted: &[Tile]) {
    let wanted = if faults::is_planted() { &wanted[..1] } else { wanted };
    for tile in tiles::<A>(machine).into_iter().filter(|tile| wanted.contains(tile)) {
        // As deep as ends inside a stage.
        let depth = A::FORMAT.pick(460, 456);
        for (direction, sizes) in
            [(Direction::Forward, [130, depth, 72]), (Direction::Backward, [130, 72, depth])]
        {
            let layer = Layer::<A>::new(direction, sizes);
            let found = machine.same_under_all_schedules(|| layer.run::<f32>(machine, tile, true));
            layer.check(tile, &found, true);
        }
        // With a sanitizer, too, the first tile alone.
        if !faults::is_planted() && (tile == wanted[0] || machine.affordable(66 * 200)) {
            other_outputs_have_the_same_bits::<A>(machine, tile);
        }
    }
}

/// Rounded outputs, nothing added, and sums in place, on shapes that are soon done.
fn other_outputs_have_the_same_bits<A: Operand>(machine: &Machine, tile: Tile) {
    for (direction, sizes) in [(Direction::Forward, [66, 200, 72]), (Direction::Backward, [66, 72, 200])] {
        let layer = Layer::<A>::new(direction, sizes);
        for with_added in [true, false] {
            let found = machine.same_under_all_schedules(|| layer.run::<bf16>(machine, tile, with_added));
            layer.check(tile, &found, with_added);
        }
        let found = machine.same_under_all_schedules(|| layer.run::<f32>(machine, tile, false));
        layer.check(tile, &found, false);
        if direction == Direction::Backward {
            let found = machine.same_under_all_schedules(|| layer.run_in_place(machine, tile));
            layer.check(tile, &found, true);
        }
    }
}

/// Those of [`Tile`] whose operands threads copy.
pub const BY_THREADS: [Tile; 3] = [Tile::Large, Tile::Small, Tile::Unaligned];

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

fn a_nan_stays<A: Operand>(machine: &Machine) {
    for tile in tiles::<A>(machine) {
        for direction in [Direction::Forward, Direction::Backward] {
            let mut layer = Layer::<A>::new(direction, [5, 40, 40]);
            layer.left[2 * 40] = A::NAN;
            let found: Vec<f32> = layer.run(machine, tile, true);
            for (row, found) in found.chunks(40).enumerate() {
                assert!(found.iter().all(|v| v.is_nan() == (row == 2)), "{tile:?} {direction:?} row {row}");
            }
        }
        // A column of the result is a row of the weight, forward.
        let mut layer = Layer::<A>::new(Direction::Forward, [5, 40, 40]);
        layer.weight[2 * 40] = A::NAN;
        let found: Vec<f32> = layer.run(machine, tile, true);
        for found in found.chunks(40) {
            assert!(found.iter().enumerate().all(|(column, v)| v.is_nan() == (column == 2)), "{tile:?}");
        }
    }
}

/// What is past the depth, or another row, is not multiplied by zero: it is not there.
#[test]
fn a_nan_stays_in_its_row() {
    let Some(machine) = machine() else { return };
    a_nan_stays::<bf16>(&machine);
    a_nan_stays::<f32>(&machine);
}

fn bits_do_not_depend_on_other_rows<A: Operand>(machine: &Machine, families: &[&[Tile]]) {
    for direction in [Direction::Forward, Direction::Backward] {
        let all = Layer::<A>::new(direction, [150, 200, 200]);
        for family in families {
            let available = tiles::<A>(machine);
            let mut found: Vec<Vec<f32>> = Vec::new();
            for tile in family.iter().filter(|tile| available.contains(tile)) {
                found.push(all.run(machine, *tile, true));
                // The last rows alone, at other places of a tile.
                let first = 77;
                let mut some = Layer::<A>::new(direction, [150, 200, 200]);
                some.shape.rows -= first;
                some.left.drain(..first * 200);
                if direction == Direction::Backward {
                    some.added.drain(..first * 200);
                }
                let alone: Vec<f32> = some.run(machine, *tile, true);
                assert!(alone == found[0][first * 200..], "{tile:?} {direction:?}");
            }
            assert!(found.windows(2).all(|pair| pair[0] == pair[1]), "{family:?} {direction:?}");
        }
    }
}

#[test]
fn bits_of_a_row_do_not_depend_on_other_rows_or_the_tile() {
    let Some(machine) = machine() else { return };
    bits_do_not_depend_on_other_rows::<bf16>(&machine, &[&BY_THREADS, &[Tile::Narrow, Tile::Wide]]);
    bits_do_not_depend_on_other_rows::<f32>(&machine, &[&BY_THREADS]);
}

#[test]
fn no_rows_is_no_work() {
    let Some(machine) = machine() else { return };
    for tile in tiles::<bf16>(&machine) {
        let layer = Layer::<bf16>::new(Direction::Forward, [0, 8, 8]);
        assert!(layer.run::<f32>(&machine, tile, true).is_empty());
    }
}

fn is_refused<A: Operand>(machine: &Machine, tile: Tile, width: usize) {
    for (direction, sizes) in [
        (Direction::Forward, [4, width + 1, width]),
        (Direction::Backward, [4, width + 1, width]),
        (Direction::Backward, [4, width, width + 1]),
    ] {
        let layer = Layer::<A>::new(direction, sizes);
        let product = || layer.run::<f32>(machine, tile, true);
        assert!(catch_unwind(AssertUnwindSafe(product)).is_err(), "{tile:?} {direction:?} {sizes:?}");
    }
}

#[test]
fn a_kernel_that_cannot_read_the_rows_is_not_launched() {
    let Some(machine) = machine() else { return };
    for tile in tiles::<bf16>(&machine).into_iter().filter(|tile| *tile != Tile::Unaligned) {
        is_refused::<bf16>(&machine, tile, 8);
    }
    for tile in [Tile::Large, Tile::Small] {
        is_refused::<f32>(&machine, tile, 4);
    }
}

/// The kernels expect the 128-byte swizzle of the maps: with none the product is wrong, and the boxes are too
/// wide for one of 64 bytes.
#[test]
fn another_swizzle_is_noticed() {
    let Some(machine) = machine() else { return };
    if !tiles::<bf16>(&machine).contains(&Tile::Narrow) {
        return;
    }
    let layer = Layer::<bf16>::new(Direction::Forward, [130, 136, 72]);
    let Shape { rows, in_features, out_features } = layer.shape;
    let (x, weight, bias) = layer.on_device(&machine);
    let kernel = machine.cuda.kernel("linear_sm90.cu", "linear_forward_sm90_f32").unwrap();
    let product = |swizzle: Swizzle| -> gradlens::error::Result<Vec<f32>> {
        let y = Buf::<f32>::new(&machine.cuda.device.memory, rows, out_features)?;
        let shared_bytes = 6 * ((128 + 128) * 64 * 2 + 2 * 8);
        kernel.allow_shared_bytes(shared_bytes)?;
        let launch = Launch::new(&kernel, 2, 384)
            .shared_bytes(shared_bytes)
            .arg("const TensorMap x", TensorMap::of(&x, 128, swizzle)?)
            .arg("const TensorMap weight", TensorMap::of(&weight, 128, swizzle)?)
            .arg("const int* experts", None::<&Buf<i32>>)
            .arg("const float* bias", &bias)
            .arg("float* y", &y)
            .arg("int rows", rows as i32)
            .arg("int in_features", in_features as i32)
            .arg("int out_features", out_features as i32);
        // SAFETY: the operands of this shape; both maps have the boxes that the kernel expects.
        unsafe { launch.on(&machine.cuda.device.compute) }?;
        y.to_host()
    };
    let right = product(Swizzle::B128).unwrap();
    layer.check(Tile::Narrow, &right, true);
    let wrong = product(Swizzle::Plain).unwrap();
    let (wanted, _) = layer.wanted(true);
    assert!(relative_error(wrong.iter().map(|v| f64::from(*v)), &wanted) > 0.1);
    let error = product(Swizzle::B64).unwrap_err().to_string();
    assert!(error.contains("refused a tensor map") && error.contains("boxes of 128 rows"), "{error}");
}
