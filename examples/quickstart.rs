//! A private language model on a plain CPU, in a few minutes, without a download:
//!
//! ```text
//! cargo run --release --example quickstart
//! ```
//!
//! 1. Pre-trains a small GPT on public text: the sources of the crates this build depends on.
//! 2. Continues *privately* (ε = 8 by default) on this repository's own files, or on `--private-text DIR`.
//! 3. Trains the same model privately from scratch, at the same ε, for comparison.
//!
//! What is protected is one record: a chunk of `--seq` tokens of the private text. The tokenizer is trained on public text only. The run
//! folder has metrics, a plot of the three curves, checkpoints, and a text sample of each model.

#[path = "common/args.rs"]
mod args;
#[path = "common/secrets.rs"]
mod secrets;

use args::{Args, Opt};
use prismgrad::data::{Bpe, CrateSources, Folder, Tokenizer, Windows, shuffled};
use prismgrad::device::cpu::simd::{Bf16Products, bf16_products};
use prismgrad::models::{Gpt, GptConfig, Sampling, generate};
use prismgrad::nn::Ctx;
use prismgrad::optim::{AdamW, Schedule};
use prismgrad::privacy::Accountant;
use prismgrad::random::NoiseKey;
use prismgrad::step::{PlainStep, Privacy, PrivacyConfig, PrivateStep, TrainStep};
use prismgrad::train::plot::{LineChart, Series};
use prismgrad::train::{Existing, Progress, RunFolder, interrupt, interrupted, state};
use prismgrad::{Array, DType, Device, Error, Result, profile};
use serde::{Deserialize, Serialize};
use std::path::Path;

const OPTIONS: &[Opt] = &[
    ("private-text", "DIR", "DIR", "folder of private text files; this repository's own by default"),
    ("epsilon", "8", "8", "privacy budget ε"),
    ("delta", "auto", "auto", "privacy parameter δ, below 1/records; a tenth of that by default"),
    ("style", "layer-wise", "layer-wise", "clipping: all-layer, layer-wise or parameter-wise"),
    ("minutes", "2.2", "0.3", "approximate duration, which sets the number of steps"),
    ("layers", "2", "2", "transformer blocks"),
    ("width", "128", "128", "model width, a multiple of 32"),
    ("seq", "64", "64", "tokens per record"),
    ("vocab", "1024", "1024", "size of the vocabulary, 300 or more"),
    ("batch", "128", "128", "expected private batch, in records"),
    ("lr", "0.002", "0.002", "peak learning rate"),
    ("dtype", "f32", "f32", "dtype of activations in training: f32 or bf16; parameters, norms and sums are f32"),
    ("seed", "0", "0", "seed of initial values and public batches (the noise key is secret and new in each run)"),
    ("profile", "", "", "print where the time of a few steps goes, and write traces to the run folder"),
    ("resume", "", "", "continue from the last checkpoint in --out"),
];

#[derive(Clone, Serialize, Deserialize)]
struct Config {
    private_text: String,
    epsilon: f64,
    delta: f64,
    style: String,
    public_steps: u64,
    private_steps: u64,
    layers: usize,
    width: usize,
    seq: usize,
    vocab: usize,
    batch: f64,
    lr: f64,
    dtype: DType,
    seed: u64,
    records: usize,
    /// The noise multiplier for the budget and the plan.
    noise_multiplier: Option<f64>,
}

/// The three curves, in the order in which they are trained.
const PHASES: [&str; 3] = ["public pre-training", "private, continued", "private, from scratch"];

#[derive(Serialize, Deserialize)]
struct Position {
    phase: usize,
}

struct Data {
    tokenizer: Bpe,
    public: Windows,
    private: Windows,
    held_out: Windows,
}

fn main() {
    let args = Args::parse("quickstart", "Pre-trains a small GPT publicly and continues privately.", OPTIONS);
    args::finish(run(&args));
}

fn run(args: &Args) -> Result<()> {
    let positive = |v: &f64| *v > 0.0 && v.is_finite();
    let minutes = args.get("minutes", "a positive number", positive);
    let private_text = match args.has("private-text") {
        true => args.text("private-text").to_string(),
        false => env!("CARGO_MANIFEST_DIR").to_string(),
    };
    let mut config = Config {
        private_text: private_text.clone(),
        epsilon: args.get("epsilon", "a positive number, such as 8", positive),
        delta: 0.0,
        style: args.text("style").to_string(),
        public_steps: ((260.0 * minutes / 2.2) as u64).max(4),
        private_steps: ((90.0 * minutes / 2.2) as u64).max(4),
        layers: args.get("layers", "1 to 48", |v| (1..=48).contains(v)),
        width: args.get("width", "a multiple of 32 up to 2048", |v| *v > 0 && *v <= 2048 && v % 32 == 0),
        seq: args.get("seq", "8 to 4096", |v| (8..=4096).contains(v)),
        vocab: args.get("vocab", "300 to 50000", |v| (300..=50_000).contains(v)),
        batch: args.get("batch", "1 or more", |v: &f64| *v >= 1.0 && v.is_finite()),
        lr: args.get("lr", "a positive number below 1", |v| *v > 0.0 && *v < 1.0),
        dtype: args.choice("dtype", &[("f32", DType::F32), ("bf16", DType::BF16)]),
        seed: args.get("seed", "a whole number", |_| true),
        records: 0,
        noise_multiplier: None,
    };
    let device = Device::from_env()?;
    println!(
        "device: {device}; reading public text (sources of this build's dependencies) and private text ({private_text})"
    );
    if config.dtype == DType::BF16 && device.is_cpu() && bf16_products() == Bf16Products::Emulated {
        println!("this processor has no bf16 products: they are computed in f32, and no faster");
    }
    let data = load(&config, &private_text)?;
    config.records = data.private.len();
    config.delta = match args.text("delta") {
        "auto" => 0.1 / config.records as f64,
        // Below this δ, the composed ε of both models cannot be distinguished from infinity.
        _ => args.get("delta", "a number from 1e-15 to below 1", |v| *v >= 1e-15 && *v < 1.0),
    };
    println!(
        "{} public and {} private records of {} tokens; {} held out",
        data.public.len(),
        data.private.len(),
        config.seq,
        data.held_out.len()
    );
    let existing = match (args.has("resume"), args.has("overwrite")) {
        (true, true) => return Err(Error::invalid("quickstart", "--resume and --overwrite exclude each other")),
        (true, _) => Existing::Resume,
        (_, true) => Existing::Overwrite,
        _ => Existing::Refuse,
    };
    // Everything about privacy is checked before the folder is changed, and the noise multiplier is computed once for both private models.
    let asked = privacy_config(&config)?;
    asked.check()?;
    let rate = asked.expected_batch / asked.records as f64;
    config.noise_multiplier =
        Some(Accountant::under(asked.neighbouring).calibrate(asked.epsilon, asked.delta, rate, asked.steps)?);
    let mut folder = RunFolder::create(args.out(), &config, existing, &[])?;
    if folder.finished() && folder.resumed() {
        println!("{} is finished already", folder.path().display());
        return Ok(());
    }
    interrupt::install()?;
    if !folder.resumed() {
        secrets::set_aside(folder.path(), PHASES.len() - 1)?;
    }
    let key = secrets::keys(folder.path())?;
    let checkpoints = folder.checkpoints()?.keep_last(4);
    let latest = checkpoints.latest()?;
    latest.warnings.iter().for_each(|w| eprintln!("{w}"));
    let mut from = if folder.resumed() { latest.checkpoint } else { None };
    let start = match &from {
        Some(c) => state::extra::<Position>(c)?.phase,
        None => 0,
    };
    folder.rewind(from.as_ref().map_or(0, |c| c.step()))?;
    let (mut epsilon, mut both) = (0.0, Accountant::under(privacy_config(&config)?.neighbouring));
    if start == 2 {
        let earlier = Privacy::new(privacy_config(&config)?, key[0].clone())?;
        both.record(earlier.noise_multiplier(), earlier.rate(), config.private_steps)?;
    }
    for (phase, name) in PHASES.iter().enumerate().skip(start) {
        let model = Gpt::new(model_config(&config), config.seed)?;
        model.params().to(&device)?;
        if phase == 1 && from.as_ref().is_none_or(|c| state::extra::<Position>(c).is_ok_and(|p| p.phase < 1)) {
            // The private phase starts from the public model.
            copy(&Gpt::load(folder.path().join("model-0"))?, &model)?;
        }
        let run = Run { config: &config, phase, profiled: args.has("profile"), model: &model, data: &data };
        if phase == 0 {
            let mut step = public_step(&config, &model)?;
            resume(from.take(), &model, &mut step, name)?;
            let per_epoch = (data.public.len() / 32).max(1) as u64;
            run.train(&mut step, &mut folder, &checkpoints, |step, t, ctx| {
                let order = shuffled(data.public.len(), config.seed ^ (t / per_epoch));
                let at = (t % per_epoch) as usize * 32;
                let batch = &order[at..(at + 32).min(order.len())];
                let report = step.run_one(|| losses(&model, &data.public, batch, ctx))?;
                // On a GPU, reading the loss waits for the step, so it is not read every time.
                let loss = if t % 8 == 0 { Some(report.loss()?) } else { None };
                Ok(Taken { loss, epsilon: None, clipped: None })
            })?;
        } else {
            let mut step = private_step(&config, phase, &model, &key, folder.path())?;
            resume(from.take(), &model, &mut step, name)?;
            let p = step.privacy();
            epsilon = p.epsilon(config.private_steps)?;
            // Both private models are trained on the same records, so what they reveal together is the composition.
            both.record(p.noise_multiplier(), p.rate(), config.private_steps)?;
            println!(
                "{name}: noise multiplier {:.4}, sensitivity {:.3}, rate {:.4}, {} steps give ε = {epsilon:.3} at δ = {:.1e}",
                p.noise_multiplier(),
                p.sensitivity(),
                p.rate(),
                config.private_steps,
                config.delta
            );
            run.train(&mut step, &mut folder, &checkpoints, |step, t, ctx| {
                // The step draws a Poisson batch and passes at most 64 of its records at a time.
                let report = step.run(64, |records| losses(&model, &data.private, records, ctx))?;
                let read = t % 8 == 0;
                let loss = if read { Some(report.loss()?) } else { None };
                let clipped = if read { Some(report.clipped()?) } else { None };
                Ok(Taken { loss, epsilon: Some(report.epsilon), clipped })
            })?;
        }
        model.save(folder.path().join(format!("model-{phase}")))?;
    }
    let both = both.epsilon(config.delta)?;
    finish(&config, &data, &mut folder, (epsilon, both))
}

fn load(config: &Config, private_text: &str) -> Result<Data> {
    let public = CrateSources::new().max_bytes(3 << 20).load()?;
    let private = Folder::new(private_text).max_bytes(4 << 20).load()?;
    let tokenizer = Bpe::train(public.texts(), config.vocab)?;
    let (private, held_out) = private.split(0.15, 1);
    if private.documents.is_empty() || held_out.documents.is_empty() {
        let message = format!(
            "{private_text} has {} documents: too few to hold some out; give --private-text more files",
            private.documents.len() + held_out.documents.len()
        );
        return Err(Error::invalid("quickstart", message));
    }
    let windows = |c: prismgrad::data::Corpus| c.tokenize(&tokenizer).chunks(config.seq);
    let (public, private, held_out) = (windows(public)?, windows(private)?, windows(held_out)?);
    for (name, w) in [("private", &private), ("held-out", &held_out)] {
        if w.len() < 16 {
            let message = format!("only {} {name} records in {private_text}; give --private-text more text", w.len());
            return Err(Error::invalid("quickstart", message));
        }
    }
    Ok(Data { tokenizer, public, private, held_out })
}

fn model_config(c: &Config) -> GptConfig {
    GptConfig::small(c.vocab, c.seq, c.layers, c.width, c.width / 32)
}

fn privacy_config(c: &Config) -> Result<PrivacyConfig> {
    let batch = c.batch.min(c.records as f64);
    let target = PrivacyConfig::target(c.epsilon, c.delta).style(c.style.parse()?);
    let target = target.records(c.records).expected_batch(batch).steps(c.private_steps);
    Ok(PrivacyConfig { noise_multiplier: c.noise_multiplier, ..target })
}

fn public_step(c: &Config, model: &Gpt) -> Result<PlainStep> {
    PlainStep::new(&model.params().all(), AdamW::default(), Schedule::cosine(c.lr, 20, c.public_steps))
}

fn private_step(c: &Config, phase: usize, model: &Gpt, key: &[NoiseKey; 2], folder: &Path) -> Result<PrivateStep> {
    // Each private run has its own key, because the same noise in two runs would cancel in their difference.
    let privacy = Privacy::new(privacy_config(c)?, key[phase - 1].clone())?;
    // A step is on disk before it is taken, so that a kill cannot make ε look smaller than it is.
    let privacy = privacy.log_to(folder.join(format!("privacy-{phase}.jsonl")))?;
    let lr = if phase == 1 { 0.5 * c.lr } else { c.lr };
    PrivateStep::new(&model.params().all(), privacy, AdamW::default(), Schedule::cosine(lr, 5, c.private_steps))
}

fn copy(from: &Gpt, to: &Gpt) -> Result<()> {
    from.params().all().iter().zip(to.params().all()).try_for_each(|(a, b)| b.set(a.value().to(&b.device())?))
}

fn losses(model: &Gpt, w: &Windows, records: &[usize], ctx: &Ctx) -> Result<prismgrad::Tensor> {
    let (x, y) = w.batch(records)?;
    let shape = [records.len(), w.seq_len()];
    model.losses(&Array::from_slice(&x, &shape)?, &Array::from_slice(&y, &shape)?, ctx)
}

/// Mean loss on held-out private text, in nats per token. It is reported for the demonstration and is not private.
fn evaluate(model: &Gpt, w: &Windows) -> Result<f64> {
    let records: Vec<usize> = shuffled(w.len(), 3).into_iter().take(128).collect();
    let mut sum = 0.0;
    for part in records.chunks(64) {
        let l = prismgrad::no_grad(|| losses(model, w, part, &Ctx::eval()))?;
        sum += l.array().to_f64().iter().sum::<f64>();
    }
    Ok(sum / records.len() as f64)
}

/// Continues from a checkpoint, if there is one.
fn resume(from: Option<prismgrad::io::Checkpoint>, model: &Gpt, step: &mut impl TrainStep, name: &str) -> Result<()> {
    let Some(checkpoint) = from else { return Ok(()) };
    state::load::<Position>(&checkpoint, model.params(), step)?;
    println!("resumed {name} at step {}", step.steps());
    Ok(())
}

/// The values of a step that are shown, and are logged if the data are public.
struct Taken {
    loss: Option<f64>,
    epsilon: Option<f64>,
    clipped: Option<f64>,
}

/// One phase of the run.
struct Run<'a> {
    config: &'a Config,
    phase: usize,
    profiled: bool,
    model: &'a Gpt,
    data: &'a Data,
}

impl Run<'_> {
    /// Takes the steps of the phase, each by `advance(step, steps taken before, context)`.
    fn train<S: TrainStep>(
        &self,
        step: &mut S,
        folder: &mut RunFolder,
        checkpoints: &prismgrad::io::CheckpointFolder,
        mut advance: impl FnMut(&mut S, u64, &Ctx) -> Result<Taken>,
    ) -> Result<()> {
        let (c, phase) = (self.config, self.phase);
        let total = if phase == 0 { c.public_steps } else { c.private_steps };
        let before = [0, c.public_steps, c.public_steps + c.private_steps][phase];
        let every = (total / 12).max(1);
        let mut progress = Progress::new(PHASES[phase], Some(total), step.steps());
        if step.steps() == 0 {
            self.log(folder, before, 0, None)?;
        }
        let (mut loss, mut session) = (f64::NAN, None);
        while step.steps() < total {
            let t = step.steps();
            // The second to the fourth step are profiled, if there are as many.
            if self.profiled && t == 1 {
                session = Some(profile::start(&step.flat().device())?);
            }
            let taken = advance(step, t, &Ctx::train(t).with_dtype(self.config.dtype))?;
            let done = step.steps();
            if done == 4
                && let Some(session) = session.take()
            {
                let report = session.finish()?;
                println!("{}, 3 steps:\n{}", PHASES[phase], report.table());
                report.save_trace(folder.path().join(format!("trace-{phase}.json")))?;
            }
            loss = taken.loss.unwrap_or(loss);
            let mut shown = vec![("loss", loss)];
            shown.extend(taken.clipped.map(|c| ("clipped", c)));
            shown.extend(taken.epsilon.map(|e| ("ε", e)));
            progress.set(done, &shown);
            let stop = interrupted();
            if done.is_multiple_of(every) || done == total || stop {
                self.log(folder, before, done, Some(&taken))?;
                state::save(checkpoints, before + done, None, self.model.params(), step, &Position { phase })?;
            }
            if stop {
                return Err(Error::Interrupted {
                    message: format!(
                        "saved; go on with the same options and --resume (run folder {})",
                        folder.path().display()
                    ),
                });
            }
        }
        progress.finish();
        Ok(())
    }
    /// Writes one line of metrics. Training losses and clipped shares of a private phase depend on the records that it protects: they are
    /// shown while it runs and not written. The held-out loss is written, for this demonstration.
    fn log(&self, folder: &mut RunFolder, before: u64, step: u64, taken: Option<&Taken>) -> Result<()> {
        #[derive(Serialize)]
        struct Line<'a> {
            phase: &'a str,
            phase_step: u64,
            held_out_loss: f64,
            train_loss: Option<f64>,
            epsilon: Option<f64>,
        }
        let line = Line {
            phase: PHASES[self.phase],
            phase_step: step,
            held_out_loss: evaluate(self.model, &self.data.held_out)?,
            train_loss: taken.filter(|_| self.phase == 0).and_then(|t| t.loss),
            epsilon: taken.and_then(|t| t.epsilon),
        };
        folder.log(before + step, &line)
    }
}

/// Writes the summary. `epsilon` is that of each private model, and `both` that of both together.
fn finish(c: &Config, data: &Data, folder: &mut RunFolder, (epsilon, both): (f64, f64)) -> Result<()> {
    let metrics = folder.metrics()?;
    let curve = |phase: usize| -> Vec<(f64, f64)> {
        let of = |m: &serde_json::Value| Some((m["phase_step"].as_f64()?, m["held_out_loss"].as_f64()?));
        metrics.iter().filter(|m| m["phase"] == PHASES[phase]).filter_map(of).collect()
    };
    let curves = [curve(0), curve(1), curve(2)];
    let mut chart =
        LineChart::new(format!("Loss on held-out private text (ε = {:.1}, δ = {:.0e})", c.epsilon, c.delta))
            .x_label("training step of the phase")
            .y_label("nats per token");
    for (name, points) in PHASES.iter().zip(&curves) {
        chart = chart.series(Series::new(*name, points.clone()).markers());
    }
    let [svg, png] = chart.save(folder.plot("curves"))?;
    let last = |p: usize| curves[p].last().map_or(f64::NAN, |v| v.1);
    let prompt = data.tokenizer.encode("/// Returns the ");
    let sampling = Sampling { temperature: 0.7, seed: c.seed, ..Sampling::default() };
    let mut samples = Vec::new();
    for (phase, name) in PHASES.iter().enumerate() {
        let model = Gpt::load(folder.path().join(format!("model-{phase}")))?;
        let tokens = generate(&model, &prompt, 80, &sampling, Some(data.tokenizer.end_of_text()))?;
        let text = data.tokenizer.decode(&[prompt.clone(), tokens].concat())?;
        println!("\n--- {name}: loss {:.3} ---\n{text}", last(phase));
        samples.push(serde_json::json!({ "model": name, "text": text }));
    }
    folder.finish(&serde_json::json!({
        "epsilon": epsilon,
        "epsilon_of_both_models": both,
        "delta": c.delta,
        "held_out_loss": { "public": last(0), "private_continued": last(1), "private_from_scratch": last(2) },
        "samples": samples,
    }))?;
    let _ = std::fs::remove_file(folder.path().join("noise.key"));
    println!("\nheld-out loss in nats per token, private models at ε = {epsilon:.3}, δ = {:.1e}:", c.delta);
    (0..3).for_each(|p| println!("  {:<24} {:.3}", PHASES[p], last(p)));
    println!("both private models saw the same records: publishing both costs ε = {both:.3}");
    println!("run folder {}; plot {} and {}", folder.path().display(), svg.display(), png.display());
    Ok(())
}
