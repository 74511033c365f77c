//! A pool of host buffers that are kept and reused.
//!
//! The page faults of fresh memory cost several times the work done on it, so freed buffers go to free lists by size class and are reused
//! from there. The idle memory is bounded by the peak of memory in use.

use std::alloc::{Layout, alloc, alloc_zeroed, dealloc, handle_alloc_error};
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

const ALIGN: usize = 64;
/// Buffers smaller than this go directly to the system allocator.
const SMALL: usize = 16 << 10;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
/// Peak since the last call of [`watermark`].
static WINDOW: AtomicUsize = AtomicUsize::new(0);
static FREE: Mutex<Lists> = Mutex::new(Lists { by_size: BTreeMap::new(), bytes: 0 });

struct Lists {
    by_size: BTreeMap<usize, Vec<usize>>,
    bytes: usize,
}

/// Bytes in use, peak bytes in use, and bytes kept for reuse.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// In use now.
    pub live: usize,
    /// In use at most.
    pub peak: usize,
    /// Kept idle.
    pub idle: usize,
}

/// The current usage of the pool.
pub fn usage() -> Usage {
    let idle = FREE.lock().unwrap_or_else(|e| e.into_inner()).bytes;
    Usage { live: LIVE.load(Ordering::Relaxed), peak: PEAK.load(Ordering::Relaxed), idle }
}

/// Bytes in use now, and the most that were in use since the last call.
pub fn watermark() -> (usize, usize) {
    let live = LIVE.load(Ordering::Relaxed);
    (live, WINDOW.swap(live, Ordering::Relaxed).max(live))
}

/// Counts bytes as in use.
fn note(bytes: usize) {
    let live = LIVE.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK.fetch_max(live, Ordering::Relaxed);
    WINDOW.fetch_max(live, Ordering::Relaxed);
}

/// Returns all idle memory to the system.
pub fn trim() {
    let mut lists = FREE.lock().unwrap_or_else(|e| e.into_inner());
    for (size, blocks) in std::mem::take(&mut lists.by_size) {
        blocks.into_iter().for_each(|p| release(p, size));
    }
    lists.bytes = 0;
}

fn release(p: usize, size: usize) {
    // SAFETY: blocks on the lists were allocated with this layout and have no other owner.
    unsafe { dealloc(p as *mut u8, Layout::from_size_align_unchecked(size, ALIGN)) }
}

/// 64-byte aligned bytes.
pub struct Buffer {
    ptr: NonNull<u8>,
    bytes: usize,
    /// Allocated size.
    class: usize,
    /// How many of its bytes count as in use.
    counted: usize,
}

// SAFETY: the buffer owns its bytes; access follows the borrow of the buffer.
unsafe impl Send for Buffer {}
unsafe impl Sync for Buffer {}

/// Size classes: eighths of powers of two, at most 12.5 % above the request.
fn class(bytes: usize) -> usize {
    let bytes = bytes.max(1).next_multiple_of(ALIGN);
    if bytes <= SMALL {
        return bytes;
    }
    let step = (bytes.next_power_of_two() / 16).max(ALIGN);
    bytes.next_multiple_of(step)
}

impl Buffer {
    /// A buffer with unspecified contents; the caller writes before it reads.
    pub fn uninit(bytes: usize) -> Buffer {
        Buffer::take(bytes, false)
    }
    /// All zeros.
    pub fn zeroed(bytes: usize) -> Buffer {
        Buffer::take(bytes, true)
    }
    fn take(bytes: usize, zero: bool) -> Buffer {
        let class = class(bytes);
        note(class);
        if class > SMALL
            && let Some(p) = reuse(class)
        {
            let mut b = Buffer { ptr: p, bytes, class, counted: class };
            if zero {
                let x = super::shared::Shared::new(b.as_mut_slice::<u8>());
                super::par::par_chunks(bytes, 1 << 20, |r| {
                    // SAFETY: chunks are disjoint.
                    unsafe { x.slice(r) }.fill(0)
                });
            }
            return b;
        }
        // SAFETY: the size is not zero and the alignment is a power of two.
        let p = unsafe {
            let layout = Layout::from_size_align_unchecked(class, ALIGN);
            // Fresh memory is zeroed even where that is not requested: reading it is then always defined.
            let p = if zero || class > SMALL { alloc_zeroed(layout) } else { alloc(layout) };
            NonNull::new(p).unwrap_or_else(|| handle_alloc_error(layout))
        };
        let mut b = Buffer { ptr: p, bytes, class, counted: class };
        if !zero && class <= SMALL {
            b.as_mut_slice::<u8>().fill(0);
        }
        b
    }
    /// Sets how many bytes count as in use from now on: 0 for a buffer that is only kept for later.
    pub fn count_as(&mut self, bytes: usize) {
        let before = std::mem::replace(&mut self.counted, bytes);
        if bytes < before {
            LIVE.fetch_sub(before - bytes, Ordering::Relaxed);
        } else {
            note(bytes - before);
        }
    }
    /// Size in bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.bytes
    }
    /// The bytes as elements.
    pub fn as_slice<T: bytemuck::Pod>(&self) -> &[T] {
        // SAFETY: initialised on allocation, aligned to 64, and any bytes are a valid Pod.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr() as *const T, self.bytes / size_of::<T>()) }
    }
    /// The bytes as elements, for writing.
    pub fn as_mut_slice<T: bytemuck::Pod>(&mut self) -> &mut [T] {
        // SAFETY: as above, and the buffer is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr() as *mut T, self.bytes / size_of::<T>()) }
    }
}

/// An idle block of this class, or of one at most an eighth larger.
fn reuse(class: usize) -> Option<NonNull<u8>> {
    let mut lists = FREE.lock().unwrap_or_else(|e| e.into_inner());
    let blocks = lists.by_size.get_mut(&class)?;
    let p = blocks.pop()?;
    lists.bytes -= class;
    NonNull::new(p as *mut u8)
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let live = LIVE.fetch_sub(self.counted, Ordering::Relaxed) - self.counted;
        let p = self.ptr.as_ptr() as usize;
        if self.class <= SMALL {
            return release(p, self.class);
        }
        let mut lists = FREE.lock().unwrap_or_else(|e| e.into_inner());
        lists.by_size.entry(self.class).or_default().push(p);
        lists.bytes += self.class;
        // The sum of idle and live bytes stays near the peak of use: beyond it, the largest idle blocks are freed first.
        let bound = PEAK.load(Ordering::Relaxed) + PEAK.load(Ordering::Relaxed) / 8;
        while lists.bytes + live > bound {
            let Some(mut last) = lists.by_size.last_entry() else { break };
            let size = *last.key();
            let popped = last.get_mut().pop();
            if last.get().is_empty() {
                last.remove();
            }
            if let Some(p) = popped {
                lists.bytes -= size;
                release(p, size);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_come_back_and_zeroed_ones_are_zero() {
        let mut b = Buffer::uninit(100_000);
        b.as_mut_slice::<f32>().fill(3.0);
        let p = b.ptr;
        drop(b);
        let again = Buffer::zeroed(100_000);
        assert!(again.as_slice::<f32>().iter().all(|&x| x == 0.0));
        assert!(again.ptr == p || usage().live > 0);
    }
    #[test]
    fn classes_waste_at_most_an_eighth() {
        for n in (1..200).map(|i| i * 7919) {
            let c = class(n);
            assert!(c >= n && c <= n.max(64) + n / 8 + 64, "{n} {c}");
        }
    }
}
