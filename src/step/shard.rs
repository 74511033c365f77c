//! ZeRO (Rajbhandari et al. 2020): the ranks share the model's state instead of each keeping a full copy.
//!
//! The flat buffers are divided into one stretch for each rank, of equal length except for the last ones; the rank *owns* it. A rank keeps
//! the optimizer's buffers of its own stretch only (stage 1), and also the gradient's (stage 2): then the gradient is accumulated in
//! buckets, each of which is summed over the ranks and freed as soon as backward has delivered it. The owner draws the noise according to
//! the position in the flat buffer, so that it has the same bits at any number of ranks and at any stage. After the update every rank
//! receives all parameters.
//!
//! Bytes of a rank for Ψ parameters in f32 with AdamW: 16Ψ, 8Ψ + 8Ψ/N and 4Ψ + 12Ψ/N at stages 0, 1 and 2, plus one bucket. A rank sends
//! Ψ·(N − 1)/N elements of gradients in a step, and as many of parameters; with k microbatches stage 2 sends gradients k times.

use super::flat::Flat;
use super::units::{Next, Units};
use crate::array::Array;
use crate::autograd::Param;
use crate::base::{DType, Error, Result};
use crate::device::cuda::{Tag, TagScope};
use crate::device::spans::{self, Kind};
use crate::dist::{Communicator, Pending, Shared};
use crate::optim::{FlatLayout, Segment};
use crate::random::digest;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

/// The part of the model's state that the ranks share (Rajbhandari et al. 2020, section 5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Stage 0, data parallelism: every rank keeps a full copy.
    #[default]
    Replicated,
    /// Stage 1: each rank keeps its part of the optimizer's buffers.
    Optimizer,
    /// Stage 2: each rank also keeps only its part of the gradient.
    Gradients,
    /// Stage 3: each rank also keeps only its part of the parameters, which are gathered module by module when they are read.
    Parameters,
}

/// A rank's stretch is a multiple of this number of elements: a chunk of the digest, so that the owners can compute its first level.
const GRAIN: usize = digest::CHUNK;
/// Number of elements of the parameters that are sent at once.
const PIECE: usize = 4 << 20;
/// Number of elements of the buckets of stages 2 and 3, unless a parameter has more: few enough that most buckets are in transit while
/// backward continues.
const BUCKET: usize = 1 << 20;

/// The stretch of each of `size` ranks, for `n` elements.
pub(super) fn stretches(n: usize, size: usize) -> Vec<Range<usize>> {
    let each = n.div_ceil(size).next_multiple_of(GRAIN);
    (0..size).map(|r| n.min(r * each)..n.min((r + 1) * each)).collect()
}

/// The parameters of each bucket, by index, from the lengths of the parameters: the last ones first, in the order in which backward
/// delivers them.
pub(super) fn buckets(lengths: &[usize]) -> Vec<Range<usize>> {
    let mut buckets: Vec<Range<usize>> = Vec::new();
    let mut held = 0;
    for (i, n) in lengths.iter().enumerate().rev() {
        match buckets.last_mut() {
            Some(b) if held + n <= BUCKET => b.start = i,
            _ => {
                buckets.push(i..i + 1);
                held = 0;
            }
        }
        held += n;
    }
    buckets
}

/// The stretches of the ranks, and the state that this rank keeps.
pub(super) struct Shard {
    pub stage: Stage,
    pub rank: usize,
    /// The stretch of each rank.
    pub stretches: Vec<Range<usize>>,
    /// This rank's stretch of the gradient: of the step in progress, then of the last one.
    pub grads: Array,
    /// The parameters in this rank's stretch.
    pub layout: FlatLayout,
    /// The parameters of each bucket, by index, in the order in which buckets are sent.
    buckets: Vec<Range<usize>>,
}

impl Shard {
    pub fn new(flat: &Flat, ranks: &dyn Communicator, stage: Stage) -> Result<Shard> {
        if let Some(p) = flat.params().iter().find(|p| p.placed()) {
            return Err(Error::invalid(
                "with_zero",
                format!(
                    "{} belongs to one rank (Moe::place), and parts of the others' state cannot be cut around it: use Stage::Replicated",
                    p.name()
                ),
            ));
        }
        let (n, size, rank) = (flat.numel(), ranks.size(), ranks.rank());
        let stretches = stretches(n, size);
        let own = &stretches[rank];
        let segments = flat.segments().iter().filter_map(|s| {
            let (from, to) = (s.range.start.max(own.start), s.range.end.min(own.end));
            (from < to).then(|| Segment { range: from - own.start..to - own.start, decay: s.decay })
        });
        let lengths: Vec<usize> = flat.segments().iter().map(|s| s.range.len()).collect();
        let buckets = buckets(&lengths);
        let _tag = TagScope::new(Tag::Gradient);
        let grads = Array::zeros(&[own.len()], flat.dtype());
        let layout = FlatLayout::new(segments.collect(), own.len());
        Ok(Shard { stage, rank, stretches: stretches.clone(), grads, layout, buckets })
    }
    /// This rank's stretch.
    pub fn own(&self) -> Range<usize> {
        self.stretches[self.rank].clone()
    }
    /// Starts to sum a stretch of the gradient over the ranks; for a bucket, the ranks agree on it first.
    fn begin(&self, ranks: &Shared, at: usize, part: Array, agree: Option<Next>) -> Pending {
        let end = at + part.numel();
        let pieces: Vec<usize> =
            self.stretches.iter().map(|s| s.end.min(end).saturating_sub(s.start.max(at))).collect();
        ranks.begin(move |ranks| {
            if let Some(next) = agree {
                next.agree(ranks)?;
            }
            ranks.reduce_scatter_parts("gradients", &part, &pieces)
        })
    }
    /// Adds this rank's part of the sum, once it has arrived.
    fn reduced(&mut self, at: usize, sum: Pending) -> Result<()> {
        let _phase = spans::span(Kind::Phase, "reduce");
        let sum = sum.wait()?;
        if sum.numel() > 0 {
            let to = at.max(self.own().start) - self.own().start;
            let mut all = self.grads.slice(0, to..to + sum.numel())?.copy();
            all.add_in_place(&sum)?;
            self.grads.write(to, &all)?;
        }
        Ok(())
    }
    /// Computes this rank's stretch of the sum of all ranks' gradients, bucket by bucket (stage 1).
    pub fn reduce_whole(&mut self, ranks: &Shared, buckets: &[Range<usize>], grads: &Array) -> Result<()> {
        buckets.iter().try_for_each(|b| {
            let part = grads.slice(0, b.clone())?.contiguous();
            let sum = self.begin(ranks, b.start, part, None);
            self.reduced(b.start, sum)
        })
    }
    /// The digest's first level of the whole sum, from the levels that the owners computed.
    pub fn first_level(&self, ranks: &dyn Communicator, key: &[u32]) -> Result<Vec<u32>> {
        let words = |elements: usize| elements * self.grads.dtype().size() / 4;
        let level = |elements: usize| 4 * words(elements).div_ceil(digest::CHUNK);
        let own = crate::with_float!("run", self.grads.dtype(), |T| {
            let words = bytemuck::cast_slice::<T, u32>(self.grads.as_slice::<T>()?);
            Ok(if words.is_empty() { Vec::new() } else { digest::first_level(key, words) })
        })?;
        // The collective needs equal parts; the padding is removed again.
        let most = self.stretches.iter().map(|s| level(s.len())).max().unwrap_or(0);
        let mut part = own;
        part.resize(most, 0);
        let all = ranks.all_gather("digest of the gradients", &Array::from_slice(&part, &[most])?)?.to_vec::<u32>()?;
        let of = |(r, s): (usize, &Range<usize>)| all[r * most..r * most + level(s.len())].to_vec();
        let all: Vec<u32> = self.stretches.iter().enumerate().flat_map(of).collect();
        // An empty parameter list counts as one chunk, too.
        Ok(if all.is_empty() { digest::first_level(key, &[]) } else { all })
    }
    /// Sends every rank the whole of a buffer, of which each owner has its stretch: `put` receives pieces of it and their positions.
    pub fn gather(
        &self,
        ranks: &dyn Communicator,
        what: &str,
        own: &Array,
        mut put: impl FnMut(usize, &Array) -> Result<()>,
    ) -> Result<()> {
        let most = self.stretches.iter().map(Range::len).max().unwrap_or(0);
        let piece = (PIECE / ranks.size()).max(1);
        for from in (0..most).step_by(piece) {
            let to = most.min(from + piece);
            let mut part = Array::zeros(&[to - from], own.dtype());
            let (a, b) = (from.min(own.numel()), to.min(own.numel()));
            if a < b {
                part.write(0, &own.slice(0, a..b)?)?;
            }
            let all = ranks.all_gather(what, &part)?;
            for (r, s) in self.stretches.iter().enumerate() {
                let (a, b) = (from.min(s.len()), to.min(s.len()));
                if a < b {
                    let at = r * (to - from);
                    put(s.start + a, &all.slice(0, at..at + b - a)?)?;
                }
            }
        }
        Ok(())
    }
}

/// Number of buckets that may be in transit at once, besides the one that is being filled.
const AHEAD: usize = 2;

/// The gradients of one step while they are accumulated in buckets (stages 2 and 3).
pub(super) struct Buckets<'a> {
    shard: &'a mut Shard,
    ranks: &'a Shared,
    flat: &'a Flat,
    /// The shared parameters, at stage 3.
    units: Option<Arc<Units>>,
    /// Buckets that are being summed, and their positions.
    sums: VecDeque<(usize, Pending)>,
    /// The memory of each bucket that is being filled.
    open: Vec<Option<Array>>,
    /// For each bucket, the number of parameters that have not been delivered yet.
    left: Vec<usize>,
    /// The bucket that is sent next: the order is the same on every rank, whatever their graphs deliver.
    next: usize,
}

impl<'a> Buckets<'a> {
    pub fn new(shard: &'a mut Shard, ranks: &'a Shared, flat: &'a Flat) -> Buckets<'a> {
        let left: Vec<usize> = shard.buckets.iter().map(Range::len).collect();
        let (open, units) = (left.iter().map(|_| None).collect(), flat.units().cloned());
        Buckets { open, left, next: 0, shard, ranks, flat, units, sums: VecDeque::new() }
    }
    pub fn dtype(&self) -> DType {
        self.shard.grads.dtype()
    }
    /// The stretch of a bucket in the flat buffer.
    fn range(&self, bucket: usize) -> Range<usize> {
        let (params, segments) = (&self.shard.buckets[bucket], self.flat.segments());
        segments[params.start].range.start..segments[params.end - 1].range.end
    }
    /// Calls `add` with a bucket, which is zeros at first, and the position of a parameter in it.
    pub fn add<R>(&mut self, param: &Param, add: impl FnOnce(&mut Array, &Range<usize>) -> Result<R>) -> Result<R> {
        let found = self.flat.index(param);
        let bucket = found.and_then(|i| self.shard.buckets.iter().position(|b| b.contains(&i)));
        // The bucket has not been sent yet, because a parameter is contracted once in a microbatch.
        let (Some(index), Some(bucket)) = (found, bucket.filter(|b| *b >= self.next)) else {
            let message = format!("{} was delivered after its bucket was sent, or is not of this step", param.name());
            return Err(Error::autograd("run", message));
        };
        let param = &self.flat.segments()[index].range;
        let range = self.range(bucket);
        let dtype = self.dtype();
        let grads = self.open[bucket].get_or_insert_with(|| {
            let _tag = TagScope::new(Tag::Gradient);
            Array::zeros(&[range.len()], dtype)
        });
        let done = add(grads, &(param.start - range.start..param.end - range.start))?;
        self.left[bucket] = self.left[bucket].saturating_sub(1);
        while self.next < self.left.len() && self.left[self.next] == 0 {
            self.send()?;
        }
        Ok(done)
    }
    /// Sends the remaining buckets, including parameters that were not reached.
    pub fn finish(&mut self) -> Result<()> {
        while self.next < self.left.len() {
            self.send()?;
        }
        self.drain(0)?;
        // Reset for the next microbatch.
        self.next = 0;
        self.left = self.shard.buckets.iter().map(Range::len).collect();
        self.units.as_ref().map_or(Ok(()), |units| units.end())
    }
    /// Takes part with zeros in a microbatch of other ranks.
    pub fn idle(&mut self) -> Result<()> {
        let Some(units) = self.units.clone() else { return self.finish() };
        units.serve(|bucket| {
            let range = self.range(bucket);
            // This rank has already agreed on the bucket with the others.
            let sum = self.shard.begin(self.ranks, range.start, Array::zeros(&[range.len()], self.dtype()), None);
            self.shard.reduced(range.start, sum)
        })
    }
    /// Waits until at most `most` buckets are in transit.
    fn drain(&mut self, most: usize) -> Result<()> {
        while self.sums.len() > most {
            if let Some((at, sum)) = self.sums.pop_front() {
                self.shard.reduced(at, sum)?;
            }
        }
        Ok(())
    }
    fn send(&mut self) -> Result<()> {
        let range = self.range(self.next);
        let part = self.open[self.next].take().unwrap_or_else(|| Array::zeros(&[range.len()], self.dtype()));
        let agree = self.units.is_some().then_some(Next::Reduce(self.next));
        self.next += 1;
        let sum = self.shard.begin(self.ranks, range.start, part, agree);
        self.sums.push_back((range.start, sum));
        self.drain(AHEAD)
    }
}
