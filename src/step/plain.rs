//! The ordinary training step.

use super::capture::{Capture, CapturedStep};
use super::core::{Core, Found, Microbatch};
use super::plan::Plan;
use super::weigh::Plain;
use super::{Flat, Stage, TrainStep};
use crate::array::Array;
use crate::autograd::{Param, Tensor};
use crate::base::{Error, Result};
use crate::dist::Communicator;
use crate::optim::{Optimizer, Schedule};

/// A training step: gradients of the mean loss over all samples of the step, then one update.
///
/// ```
/// use prismgrad::nn::{Init, Params};
/// use prismgrad::optim::{Schedule, Sgd};
/// use prismgrad::step::PlainStep;
/// use prismgrad::{DType, Result, Tensor};
/// # fn main() -> Result<()> {
/// let params = Params::new(0, DType::F32);
/// let w = params.param("w", &[1], Init::Zeros)?;
/// let mut step = PlainStep::new(&params.all(), Sgd::default(), Schedule::constant(0.1))?;
/// let report = step.run([[1f32, 2.0], [3.0, 4.0]], |microbatch| {
///     let targets = Tensor::from_slice(&microbatch, &[2])?;
///     w.dense().expand(&[2])?.sub(&targets)?.square() // one loss per sample
/// })?;
/// assert_eq!((report.samples, report.loss()?), (4, 7.5));
/// # Ok(()) }
/// ```
///
/// It has no method that concerns privacy, so that such calls fail at compile time and not at run time:
///
/// ```compile_fail
/// # fn f(step: &mut prismgrad::step::PlainStep) {
/// step.privacy().spent();
/// # }
/// ```
pub struct PlainStep {
    core: Box<Core>,
}

/// The result of a plain step.
///
/// On a GPU the step is only queued when [`PlainStep::run`] returns. The loss is then read from the device by [`Report::loss`],
/// which waits for the step: call it every few steps, not after every one.
#[derive(Clone, Debug)]
pub struct Report {
    /// Steps taken so far, this one included.
    pub step: u64,
    /// Number of samples of this step.
    pub samples: usize,
    /// Learning rate used.
    pub lr: f64,
    found: Found,
}

impl Report {
    /// Mean loss over the samples of this step.
    ///
    /// On a GPU, if a step had a non-finite loss, this report and all later ones return an error: nothing has been updated since that step.
    pub fn loss(&self) -> Result<f64> {
        Ok(self.found.read()?.0 / self.samples as f64)
    }
}

impl PlainStep {
    /// A step over the trainable parameters among `params`, which must share a dtype (f32 or f64) and a device.
    pub fn new(params: &[Param], optimizer: impl Optimizer + 'static, schedule: Schedule) -> Result<PlainStep> {
        let plan = |flat: &Flat, slots| Ok(Plan::new(flat, None, slots));
        Ok(PlainStep { core: Box::new(Core::new(params, Box::new(optimizer), schedule, plan)?) })
    }
    /// Makes this rank one of several that perform every step together, each on its part of the batch (data parallelism, ZeRO stage 0). The
    /// parameters are copied from rank 0 now. Gradients are summed over the ranks in their order, so that the update is the same on each;
    /// the mean is over all ranks' samples, and so are the losses in reports. CPU only.
    pub fn with_ranks(self, ranks: Box<dyn Communicator>) -> Result<PlainStep> {
        self.with_zero(ranks, Stage::Replicated)
    }
    /// As [`PlainStep::with_ranks`], but the ranks share the model's state (Rajbhandari et al. 2020): with [`Stage::Optimizer`] each rank
    /// keeps its stretch of the optimizer's buffers, with [`Stage::Gradients`] of the gradient as well, and with [`Stage::Parameters`] also
    /// of the parameters.
    pub fn with_zero(mut self, ranks: Box<dyn Communicator>, stage: Stage) -> Result<PlainStep> {
        self.core.with_zero(ranks, stage)?;
        Ok(self)
    }
    /// Runs `forward` on each microbatch (it returns one loss per sample), and updates the parameters once. A non-finite loss on the CPU
    /// ends the step with an error that names the sample, before anything is changed; on a GPU the error comes from [`Report::loss`].
    pub fn run<B>(
        &mut self,
        microbatches: impl IntoIterator<Item = B>,
        mut forward: impl FnMut(B) -> Result<Tensor>,
    ) -> Result<Report> {
        self.core.begin()?;
        let losses = |b| Ok(Microbatch { losses: forward(b)?, public: None });
        let counts = self.core.accumulate(&Plain, microbatches, losses, None).map_err(|e| self.core.failed(e))?;
        if counts.samples == 0 {
            return Err(Error::invalid("run", "no samples: a plain step needs at least one"));
        }
        self.core.update(1.0 / counts.samples as f64, None).map_err(|e| self.core.failed(e))?;
        self.report(counts.samples, Found::Here(counts.loss, counts.tally))
    }
    /// [`PlainStep::run`] with one microbatch.
    pub fn run_one(&mut self, forward: impl FnOnce() -> Result<Tensor>) -> Result<Report> {
        self.run([forward], |forward| forward())
    }
    /// Runs forward and backward on an eighth and on a quarter of `samples` samples, and stores in the plan what a microbatch of `samples`
    /// samples is expected to need. `forward(n)` returns the losses of any n samples. Nothing is updated.
    pub fn predict(&mut self, samples: usize, forward: impl FnMut(usize) -> Result<Tensor>) -> Result<&Plan> {
        self.core.predict(&Plain, (samples, usize::MAX), forward)?;
        Ok(&self.core.plan)
    }
    /// Captures a step as a CUDA graph, including the update, instead of performing it. Run at least one ordinary step first, so that
    /// kernels are compiled and memory is allocated.
    ///
    /// The forward pass runs once, now: its data must be on the GPU already ([`Array::to`]), and every decision of the host in it holds for
    /// all replays. Dropout is refused, because its mask would be the same in every replay. An optimizer can be captured if it implements
    /// [`step_scalars`](Optimizer::step_scalars).
    pub fn capture<B>(
        &mut self,
        microbatches: impl IntoIterator<Item = B>,
        mut forward: impl FnMut(B) -> Result<Tensor>,
    ) -> Result<CapturedStep> {
        let capture = Capture::new(&mut self.core, |core, scalars| {
            let losses = |b| Ok(Microbatch { losses: forward(b)?, public: None });
            let counts = core.accumulate(&Plain, microbatches, losses, Some(scalars))?;
            core.update(1.0 / counts.samples.max(1) as f64, Some(scalars))?;
            Ok(counts.samples)
        })?;
        Ok(CapturedStep(capture))
    }
    /// Performs a captured step with one launch. It reads its data from the same arrays as the captured forward pass: write the next batch
    /// into them with [`Array::refill`] first. The schedule continues; captured and ordinary steps may be mixed.
    pub fn replay(&mut self, captured: &mut CapturedStep) -> Result<Report> {
        self.core.begin()?;
        captured.0.launch(&mut self.core)?;
        self.report(captured.0.samples, Found::Here(0.0, Default::default()))
    }
    fn report(&mut self, samples: usize, here: Found) -> Result<Report> {
        let (lr, found) = self.core.end(here)?;
        Ok(Report { step: self.core.steps, samples, lr, found })
    }
}

impl TrainStep for PlainStep {
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
    fn whole_state(&self) -> Result<Vec<(&'static str, Array)>> {
        self.core.whole_state()
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
    fn state(&self) -> Vec<(&'static str, Array)> {
        self.core.state()
    }
    fn restore(&mut self, steps: u64, state: &[(String, Array)]) -> Result<()> {
        self.core.restore(steps, state)
    }
}
