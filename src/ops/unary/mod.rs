//! Elementwise operations with one input: activations and elementary functions.
//!
//! A function is a type that implements `Unary`: its formula, its derivative, and a kernel with its name in `cuda/unary.cu`.

pub(crate) mod cuda;

use crate::array::Array;
use crate::autograd::{Case, Cotangents, Differentiable, Gen, NO_PARAMS, OpInfo, Owner, Rule, Whose, one};
use crate::base::dtype::{of_bf16, to_bf16};
use crate::base::{DType, Element, Float, Result};
use crate::device::spans;
use crate::kernels::elementwise as ew;
use crate::kernels::{Half, dispatch};
use crate::{Tensor, with_dtype, with_float};
use half::bf16;
use smallvec::SmallVec;
use std::marker::PhantomData;

/// The argument of a derivative, which is saved for the backward pass.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Save {
    /// Nothing: the function is linear, and its derivative depends on constants only.
    Nothing,
    /// The input.
    Input,
    /// The output.
    Output,
}

/// An elementwise function of one input and up to two constants `p`.
pub(crate) trait Unary: 'static {
    /// Name of the op; its kernels are `{NAME}_{dtype}` and `{NAME}_grad_{dtype}`.
    const NAME: &'static str;
    /// The argument of [`Unary::d`].
    const SAVE: Save;
    /// Inputs of the cases lie in this range, away from kinks and poles.
    const RANGE: [f64; 2];
    /// Constants of the cases.
    const CONSTANTS: [f64; 2] = [0.0; 2];
    /// The registry entry.
    const INFO: &'static OpInfo =
        &OpInfo { name: Self::NAME, differentiable: Differentiable::Yes, factor: NO_PARAMS, cases: &[case::<Self>] };
    /// The function.
    fn f<T: Float>(x: T, p: [T; 2]) -> T;
    /// Its derivative, as a function of the saved value; the argument is ignored if nothing is saved.
    fn d<T: Float>(s: T, p: [T; 2]) -> T;
}

fn case<U: Unary + ?Sized>(g: &mut Gen) -> Result<Case> {
    let rank = g.size(0, 3);
    let shape = g.shape(rank);
    Ok(Case::new(vec![g.array_in(&shape, U::RANGE[0], U::RANGE[1])], |t| unary::<U>(&t[0], U::CONSTANTS)))
}

/// Applies the function to every element of an array.
pub(crate) fn apply<U: Unary + ?Sized>(x: Array, p: [f64; 2]) -> Result<Array> {
    dispatch(
        [x],
        Half::Bf16,
        |[x]| {
            if x.dtype() == DType::BF16 {
                let p = p.map(|p| p as f32);
                return ew::map_owned::<bf16>(
                    x,
                    #[inline(always)]
                    move |x| to_bf16(U::f(of_bf16(x), p)),
                );
            }
            with_float!(U::NAME, x.dtype(), |T| {
                let p = p.map(<T as Element>::from_f64);
                ew::map_owned::<T>(
                    x,
                    #[inline(always)]
                    move |x: T| U::f(x, p),
                )
            })
        },
        |gpu, [x]| ew::cuda::unary(gpu, U::NAME, &x, p),
    )
}

/// grad · f′(saved), element by element; for a linear function without `saved`.
pub(crate) fn gradient<U: Unary + ?Sized>(grad: Array, saved: Option<Array>, p: [f64; 2]) -> Result<Array> {
    let Some(saved) = saved else {
        let slope = U::d(1.0, p);
        return if slope == 1.0 { Ok(grad) } else { apply::<MulScalar>(grad, [slope, 0.0]) };
    };
    dispatch(
        [grad, saved],
        Half::Bf16,
        |[grad, saved]| {
            if (grad.dtype(), saved.dtype()) == (DType::BF16, DType::BF16) {
                let p = p.map(|p| p as f32);
                return ew::zip_owned::<bf16, bf16>(
                    U::NAME,
                    grad,
                    &saved,
                    #[inline(always)]
                    move |g, s| to_bf16(of_bf16(g) * U::d(of_bf16(s), p)),
                );
            }
            let (grad, saved) = (grad.cast(grad.dtype().compute()), saved.cast(saved.dtype().compute()));
            with_float!(U::NAME, grad.dtype(), |T| {
                let p = p.map(<T as Element>::from_f64);
                ew::zip_owned::<T, T>(
                    U::NAME,
                    grad,
                    &saved,
                    #[inline(always)]
                    move |g: T, s: T| g * U::d(s, p),
                )
            })
        },
        |gpu, [grad, saved]| ew::cuda::unary_grad(gpu, U::NAME, &grad, &saved, p),
    )
}

struct Back<U: ?Sized> {
    saved: Option<Array>,
    p: [f64; 2],
    function: PhantomData<fn() -> Box<U>>,
}

impl<U: Unary + ?Sized> Rule for Back<U> {
    fn info(&self) -> &'static OpInfo {
        U::INFO
    }
    fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
        one(y.same())
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        back.input(0, gradient::<U>(grad, self.saved.clone(), self.p)?);
        Ok(())
    }
}

/// The op of the function `U`.
fn unary<U: Unary + ?Sized>(x: &Tensor, p: [f64; 2]) -> Result<Tensor> {
    let _op = spans::op(U::NAME);
    spans::cost(0.0, (2 * x.numel() * x.dtype().size()) as f64);
    x.dtype().expect_float(U::NAME)?;
    let y = apply::<U>(x.array().clone(), p)?;
    let saved = match U::SAVE {
        Save::Nothing => None,
        Save::Input => Some(x.array().clone()),
        Save::Output => Some(y.clone()),
    };
    Ok(Tensor::record(y, &[x], &[], || Back::<U> { saved, p, function: PhantomData }))
}

/// The registry entries of this family.
pub static OPS: &[&OpInfo] = &[
    Neg::INFO,
    Exp::INFO,
    Log::INFO,
    Sqrt::INFO,
    Square::INFO,
    Abs::INFO,
    Recip::INFO,
    Sin::INFO,
    Cos::INFO,
    Tanh::INFO,
    Sigmoid::INFO,
    Erf::INFO,
    Relu::INFO,
    LeakyRelu::INFO,
    Gelu::INFO,
    GeluTanh::INFO,
    Silu::INFO,
    Softplus::INFO,
    Powf::INFO,
    AddScalar::INFO,
    MulScalar::INFO,
    Clamp::INFO,
    &CAST,
    &IS_FINITE,
];

/// −x.
pub(crate) struct Neg;

impl Unary for Neg {
    const NAME: &'static str = "neg";
    const SAVE: Save = Save::Nothing;
    const RANGE: [f64; 2] = [-2.0, 2.0];
    #[inline(always)]
    fn f<T: Float>(x: T, _: [T; 2]) -> T {
        -x
    }
    #[inline(always)]
    fn d<T: Float>(_: T, _: [T; 2]) -> T {
        -T::ONE
    }
}

/// eˣ.
pub(crate) struct Exp;

impl Unary for Exp {
    const NAME: &'static str = "exp";
    const SAVE: Save = Save::Output;
    const RANGE: [f64; 2] = [-2.0, 2.0];
    #[inline(always)]
    fn f<T: Float>(x: T, _: [T; 2]) -> T {
        x.exp()
    }
    #[inline(always)]
    fn d<T: Float>(s: T, _: [T; 2]) -> T {
        s
    }
}

/// Natural logarithm.
pub(crate) struct Log;

impl Unary for Log {
    const NAME: &'static str = "log";
    const SAVE: Save = Save::Input;
    const RANGE: [f64; 2] = [0.2, 3.0];
    #[inline(always)]
    fn f<T: Float>(x: T, _: [T; 2]) -> T {
        x.ln()
    }
    #[inline(always)]
    fn d<T: Float>(s: T, _: [T; 2]) -> T {
        T::ONE / s
    }
}

/// √x.
pub(crate) struct Sqrt;

impl Unary for Sqrt {
    const NAME: &'static str = "sqrt";
    const SAVE: Save = Save::Output;
    const RANGE: [f64; 2] = [0.2, 3.0];
    #[inline(always)]
    fn f<T: Float>(x: T, _: [T; 2]) -> T {
        x.sqrt()
    }
    #[inline(always)]
    fn d<T: Float>(s: T, _: [T; 2]) -> T {
        T::from_f64(0.5) / s
    }
}

/// x².
pub(crate) struct Square;

impl Unary for Square {
    const NAME: &'static str = "square";
    const SAVE: Save = Save::Input;
    const RANGE: [f64; 2] = [-2.0, 2.0];
    #[inline(always)]
    fn f<T: Float>(x: T, _: [T; 2]) -> T {
        x * x
    }
    #[inline(always)]
    fn d<T: Float>(s: T, _: [T; 2]) -> T {
        s + s
    }
}

/// |x|; the derivative at 0 is 0.
pub(crate) struct Abs;

impl Unary for Abs {
    const NAME: &'static str = "abs";
    const SAVE: Save = Save::Input;
    const RANGE: [f64; 2] = [0.1, 2.0];
    #[inline(always)]
    fn f<T: Float>(x: T, _: [T; 2]) -> T {
        x.abs()
    }
    #[inline(always)]
    fn d<T: Float>(s: T, _: [T; 2]) -> T {
        s.sign()
    }
}

/// 1/x.
pub(crate) struct Recip;

impl Unary for Recip {
    const NAME: &'static str = "recip";
    const SAVE: Save = Save::Output;
    const RANGE: [f64; 2] = [0.3, 3.0];
    #[inline(always)]
    fn f<T: Float>(x: T, _: [T; 2]) -> T {
        T::ONE / x
    }
    #[inline(always)]
    fn d<T: Float>(s: T, _: [T; 2]) -> T {
        -s * s
    }
}

/// sin x.
pub(crate) struct Sin;

impl Unary for Sin {
    const NAME: &'static str = "sin";
    const SAVE: Save = Save::Input;
    const RANGE: [f64; 2] = [-3.0, 3.0];
    #[inline(always)]
    fn f<T: Float>(x: T, _: [T; 2]) -> T {
        x.sin()
    }
    #[inline(always)]
    fn d<T: Float>(s: T, _: [T; 2]) -> T {
        s.cos()
    }
}

/// cos x.
pub(crate) struct Cos;

impl Unary for Cos {
    const NAME: &'static str = "cos";
    const SAVE: Save = Save::Input;
    const RANGE: [f64; 2] = [-3.0, 3.0];
    #[inline(always)]
    fn f<T: Float>(x: T, _: [T; 2]) -> T {
        x.cos()
    }
    #[inline(always)]
    fn d<T: Float>(s: T, _: [T; 2]) -> T {
        -s.sin()
    }
}

/// tanh x.
pub(crate) struct Tanh;

impl Unary for Tanh {
    const NAME: &'static str = "tanh";
    const SAVE: Save = Save::Output;
    const RANGE: [f64; 2] = [-2.0, 2.0];
    #[inline(always)]
    fn f<T: Float>(x: T, _: [T; 2]) -> T {
        x.tanh()
    }
    #[inline(always)]
    fn d<T: Float>(s: T, _: [T; 2]) -> T {
        T::ONE - s * s
    }
}

/// 1/(1 + e⁻ˣ).
pub(crate) struct Sigmoid;

impl Unary for Sigmoid {
    const NAME: &'static str = "sigmoid";
    const SAVE: Save = Save::Output;
    const RANGE: [f64; 2] = [-3.0, 3.0];
    #[inline(always)]
    fn f<T: Float>(x: T, _: [T; 2]) -> T {
        x.sigmoid()
    }
    #[inline(always)]
    fn d<T: Float>(s: T, _: [T; 2]) -> T {
        s * (T::ONE - s)
    }
}

/// The error function.
pub(crate) struct Erf;

impl Unary for Erf {
    const NAME: &'static str = "erf";
    const SAVE: Save = Save::Input;
    const RANGE: [f64; 2] = [-2.0, 2.0];
    #[inline(always)]
    fn f<T: Float>(x: T, _: [T; 2]) -> T {
        x.erf()
    }
    #[inline(always)]
    fn d<T: Float>(s: T, _: [T; 2]) -> T {
        T::from_f64(std::f64::consts::FRAC_2_SQRT_PI) * (-s * s).exp()
    }
}

/// max(x, 0); the derivative at 0 is 0.
pub(crate) struct Relu;

impl Unary for Relu {
    const NAME: &'static str = "relu";
    const SAVE: Save = Save::Output;
    const RANGE: [f64; 2] = [0.05, 2.0];
    #[inline(always)]
    fn f<T: Float>(x: T, _: [T; 2]) -> T {
        x.larger(T::ZERO)
    }
    #[inline(always)]
    fn d<T: Float>(s: T, _: [T; 2]) -> T {
        if s > T::ZERO { T::ONE } else { T::ZERO }
    }
}

/// x for x > 0, `slope`·x otherwise.
pub(crate) struct LeakyRelu;

impl Unary for LeakyRelu {
    const NAME: &'static str = "leaky_relu";
    const SAVE: Save = Save::Input;
    const RANGE: [f64; 2] = [-2.0, -0.05];
    const CONSTANTS: [f64; 2] = [0.1, 0.0];
    #[inline(always)]
    fn f<T: Float>(x: T, p: [T; 2]) -> T {
        if x > T::ZERO { x } else { p[0] * x }
    }
    #[inline(always)]
    fn d<T: Float>(s: T, p: [T; 2]) -> T {
        if s > T::ZERO { T::ONE } else { p[0] }
    }
}

/// x·Φ(x) with the exact normal distribution function (Hendrycks & Gimpel 2016).
pub(crate) struct Gelu;

impl Unary for Gelu {
    const NAME: &'static str = "gelu";
    const SAVE: Save = Save::Input;
    const RANGE: [f64; 2] = [-3.0, 3.0];
    #[inline(always)]
    fn f<T: Float>(x: T, _: [T; 2]) -> T {
        x.gelu()
    }
    #[inline(always)]
    fn d<T: Float>(s: T, _: [T; 2]) -> T {
        s.gelu_grad()
    }
}

/// The tanh approximation of [`Tensor::gelu`], as GPT-2 uses it.
pub(crate) struct GeluTanh;

impl Unary for GeluTanh {
    const NAME: &'static str = "gelu_tanh";
    const SAVE: Save = Save::Input;
    const RANGE: [f64; 2] = [-3.0, 3.0];
    #[inline(always)]
    fn f<T: Float>(x: T, _: [T; 2]) -> T {
        x.gelu_tanh()
    }
    #[inline(always)]
    fn d<T: Float>(s: T, _: [T; 2]) -> T {
        s.gelu_tanh_grad()
    }
}

/// x·sigmoid(x) (SiLU, also called swish).
pub(crate) struct Silu;

impl Unary for Silu {
    const NAME: &'static str = "silu";
    const SAVE: Save = Save::Input;
    const RANGE: [f64; 2] = [-3.0, 3.0];
    #[inline(always)]
    fn f<T: Float>(x: T, _: [T; 2]) -> T {
        x * x.sigmoid()
    }
    #[inline(always)]
    fn d<T: Float>(s: T, _: [T; 2]) -> T {
        let y = s.sigmoid();
        y * (T::ONE + s * (T::ONE - y))
    }
}

/// ln(1 + eˣ), without overflow.
pub(crate) struct Softplus;

impl Unary for Softplus {
    const NAME: &'static str = "softplus";
    const SAVE: Save = Save::Input;
    const RANGE: [f64; 2] = [-3.0, 3.0];
    #[inline(always)]
    fn f<T: Float>(x: T, _: [T; 2]) -> T {
        x.softplus()
    }
    #[inline(always)]
    fn d<T: Float>(s: T, _: [T; 2]) -> T {
        s.sigmoid()
    }
}

/// x to a constant power.
pub(crate) struct Powf;

impl Unary for Powf {
    const NAME: &'static str = "powf";
    const SAVE: Save = Save::Input;
    const RANGE: [f64; 2] = [0.3, 2.0];
    const CONSTANTS: [f64; 2] = [2.5, 0.0];
    #[inline(always)]
    fn f<T: Float>(x: T, p: [T; 2]) -> T {
        x.pow(p[0])
    }
    #[inline(always)]
    fn d<T: Float>(s: T, p: [T; 2]) -> T {
        // x⁰ is 1 everywhere, also at 0, where 0·0⁻¹ would be NaN.
        if p[0] == T::ZERO { T::ZERO } else { p[0] * s.pow(p[0] - T::ONE) }
    }
}

/// x + c.
pub(crate) struct AddScalar;

impl Unary for AddScalar {
    const NAME: &'static str = "add_scalar";
    const SAVE: Save = Save::Nothing;
    const RANGE: [f64; 2] = [-2.0, 2.0];
    const CONSTANTS: [f64; 2] = [0.7, 0.0];
    #[inline(always)]
    fn f<T: Float>(x: T, p: [T; 2]) -> T {
        x + p[0]
    }
    #[inline(always)]
    fn d<T: Float>(_: T, _: [T; 2]) -> T {
        T::ONE
    }
}

/// c·x.
pub(crate) struct MulScalar;

impl Unary for MulScalar {
    const NAME: &'static str = "mul_scalar";
    const SAVE: Save = Save::Nothing;
    const RANGE: [f64; 2] = [-2.0, 2.0];
    const CONSTANTS: [f64; 2] = [-1.7, 0.0];
    #[inline(always)]
    fn f<T: Float>(x: T, p: [T; 2]) -> T {
        x * p[0]
    }
    #[inline(always)]
    fn d<T: Float>(_: T, p: [T; 2]) -> T {
        p[0]
    }
}

/// x limited to `low..=high`; the derivative outside is 0.
pub(crate) struct Clamp;

impl Unary for Clamp {
    const NAME: &'static str = "clamp";
    const SAVE: Save = Save::Input;
    const RANGE: [f64; 2] = [-2.0, 2.0];
    const CONSTANTS: [f64; 2] = [-5.0, 2.5];
    #[inline(always)]
    fn f<T: Float>(x: T, p: [T; 2]) -> T {
        if x < p[0] {
            p[0]
        } else if x > p[1] {
            p[1]
        } else {
            x
        }
    }
    #[inline(always)]
    fn d<T: Float>(s: T, p: [T; 2]) -> T {
        if s < p[0] || s > p[1] { T::ZERO } else { T::ONE }
    }
}

impl Tensor {
    /// −x.
    pub fn neg(&self) -> Result<Tensor> {
        unary::<Neg>(self, [0.0; 2])
    }
    /// eˣ.
    pub fn exp(&self) -> Result<Tensor> {
        unary::<Exp>(self, [0.0; 2])
    }
    /// Natural logarithm.
    pub fn log(&self) -> Result<Tensor> {
        unary::<Log>(self, [0.0; 2])
    }
    /// √x.
    pub fn sqrt(&self) -> Result<Tensor> {
        unary::<Sqrt>(self, [0.0; 2])
    }
    /// x².
    pub fn square(&self) -> Result<Tensor> {
        unary::<Square>(self, [0.0; 2])
    }
    /// |x|; the derivative at 0 is 0.
    pub fn abs(&self) -> Result<Tensor> {
        unary::<Abs>(self, [0.0; 2])
    }
    /// 1/x.
    pub fn recip(&self) -> Result<Tensor> {
        unary::<Recip>(self, [0.0; 2])
    }
    /// sin x.
    pub fn sin(&self) -> Result<Tensor> {
        unary::<Sin>(self, [0.0; 2])
    }
    /// cos x.
    pub fn cos(&self) -> Result<Tensor> {
        unary::<Cos>(self, [0.0; 2])
    }
    /// tanh x.
    pub fn tanh(&self) -> Result<Tensor> {
        unary::<Tanh>(self, [0.0; 2])
    }
    /// 1/(1 + e⁻ˣ).
    pub fn sigmoid(&self) -> Result<Tensor> {
        unary::<Sigmoid>(self, [0.0; 2])
    }
    /// The error function.
    pub fn erf(&self) -> Result<Tensor> {
        unary::<Erf>(self, [0.0; 2])
    }
    /// max(x, 0); the derivative at 0 is 0.
    pub fn relu(&self) -> Result<Tensor> {
        unary::<Relu>(self, [0.0; 2])
    }
    /// x for x > 0, `slope`·x otherwise.
    pub fn leaky_relu(&self, slope: f64) -> Result<Tensor> {
        unary::<LeakyRelu>(self, [slope, 0.0])
    }
    /// x·Φ(x) with the exact normal distribution function (Hendrycks & Gimpel 2016).
    pub fn gelu(&self) -> Result<Tensor> {
        unary::<Gelu>(self, [0.0; 2])
    }
    /// The tanh approximation of [`Tensor::gelu`], as GPT-2 uses it.
    pub fn gelu_tanh(&self) -> Result<Tensor> {
        unary::<GeluTanh>(self, [0.0; 2])
    }
    /// x·sigmoid(x) (SiLU, also called swish).
    pub fn silu(&self) -> Result<Tensor> {
        unary::<Silu>(self, [0.0; 2])
    }
    /// ln(1 + eˣ), without overflow.
    pub fn softplus(&self) -> Result<Tensor> {
        unary::<Softplus>(self, [0.0; 2])
    }
    /// x to a constant power.
    pub fn powf(&self, power: f64) -> Result<Tensor> {
        unary::<Powf>(self, [power, 0.0])
    }
    /// x + c.
    pub fn add_scalar(&self, c: f64) -> Result<Tensor> {
        unary::<AddScalar>(self, [c, 0.0])
    }
    /// c·x.
    pub fn mul_scalar(&self, c: f64) -> Result<Tensor> {
        unary::<MulScalar>(self, [c, 0.0])
    }
    /// x limited to `low..=high`; the derivative outside is 0.
    pub fn clamp(&self, low: f64, high: f64) -> Result<Tensor> {
        unary::<Clamp>(self, [low, high])
    }
}

static IS_FINITE: OpInfo = OpInfo {
    name: "is_finite",
    differentiable: Differentiable::No("the result is a mask"),
    factor: NO_PARAMS,
    cases: &[|g| {
        let shape = g.shape(3);
        Ok(Case::new(vec![g.array(&shape)], |t| t[0].log()?.is_finite()?.cast(DType::F64)))
    }],
};

static CAST: OpInfo = OpInfo {
    name: "cast",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[|g| {
        let shape = g.shape(2);
        Ok(Case::new(vec![g.array(&shape)], |t| t[0].cast(DType::F64)?.mul_scalar(2.0)?.cast(DType::F64)))
    }],
};

impl Tensor {
    /// The values converted to another dtype. Between float types the gradient is converted back; conversions to and from integers have no
    /// gradient.
    pub fn cast(&self, dtype: DType) -> Result<Tensor> {
        let _op = spans::op("cast");
        if dtype == self.dtype() {
            return Ok(self.clone());
        }
        let y = self.array().cast(dtype);
        if !dtype.is_float() || !self.dtype().is_float() {
            return Ok(Tensor::new(y));
        }
        struct Back(DType);
        impl Rule for Back {
            fn info(&self) -> &'static OpInfo {
                &CAST
            }
            fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
                one(y.same())
            }
            fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
                back.input(0, grad.cast(self.0));
                Ok(())
            }
        }
        let from = self.dtype();
        Ok(Tensor::record(y, &[self], &[], || Back(from)))
    }
    /// A u8 mask: 1 where the value is finite, 0 elsewhere. Not differentiable.
    pub fn is_finite(&self) -> Result<Tensor> {
        let _op = spans::op("is_finite");
        let y = dispatch(
            [self.array().clone()],
            Half::Move,
            |[x]| with_dtype!(x.dtype(), |T| ew::map::<T, u8>(&x, |x| <T as Element>::to_f64(x).is_finite() as u8)),
            |gpu, [x]| match x.dtype().is_float() {
                true => cuda::is_finite(gpu, &x),
                false => Ok(Array::full(x.shape(), 1.0, (DType::U8, &x.device()))),
            },
        )?;
        Ok(Tensor::new(y))
    }
}
