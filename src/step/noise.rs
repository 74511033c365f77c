//! The noise slot: once per step, on the summed gradient.
//!
//! The key of the noise is derived from the secret key, the step, the noise's scale and a digest of the sum to which it is added
//! ([`NoiseKey::for_release`]). Two releases that differ in any bit therefore never share noise, whatever the reason (another σ, loss, data
//! set, parameter value, rank or device), and a repeated step with the same bits is the same release.

use super::privacy::Privacy;
use crate::array::Array;
use crate::base::{Error, Result};
use crate::privacy::Thresholds;
use crate::random::{self, NoiseKey, add_gaussian, digest};
use crate::with_float;

impl Privacy {
    /// The scale of the noise of a sum of `numel` elements of `bytes` each, as input of the key derivation.
    fn context(std: f64, numel: usize, bytes: usize) -> [u32; 4] {
        let (std, numel) = (std.to_bits(), numel as u64);
        [std as u32, (std >> 32) as u32, numel as u32, (numel >> 32) as u32 | (bytes as u32) << 24]
    }
    /// Standard deviation of the noise. The sum over the records is rounded as well, and one more record changes the rounding errors of the
    /// others: by up to 2·10⁻⁴ of the sensitivity with 65,536 records. The noise has a margin for that.
    fn std(&self) -> f64 {
        const ROUNDING: f64 = 1.0 / 1024.0;
        self.gradient_noise_multiplier() * self.sensitivity() * (1.0 + ROUNDING)
    }
    /// The key of the release of a sum on the CPU and, with adaptive thresholds, of the counts `below`; and the release's name for the log,
    /// which does not reveal either. `level` computes the first level of the digest under its key; `numel` is the number of elements of the
    /// whole sum and `bytes` their size.
    pub(super) fn release_key(
        &self,
        step: u64,
        (numel, bytes): (usize, usize),
        below: &[u64],
        level: impl FnOnce(&[u32]) -> Result<Vec<u32>>,
    ) -> Result<(NoiseKey, String)> {
        let words = self.digest_key();
        let sum = digest::finish(words, level(words)?);
        let context = Privacy::context(self.std(), numel, bytes);
        let of = |key: &NoiseKey| match self.config().thresholds {
            Thresholds::Adaptive { .. } => {
                let counts = digest::digest(words, bytemuck::cast_slice(below));
                key.for_release(step, [below.len() as u32, 0, 0, u32::MAX], counts).for_release(step, context, sum)
            }
            _ => key.for_release(step, context, sum),
        };
        Ok((of(&self.key), super::privacy::fingerprint(&of(&NoiseKey::from_bytes(self.key.to_bytes())))))
    }
    /// Adds N(0, (σ·sensitivity)²) to every element of a sum on the CPU; `grads` is the part of it from element `first` on.
    pub(super) fn add_noise(&self, key: &NoiseKey, step: u64, first: usize, grads: &mut Array) -> Result<()> {
        let std = self.std();
        with_float!("run", grads.dtype(), |T| {
            add_gaussian::<T>(key, step, first as u64, std, grads.as_mut_slice::<T>()?);
            Ok(())
        })
    }
    /// The same on a GPU, which computes the digest and derives the key itself. If a captured step is replayed, `before` holds the step's
    /// number, counted from 0.
    pub(super) fn add_noise_on_gpu(&self, step: u64, before: Option<&Array>, grads: &Array) -> Result<()> {
        let gpu = grads.gpu().ok_or_else(|| Error::device("run", "the gradient is on the CPU"))?;
        let std = self.std();
        let context = Privacy::context(std, grads.numel(), grads.dtype().size());
        let digest_key = match self.has_test_key() {
            true => None,
            false => Some(self.digest_key_on(gpu)?),
        };
        random::cuda::release(gpu, (&self.key, digest_key), (step, before), context, std, grads)
    }
    /// Updates adaptive thresholds after step number `step`, from the counts of its `samples` private samples. `key` is the key of the
    /// release.
    pub(super) fn adapt(&mut self, key: &NoiseKey, step: u64, below: &[u64], samples: usize) {
        let Thresholds::Adaptive { quantile, rate, noise } = self.config().thresholds else { return };
        let batch = self.config().expected_batch;
        let mut drawn = vec![0f64; below.len()];
        let std = noise * batch;
        let key = key.for_release(step, Privacy::context(std, below.len(), 0), [1; 4]);
        add_gaussian(&key, step, 0, std, &mut drawn);
        let mut thresholds = self.clipping.thresholds();
        for ((r, &b), n) in thresholds.iter_mut().zip(below).zip(&drawn) {
            // Each sample adds ±½, so that its contribution to the count has magnitude ½ in either case.
            let share = (b as f64 - 0.5 * samples as f64 + n) / batch + 0.5;
            *r *= (-rate * (share - quantile)).exp();
        }
        self.clipping.set_thresholds(&thresholds);
    }
}
