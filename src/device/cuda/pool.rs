//! A caching allocator for device memory: freed blocks are kept and reused.
//!
//! A driver allocation costs 10 to 1000 µs and may wait for the whole device, so freed blocks go to free lists by size class and stream.
//! Two rules make their reuse safe without waiting:
//!
//! - A block belongs to the stream it was allocated for. Work queued on that stream before the block was freed runs before work
//!   queued by its next owner, so that stream can reuse the block at once, even while the device still computes on it.
//! - A block that another stream used ([`Block::record_use`]) carries an event of that stream. It is reused when the event has
//!   completed, or after its own stream has been made to wait for the event. The host never waits.
//!
//! `PRISMGRAD_CUDA_POOL` chooses the mode: `cached` (the default); `guard`, where every block is an allocation of its own with the exact
//! size and is freed to the driver, so that a memory checker detects every access outside it; `poison`, where fresh and freed memory is
//! filled with 0xFF, which is NaN in every float type.
//!
//! While a graph is captured, memory comes from idle blocks only and then stays with the graph ([`super::Graph`]); guard mode has no idle
//! blocks and therefore does not support capture.

use super::context::{Gpu, RawEvent, Stream, count, lock};
use super::errors::explain;
use super::memory::{MemoryReport, Meters, Tag, human};
use crate::base::{Error, Result};
use cudarc::driver::sys::{self, CUresult};
use smallvec::SmallVec;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Alignment and smallest size of a block. The driver aligns to 256 bytes; 512 also keeps rows of tiles aligned to whole memory sectors.
const ALIGN: usize = 512;
/// How many idle blocks are searched for one whose uses by other streams have completed.
const LOOK: usize = 8;

/// How freed blocks are kept; chosen by `PRISMGRAD_CUDA_POOL`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolMode {
    /// Freed blocks are kept for reuse.
    Cached,
    /// Every block is an allocation of its own.
    Guard,
    /// Blocks are kept for reuse, and filled with NaN bytes in between.
    Poison,
}

/// The size to which a request is rounded up: powers of two with three steps between, so that at most a fifth is unused (small requests:
/// multiples of 512 bytes).
pub(crate) fn size_class(bytes: usize) -> usize {
    let step = (bytes.max(1).next_power_of_two() / 8).max(ALIGN);
    bytes.max(1).div_ceil(step) * step
}

type Uses = SmallVec<[(Stream, RawEvent); 1]>;

/// One allocation from the driver.
struct Raw {
    ptr: u64,
    size: usize,
    home: Stream,
    /// Last uses by other streams.
    uses: Uses,
    /// The graph whose launches write to this memory; 0 for none.
    graph: u64,
}

#[derive(Default)]
struct Idle {
    /// Idle blocks by home stream and size.
    free: BTreeMap<(Stream, usize), Vec<Raw>>,
    /// Blocks that belong to a graph. An entry exists as long as the graph does.
    graphs: HashMap<u64, BTreeMap<(Stream, usize), Vec<Raw>>>,
    /// Guard mode: blocks to free once their uses have completed.
    doomed: Vec<Raw>,
    reserved: usize,
    idle: usize,
}

/// The memory of one device.
pub(crate) struct Pool {
    mode: PoolMode,
    meters: Meters,
    /// Blocks left here by `Drop`. The lock is held for a push or a swap only, never across a driver call.
    returned: Mutex<Vec<Raw>>,
    idle: Mutex<Idle>,
    /// The graph being captured; 0 for none.
    capture: AtomicU64,
}

impl Pool {
    pub(crate) fn from_env() -> Result<Pool> {
        let mode = match std::env::var("PRISMGRAD_CUDA_POOL").as_deref() {
            Err(_) | Ok("" | "cached") => PoolMode::Cached,
            Ok("guard") => PoolMode::Guard,
            Ok("poison") => PoolMode::Poison,
            Ok(other) => {
                return Err(Error::invalid("PRISMGRAD_CUDA_POOL", format!("{other:?} is not cached, guard or poison")));
            }
        };
        Ok(Pool {
            mode,
            meters: Meters::default(),
            returned: Mutex::default(),
            idle: Mutex::default(),
            capture: AtomicU64::new(0),
        })
    }

    /// The graph being captured; 0 for none.
    pub(crate) fn capturing(&self) -> u64 {
        self.capture.load(Ordering::Acquire)
    }

    /// Sorts the blocks that `Drop` left into the free lists.
    fn collect(&self, gpu: &Gpu, idle: &mut Idle) {
        let returned = std::mem::take(&mut *lock(&self.returned));
        for raw in returned {
            idle.idle += raw.size;
            if raw.graph != 0
                && let Some(arena) = idle.graphs.get_mut(&raw.graph)
            {
                arena.entry((raw.home, raw.size)).or_default().push(raw);
            } else if self.mode == PoolMode::Guard {
                idle.doomed.push(raw);
            } else {
                idle.free.entry((raw.home, raw.size)).or_default().push(raw);
            }
        }
        if !idle.doomed.is_empty() && self.capturing() == 0 {
            let doomed = std::mem::take(&mut idle.doomed);
            for mut raw in doomed {
                if settle(gpu, &mut raw) { give_back(gpu, idle, raw) } else { idle.doomed.push(raw) }
            }
        }
    }

    /// Frees blocks that were waiting only for the device. Called just after the host has waited for the device.
    pub(crate) fn poll(&self, gpu: &Gpu) {
        if self.mode == PoolMode::Guard {
            self.collect(gpu, &mut lock(&self.idle));
        }
    }

    fn allocate(&self, gpu: &Gpu, bytes: usize, home: Stream) -> Result<Raw> {
        gpu.bind()?;
        let size = if self.mode == PoolMode::Guard { bytes } else { size_class(bytes) };
        let mut idle = lock(&self.idle);
        self.collect(gpu, &mut idle);
        let graph = self.capturing();
        let found = match graph {
            0 => None,
            _ => idle.graphs.get_mut(&graph).and_then(|arena| take(gpu, arena, (home, size))),
        };
        if let Some(mut raw) = found.or_else(|| take(gpu, &mut idle.free, (home, size))) {
            idle.idle -= raw.size;
            drop(idle);
            for (_, event) in raw.uses.drain(..) {
                // If the wait cannot be queued, the context is lost, and the next launch returns that error.
                let waited = gpu.wait_raw(home, event);
                gpu.recycle(event);
                waited?;
            }
            raw.graph = graph;
            return Ok(raw);
        }
        if graph != 0 {
            return Err(Error::device(
                "capture a CUDA graph",
                format!(
                    "a block of {} is not in the pool, and the driver cannot be asked inside a capture; run the same step \
                     once before capturing it",
                    human(size)
                ),
            ));
        }
        let ptr = match driver_alloc(gpu, size) {
            Ok(ptr) => ptr,
            Err(CUresult::CUDA_ERROR_OUT_OF_MEMORY) => {
                self.empty(gpu, &mut idle)?;
                driver_alloc(gpu, size).map_err(|code| self.refused(gpu, &idle, bytes, code))?
            }
            Err(code) => return Err(self.refused(gpu, &idle, bytes, code)),
        };
        idle.reserved += size;
        drop(idle);
        let raw = Raw { ptr, size, home, uses: Uses::new(), graph: 0 };
        if self.mode == PoolMode::Poison {
            poison(gpu, &raw);
        }
        Ok(raw)
    }

    #[cold]
    fn refused(&self, gpu: &Gpu, idle: &Idle, bytes: usize, code: CUresult) -> Error {
        let op = format!("allocate {} ({bytes} bytes) on cuda:{}", human(bytes), gpu.ordinal());
        if code != CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return explain(&op, code);
        }
        let (mut free, mut total) = (0, 0);
        // SAFETY: the context is current, the pointers are to locals; on failure they stay 0.
        unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) };
        let report = self.meters.report(idle.reserved, idle.idle);
        Error::device(
            op,
            format!(
                "out of memory, also after giving idle memory back: the driver has {} free of {}; {report}; use a smaller \
                 batch, recompute activations, or free what is no longer needed",
                human(free),
                human(total)
            ),
        )
    }

    /// Gives every idle block that belongs to no graph back to the driver. Waits for the device first.
    fn empty(&self, gpu: &Gpu, idle: &mut Idle) -> Result<()> {
        for s in Stream::ALL {
            count(&gpu.counters.synchronisations);
            // SAFETY: our streams; the context is current.
            gpu.check("empty the memory cache", unsafe { sys::cuStreamSynchronize(gpu.raw_stream(s)) })?;
        }
        self.collect(gpu, idle);
        for raw in std::mem::take(&mut idle.free).into_values().flatten().chain(std::mem::take(&mut idle.doomed)) {
            give_back(gpu, idle, raw);
        }
        Ok(())
    }

    // ---- graphs

    /// From here on, allocated memory belongs to the graph `id`. The caller has waited for the device.
    pub(crate) fn begin_capture(&self, gpu: &Gpu, id: u64) {
        let mut idle = lock(&self.idle);
        self.collect(gpu, &mut idle);
        // Events from before a capture cannot be waited for inside it; these have completed.
        for raw in idle.free.values_mut().flatten() {
            raw.uses.drain(..).for_each(|(_, e)| gpu.recycle(e));
        }
        idle.graphs.insert(id, BTreeMap::new());
        self.capture.store(id, Ordering::Release);
    }

    /// Ends what [`Pool::begin_capture`] started.
    pub(crate) fn end_capture(&self, gpu: &Gpu) {
        let id = self.capturing();
        let mut idle = lock(&self.idle);
        self.collect(gpu, &mut idle);
        // Events recorded during the capture became part of the graph, whose own order replaces them.
        if let Some(arena) = idle.graphs.get_mut(&id) {
            for raw in arena.values_mut().flatten() {
                raw.uses.drain(..).for_each(|(_, e)| gpu.recycle(e));
            }
        }
        self.capture.store(0, Ordering::Release);
    }

    /// Called when the graph is dropped: its memory may be reused. Its queued launches run before any new owner's work.
    pub(crate) fn release_graph(&self, gpu: &Gpu, id: u64) {
        let mut idle = lock(&self.idle);
        self.collect(gpu, &mut idle);
        for (key, raws) in idle.graphs.remove(&id).unwrap_or_default() {
            for mut raw in raws {
                raw.graph = 0;
                raw.uses.drain(..).for_each(|(_, e)| gpu.recycle(e));
                if self.mode == PoolMode::Guard {
                    raw.uses.extend(gpu.record_raw(raw.home).ok().map(|e| (raw.home, e)));
                    idle.doomed.push(raw);
                } else {
                    idle.free.entry(key).or_default().push(raw);
                }
            }
        }
    }
}

/// An idle block of this key: among the last few, one without unfinished uses by other streams; if there is none, the last.
fn take(gpu: &Gpu, lists: &mut BTreeMap<(Stream, usize), Vec<Raw>>, key: (Stream, usize)) -> Option<Raw> {
    let list = lists.get_mut(&key)?;
    let ready = (0..list.len()).rev().take(LOOK).find(|&i| settle(gpu, &mut list[i]));
    match ready {
        Some(i) => Some(list.swap_remove(i)),
        None => list.pop(),
    }
}

/// Removes the uses that have completed; returns true when none is left.
fn settle(gpu: &Gpu, raw: &mut Raw) -> bool {
    raw.uses.retain(|(_, event)| {
        let over = gpu.is_complete(*event);
        if over {
            gpu.recycle(*event);
        }
        !over
    });
    raw.uses.is_empty()
}

fn driver_alloc(gpu: &Gpu, size: usize) -> std::result::Result<u64, CUresult> {
    let mut ptr = 0;
    count(&gpu.counters.driver_allocations);
    // SAFETY: the caller has made the context current; the pointer is to a local.
    match unsafe { sys::cuMemAlloc_v2(&mut ptr, size) } {
        CUresult::CUDA_SUCCESS => Ok(ptr),
        code => Err(code),
    }
}

/// Frees a block to the driver. No queued work uses the memory any more: the device was waited for, or the events have completed.
fn give_back(gpu: &Gpu, idle: &mut Idle, raw: Raw) {
    count(&gpu.counters.driver_frees);
    idle.reserved -= raw.size;
    idle.idle -= raw.size;
    raw.uses.into_iter().for_each(|(_, e)| gpu.recycle(e));
    // SAFETY: from cuMemAlloc, and no block uses it any more. An error here means a lost context, which the next call reports.
    let _ = unsafe { sys::cuMemFree_v2(raw.ptr) };
}

/// Fills with 0xFF on the home stream, after the uses by other streams. Errors are left to the next call.
fn poison(gpu: &Gpu, raw: &Raw) {
    for (_, event) in &raw.uses {
        if !gpu.is_complete(*event) {
            let _ = gpu.wait_raw(raw.home, *event);
        }
    }
    if gpu.bind().is_ok() {
        // SAFETY: the memory is ours and `size` bytes long; stream order puts the fill after all earlier uses.
        let _ = unsafe { sys::cuMemsetD8Async(raw.ptr, 0xFF, raw.size, gpu.raw_stream(raw.home)) };
    }
}

/// Device memory, which returns to the pool when dropped.
pub struct Block {
    raw: Held,
    bytes: usize,
    tag: Tag,
    gpu: Arc<Gpu>,
}

/// [`Raw`] while in use: the fields that other threads may change are behind a lock.
struct Held {
    ptr: u64,
    size: usize,
    home: Stream,
    graph: u64,
    uses: Mutex<Uses>,
}

impl Block {
    /// The device address; 0 for a block of no bytes.
    pub fn ptr(&self) -> u64 {
        self.raw.ptr
    }

    /// The requested size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The purpose it was allocated for.
    pub fn tag(&self) -> Tag {
        self.tag
    }

    /// The device it is on.
    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// The stream it was allocated for.
    pub fn stream(&self) -> Stream {
        self.raw.home
    }

    /// Must be called after queueing work that uses the block on a stream other than its own: the memory is then not reused before that
    /// work is done. ([`super::Launch`] does this by itself.)
    pub fn record_use(&self, stream: Stream) -> Result<()> {
        if stream == self.raw.home || self.raw.ptr == 0 {
            return Ok(());
        }
        let event = self.gpu.record_raw(stream)?;
        let mut uses = lock(&self.raw.uses);
        // Work on a stream runs in order, so its latest event stands for the earlier ones.
        match uses.iter_mut().find(|(s, _)| *s == stream) {
            Some((_, last)) => self.gpu.recycle(std::mem::replace(last, event)),
            None => uses.push((stream, event)),
        }
        Ok(())
    }
}

impl std::fmt::Debug for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} of {} on cuda:{} at {:#x}", human(self.bytes), self.tag, self.gpu.ordinal(), self.raw.ptr)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if self.raw.ptr == 0 {
            return;
        }
        let pool = &self.gpu.pool;
        pool.meters.remove(self.tag, self.bytes);
        let uses = std::mem::take(&mut *lock(&self.raw.uses));
        let Held { ptr, size, home, graph, .. } = self.raw;
        // Launches that are being captured may use the block: it stays with their graph.
        let graph = if graph != 0 { graph } else { pool.capturing() };
        let mut raw = Raw { ptr, size, home, uses, graph };
        match pool.mode {
            PoolMode::Cached => {}
            PoolMode::Poison => poison(&self.gpu, &raw),
            // A plain free would wait for the device; this one happens once the work queued so far is done.
            PoolMode::Guard if pool.capturing() == 0 => {
                raw.uses.extend(self.gpu.record_raw(home).ok().map(|e| (home, e)))
            }
            PoolMode::Guard => {}
        }
        lock(&pool.returned).push(raw);
        if pool.mode == PoolMode::Guard
            && let Ok(mut idle) = pool.idle.try_lock()
        {
            pool.collect(&self.gpu, &mut idle);
        }
    }
}

impl Gpu {
    /// Memory for use on the compute stream, under the thread's current [`Tag`]. Its contents are undefined.
    pub fn alloc(self: &Arc<Self>, bytes: usize) -> Result<Block> {
        self.alloc_on(Stream::Compute, bytes)
    }

    /// Memory for use on one stream, under the thread's current [`Tag`]. Its contents are undefined.
    pub fn alloc_on(self: &Arc<Self>, stream: Stream, bytes: usize) -> Result<Block> {
        let raw = match bytes {
            0 => Raw { ptr: 0, size: 0, home: stream, uses: Uses::new(), graph: 0 },
            _ => self.pool.allocate(self, bytes, stream)?,
        };
        let tag = Tag::current();
        self.pool.meters.add(tag, bytes);
        let raw = Held { ptr: raw.ptr, size: raw.size, home: raw.home, graph: raw.graph, uses: Mutex::new(raw.uses) };
        Ok(Block { raw, bytes, tag, gpu: self.clone() })
    }

    /// How this device keeps freed memory.
    pub fn pool_mode(&self) -> PoolMode {
        self.pool.mode
    }

    /// Returns idle memory to the driver. Waits for the device.
    pub fn empty_cache(&self) -> Result<()> {
        self.refuse_in_capture("give memory back")?;
        self.bind()?;
        self.pool.empty(self, &mut lock(&self.pool.idle))
    }

    /// Memory in use and at its peak, by tag.
    pub fn memory_report(&self) -> MemoryReport {
        let mut idle = lock(&self.pool.idle);
        self.pool.collect(self, &mut idle);
        self.pool.meters.report(idle.reserved, idle.idle)
    }

    /// Bytes in use now, and the most that were in use since the last call.
    pub(crate) fn watermark(&self) -> (usize, usize) {
        self.pool.meters.watermark()
    }

    /// Resets the recorded peaks to the bytes in use now.
    pub fn reset_peak_memory(&self) {
        self.pool.meters.reset_peaks();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_aligned_close_and_their_own_class() {
        assert_eq!(size_class(1), 512);
        assert_eq!(size_class(512), 512);
        assert_eq!(size_class(513), 1024);
        assert_eq!(size_class(4096), 4096);
        assert_eq!(size_class(4097), 5120);
        assert_eq!(size_class((1 << 30) + 1), (1 << 30) + (1 << 28));
        let mut before = 0;
        for bytes in (1..200_000).step_by(7) {
            let class = size_class(bytes);
            assert!(class >= bytes && class.is_multiple_of(ALIGN) && size_class(class) == class && class >= before);
            assert!(class - bytes < ALIGN || (class - bytes) * 4 <= bytes, "{bytes} in {class}");
            before = class;
        }
    }
}
