//! Optimizers over flat parameters, and learning-rate schedules.
//!
//! An optimizer receives one flat buffer that holds every parameter of one dtype, its gradient in the same layout, and the stretches to
//! which weight decay applies. A step is one pass over memory, whatever the number of parameters.

mod adamw;
mod cuda;
mod schedule;
mod sgd;

pub use adamw::AdamW;
pub use schedule::Schedule;
pub use sgd::Sgd;

use crate::array::Array;
use crate::base::{DType, Error, Result};
use crate::device::Device;
use crate::device::cuda::Gpu;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

/// A stretch of the flat buffer: one parameter.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Its elements in the flat buffer.
    pub range: Range<usize>,
    /// Whether weight decay applies: to matrices and higher ranks, not to biases and norm gains.
    pub decay: bool,
}

/// The stretches of a flat buffer.
#[derive(Debug)]
pub struct FlatLayout {
    segments: Vec<Segment>,
    pieces: Vec<(Range<usize>, bool)>,
    /// End (i64) and decay flag (u8) of each piece, in a GPU's memory.
    table: OnceLock<(Array, Array)>,
}

impl FlatLayout {
    /// Consecutive segments in a buffer of `n` elements; elements after the last segment are not decayed.
    pub fn new(segments: Vec<Segment>, n: usize) -> FlatLayout {
        let pieces = pieces(n, &segments);
        FlatLayout { segments, pieces, table: OnceLock::new() }
    }
    /// The stretches, one per parameter.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }
    /// The longest stretches over which the decay flag is constant: (elements, decayed).
    pub fn pieces(&self) -> &[(Range<usize>, bool)] {
        &self.pieces
    }
    pub(super) fn table(&self, gpu: &Arc<Gpu>) -> Result<&(Array, Array)> {
        if let Some(t) = self.table.get() {
            return Ok(t);
        }
        let device = Device::Cuda(gpu.clone());
        let n = self.pieces.len();
        let ends: Vec<i64> = self.pieces.iter().map(|(r, _)| r.end as i64).collect();
        let decays: Vec<u8> = self.pieces.iter().map(|(_, d)| *d as u8).collect();
        let table = (Array::from_slice(&ends, &[n])?.to(&device)?, Array::from_slice(&decays, &[n])?.to(&device)?);
        Ok(self.table.get_or_init(|| table))
    }
}

/// The arguments of one update. `params`, `grads` and every buffer of `state` are flat, of one size, dtype (f32 or f64) and device.
pub struct Update<'a> {
    /// Number of the step, counted from 1.
    pub step: u64,
    /// Learning rate.
    pub lr: f64,
    /// The parameters, changed in place.
    pub params: &'a mut Array,
    /// The gradient.
    pub grads: &'a Array,
    /// The optimizer's own buffers, in the order of [`Optimizer::slots`].
    pub state: &'a mut [Array],
    /// The position of each parameter.
    pub layout: &'a FlatLayout,
    pub(crate) gpu: GpuUpdate<'a>,
}

/// The parts of an update that only a GPU uses.
#[derive(Clone, Copy, Default)]
pub(crate) struct GpuUpdate<'a> {
    /// The values of [`Optimizer::step_scalars`] for this step, in the GPU's memory, so that a captured step can be replayed.
    pub scalars: Option<&'a Array>,
    /// A flag in GPU memory: if it is not 0, nothing is updated.
    pub stop: Option<&'a Array>,
}

impl<'a> Update<'a> {
    /// An update outside a [`TrainStep`](crate::step::TrainStep).
    pub fn new(
        (step, lr): (u64, f64),
        params: &'a mut Array,
        grads: &'a Array,
        state: &'a mut [Array],
        layout: &'a FlatLayout,
    ) -> Self {
        Update { step, lr, params, grads, state, layout, gpu: GpuUpdate::default() }
    }
    /// Checks the buffers against each other; returns their GPU, if they are on one.
    fn expect(&self, op: &'static str, state: &[&'static str]) -> Result<Option<Arc<Gpu>>> {
        let alike = |a: &Array| {
            a.shape() == self.params.shape() && a.dtype() == self.params.dtype() && a.device() == self.params.device()
        };
        if self.state.len() != state.len() || !self.state.iter().all(alike) || !alike(self.grads) {
            let p = &self.params;
            let message = format!(
                "needs gradients and its buffers {state:?} like the parameters: {:?} {} on {}",
                p.shape(),
                p.dtype(),
                p.device()
            );
            return Err(Error::invalid(op, message));
        }
        if !matches!(self.params.dtype(), DType::F32 | DType::F64) {
            return Err(Error::dtype(op, format!("parameters are {}; f32 or f64 are updated", self.params.dtype())));
        }
        Ok(self.params.gpu().cloned())
    }
}

/// Updates flat parameters from flat gradients.
pub trait Optimizer: Send {
    /// Name and hyper-parameters, which run folders record.
    fn describe(&self) -> String;
    /// Returns an error for invalid hyper-parameters that names them and their valid range. A step calls it when it is made, before
    /// anything is counted.
    fn validate(&self) -> Result<()> {
        Ok(())
    }
    /// Names of the state buffers; each has the size of the parameters.
    fn slots(&self) -> &'static [&'static str];
    /// Performs one step.
    fn update(&self, u: Update) -> Result<()>;
    /// The numbers that change from step to step; the optimizer's kernel reads them from memory when a captured step is replayed. An
    /// optimizer without such a kernel returns `None`, and its steps cannot be captured.
    fn step_scalars(&self, _step: u64, _lr: f64) -> Option<Vec<f64>> {
        None
    }
}

/// Splits `0..n` so that the decay flag is constant in each piece: (piece, decayed).
fn pieces(n: usize, segments: &[Segment]) -> Vec<(Range<usize>, bool)> {
    let mut out: Vec<(Range<usize>, bool)> = Vec::new();
    for s in segments {
        match out.last_mut() {
            Some((r, d)) if *d == s.decay && r.end == s.range.start => r.end = s.range.end,
            _ => out.push((s.range.clone(), s.decay)),
        }
    }
    if out.last().is_none_or(|(r, _)| r.end < n) {
        out.push((out.last().map_or(0, |(r, _)| r.end)..n, false));
    }
    out
}

/// Returns an error for a hyper-parameter unless it is `ok`; `range` describes the valid range.
pub(crate) fn check(op: &'static str, name: &str, v: f64, ok: bool, range: &str) -> Result<()> {
    if ok { Ok(()) } else { Err(Error::invalid(op, format!("{name} = {v} is out of range; it must {range}"))) }
}
