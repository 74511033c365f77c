//! Reductions over segments: runs of rows of any length, also none (cells of a column, nodes of a hyperedge, tokens of an
//! expert). One pass over memory each; a segment is summed by one task in row order, so results are deterministic.

pub(crate) mod cuda;

use crate::array::Array;
use crate::array::shape::Dims;
use crate::autograd::{Case, Differentiable, Flow, Gen, NO_PARAMS, OpInfo, Rule};
use crate::base::{DType, Error, Float, Result};
use crate::device::cpu::par::{GRAIN, par_chunks};
use crate::device::cpu::shared::Shared;
use crate::device::cpu::simd::simd;
use crate::device::cuda::Gpu;
use crate::device::{Device, spans};
use crate::kernels::rows;
use crate::{Samples, Tensor, with_dtype, with_float};
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// Consecutive rows in segments: segment s is rows `offsets[s]..offsets[s + 1]`. Checked once; clones are handles.
///
/// ```
/// use prismgrad::ops::segment::Segments;
/// let s = Segments::new(&[0, 2, 2, 5]).unwrap(); // segments of 2, 0 and 3 rows
/// assert_eq!((s.count(), s.rows(), s.range(2)), (3, 5, 2..5));
/// assert!(Segments::new(&[0, 3, 2]).is_err());
/// ```
#[derive(Clone, Debug)]
pub struct Segments(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    offsets: Vec<usize>,
    ids: Arc<Vec<u32>>,
    on_gpu: Mutex<Option<(usize, cuda::OnGpu)>>,
}

impl Segments {
    /// From offsets `[S + 1]`, which begin with 0 and never fall.
    pub fn new(offsets: &[usize]) -> Result<Segments> {
        if offsets.first() != Some(&0) {
            return Err(Error::invalid("segments", format!("offsets must begin with 0, got {:?}", offsets.first())));
        }
        if let Some(i) = (1..offsets.len()).find(|&i| offsets[i] < offsets[i - 1]) {
            return Err(Error::invalid(
                "segments",
                format!("offsets must never fall: {} follows {} at position {i}", offsets[i], offsets[i - 1]),
            ));
        }
        let ids =
            offsets.windows(2).enumerate().flat_map(|(s, w)| std::iter::repeat_n(s as u32, w[1] - w[0])).collect();
        Ok(Segments(Arc::new(Inner { offsets: offsets.to_vec(), ids: Arc::new(ids), on_gpu: Mutex::default() })))
    }
    /// From the number of rows of each segment.
    pub fn lengths(lengths: &[usize]) -> Segments {
        let offsets: Vec<usize> = std::iter::once(0)
            .chain(lengths.iter().scan(0, |at, &n| {
                *at += n;
                Some(*at)
            }))
            .collect();
        let ids = lengths.iter().enumerate().flat_map(|(s, &n)| std::iter::repeat_n(s as u32, n)).collect();
        Segments(Arc::new(Inner { offsets, ids: Arc::new(ids), on_gpu: Mutex::default() }))
    }
    /// The segments in a GPU's memory, copied there once.
    pub(crate) fn on_gpu(&self, gpu: &Arc<Gpu>) -> Result<cuda::OnGpu> {
        let mut slot = self.0.on_gpu.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((ordinal, there)) = &*slot
            && *ordinal == gpu.ordinal()
        {
            return Ok(there.clone());
        }
        let device = Device::Cuda(gpu.clone());
        let offsets: Vec<i64> = self.0.offsets.iter().map(|&o| o as i64).collect();
        let there = cuda::OnGpu {
            offsets: Array::from_slice(&offsets, &[offsets.len()])?.to(&device)?,
            owner: Array::from_slice(&self.0.ids, &[self.0.ids.len()])?.to(&device)?,
        };
        *slot = Some((gpu.ordinal(), there.clone()));
        Ok(there)
    }
    /// `count` segments of `each` rows.
    pub fn uniform(count: usize, each: usize) -> Segments {
        Segments::lengths(&vec![each; count])
    }
    /// Number of segments.
    pub fn count(&self) -> usize {
        self.0.offsets.len() - 1
    }
    /// Number of rows in all.
    pub fn rows(&self) -> usize {
        self.0.ids.len()
    }
    /// Rows of segment `s`.
    pub fn range(&self, s: usize) -> Range<usize> {
        self.0.offsets[s]..self.0.offsets[s + 1]
    }
    /// The offsets, `[S + 1]`.
    pub fn offsets(&self) -> &[usize] {
        &self.0.offsets
    }
    /// The segment of every row.
    pub fn ids(&self) -> &Arc<Vec<u32>> {
        &self.0.ids
    }
    /// The map in which each segment is a sample.
    pub fn samples(&self) -> Samples {
        // The offsets were checked when they came in.
        Samples::ragged(&self.0.offsets).unwrap_or_else(|_| Samples::uniform(0, 0))
    }
    /// The row map of samples that own whole segments: `samples` maps segments, the result rows.
    pub fn rows_of(&self, samples: &Samples) -> Result<Samples> {
        if samples.rows() != self.count() {
            return Err(Error::shape(
                "segments",
                format!("the samples map {} of {} segments", samples.rows(), self.count()),
            ));
        }
        Samples::owners(self.ids().iter().map(|&s| samples.owner(s as usize) as u32).collect(), samples.count())
    }
    pub(crate) fn expect_rows(&self, op: &'static str, rows: usize) -> Result<()> {
        if rows == self.rows() {
            return Ok(());
        }
        Err(Error::shape(op, format!("the offsets cover {} rows, the input has {rows}", self.rows())))
    }
    /// Runs `f(segment, its rows)` for every segment, in parallel pieces of about `GRAIN` elements of `width` each.
    pub(crate) fn each(&self, width: usize, f: impl Fn(usize, Range<usize>) + Sync) {
        let rows = (self.rows() / self.count().max(1)).max(1);
        par_chunks(self.count(), (GRAIN / (rows * width.max(1))).max(1), |chunk| {
            chunk.for_each(|s| f(s, self.range(s)));
        });
    }
}

fn case(g: &mut Gen, f: fn(&Tensor, &Segments) -> Result<Tensor>) -> Result<Case> {
    let lengths: Vec<usize> = (0..g.size(0, 5)).map(|_| g.size(0, 4)).collect();
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
info!(SEGMENT_SUM, "segment_sum", |g| case(g, Tensor::segment_sum), |g| case(g, Tensor::segment_mean));
info!(SEGMENT_MAX, "segment_max", |g| case(g, Tensor::segment_max));
info!(SEGMENT_SOFTMAX, "segment_softmax", |g| case(g, Tensor::segment_softmax));
info!(SEGMENT_REPEAT, "segment_repeat", |g: &mut Gen| {
    let lengths: Vec<usize> = (0..g.size(0, 5)).map(|_| g.size(0, 4)).collect();
    let segments = Segments::lengths(&lengths);
    let shape = [lengths.len(), g.size(1, 3)];
    Ok(Case::new(vec![g.array(&shape)], move |t| t[0].segment_repeat(&segments)))
});

/// This family's entries.
pub static OPS: &[&OpInfo] = &[&SEGMENT_SUM, &SEGMENT_MAX, &SEGMENT_SOFTMAX, &SEGMENT_REPEAT];

/// Sum (or mean) of each segment's rows of `width`: `[N, …]` to `[S, …]`.
fn reduce<T: Float>(x: &[T], segments: &Segments, width: usize, mean: bool, out: &mut [T]) {
    let dst = Shared::new(out);
    segments.each(width, |s, range| {
        // SAFETY: each segment has its own row.
        let o = unsafe { dst.slice(s * width..(s + 1) * width) };
        simd(
            #[inline(always)]
            || {
                o.fill(T::ZERO);
                let n = range.len();
                for r in range {
                    o.iter_mut().zip(&x[r * width..(r + 1) * width]).for_each(|(o, &x)| *o += x);
                }
                if mean && n > 1 {
                    let scale = T::ONE / T::from_f64(n as f64);
                    o.iter_mut().for_each(|o| *o *= scale);
                }
            },
        );
    });
}

/// Each segment's row repeated for its rows (divided by their number if `mean`): `[S, …]` to `[N, …]`.
fn spread<T: Float>(g: &[T], segments: &Segments, width: usize, mean: bool, out: &mut [T]) {
    let dst = Shared::new(out);
    segments.each(width, |s, range| {
        let scale = if mean { T::ONE / T::from_f64(range.len().max(1) as f64) } else { T::ONE };
        let g = &g[s * width..(s + 1) * width];
        // SAFETY: segments are disjoint.
        let o = unsafe { dst.slice(range.start * width..range.end * width) };
        simd(
            #[inline(always)]
            || o.chunks_exact_mut(width.max(1)).for_each(|o| o.iter_mut().zip(g).for_each(|(o, &g)| *o = scale * g)),
        );
    });
}

/// The checks every op of this file begins with: shape of the input after dimension 0, and its product.
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

fn total(x: &Tensor, segments: &Segments, mean: bool) -> Result<Tensor> {
    let _op = spans::op("segment_sum");
    struct Back {
        segments: Segments,
        mean: bool,
        shape: Dims,
    }
    impl Rule for Back {
        fn info(&self) -> &'static OpInfo {
            &SEGMENT_SUM
        }
        fn backward(&self, grad: Array, flow: &mut Flow) -> Result<()> {
            let g = grad.contiguous();
            if let Some(gpu) = g.gpu() {
                flow.input(0, self.segments.on_gpu(gpu)?.spread(gpu, &g, &self.shape, self.mean)?);
                return Ok(());
            }
            let mut dx = Array::uninit(&self.shape, g.dtype());
            let width = self.shape[1..].iter().product();
            with_float!("segment_sum", g.dtype(), T => {
                spread::<T>(g.as_slice()?, &self.segments, width, self.mean, dx.fresh_mut());
                Ok(())
            })?;
            flow.input(0, dx);
            Ok(())
        }
    }
    let width = inner("segment_sum", x, segments.rows(), segments)?;
    if x.dtype().is_half() {
        return total(&x.cast(DType::F32)?, segments, mean)?.cast(x.dtype());
    }
    let a = x.array().contiguous();
    let shape = with_rows(x.shape(), segments.count());
    if let Some(gpu) = a.gpu() {
        let y = segments.on_gpu(gpu)?.sum(gpu, &a, &shape, mean)?;
        let back = || Back { segments: segments.clone(), mean, shape: x.shape().into() };
        return Ok(Tensor::record(y, &[x], &[], back));
    }
    let mut y = Array::uninit(&shape, x.dtype());
    with_float!("segment_sum", x.dtype(), T => {
        reduce::<T>(a.as_slice()?, segments, width, mean, y.fresh_mut());
        Ok(())
    })?;
    Ok(Tensor::record(y, &[x], &[], || Back { segments: segments.clone(), mean, shape: x.shape().into() }))
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
    /// Largest of each segment's rows, column by column: `[N, …]` to `[S, …]`. The gradient goes to the first of equal
    /// values. An empty segment gives 0 and no gradient; NaN wins, so that it is seen.
    pub fn segment_max(&self, segments: &Segments) -> Result<Tensor> {
        let _op = spans::op("segment_max");
        struct Back {
            segments: Segments,
            /// Row of the largest value, per output element; unused where the segment is empty.
            index: Array,
            shape: Dims,
        }
        impl Rule for Back {
            fn info(&self) -> &'static OpInfo {
                &SEGMENT_MAX
            }
            fn backward(&self, grad: Array, flow: &mut Flow) -> Result<()> {
                let g = grad.contiguous();
                if let Some(gpu) = g.gpu() {
                    let segments = self.segments.on_gpu(gpu)?;
                    flow.input(0, segments.max_grad(gpu, &g, &self.index, &self.shape)?);
                    return Ok(());
                }
                let index = self.index.as_slice::<u32>()?;
                let mut dx = Array::zeros(&self.shape, g.dtype());
                let width: usize = self.shape[1..].iter().product();
                with_float!("segment_max", g.dtype(), T => {
                    let (g, d) = (g.as_slice::<T>()?, dx.fresh_mut::<T>());
                    for s in (0..self.segments.count()).filter(|&s| !self.segments.range(s).is_empty()) {
                        for c in 0..width {
                            d[index[s * width + c] as usize * width + c] = g[s * width + c];
                        }
                    }
                    Ok(())
                })?;
                flow.input(0, dx);
                Ok(())
            }
        }
        let width = inner("segment_max", self, segments.rows(), segments)?;
        if self.dtype().is_half() {
            return self.cast(DType::F32)?.segment_max(segments)?.cast(self.dtype());
        }
        let a = self.array().contiguous();
        let to = with_rows(self.shape(), segments.count());
        if let Some(gpu) = a.gpu() {
            let (y, index) = segments.on_gpu(gpu)?.max(gpu, &a, &to)?;
            let back = || Back { segments: segments.clone(), index, shape: self.shape().into() };
            return Ok(Tensor::record(y, &[self], &[], back));
        }
        let (mut y, mut index) = (Array::zeros(&to, self.dtype()), Array::zeros(&to, DType::U32));
        with_float!("segment_max", self.dtype(), T => {
            let (best, at) = (Shared::new(y.fresh_mut::<T>()), Shared::new(index.fresh_mut::<u32>()));
            let x = a.as_slice::<T>()?;
            segments.each(width, |s, range| {
                // SAFETY: each segment has its own row.
                let (best, at) = unsafe { (best.slice(s * width..(s + 1) * width), at.slice(s * width..(s + 1) * width)) };
                for (k, r) in range.enumerate() {
                    for (c, &x) in x[r * width..(r + 1) * width].iter().enumerate() {
                        if k == 0 || x > best[c] || (x.is_nan() && !best[c].is_nan()) {
                            best[c] = x;
                            at[c] = r as u32;
                        }
                    }
                }
            });
            Ok(())
        })?;
        let shape = self.shape().into();
        Ok(Tensor::record(y, &[self], &[], || Back { segments: segments.clone(), index, shape }))
    }
    /// Softmax within each segment, column by column: `[N, …]` to `[N, …]`. A segment of −∞ only gives zeros, never NaN.
    pub fn segment_softmax(&self, segments: &Segments) -> Result<Tensor> {
        let _op = spans::op("segment_softmax");
        struct Back {
            segments: Segments,
            y: Array,
        }
        impl Rule for Back {
            fn info(&self) -> &'static OpInfo {
                &SEGMENT_SOFTMAX
            }
            fn backward(&self, grad: Array, flow: &mut Flow) -> Result<()> {
                let g = grad.contiguous();
                if let Some(gpu) = g.gpu() {
                    flow.input(0, self.segments.on_gpu(gpu)?.softmax_grad(gpu, &self.y, &g)?);
                    return Ok(());
                }
                let mut dx = Array::uninit(g.shape(), g.dtype());
                let width: usize = g.shape()[1..].iter().product();
                with_float!("segment_softmax", g.dtype(), T => {
                    let (y, g, d) = (self.y.as_slice::<T>()?, g.as_slice::<T>()?, Shared::new(dx.fresh_mut::<T>()));
                    self.segments.each(width, |_, range| {
                        // SAFETY: segments are disjoint.
                        let d = unsafe { d.slice(range.start * width..range.end * width) };
                        let part = range.start * width..range.end * width;
                        softmax_grad(&y[part.clone()], &g[part], width, d);
                    });
                    Ok(())
                })?;
                flow.input(0, dx);
                Ok(())
            }
        }
        let width = inner("segment_softmax", self, segments.rows(), segments)?;
        if self.dtype().is_half() {
            return self.cast(DType::F32)?.segment_softmax(segments)?.cast(self.dtype());
        }
        let a = self.array().contiguous();
        if let Some(gpu) = a.gpu() {
            let y = segments.on_gpu(gpu)?.softmax(gpu, &a)?;
            return Ok(Tensor::record(y.clone(), &[self], &[], || Back { segments: segments.clone(), y }));
        }
        let mut y = Array::uninit(self.shape(), self.dtype());
        with_float!("segment_softmax", self.dtype(), T => {
            let (x, dst) = (a.as_slice::<T>()?, Shared::new(y.fresh_mut::<T>()));
            segments.each(width, |_, range| {
                // SAFETY: segments are disjoint.
                let o = unsafe { dst.slice(range.start * width..range.end * width) };
                softmax(&x[range.start * width..range.end * width], width, o);
            });
            Ok(())
        })?;
        let saved = y.clone();
        Ok(Tensor::record(y, &[self], &[], || Back { segments: segments.clone(), y: saved }))
    }
    /// Row s repeated for every row of segment s: `[S, …]` to `[N, …]`, any dtype. Backward sums each segment.
    pub fn segment_repeat(&self, segments: &Segments) -> Result<Tensor> {
        let _op = spans::op("segment_repeat");
        struct Back {
            segments: Segments,
            shape: Dims,
        }
        impl Rule for Back {
            fn info(&self) -> &'static OpInfo {
                &SEGMENT_REPEAT
            }
            fn backward(&self, grad: Array, flow: &mut Flow) -> Result<()> {
                let g = grad.cast(grad.dtype().compute()).contiguous();
                if let Some(gpu) = g.gpu() {
                    let dx = self.segments.on_gpu(gpu)?.sum(gpu, &g, &self.shape, false)?;
                    flow.input(0, dx.cast(grad.dtype()));
                    return Ok(());
                }
                let mut dx = Array::uninit(&self.shape, g.dtype());
                let width = self.shape[1..].iter().product();
                with_float!("segment_repeat", g.dtype(), T => {
                    reduce::<T>(g.as_slice()?, &self.segments, width, false, dx.fresh_mut());
                    Ok(())
                })?;
                flow.input(0, dx.cast(grad.dtype()));
                Ok(())
            }
        }
        if self.shape().first() != Some(&segments.count()) {
            return Err(Error::shape(
                "segment_repeat",
                format!("{:?} for {} segments", self.shape(), segments.count()),
            ));
        }
        let width = self.shape()[1..].iter().product();
        let a = self.array().contiguous();
        let shape = with_rows(self.shape(), segments.rows());
        if let Some(gpu) = a.gpu() {
            let owner = segments.on_gpu(gpu)?.owner;
            let y = rows::cuda::take(gpu, &a, &owner, 1, segments.count(), width, &shape)?;
            let back = || Back { segments: segments.clone(), shape: self.shape().into() };
            return Ok(Tensor::record(y, &[self], &[], back));
        }
        let mut y = Array::uninit(&shape, self.dtype());
        with_dtype!(self.dtype(), T => rows::take::<T>(a.as_slice()?, segments.ids(), 1, width, y.fresh_mut()));
        Ok(Tensor::record(y, &[self], &[], || Back { segments: segments.clone(), shape: self.shape().into() }))
    }
}

/// Softmax of each column of `x`, rows of `width`.
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
            // A column of −∞ only: any finite maximum makes its terms 0.
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

/// d = y·(g − Σ y·g), column by column.
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
