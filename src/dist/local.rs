//! Ranks as threads of one process.

use super::{Communicator, Counter, Traffic, equal_parts, expect_part, expect_rows, join, sum};
use crate::array::Array;
use crate::base::{DType, Error, Result};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// A rank's call of a collective.
#[derive(Clone)]
struct Post {
    /// Kind and name, shape and dtype: the same on every rank.
    call: String,
    data: Array,
    /// The group made for some of the ranks, if this rank is the first of them.
    part: Option<Arc<Group>>,
}

#[derive(Default)]
struct Board {
    posts: Vec<Option<Post>>,
    taken: usize,
    /// The reason for which each rank has left, if it has.
    gone: Vec<Option<String>>,
}

struct Group {
    board: Mutex<Board>,
    changed: Condvar,
    patience: Duration,
}

impl Group {
    fn new(size: usize, patience: Duration) -> Arc<Group> {
        let board = Board { posts: vec![None; size], taken: 0, gone: vec![None; size] };
        Arc::new(Group { board: Mutex::new(board), changed: Condvar::new(), patience })
    }
    fn lock(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// One rank of a group whose ranks are threads of this process.
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
    counter: Counter,
}

impl Local {
    /// A group of `size` ranks, one for each of as many threads. A rank that waits for the others longer than `patience` stops with an
    /// error that names them.
    pub fn group(size: usize, patience: Duration) -> Vec<Local> {
        let group = Group::new(size, patience);
        let new = |rank| Local { rank, size, group: group.clone(), counter: Counter::default() };
        (0..size).map(new).collect()
    }
    /// Runs `body` as every rank, each on a thread of its own, and returns their results in order. If a rank fails or panics, the next
    /// collective of the others fails.
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
    /// The arrays of all ranks for this call, in the order of the ranks. The traffic counts, for each of the other ranks, the share `share`
    /// of the array's bytes as sent.
    fn exchange(&self, kind: &str, what: &str, data: &Array, share: f64) -> Result<Vec<Array>> {
        let call = format!("{kind} of {what} {:?} {}", data.shape(), data.dtype());
        let all = self.post(call, data)?;
        let bytes = (data.numel() * data.dtype().size()) as f64;
        self.counter.count(bytes * share * (self.size as f64 - 1.0));
        Ok(all)
    }
    /// The arrays of all ranks, if all of them made the same call.
    fn post(&self, call: String, data: &Array) -> Result<Vec<Array>> {
        Ok(self.post_with(call, data, None)?.into_iter().map(|p| p.data).collect())
    }
    fn post_with(&self, call: String, data: &Array, part: Option<Arc<Group>>) -> Result<Vec<Post>> {
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
        // The previous round is over when every rank has read its results.
        board = match self.wait(board, (&call, until), |b| b.posts[self.rank].is_none()) {
            Ok(board) => board,
            Err(e) => return Err(fail(e)),
        };
        board.posts[self.rank] = Some(Post { call: call.clone(), data: data.contiguous(), part });
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
        Ok(posts)
    }
    /// One part of N of a buffer, as the share that is sent to each other rank.
    fn one_nth(&self) -> f64 {
        1.0 / self.size as f64
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
        sum(self.exchange("all_reduce", what, x, 2.0 * self.one_nth())?.into_iter().map(Ok))
    }
    fn reduce_scatter(&self, what: &str, x: &Array) -> Result<Array> {
        let n = equal_parts("reduce_scatter", x, self.size)?;
        let own = self.rank * n..(self.rank + 1) * n;
        let all = self.exchange("reduce_scatter", what, x, self.one_nth())?;
        sum(all.iter().map(|a| a.slice(0, own.clone())))
    }
    fn all_gather(&self, what: &str, part: &Array) -> Result<Array> {
        let [_] = part.shape() else {
            return Err(Error::shape("all_gather", format!("{:?} of {what}: a part is [n]", part.shape())));
        };
        join(&self.exchange("all_gather", what, part, 1.0)?, part.dtype())
    }
    fn all_gather_parts(&self, what: &str, own: &Array, parts: &[usize]) -> Result<Array> {
        expect_part(own, parts, (self.rank, self.size))?;
        let all = self.post(format!("all_gather of {what} in parts {parts:?} {}", own.dtype()), own)?;
        self.counter.count((own.numel() * own.dtype().size() * (self.size - 1)) as f64);
        join(&all, own.dtype())
    }
    fn broadcast(&self, what: &str, x: &Array, root: usize) -> Result<Array> {
        if root >= self.size {
            return Err(self.error("broadcast", format!("no rank {root}")));
        }
        let mut all = self.exchange(&format!("broadcast from {root}"), what, x, self.one_nth())?;
        Ok(all.swap_remove(root))
    }
    fn all_to_all(&self, what: &str, x: &Array) -> Result<Array> {
        let n = equal_parts("all_to_all", x, self.size)?;
        let own = self.rank * n..(self.rank + 1) * n;
        let all = self.exchange("all_to_all", what, x, self.one_nth())?;
        join(&all.iter().map(|a| a.slice(0, own.clone())).collect::<Result<Vec<_>>>()?, x.dtype())
    }
    fn all_to_all_rows(&self, what: &str, x: &Array, rows: &[usize]) -> Result<(Array, Vec<usize>)> {
        let op = "all_to_all_rows";
        expect_rows(x, rows, self.size)?;
        // The numbers of rows are exchanged first, then the rows. Numbers differ from rank to rank, the rest of the shape does not.
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
        let row = x.shape()[1..].iter().product::<usize>() * x.dtype().size();
        let away = x.shape()[0] - rows[self.rank];
        self.counter.count((away * row + 8 * (self.size - 1)) as f64);
        Ok((join(&mine, x.dtype())?.reshape(&shape)?, received))
    }
    fn barrier(&self) -> Result<()> {
        self.exchange("barrier", "all", &Array::zeros(&[0], DType::U8), 0.0).map(|_| ())
    }
    fn split(&self, colour: usize) -> Result<Box<dyn Communicator>> {
        // Every rank provides a group that would be large enough; that of the first rank of a colour is used.
        let own = Group::new(self.size, self.group.patience);
        let posts = self.post_with("split".into(), &Array::from_slice(&[colour as i64], &[1])?, Some(own))?;
        self.counter.count(8.0 * (self.size as f64 - 1.0));
        let mut ranks = Vec::new();
        for (r, post) in posts.iter().enumerate() {
            if post.data.as_slice::<i64>()?[0] == colour as i64 {
                ranks.push(r);
            }
        }
        let (size, first) = (ranks.len(), ranks.first().copied().unwrap_or(self.rank));
        let Some(group) = posts[first].part.clone() else {
            return Err(self.error("split", format!("rank {first} brought no group")));
        };
        {
            let mut board = group.lock();
            board.posts.truncate(size);
            board.gone.truncate(size);
        }
        let rank = ranks.iter().position(|r| *r == self.rank).unwrap_or(0);
        Ok(Box::new(Local { rank, size, group, counter: Counter::default() }))
    }
    fn abort(&self, why: &str) {
        let mut board = self.group.lock();
        // The rank's posted array stays, since other ranks may not have read the previous round yet.
        board.gone[self.rank].get_or_insert_with(|| why.into());
        self.group.changed.notify_all();
    }
    fn traffic(&self) -> Traffic {
        self.counter.traffic()
    }
}
