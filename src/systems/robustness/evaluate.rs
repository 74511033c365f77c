//! Accuracy under attack as served and after calibration, with flags that say whether the former can be trusted.

use super::attack::{Attack, Found, accuracy_under_attack, answers};
use super::calibrate::{Calibrate, Reliability, minimise, reliability};
use super::flags::{Flag, Limits, PLAIN, beyond_chance, disagreement, double_softmax, rounded, word_scores};
use super::score::{Lens, Precision, Score};
use super::served::Served;
use super::text::TextSet;
use crate::base::{Error, Result};
use std::fmt;

/// An evaluation: the attack on the model as served, on the calibrated model, at the attacker's best temperature, and on the margin.
pub struct Evaluate<'a> {
    attack: &'a Attack<'a>,
    calibrate: Calibrate,
    optimise: Option<&'a Attack<'a>>,
    limits: Limits,
}

/// The result of one attack on a set.
#[derive(Clone, Debug)]
pub struct Attacked {
    /// The score and temperature that the attack used.
    pub lens: Lens,
    /// Share of all texts whose right class is still predicted.
    pub accuracy: f64,
    /// The same share over the texts that were right at first.
    pub of_right: f64,
    /// Mean number of queries of the texts that were right at first.
    pub queries: f64,
    /// The result for each text.
    pub found: Vec<Found>,
}

/// The result of an evaluation.
#[derive(Clone, Debug)]
pub struct Report {
    /// The name of the attack.
    pub attack: &'static str,
    /// Number of texts.
    pub texts: usize,
    /// Number of texts in which nothing could be changed, because they have only stop words or no candidates.
    pub unchangeable: usize,
    /// Accuracy without an attack.
    pub clean: f64,
    /// The attack on the model as served, with the score of common tools.
    pub plain: Attacked,
    /// The same attack with probabilities in 64 bits.
    pub plain_f64: Attacked,
    /// The attack with the served logits divided by the temperature of the calibration.
    pub calibrated: Attacked,
    /// The attack with the temperature that leaves the smallest accuracy on validation texts, if it was searched for.
    pub optimised: Option<Attacked>,
    /// The attack on the margin.
    pub margin: Attacked,
    /// Reliability on the test texts, as served and calibrated.
    pub reliability: (Reliability, Reliability),
    /// Mean rank correlation between the words' order by probability and by margin, as served and calibrated.
    pub correlation: (f64, f64),
    /// What is wrong with the measurement as served.
    pub flags: Vec<Flag>,
}

impl<'a> Evaluate<'a> {
    /// An evaluation with this attack, whose own score is replaced. It calibrates by golden-section search over ln T, and does not search
    /// for the attacker's best temperature.
    pub fn new(attack: &'a Attack<'a>) -> Evaluate<'a> {
        Evaluate { attack, calibrate: Calibrate::LogT, optimise: None, limits: Limits::default() }
    }
    /// Sets how the temperature is found.
    pub fn calibrate(mut self, calibrate: Calibrate) -> Self {
        self.calibrate = calibrate;
        self
    }
    /// Also searches for the attacker's best temperature, with the attack `with` on at most 200 of the validation texts (the paper uses
    /// DeepWordBug).
    pub fn optimise(mut self, with: &'a Attack<'a>) -> Self {
        self.optimise = Some(with);
        self
    }
    /// Sets the thresholds of the flags.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }
    /// Attacks the test texts. Temperatures come from the validation texts.
    pub fn run(&self, served: &Served, validation: &TextSet, test: &TextSet) -> Result<Report> {
        if test.is_empty() || validation.is_empty() {
            let message = format!("{} test and {} validation texts; give some of both", test.len(), validation.len());
            return Err(Error::invalid("evaluate", message));
        }
        let attacked = |lens: Lens| -> Result<Attacked> { attacked(self.attack, lens, served, test) };
        let plain = attacked(Lens::new(PLAIN))?;
        let plain_f64 = attacked(Lens::new(Score::Probability(Precision::F64)))?;
        let held = answers(served, &validation.texts, 1024)?;
        let temperature = self.calibrate.fit(&held, &validation.labels)?;
        let calibrated = attacked(Lens { score: PLAIN, temperature })?;
        let optimised = match self.optimise {
            None => None,
            Some(attack) => {
                let temperature = best_temperature(attack, served, &validation.sample(200, 0), temperature)?;
                Some(attacked(Lens { score: PLAIN, temperature })?)
            }
        };
        let margin = attacked(Lens::new(Score::Margin))?;
        let here = answers(served, &test.texts, 1024)?;
        let clean = here.labels.iter().zip(&test.labels).filter(|(a, b)| a == b).count() as f64 / test.len() as f64;

        let mut flags = Vec::new();
        let rounded = rounded(&here, served);
        let as_served = word_scores(self.attack, served, test, Lens::new(PLAIN))?;
        let after = word_scores(self.attack, served, test, Lens { score: PLAIN, temperature })?;
        if let Some((tied, correlation)) = as_served {
            if tied > self.limits.tied {
                flags.push(Flag::TiedScores { share: tied });
            }
            if correlation < self.limits.correlation {
                flags.push(Flag::RankCollapse { correlation });
            }
        }
        let share = disagreement(&plain.found, &plain_f64.found);
        if share > self.limits.precision && share * test.len() as f64 > 2.0 {
            flags.push(Flag::PrecisionDisagreement { share, accuracies: (plain.accuracy, plain_f64.accuracy) });
        }
        let others = [Some(&calibrated), optimised.as_ref(), Some(&margin)];
        let least = others.into_iter().flatten().min_by(|a, b| a.accuracy.total_cmp(&b.accuracy));
        if let Some(least) = least {
            let points = 100.0 * (plain.accuracy - least.accuracy);
            if points > self.limits.gap && beyond_chance(&plain.found, &least.found) {
                flags.push(Flag::CalibrationGap { points });
            }
        }
        flags.extend(double_softmax(&held, &validation.labels));
        if rounded > self.limits.rounded {
            flags.push(Flag::RoundedProbabilities { share: rounded });
        }
        Ok(Report {
            attack: self.attack.name(),
            texts: test.len(),
            unchangeable: plain.found.iter().filter(|f| f.outcome == super::attack::Outcome::Unchangeable).count(),
            clean,
            plain,
            plain_f64,
            calibrated,
            optimised,
            margin,
            reliability: (reliability(&here, &test.labels, 1.0)?, reliability(&here, &test.labels, temperature)?),
            correlation: (as_served.map_or(f64::NAN, |w| w.1), after.map_or(f64::NAN, |w| w.1)),
            flags,
        })
    }
}

/// Attacks a set with a given score and temperature.
pub fn attacked(attack: &Attack, lens: Lens, served: &Served, set: &TextSet) -> Result<Attacked> {
    let found = attack.clone().lens(lens).run(served, set)?;
    let (accuracy, of_right) = accuracy_under_attack(&found);
    let right: Vec<&Found> = found.iter().filter(|f| f.outcome != super::attack::Outcome::WrongFromStart).collect();
    let queries = right.iter().map(|f| f.queries as f64).sum::<f64>() / right.len().max(1) as f64;
    Ok(Attacked { lens, accuracy, of_right, queries, found })
}

/// The attacker's temperature that leaves the smallest accuracy under an attack. The search covers eight decades on either side of `near`
/// (the calibrated temperature is a good choice), then uses golden sections over ln T. It runs about fifteen attacks.
pub fn best_temperature(attack: &Attack, served: &Served, validation: &TextSet, near: f64) -> Result<f64> {
    if !(near.is_finite() && near > 0.0) {
        return Err(Error::invalid("best_temperature", format!("near {near}; it must be a positive number")));
    }
    let mut failed = None;
    let accuracy = |x: f64| match attacked(attack, Lens { score: PLAIN, temperature: x.exp() }, served, validation) {
        Ok(a) => a.accuracy,
        Err(e) => {
            failed.get_or_insert(e);
            f64::NAN
        }
    };
    let wide = 8.0 * 10f64.ln();
    let found = minimise(accuracy, (near.ln() - wide, near.ln() + wide), 9, 1.0);
    failed.map_or(Ok(found.exp()), Err)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "{} on {} texts: {:.1} % right without an attack", self.attack, self.texts, 100.0 * self.clean)?;
        let mut rows =
            vec![("as served", &self.plain), ("as served, 64 bits", &self.plain_f64), ("calibrated", &self.calibrated)];
        rows.extend(self.optimised.iter().map(|a| ("optimised", a)));
        rows.push(("margin", &self.margin));
        for (name, a) in rows {
            writeln!(
                f,
                "  {name:<20} {:>5.1} % of all, {:>5.1} % of those right at first, {:>6.1} queries a text, T = {:.3e}",
                100.0 * a.accuracy,
                100.0 * a.of_right,
                a.queries,
                a.lens.temperature
            )?;
        }
        if self.unchangeable > 0 {
            let n = self.unchangeable;
            writeln!(
                f,
                "  {n} texts have no word that may be changed (stop words only, or no candidates); they count as standing"
            )?;
        }
        let (a, b) = (&self.reliability.0, &self.reliability.1);
        writeln!(f, "  calibration error {:.3}, calibrated {:.3}", a.ece, b.ece)?;
        if self.flags.is_empty() {
            return writeln!(f, "  no flag: nothing says that this robustness is an illusion");
        }
        self.flags.iter().try_for_each(|flag| writeln!(f, "  ! {flag}"))
    }
}
