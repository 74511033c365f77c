//! A small language that is a part of Python, and families of problems in it. A model of a million parameters, trained on two cores, solves
//! most of them, so that completion can be studied without a large model.
//!
//! The rules of [`generate`](super::buggy::generate) hold for it unchanged. [`Interpreter`] is its judge, whose verdicts agree with
//! Python's.

pub mod families;
pub mod model;
pub mod run;

pub use families::{Choice, Family, families};
pub use model::{Coder, Training, Vocabulary};
pub use run::Interpreter;

use super::buggy::{Parts, Problem, Row};
use super::python::{Token, operators, tokens};
use crate::base::Result;
use crate::random::Rng;

/// Training programs, and problems whose combinations of family, constants and names do not occur in training.
pub struct Corpus {
    /// Whole programs.
    pub train: Vec<String>,
    /// Problems for choosing settings.
    pub validation: Vec<Problem>,
    /// Problems that should be used only once, for the final result.
    pub test: Vec<Problem>,
}

impl Corpus {
    /// Makes `programs` training programs, and `each` problems of every family for validation and as many for test.
    ///
    /// # Errors
    /// Those of [`Choice::problem`].
    pub fn new(programs: usize, each: usize, seed: u64) -> Result<Corpus> {
        let all = families();
        let mut rng = Rng::new(seed);
        let mut train = Vec::with_capacity(programs);
        while train.len() < programs {
            let f = rng.below(all.len() as u64) as usize;
            let choice = Choice::draw(f, &mut rng);
            if choice.part(&all[f]) > 1 {
                let (prompt, body) = choice.program(&all[f], rng.below(12) as usize);
                train.push(prompt + &body);
            }
        }
        // The problems are the same for every seed of a model.
        let mut rng = Rng::new(0x6d69_6e69);
        let mut parts = [Vec::new(), Vec::new()];
        for (f, family) in all.iter().enumerate() {
            let mut found = [0; 2];
            for _ in 0..400 {
                let choice = Choice::draw(f, &mut rng);
                let (style, part) = (rng.below(12) as usize, choice.part(family) as usize);
                if part < 2 && found[part] < each {
                    found[part] += 1;
                    parts[part].push(choice.problem(family, style, 1 + f as u64)?);
                }
            }
        }
        let [test, validation] = parts;
        Ok(Corpus { train, validation, test })
    }
}

/// The prefix of a row with the operands of its flipped operator exchanged and the operator adapted (`x < y` becomes `y > x`, `a + b`
/// becomes `b + a`, `s += x` becomes `s = x + s`). The meaning stays the same, and the text is as unusual as after a flip. `None` if there
/// is no such edit.
pub fn same_meaning(row: &Row, clean: &Parts, operator_start: usize) -> Option<String> {
    let mut lines: Vec<String> = row.clean.lines().map(str::to_string).collect();
    let line = lines.get(row.bug_line)?.clone();
    let line_start = clean.body[..operator_start].rfind('\n').map_or(0, |i| i + 1);
    let at = operator_start - line_start;
    let all = tokens(&line).ok()?;
    let here = all.iter().position(|t| t.start == at)?;
    let (op, depth) = (all[here].text, all[here].depth);
    let turned = match op {
        "<" => ">",
        ">" => "<",
        "<=" => ">=",
        ">=" => "<=",
        "==" | "!=" | "+" | "*" => op,
        "+=" | "*=" => "=",
        _ => return None,
    };
    let before = line[..at].trim_end();
    let after = line[at + op.len()..].trim();
    let edited = if turned == "=" {
        // The addition of lists does not commute.
        if after.starts_with('[') {
            return None;
        }
        let simple = operators(after, &["+", "-"]).ok()?.is_empty() || op == "+=";
        let value = if simple { after.to_string() } else { format!("({after})") };
        format!("{before} = {value} {} {}", &op[..1], before.trim_start())
    } else {
        let ends = |t: &Token| {
            t.depth < depth
                || (t.depth == depth
                    && matches!(t.text, "if" | "while" | "return" | "in" | "=" | "+=" | "-=" | "," | ":"))
        };
        let left = all[..here].iter().rposition(ends).map_or(0, |i| i + 1);
        let right = all[here..].iter().position(ends).map_or(all.len(), |i| here + i);
        let other = |t: &Token| t.depth == depth && t.start != at && matches!(t.text, "+" | "-" | "*" | "/" | "==");
        if matches!(op, "+" | "*") && all[left..right].iter().any(other) {
            return None;
        }
        let (from, to) = (all[left].start, all[right - 1].start + all[right - 1].text.len());
        let (a, b) = (line[from..at].trim(), line[at + op.len()..to].trim());
        format!("{}{b} {turned} {a}{}", &line[..from], &line[to..])
    };
    if edited == line {
        return None;
    }
    lines[row.bug_line] = edited;
    Some(lines.join("\n"))
}

/// The clean prefix of a row in which one variable of the flipped line, not a parameter, has a name that training programs do not use.
/// `None` if the line has no such variable.
pub fn renamed(row: &Row) -> Option<String> {
    let line = row.clean.lines().nth(row.bug_line)?;
    let head = row.clean.lines().next()?;
    let words = |text: &str| -> Vec<String> {
        text.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).map(str::to_string).collect()
    };
    let parameters = words(head);
    let is_name = |w: &str| families::is_name(w) && !parameters.iter().any(|p| p == w);
    let name = words(line).into_iter().find(|w| is_name(w))?;
    let spare = families::SPARE[0];
    let mut out = String::with_capacity(row.clean.len());
    let mut word = String::new();
    for c in row.clean.chars().chain(['\n']) {
        if c.is_alphanumeric() {
            word.push(c);
        } else {
            out.push_str(if word == name { spare } else { &word });
            word.clear();
            out.push(c);
        }
    }
    out.pop();
    Some(out)
}
