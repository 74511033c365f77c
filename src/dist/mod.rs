//! Collectives between the ranks of one training run.
//!
//! [`Communicator`] is what a step needs of them. [`Local`] runs the ranks as threads of one process: for tests, and for one
//! machine. Every collective is called by all ranks, in the same order, with the same shapes; a rank that does otherwise, dies or
//! stalls makes the others stop with a sentence that names it.

mod local;
mod shared;

pub use local::Local;
pub use shared::Shared;

use crate::array::Array;
use crate::base::{Error, Result};

/// What went through a communicator, as seen by one rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Collectives.
    pub calls: u64,
    /// Bytes this rank would send in a ring: 2·(N−1)/N of a buffer for an all-reduce, (N−1)/N for a reduce-scatter, a broadcast
    /// or an all-to-all, N−1 parts for an all-gather; of an exchange of rows, the rows for other ranks and a count for each.
    pub bytes: u64,
}

/// A group of ranks that compute together. Results have the same bits on every rank and in every run: sums are taken in the
/// order of the ranks.
pub trait Communicator: Send {
    /// This rank, from 0.
    fn rank(&self) -> usize;
    /// Number of ranks.
    fn size(&self) -> usize;
    /// Σ over ranks. `what` names the buffer in errors.
    fn all_reduce(&self, what: &str, x: &Array) -> Result<Array>;
    /// This rank's part of the sum: `x [N·n]` gives `[n]`.
    fn reduce_scatter(&self, what: &str, x: &Array) -> Result<Array>;
    /// All ranks' parts, in order: `[n]` gives `[N·n]`.
    fn all_gather(&self, what: &str, part: &Array) -> Result<Array>;
    /// The root's array, on every rank.
    fn broadcast(&self, what: &str, x: &Array, root: usize) -> Result<Array>;
    /// Part r of `x [N·n]` goes to rank r: the result has the part of every rank for this one, in the order of the ranks.
    fn all_to_all(&self, what: &str, x: &Array) -> Result<Array>;
    /// Rows of `x [n, …]` for each rank, `rows` of them for one rank after the other: the result has everybody's rows for this
    /// rank, in the order of the ranks, and how many there are of each. Ranks may send any number, and need not know what they will
    /// receive. The traffic is what this rank sends to the others.
    fn all_to_all_rows(&self, what: &str, x: &Array, rows: &[usize]) -> Result<(Array, Vec<usize>)>;
    /// This rank's part of the sum of `x [n]`, where rank r's part is the next `parts[r]` elements; the same `parts` on every rank.
    /// Summed in the order of the ranks, so that the bits are those of [`Communicator::all_reduce`].
    fn reduce_scatter_parts(&self, what: &str, x: &Array, parts: &[usize]) -> Result<Array> {
        let own = parts.get(self.rank()).copied().unwrap_or(0);
        let (all, received) = self.all_to_all_rows(what, x, parts)?;
        if let Some(rank) = received.iter().position(|&n| n != own) {
            let message =
                format!("rank {rank} sent {} elements of {what}, of which this rank has {own}", received[rank]);
            return Err(Error::shape("reduce_scatter_parts", message));
        }
        let mut sum = all.slice(0, 0..own)?.copy();
        for rank in 1..self.size() {
            sum.add_in_place(&all.slice(0, rank * own..(rank + 1) * own)?)?;
        }
        Ok(sum)
    }
    /// Returns when all ranks are here.
    fn barrier(&self) -> Result<()>;
    /// What went through so far.
    fn traffic(&self) -> Traffic;
}
