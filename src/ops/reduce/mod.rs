//! Reductions (sums, means, extremes, logsumexp), scans (cumsum) and sorts (topk, sort).

pub(crate) mod cuda;

use crate::array::shape::Dims;
use crate::array::{Array, shape};
use crate::autograd::{Case, Cotangents, Differentiable, Gen, NO_PARAMS, OpInfo, Owner, Rule, Whose, one};
use crate::base::{DType, Element, Error, Float, Result};
use crate::device::spans;
use crate::kernels::{Half, dispatch, elementwise as ew, sums as cpu};
use crate::ops::reduce::cuda::Extreme;
use crate::{Tensor, with_computed, with_dtype, with_float};
use smallvec::SmallVec;

/// Sums the dimensions along which `a` was broadcast from `shape`.
pub(crate) fn sum_to(a: &Array, shape: &[usize]) -> Result<Array> {
    if a.shape() == shape {
        return Ok(a.clone());
    }
    let lead = a.rank() - shape.len();
    let dims: Vec<usize> = (0..a.rank()).filter(|&d| d < lead || (shape[d - lead] == 1 && a.shape()[d] != 1)).collect();
    sum_dims(a, &dims)?.reshape(shape)
}

/// Sums over the listed dimensions, which are removed from the shape.
pub(crate) fn sum_dims(a: &Array, dims: &[usize]) -> Result<Array> {
    sum_scaled(a, dims, 1.0)
}

/// `scale` times the sum over the listed dimensions. Only the product is rounded to the dtype, not the sum: the mean of 100,000 f16 values
/// fits f16, but their sum does not.
fn sum_scaled(a: &Array, dims: &[usize], scale: f64) -> Result<Array> {
    let kept: Vec<usize> = (0..a.rank()).filter(|d| !dims.contains(d)).collect();
    let out_shape: Dims = kept.iter().map(|&d| a.shape()[d]).collect();
    let (rows, cols) = (shape::numel(&out_shape), dims.iter().map(|&d| a.shape()[d]).product::<usize>());
    // Leading dimensions of a contiguous array are column sums, computed without moving data.
    let leading = !kept.is_empty() && dims.iter().enumerate().all(|(i, &d)| i == d) && a.is_contiguous();
    a.dtype().expect_float("sum")?;
    let order: Vec<usize> = kept.iter().chain(dims).copied().collect();
    let a = if leading { a.clone() } else { a.permute(&order)?.contiguous() };
    dispatch(
        [a],
        Half::Bf16,
        |[a]| {
            let mut out = Array::uninit(&out_shape, a.dtype());
            with_computed!("sum", a.dtype(), |T| {
                match leading {
                    true => cpu::sum_columns::<T>(a.as_slice::<T>()?, (cols, rows), scale, out.fresh_mut::<T>()),
                    false => cpu::sum_rows::<T>(a.as_slice::<T>()?, (rows, cols), scale, out.fresh_mut::<T>()),
                }
                Ok(out)
            })
        },
        |gpu, [a]| match leading {
            true => cpu::cuda::sum_columns(gpu, &a, (cols, rows), scale, &out_shape),
            false => cpu::cuda::sum_rows(gpu, &a, (rows, cols), scale, &out_shape),
        },
    )
}

/// The dimensions to reduce: resolved, sorted, without repeats; all of them if none are listed.
fn resolve(op: &'static str, dims: &[isize], rank: usize) -> Result<Vec<usize>> {
    let mut out = dims.iter().map(|&d| shape::dim(op, d, rank)).collect::<Result<Vec<_>>>()?;
    if dims.is_empty() {
        out = (0..rank).collect();
    }
    out.sort_unstable();
    if out.windows(2).any(|w| w[0] == w[1]) {
        return Err(Error::invalid(op, format!("dimensions {dims:?} name one twice")));
    }
    Ok(out)
}

/// `shape` with the reduced dimensions set to 1.
fn with_ones(shape: &[usize], dims: &[usize]) -> Dims {
    shape.iter().enumerate().map(|(d, &s)| if dims.contains(&d) { 1 } else { s }).collect()
}

fn case(g: &mut Gen, f: fn(&Tensor, &[isize], bool) -> Result<Tensor>) -> Result<Case> {
    let rank = g.size(1, 3);
    let shape = g.shape(rank);
    let dims: Vec<isize> = (0..rank as isize).filter(|_| g.chance(0.5)).collect();
    let keep = g.chance(0.5);
    // Distinct values, so that maxima have no ties.
    let x = g.distinct(&shape);
    Ok(Case::new(vec![x], move |t| f(&t[0], &dims, keep)))
}

static SUM: OpInfo = OpInfo {
    name: "sum",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[
        |g| case(g, Tensor::sum),
        |g| case(g, Tensor::mean),
        |g| case(g, Tensor::var),
        // Rows and columns so long that they are summed in parts.
        |g| {
            let (rows, columns) = ([g.size(1, 2), g.size(16_400, 16_500)], [g.size(300, 700), g.size(1, 3)]);
            let inputs = vec![g.array(&rows).contiguous(), g.array(&columns).contiguous()];
            Ok(Case::new(inputs, |t| {
                let (a, b) = (t[0].sum(&[1], false)?.sum(&[0], false)?, t[1].sum(&[0], false)?);
                a.add(&b)?.mul_scalar(0.01)
            }))
        },
    ],
};
static MAX: OpInfo = OpInfo {
    name: "max",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[|g| case(g, Tensor::max), |g| case(g, Tensor::min)],
};
static LOGSUMEXP: OpInfo = OpInfo {
    name: "logsumexp",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[|g| case(g, Tensor::logsumexp)],
};
static CUMSUM: OpInfo = OpInfo {
    name: "cumsum",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[
        |g| {
            let (shape, d) = ([g.extent(0, 4), g.extent(0, 4), g.extent(2, 4)], g.size(0, 1) as isize);
            Ok(Case::new(vec![g.array(&shape)], move |t| t[0].cumsum(d)))
        },
        |g| {
            let shape = g.shape(2);
            Ok(Case::new(vec![g.array(&shape)], |t| t[0].cumsum(-1)))
        },
    ],
};
static SORT: OpInfo = OpInfo {
    name: "sort",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[
        |g| {
            let shape = g.shape(2);
            let d = g.size(0, 1) as isize;
            let down = g.chance(0.5);
            Ok(Case::new(vec![g.distinct(&shape)], move |t| Ok(t[0].sort(d, down)?.0)))
        },
        |g| {
            let shape = g.shape(2);
            let k = g.size(shape[1].min(1), shape[1]);
            Ok(Case::new(vec![g.distinct(&shape)], move |t| Ok(t[0].topk(k, -1)?.0)))
        },
        // A row so long that it is sorted in parts, which are merged.
        |g| {
            let (n, mut k) = (g.size(4100, 4200), g.size(0, 1000));
            let x = g.array_of(&[1, n], |_| {
                k += 1;
                (k * 7919 % 10_007) as f64 * 0.01
            });
            Ok(Case::new(vec![x], |t| Ok(t[0].sort(-1, true)?.0)))
        },
    ],
};
static ARGMAX: OpInfo = OpInfo {
    name: "argmax",
    differentiable: Differentiable::No("the result is an index"),
    factor: NO_PARAMS,
    cases: &[|g| {
        let shape = g.shape(2);
        let d = g.size(0, 1) as isize;
        Ok(Case::new(vec![g.distinct(&shape)], move |t| t[0].argmax(d)))
    }],
};

/// The registry entries of this family.
pub static OPS: &[&OpInfo] = &[&SUM, &MAX, &LOGSUMEXP, &CUMSUM, &SORT, &ARGMAX];

struct SumBack {
    shape: Dims,
    ones: Dims,
    scale: f64,
}
impl Rule for SumBack {
    fn info(&self) -> &'static OpInfo {
        &SUM
    }
    fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
        one(y.reading(&self.ones).along(&self.shape, Some))
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        let grad = match self.scale {
            1.0 => grad,
            scale => Tensor::new(grad).mul_scalar(scale)?.into_array(),
        };
        back.input(0, grad.reshape(&self.ones)?.expand(&self.shape)?);
        Ok(())
    }
}

/// The sum over `dims` (all if empty), times `scale` of the number of elements summed.
fn scaled(
    t: &Tensor,
    op: &'static str,
    dims: &[isize],
    keep: bool,
    scale: impl FnOnce(usize) -> f64,
) -> Result<Tensor> {
    let _op = spans::op("sum");
    t.dtype().expect_float(op)?;
    let dims = resolve(op, dims, t.rank())?;
    let ones = with_ones(t.shape(), &dims);
    let scale = scale(dims.iter().map(|&d| t.shape()[d]).product());
    let mut y = sum_scaled(t.array(), &dims, scale)?;
    if keep {
        y = y.reshape(&ones)?;
    }
    let shape: Dims = t.shape().into();
    Ok(Tensor::record(y, &[t], &[], || SumBack { shape, ones, scale }))
}

impl Tensor {
    /// Sum over `dims` (all if empty); with `keep` the summed dimensions stay with size 1. Deterministic: the order of additions depends
    /// only on the shape.
    pub fn sum(&self, dims: &[isize], keep: bool) -> Result<Tensor> {
        scaled(self, "sum", dims, keep, |_| 1.0)
    }
    /// Sum of all elements; the result has shape `[]`.
    pub fn sum_all(&self) -> Result<Tensor> {
        self.sum(&[], false)
    }
    /// Mean of all elements; the result has shape `[]`.
    pub fn mean_all(&self) -> Result<Tensor> {
        self.mean(&[], false)
    }
    /// Mean over `dims` (all if empty). It is rounded to the dtype once, so that a 16-bit mean does not overflow where the sum would.
    pub fn mean(&self, dims: &[isize], keep: bool) -> Result<Tensor> {
        scaled(self, "mean", dims, keep, |n| 1.0 / n as f64)
    }
    /// Population variance over `dims` (all if empty): mean of (x − mean)². For 16-bit dtypes it is computed in f32.
    pub fn var(&self, dims: &[isize], keep: bool) -> Result<Tensor> {
        if self.dtype().is_half() {
            return self.cast(DType::F32)?.var(dims, keep)?.cast(self.dtype());
        }
        self.sub(&self.mean(&all_if_empty(dims, self.rank()), true)?)?.square()?.mean(dims, keep)
    }
    /// Maximum over `dims` (all if empty). The gradient goes to the first of equal values.
    pub fn max(&self, dims: &[isize], keep: bool) -> Result<Tensor> {
        extreme(self, dims, keep, false)
    }
    /// Minimum over `dims` (all if empty). The gradient goes to the first of equal values.
    pub fn min(&self, dims: &[isize], keep: bool) -> Result<Tensor> {
        extreme(self, dims, keep, true)
    }
    /// Index (u32) of the maximum along `dim`; the first of equal values. Not differentiable.
    pub fn argmax(&self, dim: isize) -> Result<Tensor> {
        let _op = spans::op("argmax");
        self.dtype().expect_float("argmax")?;
        let d = shape::dim("argmax", dim, self.rank())?;
        let (moved, kept) = rows_last("argmax", self.array(), &[d])?;
        let cols = self.shape()[d];
        let index = dispatch(
            [moved],
            Half::Native,
            |[x]| {
                let best =
                    with_float!("argmax", x.dtype(), |T| Ok(argbest(x.as_slice::<T>()?, cols, |a: T, b| a > b)))?;
                Array::from_slice(&best, &kept)
            },
            |gpu, [x]| Ok(cuda::extreme(gpu, &x, (shape::numel(&kept), cols), Extreme::ArgMax, &kept)?.1),
        )?;
        Ok(Tensor::new(index))
    }
    /// ln Σ exp x over `dims` (all if empty), without overflow.
    pub fn logsumexp(&self, dims: &[isize], keep: bool) -> Result<Tensor> {
        let _op = spans::op("logsumexp");
        self.dtype().expect_float("logsumexp")?;
        struct Back {
            x: Array,
            y: Array,
            ones: Dims,
        }
        impl Rule for Back {
            fn info(&self) -> &'static OpInfo {
                &LOGSUMEXP
            }
            fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
                one(y.reading(&self.ones).along(self.x.shape(), Some))
            }
            fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
                let (y, grad) = (self.y.reshape(&self.ones)?, grad.reshape(&self.ones)?);
                let dx = dispatch(
                    [self.x.clone(), y, grad],
                    Half::Native,
                    |[x, y, grad]| {
                        with_float!("logsumexp", x.dtype(), |T| {
                            let p = ew::zip::<T, T, T>("logsumexp", &x, &y, |x, y| (x - y).exp())?;
                            ew::zip_owned::<T, T>("logsumexp", p, &grad.expand(x.shape())?, |p, g| p * g)
                        })
                    },
                    |gpu, [x, y, grad]| {
                        cuda::logsumexp_grad(gpu, &x, &y.expand(x.shape())?, &grad.contiguous().expand(x.shape())?)
                    },
                )?;
                back.input(0, dx);
                Ok(())
            }
        }
        let dims = resolve("logsumexp", dims, self.rank())?;
        let ones = with_ones(self.shape(), &dims);
        let (moved, kept) = rows_last("logsumexp", self.array(), &dims)?;
        let cols: usize = dims.iter().map(|&d| self.shape()[d]).product();
        let y = dispatch(
            [moved],
            Half::Native,
            |[x]| {
                let mut out = Array::uninit(&kept, x.dtype());
                with_float!("logsumexp", x.dtype(), |T| {
                    let x = x.as_slice::<T>()?;
                    out.fresh_mut::<T>().iter_mut().enumerate().for_each(|(r, o)| {
                        let row = &x[r * cols..(r + 1) * cols];
                        let m = row.iter().fold(T::NEG_INFINITY, |m, &x| m.larger(x));
                        let s: f64 = row.iter().map(|&x| (x - m).exp().to_f64()).sum();
                        *o = if m.finite() { m + T::from_f64(s).ln() } else { m };
                    });
                    Ok(out)
                })
            },
            |gpu, [x]| cuda::logsumexp(gpu, &x, (shape::numel(&kept), cols), &kept),
        )?;
        let (x, saved) = (self.array().clone(), y.clone());
        let y = if keep { y.reshape(&ones)? } else { y };
        Ok(Tensor::record(y, &[self], &[], || Back { x, y: saved, ones }))
    }
    /// Cumulative sum along `dim`.
    pub fn cumsum(&self, dim: isize) -> Result<Tensor> {
        let _op = spans::op("cumsum");
        self.dtype().expect_float("cumsum")?;
        struct Back(usize);
        impl Rule for Back {
            fn info(&self) -> &'static OpInfo {
                &CUMSUM
            }
            fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
                one(y.mixing(self.0, y.shape))
            }
            fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
                back.input(0, scan(&grad, self.0, true)?);
                Ok(())
            }
        }
        let d = shape::dim("cumsum", dim, self.rank())?;
        let y = scan(self.array(), d, false)?;
        Ok(Tensor::record(y, &[self], &[], || Back(d)))
    }
    /// The `k` largest values along `dim`, in descending order, and their indices (u32). Equal values keep their order.
    pub fn topk(&self, k: usize, dim: isize) -> Result<(Tensor, Tensor)> {
        let _op = spans::op("sort");
        let d = shape::dim("topk", dim, self.rank())?;
        if k > self.shape()[d] {
            return Err(Error::invalid("topk", format!("k = {k} of dimension {d} with size {}", self.shape()[d])));
        }
        sorted(self, d, k, true)
    }
    /// The values sorted along `dim`, and their indices (u32). The sort is stable; NaN is last.
    pub fn sort(&self, dim: isize, descending: bool) -> Result<(Tensor, Tensor)> {
        let _op = spans::op("sort");
        let d = shape::dim("sort", dim, self.rank())?;
        sorted(self, d, self.shape()[d], descending)
    }
}

fn all_if_empty(dims: &[isize], rank: usize) -> Vec<isize> {
    if dims.is_empty() { (0..rank as isize).collect() } else { dims.to_vec() }
}

/// The array with `dims` moved last, contiguous, and the shape of the remaining dimensions.
fn rows_last(op: &'static str, a: &Array, dims: &[usize]) -> Result<(Array, Dims)> {
    let kept: Vec<usize> = (0..a.rank()).filter(|d| !dims.contains(d)).collect();
    let order: Vec<usize> = kept.iter().chain(dims).copied().collect();
    let out: Dims = kept.iter().map(|&d| a.shape()[d]).collect();
    if dims.iter().any(|&d| a.shape()[d] == 0) && shape::numel(&out) > 0 {
        return Err(Error::shape(op, format!("nothing to reduce in {:?}", a.shape())));
    }
    Ok((a.permute(&order)?.contiguous(), out))
}

fn argbest<T: Float>(x: &[T], cols: usize, better: impl Fn(T, T) -> bool) -> Vec<u32> {
    x.chunks_exact(cols.max(1))
        .map(|row| (1..cols).fold(0, |best, i| if better(row[i], row[best]) { i } else { best }) as u32)
        .collect()
}

/// Moves `grad` of the selected elements back to their original positions: rows of `cols` elements, `k` selected from each.
fn unpick(grad: &Array, index: &Array, k: usize, cols: usize, order: &[usize], shape: &[usize]) -> Result<Array> {
    let permuted: Dims = order.iter().map(|&d| shape[d]).collect();
    let dx = dispatch(
        [grad.contiguous(), index.clone()],
        Half::Move,
        |[grad, index]| {
            let mut dx = Array::zeros(&permuted, grad.dtype());
            with_dtype!(grad.dtype(), |T| {
                let (g, d) = (grad.as_slice::<T>()?, dx.fresh_mut::<T>());
                for (i, (&g, &at)) in g.iter().zip(index.as_slice::<u32>()?).enumerate() {
                    d[(i / k) * cols + at as usize] = g;
                }
            });
            Ok(dx)
        },
        |gpu, [grad, index]| cuda::unpick(gpu, &grad, &index, (k, cols), &permuted),
    )?;
    let mut back = vec![0; order.len()];
    order.iter().enumerate().for_each(|(i, &d)| back[d] = i);
    dx.permute(&back)
}

fn extreme(t: &Tensor, dims: &[isize], keep: bool, smallest: bool) -> Result<Tensor> {
    let _op = spans::op("max");
    t.dtype().expect_float("max")?;
    struct Back {
        index: Array,
        cols: usize,
        order: Vec<usize>,
        shape: Dims,
    }
    impl Rule for Back {
        fn info(&self) -> &'static OpInfo {
            &MAX
        }
        fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
            // The reduced dimensions are the last of the order.
            let (mut ones, mut left) = (self.shape.clone(), self.cols);
            for &d in self.order.iter().rev() {
                if left > 1 {
                    left /= self.shape[d].max(1);
                    ones[d] = 1;
                }
            }
            one(y.reading(&ones).along(&self.shape, Some))
        }
        fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
            back.input(0, unpick(&grad, &self.index, 1, self.cols, &self.order, &self.shape)?);
            Ok(())
        }
    }
    let dims = resolve("max", dims, t.rank())?;
    let ones = with_ones(t.shape(), &dims);
    let (moved, kept) = rows_last("max", t.array(), &dims)?;
    let cols: usize = dims.iter().map(|&d| t.shape()[d]).product();
    let (mut y, index) = dispatch(
        [moved],
        Half::Native,
        |[x]| {
            with_float!("max", x.dtype(), |T| {
                let x = x.as_slice::<T>()?;
                // NaN counts as better, so that it propagates.
                let better = |a: T, b: T| (if smallest { a < b } else { a > b }) || (a.is_nan() && !b.is_nan());
                let index = argbest(x, cols, better);
                let best: Vec<T> = index.iter().enumerate().map(|(r, &i)| x[r * cols + i as usize]).collect();
                Ok((Array::from_slice(&best, &kept)?, Array::from_slice(&index, &kept)?))
            })
        },
        |gpu, [x]| {
            let which = if smallest { Extreme::Smallest } else { Extreme::Largest };
            cuda::extreme(gpu, &x, (shape::numel(&kept), cols), which, &kept)
        },
    )?;
    if keep {
        y = y.reshape(&ones)?;
    }
    let order: Vec<usize> = (0..t.rank()).filter(|d| !dims.contains(d)).chain(dims.iter().copied()).collect();
    let shape: Dims = t.shape().into();
    Ok(Tensor::record(y, &[t], &[], || Back { index, cols, order, shape }))
}

/// Cumulative sums along dimension `d`, from the end if `reverse`.
fn scan(a: &Array, d: usize, reverse: bool) -> Result<Array> {
    let (n, inner) = (a.shape()[d], a.shape()[d + 1..].iter().product::<usize>());
    let outer = a.shape()[..d].iter().product();
    dispatch(
        [a.clone()],
        Half::Native,
        |[a]| {
            let mut y = a.copy();
            with_float!("cumsum", a.dtype(), |T| {
                // Cumulative sums are f64, and rounded when they are written.
                let mut sums = vec![0f64; inner];
                for block in y.fresh_mut::<T>().chunks_exact_mut((n * inner).max(1)) {
                    sums.fill(0.0);
                    for i in 0..n {
                        let at = if reverse { n - 1 - i } else { i };
                        for (x, s) in block[at * inner..(at + 1) * inner].iter_mut().zip(&mut sums) {
                            *s += x.to_f64();
                            *x = T::from_f64(*s);
                        }
                    }
                }
                Ok(y)
            })
        },
        |gpu, [a]| cuda::cumsum(gpu, &a, (outer, n, inner), reverse),
    )
}

fn sorted(t: &Tensor, d: usize, k: usize, descending: bool) -> Result<(Tensor, Tensor)> {
    t.dtype().expect_float("sort")?;
    struct Back {
        index: Array,
        k: usize,
        order: Vec<usize>,
        shape: Dims,
    }
    impl Rule for Back {
        fn info(&self) -> &'static OpInfo {
            &SORT
        }
        fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
            one(y.mixing(self.order[self.order.len() - 1], &self.shape))
        }
        fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
            let cols = self.shape[self.order[self.order.len() - 1]];
            let grad = grad.permute(&self.order)?;
            back.input(0, unpick(&grad, &self.index, self.k, cols, &self.order, &self.shape)?);
            Ok(())
        }
    }
    let order: Vec<usize> = (0..t.rank()).filter(|&i| i != d).chain([d]).collect();
    let moved = t.array().permute(&order)?.contiguous();
    let cols = t.shape()[d];
    let mut out: Dims = moved.shape().into();
    out[t.rank() - 1] = k;
    let (values, index) = dispatch(
        [moved],
        Half::Native,
        |[x]| {
            with_float!("sort", x.dtype(), |T| {
                let (mut index, mut values) = (Vec::new(), Vec::new());
                for row in x.as_slice::<T>()?.chunks_exact(cols.max(1)) {
                    let mut at: Vec<u32> = (0..cols as u32).collect();
                    at.sort_by(|&i, &j| {
                        let (a, b) = (row[i as usize], row[j as usize]);
                        let by_value = if descending { b.partial_cmp(&a) } else { a.partial_cmp(&b) };
                        by_value.unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
                    });
                    at.truncate(k);
                    values.extend(at.iter().map(|&i| row[i as usize]));
                    index.extend(at);
                }
                Ok((Array::from_slice(&values, &out)?, Array::from_slice(&index, &out)?))
            })
        },
        |gpu, [x]| {
            let rows = x.numel().checked_div(cols).unwrap_or(0);
            cuda::sort(gpu, &x, (rows, cols, k), descending, &out)
        },
    )?;
    let ids = index.clone();
    let mut back = vec![0; order.len()];
    order.iter().enumerate().for_each(|(i, &o)| back[o] = i);
    let shape: Dims = t.shape().into();
    let y = values.permute(&back)?;
    Ok((Tensor::record(y, &[t], &[], || Back { index, k, order, shape }), Tensor::new(ids.permute(&back)?)))
}
