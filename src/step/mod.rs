//! The training step.
//!
//! ```text
//! collect → weigh  → contract → accumulate → reduce → noise → update
//! (norms)   (clip)   (GEMM)     (microbatch) (ranks)  (once)   (flat)
//! ```
//!
//! [`PlainStep`] and [`PrivateStep`] fix that order: noise cannot be added before clipping, and clipping cannot follow the sum. Gradients
//! are added to one flat buffer as soon as they are delivered, so that nothing is copied between backward and the optimizer. Everything
//! that is determined before the first step is in the step's [`Plan`].

mod capture;
mod contract;
mod core;
mod counters;
mod cuda;
mod flat;
mod noise;
mod plain;
mod plan;
mod privacy;
mod private;
mod reduce;
mod shard;
mod units;
mod update;
mod weigh;
mod zero_plan;

pub use self::core::Phases;
pub use capture::{CapturedPrivateStep, CapturedStep};
pub use flat::Flat;
pub use plain::{PlainStep, Report};
pub use plan::{Measurement, Plan, PlannedParam, Prediction, Retain};
pub use privacy::{Privacy, PrivacyConfig};
pub use private::{PrivateReport, PrivateStep};
pub use shard::Stage;
pub use zero_plan::{Load, Machine, ZeroPlan, zero_plan};

use self::core::{Collect, Context, Weighting};
use crate::array::Array;
use crate::autograd::{Param, Tensor};
use crate::base::Result;
use crate::dist::Communicator;
use crate::privacy::{ClipFn, ClipStyle, Thresholds};
use contract::Target;
use counters::Counters;
use plan::Clipping;

/// The common interface of [`PlainStep`] and [`PrivateStep`], for code that works with either.
pub trait TrainStep {
    /// Number of steps taken.
    fn steps(&self) -> u64;
    /// The flat parameters.
    fn flat(&self) -> &Flat;
    /// The plan, which is determined before the first step.
    fn plan(&self) -> &Plan;
    /// The gradient of the last step as the optimizer received it, flat; only this rank's stretch if ranks share the model's state.
    fn last_gradient(&self) -> &Array;
    /// Sets the optimizer's first moment (its first buffer: Adam's m, SGD's momentum) to zero and keeps the rest, which is
    /// recommended when training goes from public to private data (Bu et al. 2024).
    fn reset_first_moment(&mut self) -> Result<()>;
    /// The ranks that perform the steps together, if there are several.
    fn ranks(&self) -> Option<&dyn Communicator>;
    /// The privacy of a private step; `None` for a plain one.
    fn accounting(&self) -> Option<&Privacy> {
        None
    }
    /// All state that a checkpoint needs besides the parameters: named flat buffers.
    fn state(&self) -> Vec<(&'static str, Array)>;
    /// [`TrainStep::state`] with complete optimizer buffers if the ranks share them; every rank must call it. A checkpoint of it can be
    /// resumed at any number of ranks and any [`Stage`].
    fn whole_state(&self) -> Result<Vec<(&'static str, Array)>>;
    /// Gathers all parameters if ranks share them ([`Stage::Parameters`]): they stay complete on every rank until the next step. Every rank
    /// must call it before one of them saves or evaluates the model alone. At other stages it does nothing.
    fn gather_parameters(&self) -> Result<()>;
    /// Resumes from a checkpoint taken after `steps` steps, with the result of [`TrainStep::state`] or [`TrainStep::whole_state`] at that
    /// time.
    fn restore(&mut self, steps: u64, state: &[(String, Array)]) -> Result<()>;
}

/// The sum of clipped per-sample gradients of `losses` (one per sample), without noise: what a private step computes before it adds noise.
/// It is not private, and meant for research and checks. Returns one gradient per trainable parameter, in the order given.
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
    let mut grads = Array::zeros(&[flat.numel()], (flat.dtype(), &device));
    let counters = device.gpu().map(Counters::new).transpose()?;
    let plan = Plan::new(&flat, Some(&clipping), 0);
    let context = Context { flat: &flat, plan: &plan, counters: counters.as_ref(), grads: Target::Whole(&mut grads) };
    let mut clipper = clipping.collector(context);
    clipper.begin(losses.numel(), None);
    losses.backward_into(&mut clipper)?;
    clipper.finish()?;
    drop(clipper);
    flat.segments()
        .iter()
        .zip(flat.params())
        .map(|(s, p)| grads.slice(0, s.range.clone())?.reshape(p.shape()).map(|a| a.copy()))
        .collect()
}
