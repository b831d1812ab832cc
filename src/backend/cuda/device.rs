//! Which CUDA devices there are, and one of them opened: context, streams, what it can do.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute};
use cudarc::driver::{CudaContext, CudaStream, DriverError};

use super::memory::Memory;
use crate::error::{Error, Result};

/// What `--device` names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceName {
    /// The first usable CUDA device, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// A CUDA device by its ordinal.
    Cuda(usize),
}

impl FromStr for DeviceName {
    type Err = Error;

    /// `auto`, `cpu`, `cuda` (the first) or `cuda:N`.
    fn from_str(name: &str) -> Result<Self> {
        let unknown = || {
            Error::usage("no such device").expected("auto, cpu, cuda or cuda:N").found(format!("{name:?}"))
        };
        match name.split_once(':') {
            None if name == "auto" => Ok(Self::Auto),
            None if name == "cpu" => Ok(Self::Cpu),
            None if name == "cuda" => Ok(Self::Cuda(0)),
            Some(("cuda", ordinal)) if ordinal.bytes().all(|byte| byte.is_ascii_digit()) => {
                ordinal.parse().map(Self::Cuda).map_err(|_| unknown())
            }
            _ => Err(unknown()),
        }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// Tensor cores with bfloat16, and cp.async.
pub const MIN_COMPUTE_CAPABILITY: (i32, i32) = (8, 0);

/// What a device is and has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// N of `cuda:N`.
    pub ordinal: usize,
    /// As the driver calls it.
    pub name: String,
    /// (major, minor).
    pub compute_capability: (i32, i32),
    /// Memory of the device.
    pub total_bytes: u64,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Shared memory that one block can ask for.
    pub shared_bytes_per_block: u32,
}

impl DeviceInfo {
    /// Architecture for the compiler: `90a` on compute capability 9.0, whose tensor cores need the `a`.
    pub fn arch(&self) -> String {
        let (major, minor) = self.compute_capability;
        let suffix = if self.compute_capability == (9, 0) { "a" } else { "" };
        format!("{major}{minor}{suffix}")
    }
}

/// All devices of this machine, in the driver's order.
///
/// # Errors
///
/// No CUDA driver, or it does not start.
pub fn devices() -> Result<Vec<DeviceInfo>> {
    driver_present()?;
    let count = CudaContext::device_count().map_err(|error| driver_failed("could not start", error))?;
    (0..count.max(0) as usize)
        .map(|ordinal| info(ordinal).map_err(|e| driver_failed("could not describe a device", e)))
        .collect()
}

/// Bytes of device `ordinal` of `all` that are free now.
///
/// # Errors
///
/// No such device, one that is too old, or one that does not answer.
pub fn free_bytes(all: &[DeviceInfo], ordinal: usize) -> Result<u64> {
    check(all, ordinal)?;
    let free = CudaContext::new(ordinal).and_then(|context| context.mem_get_info());
    free.map(|(free, _)| free as u64)
        .map_err(|error| driver_failed("could not open the device", error).at(format!("cuda:{ordinal}")))
}

/// Device `ordinal` of `all`, if it can be used.
fn check(all: &[DeviceInfo], ordinal: usize) -> Result<&DeviceInfo> {
    let place = format!("cuda:{ordinal}");
    let Some(info) = all.get(ordinal) else {
        let list = all.iter().map(|info| format!("cuda:{} {}", info.ordinal, info.name)).collect::<Vec<_>>();
        let found = if list.is_empty() { "no device".to_owned() } else { list.join(", ") };
        return Err(Error::new("no such CUDA device")
            .at(place)
            .expected("one of the devices of this machine")
            .found(found)
            .hint("CUDA_VISIBLE_DEVICES hides devices and renumbers the others"));
    };
    if info.compute_capability < MIN_COMPUTE_CAPABILITY {
        let (major, minor) = info.compute_capability;
        return Err(Error::new("the device is too old")
            .at(place)
            .expected("compute capability 8.0 or newer (A100, RTX 30 series and later)")
            .found(format!("{} with {major}.{minor}", info.name))
            .hint("--device cpu"));
    }
    Ok(info)
}

/// CUDA 12.0, the first with all functions that are used here, as the driver says it.
const MIN_DRIVER: i32 = 12_000;

/// Whether this machine has the driver's library.
pub fn driver_is_there() -> bool {
    // SAFETY: dlopen of the CUDA driver by its usual names; its initialisers have no preconditions.
    unsafe { sys::is_culib_present() }
}

/// cudarc panics when the library or one of its functions is missing, so nothing of it is called before this.
fn driver_present() -> Result<()> {
    if !driver_is_there() {
        return Err(Error::new("there is no CUDA driver on this machine")
            .expected("libcuda.so, which comes with NVIDIA's driver")
            .hint("--device cpu; on a cluster, ask for a node with a GPU"));
    }
    let mut version = 0;
    // SAFETY: a function of every driver, which needs no cuInit; writes one integer.
    let asked = unsafe { sys::cuDriverGetVersion(&mut version) };
    asked.result().map_err(|error| driver_failed("does not say its version", error))?;
    new_enough(version)
}

/// `version`: 1000·major + 10·minor of the CUDA that a driver is for.
fn new_enough(version: i32) -> Result<()> {
    if version >= MIN_DRIVER {
        return Ok(());
    }
    Err(Error::new("the CUDA driver is too old")
        .expected("a driver for CUDA 12.0 or newer: 525 or newer")
        .found(format!("one for CUDA {}.{}", version / 1000, version % 1000 / 10))
        .hint("update NVIDIA's driver, or --device cpu"))
}

/// The driver's error under a sentence of ours.
pub(super) fn driver_failed(what: &str, error: DriverError) -> Error {
    let name = error.error_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let text = error.error_string().map(|text| text.to_string_lossy().into_owned()).unwrap_or_default();
    Error::new(format!("the CUDA driver {what}")).found(format!("{name}: {text}"))
}

fn info(ordinal: usize) -> std::result::Result<DeviceInfo, DriverError> {
    use cudarc::driver::result::device;
    let handle = device::get(ordinal as i32)?;
    // SAFETY: `handle` was just given out by the driver.
    let attribute = |attribute| unsafe { device::get_attribute(handle, attribute) };
    Ok(DeviceInfo {
        ordinal,
        name: device::get_name(handle)?,
        compute_capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        // SAFETY: as above.
        total_bytes: unsafe { device::total_mem(handle) }? as u64,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
        shared_bytes_per_block: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
            as u32,
    })
}

/// An open device.
pub struct Device {
    /// What it is.
    pub info: DeviceInfo,
    /// Kernels run here, in the order in which they were launched; memory is allocated and freed in this order.
    pub compute: Arc<CudaStream>,
    /// Copies between host and device that run beside the kernels.
    pub transfer: Arc<CudaStream>,
    /// The device's memory, within a budget.
    pub memory: Memory,
}

impl Device {
    /// Opens device `ordinal` for at most `budget_bytes` of its memory (`None`: what is free, less a reserve).
    ///
    /// # Errors
    ///
    /// No driver, no such device, one older than [`MIN_COMPUTE_CAPABILITY`], or one that does not answer.
    pub fn open(ordinal: usize, budget_bytes: Option<u64>) -> Result<Self> {
        let info = check(&devices()?, ordinal)?.clone();
        let place = format!("cuda:{ordinal}");
        let open = || -> std::result::Result<_, DriverError> {
            let context = CudaContext::new(ordinal)?;
            // SAFETY: order between the two streams is kept by explicit events (see `memory`); cudarc's own
            // events would cost two driver calls for every argument of every launch.
            unsafe { context.disable_event_tracking() };
            let (compute, transfer) = (context.new_stream()?, context.new_stream()?);
            Ok((context.mem_get_info()?.0 as u64, compute, transfer))
        };
        let (free_bytes, compute, transfer) =
            open().map_err(|error| driver_failed("could not open the device", error).at(&place))?;
        let memory = Memory::new(&compute, budget_bytes.unwrap_or(free_bytes - free_bytes / 16))?;
        Ok(Self { info, compute, transfer, memory })
    }

    /// Waits until everything asked for has happened. A kernel that failed since the last call shows here.
    ///
    /// # Errors
    ///
    /// What the driver says of the failure.
    pub fn synchronize(&self) -> Result<()> {
        let both = self.transfer.synchronize().and_then(|()| self.compute.synchronize());
        both.map_err(|error| {
            driver_failed("reports a failure", error)
                .at(format!("cuda:{} {}", self.info.ordinal, self.info.name))
                .hint("with CUDA_LAUNCH_BLOCKING=1 the failure is reported at the kernel that caused it")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_drivers() {
        for version in [12_000, 12_080, 13_000] {
            assert!(new_enough(version).is_ok());
        }
        let error = new_enough(11_080).unwrap_err().to_string();
        assert!(error.contains("the CUDA driver is too old") && error.contains("CUDA 11.8"), "{error}");
        assert!(error.contains("525 or newer") && error.contains("--device cpu"), "{error}");
    }

    #[test]
    fn names() {
        let parse = |name: &str| name.parse::<DeviceName>();
        for (name, device) in [
            ("auto", DeviceName::Auto),
            ("cpu", DeviceName::Cpu),
            ("cuda", DeviceName::Cuda(0)),
            ("cuda:0", DeviceName::Cuda(0)),
            ("cuda:11", DeviceName::Cuda(11)),
        ] {
            assert_eq!(parse(name).unwrap(), device);
        }
        for name in [
            "",
            "gpu",
            "cuda:",
            "cuda:x",
            "cuda:-1",
            "cuda:+1",
            "cuda:1:2",
            "CUDA",
            "cpu:0",
            "cuda:99999999999999999999",
        ] {
            assert!(parse(name).is_err(), "{name}");
        }
    }
}
