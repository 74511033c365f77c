//! A slice that several threads write at disjoint positions.

use std::marker::PhantomData;
use std::ops::Range;

/// A mutable slice passed to parallel chunks, each of which takes its own range.
#[derive(Clone, Copy)]
pub struct Shared<'a, T> {
    ptr: *mut T,
    len: usize,
    _life: PhantomData<&'a mut [T]>,
}

// SAFETY: access goes through `slice`, whose contract is that ranges taken at the same time are disjoint.
unsafe impl<T: Send> Send for Shared<'_, T> {}
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Wraps a slice for the length of the parallel section.
    pub fn new(slice: &'a mut [T]) -> Self {
        Shared { ptr: slice.as_mut_ptr(), len: slice.len(), _life: PhantomData }
    }
    /// First element; writing through it follows the contract of [`Shared::slice`].
    pub fn ptr(&self) -> *mut T {
        self.ptr
    }
    /// The part of one chunk.
    ///
    /// # Safety
    /// No two parts alive at the same time overlap.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "part {range:?} of {} elements", self.len);
        // SAFETY: in bounds by the assertion; disjoint by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(range.start), range.len()) }
    }
}
