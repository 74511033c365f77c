//! Pre-training by detection of replaced headers and cells, with one loss per table.

use super::batch::TableBatch;
use super::model::{HyTrel, ids};
use super::tokens::Encoded;
use crate::Tensor;
use crate::array::Array;
use crate::autograd::Segments;
use crate::base::{Error, Result};
use crate::kernels::Activation;
use crate::nn::{Ctx, Linear, Params};
use crate::ops::incidence::Incidence;
use crate::ops::loss::{Reduce, binary_cross_entropy_with_logits};
use crate::random::{Rng, philox};
use std::collections::HashMap;

/// Texts to draw from, in proportion to how often they occur.
#[derive(Clone, Debug)]
struct Drawn {
    texts: Vec<Vec<u32>>,
    /// The number of occurrences up to and including each text.
    sums: Vec<u64>,
}

impl Drawn {
    fn new<'a>(texts: impl Iterator<Item = &'a Vec<u32>>, share: f64) -> Drawn {
        let mut counts: HashMap<&Vec<u32>, u64> = HashMap::new();
        texts.filter(|t| !t.is_empty()).for_each(|t| *counts.entry(t).or_default() += 1);
        let mut all: Vec<(&Vec<u32>, u64)> = counts.into_iter().collect();
        all.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
        // At least two are kept, so that a different text can be drawn.
        all.truncate(((all.len() as f64 * share).ceil() as usize).max(2));
        let sums = all.iter().scan(0, |sum, (_, n)| {
            *sum += n;
            Some(*sum)
        });
        Drawn { sums: sums.collect(), texts: all.iter().map(|(t, _)| (*t).clone()).collect() }
    }
    /// A text other than `old`, or `None` if eight draws find none.
    fn draw(&self, old: &[u32], rng: &mut Rng) -> Option<Vec<u32>> {
        let all = self.sums.last().copied().unwrap_or(0);
        let texts = (0..8).map(|_| {
            let at = rng.below(all);
            self.texts.get(self.sums.partition_point(|&s| s <= at))
        });
        texts.flatten().find(|t| *t != old).cloned()
    }
}

/// Replaces headers and cells by frequent ones (the paper's first pre-training objective).
///
/// The texts to draw from are counted over public `tables`. A private run must not count the texts of its own records.
#[derive(Clone, Debug)]
pub struct Corruption {
    headers: Drawn,
    cells: Drawn,
    rate: f64,
}

/// A table with replaced texts.
#[derive(Clone, Debug)]
pub struct Corrupted {
    /// The table.
    pub table: Encoded,
    /// For each header, then for each cell: whether it was replaced; `None` if the text is missing.
    pub replaced: Vec<Option<bool>>,
}

impl Corruption {
    /// Counts headers and cells, and keeps the most frequent 5 % of the distinct texts of each. Each text of a table is replaced with
    /// probability `rate`, which is 0.15 in the paper.
    pub fn new<'a>(tables: impl Iterator<Item = &'a Encoded> + Clone, rate: f64) -> Result<Corruption> {
        if !(0.0..1.0).contains(&rate) {
            return Err(Error::invalid("Corruption", format!("rate {rate}; it must lie in [0, 1)")));
        }
        Ok(Corruption {
            headers: Drawn::new(tables.clone().flat_map(|t| &t.headers), 0.05),
            cells: Drawn::new(tables.flat_map(|t| &t.cells), 0.05),
            rate,
        })
    }
    /// The table with some texts replaced. The random choices depend only on `seed` and on `key`, the table's number, and not on other
    /// tables in the batch. Missing texts are neither replaced nor drawn.
    pub fn apply(&self, table: &Encoded, seed: u64, key: u64) -> Corrupted {
        let mut rng = Rng::new(philox::bits(seed, 0x636f_7272, key));
        let (mut table, mut replaced) = (table.clone(), Vec::new());
        let texts = table.headers.iter_mut().map(|t| (t, &self.headers));
        for (text, drawn) in texts.chain(table.cells.iter_mut().map(|t| (t, &self.cells))) {
            let chosen = rng.uniform() < self.rate;
            if text.is_empty() {
                replaced.push(None);
                continue;
            }
            let new = if chosen { drawn.draw(text, &mut rng) } else { None };
            replaced.push(Some(new.is_some()));
            if let Some(new) = new {
                *text = new;
            }
        }
        Corrupted { table, replaced }
    }
}

/// Distinguishes replaced texts from others: a linear layer d → d, GELU, and a linear layer d → 1 over the states of columns and cells.
pub struct Detector {
    fc: Linear,
    out: Linear,
}

impl Detector {
    /// A detector with the parameters `fc` and `out`. Fails if these names are taken.
    pub fn new(params: &Params, d: usize) -> Result<Detector> {
        Ok(Detector { fc: Linear::new(&params.at("fc"), d, d)?, out: Linear::new(&params.at("out"), d, 1)? })
    }
    /// A logit for each column of all tables, then for each cell: `[columns + cells, 1]`. A positive logit means "replaced".
    pub fn logits(&self, model: &HyTrel, batch: &TableBatch, ctx: &Ctx) -> Result<Tensor> {
        let states = model.forward(batch, ctx)?;
        let (columns, owners) = batch.column_edges();
        let columns = states.edges.index_select(0, ids(&columns)?)?;
        let of = owners.into_iter().chain(batch.cell_samples().owner_ids()).collect();
        let ctx = &ctx.with_samples(crate::Samples::owners(of, batch.tables())?);
        let items = Tensor::concat(&[&columns, &states.cells], 0)?;
        self.out.forward(&self.fc.forward_act(&items, Activation::Gelu, ctx)?, ctx)
    }
    /// One loss per table, `[tables]`: the mean cross-entropy of its replaced texts plus that of its other texts. A table without replaced
    /// texts has only the second mean. `tables` are the tables of the batch.
    pub fn losses(&self, model: &HyTrel, batch: &TableBatch, tables: &[Corrupted], ctx: &Ctx) -> Result<Tensor> {
        if tables.len() != batch.tables() {
            let message = format!("{} corrupted tables for a batch of {}", tables.len(), batch.tables());
            return Err(Error::shape("Detector", message));
        }
        let logits = self.logits(model, batch, ctx)?;
        let n = logits.shape()[0];
        // The rows of `logits` are the columns of all tables, then the cells. The set of each table has its columns and cells as members.
        let (mut column, mut cell) = (0u32, batch.column_edges().0.len() as u32);
        let (mut members, mut weights, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
        let mut targets = vec![0.0; n];
        for (i, t) in tables.iter().enumerate() {
            let (_, columns) = batch.shape(i);
            let count = |what: bool| t.replaced.iter().filter(|r| **r == Some(what)).count() as f64;
            let shares = [1.0 / count(false), 1.0 / count(true)];
            for (k, replaced) in t.replaced.iter().enumerate() {
                let at = if k < columns { &mut column } else { &mut cell };
                members.push(*at);
                weights.push(replaced.map_or(0.0, |r| shares[usize::from(r)]));
                targets[*at as usize] = f64::from(u8::from(*replaced == Some(true)));
                *at += 1;
            }
            lengths.push(t.replaced.len());
        }
        let dtype = logits.dtype().compute();
        let made = |v: &[f64]| -> Result<Tensor> {
            Ok(Tensor::new(Array::from_slice(v, &[v.len(), 1])?.cast(dtype).to(&logits.device())?))
        };
        let each = binary_cross_entropy_with_logits(&logits, &made(&targets)?, Reduce::Sum)?.reshape(&[n, 1])?;
        let sets = Incidence::new(&Segments::lengths(&lengths), members, n)?;
        each.incidence_sum(&sets, Some(&made(&weights)?))?.reshape(&[tables.len()])
    }
}
