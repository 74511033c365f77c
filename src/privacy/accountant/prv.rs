//! Rigorous lower and upper bounds of ε (Gopi et al. 2021), as a cross-check of the accountant's upper bound.
//!
//! Losses of one step are rounded to the nearest grid point and shifted so that their mean is exact. Rounding errors of n steps are then
//! independent, with mean zero and at most h/2 each, so that by Hoeffding's inequality their sum exceeds h·√(n·ln(2/η)/2) with probability
//! at most η.

use super::{Accountant, Aim, Neighbouring, Pld, Reach, Window, log_mix, q_tail};
use crate::base::{Error, Result};
use std::borrow::Cow;

/// A lower bound, an estimate and an upper bound of ε.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bracket {
    /// A lower bound of ε.
    pub low: f64,
    /// The estimate of ε without the rounding margin.
    pub estimate: f64,
    /// An upper bound of ε.
    pub high: f64,
}

/// One direction of the comparison: the distribution function of the loss under the first distribution, its range and its mean.
struct Direction<'a> {
    cdf: Box<dyn Fn(f64) -> f64 + 'a>,
    low: f64,
    high: f64,
}

impl Accountant {
    /// Lower and upper bounds of ε at δ, about 0.02 apart.
    pub fn bracket(&self, delta: f64) -> Result<Bracket> {
        if !(delta > 0.0 && delta < 1.0) {
            return Err(Error::privacy(format!("δ = {delta}; it must lie between 0 and 1")));
        }
        let live: Vec<_> = self.history().iter().filter(|s| s.count > 0 && s.rate > 0.0).collect();
        if live.is_empty() {
            return Ok(Bracket { low: 0.0, estimate: 0.0, high: 0.0 });
        }
        // A grid on which the rounding margin is at most one hundredth.
        let margin = delta * 1e-4;
        let per_spacing = (self.steps() as f64 / 2.0 * (2.0 / margin).ln()).sqrt();
        let h = self.interval.min(0.01 / per_spacing).max(1e-6);
        let error = h * per_spacing;
        let mut out = Bracket { low: 0.0, estimate: 0.0, high: 0.0 };
        let sides: Vec<Vec<(Pld, f64)>> = live
            .iter()
            .map(|s| directions(s.sigma, s.rate, self.neighbouring).iter().map(|d| rounded(d, h)).collect())
            .collect();
        for side in 0..sides[0].len() {
            let parts: Vec<(&Pld, u64)> = sides.iter().zip(&live).map(|(p, s)| (&p[side].0, s.count)).collect();
            let shift: f64 = sides.iter().zip(&live).map(|(p, s)| p[side].1 * s.count as f64).sum();
            let window = Window::new(h, Reach::of(&parts, h, Aim::Delta(delta)));
            let composed = window.compose(parts.iter().map(|&(p, n)| (p, Cow::Owned(window.transform(p)), n)));
            let at = |delta: f64| {
                let (mut a, mut b) = (0.0, 1.0);
                while composed.delta(b - shift) > delta && b < 1e4 {
                    b *= 2.0;
                }
                for _ in 0..60 {
                    let m = 0.5 * (a + b);
                    if composed.delta(m - shift) <= delta { b = m } else { a = m }
                }
                b
            };
            // The mass lost by truncation is in `infinite`, which only the upper bound may count.
            let lost = composed.infinite;
            out.low = out.low.max(at(delta + margin + lost) - error);
            out.estimate = out.estimate.max(at(delta));
            out.high = out.high.max(at(delta - margin - lost) + error);
        }
        Ok(out)
    }
}

fn directions(sigma: f64, rate: f64, neighbouring: Neighbouring) -> Vec<Direction<'static>> {
    let (s2, reach) = (sigma * sigma, 9.5 * sigma);
    match neighbouring {
        Neighbouring::AddRemove | Neighbouring::ZeroOut => {
            let loss = move |x: f64| log_mix(rate, (2.0 * x - 1.0) / (2.0 * s2));
            let (low, high) = (loss(-reach), loss(1.0 + reach));
            // The x at which the loss is e.
            let place = move |e: f64| {
                let t = (e.exp() - (1.0 - rate)) / rate;
                if t <= 0.0 { f64::NEG_INFINITY } else { 0.5 + s2 * t.ln() }
            };
            let remove = move |e: f64| {
                let x = place(e);
                (1.0 - rate) * q_tail(-x / sigma) + rate * q_tail((1.0 - x) / sigma)
            };
            let add = move |e: f64| q_tail(place(-e) / sigma);
            vec![
                Direction { cdf: Box::new(remove), low, high },
                Direction { cdf: Box::new(add), low: -high, high: -low },
            ]
        }
        Neighbouring::ReplaceOne => {
            let side = move |x: f64, c: f64| log_mix(rate, (2.0 * x * c - 1.0) / (2.0 * s2));
            let loss = move |x: f64| side(x, 1.0) - side(x, -1.0);
            let high = loss(1.0 + reach);
            let cdf = move |e: f64| {
                let (mut a, mut b) = (-2.0 - 2.0 * reach, 2.0 + 2.0 * reach);
                for _ in 0..80 {
                    let m = 0.5 * (a + b);
                    if loss(m) > e { b = m } else { a = m }
                }
                (1.0 - rate) * q_tail(-a / sigma) + rate * q_tail((1.0 - a) / sigma)
            };
            vec![Direction { cdf: Box::new(cdf), low: -high, high }]
        }
    }
}

/// Losses rounded to the nearest grid point, and the shift that makes their mean exact.
fn rounded(d: &Direction, h: f64) -> (Pld, f64) {
    let (first, last) = ((d.low / h).floor() as i64, (d.high / h).ceil() as i64);
    let n = (last - first + 1) as usize;
    // The distribution function at the boundaries of the cells, and at their midpoints for the mean.
    let edge = |i: usize| (first as f64 + i as f64 - 0.5) * h;
    let at: Vec<f64> = (0..=n).map(|i| (d.cdf)(edge(i))).collect();
    let mut mass: Vec<f64> = at.windows(2).map(|w| (w[1] - w[0]).max(0.0)).collect();
    mass[0] += at[0];
    let infinite = (1.0 - at[n]).max(0.0);
    // ∫ loss over a cell = [loss·F] − ∫F, by Simpson's rule; compared with grid point × mass.
    let mut shift = 0.0;
    for i in 0..n {
        let (a, b) = (edge(i), edge(i + 1));
        let area = h / 6.0 * (at[i] + 4.0 * (d.cdf)(0.5 * (a + b)) + at[i + 1]);
        shift += b * at[i + 1] - a * at[i] - area - (first + i as i64) as f64 * h * (at[i + 1] - at[i]);
    }
    (Pld { first, mass, infinite }, shift)
}
