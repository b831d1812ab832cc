//! Tensor maps: how compute capability 9.0's copy engine is told where a matrix lies.

use std::ffi::c_void;

use cudarc::driver::sys;

use super::device::driver_failed;
use super::element::Real;
use super::launch::TensorMap;
use super::memory::Buf;
use crate::error::Result;

/// Elements of a box's row: 128 bytes of bfloat16, the span of the kernels' swizzle.
pub const BOX_WIDTH: u32 = 64;

/// In which order a box's 16-byte chunks lie in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swizzle {
    /// As in the matrix.
    Plain,
    /// Exchanged within 64 bytes, which is as wide as a box may then be.
    B64,
    /// Exchanged within 128 bytes: what the kernels expect.
    B128,
}

impl TensorMap {
    /// Of `matrix`, copied in boxes of `box_rows` × [`BOX_WIDTH`], zeros outside. Rows must be multiples of 16
    /// bytes.
    ///
    /// # Errors
    ///
    /// The driver refuses the sizes.
    pub fn of<T: Real>(matrix: &Buf<T>, box_rows: u32, swizzle: Swizzle) -> Result<Self> {
        let sizes = [matrix.width() as u64, matrix.rows() as u64];
        let row_bytes = [(matrix.width() * size_of::<T>()) as u64];
        let box_sizes = [BOX_WIDTH, box_rows];
        let steps = [1_u32; 2];
        let swizzle = match swizzle {
            Swizzle::Plain => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
            Swizzle::B64 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            Swizzle::B128 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        let mut map = Self { words: [0; 16], stream: matrix.allocation().stream().cu_stream() };
        // SAFETY: the map has the size of a CUtensorMap and starts at its alignment; the arrays have `rank` and `rank` − 1
        // entries and are read during the call alone. The address is kept, not followed.
        let encoded = unsafe {
            sys::cuTensorMapEncodeTiled(
                (&raw mut map.words).cast(),
                T::FORMAT.pick(
                    sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
                    sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                ),
                2,
                matrix.address() as *mut c_void,
                sizes.as_ptr(),
                row_bytes.as_ptr(),
                box_sizes.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        encoded.result().map_err(|error| {
            let shape = format!("[{}, {}], boxes of {box_rows} rows", matrix.rows(), matrix.width());
            driver_failed("refused a tensor map", error).found(shape)
        })?;
        Ok(map)
    }
}
