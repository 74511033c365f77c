//! Models whose layers have different attention spans: all full, all blocks, and full attention in the two layers nearest to the input.
//! They are trained on long documents, and their losses by position and their costs are compared.
//!
//! ```text
//! cargo run --release --example mixed_spans
//! ```
//!
//! Writes `plots/distance`, `plots/offset` (`.svg` and `.png`), `summary.json`, and the last model as a folder `model` that `Gpt::load`
//! reads.

#[path = "common/args.rs"]
mod args;
#[path = "common/long.rs"]
mod long;

use long::{
    Arm, Documents, LAYERS, Texts, Training, batch_of, cost_words, first_rows, mean_loss, rows, train, verdict,
};
use prismgrad::models::{Gpt, Preset};
use prismgrad::ops::attention::Span;
use prismgrad::train::plot::{LineChart, Series};
use prismgrad::{Result, device::cpu::pool};
use serde_json::json;
use std::time::Instant;

const OPTIONS: &[args::Opt] = &[
    ("seeds", "1", "1", "runs of each model, paired by seed"),
    ("steps", "80", "3", "steps of each model"),
    ("positions", "512", "128", "tokens of a sequence"),
    ("block", "64", "16", "length of the blocks of a block layer"),
    ("width", "64", "32", "width of the models"),
    ("batch", "8", "4", "sequences of a step"),
    (
        "presets",
        "full,sparse,bottom(2)",
        "full,sparse,bottom(2)",
        "which layers are full: presets, separated by commas",
    ),
];

fn run() -> Result<()> {
    let args = args::Args::parse("mixed_spans", "Models whose layers have different attention spans.", OPTIONS);
    let whole = |name: &str, least: usize| {
        args.get(name, &format!("a whole number of at least {least}"), |n: &usize| *n >= least)
    };
    let (seeds, steps, n) = (whole("seeds", 1) as u64, whole("steps", 1) as u64, whole("positions", 8));
    let (block, width, size) = (whole("block", 1), whole("width", 8), whole("batch", 1));
    if block > n || !width.is_multiple_of(8) {
        args::fail(format!(
            "--block {block} and --width {width}: a block is at most --positions {n}, a width a multiple of 8"
        ));
    }
    let parsed: Result<Vec<Preset>> = args.text("presets").split(',').map(|p| p.trim().parse()).collect();
    let presets = match parsed {
        Ok(presets) => presets,
        Err(e) => args::fail(e),
    };
    let arms: Vec<Arm> = presets.into_iter().map(|p| Arm::new(p, Span::Block(block))).collect();
    for arm in &arms {
        arm.config(n, width).unwrap_or_else(|e| args::fail(e));
    }
    let start = Instant::now();
    let long = if args.has("quick") { "half a minute" } else { "about 3 minutes" };
    println!("{} models of {LAYERS} layers, {seeds} seeds, {steps} steps: {long} on two free cores", arms.len());
    let texts = Texts::load(if args.has("quick") { 1 << 20 } else { 6 << 20 }, 2048.max(n + 1))?;
    let full = Arm::new(Preset::Full, Span::Block(block)).cost(n, width)?;
    let costs = arms.iter().map(|a| Ok((a.name.clone(), a.cost(n, width)?))).collect::<Result<Vec<_>>>()?;
    let mut folder = args.folder(&json!({
        "seeds": seeds, "steps": steps, "positions": n, "block": block, "width": width, "batch": size, "layers": LAYERS, "costs": costs,
    }))?;
    let (to_train, test) = (rows(&texts.train, n), first_rows(&texts.test, n));
    let validation: Documents = rows(&texts.validation, n).into_iter().take(16).collect();
    let tokens = steps as usize * size * n;
    println!("{} rows of {n} tokens, {tokens} tokens to train on, {} documents to test", to_train.len(), test.len());
    let (mut table, mut beyond, mut by) = (Vec::new(), Vec::new(), Vec::new());
    for (arm, (_, cost)) in arms.iter().zip(&costs) {
        let (mut ends, mut seconds, mut positions, mut kept) = (Vec::new(), 0.0, vec![0.0; n], 0);
        for seed in 0..seeds {
            let model = Gpt::new(arm.config(n, width)?, seed)?;
            let t = Training { steps, batch: size, lr: 3e-3, seed };
            let (before, _) = pool::watermark();
            let batch = |i: u64| batch_of(&to_train, size, seed, i);
            seconds += train(&model, t, &arm.name, &batch, &mut |_, _, model| {
                Ok(mean_loss(&long::token_losses(model, &validation)?, |p| p >= block))
            })?;
            kept = pool::watermark().1 - before;
            let losses = long::token_losses(&model, &test)?;
            ends.push(mean_loss(&losses, |p| p >= block));
            (0..n).for_each(|p| positions[p] += mean_loss(&losses, |q| q == p) / seeds as f64);
            model.save(folder.path().join("model"))?;
        }
        let each = 1e3 * seconds / (seeds * steps) as f64;
        println!(
            "{:<20} beyond the first block {} (nats a token); {each:.0} ms a step, {:.0} MB; {}",
            arm.name,
            long::words(&ends),
            kept as f64 / 1e6,
            cost_words(cost, &full)
        );
        let (attention, model) = cost.saved(&full);
        let row = json!({
            "arm": arm.name, "beyond": ends, "ms_a_step": each, "peak_bytes": kept, "attention_saved": attention, "model_saved": model,
            "positions": positions,
        });
        folder.log(table.len() as u64, &row)?;
        table.push(row);
        beyond.push(ends);
        by.push(positions);
    }
    let named = |name: &str| arms.iter().position(|a| a.name == name);
    let mut verdicts = Vec::new();
    if let (Some(mixed), Some(blocks)) = (named("bottom(2)"), named("all blocks")) {
        let difference: Vec<f64> = beyond[mixed].iter().zip(&beyond[blocks]).map(|(a, b)| a - b).collect();
        verdicts.push(verdict("bottom(2) is below all blocks beyond the first block", &difference, 0.0));
    }
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len().max(1) as f64;
    let mut chart = LineChart::new("Loss by distance from the document's start").x_label("tokens");
    let mut offsets = LineChart::new("Loss beyond the first block by offset in the block").x_label("tokens");
    for (arm, positions) in arms.iter().zip(&by) {
        let part = (block / 2).max(1);
        let points: Vec<(f64, f64)> =
            positions.chunks(part).enumerate().map(|(i, c)| (((2 * i + 1) * part) as f64 / 2.0, mean(c))).collect();
        chart = chart.series(Series::new(arm.name.as_str(), points).markers());
        let at = |o: usize| mean(&positions.iter().skip(block + o).step_by(block).copied().collect::<Vec<_>>());
        let part = (block / 8).max(1);
        let points: Vec<(f64, f64)> = (0..block)
            .step_by(part)
            .map(|o| (o as f64, mean(&(o..(o + part).min(block)).map(at).collect::<Vec<_>>())))
            .collect();
        offsets = offsets.series(Series::new(arm.name.as_str(), points).markers());
    }
    chart.y_label("nats a token").save(folder.plot("distance"))?;
    offsets.y_label("nats a token").save(folder.plot("offset"))?;
    let seconds = start.elapsed().as_secs_f64();
    folder.finish(&json!({"rows": table, "verdicts": verdicts, "tokens": tokens, "seconds": seconds}))?;
    println!("plots, summary and the last model in {} after {seconds:.0} s", folder.path().display());
    Ok(())
}

fn main() {
    args::finish(run());
}
