//! Data without history: [`Array`] is shape, strides and dtype over shared storage on a device.

mod array;
mod dtype;
pub mod shape;

pub use array::Array;
pub use dtype::{DType, Element, Float};
pub use shape::Dims;
