//! The operations, one file or folder per family: shape rule, backward rule, factor rule or the reason there is none, cases for the checks,
//! and the loops and launches that only this family has. [`REGISTRY`] lists them all, and a test visits every entry.
//!
//! The two lists below are the folder's files. After adding one, run `PRISMGRAD_WRITE_LISTS=1 cargo test --test house`, which updates them.

pub(crate) use crate::autograd::NO_PARAMS;
pub use crate::autograd::{Differentiable, FactorRule, OpInfo};

pub mod add_scaled;
pub mod attention;
pub mod binary;
pub mod combine;
pub mod conv;
pub mod dropout;
pub mod embedding;
pub mod grouped;
pub mod incidence;
pub mod index;
pub mod linear;
pub mod loss;
pub mod matmul;
pub mod norm;
pub mod params;
pub mod pool;
pub mod random;
pub mod reduce;
pub mod rotary;
pub mod route;
pub mod segment;
pub mod softmax;
pub mod softmin;
pub mod unary;
pub mod view;

/// Every operation of the crate.
pub static REGISTRY: &[&[&OpInfo]] = &[
    add_scaled::OPS,
    attention::OPS,
    binary::OPS,
    combine::OPS,
    conv::OPS,
    dropout::OPS,
    embedding::OPS,
    grouped::OPS,
    incidence::OPS,
    index::OPS,
    linear::OPS,
    loss::OPS,
    matmul::OPS,
    norm::OPS,
    params::OPS,
    pool::OPS,
    random::OPS,
    reduce::OPS,
    rotary::OPS,
    route::OPS,
    segment::OPS,
    softmax::OPS,
    softmin::OPS,
    unary::OPS,
    view::OPS,
];

/// All registry entries in sequence.
pub fn registry() -> impl Iterator<Item = &'static OpInfo> {
    REGISTRY.iter().flat_map(|family| family.iter().copied())
}
