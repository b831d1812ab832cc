//! Cases of `hopper.cuh`: the copy engine, its barriers, and products of a warpgroup.

use gradlens::backend::cuda::Buf;
use gradlens::backend::cuda::launch::{TensorMap, Value};
use gradlens::backend::cuda::tensor_map::Swizzle;
use gradlens::error::Result;
use half::bf16;

use super::super::machine::Machine;
use super::common::{bf16_bits, integers};
use super::{At, Case, bits, floats, pair, upload};

pub const FILE: &str = "wrappers_sm90.cu";

/// Elements of a box's row, which is 128 bytes.
const BOX_WIDTH: usize = 64;
/// Rows of the boxes of `copy_boxes` and `pass_through_ring`.
const BOX_ROWS: usize = 16;

/// Whether the device has these instructions.
pub fn runs_on(machine: &Machine) -> bool {
    machine.cuda.device.info.compute_capability == (9, 0)
}

pub fn cases() -> Vec<Case> {
    let mut all = vec![copy_boxes(), pass_through_ring(), name_operands()];
    all.extend(PRODUCTS.map(product));
    all
}

/// A matrix of 16-bit elements on the device, and a map of it.
fn map(machine: &Machine, elements: &[u16], width: usize, box_rows: usize) -> Result<(Buf<bf16>, TensorMap)> {
    let elements: Vec<bf16> = elements.iter().map(|bits| bf16::from_bits(*bits)).collect();
    let matrix = Buf::from_host(&machine.cuda.device.memory, &elements, width)?;
    let map = TensorMap::of(&matrix, box_rows as u32, Swizzle::B128)?;
    Ok((matrix, map))
}

// ---- copies ------------------------------------------------------------------------------------------

/// A box of 128-byte rows as it lies in shared memory: row r starts at 128 r, and the 16-byte chunk c of it is
/// at chunk c ^ (r & 7) of that row. `element`: (row, column) of the box.
fn swizzled(rows: usize, element: impl Fn(usize, usize) -> u16) -> Vec<u32> {
    let word = |i: usize| {
        let (row, chunk, inside) = (i / 32, i / 4 % 8, i % 4);
        let column = (chunk ^ (row & 7)) * 8 + inside * 2;
        pair(element(row, column), element(row, column + 1))
    };
    (0..rows * 32).map(word).collect()
}

const ROWS: usize = 20;
const WIDTH: usize = 72;
/// (column, row) of the boxes' first elements in the matrix of `ROWS` x `WIDTH`.
const PLACES: [(i32, i32); 12] = [
    // All inside, on a box's bounds and off them.
    (0, 0),
    (8, 4),
    (5, 3),
    // Past the right, past the end, past both, with one column or row left.
    (64, 0),
    (0, 16),
    (71, 19),
    // Before the left, before the start, before both.
    (-3, 0),
    (0, -2),
    (-63, -15),
    // Nothing inside.
    (72, 0),
    (-64, 7),
    (0, -16),
];

/// Not zero anywhere.
fn numbered(row: usize, column: usize) -> u16 {
    (row * WIDTH + column + 1) as u16
}

/// What is outside of the matrix is zero, and its bytes count for the barrier, or the wait would not end.
fn copy_boxes() -> Case {
    let matrix: Vec<u16> = (0..ROWS * WIDTH).map(|i| numbered(i / WIDTH, i % WIDTH)).collect();
    let boxes = PLACES.iter().flat_map(|(first_column, first_row)| {
        swizzled(BOX_ROWS, |row, column| {
            let row = usize::try_from(first_row + row as i32).ok().filter(|row| *row < ROWS);
            let column = usize::try_from(first_column + column as i32).ok().filter(|column| *column < WIDTH);
            row.zip(column).map_or(0, |(row, column)| numbered(row, column))
        })
    });
    let expected: Vec<u32> = boxes.collect();
    let shared_bytes = (BOX_ROWS * 128 + 8) as u32;
    Case {
        name: "copy_box",
        at: At { file: FILE, entry: "copy_boxes", blocks: PLACES.len(), threads: 128, shared_bytes },
        run: Box::new(move |machine, at| {
            let (_matrix, map) = map(machine, &matrix, WIDTH, BOX_ROWS)?;
            let places: Vec<i32> = PLACES.iter().flat_map(|(column, row)| [*column, *row]).collect();
            let places = upload(machine, &places)?;
            at.launch(machine, PLACES.len() * BOX_ROWS * 32, |out| {
                vec![
                    ("const TensorMap map", Value::from(map)),
                    ("const int* places", Value::from(&places)),
                    ("u32* out", out),
                ]
            })
        }),
        expected,
    }
}

/// Every box arrives, in order, however often a slot is used; the ring of two slots is gone through twice and
/// a half.
fn pass_through_ring() -> Case {
    const BOXES: usize = 5;
    let element = |row: usize, column: usize| (row * BOX_WIDTH + column + 1) as u16;
    let matrix: Vec<u16> =
        (0..BOXES * BOX_ROWS * BOX_WIDTH).map(|i| element(i / BOX_WIDTH, i % BOX_WIDTH)).collect();
    let shared_bytes = (2 * BOX_ROWS * 128 + 4 * 8) as u32;
    Case {
        name: "barriers",
        at: At { file: FILE, entry: "pass_through_ring", blocks: 1, threads: 384, shared_bytes },
        run: Box::new(move |machine, at| {
            let (_matrix, map) = map(machine, &matrix, BOX_WIDTH, BOX_ROWS)?;
            at.launch(machine, BOXES * BOX_ROWS * 32, |out| {
                let boxes = Value::from(BOXES as i32);
                vec![("const TensorMap map", Value::from(map)), ("u32* out", out), ("int boxes", boxes)]
            })
        }),
        // Boxes are two times 8 rows: as one box of all of them.
        expected: swizzled(BOXES * BOX_ROWS, element),
    }
}

// ---- products ----------------------------------------------------------------------------------------

/// The matrix descriptor: bits 0-13 address / 16, 16-29 leading offset / 16, 32-45 stride offset / 16, 49-51
/// base offset (0: atoms start on multiples of 1024), 62-63 the swizzle (1: 128 bytes). K-major with a swizzle
/// the leading offset is not used (1 by custom), the stride leads to the next 8 rows; MN-major the leading
/// offset leads to the next 64 of the output, the stride to the next 8 of the depth.
fn name_operands() -> Case {
    const OUTPUT_STEP: u64 = 8192;
    let addresses: Vec<u32> = [0, 1024, 8192 + 32, 49152, 231_424].to_vec();
    let descriptor = |address: u32, leading: u64| {
        let (swizzle, stride) = (1_u64, 1024 / 16);
        let bits = swizzle << 62 | stride << 32 | leading << 16 | u64::from(address / 16);
        [bits as u32, (bits >> 32) as u32]
    };
    let both = |address: u32| [descriptor(address, 1), descriptor(address, OUTPUT_STEP / 16)].concat();
    Case {
        name: "operands",
        expected: addresses.iter().flat_map(|address| both(*address)).collect(),
        at: At { file: FILE, entry: "name_operands", blocks: 1, threads: 32, shared_bytes: 0 },
        run: Box::new(move |machine, at| {
            let given = upload(machine, &addresses)?;
            at.launch(machine, addresses.len() * 4, |out| {
                vec![
                    ("const u32* addresses", Value::from(&given)),
                    ("u32* out", out),
                    ("int len", Value::from(addresses.len() as i32)),
                    ("int output_step", Value::from(OUTPUT_STEP as i32)),
                ]
            })
        }),
    }
}

#[derive(Clone, Copy)]
struct Product {
    name: &'static str,
    entry: &'static str,
    columns: usize,
    /// B lies in memory as [depth, columns], not as [columns, depth].
    transposed: bool,
    accumulate: bool,
}

const PRODUCTS: [Product; 8] = {
    const fn of(
        name: &'static str,
        entry: &'static str,
        columns: usize,
        transposed: bool,
        accumulate: bool,
    ) -> Product {
        Product { name, entry, columns, transposed, accumulate }
    }
    [
        of("wgmma_128_overwrites", "product_128", 128, false, false),
        of("wgmma_128_adds", "product_128", 128, false, true),
        of("wgmma_128_transposed_overwrites", "product_128_transposed", 128, true, false),
        of("wgmma_128_transposed_adds", "product_128_transposed", 128, true, true),
        of("wgmma_256_overwrites", "product_256", 256, false, false),
        of("wgmma_256_adds", "product_256", 256, false, true),
        of("wgmma_256_transposed_overwrites", "product_256_transposed", 256, true, false),
        of("wgmma_256_transposed_adds", "product_256_transposed", 256, true, true),
    ]
};

/// wgmma.m64nNk16, four steps of the depth. Accumulator i of a thread is of row 16 warp + lane / 4, and 8 more
/// where i % 4 is 2 or 3, and of column 8 (i / 4) + 2 (lane % 4) + i % 2. Without accumulation what was there
/// does not matter: NaNs.
fn product(Product { name, entry, columns, transposed, accumulate }: Product) -> Case {
    const DEPTH: usize = 64;
    const THREADS: usize = 128;
    let count = columns / 2;
    let (a, b) = (integers(6, 64 * DEPTH), integers(7, columns * DEPTH));
    let started = integers(8, THREADS * count);
    let place = move |i: usize| {
        let (thread, i) = (i / count, i % count);
        let (warp, lane) = (thread / 32, thread % 32);
        (16 * warp + lane / 4 + i % 4 / 2 * 8, i / 4 * 8 + lane % 4 * 2 + i % 2)
    };
    let element = |i: usize| {
        let (row, column) = place(i);
        let sum: f32 = (0..DEPTH).map(|k| a[row * DEPTH + k] * b[column * DEPTH + k]).sum();
        if accumulate { started[i] + sum } else { sum }
    };
    let expected = bits((0..THREADS * count).map(element));
    let start = if accumulate { started } else { vec![f32::NAN; THREADS * count] };
    let a: Vec<u16> = a.into_iter().map(bf16_bits).collect();
    let (b_width, b_box) = if transposed { (columns, DEPTH) } else { (DEPTH, columns) };
    let b_at = |i: usize| if transposed { i % columns * DEPTH + i / columns } else { i };
    let b: Vec<u16> = (0..columns * DEPTH).map(|i| bf16_bits(b[b_at(i)])).collect();
    let shared_bytes = ((64 + columns) * 128 + 8) as u32;
    Case {
        name,
        expected,
        at: At { file: FILE, entry, blocks: 1, threads: THREADS as u32, shared_bytes },
        run: Box::new(move |machine, at| {
            let (_a, a_map) = map(machine, &a, DEPTH, 64)?;
            let (_b, b_map) = map(machine, &b, b_width, b_box)?;
            let start = upload(machine, &start)?;
            at.launch(machine, start.width(), |out| {
                vec![
                    ("const TensorMap a", Value::from(a_map)),
                    ("const TensorMap b", Value::from(b_map)),
                    ("const float* start", Value::from(&start)),
                    ("float* out", floats(out)),
                    ("int accumulate", Value::from(i32::from(accumulate))),
                ]
            })
        }),
    }
}
