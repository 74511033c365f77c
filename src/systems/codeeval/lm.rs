//! The interface to a language model of code, and a GPT with its tokenizer as a model of Python.

use super::buggy::FlipMap;
use super::locate::{Doubt, KINDS};
use super::python::{cut_completion, operators};
use crate::array::Array;
use crate::autograd::no_grad;
use crate::base::{Error, Result};
use crate::data::{IGNORE, Tokenizer};
use crate::models::{Gpt, LanguageModel, Sampling, generate};
use crate::nn::Ctx;
use crate::ops::loss::{CrossEntropy, cross_entropy};

/// How completions are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Number of completions of each prefix.
    pub samples: usize,
    /// Divides the logits; at 0 the most likely token is taken.
    pub temperature: f64,
    /// Seed of the draws; the same seed gives the same texts.
    pub seed: u64,
}

/// A language model of code.
pub trait CodeModel {
    /// Whole programs that begin with each prefix, `draw.samples` for each.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a prefix that the model cannot read.
    fn complete(&self, prefixes: &[String], draw: &Draw) -> Result<Vec<Vec<String>>>;
    /// For each text, its binary operators from left to right, with the probabilities of the next token at their positions. Only operators
    /// of the same kind are compared: orders and equalities, sums and products, or augmented assignments.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a text that the model cannot read.
    fn doubts(&self, texts: &[String]) -> Result<Vec<Vec<Doubt>>>;
    /// A text in which the operator of a doubt is replaced by the one that the model finds most likely.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the text has no operator there.
    fn replaced(&self, text: &str, doubt: &Doubt) -> Result<String>;
}

/// The most tokens of a completion (the paper's number for HumanEval).
pub const LONGEST_COMPLETION: usize = 300;

/// A GPT with its tokenizer as a model of Python. The place of a [`Doubt`] is the byte at which the operator starts.
pub struct CodeLm<'a> {
    model: &'a Gpt,
    tokenizer: &'a dyn Tokenizer,
    flips: FlipMap,
}

/// An operator in a text that was tokenized with cuts around each operator.
struct Site<'a> {
    /// The number of the operator's first token.
    token: usize,
    /// The space before the operator, if any, which belongs to its token.
    space: &'static str,
    text: &'a str,
    start: usize,
    line: usize,
}

impl<'a> CodeLm<'a> {
    /// A model `model` that reads and writes with `tokenizer`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if the tokenizer has more tokens than the model.
    pub fn new(model: &'a Gpt, tokenizer: &'a dyn Tokenizer) -> Result<CodeLm<'a>> {
        if tokenizer.vocab_size() > model.vocabulary() {
            let message = format!(
                "the tokenizer has {} tokens, the model {}; they do not belong together",
                tokenizer.vocab_size(),
                model.vocabulary()
            );
            return Err(Error::invalid("CodeLm", message));
        }
        Ok(CodeLm { model, tokenizer, flips: FlipMap::paper() })
    }

    /// The tokens of a text, which is cut before and after every operator, and the operators. The first token is the end-of-text token.
    fn cut<'t>(&self, text: &'t str) -> Result<(Vec<u32>, Vec<Site<'t>>)> {
        let (mut ids, mut sites) = (vec![self.tokenizer.end_of_text()], Vec::new());
        let mut from = 0;
        for op in operators(text, &KINDS.concat())? {
            let space = if text[from..op.start].ends_with(' ') { " " } else { "" };
            let (start, end) = (op.start - space.len(), op.start + op.text.len());
            ids.extend(self.tokenizer.encode(&text[from..start]));
            sites.push(Site { token: ids.len(), space, text: op.text, start: op.start, line: op.line });
            ids.extend(self.tokenizer.encode(&text[start..end]));
            from = end;
        }
        ids.extend(self.tokenizer.encode(&text[from..]));
        Ok((ids, sites))
    }

    /// The log-probability of each of `tokens` after `context`. The model reads the last part of the context, up to its number of
    /// positions.
    fn next(&self, context: &[u32], tokens: &[u32]) -> Result<Vec<f64>> {
        let context = &context[context.len().saturating_sub(self.model.positions())..];
        let ids = Array::from_slice(context, &[1, context.len()])?;
        let logits = no_grad(|| self.model.forward(&ids, &Ctx::eval()))?;
        let last = logits.array().slice(1, context.len() - 1..context.len())?.to_f64();
        Ok(log_probabilities(&last, tokens))
    }

    fn doubts_of(&self, text: &str) -> Result<Vec<Doubt>> {
        let (ids, sites) = self.cut(text)?;
        let Some(last) = sites.last() else { return Ok(Vec::new()) };
        // The last operator's own tokens are not read.
        let skipped = last.token.saturating_sub(self.model.positions());
        let seen = &ids[skipped..last.token];
        let logits = no_grad(|| self.model.forward(Array::from_slice(seen, &[1, seen.len()])?, &Ctx::eval()))?;
        let mut out = Vec::new();
        for site in sites.iter().filter(|s| s.token > skipped) {
            let Some(kind) = KINDS.iter().find(|k| k.contains(&site.text)) else { continue };
            let at = site.token - 1 - skipped;
            let row = logits.array().slice(1, at..at + 1)?.to_f64();
            let pieces: Vec<Vec<u32>> =
                kind.iter().map(|o| self.tokenizer.encode(&format!("{}{o}", site.space))).collect();
            let firsts: Vec<u32> = pieces.iter().map(|p| p[0]).collect();
            let mut p: Vec<f64> = log_probabilities(&row, &firsts).into_iter().map(f64::exp).collect();
            // The probability of an operator of several tokens is the product over its tokens. If one operator's tokens begin another's,
            // the longer one's probability is subtracted from the shorter one's.
            for (p, piece) in p.iter_mut().zip(&pieces) {
                for known in 1..piece.len() {
                    let context = [&ids[..site.token], &piece[..known]].concat();
                    *p *= self.next(&context, &piece[known..=known])?[0].exp();
                }
            }
            let whole = p.clone();
            for (i, short) in pieces.iter().enumerate() {
                let longer = |j: usize| pieces[j].len() > short.len() && pieces[j].starts_with(short);
                p[i] -= (0..pieces.len()).filter(|&j| longer(j)).map(|j| whole[j]).sum::<f64>();
                p[i] = p[i].max(0.0);
            }
            let Some(observed) = kind.iter().position(|o| *o == site.text) else { continue };
            let best = (0..kind.len()).fold(observed, |b, i| if p[i] > p[b] { i } else { b });
            out.push(Doubt {
                place: site.start,
                line: site.line,
                observed: p[observed],
                best: p[best],
                kind: p.iter().sum(),
                instead: kind[best].to_string(),
            });
        }
        Ok(out)
    }

    /// Doubts from the whole text for each operator that can be flipped. The probability of an operator is `L(text) / (L(text) + L(text
    /// with it flipped))`, where L is the likelihood that the model gives to the operator and to all that follows. Unlike
    /// [`CodeModel::doubts`] it uses the text on both sides of the operator.
    ///
    /// `ends` are the lengths in bytes of some prefixes of the text, each of whole lines. The doubts of each prefix are returned as if the
    /// prefix had been read by itself.
    ///
    /// # Errors [`Error::Invalid`] if the text cannot be split into tokens of Python.
    pub fn whole_doubts(&self, text: &str, ends: &[usize]) -> Result<Vec<Vec<Doubt>>> {
        let found = operators(text, &self.flips.operators())?;
        let flipped: Vec<(String, &'static str)> = (found.iter())
            .filter_map(|op| {
                let other = self.flips.flip(op.text)?;
                Some((format!("{}{other}{}", &text[..op.start], &text[op.start + op.text.len()..]), other))
            })
            .collect();
        let texts: Vec<&str> = std::iter::once(text).chain(flipped.iter().map(|f| f.0.as_str())).collect();
        let (first, losses) = self.losses(&texts)?;
        // The loss in nats of the tokens that begin before a position.
        let until = |of: &[(usize, f64)], end: usize| of.iter().filter(|t| t.0 < end).map(|t| t.1).sum::<f64>();
        let of = |end: usize| {
            let mut out = Vec::new();
            for ((op, (_, other)), other_losses) in found.iter().zip(&flipped).zip(&losses[1..]) {
                if op.start < first || op.start >= end {
                    continue;
                }
                let there = until(&losses[0], end);
                let instead = until(other_losses, end + other.len() - op.text.len());
                let p = 1.0 / (1.0 + (there - instead).exp());
                let instead = if p < 0.5 { other } else { op.text };
                out.push(Doubt {
                    place: op.start,
                    line: op.line,
                    observed: p,
                    best: p.max(1.0 - p),
                    kind: 1.0,
                    instead: instead.to_string(),
                });
            }
            out
        };
        Ok(ends.iter().map(|&end| of(end)).collect())
    }

    /// For each text, the byte at which each token begins and the token's loss in nats. Texts that are longer than the model's positions
    /// lose the same number of tokens at the left; the byte that is returned is where the rest begins. All texts must be equal before it.
    #[allow(clippy::type_complexity)]
    fn losses(&self, texts: &[&str]) -> Result<(usize, Vec<Vec<(usize, f64)>>)> {
        // A flip may need a few more tokens.
        const SPARE: usize = 8;
        let encoded: Vec<Vec<u32>> = texts.iter().map(|t| self.tokenizer.encode(t)).collect();
        let skipped = encoded[0].len().saturating_sub(self.model.positions().saturating_sub(SPARE).max(1));
        let length = |id: u32| self.tokenizer.token_bytes(id).map_or(0, <[u8]>::len);
        let first = encoded[0][..skipped].iter().map(|&id| length(id)).sum();
        let mut out = Vec::new();
        for part in encoded.chunks(8) {
            // Every row begins with the end-of-text token.
            let rows: Vec<Vec<u32>> = (part.iter())
                .map(|ids| {
                    let ids = &ids[skipped.min(ids.len())..];
                    let fits = ids.len().min(self.model.positions());
                    std::iter::once(self.tokenizer.end_of_text()).chain(ids[..fits].iter().copied()).collect()
                })
                .collect();
            let t = rows.iter().map(|r| r.len() - 1).max().unwrap_or(0).max(1);
            let (mut x, mut y) = (vec![0; rows.len() * t], vec![IGNORE; rows.len() * t]);
            for (r, row) in rows.iter().enumerate() {
                let n = row.len() - 1;
                x[r * t..r * t + n].copy_from_slice(&row[..n]);
                y[r * t..r * t + n].copy_from_slice(&row[1..]);
            }
            let x = Array::from_slice(&x, &[rows.len(), t])?;
            let losses = no_grad(|| {
                let n = rows.len() * t;
                let logits = self.model.forward(&x, &Ctx::eval())?.reshape(&[n, self.model.vocabulary()])?;
                cross_entropy(&logits, Array::from_slice(&y, &[n])?, &CrossEntropy::default())
            })?;
            let losses = losses.array().to_f64();
            for (row, losses) in rows.iter().zip(losses.chunks(t)) {
                let mut at = first;
                let of = |(&id, &loss): (&u32, &f64)| {
                    let start = at;
                    at += length(id);
                    (start, loss)
                };
                out.push(row[1..].iter().zip(losses).map(of).collect());
            }
        }
        Ok((first, out))
    }
}

/// The logarithm of the softmax for some tokens.
fn log_probabilities(logits: &[f64], tokens: &[u32]) -> Vec<f64> {
    let top = logits.iter().copied().fold(f64::MIN, f64::max);
    let total = logits.iter().map(|l| (l - top).exp()).sum::<f64>().ln();
    tokens.iter().map(|&t| logits[t as usize] - top - total).collect()
}

impl CodeModel for CodeLm<'_> {
    /// A prefix must end without a line break. The completion is cut at the first statement at module level ([`cut_completion`]).
    fn complete(&self, prefixes: &[String], draw: &Draw) -> Result<Vec<Vec<String>>> {
        let stop = self.tokenizer.end_of_text();
        let one = |(number, prefix): (usize, &String)| {
            let prompt: Vec<u32> = std::iter::once(stop).chain(self.tokenizer.encode(prefix)).collect();
            let sample = |s: usize| {
                let seed = draw.seed.wrapping_mul(1_000_003) ^ ((number as u64) << 20) ^ s as u64;
                let sampling = Sampling { temperature: draw.temperature, seed, ..Sampling::default() };
                let ids = generate(self.model, &prompt, LONGEST_COMPLETION, &sampling, Some(stop))?;
                let text = self.tokenizer.decode(&ids)?;
                let (line, rest) = text.split_once('\n').unwrap_or((&text, ""));
                Ok(format!("{prefix}{line}\n{}", cut_completion(rest)))
            };
            (0..draw.samples).map(sample).collect()
        };
        prefixes.iter().enumerate().map(one).collect()
    }
    fn doubts(&self, texts: &[String]) -> Result<Vec<Vec<Doubt>>> {
        texts.iter().map(|t| self.doubts_of(t)).collect()
    }
    fn replaced(&self, text: &str, doubt: &Doubt) -> Result<String> {
        match operators(text, &KINDS.concat())?.into_iter().find(|o| o.start == doubt.place) {
            Some(op) => Ok(format!("{}{}{}", &text[..op.start], doubt.instead, &text[op.start + op.text.len()..])),
            None => Err(Error::invalid("CodeLm::replaced", format!("no operator at byte {}", doubt.place))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::ByteTokenizer;
    use crate::models::GptConfig;

    const TEXT: &str = "def f(a, b):\n    if a <= b:\n        a += -b\n    return a*b - 1";

    fn model(positions: usize) -> Gpt {
        let gpt = Gpt::new(GptConfig::small(257, positions, 1, 16, 2), 3).unwrap();
        // The weights are larger than initial values usually are, so that probabilities differ.
        for p in gpt.params().all() {
            let value = p.value();
            p.set(Array::generate(value.shape(), value.dtype(), |i| 0.4 * (i as f64 * 0.7).sin())).unwrap();
        }
        gpt
    }

    /// Compares with the definition: each candidate after the text before the operator, token by token.
    #[test]
    fn doubts_are_probabilities_of_operators() {
        let gpt = model(128);
        let lm = CodeLm::new(&gpt, &ByteTokenizer).unwrap();
        let doubts = &lm.doubts(&[TEXT.to_string()]).unwrap()[0];
        let places: Vec<&str> = doubts.iter().map(|d| &TEXT[d.place..d.place + 2]).collect();
        assert_eq!(places, ["<=", "+=", "*b", "- "]);
        assert_eq!(doubts.iter().map(|d| d.line).collect::<Vec<_>>(), [1, 2, 3, 3]);
        let log_p = |before: &str, what: &str| -> f64 {
            let mut ids: Vec<u32> = vec![256];
            ids.extend(ByteTokenizer.encode(before));
            let mut sum = 0.0;
            for id in ByteTokenizer.encode(what) {
                sum += lm.next(&ids, &[id]).unwrap()[0];
                ids.push(id);
            }
            sum
        };
        let before = &TEXT[..doubts[0].place - 1];
        let p = log_p(before, " <=").exp();
        assert!((doubts[0].observed - p).abs() < 1e-9, "{} {p}", doubts[0].observed);
        let less = log_p(before, " <").exp() - p;
        let all = ["==", "!=", ">="].map(|o| log_p(before, &format!(" {o}")).exp());
        let more = log_p(before, " >").exp() - all[2];
        let best = all.into_iter().chain([less, more, p]).fold(0.0, f64::max);
        assert!((doubts[0].best - best).abs() < 1e-9);
        let kind = all.into_iter().chain([less, more, p]).sum::<f64>();
        assert!((doubts[0].given_kind().observed - p / kind).abs() < 1e-9);
        let p = log_p(&TEXT[..doubts[2].place], "*").exp();
        assert!((doubts[2].observed - p).abs() < 1e-9, "an operator without a space");
    }

    #[test]
    fn whole_texts_compare_both_sides() {
        let gpt = model(128);
        let lm = CodeLm::new(&gpt, &ByteTokenizer).unwrap();
        let two_lines = TEXT.find("\n        a").unwrap();
        let all = lm.whole_doubts(TEXT, &[two_lines, TEXT.len()]).unwrap();
        assert_eq!((all[0].len(), all[1].len()), (1, 4));
        let nats = |text: &str| lm.losses(&[text]).unwrap().1[0].iter().map(|t| t.1).sum::<f64>();
        for (doubts, end) in all.iter().zip([two_lines, TEXT.len()]) {
            for d in doubts {
                let op = operators(TEXT, &KINDS.concat()).unwrap().into_iter().find(|o| o.start == d.place).unwrap();
                let other = FlipMap::paper().flip(op.text).unwrap();
                let flipped = format!("{}{other}{}", &TEXT[..op.start], &TEXT[op.start + op.text.len()..end]);
                let p = 1.0 / (1.0 + (nats(&TEXT[..end]) - nats(&flipped)).exp());
                assert!((p - d.observed).abs() < 1e-4, "{p} {d:?}");
            }
        }
        assert!(lm.whole_doubts("x = 'a", &[6]).unwrap_err().to_string().contains("does not end"));
    }

    /// Text that does not fit is left out on the left, and operators in the rest are still judged.
    #[test]
    fn long_texts_are_cut_on_the_left() {
        let gpt = model(32);
        let lm = CodeLm::new(&gpt, &ByteTokenizer).unwrap();
        // The first of the four operators is more than 32 bytes before the last.
        assert_eq!(lm.doubts(&[TEXT.to_string()]).unwrap()[0].len(), 3);
        assert_eq!(lm.whole_doubts(TEXT, &[TEXT.len()]).unwrap()[0].len(), 3);
        let few = Gpt::new(GptConfig::small(200, 32, 1, 16, 2), 0).unwrap();
        assert!(CodeLm::new(&few, &ByteTokenizer).err().unwrap().to_string().contains("do not belong together"));
    }

    #[test]
    fn completions_begin_with_their_prefix() {
        let gpt = model(32);
        let lm = CodeLm::new(&gpt, &ByteTokenizer).unwrap();
        let draw = Draw { samples: 2, temperature: 1.0, seed: 1 };
        let prefix = "def f(a):".to_string();
        let all = lm.complete(std::slice::from_ref(&prefix), &draw).unwrap();
        assert_eq!(all[0].len(), 2);
        assert!(all[0].iter().all(|t| t.starts_with(&prefix)) && all[0][0] != all[0][1]);
        let doubt = Doubt { place: 20, line: 1, observed: 0.0, best: 1.0, kind: 1.0, instead: ">".into() };
        assert_eq!(&lm.replaced(TEXT, &Doubt { place: 22, ..doubt.clone() }).unwrap()[13..27], "    if a > b:\n");
        assert!(lm.replaced(TEXT, &doubt).unwrap_err().to_string().contains("no operator at byte 20"));
    }
}
