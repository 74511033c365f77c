//! Where an op runs, and in which precision: the one place that decides.

use crate::array::Array;
use crate::array::cuda::on;
use crate::base::{DType, Result};
use crate::device::cuda::Gpu;
use std::sync::Arc;

/// What happens to operands of 16 bits (bf16 and f16).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Half {
    /// The kernels read and write 16 bits and compute in f32. The loops on the CPU take f32: operands are widened before
    /// them and results rounded after them.
    Native,
    /// The loops on the CPU read and write bf16, too; f16 is widened there.
    Bf16,
    /// Operands are widened to f32 and results rounded back on both devices.
    Widen,
    /// Elements are moved or compared, not computed with: neither widened nor rounded on either device.
    Move,
}

/// Runs `cpu` or `cuda` on the inputs of `half`'s precision.
///
/// If any input is on a GPU, `cuda` runs there and receives all inputs on that GPU; else `cpu` runs. The results of an op on
/// 16-bit inputs are rounded to the dtype of its first float input, but for what is wrapped in [`Exact`].
///
/// Inputs come by value: an array whose last handle is given here may be overwritten with the result.
pub(crate) fn dispatch<const N: usize, R: Results>(
    inputs: [Array; N],
    half: Half,
    cpu: impl FnOnce([Array; N]) -> Result<R>,
    cuda: impl FnOnce(&Arc<Gpu>, [Array; N]) -> Result<R>,
) -> Result<R> {
    let gpu = inputs.iter().find_map(|a| a.gpu().cloned());
    let dtype = inputs.iter().map(Array::dtype).find(|d| d.is_float());
    let widen = |a: Array| if a.dtype().is_half() { a.cast(DType::F32) } else { a };
    let widen_f16 = |a: Array| if a.dtype() == DType::F16 { a.cast(DType::F32) } else { a };
    let inputs = match (&gpu, half) {
        (None, Half::Native | Half::Widen) | (Some(_), Half::Widen) => inputs.map(widen),
        (None, Half::Bf16) => inputs.map(widen_f16),
        (_, Half::Native | Half::Bf16 | Half::Move) => inputs,
    };
    let results = match &gpu {
        None => cpu(inputs)?,
        Some(gpu) => {
            let mut failed = None;
            let there = inputs.map(|a| {
                on(gpu, &a).unwrap_or_else(|e| {
                    failed.get_or_insert(e);
                    a
                })
            });
            match failed {
                Some(e) => return Err(e),
                None => cuda(gpu, there)?,
            }
        }
    };
    Ok(match dtype {
        Some(dtype) if dtype.is_half() && half != Half::Move => results.rounded(dtype),
        _ => results,
    })
}

/// [`dispatch`] for as many inputs as there are.
pub(crate) fn dispatch_all<R: Results>(
    inputs: Vec<Array>,
    half: Half,
    cpu: impl FnOnce(Vec<Array>) -> Result<R>,
    cuda: impl FnOnce(&Arc<Gpu>, Vec<Array>) -> Result<R>,
) -> Result<R> {
    let gpu = inputs.iter().find_map(|a| a.gpu().cloned());
    let dtype = inputs.iter().map(Array::dtype).find(|d| d.is_float());
    let wide = half == Half::Widen || (half == Half::Native && gpu.is_none());
    let widened = |a: Array| if wide && a.dtype().is_half() { a.cast(DType::F32) } else { a };
    let inputs: Vec<Array> = inputs.into_iter().map(widened).collect();
    let results = match &gpu {
        None => cpu(inputs)?,
        Some(gpu) => cuda(gpu, inputs.iter().map(|a| on(gpu, a)).collect::<Result<_>>()?)?,
    };
    Ok(match dtype {
        Some(dtype) if dtype.is_half() && half != Half::Move => results.rounded(dtype),
        _ => results,
    })
}

/// What an op returns, rounded to the dtype of its operands where it was computed in f32.
pub(crate) trait Results: Sized {
    /// The float arrays among them in `dtype`.
    fn rounded(self, dtype: DType) -> Self;
}

/// A result that keeps the precision it was computed in: statistics, factors of gradients, losses.
pub(crate) struct Exact<T>(pub T);

impl<T> Results for Exact<T> {
    fn rounded(self, _: DType) -> Self {
        self
    }
}

impl<A: Results, B: Results, C: Results> Results for (A, B, C) {
    fn rounded(self, dtype: DType) -> Self {
        (self.0.rounded(dtype), self.1.rounded(dtype), self.2.rounded(dtype))
    }
}

impl Results for () {
    fn rounded(self, _: DType) -> Self {}
}

impl Results for Array {
    fn rounded(self, dtype: DType) -> Self {
        if self.dtype().is_float() { self.cast(dtype) } else { self }
    }
}

impl<R: Results> Results for Option<R> {
    fn rounded(self, dtype: DType) -> Self {
        self.map(|r| r.rounded(dtype))
    }
}

impl<R: Results, const N: usize> Results for [R; N] {
    fn rounded(self, dtype: DType) -> Self {
        self.map(|r| r.rounded(dtype))
    }
}

impl<A: Results, B: Results> Results for (A, B) {
    fn rounded(self, dtype: DType) -> Self {
        (self.0.rounded(dtype), self.1.rounded(dtype))
    }
}
