//! The private training step.

use super::capture::{Capture, CapturedPrivateStep};
use super::core::{Core, Found, Microbatch, PublicPart};
use super::plan::Plan;
use super::reduce::Counts;
use super::update::zero;
use super::{Flat, Privacy, Stage, TrainStep};
use crate::array::Array;
use crate::autograd::{GradHook, Gradients, Mixing, Param, ParamGrad, Tensor, line_of, recorded};
use crate::base::{DType, Error, Result};
use crate::dist::Communicator;
use crate::optim::{Optimizer, Schedule};
use crate::privacy::{Public, Thresholds, Weight};
use crate::random::{digest, masks};
use std::fmt;
use std::ops::Range;

/// Name of the adaptive thresholds in a step's state.
const THRESHOLDS: &str = "clipping thresholds";
/// Name of the number of private steps in a step's state.
const PRIVATE_STEPS: &str = "private steps";

/// A private training step (DP-SGD, Abadi et al. 2016, algorithm 1): per-sample gradients of a Poisson batch are clipped, summed, noised
/// once and divided by the expected batch size; then the parameters are updated once.
///
/// The step draws its own batch, so that the sampling is what the accountant assumes. It does not accept a batch from the caller:
///
/// ```compile_fail
/// # use prismgrad::{step::PrivateStep, Result, Tensor};
/// # fn losses(records: &[usize]) -> Result<Tensor> { unimplemented!() }
/// # fn f(step: &mut PrivateStep) -> Result<()> {
/// step.run([vec![3, 5, 7]], |records| losses(&records))?; // the first argument is the size of a microbatch
/// # Ok(()) }
/// ```
pub struct PrivateStep {
    core: Box<Core>,
    privacy: Box<Privacy>,
    /// Whether the check that losses depend on their own records alone has passed.
    checked: bool,
}

/// The result of a private step.
///
/// Only ε, the step's number and the learning rate may be published: all other figures of a report depend on the data and are not private.
/// On a GPU the step is only queued when [`PrivateStep::run`] returns; the other figures are read from the device on demand, which waits
/// for the step.
#[derive(Clone, Debug)]
pub struct PrivateReport {
    /// Steps taken so far, this one included.
    pub step: u64,
    /// Number of samples of this step, private and public.
    pub samples: usize,
    /// Learning rate used.
    pub lr: f64,
    /// Upper bound of the ε spent so far at the configured δ; [`Privacy::epsilon`] computes it exactly.
    pub epsilon: f64,
    /// Whether the noise came from a test key that anyone can compute ([`NoiseKey::from_seed_for_tests`](crate::random::NoiseKey)): then
    /// the step was not private, whatever `epsilon` is.
    pub test_key: bool,
    found: Found,
    /// Number of (sample, group) pairs of padding samples, which a replayed step counts as well.
    padding: u64,
}

impl fmt::Display for PrivateReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {}: ε ≤ {:.4}", self.step, self.epsilon)?;
        if self.test_key {
            f.write_str(" if the key were secret; it is a test key, and the step is NOT private")
        } else {
            Ok(())
        }
    }
}

impl PrivateReport {
    /// Mean loss over the samples of this step; NaN if there were none. It depends on the data and is not private.
    pub fn loss(&self) -> Result<f64> {
        Ok(self.found.read()?.0 / self.samples as f64)
    }
    /// Number of samples that were dropped because their gradient was not finite.
    pub fn non_finite(&self) -> Result<usize> {
        Ok(self.found.read()?.1.non_finite as usize)
    }
    /// Share of (sample, group) pairs whose norm exceeded the threshold.
    pub fn clipped(&self) -> Result<f64> {
        let mut tally = self.found.read()?.1;
        tally.pairs = tally.pairs.saturating_sub(self.padding);
        Ok(tally.share())
    }
}

impl PrivateStep {
    /// A step over the trainable parameters among `params`, which must share a dtype (f32 or f64) and a device.
    pub fn new(
        params: &[Param],
        mut privacy: Privacy,
        optimizer: impl Optimizer + 'static,
        schedule: Schedule,
    ) -> Result<PrivateStep> {
        let core = Core::new(params, Box::new(optimizer), schedule, |flat, slots| {
            privacy.plan(flat.params())?;
            Ok(Plan::new(flat, Some(privacy.clipping()), slots))
        })?;
        Ok(PrivateStep { core: Box::new(core), privacy: Box::new(privacy), checked: false })
    }
    /// Makes this rank one of several that perform every step together, each on its own records of the one Poisson batch (data parallelism,
    /// ZeRO stage 0). The parameters are copied from rank 0 now. Gradients are summed over the ranks in their order, and noise with the
    /// same bits on each rank is added once to the sum. Losses and counts in reports are over all ranks. All ranks must have the same key,
    /// model and settings. CPU only.
    pub fn with_ranks(self, ranks: Box<dyn Communicator>) -> Result<PrivateStep> {
        self.with_zero(ranks, Stage::Replicated)
    }
    /// As [`PrivateStep::with_ranks`], but the ranks share the model's state (Bu et al. 2023, DP-ZeRO): from [`Stage::Optimizer`] on each
    /// rank keeps its stretch of the optimizer's buffers, from [`Stage::Gradients`] on also of the gradient, and with [`Stage::Parameters`]
    /// also of the parameters. The norms of a record are computed on its own rank; noise is drawn once, by the owner of each stretch, with
    /// the same bits at every stage and number of ranks. Private training sends what plain training sends, plus the digest of the sum,
    /// which is 1/512 of it.
    pub fn with_zero(mut self, ranks: Box<dyn Communicator>, stage: Stage) -> Result<PrivateStep> {
        let own = self.privacy.fingerprint()?;
        let all = ranks.all_gather("key and configuration", &Array::from_slice(&own, &[3])?)?.to_f64();
        if let Some(other) = all.chunks(3).position(|f| f != own) {
            return Err(Error::privacy(format!(
                "rank {other} has another noise key or another privacy configuration than rank {}: noise would be added more \
                 than once, or differ between ranks. Draw the key on one rank and give it to all",
                ranks.rank()
            )));
        }
        self.core.with_zero(ranks, stage)?;
        Ok(self)
    }
    /// Sampler, clipper, noise and accountant.
    pub fn privacy(&self) -> &Privacy {
        &self.privacy
    }
    /// Draws the next Poisson batch, runs `forward` on at most `physical_batch` of its records at a time, and updates the parameters once.
    /// `forward` receives the indices of the records, from 0 to the configured number of records, and returns one loss for each, in the
    /// same order. It is not called for an empty batch, which is a step all the same.
    ///
    /// The step is recorded with the accountant before the parameters are changed, and refused if the budget would be exceeded. A sample
    /// whose gradient is not finite gets weight zero and is counted.
    ///
    /// Each loss must depend on its own record alone. On the first batch of two or more records, `forward` is called twice more, on a few
    /// of the records and on half of these, without dropout: a record's loss and its gradients must not depend on the other records of the
    /// batch. An operation that mixes records, such as a batch norm, is refused in this way before anything is released.
    pub fn run(
        &mut self,
        physical_batch: usize,
        mut forward: impl FnMut(&[usize]) -> Result<Tensor>,
    ) -> Result<PrivateReport> {
        let none = Public(Vec::<()>::new());
        self.run_coupled(physical_batch, none, Weight::private(1.0)?, |records, _| forward(records))
    }
    /// One step on private and public data together. The update follows
    ///
    /// g = α·(Σ clip(gᵢ) + noise)/B₁ + (1 − α)·(mean of the public gradients),
    ///
    /// where B₁ is the expected private batch size. Both kinds go through one forward and one backward pass: `forward` receives private
    /// records and public samples, at most `physical_batch` of both together at a time, and returns their losses in that order,
    /// `[private + public]`. Noise is calibrated to the private part alone, and public samples are neither clipped nor counted. With α = 0
    /// no private record is drawn and no budget is spent; with α = 1 the public data are not used. The loss in the report covers both.
    pub fn run_coupled<Q>(
        &mut self,
        physical_batch: usize,
        public: Public<Vec<Q>>,
        weight: Weight,
        mut forward: impl FnMut(&[usize], &[Q]) -> Result<Tensor>,
    ) -> Result<PrivateReport> {
        let op = "run";
        self.core.begin()?;
        let (Public(mut public), share) = (public, weight.of_private());
        if physical_batch == 0 {
            return Err(Error::invalid(op, "a physical batch of 0 samples"));
        }
        if share == 1.0 {
            public.clear();
        } else if self.core.ranks.is_some() {
            return Err(Error::invalid(
                op,
                "public data in a step of several ranks: not there yet; take them on one rank",
            ));
        } else if public.is_empty() {
            return Err(Error::invalid(
                op,
                format!("no public samples, but a public weight of {}", weight.of_public()),
            ));
        }
        // Copies values that were set from outside, such as from a checkpoint, into the buffer.
        self.core.flat.update(|_, _| Ok(()))?;
        let records = if share == 0.0 {
            Vec::new()
        } else {
            self.privacy.admit(self.core.steps)?;
            self.next_batch()
        };
        let shown = &public[..public.len().min(physical_batch)];
        let first = &records[..records.len().min(physical_batch)];
        self.expect_independence(first, shown.len(), |records| forward(records, shown))?;
        // The memory used by the check does not count towards the step.
        self.core.begin()?;
        let secret = self.privacy.mask_secret(self.core.steps);
        // Public gradients are scaled such that the final scaling of the private sum gives the weighted mean of both.
        let expected = self.privacy.expected_batch();
        let mean = weight.of_public() / public.len().max(1) as f64;
        let scale = if share == 0.0 { 1.0 } else { mean * expected / share };
        let has_public = !public.is_empty();
        let losses = |(p, q): (Range<usize>, Range<usize>)| {
            let losses = masks::secret(secret, || forward(&records[p.clone()], &public[q.clone()]))?;
            expect_losses(&losses, p.len(), q.len())?;
            Ok(Microbatch { losses, public: has_public.then_some(PublicPart { from: p.len(), weight: scale }) })
        };
        let taken = (|| {
            let parts = parts(records.len(), public.len(), physical_batch);
            let counts = self.core.accumulate(self.privacy.clipping(), parts, losses, None)?;
            if share == 0.0 {
                self.core.update(1.0 / counts.samples as f64, None)?;
                return Ok((counts, self.privacy.spent()?));
            }
            let epsilon = self.release(&counts)?;
            self.core.update(share / expected, None)?;
            Ok((counts, epsilon))
        })();
        match taken {
            Ok((counts, epsilon)) => {
                let here = Found::Here(counts.loss, counts.tally);
                self.report(counts.samples, epsilon, here, 0)
            }
            Err(e) => Err(self.core.failed(e)),
        }
    }
    /// Runs forward and backward on the first records, up to a quarter of a microbatch, and stores in the plan what a microbatch of
    /// `physical_batch` records is expected to need. Nothing is updated or released; the figures depend on the records' sizes if those
    /// differ.
    pub fn predict(
        &mut self,
        physical_batch: usize,
        mut forward: impl FnMut(&[usize]) -> Result<Tensor>,
    ) -> Result<&Plan> {
        let records: Vec<usize> = (0..self.privacy.config().records.min(physical_batch)).collect();
        let most = (physical_batch, records.len());
        let secret = self.privacy.mask_secret(self.core.steps);
        self.core.predict(self.privacy.clipping(), most, |n| masks::secret(secret, || forward(&records[..n])))?;
        Ok(&self.core.plan)
    }
    /// Captures a step of up to `capacity` records as a CUDA graph, including noise and update, instead of performing it. `forward` returns
    /// `capacity` losses of records that it reads from arrays on the GPU. Run at least one ordinary step first, so that kernels are
    /// compiled and memory is allocated. The requirements of [`PlainStep::capture`](super::PlainStep::capture) apply here, too.
    pub fn capture(
        &mut self,
        capacity: usize,
        mut forward: impl FnMut() -> Result<Tensor>,
    ) -> Result<CapturedPrivateStep> {
        let device = self.core.flat.device();
        let mask = Array::zeros(&[capacity], (self.core.flat.dtype(), &device));
        let masked = Tensor::new(mask.clone());
        // The kernels that mask the losses are loaded before the capture, because none can be loaded during it.
        for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
            Tensor::leaf(mask.cast(dtype)).mul(&masked.cast(dtype)?)?.backward()?;
        }
        let privacy = &self.privacy;
        let scale = 1.0 / privacy.expected_batch();
        // Everything runs once outside of the capture, so that the pool has blocks of these sizes. Nothing is released: the sum is erased.
        // A few small arrays are held meanwhile and then dropped, so that the pool has blocks for the step numbers that the capture reads
        // from memory.
        let held: Vec<Array> = (0..8).map(|_| Array::zeros(&[1], (DType::I64, &device))).collect();
        let secret = privacy.mask_secret(self.core.steps);
        let mut microbatch = |_| {
            let losses = masks::secret(secret, &mut forward)?;
            expect_losses(&losses, capacity, 0)?;
            Ok(Microbatch { losses: losses.mul(&masked.cast(losses.dtype())?)?, public: None })
        };
        let taken = self.core.accumulate(privacy.clipping(), [()], &mut microbatch, None);
        let taken = taken.and_then(|_| privacy.add_noise_on_gpu(self.core.steps, None, &self.core.grads));
        zero(&mut self.core.grads)?;
        taken?;
        drop(held);
        let capture = Capture::new(&mut self.core, |core, scalars| {
            core.accumulate(privacy.clipping(), [()], &mut microbatch, Some(scalars))?;
            privacy.add_noise_on_gpu(core.steps, Some(&scalars.before), &core.grads)?;
            core.update(scale, Some(scalars))?;
            Ok(capacity)
        });
        zero(&mut self.core.grads)?;
        Ok(CapturedPrivateStep { capture: capture?, mask })
    }
    /// Performs a captured step with one launch: draws the next Poisson batch, calls `fill` to write its records into the first positions
    /// of the arrays that the captured forward pass reads ([`Array::refill`]), and masks the losses of the remaining positions. A batch
    /// that is larger than the capacity is refused before anything is spent: perform that step with [`PrivateStep::run`].
    pub fn replay(
        &mut self,
        captured: &mut CapturedPrivateStep,
        fill: impl FnOnce(&[usize]) -> Result<()>,
    ) -> Result<PrivateReport> {
        self.core.begin()?;
        let (records, capacity) = (self.next_batch(), captured.mask.numel());
        if records.len() > capacity {
            return Err(Error::invalid(
                "replay",
                format!(
                    "a Poisson batch of more than the {capacity} records that were captured: take this step with run"
                ),
            ));
        }
        captured.capture.expect_places(&mut self.core)?;
        fill(&records)?;
        let mask = Array::generate(&[capacity], captured.mask.dtype(), |i| (i < records.len()) as u8 as f64);
        captured.mask.refill(&mask)?;
        let epsilon = self.privacy.commit(self.core.steps, None)?;
        captured.capture.launch(&mut self.core)?;
        let padding = ((capacity - records.len()) * self.privacy.groups()) as u64;
        self.report(records.len(), epsilon, Found::Here(0.0, Default::default()), padding)
    }
    /// Refuses losses or gradients that depend on the other records of the batch, as far as the history or two forward and backward passes
    /// over a few of `records` show it. It runs once, and not with several ranks, where the other ranks would wait.
    fn expect_independence(
        &mut self,
        records: &[usize],
        public: usize,
        mut forward: impl FnMut(&[usize]) -> Result<Tensor>,
    ) -> Result<()> {
        if self.checked || self.core.ranks.is_some() || records.len() < 2 {
            return Ok(());
        }
        let all = &records[..records.len().min(8)];
        // Half of them, in reverse order: neither the other records nor the position may matter.
        let few: Vec<usize> = all[..all.len() / 2].iter().rev().copied().collect();
        let mut look = |records: &[usize]| Look::at(records, self.core.flat.params(), &mut forward, public);
        // If the forward pass returns the wrong number of losses here, the error comes from the batch itself.
        let part = look(&few)?;
        let whole = if part.is_some() { look(all)? } else { None };
        if let Some((mixing, after)) = whole.as_ref().and_then(|w| w.mixing.clone()) {
            let line = line_of(after, || masks::off(|| forward(all)));
            return Err(mixing.refusal(line.as_deref()));
        }
        if let (Some(part), Some(whole)) = (part, whole)
            && let Some(what) = whole.difference(&part)
        {
            // A forward pass that draws random numbers of its own differs from call to call, so that the comparison shows nothing.
            if look(all)?.is_some_and(|again| whole.difference(&again).is_none()) {
                return Err(Error::privacy(format!(
                    "{what} depends on which other records are in the batch: some operation mixes records, such as a batch norm, a \
                     maximum, mean or softmax over the batch, attention or a contrastive loss between records, or a layout whose \
                     first dimension is not that of the records. Then one record moves the gradients of others, and clipping does \
                     not bound what it does. Make each loss a function of its own record"
                )));
            }
        }
        self.checked = true;
        Ok(())
    }
    /// The records of the next batch. With several ranks, this rank's part of it, which the index of the record determines.
    fn next_batch(&self) -> Vec<usize> {
        let mut all = self.privacy.batch(self.core.steps);
        if let Some(r) = &self.core.ranks {
            all.retain(|i| i % r.size() == r.rank());
        }
        all
    }
    /// Records the release of the summed gradient, adds its noise, and updates adaptive thresholds. Returns ε including this release.
    fn release(&mut self, counts: &Counts) -> Result<f64> {
        let _phase = crate::device::spans::span(crate::device::spans::Kind::Phase, "noise");
        let start = std::time::Instant::now();
        let steps = self.core.steps;
        let epsilon = if self.core.grads.gpu().is_some() {
            let epsilon = self.privacy.commit(steps, None)?;
            self.privacy.add_noise_on_gpu(steps, None, &self.core.grads)?;
            epsilon
        } else {
            let size = (self.core.flat.numel(), self.core.flat.dtype().size());
            let (shard, ranks) = (&self.core.shard, &self.core.ranks);
            let grads = &self.core.grads;
            let (key, name) = self.privacy.release_key(steps, size, &counts.below, |key| match (shard, ranks) {
                (Some(shard), Some(ranks)) => shard.first_level(ranks, key),
                _ => crate::with_float!("run", grads.dtype(), |T| {
                    Ok(digest::first_level(key, bytemuck::cast_slice::<T, u32>(grads.as_slice::<T>()?)))
                }),
            })?;
            let epsilon = self.privacy.commit(steps, Some(name))?;
            let (first, grads) = match &mut self.core.shard {
                Some(shard) => (shard.own().start, &mut shard.grads),
                None => (0, &mut self.core.grads),
            };
            self.privacy.add_noise(&key, steps, first, grads)?;
            self.privacy.adapt(&key, steps, &counts.below, counts.private);
            epsilon
        };
        self.core.phases.noise += start.elapsed().as_secs_f64();
        Ok(epsilon)
    }
    fn report(&mut self, samples: usize, epsilon: f64, here: Found, padding: u64) -> Result<PrivateReport> {
        let (lr, found) = self.core.end(here)?;
        let test_key = self.privacy.has_test_key();
        Ok(PrivateReport { step: self.core.steps, samples, lr, epsilon, test_key, found, padding })
    }
    /// The state that a checkpoint needs besides the optimizer's buffers; the same on every rank.
    fn counts(&self) -> Vec<(&'static str, Array)> {
        let steps = self.privacy.steps();
        let mut all = vec![(PRIVATE_STEPS, Array::generate(&[1], DType::I64, |_| steps as f64))];
        if self.adaptive() {
            let thresholds = self.privacy.thresholds();
            all.push((THRESHOLDS, Array::generate(&[thresholds.len()], DType::F64, |i| thresholds[i])));
        }
        all
    }
    fn adaptive(&self) -> bool {
        matches!(self.privacy.config().thresholds, Thresholds::Adaptive { .. })
    }
}

/// The losses and gradient norms of records in one forward and backward pass.
struct Look {
    records: Vec<usize>,
    /// Losses of the records, then of public samples.
    losses: Vec<f64>,
    /// For each parameter its name and the squared norms of the gradients of the records and public samples.
    norms: Vec<(String, Vec<f64>)>,
    /// Relative difference that rounding may cause.
    tolerance: f64,
    /// The first operation that mixes samples, and the number of operations that the forward pass had recorded before it.
    mixing: Option<(Mixing, u64)>,
}

/// Collects gradients, and the operations that mix samples.
#[derive(Default)]
struct Followed {
    grads: Gradients,
    mixing: Option<Mixing>,
}

impl GradHook for Followed {
    fn param(&mut self, param: &Param, grad: ParamGrad) -> Result<()> {
        GradHook::param(&mut self.grads, param, grad)
    }
    fn follows_samples(&self) -> bool {
        true
    }
    fn mixing(&mut self, found: Mixing) -> Result<()> {
        self.mixing.get_or_insert(found);
        Ok(())
    }
}

impl Look {
    /// `None` if the number of losses is not that of the records and of `public` samples.
    fn at(
        records: &[usize],
        params: &[Param],
        forward: &mut impl FnMut(&[usize]) -> Result<Tensor>,
        public: usize,
    ) -> Result<Option<Look>> {
        let before = recorded();
        let losses = masks::off(|| forward(records))?;
        if losses.shape() != [records.len() + public] {
            return Ok(None);
        }
        let tolerance = match losses.dtype() {
            DType::F64 => 1e-9,
            DType::F32 => 1e-3,
            _ => 5e-2,
        };
        let mut found = Followed::default();
        losses.backward_into(&mut found)?;
        let Followed { grads, mixing } = found;
        let mixing = mixing.map(|m| (m.clone(), m.place - before));
        let mut norms = Vec::new();
        for p in params {
            if let Some(g) = grads.param(p) {
                norms.push((p.name().to_string(), g.sample_sq_norms()?));
            }
        }
        Ok(Some(Look { records: records.to_vec(), losses: losses.array().to_f64(), norms, tolerance, mixing }))
    }
    /// Describes a difference for a record, or a public sample, that both have; `other` has some of the records in any order.
    fn difference(&self, other: &Look) -> Option<String> {
        let differ = |a: &[f64], b: &[f64]| {
            // Numbers that are small relative to the largest may be rounding errors.
            let floor = a.iter().filter(|x| x.is_finite()).fold(0f64, |m, x| m.max(x.abs()));
            let apart = |a: f64, b: f64| match a.is_finite() && b.is_finite() {
                true => (a - b).abs() > self.tolerance * (a.abs() + b.abs() + 1e-2 * floor),
                false => a.is_finite() != b.is_finite(),
            };
            let place = |i: usize| match i.checked_sub(other.records.len()) {
                Some(public) => Some(self.records.len() + public),
                None => self.records.iter().position(|r| *r == other.records[i]),
            };
            (0..b.len()).find_map(|i| {
                let at = place(i)?;
                let whose = match i < other.records.len() {
                    true => format!("record {}", other.records[i]),
                    false => format!("public sample {}", i - other.records.len()),
                };
                apart(*a.get(at)?, b[i]).then(|| format!("{whose} ({:.6} or {:.6})", a[at], b[i]))
            })
        };
        if let Some(whose) = differ(&self.losses, &other.losses) {
            return Some(format!("the loss of {whose}"));
        }
        let mut pairs = self.norms.iter().zip(&other.norms);
        pairs.find_map(|((name, a), (_, b))| {
            differ(a, b).map(|w| format!("the squared gradient norm of {name} for {w}"))
        })
    }
}

/// Checks that there is one loss per record: with more, one record's gradient would be clipped in several pieces.
fn expect_losses(losses: &Tensor, private: usize, public: usize) -> Result<()> {
    if losses.shape() == [private + public] {
        return Ok(());
    }
    let samples = match public {
        0 => format!("{private} records"),
        _ => format!("{private} private records and {public} public samples"),
    };
    Err(Error::privacy(format!(
        "the forward pass returned losses of shape {:?} for {samples}: it must return one loss for each, in a vector",
        losses.shape()
    )))
}

/// Microbatches of at most `physical` samples, with private and public ones in proportion.
fn parts(private: usize, public: usize, physical: usize) -> Vec<(Range<usize>, Range<usize>)> {
    if public == 0 {
        return (0..private.div_ceil(physical))
            .map(|i| (i * physical..private.min((i + 1) * physical), 0..0))
            .collect();
    }
    let count = (private + public).div_ceil(physical);
    let cut = |n: usize, i: usize| n * i / count..n * (i + 1) / count;
    (0..count).map(|i| (cut(private, i), cut(public, i))).collect()
}

impl TrainStep for PrivateStep {
    fn steps(&self) -> u64 {
        self.core.steps
    }
    fn flat(&self) -> &Flat {
        &self.core.flat
    }
    fn plan(&self) -> &Plan {
        &self.core.plan
    }
    fn last_gradient(&self) -> &Array {
        self.core.last_gradient()
    }
    fn gather_parameters(&self) -> Result<()> {
        self.core.flat.units().map_or(Ok(()), |units| units.gather())
    }
    fn reset_first_moment(&mut self) -> Result<()> {
        self.core.reset_first_moment()
    }
    fn ranks(&self) -> Option<&dyn Communicator> {
        self.core.ranks.as_ref().map(|r| r as _)
    }
    fn accounting(&self) -> Option<&Privacy> {
        Some(&self.privacy)
    }
    fn whole_state(&self) -> Result<Vec<(&'static str, Array)>> {
        let mut all = self.core.whole_state()?;
        all.extend(self.counts());
        Ok(all)
    }
    fn state(&self) -> Vec<(&'static str, Array)> {
        let mut all = self.core.state();
        all.extend(self.counts());
        all
    }
    fn restore(&mut self, steps: u64, state: &[(String, Array)]) -> Result<()> {
        let mut thresholds = Vec::new();
        if self.adaptive() {
            let found = state.iter().find(|(n, a)| n == THRESHOLDS && a.dtype() == DType::F64);
            thresholds = found.map_or(Vec::new(), |(_, a)| a.to_f64());
            if thresholds.len() != self.privacy.groups() {
                let message = "the checkpoint has other adaptive thresholds or none; was it another run?";
                return Err(Error::invalid("restore", message));
            }
            if let Some(t) = thresholds.iter().find(|t| !(t.is_finite() && **t > 0.0)) {
                let message =
                    format!("the checkpoint has an adaptive threshold of {t}; all must be positive and finite");
                return Err(Error::invalid("restore", message));
            }
        }
        // All steps count as private unless the checkpoint says otherwise.
        let spent = state.iter().find(|(n, _)| n == PRIVATE_STEPS).and_then(|(_, a)| a.to_f64().first().copied());
        if let Some(spent) = spent.filter(|s| !(*s >= 0.0 && *s <= 9e15)) {
            let message = format!("the checkpoint counts {spent} private steps; that is no number of steps");
            return Err(Error::invalid("restore", message));
        }
        self.core.restore(steps, state)?;
        self.privacy.set_thresholds(&thresholds);
        self.privacy.restore(spent.map_or(steps, |s| s as u64))
    }
}
