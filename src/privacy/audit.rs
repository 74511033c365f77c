//! Privacy auditing with one training run (Steinke, Nasr, Jagielski 2023): coin flips decide which canaries are included, their inclusion
//! is guessed from what the run released, and the number of correct guesses gives a lower bound of ε.
//!
//! If the run is (ε, δ)-differentially private, each guess is correct with probability at most about e^ε/(1 + e^ε), whatever the others
//! are. A lower bound above the accountant's ε shows an error: missing noise, unclipped samples, or a sampler that is not Poisson.

use crate::base::{Error, Result};
use crate::random::NoiseKey;

/// Which canaries are in the data: a fair coin flip each, derived from the key.
pub fn coins(key: &NoiseKey, canaries: usize) -> Vec<bool> {
    key.uniforms(u64::MAX, canaries).into_iter().map(|u| u < 0.5).collect()
}

/// The result of an audit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Audit {
    /// Number of canaries whose inclusion was decided by a coin flip.
    pub canaries: usize,
    /// Number of guesses made; no guess was made for the other canaries.
    pub guesses: usize,
    /// Number of correct guesses.
    pub correct: usize,
    /// The lower bound of ε at the requested confidence.
    pub epsilon: f64,
}

/// Guesses that the canaries with the highest `scores` were included and those with the lowest were not, `guesses` in total, and returns a
/// lower bound of ε at `delta` with this `confidence` (such as 0.95). The number of guesses must not depend on the scores.
pub fn one_run(scores: &[f64], included: &[bool], guesses: usize, delta: f64, confidence: f64) -> Result<Audit> {
    let m = scores.len();
    if included.len() != m || guesses == 0 || guesses > m {
        let what = format!("{m} scores, {} coins and {guesses} guesses", included.len());
        return Err(Error::privacy(format!("an audit with {what}: one coin for each score, and 1 to {m} guesses")));
    }
    if !((0.0..1.0).contains(&delta) && confidence > 0.0 && confidence < 1.0) {
        return Err(Error::privacy(format!(
            "an audit with δ = {delta} at confidence {confidence}: δ must lie in [0, 1), the confidence between 0 and 1"
        )));
    }
    if let Some(i) = scores.iter().position(|s| s.is_nan()) {
        return Err(Error::privacy(format!("the score of canary {i} is not a number")));
    }
    let mut order: Vec<usize> = (0..m).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    let top = guesses.div_ceil(2);
    let right = order[..top].iter().filter(|&&i| included[i]).count();
    let wrong_side = order[m - (guesses - top)..].iter().filter(|&&i| !included[i]).count();
    let correct = right + wrong_side;
    let epsilon = lower_bound(m, guesses, correct, delta, confidence);
    Ok(Audit { canaries: m, guesses, correct, epsilon })
}

/// The largest ε that `correct` correct guesses out of `guesses`, with `canaries` canaries, reject at this confidence.
pub fn lower_bound(canaries: usize, guesses: usize, correct: usize, delta: f64, confidence: f64) -> f64 {
    let refuted = |epsilon: f64| p_value(epsilon, canaries, guesses, correct, delta) < 1.0 - confidence;
    if !refuted(0.0) {
        return 0.0;
    }
    let (mut low, mut high) = (0.0, 60.0);
    for _ in 0..60 {
        let mid = 0.5 * (low + high);
        if refuted(mid) { low = mid } else { high = mid }
    }
    low
}

/// An upper bound of the probability of this many correct guesses under (ε, δ) (theorem 5.2 of the paper, in its computable form):
/// P[B ≥ v] + 2mδ·maxᵢ (P[B ≥ v − i] − P[B ≥ v])/i, where B is binomial with r trials of probability e^ε/(1 + e^ε).
fn p_value(epsilon: f64, canaries: usize, guesses: usize, correct: usize, delta: f64) -> f64 {
    let q = 1.0 / (1.0 + (-epsilon).exp());
    // P[B = k], from logarithms of factorials.
    let ln_fact: Vec<f64> = std::iter::once(0.0)
        .chain((1..=guesses).scan(0.0, |s, k| {
            *s += (k as f64).ln();
            Some(*s)
        }))
        .collect();
    let mass = |k: usize| {
        let choose = ln_fact[guesses] - ln_fact[k] - ln_fact[guesses - k];
        let fail = if guesses == k { 0.0 } else { (guesses - k) as f64 * (-q).ln_1p() };
        (choose + k as f64 * q.ln() + fail).exp()
    };
    let mut tail = vec![0.0; guesses + 2];
    for k in (0..=guesses).rev() {
        tail[k] = tail[k + 1] + mass(k);
    }
    let at_least = |k: i64| if k <= 0 { 1.0 } else { tail[(k as usize).min(guesses + 1)] };
    let v = correct as i64;
    let slope = (1..=canaries as i64).map(|i| (at_least(v - i) - at_least(v)) / i as f64).fold(0.0, f64::max);
    (at_least(v) + 2.0 * canaries as f64 * delta * slope).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_of_known_counts() {
        // Without δ the bound inverts a binomial tail: 100 of 100 correct guesses reject e^ε/(1+e^ε) below 0.05^(1/100).
        let p = 0.05f64.powf(0.01);
        assert!((lower_bound(100, 100, 100, 0.0, 0.95) - (p / (1.0 - p)).ln()).abs() < 1e-9);
        assert_eq!(lower_bound(100, 100, 50, 0.0, 0.95), 0.0);
        let (without, with) = (lower_bound(1000, 100, 95, 0.0, 0.95), lower_bound(1000, 100, 95, 1e-5, 0.95));
        assert!(with < without && with > 0.9 * without, "{with} {without}");
        assert!(lower_bound(1000, 100, 95, 1e-2, 0.95) < with);
        // Random guesses are flagged at most as often as the confidence allows.
        let key = NoiseKey::from_seed_for_tests(4);
        let accused = (0..200u64).filter(|&t| {
            let (a, b) = (key.uniforms(2 * t, 100), key.uniforms(2 * t + 1, 100));
            let coins: Vec<bool> = b.iter().map(|u| *u < 0.5).collect();
            one_run(&a, &coins, 60, 0.0, 0.95).unwrap().epsilon > 0.0
        });
        assert!(accused.count() <= 20);
    }

    #[test]
    fn what_cannot_be_audited() {
        let go = |s: &[f64], c: &[bool], g, d, p| one_run(s, c, g, d, p).is_err();
        assert!(go(&[1.0], &[true, false], 1, 0.0, 0.95) && go(&[1.0, 2.0], &[true, false], 3, 0.0, 0.95));
        assert!(go(&[f64::NAN], &[true], 1, 0.0, 0.95) && go(&[1.0], &[true], 1, 1.5, 0.95));
        assert!(go(&[1.0], &[true], 1, 0.0, 1.0));
    }
}
