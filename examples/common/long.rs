//! Long documents, and small GPTs over them whose layers have different spans. The examples about spans share this.

// Each example uses a part of this file.
#![allow(dead_code)]

#[path = "study.rs"]
mod study;

use prismgrad::data::{Bpe, CrateSources, IGNORE, Tokenizer, shuffled};
use prismgrad::models::{Gpt, GptConfig, Positions, Preset, SpanCost, span_cost, spans};
use prismgrad::nn::Ctx;
use prismgrad::ops::attention::Span;
use prismgrad::ops::loss::{CrossEntropy, cross_entropy};
use prismgrad::optim::{AdamW, Schedule};
use prismgrad::step::PlainStep;
use prismgrad::train::Progress;
use prismgrad::{Array, Error, Result, no_grad};
use serde_json::{Value, json};
use std::time::Instant;
pub use study::interval;

pub const VOCAB: usize = 512;
pub const LAYERS: usize = 6;

/// Documents as tokens.
pub type Documents = Vec<Vec<u32>>;

/// Sources of crates that have at least `least` tokens: for training, for choosing, and for one final test.
pub struct Texts {
    pub train: Documents,
    pub validation: Documents,
    pub test: Documents,
    /// The number of documents that were too short, and of all documents.
    pub short: usize,
    pub all: usize,
}

impl Texts {
    pub fn load(bytes: usize, least: usize) -> Result<Texts> {
        let (train, held) = CrateSources::new().max_bytes(bytes).load()?.split(0.15, 1);
        let (validation, test) = held.split(0.5, 2);
        // A part of the text is enough for a vocabulary of 512 tokens.
        let mut sample = 0;
        let texts = train.texts().take_while(|t| {
            sample += t.len();
            sample < 1 << 20
        });
        let tokenizer = Bpe::train(texts, VOCAB)?;
        let mut counts = (0, 0);
        let mut of = |c: &prismgrad::data::Corpus| -> Documents {
            let all: Documents = c.texts().map(|t| tokenizer.encode(t)).collect();
            let kept: Documents = all.iter().filter(|d| d.len() >= least).cloned().collect();
            counts = (counts.0 + all.len() - kept.len(), counts.1 + all.len());
            kept
        };
        let (train, validation, test) = (of(&train), of(&validation), of(&test));
        let texts = Texts { train, validation, test, short: counts.0, all: counts.1 };
        if [&texts.train, &texts.validation, &texts.test].iter().any(|d| d.is_empty()) {
            let message =
                format!("no documents of {least} tokens in a part of {bytes} bytes of crate sources; read more");
            return Err(Error::invalid("texts", message));
        }
        println!(
            "{} documents of at least {least} tokens to train on, {} and {} held out; {} of {} were shorter",
            texts.train.len(),
            texts.validation.len(),
            texts.test.len(),
            texts.short,
            texts.all
        );
        Ok(texts)
    }
}

/// Cuts each document into rows of n + 1 tokens; the incomplete row at its end is dropped.
pub fn rows(documents: &Documents, n: usize) -> Documents {
    documents.iter().flat_map(|d| d.chunks_exact(n + 1).map(<[u32]>::to_vec)).collect()
}

/// The first row of each document.
pub fn first_rows(documents: &Documents, n: usize) -> Documents {
    documents.iter().filter(|d| d.len() > n).map(|d| d[..=n].to_vec()).collect()
}

/// A model of a comparison: which layers are full, and the span of the others.
#[derive(Clone)]
pub struct Arm {
    pub name: String,
    pub preset: Preset,
    pub sparse: Span,
    /// Whether full layers have no positions; the others have rotary ones.
    pub blind: bool,
}

impl Arm {
    pub fn new(preset: Preset, sparse: Span) -> Arm {
        let other = match sparse {
            Span::Window(w) => format!(", window {w}"),
            Span::Block(_) if preset == Preset::Sparse => {
                return Arm { name: "all blocks".into(), preset, sparse, blind: false };
            }
            _ => String::new(),
        };
        Arm { name: format!("{preset}{other}"), preset, sparse, blind: false }
    }
    pub fn blind(mut self) -> Arm {
        self.name += ", no positions in full layers";
        self.blind = true;
        self
    }
    pub fn config(&self, n: usize, d: usize) -> Result<GptConfig> {
        let list = spans(&self.preset, LAYERS, self.sparse)?;
        let mut c = GptConfig::small(VOCAB, n, LAYERS, d, 4).rotary();
        // GPT-2's 0.02 is for a width of 768; with it, narrow layers hardly change at first.
        c.initializer_range = 0.6 / (d as f64).sqrt();
        if self.blind {
            let of = |s: &Span| if *s == Span::Causal { Positions::None } else { Positions::Rotary };
            c.layer_positions = Some(list.iter().map(of).collect());
        }
        Ok(c.with_spans(list))
    }
    pub fn cost(&self, n: usize, d: usize) -> Result<SpanCost> {
        Ok(span_cost(&self.config(n, d)?, n))
    }
}

/// Inputs and targets of rows. In each row, tokens before `from` are not targets.
fn arrays(rows: &[Vec<u32>], from: Option<&[usize]>) -> Result<[Array; 2]> {
    let n = rows.first().map_or(0, |r| r.len() - 1);
    let inputs: Vec<u32> = rows.iter().flat_map(|r| r[..n].iter().copied()).collect();
    let target = |i: usize, p: usize| match from {
        Some(from) if p < from[i] => IGNORE,
        _ => rows[i][p],
    };
    let targets: Vec<u32> =
        (0..rows.len()).flat_map(|i| (1..=n).map(move |p| (i, p))).map(|(i, p)| target(i, p)).collect();
    Ok([Array::from_slice(&inputs, &[rows.len(), n])?, Array::from_slice(&targets, &[rows.len(), n])?])
}

/// The loss in nats of each token of each row except the first.
pub fn token_losses(model: &Gpt, rows: &[Vec<u32>]) -> Result<Vec<Vec<f64>>> {
    let mut out = Vec::new();
    for part in rows.chunks(16) {
        let [x, y] = arrays(part, None)?;
        let (b, n) = (part.len(), x.shape()[1]);
        let losses = no_grad(|| {
            let logits = model.forward(&x, &Ctx::eval())?.reshape(&[b * n, VOCAB])?;
            cross_entropy(&logits, y.reshape(&[b * n])?, &CrossEntropy::default())
        })?;
        out.extend(losses.array().to_f64().chunks(n).map(<[f64]>::to_vec));
    }
    Ok(out)
}

/// Mean of the losses at the positions for which `at` is true.
pub fn mean_loss(losses: &[Vec<f64>], at: impl Fn(usize) -> bool) -> f64 {
    let all = losses.iter().flat_map(|row| row.iter().enumerate().filter(|(p, _)| at(*p)).map(|(_, l)| *l));
    let (sum, count) = all.fold((0.0, 0usize), |(s, c), l| (s + l, c + 1));
    sum / count.max(1) as f64
}

/// Rows, and the first token of each that is a target; all tokens are if absent.
pub type Batch = (Documents, Option<Vec<usize>>);

/// How a model is trained.
#[derive(Clone, Copy)]
pub struct Training {
    pub steps: u64,
    pub batch: usize,
    pub lr: f64,
    pub seed: u64,
}

/// Trains on batches that depend only on the step, and calls `look` eight times during training and at the end. Returns the seconds of its
/// steps.
pub fn train(
    model: &Gpt,
    t: Training,
    what: &str,
    batch: &dyn Fn(u64) -> Batch,
    look: &mut dyn FnMut(u64, f64, &Gpt) -> Result<f64>,
) -> Result<f64> {
    let schedule = Schedule::cosine(t.lr, (t.steps / 20).max(1), t.steps);
    let mut step = PlainStep::new(&model.params().all(), AdamW::default(), schedule)?;
    let (mut seconds, every) = (0.0, (t.steps / 8).max(1));
    let mut progress = Progress::new(what.to_string(), Some(t.steps), 0);
    for i in 0..t.steps {
        let (rows, from) = batch(i);
        let [x, y] = arrays(&rows, from.as_deref())?;
        let start = Instant::now();
        let report = step.run_one(|| model.losses(&x, &y, &Ctx::train(i)))?;
        seconds += start.elapsed().as_secs_f64();
        if (i + 1) % every == 0 || i + 1 == t.steps {
            let seen = look(i + 1, seconds, model)?;
            progress.set(i + 1, &[("looked at", seen), ("train", report.loss()?)]);
        }
    }
    progress.finish();
    Ok(seconds)
}

/// The rows of step `i`. Each epoch has its own order of all rows, which is the same in every arm.
pub fn batch_of(rows: &Documents, batch: usize, seed: u64, i: u64) -> Batch {
    let per_epoch = (rows.len() / batch).max(1) as u64;
    let order = shuffled(rows.len(), 1_000 * seed + i / per_epoch);
    let at = (i % per_epoch) as usize * batch;
    (order.iter().cycle().skip(at).take(batch).map(|&r| rows[r].clone()).collect(), None)
}

/// A mean and its interval as text; a single run has no interval.
pub fn words(x: &[f64]) -> String {
    match interval(x) {
        (mean, half) if half.is_finite() => format!("{mean:.3} ± {half:.3}"),
        (mean, _) => format!("{mean:.3}, one seed"),
    }
}

/// The verdict on the claim that values, one for each seed, lie below `limit`: their mean, its 95 % interval, and the conclusion.
pub fn verdict(claim: &str, values: &[f64], limit: f64) -> Value {
    let (mean, half) = interval(values);
    let word = study::word(limit - mean, half);
    println!("{claim}: {word} ({} against {limit})", words(values));
    let half = half.is_finite().then_some(half);
    json!({"claim": claim, "verdict": word, "value": mean, "half_interval": half, "limit": limit, "seeds": values.len()})
}

/// The cost of spans as text: the share of the full model's FLOPs that is saved.
pub fn cost_words(cost: &SpanCost, full: &SpanCost) -> String {
    let (attention, model) = cost.saved(full);
    format!(
        "scores {:.1} MFLOP ({:.0} % saved), model {:.1} MFLOP ({:.0} % saved), cache {:.0} kB",
        cost.attention_flops as f64 / 1e6,
        100.0 * attention,
        cost.model_flops as f64 / 1e6,
        100.0 * model,
        cost.cache_bytes as f64 / 1e3
    )
}
