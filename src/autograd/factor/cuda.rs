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
use crate::kernels::rows::cuda as rows;
use crate::kernels::sums::cuda as sums;
use std::ops::Range;
use std::sync::Arc;

/// Blocks along x of a norm kernel: more tiles than these are walked with a stride.
const MOST_BLOCKS: usize = 1024;
/// Elements of the per-sample gradients that are formed at a time where nothing shorter exists.
const FORMED: usize = 1 << 26;

/// Weights of samples spread over their rows: `[rows]`.
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

/// out += Σₙ wₙ·gradₙ (⊙ scaleₙ) over the rows of `grad [N, p]`; without samples a row is a sample.
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

/// Block e of `out` += Σ over the rows of group e of w·leftₙ ⊗ rightₙ.
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
    // Rows of a group that do not lie together are walked by index, their weights put in the order of the walk.
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

/// Partial sums in f64, `[count, width]`, and their width: a squared norm or an inner product is the sum of a row.
pub(crate) type Parts = (Array, usize);

/// The operands of one side of a Gram kernel.
pub(crate) struct Side<'a> {
    /// `[N, …]`.
    pub left: &'a Array,
    /// `[N, …]`, where each row is a product of two.
    pub right: Option<&'a Array>,
    /// An index for each row: only rows of equal index meet. In a gather, the column that is gathered.
    pub ids: Option<Array>,
    /// Whose rows.
    pub samples: &'a Samples,
}

/// How two factors' inner product is taken without forming a gradient: the pairing, and whether they change places.
fn pairing(a: &Factor, b: &Factor) -> Option<(i32, bool)> {
    match a.pairing(b) {
        Some(kind) => Some((kind, false)),
        None => b.pairing(a).map(|kind| (kind, true)),
    }
}

/// The parts of the inner products of `a` and `b`. With `pairs` all of count₁·count₂, else sample i with sample i.
fn pair_parts(gpu: &Arc<Gpu>, a: &Factor, b: &Factor, pairs: bool) -> Result<Parts> {
    let Some((kind, swap)) = pairing(a, b) else {
        return Err(Error::invalid("gram", format!("{} against {}", a.kind(), b.kind())));
    };
    let (a, b) = if swap { (b, a) } else { (a, b) };
    gram_parts(gpu, kind, (&a.side(gpu, kind, false)?, &b.side(gpu, kind, true)?), false, pairs)
}

/// The parts of every sample's inner product with itself, which is its squared norm.
pub(super) fn own_gram_parts(gpu: &Arc<Gpu>, kind: i32, side: &Side) -> Result<Parts> {
    gram_parts(gpu, kind, (side, side), true, false)
}

/// Whether a squared norm of outer products takes fewer multiply-adds by [`own_gram_parts`] than by [`direct_parts`]:
/// T²·(r + c) halved by symmetry, against T·r·c, T the rows of a sample.
pub(super) fn gram_is_shorter(o: &Owners, left: &Array, right: &Array) -> bool {
    let (rd, cd) = (left.shape()[1], right.shape()[1]);
    o.longest * (rd + cd) <= 2 * rd * cd
}

/// part[pair, …] for the inner products of two sides. With `pairs` all of count₁·count₂, else sample i with sample i;
/// `same` where both sides are one.
fn gram_parts(gpu: &Arc<Gpu>, kind: i32, (x, y): (&Side, &Side), same: bool, pairs: bool) -> Result<Parts> {
    let (ox, oy) = (x.samples.on_gpu(gpu)?, y.samples.on_gpu(gpu)?);
    let tile = gemm::tile(x.left.dtype());
    let (n1, n2) = (ox.longest.div_ceil(tile), oy.longest.div_ceil(tile));
    let tiles = if same { n1 * (n1 + 1) / 2 } else { n1 * n2 };
    let width = tiles.clamp(1, MOST_BLOCKS);
    let count = if pairs { ox.count * oy.count } else { ox.count };
    let part = Array::uninit_on(gpu, &[count, width], DType::F64)?;
    let w = |x: Option<&Array>| x.map_or(0, |x| x.shape()[1] as i64);
    let shape = layouts::GramShape {
        rd: w(Some(x.left)),
        cd: if kind == layouts::PAIR_PRODUCT { w(x.right) } else { 0 },
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
        .array(&part)
        .val(shape)
        .run()?;
    Ok((part, width))
}

/// sq[i] (+)= factor·Σ part[i, …].
fn sum_parts(gpu: &Arc<Gpu>, (part, width): &Parts, sq: &Array, factor: f64, accumulate: bool) -> Result<()> {
    let n = sq.numel();
    Launch::new(gpu, "factored", "norms_sum")?
        .grid_stride(n, 8)
        .array(part)
        .array(sq)
        .val(n as i64)
        .val(*width as i64)
        .val(factor)
        .val(accumulate as i32)
        .run()
}

/// The parts of |Σₜ leftₜ ⊗ rightₜ|² by tiles of the gradient; `group` as in [`Factor::GroupedOuter`], a sample's rows of
/// one group neighbours.
pub(super) fn direct_parts(
    gpu: &Arc<Gpu>,
    (left, right): (&Array, &Array),
    group: Option<&Array>,
    o: &Owners,
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
        .val(layouts::DirectShape {
            rd: rd as i64,
            cd: cd as i64,
            l_rs: rd as i64,
            r_rs: cd as i64,
            count: o.count as i64,
            each: o.each as i64,
        })
        .run()?;
    Ok((part, width))
}

/// The parts of |Σₜ gradₜ (⊙ scaleₜ)|² for `grad [N, p]`.
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
    Ok((part, width))
}

/// The parts of |gradₙ|² for `grad [N, p]`: each row is a sample.
pub(super) fn each_row_parts(gpu: &Arc<Gpu>, grad: &Array) -> Result<Parts> {
    let o = Owners { each: 1, count: grad.shape()[0], longest: 1, owner: None, offsets: None, order: None };
    row_parts(gpu, (grad, None), &o)
}

/// Adds to `sq` the squared norms of the samples' gradients, which are formed, some at a time; `accumulate` as in
/// [`sum_parts`].
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

/// |gᵢ|² of every sample: `[count]` f64, added to `base` if there is one. Parameters used several times include their
/// cross terms.
pub(crate) fn sq_norms(
    gpu: &Arc<Gpu>,
    factors: &[Factor],
    (count, numel): (usize, usize),
    base: Option<Array>,
) -> Result<Array> {
    let mut accumulate = base.is_some();
    let sq = match base {
        Some(b) => b,
        None if factors.is_empty() => Array::zeros(&[count], (DType::F64, gpu)),
        None => Array::uninit_on(gpu, &[count], DType::F64)?,
    };
    if count == 0 || factors.is_empty() {
        return Ok(sq);
    }
    let pairs = || factors.iter().enumerate().flat_map(|(k, f)| factors[k + 1..].iter().map(move |g| (f, g)));
    if pairs().any(|(f, g)| pairing(f, g).is_none()) {
        add_formed(gpu, factors, numel, &sq, accumulate)?;
        return Ok(sq);
    }
    for f in factors {
        match f.norm_parts(gpu)? {
            Some(parts) => sum_parts(gpu, &parts, &sq, 1.0, accumulate)?,
            None => add_formed(gpu, std::slice::from_ref(f), numel, &sq, accumulate)?,
        }
        accumulate = true;
    }
    for (f, g) in pairs() {
        sum_parts(gpu, &pair_parts(gpu, f, g, false)?, &sq, 2.0, true)?;
    }
    Ok(sq)
}

/// `out [len, p]` += Σₜ gradₜ (⊙ scaleₜ) over the rows of each sample in `range`, of which each has `each`.
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

/// `out [len, r·c]` += Σₜ leftₜ ⊗ rightₜ over the rows of each sample in `range`, of which each has `each`: a batch of products.
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

/// `weights` on the GPU of `gpu`, rounded to `dtype`.
pub(crate) fn weights(gpu: &Arc<Gpu>, w: &[f64], dtype: DType) -> Result<Array> {
    Array::from_slice(w, &[w.len()])?.cast(dtype).to(&Device::Cuda(gpu.clone()))
}
