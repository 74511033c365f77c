//! Layers and the parameter store.
//!
//! Every layer is made in the same way. `Linear::new(&params, d, p)` is the default case, and
//! `Linear::builder(d, p).bias(false).build(&params)` changes what the builder names. The scope of `params` names the layer's
//! parameters: `Linear::new(&params.at("hidden"), 64, 32)` makes `hidden.weight` and `hidden.bias`. Every layer has
//! `forward(&x, &ctx)`.

/// Setters of a builder's fields.
macro_rules! setters {
    ($($(#[$doc:meta])* $field:ident: $type:ty,)*) => {
        $(
            $(#[$doc])*
            pub fn $field(mut self, $field: $type) -> Self {
                self.$field = $field;
                self
            }
        )*
    };
}

mod attention;
mod cache;
mod contrastive;
mod conv;
mod embedding;
mod expr;
pub mod hypergraph;
mod layers;
mod lora;
mod module;
mod moe;
mod params;
mod transformer;

pub use crate::ops::conv::Sides;
pub use attention::{MultiHeadAttention, MultiHeadAttentionBuilder};
pub use cache::KvCache;
pub use contrastive::contrastive_loss;
pub use conv::{Conv1d, Conv1dBuilder, Conv2d, Conv2dBuilder};
pub use embedding::{Embedding, EmbeddingBag, EmbeddingBagBuilder, EmbeddingBuilder};
pub use expr::{Expr, Operand};
pub use layers::{Dropout, GroupNorm, GroupNormBuilder, LayerNorm, LayerNormBuilder, Linear, LinearBuilder};
pub use layers::{RmsNorm, RmsNormBuilder};
pub use lora::LoraConfig;
pub use module::{Module, Sequential};
pub use moe::{
    Balance, ExpertKind, Moe, MoeBuilder, MoeConfig, MoeOut, RouterStats, RouterSummary, Seen, expert_traffic,
};
pub use params::{Init, Params, Strict, Taken};
pub(crate) use params::{refuse_merged, take};
pub use transformer::{Mlp, MlpBuilder, SwiGlu, SwiGluBuilder, TransformerBlock, TransformerBlockBuilder};

use crate::base::{Result, philox};
use crate::ops::attention::Documents;
use crate::{DType, Samples, Tensor};
use std::sync::Arc;

/// What a forward pass gives to every layer in addition to its input: whether the model is being trained, the seed of the dropout masks,
/// which rows belong to which sample, which positions belong together, and the dtype of activations.
#[derive(Clone, Debug, Default)]
pub struct Ctx {
    /// Whether dropout is on.
    pub train: bool,
    /// Seed of the dropout masks. It should change at every step; the step number is a good seed.
    pub seed: u64,
    /// The map of rows to samples, where it differs from dimension 0.
    pub samples: Option<Samples>,
    /// The dtype of activations, where it differs from the parameters' dtype. Linear layers and convolutions convert their inputs to it,
    /// embeddings convert their outputs, and every other op has the dtype of its input. With bf16 this is mixed precision: parameters,
    /// norms of gradients, sums and updates stay f32.
    pub dtype: Option<DType>,
    /// A key for each sample. Random numbers that are drawn per sample (a router's jitter) depend on it; the sample's place in the batch if
    /// not given. If the keys are the numbers of the records, a record's draws do not depend on the rest of the batch.
    pub keys: Option<Arc<[u64]>>,
    /// The documents of packed sequences, or the lengths of padded ones, within which attention stays; every sequence is one document if
    /// not given. See [`Documents`].
    pub documents: Option<Documents>,
    /// Whether mixtures of experts keep the data for an analysis of the experts: the router's inputs, and the norms of the experts' outputs
    /// ([`RouterStats::seen`]).
    pub observe: bool,
}

impl Ctx {
    /// A context for training, with dropout masks from `seed`.
    pub fn train(seed: u64) -> Ctx {
        Ctx { train: true, seed, ..Ctx::default() }
    }
    /// A context for evaluation, without dropout.
    pub fn eval() -> Ctx {
        Ctx::default()
    }
    /// The same context with another map of rows to samples.
    pub fn with_samples(&self, samples: Samples) -> Ctx {
        Ctx { samples: Some(samples), ..self.clone() }
    }
    /// The same context with activations of a dtype ([`Ctx::dtype`]).
    pub fn with_dtype(&self, dtype: DType) -> Ctx {
        Ctx { dtype: Some(dtype), ..self.clone() }
    }
    /// The same context with a key for each sample ([`Ctx::keys`]).
    pub fn with_keys(&self, keys: impl Into<Arc<[u64]>>) -> Ctx {
        Ctx { keys: Some(keys.into()), ..self.clone() }
    }
    /// The same context for sequences that are padded to a common length: sequence b of the batch is its first `lengths[b]` positions. No
    /// position attends to padding, and the output of attention is zero for padding. Whatever is computed from the sequences afterwards,
    /// such as a mean over positions or a loss, has to leave the padding out as well.
    pub fn with_lengths(&self, lengths: &[usize]) -> Ctx {
        self.with_documents(Documents::lengths(lengths))
    }
    /// The same context for packed sequences, each of which holds several documents.
    pub fn with_documents(&self, documents: Documents) -> Ctx {
        Ctx { documents: Some(documents), ..self.clone() }
    }
    /// The same context, in which mixtures of experts keep the data for an analysis of the experts ([`Ctx::observe`]).
    pub fn observing(&self) -> Ctx {
        Ctx { observe: true, ..self.clone() }
    }
    /// `x` converted to the dtype of activations.
    pub fn activations(&self, x: &Tensor) -> Result<Tensor> {
        self.dtype.map_or(Ok(x.clone()), |d| x.cast(d))
    }
    /// The mask seed of the layer with the number `layer`.
    pub fn dropout_seed(&self, layer: u64) -> u64 {
        philox::bits(self.seed, layer, 0)
    }
}
