//! Parameters as tensors: [`Param::per_sample`](crate::Param::per_sample) and [`Param::dense`](crate::Param::dense).

use super::{Differentiable, FactorRule, OpInfo};
use crate::array::Array;
use crate::autograd::{Case, Cotangents, Factor, Rule};
use crate::base::Result;
use crate::{Param, Tensor};

/// Entry of both uses.
pub static INFO: OpInfo = OpInfo {
    name: "param",
    differentiable: Differentiable::Yes,
    factor: FactorRule::Kinds(&["per-sample", "dense"]),
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
    ],
};

/// This family's entries.
pub static OPS: &[&OpInfo] = &[&INFO];

impl Param {
    /// The parameter repeated along a new sample axis: `[count, shape…]` without a copy. Its gradient stays apart per
    /// sample, whatever is done with the tensor afterwards, as long as that keeps samples apart. Exact for any op.
    pub fn per_sample(&self, count: usize) -> Result<Tensor> {
        let shape: Vec<usize> = std::iter::once(count).chain(self.shape().iter().copied()).collect();
        let value = self.value().expand(&shape)?;
        Ok(Tensor::record(value, &[], &[self], || LeafUse { param: self.clone(), per_sample: true }))
    }
    /// The parameter as a plain tensor. Its gradient has no per-sample meaning: plain training works, private training
    /// refuses it by name. Prefer the factored layers, or [`Param::per_sample`].
    pub fn dense(&self) -> Tensor {
        Tensor::record(self.value(), &[], &[self], || LeafUse { param: self.clone(), per_sample: false })
    }
}

/// A parameter entering the history as a tensor.
struct LeafUse {
    param: Param,
    per_sample: bool,
}

impl Rule for LeafUse {
    fn info(&self) -> &'static OpInfo {
        &INFO
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        let grad = grad.cast(grad.dtype().compute());
        let factor = if self.per_sample { Factor::PerSample { grads: grad } } else { Factor::Dense { grad } };
        back.param(&self.param, factor);
        Ok(())
    }
}
