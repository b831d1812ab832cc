//! The ops of a mixture of experts by themselves.

use super::backend::CudaBackend;
use super::fused::wide;
use super::moe::Routing;
use super::{Format, Tensor};
use crate::error::Result;

impl CudaBackend {
    /// Each row with its expert's part of the one weight that lowering has made of all of them.
    pub(super) fn experts_by_themselves(
        &self,
        x: &Tensor,
        weights: &[&Tensor],
        routes: &Routing,
    ) -> Result<Tensor> {
        Ok(match (self.operand(x)?, weights[0]) {
            (Tensor::Bf16(x), Tensor::Bf16(weight)) => {
                self.cuda.experts_forward::<_, f32>(&x, weight, routes)?
            }
            (x, weight) => self.cuda.experts_forward::<_, f32>(wide(&x), wide(weight), routes)?,
        }
        .into())
    }

    pub(super) fn experts_by_themselves_adjoint(
        &self,
        weights: &[&Tensor],
        routes: &Routing,
        dy: &Tensor,
        dx: Option<Tensor>,
    ) -> Result<Tensor> {
        let more = match (self.operand(dy)?, weights[0]) {
            (Tensor::Bf16(dy), Tensor::Bf16(weight)) => {
                self.cuda.experts_backward::<_, f32>(&dy, weight, routes)?
            }
            (dy, weight) => self.cuda.experts_backward::<_, f32>(wide(&dy), wide(weight), routes)?,
        };
        self.sum(dx, more)
    }

    pub(super) fn combine_adjoint(
        &self,
        x: &Tensor,
        scores: &Tensor,
        routes: &Routing,
        dout: &Tensor,
        [dx, dscores]: [Option<Tensor>; 2],
    ) -> Result<[Tensor; 2]> {
        let (cuda, scores, dout) = (&self.cuda, wide(scores), dout.wide(&self.cuda)?);
        let x = x.wide(cuda)?;
        let (more_dx, more_dscores) = match (self.lower.format, &dx) {
            // As products read it, where there is nothing to add it to.
            (Format::Bf16, None) => {
                let (dx, dscores) = cuda.combine_backward::<_, half::bf16>(&x, scores, routes, &dout)?;
                (Tensor::from(dx), dscores)
            }
            _ => {
                let (more, dscores) = cuda.combine_backward::<_, f32>(&x, scores, routes, &dout)?;
                (self.sum(dx, more)?, dscores)
            }
        };
        Ok([more_dx, self.sum(dscores, more_dscores)?])
    }
}
