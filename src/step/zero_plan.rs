//! A plan of the resources of a training step with several ranks, before any memory is allocated: bytes of each rank, bytes that it sends,
//! seconds.

use super::plan::BUCKET;
use super::shard::{Stage, buckets, stretches};
use super::units::modules;
use crate::autograd::Param;
use crate::base::{DType, Error, Result};
use serde::Serialize;
use std::ops::Range;

/// The machine for which a step is planned; give measured rates, not advertised ones.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Machine {
    /// Number of ranks.
    pub ranks: usize,
    /// FLOP/s of a rank in a training step.
    pub flops: f64,
    /// Bytes per second that a rank sends and receives.
    pub bandwidth: f64,
    /// Additional seconds per collective.
    pub latency: f64,
}

/// The work of one rank in a step.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Load {
    /// Number of microbatches.
    pub microbatches: usize,
    /// FLOPs of the forward pass of a microbatch, such as [`SpanCost::model_flops`](crate::models::SpanCost) times its records. A backward
    /// pass takes twice as many.
    pub forward_flops: f64,
    /// Bytes of activations, factors and scratch, such as [`Prediction::working_bytes`](super::Prediction).
    pub working_bytes: usize,
    /// Whether gradients are summed while backward delivers them, as in a plain step and in a private one that clips layer by layer;
    /// otherwise they are summed after it, as in a private step that clips all layers together.
    pub gradients_overlap: bool,
}

/// The resources of a step, for the rank that needs the most.
#[derive(Clone, Debug, Serialize)]
pub struct ZeroPlan {
    /// Bytes that persist from step to step: parameters, gradients, optimizer.
    pub kept: [(&'static str, usize); 3],
    /// The most bytes of parameters that are gathered at once (stage 3).
    pub gathered: usize,
    /// The most bytes of the bucket being filled and of those in transit (stages 2 and 3).
    pub buckets: usize,
    /// Bytes of activations, factors and scratch.
    pub working: usize,
    /// Bytes that a rank sends in a step: for gradients, for parameters.
    pub sent: [f64; 2],
    /// Seconds of computation.
    pub compute: f64,
    /// Seconds in which the link is in use.
    pub communicate: f64,
    /// Seconds of a step, with computation and communication overlapped.
    pub seconds: f64,
}

impl ZeroPlan {
    /// Total bytes of the rank.
    pub fn bytes(&self) -> usize {
        self.kept.iter().map(|k| k.1).sum::<usize>() + self.gathered + self.buckets + self.working
    }
}

/// The plan of a step over `params` at a stage, with `slots` buffers of the optimizer (AdamW has 2). Only the names, shapes and dtypes of
/// the parameters are used and no values ([`Params::described`](crate::nn::Params::described) makes them without memory).
///
/// Bytes of model state are exactly those of the step itself (Rajbhandari et al. 2020, section 5: 16Ψ, 8Ψ + 8Ψ/N, 4Ψ + 12Ψ/N and 16Ψ/N in
/// f32 with AdamW). Seconds are a model: a step takes the longer of its computation and the collectives that overlap with it, plus the
/// collectives that do not overlap.
///
/// ```
/// use prismgrad::models::{Gpt, GptConfig};
/// use prismgrad::step::{Load, Machine, Stage, zero_plan};
/// # fn main() -> prismgrad::Result<()> {
/// // GPT-3's largest: 175 billion parameters on 1,024 ranks. Nothing of that size is allocated.
/// let model = Gpt::described(GptConfig::small(50_257, 2048, 96, 12_288, 96))?;
/// let machine = Machine { ranks: 1024, flops: 2e14, bandwidth: 5e10, latency: 2e-5 };
/// let load = Load { microbatches: 1, forward_flops: 7e14, working_bytes: 0, gradients_overlap: true };
/// let plan = zero_plan(&model.params().all(), 2, Stage::Parameters, &machine, &load)?;
/// let state: usize = plan.kept.iter().map(|k| k.1).sum();
/// assert!(state < 3 << 30);
/// # Ok(()) }
/// ```
pub fn zero_plan(params: &[Param], slots: usize, stage: Stage, machine: &Machine, load: &Load) -> Result<ZeroPlan> {
    let bad = |message: String| Err(Error::invalid("zero_plan", message));
    let m = *machine;
    if m.ranks == 0 || !(m.flops > 0.0 && m.bandwidth > 0.0 && m.latency >= 0.0) {
        return bad(format!("{m:?}: at least one rank, rates above 0, a latency of at least 0"));
    }
    let params: Vec<&Param> = params.iter().filter(|p| p.trainable()).collect();
    let dtype = params.first().map_or(DType::F32, |p| p.dtype());
    let (each, n) = (dtype.size(), m.ranks as f64);
    let mut segments: Vec<Range<usize>> = Vec::new();
    for p in &params {
        let from = segments.last().map_or(0, |s| s.end);
        let Some(to) = p.shape().iter().try_fold(1usize, |a, b| a.checked_mul(*b)).and_then(|k| k.checked_add(from))
        else {
            return bad(format!("{} {:?} has more elements than can be counted", p.name(), p.shape()));
        };
        segments.push(from..to);
    }
    let psi = segments.last().map_or(0, |s| s.end);
    let own = stretches(psi, m.ranks).first().map_or(0, Range::len);
    let at = |from: Stage| if rank_of(stage) >= rank_of(from) { own } else { psi };
    let kept = [
        ("parameters", at(Stage::Parameters) * each),
        ("gradients", at(Stage::Gradients) * each),
        ("optimizer", slots * at(Stage::Optimizer) * each),
    ];
    let bytes = |ranges: &[Range<usize>]| -> Vec<usize> {
        ranges.iter().map(|r| (segments[r.end - 1].end - segments[r.start].start) * each).collect()
    };
    let names: Vec<&str> = params.iter().map(|p| p.name()).collect();
    let modules = bytes(&modules(&names).0);
    let lengths: Vec<usize> = segments.iter().map(Range::len).collect();
    let sums = bytes(&buckets(&lengths));
    let largest = |of: &[usize]| of.iter().copied().max().unwrap_or(0);
    let (shares_grads, shares_params) = (rank_of(stage) >= 2, stage == Stage::Parameters);
    // Ring collectives: each rank sends (n − 1)/n of the data.
    let whole = psi as f64 * each as f64 * (n - 1.0) / n;
    let k = load.microbatches as f64;
    let gradients = if shares_grads { k * whole } else { whole };
    let parameters = if shares_params { 2.0 * k * whole } else { whole };
    let calls = match stage {
        Stage::Replicated | Stage::Optimizer => 2.0 * (psi.div_ceil(BUCKET)) as f64,
        Stage::Gradients => k * sums.len() as f64 + psi.div_ceil(BUCKET) as f64,
        // The ranks agree on each collective first.
        Stage::Parameters => 2.0 * k * (2 * modules.len() + sums.len()) as f64,
    };
    let wait = if m.ranks == 1 { 0.0 } else { m.latency * calls };
    let compute = 3.0 * k * load.forward_flops / m.flops;
    let link = |bytes: f64| bytes / m.bandwidth;
    let communicate = link(gradients + parameters) + wait;
    let beside = if shares_params { link(parameters) + wait } else { 0.0 }
        + if shares_grads && load.gradients_overlap { link(gradients) } else { 0.0 };
    let seconds = compute.max(beside) + (communicate - beside).max(0.0);
    Ok(ZeroPlan {
        kept,
        gathered: if shares_params { 2 * largest(&modules) } else { 0 },
        buckets: if shares_grads { largest(&sums) } else { 0 },
        working: load.working_bytes,
        sent: [gradients, parameters],
        compute,
        communicate,
        seconds,
    })
}

fn rank_of(stage: Stage) -> u8 {
    match stage {
        Stage::Replicated => 0,
        Stage::Optimizer => 1,
        Stage::Gradients => 2,
        Stage::Parameters => 3,
    }
}
