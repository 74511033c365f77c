//! An audit of private training. Canaries are put into the training data by coin flips, an observer of every released gradient guesses
//! which are in, and the number of right guesses bounds ε from below. For comparison it prints the accountant's ε, and the result of the
//! same audit without noise.
//!
//! ```text
//! cargo run --release --example privacy_audit
//! ```
//!
//! Writes `summary.json` and a plot of the guesses' scores to the run folder.

#[path = "common/args.rs"]
mod args;
#[path = "common/study.rs"]
mod study;

use prismgrad::nn::Init;
use prismgrad::optim::{Schedule, Sgd};
use prismgrad::privacy::{ClipFn, ClipStyle, audit};
use prismgrad::random::NoiseKey;
use prismgrad::step::{Privacy, PrivacyConfig, PrivateStep, TrainStep, clipped_gradient};
use prismgrad::train::plot::{LineChart, Series};
use prismgrad::{Array, DType, Param, Result, Tensor};
use serde_json::json;
use study::{Data, Mlp};

const OPTIONS: &[args::Opt] = &[
    ("canaries", "1000", "200", "canaries, each in or out by a fair coin"),
    ("epsilon", "3", "3", "privacy budget ε at δ = 1e-6"),
    ("steps", "60", "10", "training steps"),
    ("seed", "0", "0", "seed of coins, sampling and noise"),
];
const DELTA: f64 = 1e-6;
const CONFIDENCE: f64 = 0.95;

/// The digits' model, with a parameter that only canaries use. Each canary has a coordinate of its own, which makes it the strongest
/// possible canary.
struct Audited {
    mlp: Mlp,
    canary: Param,
    digits: usize,
}

impl Audited {
    fn new(data: &Data, canaries: usize) -> Result<Audited> {
        let mlp = Mlp::new(&[32], 0)?;
        let canary = mlp.params.at("canary").param("weight", &[canaries], Init::Zeros)?;
        Ok(Audited { mlp, canary, digits: data.private.len() })
    }
    /// One loss per record. Records after the digits are canaries, with a gradient far above the threshold. A canary whose coin came up
    /// tails is not in the data, and its loss is constant.
    fn losses(&self, data: &Data, coins: &[bool], records: &[usize]) -> Result<Tensor> {
        let (n, m) = (records.len(), self.canary.numel());
        let is_digit = |r: usize| r < self.digits;
        let shown: Vec<usize> = records.iter().map(|&r| if is_digit(r) { r } else { 0 }).collect();
        let mask: Vec<f32> = records.iter().map(|&r| is_digit(r) as u8 as f32).collect();
        let hot = Array::generate(&[n, m], DType::F32, |k| {
            let r = records[k / m];
            if !is_digit(r) && coins[r - self.digits] && r - self.digits == k % m { 100.0 } else { 0.0 }
        });
        let digits = self.mlp.losses_of(&data.private, &shown)?.mul(&Tensor::from_slice(&mask, &[n])?)?;
        digits.add(&Tensor::new(hot).mul(&self.canary.per_sample(n)?)?.sum(&[1], false)?)
    }
}

fn run() -> Result<()> {
    let args = args::Args::parse("privacy_audit", "Bounds ε from below by guessing canaries.", OPTIONS);
    let m = args.get("canaries", "a whole number from 100 to 10000", |n: &usize| (100..=10_000).contains(n));
    let epsilon = args.get("epsilon", "a positive number, such as 3", |e: &f64| e.is_finite() && *e > 0.0);
    let steps = args.get("steps", "a whole number from 1 to 1000", |n: &u64| (1..=1000).contains(n));
    let seed: u64 = args.get("seed", "a whole number, 0 or more", |_| true);
    let data = Data::load()?;
    let config = json!({"canaries": m, "epsilon": epsilon, "steps": steps, "seed": seed});
    let mut folder = args.folder(&config)?;

    let key = NoiseKey::from_seed_for_tests(seed);
    let coins = audit::coins(&NoiseKey::from_seed_for_tests(seed ^ 0xc01), m);
    let model = Audited::new(&data, m)?;
    let records = model.digits + m;
    let config =
        PrivacyConfig::target(epsilon, DELTA).records(records).expected_batch(records as f64 / 4.0).steps(steps);
    let privacy = Privacy::new(config.style(ClipStyle::AllLayer).clip(ClipFn::Abadi), key)?;
    let params = model.mlp.params.all();
    let sgd = Sgd { momentum: 0.9, weight_decay: 0.0 };
    let mut step = PrivateStep::new(&params, privacy, sgd, Schedule::constant(0.2))?;
    let range = step.flat().range(&model.canary).unwrap_or_default();
    let (mut released, mut silent) = (vec![0.0; m], vec![0.0; m]);
    for t in 1..=steps {
        let report = step.run(512, |part| {
            // The same sum before noise, as a step without noise would release it.
            let losses = model.losses(&data, &coins, part)?;
            let sums = clipped_gradient(&losses, &params, &ClipStyle::AllLayer, ClipFn::Abadi, 1.0)?;
            let at = params.iter().position(|p| *p == model.canary).unwrap_or_default();
            silent.iter_mut().zip(sums[at].to_f64()).for_each(|(s, g)| *s += g);
            model.losses(&data, &coins, part)
        })?;
        let seen = step.last_gradient().slice(0, range.clone())?.to_f64();
        released.iter_mut().zip(seen).for_each(|(s, g)| *s += g);
        folder.log(t, &json!({"epsilon": report.epsilon}))?;
    }
    let promised = step.privacy().epsilon(steps)?;
    let guesses = 2 * m / 5;
    let judge = |scores: &[f64]| audit::one_run(scores, &coins, guesses, DELTA, CONFIDENCE);
    let (found, broken) = (judge(&released)?, judge(&silent)?);
    println!("{m} canaries among {} digits, test accuracy {:.3}", model.digits, model.mlp.accuracy(&data.test)?);
    println!("accountant: ε ≤ {promised:.3}");
    println!("audit:      ε ≥ {:.3}  ({} of {} guesses right)", found.epsilon, found.correct, found.guesses);
    println!("without noise it would say ε ≥ {:.3}  ({} right)", broken.epsilon, broken.correct);
    if found.epsilon > promised {
        println!("the audit contradicts the accountant: something is wrong with this training");
    }
    let curve = |name: &str, included: bool| {
        let mut s: Vec<f64> = released.iter().zip(&coins).filter(|(_, c)| **c == included).map(|(s, _)| *s).collect();
        s.sort_by(f64::total_cmp);
        let n = s.len() as f64;
        Series::new(name, s.into_iter().enumerate().map(|(i, s)| (s, (i + 1) as f64 / n)).collect::<Vec<_>>())
    };
    LineChart::new(format!("What an observer sees of canaries (ε ≤ {promised:.2}, audited ≥ {:.2})", found.epsilon))
        .x_label("sum of the released gradients in a canary's coordinate")
        .y_label("share of canaries below")
        .series(curve("in the data", true))
        .series(curve("left out", false))
        .save(folder.plot("scores"))?;
    folder.finish(&json!({
        "accountant": promised, "audit": found.epsilon, "correct": found.correct, "guesses": guesses,
        "without_noise": broken.epsilon, "confidence": CONFIDENCE, "delta": DELTA,
    }))?;
    println!("plot and summary in {}", folder.path().display());
    Ok(())
}

fn main() {
    args::finish(run());
}
