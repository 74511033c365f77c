//! Privacy-loss-distribution accountant of the Poisson-subsampled Gaussian mechanism.
//!
//! One step compares N(0, σ²) with the mixture (1 − q)·N(0, σ²) + q·N(1, σ²). On a grid of spacing h the privacy-loss distribution is the
//! one whose hockey-stick divergence equals the exact one at every grid point and lies above it between them (Doroshenko et al. 2022,
//! "connect the dots"), so that every number is an upper bound that decreases as h → 0. Steps compose by convolution, computed with the FFT
//! on a window whose truncated tails (bounded by Chernoff's inequality) are counted as infinite loss (Koskela et al. 2020; Gopi et al.
//! 2021). For small δ each distribution is tilted by e^{λ·loss} before the transform, with half of the λ that minimises Chernoff's bound,
//! and tilted back afterwards: the rounding error of the transform is then small relative to the probabilities that determine δ, and not
//! only relative to 1. Steps without sampling compose to one comparison of Gaussians, whose δ has a closed form (Balle and Wang 2018).
//!
//! The noise is bounded at 9.49 standard deviations (`random::chacha`): the probability mass that a record shifts beyond this bound is
//! counted as infinite loss.

mod prv;
pub mod rdp;

pub use prv::Bracket;

use crate::base::{Error, Result};
use realfft::{ComplexToReal, RealFftPlanner, RealToComplex, num_complex::Complex64};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::sync::Arc;

/// The neighbouring relation: the pairs of data sets that must be hard to distinguish.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Neighbouring {
    /// Data sets that differ by adding or removing one record.
    #[default]
    AddRemove,
    /// Data sets that differ by setting one record's contribution to zero; ε is the same as for [`Neighbouring::AddRemove`].
    ZeroOut,
    /// Data sets that differ by replacing one record with another.
    ReplaceOne,
}

/// A number of equal steps: noise multiplier, sampling rate, count.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Steps {
    /// Noise multiplier σ: the standard deviation of the noise divided by the sensitivity.
    pub sigma: f64,
    /// Poisson sampling rate.
    pub rate: f64,
    /// Number of steps.
    pub count: u64,
}

/// The history of a run, from which its (ε, δ) is computed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Accountant {
    history: Vec<Steps>,
    /// Grid spacing h of privacy losses.
    pub interval: f64,
    /// Neighbouring relation.
    pub neighbouring: Neighbouring,
}

impl Default for Accountant {
    fn default() -> Self {
        Accountant { history: Vec::new(), interval: 1e-4, neighbouring: Neighbouring::AddRemove }
    }
}

/// Upper limit on the mass that truncation may move to infinite loss.
const TAIL: f64 = 1e-15;
/// Number of points of the longest window: two transforms of it take about two seconds and half a gigabyte.
const LONGEST: usize = 1 << 24;
/// The bound of the normals of `random::chacha`, in standard deviations.
const REACH: f64 = 9.49;

/// The query on a composed distribution.
#[derive(Clone, Copy)]
enum Aim {
    /// ε at this δ.
    Delta(f64),
    /// δ at this ε.
    Epsilon(f64),
}

impl Aim {
    /// Limit on the mass that truncation may move to infinite loss.
    fn tail(self) -> f64 {
        match self {
            Aim::Delta(delta) => (delta * 1e-5).clamp(1e-100, TAIL),
            Aim::Epsilon(_) => TAIL,
        }
    }
}

impl Accountant {
    /// An empty history with add/remove neighbours and h = 10⁻⁴.
    pub fn new() -> Accountant {
        Accountant::default()
    }
    /// An empty history under another neighbouring relation.
    pub fn under(neighbouring: Neighbouring) -> Accountant {
        Accountant { neighbouring, ..Accountant::default() }
    }
    /// Adds steps to the history; equal ones are merged, and order does not matter.
    pub fn record(&mut self, sigma: f64, rate: f64, count: u64) -> Result<()> {
        if !(sigma.is_finite() && sigma > 0.0) {
            return Err(Error::privacy(format!("a noise multiplier of {sigma}: without noise ε is infinite")));
        }
        // Below this, losses leave the range of floating point; ε would be in the hundreds.
        if sigma < 0.05 {
            return Err(Error::privacy(format!(
                "a noise multiplier of {sigma}: below 0.05 there is no privacy to account"
            )));
        }
        if !(0.0..=1.0).contains(&rate) {
            return Err(Error::privacy(format!("a sampling rate of {rate}; it must lie in [0, 1]")));
        }
        match self.history.iter_mut().find(|s| s.sigma == sigma && s.rate == rate) {
            Some(s) => s.count = s.count.saturating_add(count),
            None => self.history.push(Steps { sigma, rate, count }),
        }
        Ok(())
    }
    /// Clears the history.
    pub fn reset(&mut self) {
        self.history.clear();
    }
    /// Steps recorded so far.
    pub fn steps(&self) -> u64 {
        self.history.iter().map(|s| s.count).sum()
    }
    /// The history.
    pub fn history(&self) -> &[Steps] {
        &self.history
    }
    /// A lower bound of the mass of infinite loss: the mass that a record shifts beyond the bound of the noise.
    fn certain(&self) -> f64 {
        let step = |s: &Steps| s.count as f64 * (-s.rate * uncovered(shift(self.neighbouring) / s.sigma)).ln_1p();
        -self.history.iter().map(step).sum::<f64>().exp_m1()
    }
    /// An upper bound of ε at δ: the smallest ε for which the recorded steps are (ε, δ)-differentially private. It is infinite if a record
    /// shifts more mass than δ beyond the bound of the noise, at 9.49 standard deviations.
    pub fn epsilon(&self, delta: f64) -> Result<f64> {
        if !(delta > 0.0 && delta < 1.0) {
            return Err(Error::privacy(format!("δ = {delta}; it must lie between 0 and 1")));
        }
        if let Some(exact) = self.unsampled() {
            return exact.epsilon(delta);
        }
        if self.certain() > delta {
            return Ok(f64::INFINITY);
        }
        let epsilon = self.composed(Aim::Delta(delta))?.iter().map(|c| c.epsilon(delta)).fold(0.0, f64::max);
        Ok(epsilon)
    }
    /// An upper bound of δ at ε.
    pub fn delta(&self, epsilon: f64) -> Result<f64> {
        if epsilon.is_nan() {
            return Err(Error::privacy(format!("ε = {epsilon}; it must be a number")));
        }
        if let Some(exact) = self.unsampled() {
            return Ok(exact.delta(epsilon));
        }
        Ok(self.composed(Aim::Epsilon(epsilon))?.iter().map(|c| c.delta(epsilon)).fold(0.0, f64::max))
    }
    /// ε at δ after each of the given numbers of identical steps (σ, q), with one shared transform. The recorded history is not used.
    pub fn epsilons(&self, (sigma, rate): (f64, f64), counts: &[u64], delta: f64, interval: f64) -> Result<Vec<f64>> {
        if !(delta > 0.0 && delta < 1.0) {
            return Err(Error::privacy(format!("δ = {delta}; it must lie between 0 and 1")));
        }
        let mut a = Accountant { interval, ..Accountant::under(self.neighbouring) };
        a.record(sigma, rate, counts.iter().copied().max().unwrap_or(0))?;
        if a.steps() == 0 || rate == 0.0 {
            return Ok(vec![0.0; counts.len()]);
        }
        let mut out = vec![0.0f64; counts.len()];
        if a.unsampled().is_some() {
            for (o, &count) in out.iter_mut().zip(counts) {
                a.history = vec![Steps { sigma, rate, count }];
                *o = a.epsilon(delta)?;
            }
            return Ok(out);
        }
        let (h, all, reaches) = a.steps_of(Aim::Delta(delta))?;
        for (one, at) in all[0].iter().zip(reaches) {
            let window = Window::new(h, at);
            let spectrum = window.transform(one);
            for (o, &n) in out.iter_mut().zip(counts) {
                if n > 0 {
                    *o = o.max(window.compose([(one, Cow::Borrowed(&spectrum[..]), n)]).epsilon(delta));
                }
            }
        }
        Ok(out)
    }
    /// The smallest noise multiplier (to 10⁻⁵, rounded up) with which `steps` steps at rate q cost at most (ε, δ). The recorded history is
    /// not used.
    ///
    /// Even a large ε requires a minimum of noise: if a record shifts more mass than δ beyond the bound of the noise, no ε is enough. At
    /// δ = 10⁻⁵, 100 steps and q = 0.05 that is the case for noise multipliers below 0.205.
    pub fn calibrate(&self, epsilon: f64, delta: f64, rate: f64, steps: u64) -> Result<f64> {
        if !(epsilon.is_finite() && epsilon > 0.0) {
            return Err(Error::privacy(format!("ε = {epsilon}; it must be positive")));
        }
        /// The smallest noise multiplier that the accountant supports.
        const LEAST: f64 = 0.05;
        let cost = |sigma: f64, interval: f64| -> Result<f64> {
            let mut a = Accountant { interval, ..Accountant::under(self.neighbouring) };
            a.record(sigma, rate, steps)?;
            a.epsilon(delta)
        };
        // Bracketed and narrowed on a coarse grid, whose ε is the larger, then refined on the fine one.
        let coarse = (epsilon * 1e-3).clamp(1e-4, 1e-2);
        let (mut low, mut high) = (LEAST, 1.0);
        while cost(high, coarse)? > epsilon {
            low = high;
            high *= 2.0;
            if high > 1e6 {
                let end = uncovered(shift(self.neighbouring) / high) * rate * steps as f64;
                if end > delta {
                    return Err(Error::privacy(format!(
                        "δ = {delta:e} over {steps} steps at rate {rate}: noise ends at {REACH} standard deviations, past which a record \
                         moves at least {end:.0e} of it; choose a larger δ"
                    )));
                }
                return Err(Error::privacy(format!(
                    "no noise multiplier up to 10⁶ gives ε = {epsilon} at δ = {delta} over {steps} steps at rate {rate}; \
                     take fewer steps, a smaller batch, or a larger ε"
                )));
            }
        }
        while high - low > 1e-3 * high {
            let mid = 0.5 * (low + high);
            if cost(mid, coarse)? > epsilon { low = mid } else { high = mid }
        }
        // The grid's contribution to ε decreases with the square of its spacing: at small ε, a spacing of 10⁻⁵ of ε is as good as the
        // finest one.
        let fine = (epsilon * 1e-5).clamp(1e-4, 1e-2);
        // `high` is valid on the fine grid too; the result of the fine grid may lie a little below the coarse bracket.
        let mut low = (low * 0.98).max(LEAST);
        while low > LEAST && cost(low, fine)? <= epsilon {
            high = low;
            low = (low * 0.98).max(LEAST);
        }
        while high - low > 1e-5 {
            let mid = 0.5 * (low + high);
            if cost(mid, fine)? > epsilon { low = mid } else { high = mid }
        }
        Ok(high)
    }
    /// The single Gaussian comparison to which steps without sampling compose; `None` if there are other steps.
    fn unsampled(&self) -> Option<Unsampled> {
        let live = || self.history.iter().filter(|s| s.count > 0 && s.rate > 0.0);
        if live().next().is_none() || live().any(|s| s.rate < 1.0) {
            return None;
        }
        let shift = shift(self.neighbouring);
        let mu = live().map(|s| s.count as f64 * (shift / s.sigma).powi(2)).sum::<f64>().sqrt();
        let beyond = live().map(|s| s.count as f64 * uncovered(shift / s.sigma)).sum();
        Some(Unsampled { mu, beyond })
    }
    /// The spacing of the grid, and on it the distributions of one step of each kind, one per direction of the comparison.
    ///
    /// The spacing is [`Accountant::interval`], or finer if the losses of a step are closer together than that, or coarser if the window
    /// would be too long.
    #[allow(clippy::type_complexity)]
    fn steps_of(&self, aim: Aim) -> Result<(f64, Vec<Vec<Pld>>, Vec<Reach>)> {
        if !(self.interval >= 1e-6 && self.interval <= 0.1) {
            return Err(Error::invalid("Accountant", format!("a grid spacing of {}; use 1e-6 to 0.1", self.interval)));
        }
        let live = || self.history.iter().filter(|s| s.count > 0 && s.rate > 0.0);
        // Standard deviation of the loss of one step: at most that of the likelihood ratio, or of an unsampled step.
        let deviation =
            |s: &Steps| (s.rate * (s.sigma.powi(-2)).exp_m1().sqrt()).min(1.0 / s.sigma) * shift(self.neighbouring);
        let least = live().map(deviation).fold(f64::INFINITY, f64::min);
        let mut h = if least < self.interval { least / 5.0 } else { self.interval };
        // Losses of one step span at most (2·reach + 1)/σ².
        let span = live().map(|s| (2.0 * REACH * s.sigma + 1.0) / (s.sigma * s.sigma)).fold(0.0, f64::max);
        h = h.max(4.0 * shift(self.neighbouring) * span / LONGEST as f64);
        loop {
            let steps: Vec<Vec<Pld>> = live().map(|s| one_step(s.sigma, s.rate, h, self.neighbouring)).collect();
            let reaches: Vec<Reach> = (0..steps[0].len())
                .map(|d| {
                    let parts: Vec<(&Pld, u64)> = steps.iter().zip(live()).map(|(p, s)| (&p[d], s.count)).collect();
                    Reach::of(&parts, h, aim)
                })
                .collect();
            let longest = reaches.iter().map(|r| r.size).max().unwrap_or(0);
            if longest <= LONGEST {
                return Ok((h, steps, reaches));
            }
            // A grid that is coarse relative to the losses of a step gives an ε that is far too large after many steps.
            let coarser = h * (longest / LONGEST).max(2) as f64;
            if coarser > 0.5 * least && live().map(|s| s.count).sum::<u64>() > 1 {
                return Err(Error::privacy(format!(
                    "{} steps whose losses deviate by {least:.1e} need a grid of {longest} points, and the accountant takes up to \
                     {LONGEST}: take fewer steps (fewer than about {:.0e} of this kind), or a larger noise multiplier",
                    self.steps(),
                    self.steps() as f64 * (LONGEST as f64 / longest as f64 * 0.5 * least / h).powi(2)
                )));
            }
            h = coarser;
        }
    }
    /// The composed loss distributions, one per direction of the comparison.
    fn composed(&self, aim: Aim) -> Result<Vec<Composed>> {
        let live: Vec<&Steps> = self.history.iter().filter(|s| s.count > 0 && s.rate > 0.0).collect();
        if live.is_empty() {
            return Ok(Vec::new());
        }
        let (h, steps, reaches) = self.steps_of(aim)?;
        let composed = reaches.into_iter().enumerate().map(|(d, at)| {
            let window = Window::new(h, at);
            let parts = steps.iter().zip(&live).map(|(p, s)| (&p[d], Cow::Owned(window.transform(&p[d])), s.count));
            window.compose(parts)
        });
        Ok(composed.collect())
    }
}

/// Distance of two neighbours' sums, in units of the sensitivity.
fn shift(neighbouring: Neighbouring) -> f64 {
    if neighbouring == Neighbouring::ReplaceOne { 2.0 } else { 1.0 }
}

/// The mass that noise shifted by `d` standard deviations has where unshifted noise has none.
fn uncovered(d: f64) -> f64 {
    q_tail(REACH - d) - q_tail(REACH)
}

/// The comparison of N(0, 1) with N(μ, 1), and a mass of infinite loss.
struct Unsampled {
    mu: f64,
    beyond: f64,
}

impl Unsampled {
    /// δ(ε) = Q(ε/μ − μ/2) − e^ε·Q(ε/μ + μ/2), with the factor φ(ε/μ − μ/2) = e^ε·φ(ε/μ + μ/2) taken out so that nothing overflows.
    fn delta(&self, epsilon: f64) -> f64 {
        let (x, y) = (epsilon / self.mu - self.mu / 2.0, epsilon / self.mu + self.mu / 2.0);
        let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let delta = if x < 5.0 { q_tail(x) - density * mills(y) } else { density * (mills(x) - mills(y)) };
        (delta.max(0.0) * (1.0 + 1e-9) + self.beyond).min(1.0)
    }
    /// An upper bound of the smallest ε with δ(ε) ≤ δ.
    fn epsilon(&self, delta: f64) -> Result<f64> {
        if self.delta(0.0) <= delta {
            return Ok(0.0);
        }
        if self.beyond >= delta {
            return Ok(f64::INFINITY);
        }
        let (mut low, mut high) = (0.0, self.mu * self.mu / 2.0 + 40.0 * self.mu);
        while high - low > 1e-9 * high {
            let mid = 0.5 * (low + high);
            if self.delta(mid) <= delta { high = mid } else { low = mid }
        }
        Ok(high)
    }
}

/// Mills ratio Q(x)/φ(x): the tail of the standard normal divided by its density.
fn mills(x: f64) -> f64 {
    if x < 5.0 {
        return q_tail(x) * (0.5 * x * x).exp() * (2.0 * std::f64::consts::PI).sqrt();
    }
    // Laplace's continued fraction 1/(x + 1/(x + 2/(x + 3/…))), which has converged to the last digit at this depth.
    1.0 / (x + (1..80).rev().fold(0.0, |rest, k| k as f64 / (x + rest)))
}

/// A discrete privacy-loss distribution: mass[i] at (first + i)·h, the rest at infinity.
struct Pld {
    first: i64,
    mass: Vec<f64>,
    infinite: f64,
}

/// Upper tail of the standard normal.
fn q_tail(x: f64) -> f64 {
    0.5 * libm::erfc(x * std::f64::consts::FRAC_1_SQRT_2)
}

/// The distributions of one step: for add/remove, mixture against Gaussian and the reverse; for replace-one, the mixture with +1 against
/// the mixture with −1 (symmetric).
fn one_step(sigma: f64, rate: f64, h: f64, neighbouring: Neighbouring) -> Vec<Pld> {
    // The bound of the noise, and so of the losses that matter.
    let reach = (REACH + 0.01) * sigma;
    // The mass that a record shifts beyond the bound of its neighbour's noise has infinite loss.
    let beyond = rate * uncovered(shift(neighbouring) / sigma);
    match neighbouring {
        Neighbouring::AddRemove | Neighbouring::ZeroOut => {
            let loss = |x: f64| log_mix(rate, (2.0 * x - 1.0) / (2.0 * sigma * sigma));
            let (low, high) = (loss(-reach), loss(1.0 + reach));
            let remove = |e: f64| {
                let t = (e.exp() - (1.0 - rate)) / rate;
                if t <= 0.0 {
                    return -e.exp_m1();
                }
                let x = 0.5 + sigma * sigma * t.ln();
                // (1−q)·Q(x/σ) + q·Q((x−1)/σ) − eᵉ·Q(x/σ), with the first and last term combined.
                (rate * q_tail((x - 1.0) / sigma) - (rate + e.exp_m1()) * q_tail(x / sigma)).max(0.0)
            };
            let add = |e: f64| {
                let t = ((-e).exp() - (1.0 - rate)) / rate;
                if t <= 0.0 {
                    return 0.0;
                }
                let x = 0.5 + sigma * sigma * t.ln();
                let (p, m) = (q_tail(-x / sigma), q_tail((1.0 - x) / sigma));
                (p - e.exp() * ((1.0 - rate) * p + rate * m)).max(0.0)
            };
            vec![discretise(remove, (low, high), h, beyond), discretise(add, (-high, -low), h, beyond)]
        }
        Neighbouring::ReplaceOne => {
            // P = (1−q)N(0) + qN(1), Q = (1−q)N(0) + qN(−1): the loss increases with x, and P(−x) = Q(x).
            let s2 = sigma * sigma;
            let loss =
                |x: f64| log_mix(rate, (2.0 * x - 1.0) / (2.0 * s2)) - log_mix(rate, (-2.0 * x - 1.0) / (2.0 * s2));
            let high = loss(1.0 + reach);
            let divergence = |e: f64| {
                // The x at which the loss is e, by bisection: the loss is monotone.
                let (mut a, mut b) = (-2.0 - 2.0 * reach, 2.0 + 2.0 * reach);
                for _ in 0..80 {
                    let m = 0.5 * (a + b);
                    if loss(m) > e { b = m } else { a = m }
                }
                let x = 0.5 * (a + b);
                let p = (1.0 - rate) * q_tail(x / sigma) + rate * q_tail((x - 1.0) / sigma);
                let m = (1.0 - rate) * q_tail(x / sigma) + rate * q_tail((x + 1.0) / sigma);
                (p - e.exp() * m).max(0.0)
            };
            vec![discretise(divergence, (-high, high), h, beyond)]
        }
    }
}

/// ln((1 − q) + q·eʸ), without overflow.
fn log_mix(q: f64, y: f64) -> f64 {
    if q >= 1.0 {
        return y;
    }
    let (a, b) = ((1.0 - q).ln(), q.ln() + y);
    let m = a.max(b);
    m + ((a - m).exp() + (b - m).exp()).ln()
}

/// The grid distribution whose hockey-stick divergence is `d` at every grid point. The mass strictly above k is (D_k − e⁻ʰ·D_{k+1})/(1 −
/// e⁻ʰ); the remainder of D at the top becomes infinite loss, in addition to `beyond`; the remainder of the mass goes to the lowest point.
fn discretise(d: impl Fn(f64) -> f64, (low, high): (f64, f64), h: f64, beyond: f64) -> Pld {
    let (first, last) = ((low / h).floor() as i64, (high / h).ceil() as i64);
    let n = (last - first + 1) as usize;
    let div: Vec<f64> = (0..n).map(|i| d((first + i as i64) as f64 * h)).collect();
    let (shrink, gap) = ((-h).exp(), -(-h).exp_m1());
    let infinite = div[n - 1];
    // above[i]: finite mass strictly above point i.
    let mut above = vec![0.0f64; n];
    for i in (0..n - 1).rev() {
        let s = (div[i] - infinite - shrink * (div[i + 1] - infinite)) / gap;
        // Rounding must not make the tail increase.
        above[i] = s.max(above[i + 1]).min(1.0 - infinite);
    }
    let mut mass = vec![0.0f64; n];
    mass[0] = (1.0 - infinite - above[0]).max(0.0);
    for i in 1..n {
        mass[i] = above[i - 1] - above[i];
    }
    Pld { first, mass, infinite: infinite + beyond }
}

impl Pld {
    /// ln Σ p·e^{λ·loss} over finite losses.
    fn log_mgf(&self, lambda: f64, h: f64) -> f64 {
        let end = if lambda > 0.0 { self.first + self.mass.len() as i64 - 1 } else { self.first };
        let m = lambda * end as f64 * h;
        let (mut sum, mut term) = (0.0, (lambda * self.first as f64 * h - m).exp());
        let step = (lambda * h).exp();
        for (i, p) in self.mass.iter().enumerate() {
            // The running product accumulates error; it is recomputed from time to time.
            if i % 1024 == 0 {
                term = (lambda * (self.first + i as i64) as f64 * h - m).exp();
            }
            sum += p * term;
            term *= step;
        }
        // All relevant terms underflowed next to the far end: this λ gives no bound.
        if sum > 0.0 { m + sum.ln() } else { f64::INFINITY }
    }
}

/// The range of the composed losses.
struct Reach {
    first: i64,
    size: usize,
    /// The parameter λ of the tilt.
    lambda: f64,
    tail: f64,
}

impl Reach {
    /// A window outside of which the composition has at most the tail mass on each side.
    fn of(parts: &[(&Pld, u64)], h: f64, aim: Aim) -> Reach {
        let tail = aim.tail();
        let log_mgf = |lambda: f64| parts.iter().map(|(p, n)| *n as f64 * p.log_mgf(lambda, h)).sum::<f64>();
        let (mut high, mut low) = (f64::INFINITY, f64::NEG_INFINITY);
        let (mut lambda, mut best) = (1e-3, (f64::INFINITY, 0.0));
        while lambda < 3000.0 {
            let m = log_mgf(lambda);
            high = high.min((m - tail.ln()) / lambda);
            low = low.max(-(log_mgf(-lambda) - tail.ln()) / lambda);
            let bound = match aim {
                Aim::Delta(delta) => (m - delta.ln()) / lambda,
                Aim::Epsilon(epsilon) => m - lambda * epsilon,
            };
            if bound < best.0 {
                best = (bound, lambda);
            }
            lambda *= 1.6;
        }
        let min: i64 = parts.iter().map(|(p, n)| p.first.saturating_mul(*n as i64)).fold(0, i64::saturating_add);
        let max = parts.iter().map(|(p, n)| (p.first + p.mass.len() as i64).saturating_mul(*n as i64));
        let max = max.fold(0, i64::saturating_add);
        let first = ((low / h).floor() as i64 - 1).max(min);
        let last = ((high / h).ceil() as i64 + 1).min(max);
        // The window must also hold a single step.
        let span = parts.iter().map(|(p, _)| p.mass.len()).max().unwrap_or(1);
        let size = (last.saturating_sub(first).saturating_add(1).max(1) as usize).max(span).next_power_of_two();
        // Half of the best λ keeps the tilted losses inside the window; if δ is large relative to the rounding error, no tilt is needed.
        let lambda = if matches!(aim, Aim::Delta(delta) if delta < 1e-10) { 0.5 * best.1 } else { 0.0 };
        Reach { first, size, lambda, tail }
    }
}

/// The window of composed losses, and the FFT on it.
struct Window {
    h: f64,
    at: Reach,
    forward: Arc<dyn RealToComplex<f64>>,
    inverse: Arc<dyn ComplexToReal<f64>>,
}

impl Window {
    fn new(h: f64, at: Reach) -> Window {
        let mut planner = RealFftPlanner::new();
        let (forward, inverse) = (planner.plan_fft_forward(at.size), planner.plan_fft_inverse(at.size));
        Window { h, at, forward, inverse }
    }
    /// The transform of p·e^{λ·loss}, normalised to sum 1.
    fn transform(&self, p: &Pld) -> Vec<Complex64> {
        let (mut x, size) = (vec![0.0; self.at.size], self.at.size as i64);
        let (lambda, log) = (self.at.lambda, p.log_mgf(self.at.lambda, self.h));
        for (i, &m) in p.mass.iter().enumerate() {
            let loss = (p.first + i as i64) as f64 * self.h;
            x[(p.first + i as i64).rem_euclid(size) as usize] += m * (lambda * loss - log).exp();
        }
        let mut spectrum = self.forward.make_output_vec();
        self.forward.process(&mut x, &mut spectrum).expect("both buffers have the plan's lengths");
        spectrum
    }
    /// The inverse transform of Π spectrumᵢ^nᵢ: the composed losses.
    fn compose<'a>(&self, terms: impl IntoIterator<Item = (&'a Pld, Cow<'a, [Complex64]>, u64)>) -> Composed {
        let mut product: Vec<Complex64> = Vec::new();
        let (mut finite, mut log) = (0.0, 0.0);
        for (p, spectrum, n) in terms {
            finite += n as f64 * (-p.infinite).ln_1p();
            log += n as f64 * p.log_mgf(self.at.lambda, self.h);
            if product.is_empty() {
                product = spectrum.into_owned();
                product.iter_mut().for_each(|x| *x = power(*x, n));
            } else {
                product.iter_mut().zip(spectrum.iter()).for_each(|(x, s)| *x *= power(*s, n));
            }
        }
        // The sum and the alternating sum of real masses are real, and so are their powers, except for the sign of a zero imaginary part.
        let (size, first) = (self.at.size, self.at.first);
        for end in [0, size / 2] {
            product[end].im = 0.0;
        }
        let mut x = self.inverse.make_output_vec();
        self.inverse.process(&mut product, &mut x).expect("both buffers have the plan's lengths");
        drop(product);
        let scale = 1.0 / size as f64;
        x.rotate_left(first.rem_euclid(size as i64) as usize);
        // The tilt is removed. Far below the losses that matter, this amplifies rounding errors; no mass is more than 1.
        x.iter_mut().enumerate().for_each(|(i, x)| {
            let loss = (first + i as i64) as f64 * self.h;
            *x = ((*x * scale).max(0.0) * (log - self.at.lambda * loss).exp()).min(1.0)
        });
        Composed { h: self.h, first, mass: x, infinite: -finite.exp_m1() + 2.0 * self.at.tail }
    }
}

/// zⁿ by repeated squaring.
fn power(mut z: Complex64, mut n: u64) -> Complex64 {
    let mut out = Complex64::new(1.0, 0.0);
    while n > 0 {
        if n & 1 == 1 {
            out *= z;
        }
        z *= z;
        n >>= 1;
    }
    out
}

/// A composed loss distribution.
struct Composed {
    h: f64,
    first: i64,
    mass: Vec<f64>,
    infinite: f64,
}

impl Composed {
    /// δ(ε): the infinite mass + Σ over losses above ε of p·(1 − e^{ε − loss}).
    fn delta(&self, epsilon: f64) -> f64 {
        let start = ((epsilon / self.h).floor() as i64 + 1 - self.first).clamp(0, self.mass.len() as i64) as usize;
        let sum: f64 = self.mass[start..]
            .iter()
            .enumerate()
            .map(|(i, p)| -p * (epsilon - (self.first + (start + i) as i64) as f64 * self.h).exp_m1())
            .sum();
        (self.infinite + sum).min(1.0)
    }
    /// The smallest ε with delta(ε) ≤ δ.
    fn epsilon(&self, delta: f64) -> f64 {
        if self.infinite > delta {
            return f64::INFINITY;
        }
        if self.delta(0.0) <= delta {
            return 0.0;
        }
        // From the top down, with running sums Σp and Σp·e^{−loss}: δ(ε) = infinite mass + Σp − eᵉ·Σp·e^{−loss}.
        let (mut p_sum, mut weighted) = (0.0, 0.0);
        for i in (0..self.mass.len()).rev() {
            let loss = (self.first + i as i64) as f64 * self.h;
            // δ at ε equal to this loss, with all losses above it in the sums.
            if self.infinite + p_sum - loss.exp() * weighted > delta {
                break;
            }
            p_sum += self.mass[i];
            weighted += self.mass[i] * (-loss).exp();
            let below = loss - self.h;
            if self.infinite + p_sum - below.exp() * weighted > delta {
                return ((self.infinite + p_sum - delta) / weighted).ln().clamp(below.max(0.0), loss);
            }
        }
        // Exponentials overflow here: use bisection on the plain sum.
        let (mut a, mut b) = (0.0, (self.first + self.mass.len() as i64) as f64 * self.h);
        for _ in 0..100 {
            let m = 0.5 * (a + b);
            if self.delta(m) <= delta { b = m } else { a = m }
        }
        b
    }
}
