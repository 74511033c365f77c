//! Merges safetensors checkpoints that may be larger than memory: a linear mean, task arithmetic, TIES, DARE.
//!
//! ```text
//! cargo run --release --example merge -- --config recipe.yml --out merged
//! cargo run --release --example merge -- --method ties --base base --models a,b --weights 0.7,0.5 --densities 0.3 --out merged
//! ```
//!
//! A model is a safetensors file, or a folder with `model.safetensors` or with several files and their index. `recipe.yml` is in
//! mergekit's form. The result appears whole or not at all, with the base's configuration and tokenizer beside it.
//!
//! Without a recipe, the example trains a small base and three models on parts of the sources on this disk, merges their files by every
//! method, compares the results with the same merges in memory, and measures time and memory of a merge of large files. Writes
//! `plots/losses` and `summary.json` to the run folder.

#[path = "common/args.rs"]
mod args;
#[path = "common/yaml.rs"]
mod yaml;

use prismgrad::data::{CrateSources, Document, shuffled};
use prismgrad::io::{self, SafeTensors};
use prismgrad::models::{Gpt, GptConfig};
use prismgrad::nn::{Ctx, Params};
use prismgrad::optim::{AdamW, Schedule};
use prismgrad::step::PlainStep;
use prismgrad::systems::editing::{
    Cost, Merge, Merged, Method, Model, Recipe, Rescale, Tags, VectorPool, dtype_named, merge_files,
};
use prismgrad::train::Progress;
use prismgrad::train::plot::BarChart;
use prismgrad::{Array, Error, Result, no_grad};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

const OPTIONS: &[args::Opt] = &[
    ("config", "none", "none", "a YAML file in mergekit's form; --out is the folder of the result"),
    ("method", "none", "none", "without a YAML file: linear, task_arithmetic, ties, dare_linear or dare_ties"),
    ("base", "none", "none", "the model that the others were tuned from; linear needs none"),
    ("models", "none", "none", "files or folders of the models, separated by commas"),
    ("weights", "1", "1", "their weights: one number for all, or one for each"),
    (
        "densities",
        "1",
        "1",
        "share of each vector's entries that is kept (ties, dare_linear, dare_ties): one number or one for each",
    ),
    ("lambda", "1", "1", "factor of the sum that is added to the base"),
    ("normalize", "default", "default", "yes or no: weights are divided by their sum; by default in linear and ties"),
    (
        "rescale",
        "default",
        "default",
        "how the kept entries are rescaled: no, norm (as mergekit) or density (as in the paper)",
    ),
    ("dtype", "base", "base", "float32, bfloat16 or float16: element type of the result"),
    ("seed", "0", "0", "seed of DARE's random choices, and of the models that are trained here"),
    ("megabytes", "220", "24", "size of each of the large files whose merge is measured"),
    ("steps", "60", "8", "steps of training the base; the models that are tuned from it get half as many"),
];
const SEQ: usize = 64;
const BATCH: usize = 16;

/// The peak memory of this process so far, in MB.
fn peak_memory() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<f64>().ok()? * 1024.0 / 1e6)
}

/// The recipe from the options, or `None` if they contain none.
fn recipe(args: &args::Args) -> Result<Option<Recipe>> {
    let seed = args.get("seed", "a whole number", |_: &u64| true);
    if args.has("config") {
        let clash = ["method", "base", "models", "weights", "densities", "lambda", "normalize", "rescale", "dtype"];
        if let Some(other) = clash.iter().find(|o| args.has(o)) {
            args::fail(format!("--{other} and --config are given; the file says it all"));
        }
        let path = PathBuf::from(args.text("config"));
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io("read", &path, e))?;
        return Ok(Some(Recipe { seed, ..Recipe::from_mergekit(&yaml::parse(&path, &text)?)? }));
    }
    if !args.has("method") {
        match ["base", "models", "weights", "densities", "lambda", "normalize", "rescale", "dtype"]
            .iter()
            .find(|o| args.has(o))
        {
            Some(other) => args::fail(format!("--{other} is given, and neither --method nor --config")),
            None => return Ok(None),
        }
    }
    let method = Method::named(args.text("method"))?;
    let paths: Vec<PathBuf> = match args.has("models") {
        true => args.text("models").split(',').map(PathBuf::from).collect(),
        false => args::fail("--models has to name the models, separated by commas"),
    };
    let numbers = |name: &str| -> Vec<f64> {
        let given: Vec<Option<f64>> = args.text(name).split(',').map(|x| x.trim().parse().ok()).collect();
        match given.iter().copied().collect::<Option<Vec<f64>>>() {
            Some(one) if one.len() == 1 => vec![one[0]; paths.len()],
            Some(all) if all.len() == paths.len() => all,
            _ => args::fail(format!(
                "--{name} cannot be '{}'; give one number, or {} of them",
                args.text(name),
                paths.len()
            )),
        }
    };
    let (weights, densities) = (numbers("weights"), numbers("densities"));
    let models = paths.iter().zip(weights.iter().zip(&densities));
    let models = models.map(|(path, (&weight, &density))| Model { path: path.clone(), weight, density }).collect();
    let mut r = Recipe::new(method, args.has("base").then(|| args.text("base").into()), models);
    r.lambda = args.get("lambda", "a number", |l: &f64| l.is_finite());
    r.normalise = args.choice("normalize", &[("default", r.normalise), ("yes", true), ("no", false)]);
    let kinds = [("default", r.rescale), ("no", Rescale::No), ("norm", Rescale::Norm), ("density", Rescale::Density)];
    r.rescale = args.choice("rescale", &kinds);
    r.dtype = if args.text("dtype") == "base" { None } else { Some(dtype_named(args.text("dtype"))?) };
    r.seed = seed;
    Ok(Some(r))
}

/// Merges with a progress bar, and prints the cost.
fn merge(recipe: &Recipe, out: &Path, replace: bool) -> Result<Merged> {
    let mut progress = Progress::new(format!("{} MB", recipe.method.name()), None, 0);
    let mut shown = 0;
    let done = merge_files(recipe, out, replace, |written, whole| {
        if written / 10_000_000 > shown {
            shown = written / 10_000_000;
            progress.set(written / 1_000_000, &[("of", (whole / 1_000_000) as f64)]);
        }
    })?;
    progress.finish();
    Ok(done)
}

fn report(recipe: &Recipe, done: &Merged, out: &Path) {
    let moved = (done.read + done.written) as f64 / 1e9;
    println!(
        "{} of {} models into {}: {} tensors merged, {} copied; {:.2} GB read, {:.2} GB written in {:.1} s ({:.2} GB/s)",
        recipe.method.name(),
        recipe.models.len(),
        out.display(),
        done.tensors,
        done.copied,
        done.read as f64 / 1e9,
        done.written as f64 / 1e9,
        done.seconds,
        moved / done.seconds.max(1e-9),
    );
    if let Some(peak) = peak_memory() {
        println!("at most {peak:.1} MB of memory");
    }
}

/// The bytes of documents, in rows.
fn rows(documents: &[&Document], held: bool) -> Vec<Vec<u32>> {
    let bytes: Vec<u32> = documents.iter().flat_map(|d| d.text.bytes()).map(u32::from).collect();
    let rows = bytes.chunks_exact(SEQ + 1).enumerate().filter(|(i, _)| (i % 10 == 0) == held);
    rows.map(|(_, r)| r.to_vec()).collect()
}

fn losses(model: &Gpt, rows: &[&Vec<u32>], ctx: &Ctx) -> Result<prismgrad::Tensor> {
    let part = |at: usize| -> Vec<u32> { rows.iter().flat_map(|r| r[at..at + SEQ].to_vec()).collect() };
    let shape = [rows.len(), SEQ];
    model.losses(Array::from_slice(&part(0), &shape)?, Array::from_slice(&part(1), &shape)?, ctx)
}

fn train(model: &Gpt, rows: &[Vec<u32>], steps: u64, lr: f64, what: &str) -> Result<()> {
    let mut step =
        PlainStep::new(&model.params().all(), AdamW::default(), Schedule::cosine(lr, steps / 10 + 1, steps))?;
    let mut progress = Progress::new(what.to_string(), Some(steps), 0);
    for t in 0..steps {
        let batch: Vec<&Vec<u32>> = shuffled(rows.len(), t).into_iter().take(BATCH).map(|i| &rows[i]).collect();
        let report = step.run_one(|| losses(model, &batch, &Ctx::train(t)))?;
        if (t + 1) % 10 == 0 || t + 1 == steps {
            progress.set(t + 1, &[("loss", report.loss()?)]);
        }
    }
    progress.finish();
    Ok(())
}

/// Writes the model to a folder in three files, as large checkpoints are stored.
fn save(model: &Gpt, folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, e))?;
    let all: Vec<(String, Array)> = model.params().all().iter().map(|p| (p.name().to_string(), p.value())).collect();
    let mut map = BTreeMap::new();
    for (i, part) in all.chunks(all.len().div_ceil(3)).enumerate() {
        let name = format!("model-{:05}-of-00003.safetensors", i + 1);
        io::save_arrays(folder.join(&name), part, &[("format", "pt")])?;
        map.extend(part.iter().map(|(n, _)| (n.clone(), name.clone())));
    }
    let index = json!({"metadata": {"total_size": 4 * model.params().count()}, "weight_map": map});
    io::write_json(folder.join("model.safetensors.index.json"), &index)?;
    io::write_json(folder.join("config.json"), model.config())
}

fn load(params: &Params, folder: &Path) -> Result<()> {
    let mut values = BTreeMap::new();
    for i in 1..=3 {
        let file = SafeTensors::open(folder.join(format!("model-{i:05}-of-00003.safetensors")))?;
        values.extend(io::arrays_of(&file)?);
    }
    for p in params.all() {
        let value = values.remove(p.name());
        p.set(value.ok_or_else(|| Error::invalid("merge", format!("{} is missing", p.name())))?)?;
    }
    Ok(())
}

/// Writes one file that repeats the values of a model until it has this size.
fn enlarge(params: &Params, path: &Path, megabytes: usize) -> Result<()> {
    let (own, mut arrays) = (4 * params.count(), Vec::new());
    for copy in 0..(megabytes * 1_000_000).div_ceil(own) {
        arrays.extend(params.all().iter().map(|p| (format!("copy{copy:03}.{}", p.name()), p.value())));
    }
    io::save_arrays(path, &arrays, &[])
}

fn verdict(claim: &str, holds: bool, figures: Value) -> Value {
    let word = if holds { "holds" } else { "contradicted" };
    println!("{claim}: {word} ({figures})");
    json!({"claim": claim, "verdict": word, "figures": figures})
}

/// The largest difference between the model's present values and those in a folder, and the share of values that differ by 10⁻⁶ or more.
fn difference(params: &Params, folder: &Path) -> Result<(f64, f64)> {
    let own: Vec<Vec<f64>> = params.all().iter().map(|p| p.value().to_f64()).collect();
    load(params, folder)?;
    let pairs = params.all().into_iter().zip(own).flat_map(|(p, own)| p.value().to_f64().into_iter().zip(own));
    let off: Vec<f64> = pairs.map(|(a, b)| (a - b).abs()).collect();
    let apart = off.iter().filter(|d| **d >= 1e-6).count() as f64 / off.len().max(1) as f64;
    Ok((off.into_iter().fold(0.0, f64::max), apart))
}

fn show(args: &args::Args) -> Result<()> {
    let seed = args.get("seed", "a whole number", |_: &u64| true);
    let megabytes = args.get("megabytes", "a whole number of at least 1", |m: &usize| *m > 0);
    let steps = args.get("steps", "a whole number of at least 2", |s: &u64| *s > 1);
    println!(
        "no recipe is given: a demonstration, {}",
        if args.has("quick") { "some seconds" } else { "about half a minute" }
    );
    let mut folder = args.folder(&json!({"seed": seed, "megabytes": megabytes, "steps": steps}))?;
    let at = |name: &str| folder.path().join(name);
    let documents = CrateSources::new().max_bytes(2 << 20).load()?.documents;
    // The parts are made different by sorting documents by size.
    let mut by_size: Vec<&Document> = documents.iter().collect();
    by_size.sort_by_key(|d| (d.text.len(), &d.name));
    let parts: Vec<&[&Document]> = by_size.chunks(by_size.len().div_ceil(3)).collect();
    let all = rows(&by_size, false);
    let held: Vec<Vec<u32>> = parts.iter().flat_map(|p| rows(p, true).into_iter().take(32)).collect();
    let model = Gpt::new(GptConfig::small(256, SEQ, 4, 128, 4), seed)?;
    let params = model.params();
    let loss = || -> Result<f64> {
        let each = held.chunks(32).map(|c| no_grad(|| losses(&model, &c.iter().collect::<Vec<_>>(), &Ctx::eval())));
        let each = each.map(|l| Ok(l?.array().to_f64())).collect::<Result<Vec<_>>>()?.concat();
        Ok(each.iter().sum::<f64>() / each.len().max(1) as f64)
    };
    train(&model, &all, steps, 2e-3, "base")?;
    save(&model, &at("base"))?;
    let mut results = vec![("base".to_string(), loss()?)];
    let mut pool = VectorPool::new(params, Tags::new())?;
    let (large_base, large) = (at("large-base.safetensors"), [at("large-0.safetensors"), at("large-1.safetensors")]);
    enlarge(params, &large_base, megabytes)?;
    for (i, part) in parts.iter().enumerate() {
        load(params, &at("base"))?;
        train(&model, &rows(part, false), (steps / 2).max(2), 1e-3, &format!("part {i}"))?;
        save(&model, &at(&format!("tuned{i}")))?;
        results.push((format!("part {i}"), loss()?));
        pool.add(&format!("part {i}"), params, Tags::new(), Cost::default())?;
        large.get(i).map_or(Ok(()), |path| enlarge(params, path, megabytes))?;
    }
    let recipe = |method: Method, weight: f64, density: f64| {
        let model = |i: usize| Model { path: at(&format!("tuned{i}")), weight, density };
        Recipe { seed, ..Recipe::new(method, Some(at("base")), (0..parts.len()).map(model).collect()) }
    };
    let n = parts.len() as f64;
    let cases = [
        ("linear", recipe(Method::Linear, 1.0, 1.0), Some(Merge::Soup)),
        ("task arithmetic, 0.5", recipe(Method::TaskArithmetic, 0.5, 1.0), Some(Merge::Arithmetic(0.5))),
        ("TIES, 0.3", recipe(Method::Ties, 1.0, 0.3), Some(Merge::Ties { density: 0.3, lambda: 1.0, normalise: true })),
        ("DARE, 0.5", recipe(Method::DareLinear, 1.0 / n, 0.5), None),
        ("DARE and TIES, 0.5", recipe(Method::DareTies, 1.0 / n, 0.5), None),
        ("nothing added", recipe(Method::TaskArithmetic, 0.0, 1.0), Some(Merge::Weights(vec![0.0; parts.len()]))),
    ];
    let (mut worst, mut untouched, mut chosen) = (0f64, f64::INFINITY, 0f64);
    for (k, (name, recipe, memory)) in cases.iter().enumerate() {
        let out = at(&format!("merged{k}"));
        merge(recipe, &out, true)?;
        match memory {
            Some(m) => {
                pool.apply(m, params)?;
                let (off, apart) = difference(params, &out)?;
                match m {
                    Merge::Ties { .. } => chosen = chosen.max(apart),
                    _ => (worst, untouched) = (worst.max(off), off),
                }
            }
            None => load(params, &out)?,
        }
        results.push((name.to_string(), loss()?));
    }
    for (name, loss) in &results {
        println!("  {name:<24} held-out loss {loss:.4} nats per byte");
    }
    // Differences are f32 here and exact in the pool, so TIES may keep another entry where magnitudes are almost equal.
    let mut verdicts = vec![
        verdict(
            "files are merged as the pool merges in memory",
            worst < 1e-6 && chosen < 1e-4,
            json!({"largest_difference": worst, "share_that_ties_chose_otherwise": chosen}),
        ),
        verdict(
            "null control: weights of 0 give the base to the bit",
            untouched == 0.0,
            json!({"largest_difference": untouched}),
        ),
    ];
    // A planted defect: a copy of a model has one value that is not finite.
    let odd = at("odd");
    load(params, &at("tuned0"))?;
    let p = &params.all()[3];
    let mut values = p.value().to_vec::<f32>()?;
    values[1] = f32::NAN;
    p.set(Array::from_slice(&values, p.shape())?)?;
    save(&model, &odd)?;
    let mut broken = recipe(Method::Ties, 1.0, 0.3);
    broken.models[0].path = odd;
    let refused = merge_files(&broken, &at("merged-odd"), true, |_, _| {}).err().map(|e| e.to_string());
    let nothing = !at("merged-odd").exists();
    verdicts.push(verdict(
        "planted defect: a NaN in one model is refused and nothing is written",
        refused.as_ref().is_some_and(|e| e.contains("not finite")) && nothing,
        json!({"error": refused}),
    ));
    // Large files are merged in a separate process, to measure its memory.
    let own = std::env::current_exe().map_err(|e| Error::io("find", "the program", e))?;
    let text = |p: &Path| p.display().to_string();
    let mut command = Command::new(own);
    command.args(["--method", "ties", "--densities", "0.3", "--overwrite", "--base", &text(&large_base)]);
    command.args([
        "--models",
        &format!("{},{}", text(&large[0]), text(&large[1])),
        "--out",
        &text(&at("large-merged")),
    ]);
    let output = command.output().map_err(|e| Error::io("start", "the program", e))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    print!("{said}{}", String::from_utf8_lossy(&output.stderr));
    let peak: Option<f64> = said.split("at most ").nth(1).and_then(|s| s.split(' ').next()?.parse().ok());
    let size =
        std::fs::metadata(&large_base).map_err(|e| Error::io("read the size of", &large_base, e))?.len() as f64 / 1e6;
    if let Some(peak) = peak {
        let figures = json!({"peak_mb": peak, "one_model_mb": size});
        verdicts.push(verdict(
            "three large files are merged in less memory than one of them has",
            peak < size,
            figures,
        ));
    }
    for path in [&large_base, &large[0], &large[1]] {
        std::fs::remove_file(path).map_err(|e| Error::io("remove", path, e))?;
    }
    std::fs::remove_dir_all(at("large-merged")).map_err(|e| Error::io("remove", at("large-merged"), e))?;
    let mut chart = BarChart::new("Held-out loss of what was merged").label("nats per byte");
    for (name, loss) in &results {
        chart = chart.bar(name, *loss);
    }
    chart.save(folder.plot("losses"))?;
    folder.finish(&json!({"losses": results, "verdicts": verdicts}))?;
    println!("models, plot and summary in {}", folder.path().display());
    Ok(())
}

fn run() -> Result<()> {
    let args =
        args::Args::parse("merge", "Merges safetensors checkpoints larger than memory, as mergekit does", OPTIONS);
    match recipe(&args)? {
        None => show(&args),
        Some(recipe) => {
            let out = args.out();
            let done = merge(&recipe, &out, args.has("overwrite"))?;
            report(&recipe, &done, &out);
            Ok(())
        }
    }
}

fn main() {
    args::finish(run());
}
