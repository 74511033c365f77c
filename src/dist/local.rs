//! Ranks as threads of one process.

use super::{Communicator, Traffic};
use crate::array::Array;
use crate::base::{DType, Error, Result};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// A collective as one rank called it.
#[derive(Clone)]
struct Post {
    /// Kind and name, shape and dtype: the same on every rank.
    call: String,
    data: Array,
}

#[derive(Default)]
struct Board {
    posts: Vec<Option<Post>>,
    taken: usize,
    /// Why a rank is gone, if it is.
    gone: Vec<Option<String>>,
}

struct Group {
    board: Mutex<Board>,
    changed: Condvar,
    patience: Duration,
}

impl Group {
    fn lock(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// One of several ranks that are threads of this process.
///
/// ```
/// use prismgrad::dist::{Communicator, Local};
/// use prismgrad::Array;
/// let sums = Local::run(3, |rank| {
///     let x = Array::from_slice(&[rank.rank() as f64, 1.0], &[2])?;
///     Ok(rank.all_reduce("x", &x)?.to_f64())
/// });
/// assert!(sums.into_iter().all(|s| s.unwrap() == [3.0, 3.0]));
/// ```
pub struct Local {
    rank: usize,
    size: usize,
    group: Arc<Group>,
    calls: AtomicU64,
    bytes: AtomicU64,
}

impl Local {
    /// A group of ranks, to be handed to as many threads. A rank that waits for the others longer than `patience` stops with an
    /// error that names them.
    pub fn group(size: usize, patience: Duration) -> Vec<Local> {
        let board = Board { posts: vec![None; size], taken: 0, gone: vec![None; size] };
        let group = Arc::new(Group { board: Mutex::new(board), changed: Condvar::new(), patience });
        let new = |rank| Local { rank, size, group: group.clone(), calls: 0.into(), bytes: 0.into() };
        (0..size).map(new).collect()
    }
    /// Runs `body` as every rank, each on a thread of its own, and returns their results in order. A rank that fails or panics
    /// ends the others' next collective.
    pub fn run<T: Send>(size: usize, body: impl Fn(Local) -> Result<T> + Sync) -> Vec<Result<T>> {
        let ranks = Local::group(size, Duration::from_secs(60));
        std::thread::scope(|s| {
            let threads: Vec<_> = ranks.into_iter().map(|rank| s.spawn(|| body(rank))).collect();
            threads
                .into_iter()
                .enumerate()
                .map(|(i, t)| {
                    t.join().unwrap_or_else(|_| Err(Error::invalid("Local::run", format!("rank {i} panicked"))))
                })
                .collect()
        })
    }
    fn error(&self, call: &str, why: String) -> Error {
        Error::invalid("collective", format!("rank {} at {call}: {why}", self.rank))
    }
    /// Waits until the board is `ready`. Fails when a rank has ended or the time limit has passed.
    fn wait<'a>(
        &'a self,
        mut board: MutexGuard<'a, Board>,
        (call, until): (&str, Instant),
        ready: impl Fn(&Board) -> bool,
    ) -> Result<MutexGuard<'a, Board>> {
        while !ready(&board) {
            if let Some((r, why)) = board.gone.iter().enumerate().find_map(|(r, g)| g.as_ref().map(|why| (r, why))) {
                return Err(self.error(call, format!("rank {r} is gone: {why}")));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let late: Vec<usize> = (0..self.size).filter(|&r| board.posts[r].is_none()).collect();
                let patience = self.group.patience;
                let why = format!("after {patience:?} nothing of ranks {late:?}; they stall, or took another path");
                return Err(self.error(call, why));
            }
            board = self.group.changed.wait_timeout(board, left).unwrap_or_else(|e| e.into_inner()).0;
        }
        Ok(board)
    }
    /// Everybody's array for this call, in the order of the ranks. The share of its bytes that this rank sends is counted for each
    /// of the others.
    fn exchange(&self, kind: &str, what: &str, data: &Array, share: f64) -> Result<Vec<Array>> {
        let call = format!("{kind} of {what} {:?} {}", data.shape(), data.dtype());
        let all = self.post(call, data)?;
        let bytes = (data.numel() * data.dtype().size()) as f64;
        self.count(bytes * share * (self.size as f64 - 1.0));
        Ok(all)
    }
    /// A collective has been made, in which this rank sent so many bytes.
    fn count(&self, bytes: f64) {
        self.calls.fetch_add(1, Relaxed);
        self.bytes.fetch_add(bytes.round() as u64, Relaxed);
    }
    /// Everybody's array, if all ranks made the same call.
    fn post(&self, call: String, data: &Array) -> Result<Vec<Array>> {
        if data.device().is_cuda() {
            return Err(self.error(&call, "local ranks exchange arrays of the CPU".into()));
        }
        let group = &self.group;
        let until = Instant::now() + group.patience;
        let mut board = group.lock();
        let fail = |e: Error| {
            let mut board = group.lock();
            board.gone[self.rank].get_or_insert_with(|| e.to_string());
            board.posts[self.rank] = None;
            group.changed.notify_all();
            e
        };
        // The round before is over when every rank has taken it.
        board = match self.wait(board, (&call, until), |b| b.posts[self.rank].is_none()) {
            Ok(board) => board,
            Err(e) => return Err(fail(e)),
        };
        board.posts[self.rank] = Some(Post { call: call.clone(), data: data.contiguous() });
        group.changed.notify_all();
        board = match self.wait(board, (&call, until), |b| b.posts.iter().all(Option::is_some)) {
            Ok(board) => board,
            Err(e) => return Err(fail(e)),
        };
        let posts: Vec<Post> = board.posts.iter().flatten().cloned().collect();
        board.taken += 1;
        if board.taken == self.size {
            board.taken = 0;
            board.posts.iter_mut().for_each(|p| *p = None);
            group.changed.notify_all();
        }
        drop(board);
        if let Some((r, other)) = posts.iter().enumerate().find(|(_, p)| p.call != call) {
            return Err(fail(
                self.error(&call, format!("rank {r} is at {}: the ranks have taken different paths", other.call)),
            ));
        }
        Ok(posts.into_iter().map(|p| p.data).collect())
    }
    /// Bytes in units of (N − 1) times the buffer.
    fn one_nth(&self) -> f64 {
        1.0 / self.size as f64
    }
    fn parts(&self, call: &str, x: &Array) -> Result<usize> {
        match x.shape() {
            [n] if n.is_multiple_of(self.size) => Ok(n / self.size),
            other => Err(self.error(call, format!("{other:?} does not divide into {} parts", self.size))),
        }
    }
    fn sum(&self, all: &[Array]) -> Result<Array> {
        let mut out = all[0].copy();
        for x in &all[1..] {
            out.add_in_place(x)?;
        }
        Ok(out)
    }
    fn join(&self, parts: &[Array]) -> Result<Array> {
        let n = parts.iter().map(Array::numel).sum();
        let mut out = Array::zeros(&[n], parts[0].dtype());
        let mut at = 0;
        for p in parts {
            out.write(at, p)?;
            at += p.numel();
        }
        Ok(out)
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        let why = if std::thread::panicking() { "it panicked" } else { "it has ended" };
        self.group.lock().gone[self.rank].get_or_insert_with(|| why.into());
        self.group.changed.notify_all();
    }
}

impl Communicator for Local {
    fn rank(&self) -> usize {
        self.rank
    }
    fn size(&self) -> usize {
        self.size
    }
    fn all_reduce(&self, what: &str, x: &Array) -> Result<Array> {
        self.sum(&self.exchange("all_reduce", what, x, 2.0 * self.one_nth())?)
    }
    fn reduce_scatter(&self, what: &str, x: &Array) -> Result<Array> {
        let n = self.parts("reduce_scatter", x)?;
        let own = self.rank * n..(self.rank + 1) * n;
        let all = self.exchange("reduce_scatter", what, x, self.one_nth())?;
        self.sum(&all.iter().map(|a| a.slice(0, own.clone())).collect::<Result<Vec<_>>>()?)
    }
    fn all_gather(&self, what: &str, part: &Array) -> Result<Array> {
        self.parts_of_rank_one("all_gather", part)?;
        self.join(&self.exchange("all_gather", what, part, 1.0)?)
    }
    fn broadcast(&self, what: &str, x: &Array, root: usize) -> Result<Array> {
        if root >= self.size {
            return Err(self.error("broadcast", format!("no rank {root}")));
        }
        let mut all = self.exchange(&format!("broadcast from {root}"), what, x, self.one_nth())?;
        Ok(all.swap_remove(root))
    }
    fn all_to_all(&self, what: &str, x: &Array) -> Result<Array> {
        let n = self.parts("all_to_all", x)?;
        let own = self.rank * n..(self.rank + 1) * n;
        let all = self.exchange("all_to_all", what, x, self.one_nth())?;
        self.join(&all.iter().map(|a| a.slice(0, own.clone())).collect::<Result<Vec<_>>>()?)
    }
    fn all_to_all_rows(&self, what: &str, x: &Array, rows: &[usize]) -> Result<(Array, Vec<usize>)> {
        let op = "all_to_all_rows";
        if rows.len() != self.size || x.rank() == 0 || x.shape()[0] != rows.iter().sum::<usize>() {
            let why = format!("{rows:?} rows for {} ranks of {:?}", self.size, x.shape());
            return Err(self.error(op, why));
        }
        // Counts first, then rows: their number differs from rank to rank, the rest of their shape does not.
        let counts: Vec<i64> = rows.iter().map(|&r| r as i64).collect();
        let counts = self.post(format!("counts of {what}"), &Array::from_slice(&counts, &[self.size])?)?;
        let counts = counts.iter().map(|c| c.to_vec::<i64>()).collect::<Result<Vec<_>>>()?;
        let all = self.post(format!("{op} of {what} rows of {:?} {}", &x.shape()[1..], x.dtype()), x)?;
        let mine = counts.iter().zip(&all).map(|(counts, x)| {
            let before: i64 = counts[..self.rank].iter().sum();
            x.slice(0, before as usize..(before + counts[self.rank]) as usize)
        });
        let mine = mine.collect::<Result<Vec<Array>>>()?;
        let received: Vec<usize> = counts.iter().map(|c| c[self.rank] as usize).collect();
        let mut shape = x.shape().to_vec();
        shape[0] = received.iter().sum();
        let mut out = Array::zeros(&[shape.iter().product()], x.dtype());
        let mut at = 0;
        for part in mine {
            out.write(at, &part.reshape(&[part.numel()])?)?;
            at += part.numel();
        }
        let row = x.shape()[1..].iter().product::<usize>() * x.dtype().size();
        let away = x.shape()[0] - rows[self.rank];
        self.count((away * row + 8 * (self.size - 1)) as f64);
        Ok((out.reshape(&shape)?, received))
    }
    fn barrier(&self) -> Result<()> {
        self.exchange("barrier", "all", &Array::zeros(&[0], DType::U8), 0.0).map(|_| ())
    }
    fn traffic(&self) -> Traffic {
        Traffic { calls: self.calls.load(Relaxed), bytes: self.bytes.load(Relaxed) }
    }
}

impl Local {
    fn parts_of_rank_one(&self, call: &str, x: &Array) -> Result<()> {
        match x.shape() {
            [_] => Ok(()),
            other => Err(self.error(call, format!("{other:?}; a part is [n]"))),
        }
    }
}
