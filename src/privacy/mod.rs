//! The components of private training: clip functions and styles, the accountant, Poisson sampling. [`step::Privacy`](crate::step::Privacy)
//! combines them.

pub mod accountant;
pub mod audit;
pub mod clip;
pub mod continual;
pub mod coupling;
pub(crate) mod cuda;
pub mod log;
pub mod sampling;

pub use accountant::{Accountant, Neighbouring};
pub use clip::{ClipFn, ClipStyle, Thresholds};
pub use coupling::{Public, Weight};
pub use log::StepLog;
pub use sampling::PoissonSampler;
