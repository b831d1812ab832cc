//! Cases of `common.cuh`: roundings, sums, copies and the tensor cores of compute capability 8.0.

use gradlens::backend::cuda::launch::Value;
use half::bf16;

use super::super::machine::Random;
use super::{At, Case, bits, floats, pair, paired, upload};

pub const FILE: &str = "wrappers.cu";

fn at(entry: &'static str, blocks: usize, threads: u32) -> At {
    At { file: FILE, entry, blocks, threads, shared_bytes: 0 }
}

pub fn cases() -> Vec<Case> {
    vec![
        round_to_bf16(),
        pack_pairs(),
        widen_pairs(),
        approximate(),
        sums("warp_sum", "sum_of_warp", 64, 32),
        sums("block_sum_1", "sum_of_1_warp", 32, 32),
        sums("block_sum_8", "sum_of_8_warps", 256, 256),
        copy_part_of_16(),
        copy_words(),
        wait_for_groups(),
        load_matrices("ldmatrix_x4", "load_matrices_plain", false),
        load_matrices("ldmatrix_x4_trans", "load_matrices_trans", true),
        multiply_fragments(),
        gather_quads(),
    ]
}

/// Integers from −8 to 8.
pub fn integers(seed: u64, len: usize) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..len).map(|_| (random.uniform() * 17.0).floor() - 8.0).collect()
}

/// Of a number that bfloat16 holds.
pub fn bf16_bits(value: f32) -> u16 {
    let exact = bf16::from_f32(value);
    assert_eq!(exact.to_f32(), value);
    exact.to_bits()
}

// ---- bfloat16 ----------------------------------------------------------------------------------------

/// float32 in all the ways a rounding can go wrong. An even number of them.
fn hard_to_round() -> Vec<u32> {
    let mut all = vec![
        // Zeros, and numbers that need no rounding.
        0x0000_0000,
        0x8000_0000,
        0x3f80_0000,
        0xc2f7_0000,
        0x7f7f_0000,
        0x0080_0000,
        // Half way, below an even and below an odd number; one bit to either side.
        0x3f80_8000,
        0x3f81_8000,
        0x3f80_7fff,
        0x3f80_8001,
        0x3f81_7fff,
        0x3f81_8001,
        0xbf80_8000,
        0xbf81_8000,
        // Carries into the exponent.
        0x3fff_8000,
        0x3fff_7fff,
        0x3fff_ffff,
        0x007f_ffff,
        0x807f_8000,
        // Half way between the largest number and 2^128, to both sides, and the largest float32.
        0x7f7f_7fff,
        0x7f7f_8000,
        0x7f7f_8001,
        0x7f7f_ffff,
        0xff7f_7fff,
        0xff7f_8000,
        0xff7f_ffff,
        // Denormals, and what is half of the smallest.
        0x0000_0001,
        0x0000_7fff,
        0x0000_8000,
        0x0000_8001,
        0x0001_8000,
        0x0001_0000,
        0x8000_8001,
        0x8001_8000,
        // Infinities and NaNs: quiet and signalling, of either sign, also with nothing in the upper half.
        0x7f80_0000,
        0xff80_0000,
        0x7fc0_0000,
        0xffc0_0000,
        0x7f80_0001,
        0xff80_0001,
        0x7fff_ffff,
        0xffff_ffff,
        0x7fa5_a5a5,
        0x7f80_8000,
    ];
    let mut random = Random::new(1);
    all.extend((0..212).map(|_| {
        let [upper, lower] = [(); 2].map(|()| (random.uniform() * 65536.0) as u32);
        upper << 16 | lower
    }));
    assert!(all.len().is_multiple_of(2));
    all
}

/// The nearest bfloat16; half way, the one whose last bit is 0. A NaN becomes 0x7fff.
fn nearest_bf16(x: u32) -> u16 {
    let value = f64::from(f32::from_bits(x));
    if value.is_nan() {
        return 0x7fff;
    }
    if value.is_infinite() {
        return (x >> 16) as u16;
    }
    // The neighbours: toward zero, and away from it. What comes after the largest number counts as 2^128 and is
    // written as infinity.
    let toward = (x >> 16) as u16;
    let away = toward + 1;
    let magnitude = |bits: u16| match bits & 0x7fff {
        0x7f80 => 2_f64.powi(128),
        bits => f64::from(f32::from_bits(u32::from(bits) << 16)),
    };
    let (below, above) = (value.abs() - magnitude(toward), magnitude(away) - value.abs());
    match below.total_cmp(&above) {
        std::cmp::Ordering::Less => toward,
        std::cmp::Ordering::Greater => away,
        std::cmp::Ordering::Equal if toward.is_multiple_of(2) => toward,
        std::cmp::Ordering::Equal => away,
    }
}

fn round_to_bf16() -> Case {
    let x = hard_to_round();
    Case {
        name: "from_float_bf16",
        expected: x.iter().map(|x| u32::from(nearest_bf16(*x))).collect(),
        at: at("round_to_bf16", x.len().div_ceil(128), 128),
        run: Box::new(move |machine, at| {
            let given = upload(machine, &x)?;
            at.launch(machine, x.len(), |out| {
                let len = Value::from(x.len() as i32);
                vec![("const float* x", floats(Value::from(&given))), ("u32* out", out), ("int len", len)]
            })
        }),
    }
}

/// Where the PTX ISA says what the approximations give: 2^x and 1/x at the ends of the range, beyond, and at 0.
fn approximate() -> Case {
    let infinity = f32::INFINITY;
    let table = [
        (0.0, 1.0, infinity),
        (-0.0, 1.0, -infinity),
        (infinity, infinity, 0.0),
        (-infinity, 0.0, -0.0),
        (1000.0, infinity, 1e-3_f32),
        (-1000.0, 0.0, -1e-3_f32),
    ];
    // What is within the range is right to a unit or two: only the leading bits are compared.
    let leading = |word: u32| word >> 8 << 8;
    let x: Vec<f32> = table.iter().map(|(x, _, _)| *x).collect();
    Case {
        name: "approximate",
        expected: table
            .iter()
            .flat_map(|(_, power, reciprocal)| [power, reciprocal])
            .map(|v| leading(v.to_bits()))
            .collect(),
        at: at("approximate", 1, 128),
        run: Box::new(move |machine, at| {
            let given = upload(machine, &x)?;
            let found = at.launch(machine, 2 * x.len(), |out| {
                let len = Value::from(x.len() as i32);
                vec![("const float* x", floats(Value::from(&given))), ("u32* out", out), ("int len", len)]
            })?;
            Ok(found.into_iter().map(leading).collect())
        }),
    }
}

fn pack_pairs() -> Case {
    let x = hard_to_round();
    let packed = x.chunks(2).map(|x| pair(nearest_bf16(x[0]), nearest_bf16(x[1])));
    Case {
        name: "pack_bf16",
        expected: packed.collect(),
        at: at("pack_pairs", (x.len() / 2).div_ceil(128), 128),
        run: Box::new(move |machine, at| {
            let given = upload(machine, &x)?;
            at.launch(machine, x.len() / 2, |out| {
                let len = Value::from(x.len() as i32);
                vec![("const float* x", floats(Value::from(&given))), ("u32* out", out), ("int len", len)]
            })
        }),
    }
}

/// bfloat16 is the upper half of float32.
fn widen_pairs() -> Case {
    let pairs = hard_to_round();
    let halves = |pair: u32| [pair & 0xffff, pair >> 16, pair & 0xffff].map(|half| half << 16);
    Case {
        name: "low_high_to_float",
        expected: pairs.iter().flat_map(|pair| halves(*pair)).collect(),
        at: at("widen_pairs", pairs.len().div_ceil(128), 128),
        run: Box::new(move |machine, at| {
            let given = upload(machine, &pairs)?;
            at.launch(machine, pairs.len() * 3, |out| {
                let len = Value::from(pairs.len() as i32);
                vec![("const u32* pairs", Value::from(&given)), ("u32* out", out), ("int len", len)]
            })
        }),
    }
}

// ---- functions ---------------------------------------------------------------------------------------

// ---- sums --------------------------------------------------------------------------------------------

/// Every thread has the sum over its `team`.
fn sums(name: &'static str, entry: &'static str, threads: usize, team: usize) -> Case {
    let x = integers(2, threads);
    let sum = |thread: usize| x[thread / team * team..][..team].iter().sum::<f32>();
    Case {
        name,
        expected: bits((0..threads).map(sum)),
        at: at(entry, 1, threads as u32),
        run: Box::new(move |machine, at| {
            let given = upload(machine, &x)?;
            at.launch(machine, x.len(), |out| {
                vec![("const float* x", floats(Value::from(&given))), ("float* out", floats(out))]
            })
        }),
    }
}

// ---- copies ------------------------------------------------------------------------------------------

/// cp.async with a source size: that many bytes come from the source, the rest of the 16 becomes zero.
fn copy_part_of_16() -> Case {
    let source: Vec<u8> = (1..=255).chain([255]).collect();
    let copied = (0..=16).flat_map(|bytes| {
        let chunk = source.chunks(16).nth(16 - bytes).unwrap_or(&[]).to_vec();
        let mut copied = [0; 16];
        copied[..bytes].copy_from_slice(&chunk[..bytes]);
        copied
    });
    let copied: Vec<u8> = copied.collect();
    Case {
        name: "cp_async_16",
        expected: words(&copied),
        at: at("copy_part_of_16", 1, 32),
        run: Box::new(move |machine, at| {
            let given = upload(machine, &words(&source))?;
            at.launch(machine, 17 * 4, |out| {
                vec![("const u32* source", Value::from(&given)), ("u32* out", out)]
            })
        }),
    }
}

fn copy_words() -> Case {
    let source: Vec<u32> = (1..=32).collect();
    Case {
        name: "cp_async_4",
        expected: source.iter().rev().map(|word| if word % 2 == 1 { *word } else { 0 }).collect(),
        at: at("copy_words", 1, 32),
        run: Box::new(move |machine, at| {
            let given = upload(machine, &source)?;
            at.launch(machine, 32, |out| vec![("const u32* source", Value::from(&given)), ("u32* out", out)])
        }),
    }
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
}

fn wait_for_groups() -> Case {
    let source: Vec<u32> = (1..=3 * 32 * 4).collect();
    Case {
        name: "cp_async_wait",
        expected: source.clone(),
        at: at("wait_for_groups", 1, 32),
        run: Box::new(move |machine, at| {
            let given = upload(machine, &source)?;
            let len = source.len();
            at.launch(machine, len, |out| vec![("const u32* source", Value::from(&given)), ("u32* out", out)])
        }),
    }
}

// ---- matrices ----------------------------------------------------------------------------------------

/// ldmatrix.x4: lanes 8m..8m+7 name the rows of matrix m. Register m of a lane holds two neighbours of row
/// lane / 4, from column 2 (lane % 4) on; with .trans two neighbours of that column, which is a row then.
fn load_matrices(name: &'static str, entry: &'static str, trans: bool) -> Case {
    // Element c of row r in memory.
    let memory = |r: usize, c: usize| (r * 8 + c + 1) as u16;
    let element = |matrix: usize, row: usize, column: usize| {
        let lane = 8 * matrix + row;
        memory((5 * lane + 3) % 32, column)
    };
    let register = |lane: usize, matrix: usize| {
        let (row, column) = (lane / 4, lane % 4 * 2);
        match trans {
            false => pair(element(matrix, row, column), element(matrix, row, column + 1)),
            true => pair(element(matrix, column, row), element(matrix, column + 1, row)),
        }
    };
    let given: Vec<u16> = (0..256).map(|i| memory(i / 8, i % 8)).collect();
    Case {
        name,
        expected: (0..128).map(|i| register(i / 4, i % 4)).collect(),
        at: at(entry, 1, 32),
        run: Box::new(move |machine, at| {
            let given = upload(machine, &paired(&given))?;
            at.launch(machine, 128, |out| vec![("const u32* in", Value::from(&given)), ("u32* out", out)])
        }),
    }
}

/// mma.m16n8k16: of each fragment, the places of its elements. With group = lane / 4 and member = lane % 4,
///
/// - a0..a7 (row, k): row is group for i = 0, 1, 4, 5 and group + 8 for the others; k is 2 member + i % 2, and 8
///   more from a4 on.
/// - b0..b3 (k, column): k is 2 member + i % 2, and 8 more for b2 and b3; column is group.
/// - c0..c3 (row, column): row is group, and 8 more for c2 and c3; column is 2 member + i % 2.
fn multiply_fragments() -> Case {
    let (a, b, d) = (integers(3, 16 * 16), integers(4, 16 * 8), integers(5, 16 * 8));
    let [a_at, b_at, d_at] = [
        |lane: usize, i: usize| {
            let (group, member) = (lane / 4, lane % 4);
            let row = if matches!(i, 0 | 1 | 4 | 5) { group } else { group + 8 };
            (row, 2 * member + i % 2 + if i >= 4 { 8 } else { 0 })
        },
        |lane: usize, i: usize| {
            let (group, member) = (lane / 4, lane % 4);
            (2 * member + i % 2 + if i >= 2 { 8 } else { 0 }, group)
        },
        |lane: usize, i: usize| {
            let (group, member) = (lane / 4, lane % 4);
            (if i < 2 { group } else { group + 8 }, 2 * member + i % 2)
        },
    ];
    let product = |row: usize, column: usize| {
        d[row * 8 + column] + (0..16).map(|k| a[row * 16 + k] * b[k * 8 + column]).sum::<f32>()
    };
    let a_element = |(lane, i)| {
        let (row, k) = a_at(lane, i);
        bf16_bits(a[row * 16 + k])
    };
    let b_element = |(lane, i)| {
        let (k, column) = b_at(lane, i);
        bf16_bits(b[k * 8 + column])
    };
    let places = |count: usize| (0..32).flat_map(move |lane| (0..count).map(move |i| (lane, i)));
    let a_given: Vec<u16> = places(8).map(a_element).collect();
    let b_given: Vec<u16> = places(4).map(b_element).collect();
    let d_places: Vec<(usize, usize)> = places(4).map(|(lane, i)| d_at(lane, i)).collect();
    let d_given: Vec<f32> = d_places.iter().map(|(row, column)| d[row * 8 + column]).collect();
    Case {
        name: "mma_bf16",
        expected: bits(d_places.iter().map(|(row, column)| product(*row, *column))),
        at: at("multiply_fragments", 1, 32),
        run: Box::new(move |machine, at| {
            let (a, b, d) = (
                upload(machine, &paired(&a_given))?,
                upload(machine, &paired(&b_given))?,
                upload(machine, &d_given)?,
            );
            at.launch(machine, 128, |out| {
                vec![
                    ("const u32* a", Value::from(&a)),
                    ("const u32* b", Value::from(&b)),
                    ("const float* d", Value::from(&d)),
                    ("float* out", floats(out)),
                ]
            })
        }),
    }
}

/// Each lane has four neighbours of its row, the four lanes of a row all 16 columns: lane by lane 0, 8, 4, 12.
fn gather_quads() -> Case {
    let tile: Vec<f32> = (1..=8 * 16).map(|i| i as f32).collect();
    let of_lane = |lane: usize| {
        let column = [0, 8, 4, 12][lane % 4];
        let first = lane / 4 * 16 + column;
        [tile[first], tile[first + 1], tile[first + 2], tile[first + 3], column as f32]
    };
    Case {
        name: "gather_quad",
        expected: bits((0..32).flat_map(of_lane)),
        at: at("gather_quads", 1, 32),
        run: Box::new(move |machine, at| {
            let given = upload(machine, &tile)?;
            at.launch(machine, 32 * 5, |out| {
                vec![("const float* tile", floats(Value::from(&given))), ("float* out", floats(out))]
            })
        }),
    }
}
