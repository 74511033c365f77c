//! Devices. The CPU backend is complete; of CUDA there is the probe.

pub mod cpu;
pub mod cuda;
