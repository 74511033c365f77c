//! Learning-rate schedules: pure functions of the step, so that a resumed run continues exactly.

use crate::base::{Error, Result};
use serde::{Deserialize, Serialize};

/// Learning rate as a function of the step (counted from 0).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Schedule {
    /// The same at every step.
    Constant {
        /// Learning rate.
        lr: f64,
    },
    /// Rises linearly over `warmup` steps, then falls along half a cosine to `floor`·lr at step `total`.
    Cosine {
        /// Peak learning rate.
        lr: f64,
        /// Steps of linear warm-up.
        warmup: u64,
        /// Step at which the floor is reached.
        total: u64,
        /// Final share of the peak.
        floor: f64,
    },
    /// Rises linearly over `warmup` steps, then falls linearly to 0 at step `total`.
    Linear {
        /// Peak learning rate.
        lr: f64,
        /// Steps of linear warm-up.
        warmup: u64,
        /// Step at which 0 is reached.
        total: u64,
    },
    /// One rate, then another, such as for a public and a private phase.
    Switch {
        /// Learning rate of the steps before `at`.
        lr: f64,
        /// Learning rate from step `at` on.
        then: f64,
        /// First step of the second rate.
        at: u64,
    },
}

impl Schedule {
    /// Always `lr`.
    pub fn constant(lr: f64) -> Schedule {
        Schedule::Constant { lr }
    }
    /// Warm-up, then a cosine to a tenth of the peak.
    pub fn cosine(lr: f64, warmup: u64, total: u64) -> Schedule {
        Schedule::Cosine { lr, warmup, total, floor: 0.1 }
    }
    /// Learning rate of step `t`, counted from 0.
    pub fn at(&self, t: u64) -> f64 {
        let ramp = |warmup: u64| if t < warmup { (t + 1) as f64 / warmup as f64 } else { 1.0 };
        let done = |warmup: u64, total: u64| {
            (t.saturating_sub(warmup) as f64 / total.saturating_sub(warmup).max(1) as f64).min(1.0)
        };
        match *self {
            Schedule::Constant { lr } => lr,
            Schedule::Cosine { lr, warmup, total, floor } => {
                let fall = 0.5 * (1.0 + (std::f64::consts::PI * done(warmup, total)).cos());
                lr * ramp(warmup) * (floor + (1.0 - floor) * fall)
            }
            Schedule::Linear { lr, warmup, total } => lr * ramp(warmup) * (1.0 - done(warmup, total)),
            Schedule::Switch { lr, then, at } => {
                if t < at {
                    lr
                } else {
                    then
                }
            }
        }
    }
    /// Returns an error for rates that are not positive and finite, and for a floor outside of [0, 1].
    pub fn validate(&self) -> Result<()> {
        let rates = match *self {
            Schedule::Constant { lr } | Schedule::Cosine { lr, .. } | Schedule::Linear { lr, .. } => [lr; 2],
            Schedule::Switch { lr, then, .. } => [lr, then],
        };
        if let Schedule::Cosine { floor, .. } = *self
            && !(0.0..=1.0).contains(&floor)
        {
            return Err(Error::invalid(
                "schedule",
                format!("a floor of {floor}; it must lie in [0, 1], a share of the peak"),
            ));
        }
        match rates.into_iter().find(|lr| !(lr.is_finite() && *lr > 0.0)) {
            None => Ok(()),
            Some(lr) => {
                Err(Error::invalid("schedule", format!("a learning rate of {lr}; it must be positive and finite")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_switch_has_two_rates() {
        let s = Schedule::Switch { lr: 0.5, then: 0.1, at: 3 };
        assert_eq!([0, 2, 3, 9].map(|t| s.at(t)), [0.5, 0.5, 0.1, 0.1]);
        assert!(s.validate().is_ok() && Schedule::Switch { lr: 0.5, then: 0.0, at: 3 }.validate().is_err());
    }

    #[test]
    fn cosine_rises_peaks_and_falls_to_its_floor() {
        let s = Schedule::cosine(1.0, 10, 110);
        assert!((s.at(0) - 0.1).abs() < 1e-12);
        assert!((s.at(10) - 1.0).abs() < 1e-12);
        assert!((s.at(60) - 0.55).abs() < 1e-12);
        assert!((s.at(110) - 0.1).abs() < 1e-12);
        assert_eq!(s.at(110), s.at(10_000));
    }
    #[test]
    fn bad_rates_are_refused() {
        assert!(Schedule::constant(f64::NAN).validate().is_err());
        assert!(Schedule::constant(0.0).validate().is_err());
        for floor in [f64::NAN, -5.0, f64::INFINITY, 7.0] {
            let s = Schedule::Cosine { lr: 1.0, warmup: 0, total: 10, floor };
            assert!(s.validate().unwrap_err().to_string().contains("[0, 1]"), "{floor}");
        }
        assert!(Schedule::Cosine { lr: 1.0, warmup: 20, total: 10, floor: 0.0 }.validate().is_ok());
    }
}
