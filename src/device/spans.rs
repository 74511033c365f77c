//! Timed spans of ops, layers and phases on the host, and of kernels on a GPU: the records from which [`profile`](crate::profile) makes
//! tables.
//!
//! While no profile is taken, a span costs one relaxed atomic load. While one is taken, it costs two clock readings and a lock, and on a
//! GPU two events around every kernel.

use crate::device::cuda::{Gpu, Stream, TimedEvent};
use std::borrow::Cow;
use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

thread_local! {
    /// Spans open on this thread, innermost last, and the thread's number.
    static OPEN: RefCell<(Vec<Open>, u64)> = const { RefCell::new((Vec::new(), u64::MAX)) };
}

pub(crate) static ON: AtomicBool = AtomicBool::new(false);

static STATE: Mutex<Option<State>> = Mutex::new(None);

static THREADS: AtomicU64 = AtomicU64::new(0);

/// The kind of work that a span covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Part of a training step.
    Phase,
    /// A layer of a model.
    Layer,
    /// The forward pass of an op.
    Forward,
    /// The backward pass of an op.
    Backward,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Phase => "phase",
            Kind::Layer => "layer",
            Kind::Forward => "forward",
            Kind::Backward => "backward",
        }
    }
}

pub(crate) struct Open {
    pub(crate) kind: Kind,
    pub(crate) name: Cow<'static, str>,
    pub(crate) start: Instant,
    /// FLOPs and bytes reported by [`cost`] inside the span.
    pub(crate) cost: [f64; 2],
    /// Time of the ops inside it, which is counted for those ops.
    pub(crate) inner: f64,
}

pub(crate) struct Done {
    pub(crate) kind: Kind,
    pub(crate) name: Cow<'static, str>,
    pub(crate) thread: u64,
    /// Seconds from the start of the session to the start of the span, its whole duration, and its duration without the ops inside.
    pub(crate) start: f64,
    pub(crate) length: f64,
    pub(crate) own: f64,
    pub(crate) cost: [f64; 2],
}

pub(crate) struct Ran {
    pub(crate) kernel: &'static str,
    pub(crate) op: Option<(Kind, Cow<'static, str>)>,
    pub(crate) from: TimedEvent,
    pub(crate) to: TimedEvent,
}

pub(crate) struct State {
    pub(crate) began: Instant,
    pub(crate) done: Vec<Done>,
    pub(crate) ran: Vec<Ran>,
}

pub(crate) fn state() -> MutexGuard<'static, Option<State>> {
    STATE.lock().unwrap_or_else(|e| e.into_inner())
}

/// Ends its span when dropped.
#[must_use = "a span ends when this is dropped"]
pub struct Span(bool);

impl Drop for Span {
    fn drop(&mut self) {
        if self.0 {
            close();
        }
    }
}

/// A span around what follows, until the result is dropped.
#[inline]
pub fn span(kind: Kind, name: impl Into<Cow<'static, str>>) -> Span {
    if !cfg!(feature = "nvtx") && !ON.load(Relaxed) {
        return Span(false);
    }
    open(kind, name.into());
    Span(true)
}

/// A span around an op's forward pass.
#[inline]
pub(crate) fn op(name: &'static str) -> Span {
    span(Kind::Forward, name)
}

/// A span around a layer's forward pass; its name is copied only while spans are recorded.
#[inline]
pub fn layer(name: &str) -> Span {
    if !cfg!(feature = "nvtx") && !ON.load(Relaxed) {
        return Span(false);
    }
    span(Kind::Layer, name.to_string())
}

/// Whether a profile is being taken.
#[inline]
pub fn is_on() -> bool {
    ON.load(Relaxed)
}

/// Reports the least FLOPs and bytes that the surrounding op needs, from which the table computes its share of the measured ceiling.
#[inline]
pub(crate) fn cost(flops: f64, bytes: f64) {
    if ON.load(Relaxed) {
        OPEN.with_borrow_mut(|(open, _)| {
            if let Some(last) = open.last_mut() {
                last.cost[0] += flops;
                last.cost[1] += bytes;
            }
        });
    }
}

#[cold]
fn open(kind: Kind, name: Cow<'static, str>) {
    #[cfg(feature = "nvtx")]
    nvtx::range_push!("{}", name);
    OPEN.with_borrow_mut(|(open, _)| open.push(Open { kind, name, start: Instant::now(), cost: [0.0; 2], inner: 0.0 }));
}

#[cold]
fn close() {
    #[cfg(feature = "nvtx")]
    nvtx::range_pop!();
    let now = Instant::now();
    OPEN.with_borrow_mut(|(open, thread)| {
        let Some(span) = open.pop() else { return };
        let length = (now - span.start).as_secs_f64();
        let is_op = |k| matches!(k, Kind::Forward | Kind::Backward);
        // For an op that calls other ops, each is charged only its own time.
        if let Some(outer) = open.iter_mut().rev().find(|o| is_op(o.kind))
            && is_op(span.kind)
        {
            outer.inner += length;
        }
        if *thread == u64::MAX {
            *thread = THREADS.fetch_add(1, Relaxed);
        }
        if !ON.load(Relaxed) {
            return;
        }
        if let Some(state) = &mut *state()
            && span.start >= state.began
        {
            state.done.push(Done {
                kind: span.kind,
                name: span.name,
                thread: *thread,
                start: (span.start - state.began).as_secs_f64(),
                length,
                own: length - span.inner,
                cost: span.cost,
            });
        }
    });
}

/// Records the device's time before a kernel, if kernels are being timed.
pub(crate) fn before_kernel(gpu: &Arc<Gpu>, stream: Stream) -> Option<TimedEvent> {
    if !ON.load(Relaxed) || gpu.is_capturing() {
        return None;
    }
    gpu.record_timed(stream).ok()
}

/// Records the device's time after the kernel.
pub(crate) fn after_kernel(gpu: &Arc<Gpu>, stream: Stream, kernel: &'static str, from: Option<TimedEvent>) {
    let Some(from) = from else { return };
    let Ok(to) = gpu.record_timed(stream) else { return };
    let op = OPEN.with_borrow(|(open, _)| {
        let op = open.iter().rev().find(|o| matches!(o.kind, Kind::Forward | Kind::Backward));
        op.or(open.last()).map(|o| (o.kind, o.name.clone()))
    });
    if let Some(state) = &mut *state() {
        state.ran.push(Ran { kernel, op, from, to });
    }
}
