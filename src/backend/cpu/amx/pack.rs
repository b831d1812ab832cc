//! Operands of a product, cut into blocks of 32 (rows or columns) by 32 (depth) in the order in which the
//! kernel reads them, with zeros beyond the edges.

use std::arch::x86_64::*;
use std::ops::Range;

use rayon::prelude::*;

use super::{Amx, BLOCK, Line, PARTS, mask};
use crate::model::Dtype;

/// Floats of memory that have room for so many lines, wherever the memory starts.
fn floats(lines: usize) -> usize {
    (lines + 1) * 16
}

/// The first `len` lines inside `space`.
fn lines(space: &mut [f32], len: usize) -> &mut [Line] {
    // SAFETY: floats and the integers of a line are valid for every bit pattern.
    let (_, lines, _) = unsafe { space.align_to_mut() };
    &mut lines[..len]
}

/// The left operand [rows, depth] in bf16 parts. For each block of rows and each step of depth: part, row, 32
/// values of depth.
pub struct Left<'a> {
    pub(super) lines: &'a [Line],
    pub(super) rows: usize,
    pub(super) depth: usize,
}

impl<'a> Left<'a> {
    /// Floats that [`Left::new`] needs as its space.
    pub fn space(rows: usize, depth: usize) -> usize {
        floats(rows.div_ceil(BLOCK) * depth.div_ceil(BLOCK) * PARTS * BLOCK)
    }

    /// Splits `x`, row-major [rows, depth]. A large one is split by all threads.
    pub fn new(_: Amx, x: &[f32], rows: usize, depth: usize, space: &'a mut [f32]) -> Self {
        /// Elements that are split before another thread has begun to help.
        const SMALL: usize = 1 << 17;
        assert!(x.len() == rows * depth && depth > 0, "[{rows}, {depth}] of {} elements", x.len());
        let block_lines = depth.div_ceil(BLOCK) * PARTS * BLOCK;
        let lines = lines(space, rows.div_ceil(BLOCK) * block_lines);
        lines
            .par_chunks_exact_mut(block_lines)
            .zip(x.par_chunks(BLOCK * depth))
            .with_min_len(SMALL.div_ceil(BLOCK * depth))
            // SAFETY: the caller has an Amx, so the processor has these features.
            .for_each(|(lines, x)| unsafe { split_rows(lines, x, depth) });
        Self { lines, rows, depth }
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Some of the rows, from a multiple of [`BLOCK`] on.
    pub fn part(&self, rows: Range<usize>) -> Left<'a> {
        assert!(
            rows.start.is_multiple_of(BLOCK) && rows.start <= rows.end && rows.end <= self.rows,
            "rows {rows:?}"
        );
        let row_lines = self.depth.div_ceil(BLOCK) * PARTS;
        let lines = &self.lines[rows.start * row_lines..rows.end.next_multiple_of(BLOCK) * row_lines];
        Left { lines, rows: rows.len(), depth: self.depth }
    }
}

/// Splits a block of up to 32 rows of `depth` elements.
#[target_feature(enable = "avx512f,avx512bw")]
fn split_rows(lines: &mut [Line], x: &[f32], depth: usize) {
    for (step, lines) in lines.chunks_exact_mut(PARTS * BLOCK).enumerate() {
        let columns = step * BLOCK..depth.min((step + 1) * BLOCK);
        let mut rows = x.chunks_exact(depth);
        for row in 0..BLOCK {
            let parts = match rows.next() {
                Some(x) => {
                    let x = &x[columns.clone()];
                    // SAFETY: the mask selects as many elements as the slice has.
                    unsafe { load::<PARTS>(x.as_ptr().cast(), mask(x.len())) }
                }
                None => [_mm512_setzero_si512(); PARTS],
            };
            for (part, value) in parts.into_iter().enumerate() {
                write(&mut lines[part * BLOCK + row], value);
            }
        }
    }
}

/// A stored matrix: whole rows of `width` elements, little-endian, at any address.
#[derive(Clone, Copy)]
pub struct Stored<'a> {
    /// The elements.
    pub bytes: &'a [u8],
    /// Their encoding.
    pub dtype: Dtype,
    /// Elements of a row.
    pub width: usize,
}

impl Stored<'_> {
    fn rows(&self) -> usize {
        self.bytes.len() / (self.width * self.dtype.size_bytes())
    }

    /// The element at `row` and `col`, which has at least `len` − 1 others after it.
    fn at(&self, row: usize, col: usize, len: usize) -> *const u8 {
        let size = self.dtype.size_bytes();
        self.bytes[(row * self.width + col) * size..][..len * size].as_ptr()
    }
}

/// bf16 parts of an element.
fn parts(dtype: Dtype) -> usize {
    match dtype {
        Dtype::BF16 => 1,
        Dtype::F16 => 2,
        Dtype::F32 => PARTS,
    }
}

/// The right operand [depth, cols] in bf16 parts. For each block of columns and each step of depth: part,
/// half of the columns, pair of depths; then two values of depth for each of 16 columns.
pub struct Right<'a> {
    pub(super) lines: &'a [Line],
    pub(super) cols: usize,
    pub(super) depth: usize,
    pub(super) parts: usize,
}

impl<'a> Right<'a> {
    /// Floats that the constructors need as their space.
    pub fn space(dtype: Dtype, depth: usize, cols: usize) -> usize {
        floats(cols.div_ceil(BLOCK) * depth.div_ceil(BLOCK) * parts(dtype) * BLOCK)
    }

    /// Rows `rows` of `weight` as columns, for x·Wᵀ.
    pub fn from_rows(_: Amx, weight: Stored<'_>, rows: Range<usize>, space: &'a mut [f32]) -> Self {
        let (depth, cols, parts) = (weight.width, rows.len(), parts(weight.dtype));
        let lines = lines(space, cols.div_ceil(BLOCK) * depth.div_ceil(BLOCK) * parts * BLOCK);
        // SAFETY: the caller has an Amx, so the processor has these features.
        unsafe {
            match weight.dtype {
                Dtype::BF16 => pack_rows::<1>(lines, weight, rows),
                Dtype::F16 => pack_rows::<2>(lines, weight, rows),
                Dtype::F32 => pack_rows::<3>(lines, weight, rows),
            }
        }
        Self { lines, cols, depth, parts }
    }

    /// Columns `cols` of `weight`, for x·W.
    pub fn from_columns(_: Amx, weight: Stored<'_>, cols: Range<usize>, space: &'a mut [f32]) -> Self {
        let (depth, count, parts) = (weight.rows(), cols.len(), parts(weight.dtype));
        assert!(cols.end <= weight.width, "columns {cols:?} of {}", weight.width);
        let lines = lines(space, count.div_ceil(BLOCK) * depth.div_ceil(BLOCK) * parts * BLOCK);
        // SAFETY: the caller has an Amx, so the processor has these features.
        unsafe {
            match weight.dtype {
                Dtype::BF16 => pack_columns::<1>(lines, weight, cols),
                Dtype::F16 => pack_columns::<2>(lines, weight, cols),
                Dtype::F32 => pack_columns::<3>(lines, weight, cols),
            }
        }
        Self { lines, cols: count, depth, parts }
    }
}

/// A line holds the same two elements of 16 weight rows: the transpose of 16 rows of pairs.
#[target_feature(enable = "avx512f,avx512bw")]
fn pack_rows<const P: usize>(lines: &mut [Line], weight: Stored<'_>, rows: Range<usize>) {
    let block_lines = weight.width.div_ceil(BLOCK) * P * BLOCK;
    for (block, lines) in lines.chunks_exact_mut(block_lines).enumerate() {
        for (step, lines) in lines.chunks_exact_mut(P * BLOCK).enumerate() {
            let start = step * BLOCK;
            let len = BLOCK.min(weight.width - start);
            for half in 0..2 {
                let mut pairs = [[_mm512_setzero_si512(); 16]; P];
                let first = rows.start + block * BLOCK + half * 16;
                for (column, row) in (first..rows.end).take(16).enumerate() {
                    // SAFETY: `at` has `len` elements, and the mask selects as many.
                    let parts = unsafe { load::<P>(weight.at(row, start, len), mask(len)) };
                    for (pairs, value) in pairs.iter_mut().zip(parts) {
                        pairs[column] = value;
                    }
                }
                for (part, pairs) in pairs.into_iter().enumerate() {
                    let lines = &mut lines[part * BLOCK + half * 16..][..16];
                    for (line, value) in lines.iter_mut().zip(transpose(pairs)) {
                        write(line, value);
                    }
                }
            }
        }
    }
}

/// A line holds 16 elements of two weight rows, alternating.
#[target_feature(enable = "avx512f,avx512bw")]
fn pack_columns<const P: usize>(lines: &mut [Line], weight: Stored<'_>, cols: Range<usize>) {
    let rows = weight.rows();
    let steps = rows.div_ceil(BLOCK);
    let low = indices(|i| i / 2 + i % 2 * 32);
    let high = indices(|i| i / 2 + i % 2 * 32 + 16);
    // Blocks of columns inside, so that the weight is read along its rows.
    for step in 0..steps {
        for (block, first) in cols.clone().step_by(BLOCK).enumerate() {
            let lines = &mut lines[(block * steps + step) * P * BLOCK..][..P * BLOCK];
            let len = BLOCK.min(cols.end - first);
            for pair in 0..16 {
                let [even, odd] = [0, 1].map(|odd| {
                    let row = step * BLOCK + 2 * pair + odd;
                    if row < rows {
                        // SAFETY: `at` has `len` elements, and the mask selects as many.
                        unsafe { load::<P>(weight.at(row, first, len), mask(len)) }
                    } else {
                        [_mm512_setzero_si512(); P]
                    }
                });
                for part in 0..P {
                    let (even, odd) = (even[part], odd[part]);
                    let lines = &mut lines[part * BLOCK..][..BLOCK];
                    write(&mut lines[pair], _mm512_permutex2var_epi16(even, low, odd));
                    write(&mut lines[16 + pair], _mm512_permutex2var_epi16(even, high, odd));
                }
            }
        }
    }
}

/// The bf16 parts of up to 32 elements, zeros where the mask has them. `P` tells the encoding: 1 part means
/// bf16, 2 float16, 3 float32.
///
/// # Safety
/// The elements that the mask selects must be readable.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn load<const P: usize>(from: *const u8, mask: u32) -> [__m512i; P] {
    // SAFETY: masked loads touch only what the mask selects. The second half of the float32 elements may
    // start outside the caller's memory, but then its mask is empty.
    unsafe {
        match P {
            1 => [_mm512_maskz_loadu_epi16(mask, from.cast()); P],
            2 => {
                let halves = _mm512_maskz_loadu_epi16(mask, from.cast());
                let low = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
                let high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(halves));
                split([low, high])
            }
            _ => {
                let low = _mm512_maskz_loadu_ps(mask as u16, from.cast());
                let high = _mm512_maskz_loadu_ps((mask >> 16) as u16, from.wrapping_add(64).cast());
                split([low, high])
            }
        }
    }
}

/// Splits 32 floats: a part is the upper half of what is left, and the difference is exact. Truncated and
/// not rounded, as the largest floats would round to infinity.
#[target_feature(enable = "avx512f,avx512bw")]
fn split<const P: usize>(mut left: [__m512; 2]) -> [__m512i; P] {
    let upper = _mm512_set1_epi32(!0xffff);
    let odd = indices(|i| 2 * i + 1);
    let mut parts = [_mm512_setzero_si512(); P];
    for part in &mut parts {
        let [low, high] = left.map(|x| _mm512_castps_si512(x));
        *part = _mm512_permutex2var_epi16(low, odd, high);
        left = left.map(|x| {
            let taken = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), upper));
            // Nothing is left of an infinity (∞ − ∞ would be NaN), but of a NaN, whose upper half may read
            // infinity, NaN is left: it differs from everything.
            let rest = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(x, taken);
            _mm512_maskz_sub_ps(rest, x, taken)
        });
    }
    parts
}

/// Indices of 16-bit words in two vectors, for a permutation.
#[target_feature(enable = "avx512f")]
fn indices(index: impl Fn(usize) -> usize) -> __m512i {
    let indices: [u16; 32] = std::array::from_fn(|i| index(i) as u16);
    // SAFETY: the array is 64 readable bytes.
    unsafe { _mm512_loadu_si512(indices.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
fn write(line: &mut Line, value: __m512i) {
    // SAFETY: a line is 64 writable bytes.
    unsafe { _mm512_storeu_si512(std::ptr::from_mut(line).cast(), value) }
}

/// The transpose of a 16 × 16 matrix of 32-bit words.
#[target_feature(enable = "avx512f")]
fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
    let mut pairs = rows;
    for i in (0..16).step_by(2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    // Register i + j then has in its quarter q (128 bits) column 4q + j of rows i to i + 3.
    let mut fours = pairs;
    for i in (0..16).step_by(4) {
        for j in 0..2 {
            fours[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
            fours[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
        }
    }
    // What remains are four transposes of 4 × 4 quarters.
    let mut out = fours;
    for j in 0..4 {
        let even = [0, 8].map(|i| _mm512_shuffle_i32x4::<0x88>(fours[i + j], fours[i + j + 4]));
        let odd = [0, 8].map(|i| _mm512_shuffle_i32x4::<0xdd>(fours[i + j], fours[i + j + 4]));
        out[j] = _mm512_shuffle_i32x4::<0x88>(even[0], even[1]);
        out[j + 4] = _mm512_shuffle_i32x4::<0x88>(odd[0], odd[1]);
        out[j + 8] = _mm512_shuffle_i32x4::<0xdd>(even[0], even[1]);
        out[j + 12] = _mm512_shuffle_i32x4::<0xdd>(odd[0], odd[1]);
    }
    out
}
