//! Reduction of the number of experts after training, for a given task.
//!
//! Sarkar et al., "Revisiting SMoE Language Models by Evaluating Inefficiencies with Task Specific Expert Pruning" (2024). A model
//! was trained with Z experts in a layer; a deployment holds D < Z of them. UNCURL observes the router on the task's tokens, clusters
//! the experts whose logits agree, aligns the hidden units of a cluster's experts, and averages them:
//!
//! 1. the similarity of experts i and j is S = (1 + cos(hᵢ, hⱼ))/2, where hᵢ has the router's logits for i over all tokens;
//! 2. experts are clustered by the eigenvectors of S's normalised Laplacian and k-means;
//! 3. in each cluster the expert that is chosen most is the *anchor*; the hidden units of each other expert y are permuted by the P that
//!    maximises ⟨W_in(anchor), P·W_in(y)⟩ + ⟨W_out(anchor), W_out(y)·Pᵀ⟩;
//! 4. the new expert is the mean of the aligned ones, weighted by how often each is chosen;
//! 5. the router gets new random weights and is trained alone for a while; then everything is trained.
//!
//! Other methods have the same interface: only the most frequent experts are kept ([`Method::Greedy`]), REAP, and merges around kept
//! experts ([`Method::AnchorMerge`], [`Method::MSmoe`], [`Method::Ream`]).
//!
//! ```
//! use prismgrad::models::{Gpt, GptConfig};
//! use prismgrad::nn::MoeConfig;
//! use prismgrad::prelude::*;
//! use prismgrad::systems::pruning::{Batch, Keep, Method, Observe, Reduce, RouterInit, SparseModel, observe};
//! # fn main() -> Result<()> {
//! let mut config = GptConfig::small(64, 16, 2, 32, 2);
//! config.moe = Some(vec![Some(MoeConfig::new(8, 1, 64)), None]);
//! let model = Gpt::new(config, 0)?;
//! // Public text of the task, or text whose use is accounted for elsewhere: what is observed is not private.
//! let batch = Batch::new(Array::generate(&[4, 16], DType::U32, |i| (i * 7 % 64) as f64));
//! let stats = observe(&model, [Ok(batch)], &Observe::default())?;
//! let reduce = Reduce { method: Method::Uncurl, router: RouterInit::LogSumExp, ..Reduce::new(Keep::Same(4)) };
//! let plan = reduce.plan(&model, &stats)?;
//! let small = plan.apply(&model)?;
//! assert_eq!(small.experts(), [Some(4), None]);
//! # Ok(()) }
//! ```

mod align;
mod assign;
mod cluster;
mod limit;
mod model;
mod observe;
mod plan;
mod reduce;
mod router;

pub use align::alignment;
pub use assign::{Assignment, assign};
pub use cluster::{adjusted_rand, spectral};
pub use limit::{StaticMerge, best_static_merge};
pub use model::SparseModel;
pub use observe::{Batch, LayerStatistics, Observe, Statistics, observe};
pub use plan::{LayerPlan, Plan};
pub use reduce::{Keep, Method, Reduce, RouterInit};
pub use router::{distillation, train_routers};
