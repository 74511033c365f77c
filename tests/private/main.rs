//! The accountant, the private step against an adversary, and what a run spends.

#[path = "../common"]
mod common {
    pub mod distance;
    pub mod gpt;
    pub mod records;
    pub mod scratch;
}

mod accountant;
mod audit;
mod budget;
mod independence;
mod privacy;
