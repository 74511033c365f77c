//! Sums of rows and of columns, in an order that depends only on the shape.
//!
//! On the CPU partial sums are f64 and the result is rounded once, so that a sum of millions of f32 is as accurate as an f32 can be. The
//! time is that of reading the operand, so f64 costs nothing extra.

pub(crate) mod cuda;

use crate::base::{Computed, Element, Float};
use crate::device::cpu::par::par_chunks;
use crate::device::cpu::shared::Shared;
use crate::device::cpu::simd::simd;

/// Independent partial sums of a row, one vector of them.
const LANES: usize = 32;
/// Elements summed before partial sums are combined; also the unit of parallel work.
const BLOCK: usize = 1 << 14;

/// Sum of a slice. Sixteen vectors at a time are added in T (bf16 in f32), in four parallel chains of four, and their sum is added to lanes
/// of f64; the rest is added vector by vector. An element is rounded five times at most before its sum is an f64. The loops run over arrays
/// and use no closures: a call that is not inlined, or an index that might be out of bounds, stops the compiler from vectorising.
#[inline(always)]
pub(crate) fn sum_block<T: Computed>(x: &[T]) -> f64 {
    let mut lanes = [0f64; LANES];
    let (blocks, rest) = x.as_chunks::<{ 16 * LANES }>();
    let (ones, tail) = rest.as_chunks::<LANES>();
    for c in blocks {
        let mut sum = [[T::Wide::ZERO; LANES]; 4];
        for k in 0..4 {
            for l in 0..LANES {
                sum[k][l] = c[k * LANES + l].wide();
            }
        }
        for k in 4..16 {
            for l in 0..LANES {
                sum[k % 4][l] += c[k * LANES + l].wide();
            }
        }
        for l in 0..LANES {
            lanes[l] += ((sum[0][l] + sum[1][l]) + (sum[2][l] + sum[3][l])).to_f64();
        }
    }
    for c in ones {
        for l in 0..LANES {
            lanes[l] += c[l].wide().to_f64();
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            let other = lanes[l + width];
            lanes[l] += other;
        }
        width /= 2;
    }
    tail.iter().fold(lanes[0], |s, &x| s + x.wide().to_f64())
}

/// `out[r]` = `scale` · Σ over row `r` of `x` (`rows` × `cols`, row-major), rounded once. Reads `x` once.
pub fn sum_rows<T: Computed>(x: &[T], (rows, cols): (usize, usize), scale: f64, out: &mut [T]) {
    let blocks = cols.div_ceil(BLOCK).max(1);
    if blocks == 1 {
        let out = Shared::new(out);
        par_chunks(rows, (BLOCK / cols.max(1)).max(1), |r| {
            // SAFETY: chunks are disjoint.
            let o = unsafe { out.slice(r.clone()) };
            simd(
                #[inline(always)]
                || {
                    for (o, r) in o.iter_mut().zip(r) {
                        *o = T::rounded(T::Wide::from_f64(sum_block(&x[r * cols..(r + 1) * cols]) * scale));
                    }
                },
            );
        });
        return;
    }
    let mut part = vec![0f64; rows * blocks];
    let shared = Shared::new(&mut part);
    par_chunks(rows * blocks, 1, |range| {
        for i in range {
            let (r, b) = (i / blocks, i % blocks);
            let piece = &x[r * cols + b * BLOCK..r * cols + ((b + 1) * BLOCK).min(cols)];
            // SAFETY: each index is written once.
            let o = unsafe { shared.slice(i..i + 1) };
            o[0] = simd(
                #[inline(always)]
                || sum_block(piece),
            );
        }
    });
    for r in 0..rows {
        out[r] = T::rounded(T::Wide::from_f64(part[r * blocks..(r + 1) * blocks].iter().sum::<f64>() * scale));
    }
}

/// `out[c]` = `scale` · Σ over column `c` of `x` (`rows` × `cols`, row-major), rounded once. Reads `x` once.
pub fn sum_columns<T: Computed>(x: &[T], (rows, cols): (usize, usize), scale: f64, out: &mut [T]) {
    if rows == 0 || cols == 0 {
        return out.fill(T::from_f64(0.0 * scale));
    }
    // Each block of rows gives partial sums in f64, which are added in order.
    let each = (4 * BLOCK / cols).clamp(8, 4096);
    let blocks = rows.div_ceil(each);
    let mut part = vec![0f64; blocks * cols];
    let shared = Shared::new(&mut part);
    par_chunks(blocks, 1, |range| {
        for b in range {
            // SAFETY: each block has its own partial sums.
            let acc = unsafe { shared.slice(b * cols..(b + 1) * cols) };
            simd(
                #[inline(always)]
                || {
                    // Four rows at a time are added as a tree.
                    let rows = &x[b * each * cols..((b + 1) * each).min(rows) * cols];
                    let quads = rows.chunks_exact(4 * cols);
                    let rest = quads.remainder();
                    for q in quads {
                        let (p, q) = q.split_at(2 * cols);
                        let ((a, b), (c, d)) = (p.split_at(cols), q.split_at(cols));
                        let terms = a.iter().zip(b).zip(c.iter().zip(d));
                        acc.iter_mut().zip(terms).for_each(|(s, ((&a, &b), (&c, &d)))| {
                            *s += ((a.wide() + b.wide()) + (c.wide() + d.wide())).to_f64()
                        });
                    }
                    for row in rest.chunks_exact(cols) {
                        acc.iter_mut().zip(row).for_each(|(a, &x)| *a += x.wide().to_f64());
                    }
                },
            );
        }
    });
    let (first, rest) = part.split_at_mut(cols);
    rest.chunks_exact(cols).for_each(|p| first.iter_mut().zip(p).for_each(|(a, &p)| *a += p));
    out.iter_mut().zip(first).for_each(|(o, &mut a)| *o = T::rounded(T::Wide::from_f64(a * scale)));
}
