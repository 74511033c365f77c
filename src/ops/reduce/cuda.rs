//! Launches of extremes, log-sum-exp, scans and sorts along rows (`cuda/reduce.cu`, `sort.cu`) of contiguous arrays.

use crate::array::cuda::{strided, suffix, width};
use crate::array::{Arguments, Array};
use crate::base::{DType, Result};
use crate::device::cuda::{Gpu, Launch, layouts};
use crate::kernels::sums::cuda::blocks;
use std::sync::Arc;

/// The element of a row to find.
#[derive(Clone, Copy)]
pub(crate) enum Extreme {
    /// The maximum; NaN counts as the largest.
    Largest,
    /// The minimum; NaN counts as the smallest.
    Smallest,
    /// The maximum; a NaN is chosen only if it is the first element.
    ArgMax,
}

/// The extreme value of each row of `x [rows, cols]` and its position (u32), both of `shape`; the first of equal values.
pub(crate) fn extreme(
    gpu: &Arc<Gpu>,
    x: &Array,
    (rows, cols): (usize, usize),
    which: Extreme,
    shape: &[usize],
) -> Result<(Array, Array)> {
    let out = Array::uninit_on(gpu, shape, x.dtype())?;
    let index = Array::uninit_on(gpu, shape, DType::U32)?;
    let code = match which {
        Extreme::Largest => layouts::EXTREME_LARGEST,
        Extreme::Smallest => layouts::EXTREME_SMALLEST,
        Extreme::ArgMax => layouts::EXTREME_ARGMAX,
    };
    let l = Launch::new(gpu, "reduce", &format!("max_rows_{}", suffix(x.dtype())))?.grid(blocks(rows, cols), 1, 1);
    l.array(x).array(&out).array(&index).val(rows as i64).val(cols as i64).val(code).run()?;
    Ok((out, index))
}

/// Gradients `g [rows, k]` of selected elements moved back to their original positions, with zeros elsewhere; the result has `shape`, with
/// rows of `cols` elements.
pub(crate) fn unpick(
    gpu: &Arc<Gpu>,
    g: &Array,
    index: &Array,
    (k, cols): (usize, usize),
    shape: &[usize],
) -> Result<Array> {
    let out = Array::zeros(shape, (g.dtype(), gpu));
    let count = g.numel();
    let l = Launch::new(gpu, "reduce", &format!("unpick_{}", width(g.dtype())))?.grid(count.div_ceil(1024), 1, 1);
    let l = l.array(g).array(index).array(&out).val(count as i64).val(k as i64);
    l.val(cols as i64).val(1i64).run()?;
    Ok(out)
}

/// ln Σ exp of each row.
pub(crate) fn logsumexp(gpu: &Arc<Gpu>, x: &Array, (rows, cols): (usize, usize), shape: &[usize]) -> Result<Array> {
    let out = Array::uninit_on(gpu, shape, x.dtype())?;
    let name = format!("logsumexp_rows_{}", suffix(x.dtype()));
    let l = Launch::new(gpu, "reduce", &name)?.grid(blocks(rows, cols), 1, 1);
    l.array(x).array(&out).val(rows as i64).val(cols as i64).run()?;
    Ok(out)
}

/// exp(x − y)·g, with y and g already expanded to `x`'s shape.
pub(crate) fn logsumexp_grad(gpu: &Arc<Gpu>, x: &Array, y: &Array, g: &Array) -> Result<Array> {
    let out = Array::uninit_on(gpu, x.shape(), x.dtype())?;
    let n = out.numel();
    let s: [i64; 25] = strided("logsumexp", x.shape(), [x.strides(), y.strides(), g.strides()])?;
    let name = format!("logsumexp_grad_{}", suffix(x.dtype()));
    let l = Launch::new(gpu, "reduce", &name)?.grid(n.div_ceil(1024), 1, 1);
    l.array(x).array(y).array(g).array(&out).val(n as i64).val(s).run()?;
    Ok(out)
}

/// Cumulative sums along the middle dimension of `[outer, n, inner]`.
pub(crate) fn cumsum(
    gpu: &Arc<Gpu>,
    x: &Array,
    (outer, n, inner): (usize, usize, usize),
    reverse: bool,
) -> Result<Array> {
    let x = x.contiguous();
    let out = Array::uninit_on(gpu, x.shape(), x.dtype())?;
    if x.numel() == 0 {
        return Ok(out);
    }
    let s = suffix(x.dtype());
    if inner == 1 {
        let l = Launch::new(gpu, "reduce", &format!("cumsum_rows_{s}"))?.grid(blocks(outer, n), 1, 1);
        l.array(&x).array(&out).val(outer as i64).val(n as i64).val(reverse as i32).run()?;
        return Ok(out);
    }
    let l = Launch::new(gpu, "reduce", &format!("cumsum_cols_{s}"))?.grid((outer * inner).div_ceil(256), 1, 1);
    let l = l.array(&x).array(&out).val(outer as i64).val(n as i64).val(inner as i64);
    l.val(reverse as i32).run()?;
    Ok(out)
}

/// The first `k` elements of each sorted row of `x [rows, cols]`, and their positions (u32), both of `shape`. Stable, NaN last.
pub(crate) fn sort(
    gpu: &Arc<Gpu>,
    x: &Array,
    (rows, cols, k): (usize, usize, usize),
    descending: bool,
    shape: &[usize],
) -> Result<(Array, Array)> {
    let out = Array::uninit_on(gpu, shape, x.dtype())?;
    let picked = Array::uninit_on(gpu, shape, DType::U32)?;
    if rows * k == 0 {
        return Ok((out, picked));
    }
    // Keys are u64, stored in i64 arrays.
    let pair = || -> Result<(Array, Array)> {
        Ok((Array::uninit_on(gpu, &[rows, cols], DType::I64)?, Array::uninit_on(gpu, &[rows, cols], DType::U32)?))
    };
    let mut now = pair()?;
    let name = format!("sort_tile_{}", suffix(x.dtype()));
    let l = Launch::new(gpu, "sort", &name)?.grid(rows * cols.div_ceil(2048), 1, 1);
    let l = l.array(x).array(&now.0).array(&now.1).val(rows as i64).val(cols as i64);
    l.val(descending as i32).run()?;
    let mut run = 2048;
    while run < cols {
        let next = pair()?;
        let l = Launch::new(gpu, "sort", "sort_merge")?.grid((rows * cols).div_ceil(256), 1, 1);
        let l = l.array(&now.0).array(&now.1).array(&next.0).array(&next.1);
        l.val(rows as i64).val(cols as i64).val(run as i64).run()?;
        (now, run) = (next, 2 * run);
    }
    let l = Launch::new(gpu, "sort", &format!("sort_pick_{}", width(x.dtype())))?.grid((rows * k).div_ceil(256), 1, 1);
    let l = l.array(x).array(&now.1).array(&out).array(&picked);
    l.val(rows as i64).val(cols as i64).val(k as i64).run()?;
    Ok((out, picked))
}
