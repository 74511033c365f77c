//! Launches of `cuda/attention.cu` (f32 and f64) and `cuda/attention_mma.cu` (16 bits, on the tensor cores).

use crate::array::cuda::{on, suffix};
use crate::array::{Arguments, Array};
use crate::base::{DType, Error, Result};
use crate::device::cuda::layouts::{self, AttentionShape};
use crate::device::cuda::{Gpu, Launch};
use crate::ops::attention::Span;
use crate::ops::attention::cpu::Problem;
use std::sync::Arc;

/// The problem as a kernel argument, without the strides of the arrays.
fn shape(p: &Problem) -> AttentionShape {
    let (span, width) = match p.span {
        Span::Full => (layouts::SPAN_FULL, 0),
        Span::Causal => (layouts::SPAN_CAUSAL, 0),
        Span::Window(w) | Span::Sinks { window: w, .. } => (layouts::SPAN_WINDOW, w),
        Span::Block(b) => (layouts::SPAN_BLOCK, b),
    };
    let (drop, seed) = p.dropout.unwrap_or((0.0, 0));
    AttentionShape {
        batch: p.batch as i64,
        queries: p.queries as i64,
        keys: p.keys as i64,
        heads: p.heads as i64,
        kv_heads: p.kv_heads as i64,
        dim: p.dim as i64,
        width: width as i64,
        sinks: p.sinks(p.keys) as i64,
        skipped: p.skipped as i64,
        alibi: if p.alibi { 1 << p.heads.max(1).ilog2() } else { 0 },
        seed,
        // Kernels that add the bias before scaling divide it by the scale, which must not be zero.
        scale: if p.alibi && p.scale == 0.0 { 1e-30 } else { p.scale },
        drop,
        span,
        ..bytemuck::Zeroable::zeroed()
    }
}

/// Strides between sequences, positions and heads.
fn steps(a: &Array) -> [i64; 3] {
    std::array::from_fn(|d| a.strides()[d] as i64)
}

/// The file of a dtype's kernels, and the threads per block of their backward pass; 16-bit dtypes use the tensor cores.
fn file(dtype: DType) -> (&'static str, usize) {
    if dtype.is_half() { ("attention_mma", 128) } else { ("attention", 256) }
}

/// The head-dimension class of a kernel, with the rows of its tile and its shared memory in bytes: forward, then backward.
fn class(p: &Problem, dtype: DType) -> Result<(&'static str, [(usize, usize); 2])> {
    match (dtype, p.dim) {
        (_, d) if d > 128 => {
            Err(Error::shape("attention", format!("a head dimension of {d}; the kernels take up to 128")))
        }
        (t, d) if t.is_half() && d <= 64 => Ok(("d64", [(128, 49_152), (64, 49_152)])),
        (t, _) if t.is_half() => Ok(("d128", [(128, 98_304), (64, 65_536)])),
        (DType::F64, d) if d <= 64 => Ok(("d64", [(32, 42_496), (32, 76_288)])),
        (DType::F64, _) => Ok(("d128", [(32, 75_264), (16, 68_864)])),
        (_, d) if d <= 64 => Ok(("d64", [(64, 52_224), (64, 87_040)])),
        _ => Ok(("d128", [(64, 84_992), (32, 72_192)])),
    }
}

/// The tiles of `rows` rows of all documents, the last ones first, as the kernels take them: `[n, 4]` with sequence, first row, and start
/// and end of the document. `None` without documents: the kernels then compute the tiles themselves.
fn tiles(gpu: &Arc<Gpu>, p: &Problem, rows: usize) -> Result<Option<Array>> {
    if p.documents.is_none() {
        return Ok(None);
    }
    let mut words: Vec<i64> = vec![];
    for part in p.parts().iter().rev() {
        for row in (0..part.queries).step_by(rows).rev() {
            let end = part.start + part.queries;
            words.extend([part.sequence, part.start + row, part.start, end].map(|x| x as i64));
        }
    }
    Ok(Some(on(gpu, &Array::from_slice(&words, &[words.len() / 4, 4])?)?))
}

/// Number of blocks for each head (over all sequences), in tiles of `rows` out of `all` rows.
fn blocks(p: &Problem, tiles: &Option<Array>, rows: usize, all: usize) -> usize {
    tiles.as_ref().map_or(all.div_ceil(rows) * p.batch, |t| t.shape()[0])
}

/// Output `[B, T, H, D]` and log-sum-exp `[B, H, T]` (f32 for 16-bit operands).
pub(crate) fn forward(gpu: &Arc<Gpu>, p: &Problem, q: &Array, k: &Array, v: &Array) -> Result<(Array, Array)> {
    let op = "attention";
    let (q, k, v) = (on(gpu, q)?, on(gpu, k)?, on(gpu, v)?);
    let out = match p.has_padding() {
        true => Array::zeros(q.shape(), (q.dtype(), gpu)),
        false => Array::uninit_on(gpu, q.shape(), q.dtype())?,
    };
    let lse = Array::uninit_on(gpu, &[p.batch, p.heads, p.queries], q.dtype().compute())?;
    if lse.numel() == 0 {
        return Ok((out, lse));
    }
    let (class, [(rows, shared), _]) = class(p, q.dtype())?;
    let tiles = tiles(gpu, p, rows)?;
    let count = tiles.as_ref().map_or(0, |t| t.shape()[0]) as i32;
    let s = AttentionShape { tiles: count, q: steps(&q), k: steps(&k), v: steps(&v), out: steps(&out), ..shape(p) };
    let name = format!("attention_fwd_{class}_{}", suffix(q.dtype()));
    let grid = blocks(p, &tiles, rows, p.queries) * p.heads;
    let mut l = Launch::new(gpu, file(q.dtype()).0, &name)?.grid(grid, 1, 1).block(256).shared(shared);
    for a in [&q, &k, &v, &out, &lse] {
        let (block, at) = a.block(op)?;
        l = l.buf(block, at);
    }
    l.optional(tiles.as_ref()).val(s).run()?;
    Ok((out, lse))
}

/// Writes the gradients of q, k and v into the given arrays, which may be slices of one.
pub(crate) fn backward(
    gpu: &Arc<Gpu>,
    p: &Problem,
    [q, k, v]: [&Array; 3],
    (out, lse, grad): (&Array, &Array, &Array),
    [dq, dk, dv]: [&Array; 3],
) -> Result<()> {
    let op = "attention";
    let grad = on(gpu, grad)?;
    if q.numel() == 0 || k.numel() == 0 {
        return Ok(());
    }
    let (class, [_, (rows, shared)]) = class(p, q.dtype())?;
    let tiles = tiles(gpu, p, rows)?;
    let delta = Array::uninit_on(gpu, lse.shape(), lse.dtype())?;
    let s = AttentionShape {
        tiles: tiles.as_ref().map_or(0, |t| t.shape()[0]) as i32,
        q: steps(q),
        k: steps(k),
        v: steps(v),
        out: steps(out),
        grad: steps(&grad),
        dq: steps(dq),
        dk: steps(dk),
        dv: steps(dv),
        ..shape(p)
    };
    let launch = |name: &str, grid: usize, shared: usize, arrays: &[&Array]| -> Result<()> {
        let with_tiles = name != format!("attention_delta_{}", suffix(q.dtype()));
        let (file, threads) = if with_tiles { file(q.dtype()) } else { ("attention", 256) };
        let mut l = Launch::new(gpu, file, name)?.grid(grid, 1, 1).block(threads).shared(shared);
        let (before, after) = arrays.split_at(if with_tiles { 6 } else { arrays.len() });
        for a in before {
            let (block, at) = a.block(op)?;
            l = l.buf(block, at);
        }
        if with_tiles {
            l = l.optional(tiles.as_ref());
        }
        for a in after {
            let (block, at) = a.block(op)?;
            l = l.buf(block, at);
        }
        l.val(s).run()
    };
    let t = suffix(q.dtype());
    let queries = p.batch * p.heads * p.queries;
    launch(&format!("attention_delta_{t}"), queries.div_ceil(8).min(65_535), 0, &[out, &grad, &delta])?;
    let grid = blocks(p, &tiles, rows, p.queries) * p.heads;
    launch(&format!("attention_dq_{class}_{t}"), grid, shared, &[q, k, v, &grad, lse, &delta, dq])?;
    let grid = blocks(p, &tiles, rows, p.keys) * p.kv_heads;
    launch(&format!("attention_dkv_{class}_{t}"), grid, shared, &[q, k, v, &grad, lse, &delta, dk, dv])
}
