//! Launches of `cuda/softmax.cu`.

use crate::array::Array;
use crate::array::cuda::suffix;
use crate::base::Result;
use crate::device::cuda::{Gpu, Launch};
use crate::kernels::sums::cuda::blocks;
use std::sync::Arc;

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

/// The gradient of softmax or log-softmax, from its output `y`.
pub(crate) fn softmax_grad(gpu: &Arc<Gpu>, y: &Array, dy: &Array, log: bool) -> Result<Array> {
    let op = if log { "log_softmax" } else { "softmax" };
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
