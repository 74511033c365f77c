//! Which operator of a text is suspicious, by what a language model thinks of it.
//!
//! The paper's rule: walk from left to right; the first operator where the probability of the most likely one exceeds that of the
//! observed one by more than a threshold is suspicious.

/// What a model thinks of an operator that it reads.
#[derive(Clone, Debug, PartialEq)]
pub struct Doubt {
    /// Where the operator is, in tokens.
    pub place: usize,
    /// Its line, from 0.
    pub line: usize,
    /// Probability of the operator that is there.
    pub observed: f64,
    /// Probability of the most likely operator of its kind.
    pub best: f64,
    /// That operator.
    pub instead: String,
}

impl Doubt {
    /// By how much another operator is more likely; 0 where the observed one is the most likely.
    pub fn gap(&self) -> f64 {
        self.best - self.observed
    }
}

/// The first operator whose gap exceeds the threshold.
pub fn first_above(doubts: &[Doubt], threshold: f64) -> Option<&Doubt> {
    doubts.iter().find(|d| d.gap() > threshold)
}

/// The operator with the largest gap, the first of equal ones.
pub fn most_suspicious(doubts: &[Doubt]) -> Option<&Doubt> {
    doubts.iter().fold(None, |best: Option<&Doubt>, d| match best {
        Some(b) if b.gap() >= d.gap() => Some(b),
        _ => Some(d),
    })
}

/// The threshold, among some, with the largest share of buggy texts whose line is found, less the share of clean texts that are
/// suspected of anything. `buggy` has the right line beside each text's doubts. To be chosen on validation data.
pub fn choose_threshold(buggy: &[(Vec<Doubt>, usize)], clean: &[Vec<Doubt>], among: &[f64]) -> f64 {
    let score = |t: f64| {
        let hits = buggy.iter().filter(|(d, line)| first_above(d, t).is_some_and(|d| d.line == *line)).count();
        let alarms = clean.iter().filter(|d| first_above(d, t).is_some()).count();
        hits as f64 / buggy.len().max(1) as f64 - alarms as f64 / clean.len().max(1) as f64
    };
    among.iter().copied().max_by(|&a, &b| score(a).total_cmp(&score(b))).unwrap_or(0.9)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn doubt(line: usize, observed: f64, best: f64) -> Doubt {
        Doubt { place: line, line, observed, best, instead: "<".into() }
    }

    #[test]
    fn the_first_above_and_the_largest() {
        let all = [doubt(1, 0.5, 0.5), doubt(2, 0.1, 0.8), doubt(3, 0.0, 0.9)];
        assert_eq!(first_above(&all, 0.6).unwrap().line, 2);
        assert_eq!(first_above(&all, 0.8).unwrap().line, 3);
        assert!(first_above(&all, 0.95).is_none());
        assert_eq!(most_suspicious(&all).unwrap().line, 3);
        assert!(most_suspicious(&[]).is_none());
        let buggy = vec![(all.to_vec(), 3), (all.to_vec(), 3)];
        assert_eq!(choose_threshold(&buggy, &[vec![doubt(1, 0.2, 0.9)]], &[0.5, 0.8, 0.95]), 0.8);
    }
}
