//! Row `ids[n]` of the parameter receives gradₙ: the factor of an embedding, and of a bias for each group of rows.

use super::change::Change;
use super::cuda::{self, Parts, Side};
use super::{Factor, Kind, Norm, cpu, is_rows, width};
use crate::array::Array;
use crate::array::cuda::on;
use crate::autograd::Samples;
use crate::base::{DType, Result};
use crate::device::cuda::{Gpu, layouts};
use crate::kernels::gemm::kernel::Kernels;
use crate::kernels::gemm::norms::Bounded;
use std::sync::Arc;

/// The operands of a [`Factor::Lookup`].
#[derive(Clone, Copy)]
pub(super) struct Lookup<'a> {
    pub ids: &'a Array,
    pub grad: &'a Array,
    pub samples: &'a Samples,
}

impl Lookup<'_> {
    /// The ids and the gradients of sample `i`.
    fn rows_of<T: Kernels>(&self, i: usize) -> Result<(&[u32], &[T])> {
        let r = self.samples.range(i);
        Ok((&self.ids.as_slice::<u32>()?[r.clone()], cpu::rows(self.grad.as_slice()?, width(self.grad), &r)))
    }
    /// ⟨gradient of sample i, gradient of sample j of another lookup⟩.
    fn inner_with<T: Kernels>(&self, i: usize, other: &Lookup, j: usize) -> Result<Bounded> {
        let ((ids1, g1), (ids2, g2)) = (self.rows_of::<T>(i)?, other.rows_of::<T>(j)?);
        Ok(cpu::lookup_inner::<T>(ids1, g1, ids2, g2, width(self.grad)))
    }
}

impl<'a> Kind<'a> for Lookup<'a> {
    fn name(&self) -> &'static str {
        "lookup"
    }
    fn values(&self) -> (&'a Array, Option<&'a Array>) {
        (self.grad, None)
    }
    fn owners(&self) -> Option<&'a Samples> {
        Some(self.samples)
    }
    fn fits(&self, shape: &[usize]) -> bool {
        is_rows(self.grad, self.samples)
            && self.ids.numel() == self.samples.rows()
            && self.ids.dtype() == DType::U32
            && shape[0] * width(self.grad) == shape.iter().product::<usize>()
    }
    fn changed(&self, change: &Change) -> Result<Factor> {
        Ok(Factor::Lookup {
            ids: change.ids(self.ids)?,
            grad: change.array(self.grad)?,
            samples: change.samples(self.samples)?,
        })
    }

    fn add<T: Kernels>(&self, weights: Option<&[f64]>, out: &mut [T]) -> Result<()> {
        let w = cpu::row_weights(weights, self.samples);
        cpu::lookup_add::<T>(self.ids.as_slice()?, self.grad.as_slice()?, w.as_deref(), out);
        Ok(())
    }
    fn norm<T: Kernels>(&self, i: usize, _numel: usize) -> Result<Norm> {
        let (ids, grad) = self.rows_of::<T>(i)?;
        // Rows of one id are summed before they are squared, as in the gradient.
        Ok(Norm {
            sq: self.inner_with::<T>(i, self, i)?,
            reach: cpu::row_reach(grad, None, ids.len()),
            rows: ids.len(),
        })
    }
    fn widths(&self) -> usize {
        width(self.grad)
    }
    /// Inner product with another lookup, or with an outer product of the same width: an embedding tied to the output head, whose `left`
    /// holds the logits' gradients and whose `right` holds the head's input.
    fn inner<T: Kernels>(&self, i: usize, other: &Factor, j: usize) -> Result<Option<Bounded>> {
        match other {
            Factor::Lookup { ids, grad, samples } => {
                self.inner_with::<T>(i, &Lookup { ids, grad, samples }, j).map(Some)
            }
            Factor::Outer { left, right, samples } if width(right) == width(self.grad) => {
                let (ids, grad) = self.rows_of::<T>(i)?;
                let b = samples.range(j);
                Ok(Some(cpu::lookup_outer_inner::<T>(
                    ids,
                    grad,
                    &cpu::wide_rows(left, &b)?,
                    &cpu::wide_rows(right, &b)?,
                    (width(left), width(right)),
                )))
            }
            _ => Ok(None),
        }
    }

    fn add_on(&self, gpu: &Arc<Gpu>, weights: Option<&Array>, out: &Array) -> Result<()> {
        cuda::lookup_add(gpu, (self.ids, self.grad), self.samples, weights, out)
    }
    fn norm_parts(&self, gpu: &Arc<Gpu>) -> Result<Option<Parts>> {
        let side = self.side(gpu, layouts::PAIR_ONE, false)?;
        cuda::own_gram_parts(gpu, layouts::PAIR_ONE, &side).map(Some)
    }
    /// Pairs with the kinds that [`Lookup::inner`] supports.
    fn pairing(&self, other: &Factor) -> Option<i32> {
        match other {
            Factor::Lookup { .. } => Some(layouts::PAIR_ONE),
            Factor::Outer { right, .. } if width(self.grad) == width(right) => Some(layouts::PAIR_GATHER),
            _ => None,
        }
    }
    fn side(&self, gpu: &Arc<Gpu>, _pairing: i32, _second: bool) -> Result<Side<'a>> {
        Ok(Side { left: self.grad, right: None, ids: Some(on(gpu, self.ids)?), samples: self.samples })
    }
}
