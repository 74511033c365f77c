//! Experts on ranks: rows are sent to the rank that holds their expert, and the outputs come back.

use super::experts::Experts;
use crate::array::Array;
use crate::autograd::{Cotangents, Differentiable, NO_PARAMS, OpInfo, Rule};
use crate::base::{DType, Error, Result};
use crate::dist::{Communicator, Shared};
use crate::ops::combine::combine;
use crate::ops::route::Routing;
use crate::{Samples, Tensor};
use std::ops::Range;

/// Which rank holds which of a layer's experts.
pub(super) struct Placement {
    ranks: Shared,
    /// The experts of each rank, in order, in ranges that differ by at most one in size.
    of: Vec<Range<usize>>,
}

impl Placement {
    pub(super) fn new(ranks: Shared, experts: usize) -> Placement {
        let n = ranks.size();
        let of = (0..n).map(|r| r * experts / n..(r + 1) * experts / n).collect();
        Placement { ranks, of }
    }
    /// The experts of this rank.
    pub(super) fn own(&self) -> Range<usize> {
        self.of[self.ranks.rank()].clone()
    }
    /// Does the same as [`Experts::forward`], where each row is computed by the rank that holds its expert. The result has a row for each
    /// choice, sorted by expert.
    ///
    /// The number of rows for each expert is sent first (4 bytes per expert), then the rows; the outputs come back the same way. In all,
    /// 2·d elements are sent for each choice that falls on another rank, and as many in the backward pass.
    pub(super) fn forward(&self, experts: &Experts, flat: &Tensor, routing: &Routing) -> Result<Tensor> {
        if flat.device().is_cuda() {
            return Err(Error::device("Moe", "ranks are on the CPU so far; move the model there"));
        }
        let offsets = routing.groups().offsets();
        let counts: Vec<u32> = offsets.windows(2).map(|w| (w[1] - w[0]) as u32).collect();
        let to: Vec<usize> = self.of.iter().map(|r| offsets[r.end] - offsets[r.start]).collect();
        let widths: Vec<usize> = self.of.iter().map(Range::len).collect();
        let all = Array::from_slice(&counts, &[counts.len()])?;
        // For each rank in turn, the number of its rows for each expert of this rank.
        let (theirs, _) = self.ranks.all_to_all_rows("rows of each expert", &all, &widths)?;
        let own = self.own().len();
        let theirs = theirs.to_vec::<u32>()?;
        let expert =
            theirs.iter().enumerate().flat_map(|(i, &n)| std::iter::repeat_n((i % own.max(1)) as u32, n as usize));
        let expert: Vec<u32> = expert.collect();
        let from: Vec<usize> =
            (0..self.of.len()).map(|r| theirs[r * own..(r + 1) * own].iter().map(|&n| n as usize).sum()).collect();
        let rows = flat.index_select(0, Tensor::new(routing.tokens_of_rows().clone()))?;
        let here = self.exchange(&rows, &to, &from)?;
        // A rank that received no rows runs the experts all the same, so that it takes part in the backward pass.
        let local = Routing::new(Array::from_slice(&expert, &[expert.len(), 1])?, own)?;
        // These rows come from samples of several ranks, which this rank cannot tell apart.
        let y = experts.forward(&here, &local, &Samples::uniform(1, expert.len()))?;
        let ones = Tensor::new(Array::full(&[expert.len(), 1], 1.0, y.dtype().compute()));
        let out = combine(&y, &ones, &local)?;
        self.exchange(&out, &from, &to)
    }
    /// Sends `to[r]` rows to each rank r and receives `from[r]` rows from it.
    fn exchange(&self, x: &Tensor, to: &[usize], from: &[usize]) -> Result<Tensor> {
        let (y, received) = self.ranks.all_to_all_rows("rows of experts", x.array(), to)?;
        if received != from {
            let message = format!("{received:?} rows came, {from:?} were announced");
            return Err(Error::invalid("Moe", message));
        }
        let back = || Back { ranks: self.ranks.clone(), rows: from.to_vec() };
        Ok(Tensor::record(y, &[x], &[], back))
    }
}

/// This op is not in the registry, because there is no case of it without other ranks. The tests of placed layers check its gradient.
static EXCHANGE: OpInfo =
    OpInfo { name: "exchange_rows", differentiable: Differentiable::Yes, factor: NO_PARAMS, cases: &[] };

/// The backward pass: gradients go back to the ranks where the rows came from.
struct Back {
    ranks: Shared,
    rows: Vec<usize>,
}

impl Rule for Back {
    fn info(&self) -> &'static OpInfo {
        &EXCHANGE
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        back.input(0, self.ranks.all_to_all_rows("gradients of rows", &grad.contiguous(), &self.rows)?.0);
        Ok(())
    }
}

/// Bytes that one rank sends to the others in a forward and a backward pass of a placed layer of width `d`. `away` of its choices fall on
/// experts of other ranks, and it receives `here` rows from them. The counts and their sizes are included.
pub fn expert_traffic(away: usize, here: usize, d: usize, dtype: DType, (experts_away, ranks): (usize, usize)) -> u64 {
    let rows = 2 * (away + here) * d * dtype.size();
    // The number of rows for each expert, and with each of five exchanges a count for each other rank.
    (rows + 4 * experts_away + 5 * 8 * (ranks - 1)) as u64
}
