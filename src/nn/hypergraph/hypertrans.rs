//! The layer of HyTrel.

use super::super::{Ctx, Dropout, Linear, Params};
use super::{SetAttention, Structure};
use crate::Tensor;
use crate::base::{Error, Result};

/// The layer of HyTrel (Chen et al. 2023). It updates the states x of nodes and e of hyperedges:
///
/// ```text
/// m  = relu(SetAttention(x, nodes of each hyperedge))
/// e' = dropout(W_f·[e; m] + b_f)
/// x' = dropout(relu(SetAttention(e', hyperedges of each node)))
/// ```
///
/// A node's old state reaches its new one only through its hyperedges, so HyTrel gives each node a hyperedge of its own. The layer has
/// 22·d² + 29·d parameters.
pub struct HyperTrans {
    name: String,
    pub(super) to_edges: SetAttention,
    pub(super) to_nodes: SetAttention,
    pub(super) fuse: Linear,
    drop_edges: Dropout,
    drop_nodes: Dropout,
}

/// Options of a [`HyperTrans`] layer, from [`HyperTrans::builder`].
#[derive(Clone, Copy, Debug)]
pub struct HyperTransBuilder {
    d: usize,
    heads: usize,
    dropout: f64,
}

impl HyperTransBuilder {
    setters! {
        /// Dropout, at every place where the paper's layer has it; 0 if not given.
        dropout: f64,
    }
    /// Makes the layer, with parameters under `to_edges`, `fuse` and `to_nodes`. Fails if the heads do not divide the width, if the dropout
    /// lies outside [0, 1), or if the names are taken.
    pub fn build(self, params: &Params) -> Result<HyperTrans> {
        params.whole(|params| {
            let HyperTransBuilder { d, heads, dropout } = self;
            let attention = SetAttention::builder(d, heads).dropout(dropout);
            Ok(HyperTrans {
                name: params.prefix().to_string(),
                to_edges: attention.build(&params.at("to_edges"))?,
                fuse: Linear::new(&params.at("fuse"), 2 * d, d)?,
                to_nodes: attention.build(&params.at("to_nodes"))?,
                drop_edges: Dropout::new(&params.at("drop_edges"), dropout)?,
                drop_nodes: Dropout::new(&params.at("drop_nodes"), dropout)?,
            })
        })
    }
}

impl HyperTrans {
    /// A layer of width `d` with `heads` heads, without dropout. Fails if the heads do not divide the width, or if the names are taken.
    pub fn new(params: &Params, d: usize, heads: usize) -> Result<HyperTrans> {
        HyperTrans::builder(d, heads).build(params)
    }
    /// Options for a layer of width `d` with `heads` heads.
    pub fn builder(d: usize, heads: usize) -> HyperTransBuilder {
        HyperTransBuilder { d, heads, dropout: 0.0 }
    }
    /// Maps nodes `x [N, d]` and hyperedges `e [M, d]` to their new states, of the same shapes.
    pub fn forward(&self, x: &Tensor, e: &Tensor, s: &Structure, ctx: &Ctx) -> Result<(Tensor, Tensor)> {
        let _layer = crate::device::spans::layer(&self.name);
        let e = self.edges(x, e, s, ctx)?;
        let sets = s.ordered(s.edges_of(), &e)?;
        let x = self.to_nodes.forward(&e, &sets, (s.edges(), s.nodes()), ctx)?.relu()?;
        Ok((self.drop_nodes.forward(&x, ctx)?, e))
    }
    /// The first half of the layer: the new states of the hyperedges, `[M, d]`. This is enough for a last layer whose nodes are not used.
    pub fn edges(&self, x: &Tensor, e: &Tensor, s: &Structure, ctx: &Ctx) -> Result<Tensor> {
        let (n, m) = (s.nodes_of().sources(), s.nodes_of().targets());
        if x.shape() != [n, self.to_edges.width()] || e.shape() != [m, self.to_edges.width()] {
            let d = self.to_edges.width();
            let message =
                format!("nodes {:?} and hyperedges {:?} must be [{n}, {d}] and [{m}, {d}]", x.shape(), e.shape());
            return Err(Error::shape("HyperTrans", message));
        }
        let sets = s.ordered(s.nodes_of(), x)?;
        let m = self.to_edges.forward(x, &sets, (s.nodes(), s.edges()), ctx)?.relu()?;
        self.fused(e, &m, &ctx.with_samples(s.edges().clone()))
    }
    pub(super) fn fused(&self, e: &Tensor, m: &Tensor, ctx: &Ctx) -> Result<Tensor> {
        let both = Tensor::concat(&[&e.cast(m.dtype())?, m], 1)?;
        self.drop_edges.forward(&self.fuse.forward(&both, ctx)?, ctx)
    }
    /// The attention weights of both directions, for pictures: over each hyperedge's nodes, and over each node's hyperedges. Each is `[I,
    /// heads]` for I incidences.
    pub fn weights(&self, x: &Tensor, e: &Tensor, s: &Structure, ctx: &Ctx) -> Result<(Tensor, Tensor)> {
        let to_edges = self.to_edges.weights(x, s.nodes_of(), s.nodes(), ctx)?;
        let e = self.edges(x, e, s, ctx)?;
        Ok((to_edges, self.to_nodes.weights(&e, s.edges_of(), s.edges(), ctx)?))
    }
    /// The attention from nodes to hyperedges.
    pub fn to_edges(&self) -> &SetAttention {
        &self.to_edges
    }
    /// The attention from hyperedges to nodes.
    pub fn to_nodes(&self) -> &SetAttention {
        &self.to_nodes
    }
}
