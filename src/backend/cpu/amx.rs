//! Matrix products as accurate as float32 ones, on the bf16 tile unit of recent Intel processors (AMX).
//!
//! A float32 is the exact sum of three bf16 parts of 8 bits each, down to the underflow threshold. The tile
//! unit multiplies bf16 exactly and adds in float32, so with a bf16 weight three bf16 products make one
//! float32 product, still several times faster than float32 multiply-adds. A float16 weight has two parts
//! and a float32 weight three; products of parts i and j (from 0) are left out from i + j = 3 on, which is
//! below float32's own rounding.
//!
//! Both operands are first laid out in blocks of 32 (rows or columns) by 32 (depth) with zeros beyond the
//! edges, in the order in which the tile unit reads them.
//!
//! An output element depends on its row of the left operand, its column of the right one and the depth, not
//! on its place in a block or on the other rows: every block is computed in full by the same instructions.
//! The unit treats subnormal parts as zero and flushes subnormal sums to zero, whatever the thread's rounding
//! state. An infinite or NaN element of the left operand gives infinities or NaN; an infinite weight gives NaN.

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;
use std::sync::OnceLock;

use rayon::prelude::*;

use crate::model::Dtype;

/// Rows, columns and depth of a block: two tiles of 16 × 16 sums a side; a tile row has 32 bf16.
const BLOCK: usize = 32;
/// bf16 parts of a float32.
const PARTS: usize = 3;
/// Steps of depth between two additions to the destination. Short enough that the block of left rows and the
/// columns of a task stay in the cache, and one sum of thousands becomes a sum of a few sums, which rounds
/// less. A constant: rounding must depend on the depth alone.
const RUN: usize = 32;

/// One row of a tile, a cache line: tile loads that straddle two lines take twice as long.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([u32; 16]);

/// Proof that this process may run the instructions used here.
#[derive(Clone, Copy, Debug)]
pub struct Amx(());

impl Amx {
    /// `None` where the processor lacks them or the kernel forbids them.
    pub fn get() -> Option<Self> {
        static ALLOWED: OnceLock<bool> = OnceLock::new();
        ALLOWED.get_or_init(allowed).then_some(Self(()))
    }
}

/// Asks the processor, then the kernel: tile registers are off until a process requests them, once for all
/// its threads. The kernel grants the request only where it saves and restores these registers.
fn allowed() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const TILE_DATA: u64 = 18;
    if !(is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw")) {
        return false;
    }
    // Newer compilers know that this is safe: every processor with AVX-512 has these leaves.
    #[allow(unused_unsafe)]
    // SAFETY: CPUID exists on every x86-64 processor.
    let (leaves, features) = unsafe { (__cpuid(0).eax, __cpuid_count(7, 0).edx) };
    let (bf16, tile) = (features >> 22 & 1, features >> 24 & 1);
    if leaves < 7 || bf16 + tile < 2 {
        return false;
    }
    let mut result = ARCH_PRCTL;
    // SAFETY: this call reads and writes no memory of ours; kernels that do not know it return an error.
    // rcx and r11 are what the instruction overwrites.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") TILE_DATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    result == 0
}

/// Floats of memory for so many lines, wherever the memory starts.
fn floats(lines: usize) -> usize {
    (lines + 1) * 16
}

/// The lines inside `space`, `len` of them.
fn lines(space: &mut [f32], len: usize) -> &mut [Line] {
    // SAFETY: a line is plain integers; every bit pattern is a valid float and a valid integer.
    let (_, lines, _) = unsafe { space.align_to_mut() };
    &mut lines[..len]
}

/// The left operand `[rows, depth]`, split into parts. For each block of rows and each step of depth: part,
/// row, 32 values of depth.
pub struct Left<'a> {
    lines: &'a [Line],
    /// Rows of the operand.
    pub rows: usize,
    steps: usize,
}

impl<'a> Left<'a> {
    /// Floats that [`Left::new`] needs as its space.
    pub fn space(rows: usize, depth: usize) -> usize {
        floats(rows.div_ceil(BLOCK) * depth.div_ceil(BLOCK) * PARTS * BLOCK)
    }

    /// Splits `x`, row-major `[rows, depth]`, into `space`. Large ones on all threads.
    pub fn new(_: Amx, x: &[f32], rows: usize, depth: usize, space: &'a mut [f32]) -> Self {
        // Elements below which handing out work takes longer than doing it.
        const SMALL: usize = 1 << 17;
        assert!(x.len() == rows * depth && depth > 0, "[{rows}, {depth}] of {} elements", x.len());
        let steps = depth.div_ceil(BLOCK);
        let block_lines = steps * PARTS * BLOCK;
        let lines = lines(space, rows.div_ceil(BLOCK) * block_lines);
        if !lines.is_empty() {
            lines
                .par_chunks_exact_mut(block_lines)
                .zip(x.par_chunks(BLOCK * depth))
                .with_min_len(SMALL.div_ceil(BLOCK * depth))
                // SAFETY: an Amx exists only where the processor has these features.
                .for_each(|(lines, x)| unsafe { split_block(lines, x, depth) });
        }
        Self { lines, rows, steps }
    }
}

/// Splits up to 32 rows of `depth` elements into whole blocks.
#[target_feature(enable = "avx512f,avx512bw")]
fn split_block(lines: &mut [Line], x: &[f32], depth: usize) {
    for (step, lines) in lines.chunks_exact_mut(PARTS * BLOCK).enumerate() {
        let start = step * BLOCK;
        let end = depth.min(start + BLOCK);
        let (high, low) = (mask(end - start), BLOCK);
        let mut rows = x.chunks_exact(depth);
        for row in 0..low {
            let parts = match rows.next() {
                // SAFETY: the mask covers the elements start..end of the row and no others.
                Some(x) => unsafe { load::<PARTS>(x[start..end].as_ptr().cast(), high) },
                None => [_mm512_setzero_si512(); PARTS],
            };
            for (part, value) in parts.into_iter().enumerate() {
                write(&mut lines[part * BLOCK + row], value);
            }
        }
    }
}

/// Bits 0 to `count` − 1.
fn mask(count: usize) -> u32 {
    ((1u64 << count) - 1) as u32
}

#[target_feature(enable = "avx512f")]
fn write(line: &mut Line, value: __m512i) {
    // SAFETY: a line is 64 writable bytes.
    unsafe { _mm512_storeu_si512(std::ptr::from_mut(line).cast(), value) }
}

/// A stored matrix, row-major, little-endian, at any address.
#[derive(Clone, Copy)]
pub struct Stored<'a> {
    /// Whole rows.
    pub bytes: &'a [u8],
    /// Encoding of the elements.
    pub dtype: Dtype,
    /// Elements of a row.
    pub width: usize,
}

impl Stored<'_> {
    fn rows(&self) -> usize {
        self.bytes.len() / (self.width * self.dtype.size_bytes()).max(1)
    }

    /// The element at `row` and `col`, followed by at least `len` − 1 others in its row.
    fn at(&self, row: usize, col: usize, len: usize) -> *const u8 {
        let size = self.dtype.size_bytes();
        let start = (row * self.width + col) * size;
        self.bytes[start..start + len * size].as_ptr()
    }

    fn parts(&self) -> usize {
        match self.dtype {
            Dtype::BF16 => 1,
            Dtype::F16 => 2,
            Dtype::F32 => 3,
        }
    }
}

/// The right operand `[depth, cols]`, split into parts. For each block of columns and each step of depth: part,
/// half of the columns, pair of depths, 16 columns of two values of depth.
pub struct Right<'a> {
    lines: &'a [Line],
    /// Columns of the operand.
    pub cols: usize,
    steps: usize,
    parts: usize,
}

impl<'a> Right<'a> {
    /// Floats that the constructors need as their space.
    pub fn space(dtype: Dtype, depth: usize, cols: usize) -> usize {
        let parts = Stored { bytes: &[], dtype, width: 0 }.parts();
        floats(cols.div_ceil(BLOCK) * depth.div_ceil(BLOCK) * parts * BLOCK)
    }

    /// Rows `rows` of `weight` as columns: the product is x·Wᵀ.
    pub fn from_rows(_: Amx, weight: Stored<'_>, rows: Range<usize>, space: &'a mut [f32]) -> Self {
        assert!(rows.end <= weight.rows());
        let (cols, steps, parts) = (rows.len(), weight.width.div_ceil(BLOCK), weight.parts());
        let lines = lines(space, cols.div_ceil(BLOCK) * steps * parts * BLOCK);
        // SAFETY: an Amx exists only where the processor has these features.
        unsafe {
            match weight.dtype {
                Dtype::BF16 => pack_rows::<1>(lines, weight, rows),
                Dtype::F16 => pack_rows::<2>(lines, weight, rows),
                Dtype::F32 => pack_rows::<3>(lines, weight, rows),
            }
        }
        Self { lines, cols, steps, parts }
    }

    /// Columns `cols` of `weight`: the product is x·W.
    pub fn from_columns(_: Amx, weight: Stored<'_>, cols: Range<usize>, space: &'a mut [f32]) -> Self {
        assert!(cols.end <= weight.width);
        let (steps, parts) = (weight.rows().div_ceil(BLOCK), weight.parts());
        let lines = lines(space, cols.len().div_ceil(BLOCK) * steps * parts * BLOCK);
        // SAFETY: an Amx exists only where the processor has these features.
        unsafe {
            match weight.dtype {
                Dtype::BF16 => pack_columns::<1>(lines, weight, cols.clone()),
                Dtype::F16 => pack_columns::<2>(lines, weight, cols.clone()),
                Dtype::F32 => pack_columns::<3>(lines, weight, cols.clone()),
            }
        }
        Self { lines, cols: cols.len(), steps, parts }
    }
}

/// Tile row `pair` holds element pairs of 16 weight rows: a transpose of 32-bit words.
#[target_feature(enable = "avx512f,avx512bw")]
fn pack_rows<const P: usize>(lines: &mut [Line], weight: Stored<'_>, rows: Range<usize>) {
    let steps = weight.width.div_ceil(BLOCK);
    for (block, lines) in lines.chunks_exact_mut((steps * P * BLOCK).max(1)).enumerate() {
        for (step, lines) in lines.chunks_exact_mut(P * BLOCK).enumerate() {
            let start = step * BLOCK;
            let len = BLOCK.min(weight.width - start);
            for half in 0..2 {
                let mut words = [[_mm512_setzero_si512(); 16]; P];
                let first = rows.start + block * BLOCK + half * 16;
                for (column, row) in (first..rows.end).take(16).enumerate() {
                    // SAFETY: `at` is inside the weight for `len` elements, and the mask covers no others.
                    let parts = unsafe { load::<P>(weight.at(row, start, len), mask(len)) };
                    for (words, value) in words.iter_mut().zip(parts) {
                        words[column] = value;
                    }
                }
                for (part, words) in words.into_iter().enumerate() {
                    let lines = &mut lines[part * BLOCK + half * 16..][..16];
                    for (line, value) in lines.iter_mut().zip(transpose(words)) {
                        write(line, value);
                    }
                }
            }
        }
    }
}

/// Tile row `pair` holds two weight rows, interleaved element by element.
#[target_feature(enable = "avx512f,avx512bw")]
fn pack_columns<const P: usize>(lines: &mut [Line], weight: Stored<'_>, cols: Range<usize>) {
    let rows = weight.rows();
    let steps = rows.div_ceil(BLOCK);
    let low: [u16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * 32) as u16);
    let high = low.map(|i| i + 16);
    // SAFETY: both arrays are 64 readable bytes.
    let (low, high) =
        unsafe { (_mm512_loadu_si512(low.as_ptr().cast()), _mm512_loadu_si512(high.as_ptr().cast())) };
    for (step, start) in (0..rows).step_by(BLOCK).enumerate() {
        for (block, first) in cols.clone().step_by(BLOCK).enumerate() {
            let len = BLOCK.min(cols.end - first);
            let lines = &mut lines[(block * steps + step) * P * BLOCK..][..P * BLOCK];
            let row = |row: usize| {
                if row < rows {
                    // SAFETY: `at` is inside the weight for `len` elements, and the mask covers no others.
                    unsafe { load::<P>(weight.at(row, first, len), mask(len)) }
                } else {
                    [_mm512_setzero_si512(); P]
                }
            };
            for pair in 0..16 {
                let (even, odd) = (row(start + 2 * pair), row(start + 2 * pair + 1));
                for part in 0..P {
                    let lines = &mut lines[part * BLOCK..][..BLOCK];
                    write(&mut lines[pair], _mm512_permutex2var_epi16(even[part], low, odd[part]));
                    write(&mut lines[16 + pair], _mm512_permutex2var_epi16(even[part], high, odd[part]));
                }
            }
        }
    }
}

/// The bf16 parts of up to 32 stored elements, zero where the mask is: 1 part means that they are bf16, 2
/// float16 and 3 float32.
///
/// # Safety
/// The elements that the mask selects must be readable.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn load<const P: usize>(from: *const u8, mask: u32) -> [__m512i; P] {
    let mut parts = [_mm512_setzero_si512(); P];
    // SAFETY: masked loads touch only what the mask selects, which the caller vouches for. The second half of
    // the float32 elements starts inside them or one past their end; wrapping arithmetic allows for more.
    unsafe {
        let [low, high] = match P {
            1 => {
                parts[0] = _mm512_maskz_loadu_epi16(mask, from.cast());
                return parts;
            }
            2 => {
                let halves = _mm512_maskz_loadu_epi16(mask, from.cast());
                [_mm512_castsi512_si256(halves), _mm512_extracti64x4_epi64::<1>(halves)]
                    .map(|half| _mm512_cvtph_ps(half))
            }
            _ => [
                _mm512_maskz_loadu_ps(mask as u16, from.cast()),
                _mm512_maskz_loadu_ps((mask >> 16) as u16, from.wrapping_add(64).cast()),
            ],
        };
        split(&mut parts, low, high);
    }
    parts
}

/// Each part is the upper 16 bits of what is left, the rest is exact. Truncation and not rounding, because
/// the largest floats would round to infinity.
#[target_feature(enable = "avx512f,avx512bw")]
fn split<const P: usize>(parts: &mut [__m512i; P], low: __m512, high: __m512) {
    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    // Word 2i + 1 of the two vectors, seen as one.
    let odd: [u16; 32] = std::array::from_fn(|i| (2 * i + 1) as u16);
    // SAFETY: the array is 64 readable bytes.
    let odd = unsafe { _mm512_loadu_si512(odd.as_ptr().cast()) };
    let mut left = [low, high];
    for part in parts {
        *part = _mm512_permutex2var_epi16(_mm512_castps_si512(left[0]), odd, _mm512_castps_si512(left[1]));
        left = left.map(|x| {
            let taken = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), upper));
            // Not where all is taken: ∞ − ∞ would make NaN of an infinity. A NaN differs from itself.
            let rest = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(x, taken);
            _mm512_maskz_sub_ps(rest, x, taken)
        });
    }
}

/// The transpose of a 16 × 16 matrix of 32-bit words.
#[target_feature(enable = "avx512f")]
fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
    let mut a = rows;
    for i in 0..8 {
        a[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        a[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    // Register 4i + j now gets, in each quarter q, column 4q + j of rows 4i to 4i + 3.
    let mut b = a;
    for i in 0..4 {
        for j in 0..2 {
            b[4 * i + 2 * j] = _mm512_unpacklo_epi64(a[4 * i + j], a[4 * i + j + 2]);
            b[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(a[4 * i + j], a[4 * i + j + 2]);
        }
    }
    // The rest is a transpose of quarters: registers j, 4 + j, 8 + j, 12 + j hold a 4 × 4 matrix of them.
    let mut out = b;
    for j in 0..4 {
        let low = _mm512_shuffle_i32x4::<0x88>(b[j], b[4 + j]);
        let high = _mm512_shuffle_i32x4::<0xdd>(b[j], b[4 + j]);
        let low2 = _mm512_shuffle_i32x4::<0x88>(b[8 + j], b[12 + j]);
        let high2 = _mm512_shuffle_i32x4::<0xdd>(b[8 + j], b[12 + j]);
        out[j] = _mm512_shuffle_i32x4::<0x88>(low, low2);
        out[8 + j] = _mm512_shuffle_i32x4::<0xdd>(low, low2);
        out[4 + j] = _mm512_shuffle_i32x4::<0x88>(high, high2);
        out[12 + j] = _mm512_shuffle_i32x4::<0xdd>(high, high2);
    }
    out
}

/// The tile registers set up for this thread: 8 tiles of 16 rows of 64 bytes. Dropping it puts them back to
/// their initial state, so that the kernel need not save 8 KiB at each switch of threads.
struct Tiles;

impl Tiles {
    fn new(_: &Left<'_>) -> Self {
        #[repr(C, align(64))]
        struct Config {
            palette: u8,
            start_row: u8,
            reserved: [u8; 14],
            row_bytes: [u16; 16],
            rows: [u8; 16],
        }
        let mut config =
            Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.row_bytes[..8].fill(64);
        config.rows[..8].fill(16);
        // SAFETY: a Left exists only where the process may use tiles; the configuration is a valid one.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly, preserves_flags)) };
        Self
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: there were tiles to configure, so there are tiles to release.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}

/// Sums of a block, row-major `[32, 32]`.
#[repr(C, align(64))]
struct Sums([f32; BLOCK * BLOCK]);

/// dst = left·right, or dst += left·right when `add`; row-major `[rows, cols]` with rows `row_stride` apart.
///
/// # Safety
/// These elements of `dst` must be readable and writable by this thread alone.
pub unsafe fn multiply(left: &Left<'_>, right: &Right<'_>, dst: *mut f32, row_stride: usize, add: bool) {
    assert_eq!(left.steps, right.steps, "depths");
    let tiles = Tiles::new(left);
    let mut sums = Sums([0.0; BLOCK * BLOCK]);
    for start in (0..left.steps).step_by(RUN) {
        let steps = RUN.min(left.steps - start);
        for row in (0..left.rows).step_by(BLOCK) {
            let a = &left.lines[(row * left.steps + start * BLOCK) * PARTS..][..steps * PARTS * BLOCK];
            let next = a.as_ptr().wrapping_add(left.steps * PARTS * BLOCK);
            for col in (0..right.cols).step_by(BLOCK) {
                let b = (col * right.steps + start * BLOCK) * right.parts;
                let b = &right.lines[b..][..steps * right.parts * BLOCK];
                block(
                    &tiles,
                    a,
                    b,
                    right.parts,
                    steps,
                    &mut sums,
                    next.wrapping_add(col / BLOCK * steps * 12),
                );
                let (rows, cols) = (BLOCK.min(left.rows - row), BLOCK.min(right.cols - col));
                // SAFETY: the block's rows and columns lie inside dst; the features exist where a Left does.
                unsafe {
                    store(&sums, dst.add(row * row_stride + col), row_stride, rows, cols, add || start > 0)
                };
            }
        }
    }
    drop(tiles);
}

/// Writes or adds the part of a block that is not padding.
///
/// # Safety
/// dst must be readable and writable, `[rows, cols]` with rows `row_stride` apart; rows and cols at most 32.
#[target_feature(enable = "avx512f")]
unsafe fn store(sums: &Sums, dst: *mut f32, row_stride: usize, rows: usize, cols: usize, add: bool) {
    let columns = mask(cols);
    for (row, sums) in sums.0.chunks_exact(BLOCK).take(rows).enumerate() {
        for half in 0..2 {
            let columns = (columns >> (16 * half)) as u16;
            // SAFETY: masked accesses touch only the given columns; the pointer to the second half may lie
            // beyond them and is then not used.
            unsafe {
                let dst = dst.add(row * row_stride).wrapping_add(16 * half);
                let mut value = _mm512_loadu_ps(sums[16 * half..][..16].as_ptr());
                if add {
                    value = _mm512_add_ps(_mm512_maskz_loadu_ps(columns, dst), value);
                }
                _mm512_mask_storeu_ps(dst, columns, value);
            }
        }
    }
}

/// The four tile products of part `$a` of the left block and the part of the right block in tiles 6 and 7.
macro_rules! product {
    ($a:literal) => {
        concat!(
            "tileloadd tmm4, [{a} + {line} + 2048*",
            $a,
            "]\n",
            "tileloadd tmm5, [{a} + {line} + 2048*",
            $a,
            " + 1024]\n",
            "tdpbf16ps tmm0, tmm4, tmm6\n",
            "tdpbf16ps tmm1, tmm4, tmm7\n",
            "tdpbf16ps tmm2, tmm5, tmm6\n",
            "tdpbf16ps tmm3, tmm5, tmm7\n",
        )
    };
}

/// Loads part `$b` of the right block into tiles 6 and 7.
macro_rules! right {
    ($b:literal) => {
        concat!(
            "tileloadd tmm6, [{b} + {line} + 2048*",
            $b,
            "]\n",
            "tileloadd tmm7, [{b} + {line} + 2048*",
            $b,
            " + 1024]\n",
        )
    };
}

/// Runs the given instructions for each step of depth on zeroed sums, and stores the sums.
macro_rules! run {
    ($a:ident, $b:ident, $steps:ident, $parts:literal, $sums:ident, $next:ident, $($step:expr),+) => {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            $($step,)+
            "prefetcht1 [{next}]", "prefetcht1 [{next} + 64]", "prefetcht1 [{next} + 128]", "prefetcht1 [{next} + 192]",
            "prefetcht1 [{next} + 256]", "prefetcht1 [{next} + 320]", "prefetcht1 [{next} + 384]", "prefetcht1 [{next} + 448]",
            "prefetcht1 [{next} + 512]", "prefetcht1 [{next} + 576]", "prefetcht1 [{next} + 640]", "prefetcht1 [{next} + 704]",
            "add {next}, 768",
            "add {a}, 3*2048",
            concat!("add {b}, ", $parts, "*2048"),
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {row}], tmm0",
            "tilestored [{sums} + {row} + 64], tmm1",
            "tilestored [{sums} + {row} + 2048], tmm2",
            "tilestored [{sums} + {row} + 2048 + 64], tmm3",
            a = inout(reg) $a.as_ptr() => _,
            b = inout(reg) $b.as_ptr() => _,
            steps = inout(reg) $steps => _,
            sums = in(reg) $sums.0.as_mut_ptr(),
            next = inout(reg) $next => _,
            line = in(reg) 64usize,
            row = in(reg) 128usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

/// The sums of a block over `steps` steps of depth.
fn block(_: &Tiles, a: &[Line], b: &[Line], parts: usize, steps: usize, sums: &mut Sums, next: *const Line) {
    assert!(steps > 0 && a.len() == steps * PARTS * BLOCK && b.len() == steps * parts * BLOCK);
    // SAFETY: the tiles are configured; each step reads 3·2 tiles of 16 lines of the left block and `parts`·2
    // of the right one, which are there; the sums are 32 rows of 128 bytes. Tile registers are used by
    // nothing else.
    unsafe {
        match parts {
            1 => run!(a, b, steps, "1", sums, next, right!("0"), product!("0"), product!("1"), product!("2")),
            2 => run!(
                a,
                b,
                steps,
                "2",
                sums,
                next,
                right!("0"),
                product!("0"),
                product!("1"),
                product!("2"),
                right!("1"),
                product!("0"),
                product!("1")
            ),
            _ => run!(
                a,
                b,
                steps,
                "3",
                sums,
                next,
                right!("0"),
                product!("0"),
                product!("1"),
                product!("2"),
                right!("1"),
                product!("0"),
                product!("1"),
                right!("2"),
                product!("0")
            ),
        }
    }
}
