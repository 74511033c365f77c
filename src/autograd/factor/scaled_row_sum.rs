//! Σₙ gradₙ ⊙ scaleₙ: the factor of the gain of a normalization.

use super::change::Change;
use super::cuda::{self, Parts};
use super::{Factor, Kind, Norm, cpu, is_rows, width};
use crate::array::Array;
use crate::autograd::Samples;
use crate::base::Result;
use crate::device::cuda::Gpu;
use crate::kernels::gemm::kernel::Kernels;
use std::ops::Range;
use std::sync::Arc;

/// The operands of a [`Factor::ScaledRowSum`].
#[derive(Clone, Copy)]
pub(super) struct ScaledRowSum<'a> {
    pub grad: &'a Array,
    pub scale: &'a Array,
    pub samples: &'a Samples,
}

impl<'a> Kind<'a> for ScaledRowSum<'a> {
    fn name(&self) -> &'static str {
        "scaled row sum"
    }
    fn values(&self) -> (&'a Array, Option<&'a Array>) {
        (self.grad, Some(self.scale))
    }
    fn owners(&self) -> Option<&'a Samples> {
        Some(self.samples)
    }
    fn fits(&self, shape: &[usize]) -> bool {
        let numel = shape.iter().product::<usize>();
        [self.grad, self.scale].iter().all(|a| is_rows(a, self.samples) && width(a) == numel)
    }
    fn changed(&self, change: &Change) -> Result<Factor> {
        Ok(Factor::ScaledRowSum {
            grad: change.array(self.grad)?,
            scale: change.array(self.scale)?,
            samples: change.samples(self.samples)?,
        })
    }

    fn add<T: Kernels>(&self, weights: Option<&[f64]>, out: &mut [T]) -> Result<()> {
        let w = cpu::row_weights(weights, self.samples);
        let (grad, scale) = (self.grad.as_slice()?, self.scale.as_slice()?);
        cpu::row_sum_add::<T>(grad, Some(scale), self.samples.rows(), w.as_deref(), out);
        Ok(())
    }
    fn norm<T: Kernels>(&self, i: usize, numel: usize) -> Result<Norm> {
        let r = self.samples.range(i);
        let reach = cpu::row_reach(
            cpu::rows(self.grad.as_slice::<T>()?, width(self.grad), &r),
            Some(cpu::rows(self.scale.as_slice::<T>()?, width(self.scale), &r)),
            r.len(),
        );
        Ok(Norm { sq: super::formed(numel, |x: &mut [T]| self.sample_add(i, x))?, reach, rows: r.len() })
    }
    fn forms_as_it_sums(&self) -> bool {
        true
    }

    fn add_on(&self, gpu: &Arc<Gpu>, weights: Option<&Array>, out: &Array) -> Result<()> {
        cuda::row_sum_add(gpu, (self.grad, Some(self.scale)), Some(self.samples), weights, out)
    }
    fn add_reach_on(&self, gpu: &Arc<Gpu>, reach: &Array) -> Result<()> {
        cuda::add_reach(gpu, (self.grad, None), Some(self.scale), Some(self.samples), reach)
    }
    fn norm_parts(&self, gpu: &Arc<Gpu>) -> Result<Option<Parts>> {
        cuda::row_parts(gpu, (self.grad, Some(self.scale)), &self.samples.on_gpu(gpu)?).map(Some)
    }
    fn form_on(&self, gpu: &Arc<Gpu>, range: Range<usize>, out: &mut Array) -> Result<bool> {
        let Samples::Uniform { each, .. } = self.samples else { return Ok(false) };
        cuda::row_sum_form(gpu, (self.grad, Some(self.scale)), *each, range, out)?;
        Ok(true)
    }
}
