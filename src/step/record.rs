//! A step recorded as a CUDA graph and replayed: one launch instead of hundreds.

use super::{Found, StepReport, TrainStep};
use crate::array::Array;
use crate::autograd::Tensor;
use crate::base::{DType, Error, Result};
use crate::device::Device;
use crate::device::cuda::Graph;

/// What changes from step to step, in the GPU's memory.
pub(super) struct Live {
    /// Steps before this one (u64 in i64): the noise's counter.
    pub before: Array,
    /// Number of this step, from 1.
    pub number: Array,
    /// The optimizer's numbers, f64.
    pub optimizer: Array,
}

/// A training step recorded by [`TrainStep::record`]. It reads its data from the arrays that the forward pass read them
/// from: write the next batch there with [`Array::refill`].
pub struct RecordedStep {
    graph: Graph,
    live: Live,
    samples: usize,
    /// Where the buffers lay when it was recorded.
    places: Vec<u64>,
}

impl RecordedStep {
    /// Kernels in the recording.
    pub fn kernels(&self) -> u64 {
        self.graph.kernels()
    }
    /// Samples of each replay.
    pub fn samples(&self) -> usize {
        self.samples
    }
}

impl TrainStep {
    /// Records a step instead of taking it, private or not, noise and update included. Take at least one ordinary step
    /// first, so that kernels are loaded and memory is there.
    ///
    /// The forward pass runs once, now: its data must be on the GPU already ([`Array::to`]), and whatever the host
    /// decides in it is decided for all replays. Dropout is refused: its mask would be the same every time. A private
    /// batch of another size than the recorded one is taken with [`TrainStep::run`], or with the losses of the places
    /// that are left over multiplied by 0.
    ///
    /// Optimizers of one's own can be recorded if they give [`live`](crate::optim::Optimizer::live) numbers.
    pub fn record<B>(
        &mut self,
        microbatches: impl IntoIterator<Item = B>,
        mut forward: impl FnMut(B) -> Result<Tensor>,
    ) -> Result<RecordedStep> {
        let op = "TrainStep::record";
        let Device::Cuda(gpu) = self.flat.device() else {
            return Err(Error::invalid(op, "the model is on the CPU, where there is nothing to record; use run"));
        };
        let device = Device::Cuda(gpu.clone());
        let Some(numbers) = self.optimizer.live(self.steps + 1, self.schedule.at(self.steps)) else {
            return Err(Error::invalid(op, format!("{} gives no live numbers", self.optimizer.describe())));
        };
        gpu.fault_words()?;
        let places = self.places()?;
        let word = || Array::zeros_at(&device, &[1], DType::I64);
        let live = Live {
            before: word()?,
            number: word()?,
            optimizer: Array::zeros_at(&device, &[numbers.len()], DType::F64)?,
        };
        let (graph, (samples, ..)) =
            gpu.capture(|| self.queue(microbatches, |b| Ok((forward(b)?, None)), Some(&live)))?;
        Ok(RecordedStep { graph, live, samples, places })
    }

    /// Takes a recorded step. Everything else is as with [`TrainStep::run`]: the budget is spent, the schedule goes on,
    /// steps of both kinds may follow each other.
    pub fn replay(&mut self, recorded: &mut RecordedStep) -> Result<StepReport> {
        let op = "TrainStep::replay";
        let places = self.places()?;
        if places != recorded.places {
            return Err(Error::invalid(
                op,
                "the parameters or the optimizer's buffers are no longer where they were recorded: drop what was taken of \
                 them with value(), state() or last_gradient() before the next step, then record again",
            ));
        }
        let epsilon = self.admit()?;
        let numbers = self.optimizer.live(self.steps + 1, self.schedule.at(self.steps)).unwrap_or_default();
        recorded.live.before.refill(&Array::from_slice(&[self.steps as i64], &[1])?)?;
        recorded.live.number.refill(&Array::from_slice(&[self.steps as i64 + 1], &[1])?)?;
        recorded.live.optimizer.refill(&Array::from_slice(&numbers, &[numbers.len()])?)?;
        recorded.graph.launch()?;
        self.report(recorded.samples, epsilon, Found::Here(0.0, Default::default()))
    }

    /// Where gradients, optimizer buffers and parameters lie, after making sure that nobody else holds them.
    fn places(&mut self) -> Result<Vec<u64>> {
        self.flat.update(|_, _| Ok(()))?;
        self.grads.own()?;
        self.state.iter_mut().try_for_each(Array::own)?;
        let mut all = vec![self.grads.address()?, self.flat.address()?];
        for s in &self.state {
            all.push(s.address()?);
        }
        Ok(all)
    }
}
