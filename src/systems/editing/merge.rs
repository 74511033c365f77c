//! Ways to combine the vectors of a pool.

use crate::base::{Error, Result, philox};
use serde::{Deserialize, Serialize};

/// A way to combine n vectors dᵢ with a base Θ.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Merge {
    /// Θ + Σ wᵢ·dᵢ, with a weight for each source.
    Weights(Vec<f64>),
    /// Θ + λ·Σ dᵢ (task arithmetic, Ilharco et al. 2023).
    Arithmetic(f64),
    /// The mean of the models: Θ + Σ dᵢ/n (Wortsman et al. 2022).
    Soup,
    /// A weight for each layer and source. A layer is the part of a parameter's name before the last dot. Layers that are not listed keep
    /// the base's values.
    PerLayer(Vec<(String, Vec<f64>)>),
    /// TIES (Yadav et al. 2023). In each tensor of dᵢ the `density` share of largest magnitude is kept, and the sign of the sum is elected
    /// element by element. The result is Θ + λ·(the mean of the entries with that sign), or their sum without `normalise`.
    Ties {
        /// The share that is kept, in (0, 1].
        density: f64,
        /// Factor of the result.
        lambda: f64,
        /// Whether the entries with the elected sign are averaged.
        normalise: bool,
    },
    /// DARE (Yu et al. 2024). Each entry is dropped with probability 1 − `density`, and the others are divided by `density`. The result is
    /// Θ + λ·Σ of them. Which entries are dropped depends on the seed, the source's name, the parameter's name and the element.
    Dare {
        /// The share that is kept on average, in (0, 1].
        density: f64,
        /// Factor of the result.
        lambda: f64,
        /// Seed of the choice of entries.
        seed: u64,
    },
}

impl Merge {
    /// Refuses settings that are not valid for `n` sources.
    pub(super) fn check(&self, n: usize) -> Result<()> {
        let bad = |what: String| Err(Error::invalid("merge", what));
        let weights = |w: &[f64]| match w.len() == n && w.iter().all(|w| w.is_finite()) {
            true => Ok(()),
            false => bad(format!("weights {w:?} for {n} sources; there must be one finite number for each")),
        };
        let share = |density: f64, lambda: f64| match density > 0.0 && density <= 1.0 && lambda.is_finite() {
            true => Ok(()),
            false => bad(format!("density {density} and λ {lambda}: the density lies in (0, 1], λ is finite")),
        };
        match self {
            Merge::Weights(w) => weights(w),
            Merge::Arithmetic(l) if !l.is_finite() => bad(format!("λ = {l}; it must be finite")),
            Merge::Arithmetic(_) | Merge::Soup => Ok(()),
            Merge::PerLayer(layers) => layers.iter().try_for_each(|(_, w)| weights(w)),
            Merge::Ties { density, lambda, .. } | Merge::Dare { density, lambda, .. } => share(*density, *lambda),
        }
    }
    /// The weights of the sources in a layer; `None` if the merge is not a weighted sum.
    pub(super) fn weights(&self, n: usize, layer: &str) -> Option<Vec<f64>> {
        match self {
            Merge::Weights(w) => Some(w.clone()),
            Merge::Arithmetic(l) => Some(vec![*l; n]),
            Merge::Soup => Some(vec![1.0 / n as f64; n]),
            Merge::PerLayer(layers) => {
                Some(layers.iter().find(|(l, _)| l == layer).map_or(vec![0.0; n], |(_, w)| w.clone()))
            }
            Merge::Ties { .. } | Merge::Dare { .. } => None,
        }
    }
}

/// How the sources' entries for one element are added up.
pub(super) struct Mix {
    /// Whether only entries with the sign of their sum take part.
    pub(super) elect: bool,
    /// Whether the sum is divided by the sum of the weights in it.
    pub(super) normalise: bool,
    /// Factor of the result.
    pub(super) lambda: f64,
}

impl Mix {
    /// λ·Σ fᵢ·xᵢ, divided by Σ wᵢ if `normalise` is set. The sums are over all entries xᵢ, or over those with the sign of the whole sum.
    /// The factors fᵢ are the weights wᵢ times any other factor of an entry. If the weights add up to 0, the sum is not divided.
    #[inline(always)]
    pub(super) fn added(&self, factors: &[f64], weights: &[f64], at: impl Fn(usize) -> f64) -> f64 {
        let entries = || factors.iter().enumerate().map(|(i, f)| f * at(i));
        let total: f64 = entries().sum();
        if !self.elect {
            let divisor: f64 = if self.normalise { weights.iter().sum() } else { 1.0 };
            return self.lambda * total / if divisor.abs() < 1e-8 { 1.0 } else { divisor };
        }
        let plus = total >= 0.0;
        let (mut sum, mut divisor) = (0.0, 0.0);
        for (x, w) in entries().zip(weights) {
            if x != 0.0 && (x > 0.0) == plus {
                sum += x;
                divisor += w;
            }
        }
        self.lambda * if self.normalise && divisor != 0.0 { sum / divisor } else { sum }
    }
}

/// The tensor that TIES adds to the base. `vectors` has the tensor of each source.
pub(super) fn ties(vectors: &[Vec<f64>], density: f64, lambda: f64, normalise: bool) -> Vec<f64> {
    let trimmed: Vec<Vec<f64>> = vectors.iter().map(|v| trim(v, density)).collect();
    let (mix, ones) = (Mix { elect: true, normalise, lambda }, vec![1.0; vectors.len()]);
    (0..vectors.first().map_or(0, Vec::len)).map(|e| mix.added(&ones, &ones, |i| trimmed[i][e])).collect()
}

/// The ⌊density·n⌋ entries of largest magnitude, with the others set to 0. Of equal magnitudes the first are kept.
fn trim(v: &[f64], density: f64) -> Vec<f64> {
    let keep = (density * v.len() as f64) as usize;
    if keep >= v.len() {
        return v.to_vec();
    }
    let mut order: Vec<u32> = (0..v.len() as u32).collect();
    let larger = |a: &u32, b: &u32| v[*b as usize].abs().total_cmp(&v[*a as usize].abs()).then(a.cmp(b));
    if keep > 0 {
        order.select_nth_unstable_by(keep - 1, larger);
    }
    let mut out = vec![0.0; v.len()];
    order[..keep].iter().for_each(|&e| out[e as usize] = v[e as usize]);
    out
}

/// The entries that DARE keeps of one tensor of one source, with the others set to 0.
pub(super) fn dare(v: &[f64], density: f64, seed: u64, stream: u64) -> Vec<f64> {
    let kept = |e: usize| philox::uniform(seed, stream, e as u64) < density;
    v.iter().enumerate().map(|(e, &x)| if kept(e) { x / density } else { 0.0 }).collect()
}
