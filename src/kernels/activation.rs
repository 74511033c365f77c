//! Activations that can be fused into a product.

use crate::base::Float;

/// An activation fused into the product.
#[derive(Default, Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// The identity.
    #[default]
    None,
    /// max(x, 0).
    Relu,
    /// x·Φ(x), exact.
    Gelu,
    /// Tanh approximation of GELU (`gelu_new` in Hugging Face configurations).
    GeluTanh,
    /// x·sigmoid(x).
    Silu,
    /// tanh x.
    Tanh,
}

impl Activation {
    #[inline(always)]
    pub(crate) fn of<T: Float>(self, x: T) -> T {
        match self {
            Activation::None => x,
            Activation::Relu => x.larger(T::ZERO),
            Activation::Gelu => x.gelu(),
            Activation::GeluTanh => x.gelu_tanh(),
            Activation::Silu => x * x.sigmoid(),
            Activation::Tanh => x.tanh(),
        }
    }
}
