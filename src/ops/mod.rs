//! The operations, one file per family: shape rule, CPU code, backward rule, factor rule or the reason there is none,
//! and cases for the checks. [`REGISTRY`] lists them all; a test walks it.

pub(crate) use crate::autograd::NO_PARAMS;
pub use crate::autograd::{Differentiable, FactorRule, OpInfo};

pub mod attention;
pub mod binary;
pub mod conv;
pub mod dropout;
pub mod embedding;
pub mod grouped;
pub mod index;
pub mod linear;
pub mod loss;
pub mod matmul;
pub mod norm;
pub mod params;
pub mod pool;
pub mod reduce;
pub mod rotary;
pub mod segment;
pub mod softmax;
pub mod unary;
pub mod view;

/// Every operation of the crate.
pub static REGISTRY: &[&[&OpInfo]] = &[
    params::OPS,
    unary::OPS,
    binary::OPS,
    reduce::OPS,
    view::OPS,
    matmul::OPS,
    linear::OPS,
    attention::OPS,
    index::OPS,
    embedding::OPS,
    segment::OPS,
    rotary::OPS,
    norm::OPS,
    softmax::OPS,
    loss::OPS,
    dropout::OPS,
    grouped::OPS,
    conv::OPS,
    pool::OPS,
];

/// All registry entries in a row.
pub fn registry() -> impl Iterator<Item = &'static OpInfo> {
    REGISTRY.iter().flat_map(|family| family.iter().copied())
}
