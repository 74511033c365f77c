//! Layers and the parameter store.

mod attention;
mod conv;
mod embedding;
mod layers;
mod lora;
mod params;
mod transformer;

pub use attention::{KvCache, MultiHeadAttention};
pub use conv::{Conv1d, Conv2d};
pub use embedding::{Embedding, EmbeddingBag};
pub use layers::{Dropout, GroupNorm, LayerNorm, Linear, RmsNorm};
pub use lora::LoraConfig;
pub use params::{Init, Params};
pub use transformer::{BlockConfig, Mlp, SwiGlu, TransformerBlock};

use crate::base::{Result, philox};
use crate::{DType, Samples, Tensor};

/// What a forward pass carries along: training or not, the seed of its dropout masks, and whose rows are whose.
#[derive(Clone, Debug, Default)]
pub struct Ctx {
    /// Dropout is on.
    pub train: bool,
    /// Seed of the masks; change it every step (the step number will do).
    pub seed: u64,
    /// The map of rows to samples where it is not dimension 0.
    pub samples: Option<Samples>,
    /// The dtype of activations, where it is not the parameters': what embeddings hand on, and everything after them
    /// follows. With bf16 this is mixed precision: parameters, norms of gradients, sums and updates stay f32.
    pub dtype: Option<DType>,
}

impl Ctx {
    /// Training, with the masks of `seed`.
    pub fn train(seed: u64) -> Ctx {
        Ctx { train: true, seed, ..Ctx::default() }
    }
    /// Evaluation: no dropout.
    pub fn eval() -> Ctx {
        Ctx::default()
    }
    /// The same with another map of rows to samples.
    pub fn with_samples(&self, samples: Samples) -> Ctx {
        Ctx { samples: Some(samples), ..self.clone() }
    }
    /// The same with activations of a dtype ([`Ctx::dtype`]).
    pub fn with_dtype(&self, dtype: DType) -> Ctx {
        Ctx { dtype: Some(dtype), ..self.clone() }
    }
    /// What goes into the layers: `x` in the dtype of activations.
    pub fn activations(&self, x: Tensor) -> Result<Tensor> {
        self.dtype.map_or(Ok(x.clone()), |d| x.cast(d))
    }
    /// The mask seed of the layer with this id.
    pub fn dropout_seed(&self, layer: u64) -> u64 {
        philox::bits(self.seed, layer, 0)
    }
}
