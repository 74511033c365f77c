//! Sampler, clipper, noise and accountant as one object, so that they cannot disagree.

use super::plan::Clipping;
use crate::array::Array;
use crate::autograd::Param;
use crate::base::{Error, Result};
use crate::privacy::accountant::Steps;
use crate::privacy::{Accountant, ClipFn, ClipStyle, Neighbouring, PoissonSampler, StepLog, Thresholds};
use crate::random::NoiseKey;
use serde::{Deserialize, Serialize};

/// What private training is asked to do. Everything else follows from it.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct PrivacyConfig {
    /// Target ε. The run stops before it is exceeded.
    pub epsilon: f64,
    /// δ; below 1/records.
    pub delta: f64,
    /// Number of records, the units protected (add or remove one).
    pub records: usize,
    /// Expected size of a Poisson batch; the sampling rate is `batch / records`.
    pub batch: f64,
    /// Planned number of steps.
    pub steps: u64,
    /// Clipping groups.
    pub style: ClipStyle,
    /// Clip function.
    pub clip: ClipFn,
    /// Total clipping threshold R; group thresholds compose to it: √(Σ R_m²) = R.
    pub threshold: f64,
    /// How it is split over the groups.
    #[serde(default)]
    pub thresholds: Thresholds,
    /// Which data sets must be hard to tell apart.
    #[serde(default)]
    pub neighbouring: Neighbouring,
    /// Noise multiplier; calibrated to ε, δ and the plan if not given.
    pub noise_multiplier: Option<f64>,
}

impl PrivacyConfig {
    /// A target with the defaults that work without tuning: layer-wise groups, AUTO-S (Bu et al. 2023), threshold 1.
    pub fn new(epsilon: f64, delta: f64, records: usize, batch: f64, steps: u64) -> PrivacyConfig {
        PrivacyConfig {
            epsilon,
            delta,
            records,
            batch,
            steps,
            style: ClipStyle::LayerWise,
            clip: ClipFn::AutoS { gamma: 0.01 },
            threshold: 1.0,
            thresholds: Thresholds::Equal,
            neighbouring: Neighbouring::AddRemove,
            noise_multiplier: None,
        }
    }
    /// Refuses what makes no sense, naming it; done again wherever the configuration is used.
    pub fn check(&self) -> Result<()> {
        let need = |ok: bool, what: String| if ok { Ok(()) } else { Err(Error::privacy(what)) };
        need(self.epsilon.is_finite() && self.epsilon > 0.0, format!("ε = {}; it must be positive", self.epsilon))?;
        need(self.delta > 0.0 && self.delta < 1.0, format!("δ = {}; it must lie between 0 and 1", self.delta))?;
        need(self.records > 0, "no records to protect".into())?;
        need(
            self.delta < 1.0 / self.records as f64,
            format!(
                "δ = {} with {} records: choose it below 1/records, such as {:.1e}",
                self.delta,
                self.records,
                0.1 / self.records as f64
            ),
        )?;
        need(
            self.batch > 0.0 && self.batch <= self.records as f64,
            format!("an expected batch of {} from {} records", self.batch, self.records),
        )?;
        need(self.steps > 0, "0 planned steps".into())?;
        need(
            self.threshold.is_finite() && self.threshold > 0.0,
            format!("a clipping threshold of {}; it must be positive", self.threshold),
        )?;
        self.clip.validate()?;
        self.thresholds.validate(self.clip)?;
        if let Some(s) = self.noise_multiplier {
            need(s.is_finite() && s > 0.0, format!("a noise multiplier of {s}: without noise there is no privacy"))?;
        }
        Ok(())
    }
}

/// The private half of a [`TrainStep`](super::TrainStep): Poisson sampler, clipper, noise and accountant.
pub struct Privacy {
    config: PrivacyConfig,
    sigma: f64,
    pub(super) key: NoiseKey,
    sampler: PoissonSampler,
    accountant: Accountant,
    /// ε after some numbers of steps, rising: what is reported in between is the next larger entry.
    ladder: Vec<(u64, f64)>,
    pub(super) clipping: Clipping,
    log: Option<StepLog>,
}

impl Privacy {
    /// Validates the target and calibrates the noise. `key` must be secret and fresh for every run
    /// ([`NoiseKey::from_os`]); sampling and noise are derived from it.
    pub fn new(config: PrivacyConfig, key: NoiseKey) -> Result<Privacy> {
        config.check()?;
        let q = config.batch / config.records as f64;
        let sigma = match config.noise_multiplier {
            Some(s) => s,
            None => Accountant::under(config.neighbouring).calibrate(config.epsilon, config.delta, q, config.steps)?,
        };
        let sampler = PoissonSampler::new(config.records, q, key.clone())?;
        let rungs = config.steps.min(24);
        let counts: Vec<u64> = (1..=rungs).map(|i| (config.steps * i).div_ceil(rungs)).collect();
        let coarse = Accountant::under(config.neighbouring).epsilons((sigma, q), &counts, config.delta, 1e-3)?;
        let mut ladder: Vec<(u64, f64)> = counts.into_iter().zip(coarse).collect();
        let mut whole = Accountant::under(config.neighbouring);
        whole.record(sigma, q, config.steps)?;
        if let Some(last) = ladder.last_mut() {
            last.1 = whole.epsilon(config.delta)?;
            let top = last.1;
            ladder.iter_mut().for_each(|(_, e)| *e = e.min(top));
        }
        Ok(Privacy {
            sigma,
            sampler,
            accountant: Accountant::under(config.neighbouring),
            ladder,
            clipping: Clipping::default(),
            log: None,
            key,
            config,
        })
    }
    /// Writes every private step to this file, and to disk, before it is taken; what is in the file already has been spent,
    /// whatever a checkpoint says. A step that a resumed run takes again in the same bits is counted once.
    pub fn log_to(mut self, path: impl AsRef<std::path::Path>) -> Result<Privacy> {
        // Not the key: a number that follows from it and from which it does not follow.
        let key = self.key.uniform(u64::MAX, 1 << 32).to_bits();
        let log = StepLog::open(path, format!("{key:016x}"))?;
        for &(sigma, rate) in log.history() {
            self.accountant.record(sigma, rate, 1)?;
        }
        self.log = Some(log);
        Ok(self)
    }
    /// Forms the clipping groups over the parameters of a step.
    pub(super) fn plan(&mut self, params: &[Param]) -> Result<()> {
        let c = &self.config;
        self.clipping = Clipping::new(&c.style, c.clip, c.threshold, &c.thresholds, params)?;
        if let Thresholds::Adaptive { noise, .. } = c.thresholds {
            if params.iter().any(|p| p.device().is_cuda()) {
                return Err(Error::privacy(
                    "adaptive thresholds read counts back at every step, which a step on a GPU does not do; train on the CPU, or \
                     use AUTO-S, which needs no threshold",
                ));
            }
            let left = self.sigma.powi(-2) - self.groups() as f64 / (2.0 * noise * c.batch).powi(2);
            if left <= 0.0 {
                return Err(Error::privacy(format!(
                    "the counts of {} groups with noise {noise} alone cost more than the noise multiplier {:.4} allows; use more \
                     noise or fewer groups",
                    self.groups(),
                    self.sigma
                )));
            }
        }
        Ok(())
    }
    /// Number of clipping groups.
    pub fn groups(&self) -> usize {
        self.clipping.thresholds().len()
    }
    /// The clipping groups' thresholds as they are now.
    pub fn thresholds(&self) -> Vec<f64> {
        self.clipping.thresholds()
    }
    pub(super) fn set_thresholds(&mut self, thresholds: &[f64]) {
        self.clipping.set_thresholds(thresholds);
    }
    /// Standard deviation of the gradient's noise over its sensitivity: the noise multiplier, or more where adaptive
    /// thresholds take their share of it.
    pub fn gradient_noise_multiplier(&self) -> f64 {
        match self.config.thresholds {
            Thresholds::Adaptive { noise, .. } => {
                let counts = self.groups() as f64 / (2.0 * noise * self.config.batch).powi(2);
                (self.sigma.powi(-2) - counts).powf(-0.5)
            }
            _ => self.sigma,
        }
    }
    pub(super) fn clipping(&self) -> &Clipping {
        &self.clipping
    }
    /// The target.
    pub fn config(&self) -> &PrivacyConfig {
        &self.config
    }
    /// Noise multiplier: standard deviation of the noise over the sensitivity of the clipped sum.
    pub fn noise_multiplier(&self) -> f64 {
        self.sigma
    }
    /// The most one record can move the clipped sum (add or remove), composed over the groups.
    pub fn sensitivity(&self) -> f64 {
        self.clipping.sensitivity
    }
    /// Expected batch size, by which private sums are divided.
    pub fn expected_batch(&self) -> f64 {
        self.config.batch
    }
    /// Sampling rate.
    pub fn rate(&self) -> f64 {
        self.config.batch / self.config.records as f64
    }
    pub(super) fn batch(&self, step: u64) -> Vec<usize> {
        self.sampler.batch(step)
    }
    /// ε spent after `steps` steps at the configured δ, to the accountant's full resolution.
    pub fn epsilon(&self, steps: u64) -> Result<f64> {
        if steps == 0 {
            return Ok(0.0);
        }
        let mut a = Accountant::under(self.config.neighbouring);
        a.record(self.sigma, self.rate(), steps)?;
        a.epsilon(self.config.delta)
    }
    /// An upper bound on ε with `more` steps taken. It costs nothing where all steps were of this run's kind: the next larger
    /// value of a table made at the start.
    fn bound(&self, more: u64) -> Result<f64> {
        let steps = self.steps() + more;
        if steps == 0 {
            return Ok(0.0);
        }
        let own = |s: &Steps| s.sigma == self.sigma && s.rate == self.rate();
        if self.accountant.history().iter().all(own)
            && let Some((_, e)) = self.ladder.iter().find(|(n, _)| *n >= steps)
        {
            return Ok(*e);
        }
        self.exactly(more)
    }
    fn exactly(&self, more: u64) -> Result<f64> {
        let mut a = self.accountant.clone();
        a.record(self.sigma, self.rate(), more)?;
        a.epsilon(self.config.delta)
    }
    /// Private steps taken so far: those that touched private data, or would have, had the batch not been empty.
    pub fn steps(&self) -> u64 {
        self.accountant.steps()
    }
    /// (An upper bound of) ε spent so far.
    pub fn spent(&self) -> Result<f64> {
        self.bound(0)
    }
    /// Records the step about to be taken, or refuses it. Returns (an upper bound of) ε with it included.
    /// `params`, flat, are what the step starts from.
    pub(super) fn admit(&mut self, step: u64, params: &Array) -> Result<f64> {
        let mut state = String::new();
        if let Some(log) = &self.log {
            state = state_of(params);
            if log.has(step, &state)? {
                return self.spent();
            }
        }
        let over = |e: f64| e > self.config.epsilon * (1.0 + 1e-9);
        let epsilon = self.bound(1)?;
        if over(epsilon) {
            let epsilon = self.exactly(1)?;
            if over(epsilon) {
                return Err(Error::BudgetSpent { epsilon, budget: self.config.epsilon, steps: self.steps() });
            }
        }
        let rate = self.rate();
        if let Some(log) = &mut self.log {
            log.write(step, &state, self.sigma, rate)?;
        }
        self.accountant.record(self.sigma, rate, 1)?;
        Ok(epsilon)
    }
    /// Takes over the number of private steps of a checkpoint. An accountant that cannot record them is an error: ε would
    /// be too small.
    pub(super) fn restore(&mut self, steps: u64) -> Result<()> {
        // The log knows of steps after the checkpoint, too.
        if self.log.is_some() && self.steps() >= steps {
            return Ok(());
        }
        self.accountant.reset();
        match steps {
            0 => Ok(()),
            steps => self.accountant.record(self.sigma, self.rate(), steps),
        }
    }
}

/// What decides the bits of a step besides key and data: the kind of machine and, on the CPU, a checksum of the parameters (on
/// a GPU that would wait for the device).
fn state_of(params: &Array) -> String {
    let device = params.device();
    let machine = format!("{} {}", std::env::consts::ARCH, env!("CARGO_PKG_VERSION"));
    match device.gpu() {
        Some(gpu) => format!("{machine} {}", gpu.name()),
        None => {
            let level = crate::device::cpu::simd::level();
            format!("{machine} {level:?} {:08x}", crc32fast::hash(&params.to_bytes()))
        }
    }
}
