//! Recipes for merging files, and mergekit's form of them.

use crate::base::{DType, Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::PathBuf;

/// How files are merged. Names and defaults are mergekit's (Goddard et al. 2024).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Σ wᵢ·Θᵢ, divided by Σ wᵢ unless `normalise` is off: a soup (Wortsman et al. 2022).
    Linear,
    /// Θ + λ·Σ wᵢ·dᵢ (Ilharco et al. 2023).
    TaskArithmetic,
    /// TIES (Yadav et al. 2023): the entries of largest magnitude of each dᵢ are kept, and of these the ones whose sign is that of the
    /// weighted sum are added. The sum is divided by the sum of their weights unless `normalise` is off. Of a tensor with n entries
    /// ⌊density·n⌋ are kept. This may be none of a small tensor, where mergekit stops.
    Ties,
    /// Entries of each dᵢ are drawn at random and added as in task arithmetic (DARE, Yu et al. 2024).
    DareLinear,
    /// Entries of each dᵢ are drawn at random and added with elected signs as in TIES.
    DareTies,
}

const METHODS: [(&str, Method); 5] = [
    ("linear", Method::Linear),
    ("task_arithmetic", Method::TaskArithmetic),
    ("ties", Method::Ties),
    ("dare_linear", Method::DareLinear),
    ("dare_ties", Method::DareTies),
];

impl Method {
    /// The method of this name.
    ///
    /// # Errors
    /// If there is no method of this name. The error lists the names.
    pub fn named(name: &str) -> Result<Method> {
        let known = METHODS.map(|m| m.0).join(", ");
        METHODS
            .iter()
            .find(|m| m.0 == name)
            .map(|m| m.1)
            .ok_or_else(|| invalid(format!("the method '{name}' is not one of those here, which are {known}")))
    }
    /// The method's name.
    pub fn name(self) -> &'static str {
        METHODS.iter().find(|m| m.1 == self).map_or("", |m| m.0)
    }
    /// Whether weights are divided by their sum by default.
    pub fn normalises(self) -> bool {
        matches!(self, Method::Linear | Method::Ties)
    }
    /// How the entries that are kept are rescaled by default.
    pub fn rescales(self) -> Rescale {
        if self.draws() { Rescale::Norm } else { Rescale::No }
    }
    /// Whether entries are left out by their magnitude.
    pub(super) fn trims(self) -> bool {
        self == Method::Ties
    }
    /// Whether entries are left out at random.
    pub(super) fn draws(self) -> bool {
        matches!(self, Method::DareLinear | Method::DareTies)
    }
    /// Whether a sign is elected for each element.
    pub(super) fn elects(self) -> bool {
        matches!(self, Method::Ties | Method::DareTies)
    }
}

/// How the entries of a vector that are kept are rescaled when others are left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rescale {
    /// They stay as they are.
    No,
    /// They are multiplied so that the tensor's sum of magnitudes stays the same, as in mergekit with `rescale: true`.
    Norm,
    /// They are divided by the density, as in the paper on DARE. In expectation both are the same.
    Density,
}

/// One of the models that are merged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// A safetensors file, or a folder with `model.safetensors` or with several files and their index.
    pub path: PathBuf,
    /// Its weight.
    pub weight: f64,
    /// The share of its entries that is kept, in (0, 1], by methods that leave some out.
    pub density: f64,
}

/// The settings of [`merge_files`](super::merge_files).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// The method.
    pub method: Method,
    /// The model from which all others were tuned. [`Method::Linear`] needs none.
    pub base: Option<PathBuf>,
    /// The models.
    pub models: Vec<Model>,
    /// Whether weights are divided by their sum.
    pub normalise: bool,
    /// How the entries that are kept are rescaled.
    pub rescale: Rescale,
    /// Factor of the sum that is added to the base.
    pub lambda: f64,
    /// Element type of the result's float tensors (f32, bf16 or f16). If not given, it is that of the base, or of the first model if there
    /// is no base.
    pub dtype: Option<DType>,
    /// Seed of the entries that are drawn.
    pub seed: u64,
}

fn invalid(message: impl Into<String>) -> Error {
    Error::invalid("merge", message)
}

impl Recipe {
    /// A recipe with the method's defaults.
    pub fn new(method: Method, base: Option<PathBuf>, models: Vec<Model>) -> Recipe {
        let (normalise, rescale) = (method.normalises(), method.rescales());
        Recipe { method, base, models, normalise, rescale, lambda: 1.0, dtype: None, seed: 0 }
    }

    /// The model from which the result takes its names, files, configuration and tokenizer.
    pub(super) fn reference(&self) -> Result<&PathBuf> {
        let first = self.base.as_ref().or(self.models.first().map(|m| &m.path));
        first.ok_or_else(|| invalid("no models are given"))
    }

    fn expect_base(&self) -> Result<()> {
        match self.base.is_none() && self.method != Method::Linear {
            false => Ok(()),
            true => Err(invalid(format!("{} needs the base that the models were tuned from", self.method.name()))),
        }
    }

    /// Fails if the settings do not fit together.
    pub(super) fn check(&self) -> Result<()> {
        let method = self.method.name();
        if self.models.is_empty() {
            return Err(invalid("no models are given"));
        }
        self.expect_base()?;
        for m in &self.models {
            let (path, weight, density) = (m.path.display(), m.weight, m.density);
            if !weight.is_finite() {
                return Err(invalid(format!("the weight {weight} of {path}: it must be finite")));
            }
            if !(density > 0.0 && density <= 1.0) {
                return Err(invalid(format!("the density {density} of {path}: it lies in (0, 1]")));
            }
            if density != 1.0 && !self.method.trims() && !self.method.draws() {
                return Err(invalid(format!("{method} leaves nothing out, and {path} has the density {density}")));
            }
        }
        let sum: f64 = self.models.iter().map(|m| m.weight).sum();
        if self.method == Method::Linear && self.normalise && sum == 0.0 {
            return Err(invalid("the weights add up to 0, and are to be divided by their sum"));
        }
        if !self.lambda.is_finite() || (self.method == Method::Linear && self.lambda != 1.0) {
            let message = format!("λ = {} with {method}: it is finite, and there is none for linear", self.lambda);
            return Err(invalid(message));
        }
        match self.dtype {
            None | Some(DType::F32 | DType::BF16 | DType::F16) => Ok(()),
            Some(other) => Err(invalid(format!("the result cannot be {other}: it is f32, bf16 or f16"))),
        }
    }

    /// Reads a recipe in mergekit's form, from YAML or JSON that has been parsed: `merge_method`, `base_model`, `models` with `model` and
    /// `parameters` (`weight`, `density`) each, `parameters` (`normalize`, `lambda`, `rescale`, and `weight` and `density` for models
    /// without their own), `dtype` and `out_dtype`. An entry of `models` that is the base is skipped, as in mergekit, except in a linear
    /// merge. `int8_mask` has no effect here.
    ///
    /// mergekit computes in the element type `dtype`, which is also that of its result. Here it is only that of the result, and sums are
    /// always taken in f64.
    ///
    /// # Errors
    /// If the recipe has something that is not supported, which the error names: other methods, `slices`, `modules`, changes of the
    /// tokenizer, or values that depend on the layer or the tensor.
    pub fn from_mergekit(config: &Value) -> Result<Recipe> {
        let all = config.as_object().ok_or_else(|| invalid("the configuration is no mapping with names and values"))?;
        for (key, value) in all {
            let why = match key.as_str() {
                "merge_method" | "base_model" | "models" | "parameters" | "dtype" | "out_dtype" => continue,
                "tokenizer_source" if value == "base" => continue,
                "tokenizer_source" | "tokenizer" | "chat_template" => "the tokenizer is the base's, unchanged",
                "slices" | "modules" => "whole models are merged: give 'models'",
                _ => "this is not known",
            };
            return Err(invalid(format!("'{key}' is not done here; {why}")));
        }
        let method = all.get("merge_method").and_then(Value::as_str);
        let method = Method::named(method.ok_or_else(|| invalid("'merge_method' is missing"))?)?;
        let base = all.get("base_model").filter(|b| !b.is_null()).map(path).transpose()?;
        let mut recipe = Recipe::new(method, base, Vec::new());
        recipe.expect_base()?;
        let shared = parameters(all.get("parameters"), "parameters")?;
        let (mut weight, mut density) = (None, None);
        for (name, value) in &shared {
            match name.as_str() {
                "weight" => weight = Some(number(name, value)?),
                "density" => density = Some(number(name, value)?),
                "normalize" => recipe.normalise = truth(name, value)?,
                "rescale" => recipe.rescale = if truth(name, value)? { Rescale::Norm } else { Rescale::No },
                "lambda" => recipe.lambda = number(name, value)?,
                "int8_mask" => drop(truth(name, value)?),
                _ => return Err(invalid(format!("the parameter '{name}' is not known here"))),
            }
        }
        let models = all.get("models").and_then(Value::as_array).ok_or_else(|| invalid("'models' is no list"))?;
        for entry in models {
            let entry = entry.as_object().ok_or_else(|| invalid("an entry of 'models' is no mapping"))?;
            if let Some(key) = entry.keys().find(|k| *k != "model" && *k != "parameters") {
                return Err(invalid(format!("'{key}' of a model is not done here")));
            }
            let path = path(entry.get("model").unwrap_or(&Value::Null))?;
            if method != Method::Linear && recipe.base.as_ref() == Some(&path) {
                continue;
            }
            let (mut own_weight, mut own_density) = (weight, density);
            for (name, value) in &parameters(entry.get("parameters"), "the parameters of a model")? {
                match name.as_str() {
                    "weight" => own_weight = Some(number(name, value)?),
                    "density" => own_density = Some(number(name, value)?),
                    _ => return Err(invalid(format!("the parameter '{name}' of a model is not known here"))),
                }
            }
            let weight = own_weight.ok_or_else(|| invalid(format!("{} has no weight", path.display())))?;
            recipe.models.push(Model { path, weight, density: own_density.unwrap_or(1.0) });
        }
        let dtype = ["out_dtype", "dtype"].iter().filter_map(|k| all.get(*k)).find(|v| !v.is_null());
        recipe.dtype = dtype.map(|v| dtype_named(v.as_str().unwrap_or_default())).transpose()?;
        recipe.check()?;
        Ok(recipe)
    }
}

/// f32, bf16 or f16, by mergekit's name or by that of [`DType`].
pub fn dtype_named(name: &str) -> Result<DType> {
    match name {
        "float32" | "f32" => Ok(DType::F32),
        "bfloat16" | "bf16" => Ok(DType::BF16),
        "float16" | "f16" => Ok(DType::F16),
        _ => Err(invalid(format!("the element type '{name}' is not one of float32, bfloat16 and float16"))),
    }
}

fn path(value: &Value) -> Result<PathBuf> {
    let text =
        value.as_str().ok_or_else(|| invalid(format!("a model is given by the path of its folder, not by {value}")))?;
    Ok(PathBuf::from(text))
}

fn parameters(value: Option<&Value>, what: &str) -> Result<serde_json::Map<String, Value>> {
    match value {
        None | Some(Value::Null) => Ok(serde_json::Map::new()),
        Some(Value::Object(o)) => Ok(o.clone()),
        Some(other) => Err(invalid(format!("{what} are no mapping: {other}"))),
    }
}

fn number(name: &str, value: &Value) -> Result<f64> {
    match value {
        Value::Array(_) | Value::Object(_) => Err(invalid(format!(
            "'{name}' depends on the layer or the tensor, which is not done here: give one number"
        ))),
        _ => value.as_f64().ok_or_else(|| invalid(format!("'{name}' is no number: {value}"))),
    }
}

fn truth(name: &str, value: &Value) -> Result<bool> {
    match value.as_bool() {
        Some(b) => Ok(b),
        None => Ok(number(name, value)? != 0.0),
    }
}
