//! Packing: operands rearranged into panels that a micro-kernel reads in order.

use super::super::simd::simd;
use super::{Mat, copy_row};
use crate::tensor::Float;

/// Columns `k0..k0 + kc` of rows `i0..i0 + mr` of `a`, k-major: out[k·mr + i]. Rows past the end are zeros. `scale`
/// multiplies column k by scale[k].
pub fn pack_a<T: Float>(a: &Mat<T>, i0: usize, mr: usize, k0: usize, kc: usize, scale: Option<&[T]>, out: &mut [T]) {
    panel(a.data, (a.rs, a.cs), i0, a.rows, mr, k0, kc, out);
    if let Some(s) = scale {
        for (row, &s) in out.chunks_exact_mut(mr).zip(&s[k0..k0 + kc]) {
            row.iter_mut().for_each(|x| *x *= s);
        }
    }
}

/// Rows `k0..k0 + kc` of columns `j0..j0 + nr` of `b`, k-major: out[k·nr + j]. Columns past the end are zeros.
pub fn pack_b<T: Float>(b: &Mat<T>, j0: usize, nr: usize, k0: usize, kc: usize, out: &mut [T]) {
    panel(b.data, (b.cs, b.rs), j0, b.cols, nr, k0, kc, out);
}

/// out[k·w + i] = data[(i0 + i)·si + (k0 + k)·sk] for i < w, zero where i0 + i ≥ n.
#[allow(clippy::too_many_arguments)]
fn panel<T: Float>(
    data: &[T],
    (si, sk): (usize, usize),
    i0: usize,
    n: usize,
    w: usize,
    k0: usize,
    kc: usize,
    out: &mut [T],
) {
    let live = w.min(n - i0);
    let out = &mut out[..kc * w];
    let at = |i: usize, k: usize| (i0 + i) * si + (k0 + k) * sk;
    if live < w {
        out.fill(T::ZERO);
    }
    if si == 1 {
        // Contiguous across the panel: copies.
        simd(
            #[inline(always)]
            || {
                for (k, row) in out.chunks_exact_mut(w).enumerate() {
                    let o = at(0, k);
                    copy_row(&data[o..o + live], &mut row[..live]);
                }
            },
        );
        return;
    }
    // Contiguous (or not) along k: transposed in 4 × 4 blocks.
    let full = if sk == 1 { live / 4 * 4 } else { 0 };
    simd(
        #[inline(always)]
        || {
            for i in (0..full).step_by(4) {
                let rows: [&[T]; 4] = std::array::from_fn(|r| &data[at(i + r, 0)..at(i + r, 0) + kc]);
                let [r0, r1, r2, r3] = rows;
                for k in 0..kc {
                    let o = &mut out[k * w + i..k * w + i + 4];
                    o[0] = r0[k];
                    o[1] = r1[k];
                    o[2] = r2[k];
                    o[3] = r3[k];
                }
            }
        },
    );
    for i in full..live {
        for k in 0..kc {
            out[k * w + i] = data[at(i, k)];
        }
    }
}
