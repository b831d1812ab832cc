//! Weights on their way to the device: matrices in the backend's format, vectors (norms and biases) as float32.

use cudarc::driver::CudaEvent;
use half::{bf16, f16};
use rayon::prelude::*;

use super::backend::CudaBackend;
use super::device::driver_failed;
use super::{Buf, Format, Tensor};
use crate::error::Result;
use crate::model::{self, Dtype, Packing};

/// Memory for a weight, and the moment from which on it may be written.
pub struct Room {
    tensor: Tensor,
    ready: CudaEvent,
}

/// Bytes that one task converts.
const TASK_BYTES: usize = 1 << 20;

impl CudaBackend {
    pub(super) fn make_room(&self, tensors: &[&model::Tensor]) -> Result<Room> {
        let memory = &self.cuda.device.memory;
        let tensor = match *tensors[0].shape {
            [_, width] => {
                let rows = tensors.iter().map(|tensor| tensor.shape[0]).sum();
                match self.lower.format {
                    Format::F32 => Tensor::F32(Buf::new(memory, rows, width)?),
                    Format::Bf16 => Tensor::Bf16(Buf::new(memory, rows, width)?),
                }
            }
            _ => Tensor::F32(Buf::new(memory, 1, tensors.iter().map(|tensor| tensor.len()).sum())?),
        };
        let event = self.cuda.device.compute.record_event(None);
        let ready = event.map_err(|error| driver_failed("could not mark a moment", error))?;
        Ok(Room { tensor, ready })
    }

    pub(super) fn fill(&self, room: Room, tensors: &[&model::Tensor], packing: Packing) -> Result<Tensor> {
        let Room { tensor, ready } = room;
        let source = Source::new(tensors, packing, tensor.format());
        let allocation = super::tensor::typed!(&tensor, buf => buf.allocation());
        let upload = self.staging.upload_with(source.num_bytes(), allocation, &ready, |start, bytes| {
            let tasks = bytes.par_chunks_mut(TASK_BYTES).enumerate();
            tasks.for_each(|(task, bytes)| source.write(start + task * TASK_BYTES, bytes));
        })?;
        upload.wait_on(&self.cuda.device.compute)?;
        Ok(tensor)
    }
}

/// The bytes of a weight as it will lie on the device.
struct Source<'a> {
    tensors: &'a [&'a model::Tensor],
    packing: Packing,
    format: Format,
    /// Elements of a row of a matrix; of a vector one, so that its elements interleave.
    width: usize,
}

impl<'a> Source<'a> {
    fn new(tensors: &'a [&'a model::Tensor], packing: Packing, format: Format) -> Self {
        let width = if let [_, width] = *tensors[0].shape { width } else { 1 };
        Self { tensors, packing, format, width: width.max(1) }
    }

    fn element_bytes(&self) -> usize {
        self.format.pick(4, 2)
    }

    fn num_bytes(&self) -> usize {
        self.tensors.iter().map(|tensor| tensor.len()).sum::<usize>() * self.element_bytes()
    }

    /// Writes the bytes from `start` on, which is the start of an element.
    fn write(&self, start: usize, mut bytes: &mut [u8]) {
        let size = self.element_bytes();
        let mut element = start / size;
        while !bytes.is_empty() {
            let (tensor, at, run) = self.run(element);
            let len = run.min(bytes.len() / size);
            let (now, rest) = bytes.split_at_mut(len * size);
            let stored = tensor.dtype.size_bytes();
            convert(tensor.dtype, &tensor.bytes()[at * stored..(at + len) * stored], self.format, now);
            element += len;
            bytes = rest;
        }
    }

    /// The tensor that element `element` comes from, its place there, and how many elements follow it there.
    fn run(&self, element: usize) -> (&model::Tensor, usize, usize) {
        match self.packing {
            Packing::Stacked => self.stacked(element),
            Packing::StackedPairs { head_dim, rows } => {
                let (row, column) = (element / self.width, element % self.width);
                if row >= rows {
                    return self.stacked(element);
                }
                let (first, within) = (row / head_dim * head_dim, row % head_dim);
                let from = first + within % 2 * (head_dim / 2) + within / 2;
                let (tensor, at, _) = self.stacked(from * self.width + column);
                (tensor, at, self.width - column)
            }
            Packing::Interleaved => {
                let (row, column) = (element / self.width, element % self.width);
                let rows = 2 * self.tensors[0].len() / self.width;
                let (pair, within) = (row / rows, row % rows);
                let at = within / 2 * self.width + column;
                (self.tensors[2 * pair + within % 2], at, self.width - column)
            }
        }
    }

    /// The same where the tensors lie one after the other.
    fn stacked(&self, element: usize) -> (&model::Tensor, usize, usize) {
        let mut at = element;
        let mut tensors = self.tensors;
        while tensors.len() > 1 && at >= tensors[0].len() {
            at -= tensors[0].len();
            tensors = &tensors[1..];
        }
        (tensors[0], at, tensors[0].len() - at)
    }
}

/// `from` as it is stored to `to` as the device wants it, rounded to the nearest.
fn convert(dtype: Dtype, from: &[u8], format: Format, to: &mut [u8]) {
    match (dtype, format) {
        (Dtype::F32, Format::F32) | (Dtype::BF16, Format::Bf16) => to.copy_from_slice(from),
        (Dtype::F32, Format::Bf16) => each(from, to, |value: [u8; 4]| narrow(f32::from_le_bytes(value))),
        (Dtype::F16, Format::Bf16) => {
            each(from, to, |value: [u8; 2]| narrow(f16::from_le_bytes(value).to_f32()))
        }
        (Dtype::F16, Format::F32) => {
            each(from, to, |value: [u8; 2]| f16::from_le_bytes(value).to_f32().to_le_bytes())
        }
        (Dtype::BF16, Format::F32) => {
            each(from, to, |value: [u8; 2]| bf16::from_le_bytes(value).to_f32().to_le_bytes());
        }
    }
}

fn narrow(value: f32) -> [u8; 2] {
    bf16::from_f32(value).to_le_bytes()
}

fn each<const FROM: usize, const TO: usize>(from: &[u8], to: &mut [u8], of: impl Fn([u8; FROM]) -> [u8; TO]) {
    let (from, to) = (from.as_chunks::<FROM>().0, to.as_chunks_mut::<TO>().0);
    for (from, to) in from.iter().zip(to) {
        *to = of(*from);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn tensor(dtype: Dtype, shape: &[usize], values: impl Iterator<Item = f32>) -> model::Tensor {
        let bytes: Vec<u8> = match dtype {
            Dtype::F32 => values.flat_map(f32::to_le_bytes).collect(),
            Dtype::F16 => values.flat_map(|value| f16::from_f32(value).to_le_bytes()).collect(),
            Dtype::BF16 => values.flat_map(|value| bf16::from_f32(value).to_le_bytes()).collect(),
        };
        let len = bytes.len();
        model::Tensor::new(dtype, shape.to_vec(), Arc::new(bytes), 0..len).unwrap()
    }

    /// In pieces of every size, all formats and types.
    #[test]
    fn parts_are_packed() {
        let first = |dtype| tensor(dtype, &[3, 2], (0..6).map(|value| value as f32));
        let second = |dtype| tensor(dtype, &[3, 2], (0..6).map(|value| 10.0 + value as f32));
        let stacked = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];
        let interleaved = [0.0, 1.0, 10.0, 11.0, 2.0, 3.0, 12.0, 13.0, 4.0, 5.0, 14.0, 15.0];
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let (first, second) = (first(dtype), second(dtype));
            let parts = [&first, &second];
            for (packing, wanted) in [(Packing::Stacked, stacked), (Packing::Interleaved, interleaved)] {
                for piece in 1..=12 {
                    let wide = Source::new(&parts, packing, Format::F32);
                    let mut bytes = vec![0; wide.num_bytes()];
                    let pieces = bytes.chunks_mut(4 * piece).enumerate();
                    pieces.for_each(|(index, bytes)| wide.write(index * 4 * piece, bytes));
                    let found: Vec<f32> =
                        bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
                    assert_eq!(found, wanted, "{dtype} {packing:?} {piece}");
                    let narrow = Source::new(&parts, packing, Format::Bf16);
                    let mut bytes = vec![0; narrow.num_bytes()];
                    let pieces = bytes.chunks_mut(2 * piece).enumerate();
                    pieces.for_each(|(index, bytes)| narrow.write(index * 2 * piece, bytes));
                    let found: Vec<f32> =
                        bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect();
                    assert_eq!(found, wanted, "{dtype} {packing:?} {piece}");
                }
            }
        }
    }

    /// Heads of eight rows in two tensors, and rows that are none, as matrices and as vectors.
    #[test]
    fn pairs_become_neighbours() {
        for width in [1, 3] {
            let part = |rows: std::ops::Range<usize>| {
                let shape = if width == 1 { vec![rows.len()] } else { vec![rows.len(), width] };
                let element = move |row| (0..width).map(move |column| (row * width + column) as f32);
                tensor(Dtype::F32, &shape, rows.flat_map(element))
            };
            let (q, k, v) = (part(0..8), part(8..16), part(16..19));
            let packing = Packing::StackedPairs { head_dim: 8, rows: 16 };
            let parts = [&q, &k, &v];
            let source = Source::new(&parts, packing, Format::F32);
            let rows = [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15, 16, 17, 18];
            let of = |row: &usize| (row * width..(row + 1) * width).map(|element| element as f32);
            let wanted: Vec<f32> = rows.iter().flat_map(of).collect();
            for piece in 1..=19 * width {
                let mut bytes = vec![0; source.num_bytes()];
                let pieces = bytes.chunks_mut(4 * piece).enumerate();
                pieces.for_each(|(index, bytes)| source.write(index * 4 * piece, bytes));
                let found: Vec<f32> = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
                assert_eq!(found, wanted, "rows of {width}, pieces of {piece}");
            }
        }
    }

    #[test]
    fn vectors_interleave_by_element_and_pair_follows_pair() {
        let vector = |first: f32| tensor(Dtype::BF16, &[2], [first, first + 1.0].into_iter());
        let [a, b, c, d] = [1.0, 3.0, 5.0, 7.0].map(vector);
        let parts = [&a, &b, &c, &d];
        for (pairs, wanted) in
            [(1, vec![1.0, 3.0, 2.0, 4.0]), (2, vec![1.0, 3.0, 2.0, 4.0, 5.0, 7.0, 6.0, 8.0])]
        {
            let source = Source::new(&parts[..2 * pairs], Packing::Interleaved, Format::F32);
            let mut bytes = vec![0; source.num_bytes()];
            source.write(0, &mut bytes);
            let found: Vec<f32> = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            assert_eq!(found, wanted);
        }
    }
}
