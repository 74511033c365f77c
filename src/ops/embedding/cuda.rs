//! Launches of `cuda/embedding.cu`.

use super::BagMode;
use crate::array::cuda::{on, suffix, width};
use crate::array::{Arguments, Array};
use crate::autograd::Segments;
use crate::base::Result;
use crate::device::cuda::{Gpu, Launch};

use std::sync::Arc;

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
    /// Bags whose ids and weights are moved to the GPU if necessary.
    pub fn new(gpu: &Arc<Gpu>, ids: &Array, bags: &Segments, mode: BagMode, scale: Option<&Array>) -> Result<Bags> {
        let there = bags.on_gpu(gpu)?;
        let scale = scale.map(|s| on(gpu, s)).transpose()?;
        Ok(Bags { ids: on(gpu, ids)?, offsets: there.offsets, owner: there.owner, mean: mode == BagMode::Mean, scale })
    }
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
    /// The gradient of the ids' weights: `[N]`.
    pub fn dots(&self, gpu: &Arc<Gpu>, g: &Array, w: &Array) -> Result<Array> {
        let (n, p) = (self.ids.numel(), g.shape()[1]);
        if p == 0 {
            return Ok(Array::zeros(&[n], (g.dtype(), gpu)));
        }
        let out = Array::uninit_on(gpu, &[n], g.dtype())?;
        let l = self.launch(gpu, "bag_dots", g.dtype(), crate::kernels::sums::cuda::blocks(n, p))?;
        let l = l.array(g).array(w).array(&self.ids).array(&self.owner).array(&self.offsets).array(&out);
        l.val(n as i64).val(p as i64).val(self.mean as i32).run()?;
        Ok(out)
    }
}
