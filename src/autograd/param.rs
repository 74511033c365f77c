//! Parameters: named, shared, trained.

use crate::array::{Array, Dims};
use crate::base::{DType, Error, Result};
use crate::device::Device;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

static NEXT: AtomicU64 = AtomicU64::new(0);

/// A trainable array with a name. Clones are handles on the same parameter.
#[derive(Clone)]
pub struct Param(Arc<Inner>);

struct Inner {
    id: u64,
    name: String,
    shape: Dims,
    dtype: DType,
    value: RwLock<Array>,
    trainable: AtomicBool,
    placed: AtomicBool,
}

impl Param {
    /// A parameter holding `value`.
    pub fn new(name: impl Into<String>, value: Array) -> Param {
        Param(Arc::new(Inner {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            name: name.into(),
            shape: value.shape().into(),
            dtype: value.dtype(),
            value: RwLock::new(value.contiguous()),
            trainable: AtomicBool::new(true),
            placed: AtomicBool::new(false),
        }))
    }
    /// Unique in this process; also the tie-break of every fixed order.
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
    /// The value now, sharing storage; a later update does not change what this handle sees.
    pub fn value(&self) -> Array {
        self.0.value.read().unwrap_or_else(|e| e.into_inner()).clone()
    }
    /// Replaces the value; shape and dtype must stay.
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
    /// Where the value is.
    pub fn device(&self) -> Device {
        self.0.value.read().unwrap_or_else(|e| e.into_inner()).device()
    }
    /// Moves the value to a device.
    pub fn to(&self, device: &Device) -> Result<()> {
        let value = self.value().to(device)?;
        self.set(value)
    }
    /// Lets go of the value until the next `set`, so that a flat buffer under it can be updated in place.
    pub(crate) fn release(&self) {
        *self.0.value.write().unwrap_or_else(|e| e.into_inner()) = Array::zeros(&[0], self.dtype());
    }
    /// Whether gradients are taken and updates applied.
    pub fn trainable(&self) -> bool {
        self.0.trainable.load(Ordering::Relaxed)
    }
    /// Whether this rank alone holds it, as a rank does its own experts: a step with ranks neither takes its value over from another
    /// rank nor sums its gradient over them.
    pub fn placed(&self) -> bool {
        self.0.placed.load(Ordering::Relaxed)
    }
    /// Says so. To be done before the step is made.
    pub fn set_placed(&self, on: bool) {
        self.0.placed.store(on, Ordering::Relaxed);
    }
    /// Freezes or thaws.
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
