//! Launches of the grouped products of `cuda/gemm_grouped.cu`: rows sorted by group, a matrix for each.

use crate::array::cuda::suffix;
use crate::array::{Arguments, Array};
use crate::base::Result;
use crate::device::cuda::{Gpu, Launch};
use crate::kernels::gemm::cuda as gemm;
use bytemuck::NoUninit;
use std::sync::Arc;

/// `GroupedRows` of `cuda/gemm_grouped.cu`.
#[repr(C)]
#[derive(Clone, Copy, NoUninit)]
struct GroupedRows {
    groups: i64,
    /// n, k.
    width: [i64; 2],
    row_steps: [i64; 2],
    /// From group to group, along k, along n.
    weight_steps: [i64; 3],
    act: i32,
    accumulate: i32,
}

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
    let shape = GroupedRows {
        groups: groups as i64,
        width: [n as i64, k as i64],
        row_steps: [k as i64, n as i64],
        weight_steps: [step(0), step(1), step(2)],
        act: 0,
        accumulate: 0,
    };
    Launch::new(gpu, "gemm_grouped", &format!("grouped_rows_{way}_{}", suffix(x.dtype())))?
        .grid((rows.div_ceil(tile) + groups) * n.div_ceil(tile), 1, 1)
        .shared(gemm::shared(x.dtype()))
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
