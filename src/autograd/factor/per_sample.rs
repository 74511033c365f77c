//! Gradients that are separate already: the factor of a parameter that was broadcast over the sample axis.

use super::change::Change;
use super::cuda::{self, Parts};
use super::{Factor, Kind, Norm, cpu};
use crate::array::Array;
use crate::autograd::Samples;
use crate::base::Result;
use crate::device::cuda::Gpu;
use crate::kernels::gemm::kernel::Kernels;
use crate::kernels::gemm::norms::{self, Bounded, toward_zero};
use std::ops::Range;
use std::sync::Arc;

/// The operand of a [`Factor::PerSample`].
#[derive(Clone, Copy)]
pub(super) struct PerSample<'a> {
    pub grads: &'a Array,
}

impl<'a> Kind<'a> for PerSample<'a> {
    fn name(&self) -> &'static str {
        "per-sample"
    }
    fn values(&self) -> (&'a Array, Option<&'a Array>) {
        (self.grads, None)
    }
    fn owners(&self) -> Option<&'a Samples> {
        None
    }
    fn count(&self) -> Option<usize> {
        self.grads.shape().first().copied()
    }
    fn fits(&self, shape: &[usize]) -> bool {
        self.grads.rank() == shape.len() + 1 && &self.grads.shape()[1..] == shape
    }
    fn changed(&self, change: &Change) -> Result<Factor> {
        Ok(Factor::PerSample { grads: change.array(self.grads)? })
    }

    fn add<T: Kernels>(&self, weights: Option<&[f64]>, out: &mut [T]) -> Result<()> {
        let w: Option<Vec<T>> = weights.map(|w| w.iter().map(|&w| toward_zero(w)).collect());
        cpu::row_sum_add::<T>(self.grads.as_slice()?, None, self.grads.shape()[0], w.as_deref(), out);
        Ok(())
    }
    fn norm<T: Kernels>(&self, i: usize, numel: usize) -> Result<Norm> {
        let sq = norms::sum_sq(&self.grads.as_slice::<T>()?[i * numel..(i + 1) * numel]);
        Ok(Norm { sq: Bounded { value: sq, error: 0.0 }, reach: sq.sqrt(), rows: 1 })
    }
    /// A gradient is added in one piece, so there are no partial sums.
    fn chain(&self) -> usize {
        0
    }
    fn sample_add<T: Kernels>(&self, i: usize, out: &mut [T]) -> Result<()> {
        let g = &self.grads.as_slice::<T>()?[i * out.len()..(i + 1) * out.len()];
        out.iter_mut().zip(g).for_each(|(o, &g)| *o += g);
        Ok(())
    }

    fn add_on(&self, gpu: &Arc<Gpu>, weights: Option<&Array>, out: &Array) -> Result<()> {
        let rows = self.grads.reshape(&[self.grads.shape()[0], out.numel()])?;
        cuda::row_sum_add(gpu, (&rows, None), None, weights, out)
    }
    fn add_reach_on(&self, gpu: &Arc<Gpu>, reach: &Array) -> Result<()> {
        let b = self.grads.shape()[0];
        let rows = self.grads.reshape(&[b, self.grads.numel().checked_div(b).unwrap_or(0)])?;
        cuda::add_reach(gpu, (&rows, None), None, None, reach)
    }
    fn norm_parts(&self, gpu: &Arc<Gpu>) -> Result<Option<Parts>> {
        let b = self.grads.shape()[0];
        let rows = self.grads.reshape(&[b, self.grads.numel().checked_div(b).unwrap_or(0)])?;
        cuda::each_row_parts(gpu, &rows).map(Some)
    }
    fn form_on(&self, _gpu: &Arc<Gpu>, range: Range<usize>, out: &mut Array) -> Result<bool> {
        let numel = out.shape()[1];
        out.add_in_place(&self.grads.reshape(&[self.grads.shape()[0], numel])?.slice(0, range)?)?;
        Ok(true)
    }
}
