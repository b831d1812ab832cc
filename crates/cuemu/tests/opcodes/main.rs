//! Every instruction, executed: PTX is translated, compiled and run, and compared with what Rust computes.

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
