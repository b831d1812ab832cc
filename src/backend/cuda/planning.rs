//! An open device lowers and counts as [`super::CudaLower`] does without one.

use super::backend::CudaBackend;
use super::lower::Fused;
use crate::backend::{Appetite, Lower};
use crate::model::op::Block;
use crate::model::{Program, Spec, Usage};

impl Lower for CudaBackend {
    type Fused = Fused;

    fn lower(&self, spec: &Spec, usages: &[Usage]) -> Program<Fused> {
        self.lower.lower(spec, usages)
    }

    fn appetite(&self, spec: &Spec, gradients: bool) -> Appetite {
        self.lower.appetite(spec, gradients)
    }

    fn slot_bytes(&self, block: &Block<Fused>, tokens: usize) -> Vec<u64> {
        self.lower.slot_bytes(block, tokens)
    }

    fn gradient_bytes(&self, block: &Block<Fused>, tokens: usize) -> Vec<u64> {
        self.lower.gradient_bytes(block, tokens)
    }

    fn weight_bytes(&self, shapes: &[&[usize]]) -> u64 {
        self.lower.weight_bytes(shapes)
    }

    fn temporary_bytes(&self, block: &Block<Fused>, index: usize, tokens: usize) -> [u64; 2] {
        self.lower.temporary_bytes(block, index, tokens)
    }

    fn placed_bytes(&self) -> u64 {
        self.lower.placed_bytes()
    }

    fn statistics_bytes(&self, widths: &[usize], gradients: bool, chunks: usize, tokens: usize) -> u64 {
        self.lower.statistics_bytes(widths, gradients, chunks, tokens)
    }

    fn rope_bytes(&self, pairs: usize, positions: usize) -> u64 {
        self.lower.rope_bytes(pairs, positions)
    }

    fn loss_workspace_bytes(&self, spec: &Spec, tokens: usize) -> u64 {
        self.lower.loss_workspace_bytes(spec, tokens)
    }

    fn product_workspace_bytes(&self, width: usize, tokens: usize) -> u64 {
        self.lower.product_workspace_bytes(width, tokens)
    }
}
