//! A chunk on the device: what kernels need to know of its rows.

use super::attention::AttentionWork;
use super::{Buf, Cuda};
use crate::backend::Chunk;
use crate::error::Result;

/// A chunk, and its rows' ids, positions and targets on the device.
pub struct PlacedChunk {
    chunk: Chunk,
    /// Token ids. `[1, N]`
    pub(super) ids: Buf<u32>,
    /// Place of each row in its sample, from 0. `[1, N]`
    pub(super) positions: Buf<i32>,
    /// The token after each row; −1 in a sample's last. `[1, N]`
    pub(super) targets: Buf<i32>,
    /// Factor of each row's loss in L. `[1, N]`
    pub(super) scales: Buf<f32>,
    /// Which tiles attention goes through.
    pub(super) work: AttentionWork,
}

impl AsRef<Chunk> for PlacedChunk {
    fn as_ref(&self) -> &Chunk {
        &self.chunk
    }
}

impl PlacedChunk {
    /// Takes `chunk` to the device.
    pub(super) fn new(cuda: &Cuda, chunk: Chunk) -> Result<Self> {
        let memory = &cuda.device.memory;
        let tokens = chunk.num_tokens();
        let (mut positions, mut targets) = (Vec::with_capacity(tokens), Vec::with_capacity(tokens));
        let mut scales = Vec::with_capacity(tokens);
        for (rows, &scale) in chunk.samples().zip(&chunk.loss_scales) {
            for row in rows.clone() {
                positions.push((row - rows.start) as i32);
                let next = chunk.ids.get(row + 1).filter(|_| row + 1 < rows.end);
                targets.push(next.map_or(-1, |&id| id as i32));
                scales.push(scale as f32);
            }
        }
        Ok(Self {
            ids: Buf::from_host(memory, &chunk.ids, tokens.max(1))?,
            positions: Buf::from_host(memory, &positions, tokens.max(1))?,
            targets: Buf::from_host(memory, &targets, tokens.max(1))?,
            scales: Buf::from_host(memory, &scales, tokens.max(1))?,
            work: cuda.attention_work(&chunk.cu_seqlens)?,
            chunk,
        })
    }
}
