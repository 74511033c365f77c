//! Treatment of a prefix that may have a bug: the three mitigations of the paper (section 5).
//!
//! | function | what is done |
//! |---|---|
//! | [`remove`] | the prefix is dropped, and the specification completed |
//! | [`complete_then_rewrite`] | the prefix is completed, and the whole program rewritten |
//! | [`rewrite_then_complete`] | the prefix is rewritten, and the result completed |
//!
//! Rewriting replaces the first suspicious operator ([`locate::operator`](super::locate::operator)) by the one that the model finds most
//! likely. The paper rewrites whole programs with a separate model (RealiT), and the released code cuts a prefix before its suspicious
//! line. Here one model does both, so that only the order of the two steps differs. Any of the three may harm a clean prefix, so measure
//! clean prefixes as well.

use super::buggy::Row;
use super::lm::{CodeModel, Draw};
use super::locate::{check_threshold, first_above};
use crate::base::Result;

/// The beginning of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// The specification and the first lines of the body, without a line break at the end.
    pub text: String,
    /// Lines of the specification.
    pub head_lines: usize,
}

impl Prefix {
    /// The clean prefix of a row.
    pub fn clean(row: &Row) -> Prefix {
        Prefix { text: row.clean.clone(), head_lines: row.head_lines }
    }
    /// The buggy prefix of a row.
    pub fn buggy(row: &Row) -> Prefix {
        Prefix { text: row.buggy.clone(), head_lines: row.head_lines }
    }
    /// The specification alone, without a line break at the end.
    pub fn specification(&self) -> String {
        self.text.lines().take(self.head_lines).collect::<Vec<_>>().join("\n")
    }
}

fn texts(prefixes: &[Prefix]) -> Vec<String> {
    prefixes.iter().map(|p| p.text.clone()).collect()
}

/// Completions of the specification of each prefix; the other lines of the prefix are not used.
///
/// # Errors
/// Those of [`CodeModel::complete`].
pub fn remove(model: &impl CodeModel, prefixes: &[Prefix], draw: &Draw) -> Result<Vec<Vec<String>>> {
    model.complete(&prefixes.iter().map(Prefix::specification).collect::<Vec<_>>(), draw)
}

/// Completions of each prefix. In each completed program the first operator whose gap exceeds the threshold is replaced, wherever it is.
///
/// # Errors
/// Those of [`CodeModel::complete`] and [`rewrite`].
pub fn complete_then_rewrite(
    model: &impl CodeModel,
    prefixes: &[Prefix],
    threshold: f64,
    draw: &Draw,
) -> Result<Vec<Vec<String>>> {
    let done = model.complete(&texts(prefixes), draw)?;
    done.iter().map(|programs| rewrite(model, programs, threshold)).collect()
}

/// Completions of the prefixes. In each prefix the first operator whose gap exceeds the threshold is replaced before the completion.
///
/// # Errors
/// Those of [`CodeModel::complete`] and [`rewrite`].
pub fn rewrite_then_complete(
    model: &impl CodeModel,
    prefixes: &[Prefix],
    threshold: f64,
    draw: &Draw,
) -> Result<Vec<Vec<String>>> {
    model.complete(&rewrite(model, &texts(prefixes), threshold)?, draw)
}

/// Each text with the first operator whose gap exceeds the threshold replaced. A text without such an operator stays as it is.
///
/// # Errors
/// Those of [`CodeModel::doubts`] and [`CodeModel::replaced`].
pub fn rewrite(model: &impl CodeModel, texts: &[String], threshold: f64) -> Result<Vec<String>> {
    check_threshold(threshold)?;
    let one = |(text, doubts): (&String, Vec<_>)| match first_above(&doubts, threshold) {
        Some(doubt) => model.replaced(text, doubt),
        None => Ok(text.clone()),
    };
    texts.iter().zip(model.doubts(texts)?).map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::systems::codeeval::locate::Doubt;

    /// A model that writes one line after every prefix, and finds every `!=` wrong.
    struct Writer;

    impl CodeModel for Writer {
        fn complete(&self, prefixes: &[String], draw: &Draw) -> Result<Vec<Vec<String>>> {
            let one = |p: &String| (0..draw.samples).map(|s| format!("{p}\n    return a != {s}\n")).collect();
            Ok(prefixes.iter().map(one).collect())
        }
        fn doubts(&self, texts: &[String]) -> Result<Vec<Vec<Doubt>>> {
            let doubt =
                |(place, _)| Doubt { place, line: 0, observed: 0.1, best: 0.9, kind: 1.0, instead: "==".into() };
            Ok(texts.iter().map(|t| t.match_indices("!=").map(doubt).collect()).collect())
        }
        fn replaced(&self, text: &str, doubt: &Doubt) -> Result<String> {
            Ok(format!("{}{}{}", &text[..doubt.place], doubt.instead, &text[doubt.place + 2..]))
        }
    }

    #[test]
    fn each_mitigation_does_its_steps_in_their_order() {
        let of = |body: &str| Prefix { text: format!("def f(a):\n    # a sentence\n    {body}"), head_lines: 2 };
        let prefixes = [of("if a != 1:"), of("if a > 1:")];
        let draw = Draw { samples: 2, temperature: 0.0, seed: 0 };
        let head = "def f(a):\n    # a sentence\n";
        let removed = remove(&Writer, &prefixes, &draw).unwrap();
        assert_eq!(removed, vec![vec![format!("{head}    return a != 0\n"), format!("{head}    return a != 1\n")]; 2]);
        // The first suspicious operator is in the prefix if it has one, and in the completion otherwise.
        let after = complete_then_rewrite(&Writer, &prefixes, 0.5, &draw).unwrap();
        assert_eq!(after[0][1], format!("{head}    if a == 1:\n    return a != 1\n"));
        assert_eq!(after[1][1], format!("{head}    if a > 1:\n    return a == 1\n"));
        let before = rewrite_then_complete(&Writer, &prefixes, 0.5, &draw).unwrap();
        assert_eq!(before[0][0], format!("{head}    if a == 1:\n    return a != 0\n"));
        assert_eq!(before[1][0], format!("{head}    if a > 1:\n    return a != 0\n"));
        // With a threshold above the gap nothing is replaced.
        let plain = Writer.complete(&texts(&prefixes), &draw).unwrap();
        assert_eq!(complete_then_rewrite(&Writer, &prefixes, 0.8, &draw).unwrap(), plain);
        assert_eq!(rewrite_then_complete(&Writer, &prefixes, 0.8, &draw).unwrap(), plain);
    }
}
