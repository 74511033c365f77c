//! Sampler, clipper, noise and accountant as one object, so that their settings always agree.

use super::plan::Clipping;
use crate::array::Array;
use crate::autograd::Param;
use crate::base::{Error, Result};
use crate::device::cuda::Gpu;
use crate::privacy::accountant::Steps;
use crate::privacy::{Accountant, ClipFn, ClipStyle, Neighbouring, PoissonSampler, StepLog, Thresholds};
use crate::random::NoiseKey;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, OnceLock};

/// The target of private training and its settings.
///
/// ```
/// use prismgrad::privacy::{ClipFn, ClipStyle};
/// use prismgrad::step::PrivacyConfig;
/// let config = PrivacyConfig::target(3.0, 1e-5).records(60_000).expected_batch(256.0).steps(1000);
/// // What Opacus does by default: one group, and the clip factor min(1, R/|g|) of Abadi et al.
/// let flat = config.style(ClipStyle::AllLayer).clip(ClipFn::Abadi).max_grad_norm(1.0);
/// flat.check().unwrap();
/// ```
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq)]
pub struct PrivacyConfig {
    /// Target ε, the privacy budget. A step that would exceed it is refused.
    pub epsilon: f64,
    /// δ; it must be below 1/records.
    pub delta: f64,
    /// Number of records, which are the units of protection. Each has one loss.
    pub records: usize,
    /// Expected size of a Poisson batch; the sampling rate is `expected_batch / records`.
    pub expected_batch: f64,
    /// Planned number of steps.
    pub steps: u64,
    /// Clipping groups; one group per layer by default.
    pub style: ClipStyle,
    /// Clip function; AUTO-S by default.
    pub clip: ClipFn,
    /// R, the largest norm of a sample's clipped gradient over all groups; 1 by default. The groups' thresholds compose to it: √(Σ R_m²) =
    /// R.
    pub max_grad_norm: f64,
    /// The division of R among the groups; equal by default.
    #[serde(default)]
    pub thresholds: Thresholds,
    /// The neighbouring relation; adding or removing one record by default.
    #[serde(default)]
    pub neighbouring: Neighbouring,
    /// Noise multiplier; if it is not given, it is calibrated to ε, δ and the planned steps.
    pub noise_multiplier: Option<f64>,
}

macro_rules! setters {
    ($($(#[$doc:meta])* $name:ident: $type:ty;)*) => {
        $($(#[$doc])*
        pub fn $name(mut self, $name: $type) -> PrivacyConfig {
            self.$name = $name;
            self
        })*
    };
}

impl PrivacyConfig {
    /// A configuration with this (ε, δ). The number of records, the expected batch size and the number of steps must be set as well.
    ///
    /// The defaults work without tuning: one clipping group per layer and AUTO-S (Bu et al. 2023), whose factor R/(|g| + γ) leaves the
    /// learning rate as the only scale. Opacus uses one group for all layers and Abadi's factor instead.
    pub fn target(epsilon: f64, delta: f64) -> PrivacyConfig {
        PrivacyConfig {
            epsilon,
            delta,
            records: 0,
            expected_batch: 0.0,
            steps: 0,
            style: ClipStyle::LayerWise,
            clip: ClipFn::AutoS { gamma: 0.01 },
            max_grad_norm: 1.0,
            thresholds: Thresholds::Equal,
            neighbouring: Neighbouring::AddRemove,
            noise_multiplier: None,
        }
    }
    setters! {
        /// Sets the number of records.
        records: usize;
        /// Sets the expected size of a Poisson batch.
        expected_batch: f64;
        /// Sets the planned number of steps.
        steps: u64;
        /// Sets the clipping groups.
        style: ClipStyle;
        /// Sets the clip function.
        clip: ClipFn;
        /// Sets R, the largest norm of a sample's clipped gradient.
        max_grad_norm: f64;
        /// Sets the division of R among the groups.
        thresholds: Thresholds;
        /// Sets the neighbouring relation.
        neighbouring: Neighbouring;
    }
    /// Sets the noise multiplier instead of calibrating it to (ε, δ).
    pub fn noise_multiplier(mut self, sigma: f64) -> PrivacyConfig {
        self.noise_multiplier = Some(sigma);
        self
    }
    /// Returns an error for invalid settings that names them; it is called again wherever the configuration is used.
    pub fn check(&self) -> Result<()> {
        let need = |ok: bool, what: String| if ok { Ok(()) } else { Err(Error::privacy(what)) };
        need(self.epsilon.is_finite() && self.epsilon > 0.0, format!("ε = {}; it must be positive", self.epsilon))?;
        need(self.delta > 0.0 && self.delta < 1.0, format!("δ = {:e}; it must lie between 0 and 1", self.delta))?;
        need(self.records > 0, "no records to protect: give their number with records(n)".into())?;
        need(
            self.delta < 1.0 / self.records as f64,
            format!(
                "δ = {:e} with {} records: choose it below 1/records, such as {:.1e}",
                self.delta,
                self.records,
                0.1 / self.records as f64
            ),
        )?;
        need(
            self.expected_batch > 0.0 && self.expected_batch <= self.records as f64,
            format!(
                "an expected batch of {} from {} records; it must be above 0 and at most all of them: set it with expected_batch(b)",
                self.expected_batch, self.records
            ),
        )?;
        need(self.steps > 0, "0 planned steps: give their number with steps(n)".into())?;
        need(
            self.max_grad_norm.is_finite() && self.max_grad_norm > 0.0,
            format!("a clipping threshold (max_grad_norm) of {}; it must be positive", self.max_grad_norm),
        )?;
        self.clip.validate()?;
        self.thresholds.validate(self.clip)?;
        if let Some(s) = self.noise_multiplier {
            need(s.is_finite() && s > 0.0, format!("a noise multiplier of {s}: without noise there is no privacy"))?;
        }
        Ok(())
    }
}

/// The privacy components of a [`PrivateStep`](super::PrivateStep): Poisson sampler, clipper, noise and accountant.
pub struct Privacy {
    config: PrivacyConfig,
    sigma: f64,
    pub(super) key: NoiseKey,
    sampler: PoissonSampler,
    accountant: Accountant,
    /// (Number of steps, ε after them), in ascending order. For a number of steps between two entries, the ε of the larger one is reported.
    epsilon_table: Vec<(u64, f64)>,
    pub(super) clipping: Clipping,
    /// The releases of this process and, if there is a log file, those of earlier ones.
    log: StepLog,
    /// Number of this run's steps that a checkpoint contains and the log does not.
    unlogged: u64,
    digest_key: OnceLock<Vec<u32>>,
    digest_key_on_gpu: OnceLock<Array>,
}

impl Privacy {
    /// Validates the configuration and calibrates the noise. `key` must be secret and fresh for every run ([`NoiseKey::from_os`]); sampling
    /// and noise are derived from it.
    pub fn new(config: PrivacyConfig, key: NoiseKey) -> Result<Privacy> {
        config.check()?;
        let q = config.expected_batch / config.records as f64;
        let sigma = match config.noise_multiplier {
            Some(s) => s,
            None => Accountant::under(config.neighbouring).calibrate(config.epsilon, config.delta, q, config.steps)?,
        };
        let sampler = PoissonSampler::new(config.records, q, key.clone())?;
        let entries = config.steps.min(24);
        let counts: Vec<u64> = (1..=entries).map(|i| (config.steps * i).div_ceil(entries)).collect();
        let coarse = Accountant::under(config.neighbouring).epsilons((sigma, q), &counts, config.delta, 1e-3)?;
        let mut epsilon_table: Vec<(u64, f64)> = counts.into_iter().zip(coarse).collect();
        let mut whole = Accountant::under(config.neighbouring);
        whole.record(sigma, q, config.steps)?;
        if let Some(last) = epsilon_table.last_mut() {
            last.1 = whole.epsilon(config.delta)?;
            let top = last.1;
            epsilon_table.iter_mut().for_each(|(_, e)| *e = e.min(top));
        }
        Ok(Privacy {
            sigma,
            sampler,
            accountant: Accountant::under(config.neighbouring),
            epsilon_table,
            clipping: Clipping::default(),
            log: StepLog::in_memory(fingerprint(&key)),
            unlogged: 0,
            digest_key: OnceLock::new(),
            digest_key_on_gpu: OnceLock::new(),
            key,
            config,
        })
    }
    /// Writes every private step to this file, and syncs it to disk, before the step is taken. Steps that are in the file already count as
    /// spent, whatever a checkpoint says. A step that a resumed run repeats with the same bits is counted once.
    pub fn log_to(mut self, path: impl AsRef<std::path::Path>) -> Result<Privacy> {
        if self.steps() > 0 {
            return Err(Error::privacy("log_to after the first step: the steps taken before would not be in the file"));
        }
        let log = StepLog::open(path, fingerprint(&self.key))?;
        self.log = log;
        self.accountant = self.accounted(None)?;
        Ok(self)
    }
    /// Forms the clipping groups over the parameters of a step.
    pub(super) fn plan(&mut self, params: &[Param]) -> Result<()> {
        let c = &self.config;
        self.clipping = Clipping::new(&c.style, c.clip, c.max_grad_norm, &c.thresholds, params)?;
        let std = self.sigma * self.clipping.sensitivity;
        if !(1e-30..1e30).contains(&std) {
            return Err(Error::privacy(format!(
                "noise of standard deviation {std:e} (noise multiplier {} times sensitivity {}) leaves the range of f32: choose \
                 max_grad_norm nearer to 1",
                self.sigma, self.clipping.sensitivity
            )));
        }
        if let Thresholds::Adaptive { noise, .. } = c.thresholds {
            if params.iter().any(|p| p.device().is_cuda()) {
                return Err(Error::privacy(
                    "adaptive thresholds read counts back at every step, which a step on a GPU does not do; train on the CPU, or \
                     use AUTO-S, which needs no threshold",
                ));
            }
            let left = self.sigma.powi(-2) - self.groups() as f64 / (2.0 * noise * c.expected_batch).powi(2);
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
    /// The current thresholds of the clipping groups.
    pub fn thresholds(&self) -> Vec<f64> {
        self.clipping.thresholds()
    }
    /// Sets adaptive thresholds; an empty list changes nothing.
    pub(super) fn set_thresholds(&mut self, thresholds: &[f64]) {
        self.clipping.set_thresholds(thresholds);
    }
    /// Standard deviation of the gradient's noise divided by its sensitivity: the noise multiplier, or more if adaptive thresholds use part
    /// of the budget.
    pub fn gradient_noise_multiplier(&self) -> f64 {
        match self.config.thresholds {
            Thresholds::Adaptive { noise, .. } => {
                let counts = self.groups() as f64 / (2.0 * noise * self.config.expected_batch).powi(2);
                (self.sigma.powi(-2) - counts).powf(-0.5)
            }
            _ => self.sigma,
        }
    }
    pub(super) fn clipping(&self) -> &Clipping {
        &self.clipping
    }
    /// The configuration.
    pub fn config(&self) -> &PrivacyConfig {
        &self.config
    }
    /// Noise multiplier: standard deviation of the noise divided by the sensitivity of the clipped sum.
    pub fn noise_multiplier(&self) -> f64 {
        self.sigma
    }
    /// Sensitivity: the largest change of the clipped sum when one record is added or removed, composed over the groups.
    pub fn sensitivity(&self) -> f64 {
        self.clipping.sensitivity
    }
    /// Expected batch size, by which private sums are divided.
    pub fn expected_batch(&self) -> f64 {
        self.config.expected_batch
    }
    /// Sampling rate.
    pub fn rate(&self) -> f64 {
        self.config.expected_batch / self.config.records as f64
    }
    /// The secret that, together with the caller's seed, determines a step's dropout masks.
    pub(super) fn mask_secret(&self, step: u64) -> u64 {
        self.key.uniform(step, 1 << 40).to_bits()
    }
    pub(super) fn batch(&self, step: u64) -> Vec<usize> {
        self.sampler.batch(step)
    }
    /// ε after `steps` steps of this run's kind at the configured δ, at the accountant's full resolution.
    pub fn epsilon(&self, steps: u64) -> Result<f64> {
        if steps == 0 {
            return Ok(0.0);
        }
        let mut a = Accountant::under(self.config.neighbouring);
        a.record(self.sigma, self.rate(), steps)?;
        a.epsilon(self.config.delta)
    }
    /// An upper bound on ε after `more` further steps. If all steps were of this run's kind, it is the next larger value of a table
    /// computed at the start, at no cost.
    fn bound(&self, more: u64) -> Result<f64> {
        let steps = self.steps() + more;
        if steps == 0 {
            return Ok(0.0);
        }
        let own = |s: &Steps| s.sigma == self.sigma && s.rate == self.rate();
        if self.accountant.history().iter().all(own)
            && let Some((_, e)) = self.epsilon_table.iter().find(|(n, _)| *n >= steps)
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
    /// Number of private steps taken so far, including those with an empty batch.
    pub fn steps(&self) -> u64 {
        self.accountant.steps()
    }
    /// An upper bound of the ε spent so far.
    pub fn spent(&self) -> Result<f64> {
        self.bound(0)
    }
    /// The accountant of everything in the log, with one more release of this run's kind at step `more`, if given.
    fn accounted(&self, more: Option<u64>) -> Result<Accountant> {
        let mut all = Accountant::under(self.config.neighbouring);
        for (sigma, rate) in self.log.history(more.map(|step| (step, self.sigma, self.rate()))) {
            all.record(sigma, rate, 1)?;
        }
        if self.unlogged > 0 {
            all.record(self.sigma, self.rate(), self.unlogged)?;
        }
        Ok(all)
    }
    /// Refuses a step that would exceed the budget or cannot be counted, before any work is done for it.
    pub(super) fn admit(&self, step: u64) -> Result<()> {
        match self.log.has(step, self.rate())? {
            // It may be a repetition of the same release; otherwise it is refused once its sum is known.
            true => self.within(self.spent()?, || self.exactly(0)).map(|_| ()),
            false => self.within(self.bound(1)?, || self.exactly(1)).map(|_| ()),
        }
    }
    /// Records a release before it is made, or refuses it. Returns an upper bound of ε that includes it. `release` is its name, or `None`
    /// on a GPU, where reading the sum would wait for the device: there a repeated step is counted again.
    pub(super) fn commit(&mut self, step: u64, release: Option<String>) -> Result<f64> {
        let rate = self.rate();
        if self.log.has_release(step, release.as_deref()) {
            return self.within(self.spent()?, || self.exactly(0));
        }
        if self.log.has(step, rate)? {
            // A second sum of the same batch.
            let all = self.accounted(Some(step))?;
            let epsilon = all.epsilon(self.config.delta)?;
            self.within(epsilon, || Ok(epsilon))?;
            self.log.write(step, release, self.sigma, rate)?;
            self.accountant = all;
            return Ok(epsilon);
        }
        let epsilon = self.within(self.bound(1)?, || self.exactly(1))?;
        self.log.write(step, release, self.sigma, rate)?;
        self.accountant.record(self.sigma, rate, 1)?;
        Ok(epsilon)
    }
    /// Returns `bound`, or the exact ε if the bound is above the budget; an error if the exact ε is above it, too.
    fn within(&self, bound: f64, exact: impl FnOnce() -> Result<f64>) -> Result<f64> {
        let budget = self.config.epsilon;
        let over = |e: f64| e > budget * (1.0 + 1e-9);
        if !over(bound) {
            return Ok(bound);
        }
        match exact()? {
            epsilon if over(epsilon) => Err(Error::BudgetSpent { epsilon, budget, steps: self.steps() }),
            _ => Ok(bound),
        }
    }
    /// Restores the number of private steps of a checkpoint, which were taken under this key and configuration. Steps that the log contains
    /// are not counted twice, and the count never decreases.
    pub(super) fn restore(&mut self, steps: u64) -> Result<()> {
        let known = self.log.own_steps() + self.unlogged;
        if steps > known {
            self.accountant.record(self.sigma, self.rate(), steps - known)?;
            self.unlogged += steps - known;
        }
        Ok(())
    }
    /// Whether the key is a test key that anyone can compute ([`NoiseKey::from_seed_for_tests`]): such a run is not private.
    pub fn has_test_key(&self) -> bool {
        self.key.is_for_tests()
    }
    /// Numbers computed from key and configuration that do not reveal the key; they must be equal on all ranks.
    pub(super) fn fingerprint(&self) -> Result<[f64; 3]> {
        let key = self.key.uniform(u64::MAX, 1 << 32).to_bits();
        Ok([(key >> 32) as f64, (key & 0xffff_ffff) as f64, self.digest()? as f64])
    }
    /// A checksum of the whole configuration.
    fn digest(&self) -> Result<u32> {
        let config = serde_json::to_string(&(&self.config, self.sigma))
            .map_err(|e| Error::privacy(format!("the configuration cannot be written down: {e}")))?;
        Ok(crc32fast::hash(config.as_bytes()))
    }
    /// The key words with which sums are digested, generated when first needed.
    pub(super) fn digest_key(&self) -> &[u32] {
        self.digest_key.get_or_init(|| crate::random::digest::key(&self.key))
    }
    /// The same words in the memory of the step's GPU.
    pub(super) fn digest_key_on(&self, gpu: &Arc<Gpu>) -> Result<&Array> {
        if let Some(key) = self.digest_key_on_gpu.get() {
            return Ok(key);
        }
        let key = crate::random::cuda::digest_key(gpu, &self.key)?;
        Ok(self.digest_key_on_gpu.get_or_init(|| key))
    }
}

/// An identifier of a key for the log: it is computed from the key, but the key cannot be computed from it.
pub(super) fn fingerprint(key: &NoiseKey) -> String {
    format!("{:016x}", key.uniform(u64::MAX, 1 << 32).to_bits())
}
