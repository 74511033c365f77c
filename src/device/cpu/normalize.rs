//! Row kernels of the norms, softmax and cross-entropy: one pass over memory forward, one backward.

use super::elementwise::GRAIN;
use super::par::par_chunks;
use super::shared::Shared;
use super::simd::simd;
use crate::tensor::Float;

/// Partial sums, one vector of them.
const LANES: usize = 16;

/// Σ f(x₀[i], x₁[i], …) over slices of one length, for the `M` results of f: lanes, then the lanes in order, then what
/// is left over. Whole vectors are taken as arrays, because an index that might be out of bounds stops the compiler
/// from vectorising.
#[inline(always)]
fn lanes_of<T: Float, const N: usize, const M: usize>(x: [&[T]; N], f: impl Fn([T; N]) -> [T; M]) -> [T; M] {
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
fn lanes<T: Float, const N: usize>(x: [&[T]; N], f: impl Fn([T; N]) -> T) -> T {
    lanes_of(
        x,
        #[inline(always)]
        |v| [f(v)],
    )[0]
}

/// max of a row, in lanes; NaN is left to show up in what follows.
#[inline(always)]
fn max_of<T: Float>(x: &[T]) -> T {
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
fn rows(n: usize, d: usize, f: impl Fn(usize) + Sync) {
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

/// y = (x − mean)·rstd·gain + bias per row of `d`; `center` off leaves the mean out (RMS norm). gain and bias repeat
/// every `repeat` rows-of-group elements: element i of a row uses `gain[i]`. Writes mean and rstd per row.
pub fn norm_forward<T: Float>(
    x: &[T],
    (d, center, eps): (usize, bool, T),
    (gain, bias): (Option<&[T]>, Option<&[T]>),
    y: &mut [T],
    stats: &mut [T],
) {
    let n = x.len().checked_div(d).unwrap_or(0);
    let inv = T::ONE / T::from_f64(d as f64);
    let (y, stats) = (Shared::new(y), Shared::new(stats));
    rows(
        n,
        d,
        #[inline(always)]
        |r| {
            let x = &x[r * d..(r + 1) * d];
            // SAFETY: each row is written once.
            let (y, s) = unsafe { (y.slice(r * d..(r + 1) * d), stats.slice(2 * r..2 * r + 2)) };
            let mean = if center {
                lanes(
                    [x],
                    #[inline(always)]
                    |[x]| x,
                ) * inv
            } else {
                T::ZERO
            };
            let var = lanes(
                [x],
                #[inline(always)]
                |[x]| (x - mean) * (x - mean),
            ) * inv;
            let rstd = T::ONE / (var + eps).sqrt();
            (s[0], s[1]) = (mean, rstd);
            match (gain, bias) {
                (Some(g), Some(b)) => {
                    for i in 0..d {
                        y[i] = (x[i] - mean) * rstd * g[i] + b[i];
                    }
                }
                (Some(g), None) => {
                    for i in 0..d {
                        y[i] = (x[i] - mean) * rstd * g[i];
                    }
                }
                (None, Some(b)) => {
                    for i in 0..d {
                        y[i] = (x[i] - mean) * rstd + b[i];
                    }
                }
                (None, None) => {
                    for i in 0..d {
                        y[i] = (x[i] - mean) * rstd;
                    }
                }
            }
        },
    );
}

/// dx = rstd·(h − mean(h) − x̂·mean(h·x̂)) with h = dy·gain; and x̂ itself, which the gain's gradient needs.
pub fn norm_backward<T: Float>(
    (x, stats, dy): (&[T], &[T], &[T]),
    (d, center): (usize, bool),
    gain: Option<&[T]>,
    dx: Option<&mut [T]>,
    xhat: Option<&mut [T]>,
) {
    let n = x.len().checked_div(d).unwrap_or(0);
    let inv = T::ONE / T::from_f64(d as f64);
    let (dx, xhat) = (dx.map(Shared::new), xhat.map(Shared::new));
    rows(
        n,
        d,
        #[inline(always)]
        |r| {
            let (x, dy) = (&x[r * d..(r + 1) * d], &dy[r * d..(r + 1) * d]);
            let (mean, rstd) = (stats[2 * r], stats[2 * r + 1]);
            if let Some(xhat) = &xhat {
                // SAFETY: each row is written once.
                let o = unsafe { xhat.slice(r * d..(r + 1) * d) };
                {
                    for i in 0..d {
                        o[i] = (x[i] - mean) * rstd;
                    }
                }
            }
            let Some(dx) = &dx else { return };
            // SAFETY: each row is written once.
            let o = unsafe { dx.slice(r * d..(r + 1) * d) };
            // rstd·h − x·(rstd²·b) − (rstd·a − mean·rstd²·b), with a = mean(h) and b = rstd·mean(h·(x − mean)).
            let finish = |[a, b]: [T; 2]| {
                let (a, b) = (if center { a * inv } else { T::ZERO }, b * inv * rstd);
                (-rstd * rstd * b, rstd * rstd * b * mean - rstd * a)
            };
            match gain {
                Some(g) => {
                    let g = &g[..d];
                    let (slope, shift) = finish(lanes_of(
                        [dy, g, x],
                        #[inline(always)]
                        |[dy, g, x]| [dy * g, dy * g * (x - mean)],
                    ));
                    for i in 0..d {
                        o[i] = (dy[i] * g[i]).mul_add(rstd, x[i].mul_add(slope, shift));
                    }
                }
                None => {
                    let (slope, shift) = finish(lanes_of(
                        [dy, x],
                        #[inline(always)]
                        |[dy, x]| [dy, dy * (x - mean)],
                    ));
                    for i in 0..d {
                        o[i] = dy[i].mul_add(rstd, x[i].mul_add(slope, shift));
                    }
                }
            }
        },
    );
}

/// Softmax (or its logarithm) of every row.
pub fn softmax<T: Float>(x: &[T], d: usize, log: bool, y: &mut [T]) {
    let n = x.len().checked_div(d).unwrap_or(0);
    let y = Shared::new(y);
    rows(
        n,
        d,
        #[inline(always)]
        |r| {
            let x = &x[r * d..(r + 1) * d];
            // SAFETY: each row is written once.
            let y = unsafe { y.slice(r * d..(r + 1) * d) };
            let m = max_of(x);
            if log {
                let z = m + lanes(
                    [x],
                    #[inline(always)]
                    |[x]| (x - m).exp(),
                )
                .ln();
                {
                    for i in 0..d {
                        y[i] = x[i] - z;
                    }
                }
            } else {
                for i in 0..d {
                    y[i] = (x[i] - m).exp();
                }
                let inv = T::ONE
                    / lanes(
                        [y],
                        #[inline(always)]
                        |[y]| y,
                    );
                {
                    for i in 0..d {
                        y[i] *= inv;
                    }
                }
            }
        },
    );
}

/// dx of softmax: y·(dy − Σ dy·y); of log-softmax: dy − eʸ·Σ dy.
pub fn softmax_backward<T: Float>(y: &[T], dy: &[T], d: usize, log: bool, dx: &mut [T]) {
    let n = y.len().checked_div(d).unwrap_or(0);
    let dx = Shared::new(dx);
    rows(
        n,
        d,
        #[inline(always)]
        |r| {
            let (y, dy) = (&y[r * d..(r + 1) * d], &dy[r * d..(r + 1) * d]);
            // SAFETY: each row is written once.
            let o = unsafe { dx.slice(r * d..(r + 1) * d) };
            if log {
                let s = lanes(
                    [dy],
                    #[inline(always)]
                    |[g]| g,
                );
                {
                    for i in 0..d {
                        o[i] = dy[i] - y[i].exp() * s;
                    }
                }
            } else {
                let s = lanes(
                    [dy, y],
                    #[inline(always)]
                    |[g, y]| g * y,
                );
                {
                    for i in 0..d {
                        o[i] = y[i] * (dy[i] - s);
                    }
                }
            }
        },
    );
}

/// Rows whose target is `usize::MAX` are ignored. Writes loss and log-sum-exp per row: with smoothing s,
/// lse − (1 − s)·`x[target]` − s·mean(x).
pub fn cross_entropy<T: Float>(x: &[T], d: usize, targets: &[usize], smoothing: T, loss: &mut [T], lse: &mut [T]) {
    let inv = T::ONE / T::from_f64(d as f64);
    let (loss, lse) = (Shared::new(loss), Shared::new(lse));
    rows(
        targets.len(),
        d,
        #[inline(always)]
        |r| {
            // SAFETY: each row is written once.
            let (l, z) = unsafe { (loss.slice(r..r + 1), lse.slice(r..r + 1)) };
            if targets[r] == usize::MAX {
                (l[0], z[0]) = (T::ZERO, T::ZERO);
                return;
            }
            let x = &x[r * d..(r + 1) * d];
            let m = max_of(x);
            z[0] = m + lanes(
                [x],
                #[inline(always)]
                |[x]| (x - m).exp(),
            )
            .ln();
            l[0] = z[0] - (T::ONE - smoothing) * x[targets[r]];
            if smoothing != T::ZERO {
                l[0] = l[0]
                    - smoothing
                        * inv
                        * lanes(
                            [x],
                            #[inline(always)]
                            |[x]| x,
                        );
            }
        },
    );
}

/// dx = w·(softmax(x) − (1 − s)·onehot − s/d) per row, zero for ignored rows.
pub fn cross_entropy_backward<T: Float>(
    (x, lse): (&[T], &[T]),
    d: usize,
    targets: &[usize],
    smoothing: T,
    weight: &[T],
    dx: &mut [T],
) {
    let even = smoothing / T::from_f64(d as f64);
    let dx = Shared::new(dx);
    rows(
        targets.len(),
        d,
        #[inline(always)]
        |r| {
            // SAFETY: each row is written once.
            let o = unsafe { dx.slice(r * d..(r + 1) * d) };
            if targets[r] == usize::MAX {
                return o.fill(T::ZERO);
            }
            let (x, z, w) = (&x[r * d..(r + 1) * d], lse[r], weight[r]);
            {
                for i in 0..d {
                    o[i] = w * ((x[i] - z).exp() - even);
                }
            }
            o[targets[r]] += -w * (T::ONE - smoothing);
        },
    );
}
