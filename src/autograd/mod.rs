//! Reverse-mode automatic differentiation: [`Tensor`], backward rules, factored parameter gradients, samples.

mod backward;
mod case;
pub mod factor;
mod owner;
mod param;
mod param_grad;
mod rule;
mod samples;
mod segments;
mod tensor;

pub use backward::{GradHook, Gradients};
pub use case::{Case, Gen, Mode};
pub use factor::Factor;
pub(crate) use owner::one;
pub use owner::{Mixing, Owner, Whose};
pub use param::Param;
pub(crate) use param::{Source, WeakParam};
pub use param_grad::ParamGrad;
pub(crate) use rule::NO_PARAMS;
pub use rule::{Cotangents, Differentiable, FactorRule, OpInfo, Rule};
pub(crate) use samples::Owners;
pub use samples::{Ragged, Samples};
pub(crate) use segments::SegmentsOnGpu;
pub use segments::{Groups, Segments};
pub use tensor::{Tensor, no_grad};
pub(crate) use tensor::{is_recording, line_of, recorded, samples_or_leading};
