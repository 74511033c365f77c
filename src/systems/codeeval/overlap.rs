//! Whether a training text shares a passage with a benchmark: runs of words that occur in both (Brown et al. 2020, "Language Models are
//! Few-Shot Learners", appendix C, with runs of 13 words).

use std::collections::HashSet;

/// The runs of `n` words of some texts. A word is a run of letters, digits and underscores, in lower case; characters between words are
/// ignored.
#[derive(Clone, Debug)]
pub struct WordRuns {
    n: usize,
    seen: HashSet<String>,
}

fn runs(text: &str, n: usize) -> impl Iterator<Item = String> {
    let words: Vec<String> = (text.split(|c: char| !(c.is_alphanumeric() || c == '_')))
        .filter(|w| !w.is_empty())
        .map(str::to_lowercase)
        .collect();
    (n..=words.len()).map(move |end| words[end - n..end].join(" "))
}

impl WordRuns {
    /// An empty set of runs of `n` words, `n` being at least 1.
    pub fn new(n: usize) -> WordRuns {
        WordRuns { n: n.max(1), seen: HashSet::new() }
    }
    /// Adds a text of the benchmark.
    pub fn add(&mut self, text: &str) {
        self.seen.extend(runs(text, self.n));
    }
    /// The number of different runs.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.seen.len()
    }
    /// The first run of a text that the benchmark contains as well.
    pub fn shared(&self, text: &str) -> Option<String> {
        runs(text, self.n).find(|run| self.seen.contains(run))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_passage_is_found_whatever_stands_between_its_words() {
        let mut runs = WordRuns::new(5);
        runs.add("def f(xs):\n    return sum(x for x in xs)");
        runs.add("too short");
        assert_eq!(runs.len(), 6);
        assert_eq!(runs.shared("# RETURN: sum, x; for X!").as_deref(), Some("return sum x for x"));
        assert_eq!(runs.shared("return sum(x) in for x in xs"), None);
        assert_eq!(runs.shared("def f xs return"), None);
    }
}
