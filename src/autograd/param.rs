//! Trainable parameters: named arrays that models and optimizers share.

use crate::array::{Array, Dims};
use crate::base::{DType, Error, Result};
use crate::device::Device;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock, Weak};

static NEXT: AtomicU64 = AtomicU64::new(0);

/// A trainable array with a name. Clones are handles on the same parameter.
#[derive(Clone)]
pub struct Param(Arc<Inner>);

/// Supplies the value of a parameter that this rank does not store.
pub(crate) trait Source: Send + Sync {
    /// Gathers the value; it is NaN if that failed, and the source reports the error later.
    fn fetch(&self, param: &Param) -> Array;
}

/// A handle that does not keep the parameter alive.
pub(crate) struct WeakParam(Weak<Inner>);

impl WeakParam {
    /// The parameter, if another handle to it still exists.
    pub fn upgrade(&self) -> Option<Param> {
        self.0.upgrade().map(Param)
    }
}

struct Inner {
    id: u64,
    name: String,
    shape: Dims,
    dtype: DType,
    value: RwLock<Array>,
    source: RwLock<Option<Arc<dyn Source>>>,
    trainable: AtomicBool,
    placed: AtomicBool,
    merged: AtomicBool,
}

impl Param {
    /// A parameter with this name and value.
    pub fn new(name: impl Into<String>, value: Array) -> Param {
        Param::with(name.into(), value.shape().into(), value.dtype(), value.contiguous())
    }
    fn with(name: String, shape: Dims, dtype: DType, value: Array) -> Param {
        Param(Arc::new(Inner {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            name,
            shape,
            dtype,
            value: RwLock::new(value),
            source: RwLock::new(None),
            trainable: AtomicBool::new(true),
            placed: AtomicBool::new(false),
            merged: AtomicBool::new(false),
        }))
    }
    /// A parameter without a value, which takes no memory: it has a name, a shape and a dtype, for planning. [`Param::set`] gives it a
    /// value.
    pub fn described(name: impl Into<String>, shape: &[usize], dtype: DType) -> Param {
        Param::with(name.into(), shape.into(), dtype, Array::zeros(&[0], dtype))
    }
    /// Unique in this process; fixed orders also use it to break ties.
    pub fn id(&self) -> u64 {
        self.0.id
    }
    /// Full scoped name, such as `h.0.attn.c_attn.weight`.
    pub fn name(&self) -> &str {
        &self.0.name
    }
    /// Sizes of the dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.0.shape
    }
    /// Element type.
    pub fn dtype(&self) -> DType {
        self.0.dtype
    }
    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.0.shape.iter().product()
    }
    /// The current value, sharing storage; a later update does not change the returned array. If ranks share the parameters
    /// ([`Stage::Parameters`](crate::step::Stage)), the value is gathered from them, so that every rank must call this together.
    pub fn value(&self) -> Array {
        if let Some(value) = self.held() {
            return value;
        }
        let source = self.0.source.read().unwrap_or_else(|e| e.into_inner()).clone();
        source.map_or_else(|| Array::zeros(&[0], self.dtype()), |s| s.fetch(self))
    }
    /// Whether the value is in this rank's memory. It is not if ranks share the parameters and the value has not been gathered, or if the
    /// parameter was only described.
    pub fn is_here(&self) -> bool {
        self.held().is_some()
    }
    /// The value, if it is in this rank's memory.
    pub(crate) fn held(&self) -> Option<Array> {
        let value = self.0.value.read().unwrap_or_else(|e| e.into_inner());
        (value.shape() == self.shape()).then(|| value.clone())
    }
    /// Sets the source from which values that are not in this rank's memory are fetched.
    pub(crate) fn set_source(&self, source: Arc<dyn Source>) {
        *self.0.source.write().unwrap_or_else(|e| e.into_inner()) = Some(source);
    }
    pub(crate) fn downgrade(&self) -> WeakParam {
        WeakParam(Arc::downgrade(&self.0))
    }
    /// Replaces the value; shape and dtype must stay the same.
    pub fn set(&self, value: Array) -> Result<()> {
        if value.shape() != self.shape() || value.dtype() != self.dtype() {
            return Err(Error::shape(
                "Param::set",
                format!(
                    "{} is {:?} {}, the new value is {:?} {}",
                    self.name(),
                    self.shape(),
                    self.dtype(),
                    value.shape(),
                    value.dtype()
                ),
            ));
        }
        *self.0.value.write().unwrap_or_else(|e| e.into_inner()) = value.contiguous();
        Ok(())
    }
    /// The device that holds the value.
    pub fn device(&self) -> Device {
        self.0.value.read().unwrap_or_else(|e| e.into_inner()).device()
    }
    /// Moves the value to a device.
    pub fn to(&self, device: &Device) -> Result<()> {
        let value = self.value().to(device)?;
        self.set(value)
    }
    /// Drops the value until the next `set`, so that the flat buffer that contains it can be updated in place.
    pub(crate) fn release(&self) {
        *self.0.value.write().unwrap_or_else(|e| e.into_inner()) = Array::zeros(&[0], self.dtype());
    }
    /// Whether gradients are computed and updates applied.
    pub fn trainable(&self) -> bool {
        self.0.trainable.load(Ordering::Relaxed)
    }
    /// Whether only this rank holds the parameter, as a rank holds its own experts: a step with several ranks neither broadcasts its value
    /// nor sums its gradient over them.
    pub fn placed(&self) -> bool {
        self.0.placed.load(Ordering::Relaxed)
    }
    /// Sets [`Param::placed`]. Call it before the step is made.
    pub fn set_placed(&self, on: bool) {
        self.0.placed.store(on, Ordering::Relaxed);
    }
    /// Whether an adapter is currently merged into the value: a saved value then includes the adapter.
    pub fn merged(&self) -> bool {
        self.0.merged.load(Ordering::Relaxed)
    }
    /// Sets [`Param::merged`].
    pub(crate) fn set_merged(&self, on: bool) {
        self.0.merged.store(on, Ordering::Relaxed);
    }
    /// Freezes (`false`) or unfreezes (`true`) the parameter.
    pub fn set_trainable(&self, on: bool) {
        self.0.trainable.store(on, Ordering::Relaxed);
    }
}

impl PartialEq for Param {
    fn eq(&self, other: &Param) -> bool {
        self.id() == other.id()
    }
}
impl Eq for Param {}

impl fmt::Debug for Param {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Param({} {:?} {})", self.name(), self.shape(), self.dtype())
    }
}
