//! Counter-based randomness: element i of a stream is a function of (key, i), so that any division of the work, any number of threads and
//! any device give the same bits.
//!
//! [`philox`] generates initial values, dropout masks and shuffles; [`chacha`] generates the randomness of privacy mechanisms.

pub mod chacha;
pub(crate) mod cuda;
pub(crate) mod digest;
pub(crate) mod masks;

pub use crate::base::philox::{self, Rng};
pub use chacha::{Grid, NoiseKey, add_gaussian};
