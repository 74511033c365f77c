//! Models made of the layers in [`nn`](crate::nn).

pub mod extend;
pub mod generate;
pub mod gpt;
pub mod mixtral;
pub mod spans;

pub use extend::Extend;
pub use generate::{LanguageModel, Sampling, generate};
pub use gpt::{Gpt, GptConfig, GptOut, Positions};
pub use mixtral::{ExpertCounts, Mixtral, MixtralConfig};
pub use spans::{Preset, SpanCost, span_cost, spans};
