//! Sums of rows and of columns, in an order that depends only on the shape.

pub(crate) mod cuda;

use crate::base::Float;
use crate::device::cpu::par::par_chunks;
use crate::device::cpu::shared::Shared;
use crate::device::cpu::simd::simd;

/// Lanes of a row sum: independent partial sums that vectorise.
const LANES: usize = 32;
/// Elements summed before partial sums are combined; also the unit of parallel work.
const BLOCK: usize = 1 << 14;

/// Sum of a slice: lanes within blocks, blocks in order.
#[inline(always)]
fn sum_block<T: Float>(x: &[T]) -> T {
    let mut lanes = [T::ZERO; LANES];
    let chunks = x.chunks_exact(LANES);
    let tail = chunks.remainder();
    for c in chunks {
        for l in 0..LANES {
            lanes[l] += c[l];
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
    tail.iter().fold(lanes[0], |s, &x| s + x)
}

/// `out[r]` = Σ over row `r` of `x` (`rows` × `cols`, row-major). Reads `x` once.
pub fn sum_rows<T: Float>(x: &[T], rows: usize, cols: usize, out: &mut [T]) {
    let blocks = cols.div_ceil(BLOCK).max(1);
    if blocks == 1 {
        let out = Shared::new(out);
        par_chunks(rows, (BLOCK / cols.max(1)).max(1), |r| {
            // SAFETY: chunks are disjoint.
            let o = unsafe { out.slice(r.clone()) };
            simd(
                #[inline(always)]
                || o.iter_mut().zip(r).for_each(|(o, r)| *o = sum_block(&x[r * cols..(r + 1) * cols])),
            );
        });
        return;
    }
    let mut part = vec![T::ZERO; rows * blocks];
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
        out[r] = part[r * blocks..(r + 1) * blocks].iter().fold(T::ZERO, |s, &p| s + p);
    }
}

/// `out[c]` = Σ over column `c` of `x` (`rows` × `cols`, row-major). Reads `x` once.
pub fn sum_columns<T: Float>(x: &[T], rows: usize, cols: usize, out: &mut [T]) {
    out.fill(T::ZERO);
    if rows == 0 || cols == 0 {
        return;
    }
    // Blocks of rows give partial sums, added up in order.
    let each = (4 * BLOCK / cols).clamp(8, 4096);
    let blocks = rows.div_ceil(each);
    let add = |r: std::ops::Range<usize>, acc: &mut [T]| {
        simd(
            #[inline(always)]
            || {
                for r in r {
                    acc.iter_mut().zip(&x[r * cols..(r + 1) * cols]).for_each(|(a, &x)| *a += x);
                }
            },
        )
    };
    if blocks == 1 {
        add(0..rows, out);
        return;
    }
    let mut part = vec![T::ZERO; blocks * cols];
    let shared = Shared::new(&mut part);
    par_chunks(blocks, 1, |range| {
        for b in range {
            // SAFETY: each block has its own partial sums.
            let acc = unsafe { shared.slice(b * cols..(b + 1) * cols) };
            add(b * each..((b + 1) * each).min(rows), acc);
        }
    });
    for b in 0..blocks {
        out.iter_mut().zip(&part[b * cols..(b + 1) * cols]).for_each(|(o, &p)| *o += p);
    }
}
