//! Matrix products as accurate as float32 ones, on the bf16 tile unit of recent Intel processors (AMX).
//!
//! A float32 is the exact sum of three bf16 parts of 8 bits each, down to the underflow threshold. The tile
//! unit multiplies bf16 exactly and adds in float32, so with a bf16 weight three bf16 products make one
//! float32 product, and still take a third of the time of float32 multiply-adds. A float16 weight has two
//! parts and a float32 weight three; the products of parts i and j (from 0) are left out from i + j = 3 on:
//! of a term they are 2⁻²³ on average and 2⁻²¹ at most, which a sum of many terms does not notice.
//!
//! An output element depends on its row of the left operand, its column of the right one and the depth, not
//! on its place in a block, on the other rows or on threads: every block is computed in full by the same
//! instructions. The unit takes subnormal parts for zero and flushes subnormal sums to zero, so products are
//! right to about 2⁻¹²⁶ absolutely. An infinite or NaN element of the left operand makes its row infinite or
//! NaN; an infinite or NaN weight makes its column NaN.

mod pack;
#[cfg(test)]
mod tests;

use std::arch::asm;
use std::arch::x86_64::*;
use std::sync::OnceLock;

pub use pack::{Left, Right, Stored};

/// Rows, columns and depth of a block: two tiles of 16 × 16 sums a side; a tile row has 32 bf16.
const BLOCK: usize = 32;
/// bf16 parts of a float32.
const PARTS: usize = 3;
/// Steps of depth between two additions to the destination. Few enough that a block of left rows and 256
/// columns stay in the cache, and that a sum of thousands becomes a sum of a few sums, which rounds less. A
/// constant: the rounding must depend on the depth alone.
const RUN: usize = 32;

/// One row of a tile, a cache line: a tile load whose rows straddle two lines takes twice as long.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([u32; 16]);

/// Proof that this process may run the instructions used here.
#[derive(Clone, Copy, Debug)]
pub struct Amx(());

impl Amx {
    /// `None` where the processor lacks them or the operating system forbids them.
    pub fn get() -> Option<Self> {
        static ALLOWED: OnceLock<bool> = OnceLock::new();
        ALLOWED.get_or_init(allowed).then_some(Self(()))
    }
}

/// Asks the processor, then the kernel: tile registers are off until a process requests them, once for all
/// its threads. The kernel grants this only where it has enabled the registers and can save them.
fn allowed() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const TILE_DATA: u64 = 18;
    if !(is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw")) {
        return false;
    }
    #[allow(unused_unsafe, reason = "a safe function in newer compilers")]
    // SAFETY: every x86-64 processor has CPUID, and every one with AVX-512 has leaf 7.
    let features = unsafe { __cpuid_count(7, 0).edx };
    let (bf16, tile) = (features >> 22 & 1, features >> 24 & 1);
    if bf16 & tile == 0 {
        return false;
    }
    let mut result = ARCH_PRCTL;
    // SAFETY: the call touches no memory of this process; a kernel that does not know it returns an error.
    // The instruction overwrites rax, rcx and r11.
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

/// The tile registers of this thread, set up as 8 tiles of 16 rows of 64 bytes. Dropping it puts them back
/// into their initial state, so that the kernel need not save 8 KiB whenever it switches threads.
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
        // SAFETY: a Left is made from an Amx, so tiles are allowed; the 64 bytes are a valid configuration.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly, preserves_flags)) };
        Self
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: tiles could be configured, so they can be released.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}

/// Sums of a block, row-major [32, 32].
#[repr(C, align(64))]
struct Sums([f32; BLOCK * BLOCK]);

/// dst = left·right, or dst += left·right when `add`. dst is row-major with the given `shape`, [rows, cols],
/// and rows `row_stride` elements apart. Runs on the calling thread.
///
/// # Safety
/// These elements of dst must be readable and writable, by this thread alone.
pub unsafe fn multiply(
    left: &Left<'_>,
    right: &Right<'_>,
    dst: *mut f32,
    shape: (usize, usize),
    row_stride: usize,
    add: bool,
) {
    assert_eq!(left.depth, right.depth, "depth of the two operands");
    assert_eq!(shape, (left.rows, right.cols), "shape of the product");
    let tiles = Tiles::new(left);
    let all_steps = left.depth.div_ceil(BLOCK);
    let mut sums = Sums([0.0; BLOCK * BLOCK]);
    for start in (0..all_steps).step_by(RUN) {
        let steps = RUN.min(all_steps - start);
        let add = add || start > 0;
        for row in (0..left.rows).step_by(BLOCK) {
            let a = (row * all_steps + start * BLOCK) * PARTS;
            let a = &left.lines[a..][..steps * PARTS * BLOCK];
            let mut next = a.as_ptr().wrapping_add(all_steps * PARTS * BLOCK);
            for col in (0..right.cols).step_by(BLOCK) {
                let b = (col * all_steps + start * BLOCK) * right.parts;
                let b = &right.lines[b..][..steps * right.parts * BLOCK];
                let (rows, cols) = (BLOCK.min(left.rows - row), BLOCK.min(right.cols - col));
                // SAFETY: [rows, cols] from here lies inside dst. If that is a whole block, it takes the
                // sums directly, else they go through memory that has the size of a block. The features that
                // `store` needs are there, since a Left is.
                unsafe {
                    let dst = dst.add(row * row_stride + col);
                    // Asks for the destination long before the sums are there: its rows are far apart in
                    // memory, and the stores would wait for 64 lines.
                    for row in 0..rows {
                        let dst = dst.add(row * row_stride).cast::<i8>();
                        _mm_prefetch::<_MM_HINT_ET0>(dst);
                        _mm_prefetch::<_MM_HINT_ET0>(dst.wrapping_add(size_of::<Line>()));
                    }
                    if rows == BLOCK && cols == BLOCK && !add {
                        block(&tiles, a, b, right.parts, steps, next, dst, row_stride);
                    } else {
                        let to = sums.0.as_mut_ptr();
                        block(&tiles, a, b, right.parts, steps, next, to, BLOCK);
                        store(&sums, dst, row_stride, rows, cols, add);
                    }
                }
                next = next.wrapping_add(steps * FETCHED);
            }
        }
    }
    drop(tiles);
}

/// Writes or adds the part of a block that is not padding.
///
/// # Safety
/// dst must be readable and writable, [rows, cols] with rows `row_stride` apart; rows and cols at most 32.
#[target_feature(enable = "avx512f")]
unsafe fn store(sums: &Sums, dst: *mut f32, row_stride: usize, rows: usize, cols: usize, add: bool) {
    for (row, sums) in sums.0.chunks_exact(BLOCK).take(rows).enumerate() {
        for (half, sums) in sums.chunks_exact(16).enumerate() {
            let columns = (mask(cols) >> (16 * half)) as u16;
            // SAFETY: masked accesses touch only the given columns. The pointer to the second half may lie
            // outside dst, but then the mask is empty.
            unsafe {
                let dst = dst.add(row * row_stride).wrapping_add(16 * half);
                let mut value = _mm512_loadu_ps(sums.as_ptr());
                if add {
                    value = _mm512_add_ps(_mm512_maskz_loadu_ps(columns, dst), value);
                }
                _mm512_mask_storeu_ps(dst, columns, value);
            }
        }
    }
}

/// Bits 0 to `count` − 1.
fn mask(count: usize) -> u32 {
    ((1u64 << count) - 1) as u32
}

/// Lines of the next block of left rows that are fetched in each step, while the present one is multiplied
/// with up to 8 blocks of columns: 8·12 lines are one step's worth.
const FETCHED: usize = 12;

/// Loads part `$b` of the right block, two tiles side by side, into tiles 6 and 7.
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

/// Adds to tiles 0 to 3 the products of part `$a` of the left block, one tile above the other, and the part
/// of the right block in tiles 6 and 7. Four sums at a time hide the latency of one.
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

/// The product of a block over `steps` steps of depth, stored to `to`. `a` has 3 parts of each step, `b` has
/// `parts`. `next` is where the next left block is expected to be.
///
/// # Safety
/// `to` must be writable, [32, 32] with rows `stride` apart.
unsafe fn block(
    _: &Tiles,
    a: &[Line],
    b: &[Line],
    parts: usize,
    steps: usize,
    next: *const Line,
    to: *mut f32,
    stride: usize,
) {
    assert!(steps > 0 && a.len() == steps * PARTS * BLOCK && b.len() == steps * parts * BLOCK);
    macro_rules! run {
        ($parts:literal, $($step:expr),+) => {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                $($step,)+
                "prefetcht1 [{next}]",
                "prefetcht1 [{next} + 64]",
                "prefetcht1 [{next} + 64*2]",
                "prefetcht1 [{next} + 64*3]",
                "prefetcht1 [{next} + 64*4]",
                "prefetcht1 [{next} + 64*5]",
                "prefetcht1 [{next} + 64*6]",
                "prefetcht1 [{next} + 64*7]",
                "prefetcht1 [{next} + 64*8]",
                "prefetcht1 [{next} + 64*9]",
                "prefetcht1 [{next} + 64*10]",
                "prefetcht1 [{next} + 64*11]",
                "add {next}, 64*12",
                "add {a}, 2048*3",
                concat!("add {b}, 2048*", $parts),
                "dec {steps}",
                "jnz 2b",
                "tilestored [{upper} + {row}], tmm0",
                "tilestored [{upper} + {row} + 64], tmm1",
                "tilestored [{lower} + {row}], tmm2",
                "tilestored [{lower} + {row} + 64], tmm3",
                a = inout(reg) a.as_ptr() => _,
                b = inout(reg) b.as_ptr() => _,
                steps = inout(reg) steps => _,
                next = inout(reg) next => _,
                upper = in(reg) to,
                lower = in(reg) to.add(16 * stride),
                line = in(reg) size_of::<Line>(),
                row = in(reg) stride * size_of::<f32>(),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            )
        };
    }
    // SAFETY: the tiles are configured. Each step reads 3 and `parts` pairs of tiles of 16 lines, which the
    // slices have (asserted above), and the results go to rows 0..16 and 16..32 of `to`. Fetching ahead is
    // a hint and cannot fault.
    unsafe {
        match parts {
            1 => run!("1", right!("0"), product!("0"), product!("1"), product!("2")),
            2 => run!(
                "2",
                right!("0"),
                product!("0"),
                product!("1"),
                product!("2"),
                right!("1"),
                product!("0"),
                product!("1")
            ),
            _ => run!(
                "3",
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
