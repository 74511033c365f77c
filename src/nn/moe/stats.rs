//! Statistics of what a router did with a batch.

use crate::array::Array;
use crate::base::{Error, Result};
use crate::ops::route::Routing;
use crate::{Samples, Tensor};

/// Where the tokens of one forward pass went. Everything is on the device of the layer, and computed when a method needs it; only
/// [`RouterStats::read`] waits for the device. The statistics are computed from the data without noise, so they are not private.
#[derive(Clone, Debug)]
pub struct RouterStats {
    logits: Array,
    routing: Routing,
    kept: Option<Array>,
    seen: Option<Seen>,
}

/// The data that a layer keeps for an analysis of its experts, with [`Ctx::observe`](crate::nn::Ctx::observe).
#[derive(Clone, Debug)]
pub struct Seen {
    /// The router's inputs, `[T, d]`.
    pub inputs: Array,
    /// The weights of each token's experts, `[T, k]`, in the order of [`Routing::choices`].
    pub weights: Array,
    /// The Euclidean norms of these experts' outputs before the weights, `[T, k]`.
    pub norms: Array,
}

impl Seen {
    /// Collects the data of one forward pass. `y` has a row for each choice, in the order of the experts.
    pub(super) fn of(inputs: &Array, weights: &Array, y: &Array, routing: &Routing) -> Result<Seen> {
        let y = Tensor::new(y.cast(y.dtype().compute()));
        let rows = y.mul(&y)?.sum(&[-1], false)?.sqrt()?;
        let places = routing.places().reshape(&[routing.tokens() * routing.top_k()])?;
        let norms = rows.index_select(0, places)?.into_array();
        let norms = norms.reshape(&[routing.tokens(), routing.top_k()])?;
        Ok(Seen { inputs: inputs.clone(), weights: weights.clone(), norms })
    }
}

/// [`RouterStats`] as numbers on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct RouterSummary {
    /// Number of choices that fell on each expert.
    pub load: Vec<f64>,
    /// Entropy of the load in nats: ln(experts) if the load is even, 0 if it all falls on one expert.
    pub entropy: f64,
    /// Number of experts without a token.
    pub idle: usize,
    /// Number of choices that were dropped for lack of capacity.
    pub dropped: usize,
}

impl RouterStats {
    pub(super) fn new(logits: Array, routing: Routing, kept: Option<Array>, seen: Option<Seen>) -> RouterStats {
        RouterStats { logits, routing, kept, seen }
    }
    /// The data that was kept for an analysis of the experts; `None` unless [`Ctx::observe`](crate::nn::Ctx::observe) was set.
    pub fn seen(&self) -> Option<&Seen> {
        self.seen.as_ref()
    }
    /// The router's logits `[T, E]`, jitter included.
    pub fn logits(&self) -> &Array {
        &self.logits
    }
    /// Which experts each token was sent to.
    pub fn routing(&self) -> &Routing {
        &self.routing
    }
    /// Number of choices that fell on each expert, `[E]` f32, including those that were dropped.
    pub fn load(&self) -> Result<Array> {
        self.routing.load(&Samples::uniform(1, self.routing.tokens()))?.reshape(&[self.routing.experts()])
    }
    /// Entropy of the load in nats, `[1]` f32.
    pub fn entropy(&self) -> Result<Array> {
        let load = Tensor::new(self.load()?);
        let share = load.div(&load.sum(&[0], true)?.clamp(1.0, f64::INFINITY)?)?;
        // 0·ln 0 is 0.
        let logs = share.clamp(f32::MIN_POSITIVE as f64, 1.0)?.log()?;
        Ok(share.mul(&logs)?.sum(&[0], true)?.neg()?.into_array())
    }
    /// The number of tokens that went to both of two experts, `[E, E]` f32, with the load on the diagonal.
    pub fn co_activation(&self) -> Result<Array> {
        let chosen = Tensor::new(self.routing.choices().clone()).one_hot(self.routing.experts(), crate::DType::F32)?;
        let chosen = chosen.sum(&[1], false)?;
        Ok(chosen.transpose(0, 1)?.matmul(&chosen)?.into_array())
    }
    /// Number of choices that were dropped for lack of capacity, `[1]` f32.
    pub fn dropped(&self) -> Result<Array> {
        match &self.kept {
            None => Ok(Array::zeros(&[1], (crate::DType::F32, &self.logits.device()))),
            Some(kept) => {
                let kept = Tensor::new(kept.reshape(&[kept.numel()])?);
                Ok(kept.sum(&[0], true)?.neg()?.add_scalar(kept.numel() as f64)?.into_array())
            }
        }
    }
    /// The statistics on the host; waits for the device. Fails if a token's logits are not finite, since such a token was sent to the
    /// experts with the lowest numbers.
    pub fn read(&self) -> Result<RouterSummary> {
        if let Some(at) = self.logits.to_f64().iter().position(|x| !x.is_finite()) {
            let (token, expert) = (at / self.routing.experts(), at % self.routing.experts());
            let message = format!("the router's logit of token {token} for expert {expert} is not finite");
            return Err(Error::invalid("Moe", message));
        }
        let load = self.load()?.to_f64();
        let idle = load.iter().filter(|&&l| l == 0.0).count();
        let (entropy, dropped) = (self.entropy()?.item()?, self.dropped()?.item()? as usize);
        Ok(RouterSummary { load, entropy, idle, dropped })
    }
}
