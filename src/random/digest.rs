//! A digest of a clipped sum under a secret key. The noise that is added to the sum is derived from it.
//!
//! Words are hashed in chunks of [`CHUNK`] by NH (Black et al. 1999, UMAC): Σ (wᵢ + kᵢ)·(wⱼ + kⱼ) over pairs of words, with the inner sums
//! mod 2³² and the outer one mod 2⁶⁴. This is done twice, the second time with the key shifted by one block. A block is 32 words, and word
//! i of its first half is paired with word i of its second half, so that both are read in order. The four resulting words of every chunk
//! are hashed in the same way with further words of the key, until one chunk is left. Two different sums of the same length have equal
//! digests with probability at most levels·2⁻⁶⁴ over the key. Integer sums do not depend on the order: the digest has the same bits on
//! every device. It takes one pass over the data and is never released.

use super::NoiseKey;
use crate::device::cpu::par::par_chunks;
use crate::device::cpu::shared::Shared;
use crate::device::cpu::simd::simd;

/// Number of words that are hashed together.
pub(crate) const CHUNK: usize = 2048;
/// Number of words of a block.
const BLOCK: usize = 32;
/// Number of key words for one level.
pub(crate) const KEY: usize = CHUNK + BLOCK;
/// Number of levels, which is enough for 2⁶⁴ words.
pub(crate) const LEVELS: usize = 8;

/// The words of the hash key.
pub(crate) fn key(key: &NoiseKey) -> Vec<u32> {
    key.digest_words(KEY * LEVELS)
}

/// NH of at most [`CHUNK`] words, computed twice; missing words of the last block count as zeros.
fn chunk(words: &[u32], key: &[u32]) -> [u64; 2] {
    const HALF: usize = BLOCK / 2;
    simd(
        #[inline(always)]
        || {
            let (mut one, mut two) = ([0u64; HALF], [0u64; HALF]);
            let mut add = |w: &[u32; BLOCK], k: &[u32]| {
                for l in 0..HALF {
                    let product =
                        |at: usize| w[l].wrapping_add(k[at]) as u64 * w[l + HALF].wrapping_add(k[at + HALF]) as u64;
                    one[l] = one[l].wrapping_add(product(l));
                    two[l] = two[l].wrapping_add(product(l + BLOCK));
                }
            };
            let (whole, rest) = words.as_chunks::<BLOCK>();
            for (w, k) in whole.iter().zip(key.windows(2 * BLOCK).step_by(BLOCK)) {
                add(w, k);
            }
            if !rest.is_empty() {
                let mut last = [0u32; BLOCK];
                last[..rest.len()].copy_from_slice(rest);
                add(&last, &key[whole.len() * BLOCK..][..2 * BLOCK]);
            }
            [one, two].map(|lanes| lanes.iter().fold(0, |a: u64, &b| a.wrapping_add(b)))
        },
    )
}

/// The digest of `words` under the words of [`key`].
pub(crate) fn digest(key: &[u32], words: &[u32]) -> [u32; 4] {
    finish(key, first_level(key, words))
}

/// Four words for each chunk of `words`. If a sequence is divided at chunk boundaries, the concatenated levels of its parts are the level
/// of the whole.
pub(crate) fn first_level(key: &[u32], words: &[u32]) -> Vec<u32> {
    hashed(&key[..KEY], words)
}

/// The digest of the data with this first level.
pub(crate) fn finish(key: &[u32], mut level: Vec<u32>) -> [u32; 4] {
    let mut at = KEY;
    while level.len() > 4 {
        level = hashed(&key[at..at + KEY], &level);
        at += KEY;
    }
    [level[0], level[1], level[2], level[3]]
}

/// One level: four words for each chunk; an empty input counts as one chunk.
fn hashed(key: &[u32], words: &[u32]) -> Vec<u32> {
    let mut out = vec![0u32; 4 * words.len().div_ceil(CHUNK).max(1)];
    let to = Shared::new(&mut out);
    par_chunks(words.len().div_ceil(CHUNK), 16, |r| {
        for c in r {
            let [a, b] = chunk(&words[c * CHUNK..words.len().min((c + 1) * CHUNK)], key);
            // SAFETY: chunks are disjoint.
            let to = unsafe { to.slice(4 * c..4 * c + 4) };
            to.copy_from_slice(&[a as u32, (a >> 32) as u32, b as u32, (b >> 32) as u32]);
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition of the hash, word by word.
    fn plain(key: &[u32], words: &[u32]) -> [u32; 4] {
        let (mut level, mut at): (Vec<u32>, usize) = (words.to_vec(), 0);
        loop {
            let mut next = Vec::new();
            for c in level.chunks(CHUNK) {
                for t in [0, 32] {
                    let mut sum = 0u64;
                    for i in (0..c.len().next_multiple_of(32)).filter(|i| i % 32 < 16) {
                        let word = |i: usize| c.get(i).copied().unwrap_or(0).wrapping_add(key[at + t + i]) as u64;
                        sum = sum.wrapping_add(word(i) * word(i + 16));
                    }
                    next.extend([sum as u32, (sum >> 32) as u32]);
                }
            }
            (level, at) = (next, at + KEY);
            if level.len() <= 4 {
                return std::array::from_fn(|i| level[i]);
            }
        }
    }

    #[test]
    fn it_is_what_the_definition_says_and_tells_every_bit() {
        let key = key(&NoiseKey::from_bytes([9; 32]));
        for n in [1, 2, 31, 33, 2047, 2048, 2049, 5000, 2048 * 600 + 3] {
            let mut words: Vec<u32> = (0..n as u32).map(|i| i.wrapping_mul(2654435761)).collect();
            let whole = digest(&key, &words);
            assert_eq!(whole, plain(&key, &words), "{n}");
            for at in [0, n / 2, n - 1] {
                for bit in [0, 13, 31] {
                    words[at] ^= 1 << bit;
                    assert_ne!(whole, digest(&key, &words), "{n} words, word {at}, bit {bit}");
                    words[at] ^= 1 << bit;
                }
            }
            if n > 2 {
                words.swap(0, n - 1);
                assert_ne!(whole, digest(&key, &words), "{n} words, two exchanged");
            }
        }
        assert_eq!(digest(&key, &[]), [0; 4]);
    }
}
