//! Clip factors of a batch on a GPU (`cuda/factored.cu`).

use crate::array::cuda::suffix;
use crate::array::{Arguments, Array};
use crate::base::{DType, Result};
use crate::device::cuda::{Gpu, Launch, layouts};
use crate::privacy::ClipFn;
use std::sync::Arc;

/// Clip factors of squared norms `sq [B]` (f64) in `dtype`; `stats` (three i64) counts the samples, the clipped ones, and those whose norm
/// is not finite.
pub(crate) fn clip_weights(
    gpu: &Arc<Gpu>,
    sq: &Array,
    (clip, threshold): (ClipFn, f64),
    dtype: DType,
    stats: Option<&Array>,
) -> Result<Array> {
    let w = Array::uninit_on(gpu, sq.shape(), dtype)?;
    let (kind, gamma) = match clip {
        ClipFn::Abadi => (layouts::CLIP_ABADI, 0.0),
        ClipFn::Reparameterised => (layouts::CLIP_REPARAMETERISED, 0.0),
        ClipFn::AutoV => (layouts::CLIP_AUTO_V, 0.0),
        ClipFn::AutoS { gamma } => (layouts::CLIP_AUTO_S, gamma),
        ClipFn::Global => (layouts::CLIP_GLOBAL, 0.0),
    };
    let shape = layouts::ClipShape { count: sq.numel() as i64, threshold, gamma, kind, reserved: 0 };
    let l = Launch::new(gpu, "factored", &format!("clip_weights_{}", suffix(dtype)))?;
    l.array(sq).array(&w).optional(stats).val(shape).run()?;
    Ok(w)
}
