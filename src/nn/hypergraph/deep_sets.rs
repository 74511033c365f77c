//! A layer that sums what a small network computes from the members of a set.

use super::super::{Ctx, Dropout, Mlp, Params};
use super::{Aggregate, Structure};
use crate::Tensor;
use crate::base::Result;
use crate::kernels::Activation;
use crate::ops::incidence::Incidence;

/// AllDeepSets (Chien et al. 2022, equation 5), with deep sets (Zaheer et al. 2017) in both directions:
///
/// ```text
/// e  = relu(MLP₂(Σ over the nodes v of e: relu(MLP₁(x_v))))
/// x' = relu(MLP₄(Σ over the hyperedges e of v: relu(MLP₃(e))))
/// ```
///
/// The sum may be a mean or a maximum ([`Aggregate`]). Each MLP has one hidden layer with ReLU.
pub struct DeepSets {
    layers: [Mlp; 4],
    how: Aggregate,
    drop: [Dropout; 2],
}

/// Options of a [`DeepSets`] layer, from [`DeepSets::builder`].
#[derive(Clone, Copy, Debug)]
pub struct DeepSetsBuilder {
    sizes: (usize, usize),
    how: Aggregate,
    dropout: f64,
}

impl DeepSetsBuilder {
    setters! {
        /// How the rows of a set's members become one row; their sum if not given.
        how: Aggregate,
        /// Dropout of the hyperedges and of the nodes; 0 if not given.
        dropout: f64,
    }
    /// Makes the layer, with parameters under `before_edges`, `edges`, `before_nodes` and `nodes`. Fails if the dropout lies outside [0,
    /// 1), or if the names are taken.
    pub fn build(self, params: &Params) -> Result<DeepSets> {
        params.whole(|params| {
            let (d, hidden) = self.sizes;
            let mlp = |name: &str| Mlp::builder(d, hidden).act(Activation::Relu).build(&params.at(name));
            let drop = |name: &str| Dropout::new(&params.at(name), self.dropout);
            Ok(DeepSets {
                layers: [mlp("before_edges")?, mlp("edges")?, mlp("before_nodes")?, mlp("nodes")?],
                how: self.how,
                drop: [drop("drop_edges")?, drop("drop_nodes")?],
            })
        })
    }
}

impl DeepSets {
    /// A layer of width d with hidden layers of `hidden`, which sums and has no dropout. Fails if the names are taken.
    pub fn new(params: &Params, d: usize, hidden: usize) -> Result<DeepSets> {
        DeepSets::builder(d, hidden).build(params)
    }
    /// Options for a layer of width d with hidden layers of `hidden`.
    pub fn builder(d: usize, hidden: usize) -> DeepSetsBuilder {
        DeepSetsBuilder { sizes: (d, hidden), how: Aggregate::Sum, dropout: 0.0 }
    }
    /// Maps nodes `[N, d]` to their new states `[N, d]` and to the states of the hyperedges, `[M, d]`.
    pub fn forward(&self, x: &Tensor, s: &Structure, ctx: &Ctx) -> Result<(Tensor, Tensor)> {
        let (nodes, edges) = (ctx.with_samples(s.nodes().clone()), ctx.with_samples(s.edges().clone()));
        let [before_edges, to_edges, before_nodes, to_nodes] = &self.layers;
        let half = |x: &Tensor, sets: &Incidence, (before, after): (&Mlp, &Mlp), (from, to): (&Ctx, &Ctx)| {
            let rows = before.forward(x, from)?.relu()?;
            after.forward(&self.how.forward(&rows, &s.ordered(sets, &rows)?)?, to)?.relu()
        };
        let e = half(x, s.nodes_of(), (before_edges, to_edges), (&nodes, &edges))?;
        let e = self.drop[0].forward(&e, ctx)?;
        let x = half(&e, s.edges_of(), (before_nodes, to_nodes), (&edges, &nodes))?;
        Ok((self.drop[1].forward(&x, ctx)?, e))
    }
}
