//! The training step.
//!
//! ```text
//! collect → weight → contract → accumulate → reduce → noise → update
//! (norms)   (clip)   (GEMM)     (microbatch) (ranks)  (once)   (flat)
//! ```
//!
//! [`TrainStep`] fixes that order; a slot is chosen by [`TrainStep::plain`] or [`TrainStep::private`], and there is no
//! way to put noise before the clip or the clip after the sum. Gradients land in one flat buffer as soon as they are
//! delivered, so nothing is copied between backward and the optimizer.

mod contract;
mod cuda;
mod flat;
mod ledger;
mod noise;
mod plan;
mod private;
mod record;
mod reduce;
mod update;
mod weigh;

pub use flat::Flat;
pub use private::{Privacy, PrivacyConfig};
pub use record::RecordedStep;

use crate::array::Array;
use crate::autograd::{GradHook, Param, ParamGrad, Tensor};
use crate::base::{DType, Error, Result};
use crate::device::cuda::{Tag, TagScope};
use crate::device::spans;
use crate::device::spans::Kind;
use crate::dist::Communicator;
use crate::optim::{Optimizer, Schedule};
use crate::privacy::{ClipFn, ClipStyle, Private, Public, Thresholds, Weight};
use ledger::{Ledger, Snapshot, Tally, not_finite};
use plan::Clipping;
use record::Live;
use reduce::{Counts, reduce};
use update::{update, zero};
use weigh::{PublicPart, Weigh};

/// Name of the adaptive thresholds among a step's buffers.
const THRESHOLDS: &str = "clipping thresholds";
/// Name of the number of private steps among them.
const PRIVATE_STEPS: &str = "private steps";

/// What one step did.
///
/// On a GPU the step is only queued when [`TrainStep::run`] returns: what it found in the data waits there until somebody
/// asks, and asking waits for the step. Ask every few steps, not every step.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// Steps taken so far, this one included.
    pub step: u64,
    /// Samples of this step.
    pub samples: usize,
    /// Learning rate used.
    pub lr: f64,
    /// ε spent so far at the configured δ, rounded up (private training only); [`Privacy::epsilon`] is exact.
    pub epsilon: Option<f64>,
    found: Found,
}

#[derive(Clone, Debug)]
enum Found {
    Here(f64, Tally),
    There(Snapshot),
}

impl StepReport {
    fn found(&self) -> Result<(f64, Tally)> {
        match &self.found {
            Found::Here(loss, tally) => Ok((*loss, *tally)),
            Found::There(snapshot) => snapshot.read(),
        }
    }
    /// Mean loss over the samples of this step; NaN if there were none. Not private: it looks at the data.
    ///
    /// On a GPU a plain step that met a loss which is not finite says so here, at this step or any later one: nothing has
    /// been updated since.
    pub fn loss(&self) -> Result<f64> {
        Ok(self.found()?.0 / self.samples as f64)
    }
    /// Samples whose gradient was not finite and that were left out (private training only).
    pub fn non_finite(&self) -> Result<usize> {
        Ok(self.found()?.1.non_finite as usize)
    }
    /// Share of (sample, group) pairs whose norm exceeded the threshold (private training only).
    pub fn clipped(&self) -> Result<f64> {
        Ok(self.found()?.1.share())
    }
}

/// One training step over fixed parameters: forward and backward over microbatches, then one update.
pub struct TrainStep {
    flat: Flat,
    grads: Array,
    state: Vec<Array>,
    ledger: Option<Ledger>,
    optimizer: Box<dyn Optimizer>,
    schedule: Schedule,
    steps: u64,
    privacy: Option<Privacy>,
    /// The weight of the private part, in a coupled step.
    coupled: Option<Weight>,
    /// The other ranks, if there are some.
    ranks: Option<Box<dyn Communicator>>,
}

impl TrainStep {
    /// The ordinary step: gradients of the mean loss over all samples of the step.
    pub fn plain(params: &[Param], optimizer: impl Optimizer + 'static, schedule: Schedule) -> Result<TrainStep> {
        TrainStep::build(params, Box::new(optimizer), schedule, None)
    }
    /// The private step: per-sample gradients clipped, summed, noised once, divided by the expected batch size.
    pub fn private(
        params: &[Param],
        privacy: Privacy,
        optimizer: impl Optimizer + 'static,
        schedule: Schedule,
    ) -> Result<TrainStep> {
        TrainStep::build(params, Box::new(optimizer), schedule, Some(privacy))
    }
    fn build(
        params: &[Param],
        optimizer: Box<dyn Optimizer>,
        schedule: Schedule,
        privacy: Option<Privacy>,
    ) -> Result<TrainStep> {
        schedule.validate()?;
        let flat = Flat::new(params)?;
        let device = flat.device();
        let zeros = |tag| {
            let _tag = TagScope::new(tag);
            Array::zeros_at(&device, &[flat.numel()], flat.dtype())
        };
        let grads = zeros(Tag::Gradient)?;
        let state = optimizer.slots().iter().map(|_| zeros(Tag::Optimizer)).collect::<Result<_>>()?;
        let ledger = device.gpu().map(Ledger::new).transpose()?;
        let mut privacy = privacy;
        if let Some(p) = &mut privacy {
            p.plan(flat.params())?;
        }
        Ok(TrainStep { flat, grads, state, ledger, optimizer, schedule, steps: 0, privacy, coupled: None, ranks: None })
    }
    /// Makes this one of several ranks that take every step together, each on its part of the batch (data parallelism, ZeRO
    /// stage 0). Parameters are taken over from rank 0 now. Gradients are summed over the ranks, in their order; the update is
    /// then the same everywhere: a plain step's mean is over all ranks' samples, a private one's noise is added once to the sum,
    /// the same bits at any number of ranks. [`TrainStep::next_batch`] gives each rank its own records of the one Poisson batch.
    ///
    /// Losses and counts in reports are over all ranks. All must be given the same key, model and settings. On the CPU.
    pub fn with_ranks(mut self, ranks: Box<dyn Communicator>) -> Result<TrainStep> {
        let op = "TrainStep::with_ranks";
        if self.flat.device().is_cuda() {
            return Err(Error::invalid(op, "ranks are on the CPU so far; move the model there"));
        }
        let first = ranks.broadcast("parameters", self.flat.buffer(), 0)?;
        self.flat.update(|params, _| params.write(0, &first))?;
        self.ranks = Some(ranks);
        Ok(self)
    }
    /// The other ranks.
    pub fn ranks(&self) -> Option<&dyn Communicator> {
        self.ranks.as_deref()
    }
    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }
    /// The privacy object, if this step is private.
    pub fn privacy(&self) -> Option<&Privacy> {
        self.privacy.as_ref()
    }
    /// The parameters, flat.
    pub fn flat(&self) -> &Flat {
        &self.flat
    }
    /// The records of the next private batch, drawn by the step's own Poisson sampler; the same however often it is
    /// asked before the step is taken. May be empty, and then the step still has to be taken.
    pub fn next_batch(&self) -> Result<Private<Vec<usize>>> {
        match &self.privacy {
            Some(p) => {
                let mut all = p.batch(self.steps);
                if let Some(r) = &self.ranks {
                    // Whose record it is follows from the record, so that the batch as a whole is that of one rank.
                    all.retain(|i| i % r.size() == r.rank());
                }
                Ok(Private(all))
            }
            None => Err(Error::invalid("next_batch", "a plain step has no sampler; draw batches with data::shuffled")),
        }
    }

    /// Runs `forward` on each microbatch (it returns one loss per sample), and updates once. Private steps may come
    /// with no microbatch at all.
    ///
    /// A private step records itself with the accountant before it touches the parameters, and refuses to run where
    /// the budget would be exceeded; a sample whose gradient is not finite gets weight zero and is counted. A plain step
    /// stops at a loss that is not finite, naming the sample, before it changes anything.
    pub fn run<B>(
        &mut self,
        microbatches: impl IntoIterator<Item = B>,
        forward: impl FnMut(B) -> Result<Tensor>,
    ) -> Result<StepReport> {
        let epsilon = self.admit()?;
        let mut forward = forward;
        let (samples, loss, tally) = self.queue(microbatches, |b| Ok((forward(b)?, None)), None)?;
        self.report(samples, epsilon, Found::Here(loss, tally))
    }
    /// One private step on private and public data together: the update follows
    ///
    /// g = α·(Σ clip(gᵢ) + noise)/B₁ + (1 − α)·(mean of the public gradients),
    ///
    /// B₁ being the expected private batch. Both kinds go through one forward and one backward pass: `forward` gets private
    /// records and public ones, and returns their losses in that order, `[private + public]`; at most `microbatch` of both at
    /// a time. Noise is calibrated to the private part alone, and public samples are neither clipped nor counted. With α = 0
    /// nothing private is touched and no budget is spent; with α = 1 the public data are left out.
    ///
    /// The loss in the report is over both.
    pub fn run_coupled<P, Q>(
        &mut self,
        private: Private<Vec<P>>,
        public: Public<Vec<Q>>,
        weight: Weight,
        microbatch: usize,
        mut forward: impl FnMut(&[P], &[Q]) -> Result<Tensor>,
    ) -> Result<StepReport> {
        let op = "TrainStep::run_coupled";
        // Values set from outside are in the buffer from here on.
        self.flat.update(|_, _| Ok(()))?;
        let Some(privacy) = &mut self.privacy else {
            return Err(Error::invalid(op, "a plain step has no private half; make it with TrainStep::private"));
        };
        let (Private(mut private), Public(mut public), share) = (private, public, weight.of_private());
        if self.ranks.is_some() {
            return Err(Error::invalid(
                op,
                "public data in a step of several ranks: not there yet; take them on one rank",
            ));
        }
        if microbatch == 0 {
            return Err(Error::invalid(op, "microbatches of 0 samples"));
        }
        if share == 1.0 {
            public.clear();
        } else if public.is_empty() {
            return Err(Error::invalid(
                op,
                format!("no public samples, but a public weight of {}", weight.of_public()),
            ));
        }
        // Public gradients are scaled so that what scales the private sum in the end makes the weighted mean of both.
        let scale = weight.of_public() / public.len().max(1) as f64;
        let epsilon = if share == 0.0 {
            private.clear();
            privacy.spent()?
        } else {
            privacy.admit(self.steps, self.flat.buffer())?
        };
        let scale = if share == 0.0 { 1.0 } else { scale * privacy.expected_batch() / share };
        let total = private.len() + public.len();
        let parts = total.div_ceil(microbatch);
        let cut = |n: usize, i: usize| n * i / parts.max(1);
        let batches: Vec<_> = (0..parts)
            .map(|i| {
                let range = |n: usize| cut(n, i)..cut(n, i + 1);
                (range(private.len()), range(public.len()))
            })
            .collect();
        self.coupled = Some(weight);
        let queued = self.queue(
            batches,
            |(p, q)| {
                let from = p.len();
                let losses = forward(&private[p], &public[q.clone()])?;
                if losses.rank() == 1 && losses.numel() != from + q.len() {
                    let message =
                        format!("{} losses for {from} private and {} public samples", losses.numel(), q.len());
                    return Err(Error::shape(op, message));
                }
                Ok((losses, Some(PublicPart { from, weight: scale })))
            },
            None,
        );
        self.coupled = None;
        let (samples, loss, tally) = queued?;
        self.report(samples, Some(epsilon), Found::Here(loss, tally))
    }
    /// Has the accountant record a private step, or refuse it.
    fn admit(&mut self) -> Result<Option<f64>> {
        let Some(p) = &mut self.privacy else { return Ok(None) };
        // Values set from outside, as by a checkpoint, are in the buffer from here on.
        self.flat.update(|_, _| Ok(()))?;
        p.admit(self.steps, self.flat.buffer()).map(Some)
    }
    /// Everything a step does to gradients and parameters: samples, and on the CPU the losses' sum and what was clipped.
    /// With `live`, what changes from step to step is read from memory.
    fn queue<B>(
        &mut self,
        microbatches: impl IntoIterator<Item = B>,
        mut forward: impl FnMut(B) -> Result<(Tensor, Option<PublicPart>)>,
        live: Option<&Live>,
    ) -> Result<(usize, f64, Tally)> {
        zero(&mut self.grads)?;
        if let Some(ledger) = &self.ledger {
            ledger.begin()?;
        }
        let (mut loss, mut samples, mut private) = (0.0, 0, 0);
        let mut weigh = match &self.privacy {
            Some(p) => Weigh::private(&self.flat, &mut self.grads, p.clipping(), self.ledger.as_ref()),
            None => Weigh::plain(&self.flat, &mut self.grads),
        };
        for batch in microbatches {
            let phase = spans::span(Kind::Phase, "forward pass");
            let (losses, public) = forward(batch)?;
            drop(phase);
            if losses.rank() != 1 {
                return Err(Error::shape(
                    "TrainStep::run",
                    format!("the forward pass must return one loss per sample, [B]; got {:?}", losses.shape()),
                ));
            }
            if losses.numel() == 0 {
                continue;
            }
            match &self.ledger {
                Some(ledger) => {
                    let step = (self.steps + 1, live.map(|l| &l.number));
                    ledger.losses(losses.array(), samples, step, self.privacy.is_none())?
                }
                None => {
                    let values = losses.array().to_f64();
                    if self.privacy.is_none()
                        && let Some(i) = values.iter().position(|l| !l.is_finite())
                    {
                        return Err(not_finite(self.steps + 1, samples + i, values[i]));
                    }
                    loss += values.iter().sum::<f64>();
                }
            }
            samples += losses.numel();
            let _phase = spans::span(Kind::Phase, "backward pass");
            private += public.map_or(losses.numel(), |p| p.from);
            weigh.begin(losses.numel(), public);
            losses.backward_into(&mut weigh)?;
            drop(losses);
            weigh.finish()?;
        }
        let own = Counts { samples, private, loss, tally: weigh.tally(), below: weigh.below() };
        let counts = reduce(self.ranks.as_deref(), &mut self.grads, own)?;
        let share = self.coupled.map_or(1.0, Weight::of_private);
        let scale = match &mut self.privacy {
            Some(_) if share == 0.0 => 1.0 / counts.samples as f64,
            Some(p) => {
                let _phase = spans::span(Kind::Phase, "noise");
                p.add_noise(self.steps, live.map(|l| &l.before), &mut self.grads)?;
                p.adapt(self.steps, self.flat.numel() as u64, &counts.below, counts.private);
                share / p.expected_batch()
            }
            None if counts.samples == 0 => {
                return Err(Error::invalid("TrainStep::run", "no samples: a plain step needs at least one"));
            }
            None => 1.0 / counts.samples as f64,
        };
        update(
            (&mut self.flat, &*self.optimizer),
            (&mut self.grads, scale),
            &mut self.state,
            (self.steps + 1, self.schedule.at(self.steps)),
            (self.ledger.as_ref(), live),
        )?;
        Ok((counts.samples, counts.loss, counts.tally))
    }
    /// The step is taken.
    fn report(&mut self, samples: usize, epsilon: Option<f64>, here: Found) -> Result<StepReport> {
        let lr = self.schedule.at(self.steps);
        self.steps += 1;
        let found = match &self.ledger {
            Some(ledger) => Found::There(ledger.snapshot()?),
            None => here,
        };
        Ok(StepReport { step: self.steps, samples, lr, epsilon, found })
    }
    /// The gradient of the last step as the optimizer saw it, flat.
    pub fn last_gradient(&self) -> &Array {
        &self.grads
    }
    /// Sets the optimizer's first moment (its first buffer: Adam's m, SGD's momentum) to zero and keeps the rest: what to do
    /// when training goes from public to private data (Bu et al. 2024).
    pub fn reset_first_moment(&mut self) -> Result<()> {
        self.state.first_mut().map_or(Ok(()), zero)
    }
    /// Everything a checkpoint needs besides the parameters: named flat buffers.
    pub fn state(&self) -> Vec<(&'static str, Array)> {
        let mut all: Vec<_> = self.optimizer.slots().iter().copied().zip(self.state.iter().cloned()).collect();
        if let Some(p) = self.privacy.as_ref() {
            all.push((PRIVATE_STEPS, Array::generate(&[1], DType::I64, |_| p.steps() as f64)));
        }
        if let Some(p) = self.adaptive() {
            let thresholds = p.thresholds();
            all.push((THRESHOLDS, Array::generate(&[thresholds.len()], DType::F64, |i| thresholds[i])));
        }
        all
    }
    fn adaptive(&self) -> Option<&Privacy> {
        self.privacy.as_ref().filter(|p| matches!(p.config().thresholds, Thresholds::Adaptive { .. }))
    }
    /// Takes up where a checkpoint left off.
    pub fn restore(&mut self, steps: u64, state: &[(String, Array)]) -> Result<()> {
        for (slot, buffer) in self.optimizer.slots().iter().zip(&mut self.state) {
            let found = state.iter().find(|(n, _)| n == slot).ok_or_else(|| {
                Error::invalid("TrainStep::restore", format!("the checkpoint has no {slot}; was it another optimizer?"))
            })?;
            if found.1.shape() != buffer.shape() || found.1.dtype() != buffer.dtype() {
                return Err(Error::shape(
                    "TrainStep::restore",
                    format!("{slot} is {:?}, the model needs {:?}", found.1.shape(), buffer.shape()),
                ));
            }
            *buffer = found.1.to(&buffer.device())?.copy();
        }
        if self.adaptive().is_some() {
            let found = state.iter().find(|(n, a)| n == THRESHOLDS && a.dtype() == DType::F64);
            let found = found.ok_or_else(|| {
                Error::invalid("TrainStep::restore", "the checkpoint has no adaptive thresholds; was it another run?")
            })?;
            let values = found.1.to_f64();
            if let Some(p) = self.privacy.as_mut().filter(|p| p.groups() == values.len()) {
                p.set_thresholds(&values);
            }
        }
        self.steps = steps;
        // Every step was private unless the checkpoint says otherwise.
        let spent = state.iter().find(|(n, _)| n == PRIVATE_STEPS).and_then(|(_, a)| a.to_f64().first().copied());
        if let Some(p) = &mut self.privacy {
            p.restore(spent.map_or(steps, |s| s as u64))?;
        }
        Ok(())
    }
}

/// The sum of clipped per-sample gradients of `losses` (one per sample), without noise: what a private step computes
/// before it adds any. For research and checks; it is not private. Returns one gradient per trainable parameter, in
/// the order given.
pub fn clipped_gradient(
    losses: &Tensor,
    params: &[Param],
    style: &ClipStyle,
    clip: ClipFn,
    threshold: f64,
) -> Result<Vec<Array>> {
    clip.validate()?;
    let flat = Flat::new(params)?;
    let clipping = Clipping::new(style, clip, threshold, &Thresholds::Equal, flat.params())?;
    let device = flat.device();
    let mut grads = Array::zeros_at(&device, &[flat.numel()], flat.dtype())?;
    let ledger = device.gpu().map(Ledger::new).transpose()?;
    let mut weigh = Weigh::private(&flat, &mut grads, &clipping, ledger.as_ref());
    weigh.begin(losses.numel(), None);
    losses.backward_into(&mut weigh)?;
    weigh.finish()?;
    flat.segments()
        .iter()
        .zip(flat.params())
        .map(|(s, p)| grads.slice(0, s.range.clone())?.reshape(p.shape()).map(|a| a.copy()))
        .collect()
}

impl GradHook for Weigh<'_> {
    fn param(&mut self, param: &Param, grad: ParamGrad) -> Result<()> {
        self.deliver(param, grad)
    }
}
