//! Philox 4×32-10 (Salmon et al. 2011), for everything that is not privacy.

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

/// Standard normal by Box and Muller.
pub fn normal(seed: u64, stream: u64, index: u64) -> f64 {
    let pair = index / 2;
    let (u, v) = (1.0 - uniform(seed, stream, 2 * pair), uniform(seed, stream, 2 * pair + 1));
    let (r, t) = ((-2.0 * u.ln()).sqrt(), std::f64::consts::TAU * v);
    if index.is_multiple_of(2) { r * t.cos() } else { r * t.sin() }
}

/// Uniform in [0, 1) with 24 bits for dropout: one block serves four elements.
#[inline(always)]
pub fn dropout_uniform(seed: u64, index: u64) -> f32 {
    (block(seed, 0x6472_6f70, index / 4)[(index % 4) as usize] >> 8) as f32 / (1u32 << 24) as f32
}

/// A sequence of random numbers: shuffles, choices, text.
#[derive(Clone, Debug)]
pub struct Rng {
    seed: u64,
    at: u64,
}

impl Rng {
    /// Same seed, same sequence.
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
