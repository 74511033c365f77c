//! Digits of 8×8 pixels, classified by a multilayer perceptron or a small convolutional network, with ordinary or private training. It
//! shows the two training steps, clipping styles, the privacy budget, and a run folder with plots.
//!
//! ```text
//! cargo run --release --example digits
//! cargo run --release --example digits -- --model convnet --out runs/convnet
//! cargo run --release --example digits -- --private --epsilon 3 --out runs/private
//! ```

#[path = "common/args.rs"]
mod args;

use prismgrad::data::{Images, digits, shuffled};
use prismgrad::nn::{Conv2d, Ctx, Linear, Params};
use prismgrad::ops::linear::Activation;
use prismgrad::ops::loss::{CrossEntropy, cross_entropy};
use prismgrad::optim::{AdamW, Schedule, Sgd};
use prismgrad::privacy::ClipStyle;
use prismgrad::random::NoiseKey;
use prismgrad::step::{PlainStep, Privacy, PrivacyConfig, PrivateStep, TrainStep};
use prismgrad::train::plot::{LineChart, Series};
use prismgrad::{Array, DType, Result, Tensor, no_grad};
use serde_json::json;
use std::time::Instant;

const OPTIONS: &[args::Opt] = &[
    ("model", "mlp", "mlp", "mlp (64-32-10, tanh) or convnet (two convolutions and a linear layer)"),
    ("private", "", "", "train with differential privacy"),
    ("epsilon", "3", "3", "privacy budget ε at δ = 1e-4, with --private"),
    (
        "style",
        "layer-wise",
        "layer-wise",
        "clipping groups, with --private: all-layer, layer-wise, parameter-wise or uniform-K",
    ),
    ("dtype", "f32", "f32", "dtype of activations in training: f32 or bf16; parameters, norms and sums are f32"),
    ("epochs", "30", "2", "passes over the training images"),
    ("seed", "0", "0", "seed; with --private it makes the noise repeatable, and so the run NOT private"),
];
const DELTA: f64 = 1e-4;
const BATCH: usize = 64;
const PRIVATE_BATCH: f64 = 128.0;

type Model = Box<dyn Fn(&Tensor) -> Result<Tensor>>;

/// `[B, 64]` → `[B, 10]`.
fn mlp(params: &Params) -> Result<Model> {
    let a = Linear::new(&params.at("hidden"), 64, 32)?;
    let b = Linear::new(&params.at("out"), 32, 10)?;
    Ok(Box::new(move |x| b.forward(&a.forward_act(x, Activation::Tanh, &Ctx::eval())?, &Ctx::eval())))
}

/// The same shapes through 16 and 32 channels, each followed by a pool that halves both sides.
fn convnet(params: &Params) -> Result<Model> {
    let conv = |name: &str, from: usize, to: usize| Conv2d::builder(from, to, 3).padding(1).build(&params.at(name));
    let (a, b) = (conv("conv1", 1, 16)?, conv("conv2", 16, 32)?);
    let out = Linear::new(&params.at("out"), 128, 10)?;
    Ok(Box::new(move |x| {
        let count = x.shape()[0];
        let ctx = Ctx::eval();
        let x = a.forward(&x.reshape(&[count, 1, 8, 8])?, &ctx)?.relu()?.max_pool2d(2)?;
        let x = b.forward(&x, &ctx)?.relu()?.max_pool2d(2)?;
        out.forward(&x.reshape(&[count, 128])?, &ctx)
    }))
}

/// An ordinary or a private training step.
enum Step {
    Plain(PlainStep),
    Private(PrivateStep),
}

impl Step {
    fn as_step(&self) -> &dyn TrainStep {
        match self {
            Step::Plain(step) => step,
            Step::Private(step) => step,
        }
    }
}

/// The logits of some images, and one loss per image.
fn losses(model: &Model, images: &Images, indices: &[usize], dtype: DType) -> Result<(Tensor, Tensor)> {
    let (pixels, labels) = images.batch(indices)?;
    let logits = model(&Tensor::from_slice(&pixels, &[indices.len(), images.size()])?.cast(dtype)?)?;
    let losses = cross_entropy(&logits, &Array::from_slice(&labels, &[labels.len()])?, &CrossEntropy::default())?;
    Ok((logits, losses))
}

/// Accuracy and mean loss.
fn evaluate(model: &Model, images: &Images) -> Result<(f64, f64)> {
    let all: Vec<usize> = (0..images.len()).collect();
    let (logits, losses) = no_grad(|| losses(model, images, &all, DType::F32))?;
    let read = logits.argmax(-1)?.array().to_f64();
    let right = read.iter().zip(&images.labels).filter(|&(&r, &l)| r == f64::from(l)).count();
    Ok((right as f64 / images.len() as f64, losses.mean(&[0], false)?.item()?))
}

fn run() -> Result<()> {
    let args = args::Args::parse("digits", "Trains a classifier of handwritten digits, privately or not.", OPTIONS);
    let name = args.choice("model", &[("mlp", "mlp"), ("convnet", "convnet")]);
    let private = args.has("private");
    let dtype = args.choice("dtype", &[("f32", DType::F32), ("bf16", DType::BF16)]);
    if let Some(option) = ["epsilon", "style"].into_iter().find(|o| args.has(o) && !private) {
        args::fail(format!("--{option} has no effect on plain training; add --private or leave it out"));
    }
    let epsilon = args.get("epsilon", "a positive number, such as 3", |e: &f64| e.is_finite() && *e > 0.0);
    let style: ClipStyle =
        args.get("style", "all-layer, layer-wise, parameter-wise or uniform-K", |_: &ClipStyle| true);
    let epochs = args.get("epochs", "a whole number from 1 to 10000", |n: &u64| (1..=10_000).contains(n));
    let seed: u64 = args.get("seed", "a whole number, 0 or more", |_| true);

    // The split is the same for all seeds, so that runs can be compared.
    let (train, test) = digits()?.shuffled(0).split(1400.0 / 1797.0);
    let params = Params::new(seed, DType::F32);
    let model = if name == "mlp" { mlp(&params)? } else { convnet(&params)? };
    let batch = if private { PRIVATE_BATCH } else { BATCH as f64 };
    let steps_at = |epoch: u64| (epoch as f64 * train.len() as f64 / batch).round() as u64;
    let total = steps_at(epochs);
    // With momentum 0.9 a learning rate of 0.1 has in the end the effect of 1 without momentum.
    let lr = if private { 0.1 } else { 4e-3 };
    let schedule = if private { Schedule::constant(lr) } else { Schedule::cosine(lr, 20, total) };
    let mut step = if private {
        let config = PrivacyConfig::target(epsilon, DELTA).records(train.len()).expected_batch(batch).steps(total);
        let key = if args.has("seed") {
            eprintln!("With --seed, sampling and noise are repeatable: this run is NOT private.");
            NoiseKey::from_seed_for_tests(seed)
        } else {
            NoiseKey::from_os()?
        };
        let sgd = Sgd { momentum: 0.9, weight_decay: 0.0 };
        let privacy = Privacy::new(config.style(style.clone()), key)?;
        Step::Private(PrivateStep::new(&params.all(), privacy, sgd, schedule)?)
    } else {
        Step::Plain(PlainStep::new(&params.all(), AdamW::default(), schedule)?)
    };
    let config = json!({
        "model": name, "epochs": epochs, "batch": batch, "lr": lr, "seed": args.has("seed").then_some(seed), "dtype": dtype,
        "privacy": step.as_step().accounting().map(|p| p.config()),
    });
    let mut folder = args.folder(&config)?;
    println!("{name}: {} parameters, {} training and {} test images", params.count(), train.len(), test.len());
    if let Some(p) = step.as_step().accounting() {
        println!(
            "{style:?} clipping, noise multiplier {:.3}, {total} steps at rate {:.4}",
            p.noise_multiplier(),
            p.rate()
        );
    }

    let start = Instant::now();
    let (mut accuracy, mut loss) = (0.0, 0.0);
    for epoch in 1..=epochs {
        let losses = |part: &[usize]| Ok(losses(&model, &train, part, dtype)?.1);
        let mut spent = None;
        match &mut step {
            // The step draws a Poisson batch, whose size varies. A step with an empty batch adds only noise.
            Step::Private(step) => {
                while step.steps() < steps_at(epoch) {
                    spent = Some(step.run(512, losses)?.epsilon);
                }
            }
            Step::Plain(step) => {
                for batch in shuffled(train.len(), seed.wrapping_mul(1_000_003).wrapping_add(epoch)).chunks(BATCH) {
                    step.run_one(|| losses(batch))?;
                }
            }
        }
        // These are measured on the test images: the training loss would reveal something about the records that a private run protects.
        (accuracy, loss) = evaluate(&model, &test)?;
        folder.log(
            step.as_step().steps(),
            &json!({"epoch": epoch, "accuracy": accuracy, "loss": loss, "epsilon": spent}),
        )?;
        let spent = spent.map_or(String::new(), |e| format!("  ε {e:.3}"));
        println!("epoch {epoch:>3}  test accuracy {accuracy:.4}  test loss {loss:.4}{spent}");
    }
    let seconds = start.elapsed().as_secs_f64();
    let steps = step.as_step().steps();
    let spent = step.as_step().accounting().map(|p| p.epsilon(steps)).transpose()?;
    for (field, title) in [("accuracy", "Test accuracy"), ("loss", "Test loss"), ("epsilon", "Privacy spent, ε")] {
        let points = folder.series(field)?;
        if !points.is_empty() {
            let chart = LineChart::new(if private { "Digits, private training" } else { "Digits" });
            chart.x_label("step").y_label(title).series(Series::new(name, points)).save(folder.plot(field))?;
        }
    }
    folder.finish(&json!({
        "accuracy": accuracy, "loss": loss, "steps": steps, "seconds": seconds, "epsilon": spent,
        "delta": spent.map(|_| DELTA), "repeatable": !private || args.has("seed"),
    }))?;
    println!("accuracy {accuracy:.4} after {seconds:.1} s; run, plots and summary in {}", folder.path().display());
    Ok(())
}

fn main() {
    args::finish(run());
}
