//! Micro-kernels: an MR × NR tile of the product, from packed panels.

use crate::base::Float;
use crate::device::cpu::simd::{Level, level};

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
            Level::Avx512 => Kernel { mr: 12, nr: 32, into: avx512::f32::packed, from_rows: Some(avx512::f32::rows) },
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
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => Kernel { mr: 12, nr: 16, into: avx512::f64::packed, from_rows: Some(avx512::f64::rows) },
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
    let mut acc = [[T::ZERO; NR]; MR];
    for k in 0..kc {
        // SAFETY: the caller gives panels of kc·MR and kc·NR elements.
        let (x, y) = unsafe { (&*(a.add(k * MR) as *const [T; MR]), &*(b.add(k * NR) as *const [T; NR])) };
        for i in 0..MR {
            for j in 0..NR {
                acc[i][j] += x[i] * y[j];
            }
        }
    }
    for (i, row) in acc.iter().enumerate() {
        // SAFETY: the tile has MR rows of NR elements, ldc apart.
        let c = unsafe { &mut *(c.add(i * ldc) as *mut [T; NR]) };
        for (c, &v) in c.iter_mut().zip(row) {
            *c = if add { *c + v } else { v };
        }
    }
}

/// Kernels for x86-64: MR rows of two registers, so 2·MR accumulators, and for each step of K 2·MR fused multiply-adds for 2 loads and MR
/// broadcasts. They are written with intrinsics, because at optimisation level 2 the compiler keeps the sums of a loop in memory.
#[cfg(target_arch = "x86_64")]
macro_rules! kernels {
    (
        $t:ident, $features:literal, $rows:literal, $lanes:literal, $zero:ident, $load:ident, $broadcast:ident, $fma:ident, $plus:ident,
        $store:ident
    ) => {
        pub mod $t {
            use std::arch::x86_64::*;

            /// Groups of three rows.
            const GROUPS: usize = $rows / 3;

            /// [`Into`](super::super::Into) for panels of the tile's rows and columns.
            #[target_feature(enable = $features)]
            pub unsafe fn packed(kc: usize, a: *const $t, b: *const $t, c: *mut $t, ldc: usize, add: bool) {
                // SAFETY: the caller gives panels of kc·MR and kc·2·lanes elements and a tile of MR rows, ldc apart.
                unsafe { tile(groups(a, 1), (1, $rows), kc, b, c, ldc, add) }
            }

            /// [`FromRows`](super::super::FromRows): one cache line of each row serves several steps of K.
            #[target_feature(enable = $features)]
            pub unsafe fn rows(
                kc: usize,
                (a, lda): (*const $t, usize),
                b: *const $t,
                c: *mut $t,
                ldc: usize,
                add: bool,
            ) {
                // SAFETY: MR rows of kc elements, lda apart; else as above.
                unsafe { tile(groups(a, lda), (lda, 1), kc, b, c, ldc, add) }
            }

            /// The first of each group of three rows, which are `row` apart.
            #[inline(always)]
            fn groups(a: *const $t, row: usize) -> [*const $t; GROUPS] {
                std::array::from_fn(|g| a.wrapping_add(3 * g * row))
            }

            /// Rows of the left operand are `row` apart, its columns `step` apart. One pointer for each group of three rows and one distance
            /// address all rows; the pointers come from outside, because the compiler would compute all addresses from one pointer in every
            /// step otherwise. The tile's cache lines are prefetched, so that they have arrived when the sums are complete.
            #[target_feature(enable = $features)]
            #[inline(never)]
            unsafe fn tile(
                mut a: [*const $t; GROUPS],
                (row, step): (usize, usize),
                kc: usize,
                mut b: *const $t,
                c: *mut $t,
                ldc: usize,
                add: bool,
            ) {
                let mut acc = [[$zero(); 2]; $rows];
                for i in 0..$rows {
                    // A prefetch may name any address.
                    _mm_prefetch::<_MM_HINT_T0>(c.wrapping_add(i * ldc).cast());
                    _mm_prefetch::<_MM_HINT_T0>(c.wrapping_add(i * ldc + 2 * $lanes - 1).cast());
                }
                for _ in 0..kc {
                    // SAFETY: the callers' promise.
                    unsafe {
                        let y = [$load(b), $load(b.add($lanes))];
                        for (i, acc) in acc.iter_mut().enumerate() {
                            let x = $broadcast(*a[i / 3].add(i % 3 * row));
                            acc[0] = $fma(x, y[0], acc[0]);
                            acc[1] = $fma(x, y[1], acc[1]);
                        }
                        b = b.add(2 * $lanes);
                    }
                    for a in &mut a {
                        *a = a.wrapping_add(step);
                    }
                }
                for (i, acc) in acc.iter().enumerate() {
                    for (j, &v) in acc.iter().enumerate() {
                        // SAFETY: the tile has MR rows of 2·lanes elements.
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

/// 12 rows of two 512-bit registers.
#[cfg(target_arch = "x86_64")]
mod avx512 {
    #[rustfmt::skip]
    kernels!(
        f32, "avx512f", 12, 16, _mm512_setzero_ps, _mm512_loadu_ps, _mm512_set1_ps, _mm512_fmadd_ps, _mm512_add_ps, _mm512_storeu_ps
    );
    #[rustfmt::skip]
    kernels!(
        f64, "avx512f", 12, 8, _mm512_setzero_pd, _mm512_loadu_pd, _mm512_set1_pd, _mm512_fmadd_pd, _mm512_add_pd, _mm512_storeu_pd
    );
}

/// 6 rows of two 256-bit registers.
#[cfg(target_arch = "x86_64")]
mod avx2 {
    #[rustfmt::skip]
    kernels!(
        f32, "avx2,fma", 6, 8, _mm256_setzero_ps, _mm256_loadu_ps, _mm256_set1_ps, _mm256_fmadd_ps, _mm256_add_ps, _mm256_storeu_ps
    );
    #[rustfmt::skip]
    kernels!(
        f64, "avx2,fma", 6, 4, _mm256_setzero_pd, _mm256_loadu_pd, _mm256_set1_pd, _mm256_fmadd_pd, _mm256_add_pd, _mm256_storeu_pd
    );
}
