//! Fused ops forward and backward, launch by launch.

use super::attention::AttentionSpec;
use super::backend::CudaBackend;
use super::lower::{Fused, Residual};
use super::moe::Routing;
use super::rope::{Pairs, Rotation};
use super::{Buf, Format, Real, Tensor};
use crate::backend::{OnTap, Scope};
use crate::error::Result;
use crate::model::op::{Attention, Slot};

/// What an op finds in its slots; a missing one is a mistake of the op list.
fn there(slots: &[Option<Tensor>], slot: Slot) -> &Tensor {
    match &slots[slot.0] {
        Some(tensor) => tensor,
        None => panic!("slot {} is empty", slot.0),
    }
}

/// The gradient of a slot, which is complete when the op that wrote it is reached.
fn taken(grads: &mut [Option<Tensor>], slot: Slot) -> Tensor {
    match grads[slot.0].take() {
        Some(tensor) => tensor,
        None => panic!("slot {} has no gradient", slot.0),
    }
}

/// What the block's router chose.
pub(super) fn chosen(routes: Option<&Routing>) -> &Routing {
    match routes {
        Some(routes) => routes,
        None => panic!("experts without a router before them"),
    }
}

impl Attention {
    /// As the kernels take it.
    pub(super) fn spec(&self) -> AttentionSpec {
        AttentionSpec {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            window: self.window,
            scale: self.scale as f32,
            softcap: self.softcap.map(|cap| cap as f32),
        }
    }
}

impl CudaBackend {
    pub(super) fn fused_forward(
        &self,
        op: &Fused,
        scope: &Scope<'_, Self>,
        wanted: &[bool],
        slots: &mut [Option<Tensor>],
        routes: Option<&Routing>,
        on_tap: OnTap<'_, Tensor>,
    ) -> Result<()> {
        match self.lower.format {
            Format::F32 => self.forward_in::<f32>(op, scope, wanted, slots, routes, on_tap),
            Format::Bf16 => self.forward_in::<half::bf16>(op, scope, wanted, slots, routes, on_tap),
        }
    }

    pub(super) fn fused_adjoint(
        &self,
        op: &Fused,
        scope: &Scope<'_, Self>,
        slots: &[Option<Tensor>],
        grads: &mut [Option<Tensor>],
        routes: Option<&Routing>,
        on_tap: OnTap<'_, Tensor>,
    ) -> Result<()> {
        match self.lower.format {
            Format::F32 => self.backward_in::<f32>(op, scope, slots, grads, routes, on_tap),
            Format::Bf16 => self.backward_in::<half::bf16>(op, scope, slots, grads, routes, on_tap),
        }
    }

    fn forward_in<A: Operand>(
        &self,
        op: &Fused,
        scope: &Scope<'_, Self>,
        wanted: &[bool],
        slots: &mut [Option<Tensor>],
        routes: Option<&Routing>,
        on_tap: OnTap<'_, Tensor>,
    ) -> Result<()> {
        let cuda = &self.cuda;
        let matrix = |weight| A::of(scope.weights.get(weight));
        let vector = |weight: Option<_>| weight.map(|weight| wide(scope.weights.get(weight)));
        match *op {
            Fused::LinearRope { x, weight, bias, heads, table, pairs, out } => {
                let (x, weight, bias) = (A::of(there(slots, x)), matrix(weight), vector(bias));
                let (table, positions) = (&scope.ropes[table], &scope.chunk.positions);
                let qkv = match pairs {
                    Pairs::Neighbours => cuda.linear_rotated(x, weight, bias, heads, table, positions)?,
                    Pairs::Halves => {
                        let mut qkv = cuda.linear_forward::<A, f32>(x, weight, bias)?;
                        cuda.rope_in_place(&mut qkv, heads, pairs, table, positions, Rotation::Forward)?;
                        cuda.cast(&qkv)?
                    }
                };
                slots[out.0] = Some(A::tensor(qkv));
            }
            Fused::Attend { qkv, ref attention, out, lse } => {
                let qkv = A::of(there(slots, qkv));
                let (attended, sums) = cuda.attention_forward(qkv, &attention.spec(), &scope.chunk.work)?;
                slots[out.0] = Some(A::tensor(attended));
                slots[lse.0] = wanted[lse.0].then(|| sums.into());
            }
            Fused::LinearAdd { x, weight, bias, out, ref residual } => {
                let x = A::of(there(slots, x)).share();
                self.add_product(&x, matrix(weight), vector(bias), residual, out, slots, on_tap)?;
            }
            Fused::GatedExperts { x, gate_up_weight, activation, gate_up, weight, out } => {
                let (x, routes) = (A::of(there(slots, x)), chosen(routes));
                let keep = wanted[gate_up.0];
                let (parts, hidden) =
                    cuda.experts_gated(x, matrix(gate_up_weight), routes, activation.into(), keep)?;
                slots[gate_up.0] = parts.map(A::tensor);
                // Gate and up alone are computed again on the way back.
                if wanted[out.0] {
                    let rows = cuda.experts_forward::<A, f32>(&hidden, matrix(weight), routes)?;
                    slots[out.0] = Some(rows.into());
                }
            }
            Fused::GatedMlp {
                x,
                gate_up_weight,
                gate_up_bias,
                activation,
                gate_up,
                weight,
                bias,
                out,
                ref residual,
            } => {
                let (parts, hidden) = cuda.linear_gated(
                    A::of(there(slots, x)),
                    matrix(gate_up_weight),
                    vector(gate_up_bias),
                    activation.into(),
                    wanted[gate_up.0],
                )?;
                slots[gate_up.0] = parts.map(A::tensor);
                let product = residual.as_ref().map_or(out, |residual| residual.sum);
                match residual {
                    // Gate and up alone are computed again on the way back.
                    _ if !wanted[product.0] => {}
                    Some(residual) => {
                        let (weight, bias) = (matrix(weight), vector(bias));
                        self.add_product(&hidden, weight, bias, residual, out, slots, on_tap)?;
                    }
                    None => {
                        let product = cuda.linear_forward::<A, f32>(&hidden, matrix(weight), vector(bias))?;
                        slots[out.0] = Some(product.into());
                    }
                }
            }
        }
        Ok(())
    }

    /// A product and the residual addition in its epilogue.
    fn add_product<A: Operand>(
        &self,
        x: &Buf<A>,
        weight: &Buf<A>,
        bias: Option<&Buf<f32>>,
        residual: &Residual,
        out: Slot,
        slots: &mut [Option<Tensor>],
        on_tap: OnTap<'_, Tensor>,
    ) -> Result<()> {
        let before = wide(there(slots, residual.x));
        let (product, sum) = self.cuda.linear_add(x, weight, bias, before, !residual.taps.is_empty())?;
        slots[out.0] = product.map(Into::into);
        slots[residual.sum.0] = Some(sum.into());
        for &site in &residual.taps {
            on_tap(site, there(slots, out))?;
        }
        slots[out.0] = None;
        Ok(())
    }

    fn backward_in<A: Operand>(
        &self,
        op: &Fused,
        scope: &Scope<'_, Self>,
        slots: &[Option<Tensor>],
        grads: &mut [Option<Tensor>],
        routes: Option<&Routing>,
        on_tap: OnTap<'_, Tensor>,
    ) -> Result<()> {
        let cuda = &self.cuda;
        let matrix = |weight| A::of(scope.weights.get(weight));
        // Lowering has seen to it that nothing else reads x: its gradient is written, not added to.
        match *op {
            Fused::LinearRope { x, weight, heads, table, pairs, out, .. } => {
                let mut dqkv = A::owned(taken(grads, out));
                let (table, positions) = (&scope.ropes[table], &scope.chunk.positions);
                cuda.rope_in_place(&mut dqkv, heads, pairs, table, positions, Rotation::Backward)?;
                grads[x.0] = Some(A::tensor(cuda.linear_backward_as(&dqkv, matrix(weight), None)?));
            }
            Fused::Attend { qkv, ref attention, out, lse } => {
                // float32 where a norm stands between the projection and the residual stream.
                let dout = A::owned(taken(grads, out).to(A::FORMAT, cuda)?);
                let saved = [qkv, out].map(|slot| A::of(there(slots, slot)));
                let lse = wide(there(slots, lse));
                let (spec, work) = (attention.spec(), &scope.chunk.work);
                let dqkv = cuda.attention_backward(saved[0], saved[1], lse, &dout, &spec, work)?;
                grads[qkv.0] = Some(A::tensor(dqkv));
            }
            Fused::LinearAdd { x, weight, out, ref residual, .. } => {
                let dy = self.residual_gradient::<A>(Some(residual), out, grads, on_tap)?;
                grads[x.0] = Some(A::tensor(cuda.linear_backward_as(&dy, matrix(weight), None)?));
            }
            Fused::GatedExperts { x, gate_up_weight, activation, gate_up, weight, out } => {
                let dy = A::owned(taken(grads, out).to(A::FORMAT, cuda)?);
                let (parts, routes) = (A::of(there(slots, gate_up)), chosen(routes));
                let dparts =
                    cuda.experts_gated_backward(&dy, matrix(weight), routes, parts, activation.into())?;
                let dx = cuda.experts_backward::<A, A>(&dparts, matrix(gate_up_weight), routes)?;
                grads[x.0] = Some(A::tensor(dx));
            }
            Fused::GatedMlp { x, gate_up_weight, activation, gate_up, weight, out, ref residual, .. } => {
                let dy = self.residual_gradient::<A>(residual.as_ref(), out, grads, on_tap)?;
                let parts = A::of(there(slots, gate_up));
                let dparts = cuda.linear_gated_backward(&dy, matrix(weight), parts, activation.into())?;
                grads[x.0] =
                    Some(A::tensor(cuda.linear_backward_as(&dparts, matrix(gate_up_weight), None)?));
            }
        }
        Ok(())
    }

    /// The gradient of a product, as products read it; that of the residual stream goes on to its other operand.
    fn residual_gradient<A: Operand>(
        &self,
        residual: Option<&Residual>,
        out: Slot,
        grads: &mut [Option<Tensor>],
        on_tap: OnTap<'_, Tensor>,
    ) -> Result<Buf<A>> {
        let Some(Residual { x, sum, taps }) = residual else {
            return Ok(A::owned(taken(grads, out).to(A::FORMAT, &self.cuda)?));
        };
        let dsum = taken(grads, *sum);
        for site in taps.iter().rev() {
            // The derivative of a sum: the product's gradient is the sum's.
            on_tap(*site, &dsum)?;
        }
        let dy = A::owned(dsum.to(A::FORMAT, &self.cuda)?);
        grads[x.0] = Some(match grads[x.0].take() {
            None => dsum,
            Some(so_far) => {
                let mut so_far = so_far.wide(&self.cuda)?;
                self.cuda.add_in_place(&mut so_far, wide(&dsum))?;
                so_far.into()
            }
        });
        Ok(dy)
    }
}

/// An element of what products read.
pub(super) trait Operand: Real {
    /// The buffer, which is of this type by the rules of lowering.
    fn of(tensor: &Tensor) -> &Buf<Self>;
    /// The same.
    fn owned(tensor: Tensor) -> Buf<Self>;
    /// The other way.
    fn tensor(buf: Buf<Self>) -> Tensor;
}

impl Operand for f32 {
    fn of(tensor: &Tensor) -> &Buf<Self> {
        wide(tensor)
    }

    fn owned(tensor: Tensor) -> Buf<Self> {
        match tensor {
            Tensor::F32(buf) => buf,
            Tensor::Bf16(_) => panic!("a bfloat16 tensor where the op list has float32"),
        }
    }

    fn tensor(buf: Buf<Self>) -> Tensor {
        Tensor::F32(buf)
    }
}

impl Operand for half::bf16 {
    fn of(tensor: &Tensor) -> &Buf<Self> {
        match tensor {
            Tensor::Bf16(buf) => buf,
            Tensor::F32(_) => panic!("a float32 tensor where the op list has bfloat16"),
        }
    }

    fn owned(tensor: Tensor) -> Buf<Self> {
        match tensor {
            Tensor::Bf16(buf) => buf,
            Tensor::F32(_) => panic!("a float32 tensor where the op list has bfloat16"),
        }
    }

    fn tensor(buf: Buf<Self>) -> Tensor {
        Tensor::Bf16(buf)
    }
}

/// A float32 buffer, which this is by the rules of lowering.
pub(super) fn wide(tensor: &Tensor) -> &Buf<f32> {
    match tensor {
        Tensor::F32(buf) => buf,
        Tensor::Bf16(_) => panic!("a bfloat16 tensor where the op list has float32"),
    }
}
