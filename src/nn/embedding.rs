//! Embedding tables as layers.

use super::{Ctx, Init, Params};
use crate::base::{Error, Result};
use crate::ops::embedding::{BagMode, embedding, embedding_bag};
use crate::ops::segment::Segments;
use crate::{Array, Param, Tensor};

fn expect_table(layer: &'static str, weight: &Param) -> Result<()> {
    match weight.shape() {
        [_, _] => Ok(()),
        other => Err(Error::shape(layer, format!("table {} is {other:?}, not [rows, size]", weight.name()))),
    }
}

fn expect_row(padding: u32, rows: usize) -> Result<()> {
    if padding as usize >= rows {
        let message = format!("padding id {padding} is no row of a table with {rows} rows; ids are in 0..{rows}");
        return Err(Error::invalid("Embedding", message));
    }
    Ok(())
}

/// A table `[V, d]` whose rows are looked up by id. It maps ids `[B, …]` (u32 or i64) to `[B, …, d]`.
///
/// ```
/// use prismgrad::nn::{Ctx, Embedding, Params};
/// use prismgrad::{DType, Tensor};
/// # fn main() -> prismgrad::Result<()> {
/// let params = Params::new(0, DType::F32);
/// let table = Embedding::new(&params.at("wte"), 100, 16)?;
/// let y = table.forward(&Tensor::from_slice(&[3i64, 1, 4, 1], &[2, 2])?, &Ctx::eval())?;
/// assert_eq!(y.shape(), [2, 2, 16]);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Embedding {
    weight: Param,
    padding: Option<u32>,
}

/// Options of an [`Embedding`], from [`Embedding::builder`].
#[derive(Clone, Copy, Debug)]
pub struct EmbeddingBuilder {
    sizes: (usize, usize),
    padding: Option<u32>,
    init: Init,
}

impl EmbeddingBuilder {
    setters! {
        /// Initial values of the table; N(0, 1), as in PyTorch, if not given.
        init: Init,
    }
    /// The id whose row starts at zero and receives no gradient; none if not given.
    pub fn padding(mut self, id: u32) -> Self {
        self.padding = Some(id);
        self
    }
    /// Makes the layer, with the parameter `weight` `[V, d]`. Fails if this name is taken in `params`, or if the padding id is not less
    /// than V.
    pub fn build(self, params: &Params) -> Result<Embedding> {
        params.whole(|params| {
            let (rows, d) = self.sizes;
            self.padding.map_or(Ok(()), |p| expect_row(p, rows))?;
            let weight = params.param("weight", &[rows, d], self.init)?;
            if let Some(p) = self.padding {
                let mut value = weight.value();
                value.write(p as usize * d, &Array::zeros(&[d], weight.dtype()))?;
                weight.set(value)?;
            }
            Ok(Embedding { weight, padding: self.padding })
        })
    }
}

impl Embedding {
    /// A table of `rows` rows of d elements, initialised from N(0, 1). Fails if the name `weight` is taken in `params`.
    pub fn new(params: &Params, rows: usize, d: usize) -> Result<Embedding> {
        Embedding::builder(rows, d).build(params)
    }
    /// Options for a table of `rows` rows of d elements.
    pub fn builder(rows: usize, d: usize) -> EmbeddingBuilder {
        EmbeddingBuilder { sizes: (rows, d), padding: None, init: Init::Normal { std: 1.0 } }
    }
    /// A layer over a parameter `[V, d]` that exists already, such as the weight of an output layer: clones of a [`Param`] are the same
    /// parameter, and its gradient stays exact per sample. Fails if the parameter is not a matrix.
    pub fn tied(weight: Param) -> Result<Embedding> {
        expect_table("Embedding", &weight)?;
        Ok(Embedding { weight, padding: None })
    }
    /// The same table, in which the row of the id `padding` receives no gradient. Fails if the id is not less than V.
    pub fn with_padding(mut self, padding: u32) -> Result<Embedding> {
        expect_row(padding, self.weight.shape()[0])?;
        self.padding = Some(padding);
        Ok(self)
    }
    /// The table.
    pub fn weight(&self) -> &Param {
        &self.weight
    }
    /// The rows of `ids` (u32 or i64) in the dtype of activations. Dimension 0 counts samples unless the context maps the ids to samples
    /// otherwise.
    pub fn forward(&self, ids: impl AsRef<Array>, ctx: &Ctx) -> Result<Tensor> {
        ctx.activations(&embedding(&self.weight, ids, self.padding, ctx.samples.as_ref())?)
    }
}

/// A table `[V, d]` whose rows are summed or averaged over bags of ids. The result is `[bags, d]`.
#[derive(Clone, Debug)]
pub struct EmbeddingBag {
    weight: Param,
    mode: BagMode,
}

/// Options of an [`EmbeddingBag`], from [`EmbeddingBag::builder`].
#[derive(Clone, Copy, Debug)]
pub struct EmbeddingBagBuilder {
    sizes: (usize, usize),
    mode: BagMode,
    init: Init,
}

impl EmbeddingBagBuilder {
    setters! {
        /// How the rows of a bag become one; their mean, as in PyTorch, if not given.
        mode: BagMode,
        /// Initial values of the table; N(0, 1), as in PyTorch, if not given.
        init: Init,
    }
    /// Makes the layer, with the parameter `weight` `[V, d]`. Fails if this name is taken in `params`.
    pub fn build(self, params: &Params) -> Result<EmbeddingBag> {
        params.whole(|params| {
            let (rows, d) = self.sizes;
            EmbeddingBag::tied(params.param("weight", &[rows, d], self.init)?, self.mode)
        })
    }
}

impl EmbeddingBag {
    /// A table of `rows` rows of d elements, initialised from N(0, 1), whose bags are averaged. Fails if the name `weight` is taken in
    /// `params`.
    pub fn new(params: &Params, rows: usize, d: usize) -> Result<EmbeddingBag> {
        EmbeddingBag::builder(rows, d).build(params)
    }
    /// Options for a table of `rows` rows of d elements.
    pub fn builder(rows: usize, d: usize) -> EmbeddingBagBuilder {
        EmbeddingBagBuilder { sizes: (rows, d), mode: BagMode::Mean, init: Init::Normal { std: 1.0 } }
    }
    /// A layer over a parameter `[V, d]` that exists already. Fails if the parameter is not a matrix.
    pub fn tied(weight: Param, mode: BagMode) -> Result<EmbeddingBag> {
        expect_table("EmbeddingBag", &weight)?;
        Ok(EmbeddingBag { weight, mode })
    }
    /// The table.
    pub fn weight(&self) -> &Param {
        &self.weight
    }
    /// Bags of equal length: ids `[B, k]` (u32 or i64) to `[B, d]`. Every bag is a sample unless the context maps the bags to samples
    /// otherwise.
    pub fn forward(&self, ids: impl AsRef<Array>, ctx: &Ctx) -> Result<Tensor> {
        let ids = ids.as_ref();
        let &[count, each] = ids.shape() else {
            let message = format!("ids {:?}; they must be [bags, ids of a bag], or use forward_bags", ids.shape());
            return Err(Error::shape("EmbeddingBag", message));
        };
        self.forward_bags(ids, &Segments::uniform(count, each), None, ctx)
    }
    /// Bags of any length over the ids, to `[bags, d]`. Each id's row is scaled by `scale` `[N]` if given.
    pub fn forward_bags(
        &self,
        ids: impl AsRef<Array>,
        bags: &Segments,
        scale: Option<&Tensor>,
        ctx: &Ctx,
    ) -> Result<Tensor> {
        ctx.activations(&embedding_bag(&self.weight, ids, bags, self.mode, scale, ctx.samples.as_ref())?)
    }
}
