//! Tensor maps: the descriptions of tiles that the tensor memory accelerator (TMA) of compute capability 9.0
//! copies.

use super::abi::{In, Out};
use super::device::{self, api};
use super::error::{Code, Error, Result};
use super::state;

/// `cuemu::TensorMap`, in the 128 bytes of a `CUtensorMap`.
#[repr(C)]
#[derive(Default)]
struct TensorMap {
    magic: u64,
    base: u64,
    dim: [u64; 5],
    stride: [u64; 4],
    box_dim: [u16; 5],
    element_bytes: u8,
    rank: u8,
    swizzle: u8,
    nan_fill: u8,
}

const MAGIC: u64 = 0x7061_6d72_6f73_6e74;
const MAX_RANK: u32 = 5;
/// Bytes of each `CUtensorMapDataType`: u8, u16, u32, i32, u64, i64, f16, f32, f64, bf16, f32 flushed, tf32,
/// tf32 flushed.
const ELEMENT_BYTES: [u8; 13] = [1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4];
const FIRST_FLOAT: usize = 6;
/// Bytes of the widest box of each swizzle: none, 32, 64, 128 bytes.
const SWIZZLE_SPAN: [u64; 4] = [u64::MAX, 32, 64, 128];

fn require(condition: bool, text: impl FnOnce() -> String) -> Result<()> {
    if condition { Ok(()) } else { Err(Error::invalid(format!("cuTensorMapEncodeTiled: {}", text()))) }
}

fn unsupported(text: &str) -> Error {
    Error::new(Code::NOT_SUPPORTED, format!("cuTensorMapEncodeTiled: {text}"))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuTensorMapEncodeTiled(
    map: Out<[u64; 16]>,
    data_type: i32,
    rank: u32,
    base: u64,
    dims: In<u64>,
    strides: In<u64>,
    boxes: In<u32>,
    element_strides: In<u32>,
    interleave: i32,
    swizzle: i32,
    promotion: i32,
    fill: i32,
) -> i32 {
    api(|| {
        if device::limits()?.capability < 90 {
            return Err(unsupported("the devices have no TMA: CUEMU_CC is below 90"));
        }
        let kind = data_type as usize;
        require(kind < ELEMENT_BYTES.len(), || format!("unknown data type {data_type}"))?;
        let bytes = ELEMENT_BYTES[kind];
        require((1..=MAX_RANK).contains(&rank), || format!("rank {rank} is not in 1..={MAX_RANK}"))?;
        if interleave != 0 {
            return Err(unsupported("interleaved layouts are not emulated"));
        }
        require(map.address().is_multiple_of(64), || "the map is not aligned to 64 bytes".into())?;
        require(base != 0 && base.is_multiple_of(16), || format!("{base:#x} is not aligned to 16 bytes"))?;
        require((0..4).contains(&swizzle), || format!("unknown swizzle {swizzle}"))?;
        require((0..4).contains(&promotion), || format!("unknown promotion {promotion}"))?;
        require(fill == 0 || fill == 1 && kind >= FIRST_FLOAT, || {
            format!("a fill of {fill} for this data type")
        })?;
        let mut encoded = TensorMap {
            magic: MAGIC,
            base,
            element_bytes: bytes,
            rank: rank as u8,
            swizzle: swizzle as u8,
            nan_fill: fill as u8,
            ..TensorMap::default()
        };
        // Bytes from the first element to the end of the last.
        let mut extent = 0;
        for index in 0..rank as usize {
            let dim = dims.at(index)?;
            require((1..=1 << 32).contains(&dim), || format!("size {dim} of dimension {index}"))?;
            encoded.dim[index] = dim;
            let width = boxes.at(index)?;
            require((1..=256).contains(&width), || format!("box size {width} of dimension {index}"))?;
            encoded.box_dim[index] = width as u16;
            if element_strides.at(index)? != 1 && index > 0 {
                return Err(unsupported("element strides other than 1 are not emulated"));
            }
            if index == 0 {
                extent = dim * u64::from(bytes);
                continue;
            }
            let stride = strides.at(index - 1)?;
            require(stride.is_multiple_of(16) && stride < 1 << 40, || {
                format!("stride {stride} of dimension {index} is not a multiple of 16 bytes below 2^40")
            })?;
            encoded.stride[index - 1] = stride;
            extent = extent.saturating_add((dim - 1).saturating_mul(stride));
        }
        let inner = u64::from(encoded.box_dim[0]) * u64::from(bytes);
        require(inner.is_multiple_of(16), || format!("the box is {inner} bytes wide, no multiple of 16"))?;
        let span = SWIZZLE_SPAN[swizzle as usize];
        require(inner <= span, || format!("the box is {inner} bytes wide, the swizzle {span}"))?;
        state().memory.device_range("cuTensorMapEncodeTiled", base, extent as usize)?;
        map.put([0; 16])?;
        map.cast().put(encoded)
    })
}
