//! The launch of the noise of `cuda/random.cu`.

use super::NoiseKey;
use crate::array::cuda::suffix;
use crate::array::{Arguments, Array};
use crate::base::Result;
use crate::device::cuda::{Gpu, Launch};
use std::sync::Arc;

/// Adds the noise of a step to `grads`, bit for bit as [`add_gaussian`](super::add_gaussian) does on the CPU. The number of
/// the step is `step`, or is read from `live`.
pub(crate) fn add_gaussian(
    gpu: &Arc<Gpu>,
    (key, step, live): (&NoiseKey, u64, Option<&Array>),
    std: f32,
    grads: &Array,
) -> Result<()> {
    let n = grads.numel();
    let l = Launch::new(gpu, "random", &format!("chacha_gaussian_{}", suffix(grads.dtype())))?;
    // 16 threads make a group of 256 normals.
    let l = l.grid((16 * n.div_ceil(256)).div_ceil(256), 1, 1).array(grads).val(n as i64);
    l.val(key.words()).val(step).val(0u64).val(std).optional(live).run()
}
