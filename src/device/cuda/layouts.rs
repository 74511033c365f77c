//! Structs that are passed to kernels by value, and codes that kernels and launches share. `build.rs` reads them in the texts
//! of `cuda/`, which are the only place where they are written down.

include!(concat!(env!("OUT_DIR"), "/layouts.rs"));
