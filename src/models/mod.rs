//! Models made of the layers.

pub mod generate;
pub mod gpt;

pub use generate::{Sampling, generate};
pub use gpt::{Gpt, GptConfig};
