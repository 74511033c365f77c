//! Checks for users' own ops and models, and the ones this crate's tests run.
//!
//! * [`gradients`]: backward rules against central differences in f64, in random directions.
//! * [`per_sample`]: factored gradients against each sample's loss differentiated alone.
//! * [`on_every_device`], and the macro [`device_tests`](crate::device_tests): a body run on the CPU, on the emulated CUDA
//!   device under several schedules, and on a card where there is one.
//! * [`independence`]: does changing sample j move sample i's loss?

mod devices;
mod gradient;
mod sample;

pub use crate::autograd::{Case, Gen, Mode};
pub use devices::on_every_device;
pub use gradient::{GradientReport, gradients};
pub use sample::{PerSampleReport, independence, per_sample};
