//! Multi-head self-attention with a span per layer.

use super::{Ctx, Init, KvCache, Linear, Params};
use crate::Tensor;
use crate::base::{Error, Result};
use crate::ops::attention::{AttentionOptions, Span, attention, attention_qkv};
use crate::ops::linear::Layout;
use crate::ops::rotary::{Pairing, RotaryTable};

/// Multi-head self-attention (Vaswani et al. 2017): one fused projection to Q, K and V, attention within the layer's span, and an output
/// projection. Parameters `c_attn` `[d, d + 2·H_kv·d/H]` (`[d, 3d]` without grouped queries) and `c_proj` `[d, d]`, as in GPT-2.
pub struct MultiHeadAttention {
    qkv: Linear,
    out: Linear,
    heads: usize,
    kv_heads: usize,
    span: Span,
    rotary: Option<RotaryTable>,
    alibi: bool,
    dropout: f64,
    id: u64,
}

/// Options of a [`MultiHeadAttention`] layer, from [`MultiHeadAttention::builder`].
#[derive(Clone, Debug)]
pub struct MultiHeadAttentionBuilder {
    d: usize,
    heads: usize,
    kv_heads: Option<usize>,
    bias: bool,
    span: Span,
    rotary: Option<RotaryTable>,
    alibi: bool,
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
        /// Number of heads of keys and values (grouped-query attention), each of which serves equally many heads of queries. One for each
        /// head of queries if not given.
        kv_heads: Option<usize>,
        /// Rotary position embedding of queries and keys, with pairs half a head apart; a table may be shared between layers.
        rotary: Option<RotaryTable>,
        /// Whether attention scores decrease with the distance between query and key ([`alibi_slope`](crate::ops::attention::alibi_slope)).
        alibi: bool,
        /// Dropout of the attention probabilities while training; 0 if not given.
        dropout: f64,
        /// Initial values of the projection to Q, K and V; [`Init::KaimingUniform`] if not given.
        init: Init,
        /// Initial values of the output projection; [`Init::KaimingUniform`] if not given.
        init_out: Init,
    }
    /// Makes the layer. Fails if the width does not divide into the heads, if the heads do not divide into groups of `kv_heads`, if the
    /// span has a width of 0, if the rotary table was made for another head size, if the dropout lies outside [0, 1), or if the names are
    /// taken in `params`.
    pub fn build(self, params: &Params) -> Result<MultiHeadAttention> {
        params.whole(|params| {
            let MultiHeadAttentionBuilder { d, heads, span, alibi, dropout, .. } = self;
            let kv_heads = self.kv_heads.unwrap_or(heads);
            if heads == 0 || !d.is_multiple_of(heads) {
                return Err(Error::invalid(
                    "MultiHeadAttention",
                    format!("width {d} does not divide into {heads} heads"),
                ));
            }
            if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
                let message = format!("{heads} heads of queries cannot share {kv_heads} heads of keys equally");
                return Err(Error::invalid("MultiHeadAttention", message));
            }
            let head = d / heads;
            if let Some(table) = self.rotary.as_ref().filter(|t| t.dim() != head) {
                let message = format!("a rotary table for heads of {}, but these have {head} elements", table.dim());
                return Err(Error::invalid("MultiHeadAttention", message));
            }
            span.validate()?;
            if !(0.0..1.0).contains(&dropout) {
                let message = format!("dropout {dropout}; it must lie in [0, 1)");
                return Err(Error::invalid("MultiHeadAttention", message));
            }
            let Some(width) = d.checked_mul(3) else {
                return Err(Error::invalid("MultiHeadAttention", format!("width {d}: no memory holds its weights")));
            };
            let linear = |p, init| Linear::builder(d, p).bias(self.bias).layout(Layout::InOut).init(init);
            Ok(MultiHeadAttention {
                qkv: linear(width - 2 * (heads - kv_heads) * head, self.init).build(&params.at("c_attn"))?,
                out: linear(d, self.init_out).build(&params.at("c_proj"))?,
                heads,
                kv_heads,
                span,
                rotary: self.rotary,
                alibi,
                dropout,
                id: params.id("attn_dropout"),
            })
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
        MultiHeadAttentionBuilder {
            d,
            heads,
            kv_heads: None,
            bias: true,
            span: Span::Full,
            rotary: None,
            alibi: false,
            dropout: 0.0,
            init,
            init_out: init,
        }
    }
    pub(crate) fn linears_mut(&mut self) -> [&mut Linear; 2] {
        [&mut self.qkv, &mut self.out]
    }
    /// `[B, T, d]` → `[B, T, d]`. If the context has documents or lengths ([`Ctx::with_lengths`]), positions attend only within their own.
    pub fn forward(&self, x: &Tensor, ctx: &Ctx) -> Result<Tensor> {
        self.run(x, None, ctx)
    }
    /// Does the same as [`MultiHeadAttention::forward`] for positions that continue those in the cache.
    pub fn forward_cached(&self, x: &Tensor, cache: &mut KvCache, ctx: &Ctx) -> Result<Tensor> {
        self.run(x, Some(cache), ctx)
    }
    fn run(&self, x: &Tensor, cache: Option<&mut KvCache>, ctx: &Ctx) -> Result<Tensor> {
        let [b, t, d] = x.shape()[..] else {
            return Err(Error::shape("MultiHeadAttention", format!("input {:?}; it must be [B, T, d]", x.shape())));
        };
        let (h, kv, head) = (self.heads, self.kv_heads, d / self.heads);
        let mut qkv = self.qkv.forward(x, ctx)?.reshape(&[b, t, h + 2 * kv, head])?;
        if let Some(table) = &self.rotary {
            qkv = qkv.rotary_heads(table, cache.as_ref().map_or(0, |c| c.seen()), Pairing::Half, h + kv)?;
        }
        let documents = ctx.documents.clone();
        let mut options = AttentionOptions { alibi: self.alibi, documents, ..AttentionOptions::new(self.span) };
        if ctx.train && self.dropout > 0.0 {
            options.dropout = Some((self.dropout, ctx.dropout_seed(self.id)));
        }
        let part = |from: usize, to: usize| qkv.slice(2, from..to);
        let y = match cache {
            Some(_) if ctx.documents.is_some() => {
                let message = "a cache holds whole sequences; generate for sequences of one length, without documents";
                return Err(Error::invalid("MultiHeadAttention", message));
            }
            Some(cache) => {
                let (k, v) = cache.extend(part(h, h + kv)?, part(h + kv, h + 2 * kv)?, &mut options)?;
                attention(&part(0, h)?, &k, &v, &options)?
            }
            None if h == kv => attention_qkv(&qkv.reshape(&[b, t, 3, h, head])?, &options)?,
            None => attention(&part(0, h)?, &part(h, h + kv)?, &part(h + kv, h + 2 * kv)?, &options)?,
        };
        self.out.forward(&y.reshape(&[b, t, d])?, ctx)
    }
}
