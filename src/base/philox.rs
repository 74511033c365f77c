//! Philox 4×32-10 (Salmon et al. 2011): the generator of all random numbers that are not part of a privacy mechanism.

/// Ten rounds on a 128-bit counter under a 64-bit key.
#[inline(always)]
pub fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let (mut c, mut k) = (counter, key);
    for round in 0..10 {
        if round > 0 {
            k = [k[0].wrapping_add(0x9e37_79b9), k[1].wrapping_add(0xbb67_ae85)];
        }
        let a = 0xd251_1f53u64 * c[0] as u64;
        let b = 0xcd9e_8d57u64 * c[2] as u64;
        c = [(b >> 32) as u32 ^ c[1] ^ k[0], b as u32, (a >> 32) as u32 ^ c[3] ^ k[1], a as u32];
    }
    c
}

fn block(seed: u64, stream: u64, index: u64) -> [u32; 4] {
    let counter = [index as u32, (index >> 32) as u32, stream as u32, (stream >> 32) as u32];
    philox(counter, [seed as u32, (seed >> 32) as u32])
}

/// 64 random bits: a function of (seed, stream, index).
pub fn bits(seed: u64, stream: u64, index: u64) -> u64 {
    let b = block(seed, stream, index / 2);
    let h = 2 * (index % 2) as usize;
    b[h] as u64 | (b[h + 1] as u64) << 32
}

/// Uniform in [0, 1) with 53 bits.
pub fn uniform(seed: u64, stream: u64, index: u64) -> f64 {
    (bits(seed, stream, index) >> 11) as f64 / (1u64 << 53) as f64
}

/// Standard normal by the Box–Muller transform. Logarithm, sine and cosine are written out here, so that every machine and every GPU
/// (`cuda/random.cu`) produces the same bits.
pub fn normal(seed: u64, stream: u64, index: u64) -> f64 {
    let k = |i| bits(seed, stream, i) >> 11;
    let pair = index / 2;
    let u = 1.0 - k(2 * pair) as f64 / (1u64 << 53) as f64;
    let (s, c) = sin_cos_turn(k(2 * pair + 1));
    let r = (-2.0 * ln_unit(u)).sqrt();
    if index.is_multiple_of(2) { r * c } else { r * s }
}

/// ln u for u in (0, 1]: u = 2ᵉ·(1 + m) with 1 + m around 1, ln(1 + m) = 2·artanh(m / (2 + m)), twelve terms.
fn ln_unit(u: f64) -> f64 {
    let bits = u.to_bits();
    // The exponent of u relative to √½, from the bits of both.
    let e = bits.wrapping_sub(0x3fe6_a09e_667f_3bcd) as i64 >> 52;
    let m = f64::from_bits(bits.wrapping_sub((e as u64) << 52)) - 1.0;
    let s = m / (2.0 + m);
    let z = s * s;
    let p = (0..=10).rev().fold(1.0 / 23.0, |p, k| 1.0 / (2 * k + 1) as f64 + z * p);
    let e = e as f64;
    // ln 2 in two parts, of which the first is exact in 32 bits.
    e * 0.693_147_180_369_123_8 + (e * 1.908_214_929_270_587_7e-10 + 2.0 * s * p)
}

/// Sine and cosine of k/2⁵³ of a turn: reduced to the nearest quarter turn, then a series on at most an eighth of a turn to either side.
fn sin_cos_turn(k: u64) -> (f64, f64) {
    let q = (k + (1 << 50)) >> 51;
    let t = (k as i64 - (q << 51) as i64) as f64 * (std::f64::consts::TAU / (1u64 << 53) as f64);
    let z = t * t;
    let s = [-1307674368000.0, 6227020800.0, -39916800.0, 362880.0, -5040.0, 120.0, -6.0]
        .iter()
        .fold(1.0 / 355687428096000.0, |s, d| 1.0 / d + z * s);
    let s = t * (1.0 + z * s);
    let c = [20922789888000.0, -87178291200.0, 479001600.0, -3628800.0, 40320.0, -720.0, 24.0]
        .iter()
        .fold(-1.0 / 6402373705728000.0, |c, d| 1.0 / d + z * c);
    let c = 1.0 + z * (-0.5 + z * c);
    let (a, d) = if q & 1 == 0 { (s, c) } else { (c, s) };
    (if q & 2 == 0 { a } else { -a }, if (q + 1) & 2 == 0 { d } else { -d })
}

/// Uniform in [0, 1) with 24 bits, for dropout: one Philox block serves four elements.
#[inline(always)]
pub fn dropout_uniform(seed: u64, index: u64) -> f32 {
    (block(seed, 0x6472_6f70, index / 4)[(index % 4) as usize] >> 8) as f32 / (1u32 << 24) as f32
}

/// A sequence of random numbers for shuffles, choices and sampled text.
#[derive(Clone, Debug)]
pub struct Rng {
    seed: u64,
    at: u64,
}

impl Rng {
    /// A generator with this seed; equal seeds give equal sequences.
    pub fn new(seed: u64) -> Rng {
        Rng { seed, at: 0 }
    }
    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.at += 1;
        bits(self.seed, 0x7365_7175, self.at - 1)
    }
    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }
    /// Uniform in 0..n, without bias; 0 if n is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        if n == 0 {
            return 0;
        }
        let limit = u64::MAX - u64::MAX % n;
        loop {
            let b = self.bits();
            if b < limit {
                return b % n;
            }
        }
    }
    /// Shuffles in place (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox([!0; 4], [!0; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        assert_eq!(
            philox([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }
    #[test]
    fn logarithm_and_circle_are_accurate() {
        let check = |u: f64| assert!((ln_unit(u) - u.ln()).abs() <= 5e-16 * u.ln().abs(), "{u:e} {}", ln_unit(u));
        (0..100_000).for_each(|i| check(1.0 - uniform(9, 9, i)));
        let half = std::f64::consts::FRAC_1_SQRT_2;
        let ends = [1.0, 1.0 - 1.0 / (1u64 << 53) as f64, 1.0 / (1u64 << 53) as f64, half, half.next_down()];
        ends.into_iter().for_each(check);
        for i in 0..100_000 {
            let k = bits(4, 2, i) >> 11;
            let t = std::f64::consts::TAU * (k as f64 / (1u64 << 53) as f64);
            let (s, c) = sin_cos_turn(k);
            assert!((s - t.sin()).abs() < 2e-15 && (c - t.cos()).abs() < 2e-15, "{k}: {s} {c}");
        }
    }
    #[test]
    fn normals_have_their_moments() {
        let n = 200_000;
        let (mut m, mut s) = (0.0, 0.0);
        for i in 0..n {
            let x = normal(3, 1, i);
            m += x;
            s += x * x;
        }
        assert!((m / n as f64).abs() < 0.01 && (s / n as f64 - 1.0).abs() < 0.01);
    }
}
