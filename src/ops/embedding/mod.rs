//! Embedding: rows of a table looked up by id, one per id, or the sum or mean over a bag of ids.
//!
//! The weight's gradient stays a lookup factor: N rows of p elements and N ids, never a dense table of V × p.

pub(crate) mod cuda;

use crate::array::Array;
use crate::array::shape::Dims;
use crate::autograd::{Case, Cotangents, Differentiable, Factor, FactorRule, Gen, OpInfo, Owner, Rule, Whose, one};
use crate::base::{DType, Error, Float, Result};
use crate::device::cpu::par::{par_rows, par_units};
use crate::device::cpu::simd::simd;
use crate::device::cuda::Gpu;
use crate::device::spans;
use crate::kernels::{Activation, Half, dispatch, elementwise as ew, rows};
use crate::ops::index::ids_below;
use crate::ops::linear::{Layout, linear};
use crate::ops::segment::Segments;
use crate::{Param, Samples, Tensor, with_dtype, with_float};
use smallvec::SmallVec;
use std::sync::Arc;

static EMBEDDING: OpInfo = OpInfo {
    name: "embedding",
    differentiable: Differentiable::Yes,
    factor: FactorRule::Kinds(&["lookup"]),
    cases: &[
        |g: &mut Gen| {
            let (b, t, v, p) = (g.count(1, 3), g.extent(0, 5), g.extent(1, 4), g.extent(0, 4));
            let w = Param::new("weight", g.array(&[v, p]));
            let ids = Tensor::new(g.ids(&[b, t], v));
            let padding = None;
            let params = vec![w.clone()];
            Ok(Case::new(vec![], move |_| embedding(&w, &ids, padding, None)).params(params).samples(b))
        },
        // A padding id, whose row receives no gradient; in this case no id equals it.
        |g: &mut Gen| {
            let (b, t, v, p) = (g.count(1, 3), g.extent(0, 5), g.extent(2, 4), g.extent(0, 4));
            let w = Param::new("weight", g.array(&[v, p]));
            let ids = Tensor::new(g.ids(&[b, t], v - 1));
            let (padding, params) = (Some(v as u32 - 1), vec![w.clone()]);
            Ok(Case::new(vec![], move |_| embedding(&w, &ids, padding, None)).params(params).samples(b))
        },
        // Rows of any owner in any order; some samples have no rows.
        |g| {
            let (n, b, v, p) = (g.extent(0, 6), g.size(1, 4), g.extent(1, 3), g.extent(0, 4));
            let w = Param::new("weight", g.array(&[v, p]));
            let ids = Tensor::new(g.ids(&[n], v).cast(DType::I64));
            let owner: Vec<u32> = (0..n).map(|_| g.size(0, b - 1) as u32).collect();
            let samples = Samples::owners(owner.clone(), b)?;
            let pick = Array::generate(&[b, n], g.dtype(), |i| (owner[i % n] as usize == i / n) as u8 as f64);
            let params = vec![w.clone()];
            Ok(Case::new(vec![], move |_| {
                Tensor::new(pick.clone()).matmul(&embedding(&w, &ids, None, Some(&samples))?.sin()?)
            })
            .params(params)
            .samples(b))
        },
        // Tied to the output head: the gradient's norm has a cross term of two kinds of factors.
        |g| {
            let (b, t, v, p) = (g.count(1, 3), g.extent(1, 4), g.extent(1, 4), g.extent(1, 4));
            let w = Param::new("weight", g.array(&[v, p]));
            let ids = Tensor::new(g.ids(&[b, t], v));
            let params = vec![w.clone()];
            Ok(Case::new(vec![], move |_| {
                let h = embedding(&w, &ids, None, None)?;
                linear(&h, &w, Layout::OutIn, None, Activation::Tanh, None)
            })
            .params(params)
            .samples(b))
        },
    ],
};
static EMBEDDING_BAG: OpInfo = OpInfo {
    name: "embedding_bag",
    differentiable: Differentiable::Yes,
    factor: FactorRule::Kinds(&["lookup"]),
    cases: &[|g| {
        let (v, p) = (g.extent(1, 4), g.extent(0, 4));
        let lengths = g.lengths(1, 4);
        let bags = lengths.len();
        let segments = Segments::lengths(&lengths);
        let w = Param::new("weight", g.array(&[v, p]));
        let ids = Tensor::new(g.ids(&[segments.rows()], v));
        let mode = if g.chance(0.5) { BagMode::Sum } else { BagMode::Mean };
        let params = vec![w.clone()];
        let inputs = if g.chance(0.5) { vec![g.array(&[segments.rows()])] } else { vec![] };
        // Bags of one sample need not be consecutive.
        let b = g.size(1, bags.min(4));
        let owner: Vec<u32> = (0..bags).map(|_| g.size(0, b - 1) as u32).collect();
        let samples = Samples::owners(owner.clone(), b)?;
        let pick = Array::generate(&[b, bags], g.dtype(), |i| (owner[i % bags] as usize == i / bags) as u8 as f64);
        Ok(Case::new(inputs, move |t| {
            let y = embedding_bag(&w, &ids, &segments, mode, t.first(), Some(&samples))?;
            Tensor::new(pick.clone()).matmul(&y.sin()?)
        })
        .params(params)
        .samples(b))
    }],
};

/// The registry entries of this family.
pub static OPS: &[&OpInfo] = &[&EMBEDDING, &EMBEDDING_BAG];

/// Checks the table and the ids, and returns the ids as contiguous u32.
fn table(op: &'static str, weight: &Param, ids: &Array) -> Result<(Array, usize)> {
    let &[v, p] = weight.shape() else {
        return Err(Error::shape(op, format!("table {} is {:?}, not [rows, size]", weight.name(), weight.shape())));
    };
    weight.dtype().expect_float(op)?;
    Ok((ids_below(op, ids, v, &|| format!("table {} with {v} rows", weight.name()))?, p))
}

/// Rows of `weight [V, p]` by `ids` (u32 or i64) `[B, …]`; returns `[B, …, p]` in the weight's dtype.
///
/// Rows looked up by the id `padding` receive no gradient. Dimension 0 of `ids` counts samples unless `samples` maps the ids otherwise. The
/// forward pass copies N rows; the gradient is a lookup factor of N rows.
///
/// ```
/// use prismgrad::{Array, DType, Param, ops::embedding::embedding};
/// let table = Param::new("wte.weight", Array::arange(6, DType::F32).reshape(&[3, 2]).unwrap());
/// let y = embedding(&table, Array::from_slice(&[2u32, 0], &[1, 2]).unwrap(), None, None).unwrap();
/// assert_eq!(y.array().to_f64(), [4.0, 5.0, 0.0, 1.0]);
/// ```
pub fn embedding(
    weight: &Param,
    ids: impl AsRef<Array>,
    padding: Option<u32>,
    samples: Option<&Samples>,
) -> Result<Tensor> {
    let _op = spans::op("embedding");
    struct Back {
        weight: Param,
        ids: Array,
        padding: Option<u32>,
        samples: Samples,
    }
    impl Rule for Back {
        fn info(&self) -> &'static OpInfo {
            &EMBEDDING
        }
        fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
            let (n, p) = (self.ids.numel(), self.weight.shape()[1]);
            // Factors are f32 or f64.
            let grad = grad.cast(grad.dtype().compute()).contiguous().reshape(&[n, p])?;
            let grad = match self.padding {
                Some(padding) => without_padding(grad, &self.ids, padding)?,
                None => grad,
            };
            back.param(
                &self.weight,
                Factor::Lookup { ids: self.ids.reshape(&[n])?, grad, samples: self.samples.clone() },
            );
            Ok(())
        }
    }
    let (ids, p) = table("embedding", weight, ids.as_ref())?;
    let samples = samples.cloned().unwrap_or_else(|| Samples::leading(ids.shape(), 0));
    if samples.rows() != ids.numel() {
        let message = format!("the samples map {} rows, there are {} ids", samples.rows(), ids.numel());
        return Err(Error::shape("embedding", message));
    }
    let shape: Dims = ids.shape().iter().copied().chain([p]).collect();
    let ids = ids.to(&weight.device())?;
    let y = dispatch(
        [weight.value(), ids.clone()],
        Half::Move,
        |[w, ids]| {
            let mut y = Array::uninit(&shape, w.dtype());
            with_dtype!(w.dtype(), |T| rows::take::<T>(w.as_slice()?, ids.as_slice()?, 1, p, y.fresh_mut()));
            Ok(y)
        },
        |gpu, [w, ids]| rows::cuda::take(gpu, &w, &ids, 1, weight.shape()[0], p, &shape),
    )?;
    Ok(Tensor::record(y, &[], &[weight], || Back { weight: weight.clone(), ids, padding, samples }))
}

/// `grad [N, p]` with the rows of the id `padding` set to 0.
fn without_padding(grad: Array, ids: &Array, padding: u32) -> Result<Array> {
    dispatch(
        [grad, ids.clone()],
        Half::Move,
        |[mut grad, ids]| {
            let (ids, p) = (ids.as_slice::<u32>()?, grad.shape()[1]);
            if ids.contains(&padding) {
                with_dtype!(grad.dtype(), |T| {
                    let g = grad.as_mut_slice::<T>()?.chunks_exact_mut(p.max(1));
                    g.zip(ids).filter(|(_, id)| **id == padding).for_each(|(g, _)| g.fill(T::default()));
                });
            }
            Ok(grad)
        },
        |gpu, [grad, ids]| cuda::zero_rows(gpu, &grad, &ids, padding),
    )
}

/// The reduction of a bag's rows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BagMode {
    /// Their sum.
    Sum,
    /// Their sum divided by their number.
    Mean,
}

struct BagBack {
    weight: Param,
    ids: Array,
    bags: Segments,
    mode: BagMode,
    scale: Option<Array>,
    samples: Samples,
}

impl BagMode {
    fn factor<T: Float>(self, n: usize) -> T {
        if self == BagMode::Mean && n > 0 { T::ONE / T::from_f64(n as f64) } else { T::ONE }
    }
}

impl BagBack {
    /// The bags in the form that the kernels take.
    fn on_gpu(&self, gpu: &Arc<Gpu>) -> Result<cuda::Bags> {
        cuda::Bags::new(gpu, &self.ids, &self.bags, self.mode, self.scale.as_ref())
    }
    /// The gradient of the ids' weights: Σⱼ grad·row, times the mean's factor. `[N]`.
    fn scale_grad(&self, g: &Array) -> Result<Array> {
        let (n, p, owner) = (self.ids.numel(), self.weight.shape()[1], &self.bags);
        dispatch(
            [g.clone(), self.weight.value(), self.ids.clone()],
            Half::Widen,
            |[g, w, ids]| {
                let mut taken = Array::uninit(&[n, p], w.dtype());
                with_dtype!(w.dtype(), |S| rows::take::<S>(w.as_slice()?, ids.as_slice()?, 1, p, taken.fresh_mut()));
                with_float!("embedding_bag", g.dtype(), |T| {
                    let spread = rows_of(&g, owner.ids(), p)?;
                    let product = ew::zip::<T, T, T>("embedding_bag", &taken.cast(g.dtype()), &spread, |a, b| a * b)?;
                    let mut d = super::reduce::sum_dims(&product, &[1])?;
                    for (d, &bag) in d.as_mut_slice::<T>()?.iter_mut().zip(owner.ids().iter()) {
                        *d *= self.mode.factor::<T>(owner.range(bag as usize).len());
                    }
                    Ok(d)
                })
            },
            |gpu, [g, w, _]| self.on_gpu(gpu)?.dots(gpu, &g, &w.cast(g.dtype())),
        )
    }
    /// The gradient of each id's row: that of its bag, scaled. `[N, p]`.
    fn rows(&self, g: &Array) -> Result<Array> {
        let (n, p, bags) = (self.ids.numel(), self.weight.shape()[1], &self.bags);
        dispatch(
            [g.clone()],
            Half::Widen,
            |[g]| {
                let mut rows = Array::uninit(&[n, p], g.dtype());
                with_float!("embedding_bag", g.dtype(), |T| {
                    let (g, owner) = (g.as_slice::<T>()?, bags.ids());
                    let w = self.scale.as_ref().map(|w| w.as_slice::<T>()).transpose()?;
                    par_rows(rows.fresh_mut::<T>(), p, |t, d| {
                        let bag = owner[t] as usize;
                        let s = self.mode.factor::<T>(bags.range(bag).len()) * w.map_or(T::ONE, |w| w[t]);
                        simd(
                            #[inline(always)]
                            || d.iter_mut().zip(&g[bag * p..(bag + 1) * p]).for_each(|(d, &g)| *d = s * g),
                        );
                    });
                    Ok(rows)
                })
            },
            |gpu, [g]| self.on_gpu(gpu)?.rows(gpu, &g),
        )
    }
}

impl Rule for BagBack {
    fn info(&self) -> &'static OpInfo {
        &EMBEDDING_BAG
    }
    fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
        one(match self.bags.known_ids() {
            Some(ids) => y.sent(self.bags.count(), ids, 1),
            None => Owner::Unknown,
        })
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        // Factors are f32 or f64.
        let g = grad.cast(grad.dtype().compute()).contiguous();
        if back.needs(0) {
            back.input(0, self.scale_grad(&g)?);
        }
        if self.weight.trainable() {
            let (ids, grad) = (self.ids.clone(), self.rows(&g)?);
            back.param(&self.weight, Factor::Lookup { ids, grad, samples: self.samples.clone() });
        }
        Ok(())
    }
}

/// Row `ids[t]` of `g`, for every t.
fn rows_of(g: &Array, ids: &[u32], p: usize) -> Result<Array> {
    let mut out = Array::uninit(&[ids.len(), p], g.dtype());
    with_dtype!(g.dtype(), |T| rows::take::<T>(g.as_slice()?, ids, 1, p, out.fresh_mut()));
    Ok(out)
}

/// Sum or mean of the rows of `weight [V, p]` in each bag of ids: `[bags, p]` in the weight's dtype. An empty bag gives zeros.
///
/// `ids` (u32 or i64) has as many elements as `bags` has rows; for `[B, k]` ids use [`Segments::uniform`]. `scale [N]` multiplies each id's
/// row (before the mean divides by the number of ids) and is differentiable. `samples` maps *bags* to samples; without it every bag is one
/// sample. The gradient is a lookup factor of N rows.
pub fn embedding_bag(
    weight: &Param,
    ids: impl AsRef<Array>,
    bags: &Segments,
    mode: BagMode,
    scale: Option<&Tensor>,
    samples: Option<&Samples>,
) -> Result<Tensor> {
    let _op = spans::op("embedding_bag");
    let op = "embedding_bag";
    let (ids, p) = table(op, weight, ids.as_ref())?;
    bags.expect_rows(op, ids.numel())?;
    let dtype = weight.dtype().compute();
    let scale = match scale {
        Some(s) if s.numel() != ids.numel() || s.rank() != 1 => {
            return Err(Error::shape(op, format!("weights {:?} for {} ids; give [{1}]", s.shape(), ids.numel())));
        }
        Some(s) if s.dtype().compute() != dtype => {
            return Err(Error::dtype(
                op,
                format!("weights are {}, the table {}; cast them", s.dtype(), weight.dtype()),
            ));
        }
        Some(s) => Some(s.cast(dtype)?),
        None => None,
    };
    let samples = match samples {
        Some(s) => bags.rows_of(s)?,
        None => bags.samples(),
    };
    let values = scale.as_ref().map(|s| s.array().contiguous().to(&weight.device())).transpose()?;
    let ids = ids.reshape(&[ids.numel()])?.to(&weight.device())?;
    let back = BagBack { weight: weight.clone(), ids: ids.clone(), bags: bags.clone(), mode, scale: values, samples };
    let y = dispatch(
        [weight.value(), ids],
        Half::Move,
        |[w, ids]| {
            // For 16-bit tables, only the rows in use are widened.
            let (source, at) = match w.dtype().is_half() {
                true => {
                    let mut taken = Array::uninit(&[ids.numel(), p], w.dtype());
                    with_dtype!(w.dtype(), |T| rows::take::<T>(
                        w.as_slice()?,
                        ids.as_slice()?,
                        1,
                        p,
                        taken.fresh_mut()
                    ));
                    (taken.cast(dtype), Array::arange(ids.numel(), DType::U32))
                }
                false => (w, ids),
            };
            let mut y = Array::uninit(&[bags.count(), p], dtype);
            with_float!(op, dtype, |T| {
                let (src, at) = (source.as_slice::<T>()?, at.as_slice::<u32>()?);
                let w = back.scale.as_ref().map(|w| w.as_slice::<T>()).transpose()?;
                par_units(y.fresh_mut::<T>(), p, bags.grain(p), |range, y| {
                    for (bag, y) in range.zip(y.chunks_exact_mut(p)) {
                        let rows = bags.range(bag);
                        simd(
                            #[inline(always)]
                            || {
                                let f = mode.factor::<T>(rows.len());
                                y.fill(T::ZERO);
                                for t in rows {
                                    let (w, row) = (w.map_or(f, |w| f * w[t]), at[t] as usize * p);
                                    y.iter_mut().zip(&src[row..row + p]).for_each(|(y, &x)| *y += w * x);
                                }
                            },
                        );
                    }
                });
                Ok(y)
            })
        },
        |gpu, [w, _]| Ok(back.on_gpu(gpu)?.sum(gpu, &w)?.cast(dtype)),
    )?;
    let parents: Vec<&Tensor> = scale.iter().collect();
    Tensor::record(y, &parents, &[weight], || back).cast(weight.dtype())
}
