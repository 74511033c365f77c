//! Data without history: [`Array`] is shape, strides and dtype over shared storage on a device.

mod array;
mod dtype;
pub mod shape;
mod storage;

pub use array::Array;
pub use dtype::{DType, Element, Float};
pub use shape::Dims;
