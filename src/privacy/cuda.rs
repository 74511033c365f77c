//! Clip factors of a batch on a GPU (`cuda/factored.cu`).

use crate::array::cuda::suffix;
use crate::array::{Arguments, Array};
use crate::base::{DType, Result};
use crate::device::cuda::{Gpu, Launch};
use crate::privacy::ClipFn;
use bytemuck::NoUninit;
use std::sync::Arc;

/// `ClipShape` of `cuda/factored.cu`.
#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
struct ClipShape {
    count: i64,
    threshold: f64,
    gamma: f64,
    kind: i32,
    reserved: i32,
}

/// Clip factors of squared norms `sq [B]` (f64) in `dtype`; `stats` (i64, three) counts samples, clipped ones, and ones
/// whose norm is not finite.
pub(crate) fn clip_weights(
    gpu: &Arc<Gpu>,
    sq: &Array,
    (clip, threshold): (ClipFn, f64),
    dtype: DType,
    stats: Option<&Array>,
) -> Result<Array> {
    let w = Array::uninit_on(gpu, sq.shape(), dtype)?;
    let (kind, gamma) = match clip {
        ClipFn::Abadi => (0, 0.0),
        ClipFn::Reparameterised => (1, 0.0),
        ClipFn::AutoV => (2, 0.0),
        ClipFn::AutoS { gamma } => (3, gamma),
        ClipFn::Global => (4, 0.0),
    };
    let shape = ClipShape { count: sq.numel() as i64, threshold, gamma, kind, reserved: 0 };
    let l = Launch::new(gpu, "factored", &format!("clip_weights_{}", suffix(dtype)))?;
    l.array(sq).array(&w).optional(stats).val(shape).run()?;
    Ok(w)
}
