//! CUDA: one GPU as a thing to allocate on, copy to and launch on.
//!
//! The driver is loaded at run time, so one binary runs with and without a GPU; the kernels are compiled for the card that
//! is found (or read from a cache) by NVRTC. Nothing here panics for lack of a library, a device or memory.
//!
//! | file | what |
//! |---|---|
//! | `probe` | is there a driver, is there a device |
//! | `context` | [`Gpu`]: context, streams, events, counters |
//! | `pool`, `memory` | [`Block`]: device memory that is kept and reused; who uses how much |
//! | `transfer` | uploads, downloads, copies, fills |
//! | `nvrtc`, `sources`, `cache`, `kernels` | kernel files compiled, cached, loaded, looked up |
//! | `module` | [`CudaModule`]: kernels that come with a user's op |
//! | `launch` | [`Launch`]: one kernel launch |
//! | `layouts` | structs and codes that kernels and launches share |
//! | `graph` | [`Graph`]: a recorded step |
//! | `deferred` | ids out of range, found by kernels, reported at the next read |
//! | `library` | where NVIDIA's libraries may lie |
//! | `errors` | result codes as sentences |
//!
//! | environment variable | meaning |
//! |---|---|
//! | `PRISMGRAD_CUDA_POOL` | `cached`, `guard` or `poison`: how freed memory is kept |
//! | `PRISMGRAD_CUDA_SYNC` | 1: wait after each launch, so that a fault is reported by the launch that caused it |
//! | `PRISMGRAD_NVRTC` | the libnvrtc to use: its file or folder |
//! | `PRISMGRAD_CUBLASLT` | the libcublasLt to use: its file or folder; `off` for none |
//! | `PRISMGRAD_CACHE` | folder for compiled kernels |

pub mod cache;
mod context;
pub(crate) mod deferred;
mod errors;
mod graph;
pub mod kernels;
mod launch;
pub mod layouts;
pub(crate) mod library;
mod memory;
mod module;
pub mod nvrtc;
mod pool;
mod probe;
pub mod sources;
mod transfer;

pub use context::{Counts, Event, Gpu, Stream, TimedEvent};
pub(crate) use context::{count, lock};
pub use graph::Graph;
pub use kernels::Kernel;
pub use launch::{Launch, MAX_GRID_YZ};
pub use memory::{MemoryReport, Tag, TagScope, Usage};
pub use module::CudaModule;
pub use pool::{Block, PoolMode};
pub use probe::{Driver, driver, driver_present};
