//! The factored linear map with bias and activation, which holds most parameters of a model.
//!
//! y = act(x·Wᵀ + b). FLOPs 2·N·d·p forward; backward takes 2·N·d·p for x, and the weight's gradient stays an outer factor.

use super::{Differentiable, FactorRule, OpInfo};
use crate::array::Array;
use crate::array::shape::Dims;
use crate::autograd::{Case, Cotangents, Factor, Gen, Owner, Rule, Whose, one, samples_or_leading};
use crate::base::{DType, Element, Error, Result};
use crate::device::spans;
pub use crate::kernels::Activation;
use crate::kernels::gemm::half::{self, Operand, Out, product as bf16_product};
use crate::kernels::gemm::{Epilogue, Mat, cuda as gpu_gemm, gemm, matmul};
use crate::kernels::{Half, dispatch};
use crate::ops::unary;
use crate::{Param, Samples, Tensor, with_float};
use smallvec::SmallVec;

/// The memory layout of a weight.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Layout {
    /// `[out, in]`, as in PyTorch's `Linear`.
    OutIn,
    /// `[in, out]`, as in GPT-2's `Conv1D`.
    InOut,
}

/// grad ⊙ act′(z), in grad's buffer.
pub(crate) fn activation_grad(act: Activation, grad: Array, z: &Array) -> Result<Array> {
    let (z, none) = (Some(z.clone()), [0.0; 2]);
    match act {
        Activation::None => Ok(grad),
        Activation::Relu => unary::gradient::<unary::Relu>(grad, z, none),
        Activation::Gelu => unary::gradient::<unary::Gelu>(grad, z, none),
        Activation::GeluTanh => unary::gradient::<unary::GeluTanh>(grad, z, none),
        Activation::Silu => unary::gradient::<unary::Silu>(grad, z, none),
        Activation::Tanh => {
            let y = z.map(|z| unary::apply::<unary::Tanh>(z, none)).transpose()?;
            unary::gradient::<unary::Tanh>(grad, y, none)
        }
    }
}

static LINEAR: OpInfo = OpInfo {
    name: "linear",
    differentiable: Differentiable::Yes,
    factor: FactorRule::Kinds(&["outer", "row sum"]),
    cases: &[
        |g: &mut Gen| {
            let (b, t, d, p) = (g.count(1, 3), g.extent(0, 4), g.extent(0, 5), g.extent(0, 5));
            let layout = if g.chance(0.5) { Layout::OutIn } else { Layout::InOut };
            let act = [Activation::None, Activation::Gelu, Activation::GeluTanh, Activation::Silu, Activation::Tanh]
                [g.size(0, 4)];
            let shape = if layout == Layout::OutIn { [p, d] } else { [d, p] };
            let (w, bias) = (Param::new("weight", g.array(&shape)), Param::new("bias", g.array(&[p])));
            let params = vec![w.clone(), bias.clone()];
            let x = g.array(&[b, t, d]);
            Ok(Case::new(vec![x], move |x| linear(&x[0], &w, layout, Some(&bias), act, None)).params(params).samples(b))
        },
        // Ragged samples in any order, some empty; the weight is used twice.
        |g: &mut Gen| {
            let (n, d, b) = (g.extent(0, 6), g.extent(1, 4), g.size(1, 4));
            let w = Param::new("weight", g.array(&[d, d]));
            let owner: Vec<u32> = (0..n).map(|_| g.size(0, b - 1) as u32).collect();
            let samples = Samples::owners(owner.clone(), b)?;
            let x = g.array(&[n, d]);
            let p = w.clone();
            let pick = Array::generate(&[b, n], g.dtype(), |i| (owner[i % n] as usize == i / n) as u8 as f64);
            Ok(Case::new(vec![x], move |x| {
                let s = Some(&samples);
                let y = linear(&x[0], &w, Layout::OutIn, None, Activation::Tanh, s)?;
                let y = linear(&y, &w, Layout::InOut, None, Activation::None, s)?;
                Tensor::new(pick.clone()).matmul(&y)
            })
            .params(vec![p])
            .samples(b))
        },
    ],
};

/// The registry entries of this family.
pub static OPS: &[&OpInfo] = &[&LINEAR];

struct Back {
    x: Array,
    z: Option<Array>,
    w: Param,
    bias: Option<Param>,
    layout: Layout,
    act: Activation,
    samples: Samples,
}

impl Rule for Back {
    fn info(&self) -> &'static OpInfo {
        &LINEAR
    }
    fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
        one(y.mixing(y.shape.len() - 1, self.x.shape()))
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        let (n, d) = (self.samples.rows(), *self.x.shape().last().unwrap_or(&1));
        let p = *grad.shape().last().unwrap_or(&1);
        let mut dz = grad.contiguous().reshape(&[n, p])?;
        if let Some(z) = &self.z {
            dz = activation_grad(self.act, dz, z)?;
        }
        if back.needs(0) {
            spans::cost(2.0 * (n * d * p) as f64, ((n * (d + p) + d * p) * dz.dtype().size()) as f64);
            // The weight is fetched again, not kept: a gathered weight is in memory only while it is used.
            let (layout, shape) = (self.layout, self.x.shape());
            let dx = dispatch(
                [dz.clone(), self.w.value()],
                Half::Bf16,
                |[dz, w]| {
                    let mut dx = Array::uninit(shape, dz.dtype());
                    if dz.dtype() == DType::BF16 {
                        let w = f32_or_bf16(w);
                        let (g, w) = (Operand::Half(Mat::new(dz.as_slice()?, n, p)), rounded_weight(&w, layout, d, p)?);
                        bf16_product(g, w.t(), Default::default(), Out::Half(dx.fresh_mut()));
                        return Ok(dx);
                    }
                    let w = w.cast(dz.dtype());
                    with_float!("linear", dz.dtype(), |T| {
                        let (g, wm) = (Mat::new(dz.as_slice::<T>()?, n, p), weight::<T>(&w, layout, d, p)?);
                        matmul(g, wm.t(), false, dx.fresh_mut::<T>());
                        Ok(dx)
                    })
                },
                |gpu, [dz, w]| {
                    let w = w.cast(dz.dtype());
                    let w = if layout == Layout::InOut { w.transpose(0, 1)? } else { w };
                    gpu_gemm::product(gpu, &dz, &w, gpu_gemm::Epilogue::default())?.0.reshape(shape)
                },
            )?;
            back.input(0, dx);
        }
        // Sums and norms are f32 or f64. On the CPU they are computed from bf16 operands; on a GPU the operands are widened.
        let half = dz.gpu().is_none() && (dz.dtype(), self.x.dtype()) == (DType::BF16, DType::BF16);
        let dz = if half { dz } else { dz.cast(dz.dtype().compute()) };
        if self.w.trainable() {
            let x = self.x.reshape(&[n, d])?.cast(dz.dtype());
            let (left, right) = if self.layout == Layout::OutIn { (dz.clone(), x) } else { (x, dz.clone()) };
            back.param(&self.w, Factor::Outer { left, right, samples: self.samples.clone() });
        }
        if let Some(b) = &self.bias {
            back.param(b, Factor::RowSum { grad: dz, samples: self.samples.clone() });
        }
        Ok(())
    }
}

/// The weight as a `d × p` matrix.
fn weight<T: Element>(w: &Array, layout: Layout, d: usize, p: usize) -> Result<Mat<'_, T>> {
    let data = w.as_slice::<T>()?;
    Ok(match layout {
        Layout::InOut => Mat::new(data, d, p),
        Layout::OutIn => Mat::new(data, p, d).t(),
    })
}

/// A weight in the form in which products of bf16 numbers take it: f32 or bf16.
pub(crate) fn f32_or_bf16(w: Array) -> Array {
    if w.dtype() == DType::BF16 { w } else { w.cast(DType::F32) }
}

/// The matrix of an f32 or bf16 weight, as an operand of a product of bf16 numbers.
fn rounded_weight(w: &Array, layout: Layout, d: usize, p: usize) -> Result<Operand<'_>> {
    Ok(match w.dtype() {
        DType::BF16 => Operand::Half(weight(w, layout, d, p)?),
        _ => Operand::Full(weight(w, layout, d, p)?),
    })
}

/// y = act(x·Wᵀ + b) over the last dimension of `x [B, …, d]`, giving `[B, …, p]`.
///
/// Dimension 0 counts samples, the rest rows, unless `samples` maps the rows otherwise. With bf16 inputs the weight is rounded to bf16,
/// too, products are summed in f32 (on a GPU by the tensor cores, on the CPU by [`half`]) and the result is rounded; f16 on the CPU is
/// computed in f32.
pub fn linear(
    x: &Tensor,
    w: &Param,
    layout: Layout,
    bias: Option<&Param>,
    act: Activation,
    samples: Option<&Samples>,
) -> Result<Tensor> {
    let _op = spans::op("linear");
    x.dtype().expect_float("linear")?;
    let [a, b] = w.shape() else {
        return Err(Error::shape("linear", format!("weight {} is {:?}, not a matrix", w.name(), w.shape())));
    };
    let (d, p) = if layout == Layout::OutIn { (*b, *a) } else { (*a, *b) };
    if x.shape().last() != Some(&d) {
        return Err(Error::shape(
            "linear",
            format!("input {:?} into {} {:?}: the last dimension must be {d}", x.shape(), w.name(), w.shape()),
        ));
    }
    if let Some(b) = bias
        && b.shape() != [p]
    {
        return Err(Error::shape("linear", format!("bias {} is {:?}, not [{p}]", b.name(), b.shape())));
    }
    let samples = samples_or_leading(samples, x.shape(), 1);
    let n = x.numel() / d.max(1);
    if samples.rows() != n {
        return Err(Error::shape("linear", format!("the samples map {} rows, the input has {n}", samples.rows())));
    }
    spans::cost(2.0 * (n * d * p) as f64, ((n * (d + p) + d * p) * x.dtype().size()) as f64);
    let mut shape: Dims = x.shape().into();
    if let Some(last) = shape.last_mut() {
        *last = p;
    }
    let xa = x.array().contiguous();
    // The pre-activation is kept only if a backward pass can need it.
    let keep = act != Activation::None && Tensor::would_record(&[x], &[w]);
    let bias_value = bias.map(Param::value);
    let (y, z) = dispatch(
        [xa.clone(), w.value()],
        Half::Bf16,
        |[x, w]| {
            let dtype = x.dtype();
            if dtype == DType::BF16 {
                let w = f32_or_bf16(w);
                let b = bias_value.as_ref().map(|b| b.cast(DType::F32));
                let mut y = Array::uninit(&shape, dtype);
                let mut z = keep.then(|| Array::uninit(&[n, p], dtype));
                let pre = z.as_mut().map(|z| Out::Half(z.fresh_mut()));
                let bias = b.as_ref().map(|b| b.as_slice()).transpose()?;
                let (x, w) = (Operand::Half(Mat::new(x.as_slice()?, n, d)), rounded_weight(&w, layout, d, p)?);
                let e = half::Epilogue { bias, act, pre, ..Default::default() };
                bf16_product(x, w, e, Out::Half(y.fresh_mut()));
                return Ok((y, z));
            }
            let (w, b) = (w.cast(dtype), bias_value.as_ref().map(|b| b.cast(dtype)));
            let mut y = Array::uninit(&shape, dtype);
            let mut z = keep.then(|| Array::uninit(&[n, p], dtype));
            with_float!("linear", dtype, |T| {
                let bias = b.as_ref().map(|b| b.as_slice::<T>()).transpose()?;
                let e = Epilogue { bias, act, pre: z.as_mut().map(|z| z.fresh_mut::<T>()), ..Epilogue::default() };
                gemm(Mat::new(x.as_slice::<T>()?, n, d), weight::<T>(&w, layout, d, p)?, e, y.fresh_mut::<T>());
                Ok((y, z))
            })
        },
        |gpu, [x, w]| {
            let (w, b) = (w.cast(x.dtype()), bias_value.as_ref().map(|b| b.cast(x.dtype())));
            let w = if layout == Layout::OutIn { w.transpose(0, 1)? } else { w };
            let e = gpu_gemm::Epilogue { bias: b.as_ref(), act, pre: keep };
            let (y, z) = gpu_gemm::product(gpu, &x.reshape(&[n, d])?, &w, e)?;
            Ok((y.reshape(&shape)?, z))
        },
    )?;
    let params: Vec<&Param> = std::iter::once(w).chain(bias).collect();
    Ok(Tensor::record(y, &[x], &params, || Back { x: xa, z, w: w.clone(), bias: bias.cloned(), layout, act, samples }))
}
