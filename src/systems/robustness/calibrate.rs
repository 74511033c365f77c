//! Calibration: a temperature by which the served logits are divided, and measures of how far confidence is from accuracy.
//!
//! Temperature scaling (Guo et al. 2017) takes the T with the smallest negative log-likelihood of validation texts, L(T) = −1/n Σ ln
//! softmax(l/T)_y. Before an attack, it makes differences between candidates visible to the search again (Raina et al. 2024).

use super::score::log_sum_exp;
use super::served::{Answers, softmax_f64};
use crate::base::{Error, Result};

/// How the attacker's temperature is found on validation texts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Calibrate {
    /// Gradient descent on T from 1, as in the paper: rate 0.01, at most 5,000 steps. From T = 1 it cannot reach the right T of a model
    /// whose served temperature is below about 1e-3.
    Descent {
        /// The learning rate.
        lr: f64,
        /// The largest number of steps.
        steps: usize,
    },
    /// Golden-section search over ln T between 1e-12 and 1e12, inside the best interval of a grid.
    LogT,
}

impl Calibrate {
    /// The paper's descent.
    pub const PAPER: Calibrate = Calibrate::Descent { lr: 0.01, steps: 5000 };

    /// The temperature for these answers to texts with these labels. Fails if the answers are only classes, or if the rate of the descent
    /// is not a positive number.
    pub fn fit(&self, answers: &Answers, labels: &[u32]) -> Result<f64> {
        if let Calibrate::Descent { lr, .. } = self
            && !(lr.is_finite() && *lr > 0.0)
        {
            return Err(Error::invalid("calibrate", format!("a rate of {lr}; it must be a positive number")));
        }
        let logits = Logits::of(answers, labels)?;
        Ok(match *self {
            Calibrate::LogT => {
                let f = |x: f64| logits.loss(x.exp());
                minimise(f, (1e-12f64.ln(), 1e12f64.ln()), 97, 1e-6).exp()
            }
            Calibrate::Descent { lr, steps } => {
                let mut t = 1.0;
                for _ in 0..steps {
                    let step = lr * logits.slope(t);
                    if step.abs() < 1e-12 * t {
                        break;
                    }
                    // A step to a T below 0 has no meaning; T is halved instead.
                    t = if step < t { t - step } else { t / 2.0 };
                }
                t
            }
        })
    }
}

/// The logits of texts, and their right classes.
struct Logits {
    rows: Vec<Vec<f64>>,
    labels: Vec<usize>,
}

impl Logits {
    fn of(answers: &Answers, labels: &[u32]) -> Result<Logits> {
        if answers.values.len() != labels.len() * answers.classes || labels.is_empty() {
            let message = "not evaluable: calibration needs the logits or the probabilities of validation texts, and classes alone \
                           have none";
            return Err(Error::invalid("calibrate", message));
        }
        // A probability of 0 has no logarithm, so the smallest positive number of f64 is used.
        let log = |p: &f64| if answers.probabilities { p.max(f64::MIN_POSITIVE).ln() } else { *p };
        let rows = (0..labels.len()).map(|i| answers.row(i).iter().map(log).collect()).collect();
        Ok(Logits { rows, labels: labels.iter().map(|&l| l as usize).collect() })
    }
    /// The negative log-likelihood L(T).
    fn loss(&self, t: f64) -> f64 {
        let mut scaled = Vec::new();
        let one = |(row, y): (&Vec<f64>, &usize)| {
            scaled.clear();
            scaled.extend(row.iter().map(|l| l / t));
            log_sum_exp(&scaled) - scaled[*y]
        };
        self.rows.iter().zip(&self.labels).map(one).sum::<f64>() / self.rows.len() as f64
    }
    /// The derivative dL/dT = 1/(n·T²) Σ (l_y − Σ_c p_c l_c).
    fn slope(&self, t: f64) -> f64 {
        let mut p = Vec::new();
        let one = |(row, y): (&Vec<f64>, &usize)| {
            p.clear();
            p.extend(row.iter().map(|l| l / t));
            softmax_f64(&mut p);
            row[*y] - row.iter().zip(&p).map(|(l, p)| l * p).sum::<f64>()
        };
        self.rows.iter().zip(&self.labels).map(one).sum::<f64>() / (self.rows.len() as f64 * t * t)
    }
}

/// The position of the minimum of f in an interval: the best point of a grid, then golden-section search between its neighbours down to the
/// width `precise`. The grid comes first because the losses are flat far from their minimum, where the section search alone could go wrong.
pub(super) fn minimise(mut f: impl FnMut(f64) -> f64, (low, high): (f64, f64), grid: usize, precise: f64) -> f64 {
    let step = (high - low) / (grid - 1) as f64;
    let values: Vec<f64> = (0..grid).map(|i| f(low + i as f64 * step)).collect();
    // Of equal values the middle one is taken.
    let least = values.iter().fold(f64::INFINITY, |m, v| m.min(*v));
    let places: Vec<usize> = (0..grid).filter(|&i| values[i] == least).collect();
    let best = places[places.len() / 2];
    let at = |i: usize| low + i as f64 * step;
    let (mut a, mut b) = (at(best.saturating_sub(1)), at((best + 1).min(grid - 1)));
    let ratio = (5f64.sqrt() - 1.0) / 2.0;
    let (mut c, mut d) = (b - ratio * (b - a), a + ratio * (b - a));
    let (mut fc, mut fd) = (f(c), f(d));
    let mut found = (least, at(best));
    for (v, x) in [(fc, c), (fd, d)] {
        found = if v < found.0 { (v, x) } else { found };
    }
    while b - a > precise {
        if fc < fd {
            (b, d, fd) = (d, c, fc);
            c = b - ratio * (b - a);
            fc = f(c);
            found = if fc < found.0 { (fc, c) } else { found };
        } else {
            (a, c, fc) = (c, d, fd);
            d = a + ratio * (b - a);
            fd = f(d);
            found = if fd < found.0 { (fd, d) } else { found };
        }
    }
    found.1
}

/// A bin of a reliability diagram, with the texts whose confidence lies in it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bin {
    /// Lower bound of the confidence.
    pub from: f64,
    /// Upper bound of the confidence.
    pub to: f64,
    /// Number of texts in the bin.
    pub count: usize,
    /// Mean confidence of these texts.
    pub confidence: f64,
    /// Share of these texts whose predicted class is right.
    pub accuracy: f64,
}

/// The relation of confidence and accuracy.
#[derive(Clone, Debug, PartialEq)]
pub struct Reliability {
    /// Fifteen bins of equal width between 0 and 1.
    pub bins: Vec<Bin>,
    /// Expected calibration error: Σ over bins of (texts in it / all) × |accuracy − confidence|.
    pub ece: f64,
    /// The largest |accuracy − confidence| of a bin that has texts.
    pub mce: f64,
    /// Mean confidence of all texts.
    pub confidence: f64,
    /// Mean negative log-likelihood, in nats.
    pub nll: f64,
}

/// The reliability of answers whose logits are divided by `temperature`, where a class's confidence is its softmax in f64. The errors are
/// also defined if all texts fall into one bin.
pub fn reliability(answers: &Answers, labels: &[u32], temperature: f64) -> Result<Reliability> {
    const BINS: usize = 15;
    if !(temperature.is_finite() && temperature > 0.0) {
        return Err(Error::invalid("reliability", format!("temperature {temperature}; it must be a positive number")));
    }
    let logits = Logits::of(answers, labels)?;
    let mut bins: Vec<Bin> = (0..BINS)
        .map(|i| Bin {
            from: i as f64 / BINS as f64,
            to: (i + 1) as f64 / BINS as f64,
            count: 0,
            confidence: 0.0,
            accuracy: 0.0,
        })
        .collect();
    let mut confidence = 0.0;
    for (i, (row, &y)) in logits.rows.iter().zip(&logits.labels).enumerate() {
        let mut p: Vec<f64> = row.iter().map(|l| l / temperature).collect();
        softmax_f64(&mut p);
        let label = answers.labels[i] as usize;
        let bin = &mut bins[((p[label] * BINS as f64) as usize).min(BINS - 1)];
        bin.count += 1;
        bin.confidence += p[label];
        bin.accuracy += f64::from(label == y);
        confidence += p[label];
    }
    let n = labels.len() as f64;
    let (mut ece, mut mce) = (0.0, 0f64);
    for bin in bins.iter_mut().filter(|b| b.count > 0) {
        bin.confidence /= bin.count as f64;
        bin.accuracy /= bin.count as f64;
        let gap = (bin.accuracy - bin.confidence).abs();
        ece += gap * bin.count as f64 / n;
        mce = mce.max(gap);
    }
    Ok(Reliability { bins, ece, mce, confidence: confidence / n, nll: logits.loss(temperature) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers to ten texts of two classes with a logit difference of 2 at T = 1, of which `right` are right.
    fn answers(right: usize, scale: f64) -> (Answers, Vec<u32>) {
        let labels: Vec<u32> = (0..10).map(|i| u32::from(i >= right)).collect();
        let values = (0..10).flat_map(|_| [2.0 * scale, 0.0]).collect();
        (Answers { classes: 2, labels: vec![0; 10], probabilities: false, values }, labels)
    }

    #[test]
    fn the_temperature_in_closed_form() {
        // The likelihood is largest where the confidence equals the accuracy: 2/T = ln(a/(1 − a)).
        for scale in [1e-9, 1.0, 1e3, 1e7] {
            let (a, labels) = answers(8, scale);
            let want = 2.0 * scale / (0.8f64 / 0.2).ln();
            let got = Calibrate::LogT.fit(&a, &labels).unwrap();
            assert!((got / want - 1.0).abs() < 1e-4, "{got} {want}");
            let r = reliability(&a, &labels, got).unwrap();
            assert!(r.ece < 1e-4 && (r.confidence - 0.8).abs() < 1e-4);
        }
        let (a, labels) = answers(8, 1.0);
        let got = Calibrate::PAPER.fit(&a, &labels).unwrap();
        assert!((got - 2.0 / 4f64.ln()).abs() < 1e-2, "{got}");
        // Starting at T = 1, five thousand steps do not reach the temperature of a model that is served at 1e-4.
        let (a, labels) = answers(8, 1e4);
        assert!(Calibrate::PAPER.fit(&a, &labels).unwrap() < 0.1 * 2e4 / 4f64.ln());
    }
    #[test]
    fn the_slope_is_that_of_the_loss() {
        let (a, labels) = answers(7, 1.3);
        let logits = Logits::of(&a, &labels).unwrap();
        for t in [0.3, 1.0, 4.0] {
            let numeric = (logits.loss(t + 1e-6) - logits.loss(t - 1e-6)) / 2e-6;
            assert!((logits.slope(t) - numeric).abs() < 1e-6, "{t}");
        }
    }
    #[test]
    fn calibration_errors_by_hand() {
        let (a, labels) = answers(5, 1.0);
        let p = 1.0 / (1.0 + (-2f64).exp());
        let r = reliability(&a, &labels, 1.0).unwrap();
        assert!((r.ece - (p - 0.5)).abs() < 1e-12 && (r.mce - r.ece).abs() < 1e-12);
        assert_eq!(r.bins.iter().map(|b| b.count).sum::<usize>(), 10);
        let none = Answers { values: Vec::new(), ..a };
        assert!(reliability(&none, &labels, 1.0).unwrap_err().to_string().contains("not evaluable"));
    }
}
