//! Distribution-edited models: models that were tuned on single sources of data, combined by element-wise vector operations.
//!
//! Ram et al., "DEM: Distribution Edited Model for Training with Mixed Data Distributions" (EMNLP 2024). From one base Θ a model Θᵢ is
//! tuned on each source i. The distribution vector of the source is dᵢ = Θᵢ − Θ, and the edited model
//!
//! Θ_DEM = Θ + Σᵢ wᵢ·dᵢ.
//!
//! The weights are searched on validation data, in memory: no candidate is written to a file. A source can be replaced or removed
//! without tuning the others again.
//!
//! A [`VectorPool`] holds the base and the vectors; [`Merge`] says how they are combined (the sum above, one λ for all, a soup, TIES or
//! DARE); [`Search`] finds weights; the [`Ledger`] lists the costs of sources and searches, in tokens, FLOPs, seconds and ε.
//!
//! [`merge_files`] merges checkpoints on disk that are larger than memory. A [`Recipe`] describes the merge, and can be read in mergekit's
//! form.
//!
//! ```
//! use prismgrad::prelude::*;
//! use prismgrad::systems::editing::{Cost, Merge, Search, Tags, VectorPool};
//! # fn main() -> Result<()> {
//! let params = Params::new(0, DType::F32);
//! let layer = Linear::new(&params.at("fc"), 2, 1)?;
//! let mut pool = VectorPool::new(&params, Tags::new())?;
//! for (name, value) in [("rust", 1.0), ("prose", -1.0)] {
//!     for p in params.all() {
//!         p.set(Array::full(p.shape(), value, DType::F32))?; // here a model would be tuned
//!     }
//!     pool.add(name, &params, Tags::new(), Cost { tokens: 1000, ..Cost::default() })?;
//!     pool.apply(&Merge::Weights(vec![0.0; pool.len()]), &params)?; // back to the base
//! }
//! let best = pool.search(&Search::Coordinate { grid: 11, rounds: 2 }, &params, None, |params| {
//!     Ok(params.all().iter().map(|p| p.value().to_f64()[0].powi(2)).sum()) // a validation loss
//! })?;
//! pool.apply(&Merge::Weights(best.weights), &params)?;
//! println!("{}", pool.ledger());
//! # let _ = layer; Ok(()) }
//! ```

mod files;
mod ledger;
mod merge;
mod pool;
mod recipe;
mod search;
mod stream;

pub use ledger::{Cost, Ledger, Privacy};
pub use merge::Merge;
pub use pool::{Diagnosis, Tags, VectorPool};
pub use recipe::{Method, Model, Recipe, Rescale, dtype_named};
pub use search::{Candidate, Found, Search};
pub use stream::{Merged, merge_files};
