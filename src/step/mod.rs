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

mod flat;
mod private;
mod weigh;

pub use flat::Flat;
pub use private::{Privacy, PrivacyConfig};

use crate::autograd::{GradHook, Param, ParamGrad, Tensor};
use crate::error::{Error, Result};
use crate::optim::{Optimizer, Schedule};
use crate::privacy::{ClipFn, ClipStyle};
use crate::tensor::Array;
use weigh::{Clipping, Weigh};

/// What one step did.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// Steps taken so far, this one included.
    pub step: u64,
    /// Mean loss over the samples of this step; NaN if there were none. Not private: it looks at the data.
    pub loss: f64,
    /// Samples of this step.
    pub samples: usize,
    /// Learning rate used.
    pub lr: f64,
    /// Samples whose gradient was not finite and that were left out (private training only).
    pub non_finite: usize,
    /// Share of (sample, group) pairs whose norm exceeded the threshold (private training only).
    pub clipped: f64,
    /// ε spent so far at the configured δ, rounded up (private training only); [`Privacy::epsilon`] is exact.
    pub epsilon: Option<f64>,
}

/// One training step over fixed parameters: forward and backward over microbatches, then one update.
pub struct TrainStep {
    flat: Flat,
    grads: Array,
    state: Vec<Array>,
    optimizer: Box<dyn Optimizer>,
    schedule: Schedule,
    steps: u64,
    privacy: Option<Privacy>,
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
        let zeros = || Array::zeros(&[flat.numel()], flat.dtype());
        let (grads, state) = (zeros(), optimizer.slots().iter().map(|_| zeros()).collect());
        let mut privacy = privacy;
        if let Some(p) = &mut privacy {
            p.plan(flat.params())?;
        }
        Ok(TrainStep { flat, grads, state, optimizer, schedule, steps: 0, privacy })
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
    pub fn next_batch(&self) -> Result<Vec<usize>> {
        match &self.privacy {
            Some(p) => Ok(p.batch(self.steps)),
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
        mut forward: impl FnMut(B) -> Result<Tensor>,
    ) -> Result<StepReport> {
        let epsilon = match &mut self.privacy {
            Some(p) => Some(p.admit(self.steps)?),
            None => None,
        };
        zero(&mut self.grads)?;
        let (mut loss_sum, mut samples) = (0.0, 0);
        let mut weigh = match &self.privacy {
            Some(p) => Weigh::private(&self.flat, &mut self.grads, p.clipping()),
            None => Weigh::plain(&self.flat, &mut self.grads),
        };
        for batch in microbatches {
            let losses = forward(batch)?;
            if losses.rank() != 1 {
                return Err(Error::shape(
                    "TrainStep::run",
                    format!("the forward pass must return one loss per sample, [B]; got {:?}", losses.shape()),
                ));
            }
            if losses.numel() == 0 {
                continue;
            }
            let values = losses.array().to_f64();
            if self.privacy.is_none()
                && let Some(i) = values.iter().position(|l| !l.is_finite())
            {
                return Err(Error::invalid(
                    "TrainStep::run",
                    format!(
                        "step {}: the loss of sample {} is {}; the parameters are as the last step left them. Look for NaN \
                         or infinity in that sample, or lower the learning rate",
                        self.steps + 1,
                        samples + i,
                        values[i]
                    ),
                ));
            }
            loss_sum += values.iter().sum::<f64>();
            samples += losses.numel();
            weigh.begin(losses.numel());
            losses.backward_into(&mut weigh)?;
            drop(losses);
            weigh.finish()?;
        }
        let (clipped, non_finite) = weigh.statistics();
        let lr = self.schedule.at(self.steps);
        let scale = match &self.privacy {
            Some(p) => {
                p.add_noise(self.steps, &mut self.grads)?;
                1.0 / p.expected_batch()
            }
            None if samples == 0 => {
                return Err(Error::invalid("TrainStep::run", "no samples: a plain step needs at least one"));
            }
            None => 1.0 / samples as f64,
        };
        scale_by(&mut self.grads, scale)?;
        let segments = self.flat.segments().to_vec();
        let (optimizer, state, grads, t) = (&self.optimizer, &mut self.state, &self.grads, self.steps + 1);
        self.flat.update(|p| optimizer.update(t, lr, p, grads, state, &segments))?;
        self.steps += 1;
        Ok(StepReport {
            step: self.steps,
            loss: if samples == 0 { f64::NAN } else { loss_sum / samples as f64 },
            samples,
            lr,
            non_finite,
            clipped,
            epsilon,
        })
    }
    /// The gradient of the last step as the optimizer saw it, flat.
    pub fn last_gradient(&self) -> &Array {
        &self.grads
    }
    /// Everything a checkpoint needs besides the parameters: named flat buffers.
    pub fn state(&self) -> Vec<(&'static str, Array)> {
        self.optimizer.slots().iter().copied().zip(self.state.iter().cloned()).collect()
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
            *buffer = found.1.copy();
        }
        self.steps = steps;
        if let Some(p) = &mut self.privacy {
            p.restore(steps);
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
    style: ClipStyle,
    clip: ClipFn,
    threshold: f64,
) -> Result<Vec<Array>> {
    clip.validate()?;
    let flat = Flat::new(params)?;
    let clipping = Clipping::new(style, clip, threshold, flat.params())?;
    let mut grads = Array::zeros(&[flat.numel()], flat.dtype());
    let mut weigh = Weigh::private(&flat, &mut grads, &clipping);
    weigh.begin(losses.numel());
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

fn zero(a: &mut Array) -> Result<()> {
    crate::with_float!("TrainStep", a.dtype(), T => {
        crate::device::cpu::elementwise::for_each_mut(a.as_mut_slice::<T>()?, |_| <T as crate::Float>::ZERO);
        Ok(())
    })
}

fn scale_by(a: &mut Array, s: f64) -> Result<()> {
    crate::with_float!("TrainStep", a.dtype(), T => {
        let s = <T as crate::Element>::from_f64(s);
        crate::device::cpu::elementwise::for_each_mut(a.as_mut_slice::<T>()?, move |x: T| x * s);
        Ok(())
    })
}
