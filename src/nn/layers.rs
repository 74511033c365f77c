//! Linear, norms, dropout.

use super::lora::{Lora, LoraConfig, activate};
use super::{Ctx, Init, Params};
use crate::base::{Error, Result};
use crate::kernels::Activation;
use crate::ops::linear::{Layout, linear};
use crate::ops::norm::{group_norm, layer_norm, rms_norm};
use crate::{Param, Tensor};

/// y = act(x·Wᵀ + b) over the last dimension.
pub struct Linear {
    weight: Param,
    bias: Option<Param>,
    layout: Layout,
    lora: Option<Lora>,
}

impl Linear {
    /// d → p with parameters `weight` (`[p, d]` or `[d, p]`, see [`Layout`]) and, if asked for, `bias` (zeros).
    pub fn new(params: &Params, d: usize, p: usize, bias: bool, layout: Layout, init: Init) -> Result<Linear> {
        let shape = if layout == Layout::OutIn { [p, d] } else { [d, p] };
        Ok(Linear {
            weight: params.param("weight", &shape, init)?,
            bias: if bias { Some(params.param("bias", &[p], Init::Zeros)?) } else { None },
            layout,
            lora: None,
        })
    }
    /// `[B, …, d]` → `[B, …, p]`.
    pub fn forward(&self, x: &Tensor, ctx: &Ctx) -> Result<Tensor> {
        self.forward_act(x, Activation::None, ctx)
    }
    /// With an activation fused into the product.
    pub fn forward_act(&self, x: &Tensor, act: Activation, ctx: &Ctx) -> Result<Tensor> {
        let run = |act| linear(x, &self.weight, self.layout, self.bias.as_ref(), act, ctx.samples.as_ref());
        match self.lora.as_ref().map(|l| l.forward(x, ctx)).transpose()?.flatten() {
            None => run(act),
            Some(more) => activate(&run(Activation::None)?.add(&more)?, act),
        }
    }
    /// Gives the layer a low-rank adapter, with parameters `lora_A.weight` `[r, d]` and `lora_B.weight` `[p, r]` beside its own
    /// in the store, and freezes weight and bias.
    pub fn adapt(&mut self, params: &Params, c: &LoraConfig) -> Result<()> {
        if self.lora.is_some() {
            return Err(Error::invalid("LoRA", format!("{} has an adapter already", self.weight.name())));
        }
        let [a, b] = self.weight.shape() else {
            return Err(Error::shape("LoRA", format!("{} is no matrix", self.weight.name())));
        };
        let sizes = if self.layout == Layout::OutIn { (*b, *a) } else { (*a, *b) };
        let layer = self.weight.name().rsplit_once('.').map_or("", |(layer, _)| layer).to_string();
        self.lora = Some(Lora::new(params, &layer, sizes, c)?);
        self.weight.set_trainable(false);
        self.bias.iter().for_each(|b| b.set_trainable(false));
        Ok(())
    }
    /// Adds the adapter to the weight, so that it costs nothing any more; nothing without one.
    pub fn merge(&mut self) -> Result<()> {
        self.lora.as_mut().map_or(Ok(()), |l| l.merge(&self.weight, self.layout))
    }
    /// Takes it out again, bit for bit.
    pub fn unmerge(&mut self) -> Result<()> {
        self.lora.as_mut().map_or(Ok(()), |l| l.unmerge(&self.weight))
    }
    /// The weight.
    pub fn weight(&self) -> &Param {
        &self.weight
    }
    /// The bias, if there is one.
    pub fn bias(&self) -> Option<&Param> {
        self.bias.as_ref()
    }
}

/// Layer norm over the last dimension: `weight` and `bias` `[d]`.
pub struct LayerNorm {
    weight: Param,
    bias: Param,
    eps: f64,
}

impl LayerNorm {
    /// Over d elements.
    pub fn new(params: &Params, d: usize, eps: f64) -> Result<LayerNorm> {
        let (weight, bias) = (params.param("weight", &[d], Init::Ones)?, params.param("bias", &[d], Init::Zeros)?);
        Ok(LayerNorm { weight, bias, eps })
    }
    /// `[B, …, d]` → `[B, …, d]`.
    pub fn forward(&self, x: &Tensor, ctx: &Ctx) -> Result<Tensor> {
        layer_norm(x, Some(&self.weight), Some(&self.bias), self.eps, ctx.samples.as_ref())
    }
}

/// RMS norm over the last dimension: `weight` `[d]`.
pub struct RmsNorm {
    weight: Param,
    eps: f64,
}

impl RmsNorm {
    /// Over d elements.
    pub fn new(params: &Params, d: usize, eps: f64) -> Result<RmsNorm> {
        Ok(RmsNorm { weight: params.param("weight", &[d], Init::Ones)?, eps })
    }
    /// `[B, …, d]` → `[B, …, d]`.
    pub fn forward(&self, x: &Tensor, ctx: &Ctx) -> Result<Tensor> {
        rms_norm(x, Some(&self.weight), self.eps, ctx.samples.as_ref())
    }
}

/// Group norm over channels: `weight` and `bias` `[C]`. Unlike batch norm it keeps samples apart.
pub struct GroupNorm {
    weight: Param,
    bias: Param,
    groups: usize,
    eps: f64,
}

impl GroupNorm {
    /// C channels in `groups` groups.
    pub fn new(params: &Params, channels: usize, groups: usize, eps: f64) -> Result<GroupNorm> {
        let (weight, bias) =
            (params.param("weight", &[channels], Init::Ones)?, params.param("bias", &[channels], Init::Zeros)?);
        Ok(GroupNorm { weight, bias, groups, eps })
    }
    /// `[B, C, …]` → `[B, C, …]`.
    pub fn forward(&self, x: &Tensor, _ctx: &Ctx) -> Result<Tensor> {
        group_norm(x, self.groups, Some(&self.weight), Some(&self.bias), self.eps)
    }
}

/// Dropout while training, the identity otherwise.
pub struct Dropout {
    p: f64,
    id: u64,
}

impl Dropout {
    /// Probability `p` of zeroing; the mask stream is named by the scope.
    pub fn new(params: &Params, p: f64) -> Result<Dropout> {
        if !(0.0..1.0).contains(&p) {
            return Err(Error::invalid("Dropout", format!("probability {p}; it must lie in [0, 1)")));
        }
        Ok(Dropout { p, id: params.id("dropout") })
    }
    /// Any shape.
    pub fn forward(&self, x: &Tensor, ctx: &Ctx) -> Result<Tensor> {
        if ctx.train { x.dropout(self.p, ctx.dropout_seed(self.id)) } else { Ok(x.clone()) }
    }
}
