//! Linear layers: the plain products, and those with something made of their sums.

use cudarc::driver::result::memset_d8_async;
use gradlens::backend::cuda::linear::{Direction, Shape, Tile};
use gradlens::backend::cuda::{Activation, Buf, Format};
use gradlens::error::Result;
use half::bf16;
use serde_json::{Value, json};

use super::{BF16_ROUNDING, Bench, Number, Work, driver, near, random};

/// Rounding of float32 sums, relative to that of their terms' absolute values.
const SUM_ROUNDING: f64 = 1e-5;

/// A layer's sizes, and inputs to rotate through.
struct Layer<A> {
    shape: Shape,
    x: Vec<Buf<A>>,
    weight: Buf<A>,
}

impl<A: Number> Layer<A> {
    fn at(&self, repetition: usize) -> usize {
        repetition % self.x.len()
    }

    /// The line of a case.
    fn case(&self, name: &str, op: &str) -> Value {
        let Shape { rows, in_features, out_features } = self.shape;
        json!({"family": "linear with epilogues", "case": format!("{name} {op}"), "op": op, "dtype": A::NAME,
            "rows": rows, "in": in_features, "out": out_features, "copies": self.x.len()})
    }

    /// The product, and `bytes` for each token besides its operands'.
    fn work(&self, bytes: usize) -> Work {
        let Shape { rows, in_features, out_features } = self.shape;
        let operands = (self.x[0].width() * rows + in_features * out_features) * size_of::<A>();
        Work {
            flops: 2.0 * (rows * in_features * out_features) as f64,
            bytes: (operands + rows * bytes) as f64,
        }
    }
}

/// A sum of the product in float64, and of its terms' absolute values.
struct Sums<A> {
    x: Vec<A>,
    weight: Vec<A>,
    /// Of x, of the weight.
    widths: (usize, usize),
    direction: Direction,
}

impl<A: Number> Sums<A> {
    fn of(x: &Buf<A>, weight: &Buf<A>, direction: Direction) -> Result<Self> {
        let widths = (x.width(), weight.width());
        Ok(Self { x: x.to_host()?, weight: weight.to_host()?, widths, direction })
    }

    fn at(&self, row: usize, column: usize) -> (f64, f64) {
        let (depth, width) = self.widths;
        let terms = (0..depth).map(|k| {
            let weight = match self.direction {
                Direction::Forward => self.weight[column * width + k],
                Direction::Backward => self.weight[k * width + column],
            };
            self.x[row * depth + k].into() * weight.into()
        });
        terms.fold((0.0, 0.0), |(sum, size), term: f64| (sum + term, size + term.abs()))
    }
}

/// Places of `[rows, width]` to look at.
fn probes(rows: usize, width: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..64).map(move |probe| ((probe * 7919) % rows, (probe * 104_729) % width))
}

fn place(row: usize, column: usize) -> String {
    format!("row {row}, column {column}")
}

/// Half a unit in the last place.
fn rounding<A: Number>() -> f64 {
    A::FORMAT.pick(1e-7, BF16_ROUNDING)
}

/// silu(x) and its slope.
fn silu(x: f64) -> (f64, f64) {
    let sigmoid = 1.0 / (1.0 + (-x).exp());
    (x * sigmoid, sigmoid * (1.0 + x * (1.0 - sigmoid)))
}

/// Some outputs of a product against float64.
fn check_product<A: Number, Y: Number>(
    x: &Buf<A>,
    weight: &Buf<A>,
    y: &Buf<Y>,
    direction: Direction,
) -> Result<()> {
    let (sums, width, y) = (Sums::of(x, weight, direction)?, y.width(), y.to_host()?);
    for (row, column) in probes(y.len() / width, width) {
        let (wanted, size) = sums.at(row, column);
        let tolerance = wanted.abs() * rounding::<Y>() + size * SUM_ROUNDING;
        near("a product", || place(row, column), y[row * width + column].into(), wanted, tolerance)?;
    }
    Ok(())
}

/// A tile by its instructions and size.
fn kernel_of(format: Format, tile: Tile) -> &'static str {
    match (format, tile) {
        (Format::F32, Tile::Large) => "FFMA 128x128",
        (Format::F32, Tile::Small) => "FFMA 64x64",
        (Format::F32, _) => "FFMA 64x64, single loads",
        (_, Tile::Large) => "mma.sync 128x128",
        (_, Tile::Small) => "mma.sync 64x64",
        (_, Tile::Unaligned) => "mma.sync 64x64, plain loads",
        (_, Tile::Narrow) => "wgmma 128x128",
        (_, Tile::Wide) => "wgmma 128x256",
    }
}

impl Bench {
    fn layer<A: Number>(
        &self,
        direction: Direction,
        in_features: usize,
        out_features: usize,
    ) -> Result<Layer<A>> {
        let (in_features, out_features) = (self.layer_width(in_features), self.layer_width(out_features));
        let shape = Shape { rows: self.rows(), in_features, out_features };
        let from = match direction {
            Direction::Forward => in_features,
            Direction::Backward => out_features,
        };
        let copies = self.copies(size_of::<A>() * shape.rows * (in_features + out_features));
        let x = self.inputs(copies, from, 8)?;
        Ok(Layer { shape, x, weight: random(&self.cuda, out_features, in_features, 7)? })
    }

    pub fn linear<A: Number>(
        &self,
        name: &str,
        direction: Direction,
        in_features: usize,
        out_features: usize,
    ) -> Result<()> {
        let layer = self.layer::<A>(direction, in_features, out_features)?;
        let Layer { shape, x, weight } = &layer;
        let (rows, info) = (shape.rows, &self.cuda.device.info);
        let (op, to) = match direction {
            Direction::Forward => ("forward", shape.out_features),
            Direction::Backward => ("backward", shape.in_features),
        };
        let chosen = Tile::choose(info, A::FORMAT, direction, *shape);
        // Where wgmma is chosen: what the kernel that runs on every device would do here.
        let other = (A::FORMAT == Format::Bf16 && info.compute_capability == (9, 0)).then_some(Tile::Large);
        for tile in [Some(chosen), other.filter(|tile| *tile != chosen)].into_iter().flatten() {
            let product = |at: usize| -> Result<Buf<A>> {
                let x = &x[layer.at(at)];
                match direction {
                    Direction::Forward => self.cuda.linear_forward_with(tile, x, weight, None),
                    Direction::Backward => self.cuda.linear_backward_as_with(tile, x, weight, None),
                }
            };
            // The pool hands out next what was freed last.
            self.poison(&Buf::<A>::new(&self.cuda.device.memory, rows, to)?)?;
            check_product(&x[0], weight, &product(0)?, direction)?;
            let case = json!({"family": "linear", "case": format!("{name} {op}"), "op": op, "dtype": A::NAME,
                "rows": rows, "in": shape.in_features, "out": shape.out_features, "copies": x.len(),
                "kernel": kernel_of(A::FORMAT, tile), "chosen": tile == chosen});
            self.time(case, layer.work(to * size_of::<A>()), |at| product(at).map(drop))?;
        }
        Ok(())
    }

    /// Makes every element NaN: what a kernel leaves out shows.
    fn poison<A: Number>(&self, buf: &Buf<A>) -> Result<()> {
        let (all, stream) = (buf.allocation(), self.cuda.device.compute.cu_stream());
        // SAFETY: the allocation has this length.
        unsafe { memset_d8_async(all.address(), 0xff, all.len(), stream) }.map_err(driver)
    }

    /// The residual stream and a layer's output.
    pub fn add(&self, name: &str, in_features: usize, out_features: usize) -> Result<()> {
        let layer = self.layer::<bf16>(Direction::Forward, in_features, out_features)?;
        let (x, weight, width) = (&layer.x, &layer.weight, layer.shape.out_features);
        let addend = random::<f32>(&self.cuda, layer.shape.rows, width, 9)?;
        let product = |at: usize| self.cuda.linear_add(&x[layer.at(at)], weight, None, &addend, false);
        let (sums, sum) = (Sums::of(&x[0], weight, Direction::Forward)?, product(0)?.1.to_host()?);
        let before = addend.to_host()?;
        for (row, column) in probes(layer.shape.rows, width) {
            let ((y, size), at) = (sums.at(row, column), row * width + column);
            let (wanted, found) = (f64::from(before[at]) + y, f64::from(sum[at]));
            near("a sum", || place(row, column), found, wanted, (size + wanted.abs()) * SUM_ROUNDING)?;
        }
        self.time(layer.case(name, "add"), layer.work(width * 8), |at| product(at).map(drop))
    }

    /// Gates and values, kept.
    pub fn gated(&self, name: &str, in_features: usize, out_features: usize) -> Result<()> {
        let layer = self.layer::<bf16>(Direction::Forward, in_features, out_features)?;
        let (x, weight, width) = (&layer.x, &layer.weight, layer.shape.out_features);
        let product =
            |at: usize| self.cuda.linear_gated(&x[layer.at(at)], weight, None, Activation::Silu, true);
        let (sums, out) = (Sums::of(&x[0], weight, Direction::Forward)?, product(0)?.1.to_host()?);
        for (row, column) in probes(layer.shape.rows, width / 2) {
            let ((g, g_size), (u, u_size)) = (sums.at(row, 2 * column), sums.at(row, 2 * column + 1));
            let wanted = silu(g).0 * u;
            let tolerance = wanted.abs() * BF16_ROUNDING
                + (g_size * u.abs() * 1.1 + silu(g).0.abs() * u_size) * SUM_ROUNDING;
            let found = out[row * (width / 2) + column].into();
            near("a gated product", || place(row, column), found, wanted, tolerance)?;
        }
        self.time(layer.case(name, "gated"), layer.work(width * 3), |at| product(at).map(drop))
    }

    /// Through the layer behind the gate.
    pub fn gated_backward(&self, name: &str, in_features: usize, out_features: usize) -> Result<()> {
        let layer = self.layer::<bf16>(Direction::Backward, in_features, out_features)?;
        let (dy, weight, width) = (&layer.x, &layer.weight, layer.shape.in_features);
        let gate_up = self.inputs::<bf16>(dy.len(), 2 * width, 10)?;
        let product = |at: usize| {
            let at = layer.at(at);
            self.cuda.linear_gated_backward(&dy[at], weight, &gate_up[at], Activation::Silu)
        };
        let (sums, found) = (Sums::of(&dy[0], weight, Direction::Backward)?, product(0)?.to_host()?);
        let gates = gate_up[0].to_host()?;
        for (row, column) in probes(layer.shape.rows, width) {
            let ((dh, size), at) = (sums.at(row, column), 2 * (row * width + column));
            let (value, slope) = silu(gates[at].into());
            for (at, factor) in [(at, slope * f64::from(gates[at + 1])), (at + 1, value)] {
                let (wanted, size) = (dh * factor, size * factor.abs());
                let tolerance = wanted.abs() * BF16_ROUNDING + size * SUM_ROUNDING;
                near("a gate's gradient", || place(row, column), found[at].into(), wanted, tolerance)?;
            }
        }
        self.time(layer.case(name, "gated backward"), layer.work(width * 8), |at| product(at).map(drop))
    }

    /// What the loss needs of the logits, for a quarter of the tokens: a chunk of the loss.
    pub fn exponentials(&self, model: &str, width: usize, vocabulary: usize) -> Result<()> {
        let mut layer = self.layer::<bf16>(Direction::Forward, width, vocabulary)?;
        layer.shape.rows = (layer.shape.rows / 4).max(1);
        let (rows, vocabulary) = (layer.shape.rows, layer.shape.out_features);
        for x in &mut layer.x {
            *x = x.view(0..rows);
        }
        let (x, weight) = (&layer.x, &layer.weight);
        let targets = Buf::from_host(&self.cuda.device.memory, &vec![1_i32; rows], 1)?;
        let product = |at: usize| self.cuda.linear_exponentials(&x[layer.at(at)], weight, &targets, None);
        let (sums, found) = (Sums::of(&x[0], weight, Direction::Forward)?, product(0)?);
        let (powers, exponents) = (found.powers.to_host()?, found.exponents.to_host()?);
        for (row, column) in probes(rows, vocabulary) {
            let (z, size) = sums.at(row, column);
            let strip = row * found.exponents.width() + column / 64;
            let power = f64::from(powers[row * vocabulary + column]) * f64::from(exponents[strip]).exp2();
            let tolerance = z.exp() * (BF16_ROUNDING + 2.0 * size * SUM_ROUNDING);
            near("a power", || place(row, column), power, z.exp(), tolerance)?;
        }
        self.time(layer.case(model, "exponentials"), layer.work(vocabulary * 2), |at| product(at).map(drop))
    }
}
