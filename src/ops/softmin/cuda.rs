//! Launches of `cuda/softmin.cu`.

use crate::array::cuda::suffix;
use crate::array::{Arguments, Array};
use crate::base::Result;
use crate::device::cuda::{Gpu, Launch};
use crate::kernels::sums::cuda::blocks;
use std::sync::Arc;

/// Launches kernel `name` on the rows of the last dimension; it writes the last of `arrays`.
fn rows(gpu: &Arc<Gpu>, name: &str, arrays: &[&Array]) -> Result<()> {
    let x = arrays[0];
    let d = *x.shape().last().unwrap_or(&1);
    let rows = x.numel().checked_div(d).unwrap_or(0);
    let l = Launch::new(gpu, "softmin", &format!("{name}_{}", suffix(x.dtype())))?.grid(blocks(rows, d), 1, 1);
    arrays.iter().fold(l, |l, a| l.array(a)).val(rows as i64).val(d as i64).run()
}

/// Softmin of the rows of a contiguous array.
pub(crate) fn softmin(gpu: &Arc<Gpu>, x: &Array) -> Result<Array> {
    let y = Array::uninit_on(gpu, x.shape(), x.dtype())?;
    rows(gpu, "softmin", &[x, &y])?;
    Ok(y)
}

/// The gradient of softmin, from its output `y`.
pub(crate) fn softmin_grad(gpu: &Arc<Gpu>, y: &Array, dy: &Array) -> Result<Array> {
    let dx = Array::uninit_on(gpu, y.shape(), y.dtype())?;
    rows(gpu, "softmin_grad", &[y, dy, &dx])?;
    Ok(dx)
}
