//! One input, one output, element by element: activations and elementary functions.

pub(crate) mod cuda;

use crate::array::Array;
use crate::autograd::{Case, Differentiable, Flow, Gen, NO_PARAMS, OpInfo, Rule};
use crate::base::{DType, Float, Result};
use crate::device::spans;
use crate::kernels::elementwise as ew;
use crate::kernels::elementwise::cuda as gpu_ew;
use crate::{Tensor, with_dtype, with_float};

/// What a rule needs of the forward pass.
#[derive(Clone, Copy, PartialEq)]
enum Save {
    Nothing,
    Input,
    Output,
}

macro_rules! unary {
    ($($(#[$doc:meta])* $name:ident / $info:ident, $save:ident, |$x:ident $(, $p:ident)*| $f:expr, |$s:ident| $d:expr,
       [$lo:expr, $hi:expr], ($($arg:expr),*);)*) => {
        $(
            static $info: OpInfo = OpInfo {
                name: stringify!($name),
                differentiable: Differentiable::Yes,
                factor: NO_PARAMS,
                cases: &[|g: &mut Gen| {
                    let rank = g.size(0, 3);
                    let shape = g.shape(rank);
                    Ok(Case::new(vec![g.array_in(&shape, $lo, $hi)], |t| t[0].$name($($arg),*)))
                }],
            };
            impl Tensor {
                $(#[$doc])*
                pub fn $name(&self $(, $p: f64)*) -> Result<Tensor> {
                    let _op = spans::op(stringify!($name));
                    spans::cost(0.0, (2 * self.numel() * self.dtype().size()) as f64);
                    #[inline(always)]
                    fn f<T: Float>($x: T $(, $p: T)*) -> T { $f }
                    #[inline(always)]
                    fn d<T: Float>($s: T $(, $p: T)*) -> T { $(let _ = $p;)* $d }
                    struct Back { saved: Option<Array> $(, $p: f64)* }
                    impl Rule for Back {
                        fn info(&self) -> &'static OpInfo { &$info }
                        fn backward(&self, grad: Array, flow: &mut Flow) -> Result<()> {
                            $(let $p = self.$p;)*
                            if let Some(gpu) = grad.gpu() {
                                #[allow(unused_mut, unused_assignments)]
                                let (mut pq, mut _i) = ([0.0f64; 2], 0);
                                $(pq[_i] = $p; _i += 1;)*
                                let dx = match (&self.saved, stringify!($name)) {
                                    (Some(s), name) => gpu_ew::unary_grad(gpu, name, &grad, s, pq)?,
                                    (None, "add_scalar") => grad,
                                    (None, name) => gpu_ew::unary(gpu, name, &grad, pq)?,
                                };
                                flow.input(0, dx);
                                return Ok(());
                            }
                            let dx = with_float!(stringify!($name), grad.dtype(), T => {
                                $(let $p = <T as crate::base::Element>::from_f64($p);)*
                                match &self.saved {
                                    Some(s) => ew::zip_owned::<T, T>(stringify!($name), grad, s, #[inline(always)] move |g: T, s: T| g * d(s $(, $p)*)),
                                    None => ew::map_owned::<T>(grad, #[inline(always)] move |g: T| g * d(T::ONE $(, $p)*)),
                                }
                            })?;
                            flow.input(0, dx);
                            Ok(())
                        }
                    }
                    self.dtype().expect_float(stringify!($name))?;
                    if let Some(gpu) = self.array().gpu() {
                        #[allow(unused_mut, unused_assignments)]
                        let (mut pq, mut _i) = ([0.0f64; 2], 0);
                        $(pq[_i] = $p; _i += 1;)*
                        let y = gpu_ew::unary(gpu, stringify!($name), self.array(), pq)?;
                        let saved = match Save::$save {
                            Save::Nothing => None,
                            Save::Input => Some(self.array().clone()),
                            Save::Output => Some(y.clone()),
                        };
                        return Ok(Tensor::record(y, &[self], &[], move || Back { saved $(, $p)* }));
                    }
                    if self.dtype().is_half() {
                        return self.cast(DType::F32)?.$name($($p),*)?.cast(self.dtype());
                    }
                    let y = with_float!(stringify!($name), self.dtype(), T => {
                        $(let $p = <T as crate::base::Element>::from_f64($p);)*
                        ew::map::<T, T>(self.array(), #[inline(always)] move |x: T| f(x $(, $p)*))
                    })?;
                    let saved = match Save::$save {
                        Save::Nothing => None,
                        Save::Input => Some(self.array().clone()),
                        Save::Output => Some(y.clone()),
                    };
                    $(let _ = $p;)*
                    Ok(Tensor::record(y, &[self], &[], move || Back { saved $(, $p)* }))
                }
            }
        )*
        /// This family's entries.
        pub static OPS: &[&OpInfo] = &[$(&$info,)* &CAST];
    };
}

unary! {
    /// −x.
    neg / NEG, Nothing, |x| -x, |_s| -T::ONE, [-2.0, 2.0], ();
    /// eˣ.
    exp / EXP, Output, |x| x.exp(), |s| s, [-2.0, 2.0], ();
    /// Natural logarithm.
    log / LOG, Input, |x| x.ln(), |s| T::ONE / s, [0.2, 3.0], ();
    /// √x.
    sqrt / SQRT, Output, |x| x.sqrt(), |s| T::from_f64(0.5) / s, [0.2, 3.0], ();
    /// x².
    square / SQUARE, Input, |x| x * x, |s| s + s, [-2.0, 2.0], ();
    /// |x|; the derivative at 0 is 0.
    abs / ABS, Input, |x| x.abs(), |s| s.sign(), [0.1, 2.0], ();
    /// 1/x.
    recip / RECIP, Output, |x| T::ONE / x, |s| -s * s, [0.3, 3.0], ();
    /// sin x.
    sin / SIN, Input, |x| x.sin(), |s| s.cos(), [-3.0, 3.0], ();
    /// cos x.
    cos / COS, Input, |x| x.cos(), |s| -s.sin(), [-3.0, 3.0], ();
    /// tanh x.
    tanh / TANH, Output, |x| x.tanh(), |s| T::ONE - s * s, [-2.0, 2.0], ();
    /// 1/(1 + e⁻ˣ).
    sigmoid / SIGMOID, Output, |x| x.sigmoid(), |s| s * (T::ONE - s), [-3.0, 3.0], ();
    /// The error function.
    erf / ERF, Input, |x| x.erf(),
        |s| T::from_f64(std::f64::consts::FRAC_2_SQRT_PI) * (-s * s).exp(), [-2.0, 2.0], ();
    /// max(x, 0); the derivative at 0 is 0.
    relu / RELU, Output, |x| x.larger(T::ZERO), |s| if s > T::ZERO { T::ONE } else { T::ZERO }, [0.05, 2.0], ();
    /// x for x > 0, `slope`·x otherwise.
    leaky_relu / LEAKY_RELU, Input, |x, slope| if x > T::ZERO { x } else { slope * x },
        |s| if s > T::ZERO { T::ONE } else { slope }, [-2.0, -0.05], (0.1);
    /// x·Φ(x) with the exact normal distribution function (Hendrycks & Gimpel 2016).
    gelu / GELU, Input, |x| x.gelu(), |s| s.gelu_grad(), [-3.0, 3.0], ();
    /// The tanh approximation of [`Tensor::gelu`], as GPT-2 uses it.
    gelu_tanh / GELU_TANH, Input, |x| x.gelu_tanh(), |s| s.gelu_tanh_grad(), [-3.0, 3.0], ();
    /// x·sigmoid(x) (SiLU, also called swish).
    silu / SILU, Input, |x| x * x.sigmoid(),
        |s| { let y = s.sigmoid(); y * (T::ONE + s * (T::ONE - y)) }, [-3.0, 3.0], ();
    /// ln(1 + eˣ), without overflow.
    softplus / SOFTPLUS, Input, |x| x.softplus(), |s| s.sigmoid(), [-3.0, 3.0], ();
    /// x to a constant power.
    powf / POWF, Input, |x, p| x.pow(p), |s| p * s.pow(p - T::ONE), [0.3, 2.0], (2.5);
    /// x + c.
    add_scalar / ADD_SCALAR, Nothing, |x, c| x + c, |_s| T::ONE, [-2.0, 2.0], (0.7);
    /// c·x.
    mul_scalar / MUL_SCALAR, Nothing, |x, c| x * c, |_s| c, [-2.0, 2.0], (-1.7);
    /// x limited to `low..=high`; the derivative outside is 0.
    clamp / CLAMP, Input, |x, low, high| if x < low { low } else if x > high { high } else { x },
        |s| if s < low || s > high { T::ZERO } else { T::ONE }, [-2.0, 2.0], (-5.0, 2.5);
}

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
    /// Converted to another dtype. Between float types the gradient is converted back; to and from integers there is
    /// none.
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
            fn backward(&self, grad: Array, flow: &mut Flow) -> Result<()> {
                flow.input(0, grad.cast(self.0));
                Ok(())
            }
        }
        let from = self.dtype();
        Ok(Tensor::record(y, &[self], &[], || Back(from)))
    }
    /// 1 where the value is finite, 0 elsewhere, u8.
    pub fn is_finite(&self) -> Result<Tensor> {
        let _op = spans::op("is_finite");
        let a = self.array();
        if let (Some(gpu), true) = (a.gpu(), a.dtype().is_float()) {
            return Ok(Tensor::new(cuda::is_finite(gpu, a)?));
        }
        let finite = with_dtype!(a.dtype(), T => ew::map::<T, u8>(a, |x| {
            crate::base::Element::to_f64(x).is_finite() as u8
        }));
        Ok(Tensor::new(finite?))
    }
}
