//! HyTrel: a language model for tables that sees a table as a hypergraph.
//!
//! Chen et al., "HyTrel: Hypergraph-enhanced Tabular Data Representation Learning" (NeurIPS 2023). Cells are nodes. The whole table, each
//! column and each row are hyperedges over their cells, and each cell has a hyperedge of its own. The text of a cell, a header or the
//! caption is the mean of its tokens' embeddings; rows share one token. L layers of
//! [`HyperTrans`](crate::nn::hypergraph::HyperTrans) then pass messages from cells to hyperedges and back:
//!
//! ```text
//! x₀ = dropout(LayerNorm(mean of token embeddings)), e₀ likewise; a cell's own hyperedge begins as the cell
//! (xₗ, eₗ) = HyperTransₗ(xₗ₋₁, eₗ₋₁)
//! ```
//!
//! V·d + 2·d + L·(22·d² + 29·d) parameters. Nothing depends on the order of rows and columns: permuted tables have equal states, to the
//! rounding of sums, or to the bit with [`TableBatch::by_values`].
//!
//! **Pre-training.** [`Corruption`] replaces headers and cells by frequent ones, and a [`Detector`] tells which: one loss per table,
//! legal in a private step. [`HyTrel::contrastive_losses`] compares two thinned views of all tables in the batch; it couples samples, and
//! a private step refuses it. What differs from the authors' program: the corruption loss is averaged within a table and not over the
//! batch, and a replacement is never equal to what it replaces.
//!
//! **Use.** A [`Head`] over the state of a column tells its type, over two columns their relation, over the table its type, and over two
//! tables whether they are similar.
//!
//! [`TableTokenizer`] cleans and cuts tables; what it cuts is counted in [`Cuts`].

mod batch;
mod clean;
mod heads;
mod model;
mod objectives;
mod tokens;

pub use batch::{Sets, TableBatch};
pub use clean::{clean, numbers, wide_pieces};
pub use heads::Head;
pub use model::{HyTrel, HyTrelConfig, States};
pub use objectives::{Corrupted, Corruption, Detector};
pub use tokens::{Cuts, Encoded, TableLimits, TableTokenizer};
