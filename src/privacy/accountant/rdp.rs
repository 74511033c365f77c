//! Rényi accounting of the Poisson-subsampled Gaussian mechanism, as a cross-check: its ε is larger than that of the privacy-loss
//! distribution.
//!
//! The divergence of one step is an integral of analytic functions that decay like a Gaussian, so that the trapezoidal rule is accurate to
//! the last digits, at integer and fractional orders alike (Mironov 2017; Mironov et al. 2019).

use super::{Accountant, Neighbouring, log_mix};
use crate::base::{Error, Result};

/// ln Σ exp, computed relative to the largest value.
fn log_sum(values: &[f64]) -> f64 {
    let top = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    top + values.iter().map(|v| (v - top).exp()).sum::<f64>().ln()
}

/// Rényi divergence of order α > 1 between a step with and without the record, in nats: (1/(α−1))·ln E_Q[(P/Q)^α].
pub fn renyi(sigma: f64, rate: f64, order: f64, neighbouring: Neighbouring) -> f64 {
    if rate == 0.0 {
        return 0.0;
    }
    let s2 = sigma * sigma;
    let mix = |x: f64, center: f64| log_mix(rate, (2.0 * x * center - 1.0) / (2.0 * s2));
    let gauss = |x: f64| -x * x / (2.0 * s2) - (2.0 * std::f64::consts::PI * s2).ln() / 2.0;
    // ln of Q(x)·(P(x)/Q(x))^α.
    let exponent = |x: f64| match neighbouring {
        Neighbouring::AddRemove | Neighbouring::ZeroOut => gauss(x) + order * mix(x, 1.0),
        Neighbouring::ReplaceOne => gauss(x) + mix(x, -1.0) + order * (mix(x, 1.0) - mix(x, -1.0)),
    };
    let step = sigma.min(s2).min(1.0) / 12.0;
    let reach = 12.0 * sigma + 1.0;
    let far = if neighbouring == Neighbouring::ReplaceOne { 2.0 * order } else { order };
    let n = ((far + 2.0 * reach) / step).ceil() as usize;
    let values: Vec<f64> = (0..=n).map(|i| exponent(-reach + i as f64 * step)).collect();
    ((log_sum(&values) + step.ln()) / (order - 1.0)).max(0.0)
}

/// The orders tried: 1.1 to 10.9 in tenths, 11 to 63, and four powers of two.
fn orders() -> impl Iterator<Item = f64> {
    let tenths = (11..110).map(|i| i as f64 / 10.0);
    tenths.chain((11..64).map(f64::from)).chain([128.0, 256.0, 512.0, 1024.0])
}

impl Accountant {
    /// ε at δ by Rényi accounting, and the order that gave it: ε = Σ rdp + ln(1 − 1/α) − ln(α·δ)/(α − 1), minimised over the orders
    /// (Canonne et al. 2020). It is an upper bound, larger than [`Accountant::epsilon`].
    pub fn epsilon_rdp(&self, delta: f64) -> Result<(f64, f64)> {
        if !(delta > 0.0 && delta < 1.0) {
            return Err(Error::privacy(format!("δ = {delta}; it must lie between 0 and 1")));
        }
        let live: Vec<_> = self.history().iter().filter(|s| s.count > 0 && s.rate > 0.0).collect();
        if live.is_empty() {
            return Ok((0.0, f64::INFINITY));
        }
        let at = |a: f64| {
            let rdp: f64 = live.iter().map(|s| s.count as f64 * renyi(s.sigma, s.rate, a, self.neighbouring)).sum();
            ((rdp + (-1.0 / a).ln_1p() - (a * delta).ln() / (a - 1.0)).max(0.0), a)
        };
        Ok(orders().map(at).fold((f64::INFINITY, 0.0), |best, x| if x.0 < best.0 { x } else { best }))
    }
}
