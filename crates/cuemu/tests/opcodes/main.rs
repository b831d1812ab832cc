//! Every instruction, executed: PTX is translated, compiled and run, and compared with what Rust computes.

#![allow(
    clippy::neg_cmp_op_on_partial_ord,
    clippy::nonminimal_bool,
    clippy::precedence,
    reason = "the formulas are written as PTX defines them"
)]

mod arithmetic;
mod bits;
mod control;
mod convert;
mod errors;
mod float;
mod half;
mod memory;
mod support;
mod tensor;
mod warp;
