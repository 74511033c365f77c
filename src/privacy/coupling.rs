//! Public and private data in one step.
//!
//! A private step draws its own records; public data are handed to
//! [`PrivateStep::run_coupled`](crate::step::PrivateStep::run_coupled) in a [`Public`], by which the caller asserts that anybody
//! may see them. Data that are not asserted to be public do not compile:
//!
//! ```compile_fail
//! # use prismgrad::{privacy::Weight, step::PrivateStep, Result, Tensor};
//! # fn losses(p: &[usize], q: &[usize]) -> Result<Tensor> { unimplemented!() }
//! fn wrong(step: &mut PrivateStep, data: Vec<usize>) -> Result<()> {
//!     step.run_coupled(32, data, Weight::private(0.5)?, losses)?; // not Public
//!     Ok(())
//! }
//! ```

use crate::base::{Error, Result};
use std::ops::Deref;

/// Data that the caller asserts to be public.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Public<T>(pub T);

impl<T> Deref for Public<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

/// The private part's share α of a coupled gradient g = α·g_private + (1 − α)·g_public.
///
/// Papers differ: coupling public and private gradients weighs the *private* gradient with α, pre-training with limited public
/// data (Bu et al. 2024) the *public* one. Each has its constructor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weight(f64);

impl Weight {
    /// α in [0, 1] on the private gradient.
    pub fn private(alpha: f64) -> Result<Weight> {
        if !(0.0..=1.0).contains(&alpha) {
            return Err(Error::privacy(format!("a weight of {alpha}; it must lie in [0, 1]")));
        }
        Ok(Weight(alpha))
    }
    /// α in [0, 1] on the public gradient.
    pub fn public(alpha: f64) -> Result<Weight> {
        Weight::private(alpha).map(|_| Weight(1.0 - alpha))
    }
    /// Of the private gradient.
    pub fn of_private(self) -> f64 {
        self.0
    }
    /// Of the public gradient.
    pub fn of_public(self) -> f64 {
        1.0 - self.0
    }
    /// From `from` to `to` in a straight line over `steps` steps: the weight at `step` (0 first).
    pub fn linear(from: Weight, to: Weight, step: u64, steps: u64) -> Weight {
        let t = if steps <= 1 { 1.0 } else { (step as f64 / (steps - 1) as f64).min(1.0) };
        Weight(from.0 + (to.0 - from.0) * t)
    }
    /// The weight that gains most where both kinds of data come from one distribution (Bu et al. 2024, section on mixing):
    ///
    /// public share = 1/(1 + (1/c)·[tr(HΣ)·B₁/B₀]/[tr(HΣ) + σ²·tr(H)/(B₁c²)]),
    ///
    /// with B₁ private and B₀ public samples, c the mean clip factor, σ the noise's standard deviation in units of the clipped
    /// gradients' sensitivity. Always strictly between 0 and 1.
    pub fn best(q: &Mixture) -> Result<Weight> {
        let all = [q.clip, q.trace_h_sigma, q.trace_h, q.private_batch, q.public_batch];
        if !(all.iter().all(|x| x.is_finite() && *x > 0.0) && q.noise.is_finite() && q.noise >= 0.0) {
            return Err(Error::privacy(format!("{q:?}: all quantities must be positive")));
        }
        let noise = q.noise * q.noise * q.trace_h / (q.private_batch * q.clip * q.clip);
        let ratio = q.trace_h_sigma * q.private_batch / q.public_batch / (q.trace_h_sigma + noise) / q.clip;
        Weight::public(1.0 / (1.0 + ratio))
    }
}

/// What [`Weight::best`] depends on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mixture {
    /// c = E(Cᵢ), the mean clip factor.
    pub clip: f64,
    /// tr(HΣ), Hessian times covariance of per-sample gradients.
    pub trace_h_sigma: f64,
    /// tr(H).
    pub trace_h: f64,
    /// σ, the noise's standard deviation over the sensitivity (1 for AUTO with R = 1).
    pub noise: f64,
    /// B₁.
    pub private_batch: f64,
    /// B₀.
    pub public_batch: f64,
}
