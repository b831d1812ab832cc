//! The CUDA device as a [`Backend`]: each op of the list by itself, and the way to the fused ones.
//!
//! Formats in bfloat16: what products read (the outputs of norms, attention and gating, and weights) is bfloat16, the
//! residual stream, what is added to it and all gradients of it are float32. A tensor in the other format is converted.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use cudarc::driver::{CudaEvent, sys};

use super::chunk::PlacedChunk;
use super::cross_entropy::DeviceNats;
use super::device::driver_failed;
use super::fused::wide;
use super::lower::{CudaLower, Fused};
use super::module::lock;
use super::moe::Routing;
use super::norm::NormSpec;
use super::rope::{Pairs, RopeTable, Rotation};
use super::staging::Staging;
use super::stats::{DeviceMoments, FiniteCheck};
use super::tensor::typed;
use super::weights::Room;
use super::{Buf, Cuda, CudaSpec, Format, Tensor};
use crate::backend::{Backend, Chunk, Moments, NonFinite, OnTap, Scope};
use crate::error::Result;
use crate::model::op::{Attention, RmsNorm};
use crate::model::{self, Activation, Packing};

/// A device that runs models.
pub struct CudaBackend {
    pub(super) cuda: Cuda,
    pub(super) lower: CudaLower,
    pub(super) staging: Staging,
    /// The longest table so far of each list of frequencies: passes ask for much the same.
    ropes: Mutex<Vec<(Vec<f32>, Arc<RopeTable>)>>,
}

impl CudaBackend {
    /// Opens a device.
    ///
    /// # Errors
    /// As [`Cuda::open`], or the host has no memory to pin.
    pub fn open(spec: CudaSpec, lower: CudaLower) -> Result<Self> {
        Self::new(Cuda::open(spec)?, lower)
    }

    /// The same; `planned` is what its memory is for, which is said when it runs out all the same.
    pub fn planned_for(mut self, planned: String) -> Self {
        self.cuda.device.memory.planned = Some(planned);
        self
    }

    /// On an open device.
    ///
    /// # Errors
    /// The host has no memory to pin.
    pub fn new(cuda: Cuda, lower: CudaLower) -> Result<Self> {
        let staging = Staging::new(&cuda.device.transfer)?;
        Ok(Self { cuda, lower, staging, ropes: Mutex::default() })
    }

    /// The device.
    pub fn cuda(&self) -> &Cuda {
        &self.cuda
    }

    /// x as products read it.
    pub(super) fn operand(&self, x: &Tensor) -> Result<Tensor> {
        x.to(self.lower.format, &self.cuda)
    }

    /// q, k and v in one buffer, as attention reads them.
    fn pack(&self, qkv: [&Tensor; 3]) -> Result<Tensor> {
        let width = qkv.iter().map(|part| part.width()).sum();
        let memory = &self.cuda.device.memory;
        let mut packed: Tensor = match self.lower.format {
            Format::F32 => Buf::<f32>::new(memory, qkv[0].rows(), width)?.into(),
            Format::Bf16 => Buf::<half::bf16>::new(memory, qkv[0].rows(), width)?.into(),
        };
        let mut column = 0;
        for part in qkv {
            let (cuda, width) = (&self.cuda, part.width());
            typed!(part, from => typed!(&mut packed, to => cuda.copy_columns(from, 0..width, to, column)))?;
            column += width;
        }
        Ok(packed)
    }

    /// `dx`, if there is something so far, and `more`, which is float32.
    pub(super) fn sum(&self, dx: Option<Tensor>, more: Buf<f32>) -> Result<Tensor> {
        let Some(dx) = dx else { return Ok(more.into()) };
        let mut dx = dx.wide(&self.cuda)?;
        self.cuda.add_in_place(&mut dx, &more)?;
        Ok(dx.into())
    }

    fn norm_spec(norm: RmsNorm) -> NormSpec {
        NormSpec { eps: norm.eps as f32, weight_offset: norm.offset as f32 }
    }

    fn attend_packed(
        &self,
        qkv: &Tensor,
        attention: &Attention,
        chunk: &PlacedChunk,
    ) -> Result<(Tensor, Buf<f32>)> {
        typed!(qkv, qkv => {
            let (out, lse) = self.cuda.attention_forward(qkv, &attention.spec(), &chunk.work)?;
            Ok((out.into(), lse))
        })
    }
}

impl Backend for CudaBackend {
    type Buf = Tensor;
    type Weight = Tensor;
    type Room = Room;
    type Rope = Arc<RopeTable>;
    type Chunk = PlacedChunk;
    type Moments = DeviceMoments;
    type Finite = FiniteCheck;
    type Routes = Routing;
    type Nats = DeviceNats;
    type Mark = CudaEvent;

    fn mark(&self) -> Result<CudaEvent> {
        let timed = Some(sys::CUevent_flags::CU_EVENT_DEFAULT);
        let event = self.cuda.device.compute.record_event(timed);
        event.map_err(|error| driver_failed("could not mark a moment", error))
    }

    fn wait(&self, mark: &CudaEvent) -> Result<()> {
        mark.synchronize().map_err(|error| driver_failed("reports a failure", error))
    }

    fn seconds_between(&self, from: &CudaEvent, to: &CudaEvent) -> Result<f64> {
        let elapsed = from.elapsed_ms(to);
        Ok(f64::from(elapsed.map_err(|error| driver_failed("could not tell a time", error))?) / 1e3)
    }

    fn room(&self, tensors: &[&model::Tensor]) -> Result<Room> {
        self.make_room(tensors)
    }

    fn load(&self, room: Room, tensors: &[&model::Tensor], packing: Packing) -> Result<Tensor> {
        self.fill(room, tensors, packing)
    }

    fn place(&self, chunk: Chunk) -> Result<PlacedChunk> {
        PlacedChunk::new(&self.cuda, chunk)
    }

    fn rope_table(&self, inv_freq: &[f32], positions: usize) -> Result<Arc<RopeTable>> {
        let mut kept = lock(&self.ropes);
        let own = |(known, _): &(Vec<f32>, Arc<RopeTable>)| known == inv_freq;
        if let Some((_, table)) = kept.iter().find(|kept| own(kept) && kept.1.positions() >= positions) {
            return Ok(Arc::clone(table));
        }
        // Before the longer one is made: there is room for one.
        kept.retain(|kept| !own(kept));
        let table = Arc::new(self.cuda.rope_table(inv_freq, positions)?);
        kept.push((inv_freq.to_vec(), Arc::clone(&table)));
        Ok(table)
    }

    fn embed(&self, table: &Tensor, scale: f64, chunk: &PlacedChunk) -> Result<Tensor> {
        Ok(typed!(table, table => self.cuda.embed(table, &chunk.ids, scale as f32)?).into())
    }

    fn norm(&self, x: &Tensor, weight: &Tensor, norm: RmsNorm) -> Result<Tensor> {
        let (x, spec) = (x.wide(&self.cuda)?, Self::norm_spec(norm));
        Ok(match self.lower.format {
            Format::F32 => self.cuda.norm::<f32>(&x, wide(weight), spec)?.into(),
            Format::Bf16 => self.cuda.norm::<half::bf16>(&x, wide(weight), spec)?.into(),
        })
    }

    fn norm_backward(
        &self,
        x: &Tensor,
        weight: &Tensor,
        norm: RmsNorm,
        dy: &Tensor,
        dx: Option<Tensor>,
    ) -> Result<Tensor> {
        let x = x.wide(&self.cuda)?;
        let dx = dx.map(|dx| dx.wide(&self.cuda)).transpose()?;
        let (weight, spec) = (wide(weight), Self::norm_spec(norm));
        Ok(typed!(dy, dy => self.cuda.norm_backward(&x, weight, spec, dy, dx)?).into())
    }

    fn linear(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let bias = bias.map(wide);
        Ok(match (self.operand(x)?, weight) {
            (Tensor::Bf16(x), Tensor::Bf16(weight)) => {
                self.cuda.linear_forward::<_, f32>(&x, weight, bias)?
            }
            (x, weight) => self.cuda.linear_forward::<_, f32>(wide(&x), wide(weight), bias)?,
        }
        .into())
    }

    fn linear_backward(&self, weight: &Tensor, dy: &Tensor, dx: Option<Tensor>) -> Result<Tensor> {
        let dx = dx.map(|dx| dx.wide(&self.cuda)).transpose()?;
        Ok(match (self.operand(dy)?, weight) {
            (Tensor::Bf16(dy), Tensor::Bf16(weight)) => self.cuda.linear_backward(&dy, weight, dx)?,
            (dy, weight) => self.cuda.linear_backward(wide(&dy), wide(weight), dx)?,
        }
        .into())
    }

    fn rope(&self, x: &Tensor, heads: usize, table: &Arc<RopeTable>, chunk: &PlacedChunk) -> Result<Tensor> {
        let mut y = x.wide_copy(&self.cuda)?;
        self.cuda.rope_in_place(&mut y, heads, Pairs::Halves, table, &chunk.positions, Rotation::Forward)?;
        Ok(y.into())
    }

    fn rope_backward(
        &self,
        dy: &Tensor,
        heads: usize,
        table: &Arc<RopeTable>,
        chunk: &PlacedChunk,
        dx: Option<Tensor>,
    ) -> Result<Tensor> {
        let (cuda, positions) = (&self.cuda, &chunk.positions);
        let mut more = dy.wide_copy(cuda)?;
        cuda.rope_in_place(&mut more, heads, Pairs::Halves, table, positions, Rotation::Backward)?;
        self.sum(dx, more)
    }

    fn attend(&self, qkv: [&Tensor; 3], attention: &Attention, chunk: &PlacedChunk) -> Result<Tensor> {
        Ok(self.attend_packed(&self.pack(qkv)?, attention, chunk)?.0)
    }

    fn attend_backward(
        &self,
        qkv: [&Tensor; 3],
        attention: &Attention,
        chunk: &PlacedChunk,
        dout: &Tensor,
        dqkv: [Option<Tensor>; 3],
    ) -> Result<[Tensor; 3]> {
        let widths = qkv.map(Tensor::width);
        let packed = self.pack(qkv)?;
        // By itself the op keeps neither its output nor the denominators: once more.
        let (out, lse) = self.attend_packed(&packed, attention, chunk)?;
        let (spec, work, dout) = (attention.spec(), &chunk.work, self.operand(dout)?);
        let packed: Tensor = match (&packed, &out, &dout) {
            (Tensor::Bf16(qkv), Tensor::Bf16(out), Tensor::Bf16(dout)) => {
                self.cuda.attention_backward(qkv, out, &lse, dout, &spec, work)?.into()
            }
            (qkv, out, dout) => {
                self.cuda.attention_backward(wide(qkv), wide(out), &lse, wide(dout), &spec, work)?.into()
            }
        };
        let mut column = 0;
        let mut part = |dx: Option<Tensor>, width: usize| -> Result<Tensor> {
            let (cuda, place) = (&self.cuda, column..column + width);
            column = place.end;
            let dx = match dx {
                Some(dx) => {
                    let mut dx = dx.wide(cuda)?;
                    typed!(&packed, packed => cuda.add_columns(packed, place, &mut dx, 0))?;
                    dx
                }
                None => {
                    let mut dx = Buf::<f32>::new(&cuda.device.memory, packed.rows(), width)?;
                    typed!(&packed, packed => cuda.copy_columns(packed, place, &mut dx, 0))?;
                    dx
                }
            };
            Ok(dx.into())
        };
        let [dq, dk, dv] = dqkv;
        Ok([part(dq, widths[0])?, part(dk, widths[1])?, part(dv, widths[2])?])
    }

    fn gate(&self, gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
        let (gate, up) = (gate.wide(&self.cuda)?, up.wide(&self.cuda)?);
        Ok(match self.lower.format {
            Format::F32 => self.cuda.gate::<f32>(&gate, &up, activation.into())?.into(),
            Format::Bf16 => self.cuda.gate::<half::bf16>(&gate, &up, activation.into())?.into(),
        })
    }

    fn gate_backward(
        &self,
        gate: &Tensor,
        up: &Tensor,
        activation: Activation,
        dout: &Tensor,
        dgate_dup: [Option<Tensor>; 2],
    ) -> Result<[Tensor; 2]> {
        let (gate, up) = (gate.wide(&self.cuda)?, up.wide(&self.cuda)?);
        let dout = dout.wide(&self.cuda)?;
        let [dgate, dup] = dgate_dup.map(|so_far| so_far.map(|so_far| so_far.wide(&self.cuda)).transpose());
        let [dgate, dup] = self.cuda.gate_backward(&gate, &up, activation.into(), &dout, [dgate?, dup?])?;
        Ok([dgate.into(), dup.into()])
    }

    fn route(&self, logits: &Tensor, top_k: usize) -> Result<(Tensor, Routing)> {
        let (scores, routes) = self.cuda.route(&logits.wide(&self.cuda)?, top_k)?;
        Ok((scores.into(), routes))
    }

    fn route_backward(
        &self,
        scores: &Tensor,
        routes: &Routing,
        dscores: &Tensor,
        _: usize,
        dlogits: Option<Tensor>,
    ) -> Result<Tensor> {
        let dlogits = dlogits.map(|dlogits| dlogits.wide(&self.cuda)).transpose()?;
        Ok(self.cuda.route_backward(wide(scores), routes, wide(dscores), dlogits)?.into())
    }

    fn dispatch(&self, x: &Tensor, routes: &Routing) -> Result<Tensor> {
        Ok(match self.operand(x)? {
            Tensor::F32(x) => self.cuda.dispatch(&x, routes)?.into(),
            Tensor::Bf16(x) => self.cuda.dispatch(&x, routes)?.into(),
        })
    }

    fn dispatch_backward(&self, dy: &Tensor, routes: &Routing, dx: Option<Tensor>) -> Result<Tensor> {
        let dx = dx.map(|dx| dx.wide(&self.cuda)).transpose()?;
        Ok(typed!(dy, dy => self.cuda.dispatch_backward(dy, routes, dx)?).into())
    }

    fn expert_linear(&self, x: &Tensor, weights: &[&Tensor], routes: &Routing) -> Result<Tensor> {
        self.experts_by_themselves(x, weights, routes)
    }

    fn expert_linear_backward(
        &self,
        weights: &[&Tensor],
        routes: &Routing,
        dy: &Tensor,
        dx: Option<Tensor>,
    ) -> Result<Tensor> {
        self.experts_by_themselves_adjoint(weights, routes, dy, dx)
    }

    fn combine(&self, x: &Tensor, scores: &Tensor, routes: &Routing) -> Result<Tensor> {
        Ok(typed!(x, x => self.cuda.combine(x, wide(scores), routes)?).into())
    }

    fn combine_backward(
        &self,
        x: &Tensor,
        scores: &Tensor,
        routes: &Routing,
        dout: &Tensor,
        dx_dscores: [Option<Tensor>; 2],
    ) -> Result<[Tensor; 2]> {
        self.combine_adjoint(x, scores, routes, dout, dx_dscores)
    }

    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        Ok(self.cuda.add(&a.wide(&self.cuda)?, &b.wide(&self.cuda)?)?.into())
    }

    fn add_backward(&self, dy: &Tensor, dx: Option<Tensor>) -> Result<Tensor> {
        match dx {
            // Gradients are added to in place: each has memory of its own.
            None => Ok(dy.wide_copy(&self.cuda)?.into()),
            some => self.sum(some, dy.wide(&self.cuda)?),
        }
    }

    fn loss(
        &self,
        x: &Tensor,
        weight: &Tensor,
        softcap: Option<f64>,
        chunk: &PlacedChunk,
        want_gradient: bool,
    ) -> Result<(DeviceNats, Option<Tensor>)> {
        let softcap = softcap.map(|cap| cap as f32);
        let samples = chunk.as_ref().samples().collect();
        let (nats, dx) = match (self.operand(x)?, weight) {
            (Tensor::Bf16(x), Tensor::Bf16(weight)) => {
                self.cross_entropy(&x, weight, chunk, softcap, want_gradient)?
            }
            (x, weight) => self.cross_entropy(wide(&x), wide(weight), chunk, softcap, want_gradient)?,
        };
        Ok((DeviceNats { nats, samples }, dx.map(Into::into)))
    }

    fn nats(&self, nats: DeviceNats) -> Result<Vec<f64>> {
        let rows = nats.nats.to_host()?;
        let sum = |samples: Range<usize>| rows[samples].iter().map(|nats| f64::from(*nats)).sum();
        Ok(nats.samples.into_iter().map(sum).collect())
    }

    fn fused(
        &self,
        op: &Fused,
        scope: &Scope<'_, Self>,
        wanted: &[bool],
        slots: &mut [Option<Tensor>],
        routes: Option<&Routing>,
        on_tap: OnTap<'_, Tensor>,
    ) -> Result<()> {
        self.fused_forward(op, scope, wanted, slots, routes, on_tap)
    }

    fn fused_backward(
        &self,
        op: &Fused,
        scope: &Scope<'_, Self>,
        slots: &[Option<Tensor>],
        grads: &mut [Option<Tensor>],
        routes: Option<&Routing>,
        on_tap: OnTap<'_, Tensor>,
    ) -> Result<()> {
        self.fused_adjoint(op, scope, slots, grads, routes, on_tap)
    }

    fn new_moments(&self, width: usize) -> Result<DeviceMoments> {
        self.cuda.new_moments(width)
    }

    fn moments(&self, x: &Tensor, samples: &[Range<usize>], into: &mut DeviceMoments) -> Result<FiniteCheck> {
        typed!(x, x => self.cuda.add_moments(x, samples, into))
    }

    fn is_finite(&self, finite: FiniteCheck) -> Result<Result<(), NonFinite>> {
        finite.wait()
    }

    fn read_moments(&self, moments: &DeviceMoments) -> Result<Moments> {
        moments.to_host()
    }

    fn row_norms(&self, x: &Tensor) -> Result<Vec<f64>> {
        typed!(x, x => self.cuda.row_norms(x))
    }
}
