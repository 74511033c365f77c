//! Σₙ leftₙ ⊗ rightₙ: the factor of linear layers, and of convolutions after unfolding.

use super::change::Change;
use super::cuda::{self, Parts, Side};
use super::{Factor, Kind, Norm, cpu, is_rows, width};
use crate::array::Array;
use crate::autograd::Samples;
use crate::base::{DType, Result};
use crate::device::cuda::{Gpu, layouts};
use crate::kernels::gemm::kernel::Kernels;
use crate::kernels::gemm::norms::{self, Bounded};
use crate::kernels::gemm::{KC, half};
use std::ops::Range;
use std::sync::Arc;

/// The operands of a [`Factor::Outer`].
#[derive(Clone, Copy)]
pub(super) struct Outer<'a> {
    pub left: &'a Array,
    pub right: &'a Array,
    pub samples: &'a Samples,
}

impl<'a> Kind<'a> for Outer<'a> {
    fn name(&self) -> &'static str {
        "outer"
    }
    fn values(&self) -> (&'a Array, Option<&'a Array>) {
        (self.left, Some(self.right))
    }
    fn owners(&self) -> Option<&'a Samples> {
        Some(self.samples)
    }
    fn fits(&self, shape: &[usize]) -> bool {
        let (left, right) = (self.left, self.right);
        is_rows(left, self.samples)
            && is_rows(right, self.samples)
            && width(left) * width(right) == shape.iter().product::<usize>()
    }
    fn changed(&self, change: &Change) -> Result<Factor> {
        Ok(Factor::Outer {
            left: change.array(self.left)?,
            right: change.array(self.right)?,
            samples: change.samples(self.samples)?,
        })
    }
    fn flops(&self) -> f64 {
        2.0 * (self.left.numel() * width(self.right)) as f64
    }

    fn add<T: Kernels>(&self, weights: Option<&[f64]>, out: &mut [T]) -> Result<()> {
        cpu::outer_add::<T>((self.left, self.right), self.samples, weights, out)
    }
    fn norm<T: Kernels>(&self, i: usize, _numel: usize) -> Result<Norm> {
        let r = self.samples.range(i);
        let (left, right) = (&*cpu::wide_rows::<T>(self.left, &r)?, &*cpu::wide_rows::<T>(self.right, &r)?);
        let sq = if self.left.dtype() == DType::BF16 && cpu::halves(r.len(), 1) {
            let sq = half::sq_norms(cpu::matrix(self.left)?, cpu::matrix(self.right)?, std::slice::from_ref(&r));
            Bounded { value: sq[0], error: 0.0 }
        } else {
            norms::sq_norm(left, right, r.len())
        };
        // A single term is its own sum.
        let reach = if r.len() == 1 { sq.value.sqrt() } else { norms::reach(left, right, r.len()) };
        // Products of bf16 operands drop terms below 2⁻¹²⁶ at each step. The bound takes at least 2⁻²² of the reach, hence 2²².
        let lost = (r.len() as f64) * ((width(self.left) * width(self.right)) as f64).sqrt() * 2f64.powi(22 - 126);
        let reach = if self.left.dtype() == DType::BF16 { reach + lost } else { reach };
        Ok(Norm { sq, reach, rows: r.len() })
    }
    fn widths(&self) -> usize {
        width(self.left) + width(self.right)
    }
    fn chain(&self) -> usize {
        let blocks = self.samples.rows() / KC + 4;
        if self.samples.is_sorted() { blocks } else { blocks + self.samples.rows().min(KC) }
    }
    /// Inner product with another outer product of the same widths.
    fn inner<T: Kernels>(&self, i: usize, other: &Factor, j: usize) -> Result<Option<Bounded>> {
        let Factor::Outer { left, right, samples } = other else { return Ok(None) };
        if width(self.left) != width(left) {
            return Ok(None);
        }
        let (a, b) = (self.samples.range(i), samples.range(j));
        Ok(Some(norms::inner::<T>(
            &cpu::wide_rows(self.left, &a)?,
            &cpu::wide_rows(self.right, &a)?,
            &cpu::wide_rows(left, &b)?,
            &cpu::wide_rows(right, &b)?,
            (a.len(), b.len()),
        )))
    }
    fn clipped_add<T: Kernels>(
        &self,
        base: &[f64],
        clip: &(dyn Fn(f64) -> f64 + Sync),
        out: &mut [T],
    ) -> Result<Option<Vec<f64>>> {
        cpu::outer_clipped_add::<T>(self.left, self.right, self.samples, base, clip, out)
    }
    fn fuses(&self) -> bool {
        true
    }
    /// True for samples of more than a few rows, whose norms are computed from the gradient, tile by tile.
    fn forms_for_norms(&self) -> bool {
        self.samples.is_sorted() && self.samples.rows() >= 16 * self.samples.count()
    }
    fn form<T: Kernels>(&self, out: &mut [T]) -> Result<Vec<f64>> {
        cpu::outer_per_sample::<T>(self.left, self.right, self.samples, out)
    }

    fn add_on(&self, gpu: &Arc<Gpu>, weights: Option<&Array>, out: &Array) -> Result<()> {
        cuda::outer_add(gpu, (self.left, self.right), self.samples, weights, out)
    }
    fn norm_parts(&self, gpu: &Arc<Gpu>) -> Result<Option<Parts>> {
        let o = self.samples.on_gpu(gpu)?;
        if cuda::gram_is_shorter(&o, self.left, self.right) {
            let side = self.side(gpu, layouts::PAIR_PRODUCT, false)?;
            return cuda::own_gram_parts(gpu, layouts::PAIR_PRODUCT, &side).map(Some);
        }
        cuda::direct_parts(gpu, (self.left, self.right), None, &o).map(Some)
    }
    /// Pairs with another outer product of the same widths.
    fn pairing(&self, other: &Factor) -> Option<i32> {
        match other {
            Factor::Outer { left, .. } if width(self.left) == width(left) => Some(layouts::PAIR_PRODUCT),
            _ => None,
        }
    }
    fn side(&self, _gpu: &Arc<Gpu>, pairing: i32, second: bool) -> Result<Side<'a>> {
        // Paired with a lookup, the rows of the head's input come first, and the logits' gradients are the operand that is gathered from.
        let (left, right) =
            if pairing == layouts::PAIR_GATHER && second { (self.right, self.left) } else { (self.left, self.right) };
        Ok(Side { left, right: Some(right), ids: None, samples: self.samples })
    }
    fn form_on(&self, gpu: &Arc<Gpu>, range: Range<usize>, out: &mut Array) -> Result<bool> {
        let Samples::Uniform { each, .. } = self.samples else { return Ok(false) };
        cuda::outer_form(gpu, (self.left, self.right), *each, range, out)?;
        Ok(true)
    }
}
