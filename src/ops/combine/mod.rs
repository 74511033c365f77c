//! Combination of expert outputs: each token sums the rows of its choices, times their weights.
//!
//! Every token gathers its own k rows in the order of its choices, so that there are no atomics and the bits depend on nothing else in the
//! batch. Memory traffic: forward reads the rows once and writes the tokens once; backward reads the rows and the tokens' gradients once
//! for both gradients (on a GPU once for each).

pub(crate) mod cuda;

use crate::array::Array;
use crate::autograd::{Case, Cotangents, Differentiable, Gen, NO_PARAMS, OpInfo, Owner, Rule, Whose};
use crate::base::{Error, Float, Result};
use crate::device::cpu::par::{GRAIN, par_units};
use crate::device::cpu::shared::Shared;
use crate::device::cpu::simd::simd;
use crate::device::spans;
use crate::kernels::{Exact, Half, dispatch};
use crate::ops::route::{Choice, Gate, Routing, route};
use crate::{Tensor, with_float};
use smallvec::SmallVec;

static COMBINE: OpInfo = OpInfo {
    name: "combine",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[|g: &mut Gen| {
        let (t, d, e) = (g.extent(0, 5), g.extent(1, 5), g.size(1, 5));
        let top_k = g.size(1, e);
        let c = Choice { top_k, gate: Gate::Softmax, renormalise: false };
        let routing = route(&Tensor::new(g.distinct(&[t, e])), &c, None)?.1;
        Ok(Case::new(vec![g.array(&[t * top_k, d]), g.array(&[t, top_k])], move |x| combine(&x[0], &x[1], &routing)))
    }],
};

/// The registry entries of this family.
pub static OPS: &[&OpInfo] = &[&COMBINE];

/// `out[t]` = Σ over its choices s of `w[t, s]`·`y[place[t, s]]`, or the plain sum without weights: `y [N, d]`, `w [T, k]` in the dtype in
/// which `y` is computed; returns `[T, d]`.
pub(crate) fn gather_sum(y: &Array, w: Option<&Array>, routing: &Routing) -> Result<Array> {
    let (t, k, d) = (routing.tokens(), routing.top_k(), y.shape()[1]);
    dispatch(
        [y.contiguous(), routing.places().clone()],
        Half::Native,
        |[y, place]| {
            let mut out = Array::uninit(&[t, d], y.dtype());
            with_float!("combine", y.dtype(), |T| {
                let (y, place) = (y.as_slice::<T>()?, place.as_slice::<u32>()?);
                let w = w.map(|w| w.as_slice::<T>()).transpose()?;
                let grain = (GRAIN / (k * d).max(1)).max(1);
                par_units(out.fresh_mut::<T>(), d.max(1), grain, |tokens, out| {
                    simd(
                        #[inline(always)]
                        || {
                            for (t, out) in tokens.zip(out.chunks_exact_mut(d)) {
                                for s in 0..k {
                                    let at = place[t * k + s] as usize * d;
                                    let (y, w) = (&y[at..at + d], w.map_or(T::ONE, |w| w[t * k + s]));
                                    match s {
                                        0 => out.iter_mut().zip(y).for_each(|(o, &y)| *o = w * y),
                                        _ => out.iter_mut().zip(y).for_each(|(o, &y)| *o += w * y),
                                    }
                                }
                            }
                        },
                    )
                });
                Ok(out)
            })
        },
        |gpu, [y, place]| cuda::gather_sum(gpu, &y, w, &place, (t, k)),
    )
}

/// The gradients of the rows, `w[pair]`·`g[token]`, and of the weights, ⟨`g[t]`, `y[place[t, s]]`⟩. On the CPU both are computed in one
/// pass over the rows.
fn gradients(g: &Array, y: &Array, w: &Array, routing: &Routing) -> Result<(Array, Array)> {
    let (t, k, d, n) = (routing.tokens(), routing.top_k(), g.shape()[1], routing.groups().rows());
    let (dy, Exact(dw)) = dispatch(
        [g.clone(), y.clone(), routing.pairs_of_rows().clone()],
        Half::Native,
        |[g, y, pairs]| {
            let (mut dy, mut dw) = (Array::uninit(&[n, d], g.dtype()), Array::uninit(&[t, k], g.dtype()));
            with_float!("combine", g.dtype(), |T| {
                let (g, y, pairs) = (g.as_slice::<T>()?, y.as_slice::<T>()?, pairs.as_slice::<u32>()?);
                let (w, dw) = (w.as_slice::<T>()?, Shared::new(dw.fresh_mut::<T>()));
                par_units(dy.fresh_mut::<T>(), d.max(1), (GRAIN / d.max(1)).max(1), |rows, dy| {
                    simd(
                        #[inline(always)]
                        || {
                            for (row, dy) in rows.zip(dy.chunks_exact_mut(d)) {
                                let pair = pairs[row] as usize;
                                let (g, y) = (&g[pair / k * d..][..d], &y[row * d..][..d]);
                                dy.iter_mut().zip(g).for_each(|(dy, &g)| *dy = w[pair] * g);
                                // SAFETY: each pair is one row.
                                let dw = unsafe { dw.slice(pair..pair + 1) };
                                dw[0] = dot(g, y);
                            }
                        },
                    )
                });
                Ok(())
            })?;
            Ok((dy, Exact(dw)))
        },
        |gpu, [g, y, pairs]| {
            let place = crate::array::cuda::on(gpu, routing.places())?;
            let dw = cuda::inner(gpu, &g, &y, &place, (t, k))?;
            Ok((cuda::spread(gpu, &g, w, &pairs, (n, k))?, Exact(dw)))
        },
    )?;
    Ok((dy, dw))
}

/// Dot product with sixteen partial sums, so that it is vectorised.
#[inline(always)]
fn dot<T: Float>(a: &[T], b: &[T]) -> T {
    let mut sums = [T::ZERO; 16];
    let (x, y) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: T = x.remainder().iter().zip(y.remainder()).map(|(&a, &b)| a * b).sum();
    for (a, b) in x.zip(y) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(s, (&a, &b))| *s += a * b);
    }
    sums.into_iter().sum::<T>() + rest
}

struct Back {
    y: Array,
    w: Array,
    routing: Routing,
}

impl Rule for Back {
    fn info(&self) -> &'static OpInfo {
        &COMBINE
    }
    fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
        let tokens = self.routing.tokens();
        let routed = match y.tokens(tokens) {
            o @ (Owner::Mixed | Owner::Unknown | Owner::All) => o,
            o => Owner::Routed(Box::new(o)),
        };
        SmallVec::from_iter([routed, y.by_rows(tokens, tokens * self.routing.top_k())])
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        let g = grad.contiguous();
        let (dy, dw) = gradients(&g, &self.y, &self.w, &self.routing)?;
        if back.needs(0) {
            back.input(0, dy);
        }
        if back.needs(1) {
            back.input(1, dw);
        }
        Ok(())
    }
}

/// The weighted sum of each token's rows: `y [T·k, d]` in the order of `routing`, `weights [T, k]`; returns `[T, d]` of `y`'s dtype
/// (Shazeer et al. 2017, equation 1). Weights are used in the precision in which `y` is computed.
pub fn combine(y: &Tensor, weights: &Tensor, routing: &Routing) -> Result<Tensor> {
    let _op = spans::op("combine");
    let op = "combine";
    y.dtype().expect_float(op)?;
    let (t, k, n) = (routing.tokens(), routing.top_k(), routing.groups().rows());
    let &[rows, d] = y.shape() else {
        return Err(Error::shape(op, format!("rows {:?} must be [{n}, d]", y.shape())));
    };
    if rows != n || weights.shape() != [t, k] {
        let message =
            format!("rows {:?} and weights {:?} for {t} tokens with {k} rows each", y.shape(), weights.shape());
        return Err(Error::shape(op, message));
    }
    spans::cost((2 * n * d) as f64, ((n + t) * d * y.dtype().size()) as f64);
    let weights = &weights.cast(y.dtype().compute())?;
    let (ya, w) = (y.array().contiguous(), weights.array().contiguous());
    let w = match ya.gpu() {
        Some(gpu) => crate::array::cuda::on(gpu, &w)?,
        None => w,
    };
    let out = gather_sum(&ya, Some(&w), routing)?;
    Ok(Tensor::record(out, &[y, weights], &[], || Back { y: ya, w, routing: routing.clone() }))
}
