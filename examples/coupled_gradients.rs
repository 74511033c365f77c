//! Coupling of public and private gradients in one step: accuracy against the public share, at three privacy budgets, beside the share that
//! the theory of the first step predicts.
//!
//! ```text
//! cargo run --release --example coupled_gradients
//! ```
//!
//! Writes `plots/accuracy.svg` and `.png` and `summary.json` to the run folder.

#[path = "common/args.rs"]
mod args;
#[path = "common/study.rs"]
mod study;

use prismgrad::Result;
use prismgrad::privacy::continual::{Probes, curvature};
use prismgrad::privacy::coupling::Mixture;
use prismgrad::privacy::{ClipFn, ClipStyle, Weight};
use prismgrad::train::plot::{LineChart, Series};
use serde_json::json;
use study::{BATCH, Data, Mix, Mlp, PUBLIC_BATCH, Run, best, interval};

const OPTIONS: &[args::Opt] = &[
    ("seeds", "5", "2", "runs per setting; the plot shows 95 % intervals of their mean"),
    ("steps", "300", "10", "training steps"),
];
const SHARES: [f64; 6] = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0];
const EPSILONS: [f64; 3] = [1.0, 3.0, 8.0];

fn run() -> Result<()> {
    let args = args::Args::parse("coupled_gradients", "Accuracy against the share of public gradients.", OPTIONS);
    let seeds = args.get("seeds", "a whole number from 2 to 10", |n: &u64| (2..=10).contains(n));
    let steps = args.get("steps", "a whole number from 10 to 10000", |n: &u64| (10..=10_000).contains(n));
    let data = Data::load()?;
    let mut folder = args.folder(&json!({"seeds": seeds, "steps": steps}))?;
    println!("{} public, {} private and {} test digits", data.public.len(), data.private.len(), data.test.len());
    let mut chart = LineChart::new("Public and private gradients in one step").x_label("public share of the gradient");
    let mut results = Vec::new();
    // With public data alone, runs are the same at every ε.
    let make = |share: f64, sigma: Option<f64>| Run {
        widths: vec![32],
        style: ClipStyle::AllLayer,
        mix: Mix::Share(share),
        sigma,
        steps,
        lr: 1.0,
        seed: 0,
    };
    let alone = best(&data, &make(1.0, None), &[0.05, 0.1, 0.2], seeds)?;
    for epsilon in EPSILONS {
        let sigma = data.sigma(epsilon, steps)?;
        // The quantities of the formula at the start of training, from public data.
        let model = Mlp::new(&[32], 0)?;
        let all: Vec<usize> = (0..data.public.len()).collect();
        let losses = || model.losses_of(&data.public, &all);
        let c = curvature(&losses, &model.params.all(), (ClipFn::AutoS { gamma: 0.01 }, 1.0), Probes::Random(30, 1))?;
        let predicted = Weight::best(&Mixture {
            clip: c.clip,
            trace_h_sigma: c.trace_h_sigma.0,
            trace_h: c.trace_h.0,
            noise: sigma,
            private_batch: BATCH,
            public_batch: PUBLIC_BATCH as f64,
        })?;
        let (mut points, mut band, mut rows) = (Vec::new(), Vec::new(), Vec::new());
        for share in SHARES {
            // A public gradient is not normalised and a private one is, so the scale of the mixture grows with the public share.
            let found = match share {
                1.0 => &alone,
                _ => &best(&data, &make(share, Some(sigma)), &[0.1, 0.2, 0.5, 1.0], seeds)?,
            };
            let (mean, half) = interval(&found.accuracies);
            println!(
                "ε {epsilon}  public share {share:.1}  accuracy {mean:.4} ± {half:.4}  (learning rate {})",
                found.lr
            );
            folder
                .log(rows.len() as u64, &json!({"epsilon": epsilon, "share": share, "accuracy": mean, "half": half}))?;
            points.push((share, mean));
            band.push((share, mean - half, mean + half));
            rows.push(
                json!({"share": share, "accuracy": mean, "interval": half, "lr": found.lr, "runs": found.accuracies}),
            );
        }
        let top = points.iter().fold((0.0, 0.0), |b, p| if p.1 > b.1 { *p } else { b });
        println!("ε {epsilon}: best at {:.1}, predicted for the first step {:.2}", top.0, predicted.of_public());
        results.push(json!({
            "epsilon": epsilon, "sigma": sigma, "best_share": top.0, "predicted_share": predicted.of_public(), "rows": rows,
        }));
        chart = chart.series(Series::new(format!("ε = {epsilon}"), points).band(band).markers());
    }
    chart.y_label("test accuracy").save(folder.plot("accuracy"))?;
    folder.finish(&json!({"results": results}))?;
    println!("plots and summary in {}", folder.path().display());
    Ok(())
}

fn main() {
    args::finish(run());
}
