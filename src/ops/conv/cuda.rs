//! Launches of the kernels for image windows (`cuda/conv.cu`): unfolding, folding, pooling. Arrays are contiguous `[n, channels, H, W]`.

use crate::array::cuda::{suffix, width};
use crate::array::{Arguments, Array};
use crate::base::Result;
use crate::device::cuda::{Gpu, Launch, layouts};
use crate::ops::conv::cpu::Window;
use std::sync::Arc;

fn window(w: &Window) -> layouts::Window {
    let [size, out, kernel, stride, padding, dilation] =
        [w.size, w.out, w.kernel, w.stride, w.padding, w.dilation].map(|[h, w]| [h as i64, w as i64]);
    layouts::Window { size, out, kernel, stride, padding, dilation }
}

/// Windows as rows: `[n, channels, H, W]` to `[n, positions, channels·kh·kw]`.
pub(crate) fn unfold(gpu: &Arc<Gpu>, x: &Array, (n, channels): (usize, usize), w: &Window) -> Result<Array> {
    let out = Array::uninit_on(gpu, &[n, w.places(), channels * w.area()], x.dtype())?;
    let l = Launch::new(gpu, "conv", &format!("unfold_{}", width(x.dtype())))?;
    let l = l.grid(out.numel().div_ceil(256), 1, 1).array(x).array(&out);
    l.val(n as i64).val(channels as i64).val(window(w)).run()?;
    Ok(out)
}

/// Adds rows of windows back into images of `shape`; nothing is launched for empty images.
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
