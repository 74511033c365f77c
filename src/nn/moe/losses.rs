//! The router's own losses, one for each sample.

use super::MoeConfig;
use crate::array::Array;
use crate::base::Result;
use crate::ops::route::{Gate, Routing};
use crate::{Samples, Tensor};
use serde::{Deserialize, Serialize};

/// How the load of the experts is kept even.
///
/// Let f be the share of the choices that fell on an expert, and P the mean of its probability over the tokens (for a sigmoid gate, of its
/// share of all scores). The loss is α·E·Σ f·P over the E experts: α where the load is even, at most E·α (Fedus et al. 2022, equation 4).
/// Gradients flow through P alone.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Balance {
    /// The load is not kept even.
    #[default]
    Off,
    /// The loss with f of the whole batch and coefficient α. It makes a sample's gradient depend on the other samples, so a private step
    /// refuses it.
    Batch(f64),
    /// The loss with f and P of a sample's own tokens and coefficient α (as in DeepSeek-V3 2024, equation 17, there for a
    /// sequence). It can be trained privately.
    PerSample(f64),
    /// No loss, but a bias that is added to the scores for the choice alone. [`Moe::update_bias`](super::Moe::update_bias) moves it by
    /// `rate` after each step (Wang et al. 2024). A private step refuses it, since it depends on the load of the whole batch.
    Bias {
        /// Step of the bias.
        rate: f64,
    },
}

/// The inputs of the losses of one forward pass.
pub(super) struct Losses<'a> {
    pub config: &'a MoeConfig,
    /// `[T, E]`.
    pub logits: &'a Tensor,
    pub routing: &'a Routing,
    pub samples: &'a Samples,
}

impl Losses<'_> {
    /// The sum of all losses of each sample, `[B]`.
    pub(super) fn all(&self) -> Result<Tensor> {
        let b = self.samples.count();
        let mut all = match self.config.balance {
            Balance::Batch(a) if a > 0.0 => Some(self.balance(true)?.mul_scalar(a)?),
            Balance::PerSample(a) if a > 0.0 => Some(self.balance(false)?.mul_scalar(a)?),
            _ => None,
        };
        if self.config.z > 0.0 {
            let z = self.mean(&self.logits.logsumexp(&[-1], true)?.square()?)?.reshape(&[b])?;
            let z = z.mul_scalar(self.config.z)?;
            all = Some(match all {
                Some(all) => all.add(&z)?,
                None => z,
            });
        }
        match all {
            Some(all) => Ok(all),
            None => Ok(Tensor::new(Array::zeros(&[b], (self.logits.dtype(), &self.logits.device())))),
        }
    }
    /// E·Σ f·P of each sample, `[B]`, with f of the whole batch or of the sample.
    fn balance(&self, batch: bool) -> Result<Tensor> {
        let (dtype, e) = (self.logits.dtype(), self.routing.experts() as f64);
        let probabilities = match self.config.gate {
            Gate::Softmax => self.logits.softmax(-1)?,
            Gate::Sigmoid => {
                let scores = self.logits.sigmoid()?;
                scores.div(&scores.sum(&[-1], true)?)?
            }
        };
        // [B, E], outside the graph: choices have no gradient.
        let load = Tensor::new(self.routing.load(self.samples)?.cast(dtype));
        let choices = load.sum(&[1], true)?;
        let share = match batch {
            false => load.div(&choices.clamp(1.0, f64::INFINITY)?)?,
            true => {
                let (b, all) =
                    (self.samples.count() as f64, (self.routing.tokens() * self.routing.top_k()).max(1) as f64);
                // Samples with more tokens have a larger weight in the batch's mean.
                load.sum(&[0], true)?.mul_scalar(1.0 / all)?.mul(&choices.mul_scalar(b / all)?)?
            }
        };
        self.mean(&probabilities)?.mul(&share)?.sum(&[1], false)?.mul_scalar(e)
    }
    /// The mean of `x [T, n]` over the tokens of each sample, `[B, n]`; 0 for a sample without tokens.
    fn mean(&self, x: &Tensor) -> Result<Tensor> {
        let (b, n, device) = (self.samples.count(), x.shape()[1], x.device());
        if self.samples.rows() == 0 {
            return Ok(Tensor::new(Array::zeros(&[b, n], (x.dtype(), &device))));
        }
        if let Samples::Uniform { each, .. } = self.samples {
            return x.reshape(&[b, *each, n])?.mean(&[1], false);
        }
        let owner = match device.gpu() {
            Some(gpu) => self.samples.on_gpu(gpu)?.owner,
            None => None,
        };
        let owner = match owner {
            Some(owner) => owner,
            None => Array::from_slice(&self.samples.owner_ids(), &[self.samples.rows()])?.to(&device)?,
        };
        let owner = owner.reshape(&[self.samples.rows(), 1])?.expand(x.shape())?.contiguous();
        let sums = x.scatter_sum(0, Tensor::new(owner), b)?;
        let choices = Tensor::new(self.routing.load(self.samples)?.cast(x.dtype())).sum(&[1], true)?;
        let tokens = choices.mul_scalar(1.0 / self.routing.top_k() as f64)?.clamp(1.0, f64::INFINITY)?;
        sums.div(&tokens)
    }
}
