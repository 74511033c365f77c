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
use std::ops::Range;

/// Elements of an operand that is not contiguous, or is one repeated element, that are gathered before a loop over them.
const BLOCK: usize = 256;

/// Applies `f` to every element, into a new contiguous array.
pub fn map<S: Element, D: Element>(a: &Array, f: impl Fn(S) -> D + Sync + Copy) -> Result<Array> {
    map_blocks(a, &|d: &mut [D], x: &[S]| {
        simd(
            #[inline(always)]
            || {
                let x = &x[..d.len()];
                for i in 0..d.len() {
                    d[i] = f(x[i]);
                }
            },
        )
    })
}

/// Applies `f` to every element, in the array's own buffer if no other handle shares it.
pub fn map_owned<T: Element>(mut a: Array, f: impl Fn(T) -> T + Sync + Copy) -> Result<Array> {
    if !a.is_contiguous() || !a.is_unique() {
        return map::<T, T>(&a, f);
    }
    for_each_mut(a.fresh_mut::<T>(), f);
    Ok(a)
}

/// Applies `f` to the pairs of two broadcast operands.
pub fn zip<A: Element, B: Element, D: Element>(
    op: &'static str,
    a: &Array,
    b: &Array,
    f: impl Fn(A, B) -> D + Sync + Copy,
) -> Result<Array> {
    zip_blocks(op, a, b, &|d: &mut [D], x: &[A], y: &[B]| {
        simd(
            #[inline(always)]
            || {
                let (x, y) = (&x[..d.len()], &y[..d.len()]);
                for i in 0..d.len() {
                    d[i] = f(x[i], y[i]);
                }
            },
        )
    })
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
        let (d, y) = (unsafe { dst.slice(r.clone()) }, &y[r]);
        simd(
            #[inline(always)]
            || {
                let y = &y[..d.len()];
                for i in 0..d.len() {
                    d[i] = f(d[i], y[i]);
                }
            },
        );
    });
    Ok(a)
}

/// What surrounds the loop of [`map`]: `each(results, elements)` over contiguous slices. It is compiled once for each pair of types and
/// not for each function.
fn map_blocks<S: Element, D: Element>(a: &Array, each: &(dyn Fn(&mut [D], &[S]) + Sync)) -> Result<Array> {
    let mut out = Array::uninit(a.shape(), D::DTYPE);
    let nest = Nest::new(a.shape(), [a.strides()]);
    let (x, dst) = (a.raw::<S>()?, Shared::new(out.fresh_mut::<D>()));
    par_chunks(a.numel(), GRAIN, |range| {
        let mut block = [S::default(); BLOCK];
        runs(&nest, range, |[o], at, len| {
            // SAFETY: runs are disjoint.
            let d = unsafe { dst.slice(at..at + len) };
            let mut x = Run::new(&x[o..], nest.step[0], len, &mut block);
            let piece = x.piece(len);
            for (i, d) in d.chunks_mut(piece).enumerate() {
                each(d, x.take(i * piece, d.len()));
            }
        });
    });
    Ok(out)
}

/// A loop over results and two contiguous operands.
type Pairs<'a, A, B, D> = dyn Fn(&mut [D], &[A], &[B]) + Sync + 'a;

/// What surrounds the loop of [`zip`].
fn zip_blocks<A: Element, B: Element, D: Element>(
    op: &'static str,
    a: &Array,
    b: &Array,
    each: &Pairs<'_, A, B, D>,
) -> Result<Array> {
    let shape = broadcast(op, a.shape(), b.shape())?;
    let sa = broadcast_strides(op, a.shape(), a.strides(), &shape)?;
    let sb = broadcast_strides(op, b.shape(), b.strides(), &shape)?;
    let mut out = Array::uninit(&shape, D::DTYPE);
    let nest = Nest::new(&shape, [&sa, &sb]);
    let n = out.numel();
    let (x, y, dst) = (a.raw::<A>()?, b.raw::<B>()?, Shared::new(out.fresh_mut::<D>()));
    par_chunks(n, GRAIN, |range| {
        let (mut block_x, mut block_y) = ([A::default(); BLOCK], [B::default(); BLOCK]);
        runs(&nest, range, |[ox, oy], at, len| {
            // SAFETY: runs are disjoint.
            let d = unsafe { dst.slice(at..at + len) };
            let mut x = Run::new(&x[ox..], nest.step[0], len, &mut block_x);
            let mut y = Run::new(&y[oy..], nest.step[1], len, &mut block_y);
            let piece = x.piece(len).min(y.piece(len));
            for (i, d) in d.chunks_mut(piece).enumerate() {
                let start = i * piece;
                each(d, x.take(start, d.len()), y.take(start, d.len()));
            }
        });
    });
    Ok(out)
}

/// A run of one operand, read as contiguous slices.
struct Run<'a, T> {
    x: &'a [T],
    step: usize,
    block: &'a mut [T; BLOCK],
}

impl<'a, T: Element> Run<'a, T> {
    /// The run of `len` elements that begins with the first of `x` and goes on at `step`.
    fn new(x: &'a [T], step: usize, len: usize, block: &'a mut [T; BLOCK]) -> Run<'a, T> {
        if step == 0 {
            block[..len.min(BLOCK)].fill(x[0]);
        }
        Run { x, step, block }
    }
    /// The most elements that [`Run::take`] gives of `len`.
    fn piece(&self, len: usize) -> usize {
        if self.step == 1 { len } else { BLOCK }
    }
    /// `len` elements from number `start` on.
    fn take(&mut self, start: usize, len: usize) -> &[T] {
        match self.step {
            1 => return &self.x[start..start + len],
            0 => {}
            step => (0..len).for_each(|i| self.block[i] = self.x[(start + i) * step]),
        }
        &self.block[..len]
    }
}

/// `a` where the mask is not 0, `b` elsewhere; all of one shape, in any strides.
pub fn select<T: Element>(mask: &Array, a: &Array, b: &Array) -> Result<Array> {
    let mut out = Array::uninit(mask.shape(), T::DTYPE);
    let nest = Nest::new(mask.shape(), [mask.strides(), a.strides(), b.strides()]);
    let n = out.numel();
    let (m, x, y, dst) = (mask.raw::<u8>()?, a.raw::<T>()?, b.raw::<T>()?, Shared::new(out.fresh_mut::<T>()));
    par_chunks(n, GRAIN, |range| {
        runs(&nest, range, |[om, ox, oy], at, len| {
            let [sm, sx, sy] = nest.step;
            let (m, x, y) = (&m[om..], &x[ox..], &y[oy..]);
            // SAFETY: runs are disjoint.
            let d = unsafe { dst.slice(at..at + len) };
            if nest.step == [1; 3] {
                let (m, x, y) = (&m[..len], &x[..len], &y[..len]);
                for i in 0..len {
                    d[i] = if m[i] != 0 { x[i] } else { y[i] };
                }
            } else {
                for i in 0..len {
                    d[i] = if m[i * sm] != 0 { x[i * sx] } else { y[i * sy] };
                }
            }
        });
    });
    Ok(out)
}

/// Calls `f(offset in each operand, position in the result, length)` for each run, or part of one, in a range of a nest's elements.
fn runs<const N: usize>(nest: &Nest<N>, range: Range<usize>, mut f: impl FnMut([usize; N], usize, usize)) {
    let mut at = range.start;
    while at < range.end {
        let (row, col) = (at / nest.inner, at % nest.inner);
        let len = (nest.inner - col).min(range.end - at);
        let mut from = nest.offsets(row);
        for k in 0..N {
            from[k] += col * nest.step[k];
        }
        f(from, at, len);
        at += len;
    }
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
