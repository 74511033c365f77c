//! Location of a bug: which operator of a text is suspicious, by the probabilities of a language model.
//!
//! The paper's rule reads from left to right. The first operator is suspicious for which the probability of the most likely operator
//! exceeds that of the observed one by more than a threshold.

use super::lm::CodeModel;
use crate::base::{Error, Result};
use std::collections::BTreeMap;

/// Operators that are compared with each other: orders and equalities, sums and products, augmented assignments.
pub(super) const KINDS: [&[&str]; 3] =
    [&["==", "!=", "<", "<=", ">", ">="], &["+", "-", "*", "/"], &["+=", "-=", "*=", "/="]];

/// An operator of a text, and the probabilities of a model at its place.
#[derive(Clone, Debug, PartialEq)]
pub struct Doubt {
    /// The operator's position, in the unit of the model that computed this: tokens or bytes.
    pub place: usize,
    /// The operator's line, from 0.
    pub line: usize,
    /// Probability of the operator in the text.
    pub observed: f64,
    /// Probability of the most likely operator of its kind.
    pub best: f64,
    /// Probability of all operators of its kind together; 1 if the model only compares operators of this kind.
    pub kind: f64,
    /// The most likely operator.
    pub instead: String,
}

impl Doubt {
    /// The probability of the most likely operator minus that of the observed one; 0 where they are the same.
    pub fn gap(&self) -> f64 {
        self.best - self.observed
    }
    /// The same probabilities, given that an operator of this kind follows. A model with little confidence gives every operator a small
    /// probability, and without this no gap would exceed the threshold of the paper's rule.
    pub fn given_kind(&self) -> Doubt {
        let share = |p: f64| if self.kind > 0.0 { (p / self.kind).min(1.0) } else { 0.0 };
        Doubt { observed: share(self.observed), best: share(self.best), kind: 1.0, ..self.clone() }
    }
}

/// The first operator whose gap exceeds the threshold.
pub fn first_above(doubts: &[Doubt], threshold: f64) -> Option<&Doubt> {
    doubts.iter().find(|d| d.gap() > threshold)
}

/// The suspicious operator of a text by the paper's rule, or `None` if no gap exceeds the threshold (0.95 in the paper).
///
/// # Errors
/// Those of [`CodeModel::doubts`].
pub fn operator(model: &impl CodeModel, text: &str, threshold: f64) -> Result<Option<Doubt>> {
    check_threshold(threshold)?;
    let doubts = model.doubts(&[text.to_string()])?;
    Ok(doubts.iter().find_map(|d| first_above(d, threshold)).cloned())
}

/// Gaps are differences of probabilities.
pub(super) fn check_threshold(threshold: f64) -> Result<()> {
    match (0.0..=1.0).contains(&threshold) {
        true => Ok(()),
        false => Err(Error::invalid("locate", format!("a threshold of {threshold}; it must lie in [0, 1]"))),
    }
}

/// The operator with the largest gap, the first of equal ones.
pub fn most_suspicious(doubts: &[Doubt]) -> Option<&Doubt> {
    doubts.iter().fold(None, |best: Option<&Doubt>, d| match best {
        Some(b) if b.gap() >= d.gap() => Some(b),
        _ => Some(d),
    })
}

/// The threshold in `among` that maximises the share of buggy texts whose line is found minus the share of clean texts in which any line is
/// suspected. `buggy` has the right line beside each text's doubts. Choose it on validation data.
pub fn choose_threshold(buggy: &[(Vec<Doubt>, usize)], clean: &[Vec<Doubt>], among: &[f64]) -> f64 {
    let score = |t: f64| {
        let hits = buggy.iter().filter(|(d, line)| first_above(d, t).is_some_and(|d| d.line == *line)).count();
        let alarms = clean.iter().filter(|d| first_above(d, t).is_some()).count();
        hits as f64 / buggy.len().max(1) as f64 - alarms as f64 / clean.len().max(1) as f64
    };
    among.iter().copied().max_by(|&a, &b| score(a).total_cmp(&score(b))).unwrap_or(0.9)
}

/// A buggy prefix in which the bug was searched for.
#[derive(Clone, Debug, PartialEq)]
pub struct Searched {
    /// The number of the problem.
    pub problem: usize,
    /// The line of the bug.
    pub line: usize,
    /// The doubts in the buggy prefix.
    pub buggy: Vec<Doubt>,
    /// The doubts in the clean prefix.
    pub clean: Vec<Doubt>,
}

/// Results of the paper's rule at one threshold.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct AtThreshold {
    /// The threshold.
    pub threshold: f64,
    /// Share of right lines among the buggy prefixes in which a line was suspected; 1 if there was none.
    pub precision: f64,
    /// Share of right lines among all buggy prefixes.
    pub recall: f64,
    /// Share of clean prefixes in which a line was suspected.
    pub false_alarms: f64,
}

/// Results of a search for bugs.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Location {
    /// Number of prefixes.
    pub rows: usize,
    /// Share of prefixes in which the largest gap is on the right line.
    pub found: f64,
    /// The same share, as a mean over problems.
    pub by_problem: f64,
    /// Share of prefixes in which an operator drawn at random among those of the prefix would be right.
    pub random: f64,
    /// The same share, as a mean over problems.
    pub random_by_problem: f64,
    /// The paper's rule at each threshold.
    pub curve: Vec<AtThreshold>,
}

/// Scores a search by its largest gaps, and by its first gaps above each threshold.
///
/// # Errors
/// [`Error::Invalid`] without prefixes.
pub fn score(all: &[Searched], thresholds: &[f64]) -> Result<Location> {
    if all.is_empty() {
        return Err(Error::invalid("locate::score", "no prefixes; there is nothing to look for"));
    }
    let n = all.len() as f64;
    let mut problems: BTreeMap<usize, [f64; 3]> = BTreeMap::new();
    for s in all {
        let hit = f64::from(u8::from(most_suspicious(&s.buggy).is_some_and(|d| d.line == s.line)));
        let chance = s.buggy.iter().filter(|d| d.line == s.line).count() as f64 / s.buggy.len().max(1) as f64;
        let [hits, chances, rows] = problems.entry(s.problem).or_default();
        (*hits, *chances, *rows) = (*hits + hit, *chances + chance, *rows + 1.0);
    }
    let share = |which: usize| problems.values().map(|p| p[which]).sum::<f64>() / n;
    let by_problem = |which: usize| problems.values().map(|p| p[which] / p[2]).sum::<f64>() / problems.len() as f64;
    let at = |&threshold: &f64| {
        let named: Vec<bool> =
            all.iter().filter_map(|s| Some(first_above(&s.buggy, threshold)?.line == s.line)).collect();
        let right = named.iter().filter(|r| **r).count() as f64;
        let alarms = all.iter().filter(|s| first_above(&s.clean, threshold).is_some()).count() as f64;
        let precision = if named.is_empty() { 1.0 } else { right / named.len() as f64 };
        AtThreshold { threshold, precision, recall: right / n, false_alarms: alarms / n }
    };
    Ok(Location {
        rows: all.len(),
        found: share(0),
        by_problem: by_problem(0),
        random: share(1),
        random_by_problem: by_problem(1),
        curve: thresholds.iter().map(at).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn doubt(line: usize, observed: f64, best: f64) -> Doubt {
        Doubt { place: line, line, observed, best, kind: 1.0, instead: "<".into() }
    }

    #[test]
    fn the_first_above_and_the_largest() {
        let all = [doubt(1, 0.5, 0.5), doubt(2, 0.1, 0.8), doubt(3, 0.0, 0.9)];
        assert_eq!(first_above(&all, 0.6).unwrap().line, 2);
        assert_eq!(first_above(&all, 0.8).unwrap().line, 3);
        assert!(first_above(&all, 0.95).is_none());
        let rare = Doubt { kind: 0.02, ..doubt(4, 0.005, 0.015) };
        assert!((rare.gap() - 0.01).abs() < 1e-12 && (rare.given_kind().gap() - 0.5).abs() < 1e-12);
        assert_eq!(most_suspicious(&all).unwrap().line, 3);
        assert!(most_suspicious(&[]).is_none());
        let buggy = vec![(all.to_vec(), 3), (all.to_vec(), 3)];
        assert_eq!(choose_threshold(&buggy, &[vec![doubt(1, 0.2, 0.9)]], &[0.5, 0.8, 0.95]), 0.8);
    }

    #[test]
    fn problems_count_alike_and_alarms_are_counted() {
        let all = [doubt(1, 0.5, 0.5), doubt(2, 0.1, 0.8)];
        let of =
            |problem, line, clean: &[Doubt]| Searched { problem, line, buggy: all.to_vec(), clean: clean.to_vec() };
        let rows = [of(0, 2, &[]), of(1, 2, &all), of(1, 1, &[]), of(1, 1, &[])];
        let score = score(&rows, &[0.5, 0.9]).unwrap();
        assert_eq!((score.found, score.by_problem, score.random), (0.5, (1.0 + 1.0 / 3.0) / 2.0, 0.5));
        let at = |i: usize| (score.curve[i].precision, score.curve[i].recall, score.curve[i].false_alarms);
        assert_eq!((at(0), at(1)), ((0.5, 0.5, 0.25), (1.0, 0.0, 0.0)));
        assert!(super::score(&[], &[]).unwrap_err().to_string().contains("no prefixes"));
    }
}
