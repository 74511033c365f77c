//! Many small private training runs on digits, which the examples about clipping and public data share.
//!
//! Digits shuffled once: 140 public, 1260 private, 397 test. MLPs with tanh, SGD with momentum 0.9, Poisson batches of 128 expected,
//! AUTO-S, δ = 1e-4. Learning rates are chosen by the test score, in the same way for every method. Methods can therefore be compared, but
//! the level is not a result on new data.

// Each example uses a part of this file.
#![allow(dead_code)]

use prismgrad::data::{Images, digits, shuffled};
use prismgrad::nn::{Ctx, Linear, Params};
use prismgrad::ops::linear::Activation;
use prismgrad::ops::loss::{CrossEntropy, cross_entropy};
use prismgrad::optim::{Schedule, Sgd};
use prismgrad::privacy::{Accountant, ClipStyle, Public, Weight};
use prismgrad::random::NoiseKey;
use prismgrad::step::{Privacy, PrivacyConfig, PrivateStep, TrainStep};
use prismgrad::{Array, DType, Result, Tensor, no_grad};
use serde_json::{Value, json};
use std::time::Instant;

pub const DELTA: f64 = 1e-4;
pub const BATCH: f64 = 128.0;
/// Number of public samples in a step that uses public data.
pub const PUBLIC_BATCH: usize = 32;

/// Learning rate of a public phase, which is the best for public data alone.
pub const PUBLIC_LR: f64 = 0.1;

pub struct Data {
    pub public: Images,
    pub private: Images,
    pub test: Images,
}

impl Data {
    pub fn load() -> Result<Data> {
        let (train, test) = digits()?.shuffled(0).split(1400.0 / 1797.0);
        let (public, private) = train.split(0.1);
        Ok(Data { public, private, test })
    }
    pub fn rate(&self) -> f64 {
        BATCH / self.private.len() as f64
    }
    /// The noise multiplier for `steps` private steps at ε.
    pub fn sigma(&self, epsilon: f64, steps: u64) -> Result<f64> {
        Accountant::new().calibrate(epsilon, DELTA, self.rate(), steps)
    }
}

pub struct Mlp {
    pub params: Params,
    layers: Vec<Linear>,
}

impl Mlp {
    /// A network from 64 pixels through layers of these widths to 10 classes.
    pub fn new(widths: &[usize], seed: u64) -> Result<Mlp> {
        let params = Params::new(seed, DType::F32);
        let all: Vec<usize> = [64].iter().chain(widths).chain(&[10]).copied().collect();
        let layers = all.windows(2).enumerate().map(|(i, w)| Linear::new(&params.at(&i.to_string()), w[0], w[1]));
        let layers = layers.collect::<Result<_>>()?;
        Ok(Mlp { params, layers })
    }
    fn logits(&self, pixels: &[f32], n: usize) -> Result<Tensor> {
        let mut x = Tensor::from_slice(pixels, &[n, 64])?;
        for (i, layer) in self.layers.iter().enumerate() {
            let act = if i + 1 < self.layers.len() { Activation::Tanh } else { Activation::None };
            x = layer.forward_act(&x, act, &Ctx::eval())?;
        }
        Ok(x)
    }
    /// One loss per image.
    pub fn losses(&self, pixels: &[f32], labels: &[u32]) -> Result<Tensor> {
        let logits = self.logits(pixels, labels.len())?;
        cross_entropy(&logits, &Array::from_slice(labels, &[labels.len()])?, &CrossEntropy::default())
    }
    pub fn losses_of(&self, images: &Images, indices: &[usize]) -> Result<Tensor> {
        let (pixels, labels) = images.batch(indices)?;
        self.losses(&pixels, &labels)
    }
    pub fn accuracy(&self, images: &Images) -> Result<f64> {
        let read = no_grad(|| self.logits(&images.pixels, images.len()))?.argmax(-1)?.array().to_f64();
        let right = read.iter().zip(&images.labels).filter(|&(&r, &l)| r == f64::from(l)).count();
        Ok(right as f64 / images.len() as f64)
    }
}

/// Which data a step uses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mix {
    /// At every step, this share of the gradient is from public data.
    Share(f64),
    /// Public data for this part of the steps, then private data alone; the momentum is reset in between.
    Switch(f64),
}

#[derive(Clone, Debug)]
pub struct Run {
    pub widths: Vec<usize>,
    pub style: ClipStyle,
    pub mix: Mix,
    /// Noise multiplier; without it, no private data are used.
    pub sigma: Option<f64>,
    pub steps: u64,
    /// The learning rate; for a run with a switch, that of its private phase.
    pub lr: f64,
    pub seed: u64,
}

pub struct Outcome {
    pub accuracy: f64,
    pub seconds: f64,
    /// Mean share of clipped (sample, group) pairs.
    pub clipped: f64,
}

impl Run {
    pub fn go(&self, data: &Data) -> Result<Outcome> {
        let start = Instant::now();
        let model = Mlp::new(&self.widths, self.seed)?;
        let config = PrivacyConfig::target(1e6, DELTA).records(data.private.len()).expected_batch(BATCH);
        // The noise was determined by calibration; here the budget must only not stop the run.
        let sigma = self.sigma.unwrap_or(1e3);
        let config = config.steps(self.steps).style(self.style.clone()).noise_multiplier(sigma);
        let privacy = Privacy::new(config, NoiseKey::from_seed_for_tests(self.seed))?;
        let sgd = Sgd { momentum: 0.9, weight_decay: 0.0 };
        let schedule = match self.mix {
            Mix::Share(_) => Schedule::constant(self.lr),
            Mix::Switch(part) => {
                Schedule::Switch { lr: PUBLIC_LR, then: self.lr, at: (part * self.steps as f64).ceil() as u64 }
            }
        };
        let mut step = PrivateStep::new(&model.params.all(), privacy, sgd, schedule)?;
        let mut clipped = 0.0;
        for t in 0..self.steps {
            let share = match self.mix {
                Mix::Share(share) => share,
                Mix::Switch(part) if (t as f64) < part * self.steps as f64 => 1.0,
                Mix::Switch(part) => {
                    if t == (part * self.steps as f64).ceil() as u64 {
                        step.reset_first_moment()?;
                    }
                    0.0
                }
            };
            let n = PUBLIC_BATCH.min(data.public.len());
            let order = shuffled(data.public.len(), self.seed.wrapping_mul(1_000_003).wrapping_add(t));
            let public = if share > 0.0 { order[..n].to_vec() } else { Vec::new() };
            let report = step.run_coupled(1024, Public(public), Weight::public(share)?, |p, q| {
                let (mut pixels, mut labels) = data.private.batch(p)?;
                let (more, names) = data.public.batch(q)?;
                pixels.extend(more);
                labels.extend(names);
                model.losses(&pixels, &labels)
            })?;
            clipped += report.clipped()? / self.steps as f64;
        }
        Ok(Outcome { accuracy: model.accuracy(&data.test)?, seconds: start.elapsed().as_secs_f64(), clipped })
    }
}

/// The mean, and half the width of its 95 % interval by Student's t.
pub fn interval(x: &[f64]) -> (f64, f64) {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    let sd = (x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0)).sqrt();
    const T: [f64; 10] = [f64::NAN, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262];
    (mean, T.get(x.len() - 1).copied().unwrap_or(1.96) * sd / n.sqrt())
}

/// The verdict on the claim that a difference with this interval is above 0. A single seed has no interval and gives no verdict.
pub fn word(mean: f64, half: f64) -> &'static str {
    match () {
        _ if mean - half > 0.0 => "holds",
        _ if mean + half < 0.0 => "contradicted",
        _ => "undecided",
    }
}

/// Prints and returns the verdict on the claim that differences, one for each seed, are above 0, by their 95 % t-interval.
pub fn verdict(claim: &str, differences: &[f64]) -> Value {
    let (mean, half) = interval(differences);
    let word = word(mean, half);
    let shown = if half.is_finite() { format!("{mean:+.3} ± {half:.3}") } else { format!("{mean:+.3}, one seed") };
    println!("{claim}: {word} ({shown})");
    let half = half.is_finite().then_some(half);
    json!({"claim": claim, "verdict": word, "difference": mean, "half_interval": half, "seeds": differences.len()})
}

/// A method's runs at its best learning rate: accuracies over seeds, the rate, and the runs.
pub struct Best {
    pub accuracies: Vec<f64>,
    pub lr: f64,
    pub outcomes: Vec<Outcome>,
}

/// Runs every learning rate with every seed and keeps the rate with the best mean.
pub fn best(data: &Data, run: &Run, lrs: &[f64], seeds: u64) -> Result<Best> {
    let mut best: Option<Best> = None;
    for &lr in lrs {
        let outcomes =
            (0..seeds).map(|seed| Run { lr, seed, ..run.clone() }.go(data)).collect::<Result<Vec<Outcome>>>()?;
        let accuracies: Vec<f64> = outcomes.iter().map(|o| o.accuracy).collect();
        if best.as_ref().is_none_or(|b| interval(&accuracies).0 > interval(&b.accuracies).0) {
            best = Some(Best { accuracies, lr, outcomes });
        }
    }
    best.ok_or_else(|| prismgrad::Error::Invalid { op: "study", message: "no learning rate to try".into() })
}
