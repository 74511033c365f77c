//! Arithmetic of factored gradients on slices: sums, norms and inner products of outer products and lookups.

use crate::array::Array;
use crate::autograd::Samples;
use crate::base::dtype::of_bf16;
use crate::base::{DType, Result};
use crate::device::cpu::par::{GRAIN, par_chunks};
use crate::device::cpu::shared::Shared;
use crate::device::cpu::simd::simd;
use crate::kernels::gemm::kernel::Kernels;
use crate::kernels::gemm::norms::{self, Bounded, toward_zero};
use crate::kernels::gemm::{Mat, half, matmul};
use crate::kernels::rows as table;
use ::half::bf16;
use std::borrow::Cow;
use std::ops::Range;

/// Rows `r` of a row-major matrix of `width` columns.
pub fn rows<'a, T>(x: &'a [T], width: usize, r: &Range<usize>) -> &'a [T] {
    &x[r.start * width..r.end * width]
}

/// A bf16 number in f32; a denormal number becomes zero.
#[inline(always)]
fn widened(x: bf16) -> f32 {
    let x = of_bf16(x);
    if x.to_bits() & 0x7f80_0000 == 0 { 0.0 } else { x }
}

/// Rows `r` of a matrix in T. A bf16 matrix is widened and its denormal numbers become zeros, as in products of bf16 operands: a sample's
/// norm must be the norm of what is added, whichever of the two methods computes each of them.
pub fn wide_rows<'a, T: Kernels>(a: &'a Array, r: &Range<usize>) -> Result<Cow<'a, [T]>> {
    let width = a.shape().last().copied().unwrap_or(1);
    if a.dtype() != DType::BF16 {
        return Ok(Cow::Borrowed(rows(a.as_slice()?, width, r)));
    }
    let rows = rows(a.as_slice::<bf16>()?, width, r);
    Ok(Cow::Owned(simd(
        #[inline(always)]
        || rows.iter().map(|&x| T::from_f64(widened(x).into())).collect(),
    )))
}

/// Per-sample weights, if given, expanded to the rows and rounded towards zero.
pub fn row_weights<T: Kernels>(weights: Option<&[f64]>, samples: &Samples) -> Option<Vec<T>> {
    weights.map(|w| match samples {
        Samples::Uniform { each, .. } => w.iter().flat_map(|&w| std::iter::repeat_n(toward_zero(w), *each)).collect(),
        Samples::Ragged(_) => (0..samples.rows()).map(|r| toward_zero(w[samples.owner(r)])).collect(),
    })
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

/// The results of `f` for 0…n−1, computed in parallel, in order.
pub fn collect<R: Default + Send>(n: usize, f: impl Fn(usize) -> Result<R> + Sync) -> Result<Vec<R>> {
    let mut out: Vec<Result<R>> = (0..n).map(|_| Ok(R::default())).collect();
    let shared = Shared::new(&mut out);
    par_chunks(n, 1, |r| {
        // SAFETY: chunks are disjoint.
        let o = unsafe { shared.slice(r.clone()) };
        o.iter_mut().zip(r).for_each(|(o, i)| *o = f(i));
    });
    out.into_iter().collect()
}

/// out += Σₙ w[sample of n]·leftₙ ⊗ rightₙ: 2·n·r·c FLOPs.
pub fn outer_add<T: Kernels>(
    (left, right): (&Array, &Array),
    samples: &Samples,
    weights: Option<&[f64]>,
    out: &mut [T],
) -> Result<()> {
    let all = 0..samples.rows();
    if left.dtype() == DType::BF16 {
        let parts = weights.map(|w| {
            let mut parts: Vec<(Range<usize>, f32)> = Vec::new();
            for n in all.clone() {
                let i = samples.owner(n);
                match parts.last_mut() {
                    Some((r, _)) if samples.owner(r.start) == i => r.end = n + 1,
                    _ => parts.push((n..n + 1, toward_zero(w[i]))),
                }
            }
            parts
        });
        // A weight is never rounded into an operand: it multiplies the f32 sum of a sample's rows, if there are enough rows.
        if parts.as_ref().is_none_or(|p| halves(all.len(), p.len())) {
            let (l, r) = (matrix(left)?.t(), matrix(right)?);
            let e = half::Epilogue { weights: parts.as_deref(), ..summed() };
            half::product(l, r, e, half::Out::Full(bytemuck::cast_slice_mut(out)));
            return Ok(());
        }
    }
    let w = row_weights(weights, samples);
    norms::outer_add(&wide_rows::<T>(left, &all)?, &wide_rows::<T>(right, &all)?, all.len(), w.as_deref(), out);
    Ok(())
}

/// Whether sums of `rows` rows in `parts` parts are computed as products of bf16 operands: a part takes at least the time of 32 rows.
pub fn halves(rows: usize, parts: usize) -> bool {
    rows >= 16 * parts
}

/// The options of products of bf16 operands that sum gradients.
fn summed<'a>() -> half::Epilogue<'a> {
    half::Epilogue { accumulate: true, denormals_are_zeros: true, ..Default::default() }
}

/// A bf16 matrix as an operand of a product.
pub fn matrix(a: &Array) -> Result<half::Operand<'_>> {
    Ok(half::Operand::Half(Mat::new(a.as_slice()?, a.shape()[0], a.shape()[1])))
}

/// Fused norm and clipped sum, if it pays: for sorted samples of more than a few rows.
pub fn outer_clipped_add<T: Kernels>(
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
    if left.dtype() == DType::BF16 {
        // The norms are those of exactly the sums that are weighted: the same products of the same rows in the same order.
        let (l, r) = (matrix(left)?, matrix(right)?);
        let sq = half::sq_norms(l, r, &ranges);
        let totals: Vec<f64> = base.iter().zip(sq).map(|(b, sq)| b + norms::upwards(T::UNIT) * sq).collect();
        let weights: Vec<f64> = totals.iter().map(|&t| clip(t)).collect();
        let parts: Vec<_> = ranges.into_iter().zip(weights.iter().map(|&w| toward_zero::<f32>(w))).collect();
        let e = half::Epilogue { weights: Some(&parts), ..summed() };
        half::product(l.t(), r, e, half::Out::Full(bytemuck::cast_slice_mut(out)));
        return Ok(Some(totals));
    }
    Ok(Some(norms::clipped_add(left.as_slice()?, right.as_slice()?, dims, &ranges, base, clip, out)))
}

/// Writes every sample's lᵀ·g into `out [B, r, c]` and returns its squared norm, for sorted samples.
pub fn outer_per_sample<T: Kernels>(left: &Array, right: &Array, samples: &Samples, out: &mut [T]) -> Result<Vec<f64>> {
    let ranges: Vec<Range<usize>> = (0..samples.count()).map(|i| samples.range(i)).collect();
    let dims = (left.shape()[1], right.shape()[1]);
    if left.dtype() == DType::BF16 {
        let out: &mut [f32] = bytemuck::cast_slice_mut(out);
        let numel = dims.0 * dims.1;
        for (i, range) in ranges.iter().enumerate() {
            let e = half::Epilogue { accumulate: false, weights: Some(&[(range.clone(), 1.0)]), ..summed() };
            half::product(matrix(left)?.t(), matrix(right)?, e, half::Out::Full(&mut out[i * numel..(i + 1) * numel]));
        }
        return collect(ranges.len(), |i| Ok(norms::sum_sq(&out[i * numel..(i + 1) * numel])));
    }
    Ok(norms::per_sample(left.as_slice()?, right.as_slice()?, dims, &ranges, out))
}

/// Σₙ |gradₙ (⊙ scaleₙ)| over `n` rows: an upper bound on the norm of their sum in any order.
pub fn row_reach<T: Kernels>(grad: &[T], scale: Option<&[T]>, n: usize) -> f64 {
    let p = grad.len() / n.max(1);
    let row = |i: usize| i * p..(i + 1) * p;
    match scale {
        None => (0..n).map(|i| norms::sum_sq(&grad[row(i)]).sqrt()).sum(),
        Some(scale) => (0..n)
            .map(|i| {
                let terms = grad[row(i)].iter().zip(&scale[row(i)]);
                terms.map(|(g, s)| (g.to_f64() * s.to_f64()).powi(2)).sum::<f64>().sqrt()
            })
            .sum(),
    }
}

/// Adds columns `col..` of the rows in `range`, weighted and scaled, to `acc`: four rows at a time are added as a tree, and the trees are
/// added in f64.
#[inline(always)]
fn accumulate<T: Kernels>(
    acc: &mut [f64],
    (grad, scale): (&[T], Option<&[T]>),
    (p, col): (usize, usize),
    range: Range<usize>,
    w: Option<&[T]>,
) {
    let n = acc.len();
    let mut t = range.start;
    while t < range.end {
        let four = t + 4 <= range.end && w.is_none_or(|w| !w[t..t + 4].contains(&T::ZERO));
        if !four {
            let w = w.map_or(T::ONE, |w| w[t]);
            if w != T::ZERO {
                let g = part(grad, (p, col), t, n);
                match scale {
                    None => acc.iter_mut().zip(g).for_each(|(a, &g)| *a += (w * g).to_f64()),
                    Some(s) => {
                        let terms = g.iter().zip(part(s, (p, col), t, n));
                        acc.iter_mut().zip(terms).for_each(|(a, (&g, &s))| *a += (w * (g * s)).to_f64())
                    }
                }
            }
            t += 1;
            continue;
        }
        let w = w.map_or([T::ONE; 4], |w| [w[t], w[t + 1], w[t + 2], w[t + 3]]);
        let (g0, g1) = (part(grad, (p, col), t, n), part(grad, (p, col), t + 1, n));
        let (g2, g3) = (part(grad, (p, col), t + 2, n), part(grad, (p, col), t + 3, n));
        match scale {
            None => {
                for i in 0..n {
                    acc[i] += ((w[0] * g0[i] + w[1] * g1[i]) + (w[2] * g2[i] + w[3] * g3[i])).to_f64();
                }
            }
            Some(s) => {
                let (s0, s1) = (part(s, (p, col), t, n), part(s, (p, col), t + 1, n));
                let (s2, s3) = (part(s, (p, col), t + 2, n), part(s, (p, col), t + 3, n));
                for i in 0..n {
                    let (a, b) = (w[0] * (g0[i] * s0[i]), w[1] * (g1[i] * s1[i]));
                    let (c, d) = (w[2] * (g2[i] * s2[i]), w[3] * (g3[i] * s3[i]));
                    acc[i] += ((a + b) + (c + d)).to_f64();
                }
            }
        }
        t += 4;
    }
}

/// `n` columns from `col` of row `t` of a matrix of `p` columns.
#[inline(always)]
fn part<T>(x: &[T], (p, col): (usize, usize), t: usize, n: usize) -> &[T] {
    &x[t * p + col..t * p + col + n]
}

/// [`row_sum_add`] of a matrix in T or in bf16; bf16 is widened one block of rows at a time.
pub fn rows_add<T: Kernels>(grad: &Array, w: Option<&[T]>, out: &mut [T]) -> Result<()> {
    let (n, p) = (grad.shape()[0], out.len());
    if grad.dtype() != DType::BF16 {
        row_sum_add(grad.as_slice()?, None, n, w, out);
        return Ok(());
    }
    // Blocks of rows that stay in the cache; their sums are added in order.
    let each = (GRAIN / p.max(1)).max(n.div_ceil(64)).max(8);
    let blocks = n.div_ceil(each);
    let mut part = vec![0f64; blocks * p];
    let shared = Shared::new(&mut part);
    collect(blocks, |b| {
        let r = b * each..((b + 1) * each).min(n);
        let rows = wide_rows::<T>(grad, &r)?;
        // SAFETY: each block has its own partial sum.
        let acc = unsafe { shared.slice(b * p..(b + 1) * p) };
        simd(
            #[inline(always)]
            || accumulate(acc, (&rows, None), (p, 0), 0..r.len(), w.map(|w| &w[r.clone()])),
        );
        Ok(())
    })?;
    let (first, rest) = part.split_at_mut(p.min(blocks * p));
    rest.chunks_exact(p.max(1)).for_each(|x| first.iter_mut().zip(x).for_each(|(a, &x)| *a += x));
    out.iter_mut().zip(first).for_each(|(o, &mut a)| *o = T::from_f64(o.to_f64() + a));
    Ok(())
}

/// out += Σₙ wₙ·gradₙ (⊙ scaleₙ). Rows of zero weight are skipped, even if they are not finite. Reads the operands once.
///
/// The sum is f64 and rounded once. Very wide rows are split by columns, others into at most 64 blocks of rows whose sums are added in
/// order: the result depends on the shape only.
pub fn row_sum_add<T: Kernels>(grad: &[T], scale: Option<&[T]>, n: usize, w: Option<&[T]>, out: &mut [T]) {
    let p = out.len();
    if n == 0 || p == 0 {
        return;
    }
    if p >= 2 * GRAIN {
        let dst = Shared::new(out);
        par_chunks(p, GRAIN, |cols| {
            // SAFETY: columns are disjoint.
            let o = unsafe { dst.slice(cols.clone()) };
            let mut acc = vec![0f64; o.len()];
            simd(
                #[inline(always)]
                || accumulate(&mut acc, (grad, scale), (p, cols.start), 0..n, w),
            );
            o.iter_mut().zip(acc).for_each(|(o, a)| *o = T::from_f64(o.to_f64() + a));
        });
        return;
    }
    let each = (2 * GRAIN / p).max(n.div_ceil(64)).max(8);
    let blocks = n.div_ceil(each);
    let mut part = vec![0f64; blocks * p];
    let shared = Shared::new(&mut part);
    par_chunks(blocks, 1, |range| {
        for b in range {
            // SAFETY: each block has its own partial sum.
            let acc = unsafe { shared.slice(b * p..(b + 1) * p) };
            simd(
                #[inline(always)]
                || accumulate(acc, (grad, scale), (p, 0), b * each..((b + 1) * each).min(n), w),
            );
        }
    });
    let (first, rest) = part.split_at_mut(p);
    rest.chunks_exact(p).for_each(|x| first.iter_mut().zip(x).for_each(|(a, &x)| *a += x));
    out.iter_mut().zip(first).for_each(|(o, &mut a)| *o = T::from_f64(o.to_f64() + a));
}

/// `out[idₙ] += wₙ·gradₙ`; the rows of one id are added in order. Rows of zero weight are skipped.
pub fn lookup_add<T: Kernels>(ids: &[u32], grad: &[T], w: Option<&[T]>, out: &mut [T]) {
    if !ids.is_empty() {
        table::add(ids, grad, w, 1, grad.len() / ids.len(), out);
    }
}

/// Σ x·y and Σ |x·y|, in f64.
#[inline(always)]
fn dot<T: Kernels>(x: &[T], y: &[T]) -> (f64, f64) {
    const LANES: usize = 16;
    let (mut lanes, mut sizes) = ([0.0f64; LANES], [0.0f64; LANES]);
    let (x, y) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let (mut sum, mut size) = (0.0, 0.0);
    for (x, y) in x.remainder().iter().zip(y.remainder()) {
        let xy = x.to_f64() * y.to_f64();
        (sum, size) = (sum + xy, size + xy.abs());
    }
    for (x, y) in x.zip(y) {
        for l in 0..LANES {
            let xy = x[l].to_f64() * y[l].to_f64();
            lanes[l] += xy;
            sizes[l] += xy.abs();
        }
    }
    (sum + lanes.iter().sum::<f64>(), size + sizes.iter().sum::<f64>())
}

/// Σ over pairs with equal ids of g1ₜ·g2ₛ, by a sort of the ids and one pass over the rows. Rows of one id are summed first, in T: the
/// result is that of the rounded sums.
pub fn lookup_inner<T: Kernels>(ids1: &[u32], g1: &[T], ids2: &[u32], g2: &[T], p: usize) -> Bounded {
    let (mut value, mut size) = (0.0, 0.0);
    let mut add = |x: &[T], y: &[T]| {
        let (v, s) = simd(
            #[inline(always)]
            || dot(x, y),
        );
        (value, size) = (value + v, size + s);
    };
    if std::ptr::eq(g1, g2) && std::ptr::eq(ids1, ids2) {
        table::each_sum(ids1, g1, p, |_, s| add(s, s));
    } else {
        let (k2, s2) = table::sums(ids2, g2, p);
        let mut b = 0;
        table::each_sum(ids1, g1, p, |id, s| {
            while b < k2.len() && k2[b] < id {
                b += 1;
            }
            if b < k2.len() && k2[b] == id {
                add(s, &s2[b * p..(b + 1) * p]);
            }
        });
    }
    Bounded { value, error: (p + ids1.len() + 64) as f64 * f64::EPSILON * size }
}

/// ⟨lookup gradient, Σₛ leftₛ ⊗ rightₛ⟩ = Σₜₛ (eₜ·rightₛ)·`leftₛ[idₜ]`: the cross term of an embedding tied to the head. One product of
/// 2·K·S·p FLOPs for K distinct ids and S rows, with K·S memory; `left` has `dims.0` columns (the vocabulary), `right` has `dims.1`.
pub fn lookup_outer_inner<T: Kernels>(ids: &[u32], e: &[T], left: &[T], right: &[T], dims: (usize, usize)) -> Bounded {
    let (v, p) = dims;
    let n = right.len() / p.max(1);
    let (keys, sums) = table::sums(ids, e, p);
    if keys.is_empty() || n == 0 {
        return Bounded::default();
    }
    let mut products = vec![T::ZERO; keys.len() * n];
    matmul(Mat::new(&sums, keys.len(), p), Mat::new(right, n, p).t(), false, &mut products);
    // A dot product over p columns has an error of at most γ times the norms of its rows.
    let (gamma, least) =
        ((p.min(crate::kernels::gemm::KC) + p / crate::kernels::gemm::KC + 2) as f64 * T::UNIT, p as f64 * T::LEAST);
    let of_keys: Vec<f64> = sums.chunks_exact(p.max(1)).map(|row| norms::sum_sq(row).sqrt()).collect();
    let (mut value, mut error) = (0.0, 0.0);
    // The outer loop runs over the rows of `left`: one pass over the columns in use.
    for s in 0..n {
        let row = &left[s * v..(s + 1) * v];
        let mut off = 0.0;
        for (k, &id) in keys.iter().enumerate() {
            let at = row[id as usize].to_f64();
            value += products[k * n + s].to_f64() * at;
            off += of_keys[k] * at.abs();
            error += least * at.abs();
        }
        error += gamma * norms::sum_sq(&right[s * p..(s + 1) * p]).sqrt() * off;
    }
    Bounded { value, error: 1.01 * error }
}
