//! ChaCha20 (RFC 8439) as a counter-based source of Gaussian noise for privacy.
//!
//! The noise of element e at step s is a function of (key, s, e). Block b of step s is the ChaCha20 block with counter b
//! and nonce (domain, s); its 16 words give 8 Box–Muller pairs: 16 normals. Each uniform has 32 bits, so |z| reaches
//! √(2·ln 2³³) ≈ 6.76. Only additions, multiplications, divisions, square roots and integer operations are used, in a fixed order
//! and never fused: the same bits at every vector width and on every device.

use crate::base::{Error, Result};
use crate::device::cpu::par::par_chunks;
use crate::device::cpu::shared::Shared;
use crate::device::cpu::simd::simd;
use std::fmt;

/// The secret of a private run: anyone who knows it can subtract the noise. Never logged, never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct NoiseKey {
    bytes: [u8; 32],
    /// Anybody can compute it.
    test: bool,
}

impl NoiseKey {
    /// A fresh key from the operating system.
    pub fn from_os() -> Result<NoiseKey> {
        let mut key = [0u8; 32];
        let path = "/dev/urandom";
        std::fs::File::open(path)
            .and_then(|mut f| std::io::Read::read_exact(&mut f, &mut key))
            .map_err(|e| Error::io("draw a noise key from", path, e))?;
        Ok(NoiseKey::from_bytes(key))
    }
    /// A key anyone can compute: repeatable runs and tests, no privacy.
    pub fn from_seed_for_tests(seed: u64) -> NoiseKey {
        let mut key = [0u8; 32];
        for (i, chunk) in key.chunks_exact_mut(8).enumerate() {
            chunk.copy_from_slice(&super::philox::bits(seed, 0x006b_6579, i as u64).to_le_bytes());
        }
        NoiseKey { bytes: key, test: true }
    }
    /// Whether it was made by [`NoiseKey::from_seed_for_tests`]: a run with it is not private.
    pub fn is_for_tests(&self) -> bool {
        self.test
    }
    /// From 32 bytes kept elsewhere.
    pub fn from_bytes(bytes: [u8; 32]) -> NoiseKey {
        NoiseKey { bytes, test: false }
    }
    /// The bytes, to be kept as secret as the data.
    pub fn to_bytes(&self) -> [u8; 32] {
        self.bytes
    }
    pub(crate) fn words(&self) -> [u32; 8] {
        std::array::from_fn(|i| {
            u32::from_le_bytes([self.bytes[4 * i], self.bytes[4 * i + 1], self.bytes[4 * i + 2], self.bytes[4 * i + 3]])
        })
    }
    /// Uniforms in [0, 1) of (step, 0..n), in a stream apart from the noise: Poisson sampling.
    pub fn uniforms(&self, step: u64, n: usize) -> Vec<f64> {
        let (words, mut out) = (self.words(), Vec::with_capacity(n.next_multiple_of(8)));
        for block in 0..n.div_ceil(8) as u64 {
            let mut x = [[0u32; 1]; 16];
            blocks::<1>(&words, [block], SAMPLING, step, &mut x);
            out.extend(x.chunks_exact(2).map(|w| to_unit(w[0][0], w[1][0])));
        }
        out.truncate(n);
        out
    }
    /// One of [`NoiseKey::uniforms`].
    pub fn uniform(&self, step: u64, index: u64) -> f64 {
        let mut out = [[0u32; 1]; 16];
        blocks::<1>(&self.words(), [index / 8], SAMPLING, step, &mut out);
        let h = 2 * (index % 8) as usize;
        to_unit(out[h][0], out[h + 1][0])
    }
}

fn to_unit(low: u32, high: u32) -> f64 {
    ((low as u64 | (high as u64) << 32) >> 11) as f64 / (1u64 << 53) as f64
}

impl fmt::Debug for NoiseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NoiseKey(secret)")
    }
}

const NOISE: u32 = 0x6e6f_6973;
const SAMPLING: u32 = 0x7361_6d70;
/// Blocks computed side by side.
const LANES: usize = 16;

/// `L` ChaCha20 blocks side by side: word w of block l in out[w][l]. The 96-bit nonce is (high counter bits ^ domain,
/// step); the counter's low 32 bits are the block counter.
#[inline(always)]
fn blocks<const L: usize>(key: &[u32; 8], counter: [u64; L], domain: u32, step: u64, out: &mut [[u32; L]; 16]) {
    let mut init = [[0u32; L]; 16];
    let constants = [0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574];
    for l in 0..L {
        for i in 0..4 {
            init[i][l] = constants[i];
        }
        for i in 0..8 {
            init[4 + i][l] = key[i];
        }
        init[12][l] = counter[l] as u32;
        init[13][l] = domain ^ (counter[l] >> 32) as u32;
        init[14][l] = step as u32;
        init[15][l] = (step >> 32) as u32;
    }
    let mut x = init;
    macro_rules! quarter {
        ($a:expr, $b:expr, $c:expr, $d:expr) => {
            for l in 0..L {
                x[$a][l] = x[$a][l].wrapping_add(x[$b][l]);
                x[$d][l] = (x[$d][l] ^ x[$a][l]).rotate_left(16);
                x[$c][l] = x[$c][l].wrapping_add(x[$d][l]);
                x[$b][l] = (x[$b][l] ^ x[$c][l]).rotate_left(12);
                x[$a][l] = x[$a][l].wrapping_add(x[$b][l]);
                x[$d][l] = (x[$d][l] ^ x[$a][l]).rotate_left(8);
                x[$c][l] = x[$c][l].wrapping_add(x[$d][l]);
                x[$b][l] = (x[$b][l] ^ x[$c][l]).rotate_left(7);
            }
        };
    }
    for _ in 0..10 {
        quarter!(0, 4, 8, 12);
        quarter!(1, 5, 9, 13);
        quarter!(2, 6, 10, 14);
        quarter!(3, 7, 11, 15);
        quarter!(0, 5, 10, 15);
        quarter!(1, 6, 11, 12);
        quarter!(2, 7, 8, 13);
        quarter!(3, 4, 9, 14);
    }
    for w in 0..16 {
        for l in 0..L {
            out[w][l] = x[w][l].wrapping_add(init[w][l]);
        }
    }
}

/// Two normals from two words.
#[inline(always)]
fn box_muller(a: u32, b: u32) -> (f32, f32) {
    let r = (-2.0 * ln_uniform(a)).sqrt();
    let (s, c) = sin_cos_turn(b);
    (r * c, r * s)
}

/// ln u for u = (a + ½)/2³² in (0, 1), relative error about 10⁻⁷ at both ends: near 1 it is taken from 1 − u, which the
/// complement of `a` gives without rounding.
#[inline(always)]
fn ln_uniform(a: u32) -> f32 {
    let part = |a: u32| a as f32 * f32::from_bits(0x2f80_0000) + f32::from_bits(0x2f00_0000);
    // u = 2ᵉ·(1 + m) with 1 + m in [√½, √2).
    let bits = part(a).to_bits() as i32;
    let e = (bits - 0x3f35_04f3) >> 23;
    let m = f32::from_bits((bits - (e << 23)) as u32) - 1.0;
    let near_one = a >= 0xc000_0000;
    let m = if near_one { -part(!a) } else { m };
    let e = if near_one { 0.0 } else { e as f32 };
    // ln(1 + m) = 2·artanh(s) with s = m/(2 + m), |s| ≤ 0.172: the next term of the series is 10⁻⁹.
    let s = m / (2.0 + m);
    let z = s * s;
    let p = 1.0 + z * (1.0 / 3.0 + z * (1.0 / 5.0 + z * (1.0 / 7.0 + z * (1.0 / 9.0))));
    // ln 2 in two parts, the first exact in nine bits.
    e * 0.693_359_4 + (e * -2.121_944_4e-4 + 2.0 * s * p)
}

/// Sine and cosine of b/2³² of a turn, by their series on an eighth of a turn either side.
#[inline(always)]
fn sin_cos_turn(b: u32) -> (f32, f32) {
    // Quarter turns to the nearest, remainder in [−⅛, ⅛) of a turn, exactly.
    let q = b.wrapping_add(1 << 29) >> 30;
    let rest = b.wrapping_sub(q << 30) as i32;
    let t = rest as f32 * (std::f32::consts::TAU / 4_294_967_296.0);
    let z = t * t;
    let s = t * (1.0 + z * (-1.0 / 6.0 + z * (1.0 / 120.0 + z * (-1.0 / 5040.0 + z * (1.0 / 362_880.0)))));
    let c = 1.0 + z * (-0.5 + z * (1.0 / 24.0 + z * (-1.0 / 720.0 + z * (1.0 / 40_320.0))));
    let (a, d) = if q & 1 == 0 { (s, c) } else { (c, s) };
    let a = if q & 2 == 0 { a } else { -a };
    let d = if (q + 1) & 2 == 0 { d } else { -d };
    (a, d)
}

/// `out[i] += std·z(key, step, first + i)`. About 5 ns per sixteen elements and core with 512-bit vectors.
pub fn add_gaussian(key: &NoiseKey, step: u64, first: u64, std: f32, out: &mut [f32]) {
    let words = key.words();
    // Aligned groups of LANES blocks, 16 normals each; the pieces at both ends use part of a group.
    const GROUP: u64 = (LANES * 16) as u64;
    let end = first + out.len() as u64;
    let (g0, g1) = (first / GROUP, end.div_ceil(GROUP));
    let dst = Shared::new(out);
    par_chunks((g1 - g0) as usize, 64, |r| {
        for g in r {
            let start = (g0 + g as u64) * GROUP;
            let mut z = [0f32; GROUP as usize];
            simd(
                #[inline(always)]
                || {
                    let mut x = [[0u32; LANES]; 16];
                    let counter = std::array::from_fn(|l| start / 16 + l as u64);
                    blocks::<LANES>(&words, counter, NOISE, step, &mut x);
                    for pair in 0..8 {
                        for l in 0..LANES {
                            let (a, b) = box_muller(x[2 * pair][l], x[2 * pair + 1][l]);
                            // Element 16·block + word.
                            z[2 * pair * LANES + l] = a;
                            z[(2 * pair + 1) * LANES + l] = b;
                        }
                    }
                },
            );
            let (lo, hi) = (start.max(first), (start + GROUP).min(end));
            // SAFETY: groups are disjoint.
            let o = unsafe { dst.slice((lo - first) as usize..(hi - first) as usize) };
            // Within a group elements lie word by word, lane by lane: a fixed order like any other, and no shuffles.
            let z = &z[(lo - start) as usize..(hi - start) as usize];
            simd(
                #[inline(always)]
                || o.iter_mut().zip(z).for_each(|(o, &z)| *o += std * z),
            );
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc_8439_block() {
        // Section 2.3.2: key 00..1f, counter 1, nonce 000000090000004a00000000.
        let key = NoiseKey::from_bytes(std::array::from_fn(|i| i as u8)).words();
        let mut out = [[0u32; 1]; 16];
        blocks::<1>(&key, [1], 0x0900_0000, 0x4a00_0000, &mut out);
        let got = [out[0][0], out[1][0], out[7][0], out[14][0], out[15][0]];
        assert_eq!(got, [0xe4e7f110, 0x15593bd1, 0x4e6cd4c3, 0xe883d0cb, 0x4e3c50a2]);
    }

    fn draw(step: u64, first: u64, n: usize) -> Vec<f32> {
        let mut v = vec![0f32; n];
        add_gaussian(&NoiseKey::from_seed_for_tests(1), step, first, 1.0, &mut v);
        v
    }

    #[test]
    fn any_split_gives_the_same_bits() {
        let whole = draw(3, 0, 5000);
        let mut parts = draw(3, 0, 777);
        parts.extend(draw(3, 777, 1));
        parts.extend(draw(3, 778, 5000 - 778));
        assert_eq!(whole, parts);
    }

    #[test]
    fn the_law_is_normal() {
        let n = 1_000_000;
        let mut v: Vec<f64> = draw(0, 0, n).into_iter().map(f64::from).collect();
        let mean = v.iter().sum::<f64>() / n as f64;
        let var = v.iter().map(|x| x * x).sum::<f64>() / n as f64;
        assert!(mean.abs() < 4e-3 && (var - 1.0).abs() < 6e-3, "{mean} {var}");
        // Kolmogorov–Smirnov: √n·D below 1.95 holds with probability 0.999.
        v.sort_by(f64::total_cmp);
        let d = v.iter().enumerate().fold(0f64, |d, (i, &x)| {
            let cdf = 0.5 * libm::erfc(-x / std::f64::consts::SQRT_2);
            d.max((cdf - i as f64 / n as f64).abs()).max((cdf - (i + 1) as f64 / n as f64).abs())
        });
        assert!(d * (n as f64).sqrt() < 1.95, "{d}");
        assert!(v[n - 1] > 4.4 && v[0] < -4.4, "thin tails: {} {}", v[0], v[n - 1]);
    }

    #[test]
    fn steps_are_independent() {
        let (a, b) = (draw(1, 0, 200_000), draw(2, 0, 200_000));
        let r = a.iter().zip(&b).map(|(&x, &y)| (x * y) as f64).sum::<f64>() / a.len() as f64;
        assert!(r.abs() < 3.5 / (a.len() as f64).sqrt(), "{r}");
    }
}
