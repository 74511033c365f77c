//! A baseline for location without a neural network. It counts how often each operator stands between the tokens around it, and uses less
//! of the context where the whole context was never seen (back-off).

use super::buggy::FlipMap;
use super::locate::Doubt;
use super::python::{Kind, Token, operators, tokens};
use crate::base::Result;
use std::collections::HashMap;

/// The numbers of tokens before and after an operator that each level uses, from the longest context to none.
const LEVELS: [(usize, usize); 6] = [(3, 2), (2, 1), (1, 1), (1, 0), (0, 1), (0, 0)];

/// Counts of operators by their context.
#[derive(Clone, Debug)]
pub struct OperatorNgrams {
    flips: FlipMap,
    counts: HashMap<(usize, String), HashMap<&'static str, f64>>,
    sites: usize,
}

/// The number of an operator among the tokens, and its line.
type Place = (usize, usize);

/// The tokens of a text without comments, and its binary operators.
fn sites<'a>(text: &'a str, flips: &FlipMap) -> Result<(Vec<Token<'a>>, Vec<Place>)> {
    let all: Vec<Token> = tokens(text)?.into_iter().filter(|t| t.kind != Kind::Comment).collect();
    let found = operators(text, &flips.operators())?;
    let number = |start: usize| all.binary_search_by_key(&start, |t| t.start).ok();
    let places = found.iter().filter_map(|o| Some((number(o.start)?, o.line))).collect();
    Ok((all, places))
}

/// The tokens around the operator at `at`. Strings are not distinguished from each other.
fn context(all: &[Token], at: usize, (before, after): (usize, usize)) -> String {
    let word = |i: Option<usize>| match i.and_then(|i| all.get(i)) {
        None => "",
        Some(t) if t.kind == Kind::String => "''",
        Some(t) if t.kind == Kind::Newline => "\n",
        Some(t) => t.text,
    };
    let left = (1..=before).map(|k| word(at.checked_sub(k)));
    let words: Vec<&str> = left.chain((1..=after).map(|k| word(Some(at + k)))).collect();
    words.join(" ")
}

impl OperatorNgrams {
    /// A model without counts.
    pub fn new(flips: FlipMap) -> OperatorNgrams {
        OperatorNgrams { flips, counts: HashMap::new(), sites: 0 }
    }
    /// Counts the operators of a program.
    ///
    /// # Errors
    /// If the program cannot be split into tokens. Nothing is counted then.
    pub fn count(&mut self, text: &str) -> Result<()> {
        let (all, places) = sites(text, &self.flips)?;
        for (at, _) in places {
            let Some(op) = self.flips.operators().into_iter().find(|o| *o == all[at].text) else { continue };
            self.sites += 1;
            for (level, around) in LEVELS.into_iter().enumerate() {
                let of = self.counts.entry((level, context(&all, at, around))).or_default();
                *of.entry(op).or_default() += 1.0;
            }
        }
        Ok(())
    }
    /// The number of operators counted.
    pub fn sites(&self) -> usize {
        self.sites
    }
    /// For each binary operator of a text, its probability against the one it would be flipped to. From the shortest context to the
    /// longest, the counts of each are added to twice the probability so far, so that frequent contexts dominate.
    ///
    /// # Errors
    /// If the text cannot be split into tokens.
    pub fn doubts(&self, text: &str) -> Result<Vec<Doubt>> {
        let (all, places) = sites(text, &self.flips)?;
        let of = |(at, line): (usize, usize)| {
            let observed = all[at].text;
            let other = self.flips.flip(observed)?;
            let mut p = 0.5;
            for (level, around) in LEVELS.into_iter().enumerate().rev() {
                if let Some(counts) = self.counts.get(&(level, context(&all, at, around))) {
                    let count = |op: &str| counts.get(op).copied().unwrap_or(0.0);
                    p = (count(observed) + 2.0 * p) / (count(observed) + count(other) + 2.0);
                }
            }
            let instead = if p < 0.5 { other } else { observed };
            Some(Doubt { place: at, line, observed: p, best: p.max(1.0 - p), kind: 1.0, instead: instead.to_string() })
        };
        Ok(places.into_iter().filter_map(of).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_seen_is_believed() {
        let mut grams = OperatorNgrams::new(FlipMap::paper());
        for _ in 0..9 {
            grams.count("def f(xs):\n    while i < len(xs):\n        i += 1\n    return a + b\n").unwrap();
        }
        assert_eq!(grams.sites(), 27);
        let doubts = grams.doubts("def g(ys):\n    while i < len(ys):\n        i -= 1\n    return c + d\n").unwrap();
        assert_eq!(doubts.iter().map(|d| d.line).collect::<Vec<_>>(), [1, 2, 3]);
        assert!(doubts[0].gap() == 0.0 && doubts[2].gap() == 0.0);
        assert!(doubts[1].gap() > 0.8 && doubts[1].instead == "+=", "{:?}", doubts[1]);
        assert!(grams.count("'abc").is_err());
    }
}
