//! Classifiers over the states of a fine-tuned model.

use super::batch::TableBatch;
use super::model::{HyTrel, ids};
use crate::base::{Error, Result};
use crate::kernels::Activation;
use crate::nn::{Ctx, Dropout, Linear, Params};
use crate::{Samples, Tensor};

/// Two layers over a state, or over two states side by side: a linear layer to `hidden`, ReLU, dropout, and a linear layer to the classes.
/// The paper has a hidden layer of 384 and a dropout of 0.5.
pub struct Head {
    hidden: Linear,
    out: Linear,
    drop: Dropout,
}

impl Head {
    /// A head with the parameters `hidden` and `out`. `inputs` is d for the type of a column or a table and 2·d for relations and
    /// similarity. Fails unless the dropout lies in [0, 1), and if the names are taken.
    pub fn new(params: &Params, (inputs, hidden, classes): (usize, usize, usize), dropout: f64) -> Result<Head> {
        Ok(Head {
            hidden: Linear::new(&params.at("hidden"), inputs, hidden)?,
            out: Linear::new(&params.at("out"), hidden, classes)?,
            drop: Dropout::new(&params.at("drop"), dropout)?,
        })
    }
    /// Logits of the rows `x`, which `of` maps to samples.
    pub fn logits(&self, x: &Tensor, of: &Samples, ctx: &Ctx) -> Result<Tensor> {
        let ctx = &ctx.with_samples(of.clone());
        let h = self.hidden.forward_act(x, Activation::Relu, ctx)?;
        self.out.forward(&self.drop.forward(&h, ctx)?, ctx)
    }
    /// The type of each column of all tables: logits `[columns, classes]`, and the map of columns to samples.
    pub fn column_types(&self, model: &HyTrel, batch: &TableBatch, ctx: &Ctx) -> Result<(Tensor, Samples)> {
        let (columns, of) = model.columns(batch, ctx)?;
        Ok((self.logits(&columns, &of, ctx)?, of))
    }
    /// The relation of each column except the first to the first column of its table: logits of these pairs, table by table, and the map of
    /// pairs to samples. A table of one column has no pair.
    pub fn relations(&self, model: &HyTrel, batch: &TableBatch, ctx: &Ctx) -> Result<(Tensor, Samples)> {
        let (columns, _) = model.columns(batch, ctx)?;
        let (mut first, mut other, mut of, mut at) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for t in 0..batch.tables() {
            let n = batch.shape(t).1 as u32;
            (1..n).for_each(|c| {
                first.push(at);
                other.push(at + c);
                of.push(t as u32);
            });
            at += n;
        }
        let of = Samples::owners(of, batch.tables())?;
        let pairs = [columns.index_select(0, ids(&first)?)?, columns.index_select(0, ids(&other)?)?];
        Ok((self.logits(&Tensor::concat(&[&pairs[0], &pairs[1]], 1)?, &of, ctx)?, of))
    }
    /// The type of each table: logits `[tables, classes]`.
    pub fn table_types(&self, model: &HyTrel, batch: &TableBatch, ctx: &Ctx) -> Result<Tensor> {
        self.logits(&model.tables(batch, ctx)?, &Samples::uniform(batch.tables(), 1), ctx)
    }
    /// Whether tables 2·i and 2·i + 1 of the batch are similar: logits `[pairs, classes]` from |a − b| and a ⊙ b side by side, so that
    /// their order does not matter. A sample is a pair; in a private step the pairs have to be the records.
    pub fn similarity(&self, model: &HyTrel, batch: &TableBatch, ctx: &Ctx) -> Result<Tensor> {
        let n = batch.tables();
        if !n.is_multiple_of(2) {
            return Err(Error::shape("Head::similarity", format!("{n} tables do not make pairs")));
        }
        let states = model.tables(batch, ctx)?;
        let side = |k: u32| states.index_select(0, ids(&(0..n as u32 / 2).map(|i| 2 * i + k).collect::<Vec<_>>())?);
        let (a, b) = (side(0)?, side(1)?);
        let both = Tensor::concat(&[&a.sub(&b)?.abs()?, &a.mul(&b)?], 1)?;
        self.logits(&both, &Samples::uniform(n / 2, 1), ctx)
    }
}
