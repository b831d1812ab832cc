//! Device memory and page-locked host memory: who has how much of it, and where.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ptr::NonNull;

use super::abi::{DevicePtr, Handle, Out};
use super::context::{self, working};
use super::device::{api, check};
use super::error::{Code, Error, Result};
use super::options::{Options, schedule};
use super::runtime::{ANY_DEVICE, Runtime};
use super::state;
use super::stream::{self, context_of, resolve, submit_always};

/// Who an allocation belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Memory of a device.
    Device,
    /// Page-locked host memory, which the driver allocated.
    Host,
    /// Host memory of the program, which it had page-locked.
    Registered,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    pub(super) address: u64,
    pub(super) bytes: usize,
    pub(super) kind: Kind,
    pub(super) device: usize,
    pub(super) context: Handle,
    /// The stream that allocates it has not come to the allocation.
    pub(super) pending: bool,
    /// Which of all allocations: addresses are used again.
    serial: u64,
}

impl Block {
    fn has(&self, address: u64, bytes: usize) -> bool {
        let offset = address.checked_sub(self.address).unwrap_or(u64::MAX);
        offset <= self.bytes as u64 && bytes as u64 <= self.bytes as u64 - offset
    }
}

#[derive(Default)]
pub(super) struct Memory {
    blocks: BTreeMap<u64, Block>,
    used: BTreeMap<usize, Usage>,
    allocations: u64,
}

/// Bytes of a device's memory.
#[derive(Clone, Copy, Default)]
struct Usage {
    now: u64,
    most: u64,
    /// What the program set as the pool's release threshold; nothing depends on it.
    threshold: u64,
}

impl Memory {
    /// Number of allocations of device memory.
    pub(super) fn live(&self) -> u64 {
        self.blocks.values().filter(|block| block.kind == Kind::Device).count() as u64
    }

    /// The allocation that has the byte at `address`, or ends there.
    pub(super) fn find(&self, address: u64) -> Option<&Block> {
        let (_, block) = self.blocks.range(..=address).next_back()?;
        block.has(address, 0).then_some(block)
    }

    /// The allocation of device memory (or of host memory that a device reaches) with all these bytes.
    pub(super) fn device_range(&self, what: &str, address: u64, bytes: usize) -> Result<Block> {
        match self.find(address) {
            Some(block) if block.has(address, bytes) => Ok(*block),
            Some(block) => Err(Error::invalid(format!(
                "{what}: {bytes} bytes at {address:#x} reach beyond the allocation of {} bytes at {:#x}",
                block.bytes, block.address
            ))),
            None => Err(Error::invalid(format!("{what}: {address:#x} is in no allocation"))),
        }
    }

    /// The page-locked allocation with all these bytes.
    pub(super) fn pinned(&self, address: u64, bytes: usize) -> Option<&Block> {
        self.find(address).filter(|block| block.kind != Kind::Device && block.has(address, bytes))
    }

    /// Adds a block, and returns its serial number.
    fn insert(&mut self, block: Block) -> u64 {
        self.allocations += 1;
        if block.kind == Kind::Device {
            let used = self.used.entry(block.device).or_default();
            used.now += block.bytes as u64;
            used.most = used.most.max(used.now);
        }
        let serial = self.allocations;
        self.blocks.insert(block.address, Block { serial, ..block });
        serial
    }

    /// The stream has come to the allocation of this block, if it is still there.
    fn begin(&mut self, address: u64, serial: u64) -> bool {
        let block = self.blocks.get_mut(&address).filter(|block| block.serial == serial);
        block.map(|block| block.pending = false).is_some()
    }

    /// Takes the allocation that begins at `address` out of the tables.
    fn take(&mut self, address: u64, is: impl Fn(Kind) -> bool) -> Option<Block> {
        let block = *self.blocks.get(&address).filter(|block| is(block.kind))?;
        self.blocks.remove(&address);
        if block.kind == Kind::Device {
            self.used.entry(block.device).or_default().now -= block.bytes as u64;
        }
        Some(block)
    }

    pub(super) fn take_all_of(&mut self, context: Handle) -> Vec<Block> {
        let of_context = self.blocks.values().filter(|block| block.context == context);
        let addresses: Vec<u64> = of_context.map(|block| block.address).collect();
        addresses.into_iter().filter_map(|address| self.take(address, |_| true)).collect()
    }

    fn usage(&mut self, device: usize) -> &mut Usage {
        self.used.entry(device).or_default()
    }
}

/// Frees (or forgets) a block that was taken out of the tables; waits until no kernel and no copy runs.
pub(super) fn free_now(block: Block) -> Result<()> {
    let Some(address) = NonNull::new(block.address as *mut u8) else { return Ok(()) };
    if block.kind == Kind::Registered {
        Runtime::load()?.unregister(address);
        return Ok(());
    }
    // SAFETY: the tables have blocks of `Runtime::allocate` only, the registered ones excepted, each once.
    unsafe { Runtime::load()?.free(address) };
    Ok(())
}

/// Allocates for this thread's context.
fn allocate(kind: Kind, bytes: usize) -> Result<u64> {
    let context = working(&state())?;
    let device = context::get(&mut state(), context)?.device;
    allocate_on(kind, bytes, device, None)
}

/// Allocates memory of `device`, at once, or when `stream` gets there: the memory is reserved meanwhile.
fn allocate_on(kind: Kind, bytes: usize, device: usize, stream: Option<Handle>) -> Result<u64> {
    let runtime = Runtime::load()?;
    let limit = Options::get()?.memory;
    let context = working(&state())?;
    if bytes == 0 {
        return Err(Error::invalid("an allocation of no bytes"));
    }
    let free = || limit.saturating_sub(state().memory.usage(device).now);
    let out_of_memory = |free: u64| {
        Error::new(
            Code::OUT_OF_MEMORY,
            format!("{bytes} bytes were asked for, {free} of the {limit} of device {device} are free"),
        )
    };
    if kind == Kind::Device && bytes as u64 > free() {
        // What was freed in a stream is free when the stream gets there. A GPU waits for that, too.
        stream::run_context(context)?;
    }
    let mut state = state();
    if kind == Kind::Device {
        let free = limit.saturating_sub(state.memory.usage(device).now);
        if bytes as u64 > free {
            return Err(out_of_memory(free));
        }
    }
    let (pending, poison) = (stream.is_some(), schedule().poison);
    let reached = if kind == Kind::Device { device as u32 } else { ANY_DEVICE };
    let block = runtime.allocate_on(reached, bytes, poison, pending).ok_or_else(|| out_of_memory(0))?;
    let address = block.as_ptr() as u64;
    let serial = state.memory.insert(Block { address, bytes, kind, device, context, pending, serial: 0 });
    let Some(stream) = stream else { return Ok(address) };
    let begin = move |_: Option<&Error>| {
        let mut state = self::state();
        if let (true, Some(block)) = (state.memory.begin(address, serial), NonNull::new(address as *mut u8)) {
            runtime.begin(block);
        }
        Ok(())
    };
    submit_always(&mut state, stream, Vec::new(), Box::new(begin))?;
    Ok(address)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemAlloc_v2(pointer: Out<DevicePtr>, bytes: usize) -> i32 {
    api(|| pointer.put(allocate(Kind::Device, bytes)?))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemAllocAsync(pointer: Out<DevicePtr>, bytes: usize, stream: Handle) -> i32 {
    api(|| {
        let (device, stream) = {
            let mut state = state();
            let stream = resolve(&mut state, stream)?;
            let context = context_of(&state, stream)?;
            (context::get(&mut state, context)?.device, stream)
        };
        pointer.put(allocate_on(Kind::Device, bytes, device, Some(stream))?)
    })
}

/// Waits for all work of the context, as on a GPU, and frees.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemFree_v2(pointer: DevicePtr) -> i32 {
    api(|| {
        if pointer == 0 {
            return Ok(());
        }
        let context = working(&state())?;
        stream::run_context(context)?;
        let block = state().memory.take(pointer, |kind| kind == Kind::Device);
        free_now(block.ok_or_else(|| not_allocated("cuMemFree", pointer))?)
    })
}

/// Frees when the stream gets there: work of other streams that comes later uses freed memory.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemFreeAsync(pointer: DevicePtr, stream: Handle) -> i32 {
    api(|| {
        if pointer == 0 {
            return Ok(());
        }
        let mut state = state();
        let known = state.memory.find(pointer);
        if known.is_none_or(|block| block.address != pointer || block.kind != Kind::Device) {
            return Err(not_allocated("cuMemFreeAsync", pointer));
        }
        let stream = resolve(&mut state, stream)?;
        // Also after a failure: the numbers would be wrong otherwise.
        let free = move |_: Option<&Error>| {
            let block = self::state().memory.take(pointer, |kind| kind == Kind::Device);
            let block = block.ok_or_else(|| not_allocated("cuMemFreeAsync", pointer))?;
            free_now(block)?;
            if block.pending { Err(used_early("cuMemFreeAsync", pointer)) } else { Ok(()) }
        };
        submit_always(&mut state, stream, Vec::new(), Box::new(free)).map(drop)
    })
}

/// What work finds that gets to memory before the stream that allocates it does.
pub(super) fn used_early(what: &str, pointer: u64) -> Error {
    Error::new(
        Code::ILLEGAL_ADDRESS,
        format!("{what}: the memory at {pointer:#x} is used before its allocation in stream order"),
    )
}

fn not_allocated(what: &str, pointer: u64) -> Error {
    Error::invalid(format!("{what}: no allocation begins at {pointer:#x}, or it was freed before"))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) -> i32 {
    api(|| {
        let limit = Options::get()?.memory;
        let mut state = state();
        let context = working(&state)?;
        let device = context::get(&mut state, context)?.device;
        free.put(limit.saturating_sub(state.memory.usage(device).now) as usize)?;
        total.put(limit as usize)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemGetAddressRange_v2(
    base: Out<DevicePtr>,
    bytes: Out<usize>,
    pointer: DevicePtr,
) -> i32 {
    api(|| {
        let block = state().memory.device_range("cuMemGetAddressRange", pointer, 1);
        let block = block.map_err(|error| Error::new(Code::NOT_FOUND, error.text()))?;
        base.put_if_wanted(block.address);
        bytes.put_if_wanted(block.bytes);
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuPointerGetAttribute(value: Out<c_void>, attribute: i32, pointer: DevicePtr) -> i32 {
    api(|| {
        let block = state().memory.device_range("cuPointerGetAttribute", pointer, 1)?;
        let host = block.kind != Kind::Device;
        match attribute {
            1 => value.cast::<Handle>().put(block.context),
            2 => value.cast::<u32>().put(if host { 1 } else { 2 }), // CU_MEMORYTYPE_HOST, _DEVICE
            3 => value.cast::<u64>().put(pointer),
            4 if host => value.cast::<u64>().put(pointer),
            8 => value.cast::<u32>().put(0), // managed
            9 => value.cast::<i32>().put(block.device as i32),
            11 => value.cast::<u64>().put(block.address),
            12 => value.cast::<usize>().put(block.bytes),
            13 => value.cast::<u32>().put(1), // mapped
            _ => Err(Error::invalid(format!("pointer attribute {attribute} is not emulated"))),
        }
    })
}

// ---- the memory pool of each device: its handle is the device's number, plus one ------------------------

fn pool_device(pool: Handle) -> Result<usize> {
    check(pool as i32 - 1).map_err(|_| Error::invalid("there is no such memory pool"))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetDefaultMemPool(pool: Out<Handle>, device: i32) -> i32 {
    api(|| pool.put(check(device)? + 1))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetMemPool(pool: Out<Handle>, device: i32) -> i32 {
    api(|| pool.put(check(device)? + 1))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemAllocFromPoolAsync(
    pointer: Out<DevicePtr>,
    bytes: usize,
    pool: Handle,
    stream: Handle,
) -> i32 {
    api(|| {
        let device = pool_device(pool)?;
        let stream = resolve(&mut state(), stream)?;
        pointer.put(allocate_on(Kind::Device, bytes, device, Some(stream))?)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemPoolTrimTo(pool: Handle, _bytes_to_keep: usize) -> i32 {
    api(|| pool_device(pool).map(drop))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemPoolGetAttribute(pool: Handle, attribute: i32, value: Out<c_void>) -> i32 {
    api(|| {
        let usage = *state().memory.usage(pool_device(pool)?);
        match attribute {
            1..=3 => value.cast::<i32>().put(1), // reuse policies
            4 => value.cast().put(usage.threshold),
            5 | 7 => value.cast().put(usage.now),
            6 | 8 => value.cast().put(usage.most),
            _ => Err(Error::invalid(format!("memory pool attribute {attribute} is not emulated"))),
        }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemPoolSetAttribute(pool: Handle, attribute: i32, value: super::abi::In<u64>) -> i32 {
    api(|| {
        let device = pool_device(pool)?;
        let mut state = state();
        let usage = state.memory.usage(device);
        match attribute {
            1..=3 => {} // reuse policies
            4 => usage.threshold = value.at(0)?,
            6 | 8 => usage.most = usage.now,
            _ => return Err(Error::invalid(format!("memory pool attribute {attribute} cannot be set"))),
        }
        Ok(())
    })
}

// ---- page-locked host memory -----------------------------------------------------------------------------

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemHostAlloc(pointer: Out<u64>, bytes: usize, _flags: u32) -> i32 {
    api(|| pointer.put(allocate(Kind::Host, bytes)?))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemAllocHost_v2(pointer: Out<u64>, bytes: usize) -> i32 {
    api(|| pointer.put(allocate(Kind::Host, bytes)?))
}

/// Waits for nothing: a copy that is still to come finds its memory gone, and says so.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemFreeHost(pointer: u64) -> i32 {
    api(|| {
        if pointer == 0 {
            return Ok(());
        }
        let block = state().memory.take(pointer, |kind| kind == Kind::Host);
        free_now(block.ok_or_else(|| not_allocated("cuMemFreeHost", pointer))?)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemHostGetDevicePointer_v2(device: Out<DevicePtr>, host: u64, _flags: u32) -> i32 {
    api(|| match state().memory.pinned(host, 1) {
        Some(_) => device.put(host),
        None => Err(Error::invalid(format!("{host:#x} is in no page-locked memory"))),
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemHostRegister_v2(pointer: u64, bytes: usize, _flags: u32) -> i32 {
    api(|| {
        let runtime = Runtime::load()?;
        let mut state = state();
        let context = working(&state)?;
        let block = NonNull::new(pointer as *mut u8).filter(|_| bytes > 0);
        let block = block.ok_or_else(|| Error::invalid("there is nothing to register"))?;
        let before = state.memory.blocks.range(..pointer.saturating_add(bytes as u64)).next_back();
        if before.is_some_and(|(_, before)| before.address + before.bytes as u64 > pointer) {
            return Err(Error::plain(Code::HOST_MEMORY_ALREADY_REGISTERED));
        }
        let device = context::get(&mut state, context)?.device;
        runtime.register(block, bytes);
        let (kind, pending, serial) = (Kind::Registered, false, 0);
        state.memory.insert(Block { address: pointer, bytes, kind, device, context, pending, serial });
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemHostUnregister(pointer: u64) -> i32 {
    api(|| {
        let block = state().memory.take(pointer, |kind| kind == Kind::Registered);
        free_now(block.ok_or_else(|| Error::plain(Code::HOST_MEMORY_NOT_REGISTERED))?)
    })
}
