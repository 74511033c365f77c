//! Launches of `cuda/optim.cu`.

use super::Update;
use crate::array::cuda::suffix;
use crate::array::{Arguments, Array};
use crate::base::Result;
use crate::device::cuda::{Gpu, Launch};
use std::sync::Arc;

impl Update<'_> {
    /// A launch of `name` of `cuda/optim.cu`; `buffers` are in the order of its arguments, and `more` adds the arguments after the table of
    /// pieces.
    pub(super) fn launch<'l>(
        &'l self,
        gpu: &'l Arc<Gpu>,
        name: &str,
        buffers: &[Option<&'l Array>],
        more: impl FnOnce(Launch<'l>) -> Launch<'l>,
    ) -> Result<()> {
        let n = self.params.numel();
        let (ends, decays) = self.layout.table(gpu)?;
        let kernel = format!("{name}_{}", suffix(self.params.dtype()));
        let l = Launch::new(gpu, "optim", &kernel)?.grid(n.div_ceil(1024), 1, 1);
        let l = buffers.iter().fold(l, |l, b| l.optional(*b));
        let l = l.val(n as i64).array(ends).array(decays).val(self.layout.pieces.len() as i32);
        more(l).optional(self.gpu.scalars).optional(self.gpu.stop).run()
    }
}
