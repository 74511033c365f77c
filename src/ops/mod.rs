//! The operations, one file per family: shape rule, CPU code, backward rule, factor rule or the reason there is none,
//! and cases for the checks. [`REGISTRY`] lists them all; a test walks it.

use crate::check::{Case, Gen};
use crate::error::Result;

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

/// An operation's entry in the registry.
pub struct OpInfo {
    /// Name, as it appears in errors and profiles.
    pub name: &'static str,
    /// Whether gradients flow through it.
    pub differentiable: Differentiable,
    /// What its parameters' gradients look like.
    pub factor: FactorRule,
    /// Random cases for the checks: each call builds one.
    pub cases: &'static [fn(&mut Gen) -> Result<Case>],
}

/// Whether an operation has a backward rule.
pub enum Differentiable {
    /// It has one.
    Yes,
    /// It declares that it has none, and why.
    No(&'static str),
}

/// How the gradients of an operation's parameters are factored.
pub enum FactorRule {
    /// Names of the [`Factor`](crate::Factor) kinds it delivers.
    Kinds(&'static [&'static str]),
    /// It takes no parameters, and why none would help.
    None(&'static str),
}

/// Reason used by operations on plain tensors.
pub(crate) const NO_PARAMS: FactorRule = FactorRule::None("takes tensors only; parameters enter through factored ops");

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
