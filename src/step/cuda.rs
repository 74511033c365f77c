//! The launch of `cuda/step.cu`.

use crate::array::cuda::suffix;
use crate::array::{Arguments, Array};
use crate::base::Result;
use crate::device::cuda::{Gpu, Launch};
use std::sync::Arc;

/// Adds `losses` (contiguous; the first is that of sample `before`) to `counters`; with `guard`, a non-finite loss stops training. The
/// number of the step is `step`, or is read from `number`.
pub(crate) fn losses(
    gpu: &Arc<Gpu>,
    losses: &Array,
    before: usize,
    counters: &Array,
    (step, number): (u64, Option<&Array>),
    guard: bool,
) -> Result<()> {
    let l = Launch::new(gpu, "step", &format!("step_losses_{}", suffix(losses.dtype())))?;
    let l = l.array(losses).val(losses.numel() as i64).val(before as i64).array(counters);
    l.val(step).val(guard as i32).optional(number).run()
}
