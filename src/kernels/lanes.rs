//! Row kernels of the norms, softmax and cross-entropy, which pass over memory once forward and once backward.

use crate::base::Float;
use crate::base::dtype::{of_bf16, to_bf16};
use crate::device::cpu::par::{GRAIN, par_chunks};
use crate::device::cpu::pool::Buffer;
use crate::device::cpu::shared::Shared;
use crate::device::cpu::simd::simd;
use half::bf16;
use std::ops::Range;

/// Number of partial sums: one vector.
const LANES: usize = 16;
/// Elements after which new partial sums start, so that the number of additions per element does not grow with the row.
const STRETCH: usize = 64 * LANES;

/// Σ f(x₀[i], x₁[i], …) over slices of one length, for the `M` results of f. Each stretch is summed in lanes, the stretches are added in
/// order, then the lanes in order, then the remaining elements. Whole vectors are read as arrays, because an index that might be out of
/// bounds stops the compiler from vectorising.
#[inline(always)]
pub(crate) fn lanes_of<T: Float, const N: usize, const M: usize>(x: [&[T]; N], f: impl Fn([T; N]) -> [T; M]) -> [T; M] {
    let n = x.iter().map(|x| x.len()).min().unwrap_or(0);
    let zeros = [T::ZERO; LANES];
    let mut acc = [zeros; M];
    let full = n / LANES * LANES;
    for start in (0..full).step_by(STRETCH) {
        let mut part = [zeros; M];
        for i in (start..full.min(start + STRETCH)).step_by(LANES) {
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
                    part[m][l] += y[m];
                }
            }
        }
        for m in 0..M {
            for l in 0..LANES {
                acc[m][l] += part[m][l];
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

/// Maximum of a row, in lanes; it may skip NaN, which the later computation propagates.
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

/// Runs `f` on every row number, in parallel pieces of about one grain of elements.
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

/// Applies a loop over f32 rows to rows of bf16, a block at a time, so that the f32 rows stay in the cache: `f(rows, ins, out)` receives
/// these rows of each input in f32, and f32 rows to fill, which are rounded into the output, if there is one. Rows have `d` elements.
pub(crate) fn bf16_blocks<const N: usize>(
    d: usize,
    inputs: [&[bf16]; N],
    output: Option<&mut [bf16]>,
    f: impl Fn(Range<usize>, [&[f32]; N], Option<&mut [f32]>) + Sync,
) {
    let n = inputs[0].len().checked_div(d).unwrap_or(0);
    let output = output.map(Shared::new);
    par_chunks(n, (GRAIN / 4 / d.max(1)).max(1), |r| {
        let (len, at) = (r.len() * d, r.start * d..r.end * d);
        let mut buffer = Buffer::uninit((N + 1) * len * 4);
        let (ins, out) = buffer.as_mut_slice::<f32>()[..(N + 1) * len].split_at_mut(N * len);
        for (wide, x) in ins.chunks_exact_mut(len).zip(inputs) {
            simd(
                #[inline(always)]
                || wide.iter_mut().zip(&x[at.clone()]).for_each(|(w, &x)| *w = of_bf16(x)),
            );
        }
        let ins: [&[f32]; N] = std::array::from_fn(|k| &ins[k * len..(k + 1) * len]);
        f(r, ins, output.is_some().then_some(&mut *out));
        if let Some(output) = &output {
            // SAFETY: pieces are disjoint ranges of rows.
            let o = unsafe { output.slice(at) };
            simd(
                #[inline(always)]
                || o.iter_mut().zip(out.iter()).for_each(|(o, w)| *o = to_bf16(*w)),
            );
        }
    });
}
