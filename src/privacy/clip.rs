//! Clip functions and styles.

use serde::{Deserialize, Serialize};

/// How a per-sample gradient of norm n is scaled under a threshold R.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClipFn {
    /// min(1, R/n) (Abadi et al. 2016).
    Abadi,
    /// min(1/n, 1/R): Abadi's divided by R, so that R no longer scales the learning rate (De et al. 2022).
    Reparameterised,
    /// R/n: every gradient has norm R (Bu et al. 2023); a zero gradient stays zero.
    AutoV,
    /// R/(n + γ): normalisation that leaves small gradients small (Bu et al. 2023).
    AutoS {
        /// Stabiliser, such as 0.01.
        gamma: f64,
    },
    /// 1 if n ≤ R, else 0: large gradients are left out.
    Global,
}

impl Default for ClipFn {
    fn default() -> Self {
        ClipFn::AutoS { gamma: 0.01 }
    }
}

impl ClipFn {
    /// The factor for a squared norm. A norm that is not finite gives 0: such a sample is left out.
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
            ClipFn::AutoV => threshold / n,
            ClipFn::AutoS { gamma } => threshold / (n + gamma),
            ClipFn::Global => (n <= threshold) as u8 as f64,
        }
    }
    /// Refuses parameters under which the stated sensitivity would not hold.
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

/// Which parameters are clipped together (He et al. 2023; Bu et al. 2023, group-wise clipping).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClipStyle {
    /// All of them: one norm per sample.
    AllLayer,
    /// Each layer's weight and bias.
    LayerWise,
    /// Each tensor by itself.
    ParameterWise,
}

impl std::str::FromStr for ClipStyle {
    type Err = crate::Error;
    fn from_str(s: &str) -> crate::Result<ClipStyle> {
        match s {
            "all-layer" => Ok(ClipStyle::AllLayer),
            "layer-wise" => Ok(ClipStyle::LayerWise),
            "param-wise" | "parameter-wise" => Ok(ClipStyle::ParameterWise),
            _ => Err(crate::Error::invalid(
                "clipping style",
                format!("{s:?}; known are all-layer, layer-wise, parameter-wise"),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_clipped_norm_exceeds_the_sensitivity() {
        for clip in
            [ClipFn::Abadi, ClipFn::Reparameterised, ClipFn::AutoV, ClipFn::AutoS { gamma: 0.01 }, ClipFn::Global]
        {
            for r in [0.1, 1.0, 7.0] {
                for n in [0.0, 1e-9, 0.05, 0.1, 1.0, 1.1, 50.0, 1e12, f64::NAN, f64::INFINITY] {
                    let f = clip.factor(n * n, r);
                    let clipped = if f == 0.0 { 0.0 } else { f * n };
                    assert!(clipped <= clip.sensitivity(r) * (1.0 + 1e-12), "{clip:?} {r} {n}");
                }
            }
        }
    }
}
