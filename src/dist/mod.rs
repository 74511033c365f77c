//! Collectives between the ranks of one training run.
//!
//! [`Communicator`] is what a step needs of them. [`Local`] runs the ranks as threads of one process: for tests, and for one
//! machine. [`Mpi`] runs them as processes that `mpirun` or Slurm starts, on one machine or several. [`Shared`] lets several parts of a
//! program use one communicator, and does collectives in the background. [`Simulated`] makes any of them as slow, or as unreliable, as
//! a network.
//!
//! Every collective is called by all ranks, in the same order, with the same shapes; a rank that does otherwise, dies or
//! stalls makes the others stop with a sentence that names it.

mod local;
#[cfg(feature = "mpi")]
mod mpi;
mod shared;
mod simulated;

pub use local::Local;
#[cfg(feature = "mpi")]
pub use mpi::Mpi;
pub use shared::{Pending, Shared};
pub use simulated::{Fault, Simulated};

use crate::array::Array;
use crate::base::{Error, Result};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// What went through a communicator, as seen by one rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Collectives.
    pub calls: u64,
    /// Bytes this rank would send in a ring: 2·(N−1)/N of a buffer for an all-reduce, (N−1)/N for a reduce-scatter, a broadcast
    /// or an all-to-all, N−1 times the own part for an all-gather; of an exchange of rows, the rows for other ranks and a count for each.
    pub bytes: u64,
}

/// A communicator's traffic so far.
#[derive(Default)]
struct Counter {
    calls: AtomicU64,
    bytes: AtomicU64,
}

impl Counter {
    /// A collective has been made, in which this rank sent so many bytes.
    fn count(&self, bytes: f64) {
        self.calls.fetch_add(1, Relaxed);
        self.bytes.fetch_add(bytes.round() as u64, Relaxed);
    }
    fn traffic(&self) -> Traffic {
        Traffic { calls: self.calls.load(Relaxed), bytes: self.bytes.load(Relaxed) }
    }
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
    /// All ranks' parts, in order, where rank r's part `own` has `parts[r]` elements; the same `parts` on every rank.
    fn all_gather_parts(&self, what: &str, own: &Array, parts: &[usize]) -> Result<Array>;
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
        sum((0..self.size()).map(|rank| all.slice(0, rank * own..(rank + 1) * own)))
    }
    /// Returns when all ranks are here.
    fn barrier(&self) -> Result<()>;
    /// The ranks that give the same `colour`, as a group of their own, in the order of their numbers. Every rank of this group calls it.
    fn split(&self, colour: usize) -> Result<Box<dyn Communicator>>;
    /// Ends the group: this rank takes part in nothing more, and every other rank's collective, the one in work included, fails with
    /// `why`.
    fn abort(&self, why: &str);
    /// What went through so far.
    fn traffic(&self) -> Traffic;
}

impl Communicator for Box<dyn Communicator> {
    fn rank(&self) -> usize {
        (**self).rank()
    }
    fn size(&self) -> usize {
        (**self).size()
    }
    fn all_reduce(&self, what: &str, x: &Array) -> Result<Array> {
        (**self).all_reduce(what, x)
    }
    fn reduce_scatter(&self, what: &str, x: &Array) -> Result<Array> {
        (**self).reduce_scatter(what, x)
    }
    fn all_gather(&self, what: &str, part: &Array) -> Result<Array> {
        (**self).all_gather(what, part)
    }
    fn all_gather_parts(&self, what: &str, own: &Array, parts: &[usize]) -> Result<Array> {
        (**self).all_gather_parts(what, own, parts)
    }
    fn broadcast(&self, what: &str, x: &Array, root: usize) -> Result<Array> {
        (**self).broadcast(what, x, root)
    }
    fn all_to_all(&self, what: &str, x: &Array) -> Result<Array> {
        (**self).all_to_all(what, x)
    }
    fn all_to_all_rows(&self, what: &str, x: &Array, rows: &[usize]) -> Result<(Array, Vec<usize>)> {
        (**self).all_to_all_rows(what, x, rows)
    }
    fn barrier(&self) -> Result<()> {
        (**self).barrier()
    }
    fn split(&self, colour: usize) -> Result<Box<dyn Communicator>> {
        (**self).split(colour)
    }
    fn abort(&self, why: &str) {
        (**self).abort(why)
    }
    fn traffic(&self) -> Traffic {
        (**self).traffic()
    }
}

/// The sum of arrays of one shape, in their order.
fn sum(all: impl IntoIterator<Item = Result<Array>>) -> Result<Array> {
    let mut all = all.into_iter();
    let first = all.next().ok_or_else(|| Error::invalid("collective", "a sum over no ranks"))?;
    let mut out = first?.copy();
    for x in all {
        out.add_in_place(&x?)?;
    }
    Ok(out)
}

/// One after the other, flat.
fn join(parts: &[Array], dtype: crate::DType) -> Result<Array> {
    let mut out = Array::zeros(&[parts.iter().map(Array::numel).sum()], dtype);
    let mut at = 0;
    for p in parts {
        out.write(at, &p.reshape(&[p.numel()])?)?;
        at += p.numel();
    }
    Ok(out)
}

/// The length of one of `size` equal parts of `x`.
fn equal_parts(op: &'static str, x: &Array, size: usize) -> Result<usize> {
    match x.shape() {
        [n] if n.is_multiple_of(size) => Ok(n / size),
        other => Err(Error::shape(op, format!("{other:?} does not divide into {size} parts"))),
    }
}

/// That `own` is this rank's part of `parts`.
fn expect_part(own: &Array, parts: &[usize], (rank, size): (usize, usize)) -> Result<()> {
    if parts.len() == size && own.shape() == [parts[rank]] {
        return Ok(());
    }
    let message = format!("{:?} as part {rank} of {parts:?}, for {size} ranks", own.shape());
    Err(Error::shape("all_gather_parts", message))
}

/// That `rows` divide `x` among the ranks.
fn expect_rows(x: &Array, rows: &[usize], size: usize) -> Result<()> {
    let all = rows.iter().try_fold(0usize, |all, r| all.checked_add(*r));
    if rows.len() == size && x.rank() > 0 && Some(x.shape()[0]) == all {
        return Ok(());
    }
    Err(Error::shape("all_to_all_rows", format!("{rows:?} rows for {size} ranks of {:?}", x.shape())))
}
