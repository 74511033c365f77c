//! Parallel loops whose division into pieces depends only on the length, never on the number of threads.

use super::shared::Shared;
use rayon::prelude::*;
use std::ops::Range;

/// Runs `f` on consecutive pieces of `0..len` of `grain` elements (the last may be shorter), in parallel if there are several. A single
/// piece runs directly on the calling thread.
pub fn par_chunks(len: usize, grain: usize, f: impl Fn(Range<usize>) + Sync) {
    if len == 0 {
        return;
    }
    let grain = grain.max(1);
    if len <= grain {
        return f(0..len);
    }
    in_parallel(len, grain, &f);
}

/// Runs the pieces in parallel. It is not generic, so that it is compiled once: otherwise rayon's code would be half of this crate's.
fn in_parallel(len: usize, grain: usize, f: &(dyn Fn(Range<usize>) + Sync)) {
    (0..len.div_ceil(grain)).into_par_iter().for_each(|i| f(i * grain..((i + 1) * grain).min(len)));
}

/// Elements of one parallel chunk.
pub const GRAIN: usize = 1 << 15;

/// Runs `f(units, their elements)` on consecutive pieces of `out`, which consists of units of `width` elements. A piece has `grain` units,
/// and pieces run in parallel.
pub fn par_units<T: Send>(out: &mut [T], width: usize, grain: usize, f: impl Fn(Range<usize>, &mut [T]) + Sync) {
    let units = out.len().checked_div(width).unwrap_or(0);
    let out = Shared::new(out);
    par_chunks(units, grain, |r| {
        // SAFETY: pieces are disjoint ranges of units.
        let part = unsafe { out.slice(r.start * width..r.end * width) };
        f(r, part);
    });
}

/// Runs `f(row, its elements)` on each row of `out`, rows of `width` elements, in parallel pieces of about [`GRAIN`]
/// elements.
pub fn par_rows<T: Send>(out: &mut [T], width: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    par_units(out, width, GRAIN / width.max(1), |rows, part| {
        rows.zip(part.chunks_exact_mut(width)).for_each(|(row, elements)| f(row, elements));
    });
}

/// [`par_rows`] over two arrays at once, with rows of `width.0` and of `width.1` elements; `width.0` determines the pieces.
pub fn par_rows2<T: Send, U: Send>(
    (a, b): (&mut [T], &mut [U]),
    width: (usize, usize),
    grain: usize,
    f: impl Fn(usize, &mut [T], &mut [U]) + Sync,
) {
    let rows = a.len().checked_div(width.0).unwrap_or(0);
    let (a, b) = (Shared::new(a), Shared::new(b));
    par_chunks(rows, grain, |r| {
        // SAFETY: pieces are disjoint ranges of rows of both.
        let (a, b) =
            unsafe { (a.slice(r.start * width.0..r.end * width.0), b.slice(r.start * width.1..r.end * width.1)) };
        let parts = a.chunks_exact_mut(width.0).zip(b.chunks_exact_mut(width.1));
        r.zip(parts).for_each(|(row, (a, b))| f(row, a, b));
    });
}
