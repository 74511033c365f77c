//! Launches of the kernels that work along rows (`cuda/reduce.cu`, `softmax.cu`, `norm.cu`, `loss.cu`, `index.cu`).
//!
//! The row rule: up to 1024 elements a warp takes a row and a block eight of them; longer rows have a block each.

use super::elementwise::{on, strided, suffix};
use super::{Gpu, Launch};
use crate::error::{Error, Result};
use crate::tensor::Array;
use std::sync::Arc;

/// Blocks for rows of `d` elements.
pub(crate) fn blocks(rows: usize, d: usize) -> usize {
    if d <= 1024 { rows.div_ceil(8) } else { rows }
}

/// A pointer argument; null if there is none.
fn optional<'a>(l: Launch<'a>, a: Option<&'a Array>, op: &str) -> Result<Launch<'a>> {
    Ok(match a {
        Some(a) => {
            let (block, at) = a.block(op)?;
            l.buf(block, at)
        }
        None => l.null(),
    })
}

/// `out[r]` = Σ over row `r` of a contiguous array of `rows` × `cols`. Long rows are cut, and the parts added in order.
pub(crate) fn sum_rows(gpu: &Arc<Gpu>, a: &Array, rows: usize, cols: usize, shape: &[usize]) -> Result<Array> {
    const CHUNK: usize = 16_384;
    let (op, s) = ("sum", suffix(a.dtype()));
    let out = Array::uninit_on(gpu, shape, a.dtype())?;
    if rows == 0 {
        return Ok(out);
    }
    let (x, y) = (a.block(op)?, out.block(op)?);
    let parts = cols.div_ceil(CHUNK);
    if parts <= 1 {
        let l = Launch::new(gpu, "reduce", &format!("sum_rows_{s}"))?.grid(blocks(rows, cols), 1, 1).block(256);
        l.buf(x.0, x.1).buf(y.0, y.1).val(rows as i64).val(cols as i64).val(1f64).run()?;
        return Ok(out);
    }
    let part = Array::uninit_on(gpu, &[rows, parts], a.dtype().compute())?;
    let p = part.block(op)?;
    let l = Launch::new(gpu, "reduce", &format!("sum_rows_part_{s}"))?.grid(rows * parts, 1, 1).block(256);
    l.buf(x.0, x.1).buf(p.0, p.1).val(rows as i64).val(cols as i64).val(CHUNK as i64).run()?;
    let l = Launch::new(gpu, "reduce", &format!("sum_rows_last_{s}"))?.grid(blocks(rows, parts), 1, 1).block(256);
    l.buf(p.0, p.1).buf(y.0, y.1).val(rows as i64).val(parts as i64).val(1f64).run()?;
    Ok(out)
}

/// `out[c]` = Σ over column `c` of a contiguous array of `n` × `inner`. Tall columns are cut, and the parts added in order.
pub(crate) fn sum_columns(gpu: &Arc<Gpu>, a: &Array, n: usize, inner: usize, shape: &[usize]) -> Result<Array> {
    const CHUNK: usize = 256;
    let (op, s) = ("sum", suffix(a.dtype()));
    let out = Array::uninit_on(gpu, shape, a.dtype())?;
    if inner == 0 {
        return Ok(out);
    }
    let (x, y) = (a.block(op)?, out.block(op)?);
    let parts = n.div_ceil(CHUNK);
    if parts <= 1 {
        let l = Launch::new(gpu, "reduce", &format!("sum_cols_{s}"))?.grid(inner.div_ceil(32), 1, 1).block(256);
        l.buf(x.0, x.1).buf(y.0, y.1).val(1i64).val(n as i64).val(inner as i64).val(1f64).run()?;
        return Ok(out);
    }
    let part = Array::uninit_on(gpu, &[parts, inner], a.dtype().compute())?;
    let p = part.block(op)?;
    let l =
        Launch::new(gpu, "reduce", &format!("sum_cols_part_{s}"))?.grid(parts * inner.div_ceil(32), 1, 1).block(256);
    l.buf(x.0, x.1).buf(p.0, p.1).val(1i64).val(n as i64).val(inner as i64).val(CHUNK as i64).run()?;
    let l = Launch::new(gpu, "reduce", &format!("sum_cols_last_{s}"))?.grid(inner.div_ceil(32), 1, 1).block(256);
    l.buf(p.0, p.1).buf(y.0, y.1).val(1i64).val(parts as i64).val(inner as i64).val(1f64).run()?;
    Ok(out)
}

/// Σ over the middle of a contiguous `[outer, n, inner]`: `[outer, inner]`.
pub(crate) fn sum_middle(gpu: &Arc<Gpu>, a: &Array, (outer, n, inner): (usize, usize, usize)) -> Result<Array> {
    let s = suffix(a.dtype());
    if outer * n * inner == 0 {
        return Array::zeros_on(gpu, &[outer, inner], a.dtype());
    }
    let out = Array::uninit_on(gpu, &[outer, inner], a.dtype())?;
    let l = Launch::new(gpu, "reduce", &format!("sum_cols_{s}"))?.grid(outer * inner.div_ceil(32), 1, 1);
    l.array(a).array(&out).val(outer as i64).val(n as i64).val(inner as i64).val(1f64).run()?;
    Ok(out)
}

/// Softmax, or its logarithm, of the rows of a contiguous array.
pub(crate) fn softmax(gpu: &Arc<Gpu>, x: &Array, log: bool) -> Result<Array> {
    let op = if log { "log_softmax" } else { "softmax" };
    let out = Array::uninit_on(gpu, x.shape(), x.dtype())?;
    let d = *x.shape().last().unwrap_or(&1);
    if x.numel() == 0 {
        return Ok(out);
    }
    let (a, y, rows) = (x.block(op)?, out.block(op)?, x.numel() / d);
    let l = Launch::new(gpu, "softmax", &format!("{op}_{}", suffix(x.dtype())))?.grid(blocks(rows, d), 1, 1).block(256);
    l.buf(a.0, a.1).buf(y.0, y.1).val(rows as i64).val(d as i64).run()?;
    Ok(out)
}

/// Its gradient, from its value.
pub(crate) fn softmax_grad(gpu: &Arc<Gpu>, y: &Array, dy: &Array, log: bool) -> Result<Array> {
    let op = if log { "log_softmax" } else { "softmax" };
    let (y, dy) = (on(gpu, y)?, on(gpu, dy)?.contiguous());
    let out = Array::uninit_on(gpu, y.shape(), y.dtype())?;
    let d = *y.shape().last().unwrap_or(&1);
    if y.numel() == 0 {
        return Ok(out);
    }
    let (a, g, dx, rows) = (y.block(op)?, dy.block(op)?, out.block(op)?, y.numel() / d);
    let name = format!("{op}_grad_{}", suffix(y.dtype()));
    let l = Launch::new(gpu, "softmax", &name)?.grid(blocks(rows, d), 1, 1).block(256);
    l.buf(a.0, a.1).buf(g.0, g.1).buf(dx.0, dx.1).val(rows as i64).val(d as i64).run()?;
    Ok(out)
}

/// (x − mean)·rstd·gain + bias over the last dimension, and mean and rstd per row.
pub(crate) fn norm(
    gpu: &Arc<Gpu>,
    x: &Array,
    (gain, bias): (Option<&Array>, Option<&Array>),
    (eps, center): (f64, bool),
) -> Result<(Array, Array)> {
    let op = "norm";
    let d = *x.shape().last().unwrap_or(&1);
    let rows = x.numel().checked_div(d).unwrap_or(0);
    let (gain, bias) = (gain.map(|a| on(gpu, a)).transpose()?, bias.map(|a| on(gpu, a)).transpose()?);
    let out = Array::uninit_on(gpu, x.shape(), x.dtype())?;
    let stats = Array::uninit_on(gpu, &[rows, 2], x.dtype().compute())?;
    if rows > 0 {
        let (a, y, st) = (x.block(op)?, out.block(op)?, stats.block(op)?);
        let l =
            Launch::new(gpu, "norm", &format!("norm_{}", suffix(x.dtype())))?.grid(blocks(rows, d), 1, 1).block(256);
        let l = optional(optional(l.buf(a.0, a.1), gain.as_ref(), op)?, bias.as_ref(), op)?;
        l.buf(y.0, y.1).buf(st.0, st.1).val(rows as i64).val(d as i64).val(eps).val(center as i32).run()?;
    }
    Ok((out, stats))
}

/// The gradient of the input, and x̂, each if asked for.
pub(crate) fn norm_grad(
    gpu: &Arc<Gpu>,
    (x, stats, dy): (&Array, &Array, &Array),
    gain: Option<&Array>,
    center: bool,
    (dx, xhat): (bool, bool),
) -> Result<(Option<Array>, Option<Array>)> {
    let op = "norm";
    let (x, stats, dy) = (on(gpu, x)?, on(gpu, stats)?, on(gpu, dy)?);
    let gain = gain.map(|a| on(gpu, a)).transpose()?;
    let d = *x.shape().last().unwrap_or(&1);
    let rows = x.numel().checked_div(d).unwrap_or(0);
    let fresh = |wanted: bool, shape: &[usize]| match wanted {
        true => Array::uninit_on(gpu, shape, x.dtype()).map(Some),
        false => Ok(None),
    };
    let (dx, xhat) = (fresh(dx, x.shape())?, fresh(xhat, &[rows, d])?);
    if rows > 0 {
        let (a, st, g) = (x.block(op)?, stats.block(op)?, dy.block(op)?);
        let name = format!("norm_grad_{}", suffix(x.dtype()));
        let l = Launch::new(gpu, "norm", &name)?.grid(blocks(rows, d), 1, 1).block(256);
        let l = optional(l.buf(a.0, a.1).buf(st.0, st.1).buf(g.0, g.1), gain.as_ref(), op)?;
        let l = optional(optional(l, dx.as_ref(), op)?, xhat.as_ref(), op)?;
        l.val(rows as i64).val(d as i64).val(center as i32).run()?;
    }
    Ok((dx, xhat))
}

/// `out[o, i]` = `src[o, ids[i]]` for rows of `p` elements: `src [outer, n, p]` contiguous, ids u32 below n.
pub(crate) fn take(
    gpu: &Arc<Gpu>,
    src: &Array,
    ids: &Array,
    outer: usize,
    n: usize,
    p: usize,
    shape: &[usize],
) -> Result<Array> {
    let op = "take";
    let (src, ids) = (on(gpu, src)?, on(gpu, ids)?);
    let out = Array::uninit_on(gpu, shape, src.dtype())?;
    if out.numel() > 0 {
        let (a, i, y, k) = (src.block(op)?, ids.block(op)?, out.block(op)?, ids.numel());
        let name = format!("take_b{}", src.dtype().size());
        let l = Launch::new(gpu, "index", &name)?.grid(out.numel().div_ceil(1024), 1, 1).block(256);
        l.buf(a.0, a.1)
            .buf(i.0, i.1)
            .buf(y.0, y.1)
            .val(outer as i64)
            .val(k as i64)
            .val(n as i64)
            .val(p as i64)
            .run()?;
    }
    Ok(out)
}

/// A map from rows to samples in a GPU's memory, as the kernels take it.
#[derive(Clone, Debug)]
pub(crate) struct Owners {
    /// Rows of each sample where they are uniform; 0 otherwise.
    pub each: usize,
    /// Number of samples.
    pub count: usize,
    /// Rows of the largest sample.
    pub longest: usize,
    /// `[rows]` u32; `None` where uniform.
    pub owner: Option<Array>,
    /// `[count + 1]` i64; `None` where uniform.
    pub offsets: Option<Array>,
    /// `[rows]` u32, rows by sample; `None` where they lie that way already.
    pub order: Option<Array>,
}

/// Targets of the rows of some logits, and whose rows they are, in a GPU's memory.
pub(crate) struct Targets {
    /// `[rows]` u32.
    ids: Array,
    /// `[rows]`: what a row's loss counts; empty until the loss has been taken.
    weight: Option<Array>,
    owners: Owners,
    /// A target that does not count; −1 for none.
    ignore: i64,
}

impl Targets {
    /// Targets from wherever they are.
    pub fn new(gpu: &Arc<Gpu>, ids: &Array, owners: Owners, ignore: Option<u32>) -> Result<Targets> {
        let ids = on(gpu, ids)?.contiguous();
        Ok(Targets { ids, weight: None, owners, ignore: ignore.map_or(-1, |i| i as i64) })
    }
}

/// Cross-entropy of contiguous logits `[…, d]` with targets, summed or averaged per sample: `[samples]`, the
/// log-sum-exp of every row, and the targets with the weights that the backward needs.
pub(crate) fn cross_entropy(
    x: &Array,
    mut targets: Targets,
    mean: bool,
    smoothing: f64,
) -> Result<(Array, Array, Targets)> {
    let gpu = targets.ids.gpu().ok_or_else(|| Error::device("cross_entropy", "targets are on the CPU"))?;
    let (rows, d, count) = (targets.ids.numel(), *x.shape().last().unwrap_or(&1), targets.owners.count);
    let fresh = |n: usize| Array::uninit_on(gpu, &[n], x.dtype().compute());
    let (loss, lse, weight) = (fresh(rows)?, fresh(rows)?, fresh(rows)?);
    if rows == 0 {
        let out = Array::zeros_on(gpu, &[count], x.dtype().compute())?;
        targets.weight = Some(weight);
        return Ok((out, lse, targets));
    }
    let out = fresh(count)?;
    let l = Launch::new(gpu, "loss", &format!("cross_entropy_{}", suffix(x.dtype())))?.grid(blocks(rows, d), 1, 1);
    let l = l.array(x).array(&targets.ids).array(&loss).array(&lse).val(rows as i64).val(d as i64);
    l.val(smoothing).val(targets.ignore).run()?;
    let name = format!("sample_loss_{}", suffix(loss.dtype()));
    let l = Launch::new(gpu, "loss", &name)?.grid(count.div_ceil(8), 1, 1).array(&loss).array(&targets.ids);
    let l = l.optional(targets.owners.offsets.as_ref()).optional(targets.owners.order.as_ref());
    let l = l.array(&out).array(&weight).val(count as i64).val(targets.owners.each as i64);
    l.val(targets.ignore).val(mean as i32).run()?;
    targets.weight = Some(weight);
    Ok((out, lse, targets))
}

/// The gradient of the logits, `grad [samples]`.
pub(crate) fn cross_entropy_grad(
    (x, lse): (&Array, &Array),
    targets: &Targets,
    grad: &Array,
    smoothing: f64,
) -> Result<Array> {
    let op = "cross_entropy";
    let (Some(gpu), Some(weight)) = (x.gpu(), &targets.weight) else {
        return Err(Error::device(op, "the gradient was asked for before the loss"));
    };
    let grad = on(gpu, grad)?.contiguous();
    let (rows, d) = (targets.ids.numel(), *x.shape().last().unwrap_or(&1));
    let out = Array::uninit_on(gpu, x.shape(), x.dtype())?;
    if rows > 0 {
        let name = format!("cross_entropy_grad_{}", suffix(x.dtype()));
        let l = Launch::new(gpu, "loss", &name)?.grid(blocks(rows, d), 1, 1);
        let l = l.array(x).array(lse).array(&targets.ids).array(weight).array(&grad);
        let l = l.optional(targets.owners.owner.as_ref()).array(&out).val(rows as i64).val(d as i64);
        l.val(targets.owners.each as i64).val(smoothing).val(targets.ignore).run()?;
    }
    Ok(out)
}

/// Rotary position embedding of `x [B, T, H, D]` (unit stride along D) with tables `[positions, D/2]`, row 0 at position
/// `offset`; pairs interleaved or half apart, forwards or back.
pub(crate) fn rotary(
    gpu: &Arc<Gpu>,
    x: &Array,
    (cos, sin): (&Array, &Array),
    offset: usize,
    (interleaved, inverse): (bool, bool),
) -> Result<Array> {
    /// `Rotary` of `cuda/rotary.cu`.
    #[repr(C)]
    #[derive(Clone, Copy, bytemuck::NoUninit)]
    struct Rotary {
        /// batch, time, heads, half, step_b, step_t, step_h, offset.
        sizes: [i64; 8],
        interleaved: i32,
        inverse: i32,
    }
    let out = Array::uninit_on(gpu, x.shape(), x.dtype())?;
    let (s, st) = (x.shape(), x.strides());
    let sizes = [s[0], s[1], s[2], s[3] / 2, st[0], st[1], st[2], offset].map(|v| v as i64);
    let r = Rotary { sizes, interleaved: interleaved as i32, inverse: inverse as i32 };
    let l = Launch::new(gpu, "rotary", &format!("rotary_{}", suffix(x.dtype())))?;
    l.grid((x.numel() / 2).div_ceil(256), 1, 1).array(x).array(cos).array(sin).array(&out).val(r).run()?;
    Ok(out)
}

/// softplus(x) − x·t, element by element.
pub(crate) fn bce(gpu: &Arc<Gpu>, x: &Array, t: &Array) -> Result<Array> {
    let t = on(gpu, t)?;
    let out = Array::uninit_on(gpu, x.shape(), x.dtype())?;
    let n = out.numel();
    let s: [i64; 19] = strided("binary_cross_entropy", x.shape(), [x.strides(), t.strides()])?;
    let l = Launch::new(gpu, "loss", &format!("bce_{}", suffix(x.dtype())))?.grid(n.div_ceil(1024), 1, 1);
    l.array(x).array(&t).array(&out).val(n as i64).val(s).run()?;
    Ok(out)
}

/// (sigmoid(x) − t)·g.
pub(crate) fn bce_grad(gpu: &Arc<Gpu>, x: &Array, t: &Array, g: &Array) -> Result<Array> {
    let t = on(gpu, t)?;
    let out = Array::uninit_on(gpu, x.shape(), x.dtype())?;
    let n = out.numel();
    let s: [i64; 25] = strided("binary_cross_entropy", x.shape(), [x.strides(), t.strides(), g.strides()])?;
    let l = Launch::new(gpu, "loss", &format!("bce_grad_{}", suffix(x.dtype())))?.grid(n.div_ceil(1024), 1, 1);
    l.array(x).array(&t).array(g).array(&out).val(n as i64).val(s).run()?;
    Ok(out)
}

/// x·ln x, 0 where x is not positive.
pub(crate) fn xlogx(gpu: &Arc<Gpu>, x: &Array) -> Result<Array> {
    let out = Array::uninit_on(gpu, x.shape(), x.dtype())?;
    let n = out.numel();
    let s: [i64; 13] = strided("kl_divergence", x.shape(), [x.strides()])?;
    let l = Launch::new(gpu, "loss", &format!("xlogx_{}", suffix(x.dtype())))?.grid(n.div_ceil(1024), 1, 1);
    l.array(x).array(&out).val(n as i64).val(s).run()?;
    Ok(out)
}
