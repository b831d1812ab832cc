//! What a model is: its configuration, the one table of architectures, and the op list built from them.

pub mod arch;
pub mod config;
mod describe;
pub mod op;
mod program;
mod rope;
pub mod sae;
pub mod tensor;

pub use config::{Activation, Config, Rope, RopeScaling};
pub use describe::{Spec, describe};
pub use program::{Packed, Packing, Program, Usage};
pub use tensor::{Dtype, Tensor, WeightSpec};
