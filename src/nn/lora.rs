//! Low-rank adapters (Hu et al. 2022): y = W·x + (α/r)·B·A·x with W frozen.
//!
//! A and B are two linear layers, so that their gradients stay factored and private training clips them like any others. B starts at zero,
//! so an adapter that has not been trained changes nothing.

use super::{Ctx, Init, Params};
use crate::array::Array;
use crate::base::{Error, Result};
use crate::kernels::Activation;
use crate::ops::linear::{Layout, linear};
use crate::{Param, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// Rank, scale and targets of adapters; serialised as PEFT's `adapter_config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoraConfig {
    /// Always `LORA`.
    pub peft_type: String,
    /// Rank.
    pub r: usize,
    /// α; the adapter's output is scaled by α/r.
    pub lora_alpha: f64,
    /// The last parts of the names of the layers that get an adapter, such as `c_attn`.
    pub target_modules: Vec<String>,
    /// Whether weights are stored as `[in, out]`, as GPT-2's are.
    pub fan_in_fan_out: bool,
    /// Always `none`: biases stay frozen.
    pub bias: String,
    /// Always `CAUSAL_LM`.
    pub task_type: String,
    /// Other settings that PEFT wrote. Settings that would change the numbers are refused by [`LoraConfig::validate`]; the others are kept.
    #[serde(flatten)]
    pub other: BTreeMap<String, Value>,
}

impl LoraConfig {
    /// Adapters of rank r and scale α/r on the layers with these names.
    pub fn new(r: usize, alpha: f64, targets: &[&str]) -> LoraConfig {
        LoraConfig {
            peft_type: "LORA".into(),
            r,
            lora_alpha: alpha,
            target_modules: targets.iter().map(|t| t.to_string()).collect(),
            fan_in_fan_out: true,
            bias: "none".into(),
            task_type: "CAUSAL_LM".into(),
            other: BTreeMap::new(),
        }
    }
    /// Fails for a rank of 0, an α that is not finite, a kind that is not `LORA`, and options of PEFT that would change the numbers.
    pub fn validate(&self) -> Result<()> {
        let bad = |message: String| Err(Error::invalid("LoRA", message));
        if self.bias != "none" {
            return bad(format!("bias {:?}; adapters leave biases frozen (\"none\")", self.bias));
        }
        for name in [
            "alpha_pattern",
            "rank_pattern",
            "modules_to_save",
            "use_rslora",
            "use_dora",
            "layers_to_transform",
            "layers_pattern",
            "exclude_modules",
            "lora_bias",
            "target_parameters",
            "trainable_token_indices",
            "layer_replication",
            "eva_config",
            "corda_config",
            "loftq_config",
            "megatron_config",
            "qalora_group_size",
            "use_qalora",
            "alora_invocation_tokens",
            "arrow_config",
            "ensure_weight_tying",
        ] {
            let usual = |v: &Value| match v {
                Value::Null | Value::Bool(false) => true,
                Value::Object(o) => o.is_empty(),
                Value::Array(a) => a.is_empty(),
                // Settings that have an effect only where another option is on.
                Value::Number(_) => name == "qalora_group_size",
                _ => false,
            };
            if let Some(v) = self.other.get(name).filter(|v| !usual(v)) {
                return bad(format!(
                    "the adapter's {name} is {v}, which is not there; merge it with PEFT first, or train without it"
                ));
            }
        }
        if self.r == 0 || !self.lora_alpha.is_finite() || self.peft_type != "LORA" {
            let what = format!("{} of rank {} and α {}", self.peft_type, self.r, self.lora_alpha);
            return Err(Error::invalid(
                "LoRA",
                format!("{what}; a LORA adapter must have a rank of 1 or more and a finite α"),
            ));
        }
        Ok(())
    }
}

/// The adapter of one layer.
pub(super) struct Lora {
    a: Param,
    b: Param,
    scale: f64,
    /// The original weight, while the adapter is merged into it.
    before: Option<Array>,
}

impl Lora {
    /// For a layer d → p whose parameters are called `layer.weight`, …
    pub fn new(params: &Params, layer: &str, (d, p): (usize, usize), c: &LoraConfig) -> Result<Lora> {
        c.validate()?;
        let part = |name: &str, shape: [usize; 2], init| params.at(layer).at(name).param("weight", &shape, init);
        Ok(Lora {
            a: part("lora_A", [c.r, d], Init::KaimingUniform)?,
            b: part("lora_B", [p, c.r], Init::Zeros)?,
            scale: c.lora_alpha / c.r as f64,
            before: None,
        })
    }
    /// The term that is added to W·x; `None` while the adapter is merged.
    pub fn forward(&self, x: &Tensor, ctx: &Ctx) -> Result<Option<Tensor>> {
        if self.before.is_some() {
            return Ok(None);
        }
        let through = |x: &Tensor, w: &Param| linear(x, w, Layout::OutIn, None, Activation::None, ctx.samples.as_ref());
        through(&through(x, &self.a)?, &self.b)?.mul_scalar(self.scale).map(Some)
    }
    /// Adds (α/r)·B·A to the weight, at most once.
    pub fn merge(&mut self, weight: &Param, layout: Layout) -> Result<()> {
        if self.before.is_some() {
            return Ok(());
        }
        let value = |p: &Param| Tensor::new(p.value());
        let delta = value(&self.b).matmul(&value(&self.a))?.mul_scalar(self.scale)?;
        let delta = if layout == Layout::InOut { delta.transpose(0, 1)? } else { delta };
        let before = weight.value().copy();
        weight.set(Tensor::new(before.clone()).add(&delta)?.array().contiguous())?;
        self.before = Some(before);
        weight.set_merged(true);
        Ok(())
    }
    /// Restores the weight with its former bits.
    pub fn unmerge(&mut self, weight: &Param) -> Result<()> {
        if let Some(before) = &self.before {
            weight.set(before.to(&weight.device())?)?;
            self.before = None;
            weight.set_merged(false);
        }
        Ok(())
    }
    /// Whether the adapter has been added to the weight.
    pub fn merged(&self) -> bool {
        self.before.is_some()
    }
}

/// The activation as an op of its own.
pub(super) fn activate(x: &Tensor, act: Activation) -> Result<Tensor> {
    match act {
        Activation::None => Ok(x.clone()),
        Activation::Relu => x.relu(),
        Activation::Gelu => x.gelu(),
        Activation::GeluTanh => x.gelu_tanh(),
        Activation::Silu => x.silu(),
        Activation::Tanh => x.tanh(),
    }
}
