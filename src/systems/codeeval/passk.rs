//! Unbiased pass@k (Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1), its average over problems, and
//! bootstrap intervals over problems.

use crate::base::{Error, Result};
use crate::random::Rng;
use std::collections::BTreeMap;

/// The probability that at least one of k samples passes, if they are drawn without replacement from n of which c pass:
///
/// # Errors
/// [`Error::Invalid`] if c exceeds n, or if k lies outside 1..=n.
pub fn pass_at_k(n: usize, c: usize, k: usize) -> Result<f64> {
    if c > n {
        return Err(Error::invalid("pass_at_k", format!("{c} of {n} samples pass; that is more than there are")));
    }
    if k == 0 || k > n {
        return Err(Error::invalid("pass_at_k", format!("k = {k} of n = {n} samples; k must lie in 1..=n")));
    }
    if n - c < k {
        return Ok(1.0);
    }
    Ok(1.0 - (n - c + 1..=n).map(|i| 1.0 - k as f64 / i as f64).product::<f64>())
}

/// The number of samples of one prefix, and of those that passed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Count {
    /// The problem that the prefix belongs to.
    pub problem: String,
    /// Number of samples.
    pub n: usize,
    /// Number of samples that passed.
    pub c: usize,
}

/// A score with its interval.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Score {
    /// Mean over problems of the mean over a problem's prefixes.
    pub mean: f64,
    /// Lower end of the 95 % bootstrap interval over problems.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
    /// Number of problems.
    pub problems: usize,
}

/// pass@k of each problem, as the mean over its prefixes, in the order of the problems' names.
pub fn per_problem(counts: &[Count], k: usize) -> Result<Vec<(String, f64)>> {
    let mut of: BTreeMap<&str, (f64, usize)> = BTreeMap::new();
    for count in counts {
        let entry = of.entry(&count.problem).or_default();
        entry.0 += pass_at_k(count.n, count.c, k)?;
        entry.1 += 1;
    }
    Ok(of.into_iter().map(|(name, (sum, n))| (name.to_string(), sum / n as f64)).collect())
}

/// The macro average of pass@k over problems, with a percentile bootstrap over problems (`draws` resamples).
///
/// # Errors
/// [`Error::Invalid`] without counts, and the errors of [`pass_at_k`].
pub fn macro_average(counts: &[Count], k: usize, draws: usize, seed: u64) -> Result<Score> {
    bootstrap(&per_problem(counts, k)?.into_iter().map(|p| p.1).collect::<Vec<_>>(), draws, seed)
}

/// The mean of some values and its 95 % percentile bootstrap interval.
///
/// # Errors
/// [`Error::Invalid`] without values, with a value that is not finite, or without draws.
pub fn bootstrap(values: &[f64], draws: usize, seed: u64) -> Result<Score> {
    if values.is_empty() {
        return Err(Error::invalid("bootstrap", "no values; there is nothing to average"));
    }
    if let Some(x) = values.iter().find(|x| !x.is_finite()) {
        return Err(Error::invalid("bootstrap", format!("a value is {x}; all must be finite")));
    }
    if draws == 0 {
        return Err(Error::invalid("bootstrap", "0 draws; an interval needs at least one"));
    }
    let n = values.len();
    let mean = values.iter().sum::<f64>() / n as f64;
    let mut rng = Rng::new(seed);
    let mut means: Vec<f64> =
        (0..draws).map(|_| (0..n).map(|_| values[rng.below(n as u64) as usize]).sum::<f64>() / n as f64).collect();
    means.sort_by(f64::total_cmp);
    let at = |q: f64| means[((q * draws as f64) as usize).min(draws - 1)];
    Ok(Score { mean, low: at(0.025), high: at(0.975), problems: n })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A non-negative integer of any size, in base 10⁹, for an exact check.
    #[derive(Clone, PartialEq, Debug)]
    struct Big(Vec<u32>);

    impl Big {
        fn one() -> Big {
            Big(vec![1])
        }
        fn times(mut self, m: u32) -> Big {
            let mut carry = 0u64;
            for d in &mut self.0 {
                carry += u64::from(*d) * u64::from(m);
                *d = (carry % 1_000_000_000) as u32;
                carry /= 1_000_000_000;
            }
            if carry > 0 {
                self.0.push(carry as u32);
            }
            self
        }
        fn over(mut self, m: u32) -> Big {
            let mut rest = 0u64;
            for d in self.0.iter_mut().rev() {
                rest = rest * 1_000_000_000 + u64::from(*d);
                *d = (rest / u64::from(m)) as u32;
                rest %= u64::from(m);
            }
            assert_eq!(rest, 0, "a binomial coefficient divides");
            while self.0.len() > 1 && self.0.last() == Some(&0) {
                self.0.pop();
            }
            self
        }
        /// The value as m · 10^e, so that the ratio of two values does not overflow.
        fn float(&self) -> (f64, i32) {
            let top = self.0.iter().rev().take(4).fold(0.0, |x, &d| x * 1e9 + f64::from(d));
            (top, 9 * (self.0.len() as i32 - 4).max(0))
        }
    }

    fn binomial(n: usize, k: usize) -> Big {
        (1..=k).fold(Big::one(), |b, i| b.times((n - k + i) as u32).over(i as u32))
    }

    #[test]
    fn the_known_value() {
        assert!((pass_at_k(20, 3, 5).unwrap() - 0.600_877_192_982_456).abs() < 1e-12);
        assert_eq!(pass_at_k(10, 0, 10).unwrap(), 0.0);
        assert_eq!(pass_at_k(10, 1, 10).unwrap(), 1.0);
        assert!((pass_at_k(100, 7, 1).unwrap() - 0.07).abs() < 1e-12);
    }

    /// Compares with exact binomial coefficients, for all c and k and a few n up to 200.
    #[test]
    fn it_is_the_ratio_of_binomials() {
        for n in [1, 2, 3, 7, 20, 50, 113, 200] {
            for k in (1..=n).step_by(1 + n / 40) {
                let all = binomial(n, k).float();
                for c in 0..=n {
                    let want = if n - c < k {
                        1.0
                    } else {
                        let none = binomial(n - c, k).float();
                        1.0 - none.0 / all.0 * 10f64.powi(none.1 - all.1)
                    };
                    let got = pass_at_k(n, c, k).unwrap();
                    assert!((got - want).abs() < 1e-12, "n {n} c {c} k {k}: {got} {want}");
                }
            }
        }
    }

    #[test]
    fn it_is_what_drawing_gives() {
        let (n, c, k, draws) = (12, 3, 4, 20_000);
        let mut rng = Rng::new(1);
        let hits = (0..draws)
            .filter(|_| {
                let mut order: Vec<usize> = (0..n).collect();
                rng.shuffle(&mut order);
                order[..k].iter().any(|&i| i < c)
            })
            .count();
        let (got, want) = (hits as f64 / draws as f64, pass_at_k(n, c, k).unwrap());
        assert!((got - want).abs() < 4.0 * (want * (1.0 - want) / draws as f64).sqrt(), "{got} {want}");
    }

    #[test]
    fn problems_count_alike_whatever_their_rows() {
        let count = |problem: &str, c| Count { problem: problem.into(), n: 10, c };
        let mut counts = vec![count("a", 10)];
        counts.extend((0..99).map(|_| count("b", 0)));
        let score = macro_average(&counts, 1, 200, 0).unwrap();
        assert_eq!((score.mean, score.problems), (0.5, 2));
        assert_eq!((score.low, score.high), (0.0, 1.0));
        assert!(macro_average(&[], 1, 10, 0).is_err());
        assert!(pass_at_k(5, 6, 1).unwrap_err().to_string().contains("more than there are"));
        assert!(pass_at_k(5, 1, 6).unwrap_err().to_string().contains("1..=n"));
    }
}
