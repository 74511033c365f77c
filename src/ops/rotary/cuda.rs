//! The launch of `cuda/rotary.cu`.

use crate::array::cuda::suffix;
use crate::array::{Arguments, Array};
use crate::base::Result;
use crate::device::cuda::{Gpu, Launch, layouts};
use std::sync::Arc;

/// Rotary position embedding of the first `turned` heads of `x [B, T, H, D]` (unit stride along D) with tables `[positions, D/2]`; row 0
/// has position `offset`. Pairs are interleaved or half a head apart; the rotation is forward or inverse.
pub(crate) fn rotary(
    gpu: &Arc<Gpu>,
    x: &Array,
    (cos, sin): (&Array, &Array),
    (offset, turned): (usize, usize),
    (interleaved, inverse): (bool, bool),
) -> Result<Array> {
    let out = Array::uninit_on(gpu, x.shape(), x.dtype())?;
    let (s, st) = (x.shape(), x.strides());
    let r = layouts::Rotary {
        batch: s[0] as i64,
        time: s[1] as i64,
        heads: s[2] as i64,
        turned: turned as i64,
        half: (s[3] / 2) as i64,
        step_b: st[0] as i64,
        step_t: st[1] as i64,
        step_h: st[2] as i64,
        offset: offset as i64,
        interleaved: interleaved as i32,
        inverse: inverse as i32,
    };
    let l = Launch::new(gpu, "rotary", &format!("rotary_{}", suffix(x.dtype())))?;
    l.grid((x.numel() / 2).div_ceil(256), 1, 1).array(x).array(cos).array(sin).array(&out).val(r).run()?;
    Ok(out)
}
