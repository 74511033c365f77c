#![doc = include_str!("../README.md")]
#![warn(missing_docs)]

pub mod autograd;
pub mod check;
pub mod data;
pub mod device;
pub mod dist;
#[cfg(feature = "emulator")]
#[path = "../cuda/emulator/mod.rs"]
pub mod emulator;
pub mod error;
pub mod io;
pub mod models;
pub mod nn;
pub mod ops;
pub mod optim;
pub mod privacy;
pub mod profile;
pub mod random;
pub mod step;
pub mod tensor;
pub mod train;

pub use autograd::{Factor, Flow, GradHook, Gradients, Param, ParamGrad, Rule, Samples, Tensor, no_grad};
pub use device::Device;
pub use error::{Error, Result};
pub use tensor::{Array, DType, Element, Float};
