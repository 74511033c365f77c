//! The pre-norm transformer block.

use super::{Ctx, Dropout, Init, KvCache, LayerNorm, Linear, Moe, MoeConfig, MoeOut, MultiHeadAttention, Params};
use crate::Tensor;
use crate::base::Result;
use crate::kernels::Activation;
use crate::ops::attention::Span;
use crate::ops::linear::Layout;
use crate::ops::rotary::RotaryTable;

/// Two linear layers with an activation between them, act(x·W₁ + b₁)·W₂ + b₂. The weights `c_fc` `[d, hidden]` and `c_proj` `[hidden, d]`
/// are stored inputs first, as in GPT-2.
pub struct Mlp {
    fc: Linear,
    proj: Linear,
    act: Activation,
}

/// Options of an [`Mlp`], from [`Mlp::builder`].
#[derive(Clone, Copy, Debug)]
pub struct MlpBuilder {
    sizes: (usize, usize),
    act: Activation,
    init: Init,
    init_out: Init,
}

impl MlpBuilder {
    setters! {
        /// The activation between the layers; [`Activation::Gelu`] if not given.
        act: Activation,
        /// Initial values of the first weight; [`Init::KaimingUniform`] if not given.
        init: Init,
        /// Initial values of the second weight; [`Init::KaimingUniform`] if not given.
        init_out: Init,
    }
    /// Makes the layers. Fails if the names are taken in `params`.
    pub fn build(self, params: &Params) -> Result<Mlp> {
        params.whole(|params| {
            let (d, hidden) = self.sizes;
            Ok(Mlp {
                fc: Linear::builder(d, hidden).layout(Layout::InOut).init(self.init).build(&params.at("c_fc"))?,
                proj: Linear::builder(hidden, d)
                    .layout(Layout::InOut)
                    .init(self.init_out)
                    .build(&params.at("c_proj"))?,
                act: self.act,
            })
        })
    }
}

impl Mlp {
    /// Layers d → hidden → d with GELU between. Fails if the names are taken in `params`.
    pub fn new(params: &Params, d: usize, hidden: usize) -> Result<Mlp> {
        Mlp::builder(d, hidden).build(params)
    }
    /// Options for layers d → hidden → d.
    pub fn builder(d: usize, hidden: usize) -> MlpBuilder {
        let init = Init::KaimingUniform;
        MlpBuilder { sizes: (d, hidden), act: Activation::Gelu, init, init_out: init }
    }
    /// `[…, d]` → `[…, d]`.
    pub fn forward(&self, x: &Tensor, ctx: &Ctx) -> Result<Tensor> {
        self.proj.forward(&self.fc.forward_act(x, self.act, ctx)?, ctx)
    }
}

/// SwiGLU (Shazeer 2020): (silu(x·W_gate) ⊙ x·W_up)·W_down, without biases.
pub struct SwiGlu {
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// Options of a [`SwiGlu`], from [`SwiGlu::builder`].
#[derive(Clone, Copy, Debug)]
pub struct SwiGluBuilder {
    sizes: (usize, usize),
    init: Init,
    init_out: Init,
}

impl SwiGluBuilder {
    setters! {
        /// Initial values of the first two weights; [`Init::KaimingUniform`] if not given.
        init: Init,
        /// Initial values of the last weight; [`Init::KaimingUniform`] if not given.
        init_out: Init,
    }
    /// Makes the layers. Fails if the names are taken in `params`.
    pub fn build(self, params: &Params) -> Result<SwiGlu> {
        params.whole(|params| {
            let (d, hidden) = self.sizes;
            let linear = |i, o, init| Linear::builder(i, o).bias(false).init(init);
            Ok(SwiGlu {
                gate: linear(d, hidden, self.init).build(&params.at("gate_proj"))?,
                up: linear(d, hidden, self.init).build(&params.at("up_proj"))?,
                down: linear(hidden, d, self.init_out).build(&params.at("down_proj"))?,
            })
        })
    }
}

impl SwiGlu {
    /// Layers d → hidden → d. Fails if the names are taken in `params`.
    pub fn new(params: &Params, d: usize, hidden: usize) -> Result<SwiGlu> {
        SwiGlu::builder(d, hidden).build(params)
    }
    /// Options for layers d → hidden → d.
    pub fn builder(d: usize, hidden: usize) -> SwiGluBuilder {
        SwiGluBuilder { sizes: (d, hidden), init: Init::KaimingUniform, init_out: Init::KaimingUniform }
    }
    /// `[…, d]` → `[…, d]`.
    pub fn forward(&self, x: &Tensor, ctx: &Ctx) -> Result<Tensor> {
        let gate = self.gate.forward_act(x, Activation::Silu, ctx)?;
        self.down.forward(&gate.mul(&self.up.forward(x, ctx)?)?, ctx)
    }
}

/// Options of a [`TransformerBlock`], from [`TransformerBlock::builder`].
#[derive(Clone, Debug)]
pub struct TransformerBlockBuilder {
    d: usize,
    heads: usize,
    hidden: usize,
    moe: Option<MoeConfig>,
    act: Activation,
    span: Span,
    kv_heads: Option<usize>,
    rotary: Option<RotaryTable>,
    alibi: bool,
    dropout: f64,
    attn_dropout: f64,
    eps: f64,
    init: Init,
    init_out: Init,
}

impl TransformerBlockBuilder {
    setters! {
        /// Width of the hidden layer; 4·d if not given.
        hidden: usize,
        /// A mixture of experts in the place of the MLP; `None` if not given.
        moe: Option<MoeConfig>,
        /// Activation of the hidden layer; [`Activation::Gelu`] if not given. Experts have their own.
        act: Activation,
        /// Which keys a query sees; all of them if not given. A language model takes [`Span::Causal`].
        span: Span,
        /// Number of heads of keys and values; as many as heads of queries if not given.
        kv_heads: Option<usize>,
        /// Rotary position embedding of queries and keys; none if not given.
        rotary: Option<RotaryTable>,
        /// Whether attention scores decrease with the distance between query and key.
        alibi: bool,
        /// Dropout after attention and after the MLP; 0 if not given.
        dropout: f64,
        /// Dropout of attention probabilities; 0 if not given.
        attn_dropout: f64,
        /// What the norms add to the variance; 1e-5 if not given.
        eps: f64,
        /// Initial values of the weights; [`Init::KaimingUniform`] if not given.
        init: Init,
        /// Initial values of the weights that write to the residual stream; [`Init::KaimingUniform`] if not given.
        init_out: Init,
    }
    /// Makes the block, with parameters under `params`. Fails if the width does not divide into the heads, if a dropout lies outside [0,
    /// 1), or if the names are taken.
    pub fn build(self, params: &Params) -> Result<TransformerBlock> {
        params.whole(|params| {
            let TransformerBlockBuilder { d, heads, hidden, init, init_out, .. } = self;
            let norm = LayerNorm::builder(d).eps(self.eps);
            let attn = MultiHeadAttention::builder(d, heads).span(self.span).kv_heads(self.kv_heads);
            let attn = attn.rotary(self.rotary).alibi(self.alibi).dropout(self.attn_dropout);
            let feed = match &self.moe {
                None => {
                    let mlp = Mlp::builder(d, hidden).act(self.act).init(init).init_out(init_out);
                    Feed::Dense(Box::new(mlp.build(&params.at("mlp"))?))
                }
                Some(c) => {
                    let moe = Moe::builder(d, c).init(init).init_out(init_out).build(&params.at("moe"))?;
                    Feed::Moe(Box::new(moe))
                }
            };
            Ok(TransformerBlock {
                name: params.prefix().to_string(),
                ln_1: norm.build(&params.at("ln_1"))?,
                attn: attn.init(init).init_out(init_out).build(&params.at("attn"))?,
                ln_2: norm.build(&params.at("ln_2"))?,
                feed,
                drop_1: Dropout::new(&params.at("drop_1"), self.dropout)?,
                drop_2: Dropout::new(&params.at("drop_2"), self.dropout)?,
            })
        })
    }
}

/// The half of a block that follows attention.
enum Feed {
    Dense(Box<Mlp>),
    Moe(Box<Moe>),
}

/// A transformer block with a norm before each of its two halves (pre-LN, Xiong et al. 2020), as in GPT-2: x + attention(norm(x)), then x +
/// mlp(norm(x)). Its parameters have GPT-2's names: `ln_1`, `attn`, `ln_2` and `mlp`. A mixture of experts in the place of the MLP is named
/// `moe`.
pub struct TransformerBlock {
    name: String,
    ln_1: LayerNorm,
    attn: MultiHeadAttention,
    ln_2: LayerNorm,
    feed: Feed,
    drop_1: Dropout,
    drop_2: Dropout,
}

impl TransformerBlock {
    /// A block of width `d` with `heads` heads, in which every query sees every key, without dropout. Fails if the width does not
    /// divide into the heads, or if the names are taken in `params`.
    pub fn new(params: &Params, d: usize, heads: usize) -> Result<TransformerBlock> {
        TransformerBlock::builder(d, heads).build(params)
    }
    /// Options for a block of width `d` with `heads` heads.
    pub fn builder(d: usize, heads: usize) -> TransformerBlockBuilder {
        TransformerBlockBuilder {
            d,
            heads,
            hidden: d.saturating_mul(4),
            moe: None,
            act: Activation::Gelu,
            span: Span::Full,
            kv_heads: None,
            rotary: None,
            alibi: false,
            dropout: 0.0,
            attn_dropout: 0.0,
            eps: 1e-5,
            init: Init::KaimingUniform,
            init_out: Init::KaimingUniform,
        }
    }
    pub(crate) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let mut all: Vec<&mut Linear> = self.attn.linears_mut().into_iter().collect();
        if let Feed::Dense(mlp) = &mut self.feed {
            all.extend([&mut mlp.fc, &mut mlp.proj]);
        }
        all
    }
    /// The mixture of experts, if the block has one.
    pub fn moe(&self) -> Option<&Moe> {
        match &self.feed {
            Feed::Dense(_) => None,
            Feed::Moe(moe) => Some(moe),
        }
    }
    /// The mixture of experts for changes such as [`Moe::place`].
    pub fn moe_mut(&mut self) -> Option<&mut Moe> {
        match &mut self.feed {
            Feed::Dense(_) => None,
            Feed::Moe(moe) => Some(moe),
        }
    }
    /// `[B, T, d]` → `[B, T, d]`.
    pub fn forward(&self, x: &Tensor, ctx: &Ctx) -> Result<Tensor> {
        Ok(self.forward_moe(x, None, ctx)?.0)
    }
    /// Does the same as [`TransformerBlock::forward`] for positions that continue those in the cache.
    pub fn forward_cached(&self, x: &Tensor, cache: &mut KvCache, ctx: &Ctx) -> Result<Tensor> {
        Ok(self.forward_moe(x, Some(cache), ctx)?.0)
    }
    /// Does the same as [`TransformerBlock::forward`], and also returns the output of the mixture of experts, if there is one. With a
    /// cache, the positions continue those in it.
    pub fn forward_moe(&self, x: &Tensor, cache: Option<&mut KvCache>, ctx: &Ctx) -> Result<(Tensor, Option<MoeOut>)> {
        let _layer = crate::device::spans::layer(&self.name);
        let h = self.ln_1.forward(x, ctx)?;
        let a = match cache {
            Some(cache) => self.attn.forward_cached(&h, cache, ctx)?,
            None => self.attn.forward(&h, ctx)?,
        };
        let x = x.add(&self.drop_1.forward(&a, ctx)?)?;
        let h = self.ln_2.forward(&x, ctx)?;
        let (m, routed) = match &self.feed {
            Feed::Dense(mlp) => (mlp.forward(&h, ctx)?, None),
            Feed::Moe(moe) => {
                let out = moe.forward(&h, ctx)?;
                (out.output.clone(), Some(out))
            }
        };
        Ok((x.add(&self.drop_2.forward(&m, ctx)?)?, routed))
    }
}
