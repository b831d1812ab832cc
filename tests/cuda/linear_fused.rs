//! What becomes of a linear layer's sums where they are computed. The sums themselves are those of the plain
//! products, bit for bit, which have tests of their own; what is made of them is compared with float64.

use gradlens::backend::cuda::linear::Tile;
use gradlens::backend::cuda::{Activation, Buf, Element};

use super::faults;
use super::linear::{BY_THREADS, Operand, tiles};
use super::linear_exponentials::targets;
use super::machine::{Machine, Random, machine};

/// Half a unit of float32 in the last place, relative.
pub const UNIT: f64 = 1.0 / 16_777_216.0;
const ACTIVATIONS: [Activation; 3] = [Activation::Silu, Activation::GeluTanh, Activation::GeluErf];
/// 2/√π·∫₀ˣ e^-t² by its series, to 1e-15: in float64 its terms lose little up to 3, and then it is 1.
fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    // x·e^-x²·2/√π·Σ (2x²)^n / (1·3·…·(2n + 1)): all terms positive.
    let mut term = 1.0;
    let mut sum = 1.0;
    for n in 1..200 {
        term *= 2.0 * x * x / f64::from(2 * n + 1);
        sum += term;
    }
    x * (-x * x).exp() * std::f64::consts::FRAC_2_SQRT_PI * sum
}

/// act(x), act'(x), and how far float32 may be from them.
///
/// x·σ(p): to 12 units, and where p is rounded to 4 of p more, as kernels/activation.cuh says. Φ is right to 12 units of
/// 1 (in float32 of itself), so x·Φ(x) is to as many of |x|.
fn act(activation: Activation, x: f64) -> [(f64, f64); 2] {
    if activation == Activation::GeluErf {
        let below = 0.5 + 0.5 * erf(x * std::f64::consts::FRAC_1_SQRT_2);
        let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let slope_error = UNIT * (12.0 + x.abs() * density * (4.0 + x * x));
        return [(x * below, 12.0 * UNIT * x.abs()), (below + x * density, slope_error)];
    }
    let (a, b) = match activation {
        Activation::Silu => (1.0, 0.0),
        _ => {
            let a = 2.0 * (2.0 / std::f64::consts::PI).sqrt();
            (a, a * 0.044_715)
        }
    };
    let square = (x * x).min(1e37);
    let p = x * (a + b * square);
    let (above, below) = (1.0 / (1.0 + (-p).exp()), 1.0 / (1.0 + p.exp()));
    let dp = a + 3.0 * b * square;
    let turn = x * above * below * dp;
    let relative = if b == 0.0 { 12.0 * UNIT } else { (12.0 + 4.0 * p.abs()) * UNIT };
    // σ below the normal numbers of float32 may be 0.
    let tiny = |factor: f64| factor * f64::from(f32::MIN_POSITIVE);
    [
        (x * above, (x * above).abs() * relative + tiny(x.abs())),
        (above + turn, (above + turn.abs()) * relative + tiny(1.0 + x.abs() * dp)),
    ]
}

/// Compares each element: `wanted` gives value and tolerance for float32, rounding to `A` comes on top.
pub fn check<A: Operand>(found: &[A], what: &str, wanted: impl Fn(usize) -> (f64, f64)) {
    for (i, found) in found.iter().enumerate() {
        let (found, (wanted, tolerance)): (f64, _) = ((*found).into(), wanted(i));
        let tolerance = tolerance + A::ROUNDING * (wanted.abs() + tolerance) * 1.001;
        assert!(
            (found - wanted).abs() <= tolerance,
            "{what}, element {i}: {found} instead of {wanted} ± {tolerance:e}"
        );
    }
}

/// A layer on the device: `[N, in]`, `[out, in]`, `[1, out]`, `[N, out]`, and the same as a next layer's.
pub struct Layer<A> {
    pub x: Buf<A>,
    pub weight: Buf<A>,
    bias: Buf<f32>,
    addend: Buf<f32>,
    pub what: String,
}

impl<A: Operand> Layer<A> {
    /// Entries of x are `scale` times as large as those of the weight. Rows from `first` on of [`Layer::new`]'s.
    fn rows_from(machine: &Machine, [rows, inputs, outputs]: [usize; 3], scale: f32, first: usize) -> Self {
        let mut random = Random::new((rows * 31 + inputs * 7 + outputs) as u64);
        let memory = &machine.cuda.device.memory;
        let x: Vec<A> = random.f32(rows * inputs).iter().map(|v| A::of(v * scale)).collect();
        let addend = random.f32(rows * outputs);
        Self {
            x: Buf::from_host(memory, &x, inputs).unwrap().view(first..rows),
            weight: Buf::from_host(memory, &A::random(&mut random, outputs * inputs), inputs).unwrap(),
            bias: Buf::from_host(memory, &random.f32(outputs), outputs).unwrap(),
            addend: Buf::from_host(memory, &addend, outputs).unwrap().view(first..rows),
            what: format!("[{rows}, {inputs}] to {outputs} in {}", A::NAME),
        }
    }

    pub fn new(machine: &Machine, sizes: [usize; 3], scale: f32) -> Self {
        Self::rows_from(machine, sizes, scale, 0)
    }

    /// The float32 sums.
    pub fn sums(&self, machine: &Machine, tile: Tile, bias: bool) -> Vec<f32> {
        let bias = bias.then_some(&self.bias);
        let y: Buf<f32> = machine.cuda.linear_forward_with(tile, &self.x, &self.weight, bias).unwrap();
        y.to_host().unwrap()
    }

    /// y and the sum.
    fn add(&self, machine: &Machine, tile: Tile, bias: bool, output: bool) -> (Option<Vec<f32>>, Vec<f32>) {
        let bias = bias.then_some(&self.bias);
        let (y, sum) =
            machine.cuda.linear_add_with(tile, &self.x, &self.weight, bias, &self.addend, output).unwrap();
        (y.map(|y| y.to_host().unwrap()), sum.to_host().unwrap())
    }

    fn check_add(&self, machine: &Machine, tile: Tile, (y, sum): &(Option<Vec<f32>>, Vec<f32>), bias: bool) {
        let sums = self.sums(machine, tile, bias);
        let what = format!("{} by {tile:?}", self.what);
        assert!(y.as_ref().is_none_or(|y| *y == sums), "{what}: y is another instead of the plain product's");
        let addend = self.addend.to_host().unwrap();
        let wanted: Vec<f32> = addend.iter().zip(&sums).map(|(addend, y)| addend + y).collect();
        assert!(*sum == wanted, "{what}: another sum instead of addend + y");
    }

    /// gate_up and out.
    fn gated(
        &self,
        machine: &Machine,
        tile: Tile,
        activation: Activation,
        bias: bool,
        keep: bool,
    ) -> (Option<Vec<A>>, Vec<A>) {
        let bias = bias.then_some(&self.bias);
        let (gate_up, out) =
            machine.cuda.linear_gated_with(tile, &self.x, &self.weight, bias, activation, keep).unwrap();
        (gate_up.map(|gate_up| gate_up.to_host().unwrap()), out.to_host().unwrap())
    }

    fn check_gated(
        &self,
        machine: &Machine,
        tile: Tile,
        activation: Activation,
        (gate_up, out): &(Option<Vec<A>>, Vec<A>),
        bias: bool,
    ) {
        let sums = self.sums(machine, tile, bias);
        let what = format!("{activation:?} {} by {tile:?}", self.what);
        if let Some(gate_up) = gate_up {
            let rounded: Vec<A> = sums.iter().map(|sum| A::of(*sum)).collect();
            assert!(*gate_up == rounded, "{what}: other gates instead of the plain product's");
        }
        assert_eq!(out.len() * 2, sums.len());
        check(out, &what, |i| {
            let [(value, error), _] = act(activation, sums[2 * i].into());
            let up = f64::from(sums[2 * i + 1]);
            (value * up, (error + UNIT * value.abs()) * up.abs())
        });
    }
}

/// The layer behind a gate: dy `[N, D]`, weight `[D, I]`, gate_up `[N, 2·I]`.
struct Behind<A> {
    layer: Layer<A>,
    gate_up: Buf<A>,
}

impl<A: Operand> Behind<A> {
    /// Rows from `first` on.
    fn rows_from(machine: &Machine, [rows, inner, hidden]: [usize; 3], first: usize) -> Self {
        let memory = &machine.cuda.device.memory;
        let mut random = Random::new((rows + inner + hidden) as u64);
        let of = |values: Vec<f32>, width| {
            let values: Vec<A> = values.iter().map(|v| A::of(v * 6.0)).collect();
            Buf::from_host(memory, &values, width).unwrap()
        };
        let mut layer = Layer::new(machine, [rows, inner, hidden], 1.0);
        layer.x = of(random.f32(rows * hidden), hidden).view(first..rows);
        Self { layer, gate_up: of(random.f32(rows * 2 * inner), 2 * inner).view(first..rows) }
    }

    fn gated_backward(&self, machine: &Machine, tile: Tile, activation: Activation) -> Vec<A> {
        let (dy, weight) = (&self.layer.x, &self.layer.weight);
        let dgate_up =
            machine.cuda.linear_gated_backward_with(tile, dy, weight, &self.gate_up, activation).unwrap();
        dgate_up.to_host().unwrap()
    }

    fn check(&self, machine: &Machine, tile: Tile, activation: Activation, found: &[A]) {
        let (dy, weight) = (&self.layer.x, &self.layer.weight);
        let dh: Buf<f32> = machine.cuda.linear_backward_as_with(tile, dy, weight, None).unwrap();
        let (dh, gate_up) = (dh.to_host().unwrap(), self.gate_up.to_host().unwrap());
        assert_eq!(found.len(), gate_up.len());
        let what = format!("gradient of {activation:?} behind {} by {tile:?}", self.layer.what);
        check(found, &what, |i| {
            let dh = f64::from(dh[i / 2]);
            let [g, u] = [gate_up[i / 2 * 2], gate_up[i / 2 * 2 + 1]].map(Into::into);
            let [value, slope] = act(activation, g);
            let ((wanted, error), factor) = if i % 2 == 0 { (slope, dh * u) } else { (value, dh) };
            (
                wanted * factor,
                (error + 2.0 * UNIT * wanted.abs()) * factor.abs() + f64::from(f32::MIN_POSITIVE),
            )
        });
    }
}

/// All epilogues on one shape: the layer's, and 2·`outputs` for gates.
fn check_all<A: Operand>(machine: &Machine, tile: Tile, sizes: [usize; 3]) {
    let [rows, inputs, outputs] = sizes;
    let layer = Layer::<A>::new(machine, sizes, 1.0);
    for (bias, output) in [(true, true), (false, false)] {
        layer.check_add(machine, tile, &layer.add(machine, tile, bias, output), bias);
    }
    let gates = Layer::<A>::new(machine, [rows, inputs, 2 * outputs], 4.0);
    let behind = Behind::<A>::rows_from(machine, sizes, 0);
    for (activation, keep) in ACTIVATIONS.into_iter().zip([true, false, true]) {
        let found = gates.gated(machine, tile, activation, keep, keep);
        gates.check_gated(machine, tile, activation, &found, keep);
        let reads = behind.layer.x.width().is_multiple_of(8) || tile == Tile::Unaligned;
        if reads {
            behind.check(machine, tile, activation, &behind.gated_backward(machine, tile, activation));
        }
    }
    let logits = Layer::<A>::new(machine, sizes, 16.0);
    let targets = targets(rows, outputs);
    let found = logits.exponentials(machine, tile, &targets, None);
    logits.check_exponentials(machine, tile, &targets, None, &found);
}

fn match_float64<A: Operand>(machine: &Machine) {
    for tile in tiles::<A>(machine) {
        for sizes in [[1, 8, 8], [130, 72, 136], [66, 200, 264], [70, 40, 33], [3, 16, 63], [5, 8, 129]] {
            check_all::<A>(machine, tile, sizes);
        }
    }
    for sizes in [[1, 1, 1], [3, 5, 7], [66, 67, 65], [2, 3, 130]] {
        check_all::<A>(machine, Tile::Unaligned, sizes);
    }
}

#[test]
fn epilogues_match_float64() {
    let Some(machine) = machine() else { return };
    match_float64::<half::bf16>(&machine);
}

#[test]
fn epilogues_of_float32_match_float64() {
    let Some(machine) = machine() else { return };
    match_float64::<f32>(&machine);
}

/// More stages than a ring has slots, and tiles that end. A process with a planted fault takes the first tile.
fn same_bits<A: Operand>(machine: &Machine, wanted: &[Tile]) {
    let wanted = if faults::is_planted() { &wanted[..1] } else { wanted };
    for tile in tiles::<A>(machine).into_iter().filter(|tile| wanted.contains(tile)) {
        if tile != wanted[0] && !machine.affordable(66 * 264) {
            continue;
        }
        let rows = if machine.affordable(130 * 264) { 130 } else { 66 };
        let layer = Layer::<A>::new(machine, [rows, 264, 72], 4.0);
        let found = machine.same_under_all_schedules(|| layer.add(machine, tile, true, true));
        layer.check_add(machine, tile, &found, true);
        let activation = Activation::GeluTanh;
        let found = machine.same_under_all_schedules(|| layer.gated(machine, tile, activation, true, true));
        layer.check_gated(machine, tile, activation, &found, true);
        // A strip that ends, and one where a tile has several.
        for layer in [&layer, &Layer::<A>::new(machine, [5, 8, 8], 8.0)] {
            let targets = targets(layer.x.rows(), layer.weight.rows());
            let found =
                machine.same_under_all_schedules(|| layer.exponentials(machine, tile, &targets, None));
            layer.check_exponentials(machine, tile, &targets, None, &found);
        }
        let behind = Behind::<A>::rows_from(machine, [rows, 72, 264], 0);
        let found = machine.same_under_all_schedules(|| behind.gated_backward(machine, tile, activation));
        behind.check(machine, tile, activation, &found);
    }
}

#[test]
fn mma_sync_gives_the_same_bits_under_all_schedules() {
    let Some(machine) = machine() else { return };
    same_bits::<half::bf16>(&machine, &BY_THREADS);
}

#[test]
fn wgmma_gives_the_same_bits_under_all_schedules() {
    let Some(machine) = machine() else { return };
    same_bits::<half::bf16>(&machine, &[Tile::Narrow, Tile::Wide]);
}

#[test]
fn ffma_gives_the_same_bits_under_all_schedules() {
    let Some(machine) = machine() else { return };
    same_bits::<f32>(&machine, &BY_THREADS);
}

/// The first is nobody's neighbour, the last rows lie elsewhere in a tile: the same bits.
fn bits_do_not_depend_on_other_rows<A: Operand>(machine: &Machine, family: &[Tile]) {
    let (sizes, first) = ([150, 72, 200], 77);
    let targets = targets(sizes[0], sizes[2]);
    let [all, last] = [0, first].map(|first| Layer::<A>::rows_from(machine, sizes, 8.0, first));
    let [behind, last_behind] = [0, first].map(|first| Behind::<A>::rows_from(machine, sizes, first));
    let activation = Activation::Silu;
    let mut found = Vec::new();
    for &tile in family.iter().filter(|tile| tiles::<A>(machine).contains(tile)) {
        let sum = all.add(machine, tile, true, false).1;
        assert!(last.add(machine, tile, true, false).1 == sum[first * 200..], "a sum by {tile:?}");
        let out = all.gated(machine, tile, activation, true, false).1;
        assert!(last.gated(machine, tile, activation, true, false).1 == out[first * 100..], "{tile:?}");
        let gradient = behind.gated_backward(machine, tile, activation);
        assert!(last_behind.gated_backward(machine, tile, activation) == gradient[first * 144..], "{tile:?}");
        let (powers, [exponents, sums, logits]) = all.exponentials(machine, tile, &targets, None);
        let (of_last, [k, s, _]) = last.exponentials(machine, tile, &targets[first..], None);
        assert!(of_last == powers[first * 200..], "powers by {tile:?}");
        assert!(k == exponents[first * 4..] && s == sums[first * 4..], "a strip's numbers by {tile:?}");
        found.push((sum, out, gradient, powers, exponents, sums, logits));
    }
    assert!(found.windows(2).all(|pair| pair[0] == pair[1]), "{family:?}");
}

#[test]
fn bits_of_a_row_do_not_depend_on_other_rows_or_the_tile() {
    let Some(machine) = machine() else { return };
    bits_do_not_depend_on_other_rows::<half::bf16>(&machine, &BY_THREADS);
    bits_do_not_depend_on_other_rows::<half::bf16>(&machine, &[Tile::Narrow, Tile::Wide]);
    bits_do_not_depend_on_other_rows::<f32>(&machine, &BY_THREADS);
}

fn on_device<T: Element>(machine: &Machine, values: &[T], width: usize) -> Buf<T> {
    Buf::from_host(&machine.cuda.device.memory, values, width).unwrap()
}

fn over_their_range<A: Operand>(machine: &Machine) {
    let far = [87.0, 88.5, 90.0, 103.0, 1e4, 1e20, 3e38].into_iter().flat_map(|v: f32| [v, -v]);
    let near = (-400..=400).map(|i| i as f32 * 0.05);
    let gates: Vec<A> = near.chain(far).chain([0.0, -0.0, 1e-30, -1e-30]).map(A::of).collect();
    let [one, zero] = [1.0, 0.0].map(A::of);
    // Gates of exactly these, and values of 1.
    let x: Vec<A> = gates.iter().flat_map(|gate| [*gate, one, zero, zero]).collect();
    let x = on_device(machine, &x, 4);
    let weight = on_device(machine, &[one, zero, zero, zero, zero, one, zero, zero], 4);
    let ones = on_device(machine, &vec![one; gates.len()], 1);
    for activation in ACTIVATIONS {
        let (gate_up, out) = machine.cuda.linear_gated(&x, &weight, None, activation, true).unwrap();
        let gate_up = gate_up.unwrap();
        let what = format!("{activation:?} in {}", A::NAME);
        check(&out.to_host().unwrap(), &what, |i| act(activation, gates[i].into())[0]);
        let gradient =
            machine.cuda.linear_gated_backward(&ones, &ones.view(0..1), &gate_up, activation).unwrap();
        let what = format!("gradient of {what}");
        let wanted = |i: usize| act(activation, gates[i / 2].into())[1 - i % 2];
        check(&gradient.to_host().unwrap(), &what, wanted);
    }
}

/// Far from 0 sigmoid is 0 or 1, and no number becomes NaN.
#[test]
fn activations_over_their_range() {
    let Some(machine) = machine() else { return };
    over_their_range::<f32>(&machine);
    over_their_range::<half::bf16>(&machine);
}
