//! The launch of `dropout` in `cuda/random.cu`.

use crate::array::cuda::{launch_elementwise, suffix};
use crate::array::{Arguments, Array};
use crate::base::Result;
use crate::device::cuda::Gpu;
use std::sync::Arc;

/// Dropout of a contiguous array: zeros with probability `p`, other elements divided by 1 − p; the mask is a function of the seed.
pub(crate) fn dropout(gpu: &Arc<Gpu>, x: &Array, p: f64, seed: u64) -> Result<Array> {
    let out = Array::uninit_on(gpu, x.shape(), x.dtype())?;
    let n = x.numel();
    let name = format!("dropout_{}", suffix(x.dtype()));
    launch_elementwise(gpu, "random", &name, n, |l| l.array(x).array(&out).val(n as i64).val(seed).val(p))?;
    Ok(out)
}
