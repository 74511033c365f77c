//! The parameter store: one place for saving, counting, freezing.

use crate::Param;
use crate::array::Array;
use crate::base::{DType, Error, Result, hash, matches, philox};
use crate::device::Device;
use std::sync::{Arc, Mutex, MutexGuard};

/// Initial values.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Init {
    /// N(0, std²).
    Normal {
        /// Standard deviation.
        std: f64,
    },
    /// Uniform in ±bound.
    Uniform {
        /// Half the width.
        bound: f64,
    },
    /// All 0.
    Zeros,
    /// All 1.
    Ones,
    /// Uniform in ±1/√fan_in (PyTorch's default), the fan-in being the number of inputs that an output adds up. Layers say what it
    /// is; see [`Params::param`] for parameters of your own.
    KaimingUniform,
}

/// Parameters under scoped names. A clone, and every scope made with [`Params::at`], is a handle on the same store.
///
/// ```
/// use prismgrad::{DType, nn::{Init, Params}};
/// let params = Params::new(0, DType::F32);
/// let w = params.at("h").at("0").param("weight", &[2, 3], Init::Zeros).unwrap();
/// assert_eq!(w.name(), "h.0.weight");
/// assert_eq!(params.count(), 6);
/// ```
#[derive(Clone)]
pub struct Params {
    store: Arc<Mutex<Vec<Param>>>,
    prefix: String,
    seed: u64,
    dtype: DType,
}

impl Params {
    /// An empty store. Initial values depend on `seed` and the parameter's full name only.
    pub fn new(seed: u64, dtype: DType) -> Params {
        Params { store: Arc::default(), prefix: String::new(), seed, dtype }
    }
    /// The scope `name` within this one.
    pub fn at(&self, name: &str) -> Params {
        Params { prefix: self.full(name), ..self.clone() }
    }
    fn full(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) }
    }
    fn lock(&self) -> MutexGuard<'_, Vec<Param>> {
        self.store.lock().unwrap_or_else(|e| e.into_inner())
    }
    /// The scope of the names: `h.0` for parameters such as `h.0.ln_1.weight`.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }
    /// A new parameter in this scope. Fails if the name is taken.
    ///
    /// [`Init::KaimingUniform`] takes the product of all dimensions but the first for the fan-in, which is right for weights
    /// that lie `[out, in, …]`. For weights that lie otherwise use [`Params::param_with_fan_in`].
    pub fn param(&self, name: &str, shape: &[usize], init: Init) -> Result<Param> {
        self.param_with_fan_in(name, shape, init, shape.iter().skip(1).product())
    }
    /// [`Params::param`] with the fan-in given, for weights that do not lie `[out, in, …]`: `d` for a weight `[d, p]`, and for
    /// stacked weights `[experts, p, d]` as well. Only [`Init::KaimingUniform`] depends on it.
    ///
    /// ```
    /// use prismgrad::{DType, nn::{Init, Params}};
    /// let params = Params::new(0, DType::F32);
    /// let experts = params.param_with_fan_in("experts", &[8, 32, 100], Init::KaimingUniform, 100).unwrap();
    /// assert!(experts.value().to_f64().iter().all(|w| w.abs() <= 0.1)); // 1/√100
    /// ```
    pub fn param_with_fan_in(&self, name: &str, shape: &[usize], init: Init, fan_in: usize) -> Result<Param> {
        let name = self.full(name);
        let mut store = self.lock();
        if store.iter().any(|p| p.name() == name) {
            return Err(Error::invalid("Params::param", format!("{name} exists already; use another scope")));
        }
        let (seed, stream) = (self.seed, hash(&name));
        let uniform = |bound: f64| {
            Array::generate(shape, self.dtype, move |i| bound * (2.0 * philox::uniform(seed, stream, i as u64) - 1.0))
        };
        let value = match init {
            Init::Zeros => Array::zeros(shape, self.dtype),
            Init::Ones => Array::ones(shape, self.dtype),
            Init::Normal { std } => {
                Array::generate(shape, self.dtype, move |i| std * philox::normal(seed, stream, i as u64))
            }
            Init::Uniform { bound } => uniform(bound),
            Init::KaimingUniform => uniform(1.0 / (fan_in.max(1) as f64).sqrt()),
        };
        let param = Param::new(name, value);
        store.push(param.clone());
        Ok(param)
    }
    /// All parameters of the store below this scope, in order of creation.
    pub fn all(&self) -> Vec<Param> {
        let below = format!("{}.", self.prefix);
        self.lock().iter().filter(|p| self.prefix.is_empty() || p.name().starts_with(&below)).cloned().collect()
    }
    /// The parameter with this name in this scope.
    pub fn get(&self, name: &str) -> Option<Param> {
        let name = self.full(name);
        self.lock().iter().find(|p| p.name() == name).cloned()
    }
    /// Number of elements below this scope.
    pub fn count(&self) -> usize {
        self.all().iter().map(Param::numel).sum()
    }
    /// Freezes or thaws everything below this scope; returns how many parameters that were.
    pub fn set_trainable(&self, on: bool) -> usize {
        let all = self.all();
        all.iter().for_each(|p| p.set_trainable(on));
        all.len()
    }
    /// Freezes everything below this scope but the parameters whose full names match one of the patterns (`*` stands for any
    /// characters), such as `*.bias` for training biases alone; returns how many parameters are trained.
    pub fn train_only(&self, patterns: &[&str]) -> Result<usize> {
        let all = self.all();
        if let Some(p) = patterns.iter().find(|p| !all.iter().any(|q| matches(p, q.name()))) {
            return Err(Error::invalid("Params::train_only", format!("no parameter's name matches {p:?}")));
        }
        let mut trained = 0;
        for p in &all {
            let on = patterns.iter().any(|pattern| matches(pattern, p.name()));
            p.set_trainable(on);
            trained += on as usize;
        }
        Ok(trained)
    }
    /// Moves everything below this scope to a device.
    pub fn to(&self, device: &Device) -> Result<()> {
        self.all().iter().try_for_each(|p| p.to(device))
    }
    /// A number for a layer without parameters, from its full name: the stream of its dropout masks.
    pub fn id(&self, name: &str) -> u64 {
        hash(&self.full(name))
    }
}
