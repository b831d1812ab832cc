//! The emulated devices, and what they say of themselves.

use std::sync::atomic::{AtomicBool, Ordering};

use super::abi::{In, Out};
use super::error::{Code, Error, Result, guard};
use super::options::Options;
use std::ffi::{c_char, c_void};

/// The CUDA version whose functions these are.
const VERSION: i32 = 13000;

static INITIALISED: AtomicBool = AtomicBool::new(false);

/// [`guard`], for every function that needs `cuInit`.
pub(super) fn api(body: impl FnOnce() -> Result<()>) -> i32 {
    guard(|| {
        if INITIALISED.load(Ordering::Acquire) {
            body()
        } else {
            Err(Error::new(Code::NOT_INITIALIZED, "cuInit has not been called"))
        }
    })
}

/// The limits of a device that differ between generations.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) capability: u32,
    /// Dynamic and static shared memory of a block that asked for more than [`DEFAULT_SHARED`].
    pub(super) shared_optin: u32,
    pub(super) shared_per_multiprocessor: u32,
    pub(super) threads_per_multiprocessor: u32,
    pub(super) blocks_per_multiprocessor: u32,
}

/// Shared memory of a block that asked for nothing.
pub(super) const DEFAULT_SHARED: u32 = 48 << 10;
/// What the system takes of a block's shared memory.
pub(super) const RESERVED_SHARED: u32 = 1 << 10;
pub(super) const MULTIPROCESSORS: u32 = 4;
pub(super) const MAX_THREADS: u32 = 1024;
pub(super) const MAX_BLOCK: [u32; 3] = [1024, 1024, 64];
pub(super) const MAX_GRID: [u32; 3] = [i32::MAX as u32, 65535, 65535];

/// The limits of every device.
pub(super) fn limits() -> Result<Limits> {
    let capability = Options::get()?.compute_capability;
    let kilobytes = match capability {
        80 => 163,
        89 => 99,
        _ => 227,
    };
    Ok(Limits {
        capability,
        shared_optin: kilobytes << 10,
        shared_per_multiprocessor: (kilobytes + 1) << 10,
        threads_per_multiprocessor: if capability == 89 { 1536 } else { 2048 },
        blocks_per_multiprocessor: if capability == 89 { 24 } else { 32 },
    })
}

/// The device with this number.
pub(super) fn check(device: i32) -> Result<usize> {
    let count = Options::get()?.devices;
    usize::try_from(device).ok().filter(|device| *device < count).ok_or_else(|| {
        Error::new(Code::INVALID_DEVICE, format!("there is no device {device}: CUEMU_DEVICES is {count}"))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuInit(flags: u32) -> i32 {
    guard(|| {
        if flags != 0 {
            return Err(Error::invalid("the flags of cuInit must be 0"));
        }
        if Options::get()?.devices == 0 {
            return Err(Error::new(Code::NO_DEVICE, "CUEMU_DEVICES is 0"));
        }
        INITIALISED.store(true, Ordering::Release);
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDriverGetVersion(version: Out<i32>) -> i32 {
    guard(|| version.put(VERSION))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetCount(count: Out<i32>) -> i32 {
    api(|| count.put(Options::get()?.devices as i32))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGet(device: Out<i32>, ordinal: i32) -> i32 {
    api(|| device.put(check(ordinal)? as i32))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetName(name: Out<u8>, bytes: i32, device: i32) -> i32 {
    api(|| name.put_text(&format!("CPU emulator {}", check(device)?), usize::try_from(bytes).unwrap_or(0)))
}

fn uuid(device: i32) -> Result<[u8; 16]> {
    let mut uuid = *b"gradlens cuemu\0\0";
    uuid[15] = check(device)? as u8;
    Ok(uuid)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetUuid(id: Out<[u8; 16]>, device: i32) -> i32 {
    api(|| id.put(uuid(device)?))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetUuid_v2(id: Out<[u8; 16]>, device: i32) -> i32 {
    api(|| id.put(uuid(device)?))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetPCIBusId(id: Out<u8>, bytes: i32, device: i32) -> i32 {
    api(|| id.put_text(&format!("0000:{:02x}:00.0", check(device)? + 1), usize::try_from(bytes).unwrap_or(0)))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: Out<usize>, device: i32) -> i32 {
    api(|| {
        check(device)?;
        bytes.put(Options::get()?.memory as usize)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetAttribute(value: Out<i32>, attribute: i32, device: i32) -> i32 {
    api(|| value.put(self::attribute(attribute, check(device)?)?))
}

/// `CU_DEVICE_ATTRIBUTE_*` by number; what is not known is 0, as is what these devices do not have.
fn attribute(attribute: i32, device: usize) -> Result<i32> {
    let limits = limits()?;
    let hopper = i32::from(limits.capability >= 90);
    Ok(match attribute {
        1 => MAX_THREADS as i32,
        2..=4 => MAX_BLOCK[attribute as usize - 2] as i32,
        5..=7 => MAX_GRID[attribute as usize - 5] as i32,
        8 => DEFAULT_SHARED as i32,
        9 => 65536,                       // constant memory
        10 => 32,                         // warp
        11 => i32::MAX,                   // pitch
        12 | 82 => 65536,                 // registers of a block, of a multiprocessor
        13 => 1_000_000,                  // clock, kHz
        14 | 30 => 512,                   // alignment of textures and surfaces
        15 | 31 | 41 | 78..=80 | 90 => 1, // overlap, concurrent kernels, unified addressing, priorities, caches
        16 => MULTIPROCESSORS as i32,
        19 | 91 | 95 | 99 | 115 => 1, // mapped and registered host memory, cooperative launch, memory pools
        33 => device as i32 + 1,      // PCI bus
        36 => 1_000_000,              // memory clock, kHz
        37 => 256,                    // memory bus, bits
        38 => 4 << 20,                // L2 cache
        39 => limits.threads_per_multiprocessor as i32,
        40 => 2, // copy engines
        75 => (limits.capability / 10) as i32,
        76 => (limits.capability % 10) as i32,
        81 => limits.shared_per_multiprocessor as i32,
        87 => 2, // single to double performance
        97 => limits.shared_optin as i32,
        106 => limits.blocks_per_multiprocessor as i32,
        111 => RESERVED_SHARED as i32,
        127 => hopper, // tensor maps
        _ => 0,
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceCanAccessPeer(can: Out<i32>, device: i32, peer: i32) -> i32 {
    api(|| can.put(i32::from(check(device)? != check(peer)?)))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetP2PAttribute(value: Out<i32>, attribute: i32, from: i32, to: i32) -> i32 {
    api(|| {
        if check(from)? == check(to)? {
            return Err(Error::new(Code::INVALID_DEVICE, "a device is no peer of itself"));
        }
        // 2: access, 3: atomics. The rest: rank 0, no arrays.
        value.put(i32::from(matches!(attribute, 2 | 3)))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuProfilerStart() -> i32 {
    api(|| Ok(()))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuProfilerStop() -> i32 {
    api(|| Ok(()))
}

/// A program that asks for functions by name and version gets none: it has to use those that are exported.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetProcAddress_v2(
    symbol: In<c_char>,
    function: Out<*const c_void>,
    _version: i32,
    _flags: u64,
    status: Out<i32>,
) -> i32 {
    guard(|| {
        function.put(std::ptr::null())?;
        status.put_if_wanted(1); // CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND
        let name = symbol.text()?.to_string_lossy();
        Err(Error::new(
            Code::NOT_FOUND,
            format!("{name}: this stand-in driver exports functions, it tells no addresses"),
        ))
    })
}
