//! Pre-training of HyTrel on tables without labels, and its benefit when few columns have types.
//!
//! ```text
//! cargo run --release --example hytrel_pretrain
//! ```
//!
//! Writes `plots/f1` and `plots/losses` (`.svg` and `.png`) and `summary.json` to the run folder. The table of `docs/results/hypergraph.md`
//! is from `--seeds 3 --arms corruption`.

#[path = "common/args.rs"]
mod args;
#[path = "common/bags.rs"]
mod bags;
#[path = "common/study.rs"]
mod study;
#[path = "common/tables.rs"]
mod tables;

use prismgrad::data::shuffled;
use prismgrad::nn::{Ctx, Params};
use prismgrad::optim::{AdamW, Schedule};
use prismgrad::random::NoiseKey;
use prismgrad::step::{Privacy, PrivacyConfig, PrivateStep};
use prismgrad::systems::hytrel::{Corrupted, Encoded, Sets};
use prismgrad::train::Progress;
use prismgrad::train::plot::{LineChart, Series};
use prismgrad::{Result, Tensor, no_grad};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::time::Instant;
use study::interval;
use tables::{Data, Pretraining, Recipe, Typed};

const OPTIONS: &[args::Opt] = &[
    ("seeds", "1", "1", "runs of each setting, paired by seed; 3 with --full"),
    ("steps", "400", "20", "pre-training steps of 32 tables; 3000 with --full"),
    ("tune", "160", "20", "fine-tuning steps of 32 tables; 800 with --full"),
    ("tables", "20000", "1200", "the most tables that are used"),
    ("often", "150", "30", "a header is a type if at least this many training tables have it"),
    ("width", "32", "32", "width of HyTrel; 64 with --full"),
    ("arms", "all", "all", "objectives to compare with scratch, such as corruption,cells; all for every one"),
    ("rate", "0.002", "0.002", "learning rate"),
    ("epsilon", "8", "8", "privacy budget ε of the private pre-training, at δ = 1e-5"),
    ("full", "", "", "uses three seeds, 3000 and 800 steps"),
];
const BATCH: usize = 32;
const DELTA: f64 = 1e-5;

/// The objective of pre-training.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Objective {
    /// No pre-training.
    Scratch,
    /// Detection of replaced headers and cells.
    Corruption,
    /// The same with hidden headers, so that pre-training has nothing to do with the later task.
    Cells,
    /// The contrastive objective with two thinned views.
    Contrastive,
    /// Like `Corruption`, on tables whose cells were permuted over all tables: the null control.
    Dealt,
    /// Like `Corruption`, trained privately.
    Private,
}

impl Objective {
    fn name(self) -> &'static str {
        match self {
            Objective::Scratch => "scratch",
            Objective::Corruption => "corruption",
            Objective::Cells => "corruption, headers hidden",
            Objective::Contrastive => "contrastive",
            Objective::Dealt => "null: cells dealt out anew",
            Objective::Private => "corruption, private",
        }
    }
}

/// The tables for the training of an objective, in the order of `data.pretrain`.
fn seen(data: &Data, objective: Objective) -> Vec<Encoded> {
    let of = |t: &usize| match objective {
        Objective::Cells => data.encoded[*t].clone(),
        _ => data.with_headers[*t].clone(),
    };
    let mut all: Vec<Encoded> = data.pretrain.iter().map(of).collect();
    if objective == Objective::Dealt {
        let cells: Vec<Vec<u32>> = all.iter().flat_map(|t| t.cells.iter().cloned()).collect();
        let mut order = shuffled(cells.len(), 11).into_iter();
        for t in &mut all {
            t.cells.iter_mut().zip(order.by_ref()).for_each(|(c, i)| *c = cells[i].clone());
        }
    }
    all
}

/// The F1 score of detected replacements. Each item says whether a text was called "replaced", and whether it was.
fn detection(said: impl Iterator<Item = (bool, bool)>) -> f64 {
    let (mut hit, mut all) = (0.0, 0.0);
    for (said, is) in said {
        hit += f64::from(u8::from(said && is));
        all += f64::from(u8::from(said)) + f64::from(u8::from(is));
    }
    if all == 0.0 { 0.0 } else { 2.0 * hit / all }
}

/// A pre-trained encoder.
struct Pretrained {
    params: Option<Params>,
    curve: Vec<(f64, f64)>,
    /// F1 of the detection on test tables, and that of a model that uses only how often each text was a replacement.
    detection: Option<(f64, f64)>,
    seconds: f64,
    epsilon: Option<f64>,
}

fn pretrain(data: &Data, objective: Objective, recipe: &Recipe, epsilon: f64) -> Result<Pretrained> {
    let mut done = Pretrained { params: None, curve: vec![], detection: None, seconds: 0.0, epsilon: None };
    if objective == Objective::Scratch {
        return Ok(done);
    }
    let pretraining = Pretraining::new(data, seen(data, objective), recipe)?;
    let Pretraining { params, model, detector, corruption, tables, .. } = &pretraining;
    let losses = |records: &[usize], t: u64| -> Result<Tensor> {
        match objective {
            Objective::Contrastive => {
                let all: Vec<&Encoded> = records.iter().map(|&r| &tables[r]).collect();
                model.contrastive_losses(&pretraining.batch(&all)?, &Ctx::train(t))
            }
            _ => pretraining.losses(records, t),
        }
    };
    let steps = recipe.steps as u64;
    let what = format!("pre-training: {}, seed {}", objective.name(), recipe.seed);
    // The contrastive objective does not use the detector.
    let trained: Vec<_> = match objective {
        Objective::Contrastive => params.all().into_iter().filter(|p| p.name().starts_with("hytrel")).collect(),
        _ => params.all(),
    };
    if objective == Objective::Private {
        let config = PrivacyConfig::target(epsilon, DELTA).records(tables.len()).expected_batch(4.0 * BATCH as f64);
        let privacy = Privacy::new(config.steps(steps / 4), NoiseKey::from_seed_for_tests(recipe.seed))?;
        let adam = AdamW { weight_decay: 0.02, ..AdamW::default() };
        let mut progress = Progress::new(what, Some(steps), 0);
        let mut step = PrivateStep::new(&trained, privacy, adam, Schedule::cosine(recipe.lr, 1, (steps / 4).max(2)))?;
        for t in 0..steps / 4 {
            let clock = Instant::now();
            let report = step.run(64, |records| losses(records, t))?;
            done.seconds += clock.elapsed().as_secs_f64();
            done.epsilon = Some(report.epsilon);
            if (t + 1) % (steps / 10).max(1) == 0 {
                progress.set(4 * (t + 1), &[("ε", report.epsilon)]);
            }
        }
        progress.finish();
    } else {
        (done.curve, done.seconds) = pretraining.train(&trained, &what, losses)?;
    }
    if objective == Objective::Corruption {
        // The number of times that each text was a replacement, counted over training tables.
        let mut counts: HashMap<&Vec<u32>, [f64; 2]> = HashMap::new();
        let sample: Vec<usize> = (0..tables.len()).take(3000).collect();
        let train = pretraining.broken(&sample, 1 << 40);
        for c in &train {
            let texts = c.table.headers.iter().chain(&c.table.cells);
            for (text, replaced) in texts.zip(&c.replaced) {
                if let Some(replaced) = replaced {
                    counts.entry(text).or_default()[usize::from(*replaced)] += 1.0;
                }
            }
        }
        let test: Vec<Corrupted> = data
            .test
            .iter()
            .take(600)
            .map(|&t| corruption.apply(&data.with_headers[t], 5 + recipe.seed, t as u64))
            .collect();
        let texts = test.iter().flat_map(|c| c.table.headers.iter().chain(&c.table.cells).zip(&c.replaced));
        // Both losses give replaced texts and others the same total weight, so the threshold does as well.
        let all = train.iter().flat_map(|c| &c.replaced).fold([1e-9; 2], |mut n, r| {
            r.iter().for_each(|r| n[usize::from(*r)] += 1.0);
            n
        });
        let known = |text: &Vec<u32>| counts.get(text).is_some_and(|n| n[1] / all[1] > n[0] / all[0]);
        let unigram = detection(texts.filter_map(|(text, r)| Some((known(text), (*r)?))));
        let mut said = Vec::new();
        for part in test.chunks(64) {
            let b = pretraining.batch(&part.iter().map(|c| &c.table).collect::<Vec<_>>())?;
            let logits = no_grad(|| detector.logits(model, &b, &Ctx::eval()))?.array().to_f64();
            // The columns of all tables come first, then the cells.
            let columns: usize = part.iter().map(|c| c.table.columns).sum();
            let (mut c, mut v) = (0, columns);
            for t in part {
                for (k, r) in t.replaced.iter().enumerate() {
                    let at = if k < t.table.columns { &mut c } else { &mut v };
                    said.extend(r.map(|r| (logits[*at] > 0.0, r)));
                    *at += 1;
                }
            }
        }
        done.detection = Some((detection(said.into_iter()), unigram));
    }
    done.params = Some(pretraining.params);
    Ok(done)
}

/// The verdict on the claim that a is above b, paired by seed, with the 95 % interval and the difference in standard errors.
fn verdict(claim: &str, a: &[f64], b: &[f64]) -> Value {
    let differences: Vec<f64> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    let (mean, half) = interval(&differences);
    let word = study::word(mean, half);
    let n = differences.len() as f64;
    let sd = (differences.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt();
    let errors = (n > 1.0 && sd > 0.0).then(|| mean / (sd / n.sqrt()));
    let half = half.is_finite().then_some(half);
    println!(
        "{claim}: {word} (difference {:.2} points{}{})",
        100.0 * mean,
        half.map_or(", one seed".to_string(), |h| format!(" ± {:.2}", 100.0 * h)),
        errors.map_or(String::new(), |e| format!(", {e:.1} standard errors")),
    );
    json!({
        "claim": claim, "verdict": word, "difference": mean, "half_interval": half, "standard_errors": errors, "seeds": differences.len(),
    })
}

fn run() -> Result<()> {
    let args = args::Args::parse("hytrel_pretrain", "The benefit of pre-training on tables with few labels.", OPTIONS);
    let (full, quick) = (args.has("full"), args.has("quick"));
    if full && quick {
        args::fail("--full and --quick exclude each other");
    }
    let of = |name: &str, full_value: usize, accepted: &str, range: std::ops::RangeInclusive<usize>| {
        if full && !args.has(name) { full_value } else { args.get(name, accepted, |n: &usize| range.contains(n)) }
    };
    let seeds = of("seeds", 3, "a whole number from 1 to 10", 1..=10) as u64;
    let steps = of("steps", 3000, "a whole number from 20 to 1000000", 20..=1_000_000);
    let tune = of("tune", 800, "a whole number from 10 to 1000000", 10..=1_000_000);
    let most = of("tables", 20_000, "a whole number from 200 to 1000000", 200..=1_000_000);
    let often = of("often", 150, "a whole number from 5 to 10000", 5..=10_000);
    let d = of("width", 64, "a multiple of 4 from 16 to 1024", 16..=1024);
    if d % 4 != 0 {
        args::fail(format!("--width cannot be {d}; give a multiple of 4, since there are four heads"));
    }
    let known = [
        ("corruption", Objective::Corruption),
        ("cells", Objective::Cells),
        ("contrastive", Objective::Contrastive),
        ("dealt", Objective::Dealt),
        ("private", Objective::Private),
    ];
    let mut objectives = vec![Objective::Scratch];
    for name in args.text("arms").split(',') {
        match known.iter().find(|k| k.0 == name) {
            Some(k) => objectives.push(k.1),
            None if name == "all" => objectives.extend(known.map(|k| k.1)),
            None => {
                let names: Vec<&str> = known.iter().map(|k| k.0).collect();
                args::fail(format!("--arms cannot have '{name}'; choose from all, {}", names.join(", ")))
            }
        }
    }
    let lr = args.get("rate", "a positive number, such as 0.002", |r: &f64| r.is_finite() && *r > 0.0);
    let epsilon = args.get("epsilon", "a positive number, such as 8", |e: &f64| e.is_finite() && *e > 0.0);
    let mut folder = args.folder(&json!({
        "seeds": seeds, "steps": steps, "tune": tune, "tables": most, "often": often, "width": d, "rate": lr,
        "epsilon": epsilon, "full": full,
    }))?;
    println!(
        "about {} on two cores",
        match (full, quick) {
            (true, _) => "an hour",
            (_, true) => "40 seconds",
            _ => "8 minutes",
        }
    );
    let start = Instant::now();
    let data = Data::load(most, often, if quick { 1024 } else { 4096 }, false)?;
    println!(
        "{} types; {} tables to pre-train on, {} with typed columns; {} to test",
        data.types.len(),
        data.pretrain.len(),
        data.train.len(),
        data.test.len()
    );
    let shares = [0.01, 0.1, 1.0];
    // Micro and macro F1 over seeds, by objective and share of labels.
    let mut scores = vec![vec![(Vec::new(), Vec::new()); shares.len()]; objectives.len()];
    let (mut notes, mut curves, mut detections) = (Vec::new(), Vec::new(), Vec::new());
    for seed in 0..seeds {
        for (o, &objective) in objectives.iter().enumerate() {
            let recipe = Recipe { d, layers: 2, sets: Sets::default(), captions: true, steps, batch: BATCH, lr, seed };
            let before = pretrain(&data, objective, &recipe, epsilon)?;
            if seed == 0 {
                curves.push((objective.name(), before.curve.clone()));
                notes.push(json!({
                    "objective": objective.name(), "seconds": before.seconds, "epsilon": before.epsilon,
                }));
            }
            if let Some(found) = before.detection {
                println!(
                    "detection of replaced texts on test tables: F1 {:.3}; counting texts {:.3}",
                    found.0, found.1
                );
                detections.push(found);
            }
            for (s, &share) in shares.iter().enumerate() {
                let n = ((data.train.len() as f64 * share).round() as usize).max(8).min(data.train.len());
                let some: Vec<usize> =
                    shuffled(data.train.len(), 50 + seed).into_iter().take(n).map(|i| data.train[i]).collect();
                let recipe = Recipe { steps: if share < 0.05 { tune / 2 } else { tune }, ..recipe.clone() };
                let mut typed = Typed::new(&data, &recipe, before.params.as_ref())?;
                let what = format!("{} at {} % of labels, seed {seed}", objective.name(), 100.0 * share);
                typed.train(&data, &data.labels, &some, &what)?;
                let (micro, by_type) = typed.f1(&data, &data.test)?;
                println!("{what}: micro {:.2}, macro {:.2}", 100.0 * micro, 100.0 * by_type);
                scores[o][s].0.push(micro);
                scores[o][s].1.push(by_type);
                folder.log(
                    seed * 100 + (o * shares.len() + s) as u64,
                    &json!({"objective": objective.name(), "share": share, "seed": seed, "micro": micro, "macro": by_type}),
                )?;
            }
        }
    }
    let mut verdicts = Vec::new();
    for (s, share) in shares.iter().enumerate() {
        let percent = 100.0 * share;
        for (o, objective) in objectives.iter().enumerate().skip(1) {
            let claim = format!("{} is above scratch at {percent} % of labels, micro", objective.name());
            verdicts.push(verdict(&claim, &scores[o][s].0, &scores[0][s].0));
        }
    }
    let (model, unigram): (Vec<f64>, Vec<f64>) = detections.into_iter().unzip();
    if !model.is_empty() {
        verdicts.push(verdict("the detector is above counting texts, F1", &model, &unigram));
    }
    let mut chart = LineChart::new("Column types with few labels").x_label("percent of the tables with labels").log_x();
    for (o, objective) in objectives.iter().enumerate() {
        let points = shares.iter().enumerate();
        let points: Vec<(f64, f64)> =
            points.map(|(s, share)| (100.0 * share, 100.0 * interval(&scores[o][s].0).0)).collect();
        let series = Series::new(objective.name(), points).markers();
        chart = chart.series(if *objective == Objective::Scratch { series.dashed() } else { series });
    }
    chart.y_label("micro F1, percent").save(folder.plot("f1"))?;
    let mut chart = LineChart::new("Loss while pre-training").x_label("step").y_label("nats");
    for (name, curve) in curves.iter().filter(|c| !c.1.is_empty()) {
        chart = chart.series(Series::new(*name, curve.clone()));
    }
    chart.save(folder.plot("losses"))?;
    let table: Vec<Value> = objectives
        .iter()
        .zip(&scores)
        .flat_map(|(o, s)| {
            let row = move |(k, s): (usize, &(Vec<f64>, Vec<f64>))| {
                json!({"objective": o.name(), "share": shares[k], "micro": s.0, "macro": s.1})
            };
            s.iter().enumerate().map(row)
        })
        .collect();
    folder.finish(&json!({
        "real_tables": data.real, "types": data.types.len(), "pretrain_tables": data.pretrain.len(), "methods": table, "pretraining": notes,
        "detector_f1": model, "counting_f1": unigram, "verdicts": verdicts, "tries": "one learning rate for everything",
        "test_key": "noise of the private run is from a key that anybody can compute", "seconds": start.elapsed().as_secs_f64(),
    }))?;
    println!("plots and summary in {}", folder.path().display());
    Ok(())
}

fn main() {
    args::finish(run());
}
