//! Arrays without autograd history: [`Array`] is shape, strides and dtype over shared storage on a device.

#[allow(clippy::module_inception)]
mod array;
pub(crate) mod cuda;
mod elementwise;
pub mod shape;
mod storage;

pub use array::{Array, ArrayOptions};
pub(crate) use cuda::Arguments;
pub use cuda::ArrayArguments;
pub use shape::Dims;
