//! Which kernel for which product.

use crate::backend::cuda::device::DeviceInfo;
use crate::backend::cuda::element::Format;

/// Which of a layer's two products.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the inputs to the outputs.
    Forward,
    /// From the outputs' gradient to the inputs'.
    Backward,
}

/// What is computed: a product, and what becomes of its sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Forward,
    Add,
    Rotated,
    Gated,
    Exponentials,
    Backward,
    GatedBackward,
}

impl Operation {
    /// Of its product.
    pub(super) fn direction(self) -> Direction {
        match self {
            Self::Forward | Self::Add | Self::Rotated | Self::Gated | Self::Exponentials => {
                Direction::Forward
            }
            Self::Backward | Self::GatedBackward => Direction::Backward,
        }
    }

    /// Whether its kernels can take rows of several weights.
    pub(super) fn takes_experts(self) -> bool {
        matches!(self, Self::Forward | Self::Gated | Self::Backward | Self::GatedBackward)
    }
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

/// The kernels: what part of the output a block computes, and with which instructions. For float32 operands
/// `linear_f32.cu` has the first three.
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

/// An operation's entry points by tile, in the order of [`Tile`].
macro_rules! names {
    ($operation:literal $(, $end:literal)?) => {
        [
            concat!("linear_", $operation $(, $end)?),
            concat!("linear_", $operation, "_small" $(, $end)?),
            concat!("linear_", $operation, "_unaligned" $(, $end)?),
            concat!("linear_", $operation, "_sm90" $(, $end)?),
            concat!("linear_", $operation, "_sm90_wide" $(, $end)?),
        ]
    };
}

impl Tile {
    /// The kernel for a product of operands in `format`.
    pub fn choose(info: &DeviceInfo, format: Format, direction: Direction, shape: Shape) -> Self {
        Self::fastest(info, direction, shape, |tile| tile.reads(format, direction, shape))
    }

    /// The same for rows of several weights; `shape`: of the product with one of them, for all rows.
    pub fn choose_for_experts(info: &DeviceInfo, format: Format, direction: Direction, shape: Shape) -> Self {
        Self::fastest(info, direction, shape, |tile| tile.reads_experts(format, direction, shape))
    }

    /// Which family of tiles is taken depends on the widths alone (`reads` looks at no others), which of its tiles on
    /// the rows too: they give the same bits.
    fn fastest(info: &DeviceInfo, direction: Direction, shape: Shape, reads: impl Fn(Self) -> bool) -> Self {
        let by_maps: &[Self] =
            if info.compute_capability == (9, 0) { &[Self::Wide, Self::Narrow] } else { &[] };
        let families = [by_maps, &[Self::Large, Self::Small]];
        let family =
            families.into_iter().find(|family| family.iter().all(|tile| reads(*tile)) && !family.is_empty());
        let time = |tile: &Self| tile.time(direction, shape, info.multiprocessors);
        let best = family.unwrap_or_default().iter().min_by(|a, b| time(a).total_cmp(&time(b)));
        *best.unwrap_or(&Self::Unaligned)
    }

    /// Whether the kernel can read a product's rows: all but one fetch 16 bytes at a time.
    pub fn reads(self, format: Format, direction: Direction, shape: Shape) -> bool {
        let Shape { in_features, out_features, .. } = shape;
        let vector = format.pick(4, 8);
        match (self, direction) {
            (Self::Narrow | Self::Wide, _) if format == Format::F32 => false,
            (Self::Unaligned, _) => true,
            (_, Direction::Forward) => in_features % vector == 0,
            (_, Direction::Backward) => in_features % vector == 0 && out_features % vector == 0,
        }
    }

    /// Whether the kernel can read the rows of a product with several weights: boxes that the copy engine fetches must
    /// not reach from one weight into the next.
    pub fn reads_experts(self, format: Format, direction: Direction, shape: Shape) -> bool {
        let apart = direction == Direction::Forward || shape.out_features.is_multiple_of(64);
        self.reads(format, direction, shape) && (!self.has_maps() || apart)
    }

    /// Rows and columns of a tile.
    pub(super) fn size(self) -> (usize, usize) {
        match self {
            Self::Large | Self::Narrow => (128, 128),
            Self::Small | Self::Unaligned => (64, 64),
            Self::Wide => (128, 256),
        }
    }

    /// Tiles of the output.
    pub(super) fn count(self, direction: Direction, shape: Shape) -> usize {
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
    pub(super) fn threads(self, format: Format) -> u32 {
        match self {
            Self::Large => format.pick(256, 128),
            Self::Small | Self::Unaligned => 128,
            Self::Narrow | Self::Wide => 384,
        }
    }

    /// Dynamic shared memory of a block: stages of both operands in bfloat16, and two barriers a stage where
    /// there are any. The kernels of float32 need none.
    pub(super) fn shared_bytes(self, format: Format) -> u32 {
        match self {
            _ if format == Format::F32 => 0,
            Self::Large => 3 * (128 + 128) * 32 * 2,
            Self::Small | Self::Unaligned => 3 * (64 + 64) * 64 * 2,
            Self::Narrow => 6 * ((128 + 128) * 64 * 2 + 2 * 8),
            Self::Wide => 4 * ((128 + 256) * 64 * 2 + 2 * 8),
        }
    }

    /// The kernel's file and name, for operands and an output of these formats. Most operations leave no choice of
    /// the latter.
    pub(super) fn entry(
        self,
        operation: Operation,
        operands: Format,
        output: Format,
    ) -> (&'static str, &'static str) {
        let names = match operation {
            Operation::Forward => output.pick(names!("forward", "_f32"), names!("forward", "_bf16")),
            Operation::Add => names!("add"),
            Operation::Rotated => names!("rotated"),
            Operation::Gated => names!("gated"),
            Operation::Exponentials => names!("exponentials"),
            Operation::Backward => output.pick(names!("backward", "_f32"), names!("backward", "_bf16")),
            Operation::GatedBackward => names!("gated_backward"),
        };
        let file = match operands {
            Format::F32 => "linear_f32.cu",
            Format::Bf16 if self.has_maps() => "linear_sm90.cu",
            Format::Bf16 => "linear.cu",
        };
        (file, names[self as usize])
    }

    /// Whether the operands are fetched by the copy engine.
    pub(super) fn has_maps(self) -> bool {
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
        Tile::choose(&device(compute_capability, multiprocessors), Format::Bf16, direction, shape)
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
                    let shape = Shape { rows: 100, in_features, out_features };
                    assert!(tile.reads(Format::Bf16, direction, shape));
                }
            }
        }
    }

    #[test]
    fn boxes_stay_inside_an_experts_weight() {
        let of = |direction, in_features, out_features| {
            let shape = Shape { rows: 4096, in_features, out_features };
            Tile::choose_for_experts(&device((9, 0), 132), Format::Bf16, direction, shape)
        };
        for direction in [Direction::Forward, Direction::Backward] {
            assert!(of(direction, 4096, 28_672).has_maps());
            assert_eq!(of(direction, 4096, 28_600).has_maps(), direction == Direction::Forward);
        }
        assert_eq!(of(Direction::Backward, 4096, 28_600), Tile::Large);
        assert_eq!(of(Direction::Backward, 4096, 28_601), Tile::Unaligned);
    }

    #[test]
    fn which_instructions_does_not_depend_on_the_number_of_rows() {
        for rows in [1, 64, 1000, 100_000] {
            assert!(chosen((9, 0), Direction::Forward, [rows, 896, 4864]).has_maps());
            assert!(!chosen((8, 6), Direction::Forward, [rows, 896, 4864]).has_maps());
        }
    }

    #[test]
    fn float32_has_the_same_tiles_everywhere() {
        for capability in [(8, 0), (9, 0)] {
            let of = |rows, in_features, out_features| {
                let shape = Shape { rows, in_features, out_features };
                let device = device(capability, 132);
                [Direction::Forward, Direction::Backward]
                    .map(|direction| Tile::choose(&device, Format::F32, direction, shape))
            };
            assert_eq!(of(8192, 4096, 4096), [Tile::Large; 2]);
            assert_eq!(of(100, 896, 900), [Tile::Small; 2]);
            assert_eq!(of(100, 896, 897), [Tile::Small, Tile::Unaligned]);
            assert_eq!(of(100, 898, 896), [Tile::Unaligned; 2]);
        }
    }
}
