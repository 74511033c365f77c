//! The encoder of HyTrel.

use super::batch::TableBatch;
use crate::array::Array;
use crate::base::{DType, Error, Result};
use crate::nn::hypergraph::HyperTrans;
use crate::nn::{Ctx, Dropout, EmbeddingBag, Init, LayerNorm, Params, contrastive_loss};
use crate::random::Rng;
use crate::{Samples, Tensor};

/// Sizes of a [`HyTrel`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HyTrelConfig {
    /// Number of tokens, [`TableTokenizer::vocab`](super::TableTokenizer::vocab).
    pub vocab: usize,
    /// Width.
    pub d: usize,
    /// Number of layers.
    pub layers: usize,
    /// Number of heads of each attention.
    pub heads: usize,
    /// Dropout, at every place where the paper has it.
    pub dropout: f64,
}

impl HyTrelConfig {
    /// The paper's base size: 179,427,072 parameters.
    pub fn base() -> HyTrelConfig {
        HyTrelConfig { vocab: 30_527, d: 768, layers: 12, heads: 12, dropout: 0.1 }
    }
    /// A size that trains on a CPU: width 64, two layers, four heads, dropout 0.1.
    pub fn small(vocab: usize) -> HyTrelConfig {
        HyTrelConfig { vocab, d: 64, layers: 2, heads: 4, dropout: 0.1 }
    }
    /// Number of parameters: V·d + 2·d + L·(22·d² + 29·d), for a vocabulary of V tokens and L layers.
    pub fn parameters(&self) -> usize {
        let d = self.d;
        self.vocab * d + 2 * d + self.layers * (22 * d * d + 29 * d)
    }
}

/// The states after the last layer.
pub struct States {
    /// States of the cells, `[N, d]`.
    pub cells: Tensor,
    /// States of the hyperedges in the order of the batch, `[M + N, d]`. The cells' own hyperedges come last.
    pub edges: Tensor,
}

/// The encoder of HyTrel; see the [module](super).
pub struct HyTrel {
    config: HyTrelConfig,
    params: Params,
    embed: EmbeddingBag,
    norm: LayerNorm,
    drop: Dropout,
    layers: Vec<HyperTrans>,
}

impl HyTrel {
    /// An encoder with parameters under `params`: `embed`, `norm`, and `layers.0` and so on. Fails if the heads do not divide the width, or
    /// if the names are taken.
    pub fn new(params: &Params, config: &HyTrelConfig) -> Result<HyTrel> {
        let HyTrelConfig { vocab, d, layers, heads, dropout } = *config;
        let layer = |i: usize| {
            let scope = params.at(&format!("layers.{i}"));
            HyperTrans::builder(d, heads).dropout(dropout).build(&scope)
        };
        Ok(HyTrel {
            config: *config,
            params: params.clone(),
            embed: EmbeddingBag::builder(vocab, d).init(Init::Normal { std: 0.02 }).build(&params.at("embed"))?,
            norm: LayerNorm::builder(d).eps(1e-12).build(&params.at("norm"))?,
            drop: Dropout::new(&params.at("drop"), dropout)?,
            layers: (0..layers).map(layer).collect::<Result<_>>()?,
        })
    }
    /// The sizes of the encoder.
    pub fn config(&self) -> &HyTrelConfig {
        &self.config
    }
    /// The scope of the encoder's parameters.
    pub fn params(&self) -> &Params {
        &self.params
    }
    /// The initial states of cells `[N, d]` and hyperedges `[M + N, d]`, from their texts.
    fn embedded(&self, batch: &TableBatch, ctx: &Ctx) -> Result<(Tensor, Tensor)> {
        let (ids, bags) = batch.tokens();
        let ctx = &ctx.with_samples(batch.structure().edges().clone());
        let e = self.embed.forward_bags(ids, bags, None, ctx)?;
        let e = self.drop.forward(&self.norm.forward(&e, ctx)?, ctx)?;
        let (m, all) = (batch.sets(), e.shape()[0]);
        Ok((e.slice(0, m..all)?, e))
    }
    /// All states after the last layer.
    pub fn forward(&self, batch: &TableBatch, ctx: &Ctx) -> Result<States> {
        let (mut cells, mut edges) = self.embedded(batch, ctx)?;
        for layer in &self.layers {
            (cells, edges) = layer.forward(&cells, &edges, batch.structure(), ctx)?;
        }
        Ok(States { cells, edges })
    }
    /// The states of the hyperedges alone. The last layer's second half, which updates the cells, is skipped.
    pub fn edges(&self, batch: &TableBatch, ctx: &Ctx) -> Result<Tensor> {
        let (mut cells, mut edges) = self.embedded(batch, ctx)?;
        for (i, layer) in self.layers.iter().enumerate() {
            if i + 1 == self.layers.len() {
                return layer.edges(&cells, &edges, batch.structure(), ctx);
            }
            (cells, edges) = layer.forward(&cells, &edges, batch.structure(), ctx)?;
        }
        Ok(edges)
    }
    /// The columns' states, `[columns of all tables, d]`, and the map of columns to samples.
    pub fn columns(&self, batch: &TableBatch, ctx: &Ctx) -> Result<(Tensor, Samples)> {
        let (edges, owners) = batch.column_edges();
        let samples = Samples::owners(owners, batch.tables())?;
        Ok((self.edges(batch, ctx)?.index_select(0, ids(&edges)?)?, samples))
    }
    /// The tables' states, `[tables, d]`.
    pub fn tables(&self, batch: &TableBatch, ctx: &Ctx) -> Result<Tensor> {
        self.edges(batch, ctx)?.index_select(0, ids(&batch.table_edges())?)
    }
    /// The contrastive objective. Two views of the batch are made, in each of which an incidence is left out with probability 0.3. The
    /// states of each table and column in one view are matched with those in the other (InfoNCE at temperature 0.07). There is one loss per
    /// table, but each depends on all tables of the batch, so a private step refuses it.
    pub fn contrastive_losses(&self, batch: &TableBatch, ctx: &Ctx) -> Result<Tensor> {
        let mut rng = Rng::new(ctx.seed ^ 0x7669_6577);
        let (columns, owners) = batch.column_edges();
        let items: Vec<u32> = batch.table_edges().into_iter().chain(columns).collect();
        let owners = (0..batch.tables() as u32).chain(owners).collect();
        let samples = Samples::owners(owners, batch.tables())?;
        let mut view = |seed: u64| {
            let ctx = Ctx { seed, ..ctx.clone() };
            self.edges(&batch.thinned(0.3, &mut rng)?, &ctx)?.index_select(0, ids(&items)?)
        };
        let (a, b) = (view(ctx.seed)?, view(ctx.seed ^ 0x006f_7468_6572)?);
        contrastive_loss(&a, &b, 0.07, &samples)
    }
    /// The attention of a layer, averaged over heads. For each cell of table 0 it has the cell's weight in the hyperedges of its table, its
    /// column and its row, each as `[rows, columns]`.
    pub fn attention(&self, batch: &TableBatch, layer: usize) -> Result<[Vec<f64>; 3]> {
        let ctx = &Ctx::eval();
        let layer_of = self.layers.get(layer);
        let Some(wanted) = layer_of.filter(|_| batch.tables() > 0) else {
            let message = format!("layer {layer} of {}, over {} tables", self.layers.len(), batch.tables());
            return Err(Error::invalid("HyTrel::attention", message));
        };
        let (mut cells, mut edges) = self.embedded(batch, ctx)?;
        for before in &self.layers[..layer] {
            (cells, edges) = before.forward(&cells, &edges, batch.structure(), ctx)?;
        }
        let nodes_of = batch.structure().nodes_of();
        let (weights, _) = wanted.weights(&cells, &edges, batch.structure(), ctx)?;
        let weights = weights.cast(DType::F64)?.mean(&[1], false)?.array().to_f64();
        let (rows, columns) = batch.shape(0);
        let mut maps = [(); 3].map(|()| vec![0.0; rows * columns]);
        for e in 0..1 + columns + rows {
            let kind = if e == 0 { 0 } else { 1 + usize::from(e > columns) };
            let range = nodes_of.segments().range(e);
            nodes_of.set(e).iter().zip(&weights[range]).for_each(|(&v, &w)| maps[kind][v as usize] = w);
        }
        Ok(maps)
    }
}

/// Row numbers as an array.
pub(super) fn ids(rows: &[u32]) -> Result<Array> {
    Array::from_slice(rows, &[rows.len()])
}
