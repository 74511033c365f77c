//! Launches of the matrix products of `cuda/gemm.cu`.

use crate::array::cuda::{on, suffix};
use crate::array::{Arguments, Array};
use crate::base::{DType, Result};
use crate::device::cuda::{Gpu, Launch, layouts};
use crate::kernels::Activation;
use crate::kernels::gemm::blas;
use std::sync::Arc;

/// Operations fused into a product when a result is written.
#[derive(Default)]
pub(crate) struct Epilogue<'a> {
    /// Added to every row.
    pub bias: Option<&'a Array>,
    /// Applied last.
    pub act: Activation,
    /// Whether the values before the activation are returned as well.
    pub pre: bool,
}

/// The activation's code in the kernels.
pub(crate) fn code(act: Activation) -> i32 {
    match act {
        Activation::None => layouts::ACT_NONE,
        Activation::Relu => layouts::ACT_RELU,
        Activation::Gelu => layouts::ACT_GELU,
        Activation::GeluTanh => layouts::ACT_GELU_TANH,
        Activation::Silu => layouts::ACT_SILU,
        Activation::Tanh => layouts::ACT_TANH,
    }
}

/// The activation's kernel in `cuda/unary.cu`.
fn name(act: Activation) -> &'static str {
    match act {
        Activation::None => "identity",
        Activation::Relu => "relu",
        Activation::Gelu => "gelu",
        Activation::GeluTanh => "gelu_tanh",
        Activation::Silu => "silu",
        Activation::Tanh => "tanh",
    }
}

/// Dynamic shared memory of the f32 and f64 products, in bytes.
pub(crate) const SHARED: usize = 33_792;

/// Dynamic shared memory of a product, in bytes; larger for tensor cores, whose pipeline stages overlap.
pub(crate) fn shared(kind: &str) -> usize {
    if matches!(kind, "f32" | "f64") { SHARED } else { 65_536 }
}

/// The arithmetic of a product as it appears in the names of kernels: the dtype, or TF32 if f32 operands may be rounded to it.
pub(crate) fn kind(gpu: &Gpu, dtype: DType) -> &'static str {
    if dtype == DType::F32 && gpu.allows_tf32() { "tf32" } else { suffix(dtype) }
}

/// Rows and columns of the tile of one block.
pub(crate) fn tile(dtype: DType) -> usize {
    if dtype == DType::F64 { 64 } else { 128 }
}

/// Weights of the steps of a contraction over rows: row n has weights[owner[n]], or weights[n / each].
pub(crate) struct RowWeights<'a> {
    /// One per sample.
    pub weights: &'a Array,
    /// The sample of each row.
    pub owner: Option<&'a Array>,
    /// Rows per sample if there is no `owner`.
    pub each: usize,
}

/// act(a·b + bias) and, if `pre` is set, a·b + bias. `a […, m, k]` and `b […, k, n]` have one float dtype, equal leading dimensions and any
/// strides. bf16 and f16 products run on the tensor cores, are summed in f32 and rounded once.
pub(crate) fn product(gpu: &Arc<Gpu>, a: &Array, b: &Array, e: Epilogue) -> Result<(Array, Option<Array>)> {
    let (a, b) = (on(gpu, a)?, on(gpu, b)?);
    let r = a.rank() - 2;
    let shape: Vec<usize> = a.shape()[..=r].iter().copied().chain([b.shape()[r + 1]]).collect();
    let out = Array::uninit_on(gpu, &shape, a.dtype())?;
    let pre = if e.pre { Some(Array::uninit_on(gpu, &shape, a.dtype())?) } else { None };
    let bias = e.bias.map(|b| on(gpu, b).map(|b| b.contiguous())).transpose()?;
    let call = Call { bias: bias.as_ref(), pre: pre.as_ref(), act: e.act, weights: None, accumulate: false };
    run(gpu, &a, &b, &out, call)?;
    Ok((out, pre))
}

/// out += a·diag(w)·b, all on the GPU; `out […, m, n]` is contiguous. A step of weight zero is skipped, even if its values are not finite.
pub(crate) fn add_product(
    gpu: &Arc<Gpu>,
    a: &Array,
    b: &Array,
    weights: Option<RowWeights>,
    out: &Array,
) -> Result<()> {
    run(gpu, a, b, out, Call { bias: None, pre: None, act: Activation::None, weights, accumulate: true })
}

struct Call<'a> {
    bias: Option<&'a Array>,
    pre: Option<&'a Array>,
    act: Activation,
    weights: Option<RowWeights<'a>>,
    accumulate: bool,
}

/// out = a·b + bias or out += a·b by this crate's own kernel, at any size.
pub(crate) fn own(
    gpu: &Arc<Gpu>,
    (a, b, out): (&Array, &Array, &Array),
    bias: Option<&Array>,
    accumulate: bool,
) -> Result<()> {
    run_own(gpu, a, b, out, Call { bias, pre: None, act: Activation::None, weights: None, accumulate })
}

fn run(gpu: &Arc<Gpu>, a: &Array, b: &Array, out: &Array, call: Call) -> Result<()> {
    // With cuBLASLt an activation is a separate pass: that pays for a large product whose pre-activation values are needed anyway.
    let target = if call.act == Activation::None { Some(out) } else { call.pre };
    if let Some(target) = target
        && out.numel() > 0
        && blas::product(gpu, a, b, target, call.bias, call.weights.as_ref(), call.accumulate)?
    {
        return match call.act {
            Activation::None => Ok(()),
            act => crate::kernels::elementwise::cuda::unary_into(gpu, name(act), target, out),
        };
    }
    run_own(gpu, a, b, out, call)
}

fn run_own(gpu: &Arc<Gpu>, a: &Array, b: &Array, out: &Array, call: Call) -> Result<()> {
    let r = a.rank() - 2;
    let (m, k, n) = (a.shape()[r], a.shape()[r + 1], b.shape()[r + 1]);
    if out.numel() == 0 || (k == 0 && call.accumulate) {
        return Ok(());
    }
    let tile = tile(a.dtype());
    // The kernel covers the last two leading dimensions; the host loops over the others.
    let (outer, inner) = a.shape()[..r].split_at(r.saturating_sub(2));
    let batch = [if inner.len() > 1 { inner[0] } else { 1 }, *inner.last().unwrap_or(&1)];
    let at = |x: &Array, d: usize| if d < r { x.strides()[d] as i64 } else { 0 };
    let (d0, d1) = if inner.len() > 1 { (r - 2, r - 1) } else { (r, r.wrapping_sub(1)) };
    let d1 = if inner.is_empty() { r } else { d1 };
    let way = |x: &Array| if x.strides()[r + 1] == 1 || x.strides()[r] != 1 { 'n' } else { 't' };
    // A product that is added to an output is a parameter's gradient: it is never rounded to TF32.
    let kind = if call.accumulate { suffix(a.dtype()) } else { kind(gpu, a.dtype()) };
    let name = format!("gemm_{}{}_{kind}", way(a), way(b));
    let s = |x: &Array, d: usize| x.strides()[d] as i64;
    let matrices = batch[0] * batch[1];
    let tiles = m.div_ceil(tile) * n.div_ceil(tile) * matrices;
    // If there are few tiles and a long contraction, the contraction is split, so that every multiprocessor has work.
    let splits = (gpu.multiprocessors() as usize / tiles).min(k / 512).clamp(1, 64);
    let shape = layouts::GemmShape {
        m: m as i64,
        n: n as i64,
        k: k as i64,
        a_rs: s(a, r),
        a_cs: s(a, r + 1),
        b_rs: s(b, r),
        b_cs: s(b, r + 1),
        c_rs: n as i64,
        batch0: batch[0] as i64,
        batch1: batch[1] as i64,
        a_s0: at(a, d0),
        a_s1: at(a, d1),
        b_s0: at(b, d0),
        b_s1: at(b, d1),
        c_s0: at(out, d0),
        c_s1: at(out, d1),
        each: call.weights.as_ref().map_or(1, |w| w.each as i64),
        alpha: 1.0,
        act: code(call.act),
        accumulate: call.accumulate as i32,
        splits: splits as i32,
        reserved: 0,
    };
    let size = a.dtype().size();
    for i in 0..outer.iter().product::<usize>() {
        let (mut left, mut oa, mut ob, mut oc) = (i, 0, 0, 0);
        for d in (0..outer.len()).rev() {
            let j = left % outer[d];
            left /= outer[d];
            oa += j * a.strides()[d] * size;
            ob += j * b.strides()[d] * size;
            oc += j * out.strides()[d] * size;
        }
        let part = match splits {
            1 => None,
            _ => Some(Array::uninit_on(gpu, &[matrices, splits, m, n], a.dtype().compute())?),
        };
        let (x, y, z) = (a.block("matmul")?, b.block("matmul")?, out.block("matmul")?);
        let pre = call.pre.map(|p| p.block("matmul")).transpose()?;
        let mut l = Launch::new(gpu, "gemm", &name)?.grid(tiles * splits, 1, 1).shared(shared(kind));
        l = l.buf(x.0, x.1 + oa).buf(y.0, y.1 + ob).buf(z.0, z.1 + oc).optional(call.bias);
        l = match pre {
            Some((p, at)) => l.buf(p, at + oc),
            None => l.null(),
        };
        l = match &call.weights {
            Some(w) => l.array(w.weights).optional(w.owner),
            None => l.null().null(),
        };
        l.optional(part.as_ref()).val(shape).run()?;
        if let Some(part) = &part {
            let name = format!("gemm_splitk_{}", suffix(a.dtype()));
            let mut l = Launch::new(gpu, "gemm", &name)?.grid_stride(m * n * matrices, 256);
            l = l.array(part).buf(z.0, z.1 + oc).optional(call.bias);
            l = match pre {
                Some((p, at)) => l.buf(p, at + oc),
                None => l.null(),
            };
            l.val(shape).run()?;
        }
    }
    Ok(())
}
