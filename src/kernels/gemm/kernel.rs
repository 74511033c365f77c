//! Micro-kernels: an MR × NR tile of the product, from packed panels.

use crate::base::Float;
use crate::device::cpu::simd::{Level, level, simd};

/// c[i·ldc + j] = Σₖ a[k·MR + i]·b[k·NR + j] for a whole MR × NR tile; with `add`, the sum is added to c.
pub type Into<T> = unsafe fn(kc: usize, a: *const T, b: *const T, c: *mut T, ldc: usize, add: bool);

/// c[i·ldc + j] = Σₖ a[i·lda + k]·b[k·NR + j]: [`Into`] for MR unpacked rows of a left operand, `lda` apart. It adds the same products in
/// the same order, so that the results have the same bits.
pub type FromRows<T> = unsafe fn(kc: usize, a: (*const T, usize), b: *const T, c: *mut T, ldc: usize, add: bool);

/// A micro-kernel and its tile.
#[derive(Clone, Copy)]
pub struct Kernel<T> {
    /// Rows of the tile.
    pub mr: usize,
    /// Columns of the tile.
    pub nr: usize,
    /// The kernel.
    pub into: Into<T>,
    /// The kernel for an unpacked left operand, if there is one.
    pub from_rows: Option<FromRows<T>>,
}

impl<T> Kernel<T> {
    /// Computes the tile into a buffer of its own, row-major.
    ///
    /// # Safety
    /// The panels hold kc·MR and kc·NR elements, the tile MR·NR.
    #[inline(always)]
    pub unsafe fn run(&self, kc: usize, a: *const T, b: *const T, tile: *mut T) {
        // SAFETY: the caller's promise.
        unsafe { (self.into)(kc, a, b, tile, self.nr, false) }
    }
}

/// Largest tile of any kernel, in elements.
pub const MAX_TILE: usize = 12 * 32;

/// A float with a micro-kernel: the type in which products are computed.
pub trait Kernels: Float {
    /// Unit roundoff: the largest relative error of a rounding.
    const UNIT: f64;
    /// The smallest positive number.
    const LEAST: f64;
    /// The best kernel of this machine.
    fn kernel() -> Kernel<Self>;
}

impl Kernels for f32 {
    const UNIT: f64 = f32::EPSILON as f64 / 2.0;
    const LEAST: f64 = f32::from_bits(1) as f64;
    fn kernel() -> Kernel<f32> {
        match level() {
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => Kernel { mr: 12, nr: 32, into: avx512_f32, from_rows: Some(avx512_f32_rows) },
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => Kernel { mr: 6, nr: 16, into: avx2::f32::packed, from_rows: Some(avx2::f32::rows) },
            _ => Kernel { mr: 4, nr: 8, into: generic::<f32, 4, 8>, from_rows: None },
        }
    }
}

impl Kernels for f64 {
    const UNIT: f64 = f64::EPSILON / 2.0;
    const LEAST: f64 = f64::from_bits(1);
    fn kernel() -> Kernel<f64> {
        match level() {
            Level::Avx512 => Kernel { mr: 8, nr: 16, into: fused::<f64, 8, 16>, from_rows: None },
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => Kernel { mr: 6, nr: 8, into: avx2::f64::packed, from_rows: Some(avx2::f64::rows) },
            _ => Kernel { mr: 4, nr: 4, into: generic::<f64, 4, 4>, from_rows: None },
        }
    }
}

/// Portable: a multiplication followed by an addition.
unsafe fn generic<T: Float, const MR: usize, const NR: usize>(
    kc: usize,
    a: *const T,
    b: *const T,
    c: *mut T,
    ldc: usize,
    add: bool,
) {
    // SAFETY: the caller gives panels of kc·MR and kc·NR elements and a tile of MR rows of NR, ldc apart.
    unsafe { body::<T, MR, NR>(kc, a, b, (c, ldc, add), |x, y, s| s + x * y) }
}

/// Vectorised by the compiler, with fused multiply-add.
unsafe fn fused<T: Float, const MR: usize, const NR: usize>(
    kc: usize,
    a: *const T,
    b: *const T,
    c: *mut T,
    ldc: usize,
    add: bool,
) {
    simd(
        #[inline(always)]
        // SAFETY: as above.
        || unsafe { body::<T, MR, NR>(kc, a, b, (c, ldc, add), |x, y, s| x.mul_add(y, s)) },
    )
}

#[inline(always)]
unsafe fn body<T: Float, const MR: usize, const NR: usize>(
    kc: usize,
    a: *const T,
    b: *const T,
    (c, ldc, add): (*mut T, usize, bool),
    fma: impl Fn(T, T, T) -> T,
) {
    let mut acc = [[T::ZERO; NR]; MR];
    for k in 0..kc {
        // SAFETY: panels hold kc·MR and kc·NR elements.
        let (x, y) = unsafe { (&*(a.add(k * MR) as *const [T; MR]), &*(b.add(k * NR) as *const [T; NR])) };
        for i in 0..MR {
            for j in 0..NR {
                acc[i][j] = fma(x[i], y[j], acc[i][j]);
            }
        }
    }
    for (i, row) in acc.iter().enumerate() {
        // SAFETY: the tile has MR rows of NR elements.
        let c = unsafe { &mut *(c.add(i * ldc) as *mut [T; NR]) };
        for (c, &v) in c.iter_mut().zip(row) {
            *c = if add { *c + v } else { v };
        }
    }
}

/// 12 × 32 in 24 accumulators: 24 fused multiply-adds for 2 loads and 12 broadcasts.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512_f32(kc: usize, a: *const f32, b: *const f32, c: *mut f32, ldc: usize, add: bool) {
    // SAFETY: panels hold kc·12 and kc·32 elements, the tile 12 rows of 32.
    unsafe { avx512_f32_body([a, a.add(3), a.add(6), a.add(9)], (1, 12), kc, b, c, ldc, add) }
}

/// The same from unpacked rows: one cache line of each row serves 16 steps of K.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn avx512_f32_rows(kc: usize, (a, lda): (*const f32, usize), b: *const f32, c: *mut f32, ldc: usize, add: bool) {
    // SAFETY: 12 rows of kc elements, lda apart; else as above.
    unsafe { avx512_f32_body([a, a.add(3 * lda), a.add(6 * lda), a.add(9 * lda)], (lda, 1), kc, b, c, ldc, add) }
}

/// Row i of the left operand starts at `a[i / 3] + (i % 3)·row`, so that four pointers and one distance address all rows; its columns are
/// `step` apart. The tile's cache lines are prefetched, so that they have arrived when the sums are complete.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn avx512_f32_body(
    mut a: [*const f32; 4],
    (row, step): (usize, usize),
    kc: usize,
    mut b: *const f32,
    c: *mut f32,
    ldc: usize,
    add: bool,
) {
    use std::arch::x86_64::*;
    const MR: usize = 12;
    let mut acc = [[_mm512_setzero_ps(); 2]; MR];
    for i in 0..MR {
        // A prefetch may name any address.
        _mm_prefetch::<_MM_HINT_T0>(c.wrapping_add(i * ldc).cast());
        _mm_prefetch::<_MM_HINT_T0>(c.wrapping_add(i * ldc + 31).cast());
    }
    for _ in 0..kc {
        // SAFETY: the callers' promise.
        unsafe {
            let (b0, b1) = (_mm512_loadu_ps(b), _mm512_loadu_ps(b.add(16)));
            for (i, acc) in acc.iter_mut().enumerate() {
                let x = _mm512_set1_ps(*a[i / 3].add(i % 3 * row));
                acc[0] = _mm512_fmadd_ps(x, b0, acc[0]);
                acc[1] = _mm512_fmadd_ps(x, b1, acc[1]);
            }
            for a in &mut a {
                *a = a.wrapping_add(step);
            }
            b = b.add(32);
        }
    }
    for (i, acc) in acc.iter().enumerate() {
        for (j, &v) in acc.iter().enumerate() {
            // SAFETY: the tile has 12 rows of 32 elements.
            unsafe {
                let c = c.add(i * ldc + j * 16);
                let v = if add { _mm512_add_ps(_mm512_loadu_ps(c), v) } else { v };
                _mm512_storeu_ps(c, v);
            }
        }
    }
}

/// 6 rows of two 256-bit registers, 12 accumulators in all: 12 fused multiply-adds for 2 loads and 6 broadcasts. Written out by hand,
/// because the compiler keeps the sums of [`fused`] in memory at optimisation level 2.
#[cfg(target_arch = "x86_64")]
mod avx2 {
    macro_rules! kernels {
        ($t:ident, $lanes:literal, $zero:ident, $load:ident, $broadcast:ident, $fma:ident, $plus:ident, $store:ident) => {
            pub mod $t {
                use std::arch::x86_64::*;

                /// [`Into`](super::super::Into) for panels of 6 rows and of two registers' columns.
                #[target_feature(enable = "avx2,fma")]
                pub unsafe fn packed(kc: usize, a: *const $t, b: *const $t, c: *mut $t, ldc: usize, add: bool) {
                    // SAFETY: the caller gives panels of kc·6 and kc·2·lanes elements and a tile of 6 rows, ldc apart.
                    unsafe { tile(a, (1, 6), kc, b, c, ldc, add) }
                }

                /// [`FromRows`](super::super::FromRows) for 6 rows.
                #[target_feature(enable = "avx2,fma")]
                pub unsafe fn rows(
                    kc: usize,
                    (a, lda): (*const $t, usize),
                    b: *const $t,
                    c: *mut $t,
                    ldc: usize,
                    add: bool,
                ) {
                    // SAFETY: 6 rows of kc elements, lda apart; else as above.
                    unsafe { tile(a, (lda, 1), kc, b, c, ldc, add) }
                }

                /// Rows of the left operand are `row` apart, its columns `step` apart.
                #[target_feature(enable = "avx2,fma")]
                #[inline]
                unsafe fn tile(
                    mut a: *const $t,
                    (row, step): (usize, usize),
                    kc: usize,
                    mut b: *const $t,
                    c: *mut $t,
                    ldc: usize,
                    add: bool,
                ) {
                    let mut acc = [[$zero(); 2]; 6];
                    for i in 0..6 {
                        // A prefetch may name any address.
                        _mm_prefetch::<_MM_HINT_T0>(c.wrapping_add(i * ldc).cast());
                        _mm_prefetch::<_MM_HINT_T0>(c.wrapping_add(i * ldc + 2 * $lanes - 1).cast());
                    }
                    for _ in 0..kc {
                        // SAFETY: the callers' promise.
                        unsafe {
                            let y = [$load(b), $load(b.add($lanes))];
                            for (i, acc) in acc.iter_mut().enumerate() {
                                let x = $broadcast(&*a.add(i * row));
                                acc[0] = $fma(x, y[0], acc[0]);
                                acc[1] = $fma(x, y[1], acc[1]);
                            }
                            b = b.add(2 * $lanes);
                        }
                        a = a.wrapping_add(step);
                    }
                    for (i, acc) in acc.iter().enumerate() {
                        for (j, &v) in acc.iter().enumerate() {
                            // SAFETY: the tile has 6 rows of 2·lanes elements.
                            unsafe {
                                let c = c.add(i * ldc + j * $lanes);
                                let v = if add { $plus($load(c), v) } else { v };
                                $store(c, v);
                            }
                        }
                    }
                }
            }
        };
    }
    kernels!(
        f32,
        8,
        _mm256_setzero_ps,
        _mm256_loadu_ps,
        _mm256_broadcast_ss,
        _mm256_fmadd_ps,
        _mm256_add_ps,
        _mm256_storeu_ps
    );
    kernels!(
        f64,
        4,
        _mm256_setzero_pd,
        _mm256_loadu_pd,
        _mm256_broadcast_sd,
        _mm256_fmadd_pd,
        _mm256_add_pd,
        _mm256_storeu_pd
    );
}
