//! Training of the classifiers, with settings that change how confident or how robust they become.

use super::attack::Attack;
use super::models::Classifier;
use super::served::Served;
use super::text::TextSet;
use crate::base::{Error, Result};
use crate::data::shuffled;
use crate::nn::Ctx;
use crate::ops::loss::{CrossEntropy, cross_entropy};
use crate::optim::{AdamW, Optimizer, Schedule, Sgd, Update};
use crate::step::PlainStep;
use crate::{Array, Tensor, no_grad};

/// An optimizer whose gradient is divided by its norm in every step. Its steps do not become shorter, so that long training keeps raising
/// the confidence.
#[derive(Clone, Debug)]
pub struct Normalised<O>(pub O);

impl<O: Optimizer> Optimizer for Normalised<O> {
    fn describe(&self) -> String {
        format!("{} on gradients of norm 1", self.0.describe())
    }
    fn slots(&self) -> &'static [&'static str] {
        self.0.slots()
    }
    fn update(&self, u: Update) -> Result<()> {
        let norm = u.grads.to_f64().iter().map(|g| g * g).sum::<f64>().sqrt();
        let scaled = Tensor::new(u.grads.clone()).mul_scalar(1.0 / norm.max(1e-12))?.into_array();
        self.0.update(Update::new((u.step, u.lr), u.params, &scaled, u.state, u.layout))
    }
}

/// Adversarial training on the embeddings (Madry et al. 2018; for text Miyato et al. 2017): steps of gradient ascent on a perturbation of a
/// text's embeddings, inside a ball.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pgd {
    /// Number of steps of ascent.
    pub steps: usize,
    /// Largest ℓ2 norm of the perturbation of a text, as a share of the norm of its embeddings.
    pub radius: f64,
}

/// How a classifier is trained.
#[derive(Clone, Debug, PartialEq)]
pub struct Training {
    /// Number of passes over the texts.
    pub epochs: usize,
    /// Number of texts in a step.
    pub batch: usize,
    /// Peak learning rate. The rate rises over the first tenth of the steps and falls to 0 along a cosine.
    pub lr: f64,
    /// Whether SGD with momentum 0.9 is used instead of AdamW.
    pub sgd: bool,
    /// The training temperature: in the loss the logits are divided by it. The model is served without it.
    pub temperature: f64,
    /// Whether the gradient is divided by its norm in every step.
    pub normalise: bool,
    /// Label smoothing of the loss.
    pub label_smoothing: f64,
    /// Adversarial training, if given.
    pub pgd: Option<Pgd>,
    /// Seed of the order of the texts.
    pub seed: u64,
}

impl Default for Training {
    fn default() -> Training {
        Training {
            epochs: 6,
            batch: 64,
            lr: 3e-3,
            sgd: false,
            temperature: 1.0,
            normalise: false,
            label_smoothing: 0.0,
            pgd: None,
            seed: 0,
        }
    }
}

impl Training {
    /// Trains a model. After each epoch `report(epoch, mean loss)` is called. Fails if a loss is not finite, or if the settings are not
    /// valid.
    pub fn run(&self, model: &Classifier, set: &TextSet, mut report: impl FnMut(usize, f64)) -> Result<()> {
        let op = "training";
        if set.is_empty() || self.batch == 0 || !(self.temperature > 0.0 && self.temperature.is_finite()) {
            let message = format!(
                "{} texts in batches of {} at a training temperature of {}; all must be positive",
                set.len(),
                self.batch,
                self.temperature
            );
            return Err(Error::invalid(op, message));
        }
        if let Some(radius) = self.pgd.map(|p| p.radius).filter(|r| !(r.is_finite() && *r >= 0.0)) {
            return Err(Error::invalid(op, format!("a radius of {radius} for PGD; it must be 0 or more")));
        }
        if set.classes.len() != model.config().classes.len() {
            let message = format!(
                "texts of {} classes for a model of {}; give both the same classes",
                set.classes.len(),
                model.config().classes.len()
            );
            return Err(Error::invalid(op, message));
        }
        let total = (self.epochs * set.len().div_ceil(self.batch)).max(1) as u64;
        let schedule = Schedule::cosine(self.lr, (total / 10).max(1), total);
        let params = model.params().all();
        let sgd = Sgd { momentum: 0.9, weight_decay: 0.0 };
        let adam = AdamW { weight_decay: 0.01, ..AdamW::default() };
        let mut step = match (self.sgd, self.normalise) {
            (true, true) => PlainStep::new(&params, Normalised(sgd), schedule)?,
            (true, false) => PlainStep::new(&params, sgd, schedule)?,
            (false, true) => PlainStep::new(&params, Normalised(adam), schedule)?,
            (false, false) => PlainStep::new(&params, adam, schedule)?,
        };
        for epoch in 0..self.epochs {
            let (mut sum, mut count) = (0.0, 0);
            let order = shuffled(set.len(), self.seed.wrapping_mul(1_000_003).wrapping_add(epoch as u64));
            for part in order.chunks(self.batch) {
                let losses = self.losses(model, set, part)?;
                let report = step.run_one(|| Ok(losses))?;
                sum += report.loss()?;
                count += 1;
            }
            report(epoch, sum / f64::from(count.max(1)));
        }
        Ok(())
    }
    /// One loss for each text of a batch.
    fn losses(&self, model: &Classifier, set: &TextSet, part: &[usize]) -> Result<Tensor> {
        let words: Vec<Vec<&str>> = part.iter().map(|&i| set.texts[i].words().collect()).collect();
        let labels: Vec<u32> = part.iter().map(|&i| set.labels[i]).collect();
        let (ids, lengths) = model.ids(words.iter().map(|w| &w[..]));
        let ctx = Ctx::train(0);
        let options = CrossEntropy { label_smoothing: self.label_smoothing, ..CrossEntropy::default() };
        let loss = |logits: Tensor| -> Result<Tensor> {
            let logits = if self.temperature == 1.0 { logits } else { logits.mul_scalar(1.0 / self.temperature)? };
            cross_entropy(&logits, Array::from_slice(&labels, &[labels.len()])?, &options)
        };
        let Some(pgd) = self.pgd else { return loss(model.forward(&ids, &lengths, &ctx)?) };
        let shift = {
            let e = no_grad(|| model.embed(&ids, &lengths, &Ctx::eval()))?;
            ascend(&pgd, &e, &lengths, |x| loss(model.on_embeddings(x, &lengths, &ctx)?))?
        };
        let e = model.embed(&ids, &lengths, &ctx)?;
        loss(model.on_embeddings(&e.add(&shift)?, &lengths, &ctx)?)
    }
}

/// The perturbation of the embeddings `[words, width]` that the steps of ascent find. For each text its norm is at most the radius.
fn ascend(pgd: &Pgd, e: &Tensor, lengths: &[usize], losses: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let width = e.shape()[1];
    let values = e.array().to_vec::<f32>()?;
    let norm = |x: &[f32]| x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    let mut shift = vec![0f32; values.len()];
    for _ in 0..pgd.steps {
        let shifted: Vec<f32> = values.iter().zip(&shift).map(|(v, s)| v + s).collect();
        let leaf = Tensor::leaf(Array::from_slice(&shifted, e.shape())?);
        let grads = losses(&leaf)?.backward()?;
        let Some(g) = grads.of(&leaf) else { break };
        let g = g.to_vec::<f32>()?;
        let mut at = 0;
        for n in lengths {
            let r = at..at + n * width;
            at = r.end;
            let radius = pgd.radius * norm(&values[r.clone()]);
            // The steps together could go a little beyond the radius, in the direction of the gradient.
            let by = 1.5 * radius / pgd.steps as f64 / norm(&g[r.clone()]).max(1e-12);
            shift[r.clone()].iter_mut().zip(&g[r.clone()]).for_each(|(s, g)| *s += (by * f64::from(*g)) as f32);
            let over = norm(&shift[r.clone()]) / radius.max(1e-12);
            if over > 1.0 {
                shift[r].iter_mut().for_each(|s| *s = (f64::from(*s) / over) as f32);
            }
        }
    }
    Tensor::from_slice(&shift, e.shape())
}

/// A set to which attacked forms of `count` of its texts are added, with the labels of the originals (augmentation).
pub fn augmented(set: &TextSet, model: &Classifier, attack: &Attack, count: usize, seed: u64) -> Result<TextSet> {
    let some = set.sample(count, seed);
    let found = attack.run(&Served::new(model), &some)?;
    let mut out = set.clone();
    for ((found, text), label) in found.iter().zip(&some.texts).zip(&some.labels) {
        if !found.changed.is_empty() {
            out.texts.push(found.text(text));
            out.labels.push(*label);
        }
    }
    Ok(out)
}
