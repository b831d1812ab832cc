//! Every instruction, executed: PTX is translated, compiled and run, and compared with what Rust computes.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(
    clippy::neg_cmp_op_on_partial_ord,
    clippy::nonminimal_bool,
    clippy::precedence,
    clippy::unwrap_used,
    reason = "formulas as PTX defines them; a test that cannot unwrap has failed"
)]

mod arithmetic;
mod bits;
mod control;
mod convert;
mod errors;
mod float;
mod half;
mod memory;
mod omissions;
mod support;
mod tensor;
mod warp;
