//! A plan of the memory, traffic and time that a GPT of any size needs on any number of ranks, made without running it.
//!
//! ```text
//! cargo run --release --example zero_plan -- --layers 96 --width 12288 --heads 96 --ranks 1024
//! ```
//!
//! It plans a step at each stage of ZeRO, privately and not: bytes of a rank, bytes that it sends, and seconds. The speed of a rank and the
//! cost of private training are measured on this machine unless they are given. Before that, plans of four small models are compared with
//! measurements of their steps. Writes `plots/memory` and `plots/seconds` (`.svg` and `.png`) and `summary.json` to the run folder.

#[path = "common/args.rs"]
mod args;

use prismgrad::dist::Local;
use prismgrad::models::{Gpt, GptConfig, span_cost};
use prismgrad::nn::Ctx;
use prismgrad::optim::{AdamW, Schedule};
use prismgrad::privacy::ClipStyle;
use prismgrad::random::NoiseKey;
use prismgrad::step::{
    Load, Machine, PlainStep, Privacy, PrivacyConfig, PrivateStep, Stage, TrainStep, ZeroPlan, zero_plan,
};
use prismgrad::train::plot::{LineChart, Series};
use prismgrad::{Array, DType, Error, Result, Tensor};
use serde_json::{Value, json};

const OPTIONS: &[args::Opt] = &[
    ("layers", "40", "40", "layers of the model"),
    ("width", "5120", "5120", "width of the model"),
    ("heads", "40", "40", "attention heads"),
    ("vocab", "50257", "50257", "size of the vocabulary"),
    ("seq", "2048", "2048", "tokens per record"),
    ("ranks", "64", "64", "ranks, one for each device"),
    ("records", "1", "1", "records of a microbatch"),
    ("microbatches", "4", "4", "microbatches of a rank in a step"),
    ("bandwidth", "25", "25", "GB/s that a rank sends and receives"),
    ("latency", "20", "20", "latency of a collective in microseconds"),
    ("tflops", "measured", "measured", "TFLOP/s of a rank in a training step; by default the rate of this machine"),
    ("device-memory", "80", "80", "GB of memory of a rank's device, for the verdict whether the model fits"),
];
const STAGES: [(Stage, &str); 4] = [
    (Stage::Replicated, "stage 0"),
    (Stage::Optimizer, "stage 1"),
    (Stage::Gradients, "stage 2"),
    (Stage::Parameters, "stage 3"),
];
/// Ways of training: a name, and the clipping style if it is private.
const WAYS: [(&str, Option<ClipStyle>); 3] = [
    ("plain", None),
    ("private, layer-wise", Some(ClipStyle::LayerWise)),
    ("private, all layers", Some(ClipStyle::AllLayer)),
];

/// The measurements of a step.
struct Taken {
    /// Bytes of the model's state, and the peak of activations, factors and scratch.
    state: usize,
    working: usize,
    seconds: f64,
}

/// Measures the second of two steps of a model on `records` records, on one rank.
fn take(config: &GptConfig, records: usize, style: &Option<ClipStyle>) -> Result<Taken> {
    let model = Gpt::new(config.clone(), 0)?;
    let (params, schedule) = (model.params().all(), Schedule::constant(1e-3));
    let (vocab, seq) = (config.vocab_size, config.n_positions);
    let losses = |records: usize| -> Result<Tensor> {
        let ids = |shift| Array::generate(&[records, seq], DType::I64, |i| ((i * 31 + shift) % vocab) as f64);
        model.losses(ids(0), ids(7), &Ctx::train(0))
    };
    let mut best = f64::INFINITY;
    let mut measure = |step: &dyn TrainStep| {
        let m = step.plan().measured().copied();
        let m = m.ok_or_else(|| Error::Invalid { op: "zero_plan", message: "nothing was measured".into() })?;
        best = best.min(m.phases.forward + m.phases.backward);
        Ok::<_, Error>(Taken { state: step.plan().fixed_bytes(), working: m.working_bytes, seconds: best })
    };
    let rank = Local::group(1, std::time::Duration::from_secs(60)).remove(0);
    let mut last = None;
    match style {
        None => {
            let mut step = PlainStep::new(&params, AdamW::default(), schedule)?.with_ranks(Box::new(rank))?;
            for _ in 0..3 {
                step.run_one(|| losses(records))?;
                last = Some(measure(&step)?);
            }
        }
        Some(style) => {
            // Every record is in every batch.
            let privacy = PrivacyConfig::target(1e6, 1e-5).records(records).expected_batch(records as f64).steps(10);
            let privacy = privacy.noise_multiplier(1.0).style(style.clone());
            let privacy = Privacy::new(privacy, NoiseKey::from_seed_for_tests(0))?;
            let step = PrivateStep::new(&params, privacy, AdamW::default(), schedule)?;
            let mut step = step.with_ranks(Box::new(rank))?;
            for _ in 0..3 {
                step.run(records, |r| losses(r.len()))?;
                last = Some(measure(&step)?);
            }
        }
    }
    last.ok_or_else(|| Error::Invalid { op: "zero_plan", message: "no step was taken".into() })
}

/// Bytes of activations and factors of a microbatch: what the forward pass keeps, and the gradient of the logits. In the backward pass each
/// layer frees as many bytes as a private step's factors for it take: the input of each of its products is kept in both cases, and the
/// gradient of each output takes the place of the output.
fn working(c: &GptConfig, records: usize) -> usize {
    records * (span_cost(c, c.n_positions).activation_bytes + 4 * c.n_positions * c.vocab_size)
}

fn run() -> Result<()> {
    let args = args::Args::parse(
        "zero_plan",
        "Plans the memory, traffic and time of a model on several ranks, at each stage of ZeRO.",
        OPTIONS,
    );
    let count = |name: &str, most: usize| {
        args.get(name, &format!("a whole number from 1 to {most}"), |n: &usize| (1..=most).contains(n))
    };
    let positive = |name: &str| args.get(name, "a number above 0", |x: &f64| x.is_finite() && *x > 0.0);
    let config = GptConfig::small(
        count("vocab", 1 << 20),
        count("seq", 1 << 20),
        count("layers", 1000),
        count("width", 1 << 17),
        count("heads", 1 << 12),
    );
    let (ranks, records, microbatches) =
        (count("ranks", 1 << 20), count("records", 1 << 16), count("microbatches", 1 << 16));
    let (bandwidth, latency, memory) =
        (positive("bandwidth") * 1e9, positive("latency") * 1e-6, positive("device-memory") * 1e9);
    let model = match Gpt::described(config.clone()) {
        Ok(model) => model,
        Err(e) => args::fail(e),
    };
    let given = args.has("tflops").then(|| positive("tflops") * 1e12);
    let mut folder = args.folder(&json!({
        "config": config, "ranks": ranks, "records": records, "microbatches": microbatches, "bandwidth": bandwidth, "latency": latency,
    }))?;

    println!("plans of small models beside their steps, one rank, MB");
    println!("{:<38} {:>9} {:>9} {:>7}", "", "planned", "measured", "ratio");
    let (mut checks, mut worst) = (Vec::<Value>::new(), 0f64);
    let mut cost = [1.0f64; 3];
    let mut rate = 0.0;
    for (layers, width, vocab, seq, records) in
        [(2, 64, 512, 64, 4), (4, 128, 512, 128, 4), (4, 256, 2048, 128, 4), (6, 256, 4096, 256, 4)]
    {
        let c = GptConfig::small(vocab, seq, layers, width, 4);
        let flops = records as f64 * span_cost(&c, seq).model_flops as f64;
        let mut plain = 0.0;
        for (way, (name, style)) in WAYS.iter().enumerate() {
            let taken = take(&c, records, style)?;
            let load = Load {
                microbatches: 1,
                forward_flops: flops,
                working_bytes: working(&c, records),
                gradients_overlap: true,
            };
            let one = Machine { ranks: 1, flops: 1.0, bandwidth: 1.0, latency: 0.0 };
            let plan = zero_plan(&Gpt::described(c.clone())?.params().all(), 2, Stage::Replicated, &one, &load)?;
            let measured = taken.state + taken.working;
            let ratio = plan.bytes() as f64 / measured as f64;
            worst = worst.max((ratio - 1.0).abs());
            println!(
                "{:<38} {:>9.2} {:>9.2} {ratio:>7.3}",
                format!("{layers} layers of {width}, {vocab} tokens, {name}"),
                plan.bytes() as f64 / 1e6,
                measured as f64 / 1e6,
            );
            if way == 0 {
                plain = taken.seconds;
                // The last model is the largest, so its rate is the one that stays.
                rate = 3.0 * flops / taken.seconds;
            }
            cost[way] = taken.seconds / plain;
            checks.push(json!({"layers": layers, "width": width, "way": name, "planned": plan.bytes(), "measured": measured, "seconds": taken.seconds}));
        }
    }
    let rate = given.unwrap_or(rate);

    let params = model.params().all();
    println!(
        "\n{:.2} billion parameters, {ranks} ranks of {:.3} TFLOP/s{}, {:.1} GB/s; {microbatches} microbatches of {records} × {} tokens a rank",
        model.params().count() as f64 / 1e9,
        rate / 1e12,
        if given.is_some() { "" } else { " (measured here)" },
        bandwidth / 1e9,
        config.n_positions
    );
    println!(
        "{:<30} {:>9} {:>9} {:>9} {:>9} {:>9} {:>10} {:>8}",
        "", "state", "gathered", "working", "all, GB", "sent, GB", "s/step", "fits"
    );
    let flops = records as f64 * span_cost(&config, config.n_positions).model_flops as f64;
    let plan = |ranks: usize, stage: Stage, way: usize| -> Result<ZeroPlan> {
        let style = &WAYS[way].1;
        let machine = Machine { ranks, flops: rate / cost[way], bandwidth, latency };
        let overlap = !matches!(style, Some(ClipStyle::AllLayer));
        let load = Load {
            microbatches,
            forward_flops: flops,
            working_bytes: working(&config, records),
            gradients_overlap: overlap,
        };
        zero_plan(&params, 2, stage, &machine, &load)
    };
    let mut rows = Vec::<Value>::new();
    let mut seconds = LineChart::new("Seconds of a step, private, layer-wise").x_label("ranks").log_x();
    for (way, (name, _)) in WAYS.iter().enumerate() {
        for (stage, stage_name) in STAGES {
            let p = plan(ranks, stage, way)?;
            let state: usize = p.kept.iter().map(|k| k.1).sum();
            let gb = |b: usize| b as f64 / 1e9;
            println!(
                "{:<30} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {:>9.2} {:>10.2} {:>8}",
                format!("{name}, {stage_name}"),
                gb(state),
                gb(p.gathered + p.buckets),
                gb(p.working),
                gb(p.bytes()),
                p.sent.iter().sum::<f64>() / 1e9,
                p.seconds,
                if (p.bytes() as f64) < memory { "yes" } else { "no" },
            );
            let row = json!({"way": name, "stage": stage_name, "plan": p, "bytes": p.bytes(), "fits": (p.bytes() as f64) < memory});
            folder.log(rows.len() as u64, &row)?;
            rows.push(row);
        }
    }
    let counts: Vec<usize> = (0..11).map(|i| 1 << i).collect();
    let mut memory_chart = LineChart::new("Bytes of a rank, private, layer-wise").x_label("ranks").log_x().log_y();
    for (stage, name) in STAGES {
        let of = |f: &dyn Fn(&ZeroPlan) -> f64, way: usize| -> Result<Vec<(f64, f64)>> {
            counts.iter().map(|&n| Ok((n as f64, f(&plan(n, stage, way)?)))).collect()
        };
        memory_chart = memory_chart.series(Series::new(name, of(&|p| p.bytes() as f64 / 1e9, 1)?));
        seconds = seconds.series(Series::new(name, of(&|p| p.seconds, 1)?));
    }
    memory_chart.y_label("GB").save(folder.plot("memory"))?;
    seconds.y_label("seconds").save(folder.plot("seconds"))?;
    let verdict = if worst <= 0.05 { "holds" } else { "contradicted" };
    println!(
        "\nplans of small models are within {:.1} % of what their steps took; private steps take {:.2} (layer-wise) and {:.2} (all layers) of plain ones",
        100.0 * worst,
        cost[1],
        cost[2]
    );
    folder.finish(&json!({
        "checks": checks, "rows": rows, "flops": rate, "private_over_plain": {"layer-wise": cost[1], "all layers": cost[2]},
        "verdicts": [{"claim": "plans of four sizes are within 5 % of the bytes that their steps took", "verdict": verdict, "worst": worst}],
    }))?;
    println!("plots and summary in {}", folder.path().display());
    Ok(())
}

fn main() {
    args::finish(run());
}
