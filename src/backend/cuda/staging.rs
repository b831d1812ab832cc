//! Pinned memory between host and device.

use std::sync::{Arc, Mutex};

use cudarc::driver::{CudaEvent, CudaStream, DriverError, PinnedHostSlice, sys};

use super::device::driver_failed;
use super::memory::Allocation;
use super::module::lock;
use crate::error::{Error, Result};

/// Bytes of one of the two pinned buffers through which large copies go.
const STAGING_BYTES: usize = 16 << 20;

/// Two pinned buffers through which host memory reaches the device while the host goes on.
pub struct Staging {
    stream: Arc<CudaStream>,
    turns: Mutex<Turns>,
}

/// The buffers, used in turn.
struct Turns {
    buffers: [Staged; 2],
    next: usize,
}

/// A copy on its way to the device.
#[must_use = "a stream that uses what is copied must wait for it"]
pub struct Upload(Arc<CudaEvent>);

impl Upload {
    /// Lets what is put into `stream` from now on see the copy. The host does not wait.
    ///
    /// # Errors
    ///
    /// The driver fails.
    pub fn wait_on(self, stream: &CudaStream) -> Result<()> {
        stream.wait(&self.0).map_err(|error| driver_failed("could not wait for a copy", error))
    }
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
        // SAFETY: bytes of any value are valid, and all are written here. Flags 0: not
        // write-combined, which cudarc's default is and which reads (and some hosts' writes) crawl on.
        let buffer = || unsafe {
            let mut pinned = context.alloc_pinned_with_flags::<u8>(STAGING_BYTES, 0)?;
            pinned.as_mut_ptr()?.write_bytes(0, STAGING_BYTES);
            Ok(pinned)
        };
        let pair = buffer().and_then(|first| Ok([first, buffer()?]));
        let pair = pair.map_err(|error: DriverError| driver_failed("could not pin host memory", error))?;
        let buffers = pair.map(|pinned| Staged { pinned, copied: None });
        Ok(Self { stream: Arc::clone(stream), turns: Mutex::new(Turns { buffers, next: 0 }) })
    }

    /// Copies `bytes` to the start of `target`: [`Staging::upload_with`].
    ///
    /// # Errors
    ///
    /// As there.
    pub fn upload(&self, bytes: &[u8], target: &Allocation, ready: &CudaEvent) -> Result<Upload> {
        self.upload_with(bytes.len(), target, ready, |start, piece| {
            piece.copy_from_slice(&bytes[start..start + piece.len()]);
        })
    }

    /// Copies `len` bytes to the start of `target`, after `ready`: an event of the compute stream by which the target
    /// was allocated and its last reader is through. `write` puts the bytes from its first argument on, a multiple of
    /// 16 MiB, into pinned memory. Returns when the last piece is on its way; kernels see it after
    /// [`Upload::wait_on`]. The target may be dropped at any time: it is freed after the copy.
    ///
    /// # Errors
    ///
    /// `target` is too small, or the driver fails.
    pub fn upload_with(
        &self,
        len: usize,
        target: &Allocation,
        ready: &CudaEvent,
        write: impl Fn(usize, &mut [u8]),
    ) -> Result<Upload> {
        if len > target.len() {
            return Err(Error::new("a copy to the device is larger than its target")
                .expected(format!("at most {} bytes", target.len()))
                .found(len));
        }
        let mut turns = lock(&self.turns);
        let mut arrived = lock(&target.arrived);
        let mut send = || -> std::result::Result<CudaEvent, DriverError> {
            self.stream.wait(ready)?;
            if let Some(before) = &*arrived {
                self.stream.wait(before)?;
            }
            for start in (0..len).step_by(STAGING_BYTES) {
                let piece = STAGING_BYTES.min(len - start);
                let turn = turns.next;
                turns.next = (turn + 1) % turns.buffers.len();
                let staged = &mut turns.buffers[turn];
                if let Some(copied) = staged.copied.take() {
                    copied.synchronize()?;
                }
                let pinned = staged.pinned.as_mut_ptr()?;
                // SAFETY: the buffer is STAGING_BYTES long, written before (it was zeroed), and no copy out of it is
                // under way.
                write(start, unsafe { std::slice::from_raw_parts_mut(pinned, piece) });
                // SAFETY: the target was checked to be large enough, and is not freed before the event below; the
                // pinned source lives as long as `self`.
                unsafe {
                    let source = pinned.cast_const().cast();
                    let target = target.address() + start as u64;
                    sys::cuMemcpyHtoDAsync_v2(target, source, piece, self.stream.cu_stream()).result()?;
                }
                staged.copied = Some(self.stream.record_event(None)?);
            }
            self.stream.record_event(None)
        };
        let sent = send().map_err(|error| {
            // Pieces without an event may be on their way.
            let _ = self.stream.synchronize();
            driver_failed("could not copy to the device", error)
        })?;
        let sent = Arc::new(sent);
        // Each copy waited for the one before: the last event stands for all.
        *arrived = Some(Arc::clone(&sent));
        Ok(Upload(sent))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // The buffers are unpinned next: no copy may still read them.
        let _ = self.stream.synchronize();
    }
}
