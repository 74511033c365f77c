//! The generator of buggy prefixes: from problems with tests it makes pairs of a clean and a buggy prefix.

use super::python::{operators, without_blank_lines};
use super::sandbox::{Judge, Program, Verdict};
use crate::base::{Error, Result};
use crate::data::read_maybe_gzip;
use serde::Deserialize;
use std::collections::BTreeSet;
use std::path::Path;

/// A problem: a specification, a solution, and tests. The fields are those of HumanEval's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The problem's name.
    pub task_id: String,
    /// The specification: imports, the function's head, and its docstring.
    pub prompt: String,
    /// The function that the tests call.
    pub entry_point: String,
    /// A function body that passes the tests.
    pub canonical_solution: String,
    /// Python that defines `check(candidate)`.
    pub test: String,
}

#[derive(Deserialize)]
struct Record {
    task_id: Option<String>,
    prompt: Option<String>,
    entry_point: Option<String>,
    canonical_solution: Option<String>,
    test: Option<String>,
    clean_prompt: Option<String>,
    buggy_prompt: Option<String>,
}

/// A row of the released `buggy-HumanEval.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Released {
    /// The problem.
    pub task_id: String,
    /// The clean prefix.
    pub clean: String,
    /// The buggy prefix.
    pub buggy: String,
}

fn records<T>(path: &Path, of: impl Fn(Record) -> Result<T, &'static str>) -> Result<Vec<T>> {
    let bytes = read_maybe_gzip(path, 256 << 20)?;
    let text =
        String::from_utf8(bytes).map_err(|_| Error::format(path, "not UTF-8; one JSON object a line is read"))?;
    let mut out = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let record: Record = serde_json::from_str(line)
            .map_err(|e| Error::format(path, format!("line {}: not a JSON object of a problem: {e}", i + 1)))?;
        out.push(of(record).map_err(|field| Error::format(path, format!("line {}: no field {field:?}", i + 1)))?);
    }
    if out.is_empty() {
        return Err(Error::format(path, "no problems; one JSON object a line is read"));
    }
    Ok(out)
}

/// Reads the problems of a JSON-lines file, gzipped or not, with the fields of HumanEval.
///
/// # Errors
/// [`Error::Format`] with the line and the field that is missing.
pub fn read_problems(path: impl AsRef<Path>) -> Result<Vec<Problem>> {
    records(path.as_ref(), |r| {
        Ok(Problem {
            task_id: r.task_id.ok_or("task_id")?,
            prompt: r.prompt.ok_or("prompt")?,
            entry_point: r.entry_point.ok_or("entry_point")?,
            canonical_solution: r.canonical_solution.ok_or("canonical_solution")?,
            test: r.test.ok_or("test")?,
        })
    })
}

/// Reads the rows of the released file of buggy prefixes.
///
/// # Errors
/// The same as [`read_problems`].
pub fn read_released(path: impl AsRef<Path>) -> Result<Vec<Released>> {
    records(path.as_ref(), |r| {
        Ok(Released {
            task_id: r.task_id.ok_or("task_id")?,
            clean: r.clean_prompt.ok_or("clean_prompt")?,
            buggy: r.buggy_prompt.ok_or("buggy_prompt")?,
        })
    })
}

/// The operator that each operator is flipped to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlipMap(Vec<(&'static str, &'static str)>);

impl FlipMap {
    /// The map of the paper: it exchanges equality and inequality, each order and its opposite, sums and differences, and products and
    /// quotients, also in augmented assignments.
    pub fn paper() -> FlipMap {
        let both = [("==", "!="), (">", "<="), ("<", ">="), ("+", "-"), ("*", "/"), ("+=", "-="), ("*=", "/=")];
        FlipMap(both.iter().flat_map(|&(a, b)| [(a, b), (b, a)]).collect())
    }
    /// A map of your own, as pairs (operator, flipped operator).
    pub fn new(pairs: Vec<(&'static str, &'static str)>) -> FlipMap {
        FlipMap(pairs)
    }
    /// The operators that are flipped.
    pub fn operators(&self) -> Vec<&'static str> {
        self.0.iter().map(|p| p.0).collect()
    }
    /// The operator that `operator` is flipped to; `None` if it is not in the map.
    pub fn flip(&self, operator: &str) -> Option<&'static str> {
        self.0.iter().find(|p| p.0 == operator).map(|p| p.1)
    }
}

/// How sites are turned into rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Every site is used once: 1,896 different rows of HumanEval.
    Corrected,
    /// As in the released file: in a chain of equal operators, such as `a + b + c`, the first operator is flipped once for each of them.
    /// The file has 1,896 rows as well, of which 29 are copies of others.
    AsReleased,
}

/// A binary operator that can be flipped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// The number of the problem.
    pub problem: usize,
    /// Where the operator starts in [`Parts::body`], in bytes.
    pub start: usize,
    /// The operator's line in the body, from 0.
    pub line: usize,
    /// The operator.
    pub operator: String,
    /// The operator that it is flipped to.
    pub flipped: &'static str,
}

/// The two parts of a problem, without blank lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parts {
    /// The specification; ends with a line break.
    pub head: String,
    /// The solution; ends with a line break.
    pub body: String,
}

impl Parts {
    /// The specification and the solution of a problem, without blank lines.
    pub fn of(problem: &Problem) -> Parts {
        Parts { head: without_blank_lines(&problem.prompt), body: without_blank_lines(&problem.canonical_solution) }
    }
    /// The body with one operator flipped.
    pub fn flipped(&self, site: &Site) -> String {
        let end = site.start + site.operator.len();
        format!("{}{}{}", &self.body[..site.start], site.flipped, &self.body[end..])
    }
}

/// A pair of prefixes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The number of the problem.
    pub problem: usize,
    /// The number of the site in [`Generated::sites`].
    pub site: usize,
    /// Lines of the specification.
    pub head_lines: usize,
    /// The line of the flipped operator, counted from the first line of the prefix.
    pub bug_line: usize,
    /// The specification and the first lines of the body, without a line break at the end.
    pub clean: String,
    /// The same text with the operator flipped.
    pub buggy: String,
    /// The rest of the reference body.
    pub rest: String,
}

impl Row {
    /// The clean prefix, completed with the rest of the reference solution.
    pub fn clean_program(&self) -> String {
        format!("{}\n{}", self.clean, self.rest)
    }
    /// The buggy prefix, completed with the rest of the reference solution. This program must fail.
    pub fn buggy_program(&self) -> String {
        format!("{}\n{}", self.buggy, self.rest)
    }
}

/// The result of [`generate`].
#[derive(Clone, Debug, Default)]
pub struct Generated {
    /// All candidate sites.
    pub sites: Vec<Site>,
    /// For each site, whether the program fails with it flipped.
    pub fails: Vec<bool>,
    /// The pairs of prefixes.
    pub rows: Vec<Row>,
    /// Problems that are left out, each with the reason: the reference solution does not pass, or cannot be split into tokens.
    pub left_out: Vec<(String, String)>,
}

impl Generated {
    /// Sites whose flip fails a test.
    pub fn failing(&self) -> usize {
        self.fails.iter().filter(|f| **f).count()
    }
    /// Sites whose flip fails no test.
    pub fn surviving(&self) -> usize {
        self.fails.len() - self.failing()
    }
    /// Sites with at least one row.
    pub fn used_sites(&self) -> usize {
        self.rows.iter().map(|r| r.site).collect::<BTreeSet<_>>().len()
    }
    /// Problems with at least one row.
    pub fn used_problems(&self) -> usize {
        self.rows.iter().map(|r| r.problem).collect::<BTreeSet<_>>().len()
    }
}

/// The sites of a problem. With [`Mode::AsReleased`] every operator of a chain is replaced by the first of the chain.
///
/// # Errors
/// [`Error::Invalid`] with the problem's name if the solution cannot be split into tokens.
pub fn sites(number: usize, problem: &Problem, flips: &FlipMap, mode: Mode) -> Result<Vec<Site>> {
    let body = Parts::of(problem).body;
    let found = operators(&body, &flips.operators())
        .map_err(|e| Error::invalid("buggy::sites", format!("the solution of {}: {e}", problem.task_id)))?;
    let site = |i: usize| {
        let op = match mode {
            Mode::Corrected => &found[i],
            Mode::AsReleased => &found[found[i].chain],
        };
        let flipped = flips.flip(op.text)?;
        Some(Site { problem: number, start: op.start, line: op.line, operator: op.text.into(), flipped })
    };
    Ok((0..found.len()).filter_map(site).collect())
}

/// The rows of a failing site: one for each line from that of the flip to the last but one of the body.
fn rows(parts: &Parts, site: &Site, number: usize) -> Vec<Row> {
    let (clean, buggy) = (parts.body.clone(), parts.flipped(site));
    let (clean, buggy): (Vec<&str>, Vec<&str>) = (clean.lines().collect(), buggy.lines().collect());
    let head_lines = parts.head.lines().count();
    let join = |lines: &[&str]| format!("{}{}", parts.head, lines.join("\n"));
    (site.line + 1..clean.len())
        .map(|end| Row {
            problem: site.problem,
            site: number,
            head_lines,
            bug_line: head_lines + site.line,
            clean: join(&clean[..end]),
            buggy: join(&buggy[..end]),
            rest: clean[end..].iter().flat_map(|l| [l, "\n"]).collect(),
        })
        .collect()
}

/// Makes the buggy prefixes of a set of problems. Every reference solution is run first, then every flip.
///
/// A problem whose reference solution does not pass or cannot be split into tokens is left out, and is listed in [`Generated::left_out`].
///
/// # Errors
/// Those of the judge, and [`Error::Invalid`] if a verdict is [`Verdict::Infrastructure`]: a flip that could not be tested neither fails
/// nor survives.
pub fn generate(problems: &[Problem], flips: &FlipMap, judge: &impl Judge, mode: Mode) -> Result<Generated> {
    let mut out = Generated::default();
    let mut tried: Vec<usize> = Vec::new();
    let parts: Vec<Parts> = problems.iter().map(Parts::of).collect();
    let program = |p: usize, body: &str| Program {
        source: format!("{}{body}", parts[p].head),
        entry_point: problems[p].entry_point.clone(),
        test: problems[p].test.clone(),
    };
    let broken = |p: usize, why: &str| {
        let message = format!("{} was not judged: {why}", problems[p].task_id);
        Error::invalid("buggy::generate", message)
    };
    let mut with_sites = Vec::new();
    for (p, problem) in problems.iter().enumerate() {
        match sites(p, problem, flips, mode) {
            Ok(found) if found.is_empty() => {}
            Ok(found) => {
                tried.push(p);
                with_sites.push(found);
            }
            Err(e) => out.left_out.push((problem.task_id.clone(), e.to_string())),
        }
    }
    let references: Vec<Program> = tried.iter().map(|&p| program(p, &parts[p].body)).collect();
    for ((&p, found), verdict) in tried.iter().zip(with_sites).zip(judge.judge(&references)?) {
        match verdict {
            Verdict::Passed => out.sites.extend(found),
            Verdict::Infrastructure(why) => return Err(broken(p, &why)),
            other => {
                out.left_out.push((problems[p].task_id.clone(), format!("its own solution does not pass: {other}")))
            }
        }
    }
    let flipped: Vec<Program> = out.sites.iter().map(|s| program(s.problem, &parts[s.problem].flipped(s))).collect();
    for (number, verdict) in judge.judge(&flipped)?.into_iter().enumerate() {
        if let Verdict::Infrastructure(why) = verdict {
            return Err(broken(out.sites[number].problem, &why));
        }
        let fails = verdict != Verdict::Passed;
        out.fails.push(fails);
        if fails {
            let site = &out.sites[number];
            out.rows.extend(rows(&parts[site.problem], site, number));
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::Scratch;

    #[test]
    fn bad_files_are_sentences() {
        let folder = Scratch::new("problems");
        let error = |text: &str| {
            let path = folder.join("problems.jsonl");
            std::fs::write(&path, text).unwrap();
            read_problems(&path).unwrap_err().to_string()
        };
        assert!(error("").contains("no problems"));
        assert!(error("{\n").contains("line 1: not a JSON object"));
        let whole = r#"{"task_id": "a", "prompt": "", "entry_point": "f", "test": "", "canonical_solution": ""}"#;
        for field in ["task_id", "prompt", "entry_point", "canonical_solution", "test"] {
            let without = whole.replace(&format!("{field:?}:"), "\"another\":");
            let text = error(&format!("{whole}\n\n{without}\n"));
            assert!(text.contains(&format!("line 3: no field {field:?}")), "{text}");
        }
        assert!(error(r#"{"task_id": 3}"#).contains("line 1"));
    }
}
