//! Layers and the parameter store.

mod attention;
mod conv;
mod embedding;
mod layers;
mod params;
mod transformer;

pub use attention::{KvCache, MultiHeadAttention};
pub use conv::{Conv1d, Conv2d};
pub use embedding::{Embedding, EmbeddingBag};
pub use layers::{Dropout, GroupNorm, LayerNorm, Linear, RmsNorm};
pub use params::{Init, Params};
pub use transformer::{BlockConfig, Mlp, SwiGlu, TransformerBlock};

use crate::Samples;
use crate::random::philox;

/// What a forward pass carries along: training or not, the seed of its dropout masks, and whose rows are whose.
#[derive(Clone, Debug, Default)]
pub struct Ctx {
    /// Dropout is on.
    pub train: bool,
    /// Seed of the masks; change it every step (the step number will do).
    pub seed: u64,
    /// The map of rows to samples where it is not dimension 0.
    pub samples: Option<Samples>,
}

impl Ctx {
    /// Training, with the masks of `seed`.
    pub fn train(seed: u64) -> Ctx {
        Ctx { train: true, seed, samples: None }
    }
    /// Evaluation: no dropout.
    pub fn eval() -> Ctx {
        Ctx::default()
    }
    /// The same with another map of rows to samples.
    pub fn with_samples(&self, samples: Samples) -> Ctx {
        Ctx { samples: Some(samples), ..self.clone() }
    }
    /// The mask seed of the layer with this id.
    pub fn dropout_seed(&self, layer: u64) -> u64 {
        philox::bits(self.seed, layer, 0)
    }
}
