//! A reduction of experts as data.

use super::align::{merged, parts};
use super::{Reduce, SparseModel};
use crate::array::Array;
use crate::base::{Error, Result};
use crate::io;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The new experts of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerPlan {
    /// The experts that are merged into each new expert. Experts in no cluster are dropped.
    pub clusters: Vec<Vec<usize>>,
    /// For each cluster, the expert to whose hidden units the others are aligned.
    pub anchors: Vec<usize>,
    /// The weight of each old expert in its new one. The weights of a cluster add up to 1.
    pub weights: Vec<f64>,
    /// For each old expert, the order of its hidden units in the new one; unchanged if absent.
    pub permutations: Vec<Option<Vec<u32>>>,
    /// The new router, with a row for each cluster.
    pub router: Vec<Vec<f64>>,
}

/// A reduction that can be inspected, saved beside a model, and applied.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The settings that it was made with.
    pub reduce: Reduce,
    /// The plan of each layer; `None` where nothing changes.
    pub layers: Vec<Option<LayerPlan>>,
}

impl Plan {
    /// The reduced model. The old model is not changed, and parameters outside the plan's layers are copied.
    ///
    /// Fails if the plan was made for another model.
    pub fn apply<M: SparseModel>(&self, model: &M) -> Result<M> {
        let old = model.mixtures();
        self.fits(&old)?;
        let counts: Vec<Option<usize>> = self
            .layers
            .iter()
            .zip(&old)
            .map(|(plan, moe)| plan.as_ref().map(|p| p.clusters.len()).or(moe.map(|m| m.config().experts)))
            .collect();
        let small = model.resized(&counts)?;
        let new = small.mixtures();
        let mut changed = Vec::new();
        for ((plan, old), new) in self.layers.iter().zip(&old).zip(&new) {
            let (Some(plan), Some(old), Some(new)) = (plan, old, new) else { continue };
            for ((from, dim), (to, _)) in parts(old)?.into_iter().zip(parts(new)?) {
                let mut all = Vec::with_capacity(to.numel());
                for members in &plan.clusters {
                    let member = |&e: &usize| (e, plan.weights[e], plan.permutations[e].as_deref());
                    all.extend(merged(&from, dim, &members.iter().map(member).collect::<Vec<_>>())?);
                }
                changed.push((to.clone(), all));
            }
            let router: Vec<f64> = plan.router.iter().flatten().copied().collect();
            changed.push((new.router().weight().clone(), router));
            // A new expert has the bias of its anchor, whose load it takes over.
            if let (Some(from), Some(to)) = (old.params().get("balance_bias"), new.params().get("balance_bias")) {
                let bias = from.value().to_f64();
                changed.push((to, plan.anchors.iter().map(|&a| bias[a]).collect()));
            }
        }
        for to in small.store().all() {
            let value = match changed.iter().find(|(p, _)| p.id() == to.id()) {
                Some((_, values)) => Array::from_slice(values, to.shape())?.cast(to.dtype()),
                None => match model.store().get(to.name()).filter(|p| p.shape() == to.shape()) {
                    Some(from) => from.value().copy().cast(to.dtype()),
                    None => {
                        return Err(Error::invalid(
                            "Plan::apply",
                            format!("the model has no {} of this size", to.name()),
                        ));
                    }
                },
            };
            to.set(value.to(&to.device())?)?;
        }
        Ok(small)
    }
    /// Refuses a plan that was made for another model or is not consistent.
    fn fits(&self, mixtures: &[Option<&crate::nn::Moe>]) -> Result<()> {
        let bad = |message: String| Err(Error::invalid("Plan::apply", message));
        if self.layers.len() != mixtures.len() {
            return bad(format!("a plan of {} layers for a model of {}", self.layers.len(), mixtures.len()));
        }
        for (i, (plan, moe)) in self.layers.iter().zip(mixtures).enumerate() {
            let Some(plan) = plan else { continue };
            let Some(moe) = moe else { return bad(format!("layer {i} has no experts")) };
            let (e, h) = (moe.config().experts, moe.config().hidden);
            let d = moe.router().weight().shape()[1];
            if plan.weights.len() != e || plan.permutations.len() != e {
                return bad(format!("the plan is of {} experts in layer {i}, which has {e}", plan.weights.len()));
            }
            let n = plan.clusters.len();
            let members = plan.clusters.iter().flatten().chain(&plan.anchors);
            let wrong = plan.clusters.iter().any(Vec::is_empty)
                || members.copied().any(|m| m >= e)
                || plan.anchors.len() != n
                || plan.router.len() != n
                || plan.router.iter().any(|r| r.len() != d)
                || plan.weights.iter().chain(plan.router.iter().flatten()).any(|w| !w.is_finite());
            let order = |p: &Vec<u32>| {
                let mut seen = vec![false; h];
                p.len() == h && p.iter().all(|&u| seen.get_mut(u as usize).is_some_and(|s| !std::mem::replace(s, true)))
            };
            if wrong || !plan.permutations.iter().flatten().all(order) {
                return bad(format!(
                    "the plan of layer {i} is none of {e} experts with {h} hidden units and width {d}"
                ));
            }
        }
        Ok(())
    }
    /// Writes the plan as JSON.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        io::write_json(path.as_ref(), self)
    }
    /// Reads a plan that [`Plan::save`] wrote.
    pub fn load(path: impl AsRef<Path>) -> Result<Plan> {
        io::read_json(path.as_ref())
    }
}
