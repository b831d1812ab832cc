//! Linear layers: which kernel for which shape, and its launch. Operands (x, dy, weights) are all in one format:
//! bfloat16, on the tensor cores, or float32.
//!
//! All kernels of one file add in the same order, and which file is taken depends on the layer's widths alone:
//! an output's bits do not depend on how many other rows there are.

mod fused;
mod grouped;
mod tile;

pub use fused::Exponentials;
use tile::Operation;
pub use tile::{Direction, Shape, Tile};

use super::Cuda;
use super::element::{Element, Format, Real};
use super::launch::{Launch, TensorMap, int};
use super::memory::Buf;
use super::moe::Routing;
use super::tensor_map::Swizzle;
use crate::error::Result;

/// in and out are smaller: the kernels' own limit.
const MAX_FEATURES: usize = 1 << 24;

impl Shape {
    /// Of the product with a layer's weight, `[out, in]`, for so many rows.
    fn of<A: Element>(rows: usize, weight: &Buf<A>) -> Self {
        Self { rows, in_features: weight.width(), out_features: weight.rows() }
    }
}

/// A product: what is multiplied, and by which kernel.
struct Product<'a, A> {
    operation: Operation,
    tile: Tile,
    left: &'a Buf<A>,
    /// One, or the experts', stacked.
    weight: &'a Buf<A>,
    /// Which rows are which expert's.
    routing: Option<&'a Routing>,
    /// Of the result, where the operation leaves a choice.
    output: Format,
}

impl<A: Real> Product<'_, A> {
    /// Its sizes.
    ///
    /// # Panics
    ///
    /// The operands do not match.
    fn shape(&self) -> Shape {
        let rows = self.left.rows();
        let shape = match self.routing {
            None => Shape::of(rows, self.weight),
            Some(routing) => {
                assert_eq!(rows, routing.rows(), "rows of the experts");
                Shape::of_expert(rows, self.weight, routing)
            }
        };
        match self.operation.direction() {
            Direction::Forward => {
                assert_eq!(self.left.width(), shape.in_features, "a linear layer's input and weight");
            }
            Direction::Backward => {
                assert_eq!(
                    self.left.width(),
                    shape.out_features,
                    "a linear layer's output gradient and weight"
                );
            }
        }
        shape
    }
}

/// Checks an array's shape.
///
/// # Panics
///
/// It has another.
fn assert_size<T: Element>(buf: &Buf<T>, rows: usize, width: usize, what: &str) {
    assert_eq!((buf.rows(), buf.width()), (rows, width), "a linear layer's {what}");
}

impl Cuda {
    /// The kernel for a layer.
    fn tile<A: Real>(&self, direction: Direction, left: &Buf<A>, weight: &Buf<A>) -> Tile {
        Tile::choose(&self.device.info, A::FORMAT, direction, Shape::of(left.rows(), weight))
    }

    /// y = x · weightᵀ + bias. x `[N, in]` · weight `[out, in]` · bias `[1, out]` → y `[N, out]`
    ///
    /// # Errors
    ///
    /// The device's memory is exhausted, the kernels cannot be had, or the driver refuses the launch.
    ///
    /// # Panics
    ///
    /// The shapes do not match, or in or out are 0 or not below 2²⁴.
    pub fn linear_forward<A: Real, Y: Real>(
        &self,
        x: &Buf<A>,
        weight: &Buf<A>,
        bias: Option<&Buf<f32>>,
    ) -> Result<Buf<Y>> {
        self.linear_forward_with(self.tile(Direction::Forward, x, weight), x, weight, bias)
    }

    /// [`Cuda::linear_forward`] by a kernel of the caller's choice.
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// # Panics
    ///
    /// As there, or the kernel cannot read such rows ([`Tile::reads`]).
    pub fn linear_forward_with<A: Real, Y: Real>(
        &self,
        tile: Tile,
        x: &Buf<A>,
        weight: &Buf<A>,
        bias: Option<&Buf<f32>>,
    ) -> Result<Buf<Y>> {
        let operation = Operation::Forward;
        self.product_forward(
            &Product { operation, tile, left: x, weight, routing: None, output: Y::FORMAT },
            bias,
        )
    }

    fn product_forward<A: Real, Y: Real>(
        &self,
        product: &Product<A>,
        bias: Option<&Buf<f32>>,
    ) -> Result<Buf<Y>> {
        let Shape { rows, out_features, .. } = product.shape();
        bias.inspect(|bias| assert_size(bias, 1, out_features, "bias"));
        let y = Buf::<Y>::new(&self.device.memory, rows, out_features)?;
        self.product(product, |launch| {
            launch.arg("const float* bias", bias).arg(Y::FORMAT.pick("float* y", "bf16* y"), &y)
        })?;
        Ok(y)
    }

    /// dx += dy · weight, in place; `None`: there is nothing so far.
    /// dy `[N, out]` · weight `[out, in]` → dx `[N, in]`
    ///
    /// # Errors
    ///
    /// As [`Cuda::linear_forward`].
    ///
    /// # Panics
    ///
    /// As there.
    pub fn linear_backward<A: Real>(
        &self,
        dy: &Buf<A>,
        weight: &Buf<A>,
        dx: Option<Buf<f32>>,
    ) -> Result<Buf<f32>> {
        self.linear_backward_with(self.tile(Direction::Backward, dy, weight), dy, weight, dx)
    }

    /// [`Cuda::linear_backward`] by a kernel of the caller's choice.
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// # Panics
    ///
    /// As there, or the kernel cannot read such rows ([`Tile::reads`]).
    pub fn linear_backward_with<A: Real>(
        &self,
        tile: Tile,
        dy: &Buf<A>,
        weight: &Buf<A>,
        dx: Option<Buf<f32>>,
    ) -> Result<Buf<f32>> {
        let Some(dx) = dx else { return self.linear_backward_as_with(tile, dy, weight, None) };
        self.product_backward(tile, dy, weight, None, Some(&dx), &dx)?;
        Ok(dx)
    }

    /// dy · weight + addend as a tensor of its own, rounded once.
    /// dy `[N, out]` · weight `[out, in]` · addend `[N, in]` → `[N, in]`
    ///
    /// # Errors
    ///
    /// As [`Cuda::linear_forward`].
    ///
    /// # Panics
    ///
    /// As there.
    pub fn linear_backward_as<A: Real, X: Real>(
        &self,
        dy: &Buf<A>,
        weight: &Buf<A>,
        addend: Option<&Buf<f32>>,
    ) -> Result<Buf<X>> {
        self.linear_backward_as_with(self.tile(Direction::Backward, dy, weight), dy, weight, addend)
    }

    /// [`Cuda::linear_backward_as`] by a kernel of the caller's choice.
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// # Panics
    ///
    /// As there, or the kernel cannot read such rows ([`Tile::reads`]).
    pub fn linear_backward_as_with<A: Real, X: Real>(
        &self,
        tile: Tile,
        dy: &Buf<A>,
        weight: &Buf<A>,
        addend: Option<&Buf<f32>>,
    ) -> Result<Buf<X>> {
        let dx = Buf::new(&self.device.memory, dy.rows(), weight.width())?;
        self.product_backward(tile, dy, weight, None, addend, &dx)?;
        Ok(dx)
    }

    /// dx = dy · weight, where dx may be a view. dy `[N, out]` · weight `[out, in]` → dx `[N, in]`
    ///
    /// # Errors
    ///
    /// As [`Cuda::linear_forward`].
    ///
    /// # Panics
    ///
    /// As there.
    pub fn linear_backward_into<A: Real>(
        &self,
        dy: &Buf<A>,
        weight: &Buf<A>,
        dx: &mut Buf<f32>,
    ) -> Result<()> {
        assert_size(dx, dy.rows(), weight.width(), "input gradient");
        self.product_backward(self.tile(Direction::Backward, dy, weight), dy, weight, None, None, dx)
    }

    fn product_backward<A: Real, X: Real>(
        &self,
        tile: Tile,
        dy: &Buf<A>,
        weight: &Buf<A>,
        routing: Option<&Routing>,
        addend: Option<&Buf<f32>>,
        dx: &Buf<X>,
    ) -> Result<()> {
        let operation = Operation::Backward;
        let product = Product { operation, tile, left: dy, weight, routing, output: X::FORMAT };
        let Shape { rows, in_features, .. } = product.shape();
        addend.inspect(|addend| assert_size(addend, rows, in_features, "input gradient so far"));
        self.product(&product, |launch| {
            launch.arg("const float* addend", addend).arg(X::FORMAT.pick("float* dx", "bf16* dx"), dx)
        })
    }

    /// `arguments`: those between the operands and the sizes, whose arrays the caller has made for this shape.
    fn product<A: Real>(
        &self,
        product: &Product<A>,
        arguments: impl FnOnce(Launch<'_>) -> Launch<'_>,
    ) -> Result<()> {
        let Product { operation, tile, left, weight, routing, output } = *product;
        let (direction, shape) = (operation.direction(), product.shape());
        let Shape { rows, in_features, out_features } = shape;
        let limits = 1..MAX_FEATURES;
        assert!(
            limits.contains(&in_features) && limits.contains(&out_features),
            "a layer's sizes: {shape:?}"
        );
        let reads = match routing {
            None => tile.reads(A::FORMAT, direction, shape),
            Some(_) => tile.reads_experts(A::FORMAT, direction, shape),
        };
        assert!(reads, "{tile:?} cannot read the rows of {shape:?} in {}", A::NAME);
        let tiles = tile.count(direction, shape);
        // Kernels number tiles, rows to the end of the last tile, and rows of a weight by int.
        let _ = (int(tiles), int(rows.next_multiple_of(tile.size().0)), int(weight.rows()));
        if tiles == 0 {
            return Ok(());
        }
        let (file, name) = tile.entry(operation, A::FORMAT, output);
        let kernel = self.kernel(file, name)?;
        let (threads, shared_bytes) = (tile.threads(A::FORMAT), tile.shared_bytes(A::FORMAT));
        let launch = if tile.has_maps() {
            kernel.allow_shared_bytes(shared_bytes)?;
            let (left_map, weight_rows) = match direction {
                Direction::Forward => ("const TensorMap x", tile.size().1),
                Direction::Backward => ("const TensorMap dy", 64),
            };
            let blocks = tiles.min(self.device.info.multiprocessors as usize);
            Launch::new(&kernel, blocks, threads)
                .arg(left_map, TensorMap::of(left, tile.size().0 as u32, Swizzle::B128)?)
                .arg("const TensorMap weight", TensorMap::of(weight, weight_rows as u32, Swizzle::B128)?)
        } else {
            let left_pointer = match direction {
                Direction::Forward => A::FORMAT.pick("const float* x", "const bf16* x"),
                Direction::Backward => A::FORMAT.pick("const float* dy", "const bf16* dy"),
            };
            Launch::new(&kernel, tiles, threads)
                .arg(left_pointer, left)
                .arg(A::FORMAT.pick("const float* weight", "const bf16* weight"), weight)
        };
        let launch = match operation.takes_experts() {
            true => launch.arg("const int* experts", routing.map(|routing| &routing.experts)),
            false => launch,
        };
        let launch = arguments(launch.shared_bytes(shared_bytes))
            .arg("int rows", int(rows))
            .arg("int in_features", int(in_features))
            .arg("int out_features", int(out_features));
        // SAFETY: the operands' sizes were compared, the kernel can read rows that start where these do, and the
        // caller vouches for the other arrays.
        unsafe { launch.on(&self.device.compute) }
    }
}
