//! Launches of the kernels that gather rows, scatter-add rows and sort indices (`cuda/index.cu`, `cuda/sort.cu`).

use crate::array::cuda::{on, suffix};
use crate::array::{Arguments, Array};
use crate::base::{DType, Result};
use crate::device::cuda::{Gpu, Launch};
use std::sync::Arc;

/// `out[o, i]` = `src[o, ids[i]]` for rows of `p` elements: `src [outer, n, p]` contiguous, ids u32 below n.
pub(crate) fn take(
    gpu: &Arc<Gpu>,
    src: &Array,
    ids: &Array,
    outer: usize,
    n: usize,
    p: usize,
    shape: &[usize],
) -> Result<Array> {
    let op = "take";
    let (src, ids) = (on(gpu, src)?, on(gpu, ids)?);
    let out = Array::uninit_on(gpu, shape, src.dtype())?;
    if out.numel() > 0 {
        let (a, i, y, k) = (src.block(op)?, ids.block(op)?, out.block(op)?, ids.numel());
        let name = format!("take_b{}", src.dtype().size());
        let l = Launch::new(gpu, "index", &name)?.grid(out.numel().div_ceil(1024), 1, 1).block(256);
        l.buf(a.0, a.1)
            .buf(i.0, i.1)
            .buf(y.0, y.1)
            .val(outer as i64)
            .val(k as i64)
            .val(n as i64)
            .val(p as i64)
            .run()?;
    }
    Ok(out)
}

/// out[o, ids[t], :] += w[t]·src[o, t, :] for `src [outer, k, p]`, `out [outer, n, p]` (f32 or f64) and ids `[k]` below n. The ids are
/// sorted and sums run in ascending t, without atomics.
pub(crate) fn add_rows(
    gpu: &Arc<Gpu>,
    (src, ids): (&Array, &Array),
    w: Option<&Array>,
    (outer, n, p): (usize, usize, usize),
    out: &Array,
) -> Result<()> {
    let k = ids.numel();
    if outer * k * p == 0 {
        return Ok(());
    }
    let (sorted, order) = sort_ids(gpu, ids, n)?;
    let part = Array::uninit_on(gpu, &[outer, k.div_ceil(32), 2, p], out.dtype())?;
    let grid = outer * k.div_ceil(32) * p.div_ceil(256);
    let sizes = [outer as i64, k as i64, n as i64, p as i64];
    let sized = |l: Launch| sizes.iter().fold(l, |l, &s| l.val(s)).run();
    let l = Launch::new(gpu, "index", &format!("rows_add_{}", suffix(src.dtype())))?.grid(grid, 1, 1);
    sized(l.array(src).array(&sorted).array(&order).optional(w).array(out).array(&part))?;
    let l = Launch::new(gpu, "index", &format!("rows_add_last_{}", suffix(out.dtype())))?.grid(grid, 1, 1);
    sized(l.array(&part).array(&sorted).array(out))
}

/// The start of each of `keys` ids in the ascending `ids [n]` (u32): `[keys + 1]` i64.
pub(crate) fn run_starts(gpu: &Arc<Gpu>, ids: &Array, keys: usize) -> Result<Array> {
    let out = Array::uninit_on(gpu, &[keys + 1], DType::I64)?;
    let l = Launch::new(gpu, "sort", "run_starts")?.grid((keys + 1).div_ceil(256), 1, 1);
    l.array(ids).array(&out).val(ids.numel() as i64).val(keys as i64).run()?;
    Ok(out)
}

/// Ids `[n]` (u32, below `below`) in ascending order, and their original positions, ascending among equal ids. It makes one pass over both
/// for every 8 bits of the largest id.
pub(crate) fn sort_ids(gpu: &Arc<Gpu>, ids: &Array, below: usize) -> Result<(Array, Array)> {
    let n = ids.numel();
    let fresh = |n: usize| Array::uninit_on(gpu, &[n], DType::U32);
    let blocks = n.div_ceil(1024);
    let counts = fresh(256 * blocks)?;
    let bits = usize::BITS - below.saturating_sub(1).leading_zeros();
    let (mut from, mut order) = (ids.clone(), None);
    for pass in 0..bits.div_ceil(8).max(1) {
        let shift = 8 * pass as i32;
        let (to, moved) = (fresh(n)?, fresh(n)?);
        let l = Launch::new(gpu, "sort", "radix_count")?.grid(blocks, 1, 1);
        l.array(&from).array(&counts).val(n as i64).val(shift).run()?;
        Launch::new(gpu, "sort", "scan_u32")?.array(&counts).val((256 * blocks) as i64).run()?;
        let l = Launch::new(gpu, "sort", "radix_move")?.grid(blocks, 1, 1);
        let l = l.array(&from).optional(order.as_ref()).array(&to).array(&moved).array(&counts);
        l.val(n as i64).val(shift).run()?;
        (from, order) = (to, Some(moved));
    }
    match order {
        Some(order) => Ok((from, order)),
        None => Ok((from.clone(), from)),
    }
}
