//! Steps captured as a CUDA graph and replayed with one launch instead of hundreds.

use super::core::Core;
use crate::array::Array;
use crate::base::{DType, Error, Result};
use crate::device::Device;
use crate::device::cuda::Graph;

/// The numbers that change from step to step, in the GPU's memory, from which a captured step reads them.
pub(super) struct StepScalars {
    /// Number of steps before this one (u64 in i64): the counter of the noise.
    pub before: Array,
    /// Number of this step, from 1.
    pub number: Array,
    /// The optimizer's scalars, f64.
    pub optimizer: Array,
}

/// A step captured by [`PlainStep::capture`](super::PlainStep::capture).
pub struct CapturedStep(pub(super) Capture);

/// A step captured by [`PrivateStep::capture`](super::PrivateStep::capture).
pub struct CapturedPrivateStep {
    pub(super) capture: Capture,
    /// 1 for positions that hold a record of the batch, 0 for padding.
    pub(super) mask: Array,
}

impl CapturedStep {
    /// Number of kernels in the capture.
    pub fn kernels(&self) -> u64 {
        self.0.graph.kernels()
    }
    /// Number of samples of each replay.
    pub fn samples(&self) -> usize {
        self.0.samples
    }
}

impl CapturedPrivateStep {
    /// Number of kernels in the capture.
    pub fn kernels(&self) -> u64 {
        self.capture.graph.kernels()
    }
    /// The most records that a replay can take.
    pub fn capacity(&self) -> usize {
        self.capture.samples
    }
}

pub(super) struct Capture {
    graph: Graph,
    scalars: StepScalars,
    pub samples: usize,
    /// Addresses of the buffers at the time of the capture.
    places: Vec<u64>,
}

impl Capture {
    /// Captures the launches of `queue`, which returns the number of samples.
    pub fn new(core: &mut Core, queue: impl FnOnce(&mut Core, &StepScalars) -> Result<usize>) -> Result<Capture> {
        let op = "capture";
        let Device::Cuda(gpu) = core.flat.device() else {
            return Err(Error::invalid(op, "the model is on the CPU, where there is nothing to capture; use run"));
        };
        let device = Device::Cuda(gpu.clone());
        let Some(numbers) = core.optimizer.step_scalars(core.steps + 1, core.schedule.at(core.steps)) else {
            return Err(Error::invalid(op, format!("{} gives no step_scalars", core.optimizer.describe())));
        };
        gpu.deferred_words()?;
        let places = core.places()?;
        let word = || Array::zeros(&[1], (DType::I64, &device));
        let scalars = StepScalars {
            before: word(),
            number: word(),
            optimizer: Array::zeros(&[numbers.len()], (DType::F64, &device)),
        };
        let (graph, samples) = gpu.capture(|| queue(core, &scalars))?;
        Ok(Capture { graph, scalars, samples, places })
    }
    /// Returns an error if a buffer's address has changed since the capture.
    pub fn expect_places(&self, core: &mut Core) -> Result<()> {
        if core.places()? == self.places {
            return Ok(());
        }
        Err(Error::invalid(
            "replay",
            "the parameters or the optimizer's buffers are no longer where they were captured: drop what was taken of \
             them with value(), state() or last_gradient() before the next step, then capture again",
        ))
    }
    /// Writes the step's numbers into the GPU's memory and launches the capture.
    pub fn launch(&mut self, core: &mut Core) -> Result<()> {
        self.expect_places(core)?;
        let numbers = core.optimizer.step_scalars(core.steps + 1, core.schedule.at(core.steps)).unwrap_or_default();
        self.scalars.before.refill(&Array::from_slice(&[core.steps as i64], &[1])?)?;
        self.scalars.number.refill(&Array::from_slice(&[core.steps as i64 + 1], &[1])?)?;
        self.scalars.optimizer.refill(&Array::from_slice(&numbers, &[numbers.len()])?)?;
        self.graph.launch()
    }
}

impl Core {
    /// Addresses of gradients, optimizer buffers and parameters, after making sure that no other handles share them.
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
