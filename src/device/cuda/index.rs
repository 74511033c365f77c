//! Launches of picking, placing and adding by index (`cuda/index.cu`, `move.cu`, `embedding.cu`). Ids are u32 on the GPU,
//! checked before.

use super::elementwise::{strided, suffix, width};
use super::{Gpu, Launch, sort};
use crate::error::Result;
use crate::tensor::Array;
use std::sync::Arc;

/// Elements before dimension `d`, along it, and after it.
fn around(shape: &[usize], d: usize) -> (usize, usize, usize) {
    (shape[..d].iter().product(), shape[d], shape[d + 1..].iter().product())
}

/// Values of `x` along `d` at `index`, which has the result's shape.
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

/// out[o, ids[t], :] += w[t]·src[o, t, :] for `src [outer, k, p]`, `out [outer, n, p]` (f32 or f64), ids `[k]` below n:
/// ids sorted, sums in rising t, without atomics.
pub(crate) fn add_rows(
    gpu: &Arc<Gpu>,
    (src, ids): (&Array, &Array),
    w: Option<&Array>,
    (outer, n, p): (usize, usize, usize),
    out: &Array,
) -> Result<()> {
    let k = ids.numel();
    if outer * k * p == 0 {
        return Ok(());
    }
    let (sorted, order) = sort::ids(gpu, ids, n)?;
    let part = Array::uninit_on(gpu, &[outer, k.div_ceil(32), 2, p], out.dtype())?;
    let grid = outer * k.div_ceil(32) * p.div_ceil(256);
    let sizes = [outer as i64, k as i64, n as i64, p as i64];
    let sized = |l: Launch| sizes.iter().fold(l, |l, &s| l.val(s)).run();
    let l = Launch::new(gpu, "index", &format!("rows_add_{}", suffix(src.dtype())))?.grid(grid, 1, 1);
    sized(l.array(src).array(&sorted).array(&order).optional(w).array(out).array(&part))?;
    let l = Launch::new(gpu, "index", &format!("rows_add_last_{}", suffix(out.dtype())))?.grid(grid, 1, 1);
    sized(l.array(&part).array(&sorted).array(out))
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

/// `g [rows, p]` with the rows whose id is `padding` set to 0.
pub(crate) fn zero_rows(gpu: &Arc<Gpu>, g: &Array, ids: &Array, padding: u32) -> Result<Array> {
    let out = Array::uninit_on(gpu, g.shape(), g.dtype())?;
    let (rows, p) = (g.shape()[0], g.shape()[1]);
    let name = format!("zero_rows_{}", width(g.dtype()));
    let l = Launch::new(gpu, "embedding", &name)?.grid((rows * p).div_ceil(1024), 1, 1);
    l.array(g).array(ids).array(&out).val(rows as i64).val(p as i64).val(padding).run()?;
    Ok(out)
}

/// Bags of ids in a GPU's memory.
pub(crate) struct Bags {
    /// `[N]` u32.
    pub ids: Array,
    /// `[bags + 1]` i64.
    pub offsets: Array,
    /// Bag of each id, `[N]` u32.
    pub owner: Array,
    /// Whether a bag's sum is divided by its length.
    pub mean: bool,
    /// Weight of each id, `[N]`.
    pub scale: Option<Array>,
}

impl Bags {
    fn launch<'a>(&self, gpu: &'a Arc<Gpu>, name: &str, dtype: crate::DType, grid: usize) -> Result<Launch<'a>> {
        Ok(Launch::new(gpu, "embedding", &format!("{name}_{}", suffix(dtype)))?.grid(grid, 1, 1))
    }
    /// Σ of the rows of `w [V, p]` in each bag: `[bags, p]`.
    pub fn sum(&self, gpu: &Arc<Gpu>, w: &Array) -> Result<Array> {
        let (bags, p) = (self.offsets.numel() - 1, w.shape()[1]);
        let out = Array::uninit_on(gpu, &[bags, p], w.dtype())?;
        let l = self.launch(gpu, "embedding_bag", w.dtype(), (bags * p).div_ceil(256))?;
        let l = l.array(w).array(&self.ids).array(&self.offsets).optional(self.scale.as_ref()).array(&out);
        l.val(bags as i64).val(p as i64).val(self.mean as i32).run()?;
        Ok(out)
    }
    /// The gradient of each id's row from that of its bag, `g [bags, p]`: `[N, p]`.
    pub fn rows(&self, gpu: &Arc<Gpu>, g: &Array) -> Result<Array> {
        let (n, p) = (self.ids.numel(), g.shape()[1]);
        let out = Array::uninit_on(gpu, &[n, p], g.dtype())?;
        let l = self.launch(gpu, "bag_rows", g.dtype(), (n * p).div_ceil(1024))?;
        let l = l.array(g).array(&self.owner).array(&self.offsets).optional(self.scale.as_ref()).array(&out);
        l.val(n as i64).val(p as i64).val(self.mean as i32).run()?;
        Ok(out)
    }
    /// The gradient of the weights of the ids: `[N]`.
    pub fn dots(&self, gpu: &Arc<Gpu>, g: &Array, w: &Array) -> Result<Array> {
        let (n, p) = (self.ids.numel(), g.shape()[1]);
        if p == 0 {
            return Array::zeros_on(gpu, &[n], g.dtype());
        }
        let out = Array::uninit_on(gpu, &[n], g.dtype())?;
        let l = self.launch(gpu, "bag_dots", g.dtype(), super::rows::blocks(n, p))?;
        let l = l.array(g).array(w).array(&self.ids).array(&self.owner).array(&self.offsets).array(&out);
        l.val(n as i64).val(p as i64).val(self.mean as i32).run()?;
        Ok(out)
    }
}
