//! The choice of the device and the precision in which an op runs.

use crate::array::Array;
use crate::array::cuda::on;
use crate::base::{DType, Result};
use crate::device::cuda::Gpu;
use std::sync::Arc;

/// The treatment of 16-bit operands (bf16 and f16).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Half {
    /// The GPU kernels read and write 16 bits and compute in f32. The CPU loops take f32: operands are widened before them and results are
    /// rounded after them.
    Native,
    /// As [`Half::Native`], but the CPU loops read and write bf16, too; f16 is widened for them.
    Bf16,
    /// Operands are widened to f32 and results rounded back on both devices.
    Widen,
    /// Elements are moved or compared, not computed with: they are neither widened nor rounded on either device.
    Move,
}

/// Runs `cpu` or `cuda` on the inputs, in the precision that `half` selects.
///
/// If any input is on a GPU, `cuda` runs there and receives all inputs on that GPU; otherwise `cpu` runs. The results of an op on 16-bit
/// inputs are rounded to the dtype of its first float input, except for results wrapped in [`Exact`].
///
/// Inputs are passed by value: if the last handle on an array is passed, the array may be overwritten with the result.
pub(crate) fn dispatch<const N: usize, R: Results>(
    mut inputs: [Array; N],
    half: Half,
    cpu: impl FnOnce([Array; N]) -> Result<R>,
    cuda: impl FnOnce(&Arc<Gpu>, [Array; N]) -> Result<R>,
) -> Result<R> {
    let (gpu, rounded) = prepare(&mut inputs, half)?;
    let results = match &gpu {
        None => cpu(inputs)?,
        Some(gpu) => cuda(gpu, inputs)?,
    };
    Ok(rounded_to(rounded, results))
}

/// Moves the inputs to the op's device and converts them to its precision. Returns the GPU, if the op runs on one, and the dtype to which
/// its results are rounded. (Separate from [`dispatch`], so that it is compiled once.)
fn prepare(inputs: &mut [Array], half: Half) -> Result<(Option<Arc<Gpu>>, Option<DType>)> {
    let gpu = inputs.iter().find_map(|a| a.gpu().cloned());
    let dtype = inputs.iter().map(Array::dtype).find(|d| d.is_float());
    let widened = |d: DType| match (half, &gpu) {
        (Half::Widen, _) | (Half::Native, None) => d.is_half(),
        (Half::Bf16, None) => d == DType::F16,
        (Half::Move, _) | (Half::Native | Half::Bf16, Some(_)) => false,
    };
    for a in inputs {
        if widened(a.dtype()) {
            *a = a.cast(DType::F32);
        }
        if let Some(gpu) = &gpu {
            *a = on(gpu, a)?;
        }
    }
    Ok((gpu, dtype.filter(|d| d.is_half() && half != Half::Move)))
}

/// [`dispatch`] for any number of inputs.
pub(crate) fn dispatch_all<R: Results>(
    mut inputs: Vec<Array>,
    half: Half,
    cpu: impl FnOnce(Vec<Array>) -> Result<R>,
    cuda: impl FnOnce(&Arc<Gpu>, Vec<Array>) -> Result<R>,
) -> Result<R> {
    let (gpu, rounded) = prepare(&mut inputs, half)?;
    let results = match &gpu {
        None => cpu(inputs)?,
        Some(gpu) => cuda(gpu, inputs)?,
    };
    Ok(rounded_to(rounded, results))
}

fn rounded_to<R: Results>(dtype: Option<DType>, results: R) -> R {
    match dtype {
        Some(dtype) => results.rounded(dtype),
        None => results,
    }
}

/// The results of an op, which are rounded to the dtype of its operands if it was computed in f32.
pub(crate) trait Results: Sized {
    /// The results with their float arrays converted to `dtype`.
    fn rounded(self, dtype: DType) -> Self;
}

/// A result that keeps the precision in which it was computed: statistics, factors of gradients, losses.
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
