//! Device memory within a budget, and pinned staging between host and device.
//!
//! Memory comes from the driver's stream-ordered pool (`cuMemAllocAsync`), which keeps what is freed and hands
//! it out again without a system call: an arena that the driver keeps, in which every buffer still has its own
//! exact bounds for memory checkers to see. A buffer dropped while kernels that use it are still queued is
//! freed behind them, because allocation, kernels and freeing all go through the compute stream.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaEvent, CudaSlice, CudaStream, DevicePtr, DriverError, PinnedHostSlice, sys};

use super::device::driver_failed;
use crate::error::{Error, Result};

/// Bytes of one of the two pinned buffers through which large copies go.
const STAGING_BYTES: usize = 16 << 20;

/// What a device's memory is used for is counted here.
#[derive(Debug)]
struct Ledger {
    budget_bytes: u64,
    used_bytes: AtomicU64,
    peak_bytes: AtomicU64,
}

/// The memory of a device.
pub struct Memory {
    stream: Arc<CudaStream>,
    ledger: Arc<Ledger>,
}

/// Memory of a device, freed in the order of the compute stream.
pub struct Allocation {
    slice: CudaSlice<u8>,
    ledger: Arc<Ledger>,
}

impl Memory {
    /// The memory of `stream`'s device.
    pub(super) fn new(stream: &Arc<CudaStream>, budget_bytes: u64) -> Result<Self> {
        keep_freed_memory(stream)
            .map_err(|error| driver_failed("could not set up its memory pool", error))?;
        let ledger = Ledger { budget_bytes, used_bytes: AtomicU64::new(0), peak_bytes: AtomicU64::new(0) };
        Ok(Self { stream: Arc::clone(stream), ledger: Arc::new(ledger) })
    }

    /// Memory with unspecified contents.
    ///
    /// # Errors
    ///
    /// The budget or the device is exhausted.
    pub fn alloc(&self, bytes: usize) -> Result<Allocation> {
        // The driver knows no empty allocation.
        let bytes = bytes.max(1);
        let used = self.ledger.used_bytes.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        let exhausted = |what: &str, limit: String| {
            self.ledger.used_bytes.fetch_sub(bytes as u64, Ordering::Relaxed);
            Error::new(format!("{what} is exhausted"))
                .at(format!("cuda:{}", self.stream.context().ordinal()))
                .expected(limit)
                .found(format!("{} in use and {bytes} bytes more asked for", used - bytes as u64))
                .hint("--tokens_per_pass with a smaller number needs less")
        };
        if used > self.ledger.budget_bytes {
            return Err(exhausted(
                "the device memory budget",
                format!("at most {} bytes", self.ledger.budget_bytes),
            ));
        }
        // SAFETY: the contents are unspecified, and callers write before they read.
        let slice = unsafe { self.stream.alloc::<u8>(bytes) };
        let slice = slice.map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => exhausted("device memory", self.limit()),
            _ => driver_failed("could not allocate memory", error),
        })?;
        self.ledger.peak_bytes.fetch_max(used, Ordering::Relaxed);
        Ok(Allocation { slice, ledger: Arc::clone(&self.ledger) })
    }

    /// What the device itself says of its memory.
    fn limit(&self) -> String {
        match self.stream.context().mem_get_info() {
            Ok((free, total)) => format!("{free} of the device's {total} bytes are free"),
            Err(error) => format!("the driver does not say ({error:?})"),
        }
    }

    /// Bytes in use.
    pub fn used_bytes(&self) -> u64 {
        self.ledger.used_bytes.load(Ordering::Relaxed)
    }

    /// The most that were ever in use.
    pub fn peak_bytes(&self) -> u64 {
        self.ledger.peak_bytes.load(Ordering::Relaxed)
    }

    /// The most that may be in use.
    pub fn budget_bytes(&self) -> u64 {
        self.ledger.budget_bytes
    }
}

impl Allocation {
    /// Size.
    pub fn len(&self) -> usize {
        self.slice.len()
    }

    /// Never: the smallest allocation is one byte.
    pub fn is_empty(&self) -> bool {
        self.slice.is_empty()
    }

    /// Address on the device. Valid while this lives, in the order of the compute stream.
    pub fn address(&self) -> u64 {
        self.slice.device_ptr(self.slice.stream()).0
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        self.ledger.used_bytes.fetch_sub(self.slice.len() as u64, Ordering::Relaxed);
    }
}

/// Lets the pool keep freed memory instead of returning it at each synchronisation.
fn keep_freed_memory(stream: &Arc<CudaStream>) -> std::result::Result<(), DriverError> {
    let context = stream.context();
    if !context.has_async_alloc() {
        return Ok(());
    }
    let mut pool = std::ptr::null_mut();
    let mut threshold = u64::MAX;
    // SAFETY: the device handle is live; the attribute's value is a u64.
    unsafe {
        sys::cuDeviceGetDefaultMemPool(&mut pool, context.cu_device()).result()?;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut threshold).cast()).result()
    }
}

/// Two pinned buffers through which host memory reaches the device while the host goes on.
pub struct Staging {
    stream: Arc<CudaStream>,
    buffers: Mutex<[Staged; 2]>,
}

struct Staged {
    pinned: PinnedHostSlice<u8>,
    /// The last copy out of the buffer.
    copied: Option<CudaEvent>,
}

impl Staging {
    /// For copies on `stream`.
    ///
    /// # Errors
    ///
    /// The host has no memory to pin.
    pub fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        let context = stream.context();
        // SAFETY: bytes of any value are valid, and each is written before it is copied. Flags 0: not
        // write-combined, which cudarc's default is and which reads (and some hosts' writes) crawl on.
        let buffer = || unsafe { context.alloc_pinned_with_flags::<u8>(STAGING_BYTES, 0) };
        let pair = buffer().and_then(|first| Ok([first, buffer()?]));
        let pair = pair.map_err(|error| driver_failed("could not pin host memory", error))?;
        let buffers = Mutex::new(pair.map(|pinned| Staged { pinned, copied: None }));
        Ok(Self { stream: Arc::clone(stream), buffers })
    }

    /// Copies `bytes` to the start of `target`, after `ready`: an event of the compute stream by which the target
    /// was allocated and its last reader is through. Returns when the last piece is on its way; kernels on
    /// another stream must wait for [`Staging::sent`].
    ///
    /// # Errors
    ///
    /// `target` is too small, or the driver fails.
    pub fn upload(&self, bytes: &[u8], target: &Allocation, ready: &CudaEvent) -> Result<()> {
        if bytes.len() > target.len() {
            return Err(Error::new("a copy to the device is larger than its target")
                .expected(format!("at most {} bytes", target.len()))
                .found(bytes.len()));
        }
        let mut buffers = self.buffers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut send = || -> std::result::Result<(), DriverError> {
            self.stream.wait(ready)?;
            for (piece, (start, bytes)) in
                (0..).step_by(STAGING_BYTES).zip(bytes.chunks(STAGING_BYTES)).enumerate()
            {
                let staged = &mut buffers[piece % 2];
                if let Some(copied) = staged.copied.take() {
                    copied.synchronize()?;
                }
                let pinned = staged.pinned.as_mut_ptr()?;
                // SAFETY: the buffer is STAGING_BYTES long and no copy out of it is under way; the target was
                // checked to be large enough, and the pinned source lives as long as `self`.
                unsafe {
                    std::ptr::copy_nonoverlapping(bytes.as_ptr(), pinned, bytes.len());
                    let source = pinned.cast_const().cast();
                    let target = target.address() + start as u64;
                    sys::cuMemcpyHtoDAsync_v2(target, source, bytes.len(), self.stream.cu_stream())
                        .result()?;
                }
                staged.copied = Some(self.stream.record_event(None)?);
            }
            Ok(())
        };
        send().map_err(|error| driver_failed("could not copy to the device", error))
    }

    /// An event after everything uploaded so far, for another stream to wait for.
    ///
    /// # Errors
    ///
    /// The driver fails.
    pub fn sent(&self) -> Result<CudaEvent> {
        self.stream.record_event(None).map_err(|error| driver_failed("could not record an event", error))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // The buffers are unpinned next: no copy may still read them.
        let _ = self.stream.synchronize();
    }
}

/// An element type of device buffers.
pub trait Element: bytemuck::Pod {
    /// As kernels' entry points name it: `f32`, `bf16`.
    const NAME: &'static str;
}

impl Element for f32 {
    const NAME: &'static str = "f32";
}

impl Element for half::bf16 {
    const NAME: &'static str = "bf16";
}

/// A row-major array on the device, `[rows, width]`.
pub struct Buf<T> {
    allocation: Allocation,
    rows: usize,
    width: usize,
    element: PhantomData<T>,
}

impl<T: bytemuck::Pod> Buf<T> {
    /// With unspecified contents.
    ///
    /// # Errors
    ///
    /// The budget or the device is exhausted.
    pub fn new(memory: &Memory, rows: usize, width: usize) -> Result<Self> {
        let allocation = memory.alloc(rows * width * size_of::<T>())?;
        Ok(Self { allocation, rows, width, element: PhantomData })
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The memory.
    pub fn allocation(&self) -> &Allocation {
        &self.allocation
    }

    /// A copy of host values on the device, in the order of `memory`'s stream. `values`: `[rows, width]`.
    ///
    /// # Errors
    ///
    /// As [`Buf::new`], or the driver fails.
    pub fn from_host(memory: &Memory, values: &[T], width: usize) -> Result<Self> {
        let mut buf = Self::new(memory, values.len() / width.max(1), width)?;
        if !values.is_empty() {
            let bytes: &[u8] = bytemuck::cast_slice(values);
            let copied = memory.stream.memcpy_htod(bytes, &mut buf.allocation.slice);
            copied.map_err(|error| driver_failed("could not copy to the device", error))?;
        }
        Ok(buf)
    }

    /// The values, after all work on them so far. `[rows, width]`
    ///
    /// # Errors
    ///
    /// The driver fails; also where a kernel before failed.
    pub fn to_host(&self) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); self.rows * self.width];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut values);
        if bytes.is_empty() {
            return Ok(values);
        }
        let stream = self.allocation.slice.stream();
        let copied = stream.memcpy_dtoh(&self.allocation.slice.slice(..bytes.len()), bytes);
        copied
            .and_then(|()| stream.synchronize())
            .map_err(|error| driver_failed("could not copy from the device", error))?;
        Ok(values)
    }
}
