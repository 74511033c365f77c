//! Linear, norms, dropout.

use super::lora::{Lora, LoraConfig, activate};
use super::{Ctx, Init, Params};
use crate::base::{Error, Result};
use crate::kernels::Activation;
use crate::ops::linear::{Layout, linear};
use crate::ops::norm::{group_norm, layer_norm, rms_norm};
use crate::{Param, Tensor};

/// A linear layer with an optional fused activation, y = act(x·Wᵀ + b), over the last dimension.
///
/// ```
/// use prismgrad::nn::{Ctx, Init, Linear, Params};
/// use prismgrad::{DType, Tensor};
/// # fn main() -> prismgrad::Result<()> {
/// let params = Params::new(0, DType::F32);
/// let hidden = Linear::new(&params.at("hidden"), 8, 32)?;
/// let out = Linear::builder(32, 10).bias(false).init(Init::Zeros).build(&params.at("out"))?;
/// let y = out.forward(&hidden.forward(&Tensor::zeros(&[4, 8], DType::F32), &Ctx::eval())?, &Ctx::eval())?;
/// assert_eq!(y.shape(), [4, 10]);
/// # Ok(()) }
/// ```
pub struct Linear {
    weight: Param,
    bias: Option<Param>,
    layout: Layout,
    lora: Option<Lora>,
}

/// Options of a [`Linear`] layer, from [`Linear::builder`].
#[derive(Clone, Copy, Debug)]
pub struct LinearBuilder {
    sizes: (usize, usize),
    bias: bool,
    init: Init,
    layout: Layout,
}

impl LinearBuilder {
    setters! {
        /// Whether the layer adds a bias, which starts at zero. The default is `true`.
        bias: bool,
        /// Initial values of the weight; [`Init::KaimingUniform`] with the number of inputs as fan-in if not given.
        init: Init,
        /// How the weight lies in memory; [`Layout::OutIn`], as in PyTorch, if not given.
        layout: Layout,
    }
    /// Makes the layer, with the parameters `weight` (`[p, d]`, or `[d, p]` for [`Layout::InOut`]) and `bias` `[p]`. Fails if these names
    /// are taken in `params`.
    pub fn build(self, params: &Params) -> Result<Linear> {
        params.whole(|params| {
            let (d, p) = self.sizes;
            let shape = if self.layout == Layout::OutIn { [p, d] } else { [d, p] };
            Ok(Linear {
                weight: params.param_with_fan_in("weight", &shape, self.init, d)?,
                bias: if self.bias { Some(params.param("bias", &[p], Init::Zeros)?) } else { None },
                layout: self.layout,
                lora: None,
            })
        })
    }
}

impl Linear {
    /// A layer from d inputs to p outputs, with a bias and a weight `[p, d]` drawn uniformly from ±1/√d. Fails if the names `weight` and
    /// `bias` are taken in `params`.
    pub fn new(params: &Params, d: usize, p: usize) -> Result<Linear> {
        Linear::builder(d, p).build(params)
    }
    /// Options for a layer from d inputs to p outputs.
    pub fn builder(d: usize, p: usize) -> LinearBuilder {
        LinearBuilder { sizes: (d, p), bias: true, init: Init::KaimingUniform, layout: Layout::OutIn }
    }
    /// `[B, …, d]` → `[B, …, p]`.
    pub fn forward(&self, x: &Tensor, ctx: &Ctx) -> Result<Tensor> {
        self.forward_act(x, Activation::None, ctx)
    }
    /// [`Linear::forward`] with an activation fused into the product.
    pub fn forward_act(&self, x: &Tensor, act: Activation, ctx: &Ctx) -> Result<Tensor> {
        let x = &ctx.activations(x)?;
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
    /// Removes the adapter without changing the weight or what is trainable; the adapter's parameters stay in the store.
    pub(crate) fn forget_adapter(&mut self) {
        self.lora = None;
    }
    /// Adds the adapter to the weight, so that it costs no time any more. Without an adapter this does nothing.
    pub fn merge(&mut self) -> Result<()> {
        self.lora.as_mut().map_or(Ok(()), |l| l.merge(&self.weight, self.layout))
    }
    /// Whether the layer has an adapter that has been added to the weight.
    pub fn merged(&self) -> bool {
        self.lora.as_ref().is_some_and(Lora::merged)
    }
    /// Undoes [`Linear::merge`]: the weight has its former bits again.
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

/// Refuses an ε that would make a norm's output undefined.
fn expect_eps(layer: &'static str, eps: f64) -> Result<()> {
    match eps.is_finite() && eps >= 0.0 {
        true => Ok(()),
        false => Err(Error::invalid(layer, format!("ε = {eps}; it must be 0 or more, and finite, such as 1e-5"))),
    }
}

/// Layer norm (Ba et al. 2016) over the last dimension: weight ⊙ (x − mean)/√(variance + ε) + bias, with `weight` and `bias` `[d]`.
pub struct LayerNorm {
    weight: Param,
    bias: Option<Param>,
    eps: f64,
}

/// Options of a [`LayerNorm`], from [`LayerNorm::builder`].
#[derive(Clone, Copy, Debug)]
pub struct LayerNormBuilder {
    d: usize,
    bias: bool,
    eps: f64,
}

impl LayerNormBuilder {
    setters! {
        /// Whether the layer adds a bias, which starts at zero. The default is `true`.
        bias: bool,
        /// What is added to the variance; 1e-5 if not given.
        eps: f64,
    }
    /// Makes the layer, with the parameters `weight` (ones) and `bias` (zeros). Fails if these names are taken in `params`.
    pub fn build(self, params: &Params) -> Result<LayerNorm> {
        params.whole(|params| {
            expect_eps("LayerNorm", self.eps)?;
            let weight = params.param("weight", &[self.d], Init::Ones)?;
            let bias = if self.bias { Some(params.param("bias", &[self.d], Init::Zeros)?) } else { None };
            Ok(LayerNorm { weight, bias, eps: self.eps })
        })
    }
}

impl LayerNorm {
    /// A norm over d elements, with weight and bias, ε = 1e-5. Fails if the names `weight` and `bias` are taken in `params`.
    pub fn new(params: &Params, d: usize) -> Result<LayerNorm> {
        LayerNorm::builder(d).build(params)
    }
    /// Options for a norm over d elements.
    pub fn builder(d: usize) -> LayerNormBuilder {
        LayerNormBuilder { d, bias: true, eps: 1e-5 }
    }
    /// `[B, …, d]` → `[B, …, d]`.
    pub fn forward(&self, x: &Tensor, ctx: &Ctx) -> Result<Tensor> {
        layer_norm(x, Some(&self.weight), self.bias.as_ref(), self.eps, ctx.samples.as_ref())
    }
}

/// RMS norm (Zhang and Sennrich 2019) over the last dimension: weight ⊙ x / √(mean(x²) + ε), with `weight` `[d]`.
pub struct RmsNorm {
    weight: Param,
    eps: f64,
}

/// Options of an [`RmsNorm`], from [`RmsNorm::builder`].
#[derive(Clone, Copy, Debug)]
pub struct RmsNormBuilder {
    d: usize,
    eps: f64,
}

impl RmsNormBuilder {
    setters! {
        /// What is added to the mean square; 1e-6 if not given.
        eps: f64,
    }
    /// Makes the layer, with the parameter `weight` (ones). Fails if this name is taken in `params`.
    pub fn build(self, params: &Params) -> Result<RmsNorm> {
        params.whole(|params| {
            expect_eps("RmsNorm", self.eps)?;
            Ok(RmsNorm { weight: params.param("weight", &[self.d], Init::Ones)?, eps: self.eps })
        })
    }
}

impl RmsNorm {
    /// A norm over d elements, ε = 1e-6. Fails if the name `weight` is taken in `params`.
    pub fn new(params: &Params, d: usize) -> Result<RmsNorm> {
        RmsNorm::builder(d).build(params)
    }
    /// Options for a norm over d elements.
    pub fn builder(d: usize) -> RmsNormBuilder {
        RmsNormBuilder { d, eps: 1e-6 }
    }
    /// `[B, …, d]` → `[B, …, d]`.
    pub fn forward(&self, x: &Tensor, ctx: &Ctx) -> Result<Tensor> {
        rms_norm(x, Some(&self.weight), self.eps, ctx.samples.as_ref())
    }
}

/// Group norm (Wu and He 2018): each sample's channels are normalised in groups, (x − mean)/√(variance + ε) over a group's channels and all
/// positions, then scaled and shifted by `weight` and `bias` `[C]`. Unlike batch norm it keeps samples apart, so that it can be trained
/// privately.
pub struct GroupNorm {
    weight: Param,
    bias: Param,
    groups: usize,
    eps: f64,
}

/// Options of a [`GroupNorm`], from [`GroupNorm::builder`].
#[derive(Clone, Copy, Debug)]
pub struct GroupNormBuilder {
    groups: usize,
    channels: usize,
    eps: f64,
}

impl GroupNormBuilder {
    setters! {
        /// What is added to the variance; 1e-5 if not given.
        eps: f64,
    }
    /// Makes the layer, with the parameters `weight` (ones) and `bias` (zeros). Fails if these names are taken in `params`, or if the
    /// groups do not divide the channels.
    pub fn build(self, params: &Params) -> Result<GroupNorm> {
        params.whole(|params| {
            let GroupNormBuilder { groups, channels, eps } = self;
            expect_eps("GroupNorm", eps)?;
            if groups == 0 || !channels.is_multiple_of(groups) {
                let message =
                    format!("{channels} channels do not divide into {groups} groups; the order is (groups, channels)");
                return Err(Error::invalid("GroupNorm", message));
            }
            let (weight, bias) =
                (params.param("weight", &[channels], Init::Ones)?, params.param("bias", &[channels], Init::Zeros)?);
            Ok(GroupNorm { weight, bias, groups, eps })
        })
    }
}

impl GroupNorm {
    /// A norm of `channels` channels in `groups` groups of equal size, with PyTorch's order of arguments and ε = 1e-5. Fails if the names
    /// `weight` and `bias` are taken in `params`, or if the groups do not divide the channels.
    pub fn new(params: &Params, groups: usize, channels: usize) -> Result<GroupNorm> {
        GroupNorm::builder(groups, channels).build(params)
    }
    /// Options for a norm of `channels` channels in `groups` groups.
    pub fn builder(groups: usize, channels: usize) -> GroupNormBuilder {
        GroupNormBuilder { groups, channels, eps: 1e-5 }
    }
    /// `[B, C, …]` → `[B, C, …]`.
    pub fn forward(&self, x: &Tensor, _ctx: &Ctx) -> Result<Tensor> {
        group_norm(x, self.groups, Some(&self.weight), Some(&self.bias), self.eps)
    }
}

/// Dropout (Srivastava et al. 2014) while training, the identity otherwise. The mask depends on the seed of the context, on the layer and
/// on the element's index alone, so that it has the same bits on every device.
pub struct Dropout {
    p: f64,
    id: u64,
}

impl Dropout {
    /// Each element becomes 0 with probability `p`, and the others are divided by 1 − p. The scope of `params` names the stream
    /// of masks, so that two layers in different scopes have different ones. Fails unless `p` lies in [0, 1).
    pub fn new(params: &Params, p: f64) -> Result<Dropout> {
        if !(0.0..1.0).contains(&p) {
            return Err(Error::invalid("Dropout", format!("probability {p}; it must lie in [0, 1)")));
        }
        Ok(Dropout { p, id: params.id("dropout") })
    }
    /// Applies dropout to a tensor of any shape.
    pub fn forward(&self, x: &Tensor, ctx: &Ctx) -> Result<Tensor> {
        if ctx.train { x.dropout(self.p, ctx.dropout_seed(self.id)) } else { Ok(x.clone()) }
    }
}
