//! The reduce slot: sums over the ranks, in the order of the ranks, so that the result has the same bits on each.

use super::counters::Tally;
use crate::array::Array;
use crate::base::Result;
use crate::device::spans::{self, Kind};
use crate::dist::Communicator;
use std::ops::Range;

/// The counts of a step, besides the gradient.
pub(super) struct Counts {
    /// Samples, private or public.
    pub samples: usize,
    /// Private samples among them.
    pub private: usize,
    /// Sum of the losses (0 on a GPU, where counters in device memory hold it).
    pub loss: f64,
    /// Clipped pairs (none on a GPU, where counters in device memory hold them).
    pub tally: Tally,
    /// For each clipping group, the number of private samples with a norm of at most the threshold.
    pub below: Vec<u64>,
}

/// Sums the gradient, bucket by bucket, and the counts over all ranks.
pub(super) fn reduce(
    ranks: Option<&dyn Communicator>,
    buckets: &[Range<usize>],
    grads: &mut Array,
    own: Counts,
) -> Result<Counts> {
    let Some(ranks) = ranks else { return Ok(own) };
    let _phase = spans::span(Kind::Phase, "reduce");
    for bucket in buckets {
        let sum = ranks.all_reduce("gradients", &grads.slice(0, bucket.clone())?)?;
        grads.write(bucket.start, &sum)?;
    }
    let Tally { pairs, clipped, non_finite } = own.tally;
    let counted = [own.samples as u64, own.private as u64, pairs, clipped, non_finite];
    let all: Vec<f64> =
        std::iter::once(own.loss).chain(counted.into_iter().chain(own.below).map(|c| c as f64)).collect();
    let all = ranks.all_reduce("counts", &Array::from_slice(&all, &[all.len()])?)?.to_f64();
    Ok(Counts {
        loss: all[0],
        samples: all[1] as usize,
        private: all[2] as usize,
        tally: Tally { pairs: all[3] as u64, clipped: all[4] as u64, non_finite: all[5] as u64 },
        below: all[6..].iter().map(|c| *c as u64).collect(),
    })
}
