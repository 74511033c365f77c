//! DP continual pre-training: private training that begins with a short public phase, beside private data alone and public data alone, at
//! three privacy budgets. It also measures the slowdown by noise that the public phase removes.
//!
//! ```text
//! cargo run --release --example dp_continual_pretraining
//! ```
//!
//! Writes two plots (`accuracy`, `slowdown`) and `summary.json` to the run folder.

#[path = "common/args.rs"]
mod args;
#[path = "common/study.rs"]
mod study;

use prismgrad::optim::{Schedule, Sgd};
use prismgrad::privacy::continual::{Probes, Switch, curvature};
use prismgrad::privacy::{ClipFn, ClipStyle, Public};
use prismgrad::step::{PlainStep, TrainStep};
use prismgrad::train::plot::{LineChart, Series};
use prismgrad::{Result, no_grad};
use serde_json::json;
use study::{BATCH, Data, Mix, Mlp, Run, best, interval};

const OPTIONS: &[args::Opt] = &[
    ("seeds", "8", "2", "runs per setting; intervals are 95 % of their mean"),
    ("steps", "300", "10", "training steps"),
    ("part", "0.2", "0.2", "share of the steps that use only public data"),
];
const EPSILONS: [f64; 3] = [1.0, 3.0, 8.0];

fn run() -> Result<()> {
    let args = args::Args::parse("dp_continual_pretraining", "Private training after a public phase.", OPTIONS);
    let seeds = args.get("seeds", "a whole number from 2 to 10", |n: &u64| (2..=10).contains(n));
    let steps = args.get("steps", "a whole number from 10 to 10000", |n: &u64| (10..=10_000).contains(n));
    let part = args.get("part", "a number between 0 and 1", |p: &f64| *p > 0.0 && *p < 1.0);
    let data = Data::load()?;
    let config = json!({"seeds": seeds, "steps": steps, "part": part});
    let mut folder = args.folder(&config)?;
    println!("{} public, {} private and {} test digits", data.public.len(), data.private.len(), data.test.len());

    let make = |mix: Mix, sigma: Option<f64>| Run {
        widths: vec![32],
        style: ClipStyle::AllLayer,
        mix,
        sigma,
        steps,
        lr: 1.0,
        seed: 0,
    };
    let private_steps = steps - (part * steps as f64).ceil() as u64;
    let public_only = best(&data, &make(Mix::Share(1.0), None), &[0.05, 0.1, 0.2], seeds)?;
    let (mut lines, mut rows) = ([Vec::new(), Vec::new(), Vec::new()], Vec::new());
    for epsilon in EPSILONS {
        let lrs = [0.02, 0.05, 0.1, 0.2];
        let private_only = best(&data, &make(Mix::Share(0.0), Some(data.sigma(epsilon, steps)?)), &lrs, seeds)?;
        let switched = best(&data, &make(Mix::Switch(part), Some(data.sigma(epsilon, private_steps)?)), &lrs, seeds)?;
        let mut row = json!({"epsilon": epsilon});
        let methods =
            [("private only", &private_only), ("public, then private", &switched), ("public only", &public_only)];
        for (line, (name, found)) in lines.iter_mut().zip(methods) {
            let (mean, half) = interval(&found.accuracies);
            println!("ε {epsilon}  {name:<20}  accuracy {mean:.4} ± {half:.4}  (learning rate {})", found.lr);
            line.push((epsilon, mean, half));
            row[name] = json!({"accuracy": mean, "interval": half, "lr": found.lr, "runs": found.accuracies});
        }
        folder.log(rows.len() as u64, &row)?;
        rows.push(row);
    }
    let mut chart =
        LineChart::new("A public phase before private training").x_label("ε").y_label("test accuracy").log_x();
    for (name, line) in ["private only", "public, then private", "public only"].into_iter().zip(&lines) {
        let points: Vec<(f64, f64)> = line.iter().map(|l| (l.0, l.1)).collect();
        let band: Vec<(f64, f64, f64)> = line.iter().map(|l| (l.0, l.1 - l.2, l.1 + l.2)).collect();
        chart = chart.series(Series::new(name, points).band(band).markers());
    }
    chart.save(folder.plot("accuracy"))?;

    // The cost of noise is measured on public data while training on them. A quarter of the public data is held out and shows when to
    // switch. This decision costs no budget, since it uses no private data.
    let model = Mlp::new(&[32], 0)?;
    let (held, train) = data.public.split(0.25);
    let sigma = data.sigma(1.0, private_steps)?;
    let sgd = Sgd { momentum: 0.9, weight_decay: 0.0 };
    let mut step = PlainStep::new(&model.params.all(), sgd, Schedule::constant(0.05))?;
    let all: Vec<usize> = (0..train.len()).collect();
    let (mut switch, mut when) = (Switch::new(3), None);
    let (mut slow, mut band, mut telemetry) = (Vec::new(), Vec::new(), Vec::new());
    for at in [0u64, 5, 10, 20, 40, 80, 160, 320] {
        while step.steps() < at {
            step.run_one(|| model.losses_of(&train, &all))?;
            if step.steps() % 10 == 0 && when.is_none() {
                let losses = no_grad(|| model.losses(&held.pixels, &held.labels))?.mean(&[0], false)?.item()?;
                when = switch.observe(Public(losses)).then_some(step.steps());
            }
        }
        let losses = || model.losses_of(&train, &all);
        let clip = (ClipFn::AutoS { gamma: 0.01 }, 1.0);
        let c = curvature(&losses, &model.params.all(), clip, Probes::Random(60, 1))?;
        let (best, error) = c.best_batch_with_error(sigma);
        let (s, e) = (c.slowdown(sigma, BATCH), (c.slowdown(sigma, BATCH) - 1.0) * c.trace_h.1 / c.trace_h.0);
        // Where the loss curves downwards along the gradient, no batch size is best: a larger one is always better.
        let batch = if best.is_finite() { format!("{best:.0} ± {error:.0}") } else { "none, GᵀHG < 0".into() };
        println!(
            "{at:>4} public steps: loss {:.3}  tr(H) {:.2} ± {:.2}  best private batch {batch}  slowdown {s:.2} ± {e:.2}",
            c.loss, c.trace_h.0, c.trace_h.1
        );
        slow.push((at as f64, s));
        band.push((at as f64, s - e, s + e));
        telemetry.push(json!({
            "public_steps": at, "loss": c.loss, "trace_h": c.trace_h.0, "best_batch": best, "best_batch_error": error,
            "decelerator": c.decelerator(sigma, BATCH), "slowdown": s, "slowdown_error": e, "clip": c.clip,
        }));
    }
    match when {
        Some(n) => println!("public losses alone would have switched after {n} public steps"),
        None => println!("public losses were still falling at the end"),
    }
    LineChart::new("What noise costs falls with public steps (ε = 1)")
        .x_label("public steps")
        .y_label("samples needed, over those without noise")
        .series(Series::new("private slowdown", slow).band(band).markers())
        .save(folder.plot("slowdown"))?;
    folder.finish(&json!({"accuracy": rows, "telemetry": telemetry, "switch_after": when}))?;
    println!("plots and summary in {}", folder.path().display());
    Ok(())
}

fn main() {
    args::finish(run());
}
