//! The experts, as stacked matrices with one for each expert.

use super::MoeConfig;
use crate::base::Result;
use crate::kernels::Activation;
use crate::nn::{Init, Params};
use crate::ops::grouped::{Grouped, grouped_linear};
use crate::ops::linear::Layout;
use crate::ops::route::Routing;
use crate::{Param, Samples, Tensor};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// The network that each expert is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExpertKind {
    /// Two matrices with biases and an activation between, as in [`Mlp`](crate::nn::Mlp).
    Mlp(Activation),
    /// Three matrices without biases, as in [`SwiGlu`](crate::nn::SwiGlu).
    SwiGlu,
}

impl Default for ExpertKind {
    /// Two matrices with GELU between.
    fn default() -> ExpertKind {
        ExpertKind::Mlp(Activation::Gelu)
    }
}

impl ExpertKind {
    /// The number of parameters of one expert from d to d.
    pub(super) fn params(self, d: usize, hidden: usize) -> usize {
        match self {
            ExpertKind::Mlp(_) => 2 * d * hidden + hidden + d,
            ExpertKind::SwiGlu => 3 * d * hidden,
        }
    }
}

/// A matrix for each expert, and a bias.
pub(super) struct Stack {
    weight: Param,
    bias: Option<Param>,
    layout: Layout,
}

impl Stack {
    /// Makes `experts` matrices from d to p, laid out and named as in a layer of this kind of expert.
    fn new(params: &Params, kind: ExpertKind, (experts, d, p): (usize, usize, usize), init: Init) -> Result<Stack> {
        let swiglu = kind == ExpertKind::SwiGlu;
        let (layout, shape) = if swiglu { (Layout::OutIn, [experts, p, d]) } else { (Layout::InOut, [experts, d, p]) };
        let weight = params.param_with_fan_in("weight", &shape, init, d)?;
        let bias = if swiglu { None } else { Some(params.param("bias", &[experts, p], Init::Zeros)?) };
        Ok(Stack { weight, bias, layout })
    }
    /// Keeps only the experts in the range, as a parameter of this rank.
    fn place(&mut self, params: &Params, own: &Range<usize>) -> Result<()> {
        let part = |p: &Param| {
            let new = Param::new(p.name(), p.value().slice(0, own.clone())?.copy());
            new.set_trainable(p.trainable());
            new.set_placed(true);
            params.swap(&new)?;
            Ok(new)
        };
        self.weight = part(&self.weight)?;
        self.bias = self.bias.as_ref().map(part).transpose()?;
        Ok(())
    }
    fn forward<'a>(
        &self,
        x: &Tensor,
        act: Activation,
        rows: impl Into<Grouped<'a>>,
        samples: &Samples,
    ) -> Result<Tensor> {
        grouped_linear(x, &self.weight, self.layout, self.bias.as_ref(), act, rows, samples)
    }
}

/// All experts of a layer.
pub(super) enum Experts {
    Mlp { fc: Stack, proj: Stack, act: Activation },
    SwiGlu { gate: Stack, up: Stack, down: Stack },
}

impl Experts {
    pub(super) fn new(params: &Params, d: usize, c: &MoeConfig, (init, init_out): (Init, Init)) -> Result<Experts> {
        let stack = |name: &str, from, to, init| Stack::new(&params.at(name), c.expert, (c.experts, from, to), init);
        let h = c.hidden;
        Ok(match c.expert {
            ExpertKind::Mlp(act) => {
                Experts::Mlp { fc: stack("c_fc", d, h, init)?, proj: stack("c_proj", h, d, init_out)?, act }
            }
            ExpertKind::SwiGlu => Experts::SwiGlu {
                gate: stack("gate_proj", d, h, init)?,
                up: stack("up_proj", d, h, init)?,
                down: stack("down_proj", h, d, init_out)?,
            },
        })
    }
    /// Keeps only the experts in the range.
    pub(super) fn place(&mut self, params: &Params, own: &Range<usize>) -> Result<()> {
        match self {
            Experts::Mlp { fc, proj, .. } => [fc, proj].into_iter().try_for_each(|s| s.place(params, own)),
            Experts::SwiGlu { gate, up, down } => [gate, up, down].into_iter().try_for_each(|s| s.place(params, own)),
        }
    }
    /// `[T, d]` → a row for each choice, `[T·k, d]`, sorted by expert. `samples` maps the input rows to samples.
    pub(super) fn forward(&self, x: &Tensor, routing: &Routing, samples: &Samples) -> Result<Tensor> {
        self.run(x, routing.into(), routing.groups().into(), samples)
    }
    /// Runs the experts. `first` describes the product of the input's rows, `then` that of the hidden rows, which are already sorted by
    /// expert.
    fn run(&self, x: &Tensor, first: Grouped, then: Grouped, samples: &Samples) -> Result<Tensor> {
        match self {
            Experts::Mlp { fc, proj, act } => {
                proj.forward(&fc.forward(x, *act, first, samples)?, Activation::None, then, samples)
            }
            Experts::SwiGlu { gate, up, down } => {
                let g = gate.forward(x, Activation::Silu, first, samples)?;
                let u = up.forward(x, Activation::None, first, samples)?;
                down.forward(&g.mul(&u)?, Activation::None, then, samples)
            }
        }
    }
}
