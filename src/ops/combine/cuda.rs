//! Launches of `cuda/combine.cu`.

use crate::array::cuda::{on, suffix};
use crate::array::{Arguments, Array};
use crate::base::Result;
use crate::device::cuda::{Gpu, Launch};
use std::sync::Arc;

/// `out[t]` = Σ `w[t, s]`·`y[place[t, s]]`; without weights they are 1.
pub(crate) fn gather_sum(
    gpu: &Arc<Gpu>,
    y: &Array,
    w: Option<&Array>,
    place: &Array,
    (t, k): (usize, usize),
) -> Result<Array> {
    let d = y.shape()[1];
    let out = Array::uninit_on(gpu, &[t, d], y.dtype())?;
    let w = w.map(|w| on(gpu, w)).transpose()?;
    let l = Launch::new(gpu, "combine", &format!("combine_{}", suffix(y.dtype())))?;
    let l = l.grid((t * d).div_ceil(1024), 1, 1).array(y).optional(w.as_ref()).array(place).array(&out);
    l.val(t as i64).val(k as i64).val(d as i64).run()?;
    Ok(out)
}

/// `dy[row]` = `w[pair]`·`g[pair / k]`.
pub(crate) fn spread(gpu: &Arc<Gpu>, g: &Array, w: &Array, pairs: &Array, (n, k): (usize, usize)) -> Result<Array> {
    let d = g.shape()[1];
    let dy = Array::uninit_on(gpu, &[n, d], g.dtype())?;
    let l = Launch::new(gpu, "combine", &format!("combine_rows_{}", suffix(g.dtype())))?;
    let l = l.grid((n * d).div_ceil(1024), 1, 1).array(g).array(w).array(pairs).array(&dy);
    l.val(n as i64).val(k as i64).val(d as i64).run()?;
    Ok(dy)
}

/// `dw[t, s]` = ⟨`g[t]`, `y[place[t, s]]`⟩.
pub(crate) fn inner(gpu: &Arc<Gpu>, g: &Array, y: &Array, place: &Array, (t, k): (usize, usize)) -> Result<Array> {
    let d = g.shape()[1];
    let dw = Array::uninit_on(gpu, &[t, k], g.dtype().compute())?;
    let l = Launch::new(gpu, "combine", &format!("combine_weights_{}", suffix(g.dtype())))?;
    let l = l.grid((t * k).div_ceil(8), 1, 1).array(g).array(y).array(place).array(&dw);
    l.val((t * k) as i64).val(k as i64).val(d as i64).run()?;
    Ok(dw)
}
