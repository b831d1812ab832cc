//! The CUDA backend, its kernels executed. Without a GPU: on the stand-in driver of `crates/cuemu`.
//!
//! `GRADLENS_TEST_GPU=1` runs the same tests on the machine's own driver and device. Where neither NVRTC nor a
//! C++ compiler is there the tests say so and pass, unless `GRADLENS_REQUIRE_CUDA=1` (as in CI) makes that a
//! failure.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/golden.rs"]
mod golden;

#[path = "cuda/activation.rs"]
mod activation;
#[path = "cuda/architectures.rs"]
mod architectures;
#[path = "cuda/atomics.rs"]
mod atomics;
#[path = "cuda/attention.rs"]
mod attention;
#[path = "cuda/attention_faults.rs"]
mod attention_faults;
#[path = "cuda/elementwise.rs"]
mod elementwise;
#[path = "cuda/elementwise_faults.rs"]
mod elementwise_faults;
#[path = "cuda/engine.rs"]
mod engine;
#[path = "cuda/faults.rs"]
mod faults;
#[path = "cuda/host.rs"]
mod host;
#[path = "cuda/linear.rs"]
mod linear;
#[path = "cuda/linear_exponentials.rs"]
mod linear_exponentials;
#[path = "cuda/linear_faults.rs"]
mod linear_faults;
#[path = "cuda/linear_fused.rs"]
mod linear_fused;
#[path = "cuda/linear_rotated.rs"]
mod linear_rotated;
#[path = "cuda/loss.rs"]
mod loss;
#[path = "cuda/machine.rs"]
mod machine;
#[path = "cuda/memory_plans.rs"]
mod memory_plans;
#[path = "cuda/moe.rs"]
mod moe;
#[path = "cuda/moe_faults.rs"]
mod moe_faults;
#[path = "cuda/moe_products.rs"]
mod moe_products;
#[path = "cuda/norm.rs"]
mod norm;
#[path = "cuda/ops.rs"]
mod ops;
#[path = "cuda/program.rs"]
mod program;
#[path = "cuda/rope.rs"]
mod rope;
#[path = "cuda/static_checks.rs"]
mod static_checks;
#[path = "cuda/stats.rs"]
mod stats;
#[path = "cuda/wrappers.rs"]
mod wrappers;
