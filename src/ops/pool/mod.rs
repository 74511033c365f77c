//! Pooling over windows of images and sequences: maximum or mean. One pass over memory; planes are processed in parallel.

pub(crate) mod cuda;

use crate::array::Array;
use crate::array::shape::Dims;
use crate::autograd::{Case, Cotangents, Differentiable, Gen, NO_PARAMS, OpInfo, Owner, Rule, Whose, one};
use crate::base::{DType, Element, Error, Float, Result};
use crate::device::cpu::par::{GRAIN, par_rows2, par_units};
use crate::device::spans;
use crate::kernels::{Half, dispatch};
use crate::ops::conv::{Conv, Sides};
use crate::{Tensor, with_float};
use smallvec::SmallVec;
use std::ops::Range;
use std::sync::Arc;

/// The windows of a pooling over `N` directions. A size alone, `2` or `[2, 3]`, gives windows that do not overlap: their stride is their
/// size, as in PyTorch.
///
/// ```
/// use prismgrad::{DType, Tensor, ops::pool::Window};
/// # fn main() -> prismgrad::Result<()> {
/// let x = Tensor::ones(&[1, 3, 8, 8], DType::F32);
/// assert_eq!(x.max_pool2d(2)?.shape(), [1, 3, 4, 4]);
/// assert_eq!(x.avg_pool2d(Window::new(3).stride(2).padding(1))?.shape(), [1, 3, 4, 4]);
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Window<const N: usize> {
    size: Sides<N>,
    stride: Sides<N>,
    padding: Sides<N>,
}

impl<const N: usize> Window<N> {
    /// Windows of this size that do not overlap, without padding.
    pub fn new(size: impl Into<Sides<N>>) -> Window<N> {
        let size = size.into();
        Window { size, stride: size, padding: Sides([0; N]) }
    }
    /// The same windows with this stride.
    pub fn stride(self, stride: impl Into<Sides<N>>) -> Window<N> {
        Window { stride: stride.into(), ..self }
    }
    /// The same windows over an input with this padding on each side, at most half the window.
    pub fn padding(self, padding: impl Into<Sides<N>>) -> Window<N> {
        Window { padding: padding.into(), ..self }
    }
}

impl<const N: usize> From<usize> for Window<N> {
    fn from(size: usize) -> Self {
        Window::new(size)
    }
}

impl<const N: usize> From<[usize; N]> for Window<N> {
    fn from(size: [usize; N]) -> Self {
        Window::new(size)
    }
}

impl Window<1> {
    /// The same windows over images of height 1.
    fn flat(self) -> Window<2> {
        Window {
            size: Sides(self.size.pair(1)),
            stride: Sides(self.stride.pair(1)),
            padding: Sides(self.padding.pair(0)),
        }
    }
}

/// A pooling method over windows.
type Pool = fn(&Tensor, Window<2>) -> Result<Tensor>;

fn case(g: &mut Gen, f: Pool) -> Result<Case> {
    let s = [g.extent(0, 2), g.extent(0, 2), g.extent(3, 5), g.extent(3, 5)];
    let (kernel, stride) = ([g.size(1, 3), g.size(1, 3)], [g.size(1, 3), g.size(1, 3)]);
    let padding = [g.size(0, kernel[0] / 2), g.size(0, kernel[1] / 2)];
    Ok(Case::new(vec![g.distinct(&s)], move |t| f(&t[0], Window::new(kernel).stride(stride).padding(padding))))
}

static MAX_POOL: OpInfo = OpInfo {
    name: "max_pool",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[|g| case(g, |x, windows| x.max_pool2d(windows))],
};
static AVG_POOL: OpInfo = OpInfo {
    name: "avg_pool",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[
        |g| case(g, |x, windows| x.avg_pool2d(windows)),
        |g| {
            let s = [g.extent(0, 2), g.extent(0, 2), g.extent(1, 5), g.extent(1, 5)];
            let out = [g.extent(1, 4), g.extent(1, 4)];
            Ok(Case::new(vec![g.array(&s)], move |t| t[0].adaptive_avg_pool2d(out)))
        },
    ],
};

/// The registry entries of this family.
pub static OPS: &[&OpInfo] = &[&MAX_POOL, &AVG_POOL];

/// The windows of an output: for each output line and column the range of the input, and the divisor of the mean if it is constant.
#[derive(Clone)]
struct Grid {
    size: [usize; 2],
    lines: Arc<Vec<Range<usize>>>,
    columns: Arc<Vec<Range<usize>>>,
    divisor: Option<usize>,
    /// The same windows in the form that the kernels take.
    pool: cuda::Pool,
}

impl Grid {
    /// Sliding windows, clipped at the borders.
    fn sliding(op: &'static str, size: [usize; 2], windows: Window<2>) -> Result<Grid> {
        let Window { size: Sides(kernel), stride: Sides(stride), padding: Sides(padding) } = windows;
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
    /// Windows of nearly equal size that cover the input in `out` ranges.
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
    /// Planes of one parallel piece.
    fn grain(&self) -> usize {
        (GRAIN / self.area().max(self.places()).max(1)).max(1)
    }
    /// Runs `f(output position, input lines, input columns)` for all output positions.
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

/// The shape `[B, C, H, W]`, or an error.
fn image(op: &'static str, x: &Tensor) -> Result<[usize; 4]> {
    x.dtype().expect_float(op)?;
    match x.shape() {
        &[b, c, h, w] => Ok([b, c, h, w]),
        other => Err(Error::shape(op, format!("needs [B, C, H, W], got {other:?}"))),
    }
}

struct AverageBack {
    grid: Grid,
    shape: Dims,
}

impl Rule for AverageBack {
    fn info(&self) -> &'static OpInfo {
        &AVG_POOL
    }
    fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
        one(y.planes(&self.shape))
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        let (grid, shape) = (&self.grid, &self.shape);
        let dx = dispatch(
            [grad.contiguous()],
            Half::Native,
            |[g]| {
                let mut dx = Array::zeros(shape, g.dtype());
                let (area, places, width) = (grid.area(), grid.places(), grid.size[1]);
                with_float!("avg_pool", g.dtype(), |T| {
                    let g = g.as_slice::<T>()?;
                    par_units(dx.fresh_mut::<T>(), area, grid.grain(), |planes, dx| {
                        for (n, d) in planes.zip(dx.chunks_exact_mut(area)) {
                            let g = &g[n * places..(n + 1) * places];
                            grid.each(|o, l, c| {
                                let g = g[o] * grid.scale::<T>(l, c);
                                for i in l.clone() {
                                    d[i * width + c.start..i * width + c.end].iter_mut().for_each(|d| *d += g);
                                }
                            });
                        }
                    });
                    Ok(dx)
                })
            },
            |gpu, [g]| cuda::average_grad(gpu, &g, &grid.pool, shape),
        )?;
        back.input(0, dx);
        Ok(())
    }
}

fn average(x: &Tensor, grid: Grid) -> Result<Tensor> {
    let _op = spans::op("avg_pool");
    let [b, c, _, width] = image("avg_pool", x)?;
    let out = [b, c, grid.lines.len(), grid.columns.len()];
    let (area, places) = (grid.area(), grid.places());
    let y = dispatch(
        [x.array().contiguous()],
        Half::Native,
        |[x]| {
            let mut y = Array::uninit(&out, x.dtype());
            with_float!("avg_pool", x.dtype(), |T| {
                let x = x.as_slice::<T>()?;
                par_units(y.fresh_mut::<T>(), places, grid.grain(), |planes, y| {
                    for (n, y) in planes.zip(y.chunks_exact_mut(places)) {
                        let x = &x[n * area..(n + 1) * area];
                        grid.each(|o, l, c| {
                            let line = |i: usize| &x[i * width + c.start..i * width + c.end];
                            let sum: f64 = l.clone().flat_map(line).map(|x| x.to_f64()).sum();
                            y[o] = T::from_f64(sum * grid.scale::<f64>(l, c));
                        });
                    }
                });
                Ok(y)
            })
        },
        |gpu, [x]| cuda::average(gpu, &x, &grid.pool, &out),
    )?;
    Ok(Tensor::record(y, &[x], &[], || AverageBack { grid, shape: x.shape().into() }))
}

struct LargestBack {
    index: Array,
    grid: Grid,
    shape: Dims,
}

impl Rule for LargestBack {
    fn info(&self) -> &'static OpInfo {
        &MAX_POOL
    }
    fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
        one(y.planes(&self.shape))
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        let shape = &self.shape;
        let dx = dispatch(
            [grad.contiguous(), self.index.clone()],
            Half::Native,
            |[g, index]| {
                let mut dx = Array::zeros(shape, g.dtype());
                let (area, places) = (shape[2] * shape[3], self.grid.places());
                with_float!("max_pool", g.dtype(), |T| {
                    let d = dx.fresh_mut::<T>();
                    for (o, (&g, &at)) in g.as_slice::<T>()?.iter().zip(index.as_slice::<u32>()?).enumerate() {
                        d[o / places * area + at as usize] += g;
                    }
                    Ok(dx)
                })
            },
            |gpu, [g, index]| cuda::largest_grad(gpu, &g, &index, &self.grid.pool, shape),
        )?;
        back.input(0, dx);
        Ok(())
    }
}

fn largest(x: &Tensor, grid: Grid) -> Result<Tensor> {
    let _op = spans::op("max_pool");
    let [b, c, _, width] = image("max_pool", x)?;
    let out = [b, c, grid.lines.len(), grid.columns.len()];
    let (area, places) = (grid.area(), grid.places());
    let (y, index) = dispatch(
        [x.array().contiguous()],
        Half::Native,
        |[x]| {
            let (mut y, mut index) = (Array::uninit(&out, x.dtype()), Array::uninit(&out, DType::U32));
            with_float!("max_pool", x.dtype(), |T| {
                let x = x.as_slice::<T>()?;
                let both = (y.fresh_mut::<T>(), index.fresh_mut::<u32>());
                par_rows2(both, (places, places), grid.grain(), |n, y, at| {
                    let x = &x[n * area..(n + 1) * area];
                    grid.each(|o, l, c| {
                        let mut best = l.start * width + c.start;
                        for i in l.clone() {
                            for k in i * width + c.start..i * width + c.end {
                                // NaN counts as the largest, so that it propagates.
                                if x[k] > x[best] || (x[k].is_nan() && !x[best].is_nan()) {
                                    best = k;
                                }
                            }
                        }
                        (y[o], at[o]) = (x[best], best as u32);
                    });
                });
                Ok((y, index))
            })
        },
        |gpu, [x]| cuda::largest(gpu, &x, &grid.pool, &out),
    )?;
    Ok(Tensor::record(y, &[x], &[], || LargestBack { index, grid, shape: x.shape().into() }))
}

impl Tensor {
    /// Maximum of each window of `[B, C, H, W]`; padding is never the maximum. The gradient goes to the first of equal values.
    /// `x.max_pool2d(2)?` halves both sides; other windows are given by a [`Window`].
    pub fn max_pool2d(&self, windows: impl Into<Window<2>>) -> Result<Tensor> {
        let [_, _, h, w] = image("max_pool", self)?;
        largest(self, Grid::sliding("max_pool", [h, w], windows.into())?)
    }
    /// Maximum of each window of `[B, C, T]`.
    pub fn max_pool1d(&self, windows: impl Into<Window<1>>) -> Result<Tensor> {
        self.flat("max_pool", |x| x.max_pool2d(windows.into().flat()))
    }
    /// Mean of each window of `[B, C, H, W]`; padding counts as zeros.
    pub fn avg_pool2d(&self, windows: impl Into<Window<2>>) -> Result<Tensor> {
        let [_, _, h, w] = image("avg_pool", self)?;
        average(self, Grid::sliding("avg_pool", [h, w], windows.into())?)
    }
    /// Mean of each window of `[B, C, T]`; padding counts as zeros.
    pub fn avg_pool1d(&self, windows: impl Into<Window<1>>) -> Result<Tensor> {
        self.flat("avg_pool", |x| x.avg_pool2d(windows.into().flat()))
    }
    /// Means over `out` windows that cover `[B, C, H, W]`; the result is `[B, C, out[0], out[1]]`. Window o of an axis of size n spans
    /// ⌊o·n/out⌋ to ⌈(o + 1)·n/out⌉.
    pub fn adaptive_avg_pool2d(&self, out: [usize; 2]) -> Result<Tensor> {
        let [_, _, h, w] = image("avg_pool", self)?;
        if h * w == 0 || out.contains(&0) {
            return Err(Error::shape("avg_pool", format!("{out:?} windows of {:?}: nothing to average", self.shape())));
        }
        average(self, Grid::adaptive([h, w], out))
    }
    /// Means over `out` windows that cover `[B, C, T]`; the result is `[B, C, out]`.
    pub fn adaptive_avg_pool1d(&self, out: usize) -> Result<Tensor> {
        self.flat("avg_pool", |x| x.adaptive_avg_pool2d([1, out]))
    }
    /// Mean over all positions: `[B, C, …]` to `[B, C]`.
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
    /// Applies `f` to `[B, C, T]` as images of height 1, and converts the result back.
    fn flat(&self, op: &'static str, f: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let &[b, c, t] = self.shape() else {
            return Err(Error::shape(op, format!("needs [B, C, T], got {:?}", self.shape())));
        };
        let y = f(&self.reshape(&[b, c, 1, t])?)?;
        y.reshape(&[b, c, y.shape()[3]])
    }
}
