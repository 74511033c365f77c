//! The names that a program about models and training needs: `use prismgrad::prelude::*;`.

pub use crate::array::Array;
pub use crate::autograd::{Param, Samples, Tensor, no_grad};
pub use crate::base::{DType, Error, Result};
pub use crate::device::Device;
pub use crate::kernels::Activation;
pub use crate::nn::{
    Conv1d, Conv2d, Ctx, Dropout, Embedding, EmbeddingBag, GroupNorm, Init, LayerNorm, Linear, Mlp, Module,
    MultiHeadAttention, Params, RmsNorm, Sequential, Strict, SwiGlu, TransformerBlock,
};
pub use crate::ops::loss::{
    CrossEntropy, Reduce, binary_cross_entropy_with_logits, cross_entropy, kl_divergence, mse_loss,
};
pub use crate::ops::pool::Window;
pub use crate::optim::{AdamW, Optimizer, Schedule, Sgd};
pub use crate::privacy::{ClipFn, ClipStyle, Public, Weight};
pub use crate::random::NoiseKey;
pub use crate::step::{PlainStep, Privacy, PrivacyConfig, PrivateStep, TrainStep};
