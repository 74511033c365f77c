//! A language model of Python that is trained here: what it completes, and whether it finds a flipped operator.
//!
//! ```text
//! cargo run --release --example code_lm
//! ```
//!
//! A small GPT is trained on the standard library of the Python on this machine (without files that share 13 words in a row with the
//! benchmark). It continues a prompt, and names the operator it doubts most in each buggy prefix of HumanEval. It is compared with
//! operators counted by their neighbours (back-off n-grams) and with a guess. `--model DIR` uses a model and a tokenizer in GPT-2's form
//! instead. Writes `plots/location`, `plots/precision`, `plots/recall`, `plots/false_alarms` and `summary.json`. `--full` trains a larger
//! model.

#[path = "common/args.rs"]
mod args;
#[path = "common/study.rs"]
mod study;

use prismgrad::data::{Bpe, Corpus, Folder, TokenSet, Tokenizer, data_file};
use prismgrad::models::{Gpt, GptConfig};
use prismgrad::nn::Ctx;
use prismgrad::optim::{AdamW, Schedule};
use prismgrad::random::Rng;
use prismgrad::step::PlainStep;
use prismgrad::systems::codeeval::buggy::{Parts, Released, read_problems, read_released};
use prismgrad::systems::codeeval::locate::{AtThreshold, Doubt, Location, Searched, score};
use prismgrad::systems::codeeval::ngram::OperatorNgrams;
use prismgrad::systems::codeeval::overlap::WordRuns;
use prismgrad::systems::codeeval::{CodeLm, CodeModel, Draw, FlipMap, Problem};
use prismgrad::train::plot::{BarChart, LineChart, Series};
use prismgrad::train::{Progress, RunFolder};
use prismgrad::{Array, Error, Result, no_grad};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, exit};
use std::time::Instant;
use study::{interval, verdict};

const OPTIONS: &[args::Opt] = &[
    ("seeds", "1", "1", "models, each with its own initial values and order; searches are paired by model"),
    ("steps", "1000", "30", "training steps of 4 windows each; 10000 with --full"),
    ("width", "128", "32", "width of the model; 192 with --full"),
    ("layers", "4", "1", "layers of the model"),
    ("vocab", "2048", "400", "tokens of the byte-pair encoding"),
    ("rate", "0.003", "0.003", "peak learning rate of AdamW"),
    ("problems", "200", "6", "problems of HumanEval whose buggy prefixes are searched; 107 have some"),
    ("megabytes", "16", "0.5", "the most training text, in MB"),
    ("prompt", PROMPT, PROMPT, "a text to continue, which must end with a whole line"),
    (
        "model",
        "none",
        "none",
        "a folder with config.json, model.safetensors and tokenizer.json in GPT-2's form; nothing is trained",
    ),
    ("full", "", "", "trains a larger model for longer"),
];

const PROMPT: &str = "def count_lines(path):\n    \"\"\"Return the number of lines of a file.\"\"\"";
/// Number of positions of the model. A longer prefix is cut on the left, which removes part of its specification.
const WINDOW: usize = 192;
/// Number of windows in a step. It is small because with so little text the number of steps is decisive.
const BATCH: usize = 4;
/// Number of words in a row that a training file may not share with the benchmark.
const RUN: usize = 13;
const THRESHOLDS: [f64; 12] = [0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99];
/// The paper's threshold.
const PAPER: f64 = 0.95;

/// The folder and the version of the standard library, as the interpreter reports them.
fn standard_library() -> Result<(PathBuf, String), String> {
    let python = std::env::var_os("PRISMGRAD_PYTHON").unwrap_or_else(|| "python3".into());
    let code = "import sys, sysconfig\nprint(sysconfig.get_paths()['stdlib'])\nprint(sys.version.split()[0])";
    let shown = Path::new(&python).display().to_string();
    let out = Command::new(&python).args(["-I", "-c", code]).output();
    let out = out.map_err(|e| format!("no Python at {shown} ({e}), whose standard library is the training text"))?;
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let mut lines = text.lines();
    match (lines.next(), lines.next()) {
        (Some(folder), Some(version)) if Path::new(folder).is_dir() => Ok((folder.into(), version.into())),
        _ => Err(format!("{shown} does not say where its standard library is, which is the training text")),
    }
}

/// Training and validation files, the number of files that share a passage with the benchmark, and these passages.
struct Text {
    train: Corpus,
    validation: Corpus,
    info: Value,
}

fn read_text(problems: &[Problem], megabytes: f64) -> Result<Text> {
    let (folder, version) = standard_library().unwrap_or_else(|why| {
        let how = "install Python 3, name one by PRISMGRAD_PYTHON, or give a model by --model";
        args::fail(format!("{why}; {how}"))
    });
    // Packages that were installed later are not part of the standard library, and its tests are repetitive.
    let without = ["site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "turtledemo"];
    let found = Folder::new(&folder).extensions(["py"]).without(without).load()?;
    let mut runs = WordRuns::new(RUN);
    for p in problems {
        for text in [&p.prompt, &p.canonical_solution, &p.test] {
            runs.add(text);
        }
    }
    let all = found.documents.len();
    let (mut kept, mut shared) = (Corpus::default(), Vec::new());
    // The order is random, so that a smaller part still has text of all kinds.
    let order = prismgrad::data::shuffled(all, 0);
    let mut bytes = 0;
    for document in order.into_iter().map(|i| &found.documents[i]) {
        match runs.shared(&document.text) {
            Some(run) => shared.push((document.name.clone(), run)),
            None if bytes as f64 + document.text.len() as f64 <= megabytes * 1e6 => {
                bytes += document.text.len();
                kept.documents.push(document.clone());
            }
            None => {}
        }
    }
    println!(
        "standard library of Python {version}: {all} files; {} share {RUN} words in a row with a problem of the benchmark \
         ({} such runs) and are left out; {} files with {:.1} MB are used",
        shared.len(),
        runs.len(),
        kept.documents.len(),
        bytes as f64 / 1e6
    );
    for (name, run) in shared.iter().take(3) {
        println!("  {name}: {run}");
    }
    let info = json!({"python": version, "files": all, "used": kept.documents.len(), "bytes": bytes,
        "overlapping": shared.len(), "overlapping_files": shared.iter().map(|s| &s.0).collect::<Vec<_>>()});
    let (train, validation) = kept.split(0.05, 0);
    Ok(Text { train, validation, info })
}

#[derive(Clone, Copy, serde::Serialize)]
struct Training {
    width: usize,
    layers: usize,
    steps: u64,
    rate: f64,
}

/// Mean loss over some windows, in nats per token.
fn mean_loss(model: &Gpt, set: &TokenSet) -> Result<f64> {
    let windows = set.windows(WINDOW)?;
    let few: Vec<usize> = (0..windows.len()).step_by((windows.len() / 96).max(1)).collect();
    let mut sum = 0.0;
    for part in few.chunks(BATCH) {
        let (x, y) = windows.batch(part)?;
        let [x, y] = [x, y].map(|ids| Array::from_slice(&ids, &[part.len(), WINDOW]));
        sum += no_grad(|| model.losses(&x?, &y?, &Ctx::eval()))?.array().to_f64().iter().sum::<f64>();
    }
    Ok(sum / few.len() as f64)
}

fn train(train: &TokenSet, vocab: usize, t: Training, seed: u64) -> Result<(Gpt, Value)> {
    let config = GptConfig::small(vocab, WINDOW, t.layers, t.width, (t.width / 32).max(1)).rotary();
    let model = Gpt::new(config, seed)?;
    let schedule = Schedule::cosine(t.rate, (t.steps / 20).max(1), t.steps);
    let mut step = PlainStep::new(&model.params().all(), AdamW::default(), schedule)?;
    let windows = train.windows(WINDOW)?;
    let mut rng = Rng::new(seed ^ 0x636f_6465);
    let mut progress = Progress::new(format!("seed {seed}: training"), Some(t.steps), 0);
    let start = Instant::now();
    let mut last = 0.0;
    for i in 0..t.steps {
        let chosen: Vec<usize> = (0..BATCH).map(|_| rng.below(windows.len() as u64) as usize).collect();
        let (x, y) = windows.batch(&chosen)?;
        let (x, y) = (Array::from_slice(&x, &[BATCH, WINDOW])?, Array::from_slice(&y, &[BATCH, WINDOW])?);
        let report = step.run_one(|| model.losses(&x, &y, &Ctx::train(i)))?;
        last = report.loss()?;
        progress.set(i + 1, &[("loss", last)]);
    }
    progress.finish();
    let (seconds, tokens) = (start.elapsed().as_secs_f64(), t.steps as usize * BATCH * WINDOW);
    println!(
        "seed {seed}: {} parameters, {tokens} tokens in {seconds:.0} s ({:.0} a second), last loss {last:.3}",
        model.params().count(),
        tokens as f64 / seconds
    );
    let info = json!({"parameters": model.params().count(), "tokens": tokens, "seconds": seconds, "loss": last});
    Ok((model, info))
}

/// Rows of a problem whose flipped operator is at the same place. Each of their texts begins with the shorter ones.
struct Site {
    problem: usize,
    head_lines: usize,
    line: usize,
    rows: Vec<Released>,
}

fn sites(problems: &[Problem], released: &[Released], most: usize) -> Result<Vec<Site>> {
    let mut of: BTreeMap<(usize, usize), Vec<Released>> = BTreeMap::new();
    for row in released {
        let known = problems.iter().position(|p| p.task_id == row.task_id);
        let place = row.clean.bytes().zip(row.buggy.bytes()).position(|(a, b)| a != b);
        let (Some(problem), Some(place)) = (known, place) else {
            let message = format!("a row of {} has no problem, or nothing is flipped in it", row.task_id);
            return Err(Error::Invalid { op: "code_lm", message });
        };
        of.entry((problem, place)).or_default().push(row.clone());
    }
    let few: BTreeSet<usize> = of.keys().map(|k| k.0).collect::<BTreeSet<_>>().into_iter().take(most).collect();
    let site = |((problem, place), mut rows): ((usize, usize), Vec<Released>)| {
        rows.sort_by_key(|r| r.buggy.len());
        let line = rows[0].clean[..place].matches('\n').count();
        Site { problem, head_lines: Parts::of(&problems[problem]).head.lines().count(), line, rows }
    };
    Ok(of.into_iter().filter(|(k, _)| few.contains(&k.0)).map(site).collect())
}

/// The doubts about operators of the body, without those of the specification.
fn body(site: &Site, doubts: impl IntoIterator<Item = Doubt>) -> Vec<Doubt> {
    doubts.into_iter().filter(|d| d.line >= site.head_lines).collect()
}

/// A search: for a text and the lengths of some prefixes of it, it returns the doubts in each prefix.
type Search<'a> = dyn FnMut(&str, &[usize]) -> Result<Vec<Vec<Doubt>>> + 'a;

fn search(sites: &[Site], of: &mut Search, mut each: impl FnMut(u64)) -> Result<Vec<Searched>> {
    let mut out = Vec::new();
    // All sites of a problem have the same clean text, so the doubts at the end of each line are kept.
    let mut known: BTreeMap<&str, BTreeMap<usize, Vec<Doubt>>> = BTreeMap::new();
    for (i, site) in sites.iter().enumerate() {
        let Some(longest) = site.rows.last() else { continue };
        let buggy = of(&longest.buggy, &site.rows.iter().map(|r| r.buggy.len()).collect::<Vec<_>>())?;
        let clean = longest.clean.as_str();
        if !known.contains_key(clean) {
            let lines = clean.match_indices('\n').map(|m| m.0).skip(site.head_lines);
            let ends: Vec<usize> = lines.chain([clean.len()]).collect();
            known.insert(clean, ends.iter().copied().zip(of(clean, &ends)?).collect());
        }
        for (row, buggy) in site.rows.iter().zip(buggy) {
            let clean = known[clean].get(&row.clean.len()).cloned().unwrap_or_default();
            let (buggy, clean) = (body(site, buggy), body(site, clean));
            out.push(Searched { problem: site.problem, line: site.line, buggy, clean });
        }
        each(i as u64 + 1);
    }
    Ok(out)
}

/// The doubts of each prefix, for a search that reads from left to right.
fn by_prefix(text: &str, ends: &[usize], doubts: &[Doubt]) -> Vec<Vec<Doubt>> {
    let lines = |end: usize| text[..end].matches('\n').count();
    ends.iter().map(|&end| doubts.iter().filter(|d| d.line <= lines(end)).cloned().collect()).collect()
}

fn shown(name: &str, l: &Location) {
    let paper = l
        .curve
        .iter()
        .find(|t| t.threshold == PAPER)
        .map_or((0.0, 0.0, 0.0), |t| (t.precision, t.recall, t.false_alarms));
    println!(
        "  {name:<18} {:.1} % of rows, {:.1} % by problem; first gap above {PAPER}: precision {:.2}, recall {:.2}, false alarms on \
         clean prefixes {:.1} %",
        100.0 * l.found,
        100.0 * l.by_problem,
        paper.0,
        paper.1,
        100.0 * paper.2
    );
}

/// The names of the model's searches: the paper's rule; the same, given that an operator of its kind follows; and the likelihood of the
/// whole text with and without the flip.
const NEXT: &str = "next token";
const OPERATOR: &str = "next operator";
const WHOLE: &str = "whole text";

fn locate(lm: &CodeLm, sites: &[Site], seed: u64) -> Result<BTreeMap<&'static str, Location>> {
    let mut progress = Progress::new(format!("seed {seed}: location"), Some(sites.len() as u64), 0);
    let whole = search(sites, &mut |text, ends| lm.whole_doubts(text, ends), |done| progress.set(done, &[]))?;
    let left = |text: &str, ends: &[usize]| Ok(by_prefix(text, ends, &lm.doubts(&[text.to_string()])?[0]));
    let next = search(sites, &mut { left }, |_| {})?;
    progress.finish();
    let given = |doubts: &[Doubt]| doubts.iter().map(Doubt::given_kind).collect();
    let operator: Vec<Searched> =
        next.iter().map(|s| Searched { buggy: given(&s.buggy), clean: given(&s.clean), ..*s }).collect();
    let all = [(NEXT, next), (OPERATOR, operator), (WHOLE, whole)];
    all.into_iter().map(|(name, rows)| Ok((name, score(&rows, &THRESHOLDS)?))).collect()
}

fn counted(grams: &OperatorNgrams, sites: &[Site]) -> Result<Location> {
    // The tokens after an operator matter here, so each prefix is read by itself.
    let mut of = |text: &str, ends: &[usize]| ends.iter().map(|&e| grams.doubts(&text[..e])).collect();
    let rows = search(sites, &mut of, |_| {})?;
    score(&rows, &THRESHOLDS)
}

fn charts(folder: &RunFolder, runs: &[BTreeMap<&'static str, Location>], grams: Option<&Location>) -> Result<()> {
    let random = runs[0][NEXT].random_by_problem;
    let mut bars = BarChart::new("Flipped operators of HumanEval found by the largest gap").label("mean over problems");
    bars = bars.bar("guess", random);
    if let Some(grams) = grams {
        bars = bars.bar("n-grams", grams.by_problem);
    }
    let n = runs.len() as f64;
    for name in [NEXT, OPERATOR, WHOLE] {
        let (mean, half) = interval(&runs.iter().map(|r| r[name].by_problem).collect::<Vec<_>>());
        bars = match half.is_finite() {
            true => bars.bar_with_interval(name, mean, (mean - half).max(0.0), (mean + half).min(1.0)),
            false => bars.bar(name, mean),
        };
    }
    bars.save(folder.plot("location"))?;
    type Of = fn(&AtThreshold) -> f64;
    let kinds: [(&str, &str, Of); 3] = [
        ("precision", "right lines among those named", |t| if t.recall > 0.0 { t.precision } else { f64::NAN }),
        ("recall", "right lines among all buggy prefixes", |t| t.recall),
        ("false_alarms", "clean prefixes in which a line is named", |t| t.false_alarms),
    ];
    for (file, label, of) in kinds {
        let mut chart =
            LineChart::new("The first gap above a threshold, HumanEval").x_label("threshold").y_label(label);
        // Where no line is named, there is no point for precision.
        let points = |curve: &dyn Fn(usize) -> f64| -> Vec<(f64, f64)> {
            let all = THRESHOLDS.iter().enumerate().map(|(i, &t)| (t, curve(i)));
            all.filter(|p| p.1.is_finite()).collect()
        };
        for name in [NEXT, OPERATOR, WHOLE] {
            let mean = |i: usize| runs.iter().map(|r| of(&r[name].curve[i])).sum::<f64>() / n;
            chart = chart.series(Series::new(name, points(&mean)).markers());
        }
        if let Some(grams) = grams {
            chart = chart.series(Series::new("n-grams", points(&|i| of(&grams.curve[i]))).dashed());
        }
        chart.save(folder.plot(file))?;
    }
    Ok(())
}

fn run() -> Result<()> {
    let args = args::Args::parse(
        "code_lm",
        "A language model of Python: completion, and location of flipped operators.",
        OPTIONS,
    );
    let (full, quick) = (args.has("full"), args.has("quick"));
    if full && quick {
        args::fail("--full and --quick exclude each other");
    }
    let of = |name: &str, full_value: usize, range: std::ops::RangeInclusive<usize>| {
        let accepted = format!("a whole number from {} to {}", range.start(), range.end());
        if full && !args.has(name) && full_value > 0 {
            full_value
        } else {
            args.get(name, &accepted, |n: &usize| range.contains(n))
        }
    };
    let own = Some(args.text("model")).filter(|m| *m != "none");
    let seeds = if own.is_some() { 1 } else { of("seeds", 0, 1..=20) };
    let (width, layers) = (32 * of("width", 192, 32..=2048).div_ceil(32), of("layers", 0, 1..=48));
    let steps = of("steps", 10_000, 1..=1_000_000) as u64;
    let rate = args.get("rate", "a number above 0 and at most 1", |r: &f64| *r > 0.0 && *r <= 1.0);
    let training = Training { width, layers, steps, rate };
    let vocab = of("vocab", 0, 257..=60_000);
    let most = of("problems", 0, 1..=10_000);
    let megabytes = args.get("megabytes", "a number from 0.1 to 1000", |m: &f64| (0.1..=1000.0).contains(m));
    let prompt = args.text("prompt").trim_end().to_string();
    let benchmark = match (data_file("HumanEval.jsonl.gz"), data_file("buggy-HumanEval.jsonl.gz")) {
        (Ok(problems), Ok(rows)) => Some((read_problems(problems)?, read_released(rows)?)),
        _ => None,
    };
    if benchmark.is_none() {
        println!(
            "location is left out, and overlap is not checked: HumanEval.jsonl.gz and buggy-HumanEval.jsonl.gz are not in the folder \
             that PRISMGRAD_DATA names; get them from the repositories openai/human-eval and amazon-science/buggy-code-completion"
        );
    }
    let config = json!({"seeds": seeds, "training": training, "vocab": vocab, "problems": most, "megabytes": megabytes,
        "model": own, "prompt": prompt, "full": full});
    let minutes = match (own, full, quick) {
        (Some(_), ..) => "it depends on the model how long this takes",
        (_, true, _) => "about 40 minutes a seed on two free cores",
        (_, _, true) => "about 15 seconds on two free cores",
        _ => "about 3 minutes a seed on two free cores",
    };
    let start = Instant::now();
    let (problems, released) = benchmark.unwrap_or_default();
    let text = match own {
        Some(_) => None,
        None => Some(read_text(&problems, megabytes)?),
    };
    let mut folder = args.folder(&config)?;
    println!("{minutes}");
    let tokenizer = match (own, &text) {
        (Some(dir), _) => Bpe::load(Path::new(dir).join("tokenizer.json"))?,
        (None, Some(text)) => Bpe::train(text.train.texts(), vocab)?,
        (None, None) => exit(2),
    };
    let sets = text.as_ref().map(|t| (t.train.tokenize(&tokenizer), t.validation.tokenize(&tokenizer)));
    if let Some((train, held)) = &sets {
        println!(
            "{} tokens to train on, {} held out, {} in the vocabulary",
            train.tokens().len(),
            held.tokens().len(),
            tokenizer.vocab_size()
        );
    }
    let sites = sites(&problems, &released, most)?;
    let mut grams = OperatorNgrams::new(FlipMap::paper());
    let mut unread = 0;
    if let Some(text) = &text {
        unread = text.train.texts().filter(|t| grams.count(t).is_err()).count();
    }
    let by_count = match (&text, sites.is_empty()) {
        (Some(_), false) => Some(counted(&grams, &sites)?),
        _ => None,
    };
    let (mut runs, mut records) = (Vec::new(), Vec::new());
    for seed in 0..seeds as u64 {
        let (model, mut record) = match (own, &sets) {
            (Some(dir), _) => {
                let model = Gpt::load(dir)?;
                println!("{dir}: {} parameters", model.params().count());
                (model, json!({"parameters": "a model of the user's"}))
            }
            (None, Some((set, _))) => train(set, tokenizer.vocab_size(), training, seed)?,
            (None, None) => exit(2),
        };
        if let Some((_, held)) = &sets {
            let loss = mean_loss(&model, held)?;
            println!("  held-out files: {loss:.3} nats a token");
            record["held_out_loss"] = json!(loss);
        }
        let lm = CodeLm::new(&model, &tokenizer)?;
        let done = lm.complete(std::slice::from_ref(&prompt), &Draw { samples: 1, temperature: 0.6, seed })?;
        println!("  the prompt, completed:\n{}", done[0][0].trim_end());
        record["completion"] = json!(done[0][0]);
        if !sites.is_empty() {
            let found = locate(&lm, &sites, seed)?;
            for (name, location) in &found {
                shown(name, location);
            }
            record["location"] = json!(found);
            runs.push(found);
        }
        folder.log(seed, &record)?;
        records.push(record);
        if own.is_none() {
            model.save(folder.path().join(format!("model-{seed}")))?;
            tokenizer.save(folder.path().join(format!("model-{seed}")).join("tokenizer.json"))?;
        }
    }
    let mut verdicts: Vec<Value> = Vec::new();
    if let Some(first) = runs.first() {
        let any = &first[NEXT];
        println!(
            "{} rows of {} sites; a guess: {:.1} % of rows, {:.1} % by problem",
            any.rows,
            sites.len(),
            100.0 * any.random,
            100.0 * any.random_by_problem
        );
        if let Some(l) = &by_count {
            println!("{} operators counted, {unread} files do not lex", grams.sites());
            shown("n-grams", l);
        }
        let less = |name: &str, of: fn(&Location) -> f64, limit: f64| -> Vec<f64> {
            runs.iter().map(|r| of(&r[name]) - limit).collect()
        };
        for name in [NEXT, OPERATOR, WHOLE] {
            let mut claim = |what: String, of: fn(&Location) -> f64, limit: f64| {
                verdicts.push(verdict(&format!("{name}: {what}"), &less(name, of, limit)));
            };
            claim("above a guess, by problem".into(), |l| l.by_problem, any.random_by_problem);
            if let Some(l) = &by_count {
                claim("above n-grams of the same files, rows".into(), |l| l.found, l.found);
                claim("above n-grams of the same files, by problem".into(), |l| l.by_problem, l.by_problem);
            }
            claim("above 62.9 % of rows".into(), |l| l.found, 0.629);
            claim("above 78.4 % by problem".into(), |l| l.by_problem, 0.784);
        }
        charts(&folder, &runs, by_count.as_ref())?;
    }
    let seconds = start.elapsed().as_secs_f64();
    let text = text.map(|t| t.info);
    folder.finish(
        &json!({"text": text, "runs": records, "n_grams": by_count, "verdicts": verdicts, "seconds": seconds}),
    )?;
    println!("plots and summary in {} after {seconds:.0} s", folder.path().display());
    Ok(())
}

fn main() {
    args::finish(run());
}
