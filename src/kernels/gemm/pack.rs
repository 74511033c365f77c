//! Packing: operands are rearranged into panels that a micro-kernel reads in order.

use crate::base::Float;
use crate::device::cpu::simd::simd;
use crate::kernels::gemm::{Mat, copy_row};

/// Columns `k0..k0 + kc` of rows `i0..i0 + mr` of `a`, k-major: out[k·mr + i]. Rows past the end are zeros. `scale`
/// multiplies column k by scale[k].
pub fn pack_a<T: Float>(a: &Mat<T>, i0: usize, mr: usize, k0: usize, kc: usize, scale: Option<&[T]>, out: &mut [T]) {
    pack_rows(a, None, i0, mr, k0, kc, out);
    scale_columns(mr, k0, scale, &mut out[..kc * mr]);
}

/// Multiplies the packed columns `k0..` of `a` by the scale of each column.
pub fn scale_columns<T: Float>(mr: usize, k0: usize, scale: Option<&[T]>, packed: &mut [T]) {
    if let Some(s) = scale {
        for (row, &s) in packed.chunks_exact_mut(mr).zip(&s[k0..]) {
            row.iter_mut().for_each(|x| *x *= s);
        }
    }
}

/// [`pack_a`] of the rows `index[i0..i0 + mr]` of `a`, where the number of rows is the length of the index; without an index, of the rows
/// themselves.
pub fn pack_rows<T: Float>(
    a: &Mat<T>,
    index: Option<&[u32]>,
    i0: usize,
    mr: usize,
    k0: usize,
    kc: usize,
    out: &mut [T],
) {
    panel(a.data, (a.rs, a.cs), index, i0, index.map_or(a.rows, <[u32]>::len), mr, k0, kc, out);
}

/// Rows `k0..k0 + kc` of columns `j0..j0 + nr` of `b`, k-major: out[k·nr + j]. Columns past the end are zeros.
pub fn pack_b<T: Float>(b: &Mat<T>, j0: usize, nr: usize, k0: usize, kc: usize, out: &mut [T]) {
    panel(b.data, (b.cs, b.rs), None, j0, b.cols, nr, k0, kc, out);
}

/// out[k·w + i] = data[(i0 + i)·si + (k0 + k)·sk] for i < w, and zero for i0 + i ≥ n; with an index, `index[i0 + i]` replaces
/// i0 + i.
#[allow(clippy::too_many_arguments)]
fn panel<T: Float>(
    data: &[T],
    (si, sk): (usize, usize),
    index: Option<&[u32]>,
    i0: usize,
    n: usize,
    w: usize,
    k0: usize,
    kc: usize,
    out: &mut [T],
) {
    if kc == 0 {
        return;
    }
    let live = w.min(n - i0);
    let out = &mut out[..kc * w];
    let at = |i: usize, k: usize| index.map_or(i0 + i, |x| x[i0 + i] as usize) * si + (k0 + k) * sk;
    if live < w {
        out.fill(T::ZERO);
    }
    if si == 1 && index.is_none() {
        // Contiguous across the panel: rows are copied.
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
    // Contiguous (or not) along k: elements are transposed in 4 × 4 blocks.
    let full = if sk == 1 { live / 4 * 4 } else { 0 };
    #[cfg(target_arch = "x86_64")]
    if T::DTYPE == crate::DType::F32 {
        let (data, out): (&[f32], &mut [f32]) = (bytemuck::cast_slice(data), bytemuck::cast_slice_mut(out));
        for i in (0..full).step_by(4) {
            let rows = std::array::from_fn(|r| &data[at(i + r, 0)..at(i + r, 0) + kc]);
            turn4(rows, &mut out[i..], w);
        }
        for i in full..live {
            let from = at(i, 0);
            for k in 0..kc {
                out[k * w + i] = data[from + k * sk];
            }
        }
        return;
    }
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
        let from = at(i, 0);
        for k in 0..kc {
            out[k * w + i] = data[from + k * sk];
        }
    }
}

/// out[k·w + r] = rows[r][k], by 4 × 4 blocks in registers.
#[cfg(target_arch = "x86_64")]
fn turn4(rows: [&[f32]; 4], out: &mut [f32], w: usize) {
    use std::arch::x86_64::*;
    let kc = rows[0].len();
    let mut k = 0;
    while k + 4 <= kc {
        assert!(rows.iter().all(|r| r.len() >= k + 4) && out.len() >= (k + 3) * w + 4);
        // SAFETY: every row holds k + 4 elements and the last store ends within `out`, as asserted; SSE is part of x86-64.
        unsafe {
            let [mut a, mut b, mut c, mut d] = rows.map(|r| _mm_loadu_ps(r.as_ptr().add(k)));
            _MM_TRANSPOSE4_PS(&mut a, &mut b, &mut c, &mut d);
            for (j, v) in [a, b, c, d].into_iter().enumerate() {
                _mm_storeu_ps(out.as_mut_ptr().add((k + j) * w), v);
            }
        }
        k += 4;
    }
    for k in k..kc {
        for (r, row) in rows.iter().enumerate() {
            out[k * w + r] = row[k];
        }
    }
}

/// Transposes a 16 × 16 block: to[j·w + i] = from[i·v + j] for i and j below 16.
#[inline(always)]
pub fn turn(from: &[u32], v: usize, to: &mut [u32], w: usize) {
    let (from, to) = (&from[..15 * v + 16], &mut to[..15 * w + 16]);
    #[cfg(target_arch = "x86_64")]
    for i in (0..16).step_by(4) {
        for j in (0..16).step_by(4) {
            use std::arch::x86_64::*;
            // SAFETY: both slices hold 16 rows of 16, as they were cut; SSE is part of x86-64.
            unsafe {
                let row = |r: usize| _mm_loadu_ps(from.as_ptr().add((i + r) * v + j).cast());
                let (mut a, mut b, mut c, mut d) = (row(0), row(1), row(2), row(3));
                _MM_TRANSPOSE4_PS(&mut a, &mut b, &mut c, &mut d);
                let to = to.as_mut_ptr().add(j * w + i).cast::<f32>();
                _mm_storeu_ps(to, a);
                _mm_storeu_ps(to.add(w), b);
                _mm_storeu_ps(to.add(2 * w), c);
                _mm_storeu_ps(to.add(3 * w), d);
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    for i in 0..16 {
        for j in 0..16 {
            to[j * w + i] = from[i * v + j];
        }
    }
}
