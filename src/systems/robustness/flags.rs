//! Signs that a measured robustness is an illusion, each with advice on what to do.

use super::attack::{Attack, Found, Outcome};
use super::score::{Lens, Precision, Score, log_sum_exp};
use super::served::{Answers, Output, Served};
use super::text::TextSet;
use crate::base::Result;
use std::fmt;

/// What can be wrong with an evaluation by probabilities.
#[derive(Clone, Debug, PartialEq)]
pub enum Flag {
    /// For this share of the texts no single word changes the score, so that the search has no signal from its first step.
    TiedScores {
        /// The share of the texts that were right at first.
        share: f64,
    },
    /// The same attack ends differently for this share of the texts when probabilities are computed in 64 bits.
    PrecisionDisagreement {
        /// The share of all texts.
        share: f64,
        /// Accuracy under attack with 32 bits, and with 64.
        accuracies: (f64, f64),
    },
    /// The order of the words by probability has little in common with the order by margin.
    RankCollapse {
        /// The mean of Spearman's rank correlation over texts; texts whose scores are all tied count as 0.
        correlation: f64,
    },
    /// An attack on the calibrated model leaves a lower accuracy.
    CalibrationGap {
        /// Accuracy under attack as served, minus the lowest of the calibrated, optimised and margin attacks, in percentage points.
        points: f64,
    },
    /// The served probabilities look like the softmax of probabilities.
    DoubleSoftmax {
        /// The largest confidence. Two softmaxes allow at most e/(e + classes − 1).
        largest: f64,
    },
    /// Probabilities were rounded or clipped to exactly 0 or 1 for this share of the texts, and no temperature restores their order.
    RoundedProbabilities {
        /// The share of the texts.
        share: f64,
    },
}

impl Flag {
    /// The name of the flag.
    pub fn name(&self) -> &'static str {
        match self {
            Flag::TiedScores { .. } => "tied scores",
            Flag::PrecisionDisagreement { .. } => "precision disagreement",
            Flag::RankCollapse { .. } => "rank collapse",
            Flag::CalibrationGap { .. } => "calibration gap",
            Flag::DoubleSoftmax { .. } => "double softmax",
            Flag::RoundedProbabilities { .. } => "rounded probabilities",
        }
    }
}

impl fmt::Display for Flag {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Flag::TiedScores { share } => write!(
                f,
                "tied scores: for {:.0} % of the texts no single word changes the score, so that the search is blind. Attack the margin, \
                 or calibrate the logits on validation texts first.",
                100.0 * share
            ),
            Flag::PrecisionDisagreement { share, accuracies: (a, b) } => write!(
                f,
                "precision disagreement: {:.1} % of the texts end differently with probabilities of 64 bits (accuracy under attack \
                 {:.1} % with 32 bits, {:.1} % with 64). Compute the scores in 64 bits, or attack the margin.",
                100.0 * share,
                100.0 * a,
                100.0 * b
            ),
            Flag::RankCollapse { correlation } => write!(
                f,
                "rank collapse: the order of words by probability has a rank correlation of {correlation:.2} with that by margin. The \
                 search visits words in an order without meaning; attack the margin, or calibrate first."
            ),
            Flag::CalibrationGap { points } => write!(
                f,
                "calibration gap: as served, accuracy under attack is {points:.1} points higher than under the best of the calibrated \
                 attacks. Report the calibrated figure; the difference is no robustness."
            ),
            Flag::DoubleSoftmax { largest } => write!(
                f,
                "double softmax: no served confidence is above {largest:.3}, and undoing one softmax fits the classes better. Probabilities \
                 were probably taken for logits (rows whose sum is not 1 to the last digit cause that in some tools): serve the logits."
            ),
            Flag::RoundedProbabilities { share } => write!(
                f,
                "rounded probabilities: for {:.0} % of the texts a probability is exactly 0 or 1, so that the logits cannot be had back, \
                 and no calibration helps: the robustness of this service is not evaluable. Evaluate the model's logits.",
                100.0 * share
            ),
        }
    }
}

/// The threshold of each flag.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Share of texts with tied scores.
    pub tied: f64,
    /// Share of texts on which 32 and 64 bits end differently.
    pub precision: f64,
    /// Rank correlation below which the orders count as unrelated.
    pub correlation: f64,
    /// Difference of accuracies in percentage points.
    pub gap: f64,
    /// Share of texts with a probability of exactly 0 or 1.
    pub rounded: f64,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits { tied: 0.1, precision: 0.02, correlation: 0.7, gap: 2.0, rounded: 0.1 }
    }
}

/// Statistics of the words' scores: the share of texts whose scores are all tied, and the mean rank correlation with the order by margin.
/// Texts that are wrong at first, or have fewer than three words to change, are left out; `None` if no text is left.
pub fn word_scores(attack: &Attack, served: &Served, set: &TextSet, plain: Lens) -> Result<Option<(f64, f64)>> {
    let lenses = [plain, Lens::new(Score::Margin)];
    let lists = attack.importances(served, set, &lenses)?;
    let (mut texts, mut tied, mut sum) = (0, 0, 0.0);
    for list in lists.iter().filter(|l| l.first().is_some_and(|s| s.len() >= 3)) {
        texts += 1;
        let all_tied = list[0].iter().all(|s| *s == 0.0);
        tied += usize::from(all_tied);
        sum += if all_tied { 0.0 } else { spearman(&list[0], &list[1]) };
    }
    Ok((texts > 0).then(|| (tied as f64 / texts as f64, sum / texts as f64)))
}

/// Spearman's rank correlation, where equal values share the mean of their ranks; 0 if one list is constant.
pub fn spearman(a: &[f64], b: &[f64]) -> f64 {
    let ranks = |x: &[f64]| -> Vec<f64> {
        let mut order: Vec<usize> = (0..x.len()).collect();
        order.sort_by(|&i, &j| x[i].total_cmp(&x[j]));
        let mut ranks = vec![0.0; x.len()];
        let mut at = 0;
        while at < order.len() {
            let end = (at..order.len()).find(|&k| x[order[k]] != x[order[at]]).unwrap_or(order.len());
            let rank = (at + end - 1) as f64 / 2.0;
            order[at..end].iter().for_each(|&i| ranks[i] = rank);
            at = end;
        }
        ranks
    };
    let (a, b) = (ranks(a), ranks(b));
    let middle = (a.len() as f64 - 1.0) / 2.0;
    let product = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| (x - middle) * (y - middle)).sum::<f64>();
    let norms = (product(&a, &a) * product(&b, &b)).sqrt();
    if norms > 0.0 { product(&a, &b) / norms } else { 0.0 }
}

/// Whether attack `a` left more texts unbroken than attack `b` beyond chance: among the texts on which they differ, the excess is more than
/// two standard deviations of a fair coin.
pub(super) fn beyond_chance(a: &[Found], b: &[Found]) -> bool {
    let broken = |f: &Found| f.outcome == Outcome::Broken;
    let only = |x: &[Found], y: &[Found]| x.iter().zip(y).filter(|(x, y)| broken(x) && !broken(y)).count() as f64;
    let (more, less) = (only(b, a), only(a, b));
    more - less > 2.0 * (more + less).sqrt()
}

/// The share of texts that one attack breaks and the other does not.
pub(super) fn disagreement(a: &[Found], b: &[Found]) -> f64 {
    let differ = a.iter().zip(b).filter(|(x, y)| (x.outcome == Outcome::Broken) != (y.outcome == Outcome::Broken));
    differ.count() as f64 / a.len().max(1) as f64
}

/// Whether probabilities are a softmax of probabilities: every confidence is at most e/(e + C − 1), undoing one softmax gives
/// probabilities, and these either fit the classes clearly better or are often close to certainty (so that many confidences lie just below
/// the bound and none above).
pub(super) fn double_softmax(answers: &Answers, labels: &[u32]) -> Option<Flag> {
    let c = answers.classes;
    let mut largest = 0f64;
    let (mut twice, mut once, mut sure) = (0.0, 0.0, 0);
    for (i, &y) in labels.iter().enumerate() {
        let mut log: Vec<f64> = answers.row(i).to_vec();
        if answers.probabilities {
            log.iter_mut().for_each(|p| *p = p.ln());
        }
        let sum = log_sum_exp(&log);
        log.iter_mut().for_each(|l| *l -= sum);
        largest = log.iter().fold(largest, |m, l| m.max(l.exp()));
        // ln q_c = p_c − ln Σ exp p, and the p add up to 1.
        let constant = (1.0 - log.iter().sum::<f64>()) / c as f64;
        let p: Vec<f64> = log.iter().map(|l| l + constant).collect();
        if p.iter().any(|p| !(-1e-3..=1.001).contains(p)) {
            return None;
        }
        sure += usize::from(p.iter().any(|p| *p > 0.95));
        twice -= log[y as usize];
        once -= p[y as usize].max(1e-3).ln();
    }
    let n = labels.len().max(1) as f64;
    (once / n < twice / n - 0.02 || sure as f64 > 0.05 * n).then_some(Flag::DoubleSoftmax { largest })
}

/// The share of rows of probabilities that have an exact 0 or 1.
pub(super) fn rounded(answers: &Answers, served: &Served) -> f64 {
    if !answers.probabilities || !matches!(served.served_output(), Output::Probabilities(_)) {
        return 0.0;
    }
    let rows = answers.values.chunks_exact(answers.classes);
    let n = rows.len().max(1) as f64;
    rows.filter(|r| r.iter().any(|p| *p == 0.0 || *p == 1.0)).count() as f64 / n
}

/// The score of common tools.
pub(super) const PLAIN: Score = Score::Probability(Precision::F32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rank_correlations_by_hand() {
        assert_eq!(spearman(&[1.0, 2.0, 3.0], &[10.0, 20.0, 21.0]), 1.0);
        assert_eq!(spearman(&[1.0, 2.0, 3.0], &[3.0, 2.0, 1.0]), -1.0);
        assert_eq!(spearman(&[1.0, 1.0, 1.0], &[3.0, 2.0, 1.0]), 0.0);
        // Ranks 0.5, 0.5, 2 against 0, 1, 2.
        assert!((spearman(&[1.0, 1.0, 2.0], &[1.0, 2.0, 3.0]) - 1.5 / 3f64.sqrt()).abs() < 1e-12);
    }
}
