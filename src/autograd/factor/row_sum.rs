//! Σₙ gradₙ: the factor of a bias.

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

/// The operands of a [`Factor::RowSum`].
#[derive(Clone, Copy)]
pub(super) struct RowSum<'a> {
    pub grad: &'a Array,
    pub samples: &'a Samples,
}

impl<'a> Kind<'a> for RowSum<'a> {
    fn name(&self) -> &'static str {
        "row sum"
    }
    fn values(&self) -> (&'a Array, Option<&'a Array>) {
        (self.grad, None)
    }
    fn owners(&self) -> Option<&'a Samples> {
        Some(self.samples)
    }
    fn fits(&self, shape: &[usize]) -> bool {
        is_rows(self.grad, self.samples) && width(self.grad) == shape.iter().product::<usize>()
    }
    fn changed(&self, change: &Change) -> Result<Factor> {
        Ok(Factor::RowSum { grad: change.array(self.grad)?, samples: change.samples(self.samples)? })
    }

    fn add<T: Kernels>(&self, weights: Option<&[f64]>, out: &mut [T]) -> Result<()> {
        let w = cpu::row_weights(weights, self.samples);
        cpu::rows_add::<T>(self.grad, w.as_deref(), out)
    }
    fn norm<T: Kernels>(&self, i: usize, numel: usize) -> Result<Norm> {
        let r = self.samples.range(i);
        let reach = cpu::row_reach(&cpu::wide_rows::<T>(self.grad, &r)?, None, r.len());
        Ok(Norm { sq: super::formed(numel, |x: &mut [T]| self.sample_add(i, x))?, reach, rows: r.len() })
    }
    fn forms_as_it_sums(&self) -> bool {
        true
    }

    fn add_on(&self, gpu: &Arc<Gpu>, weights: Option<&Array>, out: &Array) -> Result<()> {
        cuda::row_sum_add(gpu, (self.grad, None), Some(self.samples), weights, out)
    }
    fn norm_parts(&self, gpu: &Arc<Gpu>) -> Result<Option<Parts>> {
        cuda::row_parts(gpu, (self.grad, None), &self.samples.on_gpu(gpu)?).map(Some)
    }
    fn form_on(&self, gpu: &Arc<Gpu>, range: Range<usize>, out: &mut Array) -> Result<bool> {
        let Samples::Uniform { each, .. } = self.samples else { return Ok(false) };
        cuda::row_sum_form(gpu, (self.grad, None), *each, range, out)?;
        Ok(true)
    }
}
