//! Full attention in a few layers and blocks in the others (MASFormer, Zhang et al. 2023): copies from far away, the placement of the full
//! layers, language modelling, and conversion of a model of short sequences.
//!
//! ```text
//! cargo run --release --example masformer
//! ```
//!
//! Writes `plots/copy`, `plots/placement`, `plots/language`, `plots/conversion` (`.svg` and `.png`) and `summary.json` to the run folder.

#[path = "common/args.rs"]
mod args;
#[path = "common/long.rs"]
mod long;

use long::{Arm, Documents, LAYERS, Texts, Training, batch_of, cost_words, mean_loss, rows, train, verdict, words};
use prismgrad::Result;
use prismgrad::models::{Extend, Gpt, Preset, SpanCost, spans};
use prismgrad::ops::attention::Span;
use prismgrad::random::Rng;
use prismgrad::train::plot::{BarChart, LineChart, Series};
use prismgrad::train::{Existing, RunFolder};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Instant;

const OPTIONS: &[args::Opt] = &[
    ("seeds", "1", "1", "runs of everything, paired by seed; 3 with --full"),
    ("copy-steps", "1200", "4", "steps of 16 sequences of each model of the copies"),
    ("steps", "150", "4", "steps of each model of language modelling and of conversion; 600 with --full"),
    ("rate", "0.003", "0.003", "learning rate of AdamW"),
    (
        "only",
        "all",
        "all",
        "runs one part: copy, placement (with the copies), language, or conversion; all leaves out the placement",
    ),
    ("presets", "full,sparse,bottom(2)", "full,sparse,bottom(2)", "models of the copies: which layers are full"),
    ("resume", "", "", "continue an interrupted run: models of the copies that it has are not trained again"),
    ("full", "", "", "uses three seeds, more steps, and the placement; takes hours"),
];
/// Number of positions of a sequence, of a block and of a passage that occurs twice.
const N: usize = 192;
const BLOCK: usize = 24;
const PASSAGE: usize = 48;
const WIDTH: usize = 64;
const BATCH: usize = 16;

/// Sequences in which a passage occurs twice, and the position of its second occurrence.
struct Copies {
    rows: Documents,
    second: Vec<usize>,
}

/// What a sequence has at the place of the first passage.
#[derive(Clone, Copy, PartialEq)]
enum First {
    Same,
    /// Another passage.
    Other,
    /// The same tokens in another order. A model that uses only which tokens occurred gains as much from it.
    Shuffled,
}

/// A random stretch of a document.
fn stretch<'a>(documents: &'a Documents, length: usize, rng: &mut Rng) -> &'a [u32] {
    let d = &documents[rng.below(documents.len() as u64) as usize];
    let at = rng.below((d.len() - length + 1) as u64) as usize;
    &d[at..at + length]
}

/// Sequences with copies. Far copies have a passage, at least two blocks of other text, and the passage again, at a random place in other
/// text; the distance is drawn for each sequence, so that it cannot be learnt. Near copies are passages of a third of a block that occur
/// twice in the same block.
fn copies(documents: &Documents, count: usize, far: bool, first: First, seed: u64) -> Copies {
    let mut out = Copies { rows: Vec::new(), second: Vec::new() };
    for i in 0..count as u64 {
        let mut rng = Rng::new(seed * 1_000_003 + i);
        let mut row = stretch(documents, N + 1, &mut rng).to_vec();
        let (length, second, from) = match far {
            true => {
                let gap = 2 * BLOCK + rng.below((N + 1 - 2 * PASSAGE - 2 * BLOCK) as u64) as usize;
                let from = rng.below((N + 2 - 2 * PASSAGE - gap) as u64) as usize;
                (PASSAGE, from + PASSAGE + gap, from)
            }
            false => {
                // The last block after which the targets still have a whole passage.
                let (length, block) = (BLOCK / 3, N / BLOCK - 1);
                let gap = rng.below((BLOCK - 2 * length) as u64 + 1) as usize;
                let from = block * BLOCK + rng.below((BLOCK - 2 * length - gap) as u64 + 1) as usize;
                (length, from + length + gap, from)
            }
        };
        let (passage, other) =
            (stretch(documents, length, &mut rng).to_vec(), stretch(documents, length, &mut rng).to_vec());
        row[second..second + length].copy_from_slice(&passage);
        match first {
            First::Same => row[from..from + length].copy_from_slice(&passage),
            First::Other => row[from..from + length].copy_from_slice(&other),
            First::Shuffled => {
                let mut mixed = passage;
                rng.shuffle(&mut mixed);
                row[from..from + length].copy_from_slice(&mixed);
            }
        }
        out.rows.push(row);
        out.second.push(second);
    }
    out
}

/// Mean loss on the second passage from its fourth token on, in nats per token.
fn second_loss(model: &Gpt, c: &Copies, far: bool) -> Result<f64> {
    let length = if far { PASSAGE } else { BLOCK / 3 };
    let losses = long::token_losses(model, &c.rows)?;
    // Token p of a row is the target of position p − 1.
    let of = |(row, second): (&Vec<f64>, &usize)| {
        let part = &row[second + 3 - 1..second + length - 1];
        part.iter().sum::<f64>() / part.len() as f64
    };
    Ok(losses.iter().zip(&c.second).map(of).sum::<f64>() / c.rows.len() as f64)
}

/// The losses of one model on the second passage.
#[derive(Serialize, Deserialize)]
struct Copied {
    present: f64,
    absent: f64,
    shuffled: f64,
    /// Number of tokens, and the loss on validation text.
    curve: Vec<(f64, f64)>,
    seconds: f64,
}

fn copy(arm: &Arm, texts: &Texts, far: bool, t: Training) -> Result<Copied> {
    let model = Gpt::new(arm.config(N, WIDTH)?, t.seed)?;
    let held = |d: &Documents, first: First, seed: u64| copies(d, 96, far, first, seed);
    let validation = held(&texts.validation, First::Same, 77);
    let mut curve = Vec::new();
    let seed = 10 + t.seed;
    // The model is trained on the second passage and what follows; language as such is another experiment.
    let batch = |i: u64| {
        let c = copies(&texts.train, t.batch, far, First::Same, seed * 1_000_000 + i);
        (c.rows, Some(c.second))
    };
    let what = format!("{}: {}", if far { "far copy" } else { "near copy" }, arm.name);
    let seconds = train(&model, t, &what, &batch, &mut |step, _, model| {
        let loss = second_loss(model, &validation, far)?;
        curve.push(((step as usize * t.batch * N) as f64, loss));
        Ok(loss)
    })?;
    let of = |first: First| second_loss(&model, &held(&texts.test, first, 78), far);
    Ok(Copied { present: of(First::Same)?, absent: of(First::Other)?, shuffled: of(First::Shuffled)?, curve, seconds })
}

/// Runs [`copy`], unless the folder already has the same run. Its record is added to the folder.
fn copied(arm: &Arm, texts: &Texts, far: bool, t: Training, number: usize, folder: &mut RunFolder) -> Result<Copied> {
    let same = |v: &Value| v["part"] == "copy" && v["arm"] == arm.name.as_str() && v["seed"] == t.seed;
    if let Some(done) = folder.metrics()?.into_iter().find(same)
        && let Ok(copied) = serde_json::from_value(done)
    {
        return Ok(copied);
    }
    let c = copy(arm, texts, far, t)?;
    let mut record = json!(c);
    record["part"] = json!("copy");
    record["arm"] = json!(arm.name);
    record["seed"] = json!(t.seed);
    folder.log(t.seed * 100 + number as u64, &record)?;
    Ok(c)
}

type Rows = Vec<Value>;

/// Far copies: the main comparison, and the placement of the full layers at equal cost.
fn copy_part(
    texts: &Texts,
    (seeds, steps, lr): (u64, u64, f64),
    (presets, placement): (&[Preset], bool),
    folder: &mut RunFolder,
) -> Result<(Rows, Rows)> {
    let block = Span::Block(BLOCK);
    let usual = [Preset::Full, Preset::Sparse, Preset::Bottom(2)];
    let mut arms: Vec<Arm> = presets.iter().map(|p| Arm::new(p.clone(), block)).collect();
    if placement {
        arms.extend(
            [Preset::Middle(2), Preset::Top(2), Preset::Spread(2), Preset::Bottom(1)].map(|p| Arm::new(p, block)),
        );
        arms.push(Arm::new(Preset::Bottom(2), block).blind());
        // This window has as many pairs as bottom(2) with blocks.
        arms.push(Arm::new(Preset::Sparse, Span::Window(equal_window(&Arm::new(Preset::Bottom(2), block))?)));
    }
    let full = Arm::new(Preset::Full, block).cost(N, WIDTH)?;
    let (mut rows, mut all) = (Vec::new(), arms.iter().map(|_| Vec::new()).collect::<Vec<Vec<Copied>>>());
    // Seeds run one after the other, so that an interrupted run has complete seeds.
    for seed in 0..seeds {
        for (i, arm) in arms.iter().enumerate() {
            let c = copied(arm, texts, true, Training { steps, batch: BATCH, lr, seed }, i, folder)?;
            println!(
                "seed {seed}, {}: copied {:.3}, absent {:.3}, shuffled {:.3}; {:.0} s",
                arm.name, c.present, c.absent, c.shuffled, c.seconds
            );
            all[i].push(c);
        }
    }
    for (arm, runs) in arms.iter().zip(&all) {
        let column = |f: fn(&Copied) -> f64| runs.iter().map(f).collect::<Vec<f64>>();
        let (present, absent, shuffled) = (column(|c| c.present), column(|c| c.absent), column(|c| c.shuffled));
        println!(
            "{:<44} copied {}, absent {}, shuffled {}; {:.0} s a run; {}",
            arm.name,
            words(&present),
            words(&absent),
            words(&shuffled),
            column(|c| c.seconds).iter().sum::<f64>() / seeds as f64,
            cost_words(&arm.cost(N, WIDTH)?, &full)
        );
        let (attention, model) = arm.cost(N, WIDTH)?.saved(&full);
        rows.push(json!({
            "part": "copy", "arm": arm.name, "present": present, "absent": absent, "shuffled": shuffled,
            "curves": runs.iter().map(|r| &r.curve).collect::<Vec<_>>(), "seconds": column(|c| c.seconds),
            "attention_saved": attention, "model_saved": model, "cost": arm.cost(N, WIDTH)?,
        }));
    }
    let mut near = Arm::new(Preset::Sparse, block);
    near.name += ", near";
    let near = copied(&near, texts, false, Training { steps, batch: BATCH, lr, seed: 0 }, 99, folder)?;
    println!("null control, both in one block, all blocks: copied {:.3}, absent {:.3}", near.present, near.absent);
    // Runs are paired by seed: they have the same initial values and batches.
    let values = |arm: usize, f: &dyn Fn(&Copied) -> f64| all[arm].iter().map(f).collect::<Vec<f64>>();
    let mut verdicts = vec![verdict(
        "null control: all blocks copy within a block, at least 0.5 nat",
        &[near.present - near.absent],
        -0.5,
    )];
    if presets == usual {
        let open = |s: usize| {
            let [full, blocks, bottom] = [0, 1, 2].map(|arm| all[arm][s].present);
            (bottom - full) / (blocks - full)
        };
        let saved = 100.0 * arms[2].cost(N, WIDTH)?.saved(&full).0;
        verdicts.extend([
            verdict(
                "full attention copies: at least 1 nat below the same text without the first passage",
                &values(0, &|c| c.present - c.absent),
                -1.0,
            ),
            verdict(
                "all blocks lose at most 0.02 nat without the first passage",
                &values(1, &|c| (c.absent - c.present).abs()),
                0.02,
            ),
            verdict(
                &format!("bottom(2), which saves {saved:.0} % of the scores, leaves at most 0.3 of the gap open"),
                &(0..seeds as usize).map(open).collect::<Vec<f64>>(),
                0.3,
            ),
            verdict(
                "bottom(2) copies order: below the shuffled first passage",
                &values(2, &|c| c.present - c.shuffled),
                0.0,
            ),
        ]);
        for (i, arm) in arms.iter().enumerate().skip(3) {
            let differences: Vec<f64> = (0..seeds as usize).map(|s| all[2][s].present - all[i][s].present).collect();
            verdicts.push(verdict(&format!("copies: bottom(2) is below {}", arm.name), &differences, 0.0));
        }
    }
    let mut chart = LineChart::new("Loss of the second passage, from its fourth token").x_label("training tokens");
    for (arm, runs) in arms.iter().zip(&all) {
        let mean = |i: usize| runs.iter().map(|r| r.curve[i].1).sum::<f64>() / runs.len() as f64;
        let points: Vec<(f64, f64)> = (0..runs[0].curve.len()).map(|i| (runs[0].curve[i].0, mean(i))).collect();
        chart = chart.series(Series::new(arm.name.as_str(), points).markers());
    }
    chart.y_label("nats a token, validation").save(folder.plot("copy"))?;
    let mut chart = BarChart::new("Far copies, test text").label("nats a token");
    for (i, arm) in arms.iter().enumerate() {
        let (mean, half) = long::interval(&values(i, &|c| c.present));
        chart = match half.is_finite() {
            true => chart.bar_with_interval(arm.name.as_str(), mean, mean - half, mean + half),
            false => chart.bar(arm.name.as_str(), mean),
        };
    }
    chart.save(folder.plot("placement"))?;
    rows.push(json!({"part": "copy", "arm": "all blocks, near", "present": near.present, "absent": near.absent}));
    Ok((rows, verdicts))
}

/// The window whose pairs, if used in every layer, are nearest in number to those of an arm.
fn equal_window(arm: &Arm) -> Result<usize> {
    let pairs: u64 = arm.cost(N, WIDTH)?.pairs.iter().sum();
    let off = |w: usize| (Span::Window(w).pairs(N) * LAYERS as u64).abs_diff(pairs);
    Ok((1..=N).min_by_key(|&w| off(w)).unwrap_or(N))
}

/// Language modelling on documents, with losses beyond the first block, by distance from the start, and by offset in the block.
fn language_part(texts: &Texts, (seeds, steps, lr): (u64, u64, f64), folder: &mut RunFolder) -> Result<(Rows, Rows)> {
    let block = Span::Block(BLOCK);
    let bottom = Arm::new(Preset::Bottom(2), block);
    let window = Arm::new(Preset::Sparse, Span::Window(equal_window(&bottom)?));
    let arms = [Arm::new(Preset::Full, block), Arm::new(Preset::Sparse, block), bottom, window];
    let (to_train, test) = (rows(&texts.train, N), long::first_rows(&texts.test, N));
    let validation: Documents = rows(&texts.validation, N).into_iter().take(48).collect();
    let full = arms[0].cost(N, WIDTH)?;
    let (mut out, mut beyond, mut half, mut by) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for arm in &arms {
        let (mut ends, mut late, mut seconds, mut positions) = (Vec::new(), Vec::new(), 0.0, vec![0.0; N]);
        for seed in 0..seeds {
            let model = Gpt::new(arm.config(N, WIDTH)?, seed)?;
            let t = Training { steps, batch: BATCH, lr, seed };
            let batch = |i: u64| batch_of(&to_train, BATCH, seed, i);
            seconds += train(&model, t, &format!("language: {}", arm.name), &batch, &mut |_, _, model| {
                Ok(mean_loss(&long::token_losses(model, &validation)?, |p| p >= BLOCK))
            })?;
            let losses = long::token_losses(&model, &test)?;
            ends.push(mean_loss(&losses, |p| p >= BLOCK));
            late.push(mean_loss(&losses, |p| p >= BLOCK && p % BLOCK >= BLOCK / 2));
            (0..N).for_each(|p| positions[p] += mean_loss(&losses, |q| q == p) / seeds as f64);
        }
        println!(
            "{:<44} beyond the first block {}, late in blocks {}; {:.0} s a run; {}",
            arm.name,
            words(&ends),
            words(&late),
            seconds / seeds as f64,
            cost_words(&arm.cost(N, WIDTH)?, &full)
        );
        let row = json!({
            "part": "language", "arm": arm.name, "beyond": ends, "late": late, "seconds": seconds / seeds as f64,
            "positions": positions,
        });
        folder.log(100 + out.len() as u64, &row)?;
        out.push(row);
        beyond.push(ends);
        half.push(late);
        by.push(positions);
    }
    let below = |x: &[Vec<f64>], a: usize, b: usize| x[a].iter().zip(&x[b]).map(|(a, b)| a - b).collect::<Vec<f64>>();
    let verdicts = vec![
        verdict("language: bottom(2) is below all blocks beyond the first block", &below(&beyond, 2, 1), 0.0),
        verdict(
            "language: bottom(2) is below all blocks at offsets of at least half a block",
            &below(&half, 2, 1),
            0.0,
        ),
        verdict("language: bottom(2) is within 0.03 nat of full", &below(&beyond, 2, 0), 0.03),
        verdict("language: bottom(2) is below the window of equal cost", &below(&beyond, 2, 3), 0.0),
    ];
    let mut chart =
        LineChart::new("Loss by distance from the document's start").x_label("tokens, in steps of a third of a block");
    for (arm, positions) in arms.iter().zip(&by) {
        let third = BLOCK / 3;
        let points: Vec<(f64, f64)> = positions
            .chunks(third)
            .enumerate()
            .map(|(i, c)| ((i * third + third / 2) as f64, c.iter().sum::<f64>() / c.len() as f64))
            .collect();
        chart = chart.series(Series::new(arm.name.as_str(), points));
    }
    chart.y_label("nats a token").save(folder.plot("language"))?;
    Ok((out, verdicts))
}

/// A model with the positions of two blocks is converted to all N positions. The loss at the new positions is measured before further
/// training, and after 1 % and 5 % of the tokens.
fn conversion_part(texts: &Texts, (seeds, steps, lr): (u64, u64, f64), folder: &mut RunFolder) -> Result<(Rows, Rows)> {
    let (short, block) = (2 * BLOCK, Span::Block(BLOCK));
    let (few, many) = (rows(&texts.train, short), rows(&texts.train, N));
    let test: Documents = rows(&texts.test, N).into_iter().take(64).collect();
    let more = [(steps as f64 * 0.01).ceil() as u64, (steps as f64 * 0.05).ceil() as u64];
    let arms = [
        (Preset::Full, Extend::Fit),
        (Preset::Bottom(2), Extend::Fit),
        (Preset::Sparse, Extend::Fit),
        (Preset::Full, Extend::Plain),
    ];
    let name = |(p, how): &(Preset, Extend)| {
        format!("{p}{}", if *how == Extend::Plain { ", rotary base as it was" } else { "" })
    };
    let mut found: BTreeMap<usize, Vec<[f64; 3]>> = BTreeMap::new();
    for seed in 0..seeds {
        let make = || Gpt::new(Arm::new(Preset::Full, block).config(short, WIDTH)?, seed);
        let base = make()?;
        // A step has the same number of tokens: four times as many sequences of a quarter of the length.
        let t = Training { steps, batch: BATCH * N / short, lr, seed };
        train(&base, t, "short sequences", &|i| batch_of(&few, t.batch, seed, i), &mut |_, _, _| Ok(f64::NAN))?;
        for (k, (preset, how)) in arms.iter().enumerate() {
            let copy = make()?;
            for (p, q) in copy.params().all().iter().zip(base.params().all()) {
                p.set(q.value().copy())?;
            }
            let model = copy.with_spans(spans(preset, LAYERS, block)?, N, *how)?;
            let look = |model: &Gpt| {
                Ok::<f64, prismgrad::Error>(mean_loss(&long::token_losses(model, &test)?, |p| p >= short))
            };
            let mut losses = [look(&model)?, f64::NAN, f64::NAN];
            let t = Training { steps: more[1], batch: BATCH, lr: lr / 3.0, seed };
            // The loss is measured every eighth of the steps, which is often enough for the first hundredth.
            train(
                &model,
                t,
                &format!("converted: {}", name(&arms[k])),
                &|i| batch_of(&many, BATCH, 50 + seed, i),
                &mut |step, _, model| {
                    let loss = look(model)?;
                    if losses[1].is_nan() && step >= more[0] {
                        losses[1] = loss;
                    }
                    losses[2] = loss;
                    Ok(loss)
                },
            )?;
            found.entry(k).or_default().push(losses);
        }
    }
    let column = |k: usize, i: usize| found[&k].iter().map(|l| l[i]).collect::<Vec<f64>>();
    let mut out = Vec::new();
    let mut chart = LineChart::new("A converted model at positions that it did not have")
        .x_label("further tokens, % of those before");
    for (k, arm) in arms.iter().enumerate() {
        let all = [column(k, 0), column(k, 1), column(k, 2)];
        println!(
            "{:<44} before {}, after 1 % {}, after 5 % {}",
            name(arm),
            words(&all[0]),
            words(&all[1]),
            words(&all[2])
        );
        let points: Vec<(f64, f64)> =
            [0.0, 1.0, 5.0].iter().zip(&all).map(|(x, l)| (*x, long::interval(l).0)).collect();
        chart = chart.series(Series::new(name(arm), points).markers());
        let row =
            json!({"part": "conversion", "arm": name(arm), "before": all[0], "after_1": all[1], "after_5": all[2]});
        folder.log(200 + k as u64, &row)?;
        out.push(row);
    }
    chart.y_label("nats a token").save(folder.plot("conversion"))?;
    let difference =
        |a: usize, b: usize, i: usize| column(a, i).iter().zip(column(b, i)).map(|(a, b)| a - b).collect::<Vec<f64>>();
    let verdicts = vec![
        verdict(
            "conversion: bottom(2) after 5 % is within 0.05 nat of full given the same tokens",
            &difference(1, 0, 2),
            0.05,
        ),
        verdict("conversion: bottom(2) after 5 % is below all blocks", &difference(1, 2, 2), 0.0),
        verdict("conversion: before training, a fitted rotary base is below the old one", &difference(0, 3, 0), 0.0),
    ];
    Ok((out, verdicts))
}

fn run() -> Result<()> {
    let args = args::Args::parse("masformer", "Full attention in few layers, blocks in the others", OPTIONS);
    let full = args.has("full");
    let count = |name: &str, in_full: u64| match full && !args.has(name) {
        true => in_full,
        false => args.get(name, "a whole number of at least 1", |n: &u64| *n >= 1),
    };
    let (seeds, copy_steps, steps) = (count("seeds", 3), count("copy-steps", 1200), count("steps", 600));
    let presets: Result<Vec<Preset>> = args.text("presets").split(',').map(|p| p.trim().parse()).collect();
    let presets = presets.unwrap_or_else(|e| args::fail(e));
    let asked = presets.iter().find_map(|p| spans(p, LAYERS, Span::Block(BLOCK)).err());
    if let Some(e) = asked {
        args::fail(e);
    }
    let lr = args.get("rate", "a number above 0", |r: &f64| r.is_finite() && *r > 0.0);
    let parts = ["all", "copy", "placement", "language", "conversion"].map(|p| (p, p));
    let only = args.choice("only", &parts);
    let part = |name: &str| only == "all" || only == name;
    let start = Instant::now();
    let long = if full {
        "hours"
    } else if args.has("quick") {
        "half a minute"
    } else {
        "about 10 minutes"
    };
    println!("{seeds} seeds, {copy_steps} steps of copies and {steps} of language: {long} on two free cores");
    let texts = Texts::load(if args.has("quick") { 2 << 20 } else { 6 << 20 }, 2048)?;
    let all = [Preset::Full, Preset::Sparse, Preset::Bottom(2)];
    let cost = |p: &Preset| Ok((p.to_string(), Arm::new(p.clone(), Span::Block(BLOCK)).cost(N, WIDTH)?));
    let costs = all.iter().map(cost).collect::<Result<BTreeMap<String, SpanCost>>>()?;
    let config = json!({
        "seeds": seeds, "copy_steps": copy_steps, "steps": steps, "rate": lr, "only": only, "positions": N, "block": BLOCK,
        "passage": PASSAGE, "layers": LAYERS, "width": WIDTH, "batch": BATCH, "documents": texts.train.len(), "short": texts.short,
        "costs": costs,
    });
    let placement = only == "placement" || (full && only == "all");
    let existing = match (args.has("resume"), args.has("overwrite")) {
        (true, _) => Existing::Resume,
        (_, true) => Existing::Overwrite,
        _ => Existing::Refuse,
    };
    let mut folder = RunFolder::create(args.out(), &config, existing, &["seeds", "only", "steps"])?;
    let (mut rows, mut verdicts) = (Vec::new(), Vec::new());
    let mut add = |(r, v): (Rows, Rows)| {
        rows.extend(r);
        verdicts.extend(v);
    };
    if part("copy") || part("placement") {
        add(copy_part(&texts, (seeds, copy_steps, lr), (&presets, placement), &mut folder)?);
    }
    if part("language") {
        add(language_part(&texts, (seeds, steps, lr), &mut folder)?);
    }
    if part("conversion") {
        add(conversion_part(&texts, (seeds, steps, lr), &mut folder)?);
    }
    let seconds = start.elapsed().as_secs_f64();
    folder.finish(&json!({"rows": rows, "verdicts": verdicts, "seconds": seconds}))?;
    println!("plots and summary in {} after {seconds:.0} s", folder.path().display());
    Ok(())
}

fn main() {
    args::finish(run());
}
