//! Launches of the indexing kernels: gather, scatter-add, placing slices, one-hot (`cuda/index.cu`, `move.cu`, `embedding.cu`). Ids are u32
//! on the GPU and have been checked.

use crate::array::cuda::{strided, suffix, width};
use crate::array::{Arguments, Array};
use crate::base::Result;
use crate::device::cuda::{Gpu, Launch};

use std::sync::Arc;

/// Elements before dimension `d`, along it, and after it.
fn around(shape: &[usize], d: usize) -> (usize, usize, usize) {
    (shape[..d].iter().product(), shape[d], shape[d + 1..].iter().product())
}

/// Gathers values of `x` along `d` at `index`, which has the result's shape.
pub(crate) fn gather(gpu: &Arc<Gpu>, x: &Array, d: usize, index: &Array) -> Result<Array> {
    let x = x.contiguous();
    let (_, n, inner) = around(x.shape(), d);
    let out = Array::uninit_on(gpu, index.shape(), x.dtype())?;
    let count = out.numel();
    let l = Launch::new(gpu, "index", &format!("gather_{}", width(x.dtype())))?.grid(count.div_ceil(1024), 1, 1);
    let l = l.array(&x).array(index).array(&out).val(count as i64).val(index.shape()[d] as i64);
    l.val(n as i64).val(inner as i64).run()?;
    Ok(out)
}

/// Adds `src` into `out` (f32 or f64, contiguous, unshared) along `d` at `index` of `src`'s shape, in ascending order.
pub(crate) fn scatter_add(gpu: &Arc<Gpu>, out: &Array, d: usize, index: &Array, src: &Array) -> Result<()> {
    let src = src.contiguous();
    let (outer, n, inner) = around(out.shape(), d);
    let k = index.shape()[d];
    if k == 0 || n == 0 {
        return Ok(());
    }
    let name = format!("scatter_add_{}", suffix(src.dtype()));
    let l = Launch::new(gpu, "index", &name)?.grid((outer * inner).div_ceil(256), 1, 1);
    let l = l.array(out).array(index).array(&src).val(outer as i64).val(k as i64);
    l.val(n as i64).val(inner as i64).run()
}

/// Copies `part` into `out` at `start` of dimension `d`.
pub(crate) fn place(gpu: &Arc<Gpu>, out: &Array, part: &Array, d: usize, start: usize) -> Result<()> {
    let n = part.numel();
    let view = out.slice(d as isize, start..start + part.shape()[d])?;
    if n == 0 {
        return Ok(());
    }
    let s: [i64; 19] = strided("copy", part.shape(), [part.strides(), view.strides()])?;
    let l = Launch::new(gpu, "move", &format!("copy_{}", width(part.dtype())))?.grid(n.div_ceil(1024), 1, 1);
    l.array(part).array(&view).val(n as i64).val(s).run()
}

/// Rows of zeros with a single 1 (the bits of `one`) at each id: `[…, n]`.
pub(crate) fn one_hot(gpu: &Arc<Gpu>, ids: &Array, one: &Array, shape: &[usize]) -> Result<Array> {
    let out = Array::uninit_on(gpu, shape, one.dtype())?;
    let (rows, n) = (ids.numel(), shape.last().copied().unwrap_or(1));
    let mut bits = [0u8; 8];
    let bytes = one.to_bytes();
    bits[..bytes.len()].copy_from_slice(&bytes);
    let name = format!("one_hot_{}", width(one.dtype()));
    let l = Launch::new(gpu, "move", &name)?.grid((rows * n).div_ceil(1024), 1, 1);
    l.array(ids).array(&out).val(rows as i64).val(n as i64).val(u64::from_le_bytes(bits)).run()?;
    Ok(out)
}
