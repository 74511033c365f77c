//! ChaCha20 (RFC 8439) as a counter-based source of Gaussian noise for privacy.
//!
//! The noise of element e at step s is a function of (key, s, e). Block b of step s is the ChaCha20 block with counter b and nonce (domain,
//! s); its 16 words give 8 Box–Muller pairs, which are 16 normals. A radius uses one word and, if that is below 2¹⁶, another word of a
//! second block, so that |z| reaches √(2·ln 2⁶⁵) ≈ 9.49 with a density that is accurate to 2⁻¹⁶ everywhere.
//!
//! Floating-point numbers have gaps, and a sum of an f32 value and f32 noise can reveal on which side of a gap the true value was (Mironov
//! 2012). Here a normal is the exact product of two f32 numbers with 48 bits, and value + noise is computed in f64 and rounded to a
//! [`Grid`] that depends on the standard deviation alone. Every multiple of the grid is reached from about 2²⁴ pairs of factors, whatever
//! the value, and no finer part of the value is visible.
//!
//! Only additions, multiplications, divisions, square roots and integer operations are used, in a fixed order and never fused, so that the
//! bits are the same at every vector width and on every device.

use crate::base::{Error, Float, Result};
use crate::device::cpu::par::par_chunks;
use crate::device::cpu::shared::Shared;
use crate::device::cpu::simd::simd;
use std::fmt;

/// The secret key of a private run: anyone who has it can subtract the noise. It is never logged or printed.
#[derive(Clone, PartialEq, Eq)]
pub struct NoiseKey {
    bytes: [u8; 32],
    /// Whether the key is public, so that anyone can compute it.
    test: bool,
}

impl NoiseKey {
    /// A fresh key from the operating system's random generator.
    pub fn from_os() -> Result<NoiseKey> {
        let mut key = [0u8; 32];
        let path = "/dev/urandom";
        std::fs::File::open(path)
            .and_then(|mut f| std::io::Read::read_exact(&mut f, &mut key))
            .map_err(|e| Error::io("draw a noise key from", path, e))?;
        Ok(NoiseKey::from_bytes(key))
    }
    /// A key that anyone can compute: for repeatable runs and tests, without any privacy.
    pub fn from_seed_for_tests(seed: u64) -> NoiseKey {
        let mut key = [0u8; 32];
        for (i, chunk) in key.chunks_exact_mut(8).enumerate() {
            chunk.copy_from_slice(&super::philox::bits(seed, 0x006b_6579, i as u64).to_le_bytes());
        }
        NoiseKey { bytes: key, test: true }
    }
    /// Whether the key was made by [`NoiseKey::from_seed_for_tests`]: a run with it is not private.
    pub fn is_for_tests(&self) -> bool {
        self.test
    }
    /// A key from 32 bytes that were stored elsewhere.
    pub fn from_bytes(bytes: [u8; 32]) -> NoiseKey {
        NoiseKey { bytes, test: false }
    }
    /// The bytes of the key, which must be kept as secret as the data.
    pub fn to_bytes(&self) -> [u8; 32] {
        self.bytes
    }
    pub(crate) fn words(&self) -> [u32; 8] {
        std::array::from_fn(|i| {
            u32::from_le_bytes([self.bytes[4 * i], self.bytes[4 * i + 1], self.bytes[4 * i + 2], self.bytes[4 * i + 3]])
        })
    }
    /// Uniform numbers in [0, 1) for (step, 0..n), in a stream separate from the noise: for Poisson sampling.
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
    /// The key of one release: two releases share noise only if they have the same step, the same `context` (the scale of the noise) and
    /// the same `digest` (of the sum to which it is added). Each is absorbed by one ChaCha20 block under the key so far, as in HChaCha20.
    ///
    /// A test key ignores the digest: its noise depends on the step and the element alone, so that runs on other devices or numbers of
    /// ranks, whose sums differ in the last bits, can be compared with each other.
    pub fn for_release(&self, step: u64, context: [u32; 4], digest: [u32; 4]) -> NoiseKey {
        let digest = if self.test { [0; 4] } else { digest };
        let bytes_of = |words: [u32; 8]| {
            let mut bytes = [0; 32];
            bytes.chunks_exact_mut(4).zip(words).for_each(|(b, w)| b.copy_from_slice(&w.to_le_bytes()));
            bytes
        };
        let first = absorb(&self.words(), [0, DERIVE, step as u32, (step >> 32) as u32]);
        NoiseKey { bytes: bytes_of(absorb(&absorb(&first, context), digest)), test: self.test }
    }
    /// `n` words of a separate stream, which key the digest of the sums.
    pub(crate) fn digest_words(&self, n: usize) -> Vec<u32> {
        let words = self.words();
        let mut out = Vec::with_capacity(n.next_multiple_of(16));
        for block in 0..n.div_ceil(16) as u64 {
            let mut x = [[0u32; 1]; 16];
            blocks::<1>(&words, [block], DIGEST, 0, &mut x);
            out.extend(x.iter().map(|w| w[0]));
        }
        out.truncate(n);
        out
    }
    /// One element of [`NoiseKey::uniforms`].
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
const TAIL: u32 = 0x7461_696c;
const SAMPLING: u32 = 0x7361_6d70;
const DERIVE: u32 = 0x6465_7269;
const DIGEST: u32 = 0x6469_6765;
/// Number of blocks that are computed in parallel lanes.
const LANES: usize = 16;

/// `L` ChaCha20 blocks in parallel: word w of block l is out[w][l]. The 96-bit nonce is (high counter bits ^ domain, step); the counter's
/// low 32 bits are the block counter.
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
    // The rows have constant numbers: written as a loop over the rows, this would compile to stores of single elements, which take as long
    // as all of the code above.
    macro_rules! rows {
        ($($w:literal)*) => {
            $({
                let (x, init, out) = (x[$w], init[$w], &mut out[$w]);
                for l in 0..L {
                    out[l] = x[l].wrapping_add(init[l]);
                }
            })*
        };
    }
    rows!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
}

/// Eight words of the block whose last four input words are `input`: the absorbing step of HChaCha20.
fn absorb(key: &[u32; 8], input: [u32; 4]) -> [u32; 8] {
    let counter = input[0] as u64;
    let mut x = [[0u32; 1]; 16];
    blocks::<1>(key, [counter], input[1], input[2] as u64 | (input[3] as u64) << 32, &mut x);
    std::array::from_fn(|i| x[i][0])
}

/// If the first word of a radius is below this, a second word supplies further bits.
const RARE: u32 = 1 << 16;

/// (a + ½)/2³², rounded.
#[inline(always)]
fn unit(a: u32) -> f32 {
    a as f32 * f32::from_bits(0x2f80_0000) + f32::from_bits(0x2f00_0000)
}

/// √(−2·ln u) for u = (a + ½)/2³² in (0, 1).
#[inline(always)]
fn radius(a: u32) -> f32 {
    let near_one = a >= 0xc000_0000;
    // Near 1 the logarithm is computed from 1 − u, which the complement of `a` gives without rounding.
    (-2.0 * ln(unit(a), near_one, unit(!a))).sqrt()
}

/// √(−2·ln u) for u = (2³²·a + b + ½)/2⁶⁴: the radius in the tail.
fn rare_radius(a: u32, b: u32) -> f32 {
    let u = ((a as u64) << 32 | b as u64) as f32 * f32::from_bits(0x1f80_0000) + f32::from_bits(0x1f00_0000);
    (-2.0 * ln(u, false, 0.0)).sqrt()
}

/// ln u, or ln(1 − rest) if u is near one; relative error about 10⁻⁷.
#[inline(always)]
fn ln(u: f32, near_one: bool, rest: f32) -> f32 {
    // u = 2ᵉ·(1 + m) with 1 + m in [√½, √2).
    let bits = u.to_bits() as i32;
    let e = (bits - 0x3f35_04f3) >> 23;
    let m = f32::from_bits((bits - (e << 23)) as u32) - 1.0;
    let m = if near_one { -rest } else { m };
    let e = if near_one { 0.0 } else { e as f32 };
    // ln(1 + m) = 2·artanh(s) with s = m/(2 + m), |s| ≤ 0.172: the first omitted term of the series is 10⁻⁹.
    let s = m / (2.0 + m);
    let z = s * s;
    let p = 1.0 + z * (1.0 / 3.0 + z * (1.0 / 5.0 + z * (1.0 / 7.0 + z * (1.0 / 9.0))));
    // ln 2 in two parts, of which the first is exact in nine bits.
    e * 0.693_359_4 + (e * -2.121_944_4e-4 + 2.0 * s * p)
}

/// Sine and cosine of b/2³² of a turn, by their series on at most an eighth of a turn to either side.
#[inline(always)]
fn sin_cos_turn(b: u32) -> (f32, f32) {
    // The nearest number of quarter turns, and the exact remainder in [−⅛, ⅛) of a turn.
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

/// The multiples of 2^(⌊log₂ std⌋ − 20), to which sums with noise of this standard deviation are rounded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grid {
    /// Adding this in f64 and subtracting it again rounds to a multiple of the step: 1.5·2⁵² steps.
    pub(crate) magic: f64,
}

impl Grid {
    /// The grid of noise with standard deviation `std`, a normal f64.
    pub fn of(std: f64) -> Grid {
        let exponent = (std.to_bits() >> 52 & 0x7ff) as i32 - 1023 - 20;
        Grid { magic: 1.5 * 2f64.powi(52 + exponent) }
    }
    /// Distance between neighbouring multiples.
    pub fn step(self) -> f64 {
        self.magic / 1.5 / 2f64.powi(52)
    }
    /// The nearest multiple; ties go to the even one. From 2⁵¹ steps on, where f64 cannot represent half a step, the result is a neighbour
    /// of `x`; infinities and NaN are unchanged.
    #[inline(always)]
    pub fn round(self, x: f64) -> f64 {
        (x + self.magic) - self.magic
    }
}

/// `out[i] ← grid(out[i] + std·z(key, step, first + i))`, with the sum in f64; see the module's page for the [`Grid`]. It takes about 6 ns
/// per sixteen elements and core with 512-bit vectors.
pub fn add_gaussian<T: Float>(key: &NoiseKey, step: u64, first: u64, std: f64, out: &mut [T]) {
    let (words, grid) = (key.words(), Grid::of(std));
    // Aligned groups of LANES blocks with 16 normals each; the pieces at both ends use part of a group.
    const GROUP: usize = LANES * 16;
    let end = first + out.len() as u64;
    let (g0, g1) = (first / GROUP as u64, end.div_ceil(GROUP as u64));
    let dst = Shared::new(out);
    par_chunks((g1 - g0) as usize, 64, |r| {
        for g in r {
            let start = (g0 + g as u64) * GROUP as u64;
            let (lo, hi) = (start.max(first), (start + GROUP as u64).min(end));
            // SAFETY: groups are disjoint.
            let o = unsafe { dst.slice((lo - first) as usize..(hi - first) as usize) };
            let counter: [u64; LANES] = std::array::from_fn(|l| start / 16 + l as u64);
            let mut x = [[0u32; LANES]; 16];
            // Within a group elements are stored word by word, and lane by lane within a word: a fixed order that needs no shuffles.
            let done = simd(
                #[inline(always)]
                || {
                    blocks::<LANES>(&words, counter, NOISE, step, &mut x);
                    let rare = (0..8).fold(false, |any, p| x[2 * p].iter().fold(any, |any, &a| any | (a < RARE)));
                    if rare || o.len() < GROUP {
                        return false;
                    }
                    for (pair, o) in o.chunks_exact_mut(2 * LANES).enumerate() {
                        let (first, second) = o.split_at_mut(LANES);
                        for l in 0..LANES {
                            let r = radius(x[2 * pair][l]) as f64;
                            let (s, c) = sin_cos_turn(x[2 * pair + 1][l]);
                            first[l] = T::from_f64(grid.round(first[l].to_f64() + std * (r * c as f64)));
                            second[l] = T::from_f64(grid.round(second[l].to_f64() + std * (r * s as f64)));
                        }
                    }
                    true
                },
            );
            if done {
                continue;
            }
            // Part of a group, or a group with a radius that uses a second word: the same computation, element by element.
            let mut more = [[0u32; LANES]; 16];
            blocks::<LANES>(&words, counter, TAIL, step, &mut more);
            for (pair, l) in (0..8).flat_map(|pair| (0..LANES).map(move |l| (pair, l))) {
                let r = match x[2 * pair][l] {
                    a if a < RARE => rare_radius(a, more[2 * pair][l]),
                    a => radius(a),
                } as f64;
                let (s, c) = sin_cos_turn(x[2 * pair + 1][l]);
                for (word, z) in [(2 * pair, r * c as f64), (2 * pair + 1, r * s as f64)] {
                    let at = start + (word * LANES + l) as u64;
                    if (lo..hi).contains(&at) {
                        let o = &mut o[(at - lo) as usize];
                        *o = T::from_f64(grid.round(o.to_f64() + std * z));
                    }
                }
            }
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
    fn the_tail_reaches_past_nine_and_joins_without_a_step() {
        // The two computations of a radius agree where they meet, and the second one ends at √(2·ln 2⁶⁵).
        for a in [1u32, 77, RARE - 1, RARE] {
            let (coarse, fine) = (radius(a), rare_radius(a, 1 << 31));
            assert!((coarse - fine).abs() < 1e-6 * fine, "{a}: {coarse} {fine}");
        }
        let exact = |a: u32, b: u32| (-2.0 * ((a as f64 * 2f64.powi(32) + b as f64 + 0.5) / 2f64.powi(64)).ln()).sqrt();
        for (a, b) in [(0, 0), (0, 1), (0, 12345), (0, u32::MAX), (1, 0), (9, 99), (65535, 7)] {
            assert!((rare_radius(a, b) as f64 / exact(a, b) - 1.0).abs() < 3e-7, "{a} {b}");
        }
        assert!(rare_radius(0, 0) > 9.49);
    }

    /// Draws in whole groups beyond 6.7637 standard deviations, where the noise would end if a radius used one word only. Their positions
    /// were found by a search for radii whose first word is 0, and their values were computed separately in double precision.
    #[test]
    fn draws_past_the_end_of_one_word() {
        const GROUP: usize = LANES * 16;
        for (group, word, lane, want) in [(118_547_156, 7, 1, -6.795958), (196_011_209, 0, 5, 6.908007)] {
            let mut v = vec![0f64; GROUP];
            add_gaussian(&NoiseKey::from_bytes([7; 32]), 0, group * GROUP as u64, 1.0, &mut v);
            let z = v[word * LANES + lane];
            assert!((z - want).abs() < 1e-5 && z.abs() > 6.77, "group {group}: {z}, not {want}");
        }
    }

    /// Compares 10⁸ draws with the normal distribution: Kolmogorov–Smirnov at 65,536 points, six moments, the mass of the tail. The radius
    /// of one draw in 2¹⁶, beyond 4.71, uses a second word.
    #[test]
    fn the_law_is_normal_over_a_hundred_million_draws() {
        const N: usize = 100;
        const EACH: usize = 1 << 20;
        const BINS: usize = 1 << 16;
        let key = NoiseKey::from_seed_for_tests(5);
        let (mut counts, mut moments) = (vec![0u64; BINS], [0f64; 6]);
        let tails = [3.0, 4.0, 4.71, 5.0, 5.3];
        let mut beyond = [0u64; 5];
        let mut v = vec![0f32; EACH];
        for step in 0..N as u64 {
            v.fill(0.0);
            add_gaussian(&key, step, 0, 1.0, &mut v);
            for &z in &v {
                let z = z as f64;
                counts[(((z + 8.0) / 16.0 * BINS as f64) as usize).min(BINS - 1)] += 1;
                let mut power = 1.0;
                for m in &mut moments {
                    power *= z;
                    *m += power;
                }
                tails.iter().zip(&mut beyond).for_each(|(t, n)| *n += (z.abs() > *t) as u64);
            }
        }
        let n = (N * EACH) as f64;
        let (mut below, mut far) = (0, 0f64);
        for (i, c) in counts.iter().enumerate() {
            below += c;
            // Draws are on a grid of 2⁻²⁰; values on the edges of bins belong to the bin above.
            let edge = (i + 1) as f64 / BINS as f64 * 16.0 - 8.0 - 2f64.powi(-21);
            far = far.max((below as f64 / n - 0.5 * libm::erfc(-edge / std::f64::consts::SQRT_2)).abs());
        }
        assert!(far * n.sqrt() < 1.95, "√n·D = {}", far * n.sqrt());
        // E z^k and its variance E z^2k − (E z^k)².
        let even = [1.0, 1.0, 3.0, 15.0, 105.0, 945.0, 10395.0];
        for (k, m) in (1..=6).zip(moments) {
            let mean = if k % 2 == 0 { even[k / 2] } else { 0.0 };
            let off = (m / n - mean) / ((even[k] - mean * mean) / n).sqrt();
            assert!(off.abs() < 4.5, "moment {k}: {} standard deviations off", off);
        }
        for (t, found) in tails.iter().zip(beyond) {
            let expected = libm::erfc(t / 2f64.sqrt()) * n;
            assert!(
                (found as f64 - expected).abs() < 5.0 * expected.sqrt(),
                "beyond {t}: {found}, expected {expected:.1}"
            );
        }
    }

    #[test]
    fn sums_lie_on_the_grid_whatever_is_below_the_noise() {
        for std in [1.0, 1.99, 0.013, 7e-9] {
            let grid = Grid::of(std);
            assert!(grid.step() <= std * 2f64.powi(-20) && grid.step() > std * 2f64.powi(-21));
            for below in [0.0, 1e-9 * std, 0.3 * std, 12.3456789 * std] {
                let mut v = vec![below; 3000];
                add_gaussian(&NoiseKey::from_bytes([7; 32]), 0, 0, std, &mut v);
                assert!(v.iter().all(|x| (x / grid.step()).fract() == 0.0), "{std} {below}");
                // No step of the grid is preferred: the last bits of the multiples are evenly distributed.
                let ones = |bit: i64| v.iter().filter(|x| (**x / grid.step()) as i64 >> bit & 1 == 1).count() as f64;
                for bit in 0..12 {
                    assert!((ones(bit) - 1500.0).abs() < 4.5 * 750f64.sqrt(), "{std} {below} bit {bit}: {}", ones(bit));
                }
            }
        }
        let grid = Grid::of(1.0);
        assert_eq!(grid.round(f64::INFINITY), f64::INFINITY);
        assert_eq!(grid.round(1e30), 1e30);
        assert!(grid.round(f64::NAN).is_nan());
    }

    #[test]
    fn releases_that_differ_have_other_keys() {
        let key = NoiseKey::from_bytes([3; 32]);
        let one = key.for_release(4, [1, 2, 3, 4], [5, 6, 7, 8]);
        assert_eq!(one, key.for_release(4, [1, 2, 3, 4], [5, 6, 7, 8]));
        for i in 0..4 {
            let (mut context, mut digest) = ([1, 2, 3, 4], [5, 6, 7, 8]);
            context[i] ^= 1;
            assert_ne!(one, key.for_release(4, context, [5, 6, 7, 8]));
            digest[i] ^= 1 << 31;
            assert_ne!(one, key.for_release(4, [1, 2, 3, 4], digest));
        }
        assert_ne!(one, key.for_release(5, [1, 2, 3, 4], [5, 6, 7, 8]));
        assert_ne!(one, NoiseKey::from_bytes([4; 32]).for_release(4, [1, 2, 3, 4], [5, 6, 7, 8]));
        let test = NoiseKey::from_seed_for_tests(1);
        assert_eq!(test.for_release(0, [0; 4], [1; 4]), test.for_release(0, [0; 4], [2; 4]));
    }

    #[test]
    fn steps_are_independent() {
        let (a, b) = (draw(1, 0, 200_000), draw(2, 0, 200_000));
        let r = a.iter().zip(&b).map(|(&x, &y)| (x * y) as f64).sum::<f64>() / a.len() as f64;
        assert!(r.abs() < 3.5 / (a.len() as f64).sqrt(), "{r}");
    }
}
