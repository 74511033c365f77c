//! One GPU: its primary context, three streams, events, and the counters that tests compare with the documented limits.

use super::deferred::DeferredErrors;
use super::errors::{check, explain};
use super::kernels::Modules;
use super::pool::Pool;
use super::probe;
use super::transfer::Staging;
use crate::base::{Error, Result};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUresult};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};

/// A device whose name starts so is the emulator: its kernels are compiled in, so kernel images are ignored.
const EMULATED: &str = "Prismgrad emulated";

/// The three queues of a device. Work on one runs in order; between two of them, only events define an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stream {
    /// Kernels, and the transfers that kernels wait for.
    Compute,
    /// Collectives.
    Communication,
    /// Transfers that overlap with compute.
    Copy,
}

impl Stream {
    /// All streams.
    pub const ALL: [Stream; 3] = [Stream::Compute, Stream::Communication, Stream::Copy];
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stream::Compute => "compute",
            Stream::Communication => "communication",
            Stream::Copy => "copy",
        })
    }
}

/// Counts of the calls made to the device so far. Tests look at the difference between two readings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Kernels launched one by one.
    pub launches: u64,
    /// Products computed by cuBLASLt (or cuBLAS); they are not counted among the launches.
    pub library_products: u64,
    /// Captured graphs launched.
    pub graph_launches: u64,
    /// Copies from the host.
    pub uploads: u64,
    /// Copies to the host; the host waits for each.
    pub downloads: u64,
    /// Waits of the host for the device, including those of downloads.
    pub synchronisations: u64,
    /// Allocations from the driver: device blocks and pinned staging buffers.
    pub driver_allocations: u64,
    /// Memory returned to the driver.
    pub driver_frees: u64,
    /// Kernel files compiled (not read from the cache).
    pub compiles: u64,
}

macro_rules! counters {
    ($($name:ident),*) => {
        #[derive(Default)]
        pub(crate) struct Counters { $(pub(crate) $name: AtomicU64),* }
        impl Counters {
            fn read(&self) -> Counts { Counts { $($name: self.$name.load(Relaxed)),* } }
        }
    };
}
counters!(
    launches,
    library_products,
    graph_launches,
    uploads,
    downloads,
    synchronisations,
    driver_allocations,
    driver_frees,
    compiles
);

/// Adds one to a counter.
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}

/// Locks a mutex even if another thread panicked while holding it: the state behind each of these mutexes is consistent between statements.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// A driver event: a plain handle, owned by its holder.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawEvent(pub(crate) sys::CUevent);
// SAFETY: the driver's functions on events may be called from any thread.
unsafe impl Send for RawEvent {}

/// One GPU, opened once per process and shared.
pub struct Gpu {
    ordinal: usize,
    name: String,
    capability: (u32, u32),
    multiprocessors: u32,
    shared_limit: usize,
    memory: usize,
    context: sys::CUcontext,
    streams: [sys::CUstream; 3],
    idle_events: Mutex<Vec<RawEvent>>,
    /// Whether to wait after each launch, so that an error is reported by the launch that caused it.
    pub(crate) sync_each: bool,
    tf32: std::sync::atomic::AtomicBool,
    pub(crate) counters: Counters,
    pub(crate) pool: Pool,
    pub(crate) staging: Staging,
    pub(crate) modules: Modules,
    pub(crate) deferred: DeferredErrors,
    /// A slot for the matrix-product library (cuBLASLt), which the code above this folder loads.
    pub(crate) products: std::sync::OnceLock<Box<dyn std::any::Any + Send + Sync>>,
}

// SAFETY: the context and stream handles are never changed after `open`; the driver's functions on them may be called
// from any thread that has made the context current, which `bind` does before each call.
unsafe impl Send for Gpu {}
// SAFETY: as above; everything that changes is behind a mutex or atomic.
unsafe impl Sync for Gpu {}

impl Gpu {
    /// Lets f32 products of forward passes and of input gradients run on the tensor cores, which round the operands to TF32 (10 bits of
    /// mantissa) and sum in f32. Off by default. The gradients of parameters, and with them norms and clipped sums, are always computed in
    /// full f32.
    pub fn allow_tf32(&self, on: bool) {
        self.tf32.store(on, Relaxed);
    }
    /// Whether TF32 products are allowed.
    pub fn allows_tf32(&self) -> bool {
        self.tf32.load(Relaxed)
    }
    /// The GPU with this ordinal, opened at the first call. It is never closed: the driver does that when the process ends.
    pub fn open(ordinal: usize) -> Result<Arc<Gpu>> {
        static OPEN: Mutex<BTreeMap<usize, Arc<Gpu>>> = Mutex::new(BTreeMap::new());
        let mut open = lock(&OPEN);
        if let Some(gpu) = open.get(&ordinal) {
            return Ok(gpu.clone());
        }
        let driver = probe::driver()?;
        if ordinal >= driver.devices {
            let last = driver.devices - 1;
            return Err(Error::device(
                format!("open cuda:{ordinal}"),
                format!("there is no such GPU; {} visible, cuda:0 to cuda:{last}", driver.devices),
            ));
        }
        let gpu = Arc::new(Gpu::create(ordinal)?);
        open.insert(ordinal, gpu.clone());
        Ok(gpu)
    }

    fn create(ordinal: usize) -> Result<Gpu> {
        let op = format!("open cuda:{ordinal}");
        let (mut device, mut context, mut memory) = (0, std::ptr::null_mut(), 0usize);
        let mut name = [0 as core::ffi::c_char; 256];
        // SAFETY: the driver is initialised (`probe::driver`), the ordinal exists, and the pointers are to locals.
        unsafe {
            check(&op, sys::cuDeviceGet(&mut device, ordinal as i32))?;
            check(&op, sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as i32, device))?;
            check(&op, sys::cuDeviceTotalMem_v2(&mut memory, device))?;
        }
        let attribute = |a: Attribute| -> Result<u32> {
            let mut v = 0;
            // SAFETY: as above.
            check(&op, unsafe { sys::cuDeviceGetAttribute(&mut v, a, device) })?;
            Ok(v.max(0) as u32)
        };
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let shared_limit = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize;
        let mut streams = [std::ptr::null_mut(); 3];
        // SAFETY: as above; streams are made in the context that was just made current.
        unsafe {
            check(&op, sys::cuDevicePrimaryCtxRetain(&mut context, device))?;
            check(&op, sys::cuCtxSetCurrent(context))?;
            for s in &mut streams {
                // Non-blocking: without implicit ordering against the legacy default stream.
                let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
                check(&op, sys::cuStreamCreateWithPriority(s, flags, 0))?;
            }
        }
        let bytes: Vec<u8> = name.iter().take_while(|c| **c != 0).map(|c| *c as u8).collect();
        Ok(Gpu {
            ordinal,
            name: String::from_utf8_lossy(&bytes).into_owned(),
            capability,
            multiprocessors,
            shared_limit,
            memory,
            context,
            streams,
            idle_events: Mutex::default(),
            tf32: Default::default(),
            sync_each: std::env::var("PRISMGRAD_CUDA_SYNC").is_ok_and(|v| !v.is_empty() && v != "0"),
            counters: Counters::default(),
            pool: Pool::from_env()?,
            staging: Staging::default(),
            modules: Modules::default(),
            deferred: DeferredErrors::default(),
            products: Default::default(),
        })
    }

    /// Position among the visible devices.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// The name that the driver gives it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Compute capability, such as (9, 0).
    pub fn capability(&self) -> (u32, u32) {
        self.capability
    }

    /// Number of multiprocessors.
    pub fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    /// The most shared memory one block may have, in bytes.
    pub fn shared_limit(&self) -> usize {
        self.shared_limit
    }

    /// Device memory in bytes.
    pub fn memory_bytes(&self) -> usize {
        self.memory
    }

    /// Whether this is the emulator rather than hardware.
    pub fn is_emulated(&self) -> bool {
        self.name.starts_with(EMULATED)
    }

    /// Counts of the calls made to the device so far.
    pub fn counts(&self) -> Counts {
        self.counters.read()
    }

    /// The driver's handle of a stream, for libraries that launch their own work.
    pub fn raw_stream(&self, stream: Stream) -> sys::CUstream {
        self.streams[stream as usize]
    }

    /// Makes this GPU's context current on the calling thread. Costs one look-up (tens of nanoseconds) when it is current already, and is
    /// correct even when other code on the thread has switched contexts.
    pub fn bind(&self) -> Result<()> {
        let mut current = std::ptr::null_mut();
        // SAFETY: the context exists as long as the process.
        unsafe {
            if sys::cuCtxGetCurrent(&mut current) == CUresult::CUDA_SUCCESS && current == self.context {
                return Ok(());
            }
            check("make the CUDA context current", sys::cuCtxSetCurrent(self.context))
        }
    }

    /// Waits until everything queued on a stream has run. The host blocks, so this should not be called inside a training step.
    pub fn synchronize_stream(&self, stream: Stream) -> Result<()> {
        self.refuse_in_capture("wait for the device")?;
        self.bind()?;
        count(&self.counters.synchronisations);
        // SAFETY: our stream.
        let code = unsafe { sys::cuStreamSynchronize(self.raw_stream(stream)) };
        self.check("wait for the device", code)?;
        self.pool.poll(self);
        Ok(())
    }

    /// Waits until everything queued on all three streams has run.
    pub fn synchronize(&self) -> Result<()> {
        Stream::ALL.into_iter().try_for_each(|s| self.synchronize_stream(s))
    }

    /// [`check`] that also names the last kernels launched where the error may be a fault of one of them.
    pub(crate) fn check(&self, op: &str, code: CUresult) -> Result<()> {
        if code == CUresult::CUDA_SUCCESS {
            return Ok(());
        }
        // Codes from 700 on are faults of running kernels, reported by the next call, whichever it is.
        let mut op = op.to_string();
        if (700..=720).contains(&(code as u32)) {
            let last = self.modules.last_launched();
            if !last.is_empty() {
                op.push_str(&format!(" (launched before it, latest first: {})", last.join(", ")));
            }
        }
        Err(explain(&op, code))
    }

    /// Whether the compute stream is being captured into a graph.
    pub fn is_capturing(&self) -> bool {
        self.pool.capturing() != 0
    }

    pub(crate) fn refuse_in_capture(&self, what: &str) -> Result<()> {
        if self.is_capturing() {
            return Err(Error::device(
                "capture a CUDA graph",
                format!("inside it one cannot {what}; do that before the capture or after it"),
            ));
        }
        Ok(())
    }

    // ---- events

    /// Records an event at this point of a stream.
    pub fn record(self: &Arc<Self>, stream: Stream) -> Result<Event> {
        let raw = self.record_raw(stream)?;
        Ok(Event { raw, gpu: self.clone() })
    }

    /// Makes later work on `stream` wait for the event; the host does not wait.
    pub fn wait(&self, stream: Stream, event: &Event) -> Result<()> {
        self.wait_raw(stream, event.raw)
    }

    /// Makes later work on `then` wait for everything queued on `first` so far.
    pub fn order(&self, first: Stream, then: Stream) -> Result<()> {
        if first == then {
            return Ok(());
        }
        let event = self.record_raw(first)?;
        let waited = self.wait_raw(then, event);
        self.recycle(event);
        waited
    }

    pub(crate) fn record_raw(&self, stream: Stream) -> Result<RawEvent> {
        self.bind()?;
        let idle = lock(&self.idle_events).pop();
        let event = match idle {
            Some(e) => e,
            None => {
                let mut e = std::ptr::null_mut();
                let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
                // SAFETY: the context is current, the pointer is to a local.
                check("create a CUDA event", unsafe { sys::cuEventCreate(&mut e, flags) })?;
                RawEvent(e)
            }
        };
        // SAFETY: our event and stream, of one context.
        let code = unsafe { sys::cuEventRecord(event.0, self.raw_stream(stream)) };
        if code != CUresult::CUDA_SUCCESS {
            self.recycle(event);
        }
        self.check("record a CUDA event", code)?;
        Ok(event)
    }

    pub(crate) fn wait_raw(&self, stream: Stream, event: RawEvent) -> Result<()> {
        self.bind()?;
        // SAFETY: our event and stream, of one context.
        self.check("wait for a CUDA event", unsafe { sys::cuStreamWaitEvent(self.raw_stream(stream), event.0, 0) })
    }

    /// Whether everything before the event has run. Any answer of the driver other than success counts as no.
    pub(crate) fn is_complete(&self, event: RawEvent) -> bool {
        if self.bind().is_err() {
            return false;
        }
        // SAFETY: our event.
        match unsafe { sys::cuEventQuery(event.0) } {
            CUresult::CUDA_SUCCESS => true,
            // The event became an edge of a graph; after the capture there is nothing to wait for.
            CUresult::CUDA_ERROR_CAPTURED_EVENT => !self.is_capturing(),
            _ => false,
        }
    }

    /// Blocks the host until the event has completed.
    pub(crate) fn wait_on_host(&self, event: RawEvent) -> Result<()> {
        self.bind()?;
        // SAFETY: our event.
        self.check("wait for the device", unsafe { sys::cuEventSynchronize(event.0) })
    }

    /// Returns an event for reuse. A stream that already waits for it keeps waiting for the recorded point.
    pub(crate) fn recycle(&self, event: RawEvent) {
        lock(&self.idle_events).push(event);
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.capability;
        write!(f, "cuda:{} ({}, compute capability {major}.{minor})", self.ordinal, self.name)
    }
}

/// A point of a stream that other streams can wait for.
pub struct Event {
    raw: RawEvent,
    gpu: Arc<Gpu>,
}

impl Event {
    /// Whether everything before it has run. Does not wait.
    pub fn is_complete(&self) -> bool {
        self.gpu.is_complete(self.raw)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        self.gpu.recycle(self.raw);
    }
}

/// A point of a stream with the device's own timestamp, for profiling.
pub struct TimedEvent {
    raw: RawEvent,
    gpu: Arc<Gpu>,
}

impl Gpu {
    /// Records this point of a stream with the device's time (resolution about half a microsecond).
    pub fn record_timed(self: &Arc<Self>, stream: Stream) -> Result<TimedEvent> {
        self.bind()?;
        let mut e = std::ptr::null_mut();
        // SAFETY: the context is current, the pointer is to a local.
        check("create a CUDA event", unsafe { sys::cuEventCreate(&mut e, 0) })?;
        let event = TimedEvent { raw: RawEvent(e), gpu: self.clone() };
        // SAFETY: our event and stream, of one context.
        self.check("record a CUDA event", unsafe { sys::cuEventRecord(e, self.raw_stream(stream)) })?;
        Ok(event)
    }
}

impl TimedEvent {
    /// Milliseconds of device time from `self` to a later event. Both must have completed: synchronise first.
    pub fn milliseconds_to(&self, later: &TimedEvent) -> Result<f32> {
        self.gpu.bind()?;
        let mut ms = 0f32;
        // SAFETY: our events; the pointer is to a local. The function with the suffix _v2 exists from CUDA 12.8 on.
        let code = unsafe {
            if probe::has_symbols(&["cuEventElapsedTime_v2"]) {
                sys::cuEventElapsedTime_v2(&mut ms, self.raw.0, later.raw.0)
            } else {
                return Err(Error::device("time kernels", "the driver is older than CUDA 12.8; update it"));
            }
        };
        if code == CUresult::CUDA_ERROR_NOT_READY {
            return Err(Error::device("time kernels", "the device has not come to that event yet; synchronise before"));
        }
        self.gpu.check("time kernels", code)?;
        Ok(ms)
    }
}

impl Drop for TimedEvent {
    fn drop(&mut self) {
        if self.gpu.bind().is_ok() {
            // SAFETY: ours, destroyed once; the driver delays the destruction until the event has completed.
            let _ = unsafe { sys::cuEventDestroy_v2(self.raw.0) };
        }
    }
}
