//! Convolutions over images and sequences, by unfolding windows into rows.
//!
//! y = W·unfold(x) + b. FLOPs 2·B·L·Cout·(Cin/groups)·k² for L output positions. After unfolding, the weight's gradient is an outer factor
//! (grouped outer if groups > 1), so that per-sample gradients cost what a linear layer's do. The price is memory: if the weight is
//! trained, the unfolded input is kept for its gradient, k²/stride² times the size of the input. If no gradient is needed, images are
//! unfolded one at a time into scratch memory.

pub(crate) mod cpu;
pub(crate) mod cuda;

use crate::array::Array;
use crate::array::shape::Dims;
use crate::autograd::{
    Case, Cotangents, Differentiable, Factor, FactorRule, Gen, Groups, NO_PARAMS, OpInfo, Owner, Rule, Whose,
    is_recording, one,
};
use crate::base::{Error, Float, Result};
use crate::device::cpu::par::par_units;
use crate::device::spans;
use crate::kernels::elementwise::cuda as gpu_ew;
use crate::kernels::gemm::{Mat, cuda as gpu_gemm, matmul};
use crate::kernels::{Exact, Half, dispatch};
use crate::ops::conv::cpu::Window;
use crate::{Param, Samples, Tensor, with_dtype, with_float};
use smallvec::SmallVec;

/// Sizes along `N` directions, (height, width) for images: one number for all, or one for each.
///
/// ```
/// use prismgrad::ops::conv::Sides;
/// assert_eq!(Sides::<2>::from(3), Sides::from([3, 3]));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sides<const N: usize>(pub [usize; N]);

impl<const N: usize> From<usize> for Sides<N> {
    fn from(n: usize) -> Self {
        Sides([n; N])
    }
}

impl<const N: usize> From<[usize; N]> for Sides<N> {
    fn from(sides: [usize; N]) -> Self {
        Sides(sides)
    }
}

impl<const N: usize> Sides<N> {
    /// As a pair, which the ops take: a sequence is an image of height 1, for which `other` is the neutral value of this kind of size.
    pub(crate) fn pair(self, other: usize) -> [usize; 2] {
        match self.0[..] {
            [h, w] => [h, w],
            [w] => [other, w],
            _ => [other; 2],
        }
    }
}

/// The geometry of a sliding window: (height, width) each; one-dimensional convolutions use the width.
///
/// ```
/// use prismgrad::ops::conv::Conv;
/// let c = Conv::default().stride(2).padding(1); // in both directions
/// assert_eq!((c.stride, c.padding, c.dilation, c.groups), ([2, 2], [1, 1], [1, 1], 1));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub struct Conv {
    /// Step between positions of the window.
    pub stride: [usize; 2],
    /// Zeros before and after.
    pub padding: [usize; 2],
    /// Step between the elements of a window.
    pub dilation: [usize; 2],
    /// Number of groups into which channels are divided; outputs of a group depend on inputs of the same group only.
    pub groups: usize,
}

impl Default for Conv {
    fn default() -> Self {
        Conv { stride: [1; 2], padding: [0; 2], dilation: [1; 2], groups: 1 }
    }
}

impl Conv {
    /// The same step in both directions.
    pub fn stride(self, n: usize) -> Conv {
        Conv { stride: [n; 2], ..self }
    }
    /// The same padding on all sides.
    pub fn padding(self, n: usize) -> Conv {
        Conv { padding: [n; 2], ..self }
    }
    /// The same dilation in both directions.
    pub fn dilation(self, n: usize) -> Conv {
        Conv { dilation: [n; 2], ..self }
    }
    /// Sets the number of channel groups.
    pub fn groups(self, n: usize) -> Conv {
        Conv { groups: n, ..self }
    }
    /// The same geometry along the width only, for one-dimensional data of height 1.
    fn flat(self) -> Conv {
        Conv { stride: [1, self.stride[1]], padding: [0, self.padding[1]], dilation: [1, self.dilation[1]], ..self }
    }
    /// The window over an input of `size`, or an error if it does not fit.
    pub(crate) fn window(&self, op: &'static str, size: [usize; 2], kernel: [usize; 2]) -> Result<Window> {
        if [self.stride, self.dilation, kernel].concat().contains(&0) {
            return Err(Error::invalid(
                op,
                format!("kernel {kernel:?}, stride and dilation must be at least 1: {self:?}"),
            ));
        }
        let mut out = [0; 2];
        for a in 0..2 {
            let (padded, span) = (size[a] + 2 * self.padding[a], self.dilation[a] * (kernel[a] - 1) + 1);
            if span > padded {
                let message = format!("a kernel spanning {span} over {padded} padded elements of {size:?}; pad more");
                return Err(Error::shape(op, message));
            }
            out[a] = (padded - span) / self.stride[a] + 1;
        }
        let Conv { stride, padding, dilation, .. } = *self;
        Ok(Window { size, out, kernel, stride, padding, dilation })
    }
}

/// A random convolution over images (height 1 if `flat`) with small windows.
fn case(g: &mut Gen, flat: bool) -> Result<Case> {
    let groups = g.size(1, 3);
    let (b, cin, cout) = (g.count(0, 3), groups * g.side(1, 2), groups * g.side(1, 2));
    let k = [if flat { 1 } else { g.size(1, 3) }, g.size(1, 3)];
    let conv = Conv {
        stride: [g.size(1, 2), g.size(1, 2)],
        padding: [g.size(0, 1), g.size(0, 2)],
        dilation: [g.size(1, 2), g.size(1, 2)],
        groups,
    };
    let (h, w) = (conv.dilation[0] * (k[0] - 1) + g.side(1, 3), conv.dilation[1] * (k[1] - 1) + g.side(1, 3));
    let (xs, ws) = if flat {
        (vec![b, cin, w], vec![cout, cin / groups, k[1]])
    } else {
        (vec![b, cin, h, w], vec![cout, cin / groups, k[0], k[1]])
    };
    let weight = Param::new("weight", g.array(&ws));
    let bias = g.chance(0.7).then(|| Param::new("bias", g.array(&[cout])));
    let params = std::iter::once(weight.clone()).chain(bias.clone()).collect();
    Ok(Case::new(vec![g.array(&xs)], move |t| {
        let y = if flat {
            conv1d(&t[0], &weight, bias.as_ref(), conv, None)?
        } else {
            conv2d(&t[0], &weight, bias.as_ref(), conv, None)?
        };
        y.sin()
    })
    .params(params)
    .samples(b))
}

static CONV: OpInfo = OpInfo {
    name: "conv",
    differentiable: Differentiable::Yes,
    factor: FactorRule::Kinds(&["outer", "grouped outer", "row sum"]),
    cases: &[
        |g| case(g, false),
        |g| case(g, true),
        // Several images of one sample, in any order.
        |g| {
            let (n, b, groups) = (g.extent(1, 4), g.size(1, 3), g.size(1, 2));
            let weight = Param::new("weight", g.array(&[2, 2 / groups, 2]));
            let owner: Vec<u32> = (0..n).map(|_| g.size(0, b - 1) as u32).collect();
            let samples = Samples::owners(owner.clone(), b)?;
            let pick = Array::generate(&[b, n], g.dtype(), |i| (owner[i % n] as usize == i / n) as u8 as f64);
            let params = vec![weight.clone()];
            Ok(Case::new(vec![g.array(&[n, 2, 4])], move |t| {
                let y = conv1d(&t[0], &weight, None, Conv::default().groups(groups), Some(&samples))?.sin()?;
                Tensor::new(pick.clone()).matmul(&y.reshape(&[n, 6])?)
            })
            .params(params)
            .samples(b))
        },
    ],
};
static UNFOLD: OpInfo = OpInfo {
    name: "unfold",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[|g| {
        let s = [g.extent(0, 2), g.extent(0, 3), g.extent(2, 4), g.extent(2, 4)];
        let (k, conv) = ([g.size(1, 2), g.size(1, 2)], Conv::default().stride(g.size(1, 2)).padding(g.size(0, 1)));
        Ok(Case::new(vec![g.array(&s)], move |t| t[0].unfold(k, conv)))
    }],
};
static FOLD: OpInfo = OpInfo {
    name: "fold",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[|g| {
        let (size, k) = ([g.extent(2, 4), g.extent(2, 4)], [g.size(1, 2), g.size(1, 2)]);
        let conv = Conv::default().stride(g.size(1, 2)).padding(g.size(0, 1));
        let places = conv.window("fold", size, k)?.places();
        let s = [g.extent(0, 2), places, g.extent(0, 2) * k[0] * k[1]];
        Ok(Case::new(vec![g.array(&s)], move |t| t[0].fold(size, k, conv)))
    }],
};

/// The registry entries of this family.
pub static OPS: &[&OpInfo] = &[&CONV, &UNFOLD, &FOLD];

struct Back {
    /// Unfolded input `[B·groups, positions, Cin/groups·area]`, kept if the weight is trained.
    rows: Option<Array>,
    shape: Dims,
    w: Param,
    bias: Option<Param>,
    window: Window,
    groups: usize,
    samples: Samples,
}

impl Rule for Back {
    fn info(&self) -> &'static OpInfo {
        &CONV
    }
    fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
        one(y.images(&self.shape))
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        let g = grad.contiguous();
        let (b, groups, places) = (self.shape[0], self.groups, self.window.places());
        let (channels, cout) = (self.shape[1] / groups, g.shape()[1]);
        let (each, k, blocks) = (cout / groups, channels * self.window.area(), b * groups);
        if back.needs(0) {
            let image = channels * self.window.size[0] * self.window.size[1];
            let dx = dispatch(
                [g.clone(), self.w.value()],
                Half::Widen,
                |[g, w]| {
                    let (mut dx, w) = (Array::zeros(&self.shape, g.dtype()), w.cast(g.dtype()));
                    with_float!("conv", g.dtype(), |T| {
                        let (g, w) = (g.as_slice::<T>()?, w.as_slice::<T>()?);
                        par_units(dx.fresh_mut::<T>(), image, 1, |blocks, dx| {
                            let mut rows = vec![T::ZERO; places * k];
                            for (n, dx) in blocks.zip(dx.chunks_exact_mut(image)) {
                                let gm = Mat::new(&g[n * each * places..(n + 1) * each * places], each, places);
                                let wm = Mat::new(&w[n % groups * each * k..(n % groups + 1) * each * k], each, k);
                                matmul(gm.t(), wm, false, &mut rows);
                                cpu::fold_one(&rows, channels, &self.window, dx);
                            }
                        });
                        Ok(dx)
                    })
                },
                |gpu, [g, w]| {
                    let w = w.cast(g.dtype()).reshape(&[1, groups, each, k])?.expand(&[b, groups, each, k])?;
                    let gm = g.reshape(&[b, groups, each, places])?.transpose(2, 3)?;
                    let rows = gpu_gemm::product(gpu, &gm, &w, gpu_gemm::Epilogue::default())?.0;
                    cuda::fold(gpu, &rows, (blocks, channels), &self.window, &self.shape)
                },
            )?;
            back.input(0, dx);
        }
        // Factors are f32 or f64.
        let g = g.cast(g.dtype().compute());
        if let Some(rows) = &self.rows {
            let n = blocks * places;
            let left = dispatch(
                [g.clone()],
                Half::Move,
                |[g]| {
                    let mut left = Array::uninit(&[n, each], g.dtype());
                    with_float!("conv", g.dtype(), |T| {
                        cpu::transpose::<T>(g.as_slice()?, blocks, each, places, left.fresh_mut());
                        Ok(left)
                    })
                },
                |_, [g]| g.reshape(&[blocks, each, places])?.transpose(1, 2)?.contiguous().reshape(&[n, each]),
            )?;
            let right = rows.reshape(&[n, k])?;
            let samples = self.samples.repeat_rows(groups * places)?;
            let factor = if groups == 1 {
                Factor::Outer { left, right, samples }
            } else {
                let group = Groups::of_ids((0..n).map(|i| (i / places % groups) as u32).collect(), groups)?;
                Factor::GroupedOuter { left, right, group, samples }
            };
            back.param(&self.w, factor);
        }
        if let Some(bias) = &self.bias {
            // The gradient is already summed over positions: one row per image.
            let grad = super::reduce::sum_dims(&g.reshape(&[b, cout, places])?, &[2])?;
            back.param(bias, Factor::RowSum { grad, samples: self.samples.clone() });
        }
        Ok(())
    }
}

/// The convolution of `x [B, Cin, H, W]` with a weight `[Cout, Cin/groups, kernel…]`.
fn convolve(
    x: &Tensor,
    w: &Param,
    kernel: [usize; 2],
    bias: Option<&Param>,
    conv: Conv,
    samples: Option<&Samples>,
) -> Result<Tensor> {
    let op = "conv";
    let (b, cin, cout, groups) = (x.shape()[0], x.shape()[1], w.shape()[0], conv.groups);
    if groups == 0 || cin % groups != 0 || cout % groups != 0 || w.shape()[1] * groups != cin {
        return Err(Error::shape(
            op,
            format!(
                "{cin} channels into {} {:?} in {groups} groups: the weight must be [Cout, {cin}/groups, …] and groups divide both",
                w.name(),
                w.shape()
            ),
        ));
    }
    if let Some(b) = bias
        && b.shape() != [cout]
    {
        return Err(Error::shape(op, format!("bias {} is {:?}, not [{cout}]", b.name(), b.shape())));
    }
    let samples = samples.cloned().unwrap_or_else(|| Samples::uniform(b, 1));
    if samples.rows() != b {
        return Err(Error::shape(op, format!("the samples map {} of {b} images", samples.rows())));
    }
    let window = conv.window(op, [x.shape()[2], x.shape()[3]], kernel)?;
    let (channels, each, places, blocks) = (cin / groups, cout / groups, window.places(), b * groups);
    let (k, image) = (channels * window.area(), channels * window.size[0] * window.size[1]);
    let bv = bias.map(Param::value);
    let keep = w.trainable() && is_recording();
    let out = [b, cout, window.out[0], window.out[1]];
    // The unfolded input is a factor of the weight's gradient: it stays in f32.
    let (y, Exact(rows)) = dispatch(
        [x.array().contiguous(), w.value()],
        Half::Widen,
        |[x, w]| {
            let (w, bv) = (w.cast(x.dtype()), bv.as_ref().map(|b| b.cast(x.dtype())));
            let mut rows = keep.then(|| Array::uninit(&[blocks, places, k], x.dtype()));
            let mut y = Array::uninit(&out, x.dtype());
            with_float!(op, x.dtype(), |T| {
                let (xs, ws) = (x.as_slice::<T>()?, w.as_slice::<T>()?);
                let bs = bv.as_ref().map(|b| b.as_slice::<T>()).transpose()?;
                if let Some(rows) = &mut rows {
                    cpu::unfold(xs, blocks, channels, &window, rows.fresh_mut::<T>());
                }
                let kept = rows.as_ref().map(|r| r.as_slice::<T>()).transpose()?;
                par_units(y.fresh_mut::<T>(), each * places, 1, |range, y| {
                    let mut scratch = if kept.is_none() { vec![T::ZERO; places * k] } else { Vec::new() };
                    for (n, y) in range.zip(y.chunks_exact_mut(each * places)) {
                        let rows = match kept {
                            Some(rows) => &rows[n * places * k..(n + 1) * places * k],
                            None => {
                                cpu::unfold_one(&xs[n * image..(n + 1) * image], channels, &window, &mut scratch);
                                &scratch[..]
                            }
                        };
                        let g = n % groups;
                        let wm = Mat::new(&ws[g * each * k..(g + 1) * each * k], each, k);
                        if let Some(bs) = bs {
                            y.chunks_exact_mut(places).zip(&bs[g * each..]).for_each(|(y, &b)| y.fill(b));
                        }
                        if k > 0 {
                            matmul(wm, Mat::new(rows, places, k).t(), bs.is_some(), y);
                        } else if bs.is_none() {
                            y.fill(T::ZERO);
                        }
                    }
                });
                Ok((y, Exact(rows)))
            })
        },
        |gpu, [x, w]| {
            let rows = cuda::unfold(gpu, &x, (blocks, channels), &window)?.reshape(&[b, groups, places, k])?;
            let w = w.cast(x.dtype()).reshape(&[1, groups, each, k])?.expand(&[b, groups, each, k])?;
            let y = gpu_gemm::product(gpu, &w, &rows.transpose(2, 3)?, gpu_gemm::Epilogue::default())?.0;
            let mut y = y.reshape(&out)?;
            if let Some(bv) = &bv {
                y = gpu_ew::binary(gpu, "add", &y, &bv.cast(x.dtype()).reshape(&[cout, 1, 1])?)?;
            }
            Ok((y, Exact(keep.then_some(rows))))
        },
    )?;
    let params: Vec<&Param> = std::iter::once(w).chain(bias).collect();
    Ok(Tensor::record(y, &[x], &params, || Back {
        rows,
        shape: x.shape().into(),
        w: w.clone(),
        bias: bias.cloned(),
        window,
        groups,
        samples,
    }))
}

/// Cross-correlation of images `x [B, Cin, H, W]` with `w [Cout, Cin/groups, kh, kw]`, plus `bias [Cout]`:
/// `[B, Cout, H′, W′]` with H′ = ⌊(H + 2·padding − dilation·(kh − 1) − 1)/stride⌋ + 1, and W′ alike.
///
/// Every image is a sample unless `samples` maps them otherwise. bf16 and f16 inputs are computed in f32 and the result is rounded back.
pub fn conv2d(x: &Tensor, w: &Param, bias: Option<&Param>, conv: Conv, samples: Option<&Samples>) -> Result<Tensor> {
    let _op = spans::op("conv");
    x.dtype().expect_float("conv")?;
    match (x.rank(), w.shape()) {
        (4, &[_, _, kh, kw]) => convolve(x, w, [kh, kw], bias, conv, samples),
        _ => Err(Error::shape(
            "conv",
            format!(
                "conv2d needs [B, C, H, W] and a weight of 4 dimensions, got {:?} and {} {:?}",
                x.shape(),
                w.name(),
                w.shape()
            ),
        )),
    }
}

/// Cross-correlation of sequences `x [B, Cin, T]` with `w [Cout, Cin/groups, k]`, plus `bias [Cout]`: `[B, Cout, T′]`.
/// As [`conv2d`], with the width's stride, padding and dilation.
pub fn conv1d(x: &Tensor, w: &Param, bias: Option<&Param>, conv: Conv, samples: Option<&Samples>) -> Result<Tensor> {
    let _op = spans::op("conv");
    x.dtype().expect_float("conv")?;
    match (x.shape(), w.shape()) {
        (&[b, c, t], &[cout, _, k]) => {
            let y = convolve(&x.reshape(&[b, c, 1, t])?, w, [1, k], bias, conv.flat(), samples)?;
            y.reshape(&[b, cout, y.shape()[3]])
        }
        _ => Err(Error::shape(
            "conv",
            format!(
                "conv1d needs [B, C, T] and a weight of 3 dimensions, got {:?} and {} {:?}",
                x.shape(),
                w.name(),
                w.shape()
            ),
        )),
    }
}

struct Windows {
    info: &'static OpInfo,
    window: Window,
    shape: Dims,
}

impl Rule for Windows {
    fn info(&self) -> &'static OpInfo {
        self.info
    }
    fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
        one(y.images(&self.shape))
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        let folds = self.shape.len() == 4;
        back.input(0, if folds { fold(&grad, &self.shape, &self.window)? } else { unfold(&grad, &self.window)? });
        Ok(())
    }
}

fn unfold(x: &Array, w: &Window) -> Result<Array> {
    let (b, c) = (x.shape()[0], x.shape()[1]);
    dispatch(
        [x.contiguous()],
        Half::Move,
        |[x]| {
            let mut y = Array::uninit(&[b, w.places(), c * w.area()], x.dtype());
            with_dtype!(x.dtype(), |T| cpu::unfold::<T>(x.as_slice()?, b, c, w, y.fresh_mut()));
            Ok(y)
        },
        |gpu, [x]| cuda::unfold(gpu, &x, (b, c), w),
    )
}

fn fold(rows: &Array, shape: &[usize], w: &Window) -> Result<Array> {
    dispatch(
        [rows.contiguous()],
        Half::Native,
        |[rows]| {
            let mut x = Array::zeros(shape, rows.dtype());
            with_float!("fold", rows.dtype(), |T| {
                cpu::fold::<T>(rows.as_slice()?, shape[0], shape[1], w, x.fresh_mut());
                Ok(x)
            })
        },
        |gpu, [rows]| cuda::fold(gpu, &rows, (shape[0], shape[1]), w, shape),
    )
}

impl Tensor {
    /// Windows of images as rows, as in im2col: `[B, C, H, W]` to `[B, positions, C·kh·kw]`, channel by channel. `conv.groups` is not used.
    pub fn unfold(&self, kernel: [usize; 2], conv: Conv) -> Result<Tensor> {
        let _op = spans::op("unfold");
        let &[_, _, h, w] = self.shape() else {
            return Err(Error::shape("unfold", format!("needs [B, C, H, W], got {:?}", self.shape())));
        };
        let window = conv.window("unfold", [h, w], kernel)?;
        let y = unfold(self.array(), &window)?;
        let shape = self.shape().into();
        Ok(Tensor::record(y, &[self], &[], || Windows { info: &UNFOLD, window, shape }))
    }
    /// Adds rows of windows back into images of `size`: `[B, positions, C·kh·kw]` to `[B, C, H, W]`. This is the transpose of
    /// [`Tensor::unfold`], not its inverse: overlapping windows are summed.
    pub fn fold(&self, size: [usize; 2], kernel: [usize; 2], conv: Conv) -> Result<Tensor> {
        let _op = spans::op("fold");
        self.dtype().expect_float("fold")?;
        let window = conv.window("fold", size, kernel)?;
        let &[b, places, k] = self.shape() else {
            return Err(Error::shape("fold", format!("needs [B, places, C·kh·kw], got {:?}", self.shape())));
        };
        if places != window.places() || k % window.area() != 0 {
            return Err(Error::shape(
                "fold",
                format!(
                    "{:?}: this window has {} places and rows of C·{}",
                    self.shape(),
                    window.places(),
                    window.area()
                ),
            ));
        }
        let y = fold(self.array(), &[b, k / window.area(), size[0], size[1]], &window)?;
        let shape = self.shape().into();
        Ok(Tensor::record(y, &[self], &[], || Windows { info: &FOLD, window, shape }))
    }
}
