//! Elementwise operations with two broadcast inputs: arithmetic, comparison, selection.
//!
//! A function is a type that implements `Binary`: its formula, its derivatives, and a kernel with its name in `cuda/binary.cu`.

pub(crate) mod cuda;

use crate::array::Array;
use crate::array::shape::{Dims, broadcast};
use crate::autograd::{Case, Cotangents, Differentiable, Gen, NO_PARAMS, OpInfo, Owner, Rule, Whose};
use crate::base::dtype::{of_bf16, to_bf16};
use crate::base::{DType, Error, Float, Result};
use crate::device::spans;
use crate::kernels::elementwise as ew;
use crate::kernels::{Half, dispatch};
use crate::ops::reduce::sum_to;
use crate::ops::unary;
use crate::{Tensor, with_dtype, with_float};
use half::bf16;
use smallvec::SmallVec;
use std::marker::PhantomData;

/// A random pair that broadcasts: equal shapes, missing leading dimensions, or sizes of 1. With `apart` no value of one is within 0.1 of a
/// value of the other, so that a small step does not change which is larger.
fn pair(g: &mut Gen, low: f64, high: f64, apart: bool) -> (Array, Array) {
    let rank = g.size(0, 5);
    let full = g.shape(rank);
    let cut = |g: &mut Gen| -> Vec<usize> {
        let lead = g.size(0, full.len());
        full[lead..].iter().map(|&s| if g.chance(0.3) { 1 } else { s }).collect()
    };
    let small = cut(g);
    let (a, b) = if g.chance(0.5) { (&full, &small) } else { (&small, &full) };
    if !apart {
        return (g.array_in(a, low, high), g.array_in(b, low, high));
    }
    let grid = |shift: f64| move |g: &mut Gen| ((low + (high - low) * g.uniform()) * 5.0).round() / 5.0 + shift;
    (g.array_of(a, grid(0.0)), g.array_of(b, grid(0.1)))
}

/// An elementwise function of two inputs.
pub(crate) trait Binary: 'static {
    /// Name of the op; its kernels are `{NAME}_{dtype}` and, if [`Binary::SAVES`], `{NAME}_grad_{dtype}`.
    const NAME: &'static str;
    /// Whether the derivatives depend on the inputs, which are then saved.
    const SAVES: bool;
    /// Inputs of the cases lie in this range, away from poles.
    const RANGE: [f64; 2] = [-2.0, 2.0];
    /// Whether the function has a kink where the inputs are equal, which the cases avoid.
    const KINK: bool = false;
    /// The registry entry.
    const INFO: &'static OpInfo =
        &OpInfo { name: Self::NAME, differentiable: Differentiable::Yes, factor: NO_PARAMS, cases: &[case::<Self>] };
    /// The function.
    fn f<T: Float>(x: T, y: T) -> T;
    /// Its derivative with respect to the first input.
    fn dx<T: Float>(x: T, y: T) -> T;
    /// Its derivative with respect to the second input.
    fn dy<T: Float>(x: T, y: T) -> T;
}

fn case<B: Binary + ?Sized>(g: &mut Gen) -> Result<Case> {
    let (a, b) = pair(g, B::RANGE[0], B::RANGE[1], B::KINK);
    Ok(Case::new(vec![a, b], |t| binary::<B>(&t[0], &t[1])))
}

struct Back<B: ?Sized> {
    saved: Option<[Array; 2]>,
    shapes: [Dims; 2],
    function: PhantomData<fn() -> Box<B>>,
}

impl<B: Binary + ?Sized> Rule for Back<B> {
    fn info(&self) -> &'static OpInfo {
        B::INFO
    }
    fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
        let [a, b] = [y.broadcast(&self.shapes[0]), y.broadcast(&self.shapes[1])];
        match B::NAME {
            "mul" => SmallVec::from_iter([y.times(1, a), y.times(0, b)]),
            _ => SmallVec::from_iter([a, b]),
        }
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        for side in [0, 1] {
            if back.needs(side) {
                let full = match &self.saved {
                    Some([a, b]) => gradient::<B>([a.clone(), b.clone(), grad.clone()], side)?,
                    None => {
                        let slope = if side == 0 { B::dx(1.0, 1.0) } else { B::dy(1.0, 1.0) };
                        unary::gradient::<unary::MulScalar>(grad.clone(), None, [slope, 0.0])?
                    }
                };
                back.input(side, sum_to(&full, &self.shapes[side])?);
            }
        }
        Ok(())
    }
}

/// grad · ∂f/∂(input `side`), in the broadcast shape.
fn gradient<B: Binary + ?Sized>(operands: [Array; 3], side: usize) -> Result<Array> {
    dispatch(
        operands,
        Half::Native,
        |[a, b, grad]| {
            with_float!(B::NAME, grad.dtype(), |T| {
                let slope = match side {
                    0 => ew::zip::<T, T, T>(
                        B::NAME,
                        &a,
                        &b,
                        #[inline(always)]
                        |x: T, y: T| B::dx(x, y),
                    )?,
                    _ => ew::zip::<T, T, T>(
                        B::NAME,
                        &a,
                        &b,
                        #[inline(always)]
                        |x: T, y: T| B::dy(x, y),
                    )?,
                };
                ew::zip_owned::<T, T>(B::NAME, slope, &grad, |s, g| s * g)
            })
        },
        |gpu, [a, b, grad]| ew::cuda::binary_grad(gpu, B::NAME, (&a, &b), &grad, side),
    )
}

/// The op of the function `B`.
fn binary<B: Binary + ?Sized>(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let _op = spans::op(B::NAME);
    let elements = 2 * a.numel().max(b.numel()) + a.numel().min(b.numel());
    spans::cost(0.0, (elements * a.dtype().size()) as f64);
    expect_same(B::NAME, a, b)?;
    let y = dispatch(
        [a.array().clone(), b.array().clone()],
        Half::Bf16,
        |[a, b]| {
            if a.dtype() == DType::BF16 {
                return ew::zip::<bf16, bf16, bf16>(
                    B::NAME,
                    &a,
                    &b,
                    #[inline(always)]
                    |x, y| to_bf16(B::f(of_bf16(x), of_bf16(y))),
                );
            }
            with_float!(B::NAME, a.dtype(), |T| {
                ew::zip::<T, T, T>(
                    B::NAME,
                    &a,
                    &b,
                    #[inline(always)]
                    |x: T, y: T| B::f(x, y),
                )
            })
        },
        |gpu, [a, b]| ew::cuda::binary(gpu, B::NAME, &a, &b),
    )?;
    let saved = B::SAVES.then(|| [a.array().clone(), b.array().clone()]);
    let shapes = [a.shape().into(), b.shape().into()];
    Ok(Tensor::record(y, &[a, b], &[], || Back::<B> { saved, shapes, function: PhantomData }))
}

/// The registry entries of this family.
pub static OPS: &[&OpInfo] =
    &[Add::INFO, Sub::INFO, Mul::INFO, Div::INFO, Maximum::INFO, Minimum::INFO, &COMPARE, &WHERE];

/// a + b.
pub(crate) struct Add;

impl Binary for Add {
    const NAME: &'static str = "add";
    const SAVES: bool = false;
    #[inline(always)]
    fn f<T: Float>(x: T, y: T) -> T {
        x + y
    }
    #[inline(always)]
    fn dx<T: Float>(_: T, _: T) -> T {
        T::ONE
    }
    #[inline(always)]
    fn dy<T: Float>(_: T, _: T) -> T {
        T::ONE
    }
}

/// a − b.
pub(crate) struct Sub;

impl Binary for Sub {
    const NAME: &'static str = "sub";
    const SAVES: bool = false;
    #[inline(always)]
    fn f<T: Float>(x: T, y: T) -> T {
        x - y
    }
    #[inline(always)]
    fn dx<T: Float>(_: T, _: T) -> T {
        T::ONE
    }
    #[inline(always)]
    fn dy<T: Float>(_: T, _: T) -> T {
        -T::ONE
    }
}

/// a·b, element by element.
pub(crate) struct Mul;

impl Binary for Mul {
    const NAME: &'static str = "mul";
    const SAVES: bool = true;
    #[inline(always)]
    fn f<T: Float>(x: T, y: T) -> T {
        x * y
    }
    #[inline(always)]
    fn dx<T: Float>(_: T, y: T) -> T {
        y
    }
    #[inline(always)]
    fn dy<T: Float>(x: T, _: T) -> T {
        x
    }
}

/// a/b.
pub(crate) struct Div;

impl Binary for Div {
    const NAME: &'static str = "div";
    const SAVES: bool = true;
    const RANGE: [f64; 2] = [0.4, 2.0];
    #[inline(always)]
    fn f<T: Float>(x: T, y: T) -> T {
        x / y
    }
    #[inline(always)]
    fn dx<T: Float>(_: T, y: T) -> T {
        T::ONE / y
    }
    #[inline(always)]
    fn dy<T: Float>(x: T, y: T) -> T {
        -x / (y * y)
    }
}

/// The larger of a and b; for equal values the gradient goes to a.
pub(crate) struct Maximum;

impl Binary for Maximum {
    const NAME: &'static str = "maximum";
    const SAVES: bool = true;
    const KINK: bool = true;
    #[inline(always)]
    fn f<T: Float>(x: T, y: T) -> T {
        x.larger(y)
    }
    #[inline(always)]
    fn dx<T: Float>(x: T, y: T) -> T {
        if x >= y { T::ONE } else { T::ZERO }
    }
    #[inline(always)]
    fn dy<T: Float>(x: T, y: T) -> T {
        if x >= y { T::ZERO } else { T::ONE }
    }
}

/// The smaller of a and b; for equal values the gradient goes to a.
pub(crate) struct Minimum;

impl Binary for Minimum {
    const NAME: &'static str = "minimum";
    const SAVES: bool = true;
    const KINK: bool = true;
    #[inline(always)]
    fn f<T: Float>(x: T, y: T) -> T {
        -(-x).larger(-y)
    }
    #[inline(always)]
    fn dx<T: Float>(x: T, y: T) -> T {
        if x <= y { T::ONE } else { T::ZERO }
    }
    #[inline(always)]
    fn dy<T: Float>(x: T, y: T) -> T {
        if x <= y { T::ZERO } else { T::ONE }
    }
}

impl Tensor {
    /// a + b.
    ///
    /// Shapes broadcast: they are aligned at the last dimension, and sizes must be equal or 1.
    pub fn add(&self, other: &Tensor) -> Result<Tensor> {
        binary::<Add>(self, other)
    }
    /// a − b.
    ///
    /// Shapes broadcast: they are aligned at the last dimension, and sizes must be equal or 1.
    pub fn sub(&self, other: &Tensor) -> Result<Tensor> {
        binary::<Sub>(self, other)
    }
    /// a·b, element by element.
    ///
    /// Shapes broadcast: they are aligned at the last dimension, and sizes must be equal or 1.
    pub fn mul(&self, other: &Tensor) -> Result<Tensor> {
        binary::<Mul>(self, other)
    }
    /// a/b.
    ///
    /// Shapes broadcast: they are aligned at the last dimension, and sizes must be equal or 1.
    pub fn div(&self, other: &Tensor) -> Result<Tensor> {
        binary::<Div>(self, other)
    }
    /// The larger of a and b; for equal values the gradient goes to a.
    ///
    /// Shapes broadcast: they are aligned at the last dimension, and sizes must be equal or 1.
    pub fn maximum(&self, other: &Tensor) -> Result<Tensor> {
        binary::<Maximum>(self, other)
    }
    /// The smaller of a and b; for equal values the gradient goes to a.
    ///
    /// Shapes broadcast: they are aligned at the last dimension, and sizes must be equal or 1.
    pub fn minimum(&self, other: &Tensor) -> Result<Tensor> {
        binary::<Minimum>(self, other)
    }
}

/// Checks that both are floats of one dtype.
fn expect_same(op: &'static str, a: &Tensor, b: &Tensor) -> Result<()> {
    a.dtype().expect_float(op)?;
    if a.dtype() != b.dtype() {
        return Err(Error::dtype(op, format!("{} and {} differ; cast one of them", a.dtype(), b.dtype())));
    }
    Ok(())
}

static COMPARE: OpInfo = OpInfo {
    name: "compare",
    differentiable: Differentiable::No("the result is a mask"),
    factor: NO_PARAMS,
    cases: &[|g| {
        let (a, b) = pair(g, -2.0, 2.0, false);
        Ok(Case::new(vec![a, b], |t| t[0].lt(&t[1])?.cast(DType::F64)))
    }],
};

static WHERE: OpInfo = OpInfo {
    name: "where",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[|g| {
        let (a, b) = pair(g, -2.0, 2.0, false);
        let shape = crate::array::shape::broadcast("where", a.shape(), b.shape())?;
        let mask = g.ids(&shape, 2).cast(DType::U8);
        Ok(Case::new(vec![a, b], move |t| Tensor::select(&Tensor::new(mask.clone()), &t[0], &t[1])))
    }],
};

/// The kind of comparison.
#[derive(Clone, Copy)]
pub(crate) enum Comparison {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
}

fn compare(which: Comparison, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let _op = spans::op("compare");
    if a.dtype() != b.dtype() {
        let message = format!("{} and {} differ; cast one of them", a.dtype(), b.dtype());
        return Err(Error::dtype("compare", message));
    }
    let y = dispatch(
        [a.array().clone(), b.array().clone()],
        Half::Move,
        |[a, b]| {
            with_dtype!(a.dtype(), |T| match which {
                Comparison::Eq => ew::zip::<T, T, u8>("compare", &a, &b, |x, y| (x == y) as u8),
                Comparison::Ne => ew::zip::<T, T, u8>("compare", &a, &b, |x, y| (x != y) as u8),
                Comparison::Lt => ew::zip::<T, T, u8>("compare", &a, &b, |x, y| (x < y) as u8),
                Comparison::Le => ew::zip::<T, T, u8>("compare", &a, &b, |x, y| (x <= y) as u8),
                Comparison::Gt => ew::zip::<T, T, u8>("compare", &a, &b, |x, y| (x > y) as u8),
                Comparison::Ge => ew::zip::<T, T, u8>("compare", &a, &b, |x, y| (x >= y) as u8),
            })
        },
        |gpu, [a, b]| cuda::compare(gpu, which, &a, &b),
    )?;
    Ok(Tensor::new(y))
}

impl Tensor {
    /// Mask (u8) of a = b; not differentiable.
    pub fn eq(&self, other: &Tensor) -> Result<Tensor> {
        compare(Comparison::Eq, self, other)
    }
    /// Mask (u8) of a ≠ b; not differentiable.
    pub fn ne(&self, other: &Tensor) -> Result<Tensor> {
        compare(Comparison::Ne, self, other)
    }
    /// Mask (u8) of a < b; not differentiable.
    pub fn lt(&self, other: &Tensor) -> Result<Tensor> {
        compare(Comparison::Lt, self, other)
    }
    /// Mask (u8) of a ≤ b; not differentiable.
    pub fn le(&self, other: &Tensor) -> Result<Tensor> {
        compare(Comparison::Le, self, other)
    }
    /// Mask (u8) of a > b; not differentiable.
    pub fn gt(&self, other: &Tensor) -> Result<Tensor> {
        compare(Comparison::Gt, self, other)
    }
    /// Mask (u8) of a ≥ b; not differentiable.
    pub fn ge(&self, other: &Tensor) -> Result<Tensor> {
        compare(Comparison::Ge, self, other)
    }
}

/// Backward of a selection.
struct WhereBack {
    mask: Array,
    shapes: [Dims; 2],
}

impl Rule for WhereBack {
    fn info(&self) -> &'static OpInfo {
        &WHERE
    }
    fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
        // The mask may keep samples apart.
        let side = |s: &Dims| match y.broadcast(s) {
            Owner::All if !matches!(y.owner, Owner::All) => Owner::Unknown,
            o => o,
        };
        self.shapes.iter().map(side).collect()
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        for (side, keep) in [(0, true), (1, false)] {
            if back.needs(side) {
                let part = dispatch(
                    [grad.clone(), self.mask.clone()],
                    Half::Move,
                    |[grad, mask]| {
                        with_dtype!(grad.dtype(), |T| ew::zip::<T, u8, T>("where", &grad, &mask, move |g, m| {
                            if (m != 0) == keep { g } else { T::default() }
                        }))
                    },
                    |gpu, [grad, mask]| cuda::mask(gpu, &grad, &mask, keep),
                )?;
                back.input(side, sum_to(&part, &self.shapes[side])?);
            }
        }
        Ok(())
    }
}

impl Tensor {
    /// `a` where the mask (u8) is not 0, `b` elsewhere, like `torch.where`. All three broadcast; `a` and `b` must have the same dtype, of
    /// any kind.
    pub fn select(mask: &Tensor, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let _op = spans::op("where");
        if mask.dtype() != DType::U8 {
            let message = format!("the mask must be u8 (from a comparison), got {}", mask.dtype());
            return Err(Error::dtype("where", message));
        }
        if a.dtype() != b.dtype() {
            let message = format!("{} and {} differ; cast one of them", a.dtype(), b.dtype());
            return Err(Error::dtype("where", message));
        }
        let shape = broadcast("where", a.shape(), b.shape())?;
        let shape = broadcast("where", &shape, mask.shape())?;
        let wide = |t: &Tensor| t.array().expand(&shape);
        let m = wide(mask)?;
        let y = dispatch(
            [m.clone(), wide(a)?, wide(b)?],
            Half::Move,
            |[m, a, b]| with_dtype!(a.dtype(), |T| ew::select::<T>(&m, &a, &b)),
            |gpu, [m, a, b]| cuda::select(gpu, &m, &a, &b),
        )?;
        let shapes = [a.shape().into(), b.shape().into()];
        Ok(match a.dtype().is_float() {
            true => Tensor::record(y, &[a, b], &[], || WhereBack { mask: m, shapes }),
            false => Tensor::new(y),
        })
    }
    /// `value` where the mask (u8) is not 0, this tensor elsewhere.
    pub fn masked_fill(&self, mask: &Tensor, value: f64) -> Result<Tensor> {
        Tensor::select(mask, &Tensor::new(Array::scalar(value, self.dtype())), self)
    }
}
