//! Clip functions and styles.

use crate::base::matches;
use serde::{Deserialize, Serialize};

/// The factor by which a per-sample gradient of norm n is scaled, given a clipping threshold R.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClipFn {
    /// min(1, R/n) (Abadi et al. 2016).
    Abadi,
    /// min(1/n, 1/R): Abadi's factor divided by R, so that R no longer scales the learning rate (De et al. 2022).
    Reparameterised,
    /// R/n, which gives every gradient norm R (Bu et al. 2023); a zero gradient stays zero.
    AutoV,
    /// R/(n + γ): normalisation that keeps small gradients small (AUTO-S, Bu et al. 2023).
    AutoS {
        /// The stabiliser γ, such as 0.01.
        gamma: f64,
    },
    /// 1 if n ≤ R, else 0: samples with larger gradients are dropped.
    Global,
}

impl Default for ClipFn {
    fn default() -> Self {
        ClipFn::AutoS { gamma: 0.01 }
    }
}

impl ClipFn {
    /// The factor for a squared norm. A non-finite norm gives 0, which drops the sample.
    pub fn factor(self, norm_sq: f64, threshold: f64) -> f64 {
        let n = norm_sq.sqrt();
        if !n.is_finite() {
            return 0.0;
        }
        match self {
            ClipFn::Abadi if n <= threshold => 1.0,
            ClipFn::Abadi => threshold / n,
            ClipFn::Reparameterised => 1.0 / n.max(threshold),
            ClipFn::AutoV if n == 0.0 => 0.0,
            // The factor is limited to what f32 can hold: a tiny gradient stays shorter than R instead of becoming infinite.
            ClipFn::AutoV => (threshold / n).min(1e30),
            ClipFn::AutoS { gamma } => threshold / (n + gamma),
            ClipFn::Global => (n <= threshold) as u8 as f64,
        }
    }
    /// Returns an error for parameters with which the stated sensitivity would not hold.
    pub fn validate(self) -> crate::Result<()> {
        match self {
            ClipFn::AutoS { gamma } if !(gamma.is_finite() && gamma > 0.0) => Err(crate::Error::privacy(format!(
                "AUTO-S with γ = {gamma}: it must be positive, or gradients could exceed the threshold"
            ))),
            _ => Ok(()),
        }
    }
    /// The largest norm a clipped gradient can have.
    pub fn sensitivity(self, threshold: f64) -> f64 {
        match self {
            ClipFn::Reparameterised => 1.0,
            _ => threshold,
        }
    }
}

/// The clipping groups: which parameters are clipped together (He et al. 2023; Bu et al. 2023, group-wise clipping). Each group has its own
/// threshold R_m; together they compose to R = √(Σ R_m²), the largest norm of a sample's contribution.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClipStyle {
    /// All parameters in one group: one norm per sample.
    AllLayer,
    /// One group for each layer's weight and bias.
    LayerWise,
    /// One group for each tensor.
    ParameterWise,
    /// This number of groups of consecutive layers, with about the same number of layers in each.
    Uniform(usize),
    /// Groups by name: a parameter belongs to the first pattern that matches (`*` stands for any characters, as in `h.0.*`); parameters
    /// that match none form one more group.
    Named(Vec<String>),
}

/// The division of the total threshold among the groups.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum Thresholds {
    /// R_m = R/√M.
    #[default]
    Equal,
    /// R_m = R·w_m/√(Σ w²), one positive weight per group in the order in which parameters are given to the step.
    Weighted(Vec<f64>),
    /// Thresholds that follow a quantile of each group's norms (Andrew et al. 2021): after every step R_m ← R_m·exp(−rate·(b_m −
    /// quantile)), where b_m is the share of the expected batch B whose norm was at most R_m, with Gaussian noise of standard deviation
    /// `noise`·B added to the count. R is the initial value. The counts are released with the gradient: its noise multiplier is z = (σ⁻² −
    /// M/(2·noise·B)²)^(−½) instead of σ, so that both together cost what σ costs.
    Adaptive {
        /// The share of samples that should stay unclipped, such as 0.5.
        quantile: f64,
        /// Learning rate of ln R_m, such as 0.2.
        rate: f64,
        /// Standard deviation of the noise in the counts, divided by the expected batch size, such as 0.05.
        noise: f64,
    },
}

impl ClipStyle {
    /// The group of each parameter, numbered in the order in which they first appear.
    pub fn groups(&self, names: &[&str]) -> crate::Result<Vec<usize>> {
        fn numbered<K: PartialEq>(keys: impl Iterator<Item = K>) -> Vec<usize> {
            let mut seen: Vec<K> = Vec::new();
            keys.map(|k| {
                seen.iter().position(|s| *s == k).unwrap_or_else(|| {
                    seen.push(k);
                    seen.len() - 1
                })
            })
            .collect()
        }
        // Weight and bias of one layer differ only in the last part of the name.
        let layers = || numbered(names.iter().map(|n| n.rsplit_once('.').map_or(*n, |(layer, _)| layer)));
        Ok(match self {
            ClipStyle::AllLayer => vec![0; names.len()],
            ClipStyle::LayerWise => layers(),
            ClipStyle::ParameterWise => (0..names.len()).collect(),
            ClipStyle::Uniform(k) => {
                let layers = layers();
                let n = layers.iter().max().map_or(0, |m| m + 1);
                if *k == 0 || *k > n.max(1) {
                    return Err(crate::Error::privacy(format!("{k} clipping groups for {n} layers; use 1 to {n}")));
                }
                layers.into_iter().map(|l| l * k / n).collect()
            }
            ClipStyle::Named(patterns) => {
                if let Some(p) = patterns.iter().find(|p| !names.iter().any(|n| matches(p, n))) {
                    return Err(crate::Error::privacy(format!(
                        "no parameter's name matches the clipping group {p:?}; names are like {:?}",
                        names.first().unwrap_or(&"")
                    )));
                }
                numbered(names.iter().map(|n| patterns.iter().position(|p| matches(p, n))))
            }
        })
    }
}

impl Thresholds {
    /// Each group's threshold, such that √(Σ R_m²) = `total`.
    pub fn split(&self, total: f64, groups: usize) -> crate::Result<Vec<f64>> {
        match self {
            Thresholds::Equal | Thresholds::Adaptive { .. } => Ok(vec![total / (groups.max(1) as f64).sqrt(); groups]),
            Thresholds::Weighted(w) => {
                if w.len() != groups || !w.iter().all(|w| w.is_finite() && *w > 0.0) {
                    return Err(crate::Error::privacy(format!(
                        "threshold weights {w:?} for {groups} clipping groups: one positive number for each"
                    )));
                }
                let norm = w.iter().map(|w| w * w).sum::<f64>().sqrt();
                Ok(w.iter().map(|w| total * w / norm).collect())
            }
        }
    }
    /// Returns an error for settings for which the accounting does not hold.
    pub fn validate(&self, clip: ClipFn) -> crate::Result<()> {
        let Thresholds::Adaptive { quantile, rate, noise } = self else { return Ok(()) };
        let fine = |x: f64, high: f64| x > 0.0 && x < high;
        if !(fine(*quantile, 1.0) && fine(*rate, f64::INFINITY) && fine(*noise, f64::INFINITY)) {
            return Err(crate::Error::privacy(format!(
                "adaptive thresholds with quantile {quantile}, rate {rate}, noise {noise}: the quantile lies between 0 and 1, \
                 the others are positive"
            )));
        }
        if matches!(clip, ClipFn::Reparameterised) {
            return Err(crate::Error::privacy(
                "adaptive thresholds with the re-parameterised function, whose clipped norm is always 1: use Abadi",
            ));
        }
        Ok(())
    }
}

impl std::str::FromStr for ClipStyle {
    type Err = crate::Error;
    fn from_str(s: &str) -> crate::Result<ClipStyle> {
        match s {
            "all-layer" => Ok(ClipStyle::AllLayer),
            "layer-wise" => Ok(ClipStyle::LayerWise),
            "param-wise" | "parameter-wise" => Ok(ClipStyle::ParameterWise),
            _ => {
                if let Some(k) = s.strip_prefix("uniform-").and_then(|k| k.parse().ok()) {
                    return Ok(ClipStyle::Uniform(k));
                }
                Err(crate::Error::invalid(
                    "clipping style",
                    format!("{s:?}; known are all-layer, layer-wise, parameter-wise, uniform-K"),
                ))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_by_layer_number_and_name() {
        let names = ["wte.weight", "h.0.a.weight", "h.0.a.bias", "h.1.a.weight", "h.1.a.bias", "ln.weight"];
        let groups = |s: ClipStyle| s.groups(&names);
        assert_eq!(groups(ClipStyle::AllLayer).unwrap(), [0; 6]);
        assert_eq!(groups(ClipStyle::LayerWise).unwrap(), [0, 1, 1, 2, 2, 3]);
        assert_eq!(groups(ClipStyle::Uniform(2)).unwrap(), [0, 0, 0, 1, 1, 1]);
        assert_eq!(groups(ClipStyle::Uniform(4)).unwrap(), [0, 1, 1, 2, 2, 3]);
        let named = |p: &[&str]| groups(ClipStyle::Named(p.iter().map(|s| s.to_string()).collect()));
        assert_eq!(named(&["h.0.*", "*.bias"]).unwrap(), [0, 1, 1, 0, 2, 0]);
        assert_eq!(named(&["h*a*s"]).unwrap(), [0, 0, 1, 0, 1, 0]);
        assert!(named(&["x.*"]).unwrap_err().to_string().contains("x.*"));
        assert!(groups(ClipStyle::Uniform(5)).is_err() && groups(ClipStyle::Uniform(0)).is_err());
        assert!(matches("a*b", "ab") && !matches("a*b", "abc") && matches("*", "") && !matches("a", "ab"));
        let split = Thresholds::Weighted(vec![3.0, 4.0]).split(10.0, 2).unwrap();
        assert!((split[0] - 6.0).abs() < 1e-12 && (split[1] - 8.0).abs() < 1e-12);
        assert!(Thresholds::Weighted(vec![1.0, 0.0]).split(1.0, 2).is_err());
    }

    #[test]
    fn no_clipped_norm_exceeds_the_sensitivity() {
        for clip in
            [ClipFn::Abadi, ClipFn::Reparameterised, ClipFn::AutoV, ClipFn::AutoS { gamma: 0.01 }, ClipFn::Global]
        {
            for r in [0.1, 1.0, 7.0] {
                for n in [0.0, 1e-160, 1e-45, 1e-30, 1e-9, 0.05, 0.1, 1.0, 1.1, 50.0, 1e12, f64::NAN, f64::INFINITY] {
                    let f = clip.factor(n * n, r);
                    let clipped = if f == 0.0 { 0.0 } else { f * n };
                    assert!(clipped <= clip.sensitivity(r) * (1.0 + 1e-12), "{clip:?} {r} {n}");
                    assert!((f as f32).is_finite(), "{clip:?} {r} {n}: {f} as f32 is not finite");
                }
            }
        }
    }
}
