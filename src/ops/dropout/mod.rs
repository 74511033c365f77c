//! Dropout (Srivastava et al. 2014). The mask is a function of (seed, element): it is regenerated in backward and never stored.

pub(crate) mod cuda;

use crate::array::Array;
use crate::autograd::{Case, Cotangents, Differentiable, NO_PARAMS, OpInfo, Owner, Rule, Whose, one};
use crate::base::philox::dropout_uniform;
use crate::base::{Element, Error, Float, Result};
use crate::device::cpu::par::{GRAIN, par_units};
use crate::device::spans;
use crate::kernels::{Half, dispatch};
use crate::random::masks;
use crate::{Tensor, with_float};
use smallvec::SmallVec;

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

/// The registry entries of this family.
pub static OPS: &[&OpInfo] = &[&DROPOUT];

fn apply(x: &Array, p: f64, seed: u64) -> Result<Array> {
    dispatch(
        [x.contiguous()],
        Half::Native,
        |[x]| {
            let mut y = Array::uninit(x.shape(), x.dtype());
            with_float!("dropout", x.dtype(), |T| {
                let (src, keep, threshold) = (x.as_slice::<T>()?, T::from_f64(1.0 / (1.0 - p)), p as f32);
                par_units(y.fresh_mut::<T>(), 1, GRAIN, |r, y| {
                    for (i, (y, &x)) in r.clone().zip(y.iter_mut().zip(&src[r])) {
                        *y = if dropout_uniform(seed, i as u64) < threshold { T::ZERO } else { x * keep };
                    }
                });
                Ok(y)
            })
        },
        |gpu, [x]| {
            gpu.refuse_in_capture("draw a dropout mask (it would be the same in every replay)")?;
            cuda::dropout(gpu, &x, p, seed)
        },
    )
}

impl Tensor {
    /// Zeroes each element with probability `p` and scales the others by 1/(1 − p). The same seed gives the same mask; in the forward pass
    /// of a private step, the mask also depends on a secret of that step.
    pub fn dropout(&self, p: f64, seed: u64) -> Result<Tensor> {
        let _op = spans::op("dropout");
        self.dtype().expect_float("dropout")?;
        if !(0.0..1.0).contains(&p) {
            return Err(Error::invalid("dropout", format!("probability {p}; it must lie in [0, 1)")));
        }
        if p == 0.0 {
            return Ok(self.clone());
        }
        let Some(seed) = masks::seed(seed) else { return Ok(self.clone()) };
        struct Back(f64, u64);
        impl Rule for Back {
            fn info(&self) -> &'static OpInfo {
                &DROPOUT
            }
            fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
                one(y.same())
            }
            fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
                back.input(0, apply(&grad, self.0, self.1)?);
                Ok(())
            }
        }
        let y = apply(self.array(), p, seed)?;
        Ok(Tensor::record(y, &[self], &[], || Back(p, seed)))
    }
}
