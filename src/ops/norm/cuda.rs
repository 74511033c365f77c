//! Launches of `cuda/norm.cu`.

use crate::array::cuda::{on, suffix};
use crate::array::{Arguments, Array};
use crate::base::Result;
use crate::device::cuda::{Gpu, Launch};
use crate::kernels::sums::cuda::blocks;
use std::sync::Arc;

/// (x − mean)·rstd·gain + bias over the last dimension, with mean and rstd of each row.
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
        let l = l.buf(a.0, a.1).optional(gain.as_ref()).optional(bias.as_ref());
        l.buf(y.0, y.1).buf(st.0, st.1).val(rows as i64).val(d as i64).val(eps).val(center as i32).run()?;
    }
    Ok((out, stats))
}

/// The gradient of the input, and x̂ and dy in the compute dtype, each if requested.
pub(crate) fn norm_grad(
    gpu: &Arc<Gpu>,
    (x, stats, dy): (&Array, &Array, &Array),
    gain: Option<&Array>,
    center: bool,
    (dx, xhat, wide): (bool, bool, bool),
) -> Result<(Option<Array>, Option<Array>, Option<Array>)> {
    let op = "norm";
    let gain = gain.map(|a| on(gpu, a)).transpose()?;
    let d = *x.shape().last().unwrap_or(&1);
    let rows = x.numel().checked_div(d).unwrap_or(0);
    let dx = if dx { Some(Array::uninit_on(gpu, x.shape(), x.dtype())?) } else { None };
    let kept = |on: bool| on.then(|| Array::uninit_on(gpu, &[rows, d], x.dtype().compute())).transpose();
    let (xhat, wide) = (kept(xhat)?, kept(wide)?);
    if rows > 0 {
        let (a, st, g) = (x.block(op)?, stats.block(op)?, dy.block(op)?);
        let name = format!("norm_grad_{}", suffix(x.dtype()));
        let l = Launch::new(gpu, "norm", &name)?.grid(blocks(rows, d), 1, 1).block(256);
        let l = l.buf(a.0, a.1).buf(st.0, st.1).buf(g.0, g.1).optional(gain.as_ref());
        let l = l.optional(dx.as_ref()).optional(xhat.as_ref()).optional(wide.as_ref());
        l.val(rows as i64).val(d as i64).val(center as i32).run()?;
    }
    Ok((dx, xhat, wide))
}
