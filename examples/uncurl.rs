//! Reduction of experts after training, chosen for a task: UNCURL (Sarkar et al. 2024) beside other methods, on real text.
//!
//! ```text
//! cargo run --release --example uncurl
//! ```
//!
//! A language model with mixtures of experts is trained on several domains and reduced for each of three tasks; reduced models are compared
//! with each other and with small models that were trained from the start. Writes `plots/methods`, `plots/threshold`, `plots/similarity`,
//! `plots/domains` (`.svg` and `.png`) and `summary.json` to the run folder. `--full` makes the tables of `docs/results/uncurl.md`. With
//! `--mixtral DIR --text FILE --keep N` it reduces the Mixtral model in a folder for a text of your own instead.

#[path = "common/args.rs"]
mod args;
#[path = "common/documents.rs"]
mod documents;
#[path = "common/experts.rs"]
mod experts;
#[path = "common/study.rs"]
mod study;

use experts::{BATCH, Domain, SEQ, Task, Treatment, domains, tasks};
use prismgrad::models::{Gpt, GptConfig, Mixtral};
use prismgrad::nn::{Balance, Ctx, MoeConfig};
use prismgrad::optim::{AdamW, Schedule};
use prismgrad::random::Rng;
use prismgrad::step::PlainStep;
use prismgrad::systems::pruning::{Batch, Keep, Method, Observe, Plan, Reduce, RouterInit, Statistics, observe};
use prismgrad::train::plot::{BarChart, HeatMap, LineChart, Series};
use prismgrad::train::{Progress, RunFolder};
use prismgrad::{Array, Error, Result};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Instant;
use study::interval;

const OPTIONS: &[args::Opt] = &[
    ("seeds", "1", "1", "runs of everything, paired by seed; 3 with --full"),
    ("tokens", "600000", "16384", "tokens of pre-training of each model; 2000000 with --full"),
    ("steps", "60", "3", "steps of fine-tuning; 120 with --full"),
    ("full", "", "", "makes the tables of docs/results/uncurl.md: three seeds, 8 and 16 experts, all methods"),
    ("mixtral", "none", "none", "a folder with a Mixtral model, to be reduced instead"),
    ("text", "none", "none", "with --mixtral: a file of token ids, separated by spaces, of the task"),
    ("keep", "4", "4", "with --mixtral: experts that stay in each layer"),
];

fn config(vocab: usize, experts: usize) -> GptConfig {
    let mut c = GptConfig::small(vocab, SEQ, 4, 96, 4);
    let moe = MoeConfig { balance: Balance::Batch(0.01), ..MoeConfig::new(experts, 1, 384) };
    c.moe = Some(vec![Some(moe), None, Some(moe), None]);
    c
}

/// Trains on all domains equally. The same seed has the same batches for every number of experts.
fn pretrain(domains: &[Domain], vocab: usize, experts: usize, tokens: usize, seed: u64) -> Result<Gpt> {
    let model = Gpt::new(config(vocab, experts), seed)?;
    let steps = (tokens / (BATCH * SEQ)).max(2) as u64;
    let mut step =
        PlainStep::new(&model.params().all(), AdamW::default(), Schedule::cosine(3e-3, steps / 20 + 1, steps))?;
    let mut rng = Rng::new(seed);
    let mut progress = Progress::new(format!("pre-training {experts} experts, seed {seed}"), Some(steps), 0);
    for t in 0..steps {
        let (mut x, mut y) = (Vec::new(), Vec::new());
        for i in 0..BATCH {
            let from = &domains[(t as usize * BATCH + i) % domains.len()].train;
            let (a, b) = from.sample(rng.below(from.len() as u64) as usize);
            x.extend(a);
            y.extend(b);
        }
        let of = |v: &[u32]| Array::from_slice(v, &[BATCH, SEQ]);
        let report = step.run_one(|| model.losses(of(&x)?, of(&y)?, &Ctx::train(t)))?;
        if (t + 1) % 20 == 0 || t + 1 == steps {
            progress.set(t + 1, &[("loss", report.loss()?)]);
        }
    }
    progress.finish();
    Ok(model)
}

/// A new model with the same values.
fn copy(model: &Gpt) -> Result<Gpt> {
    let new = Gpt::new(model.config().clone(), 0)?;
    for (to, from) in new.params().all().iter().zip(model.params().all()) {
        to.set(from.value().copy())?;
    }
    Ok(new)
}

/// Statistics of a model on windows or samples.
fn statistics(model: &Gpt, batches: Vec<Batch>) -> Result<Statistics> {
    observe(model, batches.into_iter().map(Ok), &Observe::default())
}

/// The mutual information of expert and domain in bits, for each layer with experts, which measures how specialised the experts are. Also
/// the share of each domain's tokens by expert in the last such layer.
fn specialisation(model: &Gpt, domains: &[Domain]) -> Result<(Vec<f64>, Vec<Vec<f64>>)> {
    let all = domains.iter().map(|d| statistics(model, d.batches(8)?)).collect::<Result<Vec<_>>>()?;
    let layers = (0..all[0].layers.len()).filter(|&l| all[0].layers[l].is_some());
    let shares = |l: usize| -> Vec<Vec<f64>> {
        let layer = |s: &Statistics| {
            s.layers[l].as_ref().map_or(Vec::new(), |l| l.load.iter().map(|x| x / l.tokens as f64).collect())
        };
        all.iter().map(layer).collect()
    };
    let bits = |rows: Vec<Vec<f64>>| {
        let n = rows.len() as f64;
        let mean = |e: usize| rows.iter().map(|r| r[e]).sum::<f64>() / n;
        let term = |p: f64, e: usize| if p > 0.0 { p * (p / mean(e)).log2() } else { 0.0 };
        rows.iter().map(|r| r.iter().enumerate().map(|(e, &p)| term(p, e)).sum::<f64>()).sum::<f64>() / n
    };
    let layers: Vec<usize> = layers.collect();
    let last = layers.last().map_or(Vec::new(), |&l| shares(l));
    Ok((layers.iter().map(|&l| bits(shares(l))).collect(), last))
}

/// One cell of the tables: the method, the task, and the result.
#[derive(Clone)]
struct Cell {
    experiment: &'static str,
    from: usize,
    to: usize,
    method: String,
    router: &'static str,
    task: &'static str,
    seed: u64,
    loss: f64,
    accuracy: f64,
    seconds: f64,
}

impl Cell {
    fn json(&self) -> Value {
        json!({
            "experiment": self.experiment, "experts": self.from, "kept": self.to, "method": self.method, "router": self.router,
            "task": self.task, "seed": self.seed, "test_loss": self.loss, "accuracy": self.accuracy, "seconds": self.seconds,
        })
    }
}

/// The results of a run so far.
struct Bench<'a> {
    tasks: &'a [Task],
    steps: u64,
    cells: Vec<Cell>,
    folder: &'a mut RunFolder,
}

impl Bench<'_> {
    /// Fine-tunes a copy of a model on each task for which `reduced` gives one, and evaluates it on the task's test set.
    fn run(
        &mut self,
        (experiment, from, to, seed): (&'static str, usize, usize, u64),
        (method, router): (&str, Treatment),
        full: &Gpt,
        reduced: impl Fn(&Task) -> Result<Gpt>,
    ) -> Result<()> {
        let (mut line, tasks) = (Vec::new(), self.tasks);
        for task in tasks {
            let start = Instant::now();
            let model = reduced(task)?;
            let (loss, accuracy) = task.tune(&model, full, router, self.steps, seed)?;
            line.push(match accuracy.is_nan() {
                true => format!("{} {loss:.3}", task.name),
                false => format!("{} {loss:.3} ({:.1} %)", task.name, 100.0 * accuracy),
            });
            let cell = Cell {
                experiment,
                from,
                to,
                method: method.into(),
                router: router.name(),
                task: task.name,
                seed,
                loss,
                accuracy,
                seconds: start.elapsed().as_secs_f64(),
            };
            self.folder.log(self.cells.len() as u64, &cell.json())?;
            self.cells.push(cell);
        }
        println!("{experiment}: {from} to {to}, {method}, {}: {}", router.name(), line.join(", "));
        Ok(())
    }
    /// For each seed, the difference between two arms' test losses, averaged over tasks.
    fn paired(&self, a: impl Fn(&Cell) -> bool, b: impl Fn(&Cell) -> bool) -> Vec<f64> {
        let mut of: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
        for x in self.cells.iter().filter(|c| a(c)) {
            if let Some(y) = self.cells.iter().find(|c| b(c) && c.task == x.task && c.seed == x.seed) {
                of.entry(x.seed).or_default().push(x.loss - y.loss);
            }
        }
        of.values().map(|v| v.iter().sum::<f64>() / v.len() as f64).collect()
    }
}

/// The verdict on the claim that paired differences are below 0.
fn verdict(claim: String, differences: &[f64]) -> Value {
    let (mean, half) = interval(differences);
    let word = study::word(-mean, half);
    let spread = if half.is_finite() { format!("{mean:+.4} ± {half:.4}") } else { format!("{mean:+.4}, one seed") };
    println!("{claim}: {word} (difference {spread})");
    let below = differences.iter().filter(|d| **d < 0.0).count();
    json!({
        "claim": claim, "verdict": word, "difference": mean, "half_interval": half.is_finite().then_some(half),
        "seeds": differences.len(), "seeds_below": below,
    })
}

/// Reduces a model for a task: plan, then new model.
fn reduce(model: &Gpt, stats: &Statistics, to: usize, method: Method, router: RouterInit, seed: u64) -> Result<Gpt> {
    plan(model, stats, to, method, router, seed)?.apply(model)
}

fn plan(model: &Gpt, stats: &Statistics, to: usize, method: Method, router: RouterInit, seed: u64) -> Result<Plan> {
    Reduce { method, router, seed, ..Reduce::new(Keep::Same(to)) }.plan(model, stats)
}

/// All experiments with one full model and the native ones.
fn study(
    bench: &mut Bench,
    domains: &[Domain],
    full: &Gpt,
    natives: &BTreeMap<usize, Gpt>,
    seed: u64,
    wide: bool,
) -> Result<()> {
    let from = full.config().moe.iter().flatten().flatten().next().map_or(0, |c| c.experts);
    let stats: BTreeMap<&str, Statistics> =
        bench.tasks.iter().map(|t| Ok((t.name, statistics(full, t.batches()?)?))).collect::<Result<_>>()?;
    let elsewhere = statistics(full, domains[0].batches(16)?)?;
    bench.run(("full", from, from, seed), ("none", Treatment::Kept), full, |_| copy(full))?;
    for to in [from / 2, from / 4] {
        let at = |experiment| (experiment, from, to, seed);
        let native = natives
            .get(&to)
            .ok_or_else(|| Error::Invalid { op: "uncurl", message: format!("no model of {to} experts") })?;
        bench.run(at("native"), ("native", Treatment::Kept), full, |_| copy(native))?;
        let mut methods =
            vec![("UNCURL", Method::Uncurl), ("greedy", Method::Greedy), ("random clusters", Method::RandomClusters)];
        if wide {
            methods.extend([("anchor merge", Method::AnchorMerge), ("M-SMoE", Method::MSmoe), ("REAM", Method::Ream)]);
        }
        for (name, method) in methods {
            for (init, treatment) in [(RouterInit::Random, Treatment::WarmedUp), (RouterInit::Keep, Treatment::Kept)] {
                bench.run(at("methods"), (name, treatment), full, |t| {
                    reduce(full, &stats[t.name], to, method, init, seed)
                })?;
            }
        }
        let warm = Treatment::WarmedUp;
        bench.run(at("null"), ("UNCURL, another domain", warm), full, |_| {
            reduce(full, &elsewhere, to, Method::Uncurl, RouterInit::Random, seed)
        })?;
        bench.run(at("layers"), ("greedy first, UNCURL above", warm), full, |t| {
            let mut mixed = plan(full, &stats[t.name], to, Method::Uncurl, RouterInit::Random, seed)?;
            mixed.layers[0] =
                plan(full, &stats[t.name], to, Method::Greedy, RouterInit::Random, seed)?.layers.swap_remove(0);
            mixed.apply(full)
        })?;
        if to == from / 2 {
            let both = [("prune (REAP)", Method::Reap { renormalise: true }), ("merge (UNCURL)", Method::Uncurl)];
            let routers = [
                (RouterInit::Keep, Treatment::Kept, Treatment::OneShot),
                (RouterInit::Random, Treatment::WarmedUp, Treatment::WarmedUpOnly),
                (RouterInit::Keep, Treatment::Distilled, Treatment::DistilledOnly),
            ];
            for (name, method) in both {
                for (init, tuned, only) in routers {
                    for treatment in [only, tuned] {
                        let model = |t: &Task| reduce(full, &stats[t.name], to, method, init, seed);
                        bench.run(at("prune or merge"), (name, treatment), full, model)?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// Step times of a reduced model and a native one of its size, taken in turn, as medians in milliseconds.
fn step_times(native: &Gpt, reduced: &Gpt) -> Result<(f64, f64)> {
    let ids = Array::generate(&[BATCH, SEQ], prismgrad::DType::U32, |i| (i * 31 % 500) as f64);
    let mut steps = Vec::new();
    for model in [native, reduced] {
        steps.push((
            model,
            PlainStep::new(&model.params().all(), AdamW::default(), Schedule::constant(1e-9))?,
            Vec::new(),
        ));
    }
    for t in 0..12 {
        for (model, step, times) in &mut steps {
            let start = Instant::now();
            step.run_one(|| model.losses(&ids, &ids, &Ctx::train(t)))?.loss()?;
            times.push(1e3 * start.elapsed().as_secs_f64());
        }
    }
    let median = |times: &mut Vec<f64>| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    Ok((median(&mut steps[0].2), median(&mut steps[1].2)))
}

fn plots(
    bench: &Bench,
    sizes: &[usize],
    full: &Gpt,
    shares: &[Vec<f64>],
    domains: &[Domain],
    seeds: u64,
) -> Result<()> {
    let large = sizes[sizes.len() - 1];
    let mean = |of: &dyn Fn(&&Cell) -> bool| {
        let all: Vec<f64> = bench.cells.iter().filter(of).map(|c| c.loss).collect();
        all.iter().sum::<f64>() / all.len().max(1) as f64
    };
    let mut chart =
        BarChart::new(format!("{large} to {} experts, fine-tuned", large / 2)).label("test loss, mean of the tasks");
    let mut seen: Vec<(&str, &str)> = Vec::new();
    for c in bench.cells.iter().filter(|c| c.from == large && c.to >= large / 2) {
        let key = (c.method.as_str(), c.router);
        if matches!(c.experiment, "methods" | "native" | "full" | "null" | "layers") && !seen.contains(&key) {
            seen.push(key);
            let name =
                if c.experiment == "full" { "all experts".to_string() } else { format!("{}, {}", c.method, c.router) };
            chart = chart.bar(name, mean(&|d| (d.method.as_str(), d.router) == key && d.from == large && d.to == c.to));
        }
    }
    chart.save(bench.folder.plot("methods"))?;
    let mut lines = LineChart::new("Reduced beside native models of the same size").x_label("reduction factor");
    for &from in sizes {
        let at = |to: usize| {
            let d = bench.paired(
                |c| {
                    c.experiment == "methods"
                        && c.method == "UNCURL"
                        && c.router == "warmed up"
                        && (c.from, c.to) == (from, to)
                },
                |c| c.experiment == "native" && (c.from, c.to) == (from, to),
            );
            interval(&d)
        };
        let points: Vec<(f64, f64, f64)> =
            [2, 4].iter().map(|f| (*f as f64, at(from / f).0, if seeds > 1 { at(from / f).1 } else { 0.0 })).collect();
        let line: Vec<(f64, f64)> = points.iter().map(|p| (p.0, p.1)).collect();
        let band: Vec<(f64, f64, f64)> = points.iter().map(|p| (p.0, p.1 - p.2, p.1 + p.2)).collect();
        lines = lines.series(Series::new(format!("{from} experts"), line).band(band).markers());
    }
    lines = lines.series(Series::new("equal", vec![(2.0, 0.0), (4.0, 0.0)]).dashed());
    lines.y_label("UNCURL − native, test loss").save(bench.folder.plot("threshold"))?;
    // The experts of the last layer in the order of the clusters for the first task.
    let stats = statistics(full, bench.tasks[0].batches()?)?;
    let reduced = plan(full, &stats, large / 2, Method::Uncurl, RouterInit::Keep, 0)?;
    if let (Some(Some(layer)), Some(Some(stats))) = (reduced.layers.get(2), stats.layers.get(2)) {
        let order: Vec<usize> = layer.clusters.iter().flatten().copied().collect();
        let s = stats.similarity();
        let values: Vec<f64> =
            order.iter().flat_map(|&i| order.iter().map(move |&j| (i, j))).map(|(i, j)| s[i * large + j]).collect();
        let names = || order.iter().map(|e| e.to_string());
        HeatMap::new(
            format!("Similarity of experts on {}, layer 2, by cluster", bench.tasks[0].name),
            names(),
            names().collect::<Vec<_>>(),
            &values,
        )?
        .x_label("expert")
        .y_label("expert")
        .save(bench.folder.plot("similarity"))?;
    }
    let values: Vec<f64> = shares.iter().flatten().copied().collect();
    let columns: Vec<String> = (0..large).map(|e| e.to_string()).collect();
    HeatMap::new(
        "Share of each domain's tokens by expert, last layer",
        domains.iter().map(|d| d.name.to_string()),
        columns,
        &values,
    )?
    .x_label("expert")
    .y_label("domain")
    .save(bench.folder.plot("domains"))?;
    Ok(())
}

/// Reduces the Mixtral model in a folder for a file of token ids, and writes the result beside it.
fn mixtral(args: &args::Args, keep: usize) -> Result<()> {
    let (dir, text) = (args.text("mixtral"), args.text("text"));
    if text == "none" {
        args::fail("--mixtral needs --text, a file with the task's token ids, separated by spaces");
    }
    let model = Mixtral::load(dir)?;
    let read = std::fs::read_to_string(text).map_err(|e| Error::Io { path: text.into(), action: "read", source: e })?;
    let vocab = model.config().vocab_size as u32;
    let ids =
        read.split_whitespace().map(|w| w.parse::<u32>().ok().filter(|&i| i < vocab)).collect::<Option<Vec<u32>>>();
    let Some(ids) = ids.filter(|i| i.len() >= 2) else {
        args::fail(format!("{text} must hold at least two token ids below {vocab}, separated by spaces"));
    };
    let length = model.config().max_position_embeddings.min(512).min(ids.len());
    let batch = |part: &[u32]| Ok(Batch::new(Array::from_slice(part, &[1, part.len()])?));
    let stats = observe(&model, ids.chunks(length).map(batch), &Observe::default())?;
    for (i, layer) in stats.layers.iter().flatten().enumerate() {
        println!("layer {i}: load {:?}", layer.load);
    }
    let reduce = Reduce { router: RouterInit::ClusterMean, ..Reduce::new(Keep::Same(keep)) };
    let mut folder = args.folder(&json!({"mixtral": dir, "text": text, "reduce": reduce}))?;
    let plan = reduce.plan(&model, &stats)?;
    let small = plan.apply(&model)?;
    plan.save(folder.path().join("plan.json"))?;
    small.save(folder.path().join("model"))?;
    let (all, left) = (model.params().count(), small.params().count());
    println!("{all} parameters, {left} left; the model and its plan are in {}", folder.path().display());
    folder.finish(&json!({"parameters": all, "left": left, "tokens": ids.len(), "layers": plan.layers}))
}

fn run() -> Result<()> {
    let args = args::Args::parse("uncurl", "Reduces the experts of a trained model for a task.", OPTIONS);
    let (full, quick) = (args.has("full"), args.has("quick"));
    if full && quick {
        args::fail("--full and --quick exclude each other");
    }
    let of = |name: &str, full_value: u64, accepted: &str, range: std::ops::RangeInclusive<u64>| {
        if full && !args.has(name) { full_value } else { args.get(name, accepted, |n: &u64| range.contains(n)) }
    };
    let seeds = of("seeds", 3, "a whole number from 1 to 10", 1..=10);
    let tokens = of("tokens", 2_000_000, "a whole number from 5000 to 100000000", 5_000..=100_000_000) as usize;
    let steps = of("steps", 120, "a whole number from 1 to 10000", 1..=10_000);
    let keep = args.get("keep", "a whole number from 1 to 1024", |n: &usize| (1..=1024).contains(n));
    if args.text("mixtral") != "none" {
        return mixtral(&args, keep);
    }
    let mut folder = args.folder(&json!({"seeds": seeds, "tokens": tokens, "steps": steps, "full": full}))?;
    println!(
        "about {} on two cores",
        match (full, quick) {
            (true, _) => "an hour",
            (_, true) => "a minute",
            _ => "7 minutes",
        }
    );
    let start = Instant::now();
    let (domains, tokenizer) = domains(if quick { 1 << 18 } else { 2 << 20 })?;
    let tasks = tasks(&domains, &tokenizer, quick)?;
    let vocab = prismgrad::data::Tokenizer::vocab_size(&tokenizer);
    println!(
        "domains: {}",
        domains.iter().map(|d| format!("{} ({} windows)", d.name, d.train.len())).collect::<Vec<_>>().join(", ")
    );
    let sizes: Vec<usize> = if full { vec![8, 16] } else { vec![8] };
    let mut bench = Bench { tasks: &tasks, steps, cells: Vec::new(), folder: &mut folder };
    let (mut information, mut last, mut times) = (Vec::new(), None, None);
    for seed in 0..seeds {
        let mut models = BTreeMap::new();
        for n in [2, 4, 8, 16].into_iter().filter(|n| sizes.iter().any(|s| s % n == 0 && s / n <= 4)) {
            models.insert(n, pretrain(&domains, vocab, n, tokens, seed)?);
        }
        for n in &sizes {
            let model = &models[n];
            let (bits, shares) = specialisation(model, &domains)?;
            println!("{n} experts: mutual information of expert and domain, by layer: {bits:.3?} bits");
            information.push(json!({"experts": n, "seed": seed, "bits": bits}));
            study(&mut bench, &domains, model, &models, seed, full)?;
            last = Some(shares);
        }
        let large = sizes[sizes.len() - 1];
        if seed == 0 {
            let stats = statistics(&models[&large], tasks[0].batches()?)?;
            let small = reduce(&models[&large], &stats, large / 2, Method::Uncurl, RouterInit::Keep, 0)?;
            let native = &models[&(large / 2)];
            let (a, b) = step_times(native, &small)?;
            let bytes = |m: &Gpt| m.params().all().iter().map(|p| p.numel() * p.dtype().size()).sum::<usize>();
            println!(
                "a step takes {b:.1} ms, of a native model {a:.1} ms; {} and {} bytes",
                bytes(&small),
                bytes(native)
            );
            times = Some(
                json!({"native_ms": a, "reduced_ms": b, "native_bytes": bytes(native), "reduced_bytes": bytes(&small)}),
            );
            plots(&bench, &sizes, &models[&large], last.as_deref().unwrap_or(&[]), &domains, seeds)?;
        }
        if seed + 1 == seeds {
            plots(&bench, &sizes, &models[&large], last.as_deref().unwrap_or(&[]), &domains, seeds)?;
        }
    }
    let mut verdicts = Vec::new();
    let arm = |method: &'static str, router: &'static str, from: usize, to: usize| {
        move |c: &Cell| {
            matches!(c.experiment, "methods" | "native" | "null" | "layers")
                && (c.method.as_str(), c.router, c.from, c.to) == (method, router, from, to)
        }
    };
    for &from in &sizes {
        for to in [from / 2, from / 4] {
            let of = |m, r| arm(m, r, from, to);
            for router in ["warmed up", "kept"] {
                let claim = format!("UNCURL is below greedy, {from} to {to}, routers {router}");
                verdicts.push(verdict(claim, &bench.paired(of("UNCURL", router), of("greedy", router))));
                let claim = format!("UNCURL is below random clusters, {from} to {to}, routers {router}");
                verdicts.push(verdict(claim, &bench.paired(of("UNCURL", router), of("random clusters", router))));
            }
            let claim = format!("UNCURL is below the native model, {from} to {to}");
            verdicts.push(verdict(claim, &bench.paired(of("UNCURL", "warmed up"), of("native", "kept"))));
            let claim = format!("statistics of the task are below those of another domain, {from} to {to}");
            let other = of("UNCURL, another domain", "warmed up");
            verdicts.push(verdict(claim, &bench.paired(of("UNCURL", "warmed up"), other)));
            let claim = format!("greedy in the first layer is below UNCURL everywhere, {from} to {to}");
            let mixed = of("greedy first, UNCURL above", "warmed up");
            verdicts.push(verdict(claim, &bench.paired(mixed, of("UNCURL", "warmed up"))));
        }
    }
    let threshold = threshold(&bench, &sizes);
    println!("{threshold}");
    for router in ["one shot", "kept", "warmed up only", "warmed up", "distilled only", "distilled"] {
        let of =
            |m: &'static str| move |c: &Cell| c.experiment == "prune or merge" && c.method == m && c.router == router;
        let claim = format!("merging is below pruning, router {router}");
        verdicts.push(verdict(claim, &bench.paired(of("merge (UNCURL)"), of("prune (REAP)"))));
    }
    let cells: Vec<Value> = bench.cells.iter().map(Cell::json).collect();
    folder.finish(&json!({
        "information": information, "void_below_bits": 0.1, "cells": cells, "verdicts": verdicts, "threshold": threshold,
        "step": times, "rates_tried": 1, "seconds": start.elapsed().as_secs_f64(),
    }))?;
    println!("plots and summary in {}", folder.path().display());
    Ok(())
}

/// For each number of experts, the largest factor at which the reduced model is not above the native one, with the verdict on the claim
/// that this factor does not rise with the number of experts.
fn threshold(bench: &Bench, sizes: &[usize]) -> Value {
    let critical = |from: usize| -> usize {
        let below = |f: &usize| {
            let of = |m: &'static str, r: &'static str| {
                let to = from / f;
                move |c: &Cell| {
                    c.method == m && c.router == r && (c.from, c.to) == (from, to) && c.experiment != "prune or merge"
                }
            };
            interval(&bench.paired(of("UNCURL", "warmed up"), of("native", "kept"))).0 <= 0.0
        };
        [4, 2].into_iter().find(below).unwrap_or(1)
    };
    let factors: Vec<usize> = sizes.iter().map(|&n| critical(n)).collect();
    let word = match factors.windows(2).all(|w| w[1] <= w[0]) {
        _ if factors.len() < 2 => "undecided: one number of experts",
        true => "holds",
        false => "contradicted",
    };
    json!({"claim": "the critical factor does not rise with the number of experts", "experts": sizes, "critical": factors, "verdict": word})
}

fn main() {
    args::finish(run());
}
