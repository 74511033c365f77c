//! The pre-norm transformer block.

use super::{Ctx, Dropout, Init, KvCache, LayerNorm, Linear, MultiHeadAttention, Params};
use crate::Tensor;
use crate::base::Result;
use crate::kernels::Activation;
use crate::ops::attention::Span;
use crate::ops::linear::Layout;

/// Two linear layers with an activation between: `c_fc` `[d, hidden]`, `c_proj` `[hidden, d]`.
pub struct Mlp {
    fc: Linear,
    proj: Linear,
    act: Activation,
}

impl Mlp {
    /// A layer d → hidden → d.
    pub fn new(params: &Params, d: usize, hidden: usize, act: Activation, init: Init, init_out: Init) -> Result<Mlp> {
        Ok(Mlp {
            fc: Linear::new(&params.at("c_fc"), d, hidden, true, Layout::InOut, init)?,
            proj: Linear::new(&params.at("c_proj"), hidden, d, true, Layout::InOut, init_out)?,
            act,
        })
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

impl SwiGlu {
    /// A layer d → hidden → d.
    pub fn new(params: &Params, d: usize, hidden: usize, init: Init, init_out: Init) -> Result<SwiGlu> {
        let linear = |name: &str, i, o, init| Linear::new(&params.at(name), i, o, false, Layout::OutIn, init);
        Ok(SwiGlu {
            gate: linear("gate_proj", d, hidden, init)?,
            up: linear("up_proj", d, hidden, init)?,
            down: linear("down_proj", hidden, d, init_out)?,
        })
    }
    /// `[…, d]` → `[…, d]`.
    pub fn forward(&self, x: &Tensor, ctx: &Ctx) -> Result<Tensor> {
        let gate = self.gate.forward_act(x, Activation::Silu, ctx)?;
        self.down.forward(&gate.mul(&self.up.forward(x, ctx)?)?, ctx)
    }
}

/// What a block is made of.
#[derive(Clone, Copy, Debug)]
pub struct BlockConfig {
    /// Width.
    pub d: usize,
    /// Attention heads.
    pub heads: usize,
    /// Width of the hidden layer.
    pub hidden: usize,
    /// Activation of the hidden layer.
    pub act: Activation,
    /// Attention span.
    pub span: Span,
    /// Dropout after attention and after the MLP.
    pub dropout: f64,
    /// Dropout of attention probabilities.
    pub attn_dropout: f64,
    /// ε of the norms.
    pub eps: f64,
    /// Initial values of the projections, and of those that write to the residual stream.
    pub init: (Init, Init),
}

/// x + attention(norm(x)), then x + mlp(norm(x)). Names as in GPT-2: `ln_1`, `attn`, `ln_2`, `mlp`.
pub struct TransformerBlock {
    name: String,
    ln_1: LayerNorm,
    /// The attention layer.
    pub attn: MultiHeadAttention,
    ln_2: LayerNorm,
    mlp: Mlp,
    drop_1: Dropout,
    drop_2: Dropout,
}

impl TransformerBlock {
    /// A block with parameters under `params`.
    pub fn new(params: &Params, c: &BlockConfig) -> Result<TransformerBlock> {
        let mut attn = MultiHeadAttention::new(&params.at("attn"), c.d, c.heads, c.span, c.init.0, c.init.1)?;
        attn.dropout = c.attn_dropout;
        Ok(TransformerBlock {
            name: params.prefix().to_string(),
            ln_1: LayerNorm::new(&params.at("ln_1"), c.d, c.eps)?,
            attn,
            ln_2: LayerNorm::new(&params.at("ln_2"), c.d, c.eps)?,
            mlp: Mlp::new(&params.at("mlp"), c.d, c.hidden, c.act, c.init.0, c.init.1)?,
            drop_1: Dropout::new(&params.at("drop_1"), c.dropout)?,
            drop_2: Dropout::new(&params.at("drop_2"), c.dropout)?,
        })
    }
    pub(crate) fn linears_mut(&mut self) -> [&mut Linear; 4] {
        let [qkv, out] = self.attn.linears_mut();
        [qkv, out, &mut self.mlp.fc, &mut self.mlp.proj]
    }
    /// `[B, T, d]` → `[B, T, d]`.
    pub fn forward(&self, x: &Tensor, ctx: &Ctx) -> Result<Tensor> {
        self.run(x, None, ctx)
    }
    /// As [`TransformerBlock::forward`] for positions that continue those in the cache.
    pub fn forward_cached(&self, x: &Tensor, cache: &mut KvCache, ctx: &Ctx) -> Result<Tensor> {
        self.run(x, Some(cache), ctx)
    }
    fn run(&self, x: &Tensor, cache: Option<&mut KvCache>, ctx: &Ctx) -> Result<Tensor> {
        let _layer = crate::device::spans::layer(&self.name);
        let h = self.ln_1.forward(x, ctx)?;
        let a = match cache {
            Some(cache) => self.attn.forward_cached(&h, cache, ctx)?,
            None => self.attn.forward(&h, ctx)?,
        };
        let x = x.add(&self.drop_1.forward(&a, ctx)?)?;
        let m = self.mlp.forward(&self.ln_2.forward(&x, ctx)?, ctx)?;
        x.add(&self.drop_2.forward(&m, ctx)?)
    }
}
