//! Linear layers on the tensor cores: which kernel for which shape, and its launch.
//!
//! All kernels of one file add in the same order, and which file is taken depends on the layer's widths alone:
//! an output's bits do not depend on how many other rows there are.

use half::bf16;

use super::Cuda;
use super::device::DeviceInfo;
use super::launch::{Launch, TensorMap};
use super::memory::{Buf, Element};
use crate::error::Result;

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
        let Shape { in_features, out_features, .. } = shape;
        let aligned = match direction {
            Direction::Forward => in_features % 8 == 0,
            Direction::Backward => in_features % 8 == 0 && out_features % 8 == 0,
        };
        let tiles: &[Self] = match info.compute_capability {
            _ if !aligned => &[Self::Unaligned],
            (9, 0) => &[Self::Wide, Self::Narrow],
            _ => &[Self::Large, Self::Small],
        };
        let time = |tile: &Self| tile.time(direction, shape, info.multiprocessors);
        let best = tiles.iter().min_by(|a, b| time(a).total_cmp(&time(b)));
        *best.unwrap_or(&Self::Unaligned)
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
    fn entry<Y: Output>(self, direction: Direction) -> (&'static str, &'static str) {
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
        (file, names[Y::INDEX])
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

/// What a product can be stored as.
pub trait Output: Element {
    /// In lists of `f32` and `bf16`.
    const INDEX: usize;
    /// A pointer to it, y and dx, as the kernels declare it.
    const DECLARATIONS: [&'static str; 2];
}

impl Output for f32 {
    const INDEX: usize = 0;
    const DECLARATIONS: [&'static str; 2] = ["float* y", "float* dx"];
}

impl Output for bf16 {
    const INDEX: usize = 1;
    const DECLARATIONS: [&'static str; 2] = ["bf16* y", "bf16* dx"];
}

impl Cuda {
    /// y = x · weightᵀ + bias. x `[N, in]` · weight `[out, in]` · bias `[out]` → y `[N, out]`
    ///
    /// # Errors
    ///
    /// The kernels cannot be had, or the driver refuses the launch.
    ///
    /// # Panics
    ///
    /// The shapes do not match.
    pub fn linear_forward<Y: Output>(
        &self,
        x: &Buf<bf16>,
        weight: &Buf<bf16>,
        bias: Option<&Buf<f32>>,
        y: &Buf<Y>,
    ) -> Result<()> {
        let shape = Shape { rows: x.rows(), in_features: weight.width(), out_features: weight.rows() };
        let tile = Tile::choose(&self.device.info, Direction::Forward, shape);
        self.linear_forward_with(tile, x, weight, bias, y)
    }

    /// [`Cuda::linear_forward`] by a kernel of the caller's choice, which must be able to read the rows.
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// # Panics
    ///
    /// As there.
    pub fn linear_forward_with<Y: Output>(
        &self,
        tile: Tile,
        x: &Buf<bf16>,
        weight: &Buf<bf16>,
        bias: Option<&Buf<f32>>,
        y: &Buf<Y>,
    ) -> Result<()> {
        let shape = Shape { rows: x.rows(), in_features: weight.width(), out_features: weight.rows() };
        assert_eq!(x.width(), shape.in_features, "a linear layer's input and weight");
        assert_eq!((y.rows(), y.width()), (shape.rows, shape.out_features), "a linear layer's output");
        assert!(bias.is_none_or(|bias| bias.width() == shape.out_features), "a linear layer's bias");
        let declarations = [
            "const bf16* x",
            "const TensorMap x",
            "const float* bias",
            Y::DECLARATIONS[Direction::Forward as usize],
        ];
        self.product(tile, Direction::Forward, shape, declarations, [x, weight], bias, y)
    }

    /// dx = dy · weight + addend, where the addend may be dx itself.
    /// dy `[N, out]` · weight `[out, in]` · addend `[N, in]` → dx `[N, in]`
    ///
    /// # Errors
    ///
    /// The kernels cannot be had, or the driver refuses the launch.
    ///
    /// # Panics
    ///
    /// The shapes do not match.
    pub fn linear_backward<X: Output>(
        &self,
        dy: &Buf<bf16>,
        weight: &Buf<bf16>,
        addend: Option<&Buf<f32>>,
        dx: &Buf<X>,
    ) -> Result<()> {
        let shape = Shape { rows: dy.rows(), in_features: weight.width(), out_features: weight.rows() };
        let tile = Tile::choose(&self.device.info, Direction::Backward, shape);
        self.linear_backward_with(tile, dy, weight, addend, dx)
    }

    /// [`Cuda::linear_backward`] by a kernel of the caller's choice, which must be able to read the rows.
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// # Panics
    ///
    /// As there.
    pub fn linear_backward_with<X: Output>(
        &self,
        tile: Tile,
        dy: &Buf<bf16>,
        weight: &Buf<bf16>,
        addend: Option<&Buf<f32>>,
        dx: &Buf<X>,
    ) -> Result<()> {
        let shape = Shape { rows: dy.rows(), in_features: weight.width(), out_features: weight.rows() };
        let size = (shape.rows, shape.in_features);
        assert_eq!(dy.width(), shape.out_features, "a linear layer's output gradient and weight");
        assert_eq!((dx.rows(), dx.width()), size, "a linear layer's input gradient");
        assert!(addend.is_none_or(|addend| (addend.rows(), addend.width()) == size), "an addend");
        let declarations = [
            "const bf16* dy",
            "const TensorMap dy",
            "const float* addend",
            X::DECLARATIONS[Direction::Backward as usize],
        ];
        self.product(tile, Direction::Backward, shape, declarations, [dy, weight], addend, dx)
    }

    /// `declarations`: of the left operand as a pointer and as a map, of what is added, and of the result.
    #[allow(clippy::too_many_arguments)]
    fn product<T: Output>(
        &self,
        tile: Tile,
        direction: Direction,
        shape: Shape,
        declarations: [&'static str; 4],
        [left, weight]: [&Buf<bf16>; 2],
        added: Option<&Buf<f32>>,
        result: &Buf<T>,
    ) -> Result<()> {
        let tiles = tile.count(direction, shape);
        if tiles == 0 {
            return Ok(());
        }
        let (file, name) = tile.entry::<T>(direction);
        let kernel = self.kernel(file, name)?;
        let [left_pointer, left_map, added_pointer, result_pointer] = declarations;
        let launch = if tile.has_maps() {
            kernel.allow_shared_bytes(tile.shared_bytes())?;
            let weight_rows = match direction {
                Direction::Forward => tile.size().1,
                Direction::Backward => 64,
            };
            let blocks = tiles.min(self.device.info.multiprocessors as usize);
            Launch::new(&kernel, blocks, tile.threads())
                .arg(left_map, TensorMap::of(left, tile.size().0 as u32)?)
                .arg("const TensorMap weight", TensorMap::of(weight, weight_rows as u32)?)
        } else {
            Launch::new(&kernel, tiles, tile.threads())
                .arg(left_pointer, left)
                .arg("const bf16* weight", weight)
        };
        let launch = launch
            .shared_bytes(tile.shared_bytes())
            .arg(added_pointer, added)
            .arg(result_pointer, result)
            .arg("int rows", shape.rows as i32)
            .arg("int in_features", shape.in_features as i32)
            .arg("int out_features", shape.out_features as i32);
        // SAFETY: the callers compared all shapes; buffers are freed in the order of the compute stream.
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
    fn which_instructions_does_not_depend_on_the_number_of_rows() {
        for rows in [1, 64, 1000, 100_000] {
            assert!(chosen((9, 0), Direction::Forward, [rows, 896, 4864]).has_maps());
            assert!(!chosen((8, 6), Direction::Forward, [rows, 896, 4864]).has_maps());
        }
    }
}
