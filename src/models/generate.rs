//! Text generation with a KV cache.

use crate::Tensor;
use crate::array::Array;
use crate::base::{DType, Error, Result};
use crate::nn::{Ctx, KvCache};
use crate::ops::attention::Span;
use crate::random::Rng;

/// A model that continues a sequence of tokens, with a cache for each layer.
pub trait LanguageModel {
    /// Number of tokens of the vocabulary.
    fn vocabulary(&self) -> usize;
    /// Number of positions, the length of the longest sequence.
    fn positions(&self) -> usize;
    /// Number of caches, one per layer.
    fn layers(&self) -> usize;
    /// Logits `[B, T, vocab]` of the positions of `ids` `[B, T]`, which continue the `past` positions in `caches`. The caches are empty at
    /// first.
    fn forward_cached(&self, ids: &Array, caches: &mut [KvCache], past: usize, ctx: &Ctx) -> Result<Tensor>;
}

/// Refuses caches that do not hold `past` positions, one cache for each layer, or whose shape `[B, heads, width]`, dtype or span is not
/// that of the layer's new keys. The check runs before any cache is changed.
pub(crate) fn check_caches(
    caches: Option<&[KvCache]>,
    layers: usize,
    past: usize,
    (shape, dtype): ([usize; 3], DType),
    span: impl Fn(usize) -> Span,
) -> Result<()> {
    let Some(caches) = caches else { return Ok(()) };
    if caches.len() != layers {
        return Err(Error::invalid("forward_cached", format!("{} caches for {layers} layers", caches.len())));
    }
    if let Some(seen) = caches.iter().map(KvCache::seen).find(|seen| *seen != past) {
        let message = format!("{past} positions are said to be past, a cache has seen {seen}; go on where it ends");
        return Err(Error::invalid("forward_cached", message));
    }
    caches.iter().enumerate().try_for_each(|(i, c)| c.check(&shape, dtype, span(i)))
}

/// How the next token is drawn.
#[derive(Clone, Debug)]
pub struct Sampling {
    /// Divides the logits; at 0 the most likely token is taken.
    pub temperature: f64,
    /// Only the k most likely tokens can be drawn; 0 for all.
    pub top_k: usize,
    /// Only the most likely tokens that together reach this probability can be drawn; 1 for all (Holtzman et al. 2020).
    pub top_p: f64,
    /// Seed of the draws; the same seed gives the same text.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling { temperature: 0.8, top_k: 0, top_p: 0.95, seed: 0 }
    }
}

impl Sampling {
    pub(crate) fn validate(&self) -> Result<()> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(Error::invalid("generate", format!("temperature {}; use 0 or more", self.temperature)));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::invalid("generate", format!("top_p {}; it must lie in (0, 1]", self.top_p)));
        }
        Ok(())
    }
    /// Draws a token from the logits `[vocab]`.
    pub fn draw(&self, logits: &[f64], rng: &mut Rng) -> u32 {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        if self.temperature == 0.0 {
            return order.first().copied().unwrap_or(0) as u32;
        }
        if self.top_k > 0 {
            order.truncate(self.top_k);
        }
        let top = order.first().map_or(0.0, |&i| logits[i]);
        let weights: Vec<f64> = order.iter().map(|&i| ((logits[i] - top) / self.temperature).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut kept = 0.0;
        let mut n = 0;
        while n < weights.len() && (n == 0 || kept < self.top_p * total) {
            kept += weights[n];
            n += 1;
        }
        let mut u = rng.uniform() * kept;
        for i in 0..n {
            u -= weights[i];
            if u < 0.0 {
                return order[i] as u32;
            }
        }
        order.get(n.max(1) - 1).copied().unwrap_or(0) as u32
    }
}

/// Continues `prompt` by up to `count` tokens, and stops after the token `stop`. Returns the new tokens. When the model's positions run
/// out, the cache is filled again with the last tokens of the text, half as many as there are positions.
pub fn generate(
    model: &impl LanguageModel,
    prompt: &[u32],
    count: usize,
    sampling: &Sampling,
    stop: Option<u32>,
) -> Result<Vec<u32>> {
    sampling.validate()?;
    if prompt.is_empty() {
        return Err(Error::invalid(
            "generate",
            "an empty prompt; give at least one token, such as the end-of-text token",
        ));
    }
    let vocab = model.vocabulary();
    if let Some(bad) = prompt.iter().find(|&&t| t as usize >= vocab) {
        return Err(Error::invalid("generate", format!("token {bad} of a vocabulary of {vocab}")));
    }
    let max = model.positions();
    let (ctx, mut rng) = (Ctx::eval(), Rng::new(sampling.seed));
    let mut text = prompt.to_vec();
    let empty = KvCache::reserving(max.min(prompt.len().saturating_add(count)));
    let mut caches = vec![empty.clone(); model.layers()];
    let mut past = 0;
    for _ in 0..count {
        if past == 0 || past + 1 > max {
            past = 0;
            caches.fill(empty.clone());
        }
        let new = if past == 0 {
            let keep = if text.len() > max { (max / 2).max(1) } else { text.len() };
            &text[text.len() - keep..]
        } else {
            &text[text.len() - 1..]
        };
        let ids = Array::from_slice(new, &[1, new.len()])?;
        let logits = crate::no_grad(|| model.forward_cached(&ids, &mut caches, past, &ctx))?;
        past += new.len();
        let last = logits.array().slice(1, new.len() - 1..new.len())?.to_f64();
        if let Some(i) = last.iter().position(|l| l.is_nan()) {
            let message =
                format!("the logit of token {i} is NaN after {} tokens: the model's values are no numbers", text.len());
            return Err(Error::invalid("generate", message));
        }
        let token = sampling.draw(&last, &mut rng);
        text.push(token);
        if Some(token) == stop {
            break;
        }
    }
    Ok(text.split_off(prompt.len()))
}
