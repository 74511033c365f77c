//! Routing of tokens to experts: the gate's scores, the k best experts of each token, and the order of the rows by expert.
//!
//! A token's k choices are its k largest logits (among equal ones, the expert with the lower number); its weights are the gate's values
//! there, renormalised to sum to 1 if requested. The pairs (token, choice) are then sorted by expert with a stable counting sort, so that
//! each expert's rows are consecutive, in the order of the tokens. No token is dropped, nothing is padded, no array of tokens × experts ×
//! rows is built, and the host reads no count: on a GPU a [`Routing`] is computed there and stays there.
//!
//! Memory traffic: the logits are read once and N = tokens·k rows of indices are written; the sort takes one pass over N for every 8 bits
//! of the number of experts.

pub(crate) mod cuda;

use crate::array::Array;
use crate::array::cuda::on;
use crate::autograd::{
    Case, Cotangents, Differentiable, Gen, NO_PARAMS, OpInfo, Owner, Owners, Rule, Segments, Whose, one,
};
use crate::base::{DType, Error, Float, Result};
use crate::device::cpu::par::{GRAIN, par_chunks};
use crate::device::cpu::shared::Shared;
use crate::device::spans;
use crate::kernels::rows::cuda as rows;
use crate::kernels::{Exact, Half, dispatch};
use crate::{Device, Samples, Tensor, with_float};
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

/// The function that maps a router's logits to scores.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gate {
    /// Softmax over all experts (Shazeer et al. 2017; Fedus et al. 2022, equation 1).
    #[default]
    Softmax,
    /// A sigmoid for each expert separately (DeepSeek-V3 2024, equation 15).
    Sigmoid,
}

/// The choice of a token's experts and of their weights.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Choice {
    /// Number of experts for each token.
    pub top_k: usize,
    /// The function from logits to scores.
    pub gate: Gate,
    /// Whether the weights of a token's experts are divided by their sum.
    pub renormalise: bool,
}

static ROUTE: OpInfo = OpInfo {
    name: "route",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[
        |g: &mut Gen| {
            let (t, e) = (g.extent(0, 6), g.size(1, 7));
            let top_k = g.size(1, e);
            let gate = if g.chance(0.5) { Gate::Softmax } else { Gate::Sigmoid };
            let c = Choice { top_k, gate, renormalise: g.chance(0.5) };
            // The weights, and the rows that the tokens became.
            Ok(Case::new(vec![g.distinct(&[t, e])], move |x| {
                let (w, routing) = route(&x[0], &c, None)?;
                let place = Tensor::new(routing.places().cast(w.dtype()));
                w.mul(&place.add_scalar(1.0)?)
            }))
        },
        // Many experts, and a bias that affects the choice only.
        |g: &mut Gen| {
            let (t, e) = (g.extent(1, 3), g.extent(1, 6));
            let c = Choice { top_k: g.size(1, e.min(9)), gate: Gate::Sigmoid, renormalise: true };
            let bias = Array::generate(&[e], DType::F64, |i| (i * 7 % 5) as f64).cast(g.dtype().compute());
            Ok(Case::new(vec![g.distinct(&[t, e])], move |x| Ok(route(&x[0], &c, Some(&bias))?.0)))
        },
    ],
};

/// The registry entries of this family.
pub static OPS: &[&OpInfo] = &[&ROUTE];

/// The assignment of a batch's tokens to experts: `tokens`·k rows, sorted by expert, and in the order of the tokens for each expert.
///
/// Clones are handles. On a GPU all arrays are stored there, and no method waits for it unless its description says so.
#[derive(Clone, Debug)]
pub struct Routing {
    top_k: usize,
    choices: Array,
    /// For each row, the pair token·k + choice.
    order: Array,
    token: Array,
    place: Array,
    groups: Segments,
}

impl Routing {
    /// A routing from the experts of each token, `[T, k]` u32 below `experts`, on the CPU or a GPU.
    pub(crate) fn new(choices: Array, experts: usize) -> Result<Routing> {
        let &[tokens, top_k] = choices.shape() else {
            return Err(Error::shape("route", format!("choices {:?} must be [T, k]", choices.shape())));
        };
        let n = tokens * top_k;
        if n > u32::MAX as usize {
            return Err(Error::invalid("route", format!("{n} rows of tokens: fewer than 2³² can be told apart")));
        }
        if let Some(gpu) = choices.gpu() {
            let (sorted, order) = rows::sort_ids(gpu, &choices.reshape(&[n])?, experts)?;
            let (token, place) = cuda::places(gpu, &order, (tokens, top_k))?;
            let groups = Segments::of_sorted_on(gpu, sorted, experts)?;
            return Ok(Routing { top_k, choices, order, token, place, groups });
        }
        let ids = choices.as_slice::<u32>()?;
        let mut lengths = vec![0usize; experts];
        ids.iter().for_each(|&e| lengths[e as usize] += 1);
        let groups = Segments::lengths(&lengths);
        let mut next = groups.offsets().to_vec();
        let (mut order, mut token, mut place) = (vec![0u32; n], vec![0u32; n], vec![0u32; n]);
        for (pair, &e) in ids.iter().enumerate() {
            let at = next[e as usize];
            next[e as usize] += 1;
            (order[at], token[at], place[pair]) = (pair as u32, (pair / top_k) as u32, at as u32);
        }
        let array = |v: &[u32]| Array::from_slice(v, &[n]);
        let place = array(&place)?.reshape(&[tokens, top_k])?;
        Ok(Routing { top_k, order: array(&order)?, token: array(&token)?, place, choices, groups })
    }
    /// Number of tokens.
    pub fn tokens(&self) -> usize {
        self.choices.shape()[0]
    }
    /// Number of experts for each token.
    pub fn top_k(&self) -> usize {
        self.top_k
    }
    /// Number of experts.
    pub fn experts(&self) -> usize {
        self.groups.count()
    }
    /// The experts of each token, the best first: `[T, k]` u32.
    pub fn choices(&self) -> &Array {
        &self.choices
    }
    /// The row that each choice of each token became: `[T, k]` u32.
    pub fn places(&self) -> &Array {
        &self.place
    }
    /// The token of each row: `[T·k]` u32.
    pub fn tokens_of_rows(&self) -> &Array {
        &self.token
    }
    /// The pair token·k + choice of each row: `[T·k]` u32.
    pub(crate) fn pairs_of_rows(&self) -> &Array {
        &self.order
    }
    /// The rows of each expert.
    pub fn groups(&self) -> &Segments {
        &self.groups
    }
    /// The sample map of the rows; `samples` is the map of the tokens.
    pub fn samples(&self, samples: &Samples) -> Result<Samples> {
        if samples.rows() != self.tokens() {
            let message = format!("the samples map {} rows, there are {} tokens", samples.rows(), self.tokens());
            return Err(Error::shape("route", message));
        }
        let Some(gpu) = self.token.gpu() else { return samples.select(self.token.as_slice::<u32>()?) };
        // Every token becomes k rows, so that the lengths of samples are known although their rows are not.
        let old = samples.on_gpu(gpu)?;
        let (owner, offsets) = cuda::owners(gpu, &self.token, &old, self.top_k)?;
        let order = rows::sort_ids(gpu, &owner, old.count)?.1;
        let rows = self.token.numel();
        let (count, longest) = (old.count, old.longest * self.top_k);
        let owners = Owners { each: 0, count, longest, owner: Some(owner), offsets: Some(offsets), order: Some(order) };
        Ok(Samples::of_gpu(gpu, rows, owners))
    }
    /// The number of each sample's choices that went to each expert: `[B, E]` f32.
    pub fn load(&self, samples: &Samples) -> Result<Array> {
        let (b, e, k) = (samples.count(), self.experts(), self.top_k);
        if samples.rows() != self.tokens() {
            let message = format!("the samples map {} rows, there are {} tokens", samples.rows(), self.tokens());
            return Err(Error::shape("route", message));
        }
        if let Some(gpu) = self.choices.gpu() {
            return cuda::load(gpu, &self.choices, &samples.on_gpu(gpu)?, (b, e));
        }
        let mut load = vec![0f32; b * e];
        for (token, choices) in self.choices.as_slice::<u32>()?.chunks_exact(k.max(1)).enumerate() {
            let load = &mut load[samples.owner(token) * e..][..e];
            choices.iter().for_each(|&c| load[c as usize] += 1.0);
        }
        Array::from_slice(&load, &[b, e])
    }
    /// 1 for each choice among the first `capacity` rows of its expert, otherwise 0: `[T, k]` f32.
    pub fn within(&self, capacity: usize) -> Result<Array> {
        if let Some(gpu) = self.choices.gpu() {
            let offsets = self.groups.on_gpu(gpu)?.offsets;
            return cuda::within(gpu, &self.choices, &self.place, &offsets, capacity);
        }
        let (choices, place, offsets) =
            (self.choices.as_slice::<u32>()?, self.place.as_slice::<u32>()?, self.groups.offsets());
        let kept: Vec<f32> = (choices.iter().zip(place))
            .map(|(&e, &p)| (p as usize - offsets[e as usize] < capacity) as u8 as f32)
            .collect();
        Array::from_slice(&kept, self.choices.shape())
    }
}

/// Computes the scores of one token and selects its k best experts: `choices [k]`, `weights [k]`.
fn choose<T: Float>(x: &[T], bias: Option<&[T]>, c: &Choice, choices: &mut [u32], weights: &mut [T]) {
    let gate = Gates::of(x, c.gate);
    let key = |e: usize| match bias {
        None => x[e],
        Some(b) => gate.score(x[e]) + b[e],
    };
    // NaN is ordered last, as the smallest value.
    let above = |a: T, b: T| a > b || (b.is_nan() && !a.is_nan());
    for s in 0..choices.len() {
        let mut best: Option<usize> = None;
        for e in 0..x.len() {
            if !choices[..s].contains(&(e as u32)) && best.is_none_or(|b| above(key(e), key(b))) {
                best = Some(e);
            }
        }
        choices[s] = best.unwrap_or(0) as u32;
    }
    let mut sum = T::ZERO;
    for (w, &e) in weights.iter_mut().zip(&*choices) {
        *w = gate.score(x[e as usize]);
        sum += *w;
    }
    let scale = if c.renormalise { T::ONE / sum } else { T::ONE };
    // If any logit of a token is NaN, all of its weights become NaN.
    let spoiled = gate.total.is_nan();
    weights.iter_mut().for_each(|w| *w = if spoiled { gate.total } else { *w * scale });
}

/// The quantities that all scores of one token share.
struct Gates<T> {
    gate: Gate,
    largest: T,
    /// Σ exp(xₑ − largest), or the sum of the scores.
    total: T,
}

impl<T: Float> Gates<T> {
    fn of(x: &[T], gate: Gate) -> Gates<T> {
        let largest = x.iter().fold(T::NEG_INFINITY, |m, &x| if x > m { x } else { m });
        let mut of = Gates { gate, largest, total: T::ZERO };
        of.total = x.iter().map(|&x| of.raw(x)).sum();
        of
    }
    fn raw(&self, x: T) -> T {
        match self.gate {
            Gate::Softmax => (x - self.largest).exp(),
            Gate::Sigmoid => T::ONE / (T::ONE + (-x).exp()),
        }
    }
    fn score(&self, x: T) -> T {
        match self.gate {
            Gate::Softmax => self.raw(x) / self.total,
            Gate::Sigmoid => self.raw(x),
        }
    }
}

/// The gradient of one token's logits from the gradient of its weights.
fn choose_back<T: Float>(x: &[T], c: &Choice, choices: &[u32], g: &[T], dx: &mut [T]) {
    let gate = Gates::of(x, c.gate);
    let score = |e: u32| gate.score(x[e as usize]);
    let (mut sum, mut inner) = (T::ZERO, T::ZERO);
    for (&e, &g) in choices.iter().zip(g) {
        sum += score(e);
        inner += score(e) * g;
    }
    // Every logit contributes to the scores of a softmax; only those of the chosen experts contribute to renormalised ones.
    let all = c.gate == Gate::Softmax && !c.renormalise;
    for (dx, &x) in dx.iter_mut().zip(x) {
        *dx = if all { -gate.score(x) * inner } else { T::ZERO };
    }
    for (&e, &g) in choices.iter().zip(g) {
        let (s, dx) = (score(e), &mut dx[e as usize]);
        *dx += match (c.gate, c.renormalise) {
            (Gate::Softmax, false) => s * g,
            (Gate::Softmax, true) => s / sum * (g - inner / sum),
            (Gate::Sigmoid, false) => s * (T::ONE - s) * g,
            (Gate::Sigmoid, true) => s * (T::ONE - s) / sum * (g - inner / sum),
        };
    }
    if gate.total.is_nan() {
        dx.fill(gate.total);
    }
}

struct Back {
    logits: Array,
    choices: Array,
    choice: Choice,
}

impl Rule for Back {
    fn info(&self) -> &'static OpInfo {
        &ROUTE
    }
    fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
        one(y.by_rows(self.logits.shape()[0], self.logits.numel()))
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        let c = self.choice;
        let dx = dispatch(
            [self.logits.clone(), grad.contiguous(), self.choices.clone()],
            Half::Widen,
            |[x, g, choices]| {
                let (e, k) = (x.shape()[1], c.top_k);
                let mut dx = Array::uninit(x.shape(), x.dtype());
                with_float!("route", x.dtype(), |T| {
                    let (x, g, choices) = (x.as_slice::<T>()?, g.as_slice::<T>()?, choices.as_slice::<u32>()?);
                    let to = Shared::new(dx.fresh_mut::<T>());
                    par_chunks(x.len() / e, (GRAIN / (e * k)).max(1), |tokens| {
                        for t in tokens {
                            // SAFETY: tokens are disjoint.
                            let dx = unsafe { to.slice(t * e..(t + 1) * e) };
                            let (choices, g) = (&choices[t * k..(t + 1) * k], &g[t * k..(t + 1) * k]);
                            choose_back(&x[t * e..(t + 1) * e], &c, choices, g, dx);
                        }
                    });
                    Ok(dx)
                })
            },
            |gpu, [x, g, choices]| cuda::choose_back(gpu, &x, &c, &choices, &g),
        )?;
        back.input(0, dx);
        Ok(())
    }
}

/// Chooses `top_k` of the E experts for each of T tokens by their `logits [T, E]`. Returns the weights `[T, k]`, through which the logits
/// receive their gradient, and the routing.
///
/// Scores are softmax(logits) or sigmoid(logits); weights are the scores of the chosen experts, divided by their sum with `renormalise`.
/// `bias [E]` is added to the scores for the choice only, and does not enter the weights (Wang et al. 2024, equation 3). Everything is
/// computed in f32 or f64. If a token's logits contain a NaN, or +∞ under a softmax, its weights are NaN: the loss of its sample is then
/// not finite, which a training step reports.
pub fn route(logits: &Tensor, choice: &Choice, bias: Option<&Array>) -> Result<(Tensor, Routing)> {
    let _op = spans::op("route");
    let (op, c) = ("route", *choice);
    logits.dtype().expect_float(op)?;
    let &[tokens, experts] = logits.shape() else {
        return Err(Error::shape(op, format!("logits {:?} must be [tokens, experts]", logits.shape())));
    };
    if c.top_k == 0 || c.top_k > experts {
        let message = format!("{} of {experts} experts for each token: it must be 1 to {experts}", c.top_k);
        return Err(Error::invalid(op, message));
    }
    if let Some(b) = bias.filter(|b| b.shape() != [experts]) {
        return Err(Error::shape(op, format!("bias {:?} for {experts} experts", b.shape())));
    }
    let logits = &logits.cast(logits.dtype().compute())?;
    let x = logits.array().contiguous();
    spans::cost(0.0, (x.numel() * x.dtype().size() + 4 * tokens * c.top_k * 5) as f64);
    let bias = bias.map(|b| b.contiguous().cast(x.dtype()));
    let Exact((choices, weights)) = dispatch(
        [x.clone()],
        Half::Widen,
        |[x]| {
            let k = c.top_k;
            let mut choices = Array::uninit(&[tokens, k], DType::U32);
            let mut weights = Array::uninit(&[tokens, k], x.dtype());
            with_float!("route", x.dtype(), |T| {
                let x = x.as_slice::<T>()?;
                let bias = bias.as_ref().map(|b| b.to(&Device::Cpu)).transpose()?;
                let bias = bias.as_ref().map(|b| b.as_slice::<T>()).transpose()?;
                let (to, ids) = (Shared::new(weights.fresh_mut::<T>()), Shared::new(choices.fresh_mut::<u32>()));
                par_chunks(tokens, (GRAIN / (experts * k)).max(1), |part| {
                    for t in part {
                        // SAFETY: tokens are disjoint.
                        let (w, ids) = unsafe { (to.slice(t * k..(t + 1) * k), ids.slice(t * k..(t + 1) * k)) };
                        choose(&x[t * experts..(t + 1) * experts], bias, &c, ids, w);
                    }
                });
                Ok(())
            })?;
            Ok(Exact((choices, weights)))
        },
        |gpu, [x]| {
            let bias = bias.as_ref().map(|b| on(gpu, b)).transpose()?;
            cuda::choose(gpu, &x, bias.as_ref(), &c).map(Exact)
        },
    )?;
    let routing = Routing::new(choices.clone(), experts)?;
    Ok((Tensor::record(weights, &[logits], &[], || Back { logits: x, choices, choice: c }), routing))
}
