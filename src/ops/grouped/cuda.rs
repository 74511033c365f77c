//! Launches of the grouped products of `cuda/gemm_grouped.cu`: rows sorted by group, with one matrix for each group.

use crate::array::{Arguments, Array};
use crate::base::Result;
use crate::device::cuda::{Gpu, Launch, layouts};
use crate::kernels::Activation;
use crate::kernels::gemm::cuda as gemm;
use std::sync::Arc;

/// The rows of a grouped product: their source and their order.
pub(crate) struct Rows<'a> {
    /// The start of each group's rows, `[E + 1]` i64.
    pub offsets: &'a Array,
    /// The row of `x` that each row reads, `[N]` u32; without it, row r reads row r.
    pub index: Option<&'a Array>,
    /// Number of rows, N.
    pub count: usize,
}

/// y[r] = act(x[r]·W_e + bias_e) for the rows of each group e: `x [·, k]`, `w [E, k, n]` in any strides of which one of the last two is 1,
/// `bias [E, n]`. If `pre` is set, the values before the activation are returned as well.
pub(crate) fn rows(
    gpu: &Arc<Gpu>,
    x: &Array,
    w: &Array,
    bias: Option<&Array>,
    from: &Rows,
    (act, pre): (Activation, bool),
) -> Result<(Array, Option<Array>)> {
    let (rows, k, groups, n) = (from.count, x.shape()[1], w.shape()[0], w.shape()[2]);
    let y = Array::uninit_on(gpu, &[rows, n], x.dtype())?;
    let pre = if pre { Some(Array::uninit_on(gpu, &[rows, n], x.dtype())?) } else { None };
    if y.numel() == 0 {
        return Ok((y, pre));
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
        act: gemm::code(act),
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
        .optional(pre.as_ref())
        .array(from.offsets)
        .optional(from.index)
        .val(shape)
        .run()?;
    Ok((y, pre))
}
