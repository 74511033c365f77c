//! Launches of the Philox kernels of `cuda/random.cu`.

use super::Law;
use crate::array::cuda::suffix;
use crate::array::{Arguments, Array};
use crate::base::{DType, Result};
use crate::device::cuda::{Gpu, Launch};
use std::sync::Arc;

/// Random numbers of a distribution, in f32 or f64.
pub(crate) fn generate(gpu: &Arc<Gpu>, law: Law, shape: &[usize], dtype: DType, seed: u64) -> Result<Array> {
    let out = Array::uninit_on(gpu, shape, dtype)?;
    let n = out.numel();
    // The uniform kernel generates [0, 1) for a bound of 0; the normal one uses a standard deviation of 1.
    let (name, scale) = match law {
        Law::Uniform => ("philox_uniform", 0.0),
        Law::Normal => ("philox_normal", 1.0),
    };
    let l = Launch::new(gpu, "random", &format!("{name}_{}", suffix(dtype)))?.grid(n.div_ceil(512), 1, 1);
    l.array(&out).val(n as i64).val(seed).val(0u64).val(scale).run()?;
    Ok(out)
}
