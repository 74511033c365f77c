//! The domains and tasks for which models with mixtures of experts are reduced, and the tuning of reduced models.

use crate::documents::pieces;
use prismgrad::data::{
    Bpe, Corpus, CrateSources, Document, Folder, IGNORE, Tokenizer, Windows, data_file, read_maybe_gzip, shuffled,
};
use prismgrad::models::Gpt;
use prismgrad::nn::Ctx;
use prismgrad::optim::{AdamW, Schedule};
use prismgrad::step::PlainStep;
use prismgrad::systems::pruning::{Batch, distillation, train_routers};
use prismgrad::{Array, Result, Tensor, no_grad};
use std::path::PathBuf;
use std::process::Command;

pub const VOCAB: usize = 1024;
pub const SEQ: usize = 128;
pub const BATCH: usize = 16;
/// Number of tokens of a labelled text, including the label; longer texts are cut at the beginning.
const LONG: usize = 48;

/// Text of one kind.
pub struct Domain {
    pub name: &'static str,
    pub train: Windows,
    pub test: Windows,
}

impl Domain {
    /// Batches of training windows.
    pub fn batches(&self, count: usize) -> Result<Vec<Batch>> {
        let order = shuffled(self.train.len(), 11);
        order
            .chunks(BATCH)
            .take(count)
            .map(|c| Ok(Batch::new(Array::from_slice(&self.train.batch(c)?.0, &[c.len(), SEQ])?)))
            .collect()
    }
}

fn shared(name: &str) -> Result<Option<String>> {
    match data_file(name) {
        Ok(path) => Ok(Some(String::from_utf8_lossy(&read_maybe_gzip(path, 64 << 20)?).into_owned())),
        Err(_) => Ok(None),
    }
}

/// The folder of Python's standard library; `None` without Python.
fn standard_library() -> Option<PathBuf> {
    let out = Command::new("python3").args(["-c", "import os; print(os.path.dirname(os.__file__))"]).output().ok()?;
    let path = PathBuf::from(String::from_utf8(out.stdout).ok()?.trim());
    (out.status.success() && path.is_dir()).then_some(path)
}

/// The available text in Rust, Python, plays, reviews, tweets and Markdown, about `bytes` of each, and a tokenizer for all of it.
pub fn domains(bytes: usize) -> Result<(Vec<Domain>, Bpe)> {
    let mut texts: Vec<(&'static str, Vec<Document>)> = Vec::new();
    texts.push(("rust", CrateSources::new().max_bytes(bytes).load()?.documents));
    if let Some(folder) = standard_library() {
        texts.push(("python", Folder::new(folder).extensions(["py"]).max_bytes(bytes).load()?.documents));
    }
    for (name, files) in [
        ("plays", &["tinyshakespeare.txt.gz"][..]),
        ("reviews", &["rt-polarity.pos.gz", "rt-polarity.neg.gz"]),
        ("tweets", &["emotion-train.txt.gz"]),
    ] {
        let mut documents = Vec::new();
        for file in files {
            documents.extend(shared(file)?.map_or(Vec::new(), |text| pieces(file, &text)));
        }
        match documents.is_empty() {
            true => eprintln!("no {name}: set PRISMGRAD_DATA to the folder that has {}", files.join(" and ")),
            false => texts.push((name, documents)),
        }
    }
    let cargo = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let cargo = cargo.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    if let Some(registry) = cargo.map(|c| c.join("registry/src")).filter(|r| r.is_dir()) {
        texts.push(("markdown", Folder::new(registry).extensions(["md"]).max_bytes(bytes).load()?.documents));
    }
    let all = Corpus { documents: texts.iter().flat_map(|(_, d)| d.iter().take(200).cloned()).collect() };
    let tokenizer = Bpe::train(all.texts(), VOCAB)?;
    let domains = texts
        .into_iter()
        .map(|(name, documents)| {
            let (train, test) = Corpus { documents }.split(0.1, 1);
            let windows = |c: Corpus| c.tokenize(&tokenizer).windows(SEQ);
            Ok(Domain { name, train: windows(train)?, test: windows(test)? })
        })
        .collect::<Result<Vec<_>>>()?;
    Ok((domains, tokenizer))
}

/// How a reduced model is tuned: how the router is treated, and whether the whole model is tuned afterwards.
#[derive(Clone, Copy, PartialEq)]
pub enum Treatment {
    /// Everything is tuned from the start.
    Kept,
    /// The router alone is trained for a quarter of the steps, then everything.
    WarmedUp,
    /// The router is distilled from the full model for a quarter of the steps, then everything is trained.
    Distilled,
    /// There is no tuning.
    OneShot,
    /// The router alone is trained, for a quarter of the steps.
    WarmedUpOnly,
    /// The router alone is distilled, for a quarter of the steps.
    DistilledOnly,
}

impl Treatment {
    pub fn name(self) -> &'static str {
        match self {
            Treatment::Kept => "kept",
            Treatment::WarmedUp => "warmed up",
            Treatment::Distilled => "distilled",
            Treatment::OneShot => "one shot",
            Treatment::WarmedUpOnly => "warmed up only",
            Treatment::DistilledOnly => "distilled only",
        }
    }
}

/// Token ids and targets of equally long samples.
struct Samples {
    ids: Vec<u32>,
    targets: Vec<u32>,
    long: usize,
}

impl Samples {
    fn len(&self) -> usize {
        self.ids.len() / self.long
    }
    fn batch(&self, which: &[usize]) -> Result<(Array, Array)> {
        let of = |v: &[u32]| {
            let all: Vec<u32> =
                which.iter().flat_map(|&i| v[i * self.long..(i + 1) * self.long].iter().copied()).collect();
            Array::from_slice(&all, &[which.len(), self.long])
        };
        Ok((of(&self.ids)?, of(&self.targets)?))
    }
}

/// A task: text in which the next token is a label, or text to be continued.
pub struct Task {
    pub name: &'static str,
    train: Samples,
    test: Samples,
    /// The tokens that represent the labels; empty for text to be continued.
    labels: Vec<u32>,
    /// The token for padding.
    padding: u32,
}

impl Task {
    fn labelled(
        name: &'static str,
        words: &[&str],
        tokenizer: &Bpe,
        train: &[(String, usize)],
        test: &[(String, usize)],
    ) -> Task {
        // The token for each label: the first token of its word that no other label has.
        let mut labels: Vec<u32> = Vec::new();
        for word in words {
            let tokens = tokenizer.encode(&format!(" {word}"));
            let free = tokens.iter().rev().find(|t| !labels.contains(t)).copied();
            labels.push(free.unwrap_or(tokens[0]));
        }
        let padding = tokenizer.end_of_text();
        let samples = |all: &[(String, usize)]| {
            let (mut ids, mut targets) = (Vec::new(), Vec::new());
            for (text, label) in all {
                let text = tokenizer.encode(&format!("{text} =>"));
                let text = &text[text.len().saturating_sub(LONG)..];
                ids.extend(std::iter::repeat_n(padding, LONG - text.len()));
                ids.extend(text);
                targets.extend(std::iter::repeat_n(IGNORE, LONG - 1));
                targets.push(labels[*label]);
            }
            Samples { ids, targets, long: LONG }
        };
        Task { name, train: samples(train), test: samples(test), labels: labels.clone(), padding }
    }
    fn text(name: &'static str, domain: &Domain, most: usize) -> Result<Task> {
        let samples = |w: &Windows, most: usize| {
            let which: Vec<usize> = shuffled(w.len(), 17).into_iter().take(most).collect();
            let (ids, targets) = w.batch(&which)?;
            Ok(Samples { ids, targets, long: SEQ })
        };
        let (train, test) = (samples(&domain.train, usize::MAX)?, samples(&domain.test, most)?);
        Ok(Task { name, train, test, labels: Vec::new(), padding: IGNORE })
    }
    /// The task's tokens for observing a model; padding does not count.
    pub fn batches(&self) -> Result<Vec<Batch>> {
        let order = shuffled(self.train.len(), 7);
        order
            .chunks(64)
            .take(4)
            .map(|c| {
                let (ids, _) = self.train.batch(c)?;
                let counted = ids.to_vec::<u32>()?.iter().map(|&t| t != self.padding).collect();
                Ok(Batch::counting(ids, counted))
            })
            .collect()
    }
    /// Tunes a model, and evaluates it once on the test set: the mean loss in nats per label or token, and the accuracy among the labels,
    /// where ties count as half; NaN without labels.
    pub fn tune(&self, model: &Gpt, full: &Gpt, treatment: Treatment, steps: u64, seed: u64) -> Result<(f64, f64)> {
        let order = shuffled(self.train.len(), 31 * seed + 1);
        let per = (order.len() / BATCH).max(1) as u64;
        let batch = |t: u64| {
            let at = (t % per) as usize * BATCH;
            self.train.batch(&order[at.min(order.len() - 1)..(at + BATCH).min(order.len())])
        };
        let losses = |m: &Gpt, t: u64| {
            let (ids, targets) = batch(t)?;
            m.losses(ids, targets, &Ctx::train(t))
        };
        let alone = (steps / 4).max(1);
        match treatment {
            Treatment::WarmedUp | Treatment::WarmedUpOnly => {
                train_routers(model, alone, 3e-3, losses)?;
            }
            Treatment::Distilled | Treatment::DistilledOnly => {
                train_routers(model, alone, 3e-3, |m, t| {
                    let (ids, _) = batch(t)?;
                    let teacher = no_grad(|| full.forward(&ids, &Ctx::eval()))?;
                    distillation(&m.forward(&ids, &Ctx::train(t))?, &teacher)
                })?;
            }
            Treatment::Kept | Treatment::OneShot => {}
        }
        if matches!(treatment, Treatment::Kept | Treatment::WarmedUp | Treatment::Distilled) {
            // Every method trains on the same number of tokens, so the router's own steps are subtracted.
            let left = if treatment == Treatment::Kept { steps } else { steps - alone.min(steps - 1) };
            let schedule = Schedule::cosine(1e-3, left / 10 + 1, left);
            let mut step = PlainStep::new(&model.params().all(), AdamW::default(), schedule)?;
            for t in steps - left..steps {
                step.run_one(|| losses(model, t))?;
            }
        }
        self.evaluate(model)
    }
    fn evaluate(&self, model: &Gpt) -> Result<(f64, f64)> {
        let (mut loss, mut right, n) = (0.0, 0.0, self.test.len());
        let all: Vec<usize> = (0..n).collect();
        for part in all.chunks(32) {
            let (ids, targets) = self.test.batch(part)?;
            let logits: Tensor = no_grad(|| model.forward(&ids, &Ctx::eval()))?;
            let entropy = prismgrad::ops::loss::cross_entropy(&logits, &targets, &Default::default())?;
            loss += entropy.array().to_f64().iter().sum::<f64>();
            if !self.labels.is_empty() {
                let last = logits.array().slice(1, self.test.long - 1..self.test.long)?.to_f64();
                let vocab = last.len() / part.len();
                for (i, row) in part.iter().zip(last.chunks_exact(vocab)) {
                    let label = self.test.targets[(i + 1) * self.test.long - 1];
                    let own = row[label as usize];
                    let above = self.labels.iter().filter(|&&l| row[l as usize] > own).count();
                    let equal = self.labels.iter().filter(|&&l| row[l as usize] == own).count();
                    right += match (above, equal) {
                        (0, 1) => 1.0,
                        (0, _) => 0.5,
                        _ => 0.0,
                    };
                }
            }
        }
        Ok((loss / n as f64, if self.labels.is_empty() { f64::NAN } else { right / n as f64 }))
    }
}

/// The tasks: sentiment of reviews, emotion of tweets, and continuing plays, as far as their data are present, and continuing the first
/// domain.
pub fn tasks(domains: &[Domain], tokenizer: &Bpe, quick: bool) -> Result<Vec<Task>> {
    let most = if quick { 32 } else { 600 };
    let mut tasks = Vec::new();
    if let (Some(good), Some(bad)) = (shared("rt-polarity.pos.gz")?, shared("rt-polarity.neg.gz")?) {
        let lines = |text: &str, label: usize| text.lines().map(|l| (l.to_string(), label)).collect::<Vec<_>>();
        let all = [lines(&bad, 0), lines(&good, 1)].concat();
        let mixed: Vec<(String, usize)> = shuffled(all.len(), 3).into_iter().map(|i| all[i].clone()).collect();
        let (test, train) = mixed.split_at(most);
        tasks.push(Task::labelled("sentiment", &["bad", "good"], tokenizer, train, test));
    }
    let words = ["sadness", "joy", "love", "anger", "fear", "surprise"];
    let tweets = |name: &str| -> Result<Option<Vec<(String, usize)>>> {
        let line = |l: &str| {
            let (text, label) = l.rsplit_once(';')?;
            Some((text.to_string(), words.iter().position(|w| *w == label.trim())?))
        };
        Ok(shared(name)?.map(|text| text.lines().filter_map(line).collect()))
    };
    if let (Some(train), Some(test)) = (tweets("emotion-train.txt.gz")?, tweets("emotion-test.txt.gz")?) {
        tasks.push(Task::labelled("emotion", &words, tokenizer, &train, &test[..most.min(test.len())]));
    }
    let plays = domains.iter().find(|d| d.name == "plays").unwrap_or(&domains[0]);
    tasks.push(Task::text(plays.name, plays, most / 4)?);
    Ok(tasks)
}
