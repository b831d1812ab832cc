//! What a model is: its configuration, the one table of architectures, and the op list built from them.

pub mod arch;
pub mod config;
mod describe;
pub mod op;
mod program;
mod rope;
pub mod sae;
pub mod tensor;

pub use config::{Activation, Config, Experts, Rope, RopeScaling};
pub use describe::{Spec, describe};
pub use program::{Boundary, Packed, Packing, Program, Usage};
pub use tensor::{Dtype, Elsewhere, Tensor, WeightSpec};
