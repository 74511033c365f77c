//! Numerically stable softmin over one dimension: the softmax of −x.

mod cuda;

use crate::array::{Array, shape};
use crate::autograd::{Case, Cotangents, Differentiable, NO_PARAMS, OpInfo, Owner, Rule, Whose, one};
use crate::base::{Float, Result};
use crate::device::cpu::par::par_rows;
use crate::device::cpu::simd::simd;
use crate::device::spans;
use crate::kernels::{Half, dispatch};
use crate::{Tensor, with_float};
use smallvec::SmallVec;

static SOFTMIN: OpInfo = OpInfo {
    name: "softmin",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[|g| {
        let shape = g.shape(3);
        let d = g.size(0, 2) as isize - 1;
        Ok(Case::new(vec![g.array(&shape)], move |t| t[0].softmin(d)))
    }],
};

/// The registry entries of this family.
pub static OPS: &[&OpInfo] = &[&SOFTMIN];

/// e^{min − x}/Σ e^{min − x} of one row.
fn forward<T: Float>(x: &[T], y: &mut [T]) {
    let least = x.iter().fold(-T::NEG_INFINITY, |m, &x| if x < m { x } else { m });
    simd(
        #[inline(always)]
        || {
            y.iter_mut().zip(x).for_each(|(y, &x)| *y = (least - x).exp());
            let inverse = T::ONE / y.iter().copied().sum::<T>();
            y.iter_mut().for_each(|y| *y *= inverse);
        },
    );
}

/// y·(Σ y·dy − dy) of one row.
fn backward<T: Float>(y: &[T], dy: &[T], dx: &mut [T]) {
    let sum: T = y.iter().zip(dy).map(|(&y, &dy)| y * dy).sum();
    dx.iter_mut().zip(y.iter().zip(dy)).for_each(|(dx, (&y, &dy))| *dx = y * (sum - dy));
}

/// Backward over the last dimension.
struct Back(Array);

impl Rule for Back {
    fn info(&self) -> &'static OpInfo {
        &SOFTMIN
    }
    fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
        one(y.mixing(y.shape.len() - 1, y.shape))
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        let d = *self.0.shape().last().unwrap_or(&1);
        let dx = dispatch(
            [self.0.clone(), grad.contiguous()],
            Half::Native,
            |[y, dy]| {
                let mut dx = Array::uninit(y.shape(), y.dtype());
                with_float!("softmin", y.dtype(), |T| {
                    let (y, dy) = (y.as_slice::<T>()?, dy.as_slice::<T>()?);
                    par_rows(dx.fresh_mut::<T>(), d, |r, dx| backward(&y[r * d..][..d], &dy[r * d..][..d], dx));
                    Ok(dx)
                })
            },
            |gpu, [y, dy]| cuda::softmin_grad(gpu, &y, &dy),
        )?;
        back.input(0, dx);
        Ok(())
    }
}

impl Tensor {
    /// Softmin e⁻ˣ/Σe⁻ˣ along `dim`; the shape is unchanged.
    pub fn softmin(&self, dim: isize) -> Result<Tensor> {
        let _op = spans::op("softmin");
        spans::cost(0.0, (2 * self.numel() * self.dtype().size()) as f64);
        self.dtype().expect_float("softmin")?;
        let at = shape::dim("softmin", dim, self.rank())?;
        if at + 1 != self.rank() {
            return self.transpose(at as isize, -1)?.softmin(-1)?.transpose(at as isize, -1);
        }
        let d = self.shape()[at];
        let y = dispatch(
            [self.array().contiguous()],
            Half::Native,
            |[x]| {
                let mut y = Array::uninit(x.shape(), x.dtype());
                with_float!("softmin", x.dtype(), |T| {
                    let x = x.as_slice::<T>()?;
                    par_rows(y.fresh_mut::<T>(), d, |r, y| forward(&x[r * d..][..d], y));
                    Ok(y)
                })
            },
            |gpu, [x]| cuda::softmin(gpu, &x),
        )?;
        Ok(Tensor::record(y.clone(), &[self], &[], || Back(y)))
    }
}
