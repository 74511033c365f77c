//! Copies between host and device, and within the device, all on the compute stream.
//!
//! Uploads go through pinned staging buffers, so the call returns as soon as the bytes are in the staging buffer; the device fetches them
//! later, in stream order. A download is the only operation here that makes the host wait.

use super::context::{Gpu, RawEvent, Stream, count, lock};
use super::errors::check;
use super::memory::human;
use super::pool::Block;
use crate::base::{Error, Result};
use bytemuck::Pod;
use cudarc::driver::sys;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};

/// Transfers are split into pieces of at most this size, which is enough for full PCIe bandwidth (about 0.3 ms at 25 GB/s).
const PIECE: usize = 8 << 20;
const SMALLEST: usize = 4 << 10;
/// The most pinned memory that is kept, in bytes. Beyond it an upload waits for an earlier one.
const PINNED: usize = 128 << 20;

/// A pinned host buffer and the event of its last use.
struct Slot {
    ptr: *mut u8,
    size: usize,
    busy: Option<RawEvent>,
}
// SAFETY: the buffer is owned by the holder of the slot.
unsafe impl Send for Slot {}

/// Idle and busy staging buffers of one device.
#[derive(Default)]
pub(crate) struct Staging {
    slots: Mutex<Slots>,
}

#[derive(Default)]
struct Slots {
    list: Vec<Slot>,
    /// Bytes in all slots, including those in use.
    pinned: usize,
}

impl Staging {
    /// A buffer of at least `bytes` (at most [`PIECE`]) that the device no longer uses.
    fn take(&self, gpu: &Gpu, bytes: usize) -> Result<Slot> {
        let size = bytes.next_power_of_two().max(SMALLEST);
        let mut slots = lock(&self.slots);
        let ready = |s: &Slot| s.size == size && s.busy.is_none_or(|e| gpu.is_complete(e));
        let found = match slots.list.iter().position(ready) {
            Some(i) => Some(i),
            // No buffer is free and there is no room for more: wait for the oldest of this size.
            None if slots.pinned + size > PINNED => slots.list.iter().position(|s| s.size == size),
            None => None,
        };
        if let Some(i) = found {
            let mut slot = slots.list.remove(i);
            drop(slots);
            if let Some(event) = slot.busy.take() {
                if !gpu.is_complete(event) {
                    count(&gpu.counters.synchronisations);
                    gpu.wait_on_host(event)?;
                }
                gpu.recycle(event);
            }
            return Ok(slot);
        }
        slots.pinned += size;
        drop(slots);
        gpu.bind()?;
        let mut ptr = std::ptr::null_mut();
        count(&gpu.counters.driver_allocations);
        // SAFETY: the context is current, the pointer is to a local. Flag 1 is CU_MEMHOSTALLOC_PORTABLE.
        let code = unsafe { sys::cuMemHostAlloc(&mut ptr, size, 1) };
        if let Err(e) = check(&format!("pin {} of host memory", human(size)), code) {
            lock(&self.slots).pinned -= size;
            return Err(e);
        }
        Ok(Slot { ptr: ptr.cast(), size, busy: None })
    }

    /// Returns a slot to the list, to be reused after `busy`.
    fn put(&self, mut slot: Slot, busy: Option<RawEvent>) {
        slot.busy = busy;
        lock(&self.slots).list.push(slot);
    }
}

/// The address of `bytes` bytes at `offset` of a block; an error if they lie outside it.
fn range(op: &str, block: &Block, offset: usize, bytes: usize) -> Result<u64> {
    match offset.checked_add(bytes) {
        Some(end) if end <= block.bytes() => Ok(block.ptr() + offset as u64),
        _ => Err(Error::device(
            op,
            format!("{bytes} bytes at offset {offset} are not inside the block of {} bytes", block.bytes()),
        )),
    }
}

impl Gpu {
    /// A new block with these values.
    pub fn upload<T: Pod>(self: &Arc<Self>, values: &[T]) -> Result<Block> {
        let block = self.alloc(size_of_val(values))?;
        self.upload_into(&block, 0, values)?;
        Ok(block)
    }

    /// Writes values at a byte offset. They are copied to a staging buffer first: the slice may be changed when the call returns.
    pub fn upload_into<T: Pod>(&self, block: &Block, offset: usize, values: &[T]) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let to = range("upload", block, offset, bytes.len())?;
        if bytes.is_empty() {
            return Ok(());
        }
        self.refuse_in_capture("upload (every launch of the graph would read the same stale bytes)")?;
        self.same(block)?;
        self.bind()?;
        count(&self.counters.uploads);
        for (i, piece) in bytes.chunks(PIECE).enumerate() {
            let slot = self.staging.take(self, piece.len())?;
            // SAFETY: the slot is ours, idle, and at least as long as the piece; the target range was checked. The driver
            // reads the slot until the event recorded next has completed, and `take` waits for that.
            let code = unsafe {
                std::ptr::copy_nonoverlapping(piece.as_ptr(), slot.ptr, piece.len());
                let at = to + (i * PIECE) as u64;
                sys::cuMemcpyHtoDAsync_v2(at, slot.ptr.cast(), piece.len(), self.raw_stream(Stream::Compute))
            };
            let busy = self
                .check(&format!("upload {}", human(bytes.len())), code)
                .and_then(|()| self.record_raw(Stream::Compute));
            match busy {
                Ok(event) => self.staging.put(slot, Some(event)),
                // The slot is not returned to the list: the device may still read it. A failed upload ends the run, so the buffer is not
                // needed again.
                Err(e) => return Err(e),
            }
        }
        block.record_use(Stream::Compute)
    }

    /// Reads values at a byte offset. **Waits** for the compute stream.
    pub fn download_into<T: Pod>(&self, block: &Block, offset: usize, values: &mut [T]) -> Result<()> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(values);
        let from = range("download", block, offset, bytes.len())?;
        if bytes.is_empty() {
            return Ok(());
        }
        self.refuse_in_capture("download")?;
        self.same(block)?;
        self.bind()?;
        self.counters.downloads.fetch_add(1, Relaxed);
        self.counters.synchronisations.fetch_add(1, Relaxed);
        let op = format!("download {}", human(bytes.len()));
        // Two pieces are in flight: while the host copies one out, the next arrives.
        let mut flying: Option<(Slot, RawEvent, &mut [u8])> = None;
        let mut at = from;
        for piece in bytes.chunks_mut(PIECE) {
            let slot = self.staging.take(self, piece.len())?;
            // SAFETY: the slot is ours, idle, and at least as long as the piece; the source range was checked.
            let code = unsafe {
                sys::cuMemcpyDtoHAsync_v2(slot.ptr.cast(), at, piece.len(), self.raw_stream(Stream::Compute))
            };
            self.check(&op, code)?;
            at += piece.len() as u64;
            let event = self.record_raw(Stream::Compute)?;
            if let Some(landed) = flying.replace((slot, event, piece)) {
                self.land(landed)?;
            }
        }
        if let Some(landed) = flying {
            self.land(landed)?;
        }
        self.pool.poll(self);
        self.report_deferred_errors()
    }

    fn land(&self, (slot, event, piece): (Slot, RawEvent, &mut [u8])) -> Result<()> {
        self.wait_on_host(event)?;
        self.recycle(event);
        // SAFETY: the copy into the slot has completed, and the slot is at least as long as the piece.
        unsafe { std::ptr::copy_nonoverlapping(slot.ptr, piece.as_mut_ptr(), piece.len()) };
        self.staging.put(slot, None);
        Ok(())
    }

    /// `count` values from a byte offset. **Waits** for the compute stream.
    pub fn download<T: Pod>(&self, block: &Block, offset: usize, count: usize) -> Result<Vec<T>> {
        // Checked before the host allocates memory for a wrong count.
        range("download", block, offset, count.saturating_mul(size_of::<T>()))?;
        let mut values = vec![T::zeroed(); count];
        self.download_into(block, offset, &mut values)?;
        Ok(values)
    }

    /// Copies bytes between blocks of this device. The ranges must not overlap.
    pub fn copy(&self, to: &Block, to_offset: usize, from: &Block, from_offset: usize, bytes: usize) -> Result<()> {
        let target = range("copy on the device", to, to_offset, bytes)?;
        let source = range("copy on the device", from, from_offset, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        self.same(to)?;
        self.same(from)?;
        if target < source + bytes as u64 && source < target + bytes as u64 {
            return Err(Error::device("copy on the device", "source and target overlap; copy through a third block"));
        }
        self.bind()?;
        // SAFETY: both ranges were checked and do not overlap.
        let code = unsafe { sys::cuMemcpyDtoDAsync_v2(target, source, bytes, self.raw_stream(Stream::Compute)) };
        self.check(&format!("copy {} on the device", human(bytes)), code)?;
        to.record_use(Stream::Compute)?;
        from.record_use(Stream::Compute)
    }

    /// Sets every byte of a range: 0 for zeros of any type, 0xFF for NaN.
    pub fn fill(&self, block: &Block, offset: usize, bytes: usize, value: u8) -> Result<()> {
        let at = range("fill", block, offset, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        self.same(block)?;
        self.bind()?;
        // SAFETY: the range was checked.
        let code = unsafe { sys::cuMemsetD8Async(at, value, bytes, self.raw_stream(Stream::Compute)) };
        self.check(&format!("fill {}", human(bytes)), code)?;
        block.record_use(Stream::Compute)
    }

    /// A new block of zeros.
    pub fn zeros(self: &Arc<Self>, bytes: usize) -> Result<Block> {
        let block = self.alloc(bytes)?;
        self.fill(&block, 0, bytes, 0)?;
        Ok(block)
    }

    pub(crate) fn same(&self, block: &Block) -> Result<()> {
        if block.gpu().ordinal() == self.ordinal() {
            return Ok(());
        }
        Err(Error::device(
            format!("use memory of cuda:{} on cuda:{}", block.gpu().ordinal(), self.ordinal()),
            "move the array to one device first",
        ))
    }
}
