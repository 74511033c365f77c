//! The basic kernels, one family a module, on the emulated device under several schedules with full checks: against the
//! CPU's operations in f64, on odd sizes, strides, NaN and ties.
#![cfg(feature = "emulator")]

#[macro_use]
mod common;
mod conv;
mod elementwise;
mod index;
mod random;
mod reduce;
mod rows;
