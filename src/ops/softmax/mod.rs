//! Softmax and log-softmax over one dimension, stable.

pub(crate) mod cpu;
pub(crate) mod cuda;

use crate::array::{Array, shape};
use crate::autograd::{Case, Differentiable, Flow, Gen, NO_PARAMS, OpInfo, Rule};
use crate::base::{DType, Result};
use crate::device::spans;
use crate::{Tensor, with_float};

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

/// This family's entries.
pub static OPS: &[&OpInfo] = &[&SOFTMAX, &LOG_SOFTMAX];

/// Over the last dimension of a contiguous array.
struct Back {
    y: Array,
    log: bool,
}

impl Rule for Back {
    fn info(&self) -> &'static OpInfo {
        if self.log { &LOG_SOFTMAX } else { &SOFTMAX }
    }
    fn backward(&self, grad: Array, flow: &mut Flow) -> Result<()> {
        let (grad, d) = (grad.contiguous(), *self.y.shape().last().unwrap_or(&1));
        if let Some(gpu) = grad.gpu() {
            flow.input(0, cuda::softmax_grad(gpu, &self.y, &grad, self.log)?);
            return Ok(());
        }
        let mut dx = Array::uninit(self.y.shape(), grad.dtype());
        with_float!("softmax", grad.dtype(), T => {
            cpu::softmax_backward::<T>(self.y.as_slice()?, grad.as_slice()?, d, self.log, dx.fresh_mut());
            Ok(())
        })?;
        flow.input(0, dx);
        Ok(())
    }
}

fn run(x: &Tensor, dim: isize, log: bool) -> Result<Tensor> {
    let name = if log { "log_softmax" } else { "softmax" };
    x.dtype().expect_float(name)?;
    let d = shape::dim(name, dim, x.rank())?;
    if x.dtype().is_half() {
        return run(&x.cast(DType::F32)?, dim, log)?.cast(x.dtype());
    }
    if d + 1 != x.rank() {
        return run(&x.transpose(d as isize, -1)?, -1, log)?.transpose(d as isize, -1);
    }
    let xa = x.array().contiguous();
    if let Some(gpu) = xa.gpu() {
        let y = cuda::softmax(gpu, &xa, log)?;
        return Ok(Tensor::record(y.clone(), &[x], &[], || Back { y, log }));
    }
    let mut y = Array::uninit(x.shape(), x.dtype());
    with_float!(name, x.dtype(), T => {
        cpu::softmax::<T>(xa.as_slice()?, x.shape()[d], log, y.fresh_mut());
        Ok(())
    })?;
    Ok(Tensor::record(y.clone(), &[x], &[], || Back { y, log }))
}

impl Tensor {
    /// eˣ/Σeˣ along `dim`.
    pub fn softmax(&self, dim: isize) -> Result<Tensor> {
        let _op = spans::op("softmax");
        spans::cost(0.0, (2 * self.numel() * self.dtype().size()) as f64);
        run(self, dim, false)
    }
    /// x − ln Σeˣ along `dim`.
    pub fn log_softmax(&self, dim: isize) -> Result<Tensor> {
        let _op = spans::op("log_softmax");
        run(self, dim, true)
    }
}
