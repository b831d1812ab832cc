//! What device buffers hold, and what kernels call it.

use half::bf16;

mod sealed {
    pub trait Sealed {}
}

/// An element type of device buffers.
pub trait Element: bytemuck::Pod + sealed::Sealed {
    /// As kernels' entry points name it: `f32`, `bf16`.
    const NAME: &'static str;
    /// As kernels' parameters declare it: `float` of `const float* x`.
    const C_NAME: &'static str;
}

/// Implements [`Element`]: type, name, name in kernels.
macro_rules! elements {
    ($($element:ty: $name:literal, $c_name:literal;)*) => {$(
        impl sealed::Sealed for $element {}
        impl Element for $element {
            const NAME: &'static str = $name;
            const C_NAME: &'static str = $c_name;
        }
    )*};
}

elements! {
    f32: "f32", "float";
    f64: "f64", "double";
    bf16: "bf16", "bf16";
    i32: "i32", "int";
    u32: "u32", "u32";
    i64: "i64", "i64";
    Segment: "segment", "Segment";
    SampleTile: "sample_tile", "SampleTile";
}

/// How the numbers of a tensor are stored. A kernel that takes several formats has an entry point for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// float32
    F32,
    /// bfloat16
    Bf16,
}

impl Format {
    /// The one of two that is for this format.
    pub fn pick<T>(self, f32: T, bf16: T) -> T {
        match self {
            Self::F32 => f32,
            Self::Bf16 => bf16,
        }
    }
}

/// An element that is a number of a tensor.
pub trait Real: Element {
    /// Which.
    const FORMAT: Format;
}

impl Real for f32 {
    const FORMAT: Format = Format::F32;
}

impl Real for bf16 {
    const FORMAT: Format = Format::Bf16;
}

/// Neighbouring rows of one sample, as `kernels/stats.cu` declares them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(8))]
pub struct Segment {
    /// The first of them.
    pub first_row: i32,
    /// How many.
    pub rows: i32,
}

// SAFETY: two integers, without padding (8 bytes, aligned to as many), of which every bit pattern is valid.
unsafe impl bytemuck::Zeroable for Segment {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for Segment {}

/// 64 rows of a sample, as `kernels/attention.cuh` declares them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct SampleTile {
    /// The sample's first row.
    pub first_row: i32,
    /// The sample's rows.
    pub rows: i32,
    /// Number of the tile in the sample.
    pub tile: i32,
}

// SAFETY: three integers, without padding (12 bytes, aligned to 4), of which every bit pattern is valid.
unsafe impl bytemuck::Zeroable for SampleTile {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for SampleTile {}
