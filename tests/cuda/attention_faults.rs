//! What the tests of attention must notice.

use super::faults::{Fault, WRONG};
use cuemu::launcher::Sanitizer;

const MMA: &str = "attention::tensor_cores_give_the_same_bits_under_all_schedules";
const ANY: &str = "attention::multiply_adds_give_the_same_bits_under_all_schedules";
const RACE: &[&str] = &["ThreadSanitizer: data race"];
const OUTSIDE: &[&str] = &["out of bounds global"];
const UNFINISHED: &[&str] = &["instead of", "other bytes under", "still in flight"];

/// A fault that gives wrong numbers.
const fn wrong(
    name: &'static str,
    file: &'static str,
    test: &'static str,
    from: &'static str,
    to: &'static str,
) -> Fault {
    Fault { name, file, from, to, test, build: Sanitizer::None, reports: WRONG }
}

/// A barrier that is not there.
const fn race(name: &'static str, file: &'static str, test: &'static str, from: &'static str) -> Fault {
    Fault { name, file, from, to: "", test, build: Sanitizer::Thread, reports: RACE }
}

/// Faults in attention's kernels and headers.
pub const FAULTS: &[Fault] = &[
    // On the tensor cores: waits and barriers.
    Fault {
        reports: UNFINISHED,
        ..wrong(
            "missing wait for copies",
            "attention.cu",
            MMA,
            "cp_async_wait<0>();  // this thread's copies of the tile",
            "",
        )
    },
    Fault {
        reports: UNFINISHED,
        ..wrong(
            "missing wait for copies, dq",
            "attention_backward.cu",
            MMA,
            "cp_async_wait<0>();  // dq: this thread's copies of the tile",
            "",
        )
    },
    Fault {
        reports: UNFINISHED,
        ..wrong(
            "missing wait for copies, dkv",
            "attention_backward.cu",
            MMA,
            "cp_async_wait<0>();  // dkv: this thread's copies of the tile",
            "",
        )
    },
    race(
        "missing barrier",
        "attention.cu",
        MMA,
        "__syncthreads();     // and those of the others; all have read the stage before",
    ),
    race(
        "missing barrier, dq",
        "attention_backward.cu",
        MMA,
        "__syncthreads();     // dq: and those of the others; all have read the stage before",
    ),
    race(
        "missing barrier, dkv",
        "attention_backward.cu",
        MMA,
        "__syncthreads();     // dkv: and those of the others; all have read the stage before",
    ),
    Fault {
        to: "fetch(key0 + K, stage)",
        ..race("stage reused too early", "attention.cu", MMA, "fetch(key0 + K, stage ^ 1)")
    },
    Fault {
        to: "fetch(key0 + K, stage)",
        ..race("stage reused too early, dq", "attention_backward.cu", MMA, "fetch(key0 + K, stage ^ 1)")
    },
    Fault {
        to: "fetch(then_head, then_query, stage)",
        ..race(
            "stage reused too early, dkv",
            "attention_backward.cu",
            MMA,
            "fetch(then_head, then_query, stage ^ 1)",
        )
    },
    // What is read and written.
    Fault {
        reports: UNFINISHED,
        ..wrong("first keys never copied", "attention.cu", MMA, "  fetch(first, 0);", "")
    },
    wrong(
        "swizzle lost where rows are read",
        "attention_mma.cuh",
        MMA,
        "bits((chunk ^ swizzle(row)) * 16)",
        "bits(chunk * 16)",
    ),
    wrong("rows past the end are not zeros", "attention_mma.cuh", MMA, "row0 + row < rows ? 16 : 0", "16"),
    Fault {
        reports: &["out of bounds cp.async read"],
        ..wrong(
            "rows past the end are read",
            "attention_mma.cuh",
            MMA,
            "const u32 place = min(row, rows - 1 - row0) * (u32)stride + chunk * 8;\n    cp_async_16(tile + S::offset(row, chunk), from + place, row0 + row < rows ? 16 : 0);",
            "const u32 place = row * (u32)stride + chunk * 8;\n    cp_async_16(tile + S::offset(row, chunk), from + place, 16);",
        )
    },
    Fault {
        build: Sanitizer::Address,
        reports: &["out of bounds cp.async read", "AddressSanitizer"],
        ..wrong(
            "rows past the end are read, with a sanitizer",
            "attention_mma.cuh",
            MMA,
            "const u32 place = min(row, rows - 1 - row0) * (u32)stride + chunk * 8;\n    cp_async_16(tile + S::offset(row, chunk), from + place, row0 + row < rows ? 16 : 0);",
            "const u32 place = row * (u32)stride + chunk * 8;\n    cp_async_16(tile + S::offset(row, chunk), from + place, 16);",
        )
    },
    Fault {
        reports: OUTSIDE,
        ..wrong(
            "rows past the end are written",
            "attention_mma.cuh",
            MMA,
            "if (row < rows) store_four(",
            "store_four(",
        )
    },
    Fault {
        reports: OUTSIDE,
        ..wrong(
            "lse past the end is written",
            "attention.cu",
            MMA,
            "if (lane % 4 == 0 && row + half * 8 < at.rows)",
            "if (lane % 4 == 0)",
        )
    },
    // Masks.
    wrong("later keys are seen", "attention.cu", MMA, "if (key0 + K - 1 > warp_row || ", "if ("),
    wrong("window lost", "attention.cu", MMA, " || warp_row + 15 - key0 >= window)", ")"),
    wrong("later keys are seen, dq", "attention_backward.cu", MMA, "key0 + K - 1 > warp_row || ", ""),
    wrong("window lost, dq", "attention_backward.cu", MMA, " || warp_row + 15 - key0 >= window", ""),
    wrong("earlier queries are seen, dkv", "attention_backward.cu", MMA, "warp_key + 15 > query0 || ", ""),
    wrong("window lost, dkv", "attention_backward.cu", MMA, " || query0 + Q - 1 - warp_key >= window", ""),
    wrong(
        "queries end a tile early, dkv",
        "attention_backward.cu",
        MMA,
        "at.row0 + TILE_ROWS - 1 + window)",
        "at.row0 + window)",
    ),
    wrong(
        "keys start a tile late",
        "attention.cuh",
        MMA,
        "(row0 - window + 1) / tile * tile",
        "(row0 - window + tile) / tile * tile",
    ),
    wrong("later keys are seen", "attention.cuh", ANY, "return key <= query && ", "return "),
    wrong("window one wider", "attention.cuh", ANY, "query - key < window", "query - key <= window"),
    // Numbers.
    wrong("sum not shrunk", "attention.cu", MMA, "sum[half] *= shrink;", ""),
    wrong("result not shrunk", "attention.cu", MMA, "result[n][half * 2] *= shrink, ", ""),
    wrong(
        "columns of other lanes not summed",
        "attention_mma.cuh",
        MMA,
        "return v + __shfl_xor_sync(FULL_WARP, v, 2);",
        "return v;",
    ),
    wrong("lse in base 2", "attention.cu", MMA, "most[half] * LN2 + ", "most[half] + "),
    wrong(
        "soft-cap lost",
        "attention_mma.cuh",
        MMA,
        "inner = p.softcap == 0.f ? 0.f : ",
        "inner = true ? 0.f : ",
    ),
    wrong(
        "slope of the soft-cap lost, dq",
        "attention_backward.cu",
        MMA,
        "(dp[n][i] - deltas[i / 2]) * scores.slope(s[n][i])",
        "(dp[n][i] - deltas[i / 2])",
    ),
    wrong("delta lost, dq", "attention_backward.cu", MMA, "(dp[n][i] - deltas[i / 2])", "dp[n][i]"),
    wrong(
        "scale of dq lost",
        "attention_backward.cu",
        MMA,
        "warp_row, at.rows, p.scale, p.scale",
        "warp_row, at.rows, 1.f, 1.f",
    ),
    wrong(
        "scale of dk lost",
        "attention_backward.cu",
        MMA,
        "warp_key, at.rows, p.scale, p.scale",
        "warp_key, at.rows, 1.f, 1.f",
    ),
    wrong(
        "one query head of a group, dkv",
        "attention_backward.cu",
        MMA,
        "next_head && head == last_head",
        "next_head",
    ),
    wrong(
        "another key head",
        "attention.cu",
        MMA,
        "at.head / (p.heads / p.kv_heads)",
        "at.head % p.kv_heads",
    ),
    // By multiply-adds.
    race(
        "missing barrier before k is read",
        "attention_any.cu",
        ANY,
        "__syncthreads();  // forward: q and k are there",
    ),
    race(
        "k overwritten too early",
        "attention_any.cu",
        ANY,
        "__syncthreads();  // forward: k has been read; the weights are there",
    ),
    race(
        "v overwritten too early",
        "attention_any.cu",
        ANY,
        "__syncthreads();  // forward: v and the weights have been read",
    ),
    race("v overwritten too early, dq", "attention_any.cu", ANY, "__syncthreads();  // dq: v has been read"),
    race(
        "missing order in a warp, dq",
        "attention_any.cu",
        ANY,
        "__syncwarp();  // dq: a row of weights is written and read by the same half of a warp",
    ),
    race(
        "missing order in a warp, dkv",
        "attention_any.cu",
        ANY,
        "__syncwarp();  // dkv: a row of weights is written and read by the same half of a warp",
    ),
    race(
        "rows overwritten too early, dkv",
        "attention_any.cu",
        ANY,
        "__syncthreads();  // dkv: all rows have been read",
    ),
    Fault {
        reports: OUTSIDE,
        ..wrong(
            "rows past the end are read",
            "attention_any.cu",
            ANY,
            "if (row0 + row < rows) v = load_four",
            "v = load_four",
        )
    },
    Fault {
        reports: OUTSIDE,
        ..wrong(
            "lse past the end is read",
            "attention_any.cu",
            ANY,
            "const float row_lse = query < at.rows ? lse[place] : 0.f;",
            "const float row_lse = lse[place];",
        )
    },
    Fault {
        reports: &["instead of", "relative error", "out of bounds global"],
        ..wrong(
            "columns past the head dim are read",
            "attention_any.cu",
            ANY,
            "column + k < head_dim ? to_float(row[column + k]) : 0.f;",
            "to_float(row[column + k]);",
        )
    },
    wrong("soft-cap lost", "attention_any.cu", ANY, "return p.softcap * t;", "return s;"),
    wrong("slope of the soft-cap lost", "attention_any.cu", ANY, "slope = (1.f - t) * (1.f + t);", ""),
    wrong("sum not shrunk", "attention_any.cu", ANY, "sum[i] *= shrink;", ""),
    wrong("row's maximum of one thread", "attention_any.cu", ANY, "most = team_max(most);", ""),
];
