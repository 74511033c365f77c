//! Indexing operations: gather, scatter_add, index_select, one_hot.
//!
//! The backward pass of a gather is a scatter-add in a fixed order without atomics: the same bits at any number of threads.

pub(crate) mod cuda;

use crate::array::shape::Dims;
use crate::array::{Array, shape};
use crate::autograd::{Case, Cotangents, Differentiable, Gen, NO_PARAMS, OpInfo, Owner, Rule, Whose, one};
use crate::base::{DType, Element, Error, Result};
use crate::device::cpu::par::{GRAIN, par_units};
use crate::device::spans;
use crate::kernels::{Half, dispatch, rows};
use crate::{Tensor, with_dtype, with_float};
use smallvec::SmallVec;

/// A random number of indices into `n` elements; 0 if `n` is 0.
fn picks_from(g: &mut Gen, n: usize) -> usize {
    if n == 0 { 0 } else { g.extent(0, 5) }
}

static GATHER: OpInfo = OpInfo {
    name: "gather",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[|g: &mut Gen| {
        let s = g.shape(3);
        let d = g.size(0, 2);
        let mut picks = s.clone();
        picks[d] = picks_from(g, s[d]);
        let index = Tensor::new(g.ids(&picks, s[d]));
        Ok(Case::new(vec![g.array(&s)], move |t| t[0].gather(d as isize, &index)))
    }],
};
static SCATTER_ADD: OpInfo = OpInfo {
    name: "scatter_add",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[
        |g| {
            let s = g.shape(3);
            let d = g.size(0, 2);
            let mut from = s.clone();
            from[d] = picks_from(g, s[d]);
            let index = Tensor::new(g.ids(&from, s[d]));
            Ok(Case::new(vec![g.array(&s), g.array(&from)], move |t| t[0].scatter_add(d as isize, &index, &t[1])))
        },
        |g| {
            let s = g.shape(2);
            let n = g.extent(1, 4);
            let index = Tensor::new(g.ids(&s, n));
            Ok(Case::new(vec![g.array(&s)], move |t| t[0].scatter_sum(-1, &index, n)))
        },
    ],
};
static INDEX_SELECT: OpInfo = OpInfo {
    name: "index_select",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[|g| {
        let s = g.shape(3);
        let d = g.size(0, 2);
        let k = picks_from(g, s[d]);
        let ids = Tensor::new(g.ids(&[k], s[d]));
        Ok(Case::new(vec![g.array(&s)], move |t| t[0].index_select(d as isize, &ids)))
    }],
};
static ONE_HOT: OpInfo = OpInfo {
    name: "one_hot",
    differentiable: Differentiable::No("indices have no gradient"),
    factor: NO_PARAMS,
    cases: &[|g| {
        let (s, n) = (g.shape(2), g.extent(1, 5));
        let ids = g.ids(&s, n);
        Ok(Case::new(vec![g.array(&[1])], move |_| Tensor::new(ids.clone()).one_hot(n, DType::F64)))
    }],
};

/// The registry entries of this family.
pub static OPS: &[&OpInfo] = &[&GATHER, &SCATTER_ADD, &INDEX_SELECT, &ONE_HOT];

/// Indices (u32 or i64) as contiguous u32, each checked to be below `n`; `what` names the indexed object for the error. Those on a GPU are
/// checked there: one that is out of range is replaced by 0 and reported when something is next read back.
pub(crate) fn ids_below(op: &'static str, ids: &Array, n: usize, what: &dyn Fn() -> String) -> Result<Array> {
    let bad = |id: i64, at: usize| {
        Error::invalid(op, format!("id {id} at position {at} is outside {}: ids must be in 0..{n}", what()))
    };
    dispatch(
        [ids.contiguous()],
        Half::Move,
        |[ids]| match ids.dtype() {
            DType::U32 => {
                let v = ids.as_slice::<u32>()?;
                match v.iter().position(|&i| i as usize >= n) {
                    Some(at) => Err(bad(v[at] as i64, at)),
                    None => Ok(ids),
                }
            }
            DType::I64 => {
                let v = ids.as_slice::<i64>()?;
                if let Some(at) = v.iter().position(|&i| i < 0 || i as usize >= n || i > u32::MAX as i64) {
                    return Err(bad(v[at], at));
                }
                let v: Vec<u32> = v.iter().map(|&i| i as u32).collect();
                Array::from_slice(&v, ids.shape())
            }
            other => Err(Error::dtype(op, format!("indices must be u32 or i64, got {other}; cast them first"))),
        },
        |gpu, [ids]| crate::array::cuda::ids_below(gpu, &ids, n, &format!("{op}: {}", what())),
    )
}

/// Elements before dimension `d`, along it, and after it.
fn around(shape: &[usize], d: usize) -> (usize, usize, usize) {
    (shape[..d].iter().product(), shape[d], shape[d + 1..].iter().product())
}

/// Checks that `index` matches `shape`: the same sizes except along `d`.
fn expect_alike(op: &'static str, index: &[usize], shape: &[usize], d: usize) -> Result<()> {
    if index.len() == shape.len() && (0..shape.len()).all(|i| i == d || index[i] == shape[i]) {
        return Ok(());
    }
    Err(Error::shape(op, format!("index {index:?} and {shape:?} must have the same sizes but along dimension {d}")))
}

/// Gathers values of `x` along `d` at `index` (contiguous u32, checked).
fn pick(x: &Array, d: usize, index: &Array) -> Result<Array> {
    dispatch(
        [x.contiguous(), index.clone()],
        Half::Move,
        |[x, index]| {
            let (_, n, inner) = around(x.shape(), d);
            let block = index.shape()[d] * inner;
            let ids = index.as_slice::<u32>()?;
            let mut out = Array::uninit(index.shape(), x.dtype());
            with_dtype!(x.dtype(), |T| {
                let src = x.as_slice::<T>()?;
                par_units(out.fresh_mut::<T>(), 1, GRAIN, |range, out| {
                    for (o, i) in out.iter_mut().zip(range) {
                        *o = src[(i / block * n + ids[i] as usize) * inner + i % inner];
                    }
                });
            });
            Ok(out)
        },
        |gpu, [x, index]| cuda::gather(gpu, &x, d, &index),
    )
}

/// Scatter-add: `base` with `src` added along `d` at `index`, in ascending order; blocks before `d` run in parallel. It is computed in the
/// compute dtype and rounded once.
fn put(base: Array, d: usize, index: &Array, src: &Array) -> Result<Array> {
    dispatch(
        [base, index.clone(), src.contiguous()],
        Half::Widen,
        |[mut out, index, src]| {
            let (_, n, inner) = around(out.shape(), d);
            let block = index.shape()[d] * inner;
            let ids = index.as_slice::<u32>()?;
            with_float!("scatter_add", src.dtype(), |T| {
                let src = src.as_slice::<T>()?;
                let grain = (GRAIN / block.max(1)).max(1);
                par_units(out.as_mut_slice::<T>()?, n * inner, grain, |blocks, out| {
                    for (o, d) in blocks.zip(out.chunks_exact_mut(n * inner)) {
                        for i in 0..block {
                            d[ids[o * block + i] as usize * inner + i % inner] += src[o * block + i];
                        }
                    }
                });
                Ok(out)
            })
        },
        |gpu, [mut out, index, src]| {
            out.own()?;
            cuda::scatter_add(gpu, &out, d, &index, &src)?;
            Ok(out)
        },
    )
}

impl Tensor {
    /// Values gathered along `dim`: `out[…, i, …] = x[…, index[…, i, …], …]`. `index` (u32 or i64) has this tensor's sizes except along
    /// `dim`, where it may have any; the result has the shape of `index`. Any dtype.
    ///
    /// The backward pass scatter-adds the gradients into zeros, in order.
    pub fn gather(&self, dim: isize, index: impl AsRef<Array>) -> Result<Tensor> {
        let index = index.as_ref();
        let _op = spans::op("gather");
        struct Back {
            index: Array,
            d: usize,
            shape: Dims,
        }
        impl Rule for Back {
            fn info(&self) -> &'static OpInfo {
                &GATHER
            }
            fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
                one(y.picking(self.d, &self.shape))
            }
            fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
                let zeros = Array::zeros(&self.shape, (grad.dtype(), &grad.device()));
                back.input(0, put(zeros, self.d, &self.index, &grad)?);
                Ok(())
            }
        }
        let d = shape::dim("gather", dim, self.rank())?;
        expect_alike("gather", index.shape(), self.shape(), d)?;
        let what = || format!("dimension {d} of {:?}", self.shape());
        let index = ids_below("gather", index, self.shape()[d], &what)?.to(&self.device())?;
        let y = pick(self.array(), d, &index)?;
        Ok(Tensor::record(y, &[self], &[], || Back { index, d, shape: self.shape().into() }))
    }
    /// This tensor with `src` added along `dim`: `out[…, index[…, i, …], …] += src[…, i, …]`, in ascending i. `index` (u32 or i64) has
    /// `src`'s shape; its sizes except along `dim` are this tensor's.
    pub fn scatter_add(&self, dim: isize, index: impl AsRef<Array>, src: &Tensor) -> Result<Tensor> {
        let index = index.as_ref();
        let _op = spans::op("scatter_add");
        struct Back {
            index: Array,
            d: usize,
        }
        impl Rule for Back {
            fn info(&self) -> &'static OpInfo {
                &SCATTER_ADD
            }
            fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
                SmallVec::from_iter([y.same(), y.picking(self.d, self.index.shape())])
            }
            fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
                if back.needs(1) {
                    back.input(1, pick(&grad, self.d, &self.index)?);
                }
                back.input(0, grad);
                Ok(())
            }
        }
        let op = "scatter_add";
        self.dtype().expect_float(op)?;
        if self.dtype() != src.dtype() {
            return Err(Error::dtype(op, format!("{} into {}; cast one of them", src.dtype(), self.dtype())));
        }
        let d = shape::dim(op, dim, self.rank())?;
        expect_alike(op, src.shape(), self.shape(), d)?;
        if index.shape() != src.shape() {
            return Err(Error::shape(
                op,
                format!("index {:?} must have the source's shape {:?}", index.shape(), src.shape()),
            ));
        }
        let what = || format!("dimension {d} of {:?}", self.shape());
        let index = ids_below(op, index, self.shape()[d], &what)?.to(&self.device())?;
        let y = put(self.array().clone(), d, &index, src.array())?;
        Ok(Tensor::record(y, &[self, src], &[], || Back { index, d }))
    }
    /// [`Tensor::scatter_add`] of this tensor into zeros with size `n` along `dim`.
    pub fn scatter_sum(&self, dim: isize, index: impl AsRef<Array>, n: usize) -> Result<Tensor> {
        let d = shape::dim("scatter_add", dim, self.rank())?;
        let mut shape: Dims = self.shape().into();
        shape[d] = n;
        let zeros = Array::zeros(&shape, (self.dtype(), &self.device()));
        Tensor::new(zeros).scatter_add(dim, index, self)
    }
    /// Selects slices `ids [k]` (u32 or i64, repeats allowed) along `dim`, whose size becomes k. Any dtype.
    ///
    /// The backward pass adds the slices of one id in ascending order, deterministically, with one sort of the ids and one pass.
    pub fn index_select(&self, dim: isize, ids: impl AsRef<Array>) -> Result<Tensor> {
        let ids = ids.as_ref();
        let _op = spans::op("index_select");
        struct Back {
            ids: Array,
            d: usize,
            shape: Dims,
        }
        impl Rule for Back {
            fn info(&self) -> &'static OpInfo {
                &INDEX_SELECT
            }
            fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
                let width: usize = self.shape[1..].iter().product();
                one(match y.picking(self.d, &self.shape) {
                    Owner::Unknown if self.d == 0 && self.ids.gpu().is_none() => match self.ids.to_vec::<u32>() {
                        Ok(ids) => y.taken(&ids, self.shape[0], width),
                        Err(_) => Owner::Unknown,
                    },
                    o => o,
                })
            }
            fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
                let zeros = Array::zeros(&self.shape, (grad.dtype(), &grad.device()));
                back.input(0, add_slices(zeros, self.d, &self.ids, &grad)?);
                Ok(())
            }
        }
        let d = shape::dim("index_select", dim, self.rank())?;
        if ids.rank() != 1 {
            return Err(Error::shape("index_select", format!("ids must be a vector, got {:?}", ids.shape())));
        }
        let what = || format!("dimension {d} of {:?}", self.shape());
        let ids = ids_below("index_select", ids, self.shape()[d], &what)?.to(&self.device())?;
        let (outer, _, inner) = around(self.shape(), d);
        let mut shape: Dims = self.shape().into();
        shape[d] = ids.numel();
        let y = dispatch(
            [self.array().contiguous(), ids.clone()],
            Half::Move,
            |[x, ids]| {
                let mut y = Array::uninit(&shape, x.dtype());
                with_dtype!(x.dtype(), |T| rows::take::<T>(
                    x.as_slice()?,
                    ids.as_slice()?,
                    outer,
                    inner,
                    y.fresh_mut()
                ));
                Ok(y)
            },
            |gpu, [x, ids]| rows::cuda::take(gpu, &x, &ids, outer, self.shape()[d], inner, &shape),
        )?;
        Ok(Tensor::record(y, &[self], &[], || Back { ids, d, shape: self.shape().into() }))
    }
    /// Indices (u32 or i64) as rows of zeros with a single 1: `[…]` becomes `[…, n]` of `dtype`. Not differentiable.
    pub fn one_hot(&self, n: usize, dtype: DType) -> Result<Tensor> {
        let _op = spans::op("one_hot");
        let ids = ids_below("one_hot", self.array(), n, &|| format!("{n} classes"))?;
        let shape: Dims = self.shape().iter().copied().chain([n]).collect();
        let y = dispatch(
            [ids],
            Half::Move,
            |[ids]| {
                let mut y = Array::zeros(&shape, dtype);
                with_dtype!(dtype, |T| {
                    let one = T::from_f64(1.0);
                    let dst = y.fresh_mut::<T>();
                    ids.as_slice::<u32>()?.iter().enumerate().for_each(|(i, &id)| dst[i * n + id as usize] = one);
                });
                Ok(y)
            },
            |gpu, [ids]| cuda::one_hot(gpu, &ids, &Array::scalar(1.0, dtype), &shape),
        )?;
        Ok(Tensor::new(y))
    }
}

/// `base` with the slices of `grad` added along `d` at `ids`; the slices of one id are added in ascending order.
fn add_slices(base: Array, d: usize, ids: &Array, grad: &Array) -> Result<Array> {
    let (outer, n, inner) = around(base.shape(), d);
    dispatch(
        [base, ids.clone(), grad.contiguous()],
        Half::Widen,
        |[mut out, ids, g]| {
            with_float!("index_select", g.dtype(), |T| {
                rows::add::<T>(ids.as_slice()?, g.as_slice()?, None, outer, inner, out.as_mut_slice()?);
                Ok(out)
            })
        },
        |gpu, [mut out, ids, g]| {
            out.own()?;
            rows::cuda::add_rows(gpu, (&g, &ids), None, (outer, n, inner), &out)?;
            Ok(out)
        },
    )
}
