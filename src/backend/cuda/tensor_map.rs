//! Tensor maps: how compute capability 9.0's copy engine is told where a matrix lies.

use std::ffi::c_void;

use cudarc::driver::sys;
use half::bf16;

use super::device::driver_failed;
use super::launch::TensorMap;
use super::memory::Buf;
use crate::error::Result;

/// Elements of a box's row: 128 bytes, the span of the swizzle.
pub const BOX_WIDTH: u32 = 64;

impl TensorMap {
    /// Of `matrix`, copied in boxes of `box_rows` × [`BOX_WIDTH`] with the 128-byte swizzle, zeros outside. Rows
    /// must be multiples of 16 bytes.
    ///
    /// # Errors
    ///
    /// The driver refuses the sizes.
    pub fn of(matrix: &Buf<bf16>, box_rows: u32) -> Result<Self> {
        let sizes = [matrix.width() as u64, matrix.rows() as u64];
        let row_bytes = [matrix.width() as u64 * 2];
        let box_sizes = [BOX_WIDTH, box_rows];
        let steps = [1_u32; 2];
        let mut map = Self([0; 16]);
        // SAFETY: the map has the size and alignment of a CUtensorMap; the arrays have `rank` and `rank` − 1
        // entries and are read during the call alone. The address is kept, not followed.
        let encoded = unsafe {
            sys::cuTensorMapEncodeTiled(
                (&raw mut map).cast(),
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                matrix.allocation().address() as *mut c_void,
                sizes.as_ptr(),
                row_bytes.as_ptr(),
                box_sizes.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
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
