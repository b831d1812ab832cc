//! Device memory within a budget.
//!
//! Memory comes from the driver's stream-ordered pool (`cuMemAllocAsync`), which keeps what is freed and hands
//! it out again without a system call: an arena that the driver keeps, in which every buffer still has its own
//! exact bounds for memory checkers to see. A buffer dropped while kernels that use it are still queued is
//! freed behind them, because allocation, kernels and freeing all go through the compute stream.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use cudarc::driver::{CudaEvent, CudaSlice, CudaStream, DevicePtr, DriverError, sys};

use super::device::driver_failed;
use super::element::Element;
use super::module::lock;
use crate::error::{Error, Result};

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
    /// What it was planned for.
    pub(super) planned: Option<String>,
}

/// Bytes counted as used, until this is dropped.
struct Reservation {
    ledger: Arc<Ledger>,
    bytes: u64,
}

impl Reservation {
    /// Err: the bytes in use, to which `bytes` cannot be added within the budget.
    fn new(ledger: &Arc<Ledger>, bytes: usize) -> std::result::Result<Self, u64> {
        let bytes = bytes as u64;
        let within = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= ledger.budget_bytes);
        let before = ledger.used_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within)?;
        ledger.peak_bytes.fetch_max(before + bytes, Ordering::Relaxed);
        Ok(Self { ledger: Arc::clone(ledger), bytes })
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.ledger.used_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Memory of a device, freed in the order of the compute stream.
pub struct Allocation {
    slice: CudaSlice<u8>,
    /// After the last copy into it by another stream.
    pub(super) arrived: Mutex<Option<Arc<CudaEvent>>>,
    _reservation: Reservation,
}

impl Memory {
    /// The memory of `stream`'s device.
    pub(super) fn new(stream: &Arc<CudaStream>, budget_bytes: u64) -> Result<Self> {
        keep_freed_memory(stream)
            .map_err(|error| driver_failed("could not set up its memory pool", error))?;
        let ledger = Ledger { budget_bytes, used_bytes: AtomicU64::new(0), peak_bytes: AtomicU64::new(0) };
        Ok(Self { stream: Arc::clone(stream), ledger: Arc::new(ledger), planned: None })
    }

    /// Memory with unspecified contents.
    ///
    /// # Errors
    ///
    /// The budget or the device is exhausted, or the driver fails.
    pub fn alloc(&self, bytes: usize) -> Result<Allocation> {
        // The driver knows no empty allocation.
        let bytes = bytes.max(1);
        let reservation = Reservation::new(&self.ledger, bytes).map_err(|used| {
            self.exhausted("the device memory budget", self.budget(), used, &format!("{bytes} bytes"))
        })?;
        // SAFETY: the contents are unspecified, and callers write before they read.
        let slice = unsafe { self.stream.alloc::<u8>(bytes) };
        let slice = slice.map_err(|error| match error.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let used = self.used_bytes() - bytes as u64;
                self.exhausted("device memory", self.limit(), used, &format!("{bytes} bytes"))
            }
            _ => driver_failed("could not allocate memory", error),
        })?;
        Ok(Allocation { slice, arrived: Mutex::new(None), _reservation: reservation })
    }

    /// `used`: bytes in use besides those asked for.
    fn exhausted(&self, what: &str, limit: String, used: u64, asked: &str) -> Error {
        let planned = self.planned.as_ref().map_or(String::new(), |planned| format!("; planned: {planned}"));
        Error::new(format!("{what} is exhausted"))
            .at(format!("cuda:{}", self.stream.context().ordinal()))
            .expected(format!("{limit}{planned}"))
            .found(format!("{used} in use and {asked} more asked for"))
            .hint("a smaller --tokens_per_pass or --max_length needs less, and so do other programs on the device")
    }

    /// The budget in words.
    fn budget(&self) -> String {
        format!("at most {} bytes", self.ledger.budget_bytes)
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

    /// Address on the device. Valid while this lives, in the order of [`Allocation::stream`].
    pub fn address(&self) -> u64 {
        self.slice.device_ptr(self.slice.stream()).0
    }

    /// The stream that it is allocated and freed on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        self.slice.stream()
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // Freed in the order of its stream, which may not have waited for the copy.
        if let Some(arrived) = lock(&self.arrived).take()
            && self.stream().wait(&arrived).is_err()
        {
            let _ = arrived.synchronize();
        }
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

/// A row-major array on the device, `[rows, width]`, or neighbouring rows of one: views share its memory, which is
/// freed after the last of them.
pub struct Buf<T> {
    allocation: Arc<Allocation>,
    /// Elements of the allocation before the first row.
    start: usize,
    rows: usize,
    width: usize,
    element: PhantomData<T>,
}

impl<T: Element> Buf<T> {
    /// With unspecified contents.
    ///
    /// # Errors
    ///
    /// The budget or the device is exhausted.
    pub fn new(memory: &Memory, rows: usize, width: usize) -> Result<Self> {
        let bytes = rows.checked_mul(width).and_then(|len| len.checked_mul(size_of::<T>()));
        let bytes = bytes.ok_or_else(|| {
            let asked = format!("{rows} x {width} elements of {} bytes", size_of::<T>());
            memory.exhausted("the device memory budget", memory.budget(), memory.used_bytes(), &asked)
        })?;
        Ok(Self { allocation: Arc::new(memory.alloc(bytes)?), start: 0, rows, width, element: PhantomData })
    }

    /// Of zeros.
    ///
    /// # Errors
    ///
    /// As [`Buf::new`], or the driver fails.
    pub fn zeros(memory: &Memory, rows: usize, width: usize) -> Result<Self> {
        let buf = Self::new(memory, rows, width)?;
        let bytes = rows * width * size_of::<T>();
        // SAFETY: the memory is live and has this size; zero bytes are a value of every element.
        let set = memory.stream.context().bind_to_thread().and_then(|()| unsafe {
            sys::cuMemsetD8Async(buf.address(), 0, bytes, memory.stream.cu_stream()).result()
        });
        set.map_err(|error| driver_failed("could not clear memory", error))?;
        Ok(buf)
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The memory. A view's rows are a part of it.
    pub fn allocation(&self) -> &Allocation {
        &self.allocation
    }

    /// Where the first row starts on the device.
    pub fn address(&self) -> u64 {
        self.allocation.address() + (self.start * size_of::<T>()) as u64
    }

    /// These rows, in the same memory.
    ///
    /// # Panics
    ///
    /// There are no such rows.
    pub fn view(&self, rows: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        let start = self.start + rows.start * self.width;
        Self { allocation: Arc::clone(&self.allocation), start, rows: rows.len(), ..*self }
    }

    /// These elements of the only row, in the same memory.
    ///
    /// # Panics
    ///
    /// There are no such elements, or more rows.
    pub fn elements(&self, range: Range<usize>) -> Self {
        assert!(self.rows == 1 && range.start <= range.end && range.end <= self.width, "elements {range:?}");
        let (start, width) = (self.start + range.start, range.len());
        Self { allocation: Arc::clone(&self.allocation), start, width, ..*self }
    }

    /// All rows, in the same memory.
    pub fn share(&self) -> Self {
        self.view(0..self.rows)
    }

    /// A copy on the device, in the order of `memory`'s stream.
    ///
    /// # Errors
    ///
    /// As [`Buf::new`], or the driver fails.
    pub fn duplicate(&self, memory: &Memory) -> Result<Self> {
        let copy = Self::new(memory, self.rows, self.width)?;
        let bytes = self.rows * self.width * size_of::<T>();
        if bytes > 0 {
            let stream = memory.stream.cu_stream();
            // SAFETY: both are live and of this size, and the copy goes through the stream that orders their freeing.
            let copied = unsafe { sys::cuMemcpyDtoDAsync_v2(copy.address(), self.address(), bytes, stream) };
            copied.result().map_err(|error| driver_failed("could not copy on the device", error))?;
        }
        Ok(copy)
    }

    /// A copy of host values on the device, in the order of `memory`'s stream. `values`: `[rows, width]`.
    ///
    /// # Errors
    ///
    /// As [`Buf::new`], or the driver fails.
    ///
    /// # Panics
    ///
    /// `values` are not whole rows.
    pub fn from_host(memory: &Memory, values: &[T], width: usize) -> Result<Self> {
        assert!(values.len().is_multiple_of(width), "{} values in rows of {width}", values.len());
        let buf = Self::new(memory, values.len() / width.max(1), width)?;
        let bytes: &[u8] = bytemuck::cast_slice(values);
        if !bytes.is_empty() {
            let stream = memory.stream.cu_stream();
            let bound = memory.stream.context().bind_to_thread();
            // SAFETY: the target is as large; the driver has read pageable memory when the call returns.
            let copied = bound.and_then(|()| unsafe {
                sys::cuMemcpyHtoDAsync_v2(buf.address(), bytes.as_ptr().cast(), bytes.len(), stream).result()
            });
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
        let slice = &self.allocation.slice;
        let stream = slice.stream();
        let start = self.start * size_of::<T>();
        let copied = stream.memcpy_dtoh(&slice.slice(start..start + bytes.len()), bytes);
        copied
            .and_then(|()| stream.synchronize())
            .map_err(|error| driver_failed("could not copy from the device", error))?;
        Ok(values)
    }
}
