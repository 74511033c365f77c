//! Element types.

use crate::base::vmath::{f32 as math32, f64 as math64};
use crate::base::{Error, Result};
use half::{bf16, f16};
use std::fmt;

/// Element type of an [`Array`](crate::Array). It is a value at run time, never a type parameter.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// 32-bit float: the default, and the type in which norms, sums and noise are computed.
    F32,
    /// bfloat16; computed in f32, stored rounded to nearest even.
    BF16,
    /// IEEE half; computed in f32, stored rounded to nearest even.
    F16,
    /// 64-bit float, for checks.
    F64,
    /// 32-bit unsigned: indices, token ids.
    U32,
    /// 64-bit signed: indices.
    I64,
    /// Bytes and masks (0 or 1).
    U8,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            DType::F64 | DType::I64 => 8,
            DType::F32 | DType::U32 => 4,
            DType::BF16 | DType::F16 => 2,
            DType::U8 => 1,
        }
    }
    /// f32, f64, bf16 or f16.
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::F64 | DType::BF16 | DType::F16)
    }
    /// bf16 or f16: stored in 16 bits, computed in f32.
    pub const fn is_half(self) -> bool {
        matches!(self, DType::BF16 | DType::F16)
    }
    /// The type arithmetic is done in: f32 for the halves, the type itself otherwise.
    pub const fn compute(self) -> DType {
        if self.is_half() { DType::F32 } else { self }
    }
    /// Lower-case name, as printed in errors.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::BF16 => "bf16",
            DType::F16 => "f16",
            DType::F64 => "f64",
            DType::U32 => "u32",
            DType::I64 => "i64",
            DType::U8 => "u8",
        }
    }
    pub(crate) fn expect_float(self, op: &'static str) -> Result<()> {
        if self.is_float() {
            Ok(())
        } else {
            Err(Error::dtype(op, format!("needs a float tensor, got {self}; cast it first with .cast(DType::F32)")))
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The bf16 nearest to `x`, with ties to even; a NaN stays a NaN. The code is branch-free, so that loops over it are vectorised.
#[inline(always)]
pub(crate) fn to_bf16(x: f32) -> bf16 {
    let b = x.to_bits();
    let near = b.wrapping_add(0x7fff + ((b >> 16) & 1)) >> 16;
    let nan = (b >> 16) | 0x40;
    bf16::from_bits(if b & 0x7fff_ffff > 0x7f80_0000 { nan } else { near } as u16)
}

/// The same number in f32; the conversion is exact.
#[inline(always)]
pub(crate) fn of_bf16(x: bf16) -> f32 {
    f32::from_bits((x.to_bits() as u32) << 16)
}

/// A Rust type that can be an element.
pub trait Element: bytemuck::Pod + Send + Sync + PartialOrd + fmt::Debug + Default + 'static {
    /// The matching run-time type.
    const DTYPE: DType;
    /// Nearest value of this type (integers: truncated and saturated).
    fn from_f64(v: f64) -> Self;
    /// Value as f64 (exact, except for i64 values beyond 2^53).
    fn to_f64(self) -> f64;
}

/// An element type that CPU loops read and write directly, together with the float type in which they compute.
pub trait Computed: Element {
    /// The type of the computation: f32 for bf16, otherwise the element type itself.
    type Wide: Float;
    /// The same number in [`Computed::Wide`].
    fn wide(self) -> Self::Wide;
    /// The nearest element, ties to even.
    fn rounded(x: Self::Wide) -> Self;
}

macro_rules! computed {
    ($($t:ty, $wide:ty, $to:expr, $from:expr;)*) => {$(
        impl Computed for $t {
            type Wide = $wide;
            #[inline(always)]
            fn wide(self) -> $wide { $to(self) }
            #[inline(always)]
            fn rounded(x: $wide) -> $t { $from(x) }
        }
    )*};
}

computed! {
    f32, f32, |x| x, |x| x;
    f64, f64, |x| x, |x| x;
    bf16, f32, of_bf16, to_bf16;
}

macro_rules! element {
    ($($t:ty, $d:ident, |$v:ident| $from:expr, |$s:ident| $to:expr;)*) => {$(
        impl Element for $t {
            const DTYPE: DType = DType::$d;
            #[inline(always)]
            fn from_f64($v: f64) -> Self { $from }
            #[inline(always)]
            fn to_f64(self) -> f64 { let $s = self; $to }
        }
    )*};
}

element! {
    f32, F32, |v| v as f32, |s| s as f64;
    f64, F64, |v| v, |s| s;
    bf16, BF16, |v| bf16::from_f64(v), |s| s.to_f64();
    f16, F16, |v| f16::from_f64(v), |s| s.to_f64();
    u32, U32, |v| v as u32, |s| s as f64;
    i64, I64, |v| v as i64, |s| s as f64;
    u8, U8, |v| v as u8, |s| s as f64;
}

/// A type in which arithmetic is done: f32 or f64.
pub trait Float:
    Element
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Neg<Output = Self>
    + std::ops::AddAssign
    + std::ops::MulAssign
    + std::iter::Sum
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// −∞.
    const NEG_INFINITY: Self;
    /// √x.
    fn sqrt(self) -> Self;
    /// eˣ.
    fn exp(self) -> Self;
    /// ln x.
    fn ln(self) -> Self;
    /// |x|.
    fn abs(self) -> Self;
    /// −1, 0 or 1.
    fn sign(self) -> Self;
    /// sin x.
    fn sin(self) -> Self;
    /// cos x.
    fn cos(self) -> Self;
    /// tanh x.
    fn tanh(self) -> Self;
    /// The error function.
    fn erf(self) -> Self;
    /// 1/(1 + e⁻ˣ).
    fn sigmoid(self) -> Self;
    /// x·Φ(x).
    fn gelu(self) -> Self;
    /// Derivative of [`Float::gelu`].
    fn gelu_grad(self) -> Self;
    /// Tanh approximation of [`Float::gelu`].
    fn gelu_tanh(self) -> Self;
    /// Derivative of [`Float::gelu_tanh`].
    fn gelu_tanh_grad(self) -> Self;
    /// ln(1 + eˣ).
    fn softplus(self) -> Self;
    /// self·a + b in one rounding; slow without hardware support.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// x to the power p.
    fn pow(self, p: Self) -> Self;
    /// The larger; NaN if either is NaN.
    fn larger(self, o: Self) -> Self;
    /// NaN.
    fn is_nan(self) -> bool;
    /// Not NaN and not infinite.
    fn finite(self) -> bool;
}

macro_rules! float {
    ($t:ty, $math:ident) => {
        impl Float for $t {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const NEG_INFINITY: Self = <$t>::NEG_INFINITY;
            #[inline(always)]
            fn sqrt(self) -> Self {
                <$t>::sqrt(self)
            }
            #[inline(always)]
            fn exp(self) -> Self {
                $math::exp(self)
            }
            #[inline(always)]
            fn ln(self) -> Self {
                $math::ln(self)
            }
            #[inline(always)]
            fn abs(self) -> Self {
                <$t>::abs(self)
            }
            #[inline(always)]
            fn sign(self) -> Self {
                if self > 0.0 {
                    1.0
                } else if self < 0.0 {
                    -1.0
                } else {
                    0.0
                }
            }
            #[inline(always)]
            fn sin(self) -> Self {
                <$t>::sin(self)
            }
            #[inline(always)]
            fn cos(self) -> Self {
                <$t>::cos(self)
            }
            #[inline(always)]
            fn tanh(self) -> Self {
                $math::tanh(self)
            }
            #[inline(always)]
            fn erf(self) -> Self {
                $math::erf(self)
            }
            #[inline(always)]
            fn sigmoid(self) -> Self {
                $math::sigmoid(self)
            }
            #[inline(always)]
            fn gelu(self) -> Self {
                $math::gelu_erf(self)
            }
            #[inline(always)]
            fn gelu_grad(self) -> Self {
                $math::gelu_erf_grad(self)
            }
            #[inline(always)]
            fn gelu_tanh(self) -> Self {
                $math::gelu_tanh(self)
            }
            #[inline(always)]
            fn gelu_tanh_grad(self) -> Self {
                $math::gelu_tanh_grad(self)
            }
            #[inline(always)]
            fn softplus(self) -> Self {
                self.larger(0.0) + $math::exp(-<$t>::abs(self)).ln_1p()
            }
            #[inline(always)]
            fn mul_add(self, a: Self, b: Self) -> Self {
                <$t>::mul_add(self, a, b)
            }
            #[inline(always)]
            fn pow(self, p: Self) -> Self {
                <$t>::powf(self, p)
            }
            #[inline(always)]
            fn larger(self, o: Self) -> Self {
                if <$t>::is_nan(self) || <$t>::is_nan(o) {
                    <$t>::NAN
                } else if self > o {
                    self
                } else {
                    o
                }
            }
            #[inline(always)]
            fn is_nan(self) -> bool {
                <$t>::is_nan(self)
            }
            #[inline(always)]
            fn finite(self) -> bool {
                self.is_finite()
            }
        }
    };
}
float!(f32, math32);
float!(f64, math64);

/// Runs the body with `$t` bound to the Rust type of a compute dtype (f32 or f64); 16-bit operands must have been cast before. The body
/// returns a [`Result`](crate::Result); any other dtype is an error that names `$op`.
#[macro_export]
macro_rules! with_float {
    ($op:expr, $dtype:expr, |$t:ident| $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $t = f32;
                $body
            }
            $crate::DType::F64 => {
                type $t = f64;
                $body
            }
            other => Err($crate::Error::dtype(
                $op,
                format!("needs f32 or f64 here, got {other}; cast it first with .cast(DType::F32)"),
            )),
        }
    };
}

/// Runs the body with `$t` bound to f32, f64 or bf16, the types that CPU loops read and write: [`Computed`](crate::base::Computed).
#[macro_export]
#[doc(hidden)]
macro_rules! with_computed {
    ($op:expr, $dtype:expr, |$t:ident| $body:expr) => {
        match $dtype {
            $crate::DType::BF16 => {
                type $t = half::bf16;
                $body
            }
            dtype => $crate::with_float!($op, dtype, |$t| $body),
        }
    };
}

/// Runs the body with `$t` bound to the Rust type of any dtype.
#[macro_export]
#[doc(hidden)]
macro_rules! with_dtype {
    ($dtype:expr, |$t:ident| $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $t = f32;
                $body
            }
            $crate::DType::F64 => {
                type $t = f64;
                $body
            }
            $crate::DType::BF16 => {
                type $t = half::bf16;
                $body
            }
            $crate::DType::F16 => {
                type $t = half::f16;
                $body
            }
            $crate::DType::U32 => {
                type $t = u32;
                $body
            }
            $crate::DType::I64 => {
                type $t = i64;
                $body
            }
            $crate::DType::U8 => {
                type $t = u8;
                $body
            }
        }
    };
}
