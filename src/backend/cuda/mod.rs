//! The CUDA backend: a device, its memory, and the kernels below `kernels/`.
//!
//! The program carries the kernels' sources. NVRTC compiles a file when it is first needed, for exactly the
//! device at hand, and the result is kept on disk. Neither the driver nor NVRTC is linked: both are looked for
//! when a CUDA device is asked for, and their absence is an error that says how to get them.
//!
//! One file here per file of `kernels/`, with the same name: it knows the grid, the block and the shared memory
//! of its kernels, and repeats each parameter beside its argument.

mod activation;
pub mod attention;
mod backend;
mod chunk;
mod cross_entropy;
pub mod device;
pub mod element;
pub mod elementwise;
pub mod embed;
mod experts;
mod fused;
pub mod launch;
pub mod linear;
pub mod loss;
mod lower;
pub mod memory;
pub mod module;
pub mod moe;
pub mod norm;
pub mod nvrtc;
mod planning;
pub mod rope;
mod rows;
pub mod sources;
pub mod staging;
pub mod stats;
mod tensor;
pub mod tensor_map;
mod weights;

pub use activation::Activation;
pub use backend::CudaBackend;
pub use device::{Device, DeviceInfo, DeviceName, devices};
pub use element::{Element, Format, Real};
pub use lower::{CudaLower, Fused};
pub use memory::{Buf, Memory};
pub use module::{Kernel, ModuleSpec, Modules};
pub use nvrtc::{Code, Nvrtc};
pub use sources::Sources;
pub use tensor::Tensor;

use std::sync::Arc;

use crate::error::Result;

/// Which device, and what it may use.
#[derive(Clone)]
pub struct CudaSpec {
    /// N of `cuda:N`.
    pub ordinal: usize,
    /// Most bytes of the device's memory to use; `None`: what is free, less a reserve.
    pub budget_bytes: Option<u64>,
    /// Which kernels, and how they reach the driver.
    pub modules: ModuleSpec,
}

/// A CUDA device with its kernels.
pub struct Cuda {
    /// Context, streams and memory.
    pub device: Device,
    modules: Modules,
}

impl Cuda {
    /// Opens a device.
    ///
    /// # Errors
    ///
    /// No driver, no such device, or one that is too old.
    pub fn open(spec: CudaSpec) -> Result<Self> {
        let device = Device::open(spec.ordinal, spec.budget_bytes)?;
        let modules = Modules::new(device.compute.context(), &device.info, spec.modules);
        Ok(Self { device, modules })
    }

    /// The entry point `name` of `file`; compiled on first use.
    ///
    /// # Errors
    ///
    /// NVRTC is missing, or the file does not compile.
    pub fn kernel(&self, file: &'static str, name: &'static str) -> Result<Arc<Kernel>> {
        self.modules.kernel(file, name)
    }
}
