//! What a model is: its configuration, the one table of architectures, and the op list built from them.

pub mod arch;
pub mod config;
pub mod tensor;

pub use config::{Activation, Config, Rope, RopeScaling};
pub use tensor::{Dtype, Tensor, WeightSpec};
