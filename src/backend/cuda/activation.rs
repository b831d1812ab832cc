//! The nonlinearities of `kernels/activation.cuh`.

use crate::model;

/// The nonlinearity of a gated MLP, as kernels number it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Activation {
    /// x·σ(x)
    Silu = 0,
    /// x·Φ(x), approximated with tanh.
    GeluTanh = 1,
    /// x·Φ(x), Φ the normal distribution.
    GeluErf = 2,
}

impl From<model::Activation> for Activation {
    fn from(activation: model::Activation) -> Self {
        match activation {
            model::Activation::Silu => Self::Silu,
            model::Activation::GeluTanh => Self::GeluTanh,
        }
    }
}
