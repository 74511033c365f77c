//! What the repository says of itself: rooms, pages, rules of the kernels and what they compile to.

#[path = "../common"]
mod common {
    pub mod skip;
}

mod kernel_compile;
mod kernel_rules;
mod pages;
mod rooms;
