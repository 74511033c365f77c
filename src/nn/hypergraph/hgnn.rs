//! The convolution of hypergraph neural networks.

use super::super::{Ctx, Init, Linear, Params};
use super::{Structure, column};
use crate::base::{Error, Result};
use crate::{Param, Tensor};

/// Hypergraph convolution (Feng et al. 2019, equation 11) without its activation: X' = D_v^−½ · H · W · D_e⁻¹ · Hᵀ · D_v^−½ · X · Θ + b,
/// where H is the incidence, W the hyperedges' weights, D_v the nodes' weighted degrees and D_e the sizes of the hyperedges. Nodes without
/// hyperedges and empty hyperedges contribute nothing.
pub struct Hgnn {
    theta: Linear,
    bias: Param,
}

impl Hgnn {
    /// A layer from d to p columns. Fails if the names `weight` and `bias` are taken.
    pub fn new(params: &Params, d: usize, p: usize) -> Result<Hgnn> {
        let theta = Linear::builder(d, p).bias(false).build(params)?;
        Ok(Hgnn { theta, bias: params.param("bias", &[p], Init::Zeros)? })
    }
    /// Maps nodes `[N, d]` to `[N, p]`. `weights` has a positive number for each hyperedge; all are 1 if not given.
    pub fn forward(&self, x: &Tensor, s: &Structure, weights: Option<&[f64]>, ctx: &Ctx) -> Result<Tensor> {
        let (n, m) = (s.nodes_of().sources(), s.nodes_of().targets());
        if x.rank() != 2 || x.shape()[0] != n {
            return Err(Error::shape("Hgnn", format!("nodes {:?} must be [{n}, d]", x.shape())));
        }
        let bad = |w: &[f64]| w.len() != m || w.iter().any(|w| !w.is_finite() || *w <= 0.0);
        if weights.is_some_and(bad) {
            let message = format!("the weights must be {m} positive numbers, one for each hyperedge");
            return Err(Error::invalid("Hgnn", message));
        }
        let y = self.theta.forward(x, &ctx.with_samples(s.nodes().clone()))?;
        let weight = |e: u32| weights.map_or(1.0, |w| w[e as usize]);
        let degree = |v: usize| s.edges_of().set(v).iter().map(|&e| weight(e)).sum::<f64>();
        // D_v^−½. A node of degree 0 occurs in no sum.
        let root: Vec<f64> = (0..n).map(|v| degree(v).sqrt().recip()).collect();
        let nodes_of = s.ordered(s.nodes_of(), &y)?;
        let share = |e: u32| weight(e) / nodes_of.segments().range(e as usize).len() as f64;
        let pairs = nodes_of.members().iter().zip(nodes_of.segments().ids().iter());
        let to_edges = column(pairs.map(|(&v, &e)| root[v as usize] * share(e)), &y)?;
        let e = y.incidence_sum(&nodes_of, Some(&to_edges))?;
        let edges_of = s.ordered(s.edges_of(), &e)?;
        let to_nodes = column(edges_of.segments().ids().iter().map(|&v| root[v as usize]), &y)?;
        let y = e.incidence_sum(&edges_of, Some(&to_nodes))?;
        y.add(&self.bias.per_row(s.nodes())?.cast(y.dtype())?)
    }
}
