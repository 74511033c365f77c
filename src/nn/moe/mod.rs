//! Mixture of experts (Shazeer et al. 2017): a router sends each token to a few of many small networks.
//!
//! No token is dropped unless a capacity is set, and the number of tokens of an expert is never read back to the host. The gradients of the
//! router and of every expert can be separated by sample, so that the layer can be trained privately.

mod experts;
mod losses;
mod parallel;
mod stats;

pub use experts::ExpertKind;
pub use losses::Balance;
pub use parallel::expert_traffic;
pub use stats::{RouterStats, RouterSummary, Seen};

use super::{Ctx, Init, Linear, Mlp, Params, SwiGlu};
use crate::array::Array;
use crate::autograd::samples_or_leading;
use crate::base::{DType, Error, Result, philox};
use crate::dist::Shared as Ranks;
use crate::ops::combine::combine;
use crate::ops::route::{Choice, Gate, route};
use crate::random::masks;
use crate::{Param, Samples, Tensor};
use experts::Experts;
use losses::Losses;
use parallel::Placement;
use serde::{Deserialize, Serialize};

/// Sizes and options of a [`Moe`] layer.
///
/// ```
/// use prismgrad::nn::{Balance, MoeConfig};
/// let c = MoeConfig { balance: Balance::PerSample(0.01), ..MoeConfig::new(8, 2, 64) };
/// assert_eq!((c.experts, c.top_k, c.hidden, c.renormalise), (8, 2, 64, true));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MoeConfig {
    /// Number of experts.
    pub experts: usize,
    /// Number of experts that each token is sent to.
    pub top_k: usize,
    /// How scores are computed from logits.
    pub gate: Gate,
    /// Whether the weights of a token's experts are divided by their sum, as in Mixtral. With one expert for each token a
    /// renormalised weight is always 1, and then the router learns from the balance loss alone: [`MoeConfig::new`] turns it off
    /// there, as in Switch Transformers.
    pub renormalise: bool,
    /// Hidden width of each expert.
    pub hidden: usize,
    /// The network that each expert is.
    pub expert: ExpertKind,
    /// Number of experts that every token goes to in addition (Dai et al. 2024), as one network of this many times the hidden width.
    pub shared: usize,
    /// The most rows that an expert takes, in multiples of an even share tokens·k/experts, and at least one row. Tokens that come later in
    /// the batch are dropped. `None`, the default, drops nothing. Which tokens are dropped depends on the whole batch, so private training
    /// refuses it.
    pub capacity: Option<f64>,
    /// While training, each logit is multiplied by a number drawn uniformly from 1 − jitter to 1 + jitter. The numbers are a function of
    /// the seed and of the sample's key ([`Ctx::with_keys`]), so that those of one sample do not depend on the rest of the batch.
    pub jitter: f64,
    /// How the experts' loads are kept even.
    pub balance: Balance,
    /// Coefficient of the mean squared log-sum-exp of the logits, which keeps them small (Zoph et al. 2022, equation 5).
    pub z: f64,
}

impl Default for MoeConfig {
    /// Eight experts, two for each token, 64 hidden units each.
    fn default() -> MoeConfig {
        MoeConfig::new(8, 2, 64)
    }
}

impl MoeConfig {
    /// `experts` networks of two matrices with `hidden` units each, of which each token is sent to `top_k`. There are no auxiliary losses,
    /// and nothing is dropped.
    pub fn new(experts: usize, top_k: usize, hidden: usize) -> MoeConfig {
        MoeConfig {
            experts,
            top_k,
            gate: Gate::Softmax,
            renormalise: top_k > 1,
            hidden,
            expert: ExpertKind::default(),
            shared: 0,
            capacity: None,
            jitter: 0.0,
            balance: Balance::Off,
            z: 0.0,
        }
    }
    /// Fails if no layer can be made with these options.
    pub fn validate(&self) -> Result<()> {
        let bad = |message: String| Err(Error::invalid("MoeConfig", message));
        if self.experts == 0 || self.hidden == 0 {
            return bad(format!("{} experts of hidden width {}: both must be at least 1", self.experts, self.hidden));
        }
        if self.top_k == 0 || self.top_k > self.experts {
            return bad(format!("top_k {} of {} experts; it must be 1 to {0}", self.top_k, self.experts));
        }
        if let Some(c) = self.capacity.filter(|c| !(c.is_finite() && *c > 0.0)) {
            return bad(format!(
                "capacity {c}; it must be above 0, such as 1.25 for a quarter more than an even share"
            ));
        }
        if !(0.0..1.0).contains(&self.jitter) {
            return bad(format!("jitter {}; it must lie in [0, 1)", self.jitter));
        }
        let (Balance::Batch(c) | Balance::PerSample(c) | Balance::Bias { rate: c }) = self.balance else {
            return self.check_coefficient("z", self.z);
        };
        self.check_coefficient("balance", c)?;
        self.check_coefficient("z", self.z)
    }
    fn check_coefficient(&self, name: &str, c: f64) -> Result<()> {
        if c.is_finite() && c >= 0.0 {
            return Ok(());
        }
        Err(Error::invalid("MoeConfig", format!("coefficient {c} of {name}; it must be 0 or more")))
    }
    /// The number of parameters that take part in the output of one token, for a layer of width `d`.
    pub fn active_params(&self, d: usize) -> usize {
        let one = self.expert.params(d, self.hidden);
        d * self.experts + self.top_k * one + self.shared_params(d)
    }
    /// The number of all parameters of a layer of width `d`.
    pub fn params(&self, d: usize) -> usize {
        d * self.experts + self.experts * self.expert.params(d, self.hidden) + self.shared_params(d)
    }
    fn shared_params(&self, d: usize) -> usize {
        if self.shared == 0 { 0 } else { self.expert.params(d, self.shared * self.hidden) }
    }
}

/// What a [`Moe`] layer returns.
#[derive(Clone)]
pub struct MoeOut {
    /// The output, in the shape of the input.
    pub output: Tensor,
    /// The balance and z losses of each sample, `[B]`, multiplied by their coefficients. Add them to the samples' losses.
    pub losses: Tensor,
    /// Statistics of the router, on the device.
    pub stats: RouterStats,
}

/// The experts that every token goes to.
enum Shared {
    Mlp(Mlp),
    SwiGlu(SwiGlu),
}

/// A router and its experts: y = Σ over a token's experts of weight·expert(x), plus the shared experts.
///
/// Parameters: `router.weight` `[experts, d]`, whose logits are always computed in f32 at least; `experts.c_fc` and
/// `experts.c_proj`, or `experts.gate_proj`, `experts.up_proj` and `experts.down_proj`, each with one matrix for every expert;
/// `shared.…` as in [`Mlp`] or [`SwiGlu`]; `balance_bias` `[experts]`, which is not trained, with [`Balance::Bias`].
///
/// ```
/// use prismgrad::nn::{Balance, Ctx, Moe, MoeConfig, Params};
/// use prismgrad::{DType, Tensor};
/// # fn main() -> prismgrad::Result<()> {
/// let params = Params::new(0, DType::F32);
/// let config = MoeConfig { balance: Balance::PerSample(0.01), ..MoeConfig::new(8, 2, 32) };
/// let moe = Moe::new(&params.at("moe"), 16, &config)?;
/// let out = moe.forward(&Tensor::zeros(&[4, 10, 16], DType::F32), &Ctx::train(0))?;
/// assert_eq!((out.output.shape(), out.losses.shape()), ([4, 10, 16].as_slice(), [4].as_slice()));
/// // 40 tokens with two experts each.
/// assert_eq!(out.stats.read()?.load.iter().sum::<f64>(), 80.0);
/// # Ok(()) }
/// ```
pub struct Moe {
    name: String,
    config: MoeConfig,
    d: usize,
    router: Linear,
    experts: Experts,
    shared: Option<Shared>,
    bias: Option<Param>,
    id: u64,
    params: Params,
    placement: Option<Placement>,
}

/// Options of a [`Moe`] layer, from [`Moe::builder`].
#[derive(Clone, Copy, Debug)]
pub struct MoeBuilder {
    d: usize,
    config: MoeConfig,
    init: Init,
    init_out: Init,
}

impl MoeBuilder {
    setters! {
        /// Initial values of the router and of the weights that read the input; [`Init::KaimingUniform`] if not given.
        init: Init,
        /// Initial values of the weights that write the output; [`Init::KaimingUniform`] if not given.
        init_out: Init,
    }
    /// Makes the layer, with parameters under `params`. Fails if the options are not valid or the names are taken.
    pub fn build(self, params: &Params) -> Result<Moe> {
        params.whole(|params| {
            let MoeBuilder { d, config: c, init, init_out } = self;
            c.validate()?;
            if d == 0 {
                return Err(Error::invalid("Moe", "a layer of width 0"));
            }
            let router = Linear::builder(d, c.experts).bias(false).init(init).build(&params.at("router"))?;
            let experts = Experts::new(&params.at("experts"), d, &c, (init, init_out))?;
            let (wide, at) = (c.shared.saturating_mul(c.hidden), params.at("shared"));
            let shared = match c.expert {
                _ if c.shared == 0 => None,
                ExpertKind::Mlp(act) => {
                    Some(Shared::Mlp(Mlp::builder(d, wide).act(act).init(init).init_out(init_out).build(&at)?))
                }
                ExpertKind::SwiGlu => {
                    Some(Shared::SwiGlu(SwiGlu::builder(d, wide).init(init).init_out(init_out).build(&at)?))
                }
            };
            let bias = match c.balance {
                Balance::Bias { .. } => {
                    let bias = params.param("balance_bias", &[c.experts], Init::Zeros)?;
                    bias.set_trainable(false);
                    Some(bias)
                }
                _ => None,
            };
            let name = params.prefix().to_string();
            let (id, params) = (params.id("jitter"), params.clone());
            Ok(Moe { name, config: c, d, router, experts, shared, bias, id, params, placement: None })
        })
    }
}

impl Moe {
    /// A layer of width `d`. Fails if the options are not valid or the names are taken in `params`.
    pub fn new(params: &Params, d: usize, config: &MoeConfig) -> Result<Moe> {
        Moe::builder(d, config).build(params)
    }
    /// Options for a layer of width `d`.
    pub fn builder(d: usize, config: &MoeConfig) -> MoeBuilder {
        MoeBuilder { d, config: *config, init: Init::KaimingUniform, init_out: Init::KaimingUniform }
    }
    /// Sizes and options.
    pub fn config(&self) -> &MoeConfig {
        &self.config
    }
    /// The layer's part of the parameter store.
    pub fn params(&self) -> &Params {
        &self.params
    }
    /// The router.
    pub fn router(&self) -> &Linear {
        &self.router
    }
    /// `[B, …, d]` → the same shape. Dimension 0 counts samples unless the context maps rows to samples otherwise.
    ///
    /// In a private step, options that let one sample's output or loss depend on the others are refused.
    pub fn forward(&self, x: &Tensor, ctx: &Ctx) -> Result<MoeOut> {
        self.expect_private()?;
        let x = &ctx.activations(x)?;
        if x.shape().last() != Some(&self.d) || x.rank() < 2 {
            let message = format!("input {:?}; it must be [B, …, {}]", x.shape(), self.d);
            return Err(Error::shape("Moe", message));
        }
        let samples = samples_or_leading(ctx.samples.as_ref(), x.shape(), 1);
        let tokens = x.numel() / self.d;
        let flat = x.reshape(&[tokens, self.d])?;
        let plain = Ctx { dtype: None, samples: Some(samples.clone()), ..ctx.clone() };
        // In 16 bits several logits could be equal, and the choice would then fall on the lowest number.
        let mut logits = self.router.forward(&flat.cast(flat.dtype().compute())?, &plain)?;
        if ctx.train
            && self.config.jitter > 0.0
            && let Some(seed) = masks::seed(ctx.dropout_seed(self.id))
        {
            let noise = self.jitter(&samples, ctx, (seed, logits.dtype()))?;
            logits = logits.mul(&Tensor::new(noise.to(&logits.device())?))?;
        }
        let (out, losses, stats) = self.route_and_run(&flat, &logits, &samples, ctx.observe)?;
        let out = match &self.shared {
            None => out,
            Some(Shared::Mlp(m)) => out.add(&m.forward(&flat, &ctx.with_samples(samples))?)?,
            Some(Shared::SwiGlu(m)) => out.add(&m.forward(&flat, &ctx.with_samples(samples))?)?,
        };
        Ok(MoeOut { output: out.reshape(x.shape())?, losses, stats })
    }
    /// The output of the routed experts for `flat [T, d]`.
    fn route_and_run(
        &self,
        flat: &Tensor,
        logits: &Tensor,
        samples: &Samples,
        observe: bool,
    ) -> Result<(Tensor, Tensor, RouterStats)> {
        let c = &self.config;
        let choice = Choice { top_k: c.top_k, gate: c.gate, renormalise: c.renormalise };
        let bias = self.bias.as_ref().map(Param::value);
        let (mut weights, routing) = route(logits, &choice, bias.as_ref())?;
        let kept = match c.capacity {
            None => None,
            Some(factor) => {
                let share = routing.tokens() as f64 * c.top_k as f64 / c.experts as f64;
                let kept = routing.within((factor * share).ceil().max(1.0) as usize)?;
                weights = weights.mul(&Tensor::new(kept.cast(weights.dtype())))?;
                Some(kept)
            }
        };
        let y = match &self.placement {
            Some(placement) => placement.forward(&self.experts, flat, &routing)?,
            None => self.experts.forward(flat, &routing, &routing.samples(samples)?)?,
        };
        let out = combine(&y, &weights, &routing)?;
        let losses = Losses { config: c, logits, routing: &routing, samples }.all()?;
        let seen = match observe {
            true => Some(Seen::of(flat.array(), weights.array(), y.array(), &routing)?),
            false => None,
        };
        Ok((out, losses, RouterStats::new(logits.array().clone(), routing, kept, seen)))
    }
    /// Moves the bias of each expert with less than an even share of the load up by the rate, and that of the others down (Wang et al.
    /// 2024, algorithm 1). Call it after each step with the step's statistics. Without [`Balance::Bias`] it does nothing.
    pub fn update_bias(&self, stats: &RouterStats) -> Result<()> {
        let (Balance::Bias { rate }, Some(bias)) = (self.config.balance, &self.bias) else { return Ok(()) };
        let value = bias.value();
        let load = Tensor::new(stats.load()?.to(&value.device())?.cast(value.dtype()));
        let over = load.sub(&load.mean(&[0], true)?)?;
        let zero = Tensor::new(Array::zeros(&[1], (value.dtype(), &value.device())));
        let sign = over.gt(&zero)?.cast(value.dtype())?.sub(&over.lt(&zero)?.cast(value.dtype())?)?;
        bias.set(Tensor::new(value).sub(&sign.mul_scalar(rate)?)?.into_array())
    }
    /// Spreads the experts over ranks (Lepikhin et al. 2021, section 3): each rank keeps its share of them, tokens are sent to the rank
    /// that holds their expert, and the outputs come back. The results are those of one rank. Call it on every rank, with the same
    /// parameters, before the step is made; give the step a handle on the same communicator (`with_ranks`), so that the other parameters'
    /// gradients are summed. From then on `experts.…` in the store is this rank's part, and every rank must take part in every forward and
    /// backward pass, with at least one sample. This works on the CPU only, and a private step refuses it. [`expert_traffic`] gives the
    /// number of bytes that are sent.
    pub fn place(&mut self, ranks: &Ranks) -> Result<()> {
        if self.placement.is_some() {
            return Err(Error::invalid("Moe::place", format!("{} is on ranks already", self.name)));
        }
        let placement = Placement::new(ranks.clone(), self.config.experts);
        self.experts.place(&self.params, &placement.own())?;
        self.placement = Some(placement);
        Ok(())
    }
    /// The factor of each logit while training: `[T, experts]`.
    fn jitter(&self, samples: &Samples, ctx: &Ctx, (seed, dtype): (u64, DType)) -> Result<Array> {
        let (e, count) = (self.config.experts, samples.count());
        if let Some(keys) = ctx.keys.as_ref().filter(|k| k.len() != count) {
            return Err(Error::shape("Moe", format!("{} keys for {count} samples", keys.len())));
        }
        let key = |sample: usize| ctx.keys.as_ref().map_or(sample as u64, |k| k[sample]);
        // The number of each row within its sample.
        let mut seen = vec![0u64; count];
        let mut factors = Vec::with_capacity(samples.rows() * e);
        for row in 0..samples.rows() {
            let sample = samples.owner(row);
            let (stream, first) = (key(sample), seen[sample] * e as u64);
            seen[sample] += 1;
            let draw = |i: u64| 1.0 + self.config.jitter * (2.0 * philox::uniform(seed, stream, first + i) - 1.0);
            factors.extend((0..e as u64).map(draw));
        }
        Ok(Array::from_slice(&factors, &[samples.rows(), e])?.cast(dtype))
    }
    /// In a private step, refuses options that let samples depend on each other.
    fn expect_private(&self) -> Result<()> {
        if !masks::in_private_step() {
            return Ok(());
        }
        let layer = if self.name.is_empty() { "this layer" } else { &self.name };
        if let Some(capacity) = self.config.capacity {
            return Err(Error::privacy(format!(
                "{layer} drops tokens beyond a capacity of {capacity}: whether a sample's token is dropped depends on the \
                 other samples. Set capacity to None, with which no token is dropped"
            )));
        }
        if self.placement.is_some() {
            return Err(Error::privacy(format!(
                "{layer} has its experts on several ranks: a sample's norm would lie on all of them, and summing it is not \
                 there yet. Keep the experts on every rank (no Moe::place) and give the step the ranks (with_ranks)"
            )));
        }
        let what = match self.config.balance {
            Balance::Batch(_) => "Balance::Batch, whose loss of one sample depends on the load of the whole batch",
            Balance::Bias { .. } => "Balance::Bias, which moves its bias by the load of the whole batch without noise",
            Balance::Off | Balance::PerSample(_) => return Ok(()),
        };
        Err(Error::privacy(format!(
            "{layer} has {what}: use Balance::PerSample, the same loss over a sample's own tokens"
        )))
    }
}
