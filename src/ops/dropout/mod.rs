//! Dropout (Srivastava et al. 2014), its mask a function of (seed, element): regenerated in backward, never stored.

pub(crate) mod cuda;

use crate::array::Array;
use crate::autograd::{Case, Differentiable, Flow, NO_PARAMS, OpInfo, Rule};
use crate::base::philox::dropout_uniform;
use crate::base::{DType, Element, Error, Float, Result};
use crate::device::cpu::par::{GRAIN, par_chunks};
use crate::device::cpu::shared::Shared;
use crate::device::spans;
use crate::{Tensor, with_float};

static DROPOUT: OpInfo = OpInfo {
    name: "dropout",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[|g| {
        let shape = g.shape(3);
        let seed = g.bits();
        Ok(Case::new(vec![g.array(&shape)], move |t| t[0].dropout(0.4, seed)))
    }],
};

/// This family's entries.
pub static OPS: &[&OpInfo] = &[&DROPOUT];

fn apply(x: &Array, p: f64, seed: u64) -> Result<Array> {
    let x = x.contiguous();
    if let Some(gpu) = x.gpu() {
        return cuda::dropout(gpu, &x, p, seed);
    }
    let mut y = Array::uninit(x.shape(), x.dtype());
    with_float!("dropout", x.dtype(), T => {
        let (src, dst, keep) = (x.as_slice::<T>()?, Shared::new(y.fresh_mut::<T>()), T::from_f64(1.0 / (1.0 - p)));
        let threshold = p as f32;
        par_chunks(src.len(), GRAIN, |r| {
            // SAFETY: chunks are disjoint.
            let d = unsafe { dst.slice(r.clone()) };
            for (i, (d, &s)) in r.clone().zip(d.iter_mut().zip(&src[r])) {
                *d = if dropout_uniform(seed, i as u64) < threshold { T::ZERO } else { s * keep };
            }
        });
        Ok(())
    })?;
    Ok(y)
}

impl Tensor {
    /// Zeroes each element with probability `p` and scales the others by 1/(1 − p). Same seed, same mask.
    pub fn dropout(&self, p: f64, seed: u64) -> Result<Tensor> {
        let _op = spans::op("dropout");
        self.dtype().expect_float("dropout")?;
        if !(0.0..1.0).contains(&p) {
            return Err(Error::invalid("dropout", format!("probability {p}; it must lie in [0, 1)")));
        }
        if p == 0.0 {
            return Ok(self.clone());
        }
        if let Some(gpu) = self.array().gpu() {
            gpu.refuse_in_capture("draw a dropout mask (it would be the same in every replay)")?;
        }
        if self.dtype().is_half() {
            return self.cast(DType::F32)?.dropout(p, seed)?.cast(self.dtype());
        }
        struct Back(f64, u64);
        impl Rule for Back {
            fn info(&self) -> &'static OpInfo {
                &DROPOUT
            }
            fn backward(&self, grad: Array, flow: &mut Flow) -> Result<()> {
                flow.input(0, apply(&grad, self.0, self.1)?);
                Ok(())
            }
        }
        let y = apply(self.array(), p, seed)?;
        Ok(Tensor::record(y, &[self], &[], || Back(p, seed)))
    }
}
