//! Group-wise clipping (He et al. 2023; Bu et al. 2023): accuracy, time and memory of clipping styles, over widths and depths of the model.
//!
//! ```text
//! cargo run --release --example clipping_styles
//! ```
//!
//! Writes `plots/accuracy.svg` and `.png` and `summary.json` to the run folder.

#[path = "common/args.rs"]
mod args;
#[path = "common/study.rs"]
mod study;

use prismgrad::Result;
use prismgrad::privacy::ClipStyle;
use prismgrad::train::plot::{LineChart, Series};
use serde_json::json;
use study::{Data, Mix, Run, best, interval};

const OPTIONS: &[args::Opt] = &[
    ("seeds", "4", "2", "runs per setting; intervals are 95 % of their mean"),
    ("steps", "300", "10", "training steps"),
    ("epsilon", "3", "3", "privacy budget ε at δ = 1e-4"),
];

fn run() -> Result<()> {
    let args = args::Args::parse("clipping_styles", "Accuracy and cost of clipping styles.", OPTIONS);
    let seeds = args.get("seeds", "a whole number from 2 to 10", |n: &u64| (2..=10).contains(n));
    let steps = args.get("steps", "a whole number from 10 to 10000", |n: &u64| (10..=10_000).contains(n));
    let epsilon = args.get("epsilon", "a positive number, such as 3", |e: &f64| e.is_finite() && *e > 0.0);
    let data = Data::load()?;
    let config = json!({"seeds": seeds, "steps": steps, "epsilon": epsilon});
    let mut folder = args.folder(&config)?;
    let sigma = data.sigma(epsilon, steps)?;
    println!("{} private and {} test digits, noise multiplier {sigma:.4}", data.private.len(), data.test.len());
    let models: [(&str, Vec<usize>); 4] = [
        ("64-32-10", vec![32]),
        ("64-32x4-10", vec![32; 4]),
        ("64-96x4-10", vec![96; 4]),
        ("64-256x4-10", vec![256; 4]),
    ];
    let styles = [
        ("all-layer", ClipStyle::AllLayer),
        ("layer-wise", ClipStyle::LayerWise),
        ("parameter-wise", ClipStyle::ParameterWise),
    ];
    // For each style: (width, mean, half an interval).
    let mut lines: Vec<Vec<(f64, f64, f64)>> = vec![Vec::new(); styles.len()];
    let mut rows = Vec::new();
    for (k, (model, widths)) in models.iter().enumerate() {
        for ((name, style), line) in styles.iter().zip(&mut lines) {
            let run = Run {
                widths: widths.clone(),
                style: style.clone(),
                mix: Mix::Share(0.0),
                sigma: Some(sigma),
                steps,
                lr: 1.0,
                seed: 0,
            };
            let found = best(&data, &run, &[0.05, 0.1], seeds)?;
            let (mean, half) = interval(&found.accuracies);
            let ms = found.outcomes.iter().map(|o| o.seconds).sum::<f64>() / seeds as f64 / steps as f64 * 1e3;
            println!(
                "{model:<12} {name:<15} accuracy {mean:.4} ± {half:.4}  {ms:.2} ms a step  (learning rate {})",
                found.lr
            );
            // The axis shows the width of the models with four hidden layers; the shallow model is only in the table.
            if k > 0 {
                line.push((widths[0] as f64, mean, half));
            }
            let row = json!({
                "model": model, "style": name, "accuracy": mean, "interval": half, "ms": ms, "lr": found.lr,
                "runs": found.accuracies,
            });
            folder.log(rows.len() as u64, &row)?;
            rows.push(row);
        }
    }
    let mut chart =
        LineChart::new(format!("Clipping styles, four hidden layers, ε = {epsilon}")).x_label("width").log_x();
    for ((name, _), line) in styles.iter().zip(lines) {
        let points: Vec<(f64, f64)> = line.iter().map(|l| (l.0, l.1)).collect();
        let band: Vec<(f64, f64, f64)> = line.iter().map(|l| (l.0, l.1 - l.2, l.1 + l.2)).collect();
        chart = chart.series(Series::new(*name, points).band(band).markers());
    }
    chart.y_label("test accuracy").save(folder.plot("accuracy"))?;
    folder.finish(&json!({"sigma": sigma, "results": rows}))?;
    println!("plots and summary in {}", folder.path().display());
    Ok(())
}

fn main() {
    args::finish(run());
}
