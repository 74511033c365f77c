//! The sum of a tensor and multiples of others in one pass: x + Σ wᵢ·dᵢ.

mod cuda;

use crate::array::Array;
use crate::autograd::{Case, Cotangents, Differentiable, Gen, NO_PARAMS, OpInfo, Owner, Rule, Whose};
use crate::base::{Error, Float, Result};
use crate::device::cpu::par::{GRAIN, par_units};
use crate::device::cpu::simd::simd;
use crate::device::spans;
use crate::kernels::{Half, dispatch_all};
use crate::ops::unary::{MulScalar, apply};
use crate::{Tensor, with_float};
use smallvec::SmallVec;

static ADD_SCALED: OpInfo = OpInfo {
    name: "add_scaled",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[|g| case(g, 3), |g| case(g, 0), |g| case(g, 17)],
};

/// The registry entries of this family.
pub static OPS: &[&OpInfo] = &[&ADD_SCALED];

fn case(g: &mut Gen, terms: usize) -> Result<Case> {
    let shape = g.shape(2);
    let weights: Vec<f64> = (0..terms).map(|i| [1.0, -0.7, 0.3][i % 3] + g.uniform()).collect();
    let inputs = (0..=terms).map(|_| g.array(&shape)).collect();
    Ok(Case::new(inputs, move |t| {
        let terms: Vec<(f64, &Tensor)> = weights.iter().copied().zip(&t[1..]).collect();
        t[0].add_scaled(&terms)
    }))
}

/// y = x + Σ wᵢ·dᵢ of K terms in one loop, added in the given order.
#[inline(always)]
fn one_loop<const K: usize, T: Float>(x: &[T], weights: &[f64], terms: &[&[T]], y: &mut [T]) {
    let n = y.len();
    let (x, w): (&[T], [f64; K]) = (&x[..n], std::array::from_fn(|k| weights[k]));
    let d: [&[T]; K] = std::array::from_fn(|k| &terms[k][..n]);
    for i in 0..n {
        let mut s = x[i].to_f64();
        for k in 0..K {
            s += w[k] * d[k][i].to_f64();
        }
        y[i] = T::from_f64(s);
    }
}

/// The same for any number of terms, term by term on runs of elements that fit the first-level cache.
#[inline(always)]
fn in_runs<T: Float>(x: &[T], weights: &[f64], terms: &[&[T]], y: &mut [T]) {
    const RUN: usize = 512;
    let mut sums = [0f64; RUN];
    for (at, y) in (0..x.len()).step_by(RUN).zip(y.chunks_mut(RUN)) {
        let sums = &mut sums[..y.len()];
        sums.iter_mut().zip(&x[at..]).for_each(|(s, x)| *s = x.to_f64());
        for (w, d) in weights.iter().zip(terms) {
            sums.iter_mut().zip(&d[at..]).for_each(|(s, d)| *s += w * d.to_f64());
        }
        y.iter_mut().zip(sums.iter()).for_each(|(y, s)| *y = T::from_f64(*s));
    }
}

fn forward<T: Float>(arrays: &[Array], weights: &[f64]) -> Result<Array> {
    let x = arrays[0].as_slice::<T>()?;
    let terms = arrays[1..].iter().map(|a| a.as_slice::<T>()).collect::<Result<Vec<_>>>()?;
    let mut out = Array::uninit(arrays[0].shape(), T::DTYPE);
    par_units(out.fresh_mut::<T>(), 1, GRAIN, |r, y| {
        let (x, terms) = (&x[r.clone()], terms.iter().map(|d| &d[r.clone()]).collect::<SmallVec<[&[T]; 8]>>());
        simd(
            #[inline(always)]
            || match terms.len() {
                1 => one_loop::<1, T>(x, weights, &terms, y),
                2 => one_loop::<2, T>(x, weights, &terms, y),
                3 => one_loop::<3, T>(x, weights, &terms, y),
                4 => one_loop::<4, T>(x, weights, &terms, y),
                5 => one_loop::<5, T>(x, weights, &terms, y),
                6 => one_loop::<6, T>(x, weights, &terms, y),
                _ => in_runs(x, weights, &terms, y),
            },
        );
    });
    Ok(out)
}

/// The weights of the terms.
struct Back(Vec<f64>);

impl Rule for Back {
    fn info(&self) -> &'static OpInfo {
        &ADD_SCALED
    }
    fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
        (0..=self.0.len()).map(|_| y.same()).collect()
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        for (i, &w) in self.0.iter().enumerate() {
            if back.needs(i + 1) {
                let scaled = if w == 1.0 { grad.clone() } else { apply::<MulScalar>(grad.clone(), [w, 0.0])? };
                back.input(i + 1, scaled);
            }
        }
        back.input(0, grad);
        Ok(())
    }
}

impl Tensor {
    /// x + Σ wᵢ·dᵢ for pairs (wᵢ, dᵢ) of weights and tensors of one shape and dtype. Each tensor is read once and the result is written
    /// once; sums are computed in f64 in the given order and rounded at the end. Weights are constants: no gradient flows to them.
    ///
    /// # Errors
    /// If shapes or dtypes differ, the dtype is not a float, or a weight is not finite.
    pub fn add_scaled(&self, terms: &[(f64, &Tensor)]) -> Result<Tensor> {
        let op = "add_scaled";
        let _op = spans::op("add_scaled");
        spans::cost(
            (2 * terms.len() * self.numel()) as f64,
            ((terms.len() + 2) * self.numel() * self.dtype().size()) as f64,
        );
        self.dtype().expect_float(op)?;
        for (i, (w, d)) in terms.iter().enumerate() {
            if d.shape() != self.shape() || d.dtype() != self.dtype() {
                let (own, other) = ((self.shape(), self.dtype()), (d.shape(), d.dtype()));
                let message =
                    format!("term {i} is {:?} {}, and it is added to {:?} {}", other.0, other.1, own.0, own.1);
                return Err(Error::shape(op, message));
            }
            if !w.is_finite() {
                return Err(Error::invalid(op, format!("the weight {w} of term {i} is not finite")));
            }
        }
        let weights: Vec<f64> = terms.iter().map(|t| t.0).collect();
        let parents: Vec<&Tensor> = std::iter::once(self).chain(terms.iter().map(|t| t.1)).collect();
        let y = dispatch_all(
            parents.iter().map(|t| t.array().contiguous()).collect(),
            Half::Native,
            |arrays| with_float!("add_scaled", arrays[0].dtype(), |T| forward::<T>(&arrays, &weights)),
            |gpu, arrays| cuda::add_scaled(gpu, &arrays, &weights),
        )?;
        Ok(Tensor::record(y, &parents, &[], || Back(weights)))
    }
}
