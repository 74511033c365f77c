//! Launches of the segment ops of `cuda/segment.cu` on contiguous `[N, …]` arrays.

use crate::array::cuda::{suffix, width};
use crate::array::{Arguments, Array};
use crate::autograd::SegmentsOnGpu;
use crate::base::{DType, Result};
use crate::device::cuda::{Gpu, Launch};
use std::sync::Arc;

/// A launch of a kernel over segments with `width` columns.
fn along<'a>(gpu: &'a Arc<Gpu>, s: &SegmentsOnGpu, name: &str, dtype: DType, width: usize) -> Result<Launch<'a>> {
    let n = s.count() * width;
    let blocks = if width >= 32 { n.div_ceil(256) } else { n.div_ceil(8) };
    Ok(Launch::new(gpu, "segment", &format!("{name}_{}", suffix(dtype)))?.grid(blocks, 1, 1))
}

/// Sum (or mean) of each segment's rows.
pub(crate) fn sum(gpu: &Arc<Gpu>, s: &SegmentsOnGpu, x: &Array, shape: &[usize], mean: bool) -> Result<Array> {
    let cols: usize = shape[1..].iter().product();
    let out = Array::uninit_on(gpu, shape, x.dtype())?;
    let l = along(gpu, s, "segment_sum", x.dtype(), cols)?.array(x).array(&s.offsets).array(&out);
    l.val(s.count() as i64).val(cols as i64).val(mean as i32).run()?;
    Ok(out)
}

/// Each segment's row repeated for all rows of the segment, divided by their number if `mean`.
pub(crate) fn spread(gpu: &Arc<Gpu>, s: &SegmentsOnGpu, g: &Array, shape: &[usize], mean: bool) -> Result<Array> {
    let (rows, cols) = (shape[0], shape[1..].iter().product::<usize>());
    let out = Array::uninit_on(gpu, shape, g.dtype())?;
    let name = format!("segment_spread_{}", suffix(g.dtype()));
    let l = Launch::new(gpu, "segment", &name)?.grid((rows * cols).div_ceil(1024), 1, 1);
    let l = l.array(g).array(&s.offsets).array(&s.owner).array(&out);
    l.val(rows as i64).val(cols as i64).val(mean as i32).run()?;
    Ok(out)
}

/// Maximum of each segment's rows, and the row that has it.
pub(crate) fn max(gpu: &Arc<Gpu>, s: &SegmentsOnGpu, x: &Array, shape: &[usize]) -> Result<(Array, Array)> {
    let cols: usize = shape[1..].iter().product();
    let out = Array::uninit_on(gpu, shape, x.dtype())?;
    let index = Array::uninit_on(gpu, shape, DType::U32)?;
    let l = along(gpu, s, "segment_max", x.dtype(), cols)?.array(x).array(&s.offsets).array(&out).array(&index);
    l.val(s.count() as i64).val(cols as i64).run()?;
    Ok((out, index))
}

/// The gradient of [`max`].
pub(crate) fn max_grad(gpu: &Arc<Gpu>, s: &SegmentsOnGpu, g: &Array, index: &Array, shape: &[usize]) -> Result<Array> {
    let (rows, cols) = (shape[0], shape[1..].iter().product::<usize>());
    let out = Array::uninit_on(gpu, shape, g.dtype())?;
    let name = format!("segment_max_grad_{}", width(g.dtype()));
    let l = Launch::new(gpu, "segment", &name)?.grid((rows * cols).div_ceil(1024), 1, 1);
    let l = l.array(g).array(index).array(&s.owner).array(&out);
    l.val(rows as i64).val(cols as i64).run()?;
    Ok(out)
}

/// Softmax within each segment, column by column.
pub(crate) fn softmax(gpu: &Arc<Gpu>, s: &SegmentsOnGpu, x: &Array) -> Result<Array> {
    let cols: usize = x.shape()[1..].iter().product();
    let out = Array::uninit_on(gpu, x.shape(), x.dtype())?;
    let l = along(gpu, s, "segment_softmax", x.dtype(), cols)?.array(x).array(&s.offsets).array(&out);
    l.val(s.count() as i64).val(cols as i64).run()?;
    Ok(out)
}

/// The gradient of [`softmax`], from its output `y`.
pub(crate) fn softmax_grad(gpu: &Arc<Gpu>, s: &SegmentsOnGpu, y: &Array, g: &Array) -> Result<Array> {
    let cols: usize = y.shape()[1..].iter().product();
    let out = Array::uninit_on(gpu, y.shape(), y.dtype())?;
    let l = along(gpu, s, "segment_softmax_grad", y.dtype(), cols)?.array(y).array(g).array(&s.offsets).array(&out);
    l.val(s.count() as i64).val(cols as i64).run()?;
    Ok(out)
}
