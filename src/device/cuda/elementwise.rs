//! Launches of the elementwise kernels (`cuda/unary.cu`, `cuda/binary.cu`, `cuda/move.cu`): strided operands in, a
//! contiguous result out, 4 elements per thread.

use super::{Gpu, Launch};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::tensor::shape::{Dims, broadcast};
use crate::tensor::{Array, DType};
use smallvec::SmallVec;
use std::sync::Arc;

/// Dimensions that a kernel's table of sizes and steps holds.
const RANK: usize = 6;

/// `Strided<N>` of `cuda/prelude.cuh`, as the words of its layout: rank, six sizes, six steps per operand.
pub(crate) fn strided<const N: usize, const W: usize>(
    op: &str,
    shape: &[usize],
    steps: [&[usize]; N],
) -> Result<[i64; W]> {
    assert_eq!(W, 1 + RANK + RANK * N, "words of the table");
    // Adjacent dimensions that run together in every operand are merged.
    let mut dims: SmallVec<[(usize, [usize; N]); RANK]> = SmallVec::new();
    for d in 0..shape.len() {
        let (size, step) = (shape[d], std::array::from_fn(|k| steps[k][d]));
        if size == 1 {
            continue;
        }
        match dims.last_mut() {
            Some((s, st)) if (0..N).all(|k| st[k] == step[k] * size) => {
                *s *= size;
                *st = step;
            }
            _ => dims.push((size, step)),
        }
    }
    if dims.is_empty() {
        dims.push((1, [1; N]));
    }
    if dims.len() > RANK {
        let message =
            format!("{shape:?} with these strides has {} dimensions; make the operands contiguous", dims.len());
        return Err(Error::shape("elementwise", format!("{op}: {message}")));
    }
    let mut words = [0i64; W];
    words[0] = dims.len() as i64;
    for (d, (size, step)) in dims.iter().enumerate() {
        words[1 + d] = *size as i64;
        for k in 0..N {
            words[1 + RANK + RANK * k + d] = step[k] as i64;
        }
    }
    Ok(words)
}

/// Suffix of a dtype in kernel names.
pub(crate) fn suffix(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "f32",
        DType::F64 => "f64",
        DType::BF16 => "bf16",
        DType::F16 => "f16",
        DType::U32 => "u32",
        DType::I64 => "i64",
        DType::U8 => "u8",
    }
}

/// Width of a dtype in names of kernels that only move.
pub(crate) fn width(dtype: DType) -> &'static str {
    ["", "b1", "b2", "", "b4", "", "", "", "b8"][dtype.size()]
}

/// The array on this GPU: operands on the CPU are copied over.
pub(crate) fn on(gpu: &Arc<Gpu>, a: &Array) -> Result<Array> {
    a.to(&Device::Cuda(gpu.clone()))
}

/// Launches `file::name` over `n` elements with `args` after the result and the operands.
fn run<'a>(
    gpu: &'a Arc<Gpu>,
    file: &str,
    name: &str,
    n: usize,
    args: impl FnOnce(Launch<'a>) -> Launch<'a>,
) -> Result<()> {
    if n == 0 {
        return Ok(());
    }
    args(Launch::new(gpu, file, name)?.grid(n.div_ceil(1024), 1, 1).block(256)).run()
}

/// (n, r, c) if the array is a view of n row-major matrices `[r, c]` with rows and columns exchanged, of some size.
fn transposed(a: &Array) -> Option<(usize, usize, usize)> {
    let (lead, &[c, r]) = a.shape().split_last_chunk::<2>()?;
    let (steps, &[one, row]) = a.strides().split_last_chunk::<2>()?;
    let mut run = r * c;
    for (size, step) in lead.iter().zip(steps).rev() {
        if *size != 1 && *step != run {
            return None;
        }
        run *= size;
    }
    let n: usize = lead.iter().product();
    (one == 1 && row == c && r.min(c) >= 16 && n > 0).then_some((n, r, c))
}

/// A row-major copy. Transposed matrices go through shared memory, whole lines in and out.
pub(crate) fn copy(gpu: &Arc<Gpu>, a: &Array) -> Result<Array> {
    let out = Array::uninit_on(gpu, a.shape(), a.dtype())?;
    if let Some((n, r, c)) = transposed(a) {
        let (src, dst) = (a.block("copy")?, out.block("copy")?);
        let l = Launch::new(gpu, "move", &format!("transpose_{}", width(a.dtype())))?;
        let l = l.grid(n * r.div_ceil(32) * c.div_ceil(32), 1, 1).buf(src.0, src.1).buf(dst.0, dst.1);
        l.val(n as i64).val(r as i64).val(c as i64).run()?;
        return Ok(out);
    }
    let s: [i64; 19] = strided("copy", a.shape(), [a.strides(), out.strides()])?;
    let (src, dst) = (a.block("copy")?, out.block("copy")?);
    let name = format!("copy_{}", width(a.dtype()));
    run(gpu, "move", &name, a.numel(), |l| l.buf(src.0, src.1).buf(dst.0, dst.1).val(a.numel() as i64).val(s))?;
    Ok(out)
}

/// A new array of one value, rounded to `dtype`.
pub(crate) fn full(gpu: &Arc<Gpu>, shape: &[usize], value: f64, dtype: DType) -> Result<Array> {
    let out = Array::uninit_on(gpu, shape, dtype)?;
    let mut bits = [0u8; 8];
    let one = Array::scalar(value, dtype).to_bytes();
    bits[..one.len()].copy_from_slice(&one);
    let n = out.numel();
    let name = format!("fill_{}", width(dtype));
    run(gpu, "move", &name, n, |l| l.array(&out).val(n as i64).val(u64::from_le_bytes(bits)))?;
    Ok(out)
}

/// Dropout of a contiguous array: zeros with probability `p`, the rest over 1 − p; the mask is a function of the seed.
pub(crate) fn dropout(gpu: &Arc<Gpu>, x: &Array, p: f64, seed: u64) -> Result<Array> {
    let out = Array::uninit_on(gpu, x.shape(), x.dtype())?;
    let n = x.numel();
    let name = format!("dropout_{}", suffix(x.dtype()));
    run(gpu, "random", &name, n, |l| l.array(x).array(&out).val(n as i64).val(seed).val(p))?;
    Ok(out)
}

/// 0, 1, 2, …
pub(crate) fn arange(gpu: &Arc<Gpu>, n: usize, dtype: DType) -> Result<Array> {
    let out = Array::uninit_on(gpu, &[n], dtype)?;
    run(gpu, "move", &format!("arange_{}", suffix(dtype)), n, |l| l.array(&out).val(n as i64))?;
    Ok(out)
}

/// Converted to another dtype.
pub(crate) fn cast(gpu: &Arc<Gpu>, a: &Array, dtype: DType) -> Result<Array> {
    if a.dtype() == dtype {
        return Ok(a.clone());
    }
    let name = format!("cast_{}_{}", suffix(a.dtype()), suffix(dtype));
    let out = Array::uninit_on(gpu, a.shape(), dtype)?;
    let s: [i64; 13] = strided("cast", a.shape(), [a.strides()])?;
    let (src, dst) = (a.block("cast")?, out.block("cast")?);
    run(gpu, "move", &name, a.numel(), |l| l.buf(src.0, src.1).buf(dst.0, dst.1).val(a.numel() as i64).val(s))?;
    Ok(out)
}

/// y += x, in y's memory where nobody shares it.
pub(crate) fn add_in_place(gpu: &Arc<Gpu>, y: &mut Array, x: &Array) -> Result<()> {
    y.own()?;
    let x = on(gpu, x)?;
    let s: [i64; 13] = strided("accumulate", x.shape(), [x.strides()])?;
    let (dst, src) = (y.block("accumulate")?, x.block("accumulate")?);
    let name = format!("add_assign_{}", suffix(y.dtype()));
    run(gpu, "binary", &name, x.numel(), |l| l.buf(dst.0, dst.1).buf(src.0, src.1).val(x.numel() as i64).val(s))
}

/// `name(x, p, q)` of `cuda/unary.cu`.
pub(crate) fn unary(gpu: &Arc<Gpu>, name: &str, x: &Array, [p, q]: [f64; 2]) -> Result<Array> {
    let out = Array::uninit_on(gpu, x.shape(), x.dtype())?;
    unary_to(gpu, name, x, [p, q], &out)?;
    Ok(out)
}

/// The same into `out`, contiguous.
pub(crate) fn unary_into(gpu: &Arc<Gpu>, name: &str, x: &Array, out: &Array) -> Result<()> {
    unary_to(gpu, name, x, [0.0; 2], out)
}

fn unary_to(gpu: &Arc<Gpu>, name: &str, x: &Array, [p, q]: [f64; 2], out: &Array) -> Result<()> {
    let s: [i64; 13] = strided(name, x.shape(), [x.strides()])?;
    let (src, dst) = (x.block(name)?, out.block(name)?);
    let kernel = format!("{name}_{}", suffix(x.dtype()));
    run(gpu, "unary", &kernel, x.numel(), |l| {
        l.buf(src.0, src.1).buf(dst.0, dst.1).val(x.numel() as i64).val(s).val(p).val(q)
    })
}

/// 1 where the value is finite, 0 elsewhere, u8.
pub(crate) fn is_finite(gpu: &Arc<Gpu>, x: &Array) -> Result<Array> {
    let out = Array::uninit_on(gpu, x.shape(), DType::U8)?;
    let s: [i64; 13] = strided("is_finite", x.shape(), [x.strides()])?;
    let name = format!("is_finite_{}", suffix(x.dtype()));
    run(gpu, "unary", &name, x.numel(), |l| l.array(x).array(&out).val(x.numel() as i64).val(s))?;
    Ok(out)
}

/// x ← p·x, in place, whoever else sees it; contiguous.
pub(crate) fn scale_in_place(gpu: &Arc<Gpu>, x: &Array, p: f64) -> Result<()> {
    let s: [i64; 13] = strided("mul_scalar", &[x.numel()], [&[1]])?;
    let n = x.numel() as i64;
    let kernel = format!("mul_scalar_{}", suffix(x.dtype()));
    run(gpu, "unary", &kernel, x.numel(), |l| l.array(x).array(x).val(n).val(s).val(p).val(0f64))
}

/// g·f′(saved), for the `_grad` kernels of `cuda/unary.cu`.
pub(crate) fn unary_grad(gpu: &Arc<Gpu>, name: &str, g: &Array, saved: &Array, [p, q]: [f64; 2]) -> Result<Array> {
    let (g, saved) = (on(gpu, g)?, on(gpu, saved)?);
    let out = Array::uninit_on(gpu, g.shape(), g.dtype())?;
    let s: [i64; 19] = strided(name, g.shape(), [g.strides(), saved.strides()])?;
    let (a, b, dst) = (g.block(name)?, saved.block(name)?, out.block(name)?);
    let kernel = format!("{name}_grad_{}", suffix(g.dtype()));
    run(gpu, "unary", &kernel, g.numel(), |l| {
        l.buf(a.0, a.1).buf(b.0, b.1).buf(dst.0, dst.1).val(g.numel() as i64).val(s).val(p).val(q)
    })?;
    Ok(out)
}

/// Both operands on the GPU, expanded to their common shape.
fn pair(gpu: &Arc<Gpu>, op: &'static str, a: &Array, b: &Array) -> Result<(Array, Array, Dims)> {
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
    run(gpu, "binary", &kernel, out.numel(), |l| {
        l.buf(x.0, x.1).buf(y.0, y.1).buf(dst.0, dst.1).val(out.numel() as i64).val(s)
    })?;
    Ok(out)
}

/// g·∂/∂(operand `side`) of the broadcast operands, in their common shape.
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
    run(gpu, "binary", &kernel, out.numel(), |l| {
        l.buf(x.0, x.1).buf(y.0, y.1).buf(z.0, z.1).buf(dst.0, dst.1).val(out.numel() as i64).val(s).val(side as i32)
    })?;
    Ok(out)
}

/// Comparison `code` (0 =, 1 ≠, 2 <, 3 ≤, 4 >, 5 ≥) as a mask.
pub(crate) fn compare(gpu: &Arc<Gpu>, code: i32, a: &Array, b: &Array) -> Result<Array> {
    let (a, b, shape) = pair(gpu, "compare", a, b)?;
    let out = Array::uninit_on(gpu, &shape, DType::U8)?;
    let s: [i64; 19] = strided("compare", &shape, [a.strides(), b.strides()])?;
    let (x, y, dst) = (a.block("compare")?, b.block("compare")?, out.block("compare")?);
    let kernel = format!("compare_{}", suffix(a.dtype()));
    run(gpu, "binary", &kernel, out.numel(), |l| {
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
    run(gpu, "binary", &kernel, out.numel(), |l| {
        l.buf(m.0, m.1).buf(x.0, x.1).buf(y.0, y.1).buf(dst.0, dst.1).val(out.numel() as i64).val(s)
    })?;
    Ok(out)
}

/// `g` where (mask ≠ 0) = `keep`, 0 elsewhere; of one shape.
pub(crate) fn mask(gpu: &Arc<Gpu>, g: &Array, mask: &Array, keep: bool) -> Result<Array> {
    let (g, mask) = (on(gpu, g)?, on(gpu, mask)?);
    let out = Array::uninit_on(gpu, g.shape(), g.dtype())?;
    let s: [i64; 19] = strided("where", g.shape(), [g.strides(), mask.strides()])?;
    let (x, m, dst) = (g.block("where")?, mask.block("where")?, out.block("where")?);
    let kernel = format!("mask_{}", width(g.dtype()));
    run(gpu, "binary", &kernel, out.numel(), |l| {
        l.buf(x.0, x.1).buf(m.0, m.1).buf(dst.0, dst.1).val(out.numel() as i64).val(s).val(keep as i32)
    })?;
    Ok(out)
}
