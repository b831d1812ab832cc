//! Launches, and what they are checked for.

use std::ffi::c_void;

use super::abi::{Handle, In, Out};
use super::context;
use super::device::{
    self, DEFAULT_SHARED, MAX_BLOCK, MAX_GRID, MAX_THREADS, MULTIPROCESSORS, RESERVED_SHARED, api,
};
use super::error::{Code, Error, Result};
use super::jit::Kernel;
use super::module::{Function, function};
use super::options::schedule;
use super::state;
use super::stream::{context_of, resolve, submit};

/// Parameters lie at multiples of this, as by-value structures (tensor maps) demand.
const ALIGNMENT: usize = 128;

#[repr(C, align(128))]
#[derive(Clone, Copy)]
struct Chunk([u8; ALIGNMENT]);

/// The parameters of a launch, copied when it was called.
struct Parameters {
    chunks: Vec<Chunk>,
    /// Where each one begins.
    starts: Vec<usize>,
}

impl Parameters {
    fn copy(kernel: &Kernel, given: &In<In<u8>>) -> Result<Self> {
        let mut chunks = Vec::new();
        let mut starts = Vec::new();
        for (index, bytes) in kernel.parameter_sizes.iter().enumerate() {
            let missing = |_| Error::invalid(format!("{}: parameter {index} is null", kernel.name));
            let value = given.at(index).and_then(|value| value.bytes(*bytes as usize)).map_err(missing)?;
            starts.push(chunks.len());
            chunks.extend(value.chunks(ALIGNMENT).map(|part| {
                let mut chunk = Chunk([0; ALIGNMENT]);
                chunk.0[..part.len()].copy_from_slice(part);
                chunk
            }));
        }
        Ok(Self { chunks, starts })
    }

    fn pointers(&mut self) -> Vec<*mut c_void> {
        let base = self.chunks.as_mut_ptr();
        // A parameter of no bytes begins where the next one does, maybe behind the last chunk.
        self.starts.iter().map(|start| base.wrapping_add(*start).cast()).collect()
    }
}

/// The shape of a launch.
struct Shape {
    grid: [u32; 3],
    block: [u32; 3],
    dynamic_shared: u32,
    /// All blocks are resident at the same time.
    cooperative: bool,
}

fn check(function: &Function, shape: &Shape) -> Result<()> {
    let name = &function.kernel.name;
    let Shape { grid, block, dynamic_shared, cooperative } = shape;
    let wrong = |text: String| Err(Error::invalid(format!("{name}: {text}")));
    for (what, sizes, limits) in [("grid", grid, MAX_GRID), ("block", block, MAX_BLOCK)] {
        if sizes.iter().zip(limits).any(|(size, limit)| *size == 0 || *size > limit) {
            return wrong(format!("a {what} of {sizes:?}: each size has to be in 1..={limits:?}"));
        }
    }
    let threads: u64 = block.iter().map(|size| u64::from(*size)).product();
    if threads > u64::from(MAX_THREADS) {
        return wrong(format!("a block of {threads} threads, {MAX_THREADS} is the most"));
    }
    if threads > u64::from(function.max_threads()) {
        return wrong(format!(
            "a block of {threads} threads exceeds the launch bound of {}",
            function.max_threads()
        ));
    }
    let fixed = function.kernel.static_shared_bytes;
    if *dynamic_shared > function.max_dynamic {
        return wrong(format!(
            "{dynamic_shared} bytes of dynamic shared memory, {} are allowed: \
             CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES raises that",
            function.max_dynamic
        ));
    }
    let limit = if function.max_dynamic + fixed > DEFAULT_SHARED {
        device::limits()?.shared_optin
    } else {
        DEFAULT_SHARED
    };
    if fixed + dynamic_shared > limit {
        return wrong(format!(
            "{dynamic_shared} bytes of dynamic shared memory and {fixed} of variables, {limit} is the most"
        ));
    }
    let blocks: u64 = grid.iter().map(|size| u64::from(*size)).product();
    let resident =
        u64::from(resident(function, threads as u32, u64::from(*dynamic_shared))? * MULTIPROCESSORS);
    if *cooperative && blocks > resident {
        return Err(Error::new(
            Code::COOPERATIVE_LAUNCH_TOO_LARGE,
            format!("{name}: {blocks} blocks, {resident} are resident at the same time"),
        ));
    }
    Ok(())
}

/// Blocks that fit on a multiprocessor, as far as threads and shared memory are concerned.
fn resident(function: &Function, threads: u32, dynamic_shared: u64) -> Result<u32> {
    let limits = device::limits()?;
    let shared = u64::from(function.kernel.static_shared_bytes) + dynamic_shared + u64::from(RESERVED_SHARED);
    let by_shared = u64::from(limits.shared_per_multiprocessor) / shared;
    let by_threads = limits.threads_per_multiprocessor / threads.max(1).next_multiple_of(32);
    Ok(by_threads.min(by_shared as u32).min(limits.blocks_per_multiprocessor))
}

fn launch(handle: Handle, shape: Shape, stream: Handle, given: &In<In<u8>>, extra: &In<usize>) -> Result<()> {
    let mut state = state();
    let stream = resolve(&mut state, stream)?;
    let context = context_of(&state, stream)?;
    let function = function(&mut state, handle)?;
    if function.context != context {
        return Err(Error::new(
            Code::INVALID_HANDLE,
            format!("{}: the function and the stream are of different contexts", function.kernel.name),
        ));
    }
    if !extra.is_null() {
        return Err(Error::new(Code::NOT_SUPPORTED, "parameters as one buffer (`extra`) are not emulated"));
    }
    check(function, &shape)?;
    let kernel = function.kernel.clone();
    let mut parameters = Parameters::copy(&kernel, given)?;
    let place = context::place(&mut state, context)?;
    submit(&mut state, stream, move || {
        let Shape { grid, block, dynamic_shared, cooperative } = shape;
        let mut schedule = schedule();
        if cooperative {
            schedule.wave = grid.iter().product();
        }
        let mut pointers = parameters.pointers();
        // SAFETY: one pointer to a copy of each parameter, aligned for anything, which lives until the end.
        let outcome = unsafe {
            kernel.launch_at(place, grid, block, u64::from(dynamic_shared), &mut pointers, schedule)
        };
        outcome.map_err(|text| failure(&kernel.name, &text))
    })
    .map(drop)
}

/// What the program gets to know of a failed kernel.
fn failure(name: &str, text: &str) -> Error {
    const ADDRESSES: [&str; 7] = [
        "out of bounds ",
        "global ",
        "no device allocation",
        "was freed",
        "at shared address",
        "without peer access",
        "before its allocation",
    ];
    let code = if text.starts_with("misaligned ") {
        Code::MISALIGNED_ADDRESS
    } else if ADDRESSES.iter().any(|words| text.contains(words)) {
        Code::ILLEGAL_ADDRESS
    } else {
        Code::LAUNCH_FAILED
    };
    Error::new(code, format!("{name}: {text}"))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuLaunchKernel(
    function: Handle,
    grid_x: u32,
    grid_y: u32,
    grid_z: u32,
    block_x: u32,
    block_y: u32,
    block_z: u32,
    dynamic_shared: u32,
    stream: Handle,
    parameters: In<In<u8>>,
    extra: In<usize>,
) -> i32 {
    let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
    let shape = Shape { grid, block, dynamic_shared, cooperative: false };
    api(|| launch(function, shape, stream, &parameters, &extra))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuLaunchCooperativeKernel(
    function: Handle,
    grid_x: u32,
    grid_y: u32,
    grid_z: u32,
    block_x: u32,
    block_y: u32,
    block_z: u32,
    dynamic_shared: u32,
    stream: Handle,
    parameters: In<In<u8>>,
) -> i32 {
    let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
    let shape = Shape { grid, block, dynamic_shared, cooperative: true };
    api(|| launch(function, shape, stream, &parameters, &In::null()))
}

/// `CUlaunchConfig`
#[repr(C)]
#[derive(Clone, Copy)]
struct Config {
    grid: [u32; 3],
    block: [u32; 3],
    dynamic_shared: u32,
    stream: Handle,
    attributes: In<Attribute>,
    attribute_count: u32,
}

/// `CUlaunchAttribute`
#[repr(C)]
#[derive(Clone, Copy)]
struct Attribute {
    id: u32,
    padding: u32,
    /// A union of 64 bytes, aligned to 8.
    value: [u64; 8],
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuLaunchKernelEx(
    config: In<Config>,
    function: Handle,
    parameters: In<In<u8>>,
    extra: In<usize>,
) -> i32 {
    const COOPERATIVE: u32 = 2;
    const CLUSTER_DIMENSION: u32 = 4;
    api(|| {
        let Config { grid, block, dynamic_shared, stream, attributes, attribute_count } = config.at(0)?;
        let mut shape = Shape { grid, block, dynamic_shared, cooperative: false };
        for index in 0..attribute_count as usize {
            let Attribute { id, value, .. } = attributes.at(index)?;
            match id {
                COOPERATIVE => shape.cooperative = value[0] as u32 != 0,
                CLUSTER_DIMENSION => {
                    let sizes = [value[0] as u32, (value[0] >> 32) as u32, value[1] as u32];
                    if sizes != [1, 1, 1] {
                        return Err(Error::new(
                            Code::NOT_SUPPORTED,
                            format!("clusters ({sizes:?} blocks) are not emulated"),
                        ));
                    }
                }
                _ => {} // about speed and memory order between grids; here one runs after the other
            }
        }
        launch(function, shape, stream, &parameters, &extra)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
    blocks: Out<i32>,
    function: Handle,
    block_size: i32,
    dynamic_shared: usize,
) -> i32 {
    api(|| occupancy(&blocks, function, block_size, dynamic_shared))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    blocks: Out<i32>,
    function: Handle,
    block_size: i32,
    dynamic_shared: usize,
    _flags: u32,
) -> i32 {
    api(|| occupancy(&blocks, function, block_size, dynamic_shared))
}

fn occupancy(blocks: &Out<i32>, handle: Handle, block_size: i32, dynamic_shared: usize) -> Result<()> {
    let threads = u32::try_from(block_size).ok().filter(|threads| *threads > 0);
    let threads = threads.ok_or_else(|| Error::invalid("a block has to have threads"))?;
    let mut state = state();
    let function = function(&mut state, handle)?;
    if threads > function.max_threads() || dynamic_shared > function.max_dynamic as usize {
        return blocks.put(0);
    }
    blocks.put(resident(function, threads, dynamic_shared as u64)? as i32)
}
