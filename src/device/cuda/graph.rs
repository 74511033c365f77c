//! CUDA graphs: the work that a closure queues on the compute stream, captured once and launched as a whole.
//!
//! A launch of a step with a thousand kernels then costs the host some microseconds instead of milliseconds. In return nothing about it can
//! change: sizes, addresses and values are those of the capture. During a capture, waiting for the device and allocating from the driver
//! are refused with an error. So run the step once first, then capture it.
//!
//! **Memory.** Launches of the graph write to the same addresses as the capture. Blocks that the closure allocates or drops stay with the
//! graph until it is dropped, and are not reused for anything else. Blocks that existed before and that the graph reads or writes
//! (parameters, inputs) must outlive it: [`Graph::keep`] holds them.

use super::context::{Gpu, Stream, count};
use super::errors::check;
use super::pool::PoolMode;
use super::probe::has_symbols;
use crate::base::{Error, Result};
use cudarc::driver::sys::{self, CUresult, CUstreamCaptureMode};
use std::any::Any;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Captured work of one device.
pub struct Graph {
    gpu: Arc<Gpu>,
    exec: sys::CUgraphExec,
    id: u64,
    launches: u64,
    kept: Vec<Box<dyn Any + Send>>,
}
// SAFETY: the handle may be used from any thread, one at a time; `launch` takes `&mut self`.
unsafe impl Send for Graph {}

/// Ends a capture even when the closure panics.
struct Capture<'a> {
    gpu: &'a Gpu,
    id: u64,
    open: bool,
}

impl Capture<'_> {
    fn end(&mut self) -> Result<sys::CUgraph> {
        self.open = false;
        let mut graph = null_mut();
        // SAFETY: our stream, in the capture that `begin` started.
        let code = unsafe { sys::cuStreamEndCapture(self.gpu.raw_stream(Stream::Compute), &mut graph) };
        self.gpu.pool.end_capture(self.gpu);
        check("capture a CUDA graph", code)?;
        Ok(graph)
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        if self.open {
            if let Ok(graph) = self.end()
                && !graph.is_null()
            {
                // SAFETY: made by the capture and not used elsewhere.
                unsafe { sys::cuGraphDestroy(graph) };
            }
            self.gpu.pool.release_graph(self.gpu, self.id);
        }
    }
}

impl Gpu {
    /// Captures the work that `body` queues on the compute stream instead of running it. Waits for the device once, before the capture.
    ///
    /// Only the calling thread may use the device during the capture.
    pub fn capture<R>(self: &Arc<Self>, body: impl FnOnce() -> Result<R>) -> Result<(Graph, R)> {
        let op = "capture a CUDA graph";
        self.refuse_in_capture("start another capture")?;
        let needed = ["cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags", "cuGraphLaunch"];
        if !has_symbols(&needed) || !has_symbols(&["cuGraphDestroy", "cuGraphExecDestroy"]) {
            return Err(Error::device(op, "this driver has no graphs; update it, or run the step without one"));
        }
        if self.pool_mode() == PoolMode::Guard {
            return Err(Error::device(
                op,
                "PRISMGRAD_CUDA_POOL=guard keeps no blocks to run it in; use cached or poison",
            ));
        }
        self.synchronize()?;
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let id = NEXT.fetch_add(1, Relaxed);
        self.pool.begin_capture(self, id);
        let mut capture = Capture { gpu: self, id, open: true };
        // Relaxed mode: this module itself refuses the calls that are unsafe during a capture, and event queries must remain possible.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: our stream.
        let begun = check(op, unsafe { sys::cuStreamBeginCapture_v2(self.raw_stream(Stream::Compute), mode) });
        if let Err(e) = begun {
            capture.open = false;
            self.pool.end_capture(self);
            self.pool.release_graph(self, id);
            return Err(e);
        }
        let launches = self.counters.launches.load(Relaxed);
        // On an error, dropping the capture ends it and releases the memory.
        let value = body()?;
        let launches = self.counters.launches.load(Relaxed) - launches;
        // These launches were captured, not executed.
        self.counters.launches.fetch_sub(launches, Relaxed);
        let graph = capture.end().inspect_err(|_| self.pool.release_graph(self, id))?;
        let mut exec = null_mut();
        // SAFETY: a finished graph; the executable graph does not need it any more.
        let code = unsafe {
            let code = sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0);
            sys::cuGraphDestroy(graph);
            code
        };
        check("instantiate a CUDA graph", code).inspect_err(|_| self.pool.release_graph(self, id))?;
        Ok((Graph { gpu: self.clone(), exec, id, launches, kept: vec![] }, value))
    }
}

impl Graph {
    /// Queues all captured work on the compute stream.
    pub fn launch(&mut self) -> Result<()> {
        self.gpu.refuse_in_capture("launch another graph")?;
        self.gpu.bind()?;
        // SAFETY: an instantiated graph and our stream.
        let code = unsafe { sys::cuGraphLaunch(self.exec, self.gpu.raw_stream(Stream::Compute)) };
        self.gpu.check(&format!("launch a CUDA graph of {} kernels", self.launches), code)?;
        count(&self.gpu.counters.graph_launches);
        self.gpu.expect_deferred_errors();
        Ok(())
    }

    /// Number of kernels in the graph.
    pub fn kernels(&self) -> u64 {
        self.launches
    }

    /// Keeps `what`, which the graph reads or writes, alive as long as the graph.
    pub fn keep(&mut self, what: impl Any + Send) {
        self.kept.push(Box::new(what));
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: ours; a launch under way keeps what it needs. An error means a lost context.
            let _: CUresult = unsafe { sys::cuGraphExecDestroy(self.exec) };
        }
        self.gpu.pool.release_graph(&self.gpu, self.id);
        self.kept.clear();
    }
}
