//! Launches of the grouped products of `cuda/gemm_grouped.cu`: rows sorted by group, a matrix for each.

use crate::array::{Arguments, Array};
use crate::base::Result;
use crate::device::cuda::{Gpu, Launch, layouts};
use crate::kernels::gemm::cuda as gemm;
use std::sync::Arc;

/// y[r] = x[r]·W_e + bias_e for the rows of each group e: `x [N, k]`, `w [E, k, n]` in any strides with one of the last two
/// 1, `bias [E, n]`, `offsets [E + 1]` i64.
pub(crate) fn rows(gpu: &Arc<Gpu>, x: &Array, w: &Array, bias: Option<&Array>, offsets: &Array) -> Result<Array> {
    let (rows, k, groups, n) = (x.shape()[0], x.shape()[1], w.shape()[0], w.shape()[2]);
    let y = Array::uninit_on(gpu, &[rows, n], x.dtype())?;
    if y.numel() == 0 {
        return Ok(y);
    }
    let way = if w.strides()[2] == 1 { 'n' } else { 't' };
    let tile = gemm::tile(x.dtype());
    let step = |d: usize| w.strides()[d] as i64;
    let shape = layouts::GroupedRows {
        groups: groups as i64,
        n: n as i64,
        k: k as i64,
        x_rs: k as i64,
        y_rs: n as i64,
        w_s: step(0),
        w_rs: step(1),
        w_cs: step(2),
        act: layouts::ACT_NONE,
        accumulate: 0,
    };
    let kind = gemm::kind(gpu, x.dtype());
    Launch::new(gpu, "gemm_grouped", &format!("grouped_rows_{way}_{kind}"))?
        .grid((rows.div_ceil(tile) + groups) * n.div_ceil(tile), 1, 1)
        .shared(gemm::shared(kind))
        .array(x)
        .array(w)
        .array(&y)
        .optional(bias)
        .null()
        .array(offsets)
        .null()
        .val(shape)
        .run()?;
    Ok(y)
}
