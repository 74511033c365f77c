//! The run-time support of the CPU: threads, memory, slices that threads share, vector instructions.
pub mod par;
pub mod pool;
pub mod shared;
pub mod simd;
