//! Elementwise loops over strided arrays in one pass over memory, vectorised where operands are contiguous.
//!
//! Cost: every operand is read once and the result is written once; on arrays larger than the cache this memory traffic is the whole cost.

pub(crate) mod cuda;

use crate::array::Array;
use crate::array::shape::{Nest, broadcast, broadcast_strides};
use crate::base::{Element, Result};
use crate::device::cpu::par::{GRAIN, par_chunks};
use crate::device::cpu::shared::Shared;
use crate::device::cpu::simd::simd;

/// Applies `f` to every element, into a new contiguous array.
pub fn map<S: Element, D: Element>(a: &Array, f: impl Fn(S) -> D + Sync + Copy) -> Result<Array> {
    let mut out = Array::uninit(a.shape(), D::DTYPE);
    let nest = Nest::new(a.shape(), [a.strides()]);
    let (src, dst) = (a.raw::<S>()?, Shared::new(out.fresh_mut::<D>()));
    runs(a.numel(), nest.inner, |row, col, at, len| {
        let [o] = nest.offsets(row);
        // SAFETY: runs are disjoint.
        let d = unsafe { dst.slice(at..at + len) };
        if nest.step[0] == 1 {
            let s = &src[o + col..o + col + len];
            simd(
                #[inline(always)]
                || {
                    for (d, &s) in d.iter_mut().zip(s) {
                        *d = f(s);
                    }
                },
            );
        } else {
            let (s, step) = (&src[o + col * nest.step[0]..], nest.step[0]);
            d.iter_mut().enumerate().for_each(|(i, d)| *d = f(s[i * step]));
        }
    });
    Ok(out)
}

/// Applies `f` to every element, in the array's own buffer if no other handle shares it.
pub fn map_owned<T: Element>(mut a: Array, f: impl Fn(T) -> T + Sync + Copy) -> Result<Array> {
    if !a.is_contiguous() || !a.is_unique() {
        return map::<T, T>(&a, f);
    }
    let n = a.numel();
    let dst = Shared::new(a.fresh_mut::<T>());
    par_chunks(n, GRAIN, |r| {
        // SAFETY: chunks are disjoint.
        let d = unsafe { dst.slice(r) };
        simd(
            #[inline(always)]
            || {
                for d in d.iter_mut() {
                    *d = f(*d);
                }
            },
        );
    });
    Ok(a)
}

/// Applies `f` to the pairs of two broadcast operands.
pub fn zip<A: Element, B: Element, D: Element>(
    op: &'static str,
    a: &Array,
    b: &Array,
    f: impl Fn(A, B) -> D + Sync + Copy,
) -> Result<Array> {
    let shape = broadcast(op, a.shape(), b.shape())?;
    let sa = broadcast_strides(op, a.shape(), a.strides(), &shape)?;
    let sb = broadcast_strides(op, b.shape(), b.strides(), &shape)?;
    let mut out = Array::uninit(&shape, D::DTYPE);
    let nest = Nest::new(&shape, [&sa, &sb]);
    let n = out.numel();
    let (x, y, dst) = (a.raw::<A>()?, b.raw::<B>()?, Shared::new(out.fresh_mut::<D>()));
    runs(n, nest.inner, |row, col, at, len| {
        let [ox, oy] = nest.offsets(row);
        let [sx, sy] = nest.step;
        let (x, y) = (&x[ox + col * sx..], &y[oy + col * sy..]);
        // SAFETY: runs are disjoint.
        let d = unsafe { dst.slice(at..at + len) };
        match (sx, sy) {
            (1, 1) => simd(
                #[inline(always)]
                || {
                    for ((d, &x), &y) in d.iter_mut().zip(&x[..len]).zip(&y[..len]) {
                        *d = f(x, y);
                    }
                },
            ),
            (1, 0) => {
                let y = y[0];
                simd(
                    #[inline(always)]
                    || {
                        for (d, &x) in d.iter_mut().zip(&x[..len]) {
                            *d = f(x, y);
                        }
                    },
                )
            }
            (0, 1) => {
                let x = x[0];
                simd(
                    #[inline(always)]
                    || {
                        for (d, &y) in d.iter_mut().zip(&y[..len]) {
                            *d = f(x, y);
                        }
                    },
                )
            }
            _ => d.iter_mut().enumerate().for_each(|(i, d)| *d = f(x[i * sx], y[i * sy])),
        }
    });
    Ok(out)
}

/// Applies `f` to the pairs of two arrays of one shape, in the first one's buffer if no other handle shares it.
pub fn zip_owned<T: Element, B: Element>(
    op: &'static str,
    mut a: Array,
    b: &Array,
    f: impl Fn(T, B) -> T + Sync + Copy,
) -> Result<Array> {
    if a.shape() != b.shape() || !a.is_contiguous() || !b.is_contiguous() || !a.is_unique() {
        return zip::<T, B, T>(op, &a, b, f);
    }
    let n = a.numel();
    let (dst, y) = (Shared::new(a.fresh_mut::<T>()), b.raw::<B>()?);
    par_chunks(n, GRAIN, |r| {
        // SAFETY: chunks are disjoint.
        let d = unsafe { dst.slice(r.clone()) };
        let y = &y[r];
        simd(
            #[inline(always)]
            || {
                for (d, &y) in d.iter_mut().zip(y) {
                    *d = f(*d, y);
                }
            },
        );
    });
    Ok(a)
}

/// `a` where the mask is not 0, `b` elsewhere; all of one shape, in any strides.
pub fn select<T: Element>(mask: &Array, a: &Array, b: &Array) -> Result<Array> {
    let mut out = Array::uninit(mask.shape(), T::DTYPE);
    let nest = Nest::new(mask.shape(), [mask.strides(), a.strides(), b.strides()]);
    let n = out.numel();
    let (m, x, y, dst) = (mask.raw::<u8>()?, a.raw::<T>()?, b.raw::<T>()?, Shared::new(out.fresh_mut::<T>()));
    runs(n, nest.inner, |row, col, at, len| {
        let [om, ox, oy] = nest.offsets(row);
        let [sm, sx, sy] = nest.step;
        let (m, x, y) = (&m[om + col * sm..], &x[ox + col * sx..], &y[oy + col * sy..]);
        // SAFETY: runs are disjoint.
        let d = unsafe { dst.slice(at..at + len) };
        if nest.step == [1; 3] {
            let picks = m[..len].iter().zip(&x[..len]).zip(&y[..len]);
            d.iter_mut().zip(picks).for_each(|(d, ((&m, &x), &y))| *d = if m != 0 { x } else { y });
        } else {
            d.iter_mut().enumerate().for_each(|(i, d)| *d = if m[i * sm] != 0 { x[i * sx] } else { y[i * sy] });
        }
    });
    Ok(out)
}

/// Splits `n` elements, stored as runs of `inner`, into parallel pieces `(row, first column, position, length)`.
fn runs(n: usize, inner: usize, f: impl Fn(usize, usize, usize, usize) + Sync) {
    par_chunks(n, GRAIN, |range| {
        let mut at = range.start;
        while at < range.end {
            let (row, col) = (at / inner, at % inner);
            let len = (inner - col).min(range.end - at);
            f(row, col, at, len);
            at += len;
        }
    });
}

/// x ← f(x) over a slice.
pub fn for_each_mut<T: Element>(x: &mut [T], f: impl Fn(T) -> T + Sync + Copy) {
    let n = x.len();
    let x = Shared::new(x);
    par_chunks(n, GRAIN, |r| {
        // SAFETY: chunks are disjoint.
        let x = unsafe { x.slice(r) };
        simd(
            #[inline(always)]
            || {
                for x in x.iter_mut() {
                    *x = f(*x);
                }
            },
        );
    });
}
