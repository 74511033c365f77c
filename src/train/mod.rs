//! Parts of a training run other than its steps: its folder, its progress on the terminal, a clean stop, and its plots (feature `plots`, on
//! by default).

pub mod interrupt;
#[cfg(feature = "plots")]
pub mod plot;
pub mod progress;
pub mod run;
pub mod state;

pub use interrupt::interrupted;
pub use progress::Progress;
pub use run::{Existing, RunFolder};
