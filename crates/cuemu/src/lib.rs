//! A stand-in CUDA driver: a `libcuda.so` that executes kernels on the CPU.
//!
//! A program that talks to the CUDA driver, unchanged, loads this library instead of NVIDIA's. The PTX it
//! hands over is translated to C++, one statement per instruction ([`ptx`]), compiled by the system's `g++`
//! together with a runtime that runs every CUDA thread as a fiber (`runtime/`), and executed when the
//! program launches it ([`driver`]). The compiler of the kernels (NVRTC), the host code and the inline PTX
//! are the real ones.
//!
//! What it finds that a GPU would not tell: reads of poisoned (uninitialised) memory, accesses outside a
//! variable or allocation, barriers and warp operations that not all threads reach, asynchronous copies read
//! before they were waited for, fences that wgmma and the copy engine need, streams that do not wait for each
//! other or for an allocation, memory of another device without peer access, and, built with ThreadSanitizer,
//! data races.
//!
//! What it does not find: fences of too small a scope; within a block, a fence and an atomic access that
//! belong together, but are those of two threads with no barrier between them; `wgmma.fence` missing after
//! registers of A, or accumulators used for the first time, were written; pools whose access other devices
//! were not given (peer access opens them here); all that depends on time, and on what the compiler to
//! machine code does.
//!
//! # Environment
//!
//! | variable | values | meaning |
//! |---|---|---|
//! | `CUEMU_POLICY` | `fifo`, `reverse`, `random`, `priority` | which ready thread runs next |
//! | `CUEMU_ASYNC` | `lazy`, `eager`, `mixed` | when asynchronous copies and matrix operations happen |
//! | `CUEMU_SEED` | integer | of the random choices |
//! | `CUEMU_POISON` | integer, `0xFFFFFFFF` | 32-bit pattern of memory nobody has written |
//! | `CUEMU_SHUFFLE_BLOCKS` | `0`, `1` | blocks start in random order |
//! | `CUEMU_WAVE` | integer, 1 | blocks that are resident at the same time |
//! | `CUEMU_CC` | `80`, `89`, `90` | compute capability that the devices report |
//! | `CUEMU_DEVICES` | integer, 2 | number of devices |
//! | `CUEMU_MEMORY` | bytes, 4 GiB | memory of each device |
//! | `CUEMU_SANITIZER` | `none`, `address`, `thread` | what kernels are compiled with |
//! | `CUEMU_OPTIMIZE` | `0`, `1`, `2` | how well kernels are compiled (default 1): 0 takes a quarter of the time |
//! | `CUEMU_CACHE` | folder | where compiled kernels are kept; default: in the build folder |
//! | `CUEMU_CXX` | command, `g++` | the compiler |
//!
//! # Use
//!
//! `cargo build -p cuemu` makes `libcuemu.so` and the program `cuemu`, which runs another one on it:
//! `cuemu COMMAND`, `cuemu --sanitize thread COMMAND`. A test may also load `libcuemu.so` by its path before
//! anything else asks for a driver; its SONAME is `libcuda.so`. [`launcher`] knows what such a test's process
//! needs to run under a sanitizer.
//!
//! A failed kernel makes every later call of its context fail, as on a GPU, and `cuGetErrorString` tells what
//! happened: the kernel, the thread, the line of the `.cu` file.
//!
//! All this is for Linux on x86-64. Elsewhere the crate is empty.
//!
//! Tests control the driver through functions that it exports beside those of CUDA: `cuemu_set_schedule`,
//! `cuemu_get_schedule` ([`driver::Schedule`], of `cuemu_schedule_bytes` bytes), `cuemu_counters`
//! ([`driver::Stats`]), `cuemu_last_error`, `cuemu_live_allocations`, and `cuemu_reset`, which forgets failed
//! kernels.

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub mod driver;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub mod launcher;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
pub mod ptx;
