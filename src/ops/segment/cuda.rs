//! Launches of the segment ops of `cuda/segment.cu` on contiguous `[N, …]` arrays.

use crate::array::cuda::{suffix, width};
use crate::array::{Arguments, Array};
use crate::base::{DType, Result};
use crate::device::cuda::{Gpu, Launch};
use std::sync::Arc;

/// Segments in a GPU's memory.
#[derive(Clone, Debug)]
pub(crate) struct OnGpu {
    /// `[S + 1]` i64.
    pub offsets: Array,
    /// `[N]` u32: the segment of each row.
    pub owner: Array,
}

impl OnGpu {
    fn count(&self) -> usize {
        self.offsets.numel() - 1
    }
    /// A kernel that works along segments, `width` columns.
    fn along<'a>(&self, gpu: &'a Arc<Gpu>, name: &str, dtype: DType, width: usize) -> Result<Launch<'a>> {
        let n = self.count() * width;
        let blocks = if width >= 32 { n.div_ceil(256) } else { n.div_ceil(8) };
        Ok(Launch::new(gpu, "segment", &format!("{name}_{}", suffix(dtype)))?.grid(blocks, 1, 1))
    }
    fn sized<'a>(&self, l: Launch<'a>, width: usize) -> Launch<'a> {
        l.val(self.count() as i64).val(width as i64)
    }
    /// Sum (or mean) of each segment's rows.
    pub fn sum(&self, gpu: &Arc<Gpu>, x: &Array, shape: &[usize], mean: bool) -> Result<Array> {
        let cols: usize = shape[1..].iter().product();
        let out = Array::uninit_on(gpu, shape, x.dtype())?;
        let l = self.along(gpu, "segment_sum", x.dtype(), cols)?.array(x).array(&self.offsets).array(&out);
        self.sized(l, cols).val(mean as i32).run()?;
        Ok(out)
    }
    /// Each segment's row for its rows, divided by their number if `mean`.
    pub fn spread(&self, gpu: &Arc<Gpu>, g: &Array, shape: &[usize], mean: bool) -> Result<Array> {
        let (rows, cols) = (shape[0], shape[1..].iter().product::<usize>());
        let out = Array::uninit_on(gpu, shape, g.dtype())?;
        let name = format!("segment_spread_{}", suffix(g.dtype()));
        let l = Launch::new(gpu, "segment", &name)?.grid((rows * cols).div_ceil(1024), 1, 1);
        let l = l.array(g).array(&self.offsets).array(&self.owner).array(&out);
        l.val(rows as i64).val(cols as i64).val(mean as i32).run()?;
        Ok(out)
    }
    /// Largest of each segment's rows, and the row of each.
    pub fn max(&self, gpu: &Arc<Gpu>, x: &Array, shape: &[usize]) -> Result<(Array, Array)> {
        let cols: usize = shape[1..].iter().product();
        let out = Array::uninit_on(gpu, shape, x.dtype())?;
        let index = Array::uninit_on(gpu, shape, DType::U32)?;
        let l = self.along(gpu, "segment_max", x.dtype(), cols)?;
        self.sized(l.array(x).array(&self.offsets).array(&out).array(&index), cols).run()?;
        Ok((out, index))
    }
    /// Its gradient.
    pub fn max_grad(&self, gpu: &Arc<Gpu>, g: &Array, index: &Array, shape: &[usize]) -> Result<Array> {
        let (rows, cols) = (shape[0], shape[1..].iter().product::<usize>());
        let out = Array::uninit_on(gpu, shape, g.dtype())?;
        let name = format!("segment_max_grad_{}", width(g.dtype()));
        let l = Launch::new(gpu, "segment", &name)?.grid((rows * cols).div_ceil(1024), 1, 1);
        let l = l.array(g).array(index).array(&self.owner).array(&out);
        l.val(rows as i64).val(cols as i64).run()?;
        Ok(out)
    }
    /// Softmax within each segment, column by column.
    pub fn softmax(&self, gpu: &Arc<Gpu>, x: &Array) -> Result<Array> {
        let cols: usize = x.shape()[1..].iter().product();
        let out = Array::uninit_on(gpu, x.shape(), x.dtype())?;
        let l = self.along(gpu, "segment_softmax", x.dtype(), cols)?.array(x).array(&self.offsets).array(&out);
        self.sized(l, cols).run()?;
        Ok(out)
    }
    /// Its gradient, from its value.
    pub fn softmax_grad(&self, gpu: &Arc<Gpu>, y: &Array, g: &Array) -> Result<Array> {
        let cols: usize = y.shape()[1..].iter().product();
        let out = Array::uninit_on(gpu, y.shape(), y.dtype())?;
        let l = self.along(gpu, "segment_softmax_grad", y.dtype(), cols)?;
        self.sized(l.array(y).array(g).array(&self.offsets).array(&out), cols).run()?;
        Ok(out)
    }
}
