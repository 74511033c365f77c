//! Optimizers over flat parameters, and learning-rate schedules.
//!
//! An optimizer sees one flat buffer holding every parameter of one dtype, its gradient in the same layout, and which
//! stretches are decayed. One pass over memory per step, whatever the number of parameters.

mod adamw;
mod schedule;
mod sgd;

pub use adamw::AdamW;
pub use schedule::Schedule;
pub use sgd::Sgd;

use crate::error::{Error, Result};
use crate::tensor::Array;
use std::ops::Range;

/// A stretch of the flat buffer: one parameter.
#[derive(Clone, Debug)]
pub struct Segment {
    /// Elements of the flat buffer.
    pub range: Range<usize>,
    /// Whether weight decay applies: matrices and larger, not biases and norm gains.
    pub decay: bool,
}

/// Updates flat parameters from flat gradients.
pub trait Optimizer: Send {
    /// Name and hyper-parameters, for run folders.
    fn describe(&self) -> String;
    /// Number of state buffers of the parameters' size.
    fn slots(&self) -> &'static [&'static str];
    /// One step. `step` counts from 1; `params`, `grads` and every buffer of `state` are flat, of one size and dtype
    /// (f32 or f64).
    fn update(
        &self,
        step: u64,
        lr: f64,
        params: &mut Array,
        grads: &Array,
        state: &mut [Array],
        segments: &[Segment],
    ) -> Result<()>;
}

/// Cuts `0..n` so that no piece crosses a change of decay: (piece, decayed).
pub(crate) fn pieces(n: usize, segments: &[Segment]) -> Vec<(Range<usize>, bool)> {
    let mut out: Vec<(Range<usize>, bool)> = Vec::new();
    for s in segments {
        match out.last_mut() {
            Some((r, d)) if *d == s.decay && r.end == s.range.start => r.end = s.range.end,
            _ => out.push((s.range.clone(), s.decay)),
        }
    }
    if out.last().is_none_or(|(r, _)| r.end < n) {
        out.push((out.last().map_or(0, |(r, _)| r.end)..n, false));
    }
    out
}

pub(crate) fn check(op: &'static str, name: &str, v: f64, ok: bool) -> Result<()> {
    if ok { Ok(()) } else { Err(Error::invalid(op, format!("{name} = {v} is out of range"))) }
}
