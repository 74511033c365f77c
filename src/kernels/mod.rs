//! CPU loops and GPU launches that several operations share: products, elementwise maps, sums of rows and columns, rows by index.

mod activation;
mod dispatch;
pub mod elementwise;
pub mod gemm;
pub(crate) mod lanes;
pub mod rows;
pub mod sums;

pub use activation::Activation;
pub(crate) use dispatch::{Exact, Half, dispatch, dispatch_all};
