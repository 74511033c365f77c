//! Reductions over segments: runs of rows of any length, including empty ones (cells of a column, nodes of a hyperedge, tokens of an
//! expert). Each is one pass over memory; a segment is summed by one task in row order, so that results are deterministic.

pub(crate) mod cuda;

use crate::array::Array;
use crate::array::shape::Dims;
use crate::autograd::{Case, Cotangents, Differentiable, Gen, NO_PARAMS, OpInfo, Owner, Rule, Whose, one};
use crate::base::{DType, Error, Float, Result};
use crate::device::cpu::par::{par_rows2, par_units};
use crate::device::cpu::simd::simd;
use crate::device::spans;
use crate::kernels::{Half, dispatch, rows};
use crate::{Tensor, with_dtype, with_float};
use smallvec::SmallVec;

pub use crate::autograd::Segments;

fn case(g: &mut Gen, f: fn(&Tensor, &Segments) -> Result<Tensor>) -> Result<Case> {
    let lengths = g.lengths(0, 5);
    let segments = Segments::lengths(&lengths);
    let inner = g.size(0, 2);
    let shape: Vec<usize> = std::iter::once(segments.rows()).chain(g.shape(inner)).collect();
    Ok(Case::new(vec![g.distinct(&shape)], move |t| f(&t[0], &segments)))
}

macro_rules! info {
    ($id:ident, $name:literal, $($case:expr),*) => {
        static $id: OpInfo =
            OpInfo { name: $name, differentiable: Differentiable::Yes, factor: NO_PARAMS, cases: &[$($case),*] };
    };
}
info!(
    SEGMENT_SUM,
    "segment_sum",
    |g| case(g, Tensor::segment_sum),
    |g| case(g, Tensor::segment_mean),
    // Segments made on the device from the segment of each row.
    |g: &mut Gen| {
        let lengths = g.lengths(1, 5);
        let (count, ids) = (lengths.len(), Segments::lengths(&lengths).ids().clone());
        let shape = [ids.len(), g.extent(0, 3)];
        let x = g.array(&shape);
        Ok(Case::new(vec![x], move |t| {
            let ids = Array::from_slice(&ids, &[ids.len()])?.to(&t[0].device())?;
            t[0].segment_sum(&Segments::of_sorted_ids(&ids, count)?)
        }))
    }
);
info!(SEGMENT_MAX, "segment_max", |g| case(g, Tensor::segment_max));
info!(SEGMENT_SOFTMAX, "segment_softmax", |g| case(g, Tensor::segment_softmax));
info!(SEGMENT_REPEAT, "segment_repeat", |g: &mut Gen| {
    let lengths = g.lengths(0, 5);
    let segments = Segments::lengths(&lengths);
    let shape = [lengths.len(), g.extent(0, 3)];
    Ok(Case::new(vec![g.array(&shape)], move |t| t[0].segment_repeat(&segments)))
});

/// The registry entries of this family.
pub static OPS: &[&OpInfo] = &[&SEGMENT_SUM, &SEGMENT_MAX, &SEGMENT_SOFTMAX, &SEGMENT_REPEAT];

/// Sum (or mean) of each segment's rows of `width`: `[N, …]` to `[S, …]`.
fn reduce<T: Float>(x: &[T], segments: &Segments, width: usize, mean: bool, out: &mut [T]) {
    par_units(out, width, segments.grain(width), |range, out| {
        for (s, o) in range.zip(out.chunks_exact_mut(width)) {
            let rows = segments.range(s);
            simd(
                #[inline(always)]
                || {
                    o.fill(T::ZERO);
                    let n = rows.len();
                    for r in rows {
                        o.iter_mut().zip(&x[r * width..(r + 1) * width]).for_each(|(o, &x)| *o += x);
                    }
                    if mean && n > 1 {
                        let scale = T::ONE / T::from_f64(n as f64);
                        o.iter_mut().for_each(|o| *o *= scale);
                    }
                },
            );
        }
    });
}

/// Each segment's row repeated for all rows of the segment (divided by their number if `mean`): `[S, …]` to `[N, …]`.
fn spread<T: Float>(g: &[T], segments: &Segments, width: usize, mean: bool, out: &mut [T]) {
    segments.par_rows(out, width, |s, o| {
        let rows = o.len().checked_div(width).unwrap_or(0);
        let scale = if mean { T::ONE / T::from_f64(rows.max(1) as f64) } else { T::ONE };
        let g = &g[s * width..(s + 1) * width];
        simd(
            #[inline(always)]
            || o.chunks_exact_mut(width.max(1)).for_each(|o| o.iter_mut().zip(g).for_each(|(o, &g)| *o = scale * g)),
        );
    });
}

/// The checks at the start of every op of this file; returns the product of the input's sizes after dimension 0.
fn inner(op: &'static str, x: &Tensor, rows: usize, segments: &Segments) -> Result<usize> {
    x.dtype().expect_float(op)?;
    match x.shape().split_first() {
        Some((&n, rest)) if n == rows => Ok(rest.iter().product()),
        Some((&n, _)) if rows == segments.rows() => segments.expect_rows(op, n).map(|_| 0),
        Some((&n, _)) => Err(Error::shape(op, format!("{n} rows for {rows} segments"))),
        None => Err(Error::shape(op, "needs rows along dimension 0, got a scalar")),
    }
}

/// `shape` with another size of dimension 0.
fn with_rows(shape: &[usize], n: usize) -> Dims {
    std::iter::once(n).chain(shape[1..].iter().copied()).collect()
}

struct SumBack {
    segments: Segments,
    mean: bool,
    shape: Dims,
}

/// The owners of the rows that each segment reduces to one.
fn reduced(y: &Whose, segments: &Segments, input: &[usize]) -> Owner {
    match (y.picking(0, input), segments.known_ids()) {
        (Owner::Unknown, Some(ids)) => y.sent(segments.count(), ids, input[1..].iter().product()),
        (o, _) => o,
    }
}

impl Rule for SumBack {
    fn info(&self) -> &'static OpInfo {
        &SEGMENT_SUM
    }
    fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
        one(reduced(y, &self.segments, &self.shape))
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        let SumBack { segments, mean, shape } = self;
        let dx = dispatch(
            [grad.contiguous()],
            Half::Native,
            |[g]| {
                let mut dx = Array::uninit(shape, g.dtype());
                with_float!("segment_sum", g.dtype(), |T| {
                    spread::<T>(g.as_slice()?, segments, shape[1..].iter().product(), *mean, dx.fresh_mut());
                    Ok(dx)
                })
            },
            |gpu, [g]| cuda::spread(gpu, &segments.on_gpu(gpu)?, &g, shape, *mean),
        )?;
        back.input(0, dx);
        Ok(())
    }
}

/// Sums (or means) of each segment's rows, as an array.
fn sums(x: &Array, segments: &Segments, shape: &[usize], mean: bool) -> Result<Array> {
    dispatch(
        [x.contiguous()],
        Half::Native,
        |[x]| {
            let mut y = Array::uninit(shape, x.dtype());
            with_float!("segment_sum", x.dtype(), |T| {
                reduce::<T>(x.as_slice()?, segments, shape[1..].iter().product(), mean, y.fresh_mut());
                Ok(y)
            })
        },
        |gpu, [x]| cuda::sum(gpu, &segments.on_gpu(gpu)?, &x, shape, mean),
    )
}

fn total(x: &Tensor, segments: &Segments, mean: bool) -> Result<Tensor> {
    let _op = spans::op("segment_sum");
    inner("segment_sum", x, segments.rows(), segments)?;
    let y = sums(x.array(), segments, &with_rows(x.shape(), segments.count()), mean)?;
    Ok(Tensor::record(y, &[x], &[], || SumBack { segments: segments.clone(), mean, shape: x.shape().into() }))
}

struct MaxBack {
    segments: Segments,
    /// Row of the largest value for each output element; unused for an empty segment.
    index: Array,
    shape: Dims,
}

impl Rule for MaxBack {
    fn info(&self) -> &'static OpInfo {
        &SEGMENT_MAX
    }
    fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
        one(reduced(y, &self.segments, &self.shape))
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        let (segments, shape) = (&self.segments, &self.shape);
        let dx = dispatch(
            [grad.contiguous(), self.index.clone()],
            Half::Move,
            |[g, index]| {
                let index = index.as_slice::<u32>()?;
                let mut dx = Array::zeros(shape, g.dtype());
                let width: usize = shape[1..].iter().product();
                with_dtype!(g.dtype(), |T| {
                    let (g, d) = (g.as_slice::<T>()?, dx.fresh_mut::<T>());
                    for s in (0..segments.count()).filter(|&s| !segments.range(s).is_empty()) {
                        for c in 0..width {
                            d[index[s * width + c] as usize * width + c] = g[s * width + c];
                        }
                    }
                });
                Ok(dx)
            },
            |gpu, [g, index]| cuda::max_grad(gpu, &segments.on_gpu(gpu)?, &g, &index, shape),
        )?;
        back.input(0, dx);
        Ok(())
    }
}

struct SoftmaxBack {
    segments: Segments,
    y: Array,
}

impl Rule for SoftmaxBack {
    fn info(&self) -> &'static OpInfo {
        &SEGMENT_SOFTMAX
    }
    fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
        one(match (y.picking(0, y.shape), self.segments.known_ids()) {
            (Owner::Unknown, Some(ids)) => match y.taken(ids, self.segments.count(), 1) {
                Owner::Mixed => Owner::Mixed,
                _ if y.owners_of(ids.len()).is_some() => y.same(),
                _ => Owner::Unknown,
            },
            (o, _) => o,
        })
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        let segments = &self.segments;
        let dx = dispatch(
            [self.y.clone(), grad.contiguous()],
            Half::Native,
            |[y, g]| {
                let mut dx = Array::uninit(g.shape(), g.dtype());
                let width: usize = g.shape()[1..].iter().product();
                with_float!("segment_softmax", g.dtype(), |T| {
                    let (y, g) = (y.as_slice::<T>()?, g.as_slice::<T>()?);
                    segments.par_rows(dx.fresh_mut::<T>(), width, |s, d| {
                        let part = segments.range(s);
                        let part = part.start * width..part.end * width;
                        softmax_grad(&y[part.clone()], &g[part], width, d);
                    });
                    Ok(dx)
                })
            },
            |gpu, [y, g]| cuda::softmax_grad(gpu, &segments.on_gpu(gpu)?, &y, &g),
        )?;
        back.input(0, dx);
        Ok(())
    }
}

struct RepeatBack {
    segments: Segments,
    shape: Dims,
}

impl Rule for RepeatBack {
    fn info(&self) -> &'static OpInfo {
        &SEGMENT_REPEAT
    }
    fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
        one(match (y.picking(0, &self.shape), self.segments.known_ids()) {
            (Owner::Unknown, Some(ids)) => y.taken(ids, self.shape[0], self.shape[1..].iter().product()),
            (o, _) => o,
        })
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        back.input(0, sums(&grad, &self.segments, &self.shape, false)?);
        Ok(())
    }
}

impl Tensor {
    /// Sum of each segment's rows: `[N, …]` to `[S, …]`. An empty segment gives 0.
    pub fn segment_sum(&self, segments: &Segments) -> Result<Tensor> {
        total(self, segments, false)
    }
    /// Mean of each segment's rows: `[N, …]` to `[S, …]`. An empty segment gives 0.
    pub fn segment_mean(&self, segments: &Segments) -> Result<Tensor> {
        total(self, segments, true)
    }
    /// Maximum of each segment's rows, column by column: `[N, …]` to `[S, …]`. The gradient goes to the first of equal values. An empty
    /// segment gives 0 and no gradient; NaN counts as the largest, so that it propagates.
    pub fn segment_max(&self, segments: &Segments) -> Result<Tensor> {
        let _op = spans::op("segment_max");
        let width = inner("segment_max", self, segments.rows(), segments)?;
        let to = with_rows(self.shape(), segments.count());
        let (y, index) = dispatch(
            [self.array().contiguous()],
            Half::Native,
            |[x]| {
                let (mut y, mut index) = (Array::zeros(&to, x.dtype()), Array::zeros(&to, DType::U32));
                with_float!("segment_max", x.dtype(), |T| {
                    let x = x.as_slice::<T>()?;
                    let both = (y.fresh_mut::<T>(), index.fresh_mut::<u32>());
                    par_rows2(both, (width, width), segments.grain(width), |s, best, at| {
                        for (k, r) in segments.range(s).enumerate() {
                            for (c, &x) in x[r * width..(r + 1) * width].iter().enumerate() {
                                if k == 0 || x > best[c] || (x.is_nan() && !best[c].is_nan()) {
                                    (best[c], at[c]) = (x, r as u32);
                                }
                            }
                        }
                    });
                    Ok((y, index))
                })
            },
            |gpu, [x]| cuda::max(gpu, &segments.on_gpu(gpu)?, &x, &to),
        )?;
        let shape = self.shape().into();
        Ok(Tensor::record(y, &[self], &[], || MaxBack { segments: segments.clone(), index, shape }))
    }
    /// Softmax within each segment, column by column: `[N, …]` to `[N, …]`. A column of a segment with only −∞ gives zeros, never NaN.
    pub fn segment_softmax(&self, segments: &Segments) -> Result<Tensor> {
        let _op = spans::op("segment_softmax");
        let width = inner("segment_softmax", self, segments.rows(), segments)?;
        let y = dispatch(
            [self.array().contiguous()],
            Half::Native,
            |[x]| {
                let mut y = Array::uninit(x.shape(), x.dtype());
                with_float!("segment_softmax", x.dtype(), |T| {
                    let x = x.as_slice::<T>()?;
                    segments.par_rows(y.fresh_mut::<T>(), width, |s, o| {
                        let part = segments.range(s);
                        softmax(&x[part.start * width..part.end * width], width, o);
                    });
                    Ok(y)
                })
            },
            |gpu, [x]| cuda::softmax(gpu, &segments.on_gpu(gpu)?, &x),
        )?;
        Ok(Tensor::record(y.clone(), &[self], &[], || SoftmaxBack { segments: segments.clone(), y }))
    }
    /// Row s repeated for every row of segment s: `[S, …]` to `[N, …]`, any dtype. Backward sums each segment.
    pub fn segment_repeat(&self, segments: &Segments) -> Result<Tensor> {
        let _op = spans::op("segment_repeat");
        if self.shape().first() != Some(&segments.count()) {
            let message = format!("{:?} for {} segments", self.shape(), segments.count());
            return Err(Error::shape("segment_repeat", message));
        }
        let width = self.shape()[1..].iter().product();
        let shape = with_rows(self.shape(), segments.rows());
        let y = dispatch(
            [self.array().contiguous()],
            Half::Move,
            |[x]| {
                let mut y = Array::uninit(&shape, x.dtype());
                with_dtype!(x.dtype(), |T| rows::take::<T>(x.as_slice()?, segments.ids(), 1, width, y.fresh_mut()));
                Ok(y)
            },
            |gpu, [x]| {
                let owner = segments.on_gpu(gpu)?.owner;
                rows::cuda::take(gpu, &x, &owner, 1, segments.count(), width, &shape)
            },
        )?;
        Ok(Tensor::record(y, &[self], &[], || RepeatBack { segments: segments.clone(), shape: self.shape().into() }))
    }
}

/// Softmax of each column of `x`, whose rows have `width` elements.
fn softmax<T: Float>(x: &[T], width: usize, out: &mut [T]) {
    if x.is_empty() {
        return;
    }
    let mut top = vec![T::NEG_INFINITY; width];
    let mut sum = vec![T::ZERO; width];
    simd(
        #[inline(always)]
        || {
            for row in x.chunks_exact(width) {
                top.iter_mut().zip(row).for_each(|(m, &x)| *m = m.larger(x));
            }
            // A column with only −∞: any finite maximum makes its terms 0.
            top.iter_mut().for_each(|m| *m = if *m == T::NEG_INFINITY { T::ZERO } else { *m });
            for (row, o) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
                for c in 0..width {
                    o[c] = (row[c] - top[c]).exp();
                    sum[c] += o[c];
                }
            }
            sum.iter_mut().for_each(|s| *s = if *s == T::ZERO { T::ZERO } else { T::ONE / *s });
            out.chunks_exact_mut(width).for_each(|o| o.iter_mut().zip(&sum).for_each(|(o, &s)| *o *= s));
        },
    );
}

/// Backward of softmax: d = y·(g − Σ y·g), column by column.
fn softmax_grad<T: Float>(y: &[T], g: &[T], width: usize, d: &mut [T]) {
    if y.is_empty() {
        return;
    }
    let mut dot = vec![T::ZERO; width];
    simd(
        #[inline(always)]
        || {
            for (y, g) in y.chunks_exact(width).zip(g.chunks_exact(width)) {
                (0..width).for_each(|c| dot[c] += y[c] * g[c]);
            }
            for ((y, g), d) in y.chunks_exact(width).zip(g.chunks_exact(width)).zip(d.chunks_exact_mut(width)) {
                (0..width).for_each(|c| d[c] = y[c] * (g[c] - dot[c]));
            }
        },
    );
}
