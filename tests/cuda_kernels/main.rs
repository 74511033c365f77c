//! Kernels launched by themselves, for what no case of an op shows: bits of random numbers, updates, clip factors, sorts of many
//! passes, the same bits under every schedule, and what no op asks of a kernel yet.
//! Everything else is compared in `tests/cuda/registry.rs`, where each case of an op runs in every mode.
#![cfg(feature = "emulator")]

#[macro_use]
mod common;
mod clip;
mod gemm;
mod grouped;
mod random;
mod sort;
