//! The systems of the papers.

#[path = "../common"]
mod common {
    pub mod scratch;
    pub mod skip;
}

mod codeeval;
mod continual;
mod editing;
mod hytrel;
mod merge;
mod pruning;
mod robustness;
