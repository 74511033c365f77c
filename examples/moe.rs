//! Mixture of experts on real text: sparse against dense models, the effect of balance losses on the experts' loads, and private training.
//!
//! ```text
//! cargo run --release --example moe
//! ```
//!
//! Writes `plots/curves`, `plots/load`, `plots/balance` and `plots/private` (`.svg` and `.png`) and `summary.json` to the run
//! folder. `--full` makes the table of `docs/results/moe.md`.

#[path = "common/args.rs"]
mod args;
#[path = "common/documents.rs"]
mod documents;
#[path = "common/study.rs"]
mod study;

use documents::pieces;
use prismgrad::data::{Bpe, Corpus, CrateSources, Tokenizer, Windows, data_file, read_maybe_gzip, shuffled};
use prismgrad::models::{Gpt, GptConfig};
use prismgrad::nn::{Balance, Ctx, MoeConfig, MoeOut};
use prismgrad::optim::{AdamW, Schedule};
use prismgrad::random::NoiseKey;
use prismgrad::step::{PlainStep, Privacy, PrivacyConfig, PrivateStep};
use prismgrad::train::Progress;
use prismgrad::train::plot::{BarChart, HeatMap, LineChart, Series};
use prismgrad::{Array, Error, Result, Tensor, no_grad};
use serde_json::{Value, json};
use std::time::Instant;
use study::interval;

const OPTIONS: &[args::Opt] = &[
    ("seeds", "1", "1", "runs of each setting, paired by seed; 3 with --full"),
    ("tokens", "200000", "6000", "training tokens of each model of the first experiment; 1500000 with --full"),
    ("rate", "0", "0.001", "learning rate; 0 tries 0.001 and 0.003 with every model and chooses by validation"),
    ("epsilon", "8", "8", "privacy budget ε of the third experiment, at δ = 1e-5"),
    ("full", "", "", "makes the table of docs/results/moe.md: three seeds, 1.5 million tokens"),
];
const VOCAB: usize = 512;
const SEQ: usize = 128;
const BATCH: usize = 16;
/// Number of tokens of a tweet that are predicted in the third experiment. Shorter tweets are left out, so that there is no padding.
const TWEET: usize = 24;
const DELTA: f64 = 1e-5;

/// Text in windows: for training, for choosing, and for one final test.
struct Text {
    train: Windows,
    validation: Windows,
    test: Windows,
}

/// A shared file, or `None` with a message about it.
fn shared(name: &str) -> Result<Option<String>> {
    match data_file(name) {
        Ok(path) => Ok(Some(String::from_utf8_lossy(&read_maybe_gzip(path, 64 << 20)?).into_owned())),
        Err(_) => {
            eprintln!("{name} is missing: set PRISMGRAD_DATA to the folder that has it; going on with crate sources");
            Ok(None)
        }
    }
}

fn text() -> Result<(Text, Bpe)> {
    let mut corpus = CrateSources::new().max_bytes(3 << 20).load()?;
    for name in ["tinyshakespeare.txt.gz", "rt-polarity.pos.gz", "rt-polarity.neg.gz"] {
        if let Some(text) = shared(name)? {
            corpus.documents.extend(pieces(name, &text));
        }
    }
    let (train, held) = corpus.split(0.1, 1);
    let (validation, test) = held.split(0.5, 2);
    let tokenizer = Bpe::train(train.texts(), VOCAB)?;
    let windows = |c: &Corpus| c.tokenize(&tokenizer).windows(SEQ);
    Ok((Text { train: windows(&train)?, validation: windows(&validation)?, test: windows(&test)? }, tokenizer))
}

/// Tweets as text, one record each, or lines of crate sources if the tweets are missing.
fn tweets(tokenizer: &Bpe) -> Result<Text> {
    let of = |name: &str, lines: &dyn Fn() -> Result<Vec<String>>| {
        let lines = match shared(name)? {
            Some(text) => text.lines().skip(1).filter_map(|l| Some(l.rsplit_once(';')?.0.to_string())).collect(),
            None => lines()?,
        };
        let long = lines.iter().map(|l| tokenizer.encode(l)).filter(|t| t.len() > TWEET);
        let cut = long.map(|t| t[..TWEET].to_vec());
        prismgrad::data::TokenSet::new(cut, tokenizer.end_of_text()).chunks(TWEET)
    };
    let sources = |part: usize| {
        let corpus = CrateSources::new().max_bytes(1 << 20).load()?;
        let lines = corpus.texts().flat_map(str::lines).filter(|l| l.len() > 60).map(str::to_string);
        Ok(lines.enumerate().filter(|(i, _)| i % 3 == part).map(|(_, l)| l).collect())
    };
    Ok(Text {
        train: of("emotion-train.txt.gz", &|| sources(0))?,
        validation: of("emotion-val.txt.gz", &|| sources(1))?,
        test: of("emotion-test.txt.gz", &|| sources(2))?,
    })
}

/// A model of a comparison.
#[derive(Clone)]
struct Arm {
    name: &'static str,
    config: GptConfig,
}

impl Arm {
    /// An arm of width d, with a hidden width where the layers are dense and experts where they are not.
    fn new(name: &'static str, (layers, d, seq): (usize, usize, usize), hidden: usize, moe: Option<MoeConfig>) -> Arm {
        let mut config = GptConfig::small(VOCAB, seq, layers, d, 4);
        config.n_inner = Some(hidden);
        config.moe = moe.map(|c| vec![Some(c); layers]);
        Arm { name, config }
    }
    /// The number of all parameters, and of those that a token is multiplied by.
    fn params(&self) -> Result<(usize, usize)> {
        let all = Gpt::new(self.config.clone(), 0)?.params().count();
        let (d, mut active) = (self.config.n_embd, all - self.config.n_positions * self.config.n_embd);
        for c in self.config.moe.iter().flatten().flatten() {
            active -= c.params(d) - c.active_params(d);
        }
        Ok((all, active))
    }
    /// FLOPs per token in training: six for each parameter that the token is multiplied by, and attention over half of the positions.
    fn flops(&self) -> Result<f64> {
        let c = &self.config;
        Ok(6.0 * self.params()?.1 as f64 + 7.0 * (c.n_embd * c.n_positions * c.n_layer) as f64)
    }
}

/// The results of a training run.
struct Curve {
    /// Number of tokens, seconds of training, validation loss.
    points: Vec<(f64, f64, f64)>,
    test: f64,
    /// Share of the choices of each expert in the first layer, along the run.
    load: Vec<Vec<f64>>,
    /// On validation text at the end, as means over layers: entropy of the load in nats, and number of idle experts.
    entropy: f64,
    idle: f64,
}

fn losses(model: &Gpt, w: &Windows, records: &[usize], ctx: &Ctx) -> Result<(Tensor, Vec<Option<MoeOut>>)> {
    let (x, y) = w.batch(records)?;
    let shape = [records.len(), w.seq_len()];
    model.losses_moe(Array::from_slice(&x, &shape)?, Array::from_slice(&y, &shape)?, ctx)
}

/// Mean loss in nats per token over at most `most` windows, and the mean entropy of the load and number of idle experts over the layers.
fn evaluate(model: &Gpt, w: &Windows, most: usize) -> Result<(f64, f64, f64)> {
    let records: Vec<usize> = shuffled(w.len(), 3).into_iter().take(most).collect();
    let (mut sum, mut load) = (0.0, Vec::<Vec<f64>>::new());
    for part in records.chunks(32) {
        let (l, layers) = no_grad(|| losses(model, w, part, &Ctx::eval()))?;
        sum += l.array().to_f64().iter().sum::<f64>();
        for (i, out) in layers.iter().flatten().enumerate() {
            let read = out.stats.read()?.load;
            match load.get_mut(i) {
                Some(l) => l.iter_mut().zip(read).for_each(|(l, r)| *l += r),
                None => load.push(read),
            }
        }
    }
    let layers = load.len().max(1) as f64;
    let entropy = |l: &Vec<f64>| -> f64 {
        let all: f64 = l.iter().sum();
        l.iter().filter(|x| **x > 0.0).map(|x| -x / all * (x / all).ln()).sum()
    };
    let idle = |l: &Vec<f64>| l.iter().filter(|x| **x == 0.0).count() as f64;
    let mean = |f: &dyn Fn(&Vec<f64>) -> f64| load.iter().map(f).sum::<f64>() / layers;
    Ok((sum / records.len() as f64, mean(&entropy), mean(&idle)))
}

/// Trains on `tokens` tokens. The same seed gives the same initial values and batches in every arm.
fn train(arm: &Arm, text: &Text, tokens: usize, lr: f64, seed: u64, what: &str) -> Result<Curve> {
    let model = Gpt::new(arm.config.clone(), seed)?;
    let steps = (tokens / (BATCH * SEQ)).max(2) as u64;
    let schedule = Schedule::cosine(lr, (steps / 20).max(1), steps);
    let mut step = PlainStep::new(&model.params().all(), AdamW::default(), schedule)?;
    let (mut points, mut load, mut seconds) = (Vec::new(), Vec::new(), 0.0);
    let (per_epoch, every) = ((text.train.len() / BATCH).max(1) as u64, (steps / 10).max(1));
    let mut progress = Progress::new(format!("{what}: {}", arm.name), Some(steps), 0);
    for t in 0..steps {
        let order = shuffled(text.train.len(), 1000 * seed + t / per_epoch);
        let at = (t % per_epoch) as usize * BATCH;
        let mut first = None;
        let start = Instant::now();
        let report = step.run_one(|| {
            let (l, layers) = losses(&model, &text.train, &order[at..at + BATCH], &Ctx::train(t))?;
            first = layers.into_iter().next().flatten();
            Ok(l)
        })?;
        seconds += start.elapsed().as_secs_f64();
        if let Some(out) = first.filter(|_| t % (steps / 24).max(1) == 0) {
            let read = out.stats.read()?.load;
            let all: f64 = read.iter().sum();
            load.push(read.iter().map(|l| l / all).collect());
        }
        if (t + 1) % every == 0 || t + 1 == steps {
            let loss = evaluate(&model, &text.validation, 64)?.0;
            points.push((((t + 1) as usize * BATCH * SEQ) as f64, seconds, loss));
            progress.set(t + 1, &[("validation", loss), ("train", report.loss()?)]);
        }
    }
    progress.finish();
    let (_, entropy, idle) = evaluate(&model, &text.validation, 64)?;
    Ok(Curve { points, test: evaluate(&model, &text.test, 256)?.0, load, entropy, idle })
}

/// The learning rate with the best validation loss in short runs. Every arm tries the same number of rates.
fn choose_rate(arm: &Arm, text: &Text, tokens: usize, rates: &[f64]) -> Result<f64> {
    let mut best = (f64::INFINITY, rates[0]);
    for &lr in rates.iter().filter(|_| rates.len() > 1) {
        let loss = train(arm, text, tokens / 5, lr, 0, "learning rate")?.points.last().map_or(f64::NAN, |p| p.2);
        if loss < best.0 {
            best = (loss, lr);
        }
    }
    Ok(best.1)
}

/// A mean and its interval as text; a single run has no interval.
fn with_interval(x: &[f64]) -> String {
    match interval(x) {
        (mean, half) if half.is_finite() => format!("{mean:.4} ± {half:.4}"),
        (mean, _) => format!("{mean:.4}, one seed"),
    }
}

/// The verdict on the claim that a is below b: the paired differences, their mean and 95 % interval, and the conclusion.
fn verdict(claim: &str, a: &[f64], b: &[f64]) -> Value {
    let differences: Vec<f64> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    let (mean, half) = interval(&differences);
    let word = study::word(-mean, half);
    println!("{claim}: {word} (difference {})", with_interval(&differences));
    let half = half.is_finite().then_some(half);
    json!({"claim": claim, "verdict": word, "difference": mean, "half_interval": half, "seeds": differences.len()})
}

/// The validation loss after this number of seconds, interpolated between two points.
fn at_seconds(points: &[(f64, f64, f64)], seconds: f64) -> f64 {
    let after = points.iter().position(|p| p.1 >= seconds).unwrap_or(points.len() - 1);
    let (b, a) = (points[after], points[after.saturating_sub(1)]);
    if after == 0 || b.1 <= a.1 {
        return b.2;
    }
    a.2 + (b.2 - a.2) * ((seconds - a.1) / (b.1 - a.1)).clamp(0.0, 1.0)
}

/// Sparse against dense: equal FLOPs for each token, equal seconds, and the dense model with as many parameters.
fn sparse_and_dense(
    text: &Text,
    (tokens, seeds, rates): (usize, u64, &[f64]),
    folder: &mut prismgrad::train::RunFolder,
) -> Result<(Vec<Value>, Vec<Value>)> {
    let shape = (4, 96, SEQ);
    let balance = Balance::Batch(0.01);
    let arms = [
        Arm::new("dense", shape, 384, None),
        Arm::new("8 experts, top 1", shape, 384, Some(MoeConfig { balance, ..MoeConfig::new(8, 1, 384) })),
        Arm::new("8 experts, top 2", shape, 384, Some(MoeConfig { balance, ..MoeConfig::new(8, 2, 192) })),
        Arm::new("dense, equal parameters", shape, 3072, None),
    ];
    let mut curves: Vec<Vec<Curve>> = Vec::new();
    let mut rows = Vec::new();
    for arm in &arms {
        let lr = choose_rate(arm, text, tokens, rates)?;
        let (all, active) = arm.params()?;
        let runs =
            (0..seeds).map(|s| train(arm, text, tokens, lr, s, "sparse and dense")).collect::<Result<Vec<_>>>()?;
        let test: Vec<f64> = runs.iter().map(|r| r.test).collect();
        let seconds = runs.iter().map(|r| r.points.last().map_or(0.0, |p| p.1)).sum::<f64>() / seeds as f64;
        println!(
            "{:<24} {all:>8} parameters, {active:>7} active, {:.2} MFLOP a token, {seconds:.1} s: test loss {}",
            arm.name,
            arm.flops()? / 1e6,
            with_interval(&test)
        );
        let row = json!({
            "experiment": "sparse and dense", "arm": arm.name, "parameters": all, "active": active, "lr": lr,
            "rates_tried": rates.len(), "tokens": tokens, "flops_a_token": arm.flops()?, "seconds": seconds,
            "test": test, "curves": runs.iter().map(|r| &r.points).collect::<Vec<_>>(),
            "entropy": runs.iter().map(|r| r.entropy).collect::<Vec<_>>(),
        });
        folder.log(rows.len() as u64, &row)?;
        rows.push(row);
        curves.push(runs);
    }
    let test = |arm: usize| curves[arm].iter().map(|r| r.test).collect::<Vec<f64>>();
    // Of each pair, the losses at the time when the faster one ends.
    let timed = |a: usize, b: usize| -> (Vec<f64>, Vec<f64>) {
        let pairs = curves[a].iter().zip(&curves[b]).map(|(x, y)| {
            let end = |c: &Curve| c.points.last().map_or(0.0, |p| p.1);
            let until = end(x).min(end(y));
            (at_seconds(&x.points, until), at_seconds(&y.points, until))
        });
        pairs.unzip()
    };
    let (first, second) = (timed(1, 0), timed(2, 0));
    let verdicts = vec![
        verdict("top 1 is below dense at equal FLOPs", &test(1), &test(0)),
        verdict("top 2 is below dense at equal FLOPs", &test(2), &test(0)),
        verdict("top 1 is below dense at equal seconds", &first.0, &first.1),
        verdict("top 2 is below dense at equal seconds", &second.0, &second.1),
        verdict("the dense model of equal parameters is below top 1", &test(3), &test(1)),
        verdict("the dense model of equal parameters is below top 2", &test(3), &test(2)),
    ];
    let mut chart = LineChart::new("Sparse and dense at equal FLOPs a token").x_label("training tokens").log_x();
    for (arm, runs) in arms.iter().zip(&curves) {
        let n = runs[0].points.len();
        let mean = |i: usize| runs.iter().map(|r| r.points[i].2).sum::<f64>() / runs.len() as f64;
        let points: Vec<(f64, f64)> = (0..n).map(|i| (runs[0].points[i].0, mean(i))).collect();
        let series = Series::new(arm.name, points);
        chart = chart.series(if arm.name.contains("equal") { series.dashed() } else { series });
    }
    chart.y_label("validation loss, nats a token").save(folder.plot("curves"))?;
    let load = &curves[1][0].load;
    let values: Vec<f64> = (0..8).flat_map(|e| load.iter().map(move |l| l[e])).collect();
    let steps = (tokens / (BATCH * SEQ)).max(2);
    let columns: Vec<String> = (0..load.len()).map(|i| (i * (steps / 24).max(1)).to_string()).collect();
    HeatMap::new("Load of the first layer, top 1", (0..8).map(|e| e.to_string()), columns, &values)?
        .x_label("step")
        .y_label("expert")
        .save(folder.plot("load"))?;
    Ok((rows, verdicts))
}

/// Compares forms and coefficients of the balance loss.
fn balance(
    text: &Text,
    (tokens, seeds, lr): (usize, u64, f64),
    folder: &mut prismgrad::train::RunFolder,
) -> Result<(Vec<Value>, Vec<Value>)> {
    let forms: [(&'static str, Balance); 7] = [
        ("none", Balance::Off),
        ("batch 0.001", Balance::Batch(0.001)),
        ("batch 0.01", Balance::Batch(0.01)),
        ("batch 0.1", Balance::Batch(0.1)),
        ("sample 0.001", Balance::PerSample(0.001)),
        ("sample 0.01", Balance::PerSample(0.01)),
        ("sample 0.1", Balance::PerSample(0.1)),
    ];
    let (mut rows, mut found) = (Vec::new(), Vec::new());
    let mut chart = BarChart::new("Entropy of the load on validation text").label("nats; ln 8 = 2.08 is even");
    for (name, balance) in forms {
        let arm = Arm::new(name, (4, 96, SEQ), 384, Some(MoeConfig { balance, ..MoeConfig::new(8, 1, 384) }));
        let runs = (0..seeds).map(|s| train(&arm, text, tokens, lr, s, "balance")).collect::<Result<Vec<_>>>()?;
        let of = |f: &dyn Fn(&Curve) -> f64| runs.iter().map(f).collect::<Vec<f64>>();
        let (entropy, idle, test) = (of(&|r| r.entropy), of(&|r| r.idle), of(&|r| r.test));
        let mean = |x: &[f64]| interval(x).0;
        println!(
            "{name:<13} entropy {:.3} nats, idle {:.2} of 8, test loss {:.4}",
            mean(&entropy),
            mean(&idle),
            mean(&test)
        );
        chart = chart.bar(name, mean(&entropy));
        let row = json!({
            "experiment": "balance", "arm": name, "tokens": tokens, "entropy": entropy, "idle": idle, "test": test,
        });
        folder.log(100 + rows.len() as u64, &row)?;
        rows.push(row);
        found.push((entropy, test));
    }
    chart.save(folder.plot("balance"))?;
    let verdicts = vec![
        verdict("entropy without a loss is below batch 0.01", &found[0].0, &found[2].0),
        verdict("entropy without a loss is below sample 0.01", &found[0].0, &found[5].0),
        verdict("entropy of sample 0.01 is below batch 0.01", &found[5].0, &found[2].0),
        verdict("test loss of batch 0.01 is below none", &found[2].1, &found[0].1),
        verdict("test loss of sample 0.01 is below none", &found[5].1, &found[0].1),
    ];
    Ok((rows, verdicts))
}

/// The result of a private run: steps and validation losses, test loss, ε.
type PrivateRun = (Vec<(f64, f64)>, f64, f64);

/// One private run.
fn train_privately(
    arm: &Arm,
    text: &Text,
    (epsilon, steps, batch): (f64, u64, f64),
    lr: f64,
    seed: u64,
) -> Result<PrivateRun> {
    let model = Gpt::new(arm.config.clone(), seed)?;
    let records = text.train.len();
    let config = PrivacyConfig::target(epsilon, DELTA).records(records).expected_batch(batch).steps(steps);
    let privacy = Privacy::new(config, NoiseKey::from_seed_for_tests(seed))?;
    let schedule = Schedule::cosine(lr, (steps / 20).max(1), steps);
    let mut step = PrivateStep::new(&model.params().all(), privacy, AdamW::default(), schedule)?;
    let (mut points, mut spent) = (Vec::new(), 0.0);
    let mut progress = Progress::new(format!("private: {}", arm.name), Some(steps), 0);
    for t in 0..steps {
        let report = step.run(128, |drawn| {
            let keys: Vec<u64> = drawn.iter().map(|&r| r as u64).collect();
            Ok(losses(&model, &text.train, drawn, &Ctx::train(t).with_keys(keys))?.0)
        })?;
        spent = report.epsilon;
        if (t + 1) % (steps / 5).max(1) == 0 || t + 1 == steps {
            let loss = evaluate(&model, &text.validation, 256)?.0;
            points.push(((t + 1) as f64, loss));
            progress.set(t + 1, &[("validation", loss), ("ε", spent)]);
        }
    }
    progress.finish();
    Ok((points, evaluate(&model, &text.test, 512)?.0, spent))
}

/// Tweets at ε, by three models: dense, experts with the balance loss of each sample, and experts without.
fn private(
    text: &Text,
    (epsilon, steps, batch): (f64, u64, f64),
    (seeds, rates): (u64, &[f64]),
    folder: &mut prismgrad::train::RunFolder,
) -> Result<(Vec<Value>, Vec<Value>)> {
    let experts = |balance| Some(MoeConfig { balance, ..MoeConfig::new(8, 2, 64) });
    let shape = (2, 64, TWEET);
    let arms = [
        Arm::new("dense", shape, 128, None),
        Arm::new("experts, sample 0.01", shape, 128, experts(Balance::PerSample(0.01))),
        Arm::new("experts, none", shape, 128, experts(Balance::Off)),
    ];
    let (mut rows, mut tests) = (Vec::new(), Vec::new());
    let mut chart = LineChart::new(format!("Tweets at ε = {epsilon}")).x_label("step");
    for arm in &arms {
        let mut best = (f64::INFINITY, rates[0]);
        for &lr in rates.iter().filter(|_| rates.len() > 1) {
            let (points, ..) = train_privately(arm, text, (epsilon, steps, batch), lr, 100)?;
            let loss = points.last().map_or(f64::NAN, |p| p.1);
            best = if loss < best.0 { (loss, lr) } else { best };
        }
        let runs = (0..seeds).map(|s| train_privately(arm, text, (epsilon, steps, batch), best.1, s));
        let runs = runs.collect::<Result<Vec<_>>>()?;
        let test: Vec<f64> = runs.iter().map(|r| r.1).collect();
        println!("{:<21} ε = {:.2}: test loss {}", arm.name, runs[0].2, with_interval(&test));
        chart = chart.series(Series::new(arm.name, runs[0].0.clone()));
        let row = json!({
            "experiment": "private", "arm": arm.name, "epsilon": runs[0].2, "delta": DELTA, "steps": steps,
            "records": text.train.len(), "batch": batch, "lr": best.1, "rates_tried": rates.len(), "test": test,
        });
        folder.log(200 + rows.len() as u64, &row)?;
        rows.push(row);
        tests.push(test);
    }
    chart.y_label("validation loss, nats a token").save(folder.plot("private"))?;
    let verdicts = vec![
        verdict("private experts with the loss of each sample are below dense", &tests[1], &tests[0]),
        verdict("private experts without a loss are below dense", &tests[2], &tests[0]),
        verdict("the loss of each sample is better than none, privately", &tests[1], &tests[2]),
    ];
    Ok((rows, verdicts))
}

/// With equal experts and renormalised weights the choice of experts must not matter. Returns the largest difference between the losses of
/// such a mixture and of the dense model it was made of.
fn null_control(text: &Text) -> Result<f64> {
    let shape = (2, 32, SEQ);
    let dense = Gpt::new(Arm::new("dense", shape, 64, None).config, 0)?;
    let records: Vec<usize> = (0..4).collect();
    let want = losses(&dense, &text.validation, &records, &Ctx::eval())?.0.array().to_f64();
    let mut worst = 0f64;
    for k in [1, 2, 4] {
        let c = MoeConfig { renormalise: true, ..MoeConfig::new(4, k, 64) };
        let moe = Gpt::new(Arm::new("experts", shape, 64, Some(c)).config, 0)?;
        for p in moe.params().all() {
            let one = dense.params().get(&p.name().replace("moe.experts", "mlp"));
            let Some(one) = one.map(|one| one.value()) else { continue };
            let times = p.numel() / one.numel();
            let copies = vec![Tensor::new(one); times];
            let all = Tensor::stack(&copies.iter().collect::<Vec<_>>(), 0)?.reshape(p.shape())?;
            p.set(all.into_array())?;
        }
        let got = losses(&moe, &text.validation, &records, &Ctx::eval())?.0.array().to_f64();
        worst = got.iter().zip(&want).fold(worst, |m, (g, w)| m.max((g - w).abs()));
    }
    Ok(worst)
}

fn run() -> Result<()> {
    let args = args::Args::parse("moe", "Mixture of experts: sparse and dense, balance, privacy.", OPTIONS);
    let full = args.has("full");
    if full && args.has("quick") {
        args::fail("--full and --quick exclude each other");
    }
    let of = |name: &str, full_value: u64, accepted: &str, range: std::ops::RangeInclusive<u64>| {
        if full && !args.has(name) { full_value } else { args.get(name, accepted, |n: &u64| range.contains(n)) }
    };
    let seeds = of("seeds", 3, "a whole number from 1 to 10", 1..=10);
    let tokens = of("tokens", 1_500_000, "a whole number from 5000 to 100000000", 5_000..=100_000_000) as usize;
    let epsilon = args.get("epsilon", "a positive number, such as 8", |e: &f64| e.is_finite() && *e > 0.0);
    // Every arm tries these rates in shorter runs, and chooses by validation.
    let rate = args.get("rate", "0 or a positive number, such as 0.001", |r: &f64| r.is_finite() && *r >= 0.0);
    let rates = if rate > 0.0 { vec![rate] } else { vec![1e-3, 3e-3] };
    let rates = rates.as_slice();
    // For the third experiment: the number of steps, and the expected batch.
    let (steps, batch) = match (full, args.has("quick")) {
        (true, _) => (120, 512.0),
        (_, true) => (3, 64.0),
        _ => (40, 256.0),
    };
    let mut folder =
        args.folder(&json!({"seeds": seeds, "tokens": tokens, "rate": rate, "epsilon": epsilon, "full": full}))?;
    println!(
        "about {} on two cores",
        match (full, args.has("quick")) {
            (true, _) => "an hour",
            (_, true) => "half a minute",
            _ => "4 minutes",
        }
    );
    let start = Instant::now();
    let (text, tokenizer) = text()?;
    let tweets = tweets(&tokenizer)?;
    println!(
        "{} training windows of {SEQ} tokens, {} validation, {} test; {} tweets of {TWEET} tokens",
        text.train.len(),
        text.validation.len(),
        text.test.len(),
        tweets.train.len()
    );
    let control = null_control(&text)?;
    println!("null control, equal experts against the dense model: losses differ by at most {control:.1e}");
    if control.is_nan() || control > 1e-4 {
        let message = format!("equal experts differ from the dense model by {control}");
        return Err(Error::Invalid { op: "moe", message });
    }
    let (first, a) = sparse_and_dense(&text, (tokens, seeds, rates), &mut folder)?;
    let (second, b) = balance(&text, (tokens / 5, seeds, rates[0]), &mut folder)?;
    let (third, c) = private(&tweets, (epsilon, steps, batch), (seeds, rates), &mut folder)?;
    let verdicts = [a, b, c].concat();
    folder.finish(&json!({
        "null_control": control, "sparse_and_dense": first, "balance": second, "private": third,
        "verdicts": verdicts, "test_key": "noise of the private runs is from a key that anybody can compute",
        "seconds": start.elapsed().as_secs_f64(),
    }))?;
    println!("plots and summary in {}", folder.path().display());
    Ok(())
}

fn main() {
    args::finish(run());
}
