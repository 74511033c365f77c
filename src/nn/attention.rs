//! Multi-head self-attention with a span per layer.

use super::{Ctx, Init, Linear, Params};
use crate::Tensor;
use crate::base::{Error, Result};
use crate::ops::attention::{AttentionOptions, Span, attention, attention_qkv};
use crate::ops::linear::Layout;

/// Keys and values of the positions seen so far, for generation: `[B, S, H, D]` each.
#[derive(Clone, Default)]
pub struct KvCache {
    kv: Option<(Tensor, Tensor)>,
}

impl KvCache {
    /// Positions held.
    pub fn len(&self) -> usize {
        self.kv.as_ref().map_or(0, |(k, _)| k.shape()[1])
    }
    /// Nothing held.
    pub fn is_empty(&self) -> bool {
        self.kv.is_none()
    }
    /// Appends new positions and drops those no later query can see; returns what the new queries see.
    pub(crate) fn extend(&mut self, k: Tensor, v: Tensor, span: Span) -> Result<(Tensor, Tensor)> {
        let (k, v) = match self.kv.take() {
            Some((pk, pv)) => (Tensor::concat(&[&pk, &k], 1)?, Tensor::concat(&[&pv, &v], 1)?),
            None => (k, v),
        };
        // Block spans count positions from the start, so they keep everything; windows forget.
        let n = k.shape()[1];
        let keep = match span {
            Span::Window(w) => n.min(w.saturating_sub(1)),
            _ => n,
        };
        self.kv = Some((k.slice(1, n - keep..n)?, v.slice(1, n - keep..n)?));
        Ok((k, v))
    }
}

/// Multi-head self-attention: one fused projection to Q, K and V, attention within the layer's span, one projection
/// back. Parameters `c_attn` `[d, 3d]` and `c_proj` `[d, d]`, as in GPT-2.
pub struct MultiHeadAttention {
    qkv: Linear,
    out: Linear,
    heads: usize,
    span: Span,
    dropout: f64,
    id: u64,
}

/// Options of a [`MultiHeadAttention`] layer, from [`MultiHeadAttention::builder`].
#[derive(Clone, Copy, Debug)]
pub struct MultiHeadAttentionBuilder {
    d: usize,
    heads: usize,
    bias: bool,
    span: Span,
    dropout: f64,
    init: Init,
    init_out: Init,
}

impl MultiHeadAttentionBuilder {
    setters! {
        /// Whether the projections add biases, which start at zero. The default is `true`.
        bias: bool,
        /// Which keys a query sees; all of them if not given. A language model takes [`Span::Causal`].
        span: Span,
        /// Dropout of the attention probabilities while training; 0 if not given.
        dropout: f64,
        /// Initial values of the projection to Q, K and V; [`Init::KaimingUniform`] if not given.
        init: Init,
        /// Initial values of the projection back; [`Init::KaimingUniform`] if not given.
        init_out: Init,
    }
    /// The layer. Fails if the width does not divide into the heads, if the dropout lies outside [0, 1), or if the names are taken
    /// in `params`.
    pub fn build(self, params: &Params) -> Result<MultiHeadAttention> {
        let MultiHeadAttentionBuilder { d, heads, span, dropout, .. } = self;
        if heads == 0 || !d.is_multiple_of(heads) {
            return Err(Error::invalid("MultiHeadAttention", format!("width {d} does not divide into {heads} heads")));
        }
        if !(0.0..1.0).contains(&dropout) {
            let message = format!("dropout {dropout}; it must lie in [0, 1)");
            return Err(Error::invalid("MultiHeadAttention", message));
        }
        let linear = |p, init| Linear::builder(d, p).bias(self.bias).layout(Layout::InOut).init(init);
        Ok(MultiHeadAttention {
            qkv: linear(3 * d, self.init).build(&params.at("c_attn"))?,
            out: linear(d, self.init_out).build(&params.at("c_proj"))?,
            heads,
            span,
            dropout,
            id: params.id("attn_dropout"),
        })
    }
}

impl MultiHeadAttention {
    /// A layer of width `d` with `heads` heads in which every query sees every key, without dropout. Fails if the width does not
    /// divide into the heads, or if the names are taken in `params`.
    pub fn new(params: &Params, d: usize, heads: usize) -> Result<Self> {
        MultiHeadAttention::builder(d, heads).build(params)
    }
    /// Options for a layer of width `d` with `heads` heads.
    pub fn builder(d: usize, heads: usize) -> MultiHeadAttentionBuilder {
        let init = Init::KaimingUniform;
        MultiHeadAttentionBuilder { d, heads, bias: true, span: Span::Full, dropout: 0.0, init, init_out: init }
    }
    pub(crate) fn linears_mut(&mut self) -> [&mut Linear; 2] {
        [&mut self.qkv, &mut self.out]
    }
    /// `[B, T, d]` → `[B, T, d]`. Positions attend within the documents or lengths of the context ([`Ctx::with_lengths`]), if it has
    /// some.
    pub fn forward(&self, x: &Tensor, ctx: &Ctx) -> Result<Tensor> {
        self.run(x, None, ctx)
    }
    /// As [`MultiHeadAttention::forward`] for positions that continue those in the cache.
    pub fn forward_cached(&self, x: &Tensor, cache: &mut KvCache, ctx: &Ctx) -> Result<Tensor> {
        self.run(x, Some(cache), ctx)
    }
    fn run(&self, x: &Tensor, cache: Option<&mut KvCache>, ctx: &Ctx) -> Result<Tensor> {
        let [b, t, d] = x.shape()[..] else {
            return Err(Error::shape("MultiHeadAttention", format!("input {:?}; it must be [B, T, d]", x.shape())));
        };
        let qkv = self.qkv.forward(x, ctx)?.reshape(&[b, t, 3, self.heads, d / self.heads])?;
        let mut options = AttentionOptions { documents: ctx.documents.clone(), ..AttentionOptions::new(self.span) };
        if ctx.train && self.dropout > 0.0 {
            options.dropout = Some((self.dropout, ctx.dropout_seed(self.id)));
        }
        let y = match cache {
            Some(_) if ctx.documents.is_some() => {
                let message = "a cache holds whole sequences; generate for sequences of one length, without documents";
                return Err(Error::invalid("MultiHeadAttention", message));
            }
            Some(cache) => {
                let part = |i: usize| qkv.slice(2, i..i + 1)?.squeeze(2);
                let (k, v) = cache.extend(part(1)?, part(2)?, self.span)?;
                attention(&part(0)?, &k, &v, &options)?
            }
            None => attention_qkv(&qkv, &options)?,
        };
        self.out.forward(&y.reshape(&[b, t, d])?, ctx)
    }
}
