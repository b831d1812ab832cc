//! Linear layers whose results are used where they are computed: the residual stream, rotary embeddings, the
//! gated MLP, the loss.

use super::tile::{Direction, Operation, Shape, Tile};
use super::{Product, assert_size};
use crate::backend::cuda::launch::int;
use crate::backend::cuda::loss::{STRIP, softcap_number};
use crate::backend::cuda::rope::RopeTable;
use crate::backend::cuda::{Activation, Buf, Cuda, Real};
use crate::error::Result;

/// 2^(z·log2 e − k) of logits z `[N, V]`, with an integer k for each row and strip of 64 columns, that of the
/// strip's largest: everything softmax needs, in few bits. z may be soft-capped: c·tanh(x/c) of what the product gave.
pub struct Exponentials<A> {
    /// The powers, where z is soft-capped times dz/dx = 1 − (z/c)². `[N, V]`
    pub powers: Buf<A>,
    /// k. `[N, ceil(V / 64)]`
    pub exponents: Buf<f32>,
    /// Sums of the powers over the strips, without dz/dx and before they were rounded. `[N, ceil(V / 64)]`
    pub sums: Buf<f32>,
    /// z at each row's target; unspecified where there is none. `[1, N]`
    pub target_logits: Buf<f32>,
}

impl Cuda {
    /// y = x · weightᵀ + bias, where `output` asks for it, and addend + y.
    /// x `[N, in]` · weight `[out, in]` · bias `[1, out]` · addend `[N, out]` → y, sum `[N, out]`
    ///
    /// # Errors
    ///
    /// As [`Cuda::linear_forward`].
    ///
    /// # Panics
    ///
    /// As there.
    pub fn linear_add<A: Real>(
        &self,
        x: &Buf<A>,
        weight: &Buf<A>,
        bias: Option<&Buf<f32>>,
        addend: &Buf<f32>,
        output: bool,
    ) -> Result<(Option<Buf<f32>>, Buf<f32>)> {
        self.linear_add_with(self.tile(Direction::Forward, x, weight), x, weight, bias, addend, output)
    }

    /// [`Cuda::linear_add`] by a kernel of the caller's choice.
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// # Panics
    ///
    /// As there, or the kernel cannot read such rows ([`Tile::reads`]).
    pub fn linear_add_with<A: Real>(
        &self,
        tile: Tile,
        x: &Buf<A>,
        weight: &Buf<A>,
        bias: Option<&Buf<f32>>,
        addend: &Buf<f32>,
        output: bool,
    ) -> Result<(Option<Buf<f32>>, Buf<f32>)> {
        let product = Product { operation: Operation::Add, tile, left: x, weight, output: A::FORMAT };
        let Shape { rows, out_features, .. } = product.shape();
        bias.inspect(|bias| assert_size(bias, 1, out_features, "bias"));
        assert_size(addend, rows, out_features, "addend");
        let new = || Buf::new(&self.device.memory, rows, out_features);
        let (y, sum) = (output.then(new).transpose()?, new()?);
        self.product(&product, |launch| {
            launch
                .arg("const float* bias", bias)
                .arg("const float* addend", addend)
                .arg("float* y", y.as_ref())
                .arg("float* sum", &sum)
        })?;
        Ok((y, sum))
    }

    /// x · weightᵀ + bias, its first `heads` heads turned by the angles of their rows' positions before the only
    /// rounding: columns 2j and 2j + 1 of a head by that of pair j.
    /// x `[N, in]` · weight `[out, in]`, heads·Hd ≤ out · bias `[1, out]` · positions `[1, N]`, each at least 0 and below
    /// the table's → `[N, out]`
    ///
    /// # Errors
    ///
    /// As [`Cuda::linear_forward`].
    ///
    /// # Panics
    ///
    /// As there, or Hd is no multiple of 4, the heads do not fit, or positions are not one for each row.
    pub fn linear_rotated<A: Real>(
        &self,
        x: &Buf<A>,
        weight: &Buf<A>,
        bias: Option<&Buf<f32>>,
        heads: usize,
        table: &RopeTable,
        positions: &Buf<i32>,
    ) -> Result<Buf<A>> {
        let tile = self.tile(Direction::Forward, x, weight);
        self.linear_rotated_with(tile, x, weight, bias, heads, table, positions)
    }

    /// [`Cuda::linear_rotated`] by a kernel of the caller's choice.
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// # Panics
    ///
    /// As there, or the kernel cannot read such rows ([`Tile::reads`]).
    pub fn linear_rotated_with<A: Real>(
        &self,
        tile: Tile,
        x: &Buf<A>,
        weight: &Buf<A>,
        bias: Option<&Buf<f32>>,
        heads: usize,
        table: &RopeTable,
        positions: &Buf<i32>,
    ) -> Result<Buf<A>> {
        let product = Product { operation: Operation::Rotated, tile, left: x, weight, output: A::FORMAT };
        let Shape { rows, out_features, .. } = product.shape();
        bias.inspect(|bias| assert_size(bias, 1, out_features, "bias"));
        assert_size(positions, 1, rows, "positions");
        let (pairs, rotated) = (table.pairs(), 2 * heads * table.pairs());
        assert!(pairs.is_multiple_of(2), "heads of {}: four neighbours must be of one", 2 * pairs);
        assert!(rotated <= out_features, "{heads} heads of {} in rows of {out_features}", 2 * pairs);
        let out = Buf::<A>::new(&self.device.memory, rows, out_features)?;
        self.product(&product, |launch| {
            launch
                .arg("const float* bias", bias)
                .arg("const int* positions", positions)
                .arg("const float* cos", &table.cos)
                .arg("const float* sin", &table.sin)
                .arg("int pairs", int(pairs))
                .arg("int rotated", int(rotated))
                .arg(A::FORMAT.pick("float* out", "bf16* out"), &out)
        })?;
        Ok(out)
    }

    /// act(g)·u, where g and u are every other column of x · weightᵀ + bias, from g on; with `keep` they are
    /// returned as well, as they lie. The product is of float32 sums and rounded once.
    /// x `[N, D]` · weight `[2·I, D]`, rows g0 u0 g1 u1 … · bias `[1, 2·I]` → gate_up `[N, 2·I]`, out `[N, I]`
    ///
    /// # Errors
    ///
    /// As [`Cuda::linear_forward`].
    ///
    /// # Panics
    ///
    /// As there, or the weight has an odd number of rows.
    pub fn linear_gated<A: Real>(
        &self,
        x: &Buf<A>,
        weight: &Buf<A>,
        bias: Option<&Buf<f32>>,
        activation: Activation,
        keep: bool,
    ) -> Result<(Option<Buf<A>>, Buf<A>)> {
        self.linear_gated_with(self.tile(Direction::Forward, x, weight), x, weight, bias, activation, keep)
    }

    /// [`Cuda::linear_gated`] by a kernel of the caller's choice.
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// # Panics
    ///
    /// As there, or the kernel cannot read such rows ([`Tile::reads`]).
    pub fn linear_gated_with<A: Real>(
        &self,
        tile: Tile,
        x: &Buf<A>,
        weight: &Buf<A>,
        bias: Option<&Buf<f32>>,
        activation: Activation,
        keep: bool,
    ) -> Result<(Option<Buf<A>>, Buf<A>)> {
        let product = Product { operation: Operation::Gated, tile, left: x, weight, output: A::FORMAT };
        let Shape { rows, out_features, .. } = product.shape();
        assert!(out_features.is_multiple_of(2), "{out_features} gates and values");
        bias.inspect(|bias| assert_size(bias, 1, out_features, "bias"));
        let new = |width| Buf::<A>::new(&self.device.memory, rows, width);
        let gate_up = keep.then(|| new(out_features)).transpose()?;
        let out = new(out_features / 2)?;
        self.product(&product, |launch| {
            launch
                .arg("const float* bias", bias)
                .arg("int activation", activation as i32)
                .arg(A::FORMAT.pick("float* gate_up", "bf16* gate_up"), gate_up.as_ref())
                .arg(A::FORMAT.pick("float* out", "bf16* out"), &out)
        })?;
        Ok((gate_up, out))
    }

    /// The gradient of gate_up, through the layer behind the gate: with dh = dy · weight, dg = dh·u·act'(g) and
    /// du = dh·act(g), as gate_up lies.
    /// dy `[N, D]` · weight `[D, I]` · gate_up `[N, 2·I]` → `[N, 2·I]`
    ///
    /// # Errors
    ///
    /// As [`Cuda::linear_forward`].
    ///
    /// # Panics
    ///
    /// As there.
    pub fn linear_gated_backward<A: Real>(
        &self,
        dy: &Buf<A>,
        weight: &Buf<A>,
        gate_up: &Buf<A>,
        activation: Activation,
    ) -> Result<Buf<A>> {
        let tile = self.tile(Direction::Backward, dy, weight);
        self.linear_gated_backward_with(tile, dy, weight, gate_up, activation)
    }

    /// [`Cuda::linear_gated_backward`] by a kernel of the caller's choice.
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// # Panics
    ///
    /// As there, or the kernel cannot read such rows ([`Tile::reads`]).
    pub fn linear_gated_backward_with<A: Real>(
        &self,
        tile: Tile,
        dy: &Buf<A>,
        weight: &Buf<A>,
        gate_up: &Buf<A>,
        activation: Activation,
    ) -> Result<Buf<A>> {
        let product =
            Product { operation: Operation::GatedBackward, tile, left: dy, weight, output: A::FORMAT };
        let Shape { rows, in_features, .. } = product.shape();
        assert_size(gate_up, rows, 2 * in_features, "gates and values");
        let dgate_up = Buf::<A>::new(&self.device.memory, rows, 2 * in_features)?;
        self.product(&product, |launch| {
            launch
                .arg(A::FORMAT.pick("const float* gate_up", "const bf16* gate_up"), gate_up)
                .arg("int activation", activation as i32)
                .arg(A::FORMAT.pick("float* dgate_up", "bf16* dgate_up"), &dgate_up)
        })?;
        Ok(dgate_up)
    }

    /// What softmax needs of the logits z = x · weightᵀ, or softcap·tanh of them over softcap; they are not written.
    /// x `[N, D]` · weight `[V, D]` · targets `[1, N]`, −1 for none
    ///
    /// # Errors
    ///
    /// As [`Cuda::linear_forward`].
    ///
    /// # Panics
    ///
    /// As there, or the soft-cap is not a positive number.
    pub fn linear_exponentials<A: Real>(
        &self,
        x: &Buf<A>,
        weight: &Buf<A>,
        targets: &Buf<i32>,
        softcap: Option<f32>,
    ) -> Result<Exponentials<A>> {
        self.linear_exponentials_with(self.tile(Direction::Forward, x, weight), x, weight, targets, softcap)
    }

    /// [`Cuda::linear_exponentials`] by a kernel of the caller's choice.
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// # Panics
    ///
    /// As there, or the kernel cannot read such rows ([`Tile::reads`]).
    pub fn linear_exponentials_with<A: Real>(
        &self,
        tile: Tile,
        x: &Buf<A>,
        weight: &Buf<A>,
        targets: &Buf<i32>,
        softcap: Option<f32>,
    ) -> Result<Exponentials<A>> {
        let softcap = softcap_number(softcap);
        let product =
            Product { operation: Operation::Exponentials, tile, left: x, weight, output: A::FORMAT };
        let Shape { rows, out_features, .. } = product.shape();
        assert_eq!(targets.rows() * targets.width(), rows, "a target for each row");
        let (memory, strips) = (&self.device.memory, out_features.div_ceil(STRIP));
        let found = Exponentials {
            powers: Buf::<A>::new(memory, rows, out_features)?,
            exponents: Buf::new(memory, rows, strips)?,
            sums: Buf::new(memory, rows, strips)?,
            target_logits: Buf::new(memory, 1, rows)?,
        };
        self.product(&product, |launch| {
            launch
                .arg("const int* targets", targets)
                .arg(A::FORMAT.pick("float* e", "bf16* e"), &found.powers)
                .arg("float* exponents", &found.exponents)
                .arg("float* sums", &found.sums)
                .arg("float* target_logits", &found.target_logits)
                .arg("float softcap", softcap)
        })?;
        Ok(found)
    }
}
