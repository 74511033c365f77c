//! Collective operations between the ranks of one training run.
//!
//! [`Communicator`] has the operations that a training step needs. [`Local`] runs the ranks as threads of one process, for tests and for
//! one machine. [`Mpi`] runs them as processes that `mpirun` or Slurm starts, on one machine or several. [`Shared`] lets several parts of a
//! program use one communicator, and runs collectives in the background. [`Simulated`] gives any of them the speed, or the faults, of a
//! network.
//!
//! Every collective is called by all ranks, in the same order, with the same shapes. If a rank calls something else, ends or stalls, the
//! others stop with an error that names it.

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

/// The traffic of a communicator, as seen by one rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Number of collectives.
    pub calls: u64,
    /// Bytes this rank would send in a ring: 2·(N−1)/N of a buffer for an all-reduce, (N−1)/N for a reduce-scatter, a broadcast or an
    /// all-to-all, and N−1 times the own part for an all-gather. For an exchange of rows, the rows for other ranks and a count for each of
    /// them.
    pub bytes: u64,
}

/// A communicator's traffic so far.
#[derive(Default)]
struct Counter {
    calls: AtomicU64,
    bytes: AtomicU64,
}

impl Counter {
    /// Counts a collective in which this rank sent `bytes` bytes.
    fn count(&self, bytes: f64) {
        self.calls.fetch_add(1, Relaxed);
        self.bytes.fetch_add(bytes.round() as u64, Relaxed);
    }
    fn traffic(&self) -> Traffic {
        Traffic { calls: self.calls.load(Relaxed), bytes: self.bytes.load(Relaxed) }
    }
}

/// A group of ranks that compute together. Results have the same bits on every rank and in every run, because sums are taken in the order
/// of the ranks.
pub trait Communicator: Send {
    /// The number of this rank, from 0.
    fn rank(&self) -> usize;
    /// The number of ranks.
    fn size(&self) -> usize;
    /// The sum of `x` over all ranks, in its shape. `what` names the buffer in errors.
    fn all_reduce(&self, what: &str, x: &Array) -> Result<Array>;
    /// This rank's part of the sum over all ranks: `x [N·n]` gives `[n]`.
    fn reduce_scatter(&self, what: &str, x: &Array) -> Result<Array>;
    /// The parts of all ranks, in order: `[n]` gives `[N·n]`.
    fn all_gather(&self, what: &str, part: &Array) -> Result<Array>;
    /// The parts of all ranks, in order, where rank r's part `own` has `parts[r]` elements. `parts` must be the same on every rank.
    fn all_gather_parts(&self, what: &str, own: &Array, parts: &[usize]) -> Result<Array>;
    /// The root's array, on every rank.
    fn broadcast(&self, what: &str, x: &Array, root: usize) -> Result<Array>;
    /// Sends part r of `x [N·n]` to rank r. The result has the part that every rank sent to this one, in the order of the ranks.
    fn all_to_all(&self, what: &str, x: &Array) -> Result<Array>;
    /// Sends rows of `x [n, …]` to each rank: the first `rows[0]` to rank 0, the next `rows[1]` to rank 1, and so on. The result has the
    /// rows that all ranks sent to this one, in the order of the ranks, and the number from each. Ranks may send any number of rows, and
    /// the receiver does not need the number beforehand. The traffic is what this rank sends to the others.
    fn all_to_all_rows(&self, what: &str, x: &Array, rows: &[usize]) -> Result<(Array, Vec<usize>)>;
    /// This rank's part of the sum of `x [n]` over all ranks, where rank r's part is the next `parts[r]` elements. `parts` must be the same
    /// on every rank. The sum is taken in the order of the ranks, so that its bits are those of [`Communicator::all_reduce`].
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
    /// Returns when all ranks have called it.
    fn barrier(&self) -> Result<()>;
    /// The ranks that give the same `colour`, as a group of their own, in the order of their numbers. Every rank of this communicator must
    /// call it.
    fn split(&self, colour: usize) -> Result<Box<dyn Communicator>>;
    /// Ends the group: this rank takes no further part in it, and every other rank's collective, including one in progress, fails with
    /// `why`.
    fn abort(&self, why: &str);
    /// The traffic so far.
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

/// The sum of arrays of one shape, taken in their order.
fn sum(all: impl IntoIterator<Item = Result<Array>>) -> Result<Array> {
    let mut all = all.into_iter();
    let first = all.next().ok_or_else(|| Error::invalid("collective", "a sum over no ranks"))?;
    let mut out = first?.copy();
    for x in all {
        out.add_in_place(&x?)?;
    }
    Ok(out)
}

/// Joins arrays end to end into one flat array.
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

/// Fails unless `own` has the length of this rank's part of `parts`.
fn expect_part(own: &Array, parts: &[usize], (rank, size): (usize, usize)) -> Result<()> {
    if parts.len() == size && own.shape() == [parts[rank]] {
        return Ok(());
    }
    let message = format!("{:?} as part {rank} of {parts:?}, for {size} ranks", own.shape());
    Err(Error::shape("all_gather_parts", message))
}

/// Fails unless `rows` divides the rows of `x` among the ranks.
fn expect_rows(x: &Array, rows: &[usize], size: usize) -> Result<()> {
    let all = rows.iter().try_fold(0usize, |all, r| all.checked_add(*r));
    if rows.len() == size && x.rank() > 0 && Some(x.shape()[0]) == all {
        return Ok(());
    }
    Err(Error::shape("all_to_all_rows", format!("{rows:?} rows for {size} ranks of {:?}", x.shape())))
}
