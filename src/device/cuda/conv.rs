//! Launches of windows of images (`cuda/conv.cu`): unfolding, folding, pooling. Contiguous `[n, channels, H, W]`.

use super::elementwise::{suffix, width};
use super::{Gpu, Launch};
use crate::device::cpu::unfold::Window;
use crate::error::Result;
use crate::tensor::{Array, DType};
use std::sync::Arc;

/// Size, places, kernel, stride, padding, by height and width; stride 0 where windows are adaptive.
pub(crate) type Pool = [[usize; 2]; 5];

fn words<const N: usize, const W: usize>(pairs: [[usize; 2]; N]) -> [i64; W] {
    assert_eq!(W, 2 * N, "words of the struct");
    std::array::from_fn(|i| pairs[i / 2][i % 2] as i64)
}

fn window(w: &Window) -> [i64; 12] {
    words([w.size, w.out, w.kernel, w.stride, w.padding, w.dilation])
}

/// Windows as rows: `[n, channels, H, W]` to `[n, places, channels·kh·kw]`.
pub(crate) fn unfold(gpu: &Arc<Gpu>, x: &Array, (n, channels): (usize, usize), w: &Window) -> Result<Array> {
    let out = Array::uninit_on(gpu, &[n, w.places(), channels * w.area()], x.dtype())?;
    let l = Launch::new(gpu, "conv", &format!("unfold_{}", width(x.dtype())))?;
    let l = l.grid(out.numel().div_ceil(256), 1, 1).array(x).array(&out);
    l.val(n as i64).val(channels as i64).val(window(w)).run()?;
    Ok(out)
}

/// Rows of windows added back into images of `shape`; images of no element give nothing.
pub(crate) fn fold(
    gpu: &Arc<Gpu>,
    rows: &Array,
    (n, channels): (usize, usize),
    w: &Window,
    shape: &[usize],
) -> Result<Array> {
    let out = Array::uninit_on(gpu, shape, rows.dtype())?;
    let l = Launch::new(gpu, "conv", &format!("fold_{}", suffix(rows.dtype())))?;
    let l = l.grid(out.numel().div_ceil(256), 1, 1).array(rows).array(&out);
    l.val(n as i64).val(channels as i64).val(window(w)).run()?;
    Ok(out)
}

/// A pooling kernel over `planes`; `index` sits where the kernel has it.
fn pool(
    gpu: &Arc<Gpu>,
    name: &str,
    arrays: &[&Array],
    (planes, elements, dtype): (usize, usize, DType),
    p: &Pool,
) -> Result<()> {
    let l = Launch::new(gpu, "conv", &format!("{name}_{}", suffix(dtype)))?.grid(elements.div_ceil(256), 1, 1);
    let l = arrays.iter().fold(l, |l, a| l.array(a));
    l.val(planes as i64).val(words::<5, 10>(*p)).run()
}

/// Mean of each window: `[B, C, H, W]` to `shape`.
pub(crate) fn average(gpu: &Arc<Gpu>, x: &Array, p: &Pool, shape: &[usize]) -> Result<Array> {
    let out = Array::uninit_on(gpu, shape, x.dtype())?;
    pool(gpu, "avg_pool", &[x, &out], (shape[0] * shape[1], out.numel(), x.dtype()), p)?;
    Ok(out)
}

/// Its gradient, of the images' `shape`.
pub(crate) fn average_grad(gpu: &Arc<Gpu>, g: &Array, p: &Pool, shape: &[usize]) -> Result<Array> {
    let out = Array::uninit_on(gpu, shape, g.dtype())?;
    pool(gpu, "avg_pool_grad", &[g, &out], (shape[0] * shape[1], out.numel(), g.dtype()), p)?;
    Ok(out)
}

/// Largest value of each window, and where it stands in its plane (u32).
pub(crate) fn largest(gpu: &Arc<Gpu>, x: &Array, p: &Pool, shape: &[usize]) -> Result<(Array, Array)> {
    let out = Array::uninit_on(gpu, shape, x.dtype())?;
    let index = Array::uninit_on(gpu, shape, DType::U32)?;
    pool(gpu, "max_pool", &[x, &out, &index], (shape[0] * shape[1], out.numel(), x.dtype()), p)?;
    Ok((out, index))
}

/// Its gradient, of the images' `shape`.
pub(crate) fn largest_grad(gpu: &Arc<Gpu>, g: &Array, index: &Array, p: &Pool, shape: &[usize]) -> Result<Array> {
    let out = Array::uninit_on(gpu, shape, g.dtype())?;
    pool(gpu, "max_pool_grad", &[g, index, &out], (shape[0] * shape[1], out.numel(), g.dtype()), p)?;
    Ok(out)
}
