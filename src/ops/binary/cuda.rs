//! Launches of comparisons and selections in `cuda/binary.cu`.

use super::Comparison;
use crate::array::Array;
use crate::array::cuda::{launch_elementwise, on, strided, suffix, width};
use crate::base::{DType, Result};
use crate::device::cuda::{Gpu, layouts};
use crate::kernels::elementwise::cuda::pair;
use std::sync::Arc;

/// The result of a comparison as a u8 mask.
pub(crate) fn compare(gpu: &Arc<Gpu>, which: Comparison, a: &Array, b: &Array) -> Result<Array> {
    let (a, b, shape) = pair(gpu, "compare", a, b)?;
    let out = Array::uninit_on(gpu, &shape, DType::U8)?;
    let s: [i64; 19] = strided("compare", &shape, [a.strides(), b.strides()])?;
    let (x, y, dst) = (a.block("compare")?, b.block("compare")?, out.block("compare")?);
    let code = match which {
        Comparison::Eq => layouts::COMPARE_EQ,
        Comparison::Ne => layouts::COMPARE_NE,
        Comparison::Lt => layouts::COMPARE_LT,
        Comparison::Le => layouts::COMPARE_LE,
        Comparison::Gt => layouts::COMPARE_GT,
        Comparison::Ge => layouts::COMPARE_GE,
    };
    let kernel = format!("compare_{}", suffix(a.dtype()));
    launch_elementwise(gpu, "binary", &kernel, out.numel(), |l| {
        l.buf(x.0, x.1).buf(y.0, y.1).buf(dst.0, dst.1).val(out.numel() as i64).val(s).val(code)
    })?;
    Ok(out)
}

/// `a` where the mask is not 0, `b` elsewhere; all of one shape.
pub(crate) fn select(gpu: &Arc<Gpu>, mask: &Array, a: &Array, b: &Array) -> Result<Array> {
    let (mask, a, b) = (on(gpu, mask)?, on(gpu, a)?, on(gpu, b)?);
    let out = Array::uninit_on(gpu, mask.shape(), a.dtype())?;
    let s: [i64; 25] = strided("where", mask.shape(), [mask.strides(), a.strides(), b.strides()])?;
    let (m, x, y, dst) = (mask.block("where")?, a.block("where")?, b.block("where")?, out.block("where")?);
    let kernel = format!("where_{}", width(a.dtype()));
    launch_elementwise(gpu, "binary", &kernel, out.numel(), |l| {
        l.buf(m.0, m.1).buf(x.0, x.1).buf(y.0, y.1).buf(dst.0, dst.1).val(out.numel() as i64).val(s)
    })?;
    Ok(out)
}

/// `g` where (mask ≠ 0) = `keep`, 0 elsewhere; all of one shape.
pub(crate) fn mask(gpu: &Arc<Gpu>, g: &Array, mask: &Array, keep: bool) -> Result<Array> {
    let (g, mask) = (on(gpu, g)?, on(gpu, mask)?);
    let out = Array::uninit_on(gpu, g.shape(), g.dtype())?;
    let s: [i64; 19] = strided("where", g.shape(), [g.strides(), mask.strides()])?;
    let (x, m, dst) = (g.block("where")?, mask.block("where")?, out.block("where")?);
    let kernel = format!("mask_{}", width(g.dtype()));
    launch_elementwise(gpu, "binary", &kernel, out.numel(), |l| {
        l.buf(x.0, x.1).buf(m.0, m.1).buf(dst.0, dst.1).val(out.numel() as i64).val(s).val(keep as i32)
    })?;
    Ok(out)
}
