//! The weighting slot: what happens to a parameter's factored gradient when it is delivered.
//!
//! *Plain*: contracted at once into the flat gradient. *Private*: held until its clipping group is complete, then
//! weighted by the group's clip factors and contracted, and the group's factors are freed. With one group (all-layer)
//! every norm is taken on delivery, while the operands are warm, and contraction follows the whole backward pass; with
//! a group per layer, norm and clipped sum of the layer's large parameter are one pass.

use super::contract::{Weights, add};
use super::flat::Flat;
use super::ledger::{Ledger, Tally};
use super::plan::Clipping;
use crate::array::Array;
use crate::autograd::{Factor, Param, ParamGrad};
use crate::base::{Error, Result};
use crate::device::spans;
use crate::device::spans::Kind;
use crate::kernels::elementwise::cuda::scale_in_place;
use crate::privacy::ClipFn;
use crate::privacy::cuda::clip_weights;

/// The samples of a microbatch that are public: all from the first of them on, each with this weight instead of a clip factor.
#[derive(Clone, Copy)]
pub(super) struct PublicPart {
    pub from: usize,
    pub weight: f64,
}

pub(super) struct Weigh<'a> {
    flat: &'a Flat,
    grads: &'a mut Array,
    clipping: Option<&'a Clipping>,
    ledger: Option<&'a Ledger>,
    groups: Vec<Group>,
    tally: Tally,
    public: Option<PublicPart>,
}

/// Squared norms of a group's samples so far, where the gradients are.
enum SqNorms {
    Cpu(Vec<f64>),
    Gpu(Option<Array>),
}

/// A clipping group on its way through one backward pass.
struct Group {
    threshold: f64,
    members: usize,
    /// Members with their norms already in `sq`.
    normed: Vec<ParamGrad>,
    /// Members whose norm is left for the fused pass.
    held: Vec<ParamGrad>,
    delivered: usize,
    sq: SqNorms,
    /// Private samples of this step with a norm of at most the threshold (CPU only).
    below: u64,
}

impl<'a> Weigh<'a> {
    pub fn plain(flat: &'a Flat, grads: &'a mut Array) -> Self {
        Weigh { flat, grads, clipping: None, ledger: None, groups: Vec::new(), tally: Tally::default(), public: None }
    }
    /// `ledger`: where the counts go if the gradients are on a GPU.
    pub fn private(flat: &'a Flat, grads: &'a mut Array, clipping: &'a Clipping, ledger: Option<&'a Ledger>) -> Self {
        let groups = clipping
            .groups
            .iter()
            .map(|&(threshold, members)| Group {
                threshold,
                members,
                normed: Vec::new(),
                held: Vec::new(),
                delivered: 0,
                sq: SqNorms::Cpu(Vec::new()),
                below: 0,
            })
            .collect();
        Weigh { groups, clipping: Some(clipping), ledger, ..Weigh::plain(flat, grads) }
    }
    /// A microbatch of `samples` samples is about to be differentiated, the last of them perhaps public.
    pub fn begin(&mut self, samples: usize, public: Option<PublicPart>) {
        self.public = public;
        let gpu = self.grads.gpu().is_some();
        for g in &mut self.groups {
            g.delivered = 0;
            g.sq = if gpu { SqNorms::Gpu(None) } else { SqNorms::Cpu(vec![0.0; samples]) };
        }
    }
    pub fn deliver(&mut self, param: &Param, grad: ParamGrad) -> Result<()> {
        let Some(index) = self.flat.index(param) else {
            return Err(Error::invalid(
                "TrainStep",
                format!("{} is trainable but was not given to the step: add it, or freeze it", param.name()),
            ));
        };
        let Some(clipping) = self.clipping else {
            let _op = spans::span(Kind::Backward, "contract");
            return add(self.grads, &self.flat.segments()[index].range, &grad, Weights::None).map(|_| ());
        };
        let _op = spans::span(Kind::Backward, "norms");
        grad.expect_samples()?;
        let gi = clipping.group_of[index];
        let group = &mut self.groups[gi];
        group.delivered += 1;
        match &mut group.sq {
            SqNorms::Gpu(sq) => {
                let gpu = self.grads.gpu().cloned();
                let gpu = gpu.ok_or_else(|| Error::autograd("TrainStep", "the gradient moved during a step"))?;
                *sq = Some(grad.sq_norms_on(&gpu, sq.take())?);
                group.normed.push(grad);
            }
            SqNorms::Cpu(sq) => {
                // A group of its own, or the only large member of a small group: norm and sum in one pass at the end.
                let fused = clipping.groups.len() > 1
                    && self.public.is_none()
                    && matches!(grad.factors(), [Factor::Outer { .. }])
                    && group.held.is_empty();
                if fused {
                    group.held.push(grad);
                } else {
                    let (grad, norms) = grad.kept()?;
                    sq.iter_mut().zip(norms).for_each(|(s, n)| *s += n);
                    group.normed.push(grad);
                }
            }
        }
        if group.delivered == group.members { self.close(gi) } else { Ok(()) }
    }
    /// Weights and contracts a complete group, and frees its factors.
    fn close(&mut self, gi: usize) -> Result<()> {
        let Some(clipping) = self.clipping else { return Ok(()) };
        let _op = spans::span(Kind::Backward, "clip and contract");
        let group = &mut self.groups[gi];
        let (clip, threshold) = (clipping.clip, group.threshold);
        let (held, normed) = (std::mem::take(&mut group.held), std::mem::take(&mut group.normed));
        let mut sq = match std::mem::replace(&mut group.sq, SqNorms::Cpu(Vec::new())) {
            SqNorms::Cpu(sq) => sq,
            SqNorms::Gpu(sq) => {
                let (Some(sq), Some(gpu)) = (sq, self.grads.gpu().cloned()) else { return Ok(()) };
                let ledger = self.ledger.ok_or_else(|| Error::autograd("TrainStep", "no ledger on the GPU"))?;
                let dtype = self.grads.dtype();
                let private = self.public.map_or(sq.numel(), |p| p.from);
                let tally = ledger.tally()?;
                let of = |sq: &Array, clip, tally: Option<&Array>| clip_weights(&gpu, sq, clip, dtype, tally);
                let weights = match self.public {
                    None => of(&sq, (clip, threshold), Some(&tally))?,
                    Some(public) => {
                        let mut all = Array::zeros_on(&gpu, sq.shape(), dtype)?;
                        if private > 0 {
                            let part = sq.slice(0, 0..private)?.contiguous();
                            all.write(0, &of(&part, (clip, threshold), Some(&tally))?)?;
                        }
                        if private < sq.numel() {
                            // 1 where the norm is finite, 0 elsewhere.
                            let part = sq.slice(0, private..sq.numel())?.contiguous();
                            let ones = of(&part, (ClipFn::Global, f64::MAX), None)?;
                            scale_in_place(&gpu, &ones, public.weight)?;
                            all.write(private, &ones)?;
                        }
                        all
                    }
                };
                for grad in normed {
                    add(self.grads, &self.range(&grad)?, &grad, Weights::OnGpu(&weights))?;
                }
                return Ok(());
            }
        };
        let factor = move |sq: f64| clip.factor(sq, threshold);
        for grad in held {
            sq = add(self.grads, &self.range(&grad)?, &grad, Weights::Clip(&sq, &factor))?;
        }
        let private = self.public.map_or(sq.len(), |p| p.from);
        let weight = |(i, &s): (usize, &f64)| match self.public {
            Some(p) if i >= p.from => p.weight * s.is_finite() as u8 as f64,
            _ => factor(s),
        };
        let weights: Vec<f64> = sq.iter().enumerate().map(weight).collect();
        for grad in normed {
            add(self.grads, &self.range(&grad)?, &grad, Weights::Given(&weights))?;
        }
        for &sq in &sq[..private] {
            self.groups[gi].below += (sq.sqrt() <= threshold) as u64;
            self.tally.pairs += 1;
            self.tally.clipped += (sq.is_finite() && sq.sqrt() > threshold) as u64;
            self.tally.non_finite += !sq.is_finite() as u64;
        }
        Ok(())
    }
    fn range(&self, grad: &ParamGrad) -> Result<std::ops::Range<usize>> {
        self.flat.range(grad.param()).ok_or_else(|| Error::invalid("TrainStep", "a parameter outside the step"))
    }
    /// The backward pass is over: groups with members that were never reached close with what they have.
    pub fn finish(&mut self) -> Result<()> {
        for gi in 0..self.groups.len() {
            if self.groups[gi].delivered < self.groups[gi].members && self.groups[gi].delivered > 0 {
                self.close(gi)?;
            }
        }
        Ok(())
    }
    /// Per group, private samples with a norm of at most the threshold (CPU only).
    pub fn below(&self) -> Vec<u64> {
        self.groups.iter().map(|g| g.below).collect()
    }
    /// What was clipped on the CPU; a GPU keeps its own count.
    pub fn tally(&self) -> Tally {
        self.tally
    }
}
