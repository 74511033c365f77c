//! The update slot: the gradient is scaled to a mean, and the optimizer changes the parameters.

use super::capture::StepScalars;
use super::counters::Counters;
use super::flat::Flat;
use super::shard::{Shard, Stage};
use crate::array::Array;
use crate::base::{Float, Result};
use crate::device::spans::{self, Kind};
use crate::dist::Communicator;
use crate::kernels::elementwise::cuda::scale_in_place;
use crate::kernels::elementwise::for_each_mut;
use crate::optim::{GpuUpdate, Optimizer, Update};
use crate::with_float;

/// One update of the parameters from `scale`·`grads`, as step number `step` (from 1) at learning rate `lr`. On a GPU nothing is changed if
/// the counters' stop flag is set after a non-finite loss.
pub(super) fn update(
    (flat, optimizer): (&mut Flat, &dyn Optimizer),
    (grads, scale): (&mut Array, f64),
    state: &mut [Array],
    (step, lr): (u64, f64),
    (counters, scalars): (Option<&Counters>, Option<&StepScalars>),
) -> Result<()> {
    let _phase = spans::span(Kind::Phase, "update");
    scale_by(grads, scale)?;
    let stop = counters.map(Counters::stop).transpose()?;
    for buffer in state.iter_mut() {
        buffer.own()?;
    }
    flat.update(|params, layout| {
        let gpu = GpuUpdate { scalars: scalars.map(|s| &s.optimizer), stop: stop.as_ref() };
        optimizer.update(Update { gpu, ..Update::new((step, lr), params, grads, state, layout) })
    })
}

/// One update of this rank's stretch, after which every rank receives all parameters.
pub(super) fn update_shard(
    ranks: &dyn Communicator,
    (flat, optimizer): (&mut Flat, &dyn Optimizer),
    shard: &mut Shard,
    state: &mut [Array],
    (scale, at): (f64, (u64, f64)),
) -> Result<()> {
    let _phase = spans::span(Kind::Phase, "update");
    scale_by(&mut shard.grads, scale)?;
    for buffer in state.iter_mut() {
        buffer.own()?;
    }
    let shard = &*shard;
    if shard.stage == Stage::Parameters {
        return flat.update(|own, _| match own.numel() {
            0 => Ok(()),
            _ => optimizer.update(Update::new(at, own, &shard.grads, state, &shard.layout)),
        });
    }
    flat.update(|params, _| {
        let mut own = params.slice(0, shard.own())?.copy();
        if own.numel() > 0 {
            optimizer.update(Update::new(at, &mut own, &shard.grads, state, &shard.layout))?;
        }
        shard.gather(ranks, "parameters", &own, |at, part| params.write(at, part))
    })
}

/// Sets an array to zeros, in memory of its own.
pub(super) fn zero(a: &mut Array) -> Result<()> {
    a.own()?;
    if let Some(gpu) = a.gpu() {
        let (block, at) = a.block("run")?;
        return gpu.fill(block, at, a.numel() * a.dtype().size(), 0);
    }
    with_float!("run", a.dtype(), |T| {
        for_each_mut(a.as_mut_slice::<T>()?, |_| <T as Float>::ZERO);
        Ok(())
    })
}

/// a ← s·a.
fn scale_by(a: &mut Array, s: f64) -> Result<()> {
    if let Some(gpu) = a.gpu() {
        return scale_in_place(gpu, a, s);
    }
    with_float!("run", a.dtype(), |T| {
        let s = <T as crate::Element>::from_f64(s);
        for_each_mut(a.as_mut_slice::<T>()?, move |x: T| x * s);
        Ok(())
    })
}
