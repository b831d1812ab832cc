//! The head: logits of some rows at a time, their losses, and the gradient of what the logits were made of.

use std::ops::Range;

use super::Buf;
use super::backend::CudaBackend;
use super::chunk::PlacedChunk;
use super::fused::Operand;
use super::loss::{Strips, Targets};
use super::lower::logit_rows;
use crate::error::Result;

/// Nats of each row, on the device, and which rows are a sample's.
pub struct DeviceNats {
    pub(super) nats: Buf<f32>,
    pub(super) samples: Vec<Range<usize>>,
}

impl CudaBackend {
    /// x `[N, D]`, weight `[V, D]` → nats of each row `[1, N]`, 0 where it has no target, and the gradient `[N, D]`, with
    /// each row's loss weighted by its scale; with a `softcap` of softcap·tanh(logits/softcap). At most [`logit_rows`] rows
    /// of logits exist at a time.
    pub(super) fn cross_entropy<A: Operand>(
        &self,
        x: &Buf<A>,
        weight: &Buf<A>,
        chunk: &PlacedChunk,
        softcap: Option<f32>,
        want_gradient: bool,
    ) -> Result<(Buf<f32>, Option<Buf<f32>>)> {
        let (cuda, memory) = (&self.cuda, &self.cuda.device.memory);
        let nats = Buf::<f32>::new(memory, 1, x.rows())?;
        let dx = want_gradient.then(|| Buf::<f32>::new(memory, x.rows(), x.width())).transpose()?;
        let at_once = logit_rows(weight.rows());
        for start in (0..x.rows()).step_by(at_once) {
            let rows = start..(start + at_once).min(x.rows());
            let (ids, scales) = (chunk.targets.elements(rows.clone()), chunk.scales.elements(rows.clone()));
            let mut found = cuda.linear_exponentials(&x.view(rows.clone()), weight, &ids, softcap)?;
            let strips = Strips { exponents: &found.exponents, sums: &found.sums };
            let targets = Targets { ids: &ids, logits: &found.target_logits, scales: &scales };
            let mut nats = nats.elements(rows.clone());
            cuda.loss_finish(&mut found.powers, strips, targets, &mut nats, softcap, want_gradient)?;
            if let Some(dx) = &dx {
                cuda.linear_backward_into(&found.powers, weight, &mut dx.view(rows))?;
            }
        }
        Ok((nats, dx))
    }
}
