//! Structs that are passed to kernels by value, and codes that kernels and launches share. They are defined only in the sources in `cuda/`,
//! from which `build.rs` generates these Rust definitions.

include!(concat!(env!("OUT_DIR"), "/layouts.rs"));
