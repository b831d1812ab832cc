//! The CUDA backend, its kernels executed. Without a GPU: on the stand-in driver of `crates/cuemu`.
//!
//! `GRADLENS_TEST_GPU=1` runs the same tests on the machine's own driver and device. Where neither NVRTC nor a
//! C++ compiler is there the tests say so and pass, unless `GRADLENS_REQUIRE_CUDA=1` (as in CI) makes that a
//! failure.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(clippy::unwrap_used)]

#[path = "cuda/architectures.rs"]
mod architectures;
#[path = "cuda/atomics.rs"]
mod atomics;
#[path = "cuda/faults.rs"]
mod faults;
#[path = "cuda/host.rs"]
mod host;
#[path = "cuda/linear.rs"]
mod linear;
#[path = "cuda/linear_faults.rs"]
mod linear_faults;
#[path = "cuda/machine.rs"]
mod machine;
#[path = "cuda/norm.rs"]
mod norm;
#[path = "cuda/static_checks.rs"]
mod static_checks;
#[path = "cuda/stats.rs"]
mod stats;
#[path = "cuda/wrappers.rs"]
mod wrappers;
