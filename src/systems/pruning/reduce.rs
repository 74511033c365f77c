//! Choice of the experts that are kept, and of what the others are merged into.

use super::cluster::numbered;
use super::{LayerPlan, LayerStatistics, Plan, SparseModel, Statistics, alignment, router, spectral};
use crate::base::{Error, Result};
use crate::nn::Moe;
use crate::random::Rng;
use serde::{Deserialize, Serialize};

/// How many experts stay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// The same number in every layer that has experts.
    Same(usize),
    /// A number for each layer; `None` leaves the layer as it is.
    PerLayer(Vec<Option<usize>>),
}

/// How the experts are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Spectral clusters of the router's logits; each is merged into its most frequent expert (Sarkar et al. 2024).
    Uncurl,
    /// The experts that are chosen most; the others are dropped.
    Greedy,
    /// The experts that are chosen most; each other is merged into the most similar of them (the control without clustering of Sarkar
    /// et al. 2024).
    AnchorMerge,
    /// Like [`Method::AnchorMerge`], but the experts that stay are the most frequent of *all* layers, so that the given number is the
    /// average over layers (Li et al. 2024, M-SMoE, without its compression).
    MSmoe,
    /// The experts with the largest mean of gate × norm of the output over their own tokens; the others are dropped (Lasby et al. 2025,
    /// REAP). With `renormalise`, the gates are divided by their sum over a token's experts first.
    Reap {
        /// Whether gates are divided by their sum.
        renormalise: bool,
    },
    /// The experts that REAP keeps with `renormalise`; each other is merged into the most similar of them, weighted by REAP's sums (REAM).
    Ream,
    /// Clusters of random members with the sizes that [`Method::Uncurl`] finds. This control shows the effect of merging without
    /// similarity.
    RandomClusters,
}

/// The initial weights of the reduced router.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RouterInit {
    /// Random weights, as in UNCURL. Train the router alone first ([`train_routers`](super::train_routers)), since all gates start near
    /// 1/D.
    Random,
    /// The row of each cluster's anchor is kept.
    Keep,
    /// The mean of the rows of each cluster.
    ClusterMean,
    /// The linear router whose logits are closest, in least squares over the kept tokens, to the log-sum-exp of each cluster's logits. A
    /// cluster is then about as probable as its experts were together.
    LogSumExp,
}

/// The settings of a reduction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reduce {
    /// How many experts stay.
    pub keep: Keep,
    /// How they are chosen.
    pub method: Method,
    /// Whether hidden units are aligned before experts are averaged.
    pub align: bool,
    /// The initial weights of the router.
    pub router: RouterInit,
    /// Number of runs of k-means.
    pub restarts: usize,
    /// Seed of k-means, random clusters and random routers.
    pub seed: u64,
}

impl Reduce {
    /// UNCURL with a random router.
    pub fn new(keep: Keep) -> Reduce {
        Reduce { keep, method: Method::Uncurl, align: true, router: RouterInit::Random, restarts: 10, seed: 0 }
    }
    /// Makes the plan of a reduction. The model is not changed.
    ///
    /// Fails if the statistics are of another model, or if a layer would have fewer experts than each token is sent to, or more than it
    /// has.
    pub fn plan<M: SparseModel>(&self, model: &M, stats: &Statistics) -> Result<Plan> {
        let mixtures = model.mixtures();
        let counts = self.counts(&mixtures, stats)?;
        let mut layers = Vec::new();
        for (i, ((moe, stats), keep)) in mixtures.iter().zip(&stats.layers).zip(&counts).enumerate() {
            layers.push(match (moe, stats, keep) {
                (Some(moe), Some(stats), Some(keep)) => {
                    Some(self.layer(moe, stats, *keep, self.seed + 1000 * i as u64)?)
                }
                _ => None,
            });
        }
        Ok(Plan { reduce: self.clone(), layers })
    }
    /// The number of experts that are kept in each layer.
    fn counts(&self, mixtures: &[Option<&Moe>], stats: &Statistics) -> Result<Vec<Option<usize>>> {
        let bad = |message: String| Err(Error::invalid("Reduce::plan", message));
        let sizes = |i: usize| stats.layers.get(i).map(|l| l.as_ref().map(|l| l.experts));
        let fits = |(i, m): (usize, &Option<&Moe>)| sizes(i) == Some(m.map(|m| m.config().experts));
        if stats.layers.len() != mixtures.len() || !mixtures.iter().enumerate().all(fits) {
            return bad("the statistics are of a model with other layers or experts: observe this one".into());
        }
        let mut counts: Vec<Option<usize>> = match &self.keep {
            Keep::Same(n) => mixtures.iter().map(|m| m.map(|_| *n)).collect(),
            Keep::PerLayer(all) if all.len() == mixtures.len() => {
                all.iter().zip(mixtures).map(|(n, m)| m.and(*n)).collect()
            }
            Keep::PerLayer(all) => {
                return bad(format!("{} numbers of experts for {} layers", all.len(), mixtures.len()));
            }
        };
        if self.method == Method::MSmoe {
            // The most frequent experts of all layers are kept; loads are compared as shares of the layer's tokens.
            let mut all: Vec<(f64, usize)> = Vec::new();
            let mut left = 0;
            let mut chosen = vec![0usize; mixtures.len()];
            for (i, layer) in stats.layers.iter().enumerate() {
                let (Some(layer), Some(n), Some(moe)) = (layer, counts[i], mixtures[i]) else { continue };
                let mut load: Vec<f64> = layer.load.iter().map(|l| l / layer.tokens as f64).collect();
                load.sort_by(|a, b| b.total_cmp(a));
                // Every layer keeps at least the number of experts that a token is sent to.
                let least = moe.config().top_k.min(load.len());
                chosen[i] = least;
                left += n.saturating_sub(least);
                all.extend(load[least..].iter().map(|l| (*l, i)));
            }
            all.sort_by(|a, b| b.0.total_cmp(&a.0));
            all.iter().take(left).for_each(|(_, i)| chosen[*i] += 1);
            counts.iter_mut().zip(chosen).for_each(|(c, n)| *c = c.map(|_| n));
        }
        for (i, (n, moe)) in counts.iter().zip(mixtures).enumerate() {
            let (Some(n), Some(moe)) = (n, moe) else { continue };
            let c = moe.config();
            if *n < c.top_k || *n > c.experts {
                return bad(format!(
                    "layer {i} cannot keep {n} experts: it has {}, and each token goes to {}",
                    c.experts, c.top_k
                ));
            }
        }
        Ok(counts)
    }
    fn layer(&self, moe: &Moe, stats: &LayerStatistics, keep: usize, seed: u64) -> Result<LayerPlan> {
        let similarity = stats.similarity();
        let mean = |sums: &[f64]| -> Vec<f64> { sums.iter().zip(&stats.load).map(|(s, l)| s / l.max(1.0)).collect() };
        let spectral = || spectral(&similarity, stats.experts, keep, self.restarts, seed);
        let (anchors, clusters, scores) = match self.method {
            Method::Uncurl => clustered(&spectral()?, &stats.load),
            Method::RandomClusters => {
                let mut of = spectral()?;
                Rng::new(seed).shuffle(&mut of);
                clustered(&numbered(&of), &stats.load)
            }
            Method::Greedy => dropped(most(&stats.load, keep), &stats.load),
            Method::Reap { renormalise } => {
                let sums = if renormalise { &stats.saliency_renormalised } else { &stats.saliency };
                dropped(most(&mean(sums), keep), &stats.load)
            }
            Method::AnchorMerge | Method::MSmoe => nearest(most(&stats.load, keep), &similarity, &stats.load),
            Method::Ream => {
                nearest(most(&mean(&stats.saliency_renormalised), keep), &similarity, &stats.saliency_renormalised)
            }
        };
        let mut weights = vec![0.0; stats.experts];
        for members in &clusters {
            let sum: f64 = members.iter().map(|&e| scores[e]).sum();
            for &e in members {
                // Experts without a token are averaged with equal weights.
                weights[e] = if sum > 0.0 { scores[e] / sum } else { 1.0 / members.len() as f64 };
            }
        }
        let mut permutations = vec![None; stats.experts];
        for (members, &anchor) in clusters.iter().zip(&anchors) {
            for &e in members.iter().filter(|&&e| self.align && e != anchor && weights[e] > 0.0) {
                permutations[e] = Some(alignment(moe, anchor, e)?);
            }
        }
        let rows = router::initial(moe, stats, &clusters, &anchors, (self.router, seed))?;
        Ok(LayerPlan { clusters, anchors, weights, permutations, router: rows })
    }
}

type Choice<'a> = (Vec<usize>, Vec<Vec<usize>>, &'a [f64]);

/// The numbers of the `n` largest scores, in ascending order. Of equal scores the lower number is chosen.
fn most(scores: &[f64], n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    order.truncate(n);
    order.sort_unstable();
    order
}

/// Clusters from the cluster of each expert, with the member of the largest load as anchor.
fn clustered<'a>(of: &[usize], load: &'a [f64]) -> Choice<'a> {
    let count = of.iter().max().map_or(0, |m| m + 1);
    let clusters: Vec<Vec<usize>> = (0..count).map(|c| (0..of.len()).filter(|&e| of[e] == c).collect()).collect();
    let first = |m: &Vec<usize>| m.iter().copied().reduce(|a, b| if load[b] > load[a] { b } else { a }).unwrap_or(0);
    (clusters.iter().map(first).collect(), clusters, load)
}

/// Clusters of one kept expert each.
fn dropped(kept: Vec<usize>, load: &[f64]) -> Choice<'_> {
    let clusters = kept.iter().map(|&e| vec![e]).collect();
    (kept, clusters, load)
}

/// Clusters around the kept experts, to which each other expert is added by similarity.
fn nearest<'a>(kept: Vec<usize>, similarity: &[f64], scores: &'a [f64]) -> Choice<'a> {
    let n = scores.len();
    let mut clusters: Vec<Vec<usize>> = kept.iter().map(|&e| vec![e]).collect();
    for e in (0..n).filter(|e| !kept.contains(e)) {
        let near = |c: usize| similarity[e * n + kept[c]];
        let best = (0..kept.len()).reduce(|a, b| if near(b) > near(a) { b } else { a });
        if let Some(c) = best {
            clusters[c].push(e);
        }
    }
    (kept, clusters, scores)
}
