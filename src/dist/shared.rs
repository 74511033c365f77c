//! One communicator for several users, whose collectives run in the background.

use super::{Communicator, Traffic};
use crate::array::Array;
use crate::base::{Error, Result};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// A handle on a communicator that several parts of a program use in turn, such as a training step and the layers that it differentiates.
/// Clones are handles on the same communicator, and its traffic is that of all of them.
///
/// The collectives run on a separate thread, one after the other in the order in which they were begun. [`Shared::begin`] returns at once,
/// and the program computes while data are sent.
///
/// ```
/// use prismgrad::dist::{Communicator, Local, Shared};
/// use prismgrad::Array;
/// let sums = Local::run(2, |rank| {
///     let ranks = Shared::new(rank)?;
///     let x = Array::from_slice(&[1.0, ranks.rank() as f64], &[2])?;
///     let sum = ranks.begin(move |ranks| ranks.all_reduce("x", &x));
///     // Something else meanwhile.
///     Ok(sum.wait()?.to_f64())
/// });
/// assert!(sums.into_iter().all(|s| s.unwrap() == [2.0, 1.0]));
/// ```
#[derive(Clone)]
pub struct Shared(Arc<Inner>);

type Job = Box<dyn FnOnce(&dyn Communicator) + Send>;

struct Inner {
    /// `None` after the last handle has been dropped.
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    rank: usize,
    size: usize,
    /// The communicator's traffic after the last collective.
    traffic: Arc<Mutex<Traffic>>,
}

/// A collective that was begun. Other ranks wait for it as for any other, and it runs even if this value is dropped.
#[must_use = "a collective that fails says so in `wait` alone"]
pub struct Pending<T = Array>(Receiver<Result<T>>);

impl<T> Pending<T> {
    /// Waits for the result of the collective. It fails if the collective did. It cannot wait for ever, because collectives have deadlines.
    pub fn wait(self) -> Result<T> {
        self.0.recv().unwrap_or_else(|_| Err(Error::invalid("collective", "the thread of the communicator is gone")))
    }
}

impl Shared {
    /// Makes the first handle. Fails if no thread can be started.
    pub fn new(ranks: impl Communicator + 'static) -> Result<Shared> {
        let (rank, size, traffic) = (ranks.rank(), ranks.size(), Arc::new(Mutex::new(ranks.traffic())));
        let (jobs, todo) = channel::<Job>();
        let after = traffic.clone();
        let work = move || {
            for job in todo {
                job(&ranks);
                *after.lock().unwrap_or_else(|e| e.into_inner()) = ranks.traffic();
            }
        };
        let thread = std::thread::Builder::new()
            .name(format!("rank {rank} collectives"))
            .spawn(work)
            .map_err(|e| Error::invalid("Shared::new", format!("no thread for collectives: {e}")))?;
        Ok(Shared(Arc::new(Inner { jobs: Some(jobs), thread: Some(thread), rank, size, traffic })))
    }
    /// Begins one or more collectives, which run after all that were begun before.
    pub fn begin<T: Send + 'static>(
        &self,
        collective: impl FnOnce(&dyn Communicator) -> Result<T> + Send + 'static,
    ) -> Pending<T> {
        let (done, result) = channel();
        let traffic = self.0.traffic.clone();
        // The receiver may have been dropped, which is no error. If the thread has ended, `wait` fails.
        let job: Job = Box::new(move |ranks| {
            let made = collective(ranks);
            *traffic.lock().unwrap_or_else(|e| e.into_inner()) = ranks.traffic();
            let _ = done.send(made);
        });
        if let Some(jobs) = &self.0.jobs {
            let _ = jobs.send(job);
        }
        Pending(result)
    }
}

impl Drop for Inner {
    /// Waits for the collectives that were begun, and until the communicator itself is dropped: MPI must end before the process does.
    fn drop(&mut self) {
        let jobs = self.jobs.take();
        if let Some(jobs) = jobs.as_ref().filter(|_| std::thread::panicking()) {
            let _ = jobs.send(Box::new(|ranks| ranks.abort("it panicked")));
        }
        drop(jobs);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Communicator for Shared {
    fn rank(&self) -> usize {
        self.0.rank
    }
    fn size(&self) -> usize {
        self.0.size
    }
    fn all_reduce(&self, what: &str, x: &Array) -> Result<Array> {
        let (what, x) = (what.to_string(), x.clone());
        self.begin(move |r| r.all_reduce(&what, &x)).wait()
    }
    fn reduce_scatter(&self, what: &str, x: &Array) -> Result<Array> {
        let (what, x) = (what.to_string(), x.clone());
        self.begin(move |r| r.reduce_scatter(&what, &x)).wait()
    }
    fn all_gather(&self, what: &str, part: &Array) -> Result<Array> {
        let (what, part) = (what.to_string(), part.clone());
        self.begin(move |r| r.all_gather(&what, &part)).wait()
    }
    fn all_gather_parts(&self, what: &str, own: &Array, parts: &[usize]) -> Result<Array> {
        let (what, own, parts) = (what.to_string(), own.clone(), parts.to_vec());
        self.begin(move |r| r.all_gather_parts(&what, &own, &parts)).wait()
    }
    fn broadcast(&self, what: &str, x: &Array, root: usize) -> Result<Array> {
        let (what, x) = (what.to_string(), x.clone());
        self.begin(move |r| r.broadcast(&what, &x, root)).wait()
    }
    fn all_to_all(&self, what: &str, x: &Array) -> Result<Array> {
        let (what, x) = (what.to_string(), x.clone());
        self.begin(move |r| r.all_to_all(&what, &x)).wait()
    }
    fn all_to_all_rows(&self, what: &str, x: &Array, rows: &[usize]) -> Result<(Array, Vec<usize>)> {
        let (what, x, rows) = (what.to_string(), x.clone(), rows.to_vec());
        self.begin(move |r| r.all_to_all_rows(&what, &x, &rows)).wait()
    }
    fn reduce_scatter_parts(&self, what: &str, x: &Array, parts: &[usize]) -> Result<Array> {
        let (what, x, parts) = (what.to_string(), x.clone(), parts.to_vec());
        self.begin(move |r| r.reduce_scatter_parts(&what, &x, &parts)).wait()
    }
    fn barrier(&self) -> Result<()> {
        self.begin(|r| r.barrier()).wait()
    }
    fn split(&self, colour: usize) -> Result<Box<dyn Communicator>> {
        self.begin(move |r| r.split(colour)).wait()
    }
    fn abort(&self, why: &str) {
        let why = why.to_string();
        let _ = self.begin(move |r| {
            r.abort(&why);
            Ok(())
        });
    }
    fn traffic(&self) -> Traffic {
        *self.0.traffic.lock().unwrap_or_else(|e| e.into_inner())
    }
}
