//! The common parts of plain and private steps: the buffers, and the slots collect, contract, accumulate, reduce and update.

use super::capture::StepScalars;
use super::contract::Target;
use super::counters::{Counters, Snapshot, Tally, not_finite};
use super::flat::Flat;
use super::plan::{Event, Measurement, Plan, Prediction, Trace};
use super::reduce::{Counts, reduce};
use super::shard::{Buckets, Shard, Stage};
use super::units;
use super::update::{update, update_shard, zero};
use crate::array::Array;
use crate::autograd::{GradHook, Param, ParamGrad, Tensor};
use crate::base::{DType, Error, Result};
use crate::device::Device;
use crate::device::cuda::{Tag, TagScope};
use crate::device::spans::{self, Kind};
use crate::dist::{Communicator, Shared};
use crate::optim::{Optimizer, Schedule};
use std::time::Instant;

/// Host time in seconds for each phase of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Phases {
    /// Forward passes of all microbatches.
    pub forward: f64,
    /// Backward passes, with norms, clip factors and contraction.
    pub backward: f64,
    /// Sums over the ranks.
    pub reduce: f64,
    /// Noise.
    pub noise: f64,
    /// The optimizer.
    pub update: f64,
}

/// The public samples of a microbatch: all from number `from` on, each with this weight instead of a clip factor.
#[derive(Clone, Copy)]
pub(super) struct PublicPart {
    pub from: usize,
    pub weight: f64,
}

/// The result of a forward pass: one loss per sample, and which of the samples are public.
pub(super) struct Microbatch {
    pub losses: Tensor,
    pub public: Option<PublicPart>,
}

/// The weigh slot: how samples' gradients are weighted before they are summed. [`Plain`](super::plain::Plain) sums them unchanged,
/// [`Clipping`](super::plan::Clipping) gives each a clip factor.
pub(super) trait Weighting {
    /// Whether a non-finite loss ends the step. A private step gives such a sample weight 0 instead.
    const STOPS: bool;
    /// The type that does this during one step.
    type Collector<'a>: Collect
    where
        Self: 'a;
    /// Makes the collector of a step.
    fn collector<'a>(&'a self, step: Context<'a>) -> Self::Collector<'a>;
}

/// The inputs of a collector.
pub(super) struct Context<'a> {
    pub flat: &'a Flat,
    pub plan: &'a Plan,
    pub counters: Option<&'a Counters>,
    /// The target to which gradients are added.
    pub grads: Target<'a>,
}

/// Receives each parameter's factored gradient as backward delivers it, and adds the samples' weighted sum to the flat gradient.
pub(super) trait Collect: GradHook {
    /// Called before a microbatch of `samples` samples is differentiated.
    fn begin(&mut self, samples: usize, public: Option<PublicPart>);
    /// Called if other ranks have a microbatch and this one has none.
    fn idle(&mut self) -> Result<()>;
    /// Called after the backward pass of the microbatch.
    fn finish(&mut self) -> Result<()>;
    /// Clipped pairs on the CPU, and for each clipping group the number of private samples with a norm of at most the threshold.
    fn counts(&self) -> (Tally, Vec<u64>);
}

/// The losses and counts of a finished step.
#[derive(Clone, Debug)]
pub(super) enum Found {
    Here(f64, Tally),
    OnGpu(Snapshot),
}

impl Found {
    pub fn read(&self) -> Result<(f64, Tally)> {
        match self {
            Found::Here(loss, tally) => Ok((*loss, *tally)),
            Found::OnGpu(snapshot) => snapshot.read(),
        }
    }
}

/// Buffers, optimizer and plan of a step.
pub(super) struct Core {
    pub flat: Flat,
    pub grads: Array,
    pub state: Vec<Array>,
    pub counters: Option<Counters>,
    pub optimizer: Box<dyn Optimizer>,
    pub schedule: Schedule,
    pub steps: u64,
    pub ranks: Option<Shared>,
    /// This rank's shard, if the ranks share the model's state; `grads` is then not valid after the ranks have summed it, and is empty at
    /// stage 2.
    pub shard: Option<Shard>,
    pub plan: Plan,
    pub phases: Phases,
    /// Bytes in use when the step began.
    before: usize,
    /// On a GPU, memory for the report of the step that has begun.
    room: Option<Array>,
}

impl Core {
    pub fn new(
        params: &[Param],
        optimizer: Box<dyn Optimizer>,
        schedule: Schedule,
        plan: impl FnOnce(&Flat, usize) -> Result<Plan>,
    ) -> Result<Core> {
        schedule.validate()?;
        optimizer.validate()?;
        let flat = Flat::new(params)?;
        let device = flat.device();
        let zeros = |tag| {
            let _tag = TagScope::new(tag);
            Ok(Array::zeros(&[flat.numel()], (flat.dtype(), &device)))
        };
        let grads = zeros(Tag::Gradient)?;
        let state: Vec<Array> = optimizer.slots().iter().map(|_| zeros(Tag::Optimizer)).collect::<Result<_>>()?;
        let counters = device.gpu().map(Counters::new).transpose()?;
        let plan = plan(&flat, state.len())?;
        let (ranks, shard, phases) = (None, None, Phases::default());
        Ok(Core {
            flat,
            grads,
            state,
            counters,
            optimizer,
            schedule,
            steps: 0,
            ranks,
            shard,
            plan,
            phases,
            before: 0,
            room: None,
        })
    }
    /// Makes this rank one of several, which share the state that the stage selects.
    pub fn with_zero(&mut self, ranks: Box<dyn Communicator>, stage: Stage) -> Result<()> {
        if self.ranks.is_some() || self.steps > 0 {
            return Err(Error::invalid("with_zero", "ranks are given to a new step, once"));
        }
        if self.flat.device().is_cuda() {
            return Err(Error::invalid("with_zero", "ranks are on the CPU so far; move the model there"));
        }
        let ranks = Shared::new(ranks)?;
        for stretch in self.flat.shared() {
            let first = ranks.broadcast("parameters", &self.flat.buffer().slice(0, stretch.clone())?, 0)?;
            self.flat.update(|params, _| params.write(stretch.start, &first))?;
        }
        if stage != Stage::Replicated {
            let shard = Shard::new(&self.flat, &ranks, stage)?;
            let own = shard.own();
            let _tag = TagScope::new(Tag::Optimizer);
            self.state = self.state.iter().map(|s| Ok(s.slice(0, own.clone())?.copy())).collect::<Result<_>>()?;
            let (each, whole) = (self.flat.dtype().size(), self.flat.numel());
            let (mut params, mut grads) = (whole, whole);
            if stage != Stage::Optimizer {
                (self.grads, grads) = (Array::zeros(&[0], self.flat.dtype()), own.len());
            }
            if stage == Stage::Parameters {
                let units = units::share(&mut self.flat, ranks.clone(), &shard.stretches)?;
                self.plan.gathered = 2 * units.largest() * each;
                params = own.len();
            }
            self.plan.keeps([params * each, grads * each, self.state.len() * own.len() * each]);
            self.shard = Some(shard);
        }
        self.ranks = Some(ranks);
        Ok(())
    }
    /// The gradient of the last step as the optimizer received it: all of it, or this rank's stretch.
    pub fn last_gradient(&self) -> &Array {
        self.shard.as_ref().map_or(&self.grads, |s| &s.grads)
    }
    /// Overwrites every sum without noise with zeros.
    pub fn erase(&mut self) -> Result<()> {
        zero(&mut self.grads)?;
        self.shard.as_mut().map_or(Ok(()), |s| zero(&mut s.grads))
    }
    /// Cleans up after a failed step: no sum remains without its noise, and no other rank waits for this one.
    pub fn failed(&mut self, e: Error) -> Error {
        let e = match e {
            Error::Invalid { op: op @ "collective", message } => {
                Error::Invalid { op, message: format!("step {}: {message}", self.steps + 1) }
            }
            e => e,
        };
        if let Some(ranks) = &self.ranks {
            ranks.abort(&e.to_string());
        }
        match self.erase() {
            Ok(()) => e,
            Err(worse) => worse,
        }
    }
    /// Starts the measurement of a step, and allocates the memory in which its report will be: once the parameters have changed, nothing of
    /// a step may fail any more.
    pub fn begin(&mut self) -> Result<()> {
        self.room = self.counters.as_ref().map(Counters::room).transpose()?;
        self.phases = Phases::default();
        self.before = self.flat.device().watermark().0;
        Ok(())
    }
    /// Collects, weighs, contracts and accumulates over the microbatches, then reduces over the ranks. With `scalars`, the numbers that
    /// change from step to step are read from memory.
    pub fn accumulate<B, W: Weighting>(
        &mut self,
        weighting: &W,
        microbatches: impl IntoIterator<Item = B>,
        mut forward: impl FnMut(B) -> Result<Microbatch>,
        scalars: Option<&StepScalars>,
    ) -> Result<Counts> {
        self.erase()?;
        if let Some(counters) = &self.counters {
            counters.begin()?;
        }
        let (step, counters, phases) = (self.steps + 1, self.counters.as_ref(), &mut self.phases);
        let (mut loss, mut samples, mut private) = (0.0, 0, 0);
        let (ranks, units) = (self.ranks.as_ref(), self.flat.units().cloned());
        if let Some(units) = &units {
            units.settle()?;
        }
        let (mut microbatches, mut meets) = (microbatches.into_iter(), None);
        let grads = match (&mut self.shard, ranks) {
            (Some(shard), Some(ranks)) if shard.stage != Stage::Optimizer => {
                meets = Some(ranks);
                Target::Buckets(Buckets::new(shard, ranks, &self.flat))
            }
            _ => Target::Whole(&mut self.grads),
        };
        let mut collect = weighting.collector(Context { flat: &self.flat, plan: &self.plan, counters, grads });
        loop {
            let next = microbatches.next();
            // Ranks sum their buckets in every microbatch that any of them has: ranks without one take part with zeros.
            if let Some(ranks) = meets {
                let some = Array::full(&[1], next.is_some() as u8 as f64, DType::F64);
                if ranks.all_reduce("microbatches", &some)?.item()? > 0.0 && next.is_none() {
                    collect.begin(0, None);
                    collect.idle()?;
                    continue;
                }
            }
            let Some(batch) = next else { break };
            if let Some(units) = &units {
                units.start()?;
            }
            let (phase, start) = (spans::span(Kind::Phase, "forward pass"), Instant::now());
            let Microbatch { losses, public } = forward(batch)?;
            drop(phase);
            phases.forward += start.elapsed().as_secs_f64();
            if let Some(units) = &units {
                units.check()?;
            }
            if losses.rank() != 1 {
                return Err(Error::shape(
                    "run",
                    format!("the forward pass must return one loss per sample, [B]; got {:?}", losses.shape()),
                ));
            }
            if losses.numel() == 0 {
                collect.begin(0, None);
                collect.idle()?;
                continue;
            }
            match counters {
                Some(counters) => {
                    let number = (step, scalars.map(|s| &s.number));
                    counters.losses(losses.array(), samples, number, W::STOPS)?
                }
                None => {
                    let values = losses.array().to_f64();
                    if W::STOPS
                        && let Some(i) = values.iter().position(|l| !l.is_finite())
                    {
                        return Err(not_finite(step, samples + i, values[i]));
                    }
                    loss += values.iter().sum::<f64>();
                }
            }
            samples += losses.numel();
            private += public.map_or(losses.numel(), |p| p.from);
            let (_phase, start) = (spans::span(Kind::Phase, "backward pass"), Instant::now());
            collect.begin(losses.numel(), public);
            losses.backward_into(&mut collect)?;
            drop(losses);
            collect.finish()?;
            phases.backward += start.elapsed().as_secs_f64();
        }
        let (tally, below) = collect.counts();
        drop(collect);
        let own = Counts { samples, private, loss, tally, below };
        let start = Instant::now();
        let counts = match (&mut self.shard, self.ranks.as_ref()) {
            (Some(shard), Some(ranks)) => {
                if shard.stage == Stage::Optimizer {
                    shard.reduce_whole(ranks, self.plan.buckets(), &self.grads)?;
                    // The sum of this rank's own samples has no noise and is not needed any more.
                    zero(&mut self.grads)?;
                }
                reduce(Some(ranks), &[], &mut self.grads, own)?
            }
            (_, ranks) => reduce(ranks.map(|r| r as _), self.plan.buckets(), &mut self.grads, own)?,
        };
        self.phases.reduce += start.elapsed().as_secs_f64();
        Ok(counts)
    }
    /// Updates the parameters from `scale` times the gradient.
    pub fn update(&mut self, scale: f64, scalars: Option<&StepScalars>) -> Result<()> {
        let start = Instant::now();
        let at = (self.steps + 1, self.schedule.at(self.steps));
        match (&mut self.shard, self.ranks.as_ref()) {
            (Some(shard), Some(ranks)) => {
                let (state, optimizer) = (&mut self.state, &*self.optimizer);
                update_shard(ranks, (&mut self.flat, optimizer), shard, state, (scale, at))?
            }
            _ => update(
                (&mut self.flat, &*self.optimizer),
                (&mut self.grads, scale),
                &mut self.state,
                at,
                (self.counters.as_ref(), scalars),
            )?,
        }
        self.phases.update += start.elapsed().as_secs_f64();
        Ok(())
    }
    /// Ends a step; returns its learning rate, and the losses and counts over all ranks.
    pub fn end(&mut self, here: Found) -> Result<(f64, Found)> {
        let lr = self.schedule.at(self.steps);
        self.steps += 1;
        let working_bytes = self.flat.device().watermark().1.saturating_sub(self.before);
        self.plan.measured = Some(Measurement { working_bytes, phases: self.phases });
        let found = match &self.counters {
            Some(counters) => {
                let room = self.room.take().map_or_else(|| counters.room(), Ok)?;
                Found::OnGpu(counters.snapshot(room)?)
            }
            None => here,
        };
        Ok((lr, found))
    }
    /// Runs forward and backward on an eighth and on a quarter of `samples` samples (at most `most`), and predicts from them what a
    /// microbatch of `samples` needs. The resulting gradient is erased.
    pub fn predict<W: Weighting>(
        &mut self,
        weighting: &W,
        (samples, most): (usize, usize),
        mut forward: impl FnMut(usize) -> Result<Tensor>,
    ) -> Result<()> {
        if samples == 0 || most == 0 {
            return Err(Error::invalid("predict", "a microbatch of 0 samples"));
        }
        let few = samples.div_ceil(8).max(2);
        let (few, more) = if samples <= 2 * few { (samples, samples) } else { (few, 2 * few) };
        let (few, more) = (few.min(most), more.min(most));
        let traced = (|| {
            // Threads keep their scratch memory once allocated; the first trace makes them allocate it.
            self.trace(weighting, more, &mut forward)?;
            let a = self.trace(weighting, few, &mut forward)?;
            let b = if few == more { a.clone() } else { self.trace(weighting, more, &mut forward)? };
            Prediction::from(&a, &b, samples, self.plan.params().len())
        })();
        zero(&mut self.grads)?;
        self.plan.predicted = Some(traced?);
        Ok(())
    }
    fn trace<W: Weighting>(
        &mut self,
        weighting: &W,
        samples: usize,
        forward: &mut impl FnMut(usize) -> Result<Tensor>,
    ) -> Result<Trace> {
        let device = self.flat.device();
        let counters = self.counters.as_ref();
        // A trace runs on this rank alone; at stage 2 it needs a gradient buffer of its own.
        let mut own = None;
        let grads = match self.grads.numel() == self.flat.numel() {
            true => &mut self.grads,
            false => own.insert(Array::zeros(&[self.flat.numel()], self.flat.dtype())),
        };
        let context = Context { flat: &self.flat, plan: &self.plan, counters, grads: Target::Whole(grads) };
        let (base, _) = device.watermark();
        let inner = weighting.collector(context);
        let mut tracing = Tracing { inner, flat: &self.flat, device, base, events: Vec::new() };
        let start = Instant::now();
        let losses = forward(samples)?;
        if losses.shape() != [samples] {
            return Err(Error::shape(
                "predict",
                format!("the forward pass must return {samples} losses here; got {:?}", losses.shape()),
            ));
        }
        tracing.event(None, 0);
        tracing.inner.begin(samples, None);
        losses.backward_into(&mut tracing)?;
        drop(losses);
        tracing.inner.finish()?;
        tracing.event(None, 0);
        tracing.device.synchronize()?;
        Ok(Trace { samples, events: tracing.events, seconds: start.elapsed().as_secs_f64() })
    }
    /// Sets the optimizer's first buffer to zero.
    pub fn reset_first_moment(&mut self) -> Result<()> {
        self.state.first_mut().map_or(Ok(()), zero)
    }
    /// The optimizer's buffers, by name.
    pub fn state(&self) -> Vec<(&'static str, Array)> {
        self.optimizer.slots().iter().copied().zip(self.state.iter().cloned()).collect()
    }
    /// The complete optimizer buffers, on every rank.
    pub fn whole_state(&self) -> Result<Vec<(&'static str, Array)>> {
        let (Some(shard), Some(ranks)) = (&self.shard, self.ranks.as_ref()) else { return Ok(self.state()) };
        let whole = |(name, own): (&'static str, Array)| {
            let mut all = Array::zeros(&[self.flat.numel()], own.dtype());
            shard.gather(ranks, name, &own, |at, part| all.write(at, part))?;
            Ok((name, all))
        };
        self.state().into_iter().map(whole).collect()
    }
    /// Restores the optimizer's buffers and the number of steps from a checkpoint.
    pub fn restore(&mut self, steps: u64, state: &[(String, Array)]) -> Result<()> {
        let mut buffers = Vec::new();
        for (slot, buffer) in self.optimizer.slots().iter().zip(&self.state) {
            let found = state.iter().find(|(n, _)| n == slot).ok_or_else(|| {
                Error::invalid("restore", format!("the checkpoint has no {slot}; was it another optimizer?"))
            })?;
            // A rank that keeps a stretch extracts it from the complete buffers.
            let whole = [self.flat.numel()];
            let part = match &self.shard {
                Some(shard) if found.1.shape() == whole => found.1.slice(0, shard.own())?,
                _ => found.1.clone(),
            };
            if part.shape() != buffer.shape() || part.dtype() != buffer.dtype() {
                return Err(Error::shape(
                    "restore",
                    format!("{slot} is {:?}, the model needs {:?}", found.1.shape(), buffer.shape()),
                ));
            }
            buffers.push(part.to(&buffer.device())?.copy());
        }
        (self.state, self.steps) = (buffers, steps);
        Ok(())
    }
}

/// A collector that records the memory use at each event of a backward pass.
struct Tracing<'a, C> {
    inner: C,
    flat: &'a Flat,
    device: Device,
    base: usize,
    events: Vec<Event>,
}

impl<C> Tracing<'_, C> {
    fn event(&mut self, param: Option<usize>, factor_bytes: usize) {
        let peak = self.device.watermark().1.saturating_sub(self.base);
        self.events.push(Event { param, factor_bytes, peak });
    }
}

impl<C: Collect> GradHook for Tracing<'_, C> {
    fn param(&mut self, param: &Param, grad: ParamGrad) -> Result<()> {
        self.event(None, 0);
        let (index, bytes) = (self.flat.index(param), grad.bytes());
        self.inner.param(param, grad)?;
        self.event(index, bytes);
        Ok(())
    }
    fn visited(&mut self) {
        self.event(None, 0);
    }
}
