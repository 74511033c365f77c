//! Prediction of the types of a table's columns: HyTrel on tables as hypergraphs, beside linear models of words and a network that uses the
//! same text without the structure.
//!
//! ```text
//! cargo run --release --example hypergraph_tables
//! ```
//!
//! Headers are hidden; the type of a column is its header. Writes `plots/f1`, `plots/columns`, `plots/curve`, `plots/attention_columns` and
//! `plots/attention_rows` (`.svg` and `.png`) and `summary.json` to the run folder. The table of `docs/results/hypergraph.md` is from the
//! default run; `--full` has three seeds and more ablations.

#[path = "common/args.rs"]
mod args;
#[path = "common/bags.rs"]
mod bags;
#[path = "common/study.rs"]
mod study;
#[path = "common/tables.rs"]
mod tables;

use bags::{Bag, Linear, Words, bag, f1, sums, words};
use prismgrad::data::shuffled;
use prismgrad::nn::{Ctx, EmbeddingBag, LayerNorm, Params};
use prismgrad::ops::loss::{CrossEntropy, cross_entropy};
use prismgrad::ops::segment::Segments;
use prismgrad::optim::{AdamW, Schedule};
use prismgrad::step::PlainStep;
use prismgrad::systems::hytrel::{Head, Sets, TableBatch};
use prismgrad::train::Progress;
use prismgrad::train::plot::{BarChart, HeatMap, LineChart, Series};
use prismgrad::{Array, DType, Result, Samples, Tensor, no_grad};
use serde_json::{Value, json};
use std::time::Instant;
use study::interval;
use tables::{Data, Recipe, Typed};

const OPTIONS: &[args::Opt] = &[
    ("seeds", "1", "1", "runs of each trained model, paired by seed; 3 with --full"),
    ("steps", "1200", "60", "steps of 32 tables; 4000 with --full"),
    ("tables", "20000", "1500", "the most tables that are used"),
    ("often", "150", "40", "a header is a type if at least this many training tables have it"),
    ("width", "64", "32", "width of HyTrel"),
    ("rate", "0.002", "0.002", "learning rate of the networks"),
    ("full", "", "", "uses three seeds, 4000 steps, and each ablation by itself"),
];

/// The scores of a method on the test tables, one for each seed.
struct Row {
    name: String,
    micro: Vec<f64>,
    by_type: Vec<f64>,
    /// The types that were predicted with the first seed.
    found: Vec<u32>,
    note: Value,
}

/// The counted words of every column, every table and every title. Words that occur in no training table are left out.
struct Counted {
    words: usize,
    columns: Vec<Vec<Vec<(u32, u32)>>>,
    titles: Vec<Vec<(u32, u32)>>,
    headers: Vec<Vec<Vec<(u32, u32)>>>,
}

impl Counted {
    fn new(data: &Data) -> Counted {
        let (mut ids, n) = (Words::default(), data.tables.len());
        let (mut columns, mut titles, mut headers) = (vec![vec![]; n], vec![vec![]; n], vec![vec![]; n]);
        let rest = (0..n).filter(|t| data.train.binary_search(t).is_err());
        for (i, t) in data.train.iter().copied().chain(rest).enumerate() {
            if i == data.train.len() {
                ids.freeze();
            }
            let table = &data.tables[t];
            let mut count = |text: Vec<String>| ids.counts(text.iter().map(String::as_str));
            columns[t] = (0..table.columns()).map(|c| count(table.column(c).flat_map(words).collect())).collect();
            titles[t] = count(words(&table.caption));
            headers[t] = table.headers.iter().map(|h| count(vec![format!("header {}", h.to_lowercase())])).collect();
        }
        Counted { words: ids.len(), columns, titles, headers }
    }
    /// A bag of the column's own words. With `context` it also has a bag of the other columns' words and one of the title's words. `leak`
    /// adds the header.
    fn bag(&self, (t, c): (usize, usize), context: bool, leak: bool) -> Bag {
        let mut all = bag(&self.columns[t][c], 0);
        let first = self.words as u32;
        if context {
            let others =
                self.columns[t].iter().enumerate().filter(|(k, _)| *k != c).flat_map(|(_, w)| w.iter().copied());
            all.extend(bag(&sums(others), first));
            all.extend(bag(&self.titles[t], 2 * first));
        }
        if leak {
            all.extend(bag(&self.headers[t][c], 3 * first));
        }
        all
    }
    /// Softmax regression. `labels` replaces the columns' own types if given.
    fn linear(&self, data: &Data, labels: Option<&[u32]>, context: bool, leak: bool, name: &str) -> Row {
        let (train, test) = (data.columns(&data.train), data.columns(&data.test));
        let rows: Vec<Bag> = train.iter().map(|c| self.bag((c.0, c.1), context, leak)).collect();
        let own: Vec<u32> = train.iter().map(|c| c.2).collect();
        let size = (4 * self.words, data.types.len());
        let model = Linear::train(&rows.iter().collect::<Vec<_>>(), labels.unwrap_or(&own), size, 6, 0.5, 0);
        let found: Vec<u32> = test.iter().map(|c| model.class(&self.bag((c.0, c.1), context, leak))).collect();
        let wanted: Vec<u32> = test.iter().map(|c| c.2).collect();
        let (micro, by_type) = f1(&found, &wanted, data.types.len());
        let note = json!({"words": self.words, "epochs": 6});
        Row { name: name.to_string(), micro: vec![micro], by_type: vec![by_type], found, note }
    }
}

/// The network with the same text but without the structure: means of the token embeddings of the column, of the other columns and of the
/// title are concatenated, normalised, and passed to the same head.
struct TextOnly {
    params: Params,
    embed: EmbeddingBag,
    norm: LayerNorm,
    head: Head,
}

impl TextOnly {
    fn new(data: &Data, d: usize, seed: u64) -> Result<TextOnly> {
        let params = Params::new(seed, DType::F32);
        Ok(TextOnly {
            embed: EmbeddingBag::builder(data.tokenizer.vocab(), d).build(&params.at("embed"))?,
            norm: LayerNorm::new(&params.at("norm"), 3 * d)?,
            head: Head::new(&params.at("head"), (3 * d, 8 * d, data.types.len()), 0.1)?,
            params,
        })
    }
    fn logits(&self, data: &Data, columns: &[(usize, usize, u32)], ctx: &Ctx) -> Result<Tensor> {
        let (mut ids, mut lengths) = (Vec::new(), Vec::new());
        for &(t, c, _) in columns {
            let e = &data.encoded[t];
            let cells = |own: bool| {
                let all = e.cells.iter().enumerate();
                all.filter(move |(i, _)| (i % e.columns == c) == own).flat_map(|(_, cell)| cell)
            };
            for part in [cells(true).copied().collect::<Vec<u32>>(), cells(false).copied().collect(), e.caption.clone()]
            {
                lengths.push(part.len());
                ids.extend(part);
            }
        }
        let n = columns.len();
        let of = Samples::uniform(n, 3);
        let ids = Array::from_slice(&ids, &[ids.len()])?;
        let rows = self.embed.forward_bags(ids, &Segments::lengths(&lengths), None, &ctx.with_samples(of))?;
        let d = rows.shape()[1];
        let x = self.norm.forward(&rows.reshape(&[n, 3 * d])?, ctx)?;
        self.head.logits(&x, &Samples::uniform(n, 1), ctx)
    }
    /// A step has as many columns as HyTrel's tables have on average.
    fn train(&self, data: &Data, (steps, lr, seed): (usize, f64, u64)) -> Result<()> {
        let columns = data.columns(&data.train);
        let batch = (32 * columns.len() / data.train.len().max(1)).max(1).min(columns.len());
        let schedule = Schedule::cosine(lr, (steps / 20).max(1) as u64, steps.max(2) as u64);
        let mut step = PlainStep::new(&self.params.all(), AdamW { weight_decay: 0.02, ..AdamW::default() }, schedule)?;
        let mut progress = Progress::new("text alone", Some(steps as u64), 0);
        let per_epoch = columns.len() / batch;
        for t in 0..steps {
            let order = shuffled(columns.len(), 1000 * seed + (t / per_epoch) as u64);
            let at = t % per_epoch * batch;
            let rows: Vec<_> = order[at..at + batch].iter().map(|&i| columns[i]).collect();
            let targets: Vec<u32> = rows.iter().map(|c| c.2).collect();
            let report = step.run_one(|| {
                let logits = self.logits(data, &rows, &Ctx::train(t as u64))?;
                cross_entropy(&logits, Array::from_slice(&targets, &[batch])?, &CrossEntropy::default())
            })?;
            if (t + 1) % (steps / 5).max(1) == 0 {
                progress.set(t as u64 + 1, &[("loss", report.loss()?)]);
            }
        }
        progress.finish();
        Ok(())
    }
    fn found(&self, data: &Data, tables: &[usize]) -> Result<Vec<u32>> {
        let mut found = Vec::new();
        for part in data.columns(tables).chunks(512) {
            let best = no_grad(|| self.logits(data, part, &Ctx::eval()))?.argmax(-1)?;
            found.extend(best.array().to_f64().into_iter().map(|b| b as u32));
        }
        Ok(found)
    }
}

/// The verdict on the claim that a is above b, paired by seed if both have seeds; a method without seeds counts the same for each.
fn verdict(claim: &str, a: &[f64], b: &[f64]) -> Value {
    let pairs = a.len().max(b.len());
    let at = |x: &[f64], i: usize| x[i.min(x.len() - 1)];
    let differences: Vec<f64> = (0..pairs).map(|i| at(a, i) - at(b, i)).collect();
    let (mean, half) = interval(&differences);
    let word = study::word(mean, half);
    let half = half.is_finite().then_some(half);
    let width = half.map_or("one seed".to_string(), |h| format!("± {:.2}", 100.0 * h));
    println!("{claim}: {word} (difference {:.2} points, {width})", 100.0 * mean);
    json!({"claim": claim, "verdict": word, "difference": mean, "half_interval": half, "seeds": pairs})
}

fn printed(row: &Row) {
    let of = |x: &[f64]| match interval(x) {
        (mean, half) if half.is_finite() => format!("{:.2} ± {:.2}", 100.0 * mean, 100.0 * half),
        (mean, _) => format!("{:.2}", 100.0 * mean),
    };
    println!("{:<42} micro {:<14} macro {}", row.name, of(&row.micro), of(&row.by_type));
}

/// A trained arm of HyTrel over the seeds, with the model and the curve of the first seed.
type Arm = (Row, Typed, Vec<(f64, f64)>);

fn arm(data: &Data, name: &str, recipe: &Recipe, seeds: u64) -> Result<Arm> {
    let wanted: Vec<u32> = data.columns(&data.test).iter().map(|c| c.2).collect();
    let mut row = Row { name: name.to_string(), micro: vec![], by_type: vec![], found: vec![], note: Value::Null };
    let mut first = None;
    for seed in 0..seeds {
        let mut typed = Typed::new(data, &Recipe { seed, ..recipe.clone() }, None)?;
        let curve = typed.train(data, &data.labels, &data.train, &format!("{name}, seed {seed}"))?;
        let found = typed.found(data, &data.test)?;
        let (micro, by_type) = f1(&found, &wanted, data.types.len());
        row.micro.push(micro);
        row.by_type.push(by_type);
        if first.is_none() {
            let tables = (recipe.steps * recipe.batch) as f64;
            row.note = json!({
                "parameters": typed.params.count(), "steps": recipe.steps, "tables": tables, "seconds": typed.seconds,
                "tables_per_second": tables / typed.seconds,
            });
            row.found = found;
            first = Some((typed, curve));
        }
    }
    let (typed, curve) =
        first.ok_or_else(|| prismgrad::Error::Invalid { op: "hypergraph_tables", message: "no seeds".into() })?;
    printed(&row);
    Ok((row, typed, curve))
}

/// Micro F1 by the table's number of columns.
fn by_width(data: &Data, row: &Row) -> Vec<(String, f64, usize)> {
    let columns = data.columns(&data.test);
    let groups = [(1, 5), (6, 7), (8, 20)];
    let of = |&(low, high): &(usize, usize)| {
        let inside = columns.iter().zip(&row.found);
        let inside: Vec<bool> = inside
            .filter(|(c, _)| (low..=high).contains(&data.tables[c.0].columns()))
            .map(|(c, f)| c.2 == *f)
            .collect();
        let share = inside.iter().filter(|right| **right).count() as f64 / inside.len().max(1) as f64;
        (format!("{low} to {high}"), share, inside.len())
    };
    groups.iter().map(of).collect()
}

/// The first layer's attention for one test table.
fn attention(data: &Data, typed: &Typed, folder: &prismgrad::train::RunFolder) -> Result<()> {
    let fits = |t: &&usize| {
        let e = &data.encoded[**t];
        (5..=12).contains(&e.rows) && (4..=7).contains(&e.columns) && !e.caption.is_empty()
    };
    let Some(&t) = data.test.iter().find(fits) else { return Ok(()) };
    let e = &data.encoded[t];
    let batch = TableBatch::new(&[e], &data.tokenizer, Sets::default())?;
    let [_, columns, rows] = typed.model.attention(&batch, 0)?;
    let short = |s: &str| s.chars().take(16).collect::<String>();
    let first = |r: usize| short(&data.tables[t].rows[r][0]);
    let names: Vec<String> = (0..e.rows).map(first).collect();
    let headers: Vec<String> = data.tables[t].headers[..e.columns].iter().map(|h| short(h)).collect();
    let title = short(&data.tables[t].caption);
    HeatMap::new(format!("Weight of each cell in its column ({title})"), names.clone(), headers.clone(), &columns)?
        .x_label("header (hidden from the model)")
        .y_label("first cell of the row")
        .save(folder.plot("attention_columns"))?;
    HeatMap::new(format!("Weight of each cell in its row ({title})"), names, headers, &rows)?
        .x_label("header (hidden from the model)")
        .y_label("first cell of the row")
        .save(folder.plot("attention_rows"))?;
    Ok(())
}

fn run() -> Result<()> {
    let args = args::Args::parse("hypergraph_tables", "Column types: HyTrel, linear models, text alone.", OPTIONS);
    let (full, quick) = (args.has("full"), args.has("quick"));
    if full && quick {
        args::fail("--full and --quick exclude each other");
    }
    let of = |name: &str, full_value: usize, accepted: &str, range: std::ops::RangeInclusive<usize>| {
        if full && !args.has(name) { full_value } else { args.get(name, accepted, |n: &usize| range.contains(n)) }
    };
    let seeds = of("seeds", 3, "a whole number from 1 to 10", 1..=10) as u64;
    let steps = of("steps", 4000, "a whole number from 10 to 1000000", 10..=1_000_000);
    let most = of("tables", 20_000, "a whole number from 200 to 1000000", 200..=1_000_000);
    let often = of("often", 150, "a whole number from 5 to 10000", 5..=10_000);
    let d = of("width", 64, "a multiple of 4 from 16 to 1024", 16..=1024);
    if d % 4 != 0 {
        args::fail(format!("--width cannot be {d}; give a multiple of 4, since there are four heads"));
    }
    let lr = args.get("rate", "a positive number, such as 0.002", |r: &f64| r.is_finite() && *r > 0.0);
    let mut folder = args.folder(&json!({
        "seeds": seeds, "steps": steps, "tables": most, "often": often, "width": d, "rate": lr, "full": full,
    }))?;
    println!(
        "about {} on two cores",
        match (full, quick) {
            (true, _) => "50 minutes",
            (_, true) => "20 seconds",
            _ => "3 minutes",
        }
    );
    let start = Instant::now();
    let data = Data::load(most, often, if quick { 1024 } else { 4096 }, false)?;
    let (train, test) = (data.columns(&data.train), data.columns(&data.test));
    println!(
        "{} types; {} columns of {} tables to train on, {} of {} to test; {} tokens; cut: {:?}",
        data.types.len(),
        train.len(),
        data.train.len(),
        test.len(),
        data.test.len(),
        data.tokenizer.vocab(),
        data.cuts
    );
    if test.is_empty() {
        let message = "no column to test on; ask for more tables".into();
        return Err(prismgrad::Error::Invalid { op: "hypergraph_tables", message });
    }
    let wanted: Vec<u32> = test.iter().map(|c| c.2).collect();
    let counted = Counted::new(&data);
    let mut rows = vec![
        counted.linear(&data, None, false, false, "linear, own column"),
        counted.linear(&data, None, true, false, "linear, own column, others, title"),
    ];
    // Null control: types are permuted over all training columns. Planted defect: the header stays where a model can read it.
    let dealt: Vec<u32> = shuffled(train.len(), 7).into_iter().map(|i| train[i].2).collect();
    let nothing = counted.linear(&data, Some(&dealt), true, false, "null: types dealt out anew, linear");
    let leak = counted.linear(&data, None, true, true, "planted leak: header shown, linear");
    rows.iter().chain([&nothing, &leak]).for_each(printed);
    let most_frequent =
        (0..data.types.len() as u32).map(|c| wanted.iter().filter(|w| **w == c).count()).max().unwrap_or(0);
    let chance = most_frequent as f64 / wanted.len() as f64;
    if leak.micro[0] < 0.97 || nothing.micro[0] > 0.5 * rows[0].micro[0] {
        let message = format!(
            "with the headers shown {:.3} of the columns are told, and {:.3} with types dealt out anew: the controls do not work",
            leak.micro[0], nothing.micro[0]
        );
        return Err(prismgrad::Error::Invalid { op: "hypergraph_tables", message });
    }
    let mut text = Row {
        name: "text alone: means and a network".into(),
        micro: vec![],
        by_type: vec![],
        found: vec![],
        note: Value::Null,
    };
    for seed in 0..seeds {
        let model = TextOnly::new(&data, d, seed)?;
        let clock = Instant::now();
        model.train(&data, (steps, lr, seed))?;
        let seconds = clock.elapsed().as_secs_f64();
        let found = model.found(&data, &data.test)?;
        let (micro, by_type) = f1(&found, &wanted, data.types.len());
        text.micro.push(micro);
        text.by_type.push(by_type);
        if seed == 0 {
            text.found = found;
            text.note = json!({"parameters": model.params.count(), "steps": steps, "seconds": seconds});
        }
    }
    printed(&text);
    rows.push(text);
    let recipe = Recipe { d, layers: 2, sets: Sets::default(), captions: true, steps, batch: 32, lr, seed: 0 };
    let (hytrel, typed, curve) = arm(&data, "HyTrel", &recipe, seeds)?;
    rows.push(hytrel);
    let alone = Sets { table: false, rows: false, columns: true };
    let (row, _, curve_alone) = arm(&data, "HyTrel, columns alone", &Recipe { sets: alone, ..recipe.clone() }, seeds)?;
    rows.push(row);
    if full {
        let more = [
            ("HyTrel, no rows", Sets { rows: false, ..Sets::default() }, true),
            ("HyTrel, no table", Sets { table: false, ..Sets::default() }, true),
            ("HyTrel, no columns", Sets { columns: false, ..Sets::default() }, true),
            ("HyTrel, no title", Sets::default(), false),
        ];
        for (name, sets, captions) in more {
            rows.push(arm(&data, name, &Recipe { sets, captions, ..recipe.clone() }, seeds)?.0);
        }
    }
    let find =
        |name: &str| rows.iter().find(|r| r.name == name).map(|r| (&r.micro[..], &r.by_type[..])).unwrap_or((&[], &[]));
    let (own, context) = (find("linear, own column"), find("linear, own column, others, title"));
    let (text, ours, ablated) =
        (find("text alone: means and a network"), find("HyTrel"), find("HyTrel, columns alone"));
    let verdicts = vec![
        verdict("HyTrel is above the linear model of the own column, micro", ours.0, own.0),
        verdict("HyTrel is above the linear model of the own column, macro", ours.1, own.1),
        verdict("HyTrel is above text alone, micro", ours.0, text.0),
        verdict("HyTrel is above text alone, macro", ours.1, text.1),
        verdict("HyTrel is above the linear model with context, micro", ours.0, context.0),
        verdict("HyTrel is above the linear model with context, macro", ours.1, context.1),
        verdict("HyTrel is above itself without row and table hyperedges, micro", ours.0, ablated.0),
    ];
    let mut chart = BarChart::new("Types of columns on tables of unseen pages").label("micro F1, percent");
    for row in &rows {
        let (mean, half) = interval(&row.micro);
        let (mean, half) = (100.0 * mean, 100.0 * half);
        chart = match half.is_finite() {
            true => chart.bar_with_interval(row.name.clone(), mean, mean - half, mean + half),
            false => chart.bar(row.name.clone(), mean),
        };
    }
    chart.save(folder.plot("f1"))?;
    let percent = |c: &[(f64, f64)]| c.iter().map(|(t, f)| (*t, 100.0 * f)).collect::<Vec<_>>();
    LineChart::new("Validation while training")
        .x_label("step")
        .y_label("micro F1, percent")
        .series(Series::new("HyTrel", percent(&curve)))
        .series(Series::new("HyTrel, columns alone", percent(&curve_alone)).dashed())
        .save(folder.plot("curve"))?;
    let mut chart = BarChart::new("HyTrel by the number of columns").label("micro F1, percent");
    for (name, share, n) in by_width(&data, &rows[3]) {
        chart = chart.bar(format!("{name} ({n})"), 100.0 * share);
    }
    chart.save(folder.plot("columns"))?;
    attention(&data, &typed, &folder)?;
    let table: Vec<Value> = rows
        .iter()
        .chain([&nothing, &leak])
        .map(|r| json!({
            "method": r.name, "micro": r.micro, "macro": r.by_type, "note": r.note, "by_columns": by_width(&data, r),
        }))
        .collect();
    for (i, row) in table.iter().enumerate() {
        folder.log(i as u64, row)?;
    }
    folder.finish(&json!({
        "real_tables": data.real, "types": data.types.len(), "train_columns": train.len(), "test_columns": test.len(),
        "most_frequent_type": chance, "null_control": nothing.micro[0], "planted_leak": leak.micro[0],
        "methods": table, "verdicts": verdicts, "tries": "one learning rate for every network, none for the linear models",
        "seconds": start.elapsed().as_secs_f64(),
    }))?;
    println!("plots and summary in {}", folder.path().display());
    Ok(())
}

fn main() {
    args::finish(run());
}
