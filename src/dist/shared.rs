//! One communicator for several owners.

use super::{Communicator, Traffic};
use crate::array::Array;
use crate::base::Result;
use std::sync::{Arc, Mutex, MutexGuard};

/// A handle on a communicator that several parts of a program use in turn, such as a training step and the layers that it
/// differentiates. Clones are handles on the same one; its traffic is that of all of them.
#[derive(Clone)]
pub struct Shared(Arc<Mutex<Box<dyn Communicator>>>);

impl Shared {
    /// A first handle.
    pub fn new(ranks: impl Communicator + 'static) -> Shared {
        Shared(Arc::new(Mutex::new(Box::new(ranks))))
    }
    fn lock(&self) -> MutexGuard<'_, Box<dyn Communicator>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Communicator for Shared {
    fn rank(&self) -> usize {
        self.lock().rank()
    }
    fn size(&self) -> usize {
        self.lock().size()
    }
    fn all_reduce(&self, what: &str, x: &Array) -> Result<Array> {
        self.lock().all_reduce(what, x)
    }
    fn reduce_scatter(&self, what: &str, x: &Array) -> Result<Array> {
        self.lock().reduce_scatter(what, x)
    }
    fn all_gather(&self, what: &str, part: &Array) -> Result<Array> {
        self.lock().all_gather(what, part)
    }
    fn broadcast(&self, what: &str, x: &Array, root: usize) -> Result<Array> {
        self.lock().broadcast(what, x, root)
    }
    fn all_to_all(&self, what: &str, x: &Array) -> Result<Array> {
        self.lock().all_to_all(what, x)
    }
    fn all_to_all_rows(&self, what: &str, x: &Array, rows: &[usize]) -> Result<(Array, Vec<usize>)> {
        self.lock().all_to_all_rows(what, x, rows)
    }
    fn barrier(&self) -> Result<()> {
        self.lock().barrier()
    }
    fn traffic(&self) -> Traffic {
        self.lock().traffic()
    }
}
