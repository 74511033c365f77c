//! A gradient that is already summed: the factor of a parameter that was used as an ordinary tensor. It cannot separate samples, so that
//! only its sum is available.

use super::change::Change;
use super::{Factor, Kind, cpu, cuda};
use crate::array::Array;
use crate::autograd::Samples;
use crate::base::Result;
use crate::device::cuda::Gpu;
use crate::kernels::gemm::kernel::Kernels;
use std::sync::Arc;

/// The operand of a [`Factor::Dense`].
#[derive(Clone, Copy)]
pub(super) struct Dense<'a> {
    pub grad: &'a Array,
}

impl<'a> Kind<'a> for Dense<'a> {
    fn name(&self) -> &'static str {
        "dense"
    }
    fn values(&self) -> (&'a Array, Option<&'a Array>) {
        (self.grad, None)
    }
    fn owners(&self) -> Option<&'a Samples> {
        None
    }
    fn fits(&self, shape: &[usize]) -> bool {
        self.grad.shape() == shape
    }
    /// There are no rows to select, so the gradient is changed as a whole.
    fn changed(&self, change: &Change) -> Result<Factor> {
        Ok(Factor::Dense { grad: change.array(self.grad)? })
    }
    /// Adds the sum and ignores the weights.
    fn add<T: Kernels>(&self, _weights: Option<&[f64]>, out: &mut [T]) -> Result<()> {
        cpu::row_sum_add::<T>(self.grad.as_slice()?, None, 1, None, out);
        Ok(())
    }
    fn add_on(&self, gpu: &Arc<Gpu>, _weights: Option<&Array>, out: &Array) -> Result<()> {
        cuda::row_sum_add(gpu, (&self.grad.reshape(&[1, out.numel()])?, None), None, None, out)
    }
}
