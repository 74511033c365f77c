//! Arrays on a GPU: copies, fills, conversions and checked ids (`cuda/move.cu`), and arrays as arguments of a launch.

use crate::array::Array;
use crate::base::{DType, Element, Error, Result};
use crate::device::Device;
use crate::device::cuda::{Gpu, Launch, layouts};
use smallvec::SmallVec;
use std::sync::Arc;

/// The most dimensions that a kernel's table of sizes and strides can hold.
const RANK: usize = 6;

/// `Strided<N>` of `cuda/prelude.cuh`, as the words of its layout: rank, six sizes, and six strides per operand.
pub(crate) fn strided<const N: usize, const W: usize>(
    op: &str,
    shape: &[usize],
    steps: [&[usize]; N],
) -> Result<[i64; W]> {
    const { assert!(W == 1 + RANK + RANK * N && size_of::<layouts::Strided1>() == 8 * (1 + 2 * RANK), "words of the table") };
    // Adjacent dimensions that are contiguous in every operand are merged.
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

/// Width of a dtype, in the names of kernels that only move elements.
pub(crate) fn width(dtype: DType) -> &'static str {
    ["", "b1", "b2", "", "b4", "", "", "", "b8"][dtype.size()]
}

/// The array on this GPU: an operand on the CPU is copied to it.
pub(crate) fn on(gpu: &Arc<Gpu>, a: &Array) -> Result<Array> {
    a.to(&Device::Cuda(gpu.clone()))
}

/// Launches `file::name` over `n` elements with `args` after the result and the operands.
pub(crate) fn launch_elementwise<'a>(
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

/// Returns (n, r, c) if the array is a view of n row-major matrices `[r, c]` with rows and columns exchanged, and is large enough for a
/// tiled copy.
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

/// A row-major copy. Transposed matrices go through shared memory, so that whole memory lines are read and written.
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
    launch_elementwise(gpu, "move", &name, a.numel(), |l| {
        l.buf(src.0, src.1).buf(dst.0, dst.1).val(a.numel() as i64).val(s)
    })?;
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
    launch_elementwise(gpu, "move", &name, n, |l| l.array(&out).val(n as i64).val(u64::from_le_bytes(bits)))?;
    Ok(out)
}

/// The numbers 0, 1, 2, … n−1.
pub(crate) fn arange(gpu: &Arc<Gpu>, n: usize, dtype: DType) -> Result<Array> {
    let out = Array::uninit_on(gpu, &[n], dtype)?;
    launch_elementwise(gpu, "move", &format!("arange_{}", suffix(dtype)), n, |l| l.array(&out).val(n as i64))?;
    Ok(out)
}

/// The values converted to another dtype.
pub(crate) fn cast(gpu: &Arc<Gpu>, a: &Array, dtype: DType) -> Result<Array> {
    if a.dtype() == dtype {
        return Ok(a.clone());
    }
    let name = format!("cast_{}_{}", suffix(a.dtype()), suffix(dtype));
    let out = Array::uninit_on(gpu, a.shape(), dtype)?;
    let s: [i64; 13] = strided("cast", a.shape(), [a.strides()])?;
    let (src, dst) = (a.block("cast")?, out.block("cast")?);
    launch_elementwise(gpu, "move", &name, a.numel(), |l| {
        l.buf(src.0, src.1).buf(dst.0, dst.1).val(a.numel() as i64).val(s)
    })?;
    Ok(out)
}

/// y += x, in y's memory where no other handle shares it.
pub(crate) fn add_in_place(gpu: &Arc<Gpu>, y: &mut Array, x: &Array) -> Result<()> {
    y.own()?;
    let x = on(gpu, x)?;
    let s: [i64; 13] = strided("accumulate", x.shape(), [x.strides()])?;
    let (dst, src) = (y.block("accumulate")?, x.block("accumulate")?);
    let name = format!("add_assign_{}", suffix(y.dtype()));
    launch_elementwise(gpu, "binary", &name, x.numel(), |l| {
        l.buf(dst.0, dst.1).buf(src.0, src.1).val(x.numel() as i64).val(s)
    })
}

/// Ids (u32 or i64, on the GPU) as u32 below `below`. An id out of range is replaced by 0, and is reported as an error when the host next
/// reads from the device. `what` names the table that the ids index, for the error.
pub(crate) fn ids_below(gpu: &Arc<Gpu>, ids: &Array, below: usize, what: &str) -> Result<Array> {
    let ids = ids.contiguous();
    let name = match ids.dtype() {
        DType::U32 => "ids_u32",
        DType::I64 => "ids_i64",
        other => {
            return Err(Error::dtype("ids", format!("indices must be u32 or i64, got {other}; cast them first")));
        }
    };
    let out = Array::uninit_on(gpu, ids.shape(), DType::U32)?;
    let n = ids.numel();
    let (words, at) = gpu.deferred_word(&format!("{what}: ids must be in 0..{below}"))?;
    let l = Launch::new(gpu, "move", name)?.grid(n.div_ceil(1024), 1, 1).array(&ids).array(&out);
    l.val(n as i64).val(below as i64).buf(words, at).run()?;
    Ok(out)
}

/// Arrays as arguments of a launch.
pub(crate) trait Arguments<'a> {
    /// A pointer argument: the first element of an array on this GPU.
    fn array(self, a: &'a Array) -> Self;
    /// The same, or a null pointer.
    fn optional(self, a: Option<&'a Array>) -> Self;
}

impl<'a> Arguments<'a> for Launch<'a> {
    fn array(self, a: &'a Array) -> Self {
        match a.block("launch") {
            Ok((block, at)) => self.buf(block, at),
            Err(e) => self.failed(e),
        }
    }
    fn optional(self, a: Option<&'a Array>) -> Self {
        match a {
            Some(a) => self.array(a),
            None => self.null(),
        }
    }
}

/// Arrays as arguments of a [`Launch`], for the kernels of a [`CudaModule`](crate::device::cuda::CudaModule). The kernel receives a pointer
/// to the first element; sizes are passed as plain values ([`Launch::val`]). For an array that does not match, [`Launch::run`] returns an
/// error that names the kernel and the argument.
pub trait ArrayArguments<'a>: Sized {
    /// An array that the kernel reads: contiguous, of element type `T`, on the GPU of the launch.
    fn input<T: Element>(self, a: &'a Array) -> Self;
    /// An array that the kernel writes, with the same requirements. If other handles share its memory, it is copied first, so that none of
    /// them sees its values change; the kernel can read the array's previous contents.
    fn output<T: Element>(self, a: &'a mut Array) -> Self;
}

impl<'a> ArrayArguments<'a> for Launch<'a> {
    fn input<T: Element>(self, a: &'a Array) -> Self {
        if a.dtype() != T::DTYPE {
            return self.refused(format!("the array holds {}, not {}; use .cast()", a.dtype(), T::DTYPE));
        }
        if !a.is_contiguous() {
            return self.refused("the array is a strided view; call .contiguous() first");
        }
        if a.gpu().is_none() {
            return self.refused("the array is on the CPU; use .to(&device) first");
        }
        self.array(a)
    }
    fn output<T: Element>(self, a: &'a mut Array) -> Self {
        match a.own() {
            Ok(()) => self.input::<T>(a),
            Err(e) => self.failed(e),
        }
    }
}
