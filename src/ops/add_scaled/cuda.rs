//! Launches of `cuda/add_scaled.cu`.

use crate::array::cuda::suffix;
use crate::array::{Arguments, Array};
use crate::base::{DType, Result};
use crate::device::cuda::{Gpu, Launch, layouts};
use std::sync::Arc;

/// The most arrays that one launch adds.
const MOST: usize = 8;

/// `arrays[0]` plus each further array times its weight; contiguous, of one shape and dtype.
pub(crate) fn add_scaled(gpu: &Arc<Gpu>, arrays: &[Array], weights: &[f64]) -> Result<Array> {
    let (x, terms) = (&arrays[0], &arrays[1..]);
    let out = Array::uninit_on(gpu, x.shape(), x.dtype())?;
    let n = out.numel();
    if n == 0 {
        return Ok(out);
    }
    let launches = terms.len().div_ceil(MOST).max(1);
    let sums = if launches > 1 { Some(Array::uninit_on(gpu, x.shape(), DType::F64)?) } else { None };
    let name = format!("add_scaled_{}", suffix(x.dtype()));
    for k in 0..launches {
        let part = k * MOST..((k + 1) * MOST).min(terms.len());
        let mut w = layouts::Weights8 { w: [0.0; MOST] };
        w.w[..part.len()].copy_from_slice(&weights[part.clone()]);
        let l = Launch::new(gpu, "add_scaled", &name)?.grid(n.div_ceil(1024), 1, 1);
        let l = l.optional((k == 0).then_some(x)).optional(sums.as_ref());
        let l = l.optional((k + 1 == launches).then_some(&out)).val(n as i64);
        let l = (0..MOST).fold(l, |l, i| l.optional(terms[part.clone()].get(i)));
        l.val(w).val(part.len() as i32).run()?;
    }
    Ok(out)
}
