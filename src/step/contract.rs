//! The contract slot: contracts a factored gradient into its stretch of the flat gradient, with the samples' weights applied on the way.

use super::shard::Buckets;
use crate::array::Array;
use crate::autograd::ParamGrad;
use crate::base::{DType, Result};
use crate::device::cuda::Gpu;
use crate::device::spans;
use crate::with_float;
use std::ops::Range;
use std::sync::Arc;

/// The target to which gradients are added.
pub(super) enum Target<'a> {
    /// One flat buffer.
    Whole(&'a mut Array),
    /// Buckets, each of which is summed over the ranks and freed as soon as it is complete.
    Buckets(Buckets<'a>),
}

impl Target<'_> {
    pub fn gpu(&self) -> Option<&Arc<Gpu>> {
        match self {
            Target::Whole(grads) => grads.gpu(),
            Target::Buckets(_) => None,
        }
    }
    pub fn dtype(&self) -> DType {
        match self {
            Target::Whole(grads) => grads.dtype(),
            Target::Buckets(buckets) => buckets.dtype(),
        }
    }
    /// Adds the gradient of the parameter at `range`; returns the totals of the squared norms in the fused form.
    pub fn add(&mut self, range: &Range<usize>, grad: &ParamGrad, w: Weights) -> Result<Vec<f64>> {
        match self {
            Target::Whole(grads) => add(grads, range, grad, w),
            Target::Buckets(buckets) => buckets.add(grad.param(), |grads, range| add(grads, range, grad, w)),
        }
    }
    /// Takes part in a microbatch of other ranks when this rank has none.
    pub fn idle(&mut self) -> Result<()> {
        match self {
            Target::Whole(_) => Ok(()),
            Target::Buckets(buckets) => buckets.idle(),
        }
    }
    /// Ends the backward pass of a microbatch: no more gradients follow.
    pub fn finish(&mut self) -> Result<()> {
        match self {
            Target::Whole(_) => Ok(()),
            Target::Buckets(buckets) => buckets.finish(),
        }
    }
}

/// The weights of the samples.
pub(super) enum Weights<'a> {
    /// All weights are 1.
    None,
    /// One weight per sample.
    Given(&'a [f64]),
    /// The clip factor of each sample's squared norm, which is the sum of that of this gradient and the given one.
    Clip(&'a [f64], &'a (dyn Fn(f64) -> f64 + Sync)),
    /// One weight per sample, in a GPU's memory.
    OnGpu(&'a Array),
}

/// Adds a gradient to its stretch of the flat buffer; returns the totals of the squared norms in the fused form.
fn add(grads: &mut Array, range: &Range<usize>, grad: &ParamGrad, w: Weights) -> Result<Vec<f64>> {
    spans::cost(grad.sum_flops(), grad.bytes() as f64);
    if grads.device().is_cuda() {
        let w = if let Weights::OnGpu(w) = w { Some(w) } else { None };
        grad.add_on(w, &grads.slice(0, range.clone())?)?;
        return Ok(Vec::new());
    }
    with_float!("step", grads.dtype(), |T| {
        let out = &mut grads.as_mut_slice::<T>()?[range.clone()];
        match w {
            Weights::None | Weights::OnGpu(_) => grad.add_sum::<T>(None, out)?,
            Weights::Given(w) => grad.add_weighted::<T>(w, out)?,
            Weights::Clip(base, f) => return grad.add_clipped::<T>(base, f, out),
        }
        Ok(Vec::new())
    })
}
