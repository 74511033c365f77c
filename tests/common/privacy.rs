//! Privacy for steps whose batches are known beforehand.

use prismgrad::random::NoiseKey;
use prismgrad::step::{Privacy, PrivacyConfig};

/// `n` records, all of which are in every batch: their sampling rate is 1. The budget is out of the way.
pub fn whole(n: usize) -> PrivacyConfig {
    let config = PrivacyConfig::target(1e3, 1e-3).records(n).expected_batch(n as f64);
    config.steps(100).noise_multiplier(1.0)
}

/// Records of which no batch has any: their sampling rate is next to 0.
#[allow(dead_code)]
pub fn empty(n: usize) -> PrivacyConfig {
    whole(n).records(100).expected_batch(1e-6)
}

/// The privacy of a configuration, under a key of its own.
pub fn keyed(config: PrivacyConfig, seed: u64) -> Privacy {
    Privacy::new(config, NoiseKey::from_seed_for_tests(seed)).unwrap()
}
