//! Embedding lookup: `kernels/embed.cu`.

use super::launch::int;
use super::rows::Rows;
use super::{Buf, Cuda, Real};
use crate::error::Result;

impl Cuda {
    /// The table's rows of these ids as float32, times `scale`; table `[V, D]`, ids `[1, N]`, each below V → `[N, D]`.
    ///
    /// # Errors
    ///
    /// The device's memory is exhausted, or the driver fails.
    ///
    /// # Panics
    ///
    /// The ids are not one row.
    pub fn embed<A: Real>(&self, table: &Buf<A>, ids: &Buf<u32>, scale: f32) -> Result<Buf<f32>> {
        assert_eq!(ids.rows(), 1, "ids are one row");
        let (tokens, width) = (ids.width(), table.width());
        let kernel = self.kernel("embed.cu", A::FORMAT.pick("embed_f32", "embed_bf16"))?;
        let out = Buf::new(&self.device.memory, tokens, width)?;
        let pieces = if width.is_multiple_of(4) { width / 4 } else { width };
        let rows = Rows::new(tokens, pieces);
        let launch = rows
            .launch(&kernel)
            .arg(A::FORMAT.pick("const float* table", "const bf16* table"), table)
            .arg("const u32* ids", ids)
            .arg("float scale", scale)
            .arg("i64 rows", rows.rows())
            .arg("int width", int(width))
            .arg("int lanes", rows.lanes())
            .arg("float* out", &out);
        // SAFETY: the table is [V, width], every id below V by contract, ids [rows], out [rows, width].
        unsafe { launch.on(&self.device.compute) }?;
        Ok(out)
    }
}
