//! Implementations of published systems that are built on the framework and are not layers of a model.
//!
//! Each module names at its top the paper it comes from, with its equations. The modules use only the crate's public interface.

pub mod codeeval;
pub mod editing;
pub mod hytrel;
pub mod pruning;
pub mod robustness;
