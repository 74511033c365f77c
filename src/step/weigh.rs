//! The weighting slot: what happens to a parameter's factored gradient when it is delivered.
//!
//! *Plain*: contracted at once into the flat gradient. *Private*: held until its clipping group is complete, then
//! weighted by the group's clip factors and contracted, and the group's factors are freed. With one group (all-layer)
//! every norm is taken on delivery, while the operands are warm, and contraction follows the whole backward pass; with
//! a group per layer, norm and clipped sum of the layer's large parameter are one pass.

use super::flat::Flat;
use super::ledger::{Ledger, Tally};
use crate::autograd::{Factor, Param, ParamGrad};
use crate::device::cuda::factored::clip_weights;
use crate::error::{Error, Result};
use crate::privacy::{ClipFn, ClipStyle};
use crate::profile::{self, Kind};
use crate::tensor::Array;
use crate::with_float;

/// The clipping groups over the parameters of a step: who belongs where, and each group's share of the threshold.
#[derive(Clone, Debug, Default)]
pub(super) struct Clipping {
    clip: ClipFn,
    /// Threshold and number of members of each group.
    groups: Vec<(f64, usize)>,
    group_of: Vec<usize>,
    /// The most one sample can move the clipped sum.
    pub sensitivity: f64,
}

impl Clipping {
    /// Groups by `style`; thresholds R/√groups each, so that they compose to R = `threshold`.
    pub fn new(style: ClipStyle, clip: ClipFn, threshold: f64, params: &[Param]) -> Result<Clipping> {
        let mut names: Vec<&str> = Vec::new();
        let (mut members, mut group_of): (Vec<usize>, Vec<usize>) = (Vec::new(), Vec::new());
        for p in params {
            let name = group_name(style, p.name());
            let gi = names.iter().position(|n| *n == name).unwrap_or_else(|| {
                names.push(name);
                members.push(0);
                names.len() - 1
            });
            members[gi] += 1;
            group_of.push(gi);
        }
        let each = threshold / (names.len().max(1) as f64).sqrt();
        let s = clip.sensitivity(each);
        let sensitivity = (s * s * names.len() as f64).sqrt();
        Ok(Clipping { clip, groups: members.into_iter().map(|m| (each, m)).collect(), group_of, sensitivity })
    }
}

/// The group a parameter belongs to, by its scoped name.
fn group_name(style: ClipStyle, name: &str) -> &str {
    match style {
        ClipStyle::AllLayer => "",
        // Weight and bias of one layer share everything but the last part of the name.
        ClipStyle::LayerWise => name.rsplit_once('.').map_or(name, |(layer, _)| layer),
        ClipStyle::ParameterWise => name,
    }
}

pub(super) struct Weigh<'a> {
    flat: &'a Flat,
    grads: &'a mut Array,
    clipping: Option<&'a Clipping>,
    ledger: Option<&'a Ledger>,
    groups: Vec<Group>,
    tally: Tally,
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
}

impl<'a> Weigh<'a> {
    pub fn plain(flat: &'a Flat, grads: &'a mut Array) -> Self {
        Weigh { flat, grads, clipping: None, ledger: None, groups: Vec::new(), tally: Tally::default() }
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
            })
            .collect();
        Weigh { groups, clipping: Some(clipping), ledger, ..Weigh::plain(flat, grads) }
    }
    /// A microbatch of `samples` samples is about to be differentiated.
    pub fn begin(&mut self, samples: usize) {
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
            let _op = profile::span(Kind::Backward, "contract");
            profile::cost(grad.sum_flops(), grad.bytes() as f64);
            return add(self.grads, &self.flat.segments()[index].range, &grad, Weights::None).map(|_| ());
        };
        let _op = profile::span(Kind::Backward, "norms");
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
        let _op = profile::span(Kind::Backward, "clip and contract");
        let group = &mut self.groups[gi];
        let (clip, threshold) = (clipping.clip, group.threshold);
        let (held, normed) = (std::mem::take(&mut group.held), std::mem::take(&mut group.normed));
        let mut sq = match std::mem::replace(&mut group.sq, SqNorms::Cpu(Vec::new())) {
            SqNorms::Cpu(sq) => sq,
            SqNorms::Gpu(sq) => {
                let (Some(sq), Some(gpu)) = (sq, self.grads.gpu().cloned()) else { return Ok(()) };
                let ledger = self.ledger.ok_or_else(|| Error::autograd("TrainStep", "no ledger on the GPU"))?;
                let weights = clip_weights(&gpu, &sq, (clip, threshold), self.grads.dtype(), &ledger.tally()?)?;
                for grad in normed {
                    profile::cost(grad.sum_flops(), grad.bytes() as f64);
                    let out = self.grads.slice(0, self.range(&grad)?)?;
                    grad.add_on(&gpu, Some(&weights), &out)?;
                }
                return Ok(());
            }
        };
        let factor = move |sq: f64| clip.factor(sq, threshold);
        for grad in held {
            profile::cost(grad.sum_flops(), grad.bytes() as f64);
            sq = add(self.grads, &self.range(&grad)?, &grad, Weights::Clip(&sq, &factor))?;
        }
        let weights: Vec<f64> = sq.iter().map(|&s| factor(s)).collect();
        for grad in normed {
            profile::cost(grad.sum_flops(), grad.bytes() as f64);
            add(self.grads, &self.range(&grad)?, &grad, Weights::Given(&weights))?;
        }
        for &sq in &sq {
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
    /// What was clipped on the CPU; a GPU keeps its own count.
    pub fn tally(&self) -> Tally {
        self.tally
    }
}

enum Weights<'a> {
    None,
    Given(&'a [f64]),
    Clip(&'a [f64], &'a (dyn Fn(f64) -> f64 + Sync)),
}

/// Adds a gradient to its stretch of the flat buffer; returns the norms' totals of the fused form.
fn add(grads: &mut Array, range: &std::ops::Range<usize>, grad: &ParamGrad, w: Weights) -> Result<Vec<f64>> {
    if let Some(gpu) = grads.gpu() {
        grad.add_on(gpu, None, &grads.slice(0, range.clone())?)?;
        return Ok(Vec::new());
    }
    with_float!("TrainStep", grads.dtype(), T => {
        let out = &mut grads.as_mut_slice::<T>()?[range.clone()];
        match w {
            Weights::None => grad.add_sum::<T>(None, out)?,
            Weights::Given(w) => grad.add_weighted::<T>(w, out)?,
            Weights::Clip(base, f) => return grad.add_clipped::<T>(base, f, out),
        }
        Ok(Vec::new())
    })
}
