//! The ground of the crate: errors, element types, elementary functions, counter-based random bits, names. It imports
//! nothing of the crate.

pub mod dtype;
mod error;
mod names;
pub mod philox;
pub mod vmath;

pub use dtype::{Computed, DType, Element, Float};
pub use error::{Error, Result};
pub(crate) use names::{hash, matches};
