//! Operators on tensors.
//!
//! An operation can fail, where shapes do not fit or memory runs out, and nothing here panics on a user's input. A `?` after every operator
//! would make formulas hard to read, and the language does not allow operators on `Result`. Operators therefore give an [`Expr`], which
//! holds a tensor or the first error. Further operators work on it, and [`Expr::tensor`] returns the tensor or the error.

use crate::Tensor;
use crate::base::Result;
use std::ops::{Add, Div, Mul, Neg, Sub};

/// The value of a formula with operators, or the first error in it.
///
/// ```
/// use prismgrad::Tensor;
/// # fn main() -> prismgrad::Result<()> {
/// let (z, h, n) = (Tensor::from_slice(&[0.25], &[1])?, Tensor::from_slice(&[8.0], &[1])?, Tensor::from_slice(&[4.0], &[1])?);
/// let next = (&z * &h + (1.0 - &z) * &n).tensor()?;
/// assert_eq!(next.item()?, 5.0);
/// let other = Tensor::from_slice(&[1.0, 2.0, 3.0], &[3])?;
/// let two = Tensor::from_slice(&[1.0, 2.0], &[2])?;
/// assert!((&two + &other * 2.0).tensor().unwrap_err().to_string().contains("add"));
/// # Ok(()) }
/// ```
#[must_use = "an expression may hold an error: take its value with tensor()"]
pub struct Expr(Result<Tensor>);

impl Expr {
    /// The tensor, or the first error.
    pub fn tensor(self) -> Result<Tensor> {
        self.0
    }
}

/// What an operator may be applied to: a tensor, an expression or a number.
pub enum Operand {
    /// A tensor, or the error in its place.
    Tensor(Result<Tensor>),
    /// A number.
    Scalar(f64),
}

impl From<f64> for Operand {
    fn from(x: f64) -> Operand {
        Operand::Scalar(x)
    }
}
impl From<Tensor> for Operand {
    fn from(x: Tensor) -> Operand {
        Operand::Tensor(Ok(x))
    }
}
impl From<&Tensor> for Operand {
    fn from(x: &Tensor) -> Operand {
        Operand::Tensor(Ok(x.clone()))
    }
}
impl From<Expr> for Operand {
    fn from(x: Expr) -> Operand {
        Operand::Tensor(x.0)
    }
}

/// Computes `a op b`, by the tensor's own method where both are tensors.
fn apply(
    a: Operand,
    b: Operand,
    tensors: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor>,
    right: impl FnOnce(&Tensor, f64) -> Result<Tensor>,
    left: impl FnOnce(f64, &Tensor) -> Result<Tensor>,
    numbers: impl FnOnce(f64, f64) -> f64,
) -> Expr {
    use Operand::{Scalar, Tensor as T};
    Expr(match (a, b) {
        (T(a), T(b)) => a.and_then(|a| tensors(&a, &b?)),
        (T(a), Scalar(b)) => a.and_then(|a| right(&a, b)),
        (Scalar(a), T(b)) => b.and_then(|b| left(a, &b)),
        (Scalar(a), Scalar(b)) => Tensor::from_slice(&[numbers(a, b)], &[]),
    })
}

macro_rules! operator {
    ($trait:ident, $method:ident, $tensors:expr, $right:expr, $left:expr) => {
        operator!(@ $trait, $method, $tensors, $right, $left, Tensor, &Tensor, Expr);
        operator!(# $trait, $method, $tensors, $right, $left, Tensor, &Tensor, Expr);
    };
    (@ $trait:ident, $method:ident, $tensors:expr, $right:expr, $left:expr, $($a:ty),*) => {
        $(impl<B: Into<Operand>> $trait<B> for $a {
            type Output = Expr;
            fn $method(self, b: B) -> Expr {
                apply(self.into(), b.into(), $tensors, $right, $left, |a, b| a.$method(b))
            }
        })*
    };
    (# $trait:ident, $method:ident, $tensors:expr, $right:expr, $left:expr, $($b:ty),*) => {
        $(impl $trait<$b> for f64 {
            type Output = Expr;
            fn $method(self, b: $b) -> Expr {
                apply(self.into(), b.into(), $tensors, $right, $left, |a, b| a.$method(b))
            }
        })*
    };
}

operator!(Add, add, |a, b| a.add(b), |a, b| a.add_scalar(b), |a, b| b.add_scalar(a));
operator!(Sub, sub, |a, b| a.sub(b), |a, b| a.add_scalar(-b), |a, b| b.neg()?.add_scalar(a));
operator!(Mul, mul, |a, b| a.mul(b), |a, b| a.mul_scalar(b), |a, b| b.mul_scalar(a));
operator!(Div, div, |a, b| a.div(b), |a, b| a.mul_scalar(1.0 / b), |a, b| b.recip()?.mul_scalar(a));

macro_rules! negation {
    ($($a:ty),*) => {
        $(impl Neg for $a {
            type Output = Expr;
            fn neg(self) -> Expr {
                match self.into() {
                    Operand::Tensor(x) => Expr(x.and_then(|x| Tensor::neg(&x))),
                    Operand::Scalar(x) => Expr(Tensor::from_slice(&[-x], &[])),
                }
            }
        })*
    };
}

negation!(Tensor, &Tensor, Expr);
