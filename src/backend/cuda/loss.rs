//! The finish of linear + cross-entropy: `kernels/loss.cu`.

use super::launch::{Launch, int};
use super::{Buf, Cuda, Real};
use crate::error::Result;

/// Columns of the vocabulary that share an exponent.
pub const STRIP: usize = 64;

/// What a product leaves of each row of logits besides their scaled exponentials; S = ⌈V/64⌉.
#[derive(Clone, Copy)]
pub struct Strips<'a> {
    /// k of each strip. `[R, S]`
    pub exponents: &'a Buf<f32>,
    /// Σ 2^(z·log₂e − k) over each strip, of values that were not rounded. `[R, S]`
    pub sums: &'a Buf<f32>,
}

/// What each row should have predicted.
#[derive(Clone, Copy)]
pub struct Targets<'a> {
    /// Columns of the vocabulary; −1: none. `[1, R]`
    pub ids: &'a Buf<i32>,
    /// Their logits; anything where there is no target. `[1, R]`
    pub logits: &'a Buf<f32>,
    /// What each row's loss is multiplied by. `[1, R]`
    pub scales: &'a Buf<f32>,
}

/// The kernels' number for a soft-cap; 0 is none.
pub(super) fn softcap_number(softcap: Option<f32>) -> f32 {
    assert!(softcap.is_none_or(|cap| cap.is_finite() && cap > 0.0), "a soft-cap of {softcap:?}");
    softcap.unwrap_or(0.0)
}

impl Cuda {
    /// Cross-entropy of each row, `[1, R]` or `[R, 1]` into `nats`, 0 without a target. With `gradient`, e becomes
    /// scale·(p − onehot), zero without a target. e `[R, V]`: 2^(z·log₂e − k) of each logit z. Where logits are
    /// soft-capped, z = softcap·tanh(x/softcap), e is that times dz/dx and becomes the gradient by x.
    ///
    /// # Errors
    ///
    /// The driver fails.
    ///
    /// # Panics
    ///
    /// The shapes do not match, or the soft-cap is not a positive number.
    pub fn loss_finish<A: Real>(
        &self,
        e: &mut Buf<A>,
        strips: Strips<'_>,
        targets: Targets<'_>,
        nats: &mut Buf<f32>,
        softcap: Option<f32>,
        gradient: bool,
    ) -> Result<()> {
        let (rows, vocab) = (e.rows(), e.width());
        for (name, buf) in [("exponents", strips.exponents), ("sums", strips.sums)] {
            assert_eq!(
                (buf.rows(), buf.width()),
                (rows, vocab.div_ceil(STRIP)),
                "{name} of {rows} x {vocab}"
            );
        }
        let lengths = [targets.ids.width(), targets.logits.width(), targets.scales.width()];
        assert_eq!(lengths, [rows; 3], "a target, its logit and its scale for each row");
        assert_eq!(nats.rows() * nats.width(), rows, "a loss for each row");
        let kernel = self.kernel("loss.cu", A::FORMAT.pick("loss_finish_f32", "loss_finish_bf16"))?;
        let launch = Launch::new(&kernel, rows, 256)
            .arg(A::FORMAT.pick("float* e", "bf16* e"), &*e)
            .arg("const float* exponents", strips.exponents)
            .arg("const float* sums", strips.sums)
            .arg("const float* target_logits", targets.logits)
            .arg("const int* targets", targets.ids)
            .arg("const float* scales", targets.scales)
            .arg("float* nats", &*nats)
            .arg("float softcap", softcap_number(softcap))
            .arg("int vocab", int(vocab))
            .arg("int gradient", i32::from(gradient));
        // SAFETY: e is [rows, vocab], exponents and sums [rows, ⌈vocab/64⌉], the others [rows]; targets are below
        // vocab by contract.
        unsafe { launch.on(&self.device.compute) }
    }
}
