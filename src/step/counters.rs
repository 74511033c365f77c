//! Losses and clipped pairs of a step. A GPU sums them in its own memory (`cuda/step.cu`), so that no step waits for the device; they are
//! read when a report's methods are called.

use super::cuda;
use crate::array::Array;
use crate::base::{DType, Error, Result};
use crate::device::cuda::{Gpu, layouts};
use std::mem::offset_of;
use std::sync::{Arc, OnceLock};

/// Number of words of the counters, and the positions of some of them.
const WORDS: usize = size_of::<layouts::StepCounters>() / 8;
const STOP: usize = offset_of!(layouts::StepCounters, stop) / 8;
const TALLY: usize = offset_of!(layouts::StepCounters, pairs) / 8;

/// Counts of clipped (sample, group) pairs.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Tally {
    pub pairs: u64,
    pub clipped: u64,
    pub non_finite: u64,
}

impl Tally {
    /// Share of clipped pairs.
    pub fn share(&self) -> f64 {
        self.clipped as f64 / self.pairs.max(1) as f64
    }
}

/// Sums and counts of the current step, in the memory of a GPU.
pub(crate) struct Counters(Array);

impl Counters {
    pub fn new(gpu: &Arc<Gpu>) -> Result<Counters> {
        Ok(Counters(Array::zeros(&[WORDS], (DType::I64, gpu))))
    }
    /// Clears sums and counts at the start of a step. A stop flag is kept.
    pub fn begin(&self) -> Result<()> {
        let (block, at) = self.0.block("step")?;
        block.gpu().fill(block, at, 8, 0)?;
        block.gpu().fill(block, at + 8 * TALLY, 24, 0)
    }
    /// The three counters of clipped pairs.
    pub fn tally(&self) -> Result<Array> {
        self.0.slice(0, TALLY..TALLY + 3)
    }
    /// The stop flag, which is not 0 after a non-finite loss.
    pub fn stop(&self) -> Result<Array> {
        self.0.slice(0, STOP..STOP + 1)
    }
    /// Adds the losses of a microbatch whose first sample is number `before`; with `guard`, a non-finite loss stops training. The step's
    /// number is `step`, or is read from `number` if a captured step is replayed.
    pub fn losses(
        &self,
        losses: &Array,
        before: usize,
        (step, number): (u64, Option<&Array>),
        guard: bool,
    ) -> Result<()> {
        let Some(gpu) = losses.gpu() else {
            return Err(Error::device("step", "the losses are on the CPU, the parameters on a GPU"));
        };
        cuda::losses(gpu, &losses.contiguous(), before, &self.0, (step, number), guard)
    }
    /// Memory for a copy of the counters.
    pub fn room(&self) -> Result<Array> {
        Array::uninit_on(self.0.block("step")?.0.gpu(), &[WORDS], DType::I64)
    }
    /// A copy of the counters, in memory from [`Counters::room`], as they will be when all work queued so far has run.
    pub fn snapshot(&self, copy: Array) -> Result<Snapshot> {
        let (from, at) = self.0.block("step")?;
        let (to, to_at) = copy.block("step")?;
        from.gpu().copy(to, to_at, from, at, 8 * WORDS)?;
        Ok(Snapshot { copy, words: OnceLock::new() })
    }
}

/// The counters after a step, read on demand.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    copy: Array,
    words: OnceLock<Vec<i64>>,
}

impl Snapshot {
    /// The sum of the losses and the counts of clipped pairs. Waits for the step. After a non-finite loss it returns an error from then on.
    pub fn read(&self) -> Result<(f64, Tally)> {
        let w = match self.words.get() {
            Some(w) => w,
            None => {
                let w = self.copy.to_vec::<i64>()?;
                self.words.get_or_init(|| w)
            }
        };
        let float = |w: i64| f64::from_bits(w as u64);
        if w[STOP] != 0 {
            return Err(not_finite(w[STOP] as u64, w[STOP + 1] as usize, float(w[STOP + 2])));
        }
        let [pairs, clipped, non_finite] = std::array::from_fn(|k| w[TALLY + k] as u64);
        Ok((float(w[0]), Tally { pairs, clipped, non_finite }))
    }
}

/// The error for a non-finite loss in a plain step.
pub(crate) fn not_finite(step: u64, sample: usize, value: f64) -> Error {
    Error::invalid(
        "run",
        format!(
            "step {step}: the loss of sample {sample} is {value}; the parameters are as the last step left them. Look for \
             NaN or infinity in that sample, or lower the learning rate"
        ),
    )
}
