//! Loops of cross-entropy over rows.

use crate::base::Float;
use crate::device::cpu::shared::Shared;
use crate::kernels::lanes::{lanes, max_of, rows};

/// Rows whose target is `usize::MAX` are ignored. Writes for each row the loss, and separately the largest logit m and z = ln Σ exp(x − m),
/// because their sum would lose precision if m is large. With smoothing s the loss is z − (1 − s)·(`x[target]` − m) − s·mean(x − m).
pub fn cross_entropy<T: Float>(x: &[T], d: usize, targets: &[usize], smoothing: T, loss: &mut [T], lse: &mut [T]) {
    let inv = T::ONE / T::from_f64(d as f64);
    let (loss, lse) = (Shared::new(loss), Shared::new(lse));
    rows(
        targets.len(),
        d,
        #[inline(always)]
        |r| {
            // SAFETY: each row is written once.
            let (l, z) = unsafe { (loss.slice(r..r + 1), lse.slice(2 * r..2 * r + 2)) };
            if targets[r] == usize::MAX {
                l[0] = T::ZERO;
                return z.fill(T::ZERO);
            }
            let x = &x[r * d..(r + 1) * d];
            let m = max_of(x);
            z[0] = m;
            z[1] = lanes(
                [x],
                #[inline(always)]
                |[x]| (x - m).exp(),
            )
            .ln();
            l[0] = z[1] - (T::ONE - smoothing) * (x[targets[r]] - m);
            if smoothing != T::ZERO {
                l[0] = l[0]
                    - smoothing
                        * inv
                        * lanes(
                            [x],
                            #[inline(always)]
                            |[x]| x - m,
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
            let (x, m, z, w) = (&x[r * d..(r + 1) * d], lse[2 * r], lse[2 * r + 1], weight[r]);
            {
                for i in 0..d {
                    o[i] = w * ((x[i] - m - z).exp() - even);
                }
            }
            o[targets[r]] += -w * (T::ONE - smoothing);
        },
    );
}
