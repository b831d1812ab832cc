//! The kernels as older devices get them: other PTX, other tiles, less shared memory.

use super::faults::{is_child, run_child};
use super::machine::runs_here;

const TESTS: [&str; 5] = [
    "norm::a_norm_per_head_is_a_norm_of_shorter_rows",
    "stats::many_samples",
    "linear::linear_matches_float64",
    "linear::bits_of_a_row_do_not_depend_on_other_rows_or_the_tile",
    "moe_products::bits_of_a_token_do_not_depend_on_other_tokens",
];

fn on(compute_capability: &str) {
    if is_child() || !runs_here() {
        return;
    }
    for test in TESTS {
        run_child(test, "none", &[("CUEMU_CC", compute_capability)]).assert_passed();
    }
}

#[test]
fn compute_capability_8_0() {
    on("80");
}

#[test]
fn compute_capability_8_9() {
    on("89");
}
