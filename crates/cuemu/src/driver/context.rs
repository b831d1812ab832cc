//! Contexts: one primary context of each device, others on request, and which of them a thread uses.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::thread::ThreadId;

use super::abi::{Handle, In, Out};
use super::device::{api, check};
use super::error::{Code, Error, Result};
use super::runtime::Place;
use super::stream::{self, Stream};
use super::{State, memory, state};

pub(super) struct Context {
    pub(super) device: usize,
    /// How often the primary context was retained; 0 of any other context.
    retained: usize,
    flags: u32,
    pub(super) default_stream: Handle,
    pub(super) thread_streams: HashMap<ThreadId, Handle>,
    /// What a kernel or copy did wrong. Every later call reports it, as on a GPU.
    pub(super) failed: Option<Error>,
    peers: HashSet<Handle>,
    limits: HashMap<i32, usize>,
    cache_config: i32,
}

thread_local! {
    static CURRENT: RefCell<Vec<Handle>> = const { RefCell::new(Vec::new()) };
}

fn top() -> Option<Handle> {
    CURRENT.with_borrow(|stack| stack.last().copied())
}

fn no_context() -> Error {
    Error::new(Code::INVALID_CONTEXT, "this thread has no current context")
}

/// The context with this handle.
pub(super) fn get(state: &mut State, context: Handle) -> Result<&mut Context> {
    state
        .contexts
        .get_mut(&context)
        .ok_or_else(|| Error::new(Code::INVALID_CONTEXT, "there is no such context, or it was destroyed"))
}

/// Where kernels of a context run, and which devices' memory they reach.
pub(super) fn place(state: &mut State, context: Handle) -> Result<Place> {
    let own = get(state, context)?;
    let (device, peers) = (own.device as u32, own.peers.clone());
    let devices = peers.iter().filter_map(|peer| state.contexts.get(peer)).map(|peer| peer.device);
    Ok(Place {
        device,
        peers: devices.filter(|device| *device < 64).fold(0, |mask, device| mask | 1 << device),
    })
}

/// The context of this thread.
pub(super) fn current(state: &State) -> Result<Handle> {
    let context = top().ok_or_else(no_context)?;
    if state.contexts.contains_key(&context) {
        return Ok(context);
    }
    Err(Error::new(Code::CONTEXT_IS_DESTROYED, "the current context of this thread was destroyed"))
}

/// The context of this thread, if nothing has failed in it.
pub(super) fn working(state: &State) -> Result<Handle> {
    let context = current(state)?;
    alive(state, context)?;
    Ok(context)
}

/// An error if something has failed in the context.
pub(super) fn alive(state: &State, context: Handle) -> Result<()> {
    match state.contexts.get(&context).and_then(|context| context.failed.clone()) {
        Some(failure) => Err(failure),
        None => Ok(()),
    }
}

fn create(state: &mut State, device: usize, flags: u32) -> Handle {
    let context = state.new_handle();
    let default_stream = state.new_handle();
    state.streams.insert(default_stream, Stream::new(context, 0, 0));
    state.contexts.insert(
        context,
        Context {
            device,
            retained: 0,
            flags,
            default_stream,
            thread_streams: HashMap::new(),
            failed: None,
            peers: HashSet::new(),
            limits: HashMap::new(),
            cache_config: 0,
        },
    );
    context
}

/// Finishes the work of a context and frees all it had.
fn destroy(context: Handle) -> Result<()> {
    let outcome = stream::run_context(context);
    let blocks = {
        let mut state = state();
        state.streams.retain(|_, stream| stream.context != context);
        state.events.retain(|_, event| event.context != context);
        state.modules.retain(|_, module| module.context != context);
        state.functions.retain(|_, function| function.context != context);
        state.contexts.remove(&context);
        state.primary.retain(|_, primary| *primary != context);
        state.memory.take_all_of(context)
    };
    for block in blocks {
        memory::free_now(block)?;
    }
    outcome
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: Out<Handle>, device: i32) -> i32 {
    api(|| {
        let device = check(device)?;
        let mut state = state();
        let handle = match state.primary.get(&device) {
            Some(primary) => *primary,
            None => {
                let primary = create(&mut state, device, 0);
                state.primary.insert(device, primary);
                primary
            }
        };
        get(&mut state, handle)?.retained += 1;
        context.put(handle)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDevicePrimaryCtxRelease_v2(device: i32) -> i32 {
    api(|| {
        let device = check(device)?;
        let last = {
            let mut state = state();
            let primary = *state.primary.get(&device).ok_or_else(|| {
                Error::new(
                    Code::INVALID_CONTEXT,
                    format!("device {device} has no primary context to release"),
                )
            })?;
            let context = get(&mut state, primary)?;
            context.retained -= 1;
            (context.retained == 0).then_some(primary)
        };
        last.map_or(Ok(()), destroy)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDevicePrimaryCtxReset_v2(device: i32) -> i32 {
    api(|| {
        let device = check(device)?;
        let primary = state().primary.get(&device).copied();
        primary.map_or(Ok(()), destroy)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDevicePrimaryCtxGetState(device: i32, flags: Out<u32>, active: Out<i32>) -> i32 {
    api(|| {
        let device = check(device)?;
        let state = state();
        let context = state.primary.get(&device).and_then(|primary| state.contexts.get(primary));
        flags.put(context.map_or(0, |context| context.flags))?;
        active.put(i32::from(context.is_some()))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxCreate_v4(
    context: Out<Handle>,
    parameters: In<u8>,
    flags: u32,
    device: i32,
) -> i32 {
    api(|| {
        let device = check(device)?;
        if !parameters.is_null() {
            return Err(Error::new(Code::NOT_SUPPORTED, "contexts with parameters are not emulated"));
        }
        let handle = create(&mut state(), device, flags);
        CURRENT.with_borrow_mut(|stack| stack.push(handle));
        context.put(handle)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxDestroy_v2(context: Handle) -> i32 {
    api(|| {
        if get(&mut state(), context)?.retained > 0 {
            return Err(Error::new(Code::INVALID_CONTEXT, "a primary context is released, not destroyed"));
        }
        CURRENT.with_borrow_mut(|stack| {
            if stack.last() == Some(&context) {
                stack.pop();
            }
        });
        destroy(context)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxSetCurrent(context: Handle) -> i32 {
    api(|| {
        if context != 0 {
            get(&mut state(), context)?;
        }
        CURRENT.with_borrow_mut(|stack| {
            stack.pop();
            if context != 0 {
                stack.push(context);
            }
        });
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxGetCurrent(context: Out<Handle>) -> i32 {
    api(|| context.put(top().unwrap_or(0)))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxPushCurrent_v2(context: Handle) -> i32 {
    api(|| {
        get(&mut state(), context)?;
        CURRENT.with_borrow_mut(|stack| stack.push(context));
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxPopCurrent_v2(context: Out<Handle>) -> i32 {
    api(|| {
        let popped = CURRENT.with_borrow_mut(Vec::pop).ok_or_else(no_context)?;
        context.put_if_wanted(popped);
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxGetDevice(device: Out<i32>) -> i32 {
    api(|| {
        let mut state = state();
        let context = current(&state)?;
        device.put(get(&mut state, context)?.device as i32)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxSynchronize() -> i32 {
    api(|| {
        let context = current(&state())?;
        stream::run_context(context)
    })
}

/// Reads or changes the current context.
fn with_current(change: impl FnOnce(&mut Context) -> Result<()>) -> i32 {
    api(|| {
        let mut state = state();
        let context = current(&state)?;
        change(get(&mut state, context)?)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxGetFlags(flags: Out<u32>) -> i32 {
    with_current(|context| flags.put(context.flags))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxSetFlags(flags: u32) -> i32 {
    with_current(|context| {
        context.flags = flags;
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxGetLimit(value: Out<usize>, limit: i32) -> i32 {
    with_current(|context| {
        let usual = match limit {
            0 => 1 << 10, // stack of a thread
            1 => 1 << 20, // printf buffer
            2 => 8 << 20, // malloc heap
            _ => return Err(Error::plain(Code::UNSUPPORTED_LIMIT)),
        };
        value.put(context.limits.get(&limit).copied().unwrap_or(usual))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxSetLimit(limit: i32, value: usize) -> i32 {
    with_current(|context| {
        if !(0..=2).contains(&limit) {
            return Err(Error::plain(Code::UNSUPPORTED_LIMIT));
        }
        context.limits.insert(limit, value);
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxGetCacheConfig(config: Out<i32>) -> i32 {
    with_current(|context| config.put(context.cache_config))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxSetCacheConfig(config: i32) -> i32 {
    with_current(|context| {
        context.cache_config = config;
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxGetStreamPriorityRange(least: Out<i32>, greatest: Out<i32>) -> i32 {
    with_current(|_| {
        least.put_if_wanted(stream::LEAST_PRIORITY);
        greatest.put_if_wanted(stream::GREATEST_PRIORITY);
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxEnablePeerAccess(peer: Handle, flags: u32) -> i32 {
    api(|| {
        let mut state = state();
        let context = working(&state)?;
        if flags != 0 {
            return Err(Error::invalid("the flags of cuCtxEnablePeerAccess must be 0"));
        }
        let device = get(&mut state, peer)?.device;
        let own = get(&mut state, context)?;
        if own.device == device {
            return Err(Error::new(Code::INVALID_DEVICE, "a device is no peer of itself"));
        }
        if !own.peers.insert(peer) {
            return Err(Error::plain(Code::PEER_ACCESS_ALREADY_ENABLED));
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxDisablePeerAccess(peer: Handle) -> i32 {
    with_current(|context| match context.peers.remove(&peer) {
        true => Ok(()),
        false => Err(Error::plain(Code::PEER_ACCESS_NOT_ENABLED)),
    })
}
