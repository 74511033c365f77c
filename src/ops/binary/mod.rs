//! Two broadcast inputs: arithmetic, comparison, selection.

pub(crate) mod cuda;

use crate::array::Array;
use crate::array::shape::Dims;
use crate::autograd::{Case, Differentiable, Flow, Gen, NO_PARAMS, OpInfo, Rule};
use crate::base::{DType, Error, Float, Result};
use crate::device::spans;
use crate::kernels::elementwise as ew;
use crate::kernels::elementwise::cuda as gpu_ew;
use crate::{Tensor, with_dtype, with_float};

/// A random pair that broadcasts: equal shapes, missing leading dimensions, or sizes of 1.
fn pair(g: &mut Gen, low: f64, high: f64) -> (Array, Array) {
    let rank = g.size(0, 3);
    let full = g.shape(rank);
    let cut = |g: &mut Gen| -> Vec<usize> {
        let lead = g.size(0, full.len());
        full[lead..].iter().map(|&s| if g.chance(0.3) { 1 } else { s }).collect()
    };
    let small = cut(g);
    if g.chance(0.5) {
        (g.array_in(&full, low, high), g.array_in(&small, low, high))
    } else {
        (g.array_in(&small, low, high), g.array_in(&full, low, high))
    }
}

macro_rules! binary {
    ($($(#[$doc:meta])* $name:ident / $info:ident, |$x:ident, $y:ident| $f:expr, |$g:ident| $dx:expr, $dy:expr,
       [$lo:expr, $hi:expr], saves $saves:literal;)*) => {
        $(
            static $info: OpInfo = OpInfo {
                name: stringify!($name),
                differentiable: Differentiable::Yes,
                factor: NO_PARAMS,
                cases: &[|g: &mut Gen| {
                    let (a, b) = pair(g, $lo, $hi);
                    Ok(Case::new(vec![a, b], |t| t[0].$name(&t[1])))
                }],
            };
            impl Tensor {
                $(#[$doc])*
                ///
                /// Shapes broadcast: aligned at the last dimension, sizes equal or 1.
                pub fn $name(&self, other: &Tensor) -> Result<Tensor> {
                    let _op = spans::op(stringify!($name));
                    let elements = 2 * self.numel().max(other.numel()) + self.numel().min(other.numel());
                    spans::cost(0.0, (elements * self.dtype().size()) as f64);
                    struct Back { a: Option<Array>, b: Option<Array>, sa: Dims, sb: Dims }
                    impl Rule for Back {
                        fn info(&self) -> &'static OpInfo { &$info }
                        #[allow(unused_variables)]
                        fn backward(&self, grad: Array, flow: &mut Flow) -> Result<()> {
                            if let Some(gpu) = grad.gpu() {
                                for side in [0usize, 1] {
                                    if !flow.wants(side) { continue; }
                                    let name = stringify!($name);
                                    let full = match (&self.a, &self.b) {
                                        (Some(a), Some(b)) => gpu_ew::binary_grad(gpu, name, (a, b), &grad, side)?,
                                        _ if name == "sub" && side == 1 => gpu_ew::unary(gpu, "neg", &grad, [0.0; 2])?,
                                        _ => grad.clone(),
                                    };
                                    let shape = if side == 0 { &self.sa } else { &self.sb };
                                    flow.input(side, super::reduce::sum_to(&full, shape)?);
                                }
                                return Ok(());
                            }
                            with_float!(stringify!($name), grad.dtype(), T => {
                                for side in [0usize, 1] {
                                    if !flow.wants(side) { continue; }
                                    let full: Array = match (&self.a, &self.b) {
                                        (Some(a), Some(b)) => {
                                            // d·(factor of both operands), broadcast to the output.
                                            let factor = if side == 0 {
                                                ew::zip::<T, T, T>(stringify!($name), a, b, #[inline(always)] |$x: T, $y: T| { let $g = T::ONE; $dx })?
                                            } else {
                                                ew::zip::<T, T, T>(stringify!($name), a, b, #[inline(always)] |$x: T, $y: T| { let $g = T::ONE; $dy })?
                                            };
                                            ew::zip_owned::<T, T>(stringify!($name), factor, &grad, |f, g| f * g)?
                                        }
                                        _ => {
                                            let ($x, $y, $g) = (T::ONE, T::ONE, T::ONE);
                                            let sign: T = if side == 0 { $dx } else { $dy };
                                            if sign == T::ONE { grad.clone() } else { ew::map::<T, T>(&grad, move |g| sign * g)? }
                                        }
                                    };
                                    let shape = if side == 0 { &self.sa } else { &self.sb };
                                    flow.input(side, super::reduce::sum_to(&full, shape)?);
                                }
                                Ok(())
                            })
                        }
                    }
                    let (sa, sb): (Dims, Dims) = (self.shape().into(), other.shape().into());
                    if let Some(gpu) = self.array().gpu().or(other.array().gpu()) {
                        expect_same(stringify!($name), self, other)?;
                        let y = gpu_ew::binary(gpu, stringify!($name), self.array(), other.array())?;
                        let keep = |t: &Tensor| $saves.then(|| t.array().clone());
                        return Ok(Tensor::record(y, &[self, other], &[], || Back { a: keep(self), b: keep(other), sa, sb }));
                    }
                    let (a, b, out) = same_float(stringify!($name), self, other)?;
                    let y = with_float!(stringify!($name), a.dtype(), T => {
                        ew::zip::<T, T, T>(stringify!($name), a.array(), b.array(), #[inline(always)] |$x: T, $y: T| $f)
                    })?;
                    let keep = |t: &Tensor| $saves.then(|| t.array().clone());
                    Tensor::record(y, &[&a, &b], &[], || Back { a: keep(&a), b: keep(&b), sa, sb }).cast(out)
                }
            }
        )*
        /// This family's entries.
        pub static OPS: &[&OpInfo] = &[$(&$info,)* &COMPARE, &WHERE];
    };
}

binary! {
    /// a + b.
    add / ADD, |x, y| x + y, |g| g, g, [-2.0, 2.0], saves false;
    /// a − b.
    sub / SUB, |x, y| x - y, |g| g, -g, [-2.0, 2.0], saves false;
    /// a·b, element by element.
    mul / MUL, |x, y| x * y, |g| g * y, g * x, [-2.0, 2.0], saves true;
    /// a/b.
    div / DIV, |x, y| x / y, |g| g / y, -g * x / (y * y), [0.4, 2.0], saves true;
    /// The larger of a and b; a tie sends the gradient to a.
    maximum / MAXIMUM, |x, y| x.larger(y), |g| if x >= y { g } else { T::ZERO }, if x >= y { T::ZERO } else { g },
        [-2.0, 2.0], saves true;
    /// The smaller of a and b; a tie sends the gradient to a.
    minimum / MINIMUM, |x, y| -(-x).larger(-y), |g| if x <= y { g } else { T::ZERO }, if x <= y { T::ZERO } else { g },
        [-2.0, 2.0], saves true;
}

/// Floats of one dtype.
fn expect_same(op: &'static str, a: &Tensor, b: &Tensor) -> Result<()> {
    a.dtype().expect_float(op)?;
    if a.dtype() != b.dtype() {
        return Err(Error::dtype(op, format!("{} and {} differ; cast one of them", a.dtype(), b.dtype())));
    }
    Ok(())
}

/// Both operands in one compute dtype, and the dtype the result goes back to.
fn same_float(op: &'static str, a: &Tensor, b: &Tensor) -> Result<(Tensor, Tensor, DType)> {
    expect_same(op, a, b)?;
    let d = a.dtype();
    Ok((a.cast(d.compute())?, b.cast(d.compute())?, d))
}

static COMPARE: OpInfo = OpInfo {
    name: "compare",
    differentiable: Differentiable::No("the result is a mask"),
    factor: NO_PARAMS,
    cases: &[|g| {
        let (a, b) = pair(g, -2.0, 2.0);
        Ok(Case::new(vec![a, b], |t| t[0].lt(&t[1])?.cast(DType::F64)))
    }],
};

static WHERE: OpInfo = OpInfo {
    name: "where",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[|g| {
        let (a, b) = pair(g, -2.0, 2.0);
        let shape = crate::array::shape::broadcast("where", a.shape(), b.shape())?;
        let mask = g.array(&shape);
        let mask = ew::map::<f64, u8>(&mask.cast(DType::F64), |x| (x > 0.0) as u8)?;
        Ok(Case::new(vec![a, b], move |t| Tensor::select(&Tensor::new(mask.clone()), &t[0], &t[1])))
    }],
};

macro_rules! compare {
    ($($(#[$doc:meta])* $name:ident, $op:tt, $code:literal;)*) => {
        impl Tensor {
            $(
                $(#[$doc])*
                pub fn $name(&self, other: &Tensor) -> Result<Tensor> {
                    let _op = spans::op("compare");
                    if self.dtype() != other.dtype() {
                        return Err(Error::dtype(stringify!($name), format!("{} and {} differ; cast one of them", self.dtype(), other.dtype())));
                    }
                    let (a, b) = (self.array(), other.array());
                    if let Some(gpu) = a.gpu().or(b.gpu()) {
                        return Ok(Tensor::new(cuda::compare(gpu, $code, a, b)?));
                    }
                    Ok(Tensor::new(with_dtype!(a.dtype(), T => {
                        ew::zip::<T, T, u8>(stringify!($name), a, b, |x, y| (x $op y) as u8)
                    })?))
                }
            )*
        }
    };
}

compare! {
    /// Mask (u8) of a = b; not differentiable.
    eq, ==, 0;
    /// Mask (u8) of a ≠ b; not differentiable.
    ne, !=, 1;
    /// Mask (u8) of a < b; not differentiable.
    lt, <, 2;
    /// Mask (u8) of a ≤ b; not differentiable.
    le, <=, 3;
    /// Mask (u8) of a > b; not differentiable.
    gt, >, 4;
    /// Mask (u8) of a ≥ b; not differentiable.
    ge, >=, 5;
}

impl Tensor {
    /// `a` where the mask (u8) is not 0, `b` elsewhere. All three broadcast.
    pub fn select(mask: &Tensor, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let _op = spans::op("where");
        struct Back {
            mask: Array,
            sa: Dims,
            sb: Dims,
        }
        impl Rule for Back {
            fn info(&self) -> &'static OpInfo {
                &WHERE
            }
            fn backward(&self, grad: Array, flow: &mut Flow) -> Result<()> {
                if let Some(gpu) = grad.gpu() {
                    for (side, keep) in [(0, true), (1, false)] {
                        if flow.wants(side) {
                            let part = cuda::mask(gpu, &grad, &self.mask, keep)?;
                            flow.input(
                                side,
                                super::reduce::sum_to(&part, if side == 0 { &self.sa } else { &self.sb })?,
                            );
                        }
                    }
                    return Ok(());
                }
                with_float!("where", grad.dtype(), T => {
                    for (side, keep) in [(0, true), (1, false)] {
                        if flow.wants(side) {
                            let part = ew::zip::<T, u8, T>("where", &grad, &self.mask, move |g, m| {
                                if (m != 0) == keep { g } else { T::ZERO }
                            })?;
                            flow.input(side, super::reduce::sum_to(&part, if side == 0 { &self.sa } else { &self.sb })?);
                        }
                    }
                    Ok(())
                })
            }
        }
        if mask.dtype() != DType::U8 {
            return Err(Error::dtype(
                "where",
                format!("the mask must be u8 (from a comparison), got {}", mask.dtype()),
            ));
        }
        expect_same("where", a, b)?;
        let shape = crate::array::shape::broadcast("where", a.shape(), b.shape())?;
        let shape = crate::array::shape::broadcast("where", &shape, mask.shape())?;
        let (sa, sb): (Dims, Dims) = (a.shape().into(), b.shape().into());
        if let Some(gpu) = a.array().gpu().or(b.array().gpu()) {
            let (m, x, y) = (mask.array().expand(&shape)?, a.array().expand(&shape)?, b.array().expand(&shape)?);
            let y = cuda::select(gpu, &m, &x, &y)?;
            return Ok(Tensor::record(y, &[a, b], &[], || Back { mask: m, sa, sb }));
        }
        let (a, b, out) = same_float("where", a, b)?;
        let (m, ea, eb) = (mask.array().expand(&shape)?, a.array().expand(&shape)?, b.array().expand(&shape)?);
        let y = with_float!("where", a.dtype(), T => {
            // Two passes keep the loops to two operands: pick `a` under the mask, then `b` elsewhere.
            let bits = ew::zip::<T, u8, T>("where", &ea, &m, |x, m| if m != 0 { x } else { T::ZERO })?;
            let rest = ew::zip::<T, u8, T>("where", &eb, &m, |x, m| if m == 0 { x } else { T::ZERO })?;
            // Selected zeros are exact, so the sum is the selection.
            ew::zip_owned::<T, T>("where", bits, &rest, |x, y| if x == T::ZERO { y } else { x })
        })?;
        Tensor::record(y, &[&a, &b], &[], || Back { mask: m, sa, sb }).cast(out)
    }
    /// `value` where the mask (u8) is not 0, this tensor elsewhere.
    pub fn masked_fill(&self, mask: &Tensor, value: f64) -> Result<Tensor> {
        Tensor::select(mask, &Tensor::new(Array::scalar(value, self.dtype())), self)
    }
}
