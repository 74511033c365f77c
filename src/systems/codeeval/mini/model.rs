//! The language model of the mini language: its vocabulary, its training, sampling of many continuations at once, and its probabilities at
//! an operator.

use super::families::{Choice, SPARE, families};
use crate::array::Array;
use crate::autograd::no_grad;
use crate::base::{Error, Result};
use crate::data::IGNORE;
use crate::models::{Gpt, GptConfig, LanguageModel, Sampling};
use crate::nn::{Ctx, KvCache};
use crate::optim::{AdamW, Schedule};
use crate::random::Rng;
use crate::step::PlainStep;
use crate::systems::codeeval::lm::{CodeModel, Draw};
use crate::systems::codeeval::locate::{Doubt, KINDS};
use std::collections::{BTreeMap, BTreeSet};

/// Operators of two characters, which are one piece.
const TWO: [&str; 10] = ["==", "!=", "<=", ">=", "+=", "-=", "*=", "/=", "//", "**"];
/// Words after which a minus sign is unary.
const WORDS: [&str; 6] = ["return", "if", "while", "in", "for", "else"];

/// Splits a text into pieces: words, digits, operators, and line breaks together with the indentation that follows.
fn pieces(text: &str) -> Vec<&str> {
    let bytes = text.as_bytes();
    let (mut out, mut i) = (Vec::new(), 0);
    while i < bytes.len() {
        let rest = &text[i..];
        let length = match bytes[i] {
            b' ' => {
                i += 1;
                continue;
            }
            b'\n' => 1 + bytes[i + 1..].iter().take_while(|b| **b == b' ').count(),
            b if b.is_ascii_alphabetic() => rest.find(|c: char| !c.is_alphabetic()).unwrap_or(rest.len()),
            _ if TWO.iter().any(|t| rest.starts_with(t)) => 2,
            _ => rest.chars().next().map_or(1, char::len_utf8),
        };
        out.push(&rest[..length]);
        i += length;
    }
    out
}

/// The pieces of the mini language, each of which is a token.
#[derive(Clone, Debug)]
pub struct Vocabulary {
    pieces: Vec<String>,
    ids: BTreeMap<String, u32>,
}

impl Default for Vocabulary {
    fn default() -> Vocabulary {
        Vocabulary::new()
    }
}

impl Vocabulary {
    /// The vocabulary of all families.
    pub fn new() -> Vocabulary {
        let mut all: BTreeSet<String> = BTreeSet::new();
        for text in Choice::every(&families()) {
            all.extend(pieces(&text).into_iter().map(str::to_string));
        }
        let more = ["==", "!=", "<=", ">=", "<", ">", "+", "-", "*", "/", "+=", "-=", "*=", "/=", "#", "\n", "("];
        all.extend(more.iter().chain(&SPARE).map(|s| s.to_string()));
        all.extend((0..10).map(|d| d.to_string()));
        all.extend((0..5).map(|d| format!("\n{}", "    ".repeat(d))));
        let pieces: Vec<String> = [String::new()].into_iter().chain(all).collect();
        let ids = pieces.iter().enumerate().map(|(i, p)| (p.clone(), i as u32)).collect();
        Vocabulary { pieces, ids }
    }
    /// Number of tokens.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.pieces.len()
    }
    /// The token that ends a program.
    pub fn end(&self) -> u32 {
        0
    }
    /// The tokens of a text.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the first piece that the language does not have.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let id = |p: &&str| {
            let found = self.ids.get(*p).copied();
            found.ok_or_else(|| Error::invalid("Vocabulary::encode", format!("{p:?} is no piece of the mini language")))
        };
        pieces(text).iter().map(id).collect()
    }
    /// The text of tokens. It encodes to the same tokens, though its spaces may differ from those of the original text.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut out = String::new();
        let mut before = "\n";
        for &id in ids.iter().filter(|&&i| i != self.end()) {
            let piece = self.pieces.get(id as usize).map_or("", String::as_str);
            let digit = |p: &str| p.bytes().all(|b| b.is_ascii_digit());
            let tight = before.starts_with('\n')
                || piece.starts_with('\n')
                || matches!(before, "(" | "[")
                || matches!(piece, ")" | "]" | "," | ":")
                || (matches!(piece, "(" | "[") && before.chars().all(char::is_alphabetic) && before != "in")
                || (piece == "[" && before == "]")
                || (digit(before) && digit(piece));
            if !tight {
                out.push(' ');
            }
            out.push_str(piece);
            before = piece;
        }
        out
    }
    /// The token of a piece, such as an operator; `None` if there is none.
    pub fn id(&self, piece: &str) -> Option<u32> {
        self.ids.get(piece).copied()
    }
    /// Positions in `ids` of the binary operators whose tokens are in `which`.
    pub fn operators(&self, ids: &[u32], which: &[u32]) -> Vec<usize> {
        let operand = |id: u32| {
            let p = self.pieces[id as usize].as_str();
            let word = p.chars().next().is_some_and(char::is_alphanumeric);
            (word && !WORDS.contains(&p)) || matches!(p, ")" | "]")
        };
        // The specification is a comment, in which no operators are counted.
        let line = self.ids.get("\n    ").copied();
        let head = ids.iter().enumerate().filter(|(_, id)| Some(**id) == line).nth(1).map_or(ids.len(), |(i, _)| i);
        (head..ids.len()).filter(|&i| i > 0 && which.contains(&ids[i]) && operand(ids[i - 1])).collect()
    }
}

/// How a model is trained.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Training {
    /// Width.
    pub width: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Number of attention heads.
    pub heads: usize,
    /// Number of steps.
    pub steps: u64,
    /// Number of programs in a step.
    pub batch: usize,
    /// The peak learning rate.
    pub rate: f64,
    /// Seed of initial values and of the order of programs.
    pub seed: u64,
}

impl Default for Training {
    /// 0.8 million parameters, 1,200 steps of 32 programs.
    fn default() -> Training {
        Training { width: 128, layers: 4, heads: 4, steps: 1200, batch: 32, rate: 2e-3, seed: 0 }
    }
}

/// The most tokens of a program.
pub const LONGEST: usize = 160;

/// A language model of the mini language.
pub struct Coder {
    /// The model.
    pub model: Gpt,
    /// Its vocabulary.
    pub vocabulary: Vocabulary,
}

impl Coder {
    /// Trains a model on programs. `each` is called after every step with its number, the number of tokens so far and the loss of the
    /// batch.
    ///
    /// # Errors
    /// Those of [`Gpt::new`] and [`PlainStep`]; [`Error::Invalid`] without programs.
    pub fn train(programs: &[String], training: &Training, mut each: impl FnMut(u64, usize, f64)) -> Result<Coder> {
        let vocabulary = Vocabulary::new();
        if programs.is_empty() {
            return Err(Error::invalid("Coder::train", "no programs to train on"));
        }
        let rows: Vec<Vec<u32>> = programs
            .iter()
            .map(|p| {
                let mut ids = vocabulary.encode(p)?;
                ids.push(vocabulary.end());
                ids.truncate(LONGEST + 1);
                Ok(ids)
            })
            .collect::<Result<_>>()?;
        let config = GptConfig::small(vocabulary.len(), LONGEST, training.layers, training.width, training.heads);
        let model = Gpt::new(config, training.seed)?;
        let warmup = (training.steps / 20).max(1);
        let schedule = Schedule::cosine(training.rate, warmup, training.steps);
        let mut step = PlainStep::new(&model.params().all(), AdamW::default(), schedule)?;
        let mut rng = Rng::new(training.seed ^ 0x0074_7261_696e);
        let mut tokens = 0;
        for t in 0..training.steps {
            let batch: Vec<&Vec<u32>> =
                (0..training.batch).map(|_| &rows[rng.below(rows.len() as u64) as usize]).collect();
            let (x, y) = padded(&batch, vocabulary.end())?;
            tokens += batch.iter().map(|r| r.len() - 1).sum::<usize>();
            let report = step.run_one(|| model.losses(&x, &y, &Ctx::train(t)))?;
            each(t + 1, tokens, report.loss()?);
        }
        Ok(Coder { model, vocabulary })
    }
    fn continue_all(
        &self,
        starts: &[&Vec<u32>],
        length: usize,
        sampling: &Sampling,
        rngs: &mut [Rng],
    ) -> Result<Vec<Vec<u32>>> {
        let (b, vocab) = (starts.len(), self.vocabulary.len());
        let mut texts: Vec<Vec<u32>> = starts.iter().map(|s| s.to_vec()).collect();
        let mut caches = vec![KvCache::default(); self.model.layers()];
        let mut ended = vec![false; b];
        let mut past = 0;
        while past < LONGEST.min(length + 110) && !ended.iter().all(|e| *e) {
            let new = if past == 0 { length } else { 1 };
            let ids: Vec<u32> = texts.iter().flat_map(|t| t[past..past + new].iter().copied()).collect();
            let ids = Array::from_slice(&ids, &[b, new])?;
            let logits = no_grad(|| self.model.forward_cached(&ids, &mut caches, past, &Ctx::eval()))?;
            past += new;
            let last = logits.array().slice(1, new - 1..new)?.to_f64();
            for r in 0..b {
                let next = match ended[r] {
                    true => self.vocabulary.end(),
                    false => sampling.draw(&last[r * vocab..(r + 1) * vocab], &mut rngs[r]),
                };
                ended[r] |= next == self.vocabulary.end();
                texts[r].push(next);
            }
        }
        Ok(texts)
    }
}

impl CodeModel for Coder {
    /// Each sample has its own random numbers, which depend only on the seed, the number of the prefix and the number of the sample.
    fn complete(&self, prefixes: &[String], draw: &Draw) -> Result<Vec<Vec<String>>> {
        let (count, seed) = (draw.samples, draw.seed);
        let sampling = Sampling { temperature: draw.temperature, top_p: 1.0, ..Sampling::default() };
        sampling.validate()?;
        let encoded: Vec<Vec<u32>> = prefixes.iter().map(|p| self.vocabulary.encode(p)).collect::<Result<_>>()?;
        let mut by_length: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (i, ids) in encoded.iter().enumerate() {
            by_length.entry(ids.len()).or_default().push(i);
        }
        let mut out = vec![Vec::new(); prefixes.len()];
        // The number of rows is large enough to keep the cores busy and small enough for their caches.
        let together = (256 / count.max(1)).max(1);
        for (length, group) in by_length {
            for part in group.chunks(together) {
                let rows = part.iter().flat_map(|&p| (0..count).map(move |s| (p, s)));
                let rngs = rows.map(|(p, s)| Rng::new(seed.wrapping_mul(1_000_003) ^ ((p as u64) << 20) ^ s as u64));
                let starts: Vec<&Vec<u32>> =
                    part.iter().flat_map(|&p| std::iter::repeat_n(&encoded[p], count)).collect();
                let texts = self.continue_all(&starts, length, &sampling, &mut rngs.collect::<Vec<_>>())?;
                for (k, text) in texts.into_iter().enumerate() {
                    out[part[k / count]].push(self.vocabulary.decode(&text));
                }
            }
        }
        Ok(out)
    }
    fn doubts(&self, texts: &[String]) -> Result<Vec<Vec<Doubt>>> {
        let kinds: Vec<Vec<u32>> =
            KINDS.iter().map(|k| k.iter().filter_map(|o| self.vocabulary.id(o)).collect()).collect();
        let all = kinds.concat();
        let encoded: Vec<Vec<u32>> = texts
            .iter()
            .map(|t| {
                let mut ids = self.vocabulary.encode(t)?;
                ids.truncate(LONGEST);
                Ok(ids)
            })
            .collect::<Result<_>>()?;
        let vocab = self.vocabulary.len();
        let mut out = Vec::new();
        for part in encoded.chunks(64) {
            let (x, _) = padded(&part.iter().collect::<Vec<_>>(), self.vocabulary.end())?;
            let t = x.shape()[1];
            let logits = no_grad(|| self.model.forward(&x, &Ctx::eval()))?.array().to_f64();
            for (r, ids) in part.iter().enumerate() {
                let of = |&place: &usize| {
                    let row = &logits[(r * t + place - 1) * vocab..][..vocab];
                    let top = row.iter().copied().fold(f64::MIN, f64::max);
                    let total: f64 = row.iter().map(|l| (l - top).exp()).sum();
                    let p = |id: u32| (row[id as usize] - top).exp() / total;
                    let kind = kinds.iter().find(|k| k.contains(&ids[place]))?;
                    let best = kind.iter().copied().max_by(|&a, &b| p(a).total_cmp(&p(b)))?;
                    Some(Doubt {
                        place,
                        line: ids[..place]
                            .iter()
                            .filter(|&&i| self.vocabulary.pieces[i as usize].starts_with('\n'))
                            .count(),
                        observed: p(ids[place]),
                        best: p(best),
                        kind: kind.iter().map(|&o| p(o)).sum(),
                        instead: self.vocabulary.pieces[best as usize].clone(),
                    })
                };
                // The last token of a padded row is not read.
                let places = self.vocabulary.operators(ids, &all);
                out.push(places.iter().filter(|p| **p <= t).filter_map(of).collect());
            }
        }
        Ok(out)
    }
    fn replaced(&self, text: &str, doubt: &Doubt) -> Result<String> {
        let mut ids = self.vocabulary.encode(text)?;
        match (ids.get_mut(doubt.place), self.vocabulary.id(&doubt.instead)) {
            (Some(id), Some(new)) => *id = new,
            _ => return Err(Error::invalid("Coder::replaced", format!("no operator at {}", doubt.place))),
        }
        Ok(self.vocabulary.decode(&ids))
    }
}

/// Token ids `[B, T]` and the tokens to be predicted. Rows are padded, and padding is ignored in the loss.
fn padded(rows: &[&Vec<u32>], fill: u32) -> Result<(Array, Array)> {
    let t = rows.iter().map(|r| r.len().saturating_sub(1)).max().unwrap_or(0).max(1);
    let (mut x, mut y) = (vec![fill; rows.len() * t], vec![IGNORE; rows.len() * t]);
    for (r, row) in rows.iter().enumerate() {
        let n = row.len().saturating_sub(1);
        x[r * t..r * t + n].copy_from_slice(&row[..n]);
        y[r * t..r * t + n].copy_from_slice(&row[1..]);
    }
    Ok((Array::from_slice(&x, &[rows.len(), t])?, Array::from_slice(&y, &[rows.len(), t])?))
}
