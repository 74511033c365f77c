//! Routers of reduced layers: their initial weights, and training that changes only routers.

use super::{LayerStatistics, RouterInit, SparseModel};
use crate::base::{Error, Result, philox};
use crate::nn::Moe;
use crate::ops::loss::{Reduce as Over, kl_divergence};
use crate::optim::{AdamW, Schedule};
use crate::step::PlainStep;
use crate::{Param, Tensor};

/// The rows of the new router, one for each cluster.
pub(super) fn initial(
    moe: &Moe,
    stats: &LayerStatistics,
    clusters: &[Vec<usize>],
    anchors: &[usize],
    (init, seed): (RouterInit, u64),
) -> Result<Vec<Vec<f64>>> {
    let weight = moe.router().weight();
    let (old, d) = (weight.value().to_f64(), weight.shape()[1]);
    let row = |e: usize| &old[e * d..(e + 1) * d];
    Ok(match init {
        RouterInit::Random => {
            let draw = |c: usize, i: usize| 0.02 * philox::normal(seed, c as u64, i as u64);
            (0..clusters.len()).map(|c| (0..d).map(|i| draw(c, i)).collect()).collect()
        }
        RouterInit::Keep => anchors.iter().map(|&a| row(a).to_vec()).collect(),
        RouterInit::ClusterMean => {
            let mean =
                |m: &Vec<usize>| (0..d).map(|i| m.iter().map(|&e| row(e)[i]).sum::<f64>() / m.len() as f64).collect();
            clusters.iter().map(mean).collect()
        }
        RouterInit::LogSumExp => log_sum_exp(stats, clusters)?,
    })
}

/// The rows w that minimise Σ (w·x − ln Σ_e exp hₑ)² + λ|w|² over the kept tokens, where λ is 10⁻⁶ of the inputs' mean square.
fn log_sum_exp(stats: &LayerStatistics, clusters: &[Vec<usize>]) -> Result<Vec<Vec<f64>>> {
    let (d, e) = (stats.width, stats.experts);
    let n = stats.logits.len() / e;
    if n <= d {
        let message = format!("{n} kept tokens for a router of width {d}; observe more (Observe::kept_tokens)");
        return Err(Error::invalid("RouterInit::LogSumExp", message));
    }
    let mut gram = vec![0f64; d * d];
    let mut right = vec![vec![0f64; d]; clusters.len()];
    for (x, h) in stats.inputs.chunks_exact(d).zip(stats.logits.chunks_exact(e)) {
        for i in 0..d {
            let xi = x[i] as f64;
            gram[i * d..=i * d + i].iter_mut().zip(x).for_each(|(g, &xj)| *g += xi * xj as f64);
        }
        for (right, members) in right.iter_mut().zip(clusters) {
            let most = members.iter().map(|&m| h[m]).fold(f32::NEG_INFINITY, f32::max) as f64;
            let target = most + members.iter().map(|&m| (h[m] as f64 - most).exp()).sum::<f64>().ln();
            right.iter_mut().zip(x).for_each(|(r, &x)| *r += target * x as f64);
        }
    }
    let ridge = 1e-6 * (0..d).map(|i| gram[i * d + i]).sum::<f64>() / d as f64;
    (0..d).for_each(|i| gram[i * d + i] += ridge.max(1e-12));
    // The Cholesky factor is computed in the lower half.
    for i in 0..d {
        for j in 0..=i {
            let dot: f64 = (0..j).map(|k| gram[i * d + k] * gram[j * d + k]).sum();
            let left = gram[i * d + j] - dot;
            gram[i * d + j] = if i == j { left.max(1e-300).sqrt() } else { left / gram[j * d + j] };
        }
    }
    for y in &mut right {
        for i in 0..d {
            let dot: f64 = (0..i).map(|k| gram[i * d + k] * y[k]).sum();
            y[i] = (y[i] - dot) / gram[i * d + i];
        }
        for i in (0..d).rev() {
            let dot: f64 = (i + 1..d).map(|k| gram[k * d + i] * y[k]).sum();
            y[i] = (y[i] - dot) / gram[i * d + i];
        }
    }
    Ok(right)
}

/// Trains only the routers of a model, as UNCURL does before everything is trained, and restores afterwards what was trainable. `losses`
/// gives the losses of the batch of a step, one for each sample. Returns the mean loss of each step.
pub fn train_routers<M: SparseModel>(
    model: &M,
    steps: u64,
    lr: f64,
    mut losses: impl FnMut(&M, u64) -> Result<Tensor>,
) -> Result<Vec<f64>> {
    if !(lr.is_finite() && lr > 0.0) {
        return Err(Error::invalid("train_routers", format!("a learning rate of {lr}; it must be positive")));
    }
    let routers: Vec<Param> = model.mixtures().into_iter().flatten().map(|m| m.router().weight().clone()).collect();
    if routers.is_empty() {
        return Err(Error::invalid("train_routers", "the model has no mixture of experts"));
    }
    let before: Vec<(Param, bool)> = model.store().all().into_iter().map(|p| (p.clone(), p.trainable())).collect();
    model.store().set_trainable(false);
    routers.iter().for_each(|p| p.set_trainable(true));
    let mut train = || -> Result<Vec<f64>> {
        let schedule = Schedule::Linear { lr, warmup: (steps / 10).max(1), total: steps + 1 };
        let mut step = PlainStep::new(&routers, AdamW { weight_decay: 0.0, ..AdamW::default() }, schedule)?;
        (0..steps).map(|t| step.run_one(|| losses(model, t))?.loss()).collect()
    };
    let trained = train();
    before.iter().for_each(|(p, on)| p.set_trainable(*on));
    trained
}

/// Losses with which [`train_routers`] distils a full model into a reduced one's routers: the Kullback–Leibler divergence of the
/// reduced model's next-token distribution from the full model's, in nats per token, one for each sequence. Logits `[B, T, vocab]`.
pub fn distillation(reduced: &Tensor, full: &Tensor) -> Result<Tensor> {
    kl_divergence(&reduced.log_softmax(-1)?, &full.detach().softmax(-1)?, Over::Mean)
}
