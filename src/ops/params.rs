//! Parameters as tensors: [`Param::per_sample`](crate::Param::per_sample) and [`Param::dense`](crate::Param::dense).

use super::{Differentiable, FactorRule, OpInfo};
use crate::Param;
use crate::check::Case;

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
