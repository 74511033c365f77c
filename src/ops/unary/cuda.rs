//! The launch of `is_finite` in `cuda/unary.cu`.

use crate::array::cuda::{launch_elementwise, strided, suffix};
use crate::array::{Arguments, Array};
use crate::base::{DType, Result};
use crate::device::cuda::Gpu;
use std::sync::Arc;

/// A u8 mask: 1 where the value is finite, 0 elsewhere.
pub(crate) fn is_finite(gpu: &Arc<Gpu>, x: &Array) -> Result<Array> {
    let out = Array::uninit_on(gpu, x.shape(), DType::U8)?;
    let s: [i64; 13] = strided("is_finite", x.shape(), [x.strides()])?;
    let name = format!("is_finite_{}", suffix(x.dtype()));
    launch_elementwise(gpu, "unary", &name, x.numel(), |l| l.array(x).array(&out).val(x.numel() as i64).val(s))?;
    Ok(out)
}
