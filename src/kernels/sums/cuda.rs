//! Launches of the kernels that work along rows (`cuda/reduce.cu`, `softmax.cu`, `norm.cu`, `loss.cu`, `index.cu`).
//!
//! Rows of up to 1024 elements take one warp each, with eight rows per block; longer rows take one block each.

use crate::array::cuda::suffix;
use crate::array::{Arguments, Array};
use crate::base::Result;
use crate::device::cuda::{Gpu, Launch};
use std::sync::Arc;

/// Number of blocks for rows of `d` elements.
pub(crate) fn blocks(rows: usize, d: usize) -> usize {
    if d <= 1024 { rows.div_ceil(8) } else { rows }
}

/// `out[r]` = `scale` · Σ over row `r` of a contiguous array of `rows` × `cols`. Long rows are split, and the partial sums are added in
/// order.
pub(crate) fn sum_rows(
    gpu: &Arc<Gpu>,
    a: &Array,
    (rows, cols): (usize, usize),
    scale: f64,
    shape: &[usize],
) -> Result<Array> {
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
        l.buf(x.0, x.1).buf(y.0, y.1).val(rows as i64).val(cols as i64).val(scale).run()?;
        return Ok(out);
    }
    let part = Array::uninit_on(gpu, &[rows, parts], a.dtype().compute())?;
    let p = part.block(op)?;
    let l = Launch::new(gpu, "reduce", &format!("sum_rows_part_{s}"))?.grid(rows * parts, 1, 1).block(256);
    l.buf(x.0, x.1).buf(p.0, p.1).val(rows as i64).val(cols as i64).val(CHUNK as i64).run()?;
    let l = Launch::new(gpu, "reduce", &format!("sum_rows_last_{s}"))?.grid(blocks(rows, parts), 1, 1).block(256);
    l.buf(p.0, p.1).buf(y.0, y.1).val(rows as i64).val(parts as i64).val(scale).run()?;
    Ok(out)
}

/// `out[c]` = `scale` · Σ over column `c` of a contiguous array of `n` × `inner`. Tall columns are split, their partial sums are split
/// again while there are many, and the rest is added in order: no element goes through more than a few hundred additions.
pub(crate) fn sum_columns(
    gpu: &Arc<Gpu>,
    a: &Array,
    (mut n, inner): (usize, usize),
    scale: f64,
    shape: &[usize],
) -> Result<Array> {
    const CHUNK: usize = 256;
    let (op, s) = ("sum", suffix(a.dtype()));
    let out = Array::uninit_on(gpu, shape, a.dtype())?;
    if inner == 0 {
        return Ok(out);
    }
    let grid = inner.div_ceil(32);
    let (mut at, mut name) = (a.clone(), "sum_cols");
    while n > CHUNK {
        let parts = n.div_ceil(CHUNK);
        let part = Array::uninit_on(gpu, &[parts, inner], a.dtype().compute())?;
        let (x, p) = (at.block(op)?, part.block(op)?);
        let part_of = format!("sum_cols_part_{}", suffix(at.dtype()));
        let l = Launch::new(gpu, "reduce", &part_of)?.grid(parts * grid, 1, 1).block(256);
        l.buf(x.0, x.1).buf(p.0, p.1).val(1i64).val(n as i64).val(inner as i64).val(CHUNK as i64).run()?;
        (at, n, name) = (part, parts, "sum_cols_last");
    }
    let (x, y) = (at.block(op)?, out.block(op)?);
    let l = Launch::new(gpu, "reduce", &format!("{name}_{s}"))?.grid(grid, 1, 1).block(256);
    l.buf(x.0, x.1).buf(y.0, y.1).val(1i64).val(n as i64).val(inner as i64).val(scale).run()?;
    Ok(out)
}

/// Σ over the middle dimension of a contiguous `[outer, n, inner]`; the result is `[outer, inner]`.
pub(crate) fn sum_middle(gpu: &Arc<Gpu>, a: &Array, (outer, n, inner): (usize, usize, usize)) -> Result<Array> {
    let s = suffix(a.dtype());
    if outer * n * inner == 0 {
        return Ok(Array::zeros(&[outer, inner], (a.dtype(), gpu)));
    }
    let out = Array::uninit_on(gpu, &[outer, inner], a.dtype())?;
    let l = Launch::new(gpu, "reduce", &format!("sum_cols_{s}"))?.grid(outer * inner.div_ceil(32), 1, 1);
    l.array(a).array(&out).val(outer as i64).val(n as i64).val(inner as i64).val(1f64).run()?;
    Ok(out)
}
