//! A lower bound on the error of any merge of two experts.

use crate::base::{Error, Result};

/// The best constant mixture of two experts' outputs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StaticMerge {
    /// The share of the first expert.
    pub share: f64,
    /// The mean squared error against the output of the two experts with their own gates.
    pub error: f64,
}

/// Two experts with gates gᵢ, gⱼ and outputs fᵢ, fⱼ give gᵢ·fᵢ + gⱼ·fⱼ. One expert in their place, with the gate gᵢ + gⱼ and the output
/// α·fᵢ + (1 − α)·fⱼ for a constant α, has the error (gᵢ + gⱼ)·(r − α)·(fᵢ − fⱼ) with r = gᵢ/(gᵢ + gⱼ). With w = (gᵢ + gⱼ)²·|fᵢ − fⱼ|², the
/// best α is `E[w·r]/E[w]`, and its mean squared error is `E[w·(r − α)²]`. It is 0 only if the router always splits its weight between the
/// two in the same ratio.
///
/// `gates` has both gates of each token, and `apart` the token's |fᵢ − fⱼ|².
pub fn best_static_merge(gates: &[(f64, f64)], apart: &[f64]) -> Result<StaticMerge> {
    if gates.len() != apart.len() || gates.is_empty() {
        let message =
            format!("{} pairs of gates and {} distances; there must be one for each token", gates.len(), apart.len());
        return Err(Error::shape("best_static_merge", message));
    }
    let numbers = gates.iter().flat_map(|g| [g.0, g.1]).chain(apart.iter().copied());
    if let Some(x) = numbers.into_iter().find(|x| !(x.is_finite() && *x >= 0.0)) {
        let message = format!("a gate or a distance is {x}; they must be 0 or more");
        return Err(Error::invalid("best_static_merge", message));
    }
    let parts = || {
        gates
            .iter()
            .zip(apart)
            .filter(|((a, b), _)| a + b > 0.0)
            .map(|(&(a, b), &d)| ((a + b).powi(2) * d, a / (a + b)))
    };
    let (sum, with) = parts().fold((0.0, 0.0), |(s, t), (w, r)| (s + w, t + w * r));
    // Two experts that agree everywhere can be mixed in any ratio.
    let share = if sum > 0.0 { with / sum } else { 0.5 };
    let error = parts().map(|(w, r)| w * (r - share).powi(2)).sum::<f64>() / gates.len() as f64;
    Ok(StaticMerge { share, error })
}
