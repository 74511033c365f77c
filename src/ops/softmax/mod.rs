//! Numerically stable softmax and log-softmax over one dimension.

pub(crate) mod cpu;
pub(crate) mod cuda;

use crate::array::{Array, shape};
use crate::autograd::{Case, Cotangents, Differentiable, Gen, NO_PARAMS, OpInfo, Owner, Rule, Whose, one};
use crate::base::{DType, Result};
use crate::device::spans;
use crate::kernels::lanes::bf16_blocks;
use crate::kernels::{Half, dispatch};
use crate::{Tensor, with_float};
use smallvec::SmallVec;

fn case(g: &mut Gen, f: fn(&Tensor, isize) -> Result<Tensor>) -> Result<Case> {
    let shape = g.shape(3);
    let d = g.size(0, 2) as isize - 1;
    Ok(Case::new(vec![g.array(&shape)], move |t| f(&t[0], d)))
}
static SOFTMAX: OpInfo = OpInfo {
    name: "softmax",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[|g| case(g, Tensor::softmax)],
};
static LOG_SOFTMAX: OpInfo = OpInfo {
    name: "log_softmax",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[|g| case(g, Tensor::log_softmax)],
};

/// The registry entries of this family.
pub static OPS: &[&OpInfo] = &[&SOFTMAX, &LOG_SOFTMAX];

/// Backward over the last dimension.
struct Back {
    y: Array,
    log: bool,
}

impl Rule for Back {
    fn info(&self) -> &'static OpInfo {
        if self.log { &LOG_SOFTMAX } else { &SOFTMAX }
    }
    fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
        one(y.mixing(y.shape.len() - 1, y.shape))
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        let (d, log) = (*self.y.shape().last().unwrap_or(&1), self.log);
        let dx = dispatch(
            [self.y.clone(), grad.contiguous()],
            Half::Bf16,
            |[y, grad]| {
                if (y.dtype(), grad.dtype()) == (DType::BF16, DType::BF16) {
                    let mut dx = Array::uninit(y.shape(), DType::BF16);
                    bf16_blocks(d, [y.as_slice()?, grad.as_slice()?], Some(dx.fresh_mut()), |_, [y, grad], dx| {
                        cpu::softmax_backward(y, grad, d, log, dx.unwrap_or_default())
                    });
                    return Ok(dx);
                }
                let (y, grad) = (y.cast(y.dtype().compute()), grad.cast(grad.dtype().compute()));
                let mut dx = Array::uninit(y.shape(), grad.dtype());
                with_float!("softmax", grad.dtype(), |T| {
                    cpu::softmax_backward::<T>(y.as_slice()?, grad.as_slice()?, d, log, dx.fresh_mut());
                    Ok(dx)
                })
            },
            |gpu, [y, grad]| cuda::softmax_grad(gpu, &y, &grad, log),
        )?;
        back.input(0, dx);
        Ok(())
    }
}

fn run(x: &Tensor, dim: isize, log: bool) -> Result<Tensor> {
    let name = if log { "log_softmax" } else { "softmax" };
    x.dtype().expect_float(name)?;
    let d = shape::dim(name, dim, x.rank())?;
    if d + 1 != x.rank() {
        return run(&x.transpose(d as isize, -1)?, -1, log)?.transpose(d as isize, -1);
    }
    let size = x.shape()[d];
    let y = dispatch(
        [x.array().contiguous()],
        Half::Bf16,
        |[x]| {
            let mut y = Array::uninit(x.shape(), x.dtype());
            if x.dtype() == DType::BF16 {
                bf16_blocks(size, [x.as_slice()?], Some(y.fresh_mut()), |_, [x], y| {
                    cpu::softmax(x, size, log, y.unwrap_or_default())
                });
                return Ok(y);
            }
            with_float!(name, x.dtype(), |T| {
                cpu::softmax::<T>(x.as_slice()?, size, log, y.fresh_mut());
                Ok(y)
            })
        },
        |gpu, [x]| cuda::softmax(gpu, &x, log),
    )?;
    Ok(Tensor::record(y.clone(), &[x], &[], || Back { y, log }))
}

impl Tensor {
    /// Softmax eˣ/Σeˣ along `dim`; the shape is unchanged.
    pub fn softmax(&self, dim: isize) -> Result<Tensor> {
        let _op = spans::op("softmax");
        spans::cost(0.0, (2 * self.numel() * self.dtype().size()) as f64);
        run(self, dim, false)
    }
    /// Log-softmax x − ln Σeˣ along `dim`; the shape is unchanged.
    pub fn log_softmax(&self, dim: isize) -> Result<Tensor> {
        let _op = spans::op("log_softmax");
        run(self, dim, true)
    }
}
