//! One way to launch a kernel: each argument stands beside the C declaration of its parameter, and the
//! declarations are compared with those in the kernel's file, so a forgotten or swapped argument, or a buffer of
//! other elements, is an error with both lists in it instead of a stray write.
//!
//! ```ignore
//! let launch = Launch::new(&kernel, rows, 256)
//!     .arg("const float* x", x)
//!     .arg("float* y", &y)
//!     .arg("int width", int(width));
//! // SAFETY: x and y are [rows, width].
//! unsafe { launch.on(&device.compute) }?;
//! ```

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::sys::CUstream;
use cudarc::driver::{CudaStream, LaunchConfig, result};

use super::device::driver_failed;
use super::element::Element;
use super::memory::Buf;
use super::module::{Kernel, lock};
use super::sources::normalised;
use crate::error::{Error, Result};

/// A kernel's `int`.
///
/// # Panics
///
/// `value` is larger: no kernel takes such sizes.
pub fn int(value: usize) -> i32 {
    match i32::try_from(value) {
        Ok(value) => value,
        Err(_) => panic!("a size of {value} for a kernel's int"),
    }
}

/// An argument as the driver reads it.
#[derive(Clone, Debug)]
pub enum Value {
    /// A device address.
    Address {
        /// 0: the null pointer.
        address: u64,
        /// [`Element::C_NAME`] of what lies there.
        element: &'static str,
        /// The stream that the memory is allocated and freed on; `None`: no memory.
        stream: Option<CUstream>,
    },
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

/// A `CUtensorMap`, which the driver wants 64-byte aligned (128 in newer headers), and whose memory it names.
#[derive(Clone, Debug)]
#[repr(C, align(128))]
pub struct TensorMap {
    /// As the driver encodes it.
    pub(super) words: [u64; 16],
    /// The stream that the memory is allocated and freed on.
    pub(super) stream: CUstream,
}

impl Value {
    /// The address of element `index` of `buf`, to pass a part of it.
    ///
    /// # Panics
    ///
    /// There is no such element.
    pub fn at<T: Element>(buf: &Buf<T>, index: usize) -> Self {
        assert!(index < buf.rows() * buf.width(), "element {index} of a buffer");
        Self::address(buf, index)
    }

    fn address<T: Element>(buf: &Buf<T>, index: usize) -> Self {
        let address = buf.address() + (index * size_of::<T>()) as u64;
        Self::Address { address, element: T::C_NAME, stream: Some(buf.allocation().stream().cu_stream()) }
    }

    /// Where the driver finds it.
    fn as_ptr(&self) -> *const c_void {
        match self {
            Self::Address { address, .. } => (&raw const *address).cast(),
            Self::I32(value) => (&raw const *value).cast(),
            Self::U32(value) => (&raw const *value).cast(),
            Self::I64(value) => (&raw const *value).cast(),
            Self::F32(value) => (&raw const *value).cast(),
            Self::TensorMap(map) => (&raw const map.words).cast(),
        }
    }

    /// The stream of the memory that it names.
    fn stream(&self) -> Option<CUstream> {
        match self {
            Self::Address { stream, .. } => *stream,
            Self::TensorMap(map) => Some(map.stream),
            _ => None,
        }
    }
}

/// What a parameter takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Parameter {
    /// A pointer to elements of this name.
    Pointer(&'static str),
    /// What the declaration starts with.
    Scalar(&'static str),
}

impl Parameter {
    /// Of a declaration, `const float* x` or `int width`.
    fn of(declaration: &'static str) -> Self {
        let text = declaration.trim_start();
        let text = text.strip_prefix("const ").unwrap_or(text).trim_start();
        match text.split_once('*') {
            Some((element, _)) => Self::Pointer(element.trim()),
            None => Self::Scalar(text.split_whitespace().next().unwrap_or_default()),
        }
    }

    /// Whether it takes such a value.
    fn takes(self, value: &Value) -> bool {
        let scalar = match (self, value) {
            (Self::Pointer(wanted), Value::Address { element, .. }) => return wanted == *element,
            (Self::Pointer(_), _) | (_, Value::Address { .. }) => return false,
            (Self::Scalar(scalar), _) => scalar,
        };
        match value {
            Value::Address { .. } => false,
            Value::I32(_) => scalar == "int",
            Value::U32(_) => scalar == "u32",
            Value::I64(_) => scalar == "i64",
            Value::F32(_) => scalar == "float",
            Value::TensorMap(_) => scalar == "TensorMap",
        }
    }
}

/// A list of declarations that match a kernel's parameters. One is kept for each place in the program that
/// launches the kernel, so that text is compared once.
pub(super) struct Checked {
    declarations: Vec<&'static str>,
    parameters: Vec<Parameter>,
}

impl Checked {
    /// Whether this is about the same texts at the same places in the program.
    fn is_of(&self, declarations: &[&'static str]) -> bool {
        let same = |(a, b): (&&'static str, &&'static str)| std::ptr::eq(*a, *b);
        self.declarations.len() == declarations.len() && self.declarations.iter().zip(declarations).all(same)
    }

    /// What `kernel`'s parameters take if the declarations are its own.
    fn find(kernel: &Kernel, declarations: &[&'static str]) -> Option<Arc<Self>> {
        let mut checked = lock(&kernel.checked);
        if let Some(known) = checked.iter().find(|known| known.is_of(declarations)) {
            return Some(Arc::clone(known));
        }
        let same = kernel.parameters.len() == declarations.len()
            && kernel.parameters.iter().zip(declarations).all(|(own, given)| *own == normalised(given));
        let parameters = declarations.iter().map(|declaration| Parameter::of(declaration)).collect();
        let new = same.then(|| Arc::new(Self { declarations: declarations.to_vec(), parameters }))?;
        checked.push(Arc::clone(&new));
        Some(new)
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

impl<T: Element> From<&Buf<T>> for Value {
    fn from(buf: &Buf<T>) -> Self {
        Self::address(buf, 0)
    }
}

/// `None`: the null pointer, for parameters that may be absent.
impl<T: Element> From<Option<&Buf<T>>> for Value {
    fn from(buf: Option<&Buf<T>>) -> Self {
        buf.map_or(Self::Address { address: 0, element: T::C_NAME, stream: None }, Self::from)
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
        let arguments = kernel.parameters.len();
        Self {
            kernel,
            grid: (blocks, 1, 1),
            block: threads,
            shared_bytes: 0,
            declarations: Vec::with_capacity(arguments),
            values: Vec::with_capacity(arguments),
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

    /// Puts the launch into `stream`, which must be the one that its buffers are allocated and freed on.
    ///
    /// # Errors
    ///
    /// The arguments do not match the kernel's parameters, a buffer belongs to another stream, or the driver
    /// refuses the launch. A kernel that fails later is reported by the next call that waits for it.
    ///
    /// # Safety
    ///
    /// Addresses must be of live buffers, as large as the kernel's header demands for the given sizes.
    pub unsafe fn on(&self, stream: &CudaStream) -> Result<()> {
        if self.grid.0 == 0 || self.grid.1 == 0 {
            return Ok(());
        }
        self.check(stream)?;
        let config = LaunchConfig {
            grid_dim: self.grid,
            block_dim: (self.block, 1, 1),
            shared_mem_bytes: self.shared_bytes,
        };
        let mut pointers: Vec<*mut c_void> =
            self.values.iter().map(|value| value.as_ptr().cast_mut()).collect();
        let launched = stream.context().bind_to_thread().and_then(|()| {
            // SAFETY: number and types of the arguments were just compared with the kernel's declaration; they
            // live until the call returns, which copies them; their memory is allocated before this and freed
            // after it in the order of the stream; the caller vouches for its size.
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

    /// Compares the arguments with the kernel's declaration, and their streams with the launch's.
    fn check(&self, stream: &CudaStream) -> Result<()> {
        let checked = Checked::find(self.kernel, &self.declarations);
        let same = checked.is_some_and(|checked| {
            checked.parameters.iter().zip(&self.values).all(|(parameter, value)| parameter.takes(value))
        });
        if !same {
            return Err(Error::new("a launch does not match its kernel")
                .at(self.place())
                .expected(self.kernel.parameters.join(", "))
                .found(self.arguments()));
        }
        let elsewhere = |value: &Value| value.stream().is_some_and(|own| own != stream.cu_stream());
        match self.values.iter().position(elsewhere) {
            None => Ok(()),
            Some(index) => Err(Error::new("a launch on another stream than its memory's")
                .at(self.place())
                .expected("buffers that are allocated and freed on the launch's stream")
                .found(format!("{} of another stream", self.declarations[index]))
                .hint("memory is freed in the order of its own stream: the kernel could outlive it")),
        }
    }

    /// What was given, for a reader: declarations, and the elements of buffers that are not theirs.
    fn arguments(&self) -> String {
        let each = self.declarations.iter().zip(&self.values).map(|(declaration, value)| match value {
            Value::Address { element, .. } if !Parameter::of(declaration).takes(value) => {
                format!("{declaration} (a buffer of {element})")
            }
            _ => (*declaration).to_owned(),
        });
        each.collect::<Vec<_>>().join(", ")
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
