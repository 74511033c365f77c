//! [`Change`]: a transformation that is applied to every operand of a factor.

use crate::array::Array;
use crate::autograd::{Groups, Samples};
use crate::base::Result;
use crate::device::Device;
use crate::kernels::rows;
use crate::with_dtype;
use std::ops::Range;

/// The transformation. Each kind of factor lists its operands; this says what happens to each of them.
pub(crate) enum Change<'a> {
    /// Operands that are not contiguous are copied.
    Contiguous,
    /// Operands are moved to this device; on a GPU bf16 operands become f32, since sums there take f32.
    To(&'a Device),
    /// Rows are permuted: new row j is old row `order[j]`.
    Order(&'a [u32]),
    /// Only these rows are kept, as views; they form one sample.
    Only(Range<usize>),
}

impl Change<'_> {
    /// Applies it to an array whose first axis is rows, or samples for a kind without rows.
    pub(crate) fn array(&self, a: &Array) -> Result<Array> {
        match self {
            Change::Contiguous => Ok(a.contiguous()),
            Change::To(device) if device.gpu().is_some() => a.to(device).map(|a| a.cast(a.dtype().compute())),
            Change::To(device) => a.to(device),
            Change::Order(order) => take(a, order),
            Change::Only(range) => a.slice(0, range.clone()),
        }
    }
    /// Applies it to an array of any shape with one index for each row.
    pub(crate) fn ids(&self, ids: &Array) -> Result<Array> {
        match self {
            Change::Contiguous | Change::To(_) => self.array(ids),
            Change::Order(_) | Change::Only(_) => self.array(&ids.reshape(&[ids.numel()])?),
        }
    }
    /// Applies it to the group of each row.
    pub(crate) fn groups(&self, group: &Groups) -> Result<Groups> {
        match self {
            Change::Contiguous | Change::To(_) => Ok(group.clone()),
            Change::Order(order) => group.select(order),
            Change::Only(range) => Groups::of_ids(group.ids()[range.clone()].to_vec(), group.count()),
        }
    }
    /// Applies it to the owner of each row.
    pub(crate) fn samples(&self, samples: &Samples) -> Result<Samples> {
        match self {
            Change::Contiguous | Change::To(_) => Ok(samples.clone()),
            Change::Order(order) => samples.select(order),
            Change::Only(range) => Ok(Samples::uniform(1, range.len())),
        }
    }
}

/// The rows of a contiguous array in the given order.
fn take(a: &Array, order: &[u32]) -> Result<Array> {
    let width = a.shape()[1..].iter().product::<usize>();
    if let Some(gpu) = a.gpu() {
        let order = Array::from_slice(order, &[order.len()])?;
        return rows::cuda::take(gpu, a, &order, 1, order.numel(), width, a.shape());
    }
    let mut out = Array::uninit(a.shape(), a.dtype());
    with_dtype!(a.dtype(), |T| {
        let (src, dst) = (a.as_slice::<T>()?, out.fresh_mut::<T>());
        for (d, &r) in dst.chunks_exact_mut(width.max(1)).zip(order) {
            d.copy_from_slice(&src[r as usize * width..(r as usize + 1) * width]);
        }
    });
    Ok(out)
}
