//! Gather and scatter-add of rows by index; sums are in a fixed order.

pub(crate) mod cuda;

use crate::base::{Element, Float};
use crate::device::cpu::par::{GRAIN, par_chunks};
use crate::device::cpu::shared::Shared;
use crate::device::cpu::simd::simd;

/// Gather: `out[o, i]` = `src[o, ids[i]]` for rows of `p` elements, with `src [outer, n, p]` and `out [outer, ids.len(), p]`. Every id must
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

/// Positions grouped by id: ids in ascending order, and for each id its positions in ascending order.
struct ById {
    /// The distinct ids.
    keys: Vec<u32>,
    /// The start of each id's positions in `order`, and the end of the last.
    starts: Vec<u32>,
    order: Vec<u32>,
}

impl ById {
    /// Groups by counting where the ids are dense (N + V steps), and by sorting where they are sparse.
    fn new(ids: &[u32]) -> ById {
        let n = ids.iter().max().map_or(0, |&m| m as usize + 1);
        let (mut keys, mut starts) = (Vec::new(), Vec::new());
        if n <= 8 * ids.len() {
            let mut next = vec![0u32; n];
            ids.iter().for_each(|&id| next[id as usize] += 1);
            let mut at = 0;
            for (id, c) in next.iter_mut().enumerate().filter(|(_, c)| **c > 0) {
                keys.push(id as u32);
                starts.push(at);
                at += std::mem::replace(c, at);
            }
            starts.push(at);
            let mut order = vec![0u32; ids.len()];
            for (t, &id) in ids.iter().enumerate() {
                order[next[id as usize] as usize] = t as u32;
                next[id as usize] += 1;
            }
            return ById { keys, starts, order };
        }
        let mut pairs: Vec<u64> = ids.iter().enumerate().map(|(t, &id)| (id as u64) << 32 | t as u64).collect();
        pairs.sort_unstable();
        for (i, pair) in pairs.iter().enumerate() {
            let id = (pair >> 32) as u32;
            if keys.last() != Some(&id) {
                keys.push(id);
                starts.push(i as u32);
            }
        }
        starts.push(pairs.len() as u32);
        ById { keys, starts, order: pairs.iter().map(|&p| p as u32).collect() }
    }
    /// The positions of the `key`-th id.
    fn run(&self, key: usize) -> &[u32] {
        &self.order[self.starts[key] as usize..self.starts[key + 1] as usize]
    }
}

/// Scatter-add: `out[o, ids[t]]` += wₜ·`src[o, t]` for rows of `p` elements, with `src [outer, ids.len(), p]` and `out [outer, n, p]`. Rows
/// of zero weight are skipped, even if they are not finite. Each element of `out` is summed by one task in ascending `t`, so that the bits
/// do not depend on the number of threads. One pass over `src`; measurements show that the parallel form becomes faster than a single
/// sequential pass at about four threads.
pub fn add<T: Float>(ids: &[u32], src: &[T], w: Option<&[T]>, outer: usize, p: usize, out: &mut [T]) {
    const RANGES: usize = 64;
    let k = ids.len();
    if src.is_empty() || out.is_empty() {
        return;
    }
    let n = out.len() / (outer * p);
    if src.len() <= GRAIN || rayon::current_num_threads() < 4 {
        return simd(
            #[inline(always)]
            || {
                for (o, src) in out.chunks_exact_mut(n * p).zip(src.chunks_exact(k * p)) {
                    for ((t, &id), s) in ids.iter().enumerate().zip(src.chunks_exact(p)) {
                        let w = w.map_or(T::ONE, |w| w[t]);
                        if w != T::ZERO {
                            let d = &mut o[id as usize * p..(id as usize + 1) * p];
                            d.iter_mut().zip(s).for_each(|(d, &s)| *d += w * s);
                        }
                    }
                }
            },
        );
    }
    // Positions by range of ids, ascending in each: one range's part of `out` stays in the cache.
    let width = n.div_ceil(RANGES);
    let ranges = n.div_ceil(width);
    let range_of = |id: u32| id as usize / width;
    let mut starts = vec![0u32; ranges + 1];
    ids.iter().for_each(|&id| starts[range_of(id) + 1] += 1);
    (0..ranges).for_each(|i| starts[i + 1] += starts[i]);
    let (mut next, mut order) = (starts.clone(), vec![0u32; k]);
    for (t, &id) in ids.iter().enumerate() {
        let at = &mut next[range_of(id)];
        order[*at as usize] = t as u32;
        *at += 1;
    }
    // If there are few ranges (a bias per expert), the columns are split too.
    let cols = if ranges * outer >= RANGES / 2 { p } else { p.min(128) };
    let blocks = p.div_ceil(cols);
    let tasks = outer * ranges * blocks;
    let grain = (tasks * (GRAIN / 4) / src.len()).max(1);
    let dst = Shared::new(out);
    par_chunks(tasks, grain, |part| {
        for i in part {
            let (b, r, o) = (i % blocks, i / blocks % ranges, i / blocks / ranges);
            let (lo, hi) = (b * cols, ((b + 1) * cols).min(p));
            simd(
                #[inline(always)]
                || {
                    for &t in &order[starts[r] as usize..starts[r + 1] as usize] {
                        let t = t as usize;
                        let at = (o * n + ids[t] as usize) * p;
                        // SAFETY: ranges of ids are disjoint, and so are the column blocks of one range.
                        let d = unsafe { dst.slice(at + lo..at + hi) };
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

/// Calls `f(id, sum of its rows)` for the distinct ids in ascending order; rows of one id are summed in ascending position. A single row is
/// passed without a copy.
pub fn each_sum<T: Float>(ids: &[u32], rows: &[T], p: usize, mut f: impl FnMut(u32, &[T])) {
    let groups = ById::new(ids);
    let mut sum = vec![T::ZERO; p];
    let row = |t: u32| &rows[t as usize * p..(t as usize + 1) * p];
    for (key, &id) in groups.keys.iter().enumerate() {
        let run = groups.run(key);
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

/// The distinct ids in ascending order and the sum of each id's rows: `[keys, p]`.
pub fn sums<T: Float>(ids: &[u32], rows: &[T], p: usize) -> (Vec<u32>, Vec<T>) {
    let (mut keys, mut sums) = (Vec::new(), Vec::new());
    each_sum(ids, rows, p, |id, s| {
        keys.push(id);
        sums.extend_from_slice(s);
    });
    (keys, sums)
}
