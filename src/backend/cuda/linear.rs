//! Linear layers on the tensor cores: which kernel for which shape, and its launch.
//!
//! All kernels of one file add in the same order, and which file is taken depends on the layer's widths alone:
//! an output's bits do not depend on how many other rows there are.

use half::bf16;

use super::Cuda;
use super::device::DeviceInfo;
use super::element::Real;
use super::launch::{Launch, TensorMap, int};
use super::memory::Buf;
use super::tensor_map::Swizzle;
use crate::error::Result;

/// in and out are smaller: the kernels' own limit.
const MAX_FEATURES: usize = 1 << 24;

/// Which of a layer's two products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the inputs to the outputs.
    Forward,
    /// From the outputs' gradient to the inputs'.
    Backward,
}

/// Sizes of a layer's product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Tokens.
    pub rows: usize,
    /// Width of x and dx.
    pub in_features: usize,
    /// Width of y and dy.
    pub out_features: usize,
}

/// The kernels: what part of the output a block computes, and with which instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tile {
    /// 128×128, mma.sync.
    Large,
    /// 64×64, mma.sync.
    Small,
    /// 64×64, mma.sync, for rows that do not start on 16 bytes.
    Unaligned,
    /// 128×128, wgmma.
    Narrow,
    /// 128×256, wgmma.
    Wide,
}

impl Tile {
    /// The kernel for a product.
    pub fn choose(info: &DeviceInfo, direction: Direction, shape: Shape) -> Self {
        let tiles: &[Self] = match info.compute_capability {
            _ if !Self::Small.reads(direction, shape) => &[Self::Unaligned],
            (9, 0) => &[Self::Wide, Self::Narrow],
            _ => &[Self::Large, Self::Small],
        };
        let time = |tile: &Self| tile.time(direction, shape, info.multiprocessors);
        let best = tiles.iter().min_by(|a, b| time(a).total_cmp(&time(b)));
        *best.unwrap_or(&Self::Unaligned)
    }

    /// Whether the kernel can read a product's rows: all but one fetch 16 bytes at a time.
    pub fn reads(self, direction: Direction, shape: Shape) -> bool {
        let Shape { in_features, out_features, .. } = shape;
        match (self, direction) {
            (Self::Unaligned, _) => true,
            (_, Direction::Forward) => in_features % 8 == 0,
            (_, Direction::Backward) => in_features % 8 == 0 && out_features % 8 == 0,
        }
    }

    /// Rows and columns of a tile.
    fn size(self) -> (usize, usize) {
        match self {
            Self::Large | Self::Narrow => (128, 128),
            Self::Small | Self::Unaligned => (64, 64),
            Self::Wide => (128, 256),
        }
    }

    /// Tiles of the output.
    fn count(self, direction: Direction, shape: Shape) -> usize {
        let (rows, columns) = self.size();
        shape.rows.div_ceil(rows) * direction.columns(shape).div_ceil(columns)
    }

    /// Estimated time, to compare with that of other tiles: the busiest multiprocessor's outputs, dearer in
    /// smaller tiles, which read more operands for each.
    fn time(self, direction: Direction, shape: Shape, multiprocessors: u32) -> f64 {
        let (rows, columns) = self.size();
        let price = match self {
            Self::Large | Self::Wide => 1.0,
            Self::Narrow => 1.15,
            Self::Small | Self::Unaligned => 1.6,
        };
        let busiest = self.count(direction, shape).div_ceil(multiprocessors.max(1) as usize);
        (busiest * rows * columns) as f64 * price
    }

    /// Threads of a block.
    fn threads(self) -> u32 {
        match self {
            Self::Large | Self::Small | Self::Unaligned => 128,
            Self::Narrow | Self::Wide => 384,
        }
    }

    /// Dynamic shared memory of a block: stages of both operands in bfloat16, and two barriers a stage where
    /// there are any.
    fn shared_bytes(self) -> u32 {
        match self {
            Self::Large => 3 * (128 + 128) * 32 * 2,
            Self::Small | Self::Unaligned => 3 * (64 + 64) * 64 * 2,
            Self::Narrow => 6 * ((128 + 128) * 64 * 2 + 2 * 8),
            Self::Wide => 4 * ((128 + 256) * 64 * 2 + 2 * 8),
        }
    }

    /// The kernel's file and name.
    fn entry<Y: Real>(self, direction: Direction) -> (&'static str, &'static str) {
        let names = match (direction, self) {
            (Direction::Forward, Self::Large) => ["linear_forward_f32", "linear_forward_bf16"],
            (Direction::Forward, Self::Small) => ["linear_forward_small_f32", "linear_forward_small_bf16"],
            (Direction::Forward, Self::Unaligned) => {
                ["linear_forward_unaligned_f32", "linear_forward_unaligned_bf16"]
            }
            (Direction::Forward, Self::Narrow) => ["linear_forward_sm90_f32", "linear_forward_sm90_bf16"],
            (Direction::Forward, Self::Wide) => {
                ["linear_forward_sm90_wide_f32", "linear_forward_sm90_wide_bf16"]
            }
            (Direction::Backward, Self::Large) => ["linear_backward_f32", "linear_backward_bf16"],
            (Direction::Backward, Self::Small) => ["linear_backward_small_f32", "linear_backward_small_bf16"],
            (Direction::Backward, Self::Unaligned) => {
                ["linear_backward_unaligned_f32", "linear_backward_unaligned_bf16"]
            }
            (Direction::Backward, Self::Narrow) => ["linear_backward_sm90_f32", "linear_backward_sm90_bf16"],
            (Direction::Backward, Self::Wide) => {
                ["linear_backward_sm90_wide_f32", "linear_backward_sm90_wide_bf16"]
            }
        };
        let file = if self.has_maps() { "linear_sm90.cu" } else { "linear.cu" };
        let [f32, bf16] = names;
        (file, Y::FORMAT.pick(f32, bf16))
    }

    /// Whether the operands are fetched by the copy engine.
    fn has_maps(self) -> bool {
        matches!(self, Self::Narrow | Self::Wide)
    }
}

impl Direction {
    /// Width of the result.
    fn columns(self, shape: Shape) -> usize {
        match self {
            Self::Forward => shape.out_features,
            Self::Backward => shape.in_features,
        }
    }
}

impl Shape {
    /// Of the product with a layer's weight, `[out, in]`, for so many rows.
    fn of(rows: usize, weight: &Buf<bf16>) -> Self {
        Self { rows, in_features: weight.width(), out_features: weight.rows() }
    }
}

/// What a product is made of besides the weight: each with its declaration, which differs by direction.
struct Operands<'a, T> {
    left: &'a Buf<bf16>,
    left_pointer: &'static str,
    left_map: &'static str,
    added: Option<&'a Buf<f32>>,
    added_pointer: &'static str,
    result: &'a Buf<T>,
    result_pointer: &'static str,
}

impl Cuda {
    /// y = x · weightᵀ + bias. x `[N, in]` · weight `[out, in]` · bias `[1, out]` → y `[N, out]`
    ///
    /// # Errors
    ///
    /// The device's memory is exhausted, the kernels cannot be had, or the driver refuses the launch.
    ///
    /// # Panics
    ///
    /// The shapes do not match, or in or out are 0 or not below 2²⁴.
    pub fn linear_forward<Y: Real>(
        &self,
        x: &Buf<bf16>,
        weight: &Buf<bf16>,
        bias: Option<&Buf<f32>>,
    ) -> Result<Buf<Y>> {
        let tile = Tile::choose(&self.device.info, Direction::Forward, Shape::of(x.rows(), weight));
        self.linear_forward_with(tile, x, weight, bias)
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
    pub fn linear_forward_with<Y: Real>(
        &self,
        tile: Tile,
        x: &Buf<bf16>,
        weight: &Buf<bf16>,
        bias: Option<&Buf<f32>>,
    ) -> Result<Buf<Y>> {
        let shape = Shape::of(x.rows(), weight);
        assert_eq!(x.width(), shape.in_features, "a linear layer's input and weight");
        let bias_size = (1, shape.out_features);
        assert!(bias.is_none_or(|bias| (bias.rows(), bias.width()) == bias_size), "a linear layer's bias");
        let y = Buf::new(&self.device.memory, shape.rows, shape.out_features)?;
        let operands = Operands {
            left: x,
            left_pointer: "const bf16* x",
            left_map: "const TensorMap x",
            added: bias,
            added_pointer: "const float* bias",
            result: &y,
            result_pointer: Y::FORMAT.pick("float* y", "bf16* y"),
        };
        self.product(tile, Direction::Forward, shape, weight, operands)?;
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
    pub fn linear_backward(
        &self,
        dy: &Buf<bf16>,
        weight: &Buf<bf16>,
        dx: Option<Buf<f32>>,
    ) -> Result<Buf<f32>> {
        let tile = Tile::choose(&self.device.info, Direction::Backward, Shape::of(dy.rows(), weight));
        self.linear_backward_with(tile, dy, weight, dx)
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
    pub fn linear_backward_with(
        &self,
        tile: Tile,
        dy: &Buf<bf16>,
        weight: &Buf<bf16>,
        dx: Option<Buf<f32>>,
    ) -> Result<Buf<f32>> {
        let Some(dx) = dx else { return self.linear_backward_as_with(tile, dy, weight, None) };
        self.product_backward(tile, dy, weight, Some(&dx), &dx)?;
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
    pub fn linear_backward_as<X: Real>(
        &self,
        dy: &Buf<bf16>,
        weight: &Buf<bf16>,
        addend: Option<&Buf<f32>>,
    ) -> Result<Buf<X>> {
        let tile = Tile::choose(&self.device.info, Direction::Backward, Shape::of(dy.rows(), weight));
        self.linear_backward_as_with(tile, dy, weight, addend)
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
    pub fn linear_backward_as_with<X: Real>(
        &self,
        tile: Tile,
        dy: &Buf<bf16>,
        weight: &Buf<bf16>,
        addend: Option<&Buf<f32>>,
    ) -> Result<Buf<X>> {
        let dx = Buf::new(&self.device.memory, dy.rows(), weight.width())?;
        self.product_backward(tile, dy, weight, addend, &dx)?;
        Ok(dx)
    }

    fn product_backward<X: Real>(
        &self,
        tile: Tile,
        dy: &Buf<bf16>,
        weight: &Buf<bf16>,
        addend: Option<&Buf<f32>>,
        dx: &Buf<X>,
    ) -> Result<()> {
        let shape = Shape::of(dy.rows(), weight);
        let size = (shape.rows, shape.in_features);
        assert_eq!(dy.width(), shape.out_features, "a linear layer's output gradient and weight");
        assert!(
            addend.is_none_or(|addend| (addend.rows(), addend.width()) == size),
            "a linear layer's input gradient so far"
        );
        let operands = Operands {
            left: dy,
            left_pointer: "const bf16* dy",
            left_map: "const TensorMap dy",
            added: addend,
            added_pointer: "const float* addend",
            result: dx,
            result_pointer: X::FORMAT.pick("float* dx", "bf16* dx"),
        };
        self.product(tile, Direction::Backward, shape, weight, operands)
    }

    /// The callers have compared the operands' sizes with the shape.
    fn product<T: Real>(
        &self,
        tile: Tile,
        direction: Direction,
        shape: Shape,
        weight: &Buf<bf16>,
        operands: Operands<T>,
    ) -> Result<()> {
        let Shape { rows, in_features, out_features } = shape;
        let limits = 1..MAX_FEATURES;
        assert!(
            limits.contains(&in_features) && limits.contains(&out_features),
            "a layer's sizes: {shape:?}"
        );
        assert!(tile.reads(direction, shape), "{tile:?} cannot read the rows of {shape:?}");
        let tiles = tile.count(direction, shape);
        // Kernels number tiles, and rows to the end of the last tile, by int.
        let _ = (int(tiles), int(rows.next_multiple_of(tile.size().0)));
        if tiles == 0 {
            return Ok(());
        }
        let (file, name) = tile.entry::<T>(direction);
        let kernel = self.kernel(file, name)?;
        let Operands { left, left_pointer, left_map, added, added_pointer, result, result_pointer } =
            operands;
        let launch = if tile.has_maps() {
            kernel.allow_shared_bytes(tile.shared_bytes())?;
            let weight_rows = match direction {
                Direction::Forward => tile.size().1,
                Direction::Backward => 64,
            };
            let blocks = tiles.min(self.device.info.multiprocessors as usize);
            Launch::new(&kernel, blocks, tile.threads())
                .arg(left_map, TensorMap::of(left, tile.size().0 as u32, Swizzle::B128)?)
                .arg("const TensorMap weight", TensorMap::of(weight, weight_rows as u32, Swizzle::B128)?)
        } else {
            Launch::new(&kernel, tiles, tile.threads())
                .arg(left_pointer, left)
                .arg("const bf16* weight", weight)
        };
        let launch = launch
            .shared_bytes(tile.shared_bytes())
            .arg(added_pointer, added)
            .arg(result_pointer, result)
            .arg("int rows", int(rows))
            .arg("int in_features", int(in_features))
            .arg("int out_features", int(out_features));
        // SAFETY: all shapes were compared, and the kernel can read rows that start where these do.
        unsafe { launch.on(&self.device.compute) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(compute_capability: (i32, i32), multiprocessors: u32) -> DeviceInfo {
        let (name, shared_bytes_per_block) = (String::new(), 100 << 10);
        let (ordinal, total_bytes) = (0, 1 << 34);
        DeviceInfo { ordinal, name, compute_capability, total_bytes, multiprocessors, shared_bytes_per_block }
    }

    fn chosen(compute_capability: (i32, i32), direction: Direction, sizes: [usize; 3]) -> Tile {
        let [rows, in_features, out_features] = sizes;
        let multiprocessors = if compute_capability == (9, 0) { 132 } else { 108 };
        let shape = Shape { rows, in_features, out_features };
        Tile::choose(&device(compute_capability, multiprocessors), direction, shape)
    }

    #[test]
    fn large_outputs_take_large_tiles() {
        for direction in [Direction::Forward, Direction::Backward] {
            assert_eq!(chosen((8, 0), direction, [8192, 4096, 4096]), Tile::Large);
            assert_eq!(chosen((8, 9), direction, [100, 896, 896]), Tile::Small);
            assert_eq!(chosen((12, 0), direction, [8192, 4096, 4096]), Tile::Large);
            assert_eq!(chosen((9, 0), direction, [8192, 4096, 4096]), Tile::Wide);
            assert_eq!(chosen((9, 0), direction, [100, 896, 896]), Tile::Narrow);
        }
    }

    #[test]
    fn rows_that_do_not_start_on_16_bytes_take_plain_loads() {
        for capability in [(8, 0), (9, 0)] {
            assert_eq!(chosen(capability, Direction::Forward, [512, 897, 896]), Tile::Unaligned);
            assert_eq!(chosen(capability, Direction::Backward, [512, 896, 897]), Tile::Unaligned);
            assert_ne!(chosen(capability, Direction::Forward, [512, 896, 897]), Tile::Unaligned);
        }
    }

    #[test]
    fn what_is_chosen_can_be_read() {
        for direction in [Direction::Forward, Direction::Backward] {
            for (in_features, out_features) in [(8, 8), (8, 9), (9, 8), (9, 9), (896, 4864)] {
                for capability in [(8, 0), (9, 0)] {
                    let tile = chosen(capability, direction, [100, in_features, out_features]);
                    assert!(tile.reads(direction, Shape { rows: 100, in_features, out_features }));
                }
            }
        }
    }

    #[test]
    fn which_instructions_does_not_depend_on_the_number_of_rows() {
        for rows in [1, 64, 1000, 100_000] {
            assert!(chosen((9, 0), Direction::Forward, [rows, 896, 4864]).has_maps());
            assert!(!chosen((8, 6), Direction::Forward, [rows, 896, 4864]).has_maps());
        }
    }
}
