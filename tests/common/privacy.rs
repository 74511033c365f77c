//! Privacy for steps whose batches are known beforehand.

use prismgrad::random::NoiseKey;
use prismgrad::step::{Privacy, PrivacyConfig};

/// A configuration for `n` records, all of which are in every batch (the sampling rate is 1). The budget is so large that it stops nothing.
pub fn whole(n: usize) -> PrivacyConfig {
    let config = PrivacyConfig::target(1e3, 1e-3).records(n).expected_batch(n as f64);
    config.steps(100).noise_multiplier(1.0)
}

/// A configuration whose sampling rate is almost 0, so that every batch is empty.
#[allow(dead_code)]
pub fn empty(n: usize) -> PrivacyConfig {
    whole(n).records(100).expected_batch(1e-6)
}

/// The privacy of a configuration, with a key from `seed`.
pub fn keyed(config: PrivacyConfig, seed: u64) -> Privacy {
    Privacy::new(config, NoiseKey::from_seed_for_tests(seed)).unwrap()
}
