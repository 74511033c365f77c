//! Arithmetic of factored gradients on slices: sums, norms and inner products of outer products and lookups.

use super::gemm::norms;
use super::par::par_chunks;
use super::shared::Shared;
use crate::autograd::Samples;
use crate::error::Result;
use crate::tensor::{Array, Float};
use std::ops::Range;

/// Rows `r` of a row-major matrix of `width` columns.
pub fn rows<'a, T>(x: &'a [T], width: usize, r: &Range<usize>) -> &'a [T] {
    &x[r.start * width..r.end * width]
}

/// Maximal runs of equal ids within `range`.
pub fn runs(ids: &[u32], range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let start = at;
        while at < range.end && ids[at] == ids[start] {
            at += 1;
        }
        Some(start..at)
    })
}

/// `f` of 0…n−1, in parallel, results in order.
pub fn collect(n: usize, f: impl Fn(usize) -> Result<f64> + Sync) -> Result<Vec<f64>> {
    let mut out: Vec<Result<f64>> = (0..n).map(|_| Ok(0.0)).collect();
    let shared = Shared::new(&mut out);
    par_chunks(n, 1, |r| {
        // SAFETY: chunks are disjoint.
        let o = unsafe { shared.slice(r.clone()) };
        o.iter_mut().zip(r).for_each(|(o, i)| *o = f(i));
    });
    out.into_iter().collect()
}

/// out += Σₙ wₙ·leftₙ ⊗ rightₙ: 2·n·r·c FLOPs.
pub fn outer_add<T: Float>(left: &[T], right: &[T], n: usize, w: Option<&[T]>, out: &mut [T]) {
    norms::outer_add(left, right, n, w, out)
}

/// |Σₜ leftₜ ⊗ rightₜ|².
pub fn outer_sq_norm<T: Float>(left: &[T], right: &[T], n: usize) -> f64 {
    norms::sq_norm(left, right, n)
}

/// Σₜₛ (l1ₜ·l2ₛ)(r1ₜ·r2ₛ).
pub fn outer_inner<T: Float>(l1: &[T], r1: &[T], l2: &[T], r2: &[T], n: (usize, usize)) -> f64 {
    norms::inner(l1, r1, l2, r2, n)
}

/// Fused norm and clipped sum, where it pays: samples of more than a few sorted rows.
pub fn outer_clipped_add<T: Float>(
    left: &Array,
    right: &Array,
    samples: &Samples,
    base: &[f64],
    clip: &(dyn Fn(f64) -> f64 + Sync),
    out: &mut [T],
) -> Result<Option<Vec<f64>>> {
    if !samples.is_sorted() || samples.rows() < 16 * samples.count() {
        return Ok(None);
    }
    let ranges: Vec<Range<usize>> = (0..samples.count()).map(|i| samples.range(i)).collect();
    let dims = (left.shape()[1], right.shape()[1]);
    Ok(Some(norms::clipped_add(left.as_slice()?, right.as_slice()?, dims, &ranges, base, clip, out)))
}

/// out += Σₙ wₙ·gradₙ (⊙ scaleₙ). Rows of zero weight are skipped, whatever they hold.
pub fn row_sum_add<T: Float>(grad: &[T], scale: Option<&[T]>, n: usize, w: Option<&[T]>, out: &mut [T]) {
    let p = out.len();
    if n == 0 || p == 0 {
        return;
    }
    let each = ((1 << 16) / p).clamp(8, 4096);
    let blocks = n.div_ceil(each);
    let mut part = vec![T::ZERO; blocks * p];
    let shared = Shared::new(&mut part);
    par_chunks(blocks, 1, |range| {
        for b in range {
            // SAFETY: each block has its own partial sum.
            let acc = unsafe { shared.slice(b * p..(b + 1) * p) };
            for t in b * each..((b + 1) * each).min(n) {
                let w = w.map_or(T::ONE, |w| w[t]);
                if w == T::ZERO {
                    continue;
                }
                let g = &grad[t * p..(t + 1) * p];
                match scale {
                    None => acc.iter_mut().zip(g).for_each(|(a, &g)| *a += w * g),
                    Some(s) => {
                        let s = &s[t * p..(t + 1) * p];
                        acc.iter_mut().zip(g).zip(s).for_each(|((a, &g), &s)| *a += w * (g * s))
                    }
                }
            }
        }
    });
    for b in 0..blocks {
        out.iter_mut().zip(&part[b * p..(b + 1) * p]).for_each(|(o, &x)| *o += x);
    }
}

/// out[idₙ] += wₙ·gradₙ, rows in order. Rows of zero weight are skipped.
pub fn lookup_add<T: Float>(ids: &[u32], grad: &[T], w: Option<&[T]>, out: &mut [T]) {
    if ids.is_empty() {
        return;
    }
    let p = grad.len() / ids.len();
    for (t, &id) in ids.iter().enumerate() {
        let w = w.map_or(T::ONE, |w| w[t]);
        if w != T::ZERO {
            let o = &mut out[id as usize * p..(id as usize + 1) * p];
            o.iter_mut().zip(&grad[t * p..(t + 1) * p]).for_each(|(o, &g)| *o += w * g);
        }
    }
}

/// Rows sorted by id, each id's gradients summed: (id, sum) pairs.
fn lookup_sums<T: Float>(ids: &[u32], grad: &[T], p: usize) -> (Vec<u32>, Vec<T>) {
    let mut order: Vec<u32> = (0..ids.len() as u32).collect();
    order.sort_by_key(|&t| ids[t as usize]);
    let (mut keys, mut sums): (Vec<u32>, Vec<T>) = (Vec::new(), Vec::new());
    for t in order {
        let (id, g) = (ids[t as usize], &grad[t as usize * p..(t as usize + 1) * p]);
        if keys.last() == Some(&id) {
            let at = sums.len() - p;
            sums[at..].iter_mut().zip(g).for_each(|(s, &g)| *s += g);
        } else {
            keys.push(id);
            sums.extend_from_slice(g);
        }
    }
    (keys, sums)
}

/// Σ over pairs with equal ids of g1ₜ·g2ₛ.
pub fn lookup_inner<T: Float>(ids1: &[u32], g1: &[T], ids2: &[u32], g2: &[T], p: usize) -> f64 {
    let (k1, s1) = lookup_sums(ids1, g1, p);
    let same = std::ptr::eq(g1, g2) && std::ptr::eq(ids1, ids2);
    let (k2, s2) = if same { (k1.clone(), s1.clone()) } else { lookup_sums(ids2, g2, p) };
    let (mut a, mut b, mut sum) = (0, 0, 0.0);
    while a < k1.len() && b < k2.len() {
        match k1[a].cmp(&k2[b]) {
            std::cmp::Ordering::Less => a += 1,
            std::cmp::Ordering::Greater => b += 1,
            std::cmp::Ordering::Equal => {
                let (x, y) = (&s1[a * p..(a + 1) * p], &s2[b * p..(b + 1) * p]);
                sum += x.iter().zip(y).map(|(x, y)| x.to_f64() * y.to_f64()).sum::<f64>();
                a += 1;
                b += 1;
            }
        }
    }
    sum
}

/// ⟨lookup gradient, Σₛ leftₛ ⊗ rightₛ⟩ = Σₜₛ (eₜ·rightₛ)·leftₛ[idₜ]: the cross term of an embedding tied to the head.
/// Costs 2·T·S·p; `left` has `dims.0` columns (the vocabulary), `right` `dims.1`.
pub fn lookup_outer_inner<T: Float>(ids: &[u32], e: &[T], left: &[T], right: &[T], dims: (usize, usize)) -> f64 {
    let (v, p) = dims;
    let s_count = right.len() / p.max(1);
    // One id at a time: rightᵀ·left[·, id] is a p-vector, then a dot product with that id's summed gradient.
    let (keys, sums) = lookup_sums(ids, e, p);
    let mut column = vec![T::ZERO; p];
    let mut total = 0.0;
    for (k, &id) in keys.iter().enumerate() {
        column.fill(T::ZERO);
        for s in 0..s_count {
            let w = left[s * v + id as usize];
            column.iter_mut().zip(&right[s * p..(s + 1) * p]).for_each(|(c, &r)| *c += w * r);
        }
        let e = &sums[k * p..(k + 1) * p];
        total += column.iter().zip(e).map(|(c, e)| c.to_f64() * e.to_f64()).sum::<f64>();
    }
    total
}
