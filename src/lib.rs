//! Prismgrad: deep learning with factored gradients.
#![warn(missing_docs)]

pub mod data;
pub mod error;
pub mod io;
pub mod train;

pub use error::{Error, Result};
