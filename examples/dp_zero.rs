//! ZeRO with private training (DP-ZeRO, Bu et al. 2023): ranks share the model's state, and the result is the same model.
//!
//! ```text
//! cargo run --release --example dp_zero -- --ranks 4
//! mpirun -n 4 target/release/examples/dp_zero
//! ```
//!
//! A GPT is trained on real text by several ranks, at each stage, privately and not, and by one rank for comparison. Ranks are threads of
//! this process, or processes that `mpirun` or Slurm has started. Prints the memory and the traffic of each rank beside the formulas.
//! Writes `plots/memory` and `plots/loss` (`.svg` and `.png`) and `summary.json` to the run folder.

#[path = "common/args.rs"]
mod args;
#[path = "common/documents.rs"]
mod documents;

use documents::pieces;
use prismgrad::data::{Bpe, Corpus, CrateSources, Windows, data_file, read_maybe_gzip, shuffled};
use prismgrad::dist::{Communicator, Local, Mpi, Shared};
use prismgrad::models::{Gpt, GptConfig};
use prismgrad::nn::Ctx;
use prismgrad::optim::{AdamW, Schedule};
use prismgrad::random::NoiseKey;
use prismgrad::step::{PlainStep, Privacy, PrivacyConfig, PrivateStep, Stage, TrainStep};
use prismgrad::train::Progress;
use prismgrad::train::plot::{BarChart, LineChart, Series};
use prismgrad::{Array, Error, Result, no_grad};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

const OPTIONS: &[args::Opt] = &[
    ("ranks", "4", "2", "ranks, as threads of this process; under mpirun there are as many as it started"),
    ("steps", "40", "3", "steps of each run"),
    ("batch", "32", "8", "records per step, over all ranks; for private training the expected number"),
    ("epsilon", "8", "8", "privacy budget ε, at δ = 1e-5"),
    ("seed", "0", "0", "seed of the initial values, the batches and the test key"),
];
const VOCAB: usize = 512;
const SEQ: usize = 64;
const DELTA: f64 = 1e-5;
const STAGES: [(Stage, &str); 4] = [
    (Stage::Replicated, "stage 0"),
    (Stage::Optimizer, "stage 1"),
    (Stage::Gradients, "stage 2"),
    (Stage::Parameters, "stage 3"),
];

fn text() -> Result<(Windows, Windows)> {
    let documents = match data_file("tinyshakespeare.txt.gz") {
        Ok(path) => pieces("plays", &String::from_utf8_lossy(&read_maybe_gzip(path, 64 << 20)?)),
        Err(_) => {
            eprintln!(
                "no tinyshakespeare.txt.gz: set PRISMGRAD_DATA to the folder that has it; going on with crate sources"
            );
            CrateSources::new().max_bytes(1 << 20).load()?.documents
        }
    };
    let (train, held) = Corpus { documents }.split(0.1, 1);
    let tokenizer = Bpe::train(train.texts(), VOCAB)?;
    let windows = |c: &Corpus| c.tokenize(&tokenizer).windows(SEQ);
    Ok((windows(&train)?, windows(&held)?))
}

fn losses(model: &Gpt, text: &Windows, records: &[usize], ctx: &Ctx) -> Result<prismgrad::Tensor> {
    let (x, y) = text.batch(records)?;
    let of = |v: &[u32]| Array::from_slice(v, &[records.len(), SEQ]);
    model.losses(of(&x)?, of(&y)?, ctx)
}

/// The settings of all runs.
struct Setting<'a> {
    train: &'a Windows,
    held: &'a Windows,
    steps: u64,
    batch: usize,
    epsilon: f64,
    seed: u64,
    /// Whether this process shows its progress.
    speaks: bool,
}

/// The results of one rank's run.
struct Told {
    losses: Vec<f64>,
    held: f64,
    kept: [(&'static str, usize); 3],
    sent: f64,
    seconds: f64,
    epsilon: f64,
    parameters: Vec<f64>,
}

/// How the ranks are run.
enum World {
    Threads(usize),
    Processes(Shared),
}

impl World {
    fn size(&self) -> usize {
        match self {
            World::Threads(n) => *n,
            World::Processes(ranks) => ranks.size(),
        }
    }
    /// Whether this process prints and writes.
    fn speaks(&self) -> bool {
        matches!(self, World::Threads(_)) || matches!(self, World::Processes(r) if r.rank() == 0)
    }
    /// A number for every rank, from those of the ranks in this process.
    fn of_all(&self, own: Vec<f64>) -> Result<Vec<f64>> {
        match self {
            World::Threads(_) => Ok(own),
            World::Processes(ranks) => {
                Ok(ranks.all_gather("figures", &Array::from_slice(&own, &[own.len()])?)?.to_f64())
            }
        }
    }
}

impl Setting<'_> {
    /// A whole run as one of several ranks. The first rank shows its progress.
    fn run(&self, rank: Box<dyn Communicator>, stage: Stage, private: bool, name: &str) -> Result<Told> {
        let (me, size) = (rank.rank(), rank.size());
        let model = Gpt::new(GptConfig::small(VOCAB, SEQ, 2, 96, 4), self.seed)?;
        let params = model.params().all();
        let schedule = Schedule::cosine(2e-3, (self.steps / 10).max(1), self.steps);
        let mut progress = (me == 0 && self.speaks).then(|| Progress::new(name.to_string(), Some(self.steps), 0));
        let (mut curve, mut epsilon) = (Vec::new(), 0.0);
        // Each rank takes its part of a batch in microbatches of this many records.
        let physical = (self.batch / size).max(1);
        let step: Box<dyn TrainStep>;
        let (mut sent, mut seconds) = (0, 0.0);
        macro_rules! go {
            ($step:expr, $take:expr) => {{
                let mut inner = $step;
                let before = inner.ranks().map_or(0, |r| r.traffic().bytes);
                let start = Instant::now();
                for t in 0..self.steps {
                    let loss: f64 = $take(&mut inner, t)?;
                    curve.push(loss);
                    if let Some(p) = &mut progress {
                        p.set(t + 1, &[("loss", loss)]);
                    }
                }
                seconds += start.elapsed().as_secs_f64();
                sent += inner.ranks().map_or(0, |r| r.traffic().bytes) - before;
                step = Box::new(inner);
            }};
        }
        if private {
            let config = PrivacyConfig::target(self.epsilon, DELTA)
                .records(self.train.len())
                .expected_batch(self.batch as f64)
                .steps(self.steps);
            let privacy = Privacy::new(config, NoiseKey::from_seed_for_tests(self.seed))?;
            let inner = PrivateStep::new(&params, privacy, AdamW::default(), schedule)?.with_zero(rank, stage)?;
            go!(inner, |s: &mut PrivateStep, t| {
                let report = s.run(physical, |records| losses(&model, self.train, records, &Ctx::train(t)))?;
                epsilon = report.epsilon;
                if report.samples > 0 { report.loss() } else { Ok(f64::NAN) }
            });
        } else {
            let inner = PlainStep::new(&params, AdamW::default(), schedule)?.with_zero(rank, stage)?;
            let order = shuffled(self.train.len(), self.seed);
            go!(inner, |s: &mut PlainStep, t| {
                let own = (0..self.batch).filter(|i| i % size == me);
                let own: Vec<usize> = own.map(|i| order[(t as usize * self.batch + i) % order.len()]).collect();
                s.run(own.chunks(physical), |records| losses(&model, self.train, records, &Ctx::train(t)))?.loss()
            });
        }
        if let Some(p) = progress {
            p.finish();
        }
        step.gather_parameters()?;
        let held: Vec<usize> = shuffled(self.held.len(), 3).into_iter().take(64).collect();
        let held = no_grad(|| losses(&model, self.held, &held, &Ctx::eval()))?.array().to_f64();
        let steps = self.steps as f64;
        Ok(Told {
            losses: curve,
            held: held.iter().sum::<f64>() / held.len() as f64,
            kept: *step.plan().bytes(),
            sent: sent as f64 / steps,
            seconds: seconds / steps,
            epsilon,
            parameters: params.iter().flat_map(|p| p.value().to_f64()).collect(),
        })
    }
    /// The results of the ranks of this process, which are all ranks or one of them.
    fn all(&self, world: &World, stage: Stage, private: bool, name: &str) -> Result<Vec<Told>> {
        match world {
            World::Threads(n) => {
                Local::run(*n, |rank| self.run(Box::new(rank), stage, private, name)).into_iter().collect()
            }
            World::Processes(ranks) => Ok(vec![self.run(ranks.split(0)?, stage, private, name)?]),
        }
    }
}

fn run() -> Result<()> {
    let args = args::Args::parse("dp_zero", "Ranks that share the model's state, privately and not.", OPTIONS);
    let threads = args.get("ranks", "a whole number from 1 to 64", |n: &usize| (1..=64).contains(n));
    let world = match Mpi::started() {
        true => World::Processes(Shared::new(Mpi::world(Duration::from_secs(60))?)?),
        false => World::Threads(threads),
    };
    let (ranks, speaks) = (world.size(), world.speaks());
    let setting = |train, held| Setting {
        train,
        held,
        steps: args.get("steps", "a whole number from 1 to 100000", |n: &u64| (1..=100_000).contains(n)),
        batch: args.get("batch", "a whole number from 1 to 4096", |n: &usize| (1..=4096).contains(n)),
        epsilon: args.get("epsilon", "a positive number, such as 8", |e: &f64| e.is_finite() && *e > 0.0),
        seed: args.get("seed", "a whole number", |_: &u64| true),
        speaks,
    };
    let (train, held) = text()?;
    let setting = setting(&train, &held);
    // Only the first rank prints and writes.
    let options = json!({
        "ranks": ranks, "steps": setting.steps, "batch": setting.batch, "epsilon": setting.epsilon, "seed": setting.seed,
    });
    let mut folder = if speaks { Some(args.folder(&options)?) } else { None };
    let kinds = if matches!(world, World::Threads(_)) { "threads" } else { "processes" };
    if speaks {
        println!(
            "{ranks} ranks that are {kinds}; about {} on two cores",
            if args.has("quick") { "20 seconds" } else { "3 minutes" }
        );
    }
    if setting.batch > train.len() {
        args::fail(format!("--batch cannot be {}; the text has {} records", setting.batch, train.len()));
    }
    let (mut rows, mut memory) = (Vec::<Value>::new(), BarChart::new("Model state of a rank").label("MB"));
    let mut chart = LineChart::new(format!("Private training at ε = {}", setting.epsilon)).x_label("step");
    if speaks {
        println!(
            "{:<28} {:>10} {:>10} {:>12} {:>12} {:>8} {:>9}",
            "", "kept, MB", "formula", "sent, MB", "formula", "s/step", "held out"
        );
    }
    let mut worst = 0f64;
    let (mut sent, mut same) = (Vec::new(), Vec::new());
    for private in [false, true] {
        let kind = if private { "private" } else { "plain" };
        let name = format!("{kind}, one rank");
        let alone = setting.all(&World::Threads(1), Stage::Replicated, private, &name)?.remove(0);
        let psi = alone.parameters.len() as f64;
        for (stage, name) in STAGES {
            let told = setting.all(&world, stage, private, &format!("{kind}, {ranks} ranks, {name}"))?;
            let n = ranks as f64;
            // f32 with AdamW has parameters, gradient and two buffers.
            let formula = match stage {
                Stage::Replicated => 16.0 * psi,
                Stage::Optimizer => 8.0 * psi + 8.0 * psi / n,
                Stage::Gradients => 4.0 * psi + 12.0 * psi / n,
                Stage::Parameters => 16.0 * psi / n,
            };
            // Gradients and parameters are sent; at stage 3, the parameters for the forward and for the backward pass.
            let traffic = if stage == Stage::Parameters { 12.0 } else { 8.0 } * psi * (n - 1.0) / n;
            let kept = told.iter().map(|t| t.kept.iter().map(|k| k.1).sum::<usize>() as f64).collect();
            let kept = world.of_all(kept)?.into_iter().fold(0.0, f64::max);
            let mean_sent = world.of_all(told.iter().map(|t| t.sent).collect())?.iter().sum::<f64>() / n;
            // The largest difference between these parameters and those of one rank, relative to the largest parameter.
            let most = alone.parameters.iter().fold(0f64, |m, x| m.max(x.abs()));
            let apart = told
                .iter()
                .flat_map(|t| t.parameters.iter().zip(&alone.parameters))
                .fold(0f64, |m, (a, b)| m.max((a - b).abs()));
            let apart = world.of_all(vec![apart])?.into_iter().fold(0.0, f64::max);
            worst = worst.max(apart / most);
            if speaks {
                println!(
                    "{:<28} {:>10.2} {:>10.2} {:>12.2} {:>12.2} {:>8.3} {:>9.4}",
                    format!("{kind}, {ranks} ranks, {name}"),
                    kept / 1e6,
                    formula / 1e6,
                    mean_sent / 1e6,
                    traffic / 1e6,
                    told[0].seconds,
                    told[0].held,
                );
            }
            if !private {
                memory = memory.bar(name, kept / 1e6);
            } else {
                chart = chart.series(Series::new(
                    name,
                    told[0].losses.iter().enumerate().map(|(i, l)| (i as f64 + 1.0, *l)).collect::<Vec<_>>(),
                ));
            }
            let row = json!({
                "kind": kind, "ranks": ranks, "ranks_are": kinds, "stage": name, "parameters": psi, "kept_bytes": kept, "kept_formula": formula,
                "sent_bytes_a_step": mean_sent, "sent_formula": traffic, "seconds_a_step": told[0].seconds, "held_out": told[0].held,
                "held_out_of_one_rank": alone.held, "parameters_apart": apart / most, "epsilon": told[0].epsilon,
            });
            if let Some(folder) = &mut folder {
                folder.log(rows.len() as u64, &row)?;
            }
            rows.push(row);
            sent.push((private, stage, mean_sent));
            same.push((told[0].held - alone.held).abs());
        }
        if private {
            chart = chart.series(
                Series::new(
                    "one rank",
                    alone.losses.iter().enumerate().map(|(i, l)| (i as f64 + 1.0, *l)).collect::<Vec<_>>(),
                )
                .dashed(),
            );
        }
    }
    // The other ranks write nothing.
    let Some(mut folder) = folder else { return Ok(()) };
    memory.save(folder.plot("memory"))?;
    chart.y_label("training loss, nats a token").save(folder.plot("loss"))?;
    // The bytes that runs sent. A plain step has one microbatch here; a private step may need more, and stage 2 sends gradients in each.
    let of =
        |private: bool, stage: Stage| sent.iter().find(|s| s.0 == private && s.1 == stage).map_or(f64::NAN, |s| s.2);
    let more = of(true, Stage::Optimizer) / of(false, Stage::Optimizer);
    let word = |holds: bool| if holds { "holds" } else { "contradicted" };
    let apart = same.iter().copied().fold(0.0, f64::max);
    let verdicts = json!([
        {"claim": "every stage trains the model of one rank (held-out loss within 0.001)", "verdict": word(apart <= 1e-3), "difference": apart},
        {"claim": "private training sends what plain training sends at stage 1, within 2 %", "verdict": word(ranks == 1 || more <= 1.02), "ratio": more},
    ]);
    println!(
        "held-out losses are within {apart:.1e} of one rank's, parameters within {worst:.1e}; private sends {more:.4} of plain at stage 1"
    );
    if apart > 0.05 {
        return Err(Error::Invalid {
            op: "dp_zero",
            message: format!("a stage trained another model: held-out losses differ by {apart}"),
        });
    }
    folder.finish(
        &json!({"runs": rows, "verdicts": verdicts, "test_key": "noise is from a key that anybody can compute"}),
    )?;
    println!("plots and summary in {}", folder.path().display());
    Ok(())
}

fn main() {
    args::finish(run());
}
