//! The driver API on the CPU: the functions of `libcuda.so` that CUDA programs call.
//!
//! A stream is a queue of work that nobody does until somebody waits for it (stream.rs), and then only the
//! work that was waited for and what it waits for itself. What a program forgets to wait for has not
//! happened: it reads old data, every time.

mod abi;
mod context;
mod copy;
mod device;
mod error;
mod event;
pub mod jit;
mod launch;
mod memory;
mod module;
mod options;
mod runtime;
mod stream;
mod tensor_map;

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use abi::{Handle, Out};
use error::guard;
pub use error::{Code, Error, Result};
pub use options::{Options, Sanitizer, Schedule, schedule, set_schedule};
pub use runtime::{Runtime, Stats};

/// The tables of the driver.
#[derive(Default)]
struct State {
    handles: usize,
    contexts: HashMap<Handle, context::Context>,
    /// The primary context of each device that has one.
    primary: HashMap<usize, Handle>,
    streams: HashMap<Handle, stream::Stream>,
    events: HashMap<Handle, event::Event>,
    modules: HashMap<Handle, module::Module>,
    functions: HashMap<Handle, module::Function>,
    memory: memory::Memory,
}

impl State {
    /// A handle that no other thing has, nor had: one that was destroyed is never mistaken for another.
    fn new_handle(&mut self) -> Handle {
        self.handles += 1;
        0x5EED_0000_0000 + self.handles * 0x40
    }
}

static STATE: LazyLock<Mutex<State>> = LazyLock::new(Mutex::default);

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// For tests: forgets the failed kernels of all contexts, which would go on being reported otherwise.
#[unsafe(no_mangle)]
extern "C" fn cuemu_reset() {
    let mut state = state();
    state.contexts.values_mut().for_each(|context| context.failed = None);
    error::forget();
}

/// For tests: counters over all grids so far.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuemu_counters(counters: Out<Stats>) -> i32 {
    guard(|| counters.put(Runtime::load()?.stats()))
}

/// For tests: allocations of device memory that nobody has freed, of all devices. A free that waits in a
/// stream has not happened.
#[unsafe(no_mangle)]
extern "C" fn cuemu_live_allocations() -> u64 {
    state().memory.live()
}
