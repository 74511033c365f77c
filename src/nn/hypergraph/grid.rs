//! HyTrel's layer for tables of one size, computed along the axes of dense arrays.

use super::super::Ctx;
use super::{HyperTrans, SetAttention};
use crate::base::{Error, Result};
use crate::{Samples, Tensor};

/// States of B tables of R rows and C columns. Each table, column, row and cell has a state of d elements.
#[derive(Clone)]
pub struct Grid {
    /// `[B, R, C, d]`.
    pub cells: Tensor,
    /// The hyperedge of the whole table, `[B, 1, 1, d]`.
    pub tables: Tensor,
    /// `[B, 1, C, d]`.
    pub columns: Tensor,
    /// `[B, R, 1, d]`.
    pub rows: Tensor,
    /// Each cell's own hyperedge, `[B, R, C, d]`.
    pub own: Tensor,
}

/// Which cells belong to a table's hyperedges, as arrays `[B, R, C]` of 1 and 0. A cell always belongs to its own hyperedge.
#[derive(Clone)]
pub struct GridMask {
    /// Cells that belong to the hyperedge of the whole table.
    pub tables: Tensor,
    /// Cells that belong to the hyperedge of their column.
    pub columns: Tensor,
    /// Cells that belong to the hyperedge of their row.
    pub rows: Tensor,
}

/// Score of a member that is left out: its softmax weight is 0.
const OUT: f64 = -1e30;

impl HyperTrans {
    /// [`HyperTrans::forward`] for full tables, written as softmaxes along the axes of a `[B, R, C, heads]` array, without dropout. It
    /// shares only the linear layers and norms with the general path, so that each path can be checked by the other.
    pub fn forward_grid(&self, g: &Grid, mask: Option<&GridMask>, ctx: &Ctx) -> Result<Grid> {
        let op = "HyperTrans::forward_grid";
        let &[b, r, c, d] = g.cells.shape() else {
            return Err(Error::shape(op, format!("cells {:?} must be [tables, rows, columns, d]", g.cells.shape())));
        };
        let wanted = [[b, 1, 1, d], [b, 1, c, d], [b, r, 1, d], [b, r, c, d]];
        let parts = [&g.tables, &g.columns, &g.rows, &g.own];
        if let Some((part, want)) = parts.iter().zip(&wanted).find(|(p, w)| p.shape() != *w) {
            return Err(Error::shape(op, format!("hyperedges {:?} must be {want:?}", part.shape())));
        }
        if ctx.train && self.to_edges.dropout() > 0.0 {
            return Err(Error::invalid(op, "it draws no dropout: use forward to train with it"));
        }
        let h = self.to_edges.heads();
        let flat = |x: &Tensor| x.reshape(&[x.numel() / d, d]);
        let samples = |x: &Tensor| Samples::uniform(b, x.shape()[1] * x.shape()[2]);
        // Scores [.., heads] and values [.., heads, d / heads] of an array of rows.
        let scored = |a: &SetAttention, x: &Tensor| -> Result<(Tensor, Tensor)> {
            let (rows, of) = (flat(x)?, samples(x));
            let s = x.shape();
            let scores = a.scores(&rows, &of, ctx)?.reshape(&[s[0], s[1], s[2], h])?;
            Ok((scores, a.values(&rows, &of, ctx)?.reshape(&[s[0], s[1], s[2], h, d / h])?))
        };
        let finished = |a: &SetAttention, sums: &Tensor, like: &[usize; 4]| -> Result<Tensor> {
            let of = Samples::uniform(b, like[1] * like[2]);
            a.finish(&sums.reshape(&[b * like[1] * like[2], d])?, &of, ctx)?.relu()?.reshape(like)
        };
        // The attention from cells to hyperedges.
        let (s, v) = scored(&self.to_edges, &g.cells)?;
        let kept = |m: fn(&GridMask) -> &Tensor| mask.map(|k| m(k).reshape(&[b, r, c, 1])).transpose();
        // The softmax-weighted sum over some axes; members that are left out have weight 0.
        let over = |dims: &[isize], kept: Option<&Tensor>| -> Result<Tensor> {
            let scores = match kept {
                Some(k) => s.mul(k)?.add(&k.add_scalar(-1.0)?.mul_scalar(-OUT)?)?,
                None => s.clone(),
            };
            let e = scores.sub(&scores.detach().max(dims, true)?)?.exp()?;
            let a = e.div(&e.sum(dims, true)?)?;
            let a = kept.map_or(Ok(a.clone()), |k| a.mul(k))?;
            a.unsqueeze(-1)?.mul(&v)?.sum(dims, true)
        };
        let masks = [kept(|m| &m.tables)?, kept(|m| &m.columns)?, kept(|m| &m.rows)?];
        let sums = [
            over(&[1, 2], masks[0].as_ref())?,
            over(&[1], masks[1].as_ref())?,
            over(&[2], masks[2].as_ref())?,
            // A cell's own hyperedge has one member, whose softmax weight is 1.
            v.clone(),
        ];
        let mut edges = Vec::new();
        for ((sums, old), like) in sums.iter().zip(parts).zip(&wanted) {
            let m = finished(&self.to_edges, sums, like)?;
            let ctx = &ctx.with_samples(samples(old));
            edges.push(self.fused(&flat(old)?, &flat(&m)?, ctx)?.reshape(like)?);
        }
        // The attention from hyperedges to cells: each cell is in four hyperedges.
        let all = [b, r, c, h];
        let (mut scores, mut values) = (Vec::new(), Vec::new());
        for (k, e) in edges.iter().enumerate() {
            let (s, v) = scored(&self.to_nodes, e)?;
            let s = s.expand(&all)?;
            scores.push(match masks.get(k).and_then(Option::as_ref) {
                Some(kept) => s.mul(kept)?.add(&kept.add_scalar(-1.0)?.mul_scalar(-OUT)?)?,
                None => s,
            });
            values.push(v);
        }
        let weights = Tensor::stack(&scores.iter().collect::<Vec<_>>(), 0)?.softmax(0)?;
        let mut sum: Option<Tensor> = None;
        for (k, v) in values.iter().enumerate() {
            let a = weights.slice(0, k..k + 1)?.squeeze(0)?.unsqueeze(-1)?;
            let term = a.mul(v)?;
            sum = Some(match sum {
                None => term,
                Some(sum) => sum.add(&term)?,
            });
        }
        let sum = sum.ok_or_else(|| Error::invalid(op, "no hyperedges"))?;
        let cells = finished(&self.to_nodes, &sum, &[b, r, c, d])?;
        let [tables, columns, rows, own] = [&edges[0], &edges[1], &edges[2], &edges[3]].map(Clone::clone);
        Ok(Grid { cells, tables, columns, rows, own })
    }
}
