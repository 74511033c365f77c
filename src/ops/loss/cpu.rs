//! Loops of cross-entropy over rows.

use crate::base::Float;
use crate::device::cpu::shared::Shared;
use crate::kernels::lanes::{lanes, max_of, rows};

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
