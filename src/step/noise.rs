//! The noise slot: once per step, on the summed gradient, the same bits on every device and at any number of ranks.

use super::privacy::Privacy;
use crate::array::Array;
use crate::base::{DType, Result};
use crate::privacy::Thresholds;
use crate::random::{self, add_gaussian};

impl Privacy {
    /// Adds N(0, (σ·sensitivity)²) to every element, from (key, step, element index).
    /// `before` holds the step's number, from 0, where a captured one is replayed.
    pub(super) fn add_noise(&self, step: u64, before: Option<&Array>, grads: &mut Array) -> Result<()> {
        let std = self.gradient_noise_multiplier() * self.sensitivity();
        if let Some(gpu) = grads.gpu() {
            return random::cuda::add_gaussian(gpu, (&self.key, step, before), std as f32, grads);
        }
        match grads.dtype() {
            DType::F32 => add_gaussian(&self.key, step, 0, std as f32, grads.as_mut_slice::<f32>()?),
            _ => {
                let mut noise = vec![0f32; grads.numel()];
                add_gaussian(&self.key, step, 0, std as f32, &mut noise);
                grads.as_mut_slice::<f64>()?.iter_mut().zip(&noise).for_each(|(g, &n)| *g += n as f64);
            }
        }
        Ok(())
    }
    /// Moves adaptive thresholds after the step numbered `step`, from the counts of its `samples` private samples. `after` is
    /// the first noise index that the gradient has not used.
    pub(super) fn adapt(&mut self, step: u64, after: u64, below: &[u64], samples: usize) {
        let Thresholds::Adaptive { quantile, rate, noise } = self.config().thresholds else { return };
        let batch = self.config().expected_batch;
        let mut drawn = vec![0f32; below.len()];
        add_gaussian(&self.key, step, after, (noise * batch) as f32, &mut drawn);
        let mut thresholds = self.clipping.thresholds();
        for ((r, &b), n) in thresholds.iter_mut().zip(below).zip(&drawn) {
            // Each sample adds ±½, so that it moves the count by ½ whichever side it is on.
            let share = (b as f64 - 0.5 * samples as f64 + *n as f64) / batch + 0.5;
            *r *= (-rate * (share - quantile)).exp();
        }
        self.clipping.set_thresholds(&thresholds);
    }
}
