//! Elementary functions. The f32 forms are branch-free and vectorise; the f64 forms call the libraries and serve as references in checks.
//!
//! Multiply-adds are fused only where the code says so, so that a value has the same bits at every vector width.

// Constants are written with the digits that define them.
#![allow(clippy::excessive_precision)]

/// f32, vectorisable.
pub mod f32 {
    /// c₀ + x·(c₁ + x·(…)), fused.
    #[inline(always)]
    fn poly<const N: usize>(x: f32, c: [f32; N]) -> f32 {
        let mut y = c[N - 1];
        for i in (0..N - 1).rev() {
            y = y.mul_add(x, c[i]);
        }
        y
    }
    const MAGIC: f32 = 12_582_912.0; // 1.5·2²³: adding it rounds to an integer, which stays in the low bits.
    /// p·2ⁿ for the integer n in the low bits of `t` = n + MAGIC, −126 < n ≤ 128; 0 at n = −126.
    #[inline(always)]
    fn scale(p: f32, t: f32) -> f32 {
        let half = (t.to_bits() << 23).wrapping_add(126u32.wrapping_sub(MAGIC.to_bits()) << 23);
        p * f32::from_bits(half) * 2.0
    }
    /// eˣ, within 2 ulp; 0 below −86.99, ∞ above 88.72.
    #[inline(always)]
    pub fn exp(x: f32) -> f32 {
        // Inputs outside the clamp give 0 or ∞, which are the correct results there; NaN passes through clamp and every later step.
        let c = x.clamp(-87.0, 89.0);
        let t = c.mul_add(std::f32::consts::LOG2_E, MAGIC);
        let n = t - MAGIC;
        let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_375, c));
        // Taylor to the seventh power: |r| ≤ ln 2/2, so the next term is 5·10⁻⁹.
        scale(poly(r, [1.0, 1.0, 0.5, 1.0 / 6.0, 1.0 / 24.0, 1.0 / 120.0, 1.0 / 720.0, 1.0 / 5040.0]), t)
    }
    /// 2ʸ for y ≤ 0, within 3·10⁻⁷; 0 below −125.5.
    #[inline(always)]
    fn exp2_negative(y: f32) -> f32 {
        let y = if y < -126.0 { -126.0 } else { y };
        let t = y + MAGIC;
        let r = y - (t - MAGIC);
        // Minimax over |r| ≤ ½: 2·10⁻⁹.
        let c = [1.0, 0.693_147_206, 0.240_226_469, 0.055_503_288, 0.009_618_488, 1.339_993_1e-3, 1.534_581_2e-4];
        scale(poly(r, c), t)
    }
    /// Natural logarithm.
    #[inline(always)]
    pub fn ln(x: f32) -> f32 {
        x.ln()
    }
    /// tanh x, within 3 ulp.
    #[inline(always)]
    pub fn tanh(x: f32) -> f32 {
        let s = x * x;
        // Taylor to the thirteenth power: 4·10⁻⁹ at the border.
        let c = [1.0, -0.333_333_333, 0.133_333_333, -0.053_968_254, 0.021_869_488, -8.863_235_53e-3, 3.592_128_04e-3];
        let small = x * poly(s, c);
        let a = x.abs().min(10.0);
        let large = 1.0 - 2.0 / (exp(2.0 * a) + 1.0);
        let large = if x < 0.0 { -large } else { large };
        let y = if x.abs() < 0.4 { small } else { large };
        if x.is_nan() { x } else { y }
    }
    /// 1/(1 + e⁻ˣ).
    #[inline(always)]
    pub fn sigmoid(x: f32) -> f32 {
        1.0 / (1.0 + exp(-x))
    }
    /// erfc z for z ≥ 0, relative error about 10⁻⁷: t·exp(−z² + p(t)) with t = 1/(1 + z/2), p a Chebyshev fit of degree
    /// 9 over z in [0, 10] to ln(erfc z·e^{z²}/t).
    #[inline(always)]
    fn erfc_positive(z: f32) -> f32 {
        let t = 1.0 / (1.0 + 0.5 * z);
        let p = poly(
            t,
            [
                -1.265_447_997,
                0.998_632_783,
                0.386_640_412,
                0.034_602_800,
                0.001_267_586_8,
                -0.080_280_433,
                -0.696_251_898,
                1.156_733_756,
                -0.680_827_178,
                0.144_930_214,
            ],
        );
        t * exp(p - z * z)
    }
    /// The error function, absolute error 10⁻⁷, relative 10⁻⁶ near 0.
    #[inline(always)]
    pub fn erf(x: f32) -> f32 {
        let s = x * x;
        let small = x
            * (std::f32::consts::FRAC_2_SQRT_PI
                + s * (-0.376_126_39 + s * (0.112_837_92 + s * (-0.026_866_17 + s * 5.223_978e-3))));
        let e = 1.0 - erfc_positive(x.abs());
        let large = if x < 0.0 { -e } else { e };
        if s < 0.25 { small } else { large }
    }
    /// e^(−x²/2) and 1 − Φ(|x|), the tail of the normal distribution, relative error 10⁻⁶ up to |x| = 7 (2·10⁻¹²),
    /// growing beyond: the tail is the first times ½·erfcx(|x|/√2), a polynomial of degree 14 fitted over [0, 7].
    #[inline(always)]
    fn normal_tail(x: f32) -> (f32, f32) {
        let a = x.abs();
        let e = exp2_negative(-0.721_347_520 * a * a);
        let u = a.mul_add(2.0 / 7.0, -1.0);
        let u = if u < 1.0 { u } else { 1.0 };
        let w = [
            0.106_345_179,
            -0.093_570_759,
            0.078_246_58,
            -0.062_525_084,
            0.048_068_063,
            -0.035_974_529,
            0.025_408_526,
            -0.015_724_096,
            0.011_685_872,
            -0.012_528_916,
            6.329_704_7e-3,
            2.617_596_2e-3,
            -2.954_521_5e-4,
            -4.347_305_3e-3,
            2.158_136e-3,
        ];
        (e, e * poly(u, w))
    }
    /// x·Φ(x) = max(x, 0) − |x|·(1 − Φ(|x|)).
    #[inline(always)]
    pub fn gelu_erf(x: f32) -> f32 {
        let positive = if x < 0.0 { 0.0 } else { x };
        // Far from 0 the tail is 0, and 0·∞ would be NaN: the clamp keeps |x| finite.
        let near = if x < 100.0 { x } else { 100.0 };
        (-near.abs()).mul_add(normal_tail(near).1, positive)
    }
    /// Φ(x) + x·φ(x).
    #[inline(always)]
    pub fn gelu_erf_grad(x: f32) -> f32 {
        let (e, tail) = normal_tail(x);
        let cdf = if x < 0.0 { tail } else { 1.0 - tail };
        (x * 0.398_942_280).mul_add(e, cdf)
    }
    const K: f32 = 0.797_884_561;
    /// Tanh approximation of GELU.
    #[inline(always)]
    pub fn gelu_tanh(x: f32) -> f32 {
        // ½(1 + tanh u) = sigmoid(2u).
        x * sigmoid(2.0 * K * (x + 0.044_715 * x * x * x))
    }
    /// Its derivative.
    #[inline(always)]
    pub fn gelu_tanh_grad(x: f32) -> f32 {
        let s = sigmoid(2.0 * K * (x + 0.044_715 * x * x * x));
        s + x * s * (1.0 - s) * 2.0 * K * (1.0 + 0.134_145 * x * x)
    }
}

/// f64 forms, exact up to the last digits.
pub mod f64 {
    /// eˣ.
    #[inline(always)]
    pub fn exp(x: f64) -> f64 {
        x.exp()
    }
    /// Natural logarithm.
    #[inline(always)]
    pub fn ln(x: f64) -> f64 {
        x.ln()
    }
    /// tanh x.
    #[inline(always)]
    pub fn tanh(x: f64) -> f64 {
        x.tanh()
    }
    /// 1/(1 + e⁻ˣ).
    #[inline(always)]
    pub fn sigmoid(x: f64) -> f64 {
        1.0 / (1.0 + (-x).exp())
    }
    /// The error function.
    #[inline(always)]
    pub fn erf(x: f64) -> f64 {
        libm::erf(x)
    }
    /// x·Φ(x).
    #[inline(always)]
    pub fn gelu_erf(x: f64) -> f64 {
        0.5 * x * libm::erfc(-x * std::f64::consts::FRAC_1_SQRT_2)
    }
    /// Φ(x) + x·φ(x).
    #[inline(always)]
    pub fn gelu_erf_grad(x: f64) -> f64 {
        0.5 * libm::erfc(-x * std::f64::consts::FRAC_1_SQRT_2) + x * (-0.5 * x * x).exp() * 0.398_942_280_401_432_678
    }
    const K: f64 = 0.797_884_560_802_865_356;
    /// Tanh approximation of GELU.
    #[inline(always)]
    pub fn gelu_tanh(x: f64) -> f64 {
        0.5 * x * (1.0 + (K * (x + 0.044_715 * x * x * x)).tanh())
    }
    /// Its derivative.
    #[inline(always)]
    pub fn gelu_tanh_grad(x: f64) -> f64 {
        let t = (K * (x + 0.044_715 * x * x * x)).tanh();
        0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * K * (1.0 + 0.134_145 * x * x)
    }
}

#[cfg(test)]
mod tests {
    use super::{f32 as m, f64 as d};

    /// The f32 and the f64 form of a function, and the tolerated relative and absolute error.
    type Row = (&'static str, fn(f32) -> f32, fn(f64) -> f64, f64, f64);

    #[test]
    fn f32_agrees_with_f64() {
        let rows: [Row; 8] = [
            ("exp", m::exp, d::exp, 3e-7, 0.0),
            ("tanh", m::tanh, d::tanh, 3e-7, 0.0),
            ("sigmoid", m::sigmoid, d::sigmoid, 3e-7, 1e-37),
            ("erf", m::erf, d::erf, 2e-6, 2e-7),
            ("gelu", m::gelu_erf, d::gelu_erf, 2e-5, 1e-12),
            ("gelu_grad", m::gelu_erf_grad, d::gelu_erf_grad, 2e-5, 3e-7),
            ("gelu_tanh", m::gelu_tanh, d::gelu_tanh, 2e-5, 1e-6),
            ("gelu_tanh_grad", m::gelu_tanh_grad, d::gelu_tanh_grad, 2e-5, 1e-6),
        ];
        for (name, f, g, rel, abs) in rows {
            for i in -80_000..=80_000 {
                let x = i as f32 * 1e-3 * if name == "exp" { 1.0 } else { 0.12 };
                let (got, want) = (f(x) as f64, g(x as f64));
                assert!((got - want).abs() <= rel * want.abs() + abs, "{name}({x}): {got:e} {want:e}");
            }
            assert!(f(f32::NAN).is_nan(), "{name} hides NaN");
        }
        assert_eq!(m::exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(m::exp(f32::INFINITY), f32::INFINITY);
    }
}
