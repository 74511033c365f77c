//! Embedding tables as layers.

use crate::base::{Error, Result};
use crate::ops::embedding::{BagMode, embedding, embedding_bag};
use crate::ops::segment::Segments;
use crate::{Param, Samples, Tensor};

fn expect_table(layer: &'static str, weight: &Param) -> Result<()> {
    match weight.shape() {
        [_, _] => Ok(()),
        other => Err(Error::shape(layer, format!("table {} is {other:?}, not [rows, size]", weight.name()))),
    }
}

/// A table `[V, p]` looked up by id: `[B, …]` ids to `[B, …, p]`. Its weight may be shared with an output head: clones of
/// a [`Param`] are the same parameter, and its gradient stays exact per sample.
#[derive(Clone, Debug)]
pub struct Embedding {
    weight: Param,
    padding: Option<u32>,
}

impl Embedding {
    /// Over `weight [V, p]`; rows looked up by the id `padding` receive no gradient.
    pub fn new(weight: Param, padding: Option<u32>) -> Result<Embedding> {
        expect_table("Embedding", &weight)?;
        if let Some(p) = padding
            && p as usize >= weight.shape()[0]
        {
            let message = format!("padding id {p} outside {} with {} rows", weight.name(), weight.shape()[0]);
            return Err(Error::invalid("Embedding", message));
        }
        Ok(Embedding { weight, padding })
    }
    /// The table.
    pub fn weight(&self) -> &Param {
        &self.weight
    }
    /// Rows of `ids` (u32 or i64); dimension 0 counts samples unless `samples` maps the ids otherwise.
    pub fn forward(&self, ids: &Tensor, samples: Option<&Samples>) -> Result<Tensor> {
        embedding(&self.weight, ids, self.padding, samples)
    }
}

/// A table `[V, p]` of which bags of ids are summed or averaged: `[bags, p]`.
#[derive(Clone, Debug)]
pub struct EmbeddingBag {
    weight: Param,
    mode: BagMode,
}

impl EmbeddingBag {
    /// Over `weight [V, p]`.
    pub fn new(weight: Param, mode: BagMode) -> Result<EmbeddingBag> {
        expect_table("EmbeddingBag", &weight)?;
        Ok(EmbeddingBag { weight, mode })
    }
    /// The table.
    pub fn weight(&self) -> &Param {
        &self.weight
    }
    /// Bags of `ids` (u32 or i64), each scaled by `scale` if given; every bag is a sample unless `samples` maps the bags
    /// otherwise.
    pub fn forward(
        &self,
        ids: &Tensor,
        bags: &Segments,
        scale: Option<&Tensor>,
        samples: Option<&Samples>,
    ) -> Result<Tensor> {
        embedding_bag(&self.weight, ids, bags, self.mode, scale, samples)
    }
}
