//! Rows by index: taking them, and adding into them in a fixed order.

use super::elementwise::GRAIN;
use super::par::par_chunks;
use super::shared::Shared;
use super::simd::simd;
use crate::tensor::{Element, Float};

/// `out[o, i]` = `src[o, ids[i]]` for rows of `p`: `src` is `[outer, n, p]`, `out` `[outer, ids.len(), p]`. Every id must
/// be below `n`. Reads and writes each taken row once.
pub fn take<T: Element>(src: &[T], ids: &[u32], outer: usize, p: usize, out: &mut [T]) {
    let k = ids.len();
    if out.is_empty() {
        return;
    }
    let n = src.len() / (outer * p);
    let dst = Shared::new(out);
    par_chunks(outer * k, (GRAIN / p).max(1), |range| {
        // SAFETY: chunks are disjoint.
        let d = unsafe { dst.slice(range.start * p..range.end * p) };
        for (d, i) in d.chunks_exact_mut(p).zip(range) {
            let at = (i / k * n + ids[i % k] as usize) * p;
            d.copy_from_slice(&src[at..at + p]);
        }
    });
}

/// Positions of `ids` grouped by id: each entry is `id << 32 | position`, sorted, so that positions of one id ascend.
fn by_id(ids: &[u32]) -> Vec<u64> {
    let mut order: Vec<u64> = ids.iter().enumerate().map(|(t, &id)| (id as u64) << 32 | t as u64).collect();
    order.sort_unstable();
    order
}

/// Where each id's run begins in the sorted positions, and the end.
fn starts(order: &[u64]) -> Vec<usize> {
    let mut s: Vec<usize> = (0..order.len()).filter(|&i| i == 0 || order[i] >> 32 != order[i - 1] >> 32).collect();
    s.push(order.len());
    s
}

/// `out[o, ids[t]]` += wₜ·`src[o, t]` for rows of `p`: `src` is `[outer, ids.len(), p]`, `out` `[outer, n, p]`. Rows of zero
/// weight are skipped, whatever they hold. Each element of `out` is summed by one task in ascending `t`, so the bits do
/// not depend on the number of threads. Costs a sort of the ids, then one pass over `src`.
pub fn add<T: Float>(ids: &[u32], src: &[T], w: Option<&[T]>, outer: usize, p: usize, out: &mut [T]) {
    let k = ids.len();
    if src.is_empty() || out.is_empty() {
        return;
    }
    let n = out.len() / (outer * p);
    let order = by_id(ids);
    let starts = starts(&order);
    let keys = starts.len() - 1;
    // Few, long runs (a bias per expert): cut the columns too.
    let cols = if keys * outer >= 32 { p } else { p.min(128) };
    let blocks = p.div_ceil(cols);
    let grain = (GRAIN / (cols * (k / keys))).max(1);
    let dst = Shared::new(out);
    par_chunks(outer * keys * blocks, grain, |range| {
        for i in range {
            let (b, key, o) = (i % blocks, i / blocks % keys, i / blocks / keys);
            let (lo, hi) = (b * cols, ((b + 1) * cols).min(p));
            let run = &order[starts[key]..starts[key + 1]];
            let at = (o * n + (run[0] >> 32) as usize) * p;
            // SAFETY: ids of different runs differ, and so do the blocks of one id.
            let d = unsafe { dst.slice(at + lo..at + hi) };
            simd(
                #[inline(always)]
                || {
                    for &t in run {
                        let t = t as u32 as usize;
                        let s = &src[(o * k + t) * p + lo..(o * k + t) * p + hi];
                        match w {
                            None => d.iter_mut().zip(s).for_each(|(d, &s)| *d += s),
                            Some(w) if w[t] == T::ZERO => {}
                            Some(w) => {
                                let w = w[t];
                                d.iter_mut().zip(s).for_each(|(d, &s)| *d += w * s)
                            }
                        }
                    }
                },
            );
        }
    });
}

/// `f(id, sum of its rows)` for the distinct ids in ascending order; rows of one id are summed in ascending position. A
/// row that is alone is handed over in place.
pub fn each_sum<T: Float>(ids: &[u32], rows: &[T], p: usize, mut f: impl FnMut(u32, &[T])) {
    let order = by_id(ids);
    let mut sum = vec![T::ZERO; p];
    for run in order.chunk_by(|a, b| a >> 32 == b >> 32) {
        let row = |t: u64| &rows[t as u32 as usize * p..(t as u32 as usize + 1) * p];
        let id = (run[0] >> 32) as u32;
        if let &[alone] = run {
            f(id, row(alone));
            continue;
        }
        simd(
            #[inline(always)]
            || {
                sum.fill(T::ZERO);
                run.iter().for_each(|&t| sum.iter_mut().zip(row(t)).for_each(|(s, &g)| *s += g));
            },
        );
        f(id, &sum);
    }
}

/// The distinct ids in ascending order and the sum of each one's rows: `[keys, p]`.
pub fn sums<T: Float>(ids: &[u32], rows: &[T], p: usize) -> (Vec<u32>, Vec<T>) {
    let (mut keys, mut sums) = (Vec::new(), Vec::new());
    each_sum(ids, rows, p, |id, s| {
        keys.push(id);
        sums.extend_from_slice(s);
    });
    (keys, sums)
}
