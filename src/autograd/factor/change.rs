//! [`Change`]: what is done alike to every operand of a factor.

use crate::array::Array;
use crate::autograd::{Groups, Samples};
use crate::base::Result;
use crate::device::Device;
use crate::kernels::rows;
use crate::with_dtype;
use std::ops::Range;

/// What is done to each operand. A kind says which operands it has; this says what becomes of each.
pub(crate) enum Change<'a> {
    /// What is not contiguous is copied.
    Contiguous,
    /// Everything comes to lie on this device; a GPU's sums take what is bf16 as f32.
    To(&'a Device),
    /// New row j is old row `order[j]`; all rows are taken.
    Order(&'a [u32]),
    /// Only these rows are left, as views; they are one sample.
    Only(Range<usize>),
}

impl Change<'_> {
    /// An array whose first axis is rows, or samples where the kind has no rows.
    pub(crate) fn array(&self, a: &Array) -> Result<Array> {
        match self {
            Change::Contiguous => Ok(a.contiguous()),
            Change::To(device) if device.gpu().is_some() => a.to(device).map(|a| a.cast(a.dtype().compute())),
            Change::To(device) => a.to(device),
            Change::Order(order) => take(a, order),
            Change::Only(range) => a.slice(0, range.clone()),
        }
    }
    /// One index for each row, in an array of any shape.
    pub(crate) fn ids(&self, ids: &Array) -> Result<Array> {
        match self {
            Change::Contiguous | Change::To(_) => self.array(ids),
            Change::Order(_) | Change::Only(_) => self.array(&ids.reshape(&[ids.numel()])?),
        }
    }
    /// The group of each row.
    pub(crate) fn groups(&self, group: &Groups) -> Result<Groups> {
        match self {
            Change::Contiguous | Change::To(_) => Ok(group.clone()),
            Change::Order(order) => group.select(order),
            Change::Only(range) => Groups::of_ids(group.ids()[range.clone()].to_vec(), group.count()),
        }
    }
    /// The owner of each row.
    pub(crate) fn samples(&self, samples: &Samples) -> Result<Samples> {
        match self {
            Change::Contiguous | Change::To(_) => Ok(samples.clone()),
            Change::Order(order) => samples.select(order),
            Change::Only(range) => Ok(Samples::uniform(1, range.len())),
        }
    }
}

/// The rows of a contiguous array in this order.
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
