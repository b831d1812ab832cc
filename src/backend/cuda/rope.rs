//! Rotary position embeddings: `kernels/rope.cu`.

use super::launch::int;
use super::rows::Rows;
use super::{Buf, Cuda, Real};
use crate::error::Result;
use crate::model::Rope;

/// Cosine and sine of the angle of every pair at every position, on the device.
pub struct RopeTable {
    /// `[positions, Hd/2]`
    pub(super) cos: Buf<f32>,
    /// As `cos`.
    pub(super) sin: Buf<f32>,
}

impl RopeTable {
    /// Hd/2.
    pub fn pairs(&self) -> usize {
        self.cos.width()
    }

    /// Positions are below this.
    pub fn positions(&self) -> usize {
        self.cos.rows()
    }
}

/// Which columns of a head are pair j.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairs {
    /// j and j + Hd/2, as checkpoints have them.
    Halves,
    /// 2j and 2j + 1, which [`Cuda::linear_rotated`] turns.
    Neighbours,
}

/// Which way pairs turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotation {
    /// By the angle.
    Forward,
    /// By the negated angle, which is the adjoint.
    Backward,
}

impl Cuda {
    /// Angles for positions `0..positions`; `inv_freq` `[Hd/2]`.
    ///
    /// # Errors
    ///
    /// The device's memory is exhausted, or the driver fails.
    pub fn rope_table(&self, inv_freq: &[f32], positions: usize) -> Result<RopeTable> {
        let (sin, cos): (Vec<f32>, Vec<f32>) =
            Rope::angles(inv_freq, positions).map(|angle| (angle.sin() as f32, angle.cos() as f32)).unzip();
        let table = |values: &[f32]| Buf::from_host(&self.device.memory, values, inv_freq.len());
        Ok(RopeTable { cos: table(&cos)?, sin: table(&sin)? })
    }

    /// Turns the first `heads` heads of every row in place; x `[N, W]` with heads·Hd ≤ W, positions `[1, N]`, each at
    /// least 0 and below the table's.
    ///
    /// # Errors
    ///
    /// The driver fails.
    ///
    /// # Panics
    ///
    /// The rows are too short, or positions are not one for each.
    pub fn rope_in_place<A: Real>(
        &self,
        x: &mut Buf<A>,
        heads: usize,
        layout: Pairs,
        table: &RopeTable,
        positions: &Buf<i32>,
        direction: Rotation,
    ) -> Result<()> {
        let pairs = table.pairs();
        assert!(2 * heads * pairs <= x.width(), "{heads} heads of {} in rows of {}", 2 * pairs, x.width());
        assert_eq!((positions.rows(), positions.width()), (1, x.rows()), "a position for each row");
        let (names, at_once) = match layout {
            Pairs::Halves => (("rope_f32", "rope_bf16"), 4),
            Pairs::Neighbours => (("rope_neighbours_f32", "rope_neighbours_bf16"), 2),
        };
        let kernel = self.kernel("rope.cu", A::FORMAT.pick(names.0, names.1))?;
        let together = x.width().is_multiple_of(4) && pairs.is_multiple_of(at_once);
        let rows = Rows::new(x.rows(), heads * pairs / if together { at_once } else { 1 });
        let sign = match direction {
            Rotation::Forward => 1.0,
            Rotation::Backward => -1.0_f32,
        };
        let launch = rows
            .launch(&kernel)
            .arg(A::FORMAT.pick("float* x", "bf16* x"), &*x)
            .arg("int width", int(x.width()))
            .arg("int heads", int(heads))
            .arg("int pairs", int(pairs))
            .arg("const float* cos", &table.cos)
            .arg("const float* sin", &table.sin)
            .arg("float sign", sign)
            .arg("const int* positions", positions)
            .arg("i64 rows", rows.rows())
            .arg("int lanes", rows.lanes());
        // SAFETY: x is [rows, width] with 2·heads·pairs ≤ width, positions [rows], cos and sin have a row of `pairs`
        // for every position by contract.
        unsafe { launch.on(&self.device.compute) }
    }
}
