//! Copies and fills.
//!
//! A copy from pageable host memory takes the data when it is called, and one to pageable memory is done
//! when it returns, as on a GPU. Page-locked memory is read and written when the stream gets there.

use super::abi::{DevicePtr, Handle, In, Out};
use super::context::{self, working};
use super::device::api;
use super::error::{Code, Error, Result};
use super::memory::{Kind, used_early};
use super::runtime::using_memory;
use super::stream::{self, context_of, resolve, submit};
use super::{State, state};

/// The bytes that a copy reads or writes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In an allocation of the driver, or registered with it.
    Known(u64),
    /// Host memory that the driver knows nothing of.
    Pageable(u64),
}

/// Where a pointer may point to.
#[derive(Clone, Copy)]
enum Side {
    Device,
    Host,
    Either,
}

fn place(state: &State, what: &str, side: Side, address: u64, bytes: usize) -> Result<Place> {
    match side {
        Side::Device => state.memory.device_range(what, address, bytes).map(|_| Place::Known(address)),
        Side::Host | Side::Either => {
            if state.memory.pinned(address, bytes).is_some() {
                return Ok(Place::Known(address));
            }
            let in_device = state.memory.find(address).is_some_and(|block| {
                block.kind == Kind::Device && address < block.address + block.bytes as u64
            });
            match (in_device, side) {
                (true, Side::Either) => place(state, what, Side::Device, address, bytes),
                (true, _) => {
                    Err(Error::invalid(format!("{what}: the host pointer {address:#x} is device memory")))
                }
                (false, _) if address == 0 => {
                    Err(Error::invalid(format!("{what}: the host pointer is null")))
                }
                (false, _) => Ok(Place::Pageable(address)),
            }
        }
    }
}

/// Whether the memory at `place`, which was there when the copy was submitted, is still there.
fn still_there(what: &str, place: Place, bytes: usize) -> Result<u64> {
    match place {
        Place::Pageable(address) => Ok(address),
        Place::Known(address) => match state().memory.device_range(what, address, bytes) {
            Ok(block) if block.pending => Err(used_early(what, address)),
            Ok(_) => Ok(address),
            Err(_) => Err(Error::new(
                Code::ILLEGAL_ADDRESS,
                format!(
                    "{what}: the {bytes} bytes at {address:#x} were freed before the stream got to the copy"
                ),
            )),
        },
    }
}

/// Submits a copy. `stream` none: the default stream, which is waited for if a host is involved.
fn copy(
    what: &'static str,
    (to, to_side): (u64, Side),
    (from, from_side): (u64, Side),
    bytes: usize,
    stream: Option<Handle>,
) -> Result<()> {
    let (context, point, wait) = {
        let mut state = state();
        let resolved = resolve(&mut state, stream.unwrap_or(0))?;
        if bytes == 0 {
            return Ok(());
        }
        let to = place(&state, what, to_side, to, bytes)?;
        let from = place(&state, what, from_side, from, bytes)?;
        let snapshot = match from {
            Place::Pageable(address) => Some(In::at_address(address).bytes(bytes)?),
            Place::Known(_) => None,
        };
        let point = submit(&mut state, resolved, move || {
            using_memory(|| {
                let from = match &snapshot {
                    Some(snapshot) => snapshot.as_ptr() as u64,
                    None => still_there(what, from, bytes)?,
                };
                let to = still_there(what, to, bytes)?;
                // SAFETY: both ranges were found in allocations just now, and nothing is freed meanwhile; or are
                // the snapshot, or host memory of the program, which has to keep it until the copy is done.
                unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
                Ok(())
            })
        })?;
        let host = matches!(to_side, Side::Host) || matches!(from_side, Side::Host);
        let either = matches!(to_side, Side::Either) || matches!(from_side, Side::Either);
        let synchronous = stream.is_none() && (host || either);
        (context_of(&state, resolved)?, point, synchronous || matches!(to, Place::Pageable(_)))
    };
    if wait { stream::wait(context, point) } else { Ok(()) }
}

/// Submits a fill of `count` elements.
fn fill(
    what: &'static str,
    to: DevicePtr,
    element: &[u8],
    count: usize,
    stream: Option<Handle>,
) -> Result<()> {
    let mut state = state();
    let stream = resolve(&mut state, stream.unwrap_or(0))?;
    let bytes =
        count.checked_mul(element.len()).ok_or_else(|| Error::invalid("more bytes than there are"))?;
    if bytes == 0 {
        return Ok(());
    }
    if !to.is_multiple_of(element.len() as u64) {
        return Err(Error::invalid(format!("{what}: {to:#x} is not a multiple of {}", element.len())));
    }
    let to = place(&state, what, Side::Device, to, bytes)?;
    let element = element.to_vec();
    let fill = move || {
        using_memory(|| {
            let to = still_there(what, to, bytes)?;
            // SAFETY: the range was found in an allocation just now, and nothing is freed meanwhile.
            let target = unsafe { std::slice::from_raw_parts_mut(to as *mut u8, bytes) };
            target.chunks_exact_mut(element.len()).for_each(|chunk| chunk.copy_from_slice(&element));
            Ok(())
        })
    };
    submit(&mut state, stream, fill).map(drop)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyHtoD_v2(to: DevicePtr, from: In<u8>, bytes: usize) -> i32 {
    api(|| copy("cuMemcpyHtoD", (to, Side::Device), (from.address() as u64, Side::Host), bytes, None))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyHtoDAsync_v2(to: DevicePtr, from: In<u8>, bytes: usize, stream: Handle) -> i32 {
    let from = (from.address() as u64, Side::Host);
    api(|| copy("cuMemcpyHtoDAsync", (to, Side::Device), from, bytes, Some(stream)))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyDtoH_v2(to: Out<u8>, from: DevicePtr, bytes: usize) -> i32 {
    api(|| copy("cuMemcpyDtoH", (to.address() as u64, Side::Host), (from, Side::Device), bytes, None))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyDtoHAsync_v2(to: Out<u8>, from: DevicePtr, bytes: usize, stream: Handle) -> i32 {
    let to = (to.address() as u64, Side::Host);
    api(|| copy("cuMemcpyDtoHAsync", to, (from, Side::Device), bytes, Some(stream)))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyDtoD_v2(to: DevicePtr, from: DevicePtr, bytes: usize) -> i32 {
    api(|| copy("cuMemcpyDtoD", (to, Side::Device), (from, Side::Device), bytes, None))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyDtoDAsync_v2(
    to: DevicePtr,
    from: DevicePtr,
    bytes: usize,
    stream: Handle,
) -> i32 {
    api(|| copy("cuMemcpyDtoDAsync", (to, Side::Device), (from, Side::Device), bytes, Some(stream)))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpy(to: DevicePtr, from: DevicePtr, bytes: usize) -> i32 {
    api(|| copy("cuMemcpy", (to, Side::Either), (from, Side::Either), bytes, None))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyAsync(to: DevicePtr, from: DevicePtr, bytes: usize, stream: Handle) -> i32 {
    api(|| copy("cuMemcpyAsync", (to, Side::Either), (from, Side::Either), bytes, Some(stream)))
}

/// A copy between two contexts: each pointer has to be of its context's device.
fn peer_copy(
    what: &'static str,
    (to, to_context): (DevicePtr, Handle),
    (from, from_context): (DevicePtr, Handle),
    bytes: usize,
    stream: Option<Handle>,
) -> Result<()> {
    {
        let mut state = state();
        working(&state)?;
        for (address, context) in [(to, to_context), (from, from_context)] {
            let device = context::get(&mut state, context)?.device;
            let block = state.memory.device_range(what, address, bytes)?;
            if block.device != device {
                return Err(Error::invalid(format!(
                    "{what}: {address:#x} is of device {}, its context of device {device}",
                    block.device
                )));
            }
        }
    }
    copy(what, (to, Side::Device), (from, Side::Device), bytes, stream)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyPeer(
    to: DevicePtr,
    to_context: Handle,
    from: DevicePtr,
    from_context: Handle,
    bytes: usize,
) -> i32 {
    api(|| peer_copy("cuMemcpyPeer", (to, to_context), (from, from_context), bytes, None))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemcpyPeerAsync(
    to: DevicePtr,
    to_context: Handle,
    from: DevicePtr,
    from_context: Handle,
    bytes: usize,
    stream: Handle,
) -> i32 {
    api(|| peer_copy("cuMemcpyPeerAsync", (to, to_context), (from, from_context), bytes, Some(stream)))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemsetD8_v2(to: DevicePtr, value: u8, count: usize) -> i32 {
    api(|| fill("cuMemsetD8", to, &value.to_ne_bytes(), count, None))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemsetD16_v2(to: DevicePtr, value: u16, count: usize) -> i32 {
    api(|| fill("cuMemsetD16", to, &value.to_ne_bytes(), count, None))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemsetD32_v2(to: DevicePtr, value: u32, count: usize) -> i32 {
    api(|| fill("cuMemsetD32", to, &value.to_ne_bytes(), count, None))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemsetD8Async(to: DevicePtr, value: u8, count: usize, stream: Handle) -> i32 {
    api(|| fill("cuMemsetD8Async", to, &value.to_ne_bytes(), count, Some(stream)))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemsetD16Async(to: DevicePtr, value: u16, count: usize, stream: Handle) -> i32 {
    api(|| fill("cuMemsetD16Async", to, &value.to_ne_bytes(), count, Some(stream)))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemsetD32Async(to: DevicePtr, value: u32, count: usize, stream: Handle) -> i32 {
    api(|| fill("cuMemsetD32Async", to, &value.to_ne_bytes(), count, Some(stream)))
}
