// Only documentation builds include the README: otherwise each edit of the README would recompile the crate.
#![cfg_attr(any(doc, doctest), doc = include_str!("../README.md"))]
#![cfg_attr(not(any(doc, doctest)), doc = "The README is this page.")]
#![warn(missing_docs)]

pub mod array;
pub mod autograd;
pub mod base;
pub mod check;
pub mod data;
pub mod device;
pub mod dist;
pub mod io;
pub mod kernels;
pub mod models;
pub mod nn;
pub mod ops;
pub mod optim;
pub mod prelude;
pub mod privacy;
pub mod profile;
pub mod random;
pub mod step;
pub mod systems;
pub mod train;

pub use array::Array;
pub use autograd::{Cotangents, Factor, GradHook, Gradients, Param, ParamGrad, Rule, Samples, Tensor, no_grad};
pub use base::{DType, Element, Error, Float, Result};
pub use device::Device;
