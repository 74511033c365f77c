//! Published systems that are built on the framework and are no layer of a model.
//!
//! Each module has the paper it comes from, with its equations, at its top. They use nothing that a program which links the crate
//! could not use.

pub mod codeeval;
pub mod editing;
pub mod hytrel;
pub mod pruning;
pub mod robustness;
