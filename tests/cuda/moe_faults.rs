//! What the tests of mixtures of experts must notice.

use cuemu::launcher::Sanitizer;

use super::faults::{Fault, WRONG};

const ROUTE: &str = "moe::route";
const UNUSUAL: &str = "moe::unusual_logits";
const ROUTE_BACKWARD: &str = "moe::route_backward";
const COMBINE: &str = "moe::combine";
const COMBINE_BACKWARD: &str = "moe::combine_backward";
const MMA: &str = "moe_products::mma_sync_multiplies_each_row_by_its_experts_weight";
const WGMMA: &str = "moe_products::wgmma_multiplies_each_row_by_its_experts_weight";
const FFMA: &str = "moe_products::ffma_multiplies_each_row_by_its_experts_weight";
const OUTSIDE: &[&str] =
    &["out of bounds", "no device allocation", "instead of", "relative error", "other bytes under"];

/// One place of one file changed, run without a sanitizer.
const fn fault(
    name: &'static str,
    file: &'static str,
    [from, to]: [&'static str; 2],
    test: &'static str,
    reports: &'static [&'static str],
) -> Fault {
    Fault { name, file, from, to, test, build: Sanitizer::None, reports }
}

/// One that ThreadSanitizer must see.
const fn race(name: &'static str, from: &'static str, test: &'static str) -> Fault {
    let (build, reports): (_, &[_]) = (Sanitizer::Thread, &["ThreadSanitizer: data race"]);
    Fault { name, file: "moe.cu", from, to: "", test, build, reports }
}

/// Faults in the kernels around the products, and in the products' way to an expert's weight.
pub const FAULTS: &[Fault] = &[
    // Choice.
    fault(
        "of equal experts the last",
        "moe.cu",
        ["return MAX_EXPERTS - 1 - expert;", "return expert;"],
        ROUTE,
        WRONG,
    ),
    fault("-0 below 0", "moe.cu", ["__float_as_uint(v + 0.f)", "__float_as_uint(v)"], UNUSUAL, WRONG),
    fault(
        "NaN below all",
        "moe.cu",
        ["if (v != v) return 0xffffffffu;", "if (v != v) return 1;"],
        UNUSUAL,
        WRONG,
    ),
    fault(
        "experts of a token downwards",
        "moe.cu",
        ["__popc(all & ((1u << lane) - 1))", "__popc(all & ~((2u << lane) - 1))"],
        ROUTE,
        WRONG,
    ),
    fault("scores that are not normalised", "moe.cu", ["logit[m] / sum", "logit[m]"], ROUTE, WRONG),
    fault(
        "softmax over all experts",
        "moe.cu",
        ["chosen >> m & 1 ? expf(logit[m] - largest) : 0.f", "expf(logit[m] - largest)"],
        ROUTE,
        WRONG,
    ),
    // Order.
    fault(
        "tokens of a warp downwards",
        "moe.cu",
        ["takes[expert][warp] & (bit - 1)", "takes[expert][warp] & ~(bit | (bit - 1))"],
        ROUTE,
        WRONG,
    ),
    fault("warps before are forgotten", "moe.cu", ["w < warp; w++", "w < 0; w++"], ROUTE, OUTSIDE),
    fault(
        "chunks before are forgotten",
        "moe.cu",
        ["starts[expert] + before[expert] +", "starts[expert] +"],
        ROUTE,
        OUTSIDE,
    ),
    fault(
        "experts one after the other",
        "moe.cu",
        ["start += (total[i] + SEGMENT - 1) / SEGMENT * SEGMENT;", "start += total[i];"],
        ROUTE,
        OUTSIDE,
    ),
    fault(
        "an expert for rows that are nobody's",
        "moe.cu",
        ["row - starts[e] < total[e] ? e : -1", "e"],
        ROUTE,
        WRONG,
    ),
    race("counted before the counts are zero", "__syncthreads();  // the counts are zero", ROUTE),
    race("totals that are not there yet", "__syncthreads();  // the totals are written", ROUTE),
    race("ranks before all tokens are there", "__syncthreads();  // all bits are set", ROUTE),
    // Gradients.
    fault("no softmax jacobian", "moe.cu", ["dscore - mean", "dscore"], ROUTE_BACKWARD, WRONG),
    fault(
        "the gradient so far is lost",
        "moe.cu",
        ["chosen ? so_far + __fmul_rn", "chosen ? __fmul_rn"],
        ROUTE_BACKWARD,
        WRONG,
    ),
    fault(
        "a score's gradient without a column",
        "moe.cu",
        ["element[k] = column + k < width ?", "element[k] = column + k + 1 < width ?"],
        COMBINE_BACKWARD,
        WRONG,
    ),
    fault(
        "dout without its score",
        "moe.cu",
        ["v[k] = score * of_token", "v[k] = of_token"],
        COMBINE_BACKWARD,
        WRONG,
    ),
    fault(
        "warps' sums before they are written",
        "moe.cu",
        ["__syncthreads();  // the warps' sums are written", ""],
        COMBINE_BACKWARD,
        WRONG,
    ),
    fault(
        "lanes missing from a sum",
        "moe.cu",
        ["step = min(lanes, 32) / 2; step > 0", "step = min(lanes, 32) / 2; step > 1"],
        COMBINE_BACKWARD,
        WRONG,
    ),
    fault(
        "rows of another token",
        "moe.cu",
        ["const i64 token = max(slot, 0) / top_k", "const i64 token = max(slot, 0)"],
        COMBINE_BACKWARD,
        OUTSIDE,
    ),
    fault(
        "what is nobody's is multiplied by zero",
        "moe.cu",
        ["const int there = slot < 0 ? 0 : width;  // of both, to be read", "const int there = width;"],
        COMBINE_BACKWARD,
        OUTSIDE,
    ),
    // Rows.
    fault(
        "a token in rows that are nobody's",
        "moe.cu",
        ["const int there = slot < 0 ? 0 : width;  // of x, to be read", "const int there = width;"],
        "moe::dispatch",
        OUTSIDE,
    ),
    fault(
        "one score for all experts",
        "moe.cu",
        ["scores ? scores[first + j] : 1.f", "scores ? scores[first] : 1.f"],
        COMBINE,
        WRONG,
    ),
    fault("what there is so far is lost", "moe.cu", ["sum[i][k] += so_far.value(k);", ";"], COMBINE, WRONG),
    // Products.
    fault(
        "another expert's weight",
        "linear.cu",
        ["weight += (i64)expert * columns * depth;", "weight += (i64)(expert ^ 1) * columns * depth;"],
        MMA,
        WRONG,
    ),
    fault(
        "rows that are nobody's are multiplied",
        "linear.cu",
        ["if (expert < 0) return;", ""],
        MMA,
        OUTSIDE,
    ),
    fault(
        "rows past those in use are multiplied",
        "linear.cu",
        ["if (experts && blockIdx.x >= row_tiles * column_tiles) return;", ""],
        MMA,
        OUTSIDE,
    ),
    fault(
        "the first expert's weight for all",
        "linear_sm90.cu",
        ["index * DEPTH, weight_row + column0);", "index * DEPTH, column0);"],
        WGMMA,
        WRONG,
    ),
    fault(
        "the first expert's weight for all gradients",
        "linear_sm90.cu",
        ["weight_row + index * DEPTH);", "index * DEPTH);"],
        WGMMA,
        WRONG,
    ),
    fault(
        "weights as high as they are wide",
        "linear_sm90.cu",
        ["(BACKWARD ? depth : columns)", "(BACKWARD ? columns : depth)"],
        WGMMA,
        WRONG,
    ),
    fault(
        "another expert's weight",
        "linear_f32.cu",
        ["weight += (i64)expert * columns * depth;", "weight += (i64)expert * columns;"],
        FFMA,
        WRONG,
    ),
    fault(
        "rows that are nobody's are multiplied",
        "linear_f32.cu",
        ["if (expert < 0) return;", ""],
        FFMA,
        OUTSIDE,
    ),
];
