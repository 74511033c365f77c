//! CUDA: opening a GPU, allocating memory on it, copying to and from it, and launching kernels.
//!
//! The driver is loaded at run time, so that one binary runs with and without a GPU. NVRTC compiles the kernels for the card that is found,
//! or they are read from a cache. Nothing here panics for lack of a library, a device or memory.
//!
//! | file | what |
//! |---|---|
//! | `probe` | whether there is a driver and a device |
//! | `context` | [`Gpu`]: context, streams, events, counters |
//! | `pool`, `memory` | [`Block`]: device memory that is kept and reused; memory use by tag |
//! | `transfer` | uploads, downloads, copies, fills |
//! | `nvrtc`, `sources`, `cache`, `kernels` | kernel files compiled, cached, loaded, looked up |
//! | `module` | [`CudaModule`]: the kernels of a user's own op |
//! | `launch` | [`Launch`]: one kernel launch |
//! | `layouts` | structs and codes that kernels and launches share |
//! | `graph` | [`Graph`]: a captured step |
//! | `deferred` | ids out of range, found by kernels, reported at the next read |
//! | `library` | the places where NVIDIA's libraries are searched |
//! | `errors` | driver result codes as sentences |
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
