//! Which training images support the predicted class of a test image, and which oppose it? The example takes inner products of the test
//! image's gradient with every training image's gradient (TracIn at one checkpoint, Pruthi et al. 2020). They are computed from factors, so
//! no image's gradient is ever formed.
//!
//! ```text
//! cargo run --release --example influence
//! ```
//!
//! Writes `plots/influence.svg` and `.png` to the run folder, and prints the same list.

#[path = "common/args.rs"]
mod args;

use prismgrad::data::{Images, digits, shuffled};
use prismgrad::nn::{Ctx, Linear, Params};
use prismgrad::ops::linear::Activation;
use prismgrad::ops::loss::{CrossEntropy, cross_entropy};
use prismgrad::optim::{AdamW, Schedule};
use prismgrad::step::{PlainStep, TrainStep};
use prismgrad::train::plot::ImageGrid;
use prismgrad::{Array, DType, Result, Tensor, no_grad};
use serde_json::json;
use std::time::Instant;

const OPTIONS: &[args::Opt] = &[("epochs", "8", "2", "passes over the training images")];
/// Number of training images shown on each side.
const SHOWN: usize = 5;
/// Number of test images shown.
const ROWS: usize = 5;

struct Mlp {
    hidden: Linear,
    out: Linear,
}

impl Mlp {
    /// The logits of some images, and one loss per image.
    fn losses(&self, images: &Images, indices: &[usize]) -> Result<(Tensor, Tensor)> {
        let (pixels, labels) = images.batch(indices)?;
        let x = Tensor::from_slice(&pixels, &[indices.len(), images.size()])?;
        let logits = self.out.forward(&self.hidden.forward_act(&x, Activation::Tanh, &Ctx::eval())?, &Ctx::eval())?;
        let labels = Array::from_slice(&labels, &[labels.len()])?;
        let losses = cross_entropy(&logits, &labels, &CrossEntropy::default())?;
        Ok((logits, losses))
    }
}

fn run() -> Result<()> {
    let args = args::Args::parse("influence", "Finds the training images that influenced a prediction.", OPTIONS);
    let epochs = args.get("epochs", "a whole number from 1 to 10000", |n: &u64| (1..=10_000).contains(n));
    let (train, test) = digits()?.shuffled(0).split(1400.0 / 1797.0);
    let params = Params::new(0, DType::F32);
    let linear = |name, from, to| Linear::new(&params.at(name), from, to);
    let model = Mlp { hidden: linear("hidden", 64, 32)?, out: linear("out", 32, 10)? };
    let mut folder = args.folder(&json!({"epochs": epochs}))?;

    let mut step = PlainStep::new(&params.all(), AdamW::default(), Schedule::constant(4e-3))?;
    for epoch in 0..epochs {
        let mut total = 0.0;
        for batch in shuffled(train.len(), epoch).chunks(64) {
            let report = step.run([batch], |part| Ok(model.losses(&train, part)?.1))?;
            total += report.loss()? * report.samples as f64;
        }
        folder.log(step.steps(), &json!({"epoch": epoch + 1, "loss": total / train.len() as f64}))?;
    }
    let all: Vec<usize> = (0..test.len()).collect();
    let read = no_grad(|| model.losses(&test, &all)?.0.argmax(-1))?.array().to_f64();
    let wrong = |&i: &usize| read[i] != f64::from(test.labels[i]);
    let accuracy = 1.0 - all.iter().filter(|i| wrong(i)).count() as f64 / test.len() as f64;
    println!("test accuracy {accuracy:.4} after {epochs} epochs");
    // Up to three misclassified images are shown; the other rows show correctly classified ones.
    let mut chosen: Vec<usize> = all.iter().copied().filter(|i| wrong(i)).take(3).collect();
    chosen.extend(all.iter().copied().filter(|i| !wrong(i)).take(ROWS - chosen.len()));

    // One backward pass over each set gives the factors: for a linear layer, its inputs and its outputs' gradients.
    let start = Instant::now();
    let everything: Vec<usize> = (0..train.len()).collect();
    let of_train = model.losses(&train, &everything)?.1.backward()?;
    let of_test = model.losses(&test, &chosen)?.1.backward()?;
    let mut influence = vec![0.0; chosen.len() * train.len()];
    for grad in of_test.params() {
        if let Some(other) = of_train.param(grad.param()) {
            influence.iter_mut().zip(grad.gram(other)?.to_f64()).for_each(|(sum, g)| *sum += g);
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("{} × {} inner products of {} elements in {seconds:.3} s", chosen.len(), train.len(), params.count());

    let title = "Left: test image. Then the 5 most helpful, 5 most harmful training images";
    let mut sheet = ImageGrid::new(title, train.width, train.height).columns(1 + 2 * SHOWN);
    let mut rows = Vec::new();
    for (&i, scores) in chosen.iter().zip(influence.chunks_exact(train.len())) {
        let mut order = everything.clone();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        let harmful = order.iter().rev().take(SHOWN);
        let picked: Vec<usize> = order.iter().take(SHOWN).chain(harmful).copied().collect();
        println!("test image {i}: a {}, read as {}", test.labels[i], read[i]);
        sheet = sheet.image(test.image(i), format!("{}, read {}", test.labels[i], read[i]))?;
        for (place, &j) in picked.iter().enumerate() {
            let side = if place < SHOWN { "helpful" } else { "harmful" };
            println!("  {side}  training image {j:>4}, a {}: {:+.3}", train.labels[j], scores[j]);
            sheet = sheet.image(train.image(j), format!("{}: {:+.2}", train.labels[j], scores[j]))?;
        }
        let list: Vec<_> =
            picked.iter().map(|&j| json!({"image": j, "label": train.labels[j], "influence": scores[j]})).collect();
        rows.push(json!({"image": i, "label": test.labels[i], "read": read[i], "training_images": list}));
    }
    let [svg, png] = sheet.save(folder.plot("influence"))?;
    folder.finish(&json!({"accuracy": accuracy, "seconds": seconds, "test_images": rows}))?;
    println!("picture: {} and {}", svg.display(), png.display());
    Ok(())
}

fn main() {
    args::finish(run());
}
