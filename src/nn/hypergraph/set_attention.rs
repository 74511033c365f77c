//! Attention over sets, with learned seeds as queries.

use super::super::{Ctx, Dropout, Init, LayerNorm, Linear, Params};
use crate::base::{Error, Result};
use crate::kernels::Activation;
use crate::ops::incidence::Incidence;
use crate::{Param, Samples, Tensor};

/// Slope of the leaky ReLU for negative scores.
const SLOPE: f64 = 0.2;

/// Pools each set by attention, with one learned seed per head as the query: the pooling of AllSet (Chien et al. 2022, equations 6 to 8) as
/// HyTrel uses it.
///
/// The members have keys k = W_k·x + b_k and values v = W_v·x + b_v, in heads of d/H columns. With the seed q:
///
/// ```text
/// s_jh = leaky_relu(⟨k_jh, q_h⟩), slope 0.2, not scaled by the width
/// a_jh = softmax of s_jh over the members j of the set
/// o    = q + Σ_j dropout(a_jh)·v_jh, heads side by side
/// u    = LayerNorm(o)
/// F(u) = LayerNorm(u + dropout(W_2·dropout(gelu(W_1·u))))
/// y    = LayerNorm(u + relu(F(u)))
/// ```
///
/// An empty set has o = q. The inner width is 4·d. The layer has 10·d² + 14·d parameters.
pub struct SetAttention {
    d: usize,
    heads: usize,
    key: Linear,
    value: Linear,
    seed: Param,
    ln_0: LayerNorm,
    fc: Linear,
    proj: Linear,
    ln_f: LayerNorm,
    ln_1: LayerNorm,
    drop_attn: Dropout,
    drop_fc: Dropout,
    drop_proj: Dropout,
    p: f64,
}

/// Options of a [`SetAttention`], from [`SetAttention::builder`].
#[derive(Clone, Copy, Debug)]
pub struct SetAttentionBuilder {
    d: usize,
    heads: usize,
    dropout: f64,
}

impl SetAttentionBuilder {
    setters! {
        /// Dropout of the attention's weights and in the feed-forward part; 0 if not given.
        dropout: f64,
    }
    /// Makes the layer, with the parameters `key`, `value`, `seed`, `ln_0`, `fc`, `proj`, `ln_f` and `ln_1`. Fails if the heads do not
    /// divide the width, if the dropout lies outside [0, 1), or if the names are taken.
    pub fn build(self, params: &Params) -> Result<SetAttention> {
        params.whole(|params| {
            let SetAttentionBuilder { d, heads, dropout } = self;
            if heads == 0 || !d.is_multiple_of(heads) {
                return Err(Error::invalid(
                    "SetAttention",
                    format!("a width of {d} does not divide into {heads} heads"),
                ));
            }
            // The bound of Glorot and Bengio (2010), also for the seed, whose fans are d and d / heads.
            let glorot = |fans: usize| Init::Uniform { bound: (6.0 / fans.max(1) as f64).sqrt() };
            let drop = |name: &str| Dropout::new(&params.at(name), dropout);
            let fine = LayerNorm::builder(d).eps(1e-12);
            Ok(SetAttention {
                d,
                heads,
                key: Linear::builder(d, d).init(glorot(d.saturating_mul(2))).build(&params.at("key"))?,
                value: Linear::builder(d, d).init(glorot(d.saturating_mul(2))).build(&params.at("value"))?,
                seed: params.param("seed", &[d], glorot(d.saturating_add(d / heads)))?,
                ln_0: LayerNorm::new(&params.at("ln_0"), d)?,
                fc: Linear::new(&params.at("fc"), d, 4 * d)?,
                proj: Linear::new(&params.at("proj"), 4 * d, d)?,
                ln_f: fine.build(&params.at("ln_f"))?,
                ln_1: LayerNorm::new(&params.at("ln_1"), d)?,
                drop_attn: drop("drop_attn")?,
                drop_fc: drop("drop_fc")?,
                drop_proj: drop("drop_proj")?,
                p: dropout,
            })
        })
    }
}

impl SetAttention {
    /// A layer of width `d` with `heads` heads, without dropout. Fails if the heads do not divide the width, or if the names are taken.
    pub fn new(params: &Params, d: usize, heads: usize) -> Result<SetAttention> {
        SetAttention::builder(d, heads).build(params)
    }
    /// Options for a layer of width `d` with `heads` heads.
    pub fn builder(d: usize, heads: usize) -> SetAttentionBuilder {
        SetAttentionBuilder { d, heads, dropout: 0.0 }
    }
    /// Maps the rows `x [sources, d]` to `[targets, d]`; `from` and `to` map sources and targets to samples.
    pub fn forward(&self, x: &Tensor, sets: &Incidence, (from, to): (&Samples, &Samples), ctx: &Ctx) -> Result<Tensor> {
        self.expect_width(x)?;
        let weights = self.drop_attn.forward(&self.weights(x, sets, from, ctx)?, ctx)?;
        self.finish(&self.values(x, from, ctx)?.incidence_sum(sets, Some(&weights))?, to, ctx)
    }
    /// The attention weights before dropout, `[I, heads]`: one for each incidence, in the order of [`Incidence::members`], and each head.
    pub fn weights(&self, x: &Tensor, sets: &Incidence, from: &Samples, ctx: &Ctx) -> Result<Tensor> {
        self.expect_width(x)?;
        let scores = self.scores(x, from, ctx)?;
        scores.index_select(0, sets.members_on(&scores.device())?)?.segment_softmax(sets.segments())
    }
    fn expect_width(&self, x: &Tensor) -> Result<()> {
        match x.shape() {
            &[_, d] if d == self.d => Ok(()),
            other => Err(Error::shape("SetAttention", format!("rows {other:?} must be [sources, {}]", self.d))),
        }
    }
    /// The scores s of each row and head, `[rows, heads]`.
    pub(super) fn scores(&self, x: &Tensor, of: &Samples, ctx: &Ctx) -> Result<Tensor> {
        let k = self.key.forward(x, &ctx.with_samples(of.clone()))?;
        let products = k.mul(&self.seed.per_row(of)?.cast(k.dtype())?)?;
        let heads = [k.shape()[0], self.heads, self.d / self.heads];
        products.reshape(&heads)?.sum(&[2], false)?.leaky_relu(SLOPE)
    }
    /// The values v of each row, `[rows, d]`.
    pub(super) fn values(&self, x: &Tensor, of: &Samples, ctx: &Ctx) -> Result<Tensor> {
        self.value.forward(x, &ctx.with_samples(of.clone()))
    }
    /// The rest of the layer after the weighted sums `[targets, d]`: seed, norms and the feed-forward part.
    pub(super) fn finish(&self, sums: &Tensor, to: &Samples, ctx: &Ctx) -> Result<Tensor> {
        let ctx = &ctx.with_samples(to.clone());
        let u = self.ln_0.forward(&sums.add(&self.seed.per_row(to)?.cast(sums.dtype())?)?, ctx)?;
        let h = self.drop_fc.forward(&self.fc.forward_act(&u, Activation::Gelu, ctx)?, ctx)?;
        let h = self.drop_proj.forward(&self.proj.forward(&h, ctx)?, ctx)?;
        let f = self.ln_f.forward(&u.add(&h)?, ctx)?;
        self.ln_1.forward(&u.add(&f.relu()?)?, ctx)
    }
    /// Number of heads.
    pub fn heads(&self) -> usize {
        self.heads
    }
    /// Width of a row.
    pub fn width(&self) -> usize {
        self.d
    }
    pub(super) fn dropout(&self) -> f64 {
        self.p
    }
}
