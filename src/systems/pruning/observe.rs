//! Statistics of a model's experts on a task's tokens.

use super::SparseModel;
use crate::array::Array;
use crate::base::{DType, Error, Result};
use crate::nn::{Ctx, MoeOut};
use crate::ops::route::Gate;
use crate::{Tensor, no_grad};
use serde::{Deserialize, Serialize};

/// Tokens to observe a model on.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Token ids `[B, T]`.
    pub ids: Array,
    /// For each of the B·T tokens, whether it counts; all do if absent. Padding must not count, since it would be most of a task of short
    /// texts.
    pub counted: Option<Vec<bool>>,
}

impl Batch {
    /// Tokens that all count.
    pub fn new(ids: Array) -> Batch {
        Batch { ids, counted: None }
    }
    /// Tokens of which only those with `true` in `counted` count.
    pub fn counting(ids: Array, counted: Vec<bool>) -> Batch {
        Batch { ids, counted: Some(counted) }
    }
}

/// What is kept in addition to sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observe {
    /// The number of tokens, the first ones, whose router inputs and logits are kept in each layer. A router that is fitted to them
    /// ([`RouterInit::LogSumExp`](super::RouterInit::LogSumExp)) needs more tokens than the model's width.
    pub kept_tokens: usize,
}

impl Default for Observe {
    /// The first 4,096 tokens.
    fn default() -> Observe {
        Observe { kept_tokens: 4096 }
    }
}

/// The statistics of one layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerStatistics {
    /// Number of experts.
    pub experts: usize,
    /// Number of tokens that counted.
    pub tokens: usize,
    /// Number of tokens for which each expert was chosen.
    pub load: Vec<f64>,
    /// Sums over tokens of the product of the logits of two experts, `[E, E]`.
    pub products: Vec<f64>,
    /// Sums over each expert's tokens of gate × norm of its output, where the gates are probabilities over all experts.
    pub saliency: Vec<f64>,
    /// The same sums with the gates of a token's experts divided by their sum.
    pub saliency_renormalised: Vec<f64>,
    /// Width of the router's inputs.
    pub width: usize,
    /// Router inputs of the tokens that were kept, `[n, width]`.
    pub inputs: Vec<f32>,
    /// Router logits of these tokens, `[n, E]`.
    pub logits: Vec<f32>,
}

impl LayerStatistics {
    /// The similarity of experts i and j, (1 + cos)/2 of their logits over all tokens: `[E, E]`.
    pub fn similarity(&self) -> Vec<f64> {
        let (n, p) = (self.experts, &self.products);
        let cosine = |i: usize, j: usize| match (p[i * n + i] * p[j * n + j]).sqrt() {
            // Logits that are always 0 have cosine 1 with themselves and 0 with all others.
            0.0 => (i == j) as u8 as f64,
            norm => (p[i * n + j] / norm).clamp(-1.0, 1.0),
        };
        (0..n * n).map(|x| (1.0 + cosine(x / n, x % n)) / 2.0).collect()
    }
    fn add(&mut self, out: &MoeOut, gate: Gate, counted: &[usize], keep: usize) -> Result<()> {
        let seen = out.stats.seen().ok_or_else(|| Error::invalid("observe", "a layer kept nothing of what it saw"))?;
        let (routing, e) = (out.stats.routing(), self.experts);
        let ids: Vec<u32> = counted.iter().map(|&t| t as u32).collect();
        let rows =
            |a: &Array| Tensor::new(a.clone()).index_select(0, Array::from_slice(&ids, &[ids.len()])?.to(&a.device())?);
        let logits = rows(out.stats.logits())?.cast(DType::F64)?;
        let products = logits.transpose(0, 1)?.matmul(&logits)?.array().to_f64();
        self.products.iter_mut().zip(products).for_each(|(s, p)| *s += p);
        let logits = logits.array().to_f64();
        let (choices, norms) = (rows(routing.choices())?.array().to_f64(), rows(&seen.norms)?.array().to_f64());
        if let Some(at) = logits.iter().position(|x| !x.is_finite()) {
            let message = format!("the logit of expert {} is {} for a token", at % e, logits[at]);
            return Err(Error::invalid("observe", message));
        }
        let k = routing.top_k();
        for (t, row) in logits.chunks_exact(e).enumerate() {
            let scores: Vec<f64> = match gate {
                Gate::Softmax => {
                    let most = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let all: f64 = row.iter().map(|x| (x - most).exp()).sum();
                    row.iter().map(|x| (x - most).exp() / all).collect()
                }
                Gate::Sigmoid => row.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
            };
            let own = || choices[t * k..(t + 1) * k].iter().map(|&c| c as usize);
            let sum: f64 = own().map(|c| scores[c]).sum();
            for (c, norm) in own().zip(&norms[t * k..(t + 1) * k]) {
                self.load[c] += 1.0;
                self.saliency[c] += scores[c] * norm;
                self.saliency_renormalised[c] += scores[c] / sum.max(1e-300) * norm;
            }
        }
        let more = keep.saturating_sub(self.logits.len() / e).min(counted.len());
        if more > 0 {
            self.logits.extend(logits[..more * e].iter().map(|&x| x as f32));
            let inputs = rows(&seen.inputs)?.slice(0, 0..more)?.cast(DType::F32)?;
            self.inputs.extend(inputs.array().to_f64().into_iter().map(|x| x as f32));
        }
        self.tokens += counted.len();
        Ok(())
    }
}

/// The statistics of a model on a task. They are a pure function of the model and the batches.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Statistics {
    /// Statistics of each layer; `None` where the layer has no experts.
    pub layers: Vec<Option<LayerStatistics>>,
}

/// Runs a model on a task's tokens, without dropout or jitter, and sums up statistics of its routers and experts.
///
/// The result is not private: the sums depend directly on which expert each token goes to. Use public text, or account for it elsewhere.
///
/// Fails if no token counts, if a batch's mask has another size than its tokens, or if a logit is not finite.
pub fn observe<M: SparseModel>(
    model: &M,
    batches: impl IntoIterator<Item = Result<Batch>>,
    options: &Observe,
) -> Result<Statistics> {
    let mixtures = model.mixtures();
    let fresh = |e: usize, width: usize| LayerStatistics {
        experts: e,
        load: vec![0.0; e],
        products: vec![0.0; e * e],
        saliency: vec![0.0; e],
        saliency_renormalised: vec![0.0; e],
        width,
        ..LayerStatistics::default()
    };
    let width = |m: &&crate::nn::Moe| m.router().weight().shape()[1];
    let mut layers: Vec<Option<LayerStatistics>> =
        mixtures.iter().map(|m| m.as_ref().map(|m| fresh(m.config().experts, width(m)))).collect();
    let mut tokens = 0;
    for batch in batches {
        let Batch { ids, counted } = batch?;
        let counted: Vec<usize> = match counted {
            None => (0..ids.numel()).collect(),
            Some(mask) if mask.len() == ids.numel() => (0..mask.len()).filter(|&t| mask[t]).collect(),
            Some(mask) => {
                let message = format!("a mask of {} for tokens {:?}", mask.len(), ids.shape());
                return Err(Error::shape("observe", message));
            }
        };
        if counted.is_empty() {
            continue;
        }
        tokens += counted.len();
        let (_, outs) = no_grad(|| model.run(&ids, &Ctx::eval().observing()))?;
        for ((layer, out), moe) in layers.iter_mut().zip(&outs).zip(&mixtures) {
            if let (Some(layer), Some(out), Some(moe)) = (layer, out, moe) {
                layer.add(out, moe.config().gate, &counted, options.kept_tokens)?;
            }
        }
    }
    if tokens == 0 {
        return Err(Error::invalid("observe", "no token was observed; give at least one batch with tokens that count"));
    }
    Ok(Statistics { layers })
}
