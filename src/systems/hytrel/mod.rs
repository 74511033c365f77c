//! HyTrel: a language model for tables, each of which is represented as a hypergraph.
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
//! The model has V·d + 2·d + L·(22·d² + 29·d) parameters. Nothing depends on the order of rows and columns: permuted tables have equal
//! states, except for the rounding of sums, or to the bit with [`TableBatch::by_values`].
//!
//! **Pre-training.** [`Corruption`] replaces headers and cells by frequent ones, and a [`Detector`] learns to recognise the replacements.
//! This has one loss per table, which a private step accepts. [`HyTrel::contrastive_losses`] compares two thinned views of all tables in
//! the batch; it couples samples, and a private step refuses it. There are two differences from the authors' program: the corruption loss
//! is averaged within a table and not over the batch, and a replacement is never equal to the text it replaces.
//!
//! **Use.** A [`Head`] predicts the type of a column from the column's state, the relation of two columns from both states, the type of a
//! table from its state, and the similarity of two tables from both states.
//!
//! [`TableTokenizer`] cleans tables, shortens them to limits and cuts them into tokens. [`Cuts`] counts what was shortened.

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
