//! The lowest layer of the crate: errors, element types, elementary functions, counter-based random bits, names. It imports no other module
//! of the crate.

pub mod dtype;
mod error;
mod names;
pub mod philox;
pub mod vmath;

pub use dtype::{Computed, DType, Element, Float};
pub use error::{Error, Result};
pub(crate) use names::{hash, matches};
