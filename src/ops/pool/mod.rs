//! Pooling over windows of images and sequences: the largest value, or the mean. One pass; planes in parallel.

pub(crate) mod cuda;

use crate::array::Array;
use crate::array::shape::Dims;
use crate::autograd::{Case, Differentiable, Flow, Gen, NO_PARAMS, OpInfo, Rule};
use crate::base::{DType, Error, Float, Result};
use crate::device::cpu::par::{GRAIN, par_chunks};
use crate::device::cpu::shared::Shared;
use crate::device::spans;
use crate::ops::conv::Conv;
use crate::{Tensor, with_float};
use std::ops::Range;
use std::sync::Arc;

/// A pooling method over kernel, stride and padding.
type Pool = fn(&Tensor, [usize; 2], [usize; 2], [usize; 2]) -> Result<Tensor>;

fn case(g: &mut Gen, f: Pool) -> Result<Case> {
    let s = [g.size(1, 2), g.size(1, 2), g.size(3, 5), g.size(3, 5)];
    let (kernel, stride) = ([g.size(1, 3), g.size(1, 3)], [g.size(1, 3), g.size(1, 3)]);
    let padding = [g.size(0, kernel[0] / 2), g.size(0, kernel[1] / 2)];
    Ok(Case::new(vec![g.distinct(&s)], move |t| f(&t[0], kernel, stride, padding)))
}

static MAX_POOL: OpInfo = OpInfo {
    name: "max_pool",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[|g| case(g, Tensor::max_pool2d)],
};
static AVG_POOL: OpInfo = OpInfo {
    name: "avg_pool",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[
        |g| case(g, Tensor::avg_pool2d),
        |g| {
            let s = [g.size(0, 2), g.size(1, 2), g.size(1, 5), g.size(1, 5)];
            let out = [g.size(1, 4), g.size(1, 4)];
            Ok(Case::new(vec![g.array(&s)], move |t| t[0].adaptive_avg_pool2d(out)))
        },
    ],
};

/// This family's entries.
pub static OPS: &[&OpInfo] = &[&MAX_POOL, &AVG_POOL];

/// The windows of an output: for each output line and column the input's, and the mean's divisor if it is constant.
#[derive(Clone)]
struct Grid {
    size: [usize; 2],
    lines: Arc<Vec<Range<usize>>>,
    columns: Arc<Vec<Range<usize>>>,
    divisor: Option<usize>,
    /// The same windows, for the kernels.
    pool: cuda::Pool,
}

impl Grid {
    /// Sliding windows, cut off at the borders.
    fn sliding(
        op: &'static str,
        size: [usize; 2],
        kernel: [usize; 2],
        stride: [usize; 2],
        padding: [usize; 2],
    ) -> Result<Grid> {
        if (0..2).any(|a| 2 * padding[a] > kernel[a]) {
            let message = format!("padding {padding:?} must be at most half the kernel {kernel:?}");
            return Err(Error::invalid(op, message));
        }
        if size.contains(&0) {
            return Err(Error::shape(op, format!("nothing to pool in images of {size:?}")));
        }
        let w = Conv { stride, padding, ..Conv::default() }.window(op, size, kernel)?;
        let axis = |a: usize| {
            let cut = |o: usize| {
                let start = o * stride[a];
                start.saturating_sub(padding[a])..(start + kernel[a] - padding[a]).min(size[a])
            };
            Arc::new((0..w.out[a]).map(cut).collect())
        };
        let pool = [size, w.out, kernel, stride, padding];
        Ok(Grid { size, lines: axis(0), columns: axis(1), divisor: Some(kernel[0] * kernel[1]), pool })
    }
    /// Windows of nearly equal size that cover the input in `out` pieces.
    fn adaptive(size: [usize; 2], out: [usize; 2]) -> Grid {
        let axis = |a: usize| {
            Arc::new((0..out[a]).map(|o| o * size[a] / out[a]..((o + 1) * size[a]).div_ceil(out[a])).collect())
        };
        let pool = [size, out, [0; 2], [0; 2], [0; 2]];
        Grid { size, lines: axis(0), columns: axis(1), divisor: None, pool }
    }
    fn area(&self) -> usize {
        self.size[0] * self.size[1]
    }
    fn places(&self) -> usize {
        self.lines.len() * self.columns.len()
    }
    /// Runs `f(plane)` for all planes in parallel pieces.
    fn planes(&self, n: usize, f: impl Fn(usize) + Sync) {
        par_chunks(n, (GRAIN / self.area().max(self.places()).max(1)).max(1), |r| r.for_each(&f));
    }
    /// Runs `f(output place, input lines, input columns)` for all places.
    fn each(&self, mut f: impl FnMut(usize, &Range<usize>, &Range<usize>)) {
        for (i, l) in self.lines.iter().enumerate() {
            for (j, c) in self.columns.iter().enumerate() {
                f(i * self.columns.len() + j, l, c);
            }
        }
    }
    fn scale<T: Float>(&self, l: &Range<usize>, c: &Range<usize>) -> T {
        T::ONE / T::from_f64(self.divisor.unwrap_or(l.len() * c.len()) as f64)
    }
}

/// `[B, C, H, W]`, or why not.
fn image(op: &'static str, x: &Tensor) -> Result<[usize; 4]> {
    x.dtype().expect_float(op)?;
    match x.shape() {
        &[b, c, h, w] => Ok([b, c, h, w]),
        other => Err(Error::shape(op, format!("needs [B, C, H, W], got {other:?}"))),
    }
}

fn average(x: &Tensor, grid: Grid) -> Result<Tensor> {
    let _op = spans::op("avg_pool");
    struct Back {
        grid: Grid,
        shape: Dims,
    }
    impl Rule for Back {
        fn info(&self) -> &'static OpInfo {
            &AVG_POOL
        }
        fn backward(&self, grad: Array, flow: &mut Flow) -> Result<()> {
            let g = grad.contiguous();
            if let Some(gpu) = g.gpu() {
                flow.input(0, cuda::average_grad(gpu, &g, &self.grid.pool, &self.shape)?);
                return Ok(());
            }
            let mut dx = Array::zeros(&self.shape, g.dtype());
            let (area, places, width) = (self.grid.area(), self.grid.places(), self.grid.size[1]);
            with_float!("avg_pool", g.dtype(), T => {
                let (g, dst) = (g.as_slice::<T>()?, Shared::new(dx.fresh_mut::<T>()));
                self.grid.planes(self.shape[0] * self.shape[1], |n| {
                    // SAFETY: each plane is visited once.
                    let d = unsafe { dst.slice(n * area..(n + 1) * area) };
                    let g = &g[n * places..(n + 1) * places];
                    self.grid.each(|o, l, c| {
                        let g = g[o] * self.grid.scale::<T>(l, c);
                        l.clone().for_each(|i| d[i * width + c.start..i * width + c.end].iter_mut().for_each(|d| *d += g));
                    });
                });
                Ok(())
            })?;
            flow.input(0, dx);
            Ok(())
        }
    }
    let [b, c, _, width] = image("avg_pool", x)?;
    if x.dtype().is_half() {
        return average(&x.cast(DType::F32)?, grid)?.cast(x.dtype());
    }
    let a = x.array().contiguous();
    let out = [b, c, grid.lines.len(), grid.columns.len()];
    if let Some(gpu) = a.gpu() {
        let y = cuda::average(gpu, &a, &grid.pool, &out)?;
        return Ok(Tensor::record(y, &[x], &[], || Back { grid, shape: x.shape().into() }));
    }
    let mut y = Array::uninit(&out, x.dtype());
    let (area, places) = (grid.area(), grid.places());
    with_float!("avg_pool", x.dtype(), T => {
        let (x, dst) = (a.as_slice::<T>()?, Shared::new(y.fresh_mut::<T>()));
        grid.planes(b * c, |n| {
            // SAFETY: each plane is written once.
            let y = unsafe { dst.slice(n * places..(n + 1) * places) };
            let x = &x[n * area..(n + 1) * area];
            grid.each(|o, l, c| {
                let sum: T = l.clone().map(|i| x[i * width + c.start..i * width + c.end].iter().copied().sum::<T>()).sum();
                y[o] = sum * grid.scale::<T>(l, c);
            });
        });
        Ok(())
    })?;
    Ok(Tensor::record(y, &[x], &[], || Back { grid, shape: x.shape().into() }))
}

fn largest(x: &Tensor, grid: Grid) -> Result<Tensor> {
    let _op = spans::op("max_pool");
    struct Back {
        index: Array,
        grid: Grid,
        shape: Dims,
    }
    impl Rule for Back {
        fn info(&self) -> &'static OpInfo {
            &MAX_POOL
        }
        fn backward(&self, grad: Array, flow: &mut Flow) -> Result<()> {
            let g = grad.contiguous();
            if let Some(gpu) = g.gpu() {
                flow.input(0, cuda::largest_grad(gpu, &g, &self.index, &self.grid.pool, &self.shape)?);
                return Ok(());
            }
            let mut dx = Array::zeros(&self.shape, g.dtype());
            let (area, places) = (self.shape[2] * self.shape[3], self.grid.places());
            let index = self.index.as_slice::<u32>()?;
            with_float!("max_pool", g.dtype(), T => {
                let d = dx.fresh_mut::<T>();
                for (o, (&g, &at)) in g.as_slice::<T>()?.iter().zip(index).enumerate() {
                    d[o / places * area + at as usize] += g;
                }
                Ok(())
            })?;
            flow.input(0, dx);
            Ok(())
        }
    }
    let [b, c, _, width] = image("max_pool", x)?;
    if x.dtype().is_half() {
        return largest(&x.cast(DType::F32)?, grid)?.cast(x.dtype());
    }
    let a = x.array().contiguous();
    let out = [b, c, grid.lines.len(), grid.columns.len()];
    if let Some(gpu) = a.gpu() {
        let (y, index) = cuda::largest(gpu, &a, &grid.pool, &out)?;
        return Ok(Tensor::record(y, &[x], &[], || Back { index, grid, shape: x.shape().into() }));
    }
    let (mut y, mut index) = (Array::uninit(&out, x.dtype()), Array::uninit(&out, DType::U32));
    let (area, places) = (grid.area(), grid.places());
    with_float!("max_pool", x.dtype(), T => {
        let (dst, at) = (Shared::new(y.fresh_mut::<T>()), Shared::new(index.fresh_mut::<u32>()));
        let x = a.as_slice::<T>()?;
        grid.planes(b * c, |n| {
            let part = n * places..(n + 1) * places;
            // SAFETY: each plane is written once.
            let (y, at) = unsafe { (dst.slice(part.clone()), at.slice(part)) };
            let x = &x[n * area..(n + 1) * area];
            grid.each(|o, l, c| {
                let mut best = l.start * width + c.start;
                for i in l.clone() {
                    for k in i * width + c.start..i * width + c.end {
                        // NaN wins, so that it is seen.
                        if x[k] > x[best] || (x[k].is_nan() && !x[best].is_nan()) {
                            best = k;
                        }
                    }
                }
                (y[o], at[o]) = (x[best], best as u32);
            });
        });
        Ok(())
    })?;
    Ok(Tensor::record(y, &[x], &[], || Back { index, grid, shape: x.shape().into() }))
}

impl Tensor {
    /// Largest value of each window of `[B, C, H, W]`; padding never wins. The gradient goes to the first of equal values.
    pub fn max_pool2d(&self, kernel: [usize; 2], stride: [usize; 2], padding: [usize; 2]) -> Result<Tensor> {
        let [_, _, h, w] = image("max_pool", self)?;
        largest(self, Grid::sliding("max_pool", [h, w], kernel, stride, padding)?)
    }
    /// Largest value of each window of `[B, C, T]`.
    pub fn max_pool1d(&self, kernel: usize, stride: usize, padding: usize) -> Result<Tensor> {
        self.flat("max_pool", |x| x.max_pool2d([1, kernel], [1, stride], [0, padding]))
    }
    /// Mean of each window of `[B, C, H, W]`; padding counts as zeros.
    pub fn avg_pool2d(&self, kernel: [usize; 2], stride: [usize; 2], padding: [usize; 2]) -> Result<Tensor> {
        let [_, _, h, w] = image("avg_pool", self)?;
        average(self, Grid::sliding("avg_pool", [h, w], kernel, stride, padding)?)
    }
    /// Mean of each window of `[B, C, T]`; padding counts as zeros.
    pub fn avg_pool1d(&self, kernel: usize, stride: usize, padding: usize) -> Result<Tensor> {
        self.flat("avg_pool", |x| x.avg_pool2d([1, kernel], [1, stride], [0, padding]))
    }
    /// Means over `out` windows that cover `[B, C, H, W]`: window o of a size n spans ⌊o·n/out⌋ to ⌈(o + 1)·n/out⌉.
    pub fn adaptive_avg_pool2d(&self, out: [usize; 2]) -> Result<Tensor> {
        let [_, _, h, w] = image("avg_pool", self)?;
        if h * w == 0 || out.contains(&0) {
            return Err(Error::shape("avg_pool", format!("{out:?} windows of {:?}: nothing to average", self.shape())));
        }
        average(self, Grid::adaptive([h, w], out))
    }
    /// Means over `out` windows that cover `[B, C, T]`.
    pub fn adaptive_avg_pool1d(&self, out: usize) -> Result<Tensor> {
        self.flat("avg_pool", |x| x.adaptive_avg_pool2d([1, out]))
    }
    /// Mean over all places: `[B, C, …]` to `[B, C]`.
    pub fn global_avg_pool(&self) -> Result<Tensor> {
        if self.rank() < 3 || self.shape()[2..].contains(&0) {
            return Err(Error::shape(
                "avg_pool",
                format!("needs [B, C, …] with something to average, got {:?}", self.shape()),
            ));
        }
        let dims: Vec<isize> = (2..self.rank() as isize).collect();
        self.mean(&dims, false)
    }
    /// `[B, C, T]` as images of height 1, and back.
    fn flat(&self, op: &'static str, f: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let &[b, c, t] = self.shape() else {
            return Err(Error::shape(op, format!("needs [B, C, T], got {:?}", self.shape())));
        };
        let y = f(&self.reshape(&[b, c, 1, t])?)?;
        y.reshape(&[b, c, y.shape()[3]])
    }
}
