//! Factored gradients on a GPU: sums, weighted sums, squared norms per sample, inner products (`cuda/factored.cu`,
//! `gemm.cu`, `gemm_grouped.cu`, `index.cu`). Nothing here waits for the device.

use crate::array::cuda::{on, suffix};
use crate::array::{Arguments, Array};
use crate::autograd::{Factor, Groups, Owners, Samples};
use crate::base::{DType, Error, Result};
use crate::device::Device;
use crate::device::cuda::{Gpu, Launch, MAX_GRID_YZ, layouts};
use crate::kernels::elementwise::cuda as elementwise;
use crate::kernels::gemm::cuda as gemm;
use crate::kernels::gemm::kernel::Kernels;
use crate::kernels::gemm::norms::{toward_zero, upwards};
use crate::kernels::rows::cuda as rows;
use crate::kernels::sums::cuda as sums;
use crate::with_float;
use std::ops::Range;
use std::sync::Arc;

/// The most blocks in x of a norm kernel; more tiles than that are covered by a grid-stride loop.
const MOST_BLOCKS: usize = 1024;
/// Elements of the per-sample gradients that are formed at a time if there is no faster method.
const FORMED: usize = 1 << 26;

/// Per-sample weights expanded to the rows: `[rows]`.
fn row_weights(gpu: &Arc<Gpu>, w: &Array, samples: &Samples) -> Result<Array> {
    let o = samples.on_gpu(gpu)?;
    match &o.owner {
        None => crate::array::cuda::copy(gpu, &w.reshape(&[o.count, 1])?.expand(&[o.count, o.each])?),
        Some(owner) => rows::take(gpu, w, owner, 1, o.count, 1, owner.shape()),
    }
}

/// out += Σₙ wₙ·leftₙ ⊗ rightₙ; `weights [B]` as in [`super::Kind::add_on`].
pub(super) fn outer_add(
    gpu: &Arc<Gpu>,
    (left, right): (&Array, &Array),
    samples: &Samples,
    weights: Option<&Array>,
    out: &Array,
) -> Result<()> {
    let o = samples.on_gpu(gpu)?;
    let w = weights.map(|w| gemm::RowWeights { weights: w, owner: o.owner.as_ref(), each: o.each.max(1) });
    let shape = [left.shape()[1], right.shape()[1]];
    gemm::add_product(gpu, &left.transpose(0, 1)?, right, w, &out.reshape(&shape)?)
}

/// `out[idₙ]` += wₙ·gradₙ.
pub(super) fn lookup_add(
    gpu: &Arc<Gpu>,
    (ids, grad): (&Array, &Array),
    samples: &Samples,
    weights: Option<&Array>,
    out: &Array,
) -> Result<()> {
    let w = weights.map(|w| row_weights(gpu, w, samples)).transpose()?;
    let p = grad.shape()[1];
    let n = out.numel().checked_div(p).unwrap_or(0);
    rows::add_rows(gpu, (grad, &on(gpu, ids)?), w.as_ref(), (1, n, p), out)
}

/// out += Σₙ wₙ·gradₙ (⊙ scaleₙ) over the rows of `grad [N, p]`; without `samples`, each row is a sample.
pub(super) fn row_sum_add(
    gpu: &Arc<Gpu>,
    (grad, scale): (&Array, Option<&Array>),
    samples: Option<&Samples>,
    weights: Option<&Array>,
    out: &Array,
) -> Result<()> {
    let (n, p) = (grad.shape()[0], out.numel());
    if n * p == 0 {
        return Ok(());
    }
    let owners = samples.map(|s| s.on_gpu(gpu)).transpose()?;
    let (owner, each) = owners.as_ref().map_or((None, 1), |o| (o.owner.as_ref(), o.each.max(1)));
    let chunks = n.div_ceil(128).min(64);
    let chunk = n.div_ceil(chunks);
    let chunks = n.div_ceil(chunk);
    let part = Array::uninit_on(gpu, &[chunks, p], out.dtype())?;
    let s = suffix(grad.dtype());
    Launch::new(gpu, "factored", &format!("factor_rowsum_{s}"))?
        .grid(p.div_ceil(32), chunks, 1)
        .array(grad)
        .optional(scale)
        .optional(weights)
        .optional(owner)
        .array(&part)
        .val(layouts::RowSumShape {
            rows: n as i64,
            width: p as i64,
            chunk: chunk as i64,
            g_rs: p as i64,
            s_rs: p as i64,
            each: each as i64,
        })
        .run()?;
    Launch::new(gpu, "factored", &format!("factor_rowsum_add_{}", suffix(out.dtype())))?
        .grid_stride(p, 256)
        .array(&part)
        .array(out)
        .val(chunks as i64)
        .val(p as i64)
        .val(1i32)
        .run()
}

/// Adds Σ over the rows of group e of w·leftₙ ⊗ rightₙ to block e of `out`.
pub(super) fn grouped_outer_add(
    gpu: &Arc<Gpu>,
    (left, right): (&Array, &Array),
    group: &Groups,
    samples: &Samples,
    weights: Option<&Array>,
    out: &Array,
) -> Result<()> {
    let (rd, cd) = (left.shape()[1], right.shape()[1]);
    let groups = out.numel().checked_div(rd * cd).unwrap_or(0);
    if group.rows() == 0 || groups == 0 {
        return Ok(());
    }
    // If the rows of a group are not consecutive, they are visited by index, and their weights are put into the same order.
    let (_, offsets, index) = group.on_gpu(gpu)?;
    let w = weights.map(|w| row_weights(gpu, w, samples)).transpose()?;
    let w = match (&w, &index) {
        (Some(w), Some(index)) => Some(rows::take(gpu, w, index, 1, group.rows(), 1, index.shape())?),
        _ => w,
    };
    let tile = gemm::tile(left.dtype());
    let shape = layouts::GroupedWeight {
        groups: groups as i64,
        rd: rd as i64,
        cd: cd as i64,
        l_rs: rd as i64,
        r_rs: cd as i64,
        o_s: (rd * cd) as i64,
        o_rs: cd as i64,
        each: 1,
        accumulate: 1,
        reserved: 0,
    };
    Launch::new(gpu, "gemm_grouped", &format!("grouped_weight_{}", suffix(left.dtype())))?
        .grid(rd.div_ceil(tile) * cd.div_ceil(tile), groups.min(MAX_GRID_YZ), 1)
        .shared(gemm::SHARED)
        .array(left)
        .array(right)
        .array(out)
        .optional(w.as_ref())
        .null()
        .array(&offsets)
        .optional(index.as_ref())
        .optional(index.as_ref())
        .val(shape)
        .run()
}

/// Partial sums in f64, `[count, width]`: a squared norm or an inner product is the sum of one row.
pub(crate) struct Parts {
    values: Array,
    /// Partial sums of a bound on the values' error; `None` for squared norms of gradients that were formed.
    errors: Option<Array>,
    width: usize,
}

/// Norms of the rows of both operands of a factor, `[N]` f64.
struct RowNorms {
    left: Array,
    right: Option<Array>,
}

/// |xₙ (⊙ scaleₙ)| for the rows of `x [N, p]`.
fn row_norms(gpu: &Arc<Gpu>, x: &Array, scale: Option<&Array>) -> Result<Array> {
    let (n, p) = (x.shape()[0], x.shape()[1]);
    let out = Array::uninit_on(gpu, &[n], DType::F64)?;
    if n > 0 {
        Launch::new(gpu, "factored", &format!("factor_row_norms_{}", suffix(x.dtype())))?
            .grid_stride(n, 8)
            .array(x)
            .optional(scale)
            .array(&out)
            .val(n as i64)
            .val(p as i64)
            .run()?;
    }
    Ok(out)
}

/// Rounding error of a dot product over `d` columns of `dtype`: relative to the norms of its rows, and absolute.
fn of_dots(d: i64, dtype: DType) -> (f64, f64) {
    match dtype {
        DType::F64 => ((d + 2) as f64 * f64::UNIT, d as f64 * f64::LEAST),
        _ => ((d + 2) as f64 * f32::UNIT, d as f64 * f32::LEAST),
    }
}

/// If the error bound of a squared norm by inner products is at most this share of its value, the bound is added to the value; otherwise
/// the gradient is formed tile by tile. The share is larger than on the CPU, where sums over columns are split into stretches and have
/// smaller errors.
const UNCERTAIN: f64 = 1.0 / 64.0;

/// The operands of one side of a Gram kernel.
pub(crate) struct Side<'a> {
    /// `[N, …]`.
    pub left: &'a Array,
    /// `[N, …]`, if each row is a product of two.
    pub right: Option<&'a Array>,
    /// An index for each row: only rows of equal index are paired. For a gather, the column to gather.
    pub ids: Option<Array>,
    /// The sample of each row.
    pub samples: &'a Samples,
}

impl Side<'_> {
    fn row_norms(&self, gpu: &Arc<Gpu>, kind: i32) -> Result<RowNorms> {
        let product = kind == layouts::PAIR_PRODUCT;
        let right = self.right.filter(|_| product).map(|r| row_norms(gpu, r, None)).transpose()?;
        Ok(RowNorms { left: row_norms(gpu, self.left, None)?, right })
    }
}

/// The method by which two factors' inner product is computed without forming a gradient: the pairing, and whether the factors are
/// exchanged.
fn pairing(a: &Factor, b: &Factor) -> Option<(i32, bool)> {
    match a.pairing(b) {
        Some(kind) => Some((kind, false)),
        None => b.pairing(a).map(|kind| (kind, true)),
    }
}

/// Partial sums of the inner products of `a` and `b`. With `pairs` all count₁·count₂ products, otherwise sample i with sample i.
fn pair_parts(gpu: &Arc<Gpu>, a: &Factor, b: &Factor, pairs: bool) -> Result<Parts> {
    let Some((kind, swap)) = pairing(a, b) else {
        return Err(Error::invalid("gram", format!("{} against {}", a.kind(), b.kind())));
    };
    let (a, b) = if swap { (b, a) } else { (a, b) };
    let (a, b) = (a.side(gpu, kind, false)?, b.side(gpu, kind, true)?);
    // Inner products that are only reported need no error bound.
    let norms = match pairs {
        true => None,
        false => Some((a.row_norms(gpu, kind)?, b.row_norms(gpu, kind)?)),
    };
    gram_parts(gpu, kind, (&a, &b), norms.as_ref().map(|(a, b)| (a, b)), false, pairs)
}

/// Partial sums of every sample's inner product with itself, which is its squared norm.
pub(super) fn own_gram_parts(gpu: &Arc<Gpu>, kind: i32, side: &Side) -> Result<Parts> {
    let norms = side.row_norms(gpu, kind)?;
    gram_parts(gpu, kind, (side, side), Some((&norms, &norms)), true, false)
}

/// Whether a squared norm of outer products takes fewer multiply-adds by [`own_gram_parts`] than by [`direct_parts`]: T²·(r + c), halved by
/// symmetry, against T·r·c, where T is the number of rows of a sample.
pub(super) fn gram_is_shorter(o: &Owners, left: &Array, right: &Array) -> bool {
    let (rd, cd) = (left.shape()[1], right.shape()[1]);
    o.longest * (rd + cd) <= 2 * rd * cd
}

/// part[pair, …] for the inner products of two sides. With `pairs` all count₁·count₂ products, otherwise sample i with sample i; `same` if
/// both sides are one. If the norms of the rows are given, errors are bounded as well.
fn gram_parts(
    gpu: &Arc<Gpu>,
    kind: i32,
    (x, y): (&Side, &Side),
    norms: Option<(&RowNorms, &RowNorms)>,
    same: bool,
    pairs: bool,
) -> Result<Parts> {
    let (ox, oy) = (x.samples.on_gpu(gpu)?, y.samples.on_gpu(gpu)?);
    let tile = gemm::tile(x.left.dtype());
    let (n1, n2) = (ox.longest.div_ceil(tile), oy.longest.div_ceil(tile));
    let tiles = if same { n1 * (n1 + 1) / 2 } else { n1 * n2 };
    let width = tiles.clamp(1, MOST_BLOCKS);
    let count = if pairs { ox.count * oy.count } else { ox.count };
    let part = || Array::uninit_on(gpu, &[count, width], DType::F64);
    let (values, errors) = (part()?, norms.map(|_| part()).transpose()?);
    let w = |x: Option<&Array>| x.map_or(0, |x| x.shape()[1] as i64);
    let (rd, cd) = (w(Some(x.left)), if kind == layouts::PAIR_PRODUCT { w(x.right) } else { 0 });
    let ((gamma_l, least_l), (gamma_r, least_r)) = (of_dots(rd, x.left.dtype()), of_dots(cd, x.left.dtype()));
    let shape = layouts::GramShape {
        rd,
        cd,
        l1_rs: w(Some(x.left)),
        r1_rs: w(x.right),
        l2_rs: w(Some(y.left)),
        r2_rs: w(y.right),
        count1: ox.count as i64,
        count2: oy.count as i64,
        each1: ox.each as i64,
        each2: oy.each as i64,
        kind,
        same: same as i32,
        all_pairs: pairs as i32,
        reserved: 0,
        gamma_l,
        gamma_r,
        least_l,
        least_r,
    };
    Launch::new(gpu, "factored", &format!("factor_gram_{}", suffix(x.left.dtype())))?
        .grid(width, count.min(MAX_GRID_YZ), 1)
        .shared(layouts::GRAM_SHARED)
        .array(x.left)
        .optional(x.right)
        .array(y.left)
        .optional(y.right)
        .optional(x.ids.as_ref())
        .optional(y.ids.as_ref())
        .optional(ox.offsets.as_ref())
        .optional(oy.offsets.as_ref())
        .optional(ox.order.as_ref())
        .optional(oy.order.as_ref())
        .array(&values)
        .optional(norms.map(|n| &n.0.left))
        .optional(norms.and_then(|n| n.0.right.as_ref()))
        .optional(norms.map(|n| &n.1.left))
        .optional(norms.and_then(|n| n.1.right.as_ref()))
        .optional(errors.as_ref())
        .val(shape)
        .run()?;
    Ok(Parts { values, errors, width })
}

/// sq[i] = factor·Σ part[i, …], or += with `accumulate`.
fn sum_parts(gpu: &Arc<Gpu>, parts: &Parts, sq: &Array, factor: f64, accumulate: bool) -> Result<()> {
    sum_rows(gpu, (&parts.values, parts.width), sq, factor, accumulate)
}
fn sum_rows(gpu: &Arc<Gpu>, (part, width): (&Array, usize), sq: &Array, factor: f64, accumulate: bool) -> Result<()> {
    let n = sq.numel();
    Launch::new(gpu, "factored", "norms_sum")?
        .grid_stride(n, 8)
        .array(part)
        .array(sq)
        .val(n as i64)
        .val(width as i64)
        .val(factor)
        .val(accumulate as i32)
        .run()
}

/// Partial sums of |Σₜ leftₜ ⊗ rightₜ|² by tiles of the gradient; `group` as in [`Factor::GroupedOuter`], where a sample's rows of one
/// group are consecutive.
pub(super) fn direct_parts(
    gpu: &Arc<Gpu>,
    (left, right): (&Array, &Array),
    group: Option<&Array>,
    o: &Owners,
) -> Result<Parts> {
    direct_parts_of(gpu, (left, right), group, o, None)
}
/// The same; given norms and errors from other parts, it is computed only for samples whose error is too large a share of the norm.
fn direct_parts_of(
    gpu: &Arc<Gpu>,
    (left, right): (&Array, &Array),
    group: Option<&Array>,
    o: &Owners,
    known: Option<(&Array, &Array)>,
) -> Result<Parts> {
    let (rd, cd, tile) = (left.shape()[1], right.shape()[1], gemm::tile(left.dtype()));
    let width = (rd.div_ceil(tile) * cd.div_ceil(tile)).clamp(1, MOST_BLOCKS);
    let part = Array::uninit_on(gpu, &[o.count, width], DType::F64)?;
    Launch::new(gpu, "factored", &format!("factor_direct_{}", suffix(left.dtype())))?
        .grid(width, o.count.min(MAX_GRID_YZ), 1)
        .shared(layouts::DIRECT_SHARED)
        .array(left)
        .array(right)
        .optional(group)
        .optional(o.offsets.as_ref())
        .optional(o.order.as_ref())
        .array(&part)
        .optional(known.map(|k| k.0))
        .optional(known.map(|k| k.1))
        .val(layouts::DirectShape {
            rd: rd as i64,
            cd: cd as i64,
            l_rs: rd as i64,
            r_rs: cd as i64,
            count: o.count as i64,
            each: o.each as i64,
            share: UNCERTAIN,
        })
        .run()?;
    Ok(Parts { values: part, errors: None, width })
}

/// Partial sums of |Σₜ gradₜ (⊙ scaleₜ)|² for `grad [N, p]`.
pub(super) fn row_parts(gpu: &Arc<Gpu>, (grad, scale): (&Array, Option<&Array>), o: &Owners) -> Result<Parts> {
    let p = grad.shape()[1];
    let width = p.div_ceil(256).clamp(1, MOST_BLOCKS);
    let part = Array::uninit_on(gpu, &[o.count, width], DType::F64)?;
    Launch::new(gpu, "factored", &format!("factor_rows_{}", suffix(grad.dtype())))?
        .grid(width, o.count.min(MAX_GRID_YZ), 1)
        .array(grad)
        .optional(scale)
        .optional(o.offsets.as_ref())
        .optional(o.order.as_ref())
        .array(&part)
        .val(layouts::RowsShape {
            width: p as i64,
            g_rs: p as i64,
            s_rs: p as i64,
            count: o.count as i64,
            each: o.each as i64,
        })
        .run()?;
    Ok(Parts { values: part, errors: None, width })
}

/// Partial sums of |gradₙ|² for `grad [N, p]`: each row is a sample.
pub(super) fn each_row_parts(gpu: &Arc<Gpu>, grad: &Array) -> Result<Parts> {
    row_parts(gpu, (grad, None), &each_row(grad.shape()[0]))
}

/// The map in which each of `n` rows is a sample.
fn each_row(n: usize) -> Owners {
    Owners { each: 1, count: n, longest: 1, owner: None, offsets: None, order: None }
}

/// Forms the samples' gradients, some at a time, and adds their squared norms to `sq`; `accumulate` as in [`sum_parts`].
fn add_formed(gpu: &Arc<Gpu>, factors: &[Factor], numel: usize, sq: &Array, accumulate: bool) -> Result<()> {
    let count = sq.numel();
    let each = (FORMED / numel.max(1)).clamp(1, count);
    for from in (0..count).step_by(each) {
        let range = from..(from + each).min(count);
        let grads = per_sample(gpu, factors, range.clone(), numel)?;
        sum_parts(gpu, &each_row_parts(gpu, &grads)?, &sq.slice(0, range)?, 1.0, accumulate)?;
    }
    Ok(())
}

/// The squared norm of every sample and its bounds, each `[count]` f64.
struct Norms {
    sq: Array,
    /// Bound on the error of `sq`.
    error: Array,
    /// Sum of the norms of a sample's terms.
    reach: Array,
}

/// Squared norms of every sample. For parameters used several times they include the cross terms.
fn norms(gpu: &Arc<Gpu>, factors: &[Factor], (count, numel): (usize, usize)) -> Result<Norms> {
    let zeros = || Array::zeros(&[count], (DType::F64, gpu));
    let Norms { sq, error, reach } = Norms { sq: zeros(), error: zeros(), reach: zeros() };
    let add = |parts: &Parts, factor: f64| -> Result<()> {
        sum_parts(gpu, parts, &sq, factor, true)?;
        match &parts.errors {
            Some(errors) => sum_rows(gpu, (errors, parts.width), &error, factor, true),
            None => Ok(()),
        }
    };
    for f in factors {
        f.add_reach_on(gpu, &reach)?;
    }
    let pairs = || factors.iter().enumerate().flat_map(|(k, f)| factors[k + 1..].iter().map(move |g| (f, g)));
    if pairs().any(|(f, g)| pairing(f, g).is_none()) {
        add_formed(gpu, factors, numel, &sq, true)?;
        return Ok(Norms { sq, error, reach });
    }
    for f in factors {
        match f.norm_parts(gpu)? {
            Some(parts) => add(&parts, 1.0)?,
            None => add_formed(gpu, std::slice::from_ref(f), numel, &sq, true)?,
        }
    }
    for (f, g) in pairs() {
        add(&pair_parts(gpu, f, g, false)?, 2.0)?;
    }
    // Where the inner products may have cancelled, the gradient of the sample is formed.
    if let [Factor::Outer { left, right, samples }] = factors {
        let o = samples.on_gpu(gpu)?;
        if gram_is_shorter(&o, left, right) {
            let parts = direct_parts_of(gpu, (left, right), None, &o, Some((&sq, &error)))?;
            Launch::new(gpu, "factored", "norms_replace")?
                .grid_stride(count, 8)
                .array(&parts.values)
                .array(&sq)
                .array(&error)
                .val(count as i64)
                .val(parts.width as i64)
                .val(UNCERTAIN)
                .run()?;
        }
    }
    Ok(Norms { sq, error, reach })
}

/// |gᵢ|² of every sample: `[count]` f64.
pub(crate) fn sq_norms(gpu: &Arc<Gpu>, factors: &[Factor], (count, numel): (usize, usize)) -> Result<Array> {
    if count == 0 || factors.is_empty() {
        return Ok(Array::zeros(&[count], (DType::F64, gpu)));
    }
    Ok(norms(gpu, factors, (count, numel))?.sq)
}

/// Upper bounds on the squared norms of the samples' contributions to a weighted sum, `[count]` f64, added to `base` if it is given. They
/// correspond to [`super::Norm::bound`] on the CPU.
pub(crate) fn sq_bounds(
    gpu: &Arc<Gpu>,
    factors: &[Factor],
    (count, numel): (usize, usize),
    base: Option<Array>,
) -> Result<Array> {
    let accumulate = base.is_some();
    let out = match base {
        Some(b) => b,
        None => Array::zeros(&[count], (DType::F64, gpu)),
    };
    if count == 0 || factors.is_empty() {
        return Ok(out);
    }
    let Norms { sq, error, reach } = norms(gpu, factors, (count, numel))?;
    let unit = if factors[0].dtype() == DType::F64 { f64::UNIT } else { f32::UNIT };
    // The most rows that a sum may pass over while it holds a partial sum of a sample.
    let rows: usize = factors.iter().map(|f| f.chain_on_gpu(gpu)).sum::<Result<usize>>()?;
    let widths = factors.iter().map(Factor::widths).max().unwrap_or(0) as f64;
    let shape = layouts::BoundShape {
        count: count as i64,
        up: upwards(unit),
        gamma: 1.01 * (rows + 8) as f64 * unit,
        second: (widths * unit).powi(2) + 1e-15,
        accumulate: accumulate as i64,
    };
    Launch::new(gpu, "factored", "norms_bound")?
        .grid_stride(count, 256)
        .array(&sq)
        .array(&error)
        .array(&reach)
        .array(&out)
        .val(shape)
        .run()?;
    Ok(out)
}

/// Adds to `reach` Σₜ |leftₜ|·|rightₜ|, or Σₜ |leftₜ (⊙ scaleₜ)|, over the rows of each sample; without samples, each row is one.
pub(super) fn add_reach(
    gpu: &Arc<Gpu>,
    (left, right): (&Array, Option<&Array>),
    scale: Option<&Array>,
    samples: Option<&Samples>,
    reach: &Array,
) -> Result<()> {
    let o = match samples {
        Some(s) => s.on_gpu(gpu)?,
        None => each_row(left.shape()[0]),
    };
    let l = row_norms(gpu, left, scale)?;
    let r = right.map(|r| row_norms(gpu, r, None)).transpose()?;
    Launch::new(gpu, "factored", "factor_reach")?
        .grid_stride(o.count, 8)
        .array(&l)
        .optional(r.as_ref())
        .optional(o.offsets.as_ref())
        .optional(o.order.as_ref())
        .array(reach)
        .val(o.count as i64)
        .val(o.each as i64)
        .val(1i32)
        .run()
}

/// `out [len, p]` += Σₜ gradₜ (⊙ scaleₜ) over the rows of each sample in `range`; every sample has `each` rows.
pub(super) fn row_sum_form(
    gpu: &Arc<Gpu>,
    (grad, scale): (&Array, Option<&Array>),
    each: usize,
    range: Range<usize>,
    out: &mut Array,
) -> Result<()> {
    let at = range.start * each..range.end * each;
    let mut terms = grad.slice(0, at.clone())?;
    if let Some(scale) = scale {
        terms = elementwise::binary(gpu, "mul", &terms, &scale.slice(0, at)?)?;
    }
    out.add_in_place(&sums::sum_middle(gpu, &terms, (range.len(), each, out.shape()[1]))?)
}

/// `out [len, r·c]` += Σₜ leftₜ ⊗ rightₜ over the rows of each sample in `range`, as a batched product; every sample has `each` rows.
pub(super) fn outer_form(
    gpu: &Arc<Gpu>,
    (left, right): (&Array, &Array),
    each: usize,
    range: Range<usize>,
    out: &Array,
) -> Result<()> {
    let (at, b) = (range.start * each..range.end * each, range.len());
    let cut = |x: &Array| x.slice(0, at.clone())?.reshape(&[b, each, x.shape()[1]]);
    let to = out.reshape(&[b, left.shape()[1], right.shape()[1]])?;
    gemm::add_product(gpu, &cut(left)?.transpose(1, 2)?, &cut(right)?, None, &to)
}

/// The gradients of the samples in `range`: `[len, numel]`.
pub(crate) fn per_sample(gpu: &Arc<Gpu>, factors: &[Factor], range: Range<usize>, numel: usize) -> Result<Array> {
    let dtype = factors.first().map_or(DType::F32, Factor::dtype);
    let mut out = Array::zeros(&[range.len(), numel], (dtype, gpu));
    for f in factors {
        if f.form_on(gpu, range.clone(), &mut out)? {
            continue;
        }
        let sorted = f.sorted()?;
        for i in range.clone() {
            let row = out.slice(0, i - range.start..i - range.start + 1)?.reshape(&[numel])?;
            sorted.only(i)?.add_on(gpu, None, &row)?;
        }
    }
    Ok(out)
}

/// ⟨gᵢ, hⱼ⟩ for all i, j: `[count₁, count₂]` f64.
pub(crate) fn gram(gpu: &Arc<Gpu>, a: &[Factor], b: &[Factor], (n, m): (usize, usize), numel: usize) -> Result<Array> {
    let out = Array::zeros(&[n, m], (DType::F64, gpu));
    if a.is_empty() || b.is_empty() || n * m == 0 {
        return Ok(out);
    }
    let pairs = || a.iter().flat_map(|f| b.iter().map(move |g| (f, g)));
    if pairs().any(|(f, g)| !matches!(pairing(f, g), Some((_, false)))) {
        let (x, y) = (per_sample(gpu, a, 0..n, numel)?, per_sample(gpu, b, 0..m, numel)?);
        return crate::array::cuda::cast(
            gpu,
            &gemm::product(gpu, &x, &y.transpose(0, 1)?, Default::default())?.0,
            DType::F64,
        );
    }
    let flat = out.reshape(&[n * m])?;
    for (f, g) in pairs() {
        sum_parts(gpu, &pair_parts(gpu, f, g, true)?, &flat, 1.0, true)?;
    }
    Ok(out)
}

/// `weights` on `gpu`, rounded to `dtype` towards zero.
pub(crate) fn weights(gpu: &Arc<Gpu>, w: &[f64], dtype: DType) -> Result<Array> {
    let w = with_float!("weights", dtype, |T| {
        Array::from_slice(&w.iter().map(|&w| toward_zero::<T>(w)).collect::<Vec<_>>(), &[w.len()])
    })?;
    w.to(&Device::Cuda(gpu.clone()))
}
