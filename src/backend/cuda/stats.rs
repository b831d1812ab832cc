//! Per-dimension sums over the rows of samples: `kernels/stats.cu`.

use std::ops::Range;

use super::element::Segment;
use super::launch::{Launch, Value, int};
use super::{Buf, Cuda, Format, Real};
use crate::backend::{Moments, NonFinite};
use crate::error::Result;

/// Rows of a segment at most.
const SEGMENT_ROWS: usize = 128;
/// Segments that are summed before they are added to the sums: 256 · 16 bytes per column of partial sums, which
/// stay in the L2 cache, however short samples are.
const GROUP: usize = 256;
/// Bytes of [`DeviceMoments`] per dimension.
pub(super) const SUMS_BYTES: usize = 7 * 8;
/// Bytes of the partial sums of so many tokens per dimension.
pub(super) fn partials_bytes(tokens: usize) -> usize {
    4 * tokens.min(GROUP) * 4
}

/// Bytes of the [`FiniteCheck`] of so many tokens.
pub(super) fn check_bytes(tokens: usize) -> usize {
    4 * tokens.div_ceil(GROUP).max(1)
}

/// [`Moments`] on a device.
pub struct DeviceMoments {
    /// Σ v, Σ |v|, Σ v², max |v|, and what is left of the first three. `[7, width]`
    sums: Buf<f64>,
    /// Tokens counted.
    count: u64,
}

/// Whether what was added was finite: known once the device has come that far.
#[must_use = "values may not be finite"]
pub struct FiniteCheck {
    /// Lowest index in its group of a segment that is not finite, or `u32::MAX`. `[1, groups]`
    lowest: Buf<u32>,
    /// The sample of each segment.
    samples: Vec<usize>,
}

impl FiniteCheck {
    /// Waits for the device.
    ///
    /// # Errors
    ///
    /// The driver fails. The inner error: the first sample whose values are not all finite, or that holds values
    /// whose squares are too large for float32.
    pub fn wait(self) -> Result<Result<(), NonFinite>> {
        let lowest = self.lowest.to_host()?;
        let found = lowest.iter().enumerate().find(|(_, index)| **index != u32::MAX);
        Ok(found
            .map_or(Ok(()), |(group, index)| Err(NonFinite(self.samples[group * GROUP + *index as usize]))))
    }
}

impl DeviceMoments {
    /// Waits for the device.
    ///
    /// # Errors
    ///
    /// The driver fails.
    pub fn to_host(&self) -> Result<Moments> {
        let sums = self.sums.to_host()?;
        let row = |index: usize| {
            let width = self.sums.width();
            sums[index * width..(index + 1) * width].to_vec()
        };
        let low = [row(4), row(5), row(6)];
        Ok(Moments { sum: row(0), sum_abs: row(1), sum_sq: row(2), max_abs: row(3), count: self.count, low })
    }
}

/// Rows of `samples` as the kernel takes them (first row, number of rows), and the sample of each segment. A
/// sample is cut from its own first row on, so its segments do not depend on where it lies.
fn segments(samples: &[Range<usize>]) -> (Vec<Segment>, Vec<usize>) {
    let cut = |(sample, rows): (usize, &Range<usize>)| {
        let end = rows.end;
        let starts = rows.clone().step_by(SEGMENT_ROWS);
        starts.map(move |start| {
            (Segment { first_row: int(start), rows: int(SEGMENT_ROWS.min(end - start)) }, sample)
        })
    };
    samples.iter().enumerate().flat_map(cut).unzip()
}

impl Cuda {
    /// Nothing seen yet.
    ///
    /// # Errors
    ///
    /// The device's memory is exhausted, or the driver fails.
    pub fn new_moments(&self, width: usize) -> Result<DeviceMoments> {
        let sums = Buf::zeros(&self.device.memory, 7, width)?;
        Ok(DeviceMoments { sums, count: 0 })
    }

    /// See [`crate::backend::Backend::moments`]; x `[N, width]`. The sums are the same bytes for any cut of a
    /// corpus into calls that keeps samples whole.
    ///
    /// # Errors
    ///
    /// As [`Cuda::new_moments`].
    ///
    /// # Panics
    ///
    /// x has another width than the sums, or samples lie outside x.
    pub fn add_moments<T: Real>(
        &self,
        x: &Buf<T>,
        samples: &[Range<usize>],
        into: &mut DeviceMoments,
    ) -> Result<FiniteCheck> {
        let width = x.width();
        assert_eq!(width, into.sums.width(), "the sums have the width of x");
        assert!(samples.iter().all(|rows| rows.end <= x.rows()), "samples lie in x");
        let (segments, samples_of_segments) = segments(samples);
        let groups = segments.len().div_ceil(GROUP);
        let memory = &self.device.memory;
        let lowest = Buf::from_host(memory, &vec![u32::MAX; groups], groups.max(1))?;
        let together = 16 / size_of::<T>();
        let (name, columns) = match (T::FORMAT, width.is_multiple_of(together)) {
            (Format::F32, true) => ("moments_segments_f32", 32 * together),
            (Format::F32, false) => ("moments_segments_f32_any", 64),
            (Format::Bf16, true) => ("moments_segments_bf16", 32 * together),
            (Format::Bf16, false) => ("moments_segments_bf16_any", 64),
        };
        let first = self.kernel("stats.cu", name)?;
        let second = self.kernel("stats.cu", "moments_accumulate")?;
        let on_device = Buf::from_host(memory, &segments, 1)?;
        let partials = Buf::<f32>::new(memory, 4 * segments.len().min(GROUP), width)?;
        for (group, members) in segments.chunks(GROUP).enumerate() {
            let summed = Launch::new(&first, members.len() * width.div_ceil(columns), 128)
                .arg(T::FORMAT.pick("const float* values", "const bf16* values"), x)
                .arg("int width", int(width))
                .arg("const Segment* segments", Value::at(&on_device, group * GROUP))
                .arg("float* partials", &partials)
                .arg("u32* non_finite", Value::at(&lowest, group));
            let added = Launch::new(&second, width.div_ceil(64), 64)
                .grid_y(4)
                .arg("const float* partials", &partials)
                .arg("int num_segments", int(members.len()))
                .arg("int width", int(width))
                .arg("double* sums", &into.sums);
            // SAFETY: segments lie in x, which is [N, width]; partials are [4, S, width] for this group's S; its
            // segments and its place in `lowest` exist; the sums are [7, width].
            unsafe {
                summed.on(&self.device.compute)?;
                added.on(&self.device.compute)?;
            }
        }
        into.count += samples.iter().map(|rows| rows.len() as u64).sum::<u64>();
        Ok(FiniteCheck { lowest, samples: samples_of_segments })
    }

    /// See [`crate::backend::Backend::row_norms`]; x `[N, width]` → `[N]`
    ///
    /// # Errors
    ///
    /// As [`Cuda::new_moments`].
    pub fn row_norms<T: Real>(&self, x: &Buf<T>) -> Result<Vec<f64>> {
        /// Rows of a block.
        const ROWS: usize = 4;
        if x.rows() == 0 {
            return Ok(Vec::new());
        }
        let name = T::FORMAT.pick("row_squares_f32", "row_squares_bf16");
        let kernel = self.kernel("stats.cu", name)?;
        let squares = Buf::<f64>::new(&self.device.memory, x.rows(), 1)?;
        let summed = Launch::new(&kernel, x.rows().div_ceil(ROWS), 128)
            .arg(T::FORMAT.pick("const float* values", "const bf16* values"), x)
            .arg("int rows", int(x.rows()))
            .arg("int width", int(x.width()))
            .arg("double* squares", &squares);
        // SAFETY: x is [rows, width], squares are [rows].
        unsafe { summed.on(&self.device.compute)? };
        let mut norms = squares.to_host()?;
        norms.iter_mut().for_each(|square| *square = square.sqrt());
        Ok(norms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_cut_from_their_own_first_row() {
        let (cut, of) = segments(&[3..4, 5..5, 10..266, 266..400]);
        let cut: Vec<_> = cut.iter().map(|segment| (segment.first_row, segment.rows)).collect();
        assert_eq!(cut, [(3, 1), (10, 128), (138, 128), (266, 128), (394, 6)]);
        assert_eq!(of, [0, 2, 2, 3, 3]);
    }
}
