//! The interface that a reduction needs from a model.

use crate::Tensor;
use crate::array::Array;
use crate::base::{Error, Result};
use crate::models::{ExpertCounts, Gpt, GptConfig, Mixtral, MixtralConfig};
use crate::nn::{Ctx, Moe, MoeOut, Params};

/// A language model with mixtures of experts, whose number of experts may differ by layer.
pub trait SparseModel: Sized {
    /// All parameters.
    fn store(&self) -> &Params;
    /// The mixture of experts of each layer; `None` where it has none.
    fn mixtures(&self) -> Vec<Option<&Moe>>;
    /// Logits `[B, T, vocab]` of token ids `[B, T]`, and the output of each layer's mixture of experts.
    fn run(&self, ids: &Array, ctx: &Ctx) -> Result<(Tensor, Vec<Option<MoeOut>>)>;
    /// A model with new parameters and the same sizes and options, except for the number of experts of each layer that has some.
    fn resized(&self, experts: &[Option<usize>]) -> Result<Self>;
    /// The number of experts of each layer; `None` where it has none.
    fn experts(&self) -> Vec<Option<usize>> {
        self.mixtures().iter().map(|m| m.map(|m| m.config().experts)).collect()
    }
    /// The number of experts, if all layers that have some have the same; otherwise an error that lists the numbers.
    fn experts_per_layer(&self) -> Result<usize> {
        let all: Vec<usize> = self.experts().into_iter().flatten().collect();
        match all.is_empty() {
            true => Err(Error::invalid("experts_per_layer", "the model has no mixture of experts")),
            false => ExpertCounts::of(&all).same(),
        }
    }
}

impl SparseModel for Gpt {
    fn store(&self) -> &Params {
        self.params()
    }
    fn mixtures(&self) -> Vec<Option<&Moe>> {
        self.moe()
    }
    fn run(&self, ids: &Array, ctx: &Ctx) -> Result<(Tensor, Vec<Option<MoeOut>>)> {
        let out = self.forward_moe(ids, ctx)?;
        Ok((out.logits, out.layers))
    }
    fn resized(&self, experts: &[Option<usize>]) -> Result<Gpt> {
        let mut config: GptConfig = self.config().clone();
        for (layer, n) in config.moe.iter_mut().flatten().zip(experts) {
            if let (Some(layer), Some(n)) = (layer, n) {
                layer.experts = *n;
            }
        }
        Gpt::with_dtype(config, 0, self.store().dtype())
    }
}

impl SparseModel for Mixtral {
    fn store(&self) -> &Params {
        self.params()
    }
    fn mixtures(&self) -> Vec<Option<&Moe>> {
        self.moe().into_iter().map(Some).collect()
    }
    fn run(&self, ids: &Array, ctx: &Ctx) -> Result<(Tensor, Vec<Option<MoeOut>>)> {
        let (logits, layers) = self.forward_moe(ids, ctx)?;
        Ok((logits, layers.into_iter().map(Some).collect()))
    }
    fn resized(&self, experts: &[Option<usize>]) -> Result<Mixtral> {
        let old = self.experts();
        let counts: Vec<usize> = experts.iter().zip(&old).filter_map(|(new, old)| new.or(*old)).collect();
        let config = MixtralConfig { num_local_experts: ExpertCounts::of(&counts), ..self.config().clone() };
        Mixtral::with_dtype(config, 0, self.store().dtype())
    }
}
