//! The products, attention and factored-gradient kernels, the tensor-core ones too, on the emulated device under several
//! schedules with full checks: against plain loops and the CPU's operations in f64, on odd sizes, strides and offsets.
#![cfg(feature = "emulator")]

/// Launches a kernel at once: name, grid, block, shared memory; arguments.
macro_rules! launch {
    ($name:expr, $grid:expr, $block:expr, $smem:expr, $coop:expr; $($a:expr),*) => {
        prismgrad::device::emulator::launch($name, $grid, $block, $smem, $coop, &[$($crate::bytes(&$a)),*])
    };
}

#[allow(dead_code, unused_macros)]
#[macro_use]
#[path = "../cuda_kernels_basic/common.rs"]
mod common;

mod attention;
mod factored;
mod gemm;
mod grouped;

/// A kernel's argument.
fn bytes<T: Copy>(v: &T) -> Vec<u8> {
    // SAFETY: plain values without padding that a kernel would look at.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(v).cast::<u8>(), size_of::<T>()) }.to_vec()
}
