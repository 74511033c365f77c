//! [`Tensor`]: an array together with its autograd history.

use super::rule::Rule;
use super::{Param, Samples};
use crate::array::shape::Dims;
use crate::array::{Array, ArrayOptions};
use crate::base::{DType, Element, Result};
use crate::device::Device;
use smallvec::SmallVec;
use std::backtrace::Backtrace;
use std::cell::{Cell, RefCell};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

static NEXT: AtomicU64 = AtomicU64::new(1);

thread_local! {
    static RECORDING: Cell<bool> = const { Cell::new(true) };
    /// Number of operations recorded so far.
    static RECORDED: Cell<u64> = const { Cell::new(0) };
    static SOUGHT: Sought = const { Sought { place: Cell::new(u64::MAX), line: RefCell::new(None) } };
}

/// The operation whose source line is being searched.
struct Sought {
    place: Cell<u64>,
    line: RefCell<Option<String>>,
}

impl Sought {
    /// Stores the source line if this is the searched operation.
    fn find(&self) {
        if self.place.get() == RECORDED.with(Cell::get) {
            *self.line.borrow_mut() = caller(&Backtrace::force_capture().to_string());
        }
    }
}

/// File and line of the innermost function outside of this crate and its dependencies, if the program has line numbers.
fn caller(backtrace: &str) -> Option<String> {
    let own = file!().strip_suffix("autograd/tensor.rs")?;
    let paths = backtrace.lines().filter_map(|l| l.trim().strip_prefix("at ")).map(|at| at.trim_start_matches("./"));
    let mut outside =
        paths.filter(|at| !at.starts_with(own) && !at.contains("/rustc/") && !at.contains("/registry/src/"));
    // The column is removed.
    outside.next().map(|at| at.rsplit_once(':').map_or(at, |(line, _)| line).to_string())
}

/// Runs `f` once more and returns the line of the caller's program that recorded a certain operation: the one before which `f` records
/// `after` others on this thread. `None` if the program was built without line numbers.
pub(crate) fn line_of<R>(after: u64, f: impl FnOnce() -> R) -> Option<String> {
    SOUGHT.with(|s| s.place.set(RECORDED.with(Cell::get) + after));
    f();
    SOUGHT.with(|s| {
        s.place.set(u64::MAX);
        s.line.take()
    })
}

/// Number of operations that this thread has recorded.
pub(crate) fn recorded() -> u64 {
    RECORDED.with(Cell::get)
}

/// An [`Array`] with the history that is needed to differentiate it. Cloning it is cheap.
///
/// The history holds only what the backward rules saved: an activation that no rule saved is freed when its last handle is dropped.
#[derive(Clone)]
pub struct Tensor {
    value: Array,
    node: Option<Arc<Node>>,
}

/// One recorded operation, or a leaf.
pub(crate) struct Node {
    /// Creation order: a node's parents have smaller ids, so descending ids are a backward order.
    pub id: u64,
    pub parents: SmallVec<[Option<Arc<Node>>; 3]>,
    pub params: SmallVec<[Param; 2]>,
    /// `None` for leaves, and after a backward pass that did not retain the graph.
    pub rule: Mutex<Option<Arc<dyn Rule>>>,
    pub leaf: bool,
    /// The device of the value, and of its gradient.
    pub device: Device,
    /// The value's shape.
    pub shape: Dims,
    /// Number of operations that this thread had recorded before this one.
    pub place: u64,
}

impl Drop for Node {
    /// Dismantles long chains in a loop, so that a graph of any depth is dropped without recursion.
    fn drop(&mut self) {
        let mut todo: Vec<Arc<Node>> = self.parents.drain(..).flatten().collect();
        while let Some(node) = todo.pop() {
            if let Some(mut last) = Arc::into_inner(node) {
                todo.extend(last.parents.drain(..).flatten());
            }
        }
    }
}

/// Runs `f` without recording history: nothing inside is differentiable, and nothing is saved for backward.
pub fn no_grad<R>(f: impl FnOnce() -> R) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            RECORDING.with(|r| r.set(self.0));
        }
    }
    let _restore = Restore(RECORDING.with(|r| r.replace(false)));
    f()
}

/// Whether operations are recorded on this thread; false inside [`no_grad`].
pub(crate) fn is_recording() -> bool {
    RECORDING.with(|r| r.get())
}

impl Tensor {
    /// A tensor without history, for data, labels and masks.
    pub fn new(value: Array) -> Tensor {
        Tensor { value, node: None }
    }
    /// A tensor that requires a gradient; read it from [`Gradients::of`](crate::Gradients::of) after backward.
    pub fn leaf(value: Array) -> Tensor {
        let node = Node {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            parents: SmallVec::new(),
            params: SmallVec::new(),
            rule: Mutex::new(None),
            leaf: true,
            device: value.device(),
            shape: value.shape().into(),
            place: RECORDED.with(Cell::get),
        };
        Tensor { value, node: Some(Arc::new(node)) }
    }
    /// Copies a slice, row-major, into a tensor without history.
    pub fn from_slice<T: Element>(data: &[T], shape: &[usize]) -> Result<Tensor> {
        Ok(Tensor::new(Array::from_slice(data, shape)?))
    }
    /// Zeros, without history. `at` is the element type, `DType::F32`, or element type and device, `(DType::F32, &device)`.
    pub fn zeros(shape: &[usize], at: impl Into<ArrayOptions>) -> Tensor {
        Tensor::new(Array::zeros(shape, at))
    }
    /// Ones, without history.
    pub fn ones(shape: &[usize], at: impl Into<ArrayOptions>) -> Tensor {
        Tensor::full(shape, 1.0, at)
    }
    /// All elements equal to `value`, without history.
    pub fn full(shape: &[usize], value: f64, at: impl Into<ArrayOptions>) -> Tensor {
        Tensor::new(Array::full(shape, value, at))
    }
    /// Zeros of this tensor's shape and element type, on its device, without history.
    pub fn zeros_like(&self) -> Tensor {
        Tensor::zeros(self.shape(), (self.dtype(), &self.device()))
    }
    /// Ones of this tensor's shape and element type, on its device, without history.
    pub fn ones_like(&self) -> Tensor {
        self.full_like(1.0)
    }
    /// A tensor of this one's shape and element type, on its device, without history, all of whose elements are `value`.
    pub fn full_like(&self, value: f64) -> Tensor {
        Tensor::full(self.shape(), value, (self.dtype(), &self.device()))
    }
    /// The data.
    pub fn array(&self) -> &Array {
        &self.value
    }
    /// The data; the history is dropped.
    pub fn into_array(self) -> Array {
        self.value
    }
    /// The same data without history.
    pub fn detach(&self) -> Tensor {
        Tensor::new(self.value.clone())
    }
    /// Sizes of the dimensions.
    pub fn shape(&self) -> &[usize] {
        self.value.shape()
    }
    /// Element type.
    pub fn dtype(&self) -> DType {
        self.value.dtype()
    }
    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.value.numel()
    }
    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.value.rank()
    }
    /// Whether this tensor has a history through which backward can reach a leaf or parameter.
    pub fn requires_grad(&self) -> bool {
        self.node.is_some()
    }
    /// The device that holds the tensor.
    pub fn device(&self) -> Device {
        self.value.device()
    }
    /// The same values on another device, without history: move data and parameters before the forward pass.
    pub fn to(&self, device: &Device) -> Result<Tensor> {
        Ok(Tensor::new(self.value.to(device)?))
    }
    /// The value of a tensor with one element, as f64.
    pub fn item(&self) -> Result<f64> {
        self.value.item()
    }
    pub(crate) fn node(&self) -> Option<&Arc<Node>> {
        self.node.as_ref()
    }

    /// Whether [`Tensor::record`] would record an operation with these parents and parameters.
    pub fn would_record(parents: &[&Tensor], params: &[&Param]) -> bool {
        RECORDING.with(|r| r.get())
            && (parents.iter().any(|p| p.node.is_some()) || params.iter().any(|p| p.trainable()))
    }
    /// Records an operation: `value` was computed from `parents` and `params`, and `rule` is its backward rule. The rule (and with it
    /// whatever it saves) is only built if a gradient can be requested. Every op of the crate, and every custom op, enters the history
    /// through this function.
    ///
    /// List a parameter once per use, in the order in which the rule returns its factors.
    pub fn record<R: Rule>(value: Array, parents: &[&Tensor], params: &[&Param], rule: impl FnOnce() -> R) -> Tensor {
        if !Tensor::would_record(parents, params) {
            return Tensor::new(value);
        }
        SOUGHT.with(|s| s.find());
        let node = Node {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            parents: parents.iter().map(|p| p.node.clone()).collect(),
            params: params.iter().filter(|p| p.trainable()).map(|&p| p.clone()).collect(),
            rule: Mutex::new(Some(Arc::new(rule()))),
            leaf: false,
            device: value.device(),
            shape: value.shape().into(),
            place: RECORDED.with(|n| n.replace(n.get() + 1)),
        };
        Tensor { value, node: Some(Arc::new(node)) }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}{}", self.value, if self.node.is_some() { " with history" } else { "" })
    }
}

impl AsRef<Array> for Tensor {
    fn as_ref(&self) -> &Array {
        &self.value
    }
}

impl From<Array> for Tensor {
    fn from(value: Array) -> Tensor {
        Tensor::new(value)
    }
}

/// The leading dimensions of `x` as rows of samples, unless the caller gives `samples`.
pub(crate) fn samples_or_leading(samples: Option<&Samples>, shape: &[usize], row_dims: usize) -> Samples {
    samples.cloned().unwrap_or_else(|| Samples::leading(shape, row_dims))
}
