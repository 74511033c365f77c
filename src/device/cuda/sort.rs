//! Launches of the sorts of ids in `cuda/sort.cu`.

use super::{Gpu, Launch};
use crate::error::Result;
use crate::tensor::{Array, DType};
use std::sync::Arc;

/// Ids `[n]` (u32, below `below`) in rising order, and the positions they came from, rising among equal ids. A pass over
/// both for every 8 bits of the largest id.
pub(crate) fn ids(gpu: &Arc<Gpu>, ids: &Array, below: usize) -> Result<(Array, Array)> {
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
