//! The contracting slot: a factored gradient becomes a stretch of the flat gradient, samples weighted as it is formed.

use crate::array::Array;
use crate::autograd::ParamGrad;
use crate::base::Result;
use crate::device::spans;
use crate::with_float;
use std::ops::Range;

/// The weights of the samples.
pub(super) enum Weights<'a> {
    /// All 1.
    None,
    /// One per sample.
    Given(&'a [f64]),
    /// The clip factor of the sample's squared norm, which is that of this gradient and of what is given together.
    Clip(&'a [f64], &'a (dyn Fn(f64) -> f64 + Sync)),
    /// One per sample, in a GPU's memory.
    OnGpu(&'a Array),
}

/// Adds a gradient to its stretch of the flat buffer; returns the norms' totals of the fused form.
pub(super) fn add(grads: &mut Array, range: &Range<usize>, grad: &ParamGrad, w: Weights) -> Result<Vec<f64>> {
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
