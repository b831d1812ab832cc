//! Linear layers of experts: rows sorted by expert, each expert's by its own weight. An output's bits are those of the
//! product with that weight alone, by the same kernel. Rows that are nobody's are multiplied like others, or not
//! written: what they hold reaches no other row.

use super::Product;
use super::tile::{Direction, Operation, Shape, Tile};
use crate::backend::cuda::moe::Routing;
use crate::backend::cuda::{Activation, Buf, Cuda, Element, Real};
use crate::error::Result;

impl Shape {
    /// Of the product of one expert's weight of `[E·out, in]`, for all rows.
    ///
    /// # Panics
    ///
    /// The weight is not E of one size.
    pub(super) fn of_expert<A: Element>(rows: usize, weight: &Buf<A>, routing: &Routing) -> Self {
        let count = routing.expert_count();
        assert!(weight.rows().is_multiple_of(count), "{} rows of {count} experts' weights", weight.rows());
        Self { rows, in_features: weight.width(), out_features: weight.rows() / count }
    }
}

impl Cuda {
    /// The kernel for a layer of experts.
    fn expert_tile<A: Real>(
        &self,
        direction: Direction,
        left: &Buf<A>,
        weight: &Buf<A>,
        routing: &Routing,
    ) -> Tile {
        let shape = Shape::of_expert(left.rows(), weight, routing);
        Tile::choose_for_experts(&self.device.info, A::FORMAT, direction, shape)
    }

    /// y = x · its expert's weightᵀ of each row. x `[R, in]` · weight `[E·out, in]` → y `[R, out]`
    ///
    /// # Errors
    ///
    /// As [`Cuda::linear_forward`].
    ///
    /// # Panics
    ///
    /// As there, or x has not the routing's rows.
    pub fn experts_forward<A: Real, Y: Real>(
        &self,
        x: &Buf<A>,
        weight: &Buf<A>,
        routing: &Routing,
    ) -> Result<Buf<Y>> {
        let tile = self.expert_tile(Direction::Forward, x, weight, routing);
        self.experts_forward_with(tile, x, weight, routing)
    }

    /// [`Cuda::experts_forward`] by a kernel of the caller's choice.
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// # Panics
    ///
    /// As there, or the kernel cannot read such rows ([`Tile::reads_experts`]).
    pub fn experts_forward_with<A: Real, Y: Real>(
        &self,
        tile: Tile,
        x: &Buf<A>,
        weight: &Buf<A>,
        routing: &Routing,
    ) -> Result<Buf<Y>> {
        let (operation, routing) = (Operation::Forward, Some(routing));
        let product = Product { operation, tile, left: x, weight, routing, output: Y::FORMAT };
        self.product_forward(&product, None)
    }

    /// act(g)·u, where g and u are every other column of x · its expert's weightᵀ of each row; with `keep` they are
    /// returned as well, as [`Cuda::linear_gated`] does.
    /// x `[R, D]` · weight `[E·2·I, D]`, each expert's rows g0 u0 g1 u1 … → gate_up `[R, 2·I]`, out `[R, I]`
    ///
    /// # Errors
    ///
    /// As [`Cuda::linear_forward`].
    ///
    /// # Panics
    ///
    /// As [`Cuda::experts_forward`], or an expert's weight has an odd number of rows.
    pub fn experts_gated<A: Real>(
        &self,
        x: &Buf<A>,
        weight: &Buf<A>,
        routing: &Routing,
        activation: Activation,
        keep: bool,
    ) -> Result<(Option<Buf<A>>, Buf<A>)> {
        let tile = self.expert_tile(Direction::Forward, x, weight, routing);
        self.experts_gated_with(tile, x, weight, routing, activation, keep)
    }

    /// [`Cuda::experts_gated`] by a kernel of the caller's choice.
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// # Panics
    ///
    /// As there, or the kernel cannot read such rows ([`Tile::reads_experts`]).
    pub fn experts_gated_with<A: Real>(
        &self,
        tile: Tile,
        x: &Buf<A>,
        weight: &Buf<A>,
        routing: &Routing,
        activation: Activation,
        keep: bool,
    ) -> Result<(Option<Buf<A>>, Buf<A>)> {
        let (operation, routing) = (Operation::Gated, Some(routing));
        let product = Product { operation, tile, left: x, weight, routing, output: A::FORMAT };
        self.product_gated(&product, None, activation, keep)
    }

    /// dy · its expert's weight of each row, rounded once. dy `[R, out]` · weight `[E·out, in]` → `[R, in]`
    ///
    /// # Errors
    ///
    /// As [`Cuda::linear_forward`].
    ///
    /// # Panics
    ///
    /// As [`Cuda::experts_forward`].
    pub fn experts_backward<A: Real, X: Real>(
        &self,
        dy: &Buf<A>,
        weight: &Buf<A>,
        routing: &Routing,
    ) -> Result<Buf<X>> {
        let tile = self.expert_tile(Direction::Backward, dy, weight, routing);
        self.experts_backward_with(tile, dy, weight, routing)
    }

    /// [`Cuda::experts_backward`] by a kernel of the caller's choice.
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// # Panics
    ///
    /// As there, or the kernel cannot read such rows ([`Tile::reads_experts`]).
    pub fn experts_backward_with<A: Real, X: Real>(
        &self,
        tile: Tile,
        dy: &Buf<A>,
        weight: &Buf<A>,
        routing: &Routing,
    ) -> Result<Buf<X>> {
        let dx = Buf::new(&self.device.memory, dy.rows(), weight.width())?;
        self.product_backward(tile, dy, weight, Some(routing), None, &dx)?;
        Ok(dx)
    }

    /// The gradient of gate_up, through the experts' layer behind the gate, as [`Cuda::linear_gated_backward`] gives it.
    /// dy `[R, D]` · weight `[E·D, I]` · gate_up `[R, 2·I]` → `[R, 2·I]`
    ///
    /// # Errors
    ///
    /// As [`Cuda::linear_forward`].
    ///
    /// # Panics
    ///
    /// As [`Cuda::experts_forward`].
    pub fn experts_gated_backward<A: Real>(
        &self,
        dy: &Buf<A>,
        weight: &Buf<A>,
        routing: &Routing,
        gate_up: &Buf<A>,
        activation: Activation,
    ) -> Result<Buf<A>> {
        let tile = self.expert_tile(Direction::Backward, dy, weight, routing);
        self.experts_gated_backward_with(tile, dy, weight, routing, gate_up, activation)
    }

    /// [`Cuda::experts_gated_backward`] by a kernel of the caller's choice.
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// # Panics
    ///
    /// As there, or the kernel cannot read such rows ([`Tile::reads_experts`]).
    pub fn experts_gated_backward_with<A: Real>(
        &self,
        tile: Tile,
        dy: &Buf<A>,
        weight: &Buf<A>,
        routing: &Routing,
        gate_up: &Buf<A>,
        activation: Activation,
    ) -> Result<Buf<A>> {
        let (operation, routing) = (Operation::GatedBackward, Some(routing));
        let product = Product { operation, tile, left: dy, weight, routing, output: A::FORMAT };
        self.product_gated_backward(&product, gate_up, activation)
    }
}
