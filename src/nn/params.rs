//! The parameter store, which saves, counts and freezes parameters.

use crate::Param;
use crate::array::Array;
use crate::base::{DType, Error, Result, hash, matches, philox};
use crate::device::Device;
use crate::io::{self, SafeTensors};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

/// Initial values of a parameter.
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
    /// Uniform in ±1/√fan_in (PyTorch's default), where the fan-in is the number of inputs that are added up for one output. Layers set it
    /// themselves; see [`Params::param`] for parameters of your own.
    KaimingUniform,
}

/// How strictly the tensors of a file must match the parameters of a model.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Strict {
    /// The same names on both sides.
    Yes,
    /// Every parameter must be in the file; other tensors of the file are ignored.
    AllowUnexpected,
    /// Parameters that the file does not have keep their values, and other tensors of the file are ignored.
    No,
}

/// What [`Params::load`] could not match: parameters without a tensor in the file, and tensors without a parameter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// The file.
    pub path: PathBuf,
    /// Parameters that the file does not have; they keep their values.
    pub missing: Vec<String>,
    /// Tensors of the file that no parameter takes.
    pub unexpected: Vec<String>,
}

/// Refuses parameters that an adapter has been added to: the file would have the adapter beside them, and it would count twice.
pub(crate) fn refuse_merged(op: &'static str, params: &[Param]) -> Result<()> {
    match params.iter().find(|p| p.merged()) {
        None => Ok(()),
        Some(p) => Err(Error::invalid(
            op,
            format!(
                "an adapter is merged into {}; take it out first (unmerge), or write the merged model (Gpt::save)",
                p.name()
            ),
        )),
    }
}

/// Reads a safetensors file into parameters. `names` gives the names that a parameter may have in the file. Either all parameters are read
/// or none; see [`Params::load`].
pub(crate) fn take(
    params: &[Param],
    file: &SafeTensors,
    names: &dyn Fn(&str) -> Vec<String>,
    strict: Strict,
) -> Result<Taken> {
    refuse_merged("Params::load", params)?;
    let mut taken = Taken { path: file.path().to_path_buf(), ..Taken::default() };
    let mut unused: BTreeSet<String> = file.tensors().iter().map(|t| t.name.to_string()).collect();
    let (mut wrong, mut found) = (Vec::new(), Vec::new());
    for p in params {
        let Some(name) = names(p.name()).into_iter().find(|n| unused.remove(n)) else {
            taken.missing.push(p.name().to_string());
            continue;
        };
        let a = match io::array_of(file, &name) {
            Ok(a) => a,
            Err(e) => {
                wrong.push(e.to_string());
                continue;
            }
        };
        if a.shape() != p.shape() {
            wrong.push(format!("{name} is {:?}, the model's {} is {:?}", a.shape(), p.name(), p.shape()));
        } else if !a.dtype().is_float() {
            wrong.push(format!("{name} is {}, which is no float", a.dtype()));
        } else {
            found.push((p, a));
        }
    }
    taken.unexpected = unused.into_iter().collect();
    if strict != Strict::No {
        wrong.extend(taken.missing.iter().map(|n| format!("{n} is missing")));
    }
    if strict == Strict::Yes {
        wrong.extend(taken.unexpected.iter().map(|n| format!("{n} is in the file, but not in the model")));
    }
    if !wrong.is_empty() {
        return Err(Error::format(&taken.path, format!("does not fit the model: {}", wrong.join("; "))));
    }
    // Every tensor is checked before the first parameter changes.
    let found: Vec<(&Param, Array)> =
        found.into_iter().map(|(p, a)| Ok((p, a.cast(p.dtype()).to(&p.device())?))).collect::<Result<_>>()?;
    found.into_iter().try_for_each(|(p, a)| p.set(a))?;
    Ok(taken)
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
    /// How new parameters are filled.
    values: Values,
}

/// How new parameters are filled.
#[derive(Clone, Copy, PartialEq)]
enum Values {
    Drawn,
    Zeros,
    /// Without values: parameters have only a name, a shape and a dtype.
    None,
}

impl Params {
    /// An empty store. Initial values depend on `seed` and the parameter's full name only.
    pub fn new(seed: u64, dtype: DType) -> Params {
        Params { store: Arc::default(), prefix: String::new(), seed, dtype, values: Values::Drawn }
    }
    /// A store whose parameters have names and shapes but take no memory, for planning models that are too large to be made here.
    pub fn described(dtype: DType) -> Params {
        Params { values: Values::None, ..Params::new(0, dtype) }
    }
    /// The same store and scope. If `draws` is set, initial values of new parameters are drawn; otherwise they are zeros, because values
    /// are read over them before anything uses them. Drawing the initial values of a large model takes longer than reading its file.
    pub(crate) fn drawing(&self, draws: bool) -> Params {
        Params { values: if draws { Values::Drawn } else { Values::Zeros }, ..self.clone() }
    }
    /// Runs `make`. If it fails, the parameters that it created are removed from the store.
    pub(crate) fn whole<T>(&self, make: impl FnOnce(&Params) -> Result<T>) -> Result<T> {
        let n = self.lock().len();
        make(self).inspect_err(|_| self.truncate(n))
    }
    /// Removes the parameters that were created after the first `n` of the store.
    pub(crate) fn truncate(&self, n: usize) {
        self.lock().truncate(n);
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
    /// The prefix of names in this scope: `h.0` for parameters such as `h.0.ln_1.weight`.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }
    /// A new parameter in this scope. Fails if the name is taken.
    ///
    /// [`Init::KaimingUniform`] uses the product of all dimensions but the first as the fan-in, which is right for weights with the layout
    /// `[out, in, …]`. For other layouts use [`Params::param_with_fan_in`].
    pub fn param(&self, name: &str, shape: &[usize], init: Init) -> Result<Param> {
        self.param_with_fan_in(name, shape, init, shape.iter().skip(1).fold(1, |n: usize, &d| n.saturating_mul(d)))
    }
    /// [`Params::param`] with a given fan-in, for weights with another layout than `[out, in, …]`: `d` for a weight `[d, p]`, and for
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
        if shape
            .iter()
            .try_fold(self.dtype.size(), |n, &d| n.checked_mul(d.max(1)))
            .is_none_or(|n| n > isize::MAX as usize / 2)
        {
            return Err(Error::shape(
                "Params::param",
                format!("{name} of {shape:?} {}: no memory holds that", self.dtype),
            ));
        }
        let scale = match init {
            Init::Normal { std } => ("standard deviation", std),
            Init::Uniform { bound } => ("bound", bound),
            Init::Zeros | Init::Ones | Init::KaimingUniform => ("", 0.0),
        };
        if !(scale.1.is_finite() && scale.1 >= 0.0) {
            let message =
                format!("initial values of {name} with a {} of {}; it must be 0 or more, and finite", scale.0, scale.1);
            return Err(Error::invalid("Params::param", message));
        }
        let mut store = self.lock();
        if store.iter().any(|p| p.name() == name) {
            return Err(Error::invalid("Params::param", format!("{name} exists already; use another scope")));
        }
        let (seed, stream) = (self.seed, hash(&name));
        let uniform = |bound: f64| {
            Array::generate(shape, self.dtype, move |i| bound * (2.0 * philox::uniform(seed, stream, i as u64) - 1.0))
        };
        let value = match init {
            _ if self.values == Values::None => {
                let param = Param::described(name, shape, self.dtype);
                store.push(param.clone());
                return Ok(param);
            }
            _ if self.values == Values::Zeros => Array::zeros(shape, self.dtype),
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
    /// Replaces the store's parameter of the same name.
    pub(crate) fn swap(&self, new: &Param) -> Result<()> {
        match self.lock().iter_mut().find(|p| p.name() == new.name()) {
            Some(old) => {
                *old = new.clone();
                Ok(())
            }
            None => Err(Error::invalid("Params", format!("there is no {}", new.name()))),
        }
    }
    /// The dtype of new parameters.
    pub fn dtype(&self) -> DType {
        self.dtype
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
    /// The number of elements of all parameters below this scope.
    pub fn count(&self) -> usize {
        self.all().iter().map(Param::numel).sum()
    }
    /// Freezes (`on` = false) or unfreezes everything below this scope; returns the number of parameters.
    pub fn set_trainable(&self, on: bool) -> usize {
        let all = self.all();
        all.iter().for_each(|p| p.set_trainable(on));
        all.len()
    }
    /// Freezes everything below this scope except the parameters whose full names match one of the patterns (`*` stands for any
    /// characters), such as `*.bias` to train biases alone. Returns how many parameters are trained.
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
    /// Writes everything below this scope as one safetensors file, atomically. Names are relative to the scope: the parameter
    /// `block.0.weight` of the scope `block` is saved as `0.weight`, so that a part of a model can be loaded into another.
    ///
    /// ```
    /// use prismgrad::nn::{Linear, Params, Strict};
    /// use prismgrad::DType;
    /// # fn main() -> prismgrad::Result<()> {
    /// # let folder = std::env::temp_dir().join(format!("prismgrad-doc-params-{}", std::process::id()));
    /// # std::fs::create_dir_all(&folder).unwrap();
    /// # let path = folder.join("model.safetensors");
    /// let params = Params::new(0, DType::F32);
    /// Linear::new(&params.at("fc"), 3, 2)?;
    /// params.save(&path)?;
    /// params.load(&path, Strict::Yes)?;
    /// # std::fs::remove_dir_all(&folder).unwrap();
    /// # Ok(()) }
    /// ```
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        self.save_as(path, None)
    }
    /// [`Params::save`] with the values converted to a float dtype, such as bf16 for half the size.
    pub fn save_as(&self, path: impl AsRef<Path>, dtype: Option<DType>) -> Result<()> {
        if let Some(d) = dtype.filter(|d| !d.is_float()) {
            return Err(Error::dtype("Params::save_as", format!("{d} holds no parameters; choose a float dtype")));
        }
        let all = self.all();
        refuse_merged("Params::save", &all)?;
        let named: Vec<(String, Array)> = all
            .iter()
            .map(|p| (self.relative(p.name()).to_string(), dtype.map_or(p.value(), |d| p.value().cast(d))))
            .collect();
        io::save_arrays(path, &named, &[("format", "pt")])
    }
    /// Reads what [`Params::save`] wrote, or any safetensors file with these names, into the parameters below this scope. Float dtypes are
    /// converted. With [`Strict::Yes`], parameters that the file does not have and tensors that the model does not have are an error;
    /// mismatches that `strict` allows are returned. A wrong shape or a dtype that is not a float is an error in any case. The error lists
    /// every mismatch, and then no parameter is changed.
    pub fn load(&self, path: impl AsRef<Path>, strict: Strict) -> Result<Taken> {
        self.load_from(&SafeTensors::open(path)?, strict)
    }
    /// Does the same as [`Params::load`] from an open file.
    pub fn load_from(&self, file: &SafeTensors, strict: Strict) -> Result<Taken> {
        take(&self.all(), file, &|n| vec![self.relative(n).to_string()], strict)
    }
    fn relative<'a>(&self, name: &'a str) -> &'a str {
        name.strip_prefix(&self.prefix).map_or(name, |n| n.strip_prefix('.').unwrap_or(n))
    }
    /// Moves everything below this scope to a device. If it has no room for all parameters, an error is returned and none has moved.
    pub fn to(&self, device: &Device) -> Result<()> {
        let all = self.all();
        let moved = all.iter().map(|p| p.value().to(device)).collect::<Result<Vec<_>>>()?;
        all.iter().zip(moved).try_for_each(|(p, value)| p.set(value))
    }
    /// A number for a layer without parameters, derived from its full name. It selects the stream of its dropout masks.
    pub fn id(&self, name: &str) -> u64 {
        hash(&self.full(name))
    }
}
