//! Models made of the layers.

pub mod generate;
pub mod gpt;
pub mod mixtral;

pub use generate::{LanguageModel, Sampling, generate};
pub use gpt::{Gpt, GptConfig, GptOut};
pub use mixtral::{ExpertCounts, Mixtral, MixtralConfig};
