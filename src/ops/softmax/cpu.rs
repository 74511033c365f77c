//! Loops of softmax over rows.

use crate::base::Float;
use crate::device::cpu::shared::Shared;
use crate::kernels::lanes::{lanes, max_of, rows};

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
                let z = lanes(
                    [x],
                    #[inline(always)]
                    |[x]| (x - m).exp(),
                )
                .ln();
                {
                    for i in 0..d {
                        y[i] = x[i] - m - z;
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
