//! Block `group[n]` of the parameter receives leftₙ ⊗ rightₙ: the factor of experts and of grouped convolutions.

use super::change::Change;
use super::cuda::{self, Parts, Side};
use super::{Factor, Kind, Norm, cpu, is_rows, width};
use crate::array::Array;
use crate::autograd::{Groups, Samples};
use crate::base::Result;
use crate::device::cuda::{Gpu, layouts};
use crate::kernels::gemm::KC;
use crate::kernels::gemm::kernel::Kernels;
use crate::kernels::gemm::norms::{self, Bounded, UNCERTAIN};
use std::sync::Arc;

/// The operands of a [`Factor::GroupedOuter`].
#[derive(Clone, Copy)]
pub(super) struct GroupedOuter<'a> {
    pub left: &'a Array,
    pub right: &'a Array,
    pub group: &'a Groups,
    pub samples: &'a Samples,
}

impl GroupedOuter<'_> {
    /// ⟨gradient of sample i, gradient of sample j of another grouped product⟩, computed run by run over equal groups.
    fn inner_with<T: Kernels>(&self, i: usize, other: &GroupedOuter, j: usize) -> Result<Bounded> {
        let (rd, cd) = (width(self.left), width(self.right));
        let (l1, r1) = (self.left.as_slice::<T>()?, self.right.as_slice()?);
        let (l2, r2) = (other.left.as_slice::<T>()?, other.right.as_slice()?);
        let (g1, g2, mut sum) = (self.group.ids(), other.group.ids(), Bounded::default());
        for a in cpu::runs(g1, self.samples.range(i)) {
            for b in cpu::runs(g2, other.samples.range(j)) {
                if g1[a.start] == g2[b.start] {
                    sum += norms::inner::<T>(
                        cpu::rows(l1, rd, &a),
                        cpu::rows(r1, cd, &a),
                        cpu::rows(l2, rd, &b),
                        cpu::rows(r2, cd, &b),
                        (a.len(), b.len()),
                    );
                }
            }
        }
        Ok(sum)
    }

    /// Whether another grouped product, of `left` and `right`, has blocks of the same shape.
    fn has_widths_of(&self, left: &Array, right: &Array) -> bool {
        (width(self.left), width(self.right)) == (width(left), width(right))
    }

    /// Whether the rows of each sample and group are consecutive.
    fn groups_are_neighbours(&self) -> bool {
        // A sample's rows are visited in ascending order, and so in the order of groups if these are sorted.
        if self.group.is_sorted() {
            return true;
        }
        // Groups that exist only on a GPU are not read back for this: the general form is correct for any order.
        if !self.group.is_on_host() {
            return false;
        }
        let group = self.group.ids();
        let order = self.samples.order();
        let mut seen: Vec<u32> = Vec::new();
        (0..self.samples.count()).all(|i| {
            seen.clear();
            let rows = self.samples.range(i).map(|at| group[order.map_or(at, |o| o[at] as usize)]);
            rows.for_each(|e| {
                if seen.last() != Some(&e) {
                    seen.push(e);
                }
            });
            seen.sort_unstable();
            seen.windows(2).all(|w| w[0] != w[1])
        })
    }
}

impl<'a> Kind<'a> for GroupedOuter<'a> {
    fn name(&self) -> &'static str {
        "grouped outer"
    }
    fn values(&self) -> (&'a Array, Option<&'a Array>) {
        (self.left, Some(self.right))
    }
    fn owners(&self) -> Option<&'a Samples> {
        Some(self.samples)
    }
    fn fits(&self, shape: &[usize]) -> bool {
        let (numel, block) = (shape.iter().product::<usize>(), width(self.left) * width(self.right));
        let blocks = numel.checked_div(block).unwrap_or(0);
        is_rows(self.left, self.samples)
            && is_rows(self.right, self.samples)
            && self.group.rows() == self.samples.rows()
            && blocks * block == numel
            && (self.group.count() == blocks || numel == 0)
    }
    fn changed(&self, change: &Change) -> Result<Factor> {
        Ok(Factor::GroupedOuter {
            left: change.array(self.left)?,
            right: change.array(self.right)?,
            group: change.groups(self.group)?,
            samples: change.samples(self.samples)?,
        })
    }
    fn flops(&self) -> f64 {
        2.0 * (self.left.numel() * width(self.right)) as f64
    }

    fn add<T: Kernels>(&self, weights: Option<&[f64]>, out: &mut [T]) -> Result<()> {
        let w = cpu::row_weights(weights, self.samples);
        let (left, right) = (self.left.as_slice::<T>()?, self.right.as_slice::<T>()?);
        let (rd, cd, group) = (width(self.left), width(self.right), self.group.ids());
        for run in cpu::runs(group, 0..group.len()) {
            let block = group[run.start] as usize * rd * cd;
            norms::outer_add(
                cpu::rows(left, rd, &run),
                cpu::rows(right, cd, &run),
                run.len(),
                w.as_ref().map(|w| &w[run.clone()]),
                &mut out[block..block + rd * cd],
            );
        }
        Ok(())
    }
    fn norm<T: Kernels>(&self, i: usize, numel: usize) -> Result<Norm> {
        let (rd, cd) = (width(self.left), width(self.right));
        let (left, right, group) = (self.left.as_slice::<T>()?, self.right.as_slice::<T>()?, self.group.ids());
        let range = self.samples.range(i);
        let mut runs: Vec<_> = cpu::runs(group, range.clone()).collect();
        runs.sort_by_key(|r| group[r.start]);
        let rows = range.len();
        let reach = norms::reach(cpu::rows(left, rd, &range), cpu::rows(right, cd, &range), rows);
        let mut sq = Bounded::default();
        if runs.windows(2).any(|w| group[w[0].start] == group[w[1].start]) {
            // Rows of one group are not consecutive: use the general form.
            sq = self.inner_with::<T>(i, self, i)?;
            if sq.error > UNCERTAIN * sq.value || sq.value < 0.0 {
                sq = super::formed(numel, |x: &mut [T]| self.sample_add(i, x))?;
            }
        } else {
            for r in runs {
                sq += norms::sq_norm::<T>(cpu::rows(left, rd, &r), cpu::rows(right, cd, &r), r.len());
            }
        }
        Ok(Norm { sq, reach, rows })
    }
    fn widths(&self) -> usize {
        width(self.left) + width(self.right)
    }
    fn chain(&self) -> usize {
        self.samples.rows() / KC + 4 + self.samples.rows().min(KC)
    }
    /// Inner product with another grouped product of the same widths.
    fn inner<T: Kernels>(&self, i: usize, other: &Factor, j: usize) -> Result<Option<Bounded>> {
        match other {
            Factor::GroupedOuter { left, right, group, samples } if self.has_widths_of(left, right) => {
                self.inner_with::<T>(i, &GroupedOuter { left, right, group, samples }, j).map(Some)
            }
            _ => Ok(None),
        }
    }

    fn add_on(&self, gpu: &Arc<Gpu>, weights: Option<&Array>, out: &Array) -> Result<()> {
        cuda::grouped_outer_add(gpu, (self.left, self.right), self.group, self.samples, weights, out)
    }
    fn norm_parts(&self, gpu: &Arc<Gpu>) -> Result<Option<Parts>> {
        let o = self.samples.on_gpu(gpu)?;
        if cuda::gram_is_shorter(&o, self.left, self.right) || !self.groups_are_neighbours() {
            let side = self.side(gpu, layouts::PAIR_PRODUCT, false)?;
            return cuda::own_gram_parts(gpu, layouts::PAIR_PRODUCT, &side).map(Some);
        }
        let (group, ..) = self.group.on_gpu(gpu)?;
        cuda::direct_parts(gpu, (self.left, self.right), Some(&group), &o).map(Some)
    }
    /// Pairs with another grouped product of the same widths.
    fn pairing(&self, other: &Factor) -> Option<i32> {
        match other {
            Factor::GroupedOuter { left, right, .. } if self.has_widths_of(left, right) => Some(layouts::PAIR_PRODUCT),
            _ => None,
        }
    }
    fn side(&self, gpu: &Arc<Gpu>, _pairing: i32, _second: bool) -> Result<Side<'a>> {
        let (ids, ..) = self.group.on_gpu(gpu)?;
        Ok(Side { left: self.left, right: Some(self.right), ids: Some(ids), samples: self.samples })
    }
}
