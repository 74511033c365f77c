//! Row kernels of the norms, softmax and cross-entropy: one pass over memory forward, one backward.

use crate::base::Float;
use crate::device::cpu::par::{GRAIN, par_chunks};
use crate::device::cpu::simd::simd;

/// Partial sums, one vector of them.
const LANES: usize = 16;

/// Σ f(x₀[i], x₁[i], …) over slices of one length, for the `M` results of f: lanes, then the lanes in order, then what
/// is left over. Whole vectors are taken as arrays, because an index that might be out of bounds stops the compiler
/// from vectorising.
#[inline(always)]
pub(crate) fn lanes_of<T: Float, const N: usize, const M: usize>(x: [&[T]; N], f: impl Fn([T; N]) -> [T; M]) -> [T; M] {
    let n = x.iter().map(|x| x.len()).min().unwrap_or(0);
    let zeros = [T::ZERO; LANES];
    let mut acc = [zeros; M];
    let full = n / LANES * LANES;
    for i in (0..full).step_by(LANES) {
        let v: [&[T; LANES]; N] = std::array::from_fn(
            #[inline(always)]
            |k| x[k][i..].first_chunk().unwrap_or(&zeros),
        );
        for l in 0..LANES {
            let y = f(std::array::from_fn(
                #[inline(always)]
                |k| v[k][l],
            ));
            for m in 0..M {
                acc[m][l] += y[m];
            }
        }
    }
    let mut sum = [T::ZERO; M];
    for m in 0..M {
        for l in 0..LANES {
            sum[m] += acc[m][l];
        }
    }
    for i in full..n {
        let y = f(std::array::from_fn(
            #[inline(always)]
            |k| x[k][i],
        ));
        for m in 0..M {
            sum[m] += y[m];
        }
    }
    sum
}

/// One sum of [`lanes_of`].
#[inline(always)]
pub(crate) fn lanes<T: Float, const N: usize>(x: [&[T]; N], f: impl Fn([T; N]) -> T) -> T {
    lanes_of(
        x,
        #[inline(always)]
        |v| [f(v)],
    )[0]
}

/// max of a row, in lanes; NaN is left to show up in what follows.
#[inline(always)]
pub(crate) fn max_of<T: Float>(x: &[T]) -> T {
    let mut acc = [T::NEG_INFINITY; LANES];
    let chunks = x.chunks_exact(LANES);
    let tail = chunks.remainder();
    for c in chunks {
        for l in 0..LANES {
            acc[l] = if c[l] > acc[l] { c[l] } else { acc[l] };
        }
    }
    acc.iter().chain(tail).fold(T::NEG_INFINITY, |m, &x| if x > m { x } else { m })
}

/// Runs `f` on every row number, in parallel pieces of about a grain of elements.
pub(crate) fn rows(n: usize, d: usize, f: impl Fn(usize) + Sync) {
    par_chunks(n, (GRAIN / d.max(1)).max(1), |r| {
        simd(
            #[inline(always)]
            || {
                for i in r {
                    f(i);
                }
            },
        )
    });
}
