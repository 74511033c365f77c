//! A simulation of a slow or unreliable network around any communicator.

use super::{Communicator, Traffic};
use crate::array::Array;
use crate::base::{Error, Result};
use std::sync::Mutex;
use std::time::Duration;

/// A fault at one collective of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The rank is late by this time.
    Stall(Duration),
    /// The rank fails, and takes no further part.
    Fail,
}

/// Any communicator, slowed down to a network between machines. Each collective takes longer by the latency, and by the time in which a
/// link of the given bandwidth transfers the bytes that a rank sends in it. The delay is a sleep and uses no processor, so that collectives
/// in the background overlap with computing as they do on a cluster. Faults can be added, and calls are recorded.
///
/// ```
/// use prismgrad::dist::{Communicator, Local, Simulated};
/// use prismgrad::{Array, DType};
/// use std::time::{Duration, Instant};
/// let took = Local::run(2, |rank| {
///     let ranks = Simulated::new(rank, Duration::from_millis(1), 1e6)?;
///     let start = Instant::now();
///     ranks.all_reduce("x", &Array::ones(&[2500], DType::F32))?; // 10 kB: 10 ms at 1 MB/s
///     Ok(start.elapsed())
/// });
/// assert!(took.into_iter().all(|t| t.unwrap() >= Duration::from_millis(11)));
/// ```
pub struct Simulated<C> {
    inner: C,
    latency: Duration,
    /// Bytes per second.
    bandwidth: f64,
    faults: Vec<(u64, Fault)>,
    calls: Mutex<Vec<String>>,
}

impl<C: Communicator> Simulated<C> {
    /// Each collective takes `latency` longer, and its bytes pass at `bandwidth` in bytes per second, which may be infinite.
    ///
    /// # Errors
    /// [`Error::Invalid`] unless the bandwidth is positive.
    pub fn new(inner: C, latency: Duration, bandwidth: f64) -> Result<Simulated<C>> {
        if bandwidth.is_nan() || bandwidth <= 0.0 {
            let message = format!("a bandwidth of {bandwidth} bytes per second; it must be positive");
            return Err(Error::invalid("Simulated", message));
        }
        Ok(Simulated { inner, latency, bandwidth, faults: Vec::new(), calls: Mutex::new(Vec::new()) })
    }
    /// Adds a fault before collective number `call` of this rank, counted from 0.
    pub fn fault(mut self, call: u64, fault: Fault) -> Simulated<C> {
        self.faults.push((call, fault));
        self
    }
    /// The bytes that each rank sends in a ring for `elements` elements of the dtype of `x`, however they are divided.
    fn ring(&self, elements: usize, x: &Array) -> f64 {
        let n = self.inner.size() as f64;
        (elements * x.dtype().size()) as f64 * (n - 1.0) / n
    }
    /// The collectives so far, each with its kind and buffer.
    pub fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap_or_else(|e| e.into_inner()).clone()
    }
    /// Runs a collective with its delay and faults. `ring` is the number of bytes that a rank sends for it in a ring, where the rank's own
    /// traffic differs from that.
    fn through<R>(
        &self,
        (kind, what): (&str, &str),
        ring: Option<f64>,
        collective: impl FnOnce(&C) -> Result<R>,
    ) -> Result<R> {
        let number = {
            let mut calls = self.calls.lock().unwrap_or_else(|e| e.into_inner());
            calls.push(format!("{kind} of {what}"));
            calls.len() as u64 - 1
        };
        for (at, fault) in &self.faults {
            match fault {
                Fault::Stall(time) if *at == number => std::thread::sleep(*time),
                Fault::Fail if *at <= number => {
                    let why = format!("rank {} failed at {kind} of {what}, as planted", self.inner.rank());
                    self.inner.abort(&why);
                    return Err(Error::invalid("collective", why));
                }
                _ => {}
            }
        }
        let before = self.inner.traffic().bytes;
        let made = collective(&self.inner)?;
        let sent = ring.unwrap_or((self.inner.traffic().bytes - before) as f64);
        let least = self.latency.as_secs_f64() + sent / self.bandwidth;
        if least.is_finite() && least > 0.0 {
            std::thread::sleep(Duration::from_secs_f64(least));
        }
        Ok(made)
    }
}

impl<C: Communicator> Communicator for Simulated<C> {
    fn rank(&self) -> usize {
        self.inner.rank()
    }
    fn size(&self) -> usize {
        self.inner.size()
    }
    fn all_reduce(&self, what: &str, x: &Array) -> Result<Array> {
        self.through(("all_reduce", what), None, |r| r.all_reduce(what, x))
    }
    fn reduce_scatter(&self, what: &str, x: &Array) -> Result<Array> {
        self.through(("reduce_scatter", what), None, |r| r.reduce_scatter(what, x))
    }
    fn all_gather(&self, what: &str, part: &Array) -> Result<Array> {
        self.through(("all_gather", what), None, |r| r.all_gather(what, part))
    }
    fn all_gather_parts(&self, what: &str, own: &Array, parts: &[usize]) -> Result<Array> {
        let bytes = self.ring(parts.iter().sum(), own);
        self.through(("all_gather_parts", what), Some(bytes), |r| r.all_gather_parts(what, own, parts))
    }
    fn broadcast(&self, what: &str, x: &Array, root: usize) -> Result<Array> {
        self.through(("broadcast", what), None, |r| r.broadcast(what, x, root))
    }
    fn all_to_all(&self, what: &str, x: &Array) -> Result<Array> {
        self.through(("all_to_all", what), None, |r| r.all_to_all(what, x))
    }
    fn all_to_all_rows(&self, what: &str, x: &Array, rows: &[usize]) -> Result<(Array, Vec<usize>)> {
        self.through(("all_to_all_rows", what), None, |r| r.all_to_all_rows(what, x, rows))
    }
    fn reduce_scatter_parts(&self, what: &str, x: &Array, parts: &[usize]) -> Result<Array> {
        let bytes = self.ring(x.numel(), x);
        self.through(("reduce_scatter_parts", what), Some(bytes), |r| r.reduce_scatter_parts(what, x, parts))
    }
    fn barrier(&self) -> Result<()> {
        self.through(("barrier", "all"), None, |r| r.barrier())
    }
    fn split(&self, colour: usize) -> Result<Box<dyn Communicator>> {
        let inner = self.inner.split(colour)?;
        Ok(Box::new(Simulated::new(inner, self.latency, self.bandwidth)?))
    }
    fn abort(&self, why: &str) {
        self.inner.abort(why)
    }
    fn traffic(&self) -> Traffic {
        self.inner.traffic()
    }
}
