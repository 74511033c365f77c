//! The trait that all layers share, and layers that run one after the other.

use super::{Conv1d, Conv2d, Ctx, Dropout, Embedding, EmbeddingBag, GroupNorm, LayerNorm, Linear, Mlp};
use super::{MultiHeadAttention, RmsNorm, SwiGlu, TransformerBlock};
use crate::Tensor;
use crate::base::Result;
use crate::kernels::Activation;
use crate::nn::lora::activate;

/// A function from tensor to tensor with parameters of its own: every layer, every activation, and every closure
/// `Fn(&Tensor, &Ctx) -> Result<Tensor>`. Modules may be sent to other threads and used by several at once.
pub trait Module: Send + Sync {
    /// The output for `x`. Dimension 0 counts the samples, unless the context maps rows to samples.
    fn forward(&self, x: &Tensor, ctx: &Ctx) -> Result<Tensor>;
}

macro_rules! modules {
    ($($layer:ty),*) => {
        $(impl Module for $layer {
            fn forward(&self, x: &Tensor, ctx: &Ctx) -> Result<Tensor> {
                <$layer>::forward(self, x, ctx)
            }
        })*
    };
}

modules!(
    Conv1d,
    Conv2d,
    Dropout,
    Embedding,
    EmbeddingBag,
    GroupNorm,
    LayerNorm,
    Linear,
    Mlp,
    MultiHeadAttention,
    RmsNorm,
    SwiGlu,
    TransformerBlock
);

impl Module for Activation {
    fn forward(&self, x: &Tensor, _ctx: &Ctx) -> Result<Tensor> {
        activate(x, *self)
    }
}

impl<F: Fn(&Tensor, &Ctx) -> Result<Tensor> + Send + Sync> Module for F {
    fn forward(&self, x: &Tensor, ctx: &Ctx) -> Result<Tensor> {
        self(x, ctx)
    }
}

/// Runs modules one after the other.
///
/// ```
/// use prismgrad::kernels::Activation;
/// use prismgrad::nn::{Ctx, Linear, Module, Params, Sequential};
/// use prismgrad::{DType, Tensor};
/// # fn main() -> prismgrad::Result<()> {
/// let params = Params::new(0, DType::F32);
/// let model = Sequential::new()
///     .then(|x: &Tensor, _: &Ctx| x.flatten(1))
///     .then(Linear::new(&params.at("0"), 64, 32)?)
///     .then(Activation::Relu)
///     .then(Linear::new(&params.at("1"), 32, 10)?);
/// assert_eq!(model.forward(&Tensor::zeros(&[5, 8, 8], DType::F32), &Ctx::eval())?.shape(), [5, 10]);
/// # Ok(()) }
/// ```
#[derive(Default)]
pub struct Sequential(Vec<Box<dyn Module>>);

impl Sequential {
    /// A sequence without modules, which is the identity.
    pub fn new() -> Sequential {
        Sequential::default()
    }
    /// The same sequence with one more module at the end.
    pub fn then(mut self, module: impl Module + 'static) -> Sequential {
        self.0.push(Box::new(module));
        self
    }
}

impl Module for Sequential {
    fn forward(&self, x: &Tensor, ctx: &Ctx) -> Result<Tensor> {
        self.0.iter().try_fold(x.clone(), |x, module| module.forward(&x, ctx))
    }
}
