//! Launches of the elementwise kernels (`cuda/unary.cu`, `cuda/binary.cu`, `cuda/move.cu`). Operands are strided, the result is contiguous,
//! and each thread computes 4 elements.

use crate::array::cuda::{launch_elementwise, on, strided, suffix};
use crate::array::shape::{Dims, broadcast};
use crate::array::{Arguments, Array};
use crate::base::Result;
use crate::device::cuda::Gpu;
use std::sync::Arc;

/// `name(x, p, q)` of `cuda/unary.cu`.
pub(crate) fn unary(gpu: &Arc<Gpu>, name: &str, x: &Array, [p, q]: [f64; 2]) -> Result<Array> {
    let out = Array::uninit_on(gpu, x.shape(), x.dtype())?;
    unary_to(gpu, name, x, [p, q], &out)?;
    Ok(out)
}

/// The same into the contiguous array `out`.
pub(crate) fn unary_into(gpu: &Arc<Gpu>, name: &str, x: &Array, out: &Array) -> Result<()> {
    unary_to(gpu, name, x, [0.0; 2], out)
}

fn unary_to(gpu: &Arc<Gpu>, name: &str, x: &Array, [p, q]: [f64; 2], out: &Array) -> Result<()> {
    let s: [i64; 13] = strided(name, x.shape(), [x.strides()])?;
    let (src, dst) = (x.block(name)?, out.block(name)?);
    let kernel = format!("{name}_{}", suffix(x.dtype()));
    launch_elementwise(gpu, "unary", &kernel, x.numel(), |l| {
        l.buf(src.0, src.1).buf(dst.0, dst.1).val(x.numel() as i64).val(s).val(p).val(q)
    })
}

/// x ← p·x for a contiguous x, in place: other handles on the same memory see the new values.
pub(crate) fn scale_in_place(gpu: &Arc<Gpu>, x: &Array, p: f64) -> Result<()> {
    let s: [i64; 13] = strided("mul_scalar", &[x.numel()], [&[1]])?;
    let n = x.numel() as i64;
    let kernel = format!("mul_scalar_{}", suffix(x.dtype()));
    launch_elementwise(gpu, "unary", &kernel, x.numel(), |l| l.array(x).array(x).val(n).val(s).val(p).val(0f64))
}

/// g·f′(saved), for the `_grad` kernels of `cuda/unary.cu`.
pub(crate) fn unary_grad(gpu: &Arc<Gpu>, name: &str, g: &Array, saved: &Array, [p, q]: [f64; 2]) -> Result<Array> {
    let (g, saved) = (on(gpu, g)?, on(gpu, saved)?);
    let out = Array::uninit_on(gpu, g.shape(), g.dtype())?;
    let s: [i64; 19] = strided(name, g.shape(), [g.strides(), saved.strides()])?;
    let (a, b, dst) = (g.block(name)?, saved.block(name)?, out.block(name)?);
    let kernel = format!("{name}_grad_{}", suffix(g.dtype()));
    launch_elementwise(gpu, "unary", &kernel, g.numel(), |l| {
        l.buf(a.0, a.1).buf(b.0, b.1).buf(dst.0, dst.1).val(g.numel() as i64).val(s).val(p).val(q)
    })?;
    Ok(out)
}

/// Both operands on the GPU, expanded to the shape to which they broadcast.
pub(crate) fn pair(gpu: &Arc<Gpu>, op: &'static str, a: &Array, b: &Array) -> Result<(Array, Array, Dims)> {
    let shape = broadcast(op, a.shape(), b.shape())?;
    Ok((on(gpu, a)?.expand(&shape)?, on(gpu, b)?.expand(&shape)?, shape))
}

/// `name(a, b)` of `cuda/binary.cu`, broadcast.
pub(crate) fn binary(gpu: &Arc<Gpu>, name: &'static str, a: &Array, b: &Array) -> Result<Array> {
    let (a, b, shape) = pair(gpu, name, a, b)?;
    let out = Array::uninit_on(gpu, &shape, a.dtype())?;
    let s: [i64; 19] = strided(name, &shape, [a.strides(), b.strides()])?;
    let (x, y, dst) = (a.block(name)?, b.block(name)?, out.block(name)?);
    let kernel = format!("{name}_{}", suffix(a.dtype()));
    launch_elementwise(gpu, "binary", &kernel, out.numel(), |l| {
        l.buf(x.0, x.1).buf(y.0, y.1).buf(dst.0, dst.1).val(out.numel() as i64).val(s)
    })?;
    Ok(out)
}

/// g·∂/∂(operand `side`) of the broadcast operands, in the broadcast shape.
pub(crate) fn binary_grad(
    gpu: &Arc<Gpu>,
    name: &'static str,
    (a, b): (&Array, &Array),
    g: &Array,
    side: usize,
) -> Result<Array> {
    let (a, b, shape) = pair(gpu, name, a, b)?;
    let g = on(gpu, g)?;
    let out = Array::uninit_on(gpu, &shape, g.dtype())?;
    let s: [i64; 25] = strided(name, &shape, [a.strides(), b.strides(), g.strides()])?;
    let (x, y, z, dst) = (a.block(name)?, b.block(name)?, g.block(name)?, out.block(name)?);
    let kernel = format!("{name}_grad_{}", suffix(g.dtype()));
    launch_elementwise(gpu, "binary", &kernel, out.numel(), |l| {
        l.buf(x.0, x.1).buf(y.0, y.1).buf(z.0, z.1).buf(dst.0, dst.1).val(out.numel() as i64).val(s).val(side as i32)
    })?;
    Ok(out)
}
