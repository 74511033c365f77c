//! Launches of the kernels that work along rows (`cuda/reduce.cu`, `softmax.cu`, `norm.cu`, `loss.cu`, `index.cu`).
//!
//! The row rule: up to 1024 elements a warp takes a row and a block eight of them; longer rows have a block each.

use super::elementwise::{on, suffix};
use super::{Gpu, Launch};
use crate::error::Result;
use crate::tensor::Array;
use std::sync::Arc;

/// Blocks for rows of `d` elements.
fn blocks(rows: usize, d: usize) -> usize {
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

/// Targets that are ignored, for the kernels below.
pub(crate) const IGNORED: u32 = u32::MAX;

/// Loss and log-sum-exp of every row of contiguous logits; targets u32, [`IGNORED`] rows give 0.
pub(crate) fn cross_entropy(gpu: &Arc<Gpu>, x: &Array, targets: &Array, smoothing: f64) -> Result<(Array, Array)> {
    let op = "cross_entropy";
    let targets = on(gpu, targets)?;
    let (rows, d) = (targets.numel(), *x.shape().last().unwrap_or(&1));
    let fresh = || Array::uninit_on(gpu, &[rows], x.dtype().compute());
    let (loss, lse) = (fresh()?, fresh()?);
    if rows > 0 {
        let (a, t, l, z) = (x.block(op)?, targets.block(op)?, loss.block(op)?, lse.block(op)?);
        let name = format!("cross_entropy_{}", suffix(x.dtype()));
        let launch = Launch::new(gpu, "loss", &name)?.grid(blocks(rows, d), 1, 1).block(256);
        let launch = launch.buf(a.0, a.1).buf(t.0, t.1).buf(l.0, l.1).buf(z.0, z.1);
        launch.val(rows as i64).val(d as i64).val(smoothing).val(IGNORED as i64).run()?;
    }
    Ok((loss, lse))
}

/// The gradient of the logits: row r is weighted by `weight[r]·grad[owner[r]]`.
pub(crate) fn cross_entropy_grad(
    gpu: &Arc<Gpu>,
    (x, lse, targets): (&Array, &Array, &Array),
    (weight, grad, owner): (&Array, &Array, &Array),
    smoothing: f64,
) -> Result<Array> {
    let op = "cross_entropy";
    let (lse, targets, weight) = (on(gpu, lse)?, on(gpu, targets)?, on(gpu, weight)?);
    let (grad, owner) = (on(gpu, grad)?.contiguous(), on(gpu, owner)?);
    let (rows, d) = (targets.numel(), *x.shape().last().unwrap_or(&1));
    let out = Array::uninit_on(gpu, x.shape(), x.dtype())?;
    if rows > 0 {
        let name = format!("cross_entropy_grad_{}", suffix(x.dtype()));
        let mut l = Launch::new(gpu, "loss", &name)?.grid(blocks(rows, d), 1, 1).block(256);
        for a in [x, &lse, &targets, &weight, &grad, &owner, &out] {
            let (block, at) = a.block(op)?;
            l = l.buf(block, at);
        }
        l.val(rows as i64).val(d as i64).val(0i64).val(smoothing).val(IGNORED as i64).run()?;
    }
    Ok(out)
}
