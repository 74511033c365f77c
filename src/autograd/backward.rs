//! The backward pass.
//!
//! Nodes are visited by descending creation order, from a heap, without recursion. A node's gradient is complete when it is popped, because
//! everything computed from the node was created later. A parameter's gradient is delivered as soon as its last use has returned its
//! factor: exactly once each, in an order that depends only on the graph.

use super::owner::Following;
use super::rule::{Cotangents, Rule};
use super::tensor::Node;
use super::{Mixing, Owner, Param, ParamGrad, Tensor};
use crate::array::Array;
use crate::base::{Error, Result};
use crate::device::spans;
use smallvec::SmallVec;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::sync::Arc;

/// Receives gradients in delivery order. Research code can implement it to process gradients during the backward pass; closures
/// `FnMut(&Param, ParamGrad) -> Result<()>` are hooks.
pub trait GradHook {
    /// A parameter's gradient, summed over all uses, still factored. Called once per parameter reached.
    fn param(&mut self, param: &Param, grad: ParamGrad) -> Result<()>;
    /// The gradient of a leaf tensor, by its id.
    fn leaf(&mut self, _id: u64, _grad: Array) {}
    /// Whether samples are to be followed from their losses, for [`GradHook::mixing`].
    fn follows_samples(&self) -> bool {
        false
    }
    /// Called if an operation mixes samples, before the gradients that come from it. An error ends the backward pass.
    fn mixing(&mut self, _found: Mixing) -> Result<()> {
        Ok(())
    }
    /// The owners of the elements of a leaf tensor, by its id, if every operation on the way declared them.
    fn whose(&mut self, _leaf: u64, _owner: &Owner) {}
    /// Called after each operation of the backward pass, so that memory or time can be monitored.
    fn visited(&mut self) {}
}

impl<F: FnMut(&Param, ParamGrad) -> Result<()>> GradHook for F {
    fn param(&mut self, param: &Param, grad: ParamGrad) -> Result<()> {
        self(param, grad)
    }
}

/// All results of a backward pass: leaf gradients, and factored parameter gradients in delivery order.
#[derive(Default)]
pub struct Gradients {
    leaves: HashMap<u64, Array>,
    params: Vec<ParamGrad>,
    index: HashMap<u64, usize>,
}

impl Gradients {
    /// Gradient of a leaf tensor, if it was reached.
    pub fn of(&self, leaf: &Tensor) -> Option<&Array> {
        self.leaves.get(&leaf.node()?.id)
    }
    /// Factored gradient of a parameter, if it was reached.
    pub fn param(&self, param: &Param) -> Option<&ParamGrad> {
        self.index.get(&param.id()).map(|&i| &self.params[i])
    }
    /// All parameter gradients, in delivery order.
    pub fn params(&self) -> &[ParamGrad] {
        &self.params
    }
}

impl GradHook for Gradients {
    fn param(&mut self, param: &Param, grad: ParamGrad) -> Result<()> {
        self.index.insert(param.id(), self.params.len());
        self.params.push(grad);
        Ok(())
    }
    fn leaf(&mut self, id: u64, grad: Array) {
        self.leaves.insert(id, grad);
    }
}

impl Tensor {
    /// Gradients of the sum of this tensor's elements. For a vector of losses, one per sample, that is each sample's gradient of its own
    /// loss. The history is freed during the pass.
    pub fn backward(&self) -> Result<Gradients> {
        let mut all = Gradients::default();
        self.backward_into(&mut all)?;
        Ok(all)
    }
    /// As [`Tensor::backward`], but passes each gradient to `hook` as soon as it is complete.
    pub fn backward_into(&self, hook: &mut dyn GradHook) -> Result<()> {
        self.backward_from(Array::full(self.shape(), 1.0, (self.dtype(), &self.device())), false, hook)
    }
    /// As [`Tensor::backward_into`], but starts from `seed` (the gradient of this tensor, with its shape and dtype), and retains the graph
    /// for another pass if `keep`.
    pub fn backward_from(&self, seed: Array, keep: bool, hook: &mut dyn GradHook) -> Result<()> {
        if seed.shape() != self.shape() || seed.dtype() != self.dtype() {
            return Err(Error::shape(
                "backward",
                format!(
                    "the seed is {:?} {}, the tensor {:?} {}",
                    seed.shape(),
                    seed.dtype(),
                    self.shape(),
                    self.dtype()
                ),
            ));
        }
        let Some(root) = self.node() else {
            return Err(Error::autograd(
                "backward",
                "this tensor has no history: nothing trainable went into it, or it was made inside no_grad",
            ));
        };
        let count = self.shape().first().copied().unwrap_or(1);
        walk(root, seed, count, keep, hook)
    }
}

/// Heap entry: the youngest node first.
struct ById(Arc<Node>);
impl PartialEq for ById {
    fn eq(&self, o: &Self) -> bool {
        self.0.id == o.0.id
    }
}
impl Eq for ById {}
impl PartialOrd for ById {
    fn partial_cmp(&self, o: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(o))
    }
}
impl Ord for ById {
    fn cmp(&self, o: &Self) -> std::cmp::Ordering {
        self.0.id.cmp(&o.0.id)
    }
}

fn walk(root: &Arc<Node>, seed: Array, samples: usize, keep: bool, hook: &mut dyn GradHook) -> Result<()> {
    let mut uses = count_uses(root);
    let mut pending: HashMap<u64, ParamGrad> = HashMap::new();
    let mut grads: HashMap<u64, Array> = HashMap::from([(root.id, seed)]);
    let mut heap = BinaryHeap::from([ById(root.clone())]);
    let mut queued = HashSet::from([root.id]);
    let follow = hook.follows_samples() && samples > 1 && root.shape.len() == 1;
    let mut following = follow.then(|| Following::from(root.id, samples));
    while let Some(ById(node)) = heap.pop() {
        // A custom rule may have returned the gradient on another device.
        let grad = grads.remove(&node.id).map(|g| g.to(&node.device)).transpose()?;
        queued.remove(&node.id);
        if node.leaf {
            if let Some(following) = &mut following {
                let owner = following.take(node.id);
                hook.whose(node.id, if following.complete { &owner } else { &Owner::Unknown });
            }
            if let Some(g) = grad {
                hook.leaf(node.id, g);
            }
            continue;
        }
        let rule = {
            let mut slot = node.rule.lock().unwrap_or_else(|e| e.into_inner());
            if keep { slot.clone() } else { slot.take() }
        };
        let Some(rule) = rule else {
            return Err(Error::autograd(
                "backward",
                "this history was already used and freed; run the forward pass again, or keep it with backward_from(.., true, ..)",
            ));
        };
        let wanted: SmallVec<[bool; 3]> = node.parents.iter().map(|p| p.is_some()).collect();
        let mut back = Cotangents::new(wanted);
        // A node that was reached only through inputs without a gradient passes none on.
        if let Some(g) = grad {
            let name = rule.info().name;
            let _op = spans::span(spans::Kind::Backward, name);
            rule.backward(g, &mut back)?;
            if let Some(following) = &mut following {
                follow_samples(&node, &*rule, &back, following, hook)?;
            }
            drop(rule);
            for (i, parent) in node.parents.iter().enumerate() {
                let Some(parent) = parent else { continue };
                match back.inputs[i].take() {
                    Some(g) => match grads.entry(parent.id) {
                        std::collections::hash_map::Entry::Vacant(e) => {
                            e.insert(g);
                        }
                        std::collections::hash_map::Entry::Occupied(mut e) => e.get_mut().add_in_place(&g)?,
                    },
                    None => {
                        return Err(Error::autograd(
                            name,
                            format!("the backward rule gave no gradient for input {i}, which needs one"),
                        ));
                    }
                }
            }
        }
        for parent in node.parents.iter().flatten() {
            if queued.insert(parent.id) {
                heap.push(ById(parent.clone()));
            }
        }
        for (param, factor) in back.factors {
            pending.entry(param.id()).or_insert_with(|| ParamGrad::new(param.clone(), samples)).push(factor)?;
        }
        for param in &node.params {
            let left = uses.entry(param.id()).or_insert(1);
            *left -= 1;
            if *left == 0 {
                let grad = pending.remove(&param.id()).unwrap_or_else(|| ParamGrad::new(param.clone(), samples));
                hook.param(param, grad)?;
            }
        }
        hook.visited();
    }
    Ok(())
}

/// Gets the owners of a node's inputs from its rule, and compares them with those of their other uses and of its factors.
fn follow_samples(
    node: &Node,
    rule: &dyn Rule,
    back: &Cotangents,
    following: &mut Following,
    hook: &mut dyn GradHook,
) -> Result<()> {
    let owner = following.take(node.id);
    let history: SmallVec<[bool; 3]> = node.parents.iter().map(Option::is_some).collect();
    let whose = following.whose(&owner, &node.shape, &history);
    if !whose.is_followed() {
        following.complete = false;
        return Ok(());
    }
    let name = rule.info().name;
    let owners = rule.owners(&whose);
    for (i, parent) in node.parents.iter().enumerate() {
        let owner = owners.get(i).cloned().unwrap_or(Owner::Unknown);
        if let Some(parent) = parent
            && let Some((op, place)) = following.ask((name, node), parent, owner)
        {
            hook.mixing(Mixing { op, place, param: None })?;
        }
    }
    for (param, factor) in &back.factors {
        if !whose.fits(factor) {
            hook.mixing(Mixing { op: name, place: node.place, param: Some(param.name().to_string()) })?;
        }
    }
    Ok(())
}

/// The number of uses of each parameter in the history.
fn count_uses(root: &Arc<Node>) -> HashMap<u64, usize> {
    let mut uses = HashMap::new();
    let mut seen = HashSet::from([root.id]);
    let mut todo = vec![root.clone()];
    while let Some(node) = todo.pop() {
        node.params.iter().for_each(|p| *uses.entry(p.id()).or_insert(0) += 1);
        todo.extend(node.parents.iter().flatten().filter(|p| seen.insert(p.id)).cloned());
    }
    uses
}
