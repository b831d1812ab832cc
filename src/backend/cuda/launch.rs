//! One way to launch a kernel: each argument stands beside the C declaration of its parameter, and the
//! declarations are compared with those in the kernel's file, so a forgotten or swapped argument is an error
//! with both lists in it instead of a stray write.
//!
//! ```ignore
//! let launch = Launch::new(&kernel, rows, 256)
//!     .arg("const float* x", x)
//!     .arg("float* y", &y)
//!     .arg("int width", width as i32);
//! // SAFETY: x and y are [rows, width].
//! unsafe { launch.on(&device.compute) }?;
//! ```

use std::ffi::c_void;

use cudarc::driver::{CudaStream, LaunchConfig, result};

use super::device::driver_failed;
use super::memory::{Allocation, Buf};
use super::module::{Kernel, normalised};
use crate::error::{Error, Result};

/// An argument as the driver reads it.
#[derive(Clone, Debug)]
pub enum Value {
    /// A device address.
    Address(u64),
    /// `int`.
    I32(i32),
    /// `u32`.
    U32(u32),
    /// `i64`.
    I64(i64),
    /// `float`.
    F32(f32),
    /// A struct passed by value: a tensor map.
    TensorMap(Box<TensorMap>),
}

/// A `CUtensorMap`, which the driver wants 64-byte aligned (128 in newer headers).
#[derive(Clone, Debug)]
#[repr(C, align(128))]
pub struct TensorMap(pub [u64; 16]);

impl Value {
    /// Where the driver finds it.
    fn as_ptr(&self) -> *const c_void {
        match self {
            Self::Address(value) => (&raw const *value).cast(),
            Self::I32(value) => (&raw const *value).cast(),
            Self::U32(value) => (&raw const *value).cast(),
            Self::I64(value) => (&raw const *value).cast(),
            Self::F32(value) => (&raw const *value).cast(),
            Self::TensorMap(map) => (&raw const **map).cast(),
        }
    }

    /// Whether a parameter declared like this takes such a value.
    fn fits(&self, declaration: &str) -> bool {
        let starts = |word: &str| declaration.split_whitespace().next() == Some(word);
        match self {
            Self::Address(_) => declaration.contains('*'),
            _ if declaration.contains('*') => false,
            Self::I32(_) => starts("int"),
            Self::U32(_) => starts("u32"),
            Self::I64(_) => starts("i64"),
            Self::F32(_) => starts("float"),
            Self::TensorMap(_) => declaration.contains("TensorMap"),
        }
    }
}

impl From<i32> for Value {
    fn from(value: i32) -> Self {
        Self::I32(value)
    }
}

impl From<u32> for Value {
    fn from(value: u32) -> Self {
        Self::U32(value)
    }
}

impl From<i64> for Value {
    fn from(value: i64) -> Self {
        Self::I64(value)
    }
}

impl From<f32> for Value {
    fn from(value: f32) -> Self {
        Self::F32(value)
    }
}

impl From<TensorMap> for Value {
    fn from(map: TensorMap) -> Self {
        Self::TensorMap(Box::new(map))
    }
}

impl From<&Allocation> for Value {
    fn from(allocation: &Allocation) -> Self {
        Self::Address(allocation.address())
    }
}

impl<T: bytemuck::Pod> From<&Buf<T>> for Value {
    fn from(buf: &Buf<T>) -> Self {
        Self::from(buf.allocation())
    }
}

/// `None`: the null pointer, for parameters that may be absent.
impl<T: bytemuck::Pod> From<Option<&Buf<T>>> for Value {
    fn from(buf: Option<&Buf<T>>) -> Self {
        buf.map_or(Self::Address(0), Self::from)
    }
}

/// A launch being put together.
pub struct Launch<'a> {
    kernel: &'a Kernel,
    grid: (u32, u32, u32),
    block: u32,
    shared_bytes: u32,
    declarations: Vec<&'static str>,
    values: Vec<Value>,
}

impl<'a> Launch<'a> {
    /// A grid of `blocks` × 1 × 1 blocks of `threads`.
    pub fn new(kernel: &'a Kernel, blocks: usize, threads: u32) -> Self {
        // More blocks than the driver takes are refused there.
        let blocks = u32::try_from(blocks).unwrap_or(u32::MAX);
        Self {
            kernel,
            grid: (blocks, 1, 1),
            block: threads,
            shared_bytes: 0,
            declarations: Vec::new(),
            values: Vec::new(),
        }
    }

    /// The grid's second dimension.
    pub fn grid_y(mut self, blocks: usize) -> Self {
        self.grid.1 = u32::try_from(blocks).unwrap_or(u32::MAX);
        self
    }

    /// Dynamic shared memory of a block.
    pub fn shared_bytes(mut self, bytes: u32) -> Self {
        self.shared_bytes = bytes;
        self
    }

    /// The next argument, beside its parameter as the kernel's file declares it (`__restrict__` and spaces left
    /// out).
    pub fn arg(mut self, declaration: &'static str, value: impl Into<Value>) -> Self {
        self.declarations.push(declaration);
        self.values.push(value.into());
        self
    }

    /// Puts the launch into `stream`.
    ///
    /// # Errors
    ///
    /// The arguments do not match the kernel's parameters, or the driver refuses the launch. A kernel that fails
    /// later is reported by the next call that waits for it.
    ///
    /// # Safety
    ///
    /// Addresses must be of memory as large as the kernel's header demands for the given sizes, allocated by
    /// then in the order of `stream` and freed after.
    pub unsafe fn on(&self, stream: &CudaStream) -> Result<()> {
        if self.grid.0 == 0 || self.grid.1 == 0 {
            return Ok(());
        }
        self.check()?;
        let config = LaunchConfig {
            grid_dim: self.grid,
            block_dim: (self.block, 1, 1),
            shared_mem_bytes: self.shared_bytes,
        };
        let mut pointers: Vec<*mut c_void> =
            self.values.iter().map(|value| value.as_ptr().cast_mut()).collect();
        let launched = stream.context().bind_to_thread().and_then(|()| {
            // SAFETY: number and types of the arguments were just compared with the kernel's declaration; they
            // live until the call returns, which copies them; the caller vouches for the memory.
            unsafe {
                result::launch_kernel(
                    self.kernel.function.cu_function(),
                    config.grid_dim,
                    config.block_dim,
                    config.shared_mem_bytes,
                    stream.cu_stream(),
                    &mut pointers,
                )
            }
        });
        launched.map_err(|error| driver_failed("refused a launch", error).at(self.place()))
    }

    /// Compares the arguments with the kernel's declaration.
    fn check(&self) -> Result<()> {
        let declared = &*self.kernel.parameters;
        let same = declared.len() == self.declarations.len()
            && declared
                .iter()
                .zip(&self.declarations)
                .all(|(declared, given)| *declared == normalised(given))
            && self.values.iter().zip(&self.declarations).all(|(value, given)| value.fits(given));
        match same {
            true => Ok(()),
            false => Err(Error::new("a launch does not match its kernel")
                .at(self.place())
                .expected(declared.join(", "))
                .found(self.declarations.join(", "))),
        }
    }

    fn place(&self) -> String {
        let (x, y, z) = self.grid;
        let Kernel { name, file, .. } = self.kernel;
        format!(
            "kernel {name} of kernels/{file}, grid {x}x{y}x{z}, block {}, {} bytes shared",
            self.block, self.shared_bytes
        )
    }
}
