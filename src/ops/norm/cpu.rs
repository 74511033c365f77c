//! Loops of layer, RMS and group norm over rows.

use crate::base::Float;
use crate::device::cpu::shared::Shared;
use crate::kernels::lanes::{lanes, lanes_of, rows};

/// y = (x − mean)·rstd·gain + bias for each row of `d` elements; without `center` the mean is not subtracted (RMS norm). Element i of a row
/// uses `gain[i]` and `bias[i]`. Writes mean and rstd of each row.
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

/// dx = rstd·(h − mean(h) − x̂·mean(h·x̂)) with h = dy·gain; also computes x̂, which the gain's gradient needs.
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
