//! Checks for custom ops and models, which this crate's own tests use as well.
//!
//! * [`gradients`]: compares backward rules with central differences in f64, in random directions.
//! * [`per_sample`]: compares factored gradients with the gradient of each sample's loss alone.
//! * [`on_every_device`], and the macro [`device_tests`](crate::device_tests): run a body on the CPU, on the emulated CUDA
//!   device under several schedules, and on a GPU if there is one.
//! * [`independence`]: measures whether changing sample j changes sample i's loss.

mod devices;
mod gradient;
mod sample;

pub use crate::autograd::{Case, Gen, Mode};
pub use devices::on_every_device;
pub use gradient::{GradientReport, gradients};
pub use sample::{PerSampleReport, independence, per_sample};
