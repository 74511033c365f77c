//! A distribution-edited model on real text: a model is tuned from one base on each source, and the vectors are added with searched
//! weights. It is compared with mixtures of the sources, soups, TIES, DARE and tuning on one source after the other. Then the data of one
//! source are replaced and only this source is tuned again, and two sources are tuned privately.
//!
//! ```text
//! cargo run --release --example dem
//! ```
//!
//! Writes `plots/losses`, `plots/cost`, `plots/weights`, `plots/directions`, `plots/cosines` (`.svg` and `.png`) and `summary.json` to
//! the run folder. `--full` has a longer base, more mixtures and three seeds.

#[path = "common/args.rs"]
mod args;
#[path = "common/documents.rs"]
mod documents;
#[path = "common/study.rs"]
mod study;

use documents::pieces;
use prismgrad::data::{Bpe, Corpus, CrateSources, Document, Windows, data_file, read_maybe_gzip, shuffled};
use prismgrad::models::{Gpt, GptConfig};
use prismgrad::nn::{Ctx, Params};
use prismgrad::optim::{AdamW, Schedule};
use prismgrad::random::{NoiseKey, Rng};
use prismgrad::step::{self, PlainStep, PrivacyConfig, PrivateStep};
use prismgrad::systems::editing::{Cost, Ledger, Merge, Privacy, Search, Tags, VectorPool};
use prismgrad::train::Progress;
use prismgrad::train::plot::{BarChart, HeatMap, LineChart, Series};
use prismgrad::{Array, DType, Error, Result, no_grad};
use serde_json::{Value, json};
use std::time::Instant;
use study::interval;

const OPTIONS: &[args::Opt] = &[
    ("seeds", "1", "1", "runs of everything, paired by seed; 3 with --full"),
    ("base-tokens", "400000", "8192", "tokens that the base is trained on; 1500000 with --full"),
    ("tokens", "60000", "4096", "tokens of each source; 150000 with --full"),
    (
        "mixtures",
        "4",
        "2",
        "mixtures of the sources that are tried, each with the tokens of all sources; 12 with --full",
    ),
    (
        "epsilon",
        "8",
        "8",
        "privacy budget of the last source when it is tuned privately; the one before it gets half of that",
    ),
    (
        "full",
        "",
        "",
        "uses three seeds, 12 mixtures, a longer base and more tokens of each source; takes about an hour",
    ),
];
const VOCAB: usize = 512;
const SEQ: usize = 128;
const BATCH: usize = 16;
/// The source whose data are replaced.
const RENEWED: usize = 0;
const DELTA: f64 = 1e-5;

/// A source's text in windows: for tuning, for choosing, and for one final test.
struct Source {
    name: &'static str,
    train: Windows,
    /// Other documents, which replace those of one source.
    newer: Option<Windows>,
    validation: Windows,
    test: Windows,
}

fn sources() -> Result<Vec<Source>> {
    let mut texts: Vec<(&'static str, Vec<Document>)> = Vec::new();
    let crates = CrateSources::new().max_bytes(2 << 20).load()?;
    for (name, files) in [
        ("shakespeare", &["tinyshakespeare.txt.gz"][..]),
        ("reviews", &["rt-polarity.pos.gz", "rt-polarity.neg.gz"]),
        ("tweets", &["emotion-train.txt.gz"]),
    ] {
        let mut documents = Vec::new();
        for file in files {
            let Ok(path) = data_file(file) else { continue };
            let text = String::from_utf8_lossy(&read_maybe_gzip(path, 64 << 20)?).into_owned();
            documents.extend(pieces(file, &text));
        }
        match documents.is_empty() {
            true => eprintln!("no {name}: set PRISMGRAD_DATA to the folder that has {}", files.join(" and ")),
            false => texts.push((name, documents)),
        }
    }
    if texts.is_empty() {
        eprintln!("going on with two halves of the crate sources");
        let (a, b) = crates.documents.into_iter().partition(|d: &Document| d.name.len().is_multiple_of(2));
        texts = vec![("crates, one half", a), ("crates, the other", b)];
    } else {
        texts.insert(0, ("rust", crates.documents));
    }
    let mut all = Corpus { documents: texts.iter().flat_map(|(_, d)| d.clone()).collect() };
    all.documents.sort_by(|a, b| a.name.cmp(&b.name));
    let tokenizer = Bpe::train(all.split(0.1, 1).0.texts(), VOCAB)?;
    let windows = |c: &Corpus| c.tokenize(&tokenizer).windows(SEQ);
    let source = |(i, (name, documents))| {
        let (train, held) = Corpus { documents }.split(0.15, 1);
        let (validation, test) = held.split(0.5, 2);
        let (train, newer) = match i == RENEWED {
            true => {
                let (older, newer) = train.split(0.5, 3);
                (older, Some(windows(&newer)?))
            }
            false => (train, None),
        };
        Ok(Source { name, train: windows(&train)?, newer, validation: windows(&validation)?, test: windows(&test)? })
    };
    texts.into_iter().enumerate().map(source).collect()
}

fn losses(model: &Gpt, w: &Windows, records: &[usize], ctx: &Ctx) -> Result<prismgrad::Tensor> {
    let (x, y) = w.batch(records)?;
    let shape = [records.len(), w.seq_len()];
    model.losses(Array::from_slice(&x, &shape)?, Array::from_slice(&y, &shape)?, ctx)
}

/// Mean loss in nats per token over at most `most` windows.
fn evaluate(model: &Gpt, w: &Windows, most: usize) -> Result<f64> {
    let records: Vec<usize> = shuffled(w.len(), 3).into_iter().take(most).collect();
    let mut sum = 0.0;
    for part in records.chunks(32) {
        sum += no_grad(|| losses(model, w, part, &Ctx::eval()))?.array().to_f64().iter().sum::<f64>();
    }
    Ok(sum / records.len().max(1) as f64)
}

fn values(params: &Params) -> Vec<Array> {
    params.all().iter().map(|p| p.value().copy()).collect()
}

fn put(params: &Params, values: &[Array]) -> Result<()> {
    params.all().iter().zip(values).try_for_each(|(p, v)| p.set(v.copy()))
}

/// Which text is drawn, and in which order.
#[derive(Clone, Copy, Default)]
struct Draw {
    order: u64,
    newer: bool,
}

/// The work of one seed: the model, its sources, and the costs that are counted.
struct Study<'a> {
    model: Gpt,
    sources: &'a [Source],
    seed: u64,
    /// Number of windows of each source in a validation loss.
    validation: usize,
}

impl Study<'_> {
    fn cost(&self, tokens: usize, seconds: f64) -> Cost {
        Cost { tokens: tokens as u64, flops: self.flops(tokens), seconds, privacy: None }
    }
    fn flops(&self, tokens: usize) -> f64 {
        6.0 * self.model.params().count() as f64 * tokens as f64
    }
    /// Trains the model from its present values. Each batch is from one source, drawn with these probabilities, and the values with the
    /// best mean validation loss over these sources are kept. Returns that loss and the seconds.
    fn train(&self, shares: &[f64], tokens: usize, lr: f64, what: &str) -> Result<(f64, f64)> {
        self.train_on(Draw::default(), shares, tokens, lr, what)
    }
    fn train_on(&self, draw: Draw, shares: &[f64], tokens: usize, lr: f64, what: &str) -> Result<(f64, f64)> {
        let texts: Vec<&Windows> =
            self.sources.iter().map(|s| s.newer.as_ref().filter(|_| draw.newer).unwrap_or(&s.train)).collect();
        let steps = (tokens / (BATCH * SEQ)).max(2) as u64;
        let schedule = Schedule::cosine(lr, (steps / 10).max(1), steps);
        let params = self.model.params();
        let mut step = PlainStep::new(&params.all(), AdamW::default(), schedule)?;
        let mut rng = Rng::new(self.seed * 7919 + 17 + 1_000_003 * draw.order);
        let mut orders: Vec<(Vec<usize>, usize, u64)> = self.sources.iter().map(|_| (Vec::new(), 0, 0)).collect();
        let (mut best, mut kept, mut seconds) = (f64::INFINITY, Vec::new(), 0.0);
        let mut progress = Progress::new(what.to_string(), Some(steps), 0);
        for t in 0..steps {
            let mut u = rng.uniform() * shares.iter().sum::<f64>();
            let i = shares.iter().position(|s| {
                u -= s;
                u < 0.0
            });
            let i = i.unwrap_or(shares.len() - 1);
            let (order, at, epoch) = &mut orders[i];
            if *at + BATCH > order.len() {
                *epoch += 1;
                (*order, *at) = (shuffled(texts[i].len(), 1000 * self.seed + *epoch + 500 * draw.order), 0);
            }
            let batch: Vec<usize> = order.iter().skip(*at).take(BATCH).copied().collect();
            *at += BATCH;
            let start = Instant::now();
            let report = step.run_one(|| losses(&self.model, texts[i], &batch, &Ctx::train(t)))?;
            seconds += start.elapsed().as_secs_f64();
            if (t + 1) % (steps / 5).max(1) == 0 || t + 1 == steps {
                let mut loss = 0.0;
                for (s, share) in self.sources.iter().zip(shares).filter(|(_, share)| **share > 0.0) {
                    loss += share / shares.iter().sum::<f64>() * evaluate(&self.model, &s.validation, self.validation)?;
                }
                if loss < best {
                    (best, kept) = (loss, values(params));
                }
                progress.set(t + 1, &[("validation", loss), ("train", report.loss()?)]);
            }
        }
        progress.finish();
        put(params, &kept)?;
        Ok((best, seconds))
    }
    /// Trains the model privately on one source from its present values; a record is a window. The last values are kept, because choosing
    /// them by the source's own held-out windows would use private data again.
    fn train_private(&self, i: usize, tokens: usize, lr: f64, epsilon: f64) -> Result<Cost> {
        let (source, batch) = (&self.sources[i], 2 * BATCH);
        let steps = (tokens / (batch * SEQ)).max(2) as u64;
        let config =
            PrivacyConfig::target(epsilon, DELTA).records(source.train.len()).expected_batch(batch as f64).steps(steps);
        // The key makes the experiment repeatable; a key for real records comes from NoiseKey::from_os.
        let privacy = step::Privacy::new(config, NoiseKey::from_seed_for_tests(self.seed + 77 + i as u64))?;
        let schedule = Schedule::cosine(lr, (steps / 10).max(1), steps);
        let mut step = PrivateStep::new(&self.model.params().all(), privacy, AdamW::default(), schedule)?;
        let mut progress = Progress::new(format!("{}, privately", source.name), Some(steps), 0);
        let (start, mut spent) = (Instant::now(), 0.0);
        for t in 0..steps {
            let report = step.run(BATCH, |records| losses(&self.model, &source.train, records, &Ctx::train(t)))?;
            spent = report.epsilon;
            progress.set(t + 1, &[("ε", spent)]);
        }
        progress.finish();
        Ok(Cost {
            tokens: (steps as usize * batch * SEQ) as u64,
            flops: self.flops(steps as usize * batch * SEQ),
            seconds: start.elapsed().as_secs_f64(),
            privacy: Some(Privacy { epsilon: spent, delta: DELTA }),
        })
    }
    /// Mean validation loss over the sources.
    fn validate(&self) -> Result<f64> {
        let each = self.sources.iter().map(|s| evaluate(&self.model, &s.validation, self.validation));
        Ok(each.collect::<Result<Vec<f64>>>()?.iter().sum::<f64>() / self.sources.len() as f64)
    }
    /// Mean test loss over the sources, and the worst.
    fn test(&self) -> Result<(f64, f64)> {
        let each = self.sources.iter().map(|s| evaluate(&self.model, &s.test, 128)).collect::<Result<Vec<f64>>>()?;
        Ok((each.iter().sum::<f64>() / each.len() as f64, each.into_iter().fold(f64::NEG_INFINITY, f64::max)))
    }
    /// Applies and returns the merge with the best validation loss.
    fn best_merge(&self, pool: &VectorPool, merges: impl IntoIterator<Item = Merge>) -> Result<Merge> {
        let mut best: Option<(f64, Merge)> = None;
        for m in merges {
            pool.apply(&m, self.model.params())?;
            let loss = self.validate()?;
            if best.as_ref().is_none_or(|b| loss < b.0) {
                best = Some((loss, m));
            }
        }
        let (_, merge) = best.ok_or_else(|| Error::invalid("dem", "no merges"))?;
        pool.apply(&merge, self.model.params())?;
        Ok(merge)
    }
}

/// Sets the parameters to these values.
fn params_at<'a>(params: &'a Params, values: &[Array]) -> Result<&'a Params> {
    put(params, values)?;
    Ok(params)
}

/// Points of the simplex: equal shares first, then random ones (exponentials divided by their sum).
fn simplex(n: usize, count: usize, seed: u64) -> Vec<Vec<f64>> {
    let mut rng = Rng::new(seed);
    (0..count)
        .map(|g| {
            let x: Vec<f64> = (0..n).map(|_| if g == 0 { 1.0 } else { -(1.0 - rng.uniform()).ln() }).collect();
            let sum: f64 = x.iter().sum();
            x.into_iter().map(|x| x / sum).collect()
        })
        .collect()
}

/// The result of each method for one seed: name, training tokens, mean test loss, worst test loss.
type Row = (String, usize, f64, f64);

/// The results of one seed: weights, rows, loss along each direction, cosines, edits lost in bf16.
struct Outcome {
    rows: Vec<Row>,
    weights: Vec<f64>,
    directions: Vec<Vec<(f64, f64)>>,
    cosines: Vec<Vec<f64>>,
    lost: Vec<usize>,
    edits: usize,
    permuted: f64,
    tuned: f64,
    ledger: Ledger,
    private: Ledger,
}

fn one_seed(
    sources: &[Source],
    (base_tokens, tokens, mixtures): (usize, usize, usize),
    seed: u64,
    validation: usize,
    epsilon: f64,
) -> Result<Outcome> {
    let n = sources.len();
    let config = GptConfig::small(VOCAB, SEQ, 4, 96, 4);
    let study = Study { model: Gpt::new(config, seed)?, sources, seed, validation };
    let params = study.model.params();
    study.train(&vec![1.0; n], base_tokens, 2e-3, "base")?;
    let mut pool = VectorPool::new(params, Tags::new())?;
    let base = values(params);
    let mut rows: Vec<Row> = Vec::new();
    let row = |name: &str, tokens: usize, study: &Study| -> Result<Row> {
        let (mean, worst) = study.test()?;
        println!("  {name:<28}{tokens:>9} tokens   mean test loss {mean:.4}   worst {worst:.4}");
        Ok((name.to_string(), tokens, mean, worst))
    };
    rows.push(row("base", 0, &study)?);
    let lr = 1e-3;
    let only = |i: usize| -> Vec<f64> { (0..n).map(|j| (i == j) as u8 as f64).collect() };
    let mut single: Option<(f64, Row)> = None;
    for (i, s) in sources.iter().enumerate() {
        put(params, &base)?;
        let (_, seconds) = study.train(&only(i), tokens, lr, s.name)?;
        pool.add(s.name, params, Tags::new(), study.cost(tokens, seconds))?;
        let loss = study.validate()?;
        if single.as_ref().is_none_or(|b| loss < b.0) {
            single = Some((loss, row("best single source", tokens, &study)?));
        }
    }
    let all = n * tokens;
    rows.extend(single.map(|s| s.1));
    let found = pool.search(&Search::Coordinate { grid: 11, rounds: 2 }, params, None, |_| study.validate())?;
    let tuned = found.loss;
    rows.push(row("DEM", all, &study)?);
    // The coordinates of each vector are permuted and the weights kept, so that the edit must lose its effect.
    let edited = values(params);
    let mut rng = Rng::new(seed + 5);
    for (p, (b, e)) in params.all().iter().zip(base.iter().zip(&edited)) {
        let (b, e) = (b.to_f64(), e.to_f64());
        let mut difference: Vec<f64> = e.iter().zip(&b).map(|(e, b)| e - b).collect();
        rng.shuffle(&mut difference);
        let moved: Vec<f64> = b.iter().zip(difference).map(|(b, d)| b + d).collect();
        p.set(Array::from_slice(&moved, p.shape())?.cast(DType::F32))?;
    }
    let permuted = study.validate()?;
    pool.apply(&Merge::Soup, params)?;
    rows.push(row("soup", all, &study)?);
    let lambdas = || (0..=10).map(|i| i as f64 / 10.0);
    study.best_merge(&pool, lambdas().map(Merge::Arithmetic))?;
    rows.push(row("one λ for all", all, &study)?);
    study.best_merge(&pool, lambdas().map(|l| Merge::Ties { density: 0.2, lambda: 2.0 * l, normalise: true }))?;
    rows.push(row("TIES", all, &study)?);
    study.best_merge(&pool, lambdas().map(|lambda| Merge::Dare { density: 0.5, lambda, seed }))?;
    rows.push(row("DARE", all, &study)?);
    put(params, &base)?;
    for (i, s) in sources.iter().enumerate() {
        study.train(&only(i), tokens, lr, &format!("then {}", s.name))?;
    }
    rows.push(row("one after the other", all, &study)?);
    let mut best: Option<(f64, Row)> = None;
    for (g, shares) in simplex(n, mixtures, seed).into_iter().enumerate() {
        put(params, &base)?;
        study.train(&shares, all, lr, &format!("mixture {}", g + 1))?;
        let loss = study.validate()?;
        let name = if g == 0 { "even mixture".to_string() } else { format!("mixture {}", g + 1) };
        let r = row(&name, all, &study)?;
        if g == 0 {
            rows.push(r.clone());
        }
        if best.as_ref().is_none_or(|b| loss < b.0) {
            best = Some((loss, r));
        }
    }
    if let Some((_, (_, _, mean, worst))) = best {
        rows.push((format!("best of {mixtures} mixtures"), mixtures * all, mean, worst));
    }
    // The data of one source are replaced. Once only its vector is made again, and for comparison all of them are. Both searches have one
    // round.
    let search = Search::Coordinate { grid: 11, rounds: 1 };
    let (draw, mut renewed) = (Draw { order: 1, newer: true }, pool.clone());
    let mut redone = VectorPool::new(params_at(params, &base)?, Tags::new())?;
    for (i, s) in sources.iter().enumerate() {
        put(params, &base)?;
        let (_, seconds) = study.train_on(draw, &only(i), tokens, lr, &format!("{} again", s.name))?;
        redone.add(s.name, params, Tags::new(), study.cost(tokens, seconds))?;
        if i == RENEWED {
            renewed.replace(s.name, params, Tags::new(), study.cost(tokens, seconds))?;
        }
    }
    renewed.search(&search, params, None, |_| study.validate())?;
    rows.push(row("one source replaced", tokens, &study)?);
    redone.search(&search, params, None, |_| study.validate())?;
    rows.push(row("all sources redone", all, &study)?);
    // Two sources have private records, which are disjoint. Weights are chosen on held-out windows, which are assumed to be public.
    let mut private = VectorPool::new(params_at(params, &base)?, Tags::new())?;
    for (i, s) in sources.iter().enumerate() {
        let cost = match i + 2 >= n {
            false => {
                pool.apply(&Merge::Weights(only(i)), params)?;
                study.cost(tokens, 0.0)
            }
            true => {
                put(params, &base)?;
                study.train_private(i, tokens, lr, if i + 1 == n { epsilon } else { epsilon / 2.0 })?
            }
        };
        private.add(s.name, params, Tags::new(), cost)?;
    }
    private.search(&search, params, None, |_| study.validate())?;
    rows.push(row("DEM, two sources private", all, &study)?);
    let mut directions = Vec::new();
    for i in 0..n {
        let at = |w: f64| -> Result<(f64, f64)> {
            pool.apply(&Merge::Weights(only(i).iter().map(|x| x * w).collect()), params)?;
            Ok((w, study.validate()?))
        };
        directions.push((0..=6).map(|k| at(k as f64 / 4.0)).collect::<Result<Vec<_>>>()?);
    }
    let diagnosis = pool.diagnose()?;
    Ok(Outcome {
        rows,
        weights: found.weights,
        directions,
        cosines: diagnosis.cosines,
        lost: diagnosis.lost_in_bf16,
        edits: params.count(),
        permuted,
        tuned,
        ledger: pool.ledger().clone(),
        private: private.ledger().clone(),
    })
}

/// The verdict on the claim that a − b is below `limit`: the paired differences, their mean and 95 % interval, and the conclusion.
fn verdict(claim: &str, a: &[f64], b: &[f64], limit: f64) -> Value {
    let differences: Vec<f64> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    let (mean, half) = interval(&differences);
    let word = match () {
        _ if mean + half < limit => "holds",
        _ if mean - half > limit => "contradicted",
        // A single seed has no interval.
        _ => "undecided",
    };
    match half.is_finite() {
        true => println!("{claim}: {word} (difference {mean:+.4} ± {half:.4})"),
        false => println!("{claim}: {word} (difference {mean:+.4}, one seed)"),
    }
    let half = half.is_finite().then_some(half);
    json!({"claim": claim, "verdict": word, "difference": mean, "half_interval": half, "limit": limit, "seeds": differences.len()})
}

fn run() -> Result<()> {
    let args =
        args::Args::parse("dem", "Distribution-edited models beside mixtures of the sources and other merges", OPTIONS);
    let full = args.has("full");
    let count = |name: &str, in_full: usize, least: usize| match full && !args.has(name) {
        true => in_full,
        false => args.get(name, &format!("a whole number of at least {least}"), |n: &usize| *n >= least),
    };
    let (seeds, base_tokens) = (count("seeds", 3, 1), count("base-tokens", 1_500_000, 4096));
    let (tokens, mixtures) = (count("tokens", 150_000, 2048), count("mixtures", 12, 1));
    let epsilon = args.get("epsilon", "a positive number, such as 8", |e: &f64| *e > 0.0 && e.is_finite());
    let start = Instant::now();
    let long = if full {
        "about an hour"
    } else if args.has("quick") {
        "half a minute"
    } else {
        "about 6 minutes"
    };
    println!("{seeds} seeds, {mixtures} mixtures: {long} on two cores");
    let sources = sources()?;
    let names: Vec<&str> = sources.iter().map(|s| s.name).collect();
    let config = json!({
        "seeds": seeds, "base_tokens": base_tokens, "tokens": tokens, "mixtures": mixtures, "epsilon": epsilon, "sources": names,
    });
    let mut folder = args.folder(&config)?;
    let validation = if args.has("quick") { 8 } else { 32 };
    let mut outcomes = Vec::new();
    for seed in 0..seeds as u64 {
        println!("seed {seed}");
        let o = one_seed(&sources, (base_tokens, tokens, mixtures), seed, validation, epsilon)?;
        println!("  weights {:?} for {names:?}", o.weights);
        println!("{}\nwith two sources private:\n{}", o.ledger, o.private);
        folder.log(
            seed,
            &json!({
                "rows": o.rows, "weights": o.weights, "lost_in_bf16": o.lost, "edits": o.edits, "validation": o.tuned,
                "validation_permuted": o.permuted, "cosines": o.cosines,
            }),
        )?;
        outcomes.push(o);
    }
    let mean_of = |name: &str| -> Vec<f64> {
        outcomes.iter().filter_map(|o| o.rows.iter().find(|r| r.0 == name).map(|r| r.2)).collect()
    };
    let best = format!("best of {mixtures} mixtures");
    let dem = mean_of("DEM");
    let tokens_of = |name: &str| outcomes[0].rows.iter().find(|r| r.0 == name).map_or(0, |r| r.1);
    let ratio = tokens_of(&best) as f64 / tokens_of("DEM").max(1) as f64;
    println!("training tokens of the {best} over those of DEM: {ratio:.1}");
    let permuted: Vec<f64> = outcomes.iter().map(|o| o.tuned - o.permuted).collect();
    let ratio_of =
        |a: &str, b: &str| -> Vec<f64> { mean_of(a).iter().zip(mean_of(b)).map(|(a, b)| a / b - 1.0).collect() };
    let renewed = ratio_of("one source replaced", "all sources redone");
    let verdicts = vec![
        verdict(&format!("DEM is within 0.01 nat of the {best}"), &dem, &mean_of(&best), 0.01),
        verdict("DEM is below the even mixture of equal cost", &dem, &mean_of("even mixture"), 0.0),
        verdict("DEM is below the soup", &dem, &mean_of("soup"), 0.0),
        verdict("DEM is below one λ for all", &dem, &mean_of("one λ for all"), 0.0),
        verdict("DEM is below TIES", &dem, &mean_of("TIES"), 0.0),
        verdict("DEM is below tuning one after the other", &dem, &mean_of("one after the other"), 0.0),
        verdict("one source replaced is within 1 % of redoing all", &renewed, &vec![0.0; renewed.len()], 0.01),
        verdict(
            "DEM with two private sources is below the base",
            &mean_of("DEM, two sources private"),
            &mean_of("base"),
            0.0,
        ),
        verdict("null control: permuted vectors are worse", &permuted, &vec![0.0; permuted.len()], 0.0),
    ];
    // The records are disjoint, so the whole protects each as its own source does.
    let of_source =
        |(name, c): &(String, Cost)| c.privacy.map(|p| json!({"source": name, "epsilon": p.epsilon, "delta": p.delta}));
    let private = &outcomes[0].private;
    let privacy = json!({
        "record": format!("a window of {SEQ} tokens"), "whole": private.privacy(),
        "sources": private.sources.iter().filter_map(of_source).collect::<Vec<_>>(),
    });
    if let Some(p) = private.privacy() {
        println!("two private sources of disjoint records: ε {:.3} at δ {:e} for the whole", p.epsilon, p.delta);
    }
    let lost: usize = outcomes.iter().flat_map(|o| &o.lost).sum();
    let edits: usize = outcomes.iter().map(|o| o.edits * sources.len()).sum();
    println!("edits that bf16 would lose: {lost} of {edits} ({:.1} %)", 100.0 * lost as f64 / edits.max(1) as f64);
    let mut chart = BarChart::new("Mean test loss over the sources").label("nats per token");
    for (name, ..) in &outcomes[0].rows {
        let (mean, half) = interval(&mean_of(name));
        chart = match half.is_finite() {
            true => chart.bar_with_interval(name, mean, mean - half, mean + half),
            false => chart.bar(name, mean),
        };
    }
    chart.save(folder.plot("losses"))?;
    let mut chart = LineChart::new("Quality against cost")
        .x_label("training tokens after the base")
        .y_label("mean test loss")
        .log_x();
    let best = format!("best of {mixtures} mixtures");
    let kinds: [(&str, &[&str]); 5] = [
        ("DEM", &["DEM"]),
        ("other merges", &["soup", "one λ for all", "TIES", "DARE"]),
        ("mixtures", &["even mixture", &best]),
        ("one after the other", &["one after the other"]),
        ("DEM, one source replaced", &["one source replaced"]),
    ];
    for (kind, methods) in kinds {
        let points: Vec<(f64, f64)> = methods.iter().map(|m| (tokens_of(m) as f64, interval(&mean_of(m)).0)).collect();
        chart = chart.series(Series::new(kind, points).markers());
    }
    chart.save(folder.plot("cost"))?;
    let mut chart = BarChart::new("Weights that the search found").label("weight");
    for (i, name) in names.iter().enumerate() {
        let (mean, half) = interval(&outcomes.iter().map(|o| o.weights[i]).collect::<Vec<f64>>());
        chart = match half.is_finite() {
            true => chart.bar_with_interval(*name, mean, mean - half, mean + half),
            false => chart.bar(*name, mean),
        };
    }
    chart.save(folder.plot("weights"))?;
    let mut chart =
        LineChart::new("Mean validation loss along each vector").x_label("weight").y_label("nats per token");
    for (name, points) in names.iter().zip(&outcomes[0].directions) {
        chart = chart.series(Series::new(*name, points.clone()).markers());
    }
    chart.save(folder.plot("directions"))?;
    HeatMap::new("Cosine between vectors", names.clone(), names.clone(), &outcomes[0].cosines.concat())?
        .save(folder.plot("cosines"))?;
    folder.finish(&json!({
        "rows": outcomes.iter().map(|o| &o.rows).collect::<Vec<_>>(), "weights": outcomes.iter().map(|o| &o.weights).collect::<Vec<_>>(),
        "verdicts": verdicts, "token_ratio": ratio, "privacy": privacy, "ledgers": outcomes.iter().map(|o| &o.ledger).collect::<Vec<_>>(),
        "lost_in_bf16": lost, "edits": edits, "seconds": start.elapsed().as_secs_f64(),
    }))?;
    println!("plots and summary in {} after {:.0} s", folder.path().display(), start.elapsed().as_secs_f64());
    Ok(())
}

fn main() {
    args::finish(run());
}
