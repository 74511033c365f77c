//! Views: other shapes and strides over the same data. The forward pass copies nothing; the backward pass sums over expanded dimensions and
//! pads slices with zeros, and otherwise copies nothing either.

use super::{Differentiable, NO_PARAMS, OpInfo};
use crate::array::shape::Dims;
use crate::array::{Array, shape};
use crate::autograd::{Case, Cotangents, Gen, Owner, Rule, Whose, one};
use crate::base::{Error, Result};
use crate::device::{Device, spans};
use crate::kernels::{Half, dispatch};
use crate::ops::index::cuda as gpu_index;
use crate::{Tensor, with_dtype};
use smallvec::SmallVec;
use std::ops::Range;

macro_rules! info {
    ($id:ident, $name:literal, $($case:expr),*) => {
        static $id: OpInfo = OpInfo { name: $name, differentiable: Differentiable::Yes, factor: NO_PARAMS, cases: &[$($case),*] };
    };
}

info!(RESHAPE, "reshape", |g: &mut Gen| {
    let s = g.shape(3);
    let to = [s[0] * s[1], s[2]];
    Ok(Case::new(vec![g.array(&s)], move |t| t[0].reshape(&to)))
});
info!(PERMUTE, "permute", |g: &mut Gen| {
    let s = g.shape(3);
    Ok(Case::new(vec![g.array(&s)], |t| t[0].permute(&[2, 0, 1])?.transpose(0, -1)))
});
info!(EXPAND, "expand", |g: &mut Gen| {
    let (a, b, c) = (g.extent(0, 3), g.extent(0, 3), g.extent(1, 3));
    Ok(Case::new(vec![g.array(&[a, 1])], move |t| t[0].expand(&[c, a, b])))
});
info!(
    SLICE,
    "slice",
    |g: &mut Gen| {
        let s = [g.extent(0, 4), g.extent(2, 5)];
        let (lo, hi) = (g.size(0, 1), s[1] - g.size(0, 1));
        Ok(Case::new(vec![g.array(&s)], move |t| t[0].slice(-1, lo..hi.max(lo))))
    },
    |g: &mut Gen| {
        let s = [g.extent(0, 4), g.extent(2, 5)];
        Ok(Case::new(vec![g.array(&s)], move |t| {
            let parts = t[0].split(&[1, s[1] - 1], 1)?;
            parts[0].mul(&parts[1])
        }))
    }
);
info!(CONCAT, "concat", |g: &mut Gen| {
    let (a, b, c) = (g.extent(0, 3), g.extent(0, 3), g.extent(1, 3));
    Ok(Case::new(vec![g.array(&[a, c]), g.array(&[b, c])], |t| Tensor::concat(&[&t[0], &t[1], &t[0]], 0)))
});
info!(PAD, "pad", |g: &mut Gen| {
    let s = g.shape(2);
    let (lo, hi) = (g.size(0, 2), g.size(0, 2));
    Ok(Case::new(vec![g.array(&s)], move |t| t[0].pad(1, lo, hi)))
});

/// The registry entries of this family.
pub static OPS: &[&OpInfo] = &[&RESHAPE, &PERMUTE, &EXPAND, &SLICE, &CONCAT, &PAD];

/// The backward rule of a view op.
struct Back {
    info: &'static OpInfo,
    back: Undo,
}

enum Undo {
    Reshape(Dims),
    Permute(Vec<usize>),
    SumTo(Dims),
    /// Zeros of this shape with the gradient at this start of the dimension.
    Embed(Dims, usize, usize),
    /// Slices of the gradient along the dimension, one per input.
    Cut(usize, Vec<Range<usize>>),
}

impl Rule for Back {
    fn info(&self) -> &'static OpInfo {
        self.info
    }
    fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
        match &self.back {
            Undo::Reshape(_) => one(y.reshaped()),
            Undo::Permute(back) => {
                let mut shape: Dims = back.iter().map(|&d| y.shape[d]).collect();
                shape.truncate(back.len());
                one(y.along(&shape, |d| back.iter().position(|&b| b == d)))
            }
            Undo::SumTo(shape) => one(y.broadcast(shape)),
            Undo::Embed(shape, ..) => one(y.along(shape, Some)),
            Undo::Cut(d, parts) => {
                let part = |r: &Range<usize>| {
                    let mut shape: Dims = y.shape.into();
                    shape[*d] = r.len();
                    y.along(&shape, Some)
                };
                parts.iter().map(part).collect()
            }
        }
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        match &self.back {
            Undo::Reshape(s) => back.input(0, grad.reshape(s)?),
            Undo::Permute(p) => back.input(0, grad.permute(p)?),
            Undo::SumTo(s) => back.input(0, super::reduce::sum_to(&grad, s)?),
            Undo::Embed(s, d, start) => back.input(0, embed(&grad, s, *d, *start)?),
            Undo::Cut(d, parts) => {
                for (i, r) in parts.iter().enumerate() {
                    if back.needs(i) {
                        back.input(i, grad.slice(*d as isize, r.clone())?);
                    }
                }
            }
        }
        Ok(())
    }
}

/// Zeros of `shape`, with `part` from index `start` of dimension `d` on.
fn embed(part: &Array, shape: &[usize], d: usize, start: usize) -> Result<Array> {
    let mut out = Array::zeros(shape, (part.dtype(), &part.device()));
    out = with_part(out, part, d, start)?;
    Ok(out)
}

/// `out`, a newly created contiguous array, with `part` copied to index `start` of dimension `d`.
fn with_part(out: Array, part: &Array, d: usize, start: usize) -> Result<Array> {
    dispatch(
        [out, part.clone()],
        Half::Move,
        |[mut out, part]| {
            let part = part.contiguous();
            let inner: usize = part.shape()[d..].iter().product();
            let stride: usize = out.shape()[d..].iter().product();
            let at = start * out.shape()[d + 1..].iter().product::<usize>();
            with_dtype!(part.dtype(), |T| {
                let (src, dst) = (part.as_slice::<T>()?, out.fresh_mut::<T>());
                if inner > 0 {
                    for (o, s) in dst.chunks_exact_mut(stride).zip(src.chunks_exact(inner)) {
                        o[at..at + inner].copy_from_slice(s);
                    }
                }
            });
            Ok(out)
        },
        |gpu, [out, part]| {
            gpu_index::place(gpu, &out, &part, d, start)?;
            Ok(out)
        },
    )
}

impl Tensor {
    /// Merges the dimensions from `from` on: `[B, C, H, W]` flattened from 1 is `[B, C·H·W]`.
    pub fn flatten(&self, from: usize) -> Result<Tensor> {
        if from >= self.rank().max(1) {
            return Err(Error::shape("flatten", format!("from dimension {from} of {:?}", self.shape())));
        }
        let mut shape = self.shape()[..from].to_vec();
        shape.push(self.shape()[from..].iter().product());
        self.reshape(&shape)
    }
    fn view(&self, value: Array, info: &'static OpInfo, back: impl FnOnce() -> Undo) -> Tensor {
        Tensor::record(value, &[self], &[], || Back { info, back: back() })
    }
    /// Another shape with the same number of elements; no copy where the strides allow it.
    pub fn reshape(&self, shape: &[usize]) -> Result<Tensor> {
        let y = self.array().reshape(shape)?;
        Ok(self.view(y, &RESHAPE, || Undo::Reshape(self.shape().into())))
    }
    /// Dimensions in another order; no copy.
    pub fn permute(&self, order: &[usize]) -> Result<Tensor> {
        let y = self.array().permute(order)?;
        Ok(self.view(y, &PERMUTE, || {
            let mut back = vec![0; order.len()];
            order.iter().enumerate().for_each(|(i, &d)| back[d] = i);
            Undo::Permute(back)
        }))
    }
    /// Exchanges two dimensions; negative numbers count from the end; no copy.
    pub fn transpose(&self, a: isize, b: isize) -> Result<Tensor> {
        let (a, b) = (shape::dim("transpose", a, self.rank())?, shape::dim("transpose", b, self.rank())?);
        let mut order: Vec<usize> = (0..self.rank()).collect();
        order.swap(a, b);
        self.permute(&order)
    }
    /// Repeats along dimensions of size 1 and new leading ones; no copy.
    pub fn expand(&self, shape: &[usize]) -> Result<Tensor> {
        let y = self.array().expand(shape)?;
        Ok(self.view(y, &EXPAND, || Undo::SumTo(self.shape().into())))
    }
    /// Inserts a dimension of size 1 at `dim`.
    pub fn unsqueeze(&self, dim: isize) -> Result<Tensor> {
        let y = self.array().unsqueeze(dim)?;
        Ok(self.view(y, &RESHAPE, || Undo::Reshape(self.shape().into())))
    }
    /// Removes dimension `dim`, of size 1.
    pub fn squeeze(&self, dim: isize) -> Result<Tensor> {
        let d = shape::dim("squeeze", dim, self.rank())?;
        if self.shape()[d] != 1 {
            return Err(Error::shape("squeeze", format!("dimension {d} of {:?} is not 1", self.shape())));
        }
        let shape: Vec<usize> = (0..self.rank()).filter(|&i| i != d).map(|i| self.shape()[i]).collect();
        self.reshape(&shape)
    }
    /// Elements `range` of a dimension; no copy.
    pub fn slice(&self, dim: isize, range: Range<usize>) -> Result<Tensor> {
        let d = shape::dim("slice", dim, self.rank())?;
        let y = self.array().slice(dim, range.clone())?;
        Ok(self.view(y, &SLICE, || Undo::Embed(self.shape().into(), d, range.start)))
    }
    /// Splits along a dimension into parts of the given sizes, which must add up to its size.
    pub fn split(&self, sizes: &[usize], dim: isize) -> Result<Vec<Tensor>> {
        let d = shape::dim("split", dim, self.rank())?;
        if sizes.iter().sum::<usize>() != self.shape()[d] {
            return Err(Error::shape("split", format!("sizes {sizes:?} do not add up to {}", self.shape()[d])));
        }
        let mut at = 0;
        sizes
            .iter()
            .map(|&n| {
                at += n;
                self.slice(dim, at - n..at)
            })
            .collect()
    }
    /// Concatenates along a dimension; all other sizes and the dtypes must be equal.
    pub fn concat(parts: &[&Tensor], dim: isize) -> Result<Tensor> {
        let _op = spans::op("concat");
        let Some(first) = parts.first() else {
            return Err(Error::invalid("concat", "no tensors given"));
        };
        let d = shape::dim("concat", dim, first.rank())?;
        let mut shape: Dims = first.shape().into();
        shape[d] = 0;
        let mut ranges = Vec::new();
        for p in parts {
            let fits = p.rank() == first.rank()
                && p.dtype() == first.dtype()
                && (0..p.rank()).all(|i| i == d || p.shape()[i] == first.shape()[i]);
            if !fits {
                return Err(Error::shape(
                    "concat",
                    format!(
                        "{:?} {} next to {:?} {} along dimension {d}",
                        p.shape(),
                        p.dtype(),
                        first.shape(),
                        first.dtype()
                    ),
                ));
            }
            ranges.push(shape[d]..shape[d] + p.shape()[d]);
            shape[d] += p.shape()[d];
        }
        let device = parts.iter().map(|p| p.device()).find(Device::is_cuda).unwrap_or(Device::Cpu);
        let mut out = Array::uninit_at(&device, &shape, first.dtype())?;
        for (p, r) in parts.iter().zip(&ranges) {
            out = with_part(out, p.array(), d, r.start)?;
        }
        Ok(Tensor::record(out, parts, &[], || Back { info: &CONCAT, back: Undo::Cut(d, ranges) }))
    }
    /// Stacks tensors of one shape along a new dimension.
    pub fn stack(parts: &[&Tensor], dim: isize) -> Result<Tensor> {
        let up = parts.iter().map(|p| p.unsqueeze(dim)).collect::<Result<Vec<_>>>()?;
        Tensor::concat(&up.iter().collect::<Vec<_>>(), dim)
    }
    /// Pads with zeros before and after along a dimension.
    pub fn pad(&self, dim: isize, before: usize, after: usize) -> Result<Tensor> {
        let _op = spans::op("pad");
        let d = shape::dim("pad", dim, self.rank())?;
        let mut shape: Dims = self.shape().into();
        shape[d] += before + after;
        let y = embed(self.array(), &shape, d, before)?;
        let n = self.shape()[d];
        Ok(Tensor::record(y, &[self], &[], || Back {
            info: &PAD,
            back: Undo::Cut(d, std::iter::once(before..before + n).collect()),
        }))
    }
    /// The same values with row-major strides, copied only if needed.
    pub fn contiguous(&self) -> Result<Tensor> {
        if self.array().is_contiguous() {
            return Ok(self.clone());
        }
        Ok(self.view(self.array().contiguous(), &RESHAPE, || Undo::Reshape(self.shape().into())))
    }
}
