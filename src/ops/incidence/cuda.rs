//! Launches of `cuda/incidence.cu`.

use super::sets::Side;
use crate::array::cuda::{on, suffix};
use crate::array::{Arguments, Array};
use crate::base::Result;
use crate::device::cuda::{Gpu, Launch};
use std::sync::Arc;

/// `out[t]` = Σ `w[at(i)]`·`x[member(i)]`; without weights they are 1. `at(i)` is i, or its position in the other order.
pub(crate) fn sums(
    gpu: &Arc<Gpu>,
    x: &Array,
    w: Option<&Array>,
    side: &Side,
    places: bool,
    heads: usize,
    shape: &[usize],
) -> Result<Array> {
    let (t, d) = (shape[0], shape[1]);
    let out = Array::uninit_on(gpu, shape, x.dtype())?;
    let w = w.map(|w| on(gpu, w)).transpose()?;
    let (members, place) = side.on_gpu(gpu)?;
    let offsets = side.segments.on_gpu(gpu)?.offsets;
    let l = Launch::new(gpu, "incidence", &format!("incidence_sum_{}", suffix(x.dtype())))?;
    let l = l.grid((t * d).div_ceil(1024), 1, 1).array(x).optional(w.as_ref()).array(&offsets).array(&members);
    let l = l.optional(places.then_some(&place)).array(&out);
    l.val(t as i64).val(d as i64).val(heads as i64).run()?;
    Ok(out)
}

/// ⟨`g[target(i)]`, `x[member(i)]`⟩ for each incidence and head.
pub(crate) fn dots(gpu: &Arc<Gpu>, g: &Array, x: &Array, side: &Side, heads: usize) -> Result<Array> {
    let (n, d) = (side.members().len(), x.shape()[1]);
    let dw = Array::uninit_on(gpu, &[n, heads], g.dtype().compute())?;
    let (members, _) = side.on_gpu(gpu)?;
    let owner = side.segments.on_gpu(gpu)?.owner;
    let l = Launch::new(gpu, "incidence", &format!("incidence_dot_{}", suffix(g.dtype())))?;
    let l = l.grid((n * heads).div_ceil(8), 1, 1).array(g).array(x).array(&owner).array(&members).array(&dw);
    l.val((n * heads) as i64).val(d as i64).val(heads as i64).run()?;
    Ok(dw)
}
