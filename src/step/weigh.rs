//! The weigh slot: the processing of a parameter's factored gradient when it is delivered.
//!
//! [`Plain`] contracts it at once into the flat gradient. [`Clipping`] holds it until its clipping group is complete; then it is weighted
//! by the group's clip factors and contracted, and the group's factors are freed. With one group (all-layer) every norm is computed on
//! delivery, while the operands are in the cache, and contraction follows after the whole backward pass; with one group per layer, norm and
//! clipped sum of the layer's largest matrix are computed in one pass.

use super::contract::Weights;
use super::core::{Collect, Context, PublicPart, Weighting};
use super::counters::Tally;
use super::plan::{Clipping, Retain};
use crate::array::Array;
use crate::autograd::{GradHook, Mixing, Param, ParamGrad};
use crate::base::{Error, Result};
use crate::device::spans;
use crate::device::spans::Kind;
use crate::kernels::elementwise::cuda::scale_in_place;
use crate::privacy::ClipFn;
use crate::privacy::cuda::clip_weights;

/// The index of a parameter in the step.
fn index_of(step: &Context, param: &Param) -> Result<usize> {
    step.flat.index(param).ok_or_else(|| {
        Error::invalid(
            "run",
            format!("{} is trainable but was not given to the step: add it, or freeze it", param.name()),
        )
    })
}

/// The weighting of a plain step, which has no weights.
pub(super) struct Plain;

impl Weighting for Plain {
    const STOPS: bool = true;
    type Collector<'a> = Context<'a>;
    fn collector<'a>(&'a self, step: Context<'a>) -> Context<'a> {
        step
    }
}

impl GradHook for Context<'_> {
    fn param(&mut self, param: &Param, grad: ParamGrad) -> Result<()> {
        let index = index_of(self, param)?;
        let _op = spans::span(Kind::Backward, "contract");
        self.grads.add(&self.flat.segments()[index].range, &grad, Weights::None).map(|_| ())
    }
}

impl Collect for Context<'_> {
    fn begin(&mut self, _samples: usize, _public: Option<PublicPart>) {}
    fn idle(&mut self) -> Result<()> {
        self.grads.idle()
    }
    fn finish(&mut self) -> Result<()> {
        self.grads.finish()
    }
    fn counts(&self) -> (Tally, Vec<u64>) {
        Default::default()
    }
}

impl Weighting for Clipping {
    const STOPS: bool = false;
    type Collector<'a> = Clipper<'a>;
    fn collector<'a>(&'a self, step: Context<'a>) -> Clipper<'a> {
        let groups = self.groups.iter().map(|&(threshold, members)| Group {
            threshold,
            members,
            normed: Vec::new(),
            held: None,
            delivered: 0,
            sq: SqNorms::Cpu(Vec::new()),
            below: 0,
        });
        Clipper { groups: groups.collect(), clipping: self, step, tally: Tally::default(), public: None }
    }
}

/// Clips each private sample's gradient, group by group.
pub(super) struct Clipper<'a> {
    step: Context<'a>,
    clipping: &'a Clipping,
    groups: Vec<Group>,
    tally: Tally,
    public: Option<PublicPart>,
}

/// Squared norms of a group's samples so far, on the device of the gradients.
enum SqNorms {
    Cpu(Vec<f64>),
    Gpu(Option<Array>),
}

/// A clipping group during one backward pass.
struct Group {
    threshold: f64,
    members: usize,
    /// Members whose norms are included in `sq`.
    normed: Vec<ParamGrad>,
    /// The member whose norm is computed by the pass that forms the clipped sum.
    held: Option<ParamGrad>,
    delivered: usize,
    sq: SqNorms,
    /// Number of private samples of this step with a norm of at most the threshold (CPU only).
    below: u64,
}

impl Collect for Clipper<'_> {
    fn begin(&mut self, samples: usize, public: Option<PublicPart>) {
        self.public = public;
        let gpu = self.step.grads.gpu().is_some();
        for g in &mut self.groups {
            g.delivered = 0;
            g.sq = if gpu { SqNorms::Gpu(None) } else { SqNorms::Cpu(vec![0.0; samples]) };
        }
    }
    fn idle(&mut self) -> Result<()> {
        self.step.grads.idle()
    }
    /// Closes the groups of which some members were never reached, with the members they have.
    fn finish(&mut self) -> Result<()> {
        for gi in 0..self.groups.len() {
            if self.groups[gi].delivered < self.groups[gi].members && self.groups[gi].delivered > 0 {
                self.close(gi)?;
            }
        }
        self.step.grads.finish()
    }
    fn counts(&self) -> (Tally, Vec<u64>) {
        (self.tally, self.groups.iter().map(|g| g.below).collect())
    }
}

impl GradHook for Clipper<'_> {
    fn follows_samples(&self) -> bool {
        true
    }
    fn mixing(&mut self, found: Mixing) -> Result<()> {
        Err(found.refusal(None))
    }
    fn param(&mut self, param: &Param, grad: ParamGrad) -> Result<()> {
        let index = index_of(&self.step, param)?;
        let _op = spans::span(Kind::Backward, "norms");
        grad.expect_samples()?;
        let gi = self.clipping.group_of[index];
        let group = &mut self.groups[gi];
        group.delivered += 1;
        match &mut group.sq {
            SqNorms::Gpu(sq) => {
                let gpu = self.step.grads.gpu().cloned();
                let gpu = gpu.ok_or_else(|| Error::autograd("run", "the gradient moved during a step"))?;
                *sq = Some(grad.sq_bounds_on(&gpu, sq.take())?);
                group.normed.push(grad);
            }
            SqNorms::Cpu(sq) => {
                let planned = self.step.plan.params()[index].retain == Retain::Fused;
                if planned && self.public.is_none() && grad.fuses() {
                    group.held = Some(grad);
                } else {
                    let (grad, norms) = grad.kept()?;
                    sq.iter_mut().zip(norms).for_each(|(s, n)| *s += n);
                    group.normed.push(grad);
                }
            }
        }
        if group.delivered == group.members { self.close(gi) } else { Ok(()) }
    }
}

impl Clipper<'_> {
    /// Weights and contracts a complete group, and frees its factors.
    fn close(&mut self, gi: usize) -> Result<()> {
        let _op = spans::span(Kind::Backward, "clip and contract");
        let group = &mut self.groups[gi];
        let (clip, threshold) = (self.clipping.clip, group.threshold);
        let (held, normed) = (std::mem::take(&mut group.held), std::mem::take(&mut group.normed));
        let mut sq = match std::mem::replace(&mut group.sq, SqNorms::Cpu(Vec::new())) {
            SqNorms::Cpu(sq) => sq,
            SqNorms::Gpu(sq) => {
                let (Some(sq), Some(gpu)) = (sq, self.step.grads.gpu().cloned()) else { return Ok(()) };
                let counters = self.step.counters.ok_or_else(|| Error::autograd("run", "no counters on the GPU"))?;
                let dtype = self.step.grads.dtype();
                let private = self.public.map_or(sq.numel(), |p| p.from);
                let tally = counters.tally()?;
                let of = |sq: &Array, clip, tally: Option<&Array>| clip_weights(&gpu, sq, clip, dtype, tally);
                let weights = match self.public {
                    None => of(&sq, (clip, threshold), Some(&tally))?,
                    Some(public) => {
                        let mut all = Array::zeros(sq.shape(), (dtype, &gpu));
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
                    let range = range_of(&self.step, &grad)?;
                    self.step.grads.add(&range, &grad, Weights::OnGpu(&weights))?;
                }
                return Ok(());
            }
        };
        let factor = move |sq: f64| clip.factor(sq, threshold);
        if let Some(grad) = held {
            let range = range_of(&self.step, &grad)?;
            sq = self.step.grads.add(&range, &grad, Weights::Clip(&sq, &factor))?;
        }
        let private = self.public.map_or(sq.len(), |p| p.from);
        let weight = |(i, &s): (usize, &f64)| match self.public {
            Some(p) if i >= p.from => p.weight * s.is_finite() as u8 as f64,
            _ => factor(s),
        };
        let weights: Vec<f64> = sq.iter().enumerate().map(weight).collect();
        for grad in normed {
            let range = range_of(&self.step, &grad)?;
            self.step.grads.add(&range, &grad, Weights::Given(&weights))?;
        }
        for &sq in &sq[..private] {
            self.groups[gi].below += (sq.sqrt() <= threshold) as u64;
            self.tally.pairs += 1;
            self.tally.clipped += (sq.is_finite() && sq.sqrt() > threshold) as u64;
            self.tally.non_finite += !sq.is_finite() as u64;
        }
        Ok(())
    }
}

/// The stretch of the flat gradient for a parameter's gradient.
fn range_of(step: &Context, grad: &ParamGrad) -> Result<std::ops::Range<usize>> {
    step.flat.range(grad.param()).ok_or_else(|| Error::invalid("run", "a parameter outside the step"))
}
