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
use crate::kernels::rows::{cuda as index, cuda as rows};
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

/// out += Σᵢ wᵢ·(gradient of sample i), or the plain sum; `weights [B]` and `out [numel]` contiguous and of the
/// factor's dtype. A sample of weight zero is left out whatever it holds.
pub(crate) fn add(gpu: &Arc<Gpu>, factor: &Factor, weights: Option<&Array>, out: &Array) -> Result<()> {
    match factor {
        Factor::Outer { left, right, samples } => {
            let o = samples.on_gpu(gpu)?;
            let w = weights.map(|w| gemm::RowWeights { weights: w, owner: o.owner.as_ref(), each: o.each.max(1) });
            let shape = [left.shape()[1], right.shape()[1]];
            gemm::add_product(gpu, &left.transpose(0, 1)?, right, w, &out.reshape(&shape)?)
        }
        Factor::RowSum { grad, samples } => row_sum(gpu, grad, None, weights, Some(samples), out),
        Factor::ScaledRowSum { grad, scale, samples } => row_sum(gpu, grad, Some(scale), weights, Some(samples), out),
        Factor::Lookup { ids, grad, samples } => {
            let w = weights.map(|w| row_weights(gpu, w, samples)).transpose()?;
            let p = grad.shape()[1];
            let n = out.numel().checked_div(p).unwrap_or(0);
            index::add_rows(gpu, (grad, &on(gpu, ids)?), w.as_ref(), (1, n, p), out)
        }
        Factor::GroupedOuter { left, right, group, samples } => {
            grouped(gpu, (left, right), group, samples, weights, out)
        }
        Factor::PerSample { grads } => {
            let flat = grads.reshape(&[grads.shape()[0], out.numel()])?;
            row_sum(gpu, &flat, None, weights, None, out)
        }
        Factor::Dense { grad } => row_sum(gpu, &grad.reshape(&[1, out.numel()])?, None, None, None, out),
    }
}

/// out += Σₙ wₙ·gradₙ (⊙ scaleₙ) over the rows of `grad [N, p]`; without samples a row is a sample.
fn row_sum(
    gpu: &Arc<Gpu>,
    grad: &Array,
    scale: Option<&Array>,
    weights: Option<&Array>,
    samples: Option<&Samples>,
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
fn grouped(
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

/// The operands of one side of a Gram kernel.
struct Side<'a> {
    left: &'a Array,
    right: Option<&'a Array>,
    ids: Option<Array>,
    samples: &'a Samples,
}

/// How two factors' inner product is taken without forming a gradient: the kind, and whether they change places.
fn pairing(a: &Factor, b: &Factor) -> Option<(i32, bool)> {
    let width = |x: &Array| x.shape()[1];
    match (a, b) {
        (Factor::Outer { left: x, .. }, Factor::Outer { left: y, .. }) if width(x) == width(y) => {
            Some((layouts::PAIR_PRODUCT, false))
        }
        (Factor::GroupedOuter { .. }, Factor::GroupedOuter { .. }) => Some((layouts::PAIR_PRODUCT, false)),
        (Factor::Lookup { .. }, Factor::Lookup { .. }) => Some((layouts::PAIR_ONE, false)),
        // An embedding tied to the output head: left holds the logits' gradients, right the head's input.
        (Factor::Lookup { grad, .. }, Factor::Outer { right, .. }) if width(grad) == width(right) => {
            Some((layouts::PAIR_GATHER, false))
        }
        (Factor::Outer { right, .. }, Factor::Lookup { grad, .. }) if width(grad) == width(right) => {
            Some((layouts::PAIR_GATHER, true))
        }
        _ => None,
    }
}

/// The operands of a factor in a Gram kernel of this kind; `second` is its place.
fn side<'a>(gpu: &Arc<Gpu>, f: &'a Factor, kind: i32, second: bool) -> Result<Side<'a>> {
    Ok(match f {
        Factor::Outer { left, right, samples } if kind == layouts::PAIR_GATHER && second => {
            Side { left: right, right: Some(left), ids: None, samples }
        }
        Factor::Outer { left, right, samples } => Side { left, right: Some(right), ids: None, samples },
        Factor::GroupedOuter { left, right, group, samples } => {
            let (ids, ..) = group.on_gpu(gpu)?;
            Side { left, right: Some(right), ids: Some(ids), samples }
        }
        Factor::Lookup { ids, grad, samples } => Side { left: grad, right: None, ids: Some(on(gpu, ids)?), samples },
        _ => return Err(Error::invalid("gram", format!("a {} factor has no such form", f.kind()))),
    })
}

/// part[pair, …] for the inner products of `a` and `b`; returns the parts and their number per pair. With `pairs` all of
/// count₁·count₂, else sample i with sample i.
fn gram_parts(gpu: &Arc<Gpu>, a: &Factor, b: &Factor, same: bool, pairs: bool) -> Result<(Array, usize)> {
    let Some((kind, swap)) = pairing(a, b) else {
        return Err(Error::invalid("gram", format!("{} against {}", a.kind(), b.kind())));
    };
    let (a, b) = if swap { (b, a) } else { (a, b) };
    let (x, y) = (side(gpu, a, kind, false)?, side(gpu, b, kind, true)?);
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
        .shared(34_880)
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
fn sum_parts(gpu: &Arc<Gpu>, (part, width): (&Array, usize), sq: &Array, factor: f64, accumulate: bool) -> Result<()> {
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

/// The parts of |Σₜ leftₜ ⊗ rightₜ|² by tiles of the gradient; `group` as in [`Factor::GroupedOuter`], a sample's rows of
/// one group neighbours.
fn direct_parts(
    gpu: &Arc<Gpu>,
    (left, right): (&Array, &Array),
    group: Option<&Array>,
    o: &Owners,
) -> Result<(Array, usize)> {
    let (rd, cd, tile) = (left.shape()[1], right.shape()[1], gemm::tile(left.dtype()));
    let width = (rd.div_ceil(tile) * cd.div_ceil(tile)).clamp(1, MOST_BLOCKS);
    let part = Array::uninit_on(gpu, &[o.count, width], DType::F64)?;
    Launch::new(gpu, "factored", &format!("factor_direct_{}", suffix(left.dtype())))?
        .grid(width, o.count.min(MAX_GRID_YZ), 1)
        .shared(33_856)
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
fn row_parts(gpu: &Arc<Gpu>, grad: &Array, scale: Option<&Array>, o: &Owners) -> Result<(Array, usize)> {
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

/// Each row a sample.
fn single(count: usize) -> Owners {
    Owners { each: 1, count, longest: 1, owner: None, offsets: None, order: None }
}

/// The parts of the squared norms of one factor by itself.
fn norm_parts(gpu: &Arc<Gpu>, f: &Factor) -> Result<(Array, usize)> {
    // Multiply-adds: T²·(r + c) halved by symmetry, against T·r·c, T the rows of a sample.
    let shorter =
        |o: &Owners, l: &Array, r: &Array| o.longest * (l.shape()[1] + r.shape()[1]) <= 2 * l.shape()[1] * r.shape()[1];
    match f {
        Factor::Outer { left, right, samples } => {
            let o = samples.on_gpu(gpu)?;
            if shorter(&o, left, right) {
                return gram_parts(gpu, f, f, true, false);
            }
            direct_parts(gpu, (left, right), None, &o)
        }
        Factor::GroupedOuter { left, right, group, samples } => {
            let o = samples.on_gpu(gpu)?;
            if shorter(&o, left, right) || !f.groups_are_neighbours() {
                return gram_parts(gpu, f, f, true, false);
            }
            let (group, ..) = group.on_gpu(gpu)?;
            direct_parts(gpu, (left, right), Some(&group), &o)
        }
        Factor::Lookup { .. } => gram_parts(gpu, f, f, true, false),
        Factor::RowSum { grad, samples } => row_parts(gpu, grad, None, &samples.on_gpu(gpu)?),
        Factor::ScaledRowSum { grad, scale, samples } => row_parts(gpu, grad, Some(scale), &samples.on_gpu(gpu)?),
        Factor::PerSample { grads } => {
            let b = grads.shape()[0];
            row_parts(gpu, &grads.reshape(&[b, grads.numel().checked_div(b).unwrap_or(0)])?, None, &single(b))
        }
        Factor::Dense { .. } => Err(Error::autograd("sample_sq_norms", "a dense gradient has no per-sample meaning")),
    }
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
        None if factors.is_empty() => Array::zeros_on(gpu, &[count], DType::F64)?,
        None => Array::uninit_on(gpu, &[count], DType::F64)?,
    };
    if count == 0 || factors.is_empty() {
        return Ok(sq);
    }
    let pairs = || factors.iter().enumerate().flat_map(|(k, f)| factors[k + 1..].iter().map(move |g| (f, g)));
    if pairs().any(|(f, g)| pairing(f, g).is_none()) {
        // No short form: the samples' gradients are formed, some at a time.
        let each = (FORMED / numel.max(1)).clamp(1, count);
        for from in (0..count).step_by(each) {
            let range = from..(from + each).min(count);
            let grads = per_sample(gpu, factors, range.clone(), numel)?;
            let (part, width) = row_parts(gpu, &grads, None, &single(range.len()))?;
            sum_parts(gpu, (&part, width), &sq.slice(0, range)?, 1.0, accumulate)?;
        }
        return Ok(sq);
    }
    for f in factors {
        let (part, width) = norm_parts(gpu, f)?;
        sum_parts(gpu, (&part, width), &sq, 1.0, accumulate)?;
        accumulate = true;
    }
    for (f, g) in pairs() {
        let (part, width) = gram_parts(gpu, f, g, false, false)?;
        sum_parts(gpu, (&part, width), &sq, 2.0, true)?;
    }
    Ok(sq)
}

/// The gradients of the samples in `range`: `[len, numel]`.
pub(crate) fn per_sample(gpu: &Arc<Gpu>, factors: &[Factor], range: Range<usize>, numel: usize) -> Result<Array> {
    let dtype = factors.first().map_or(DType::F32, Factor::dtype);
    let mut out = Array::zeros_on(gpu, &[range.len(), numel], dtype)?;
    for f in factors {
        let whole = match f {
            Factor::PerSample { grads } => Some(grads.reshape(&[grads.shape()[0], numel])?.slice(0, range.clone())?),
            Factor::RowSum { grad, samples: Samples::Uniform { each, .. } } => {
                let rows = grad.slice(0, range.start * each..range.end * each)?;
                Some(sums::sum_middle(gpu, &rows, (range.len(), *each, numel))?)
            }
            Factor::ScaledRowSum { grad, scale, samples: Samples::Uniform { each, .. } } => {
                let rows = range.start * each..range.end * each;
                let product = elementwise::binary(gpu, "mul", &grad.slice(0, rows.clone())?, &scale.slice(0, rows)?)?;
                Some(sums::sum_middle(gpu, &product, (range.len(), *each, numel))?)
            }
            _ => None,
        };
        if let Some(whole) = whole {
            out.add_in_place(&whole)?;
            continue;
        }
        if let Factor::Outer { left, right, samples: Samples::Uniform { each, .. } } = f {
            let (rows, b) = (range.start * each..range.end * each, range.len());
            let cut = |x: &Array| x.slice(0, rows.clone())?.reshape(&[b, *each, x.shape()[1]]);
            let to = out.reshape(&[b, left.shape()[1], right.shape()[1]])?;
            gemm::add_product(gpu, &cut(left)?.transpose(1, 2)?, &cut(right)?, None, &to)?;
            continue;
        }
        let sorted = f.sorted()?;
        for i in range.clone() {
            let row = out.slice(0, i - range.start..i - range.start + 1)?.reshape(&[numel])?;
            add(gpu, &sorted.only(i)?, None, &row)?;
        }
    }
    Ok(out)
}

/// ⟨gᵢ, hⱼ⟩ for all i, j: `[count₁, count₂]` f64.
pub(crate) fn gram(gpu: &Arc<Gpu>, a: &[Factor], b: &[Factor], (n, m): (usize, usize), numel: usize) -> Result<Array> {
    let out = Array::zeros_on(gpu, &[n, m], DType::F64)?;
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
        let (part, width) = gram_parts(gpu, f, g, false, true)?;
        sum_parts(gpu, (&part, width), &flat, 1.0, true)?;
    }
    Ok(out)
}

/// `weights` on the GPU of `gpu`, rounded to `dtype`.
pub(crate) fn weights(gpu: &Arc<Gpu>, w: &[f64], dtype: DType) -> Result<Array> {
    Array::from_slice(w, &[w.len()])?.cast(dtype).to(&Device::Cuda(gpu.clone()))
}
