//! Public and private data in one step.
//!
//! A private step draws its own records; public data are passed to [`PrivateStep::run_coupled`](crate::step::PrivateStep::run_coupled) in a
//! [`Public`], by which the caller asserts that anyone may see them. Passing data without this assertion does not compile:
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
/// Papers differ in their convention: in coupled gradients α weights the *private* gradient, in pre-training with limited public data (Bu
/// et al. 2024) the *public* one. Each convention has its constructor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weight(f64);

impl Weight {
    /// The weight α in [0, 1] on the private gradient.
    pub fn private(alpha: f64) -> Result<Weight> {
        if !(0.0..=1.0).contains(&alpha) {
            return Err(Error::privacy(format!("a weight of {alpha}; it must lie in [0, 1]")));
        }
        Ok(Weight(alpha))
    }
    /// The weight α in [0, 1] on the public gradient.
    pub fn public(alpha: f64) -> Result<Weight> {
        Weight::private(alpha).map(|_| Weight(1.0 - alpha))
    }
    /// The weight of the private gradient.
    pub fn of_private(self) -> f64 {
        self.0
    }
    /// The weight of the public gradient.
    pub fn of_public(self) -> f64 {
        1.0 - self.0
    }
    /// Linear interpolation from `from` to `to` over `steps` steps: the weight at `step` (counted from 0).
    pub fn linear(from: Weight, to: Weight, step: u64, steps: u64) -> Weight {
        let t = if steps <= 1 { 1.0 } else { (step as f64 / (steps - 1) as f64).min(1.0) };
        Weight(from.0 + (to.0 - from.0) * t)
    }
    /// The weight with the largest gain if both kinds of data come from one distribution (Bu et al. 2024, section on mixing):
    ///
    /// public share = 1/(1 + (1/c)·[tr(HΣ)·B₁/B₀]/[tr(HΣ) + σ²·tr(H)/(B₁c²)]),
    ///
    /// with B₁ private and B₀ public samples, c the mean clip factor, and σ the standard deviation of the noise in units of the sensitivity
    /// of the clipped sum. The result is always strictly between 0 and 1.
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

/// The inputs of [`Weight::best`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mixture {
    /// c = E(Cᵢ), the mean clip factor.
    pub clip: f64,
    /// tr(HΣ), the trace of the Hessian times the covariance of per-sample gradients.
    pub trace_h_sigma: f64,
    /// tr(H), the trace of the Hessian.
    pub trace_h: f64,
    /// σ, the standard deviation of the noise divided by the sensitivity (which is 1 for AUTO with R = 1).
    pub noise: f64,
    /// B₁, the number of private samples.
    pub private_batch: f64,
    /// B₀, the number of public samples.
    pub public_batch: f64,
}
