//! Launches of the pooling kernels of `cuda/conv.cu`.

use crate::array::cuda::suffix;
use crate::array::{Arguments, Array};
use crate::base::{DType, Result};
use crate::device::cuda::{Gpu, Launch, layouts};
use std::sync::Arc;

/// Size, number of positions, kernel, stride, padding, each for height and width; the stride is 0 for adaptive windows.
pub(crate) type Pool = [[usize; 2]; 5];

/// Launches a pooling kernel over `planes`; `index` is passed in the kernel's position for it.
fn pool(
    gpu: &Arc<Gpu>,
    name: &str,
    arrays: &[&Array],
    (planes, elements, dtype): (usize, usize, DType),
    p: &Pool,
) -> Result<()> {
    let l = Launch::new(gpu, "conv", &format!("{name}_{}", suffix(dtype)))?.grid(elements.div_ceil(256), 1, 1);
    let l = arrays.iter().fold(l, |l, a| l.array(a));
    let [size, out, kernel, stride, padding] = p.map(|[h, w]| [h as i64, w as i64]);
    l.val(planes as i64).val(layouts::Pool { size, out, kernel, stride, padding }).run()
}

/// Mean of each window: `[B, C, H, W]` to `shape`.
pub(crate) fn average(gpu: &Arc<Gpu>, x: &Array, p: &Pool, shape: &[usize]) -> Result<Array> {
    let out = Array::uninit_on(gpu, shape, x.dtype())?;
    pool(gpu, "avg_pool", &[x, &out], (shape[0] * shape[1], out.numel(), x.dtype()), p)?;
    Ok(out)
}

/// The gradient of [`average`], in the images' `shape`.
pub(crate) fn average_grad(gpu: &Arc<Gpu>, g: &Array, p: &Pool, shape: &[usize]) -> Result<Array> {
    let out = Array::uninit_on(gpu, shape, g.dtype())?;
    pool(gpu, "avg_pool_grad", &[g, &out], (shape[0] * shape[1], out.numel(), g.dtype()), p)?;
    Ok(out)
}

/// Maximum of each window, and its position in its plane (u32).
pub(crate) fn largest(gpu: &Arc<Gpu>, x: &Array, p: &Pool, shape: &[usize]) -> Result<(Array, Array)> {
    let out = Array::uninit_on(gpu, shape, x.dtype())?;
    let index = Array::uninit_on(gpu, shape, DType::U32)?;
    pool(gpu, "max_pool", &[x, &out, &index], (shape[0] * shape[1], out.numel(), x.dtype()), p)?;
    Ok((out, index))
}

/// The gradient of [`largest`], in the images' `shape`.
pub(crate) fn largest_grad(gpu: &Arc<Gpu>, g: &Array, index: &Array, p: &Pool, shape: &[usize]) -> Result<Array> {
    let out = Array::uninit_on(gpu, shape, g.dtype())?;
    pool(gpu, "max_pool_grad", &[g, index, &out], (shape[0] * shape[1], out.numel(), g.dtype()), p)?;
    Ok(out)
}
