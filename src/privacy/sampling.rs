//! Poisson sampling.

use crate::base::{Error, Result};
use crate::random::NoiseKey;

/// Includes each record with the same probability, independently, at every step: the sampling that the accountant assumes. Whether a record
/// is included depends on (key, step, record) alone: any partition of the records over workers, and a resumed run, draw the same batches.
/// resumed run, draw the same batches.
#[derive(Clone, Debug)]
pub struct PoissonSampler {
    records: usize,
    rate: f64,
    key: NoiseKey,
}

impl PoissonSampler {
    /// A sampler of `records` records at rate q = `rate`.
    pub fn new(records: usize, rate: f64, key: NoiseKey) -> Result<PoissonSampler> {
        if !(rate > 0.0 && rate <= 1.0) {
            return Err(Error::privacy(format!("a sampling rate of {rate}; it must lie in (0, 1]")));
        }
        Ok(PoissonSampler { records, rate, key })
    }
    /// Whether record `i` is in the batch of `step`.
    pub fn includes(&self, step: u64, i: usize) -> bool {
        self.key.uniform(step, i as u64) < self.rate
    }
    /// The batch of `step`, in ascending order. It may be empty; an empty batch is a step all the same.
    pub fn batch(&self, step: u64) -> Vec<usize> {
        let u = self.key.uniforms(step, self.records);
        (0..self.records).filter(|&i| u[i] < self.rate).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_follow_the_rate_and_steps_differ() {
        let s = PoissonSampler::new(2000, 0.1, NoiseKey::from_seed_for_tests(5)).unwrap();
        let sizes: Vec<f64> = (0..50).map(|t| s.batch(t).len() as f64).collect();
        let mean = sizes.iter().sum::<f64>() / 50.0;
        // Standard error √(2000·0.1·0.9/50) ≈ 1.9.
        assert!((mean - 200.0).abs() < 8.0, "{mean}");
        assert_ne!(s.batch(0), s.batch(1));
        // The draw is the same record by record, in any partition.
        let apart: Vec<usize> = (0..2000).rev().filter(|&i| s.includes(3, i)).collect();
        assert_eq!(s.batch(3), apart.into_iter().rev().collect::<Vec<_>>());
    }
}
