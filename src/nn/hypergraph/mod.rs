//! Layers over hypergraphs. They process sets of any size, in batches of many small hypergraphs or over one large one.
//!
//! A hyperedge is a set of nodes. Message passing goes from the nodes to the hyperedges and back; each layer here is one way of turning a
//! set into a row: [`SetAttention`] with learned seeds (the layer of HyTrel, [`HyperTrans`], is made of two), sums, means and maxima
//! ([`Aggregate`], [`DeepSets`]), and the normalised average of [`Hgnn`]. A [`Structure`] says which nodes each hyperedge has, and to which
//! sample each node and hyperedge belongs. Per-sample gradients are those of each hypergraph alone.
//!
//! The result of a layer does not depend on the order of nodes or hyperedges, except that sums are rounded in that order. See
//! [`Structure::by_values`] for sums that do not depend on it at all.

mod deep_sets;
mod grid;
mod hgnn;
mod hypertrans;
mod set_attention;

pub use deep_sets::{DeepSets, DeepSetsBuilder};
pub use grid::{Grid, GridMask};
pub use hgnn::Hgnn;
pub use hypertrans::{HyperTrans, HyperTransBuilder};
pub use set_attention::{SetAttention, SetAttentionBuilder};

use crate::base::{Error, Result};
use crate::ops::incidence::Incidence;
use crate::{Samples, Tensor};

/// The sets of a batch of hypergraphs, and the sample to which each node and hyperedge belongs.
#[derive(Clone, Debug)]
pub struct Structure {
    nodes_of: Incidence,
    edges_of: Incidence,
    nodes: Samples,
    edges: Samples,
    by_values: bool,
}

impl Structure {
    /// `nodes_of` has the nodes of each hyperedge; `nodes` and `edges` map nodes and hyperedges to samples. Fails if the numbers of rows
    /// differ, or if a hyperedge of one sample has a node of another.
    pub fn new(nodes_of: Incidence, nodes: Samples, edges: Samples) -> Result<Structure> {
        let op = "hypergraph";
        let (n, e) = (nodes_of.sources(), nodes_of.targets());
        if nodes.rows() != n || edges.rows() != e || nodes.count() != edges.count() {
            let message = format!(
                "the samples map {} nodes and {} hyperedges of {} and {} samples; the sets have {n} nodes and {e} hyperedges",
                nodes.rows(),
                edges.rows(),
                nodes.count(),
                edges.count()
            );
            return Err(Error::shape(op, message));
        }
        let (of_node, of_edge) = (nodes.owner_ids(), edges.owner_ids());
        let pairs = nodes_of.members().iter().zip(nodes_of.segments().ids().iter());
        if let Some((&v, &e)) = pairs.clone().find(|&(&v, &e)| of_node[v as usize] != of_edge[e as usize]) {
            let message = format!(
                "hyperedge {e} of sample {} has node {v} of sample {}; a set has to stay within its sample",
                of_edge[e as usize], of_node[v as usize]
            );
            return Err(Error::invalid(op, message));
        }
        let edges_of = nodes_of.flipped();
        Ok(Structure { nodes_of, edges_of, nodes, edges, by_values: false })
    }
    /// A single hypergraph that is one sample.
    pub fn whole(nodes_of: Incidence) -> Result<Structure> {
        let (nodes, edges) = (Samples::uniform(1, nodes_of.sources()), Samples::uniform(1, nodes_of.targets()));
        Structure::new(nodes_of, nodes, edges)
    }
    /// The same sets, summed in an order that depends on values alone ([`Incidence::by_values`]). The result for a node or a hyperedge then
    /// has the same bits however nodes and hyperedges are numbered. The rows are sorted on the host before each layer.
    pub fn by_values(&self) -> Structure {
        Structure { by_values: true, ..self.clone() }
    }
    /// The nodes of each hyperedge.
    pub fn nodes_of(&self) -> &Incidence {
        &self.nodes_of
    }
    /// The hyperedges of each node.
    pub fn edges_of(&self) -> &Incidence {
        &self.edges_of
    }
    /// The map of nodes to samples.
    pub fn nodes(&self) -> &Samples {
        &self.nodes
    }
    /// The map of hyperedges to samples.
    pub fn edges(&self) -> &Samples {
        &self.edges
    }
    /// The sets, with the order in which their members `x` are to be added up.
    fn ordered(&self, sets: &Incidence, x: &Tensor) -> Result<Incidence> {
        if self.by_values { sets.by_values(x.array()) } else { Ok(sets.clone()) }
    }
}

/// How the rows of a set are reduced to one row, column by column.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Aggregate {
    /// Their sum; zeros for an empty set.
    #[default]
    Sum,
    /// Their mean; zeros for an empty set.
    Mean,
    /// Their maximum; zeros for an empty set.
    Max,
}

impl Aggregate {
    /// Reduces rows `[sources, d]` to `[targets, d]`.
    pub fn forward(self, x: &Tensor, sets: &Incidence) -> Result<Tensor> {
        match self {
            Aggregate::Sum => x.incidence_sum(sets, None),
            Aggregate::Mean => {
                let share = |t: u32| 1.0 / sets.segments().range(t as usize).len() as f64;
                let weights = sets.segments().ids().iter().map(|&t| share(t));
                x.incidence_sum(sets, Some(&column(weights, x)?))
            }
            Aggregate::Max => x.index_select(0, sets.members_on(&x.device())?)?.segment_max(sets.segments()),
        }
    }
}

/// Numbers as a column of weights in the dtype of `x` and on its device.
fn column(values: impl Iterator<Item = f64>, x: &Tensor) -> Result<Tensor> {
    let values: Vec<f64> = values.collect();
    let array = crate::Array::from_slice(&values, &[values.len(), 1])?;
    Ok(Tensor::new(array.cast(x.dtype().compute()).to(&x.device())?))
}
