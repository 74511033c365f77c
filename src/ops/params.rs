//! Parameters as tensors: [`Param::per_sample`](crate::Param::per_sample), [`Param::per_row`](crate::Param::per_row) and
//! [`Param::dense`](crate::Param::dense).

use super::{Differentiable, FactorRule, OpInfo};
use crate::array::Array;
use crate::autograd::{Case, Cotangents, Factor, Rule, Segments};
use crate::base::Result;
use crate::{Param, Samples, Tensor};

/// The registry entry of all of them.
pub static INFO: OpInfo = OpInfo {
    name: "param",
    differentiable: Differentiable::Yes,
    factor: FactorRule::Kinds(&["per-sample", "dense", "row sum"]),
    cases: &[
        // A parameter broadcast over the sample axis, then used by ordinary ops.
        |g| {
            let (b, d) = (g.size(1, 4), g.size(1, 5));
            let w = Param::new("w", g.array(&[d]));
            let x = g.array(&[b, d]);
            let p = w.clone();
            Ok(Case::new(vec![x], move |t| t[0].mul(&p.per_sample(t[0].shape()[0])?)?.sin()).params(vec![w]).samples(b))
        },
        |g| {
            let (b, d) = (g.size(1, 4), g.size(1, 5));
            let w = Param::new("w", g.array(&[d]));
            let x = g.array(&[b, d]);
            let p = w.clone();
            Ok(Case::new(vec![x], move |t| t[0].mul(&p.dense())).params(vec![w]))
        },
        // A parameter repeated for each row, with samples of any number of rows.
        |g| {
            let (rows, d) = (Samples::ragged(Segments::lengths(&g.lengths(1, 4)).offsets())?, g.size(1, 5));
            let w = Param::new("w", g.array(&[d]));
            let (x, b, p) = (g.array(&[rows.rows(), d]), rows.count(), w.clone());
            let run = move |t: &[Tensor]| {
                let y = t[0].mul(&p.per_row(&rows)?)?.sin()?;
                y.segment_sum(&Segments::lengths(&(0..b).map(|i| rows.range(i).len()).collect::<Vec<_>>()))
            };
            Ok(Case::new(vec![x], run).params(vec![w]).samples(b))
        },
    ],
};

/// The registry entries of this family.
pub static OPS: &[&OpInfo] = &[&INFO];

impl Param {
    /// The parameter repeated along a new sample axis: `[count, shape…]` without a copy. Its gradient stays separate per sample, whatever
    /// ops are applied to the tensor afterwards, as long as they keep samples apart. It is exact for any op.
    pub fn per_sample(&self, count: usize) -> Result<Tensor> {
        let shape: Vec<usize> = std::iter::once(count).chain(self.shape().iter().copied()).collect();
        let value = self.value().expand(&shape)?;
        Ok(Tensor::record(value, &[], &[self], || LeafUse { param: self.clone(), kept: Kept::PerSample }))
    }
    /// The parameter repeated for each row: `[rows, shape…]` without a copy. `samples` maps the rows to samples, and each row's gradient is
    /// kept: ops applied to a row must not mix it with rows of other samples. If samples have several rows, this replaces
    /// [`Param::per_sample`] followed by a gather.
    pub fn per_row(&self, samples: &Samples) -> Result<Tensor> {
        let shape: Vec<usize> = std::iter::once(samples.rows()).chain(self.shape().iter().copied()).collect();
        let value = self.value().expand(&shape)?;
        let kept = Kept::PerRow(samples.clone());
        Ok(Tensor::record(value, &[], &[self], || LeafUse { param: self.clone(), kept }))
    }
    /// The parameter as a plain tensor. Its gradient cannot be separated by sample: plain training works, but private training refuses it
    /// with an error that names it. Prefer the factored layers, or [`Param::per_sample`].
    pub fn dense(&self) -> Tensor {
        Tensor::record(self.value(), &[], &[self], || LeafUse { param: self.clone(), kept: Kept::Sum })
    }
}

/// The use of a parameter as a tensor in the history.
struct LeafUse {
    param: Param,
    kept: Kept,
}

/// How far its gradient is kept separate.
enum Kept {
    PerSample,
    PerRow(Samples),
    Sum,
}

impl Rule for LeafUse {
    fn info(&self) -> &'static OpInfo {
        &INFO
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        let grad = grad.cast(grad.dtype().compute());
        let factor = match &self.kept {
            Kept::PerSample => Factor::PerSample { grads: grad },
            Kept::PerRow(samples) => {
                let rows = [samples.rows(), self.param.numel()];
                Factor::RowSum { grad: grad.contiguous().reshape(&rows)?, samples: samples.clone() }
            }
            Kept::Sum => Factor::Dense { grad },
        };
        back.param(&self.param, factor);
        Ok(())
    }
}
