//! The launch of `cuda/rotary.cu`.

use crate::array::cuda::suffix;
use crate::array::{Arguments, Array};
use crate::base::Result;
use crate::device::cuda::{Gpu, Launch};
use std::sync::Arc;

/// Rotary position embedding of `x [B, T, H, D]` (unit stride along D) with tables `[positions, D/2]`, row 0 at position
/// `offset`; pairs interleaved or half apart, forwards or back.
pub(crate) fn rotary(
    gpu: &Arc<Gpu>,
    x: &Array,
    (cos, sin): (&Array, &Array),
    offset: usize,
    (interleaved, inverse): (bool, bool),
) -> Result<Array> {
    /// `Rotary` of `cuda/rotary.cu`.
    #[repr(C)]
    #[derive(Clone, Copy, bytemuck::NoUninit)]
    struct Rotary {
        /// batch, time, heads, half, step_b, step_t, step_h, offset.
        sizes: [i64; 8],
        interleaved: i32,
        inverse: i32,
    }
    let out = Array::uninit_on(gpu, x.shape(), x.dtype())?;
    let (s, st) = (x.shape(), x.strides());
    let sizes = [s[0], s[1], s[2], s[3] / 2, st[0], st[1], st[2], offset].map(|v| v as i64);
    let r = Rotary { sizes, interleaved: interleaved as i32, inverse: inverse as i32 };
    let l = Launch::new(gpu, "rotary", &format!("rotary_{}", suffix(x.dtype())))?;
    l.grid((x.numel() / 2).div_ceil(256), 1, 1).array(x).array(cos).array(sin).array(&out).val(r).run()?;
    Ok(out)
}
