//! Checks for users' own ops and models, and the ones this crate's tests run.
//!
//! * [`gradients`]: backward rules against central differences in f64, in random directions.
//! * [`per_sample`]: factored gradients against each sample's loss differentiated alone.
//! * [`independence`]: does changing sample j move sample i's loss?

mod case;
mod gradient;
mod sample;

pub use case::{Case, Gen};
pub use gradient::{GradientReport, gradients};
pub use sample::{PerSampleReport, independence, per_sample};
