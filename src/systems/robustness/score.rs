//! Scores that an attack maximises. A score compares an answer with the right class, and is higher where the text is nearer to being
//! misclassified.

use super::served::{Answers, softmax_f32, softmax_f64};

/// The precision in which a probability is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// 32 bits, as in attack tools.
    F32,
    /// 64 bits.
    F64,
}

/// A score of the answer l (logits, or the logarithms of probabilities) against the right class y.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// 1 − p_y, with p the softmax. Different texts have the same score where 1 − p_y is below the precision of 1 (an over-confident
    /// model), or where differences of p are below it (an under-confident model in f32).
    Probability(Precision),
    /// −ln p_y in f64. Over-confidence still produces ties: where p_y is 1, its logarithm is 0.
    LogProbability,
    /// The largest logit of another class minus that of y. A temperature multiplies it by one factor for all texts and changes no order, so
    /// that the search does not depend on it.
    Margin,
}

impl std::fmt::Display for Score {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(match self {
            Score::Probability(Precision::F32) => "probability in f32",
            Score::Probability(Precision::F64) => "probability in f64",
            Score::LogProbability => "logarithm of the probability",
            Score::Margin => "margin",
        })
    }
}

/// How an attacker uses answers: they are divided by a temperature and then scored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lens {
    /// The score.
    pub score: Score,
    /// The served logits are divided by this before they are scored; 1 leaves them as they are.
    pub temperature: f64,
}

impl Lens {
    /// A lens that uses the served logits as they are.
    pub fn new(score: Score) -> Lens {
        Lens { score, temperature: 1.0 }
    }
    /// The score of sequence i of the answers against class `label`.
    pub fn score(&self, answers: &Answers, i: usize, label: u32, scratch: &mut Vec<f64>) -> f64 {
        scratch.clear();
        scratch.extend_from_slice(answers.row(i));
        let y = label as usize;
        // Probabilities that are not rescaled are scored without conversion.
        let plain = answers.probabilities && self.temperature == 1.0;
        if answers.probabilities && (!plain || self.score == Score::Margin) {
            scratch.iter_mut().for_each(|p| *p = p.ln());
        }
        if self.temperature != 1.0 {
            scratch.iter_mut().for_each(|l| *l /= self.temperature);
        }
        match self.score {
            Score::Probability(Precision::F32) => {
                if !plain {
                    softmax_f32(scratch);
                }
                f64::from(1.0 - scratch[y] as f32)
            }
            Score::Probability(Precision::F64) => {
                if !plain {
                    softmax_f64(scratch);
                }
                1.0 - scratch[y]
            }
            Score::LogProbability if plain => -scratch[y].ln(),
            Score::LogProbability => log_sum_exp(scratch) - scratch[y],
            Score::Margin => {
                let other =
                    (0..scratch.len()).filter(|&c| c != y).map(|c| scratch[c]).fold(f64::NEG_INFINITY, f64::max);
                // Probabilities that were rounded to 0 cannot be compared.
                if other == f64::NEG_INFINITY || scratch[y] == f64::NEG_INFINITY {
                    return if other > scratch[y] { f64::MAX } else { f64::MIN };
                }
                other - scratch[y]
            }
        }
    }
}

/// ln Σ exp of the values in a row.
pub(super) fn log_sum_exp(row: &[f64]) -> f64 {
    let largest = row.iter().fold(f64::NEG_INFINITY, |m, x| m.max(*x));
    largest + row.iter().map(|x| (x - largest).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: &[f64], score: Score, temperature: f64) -> f64 {
        let answers = Answers { classes: values.len(), labels: vec![0], probabilities: false, values: values.to_vec() };
        Lens { score, temperature }.score(&answers, 0, 0, &mut Vec::new())
    }

    #[test]
    fn scores_by_hand() {
        let l = [2.0, 1.0, 0.0];
        let p = 1.0 / (1.0 + (-1f64).exp() + (-2f64).exp());
        assert_eq!(of(&l, Score::Margin, 1.0), -1.0);
        assert_eq!(of(&l, Score::Margin, 0.5), -2.0);
        assert!((of(&l, Score::Probability(Precision::F64), 1.0) - (1.0 - p)).abs() < 1e-15);
        assert!((of(&l, Score::Probability(Precision::F32), 1.0) - (1.0 - p)).abs() < 1e-7);
        assert!((of(&l, Score::LogProbability, 1.0) + p.ln()).abs() < 1e-15);
    }
    /// The two ways in which probabilities hide progress that the margin shows.
    #[test]
    fn probabilities_tie_where_margins_do_not() {
        let (a, b) = ([3.0, 0.0], [2.0, 0.0]);
        let tied = |score, t| of(&a, score, t) == of(&b, score, t);
        let (f32, f64) = (Score::Probability(Precision::F32), Score::Probability(Precision::F64));
        assert!(tied(f32, 1e-2) && tied(f64, 1e-2), "over-confident: 64 bits are no cure");
        assert!(tied(f32, 1e9) && !tied(f64, 1e9), "under-confident: 64 bits are one");
        assert!(!tied(Score::LogProbability, 0.1) && tied(Score::LogProbability, 1e-2));
        assert!([1e-9, 1e-2, 1.0, 1e9].iter().all(|&t| !tied(Score::Margin, t)));
    }
}
