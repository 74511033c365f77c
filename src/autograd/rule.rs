//! Backward rules and the gradients they return.

use super::{Factor, Owner, Param, Whose};
use crate::array::Array;
use crate::autograd::{Case, Gen};
use crate::base::Result;
use smallvec::{SmallVec, smallvec};

/// The backward rule of one recorded operation, together with the operands it saved.
///
/// Rules compute on [`Array`]s, so a backward pass never builds a graph. They return gradients through [`Cotangents`]; only the autograd
/// engine accumulates gradients.
pub trait Rule: Send + Sync + 'static {
    /// The operation's entry in the registry; its name appears in error messages.
    fn info(&self) -> &'static OpInfo;
    /// Given the gradient of the output, returns through `back` the gradient of each input that needs one and the factor of each trainable
    /// parameter.
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()>;
    /// The owners (samples) that the elements of each input must have if those of the output have the owners in `output`. With this
    /// information samples are followed from their losses to the parameters, and an operation that mixes them is refused in a private step.
    /// Without it samples are not followed past this operation, and only the numeric check in the first batch of a private step can detect
    /// mixing.
    fn owners(&self, _output: &Whose) -> SmallVec<[Owner; 3]> {
        SmallVec::new()
    }
}

/// What a backward rule returns: the cotangents (gradients) of the inputs, and the factors of the parameters.
pub struct Cotangents {
    pub(crate) wanted: SmallVec<[bool; 3]>,
    pub(crate) inputs: SmallVec<[Option<Array>; 3]>,
    pub(crate) factors: SmallVec<[(Param, Factor); 2]>,
}

impl Cotangents {
    pub(crate) fn new(wanted: SmallVec<[bool; 3]>) -> Cotangents {
        let n = wanted.len();
        Cotangents { wanted, inputs: smallvec![None; n], factors: SmallVec::new() }
    }
    /// Whether input `i` needs a gradient; if not, skip its computation.
    pub fn needs(&self, i: usize) -> bool {
        self.wanted.get(i).copied().unwrap_or(false)
    }
    /// Delivers the gradient of input `i`, in the shape and dtype of that input.
    pub fn input(&mut self, i: usize, grad: Array) {
        if let Some(slot) = self.inputs.get_mut(i) {
            *slot = Some(grad);
        }
    }
    /// Delivers the factor of one use of a parameter; it is dropped if the parameter is frozen.
    pub fn param(&mut self, param: &Param, factor: Factor) {
        if param.trainable() {
            self.factors.push((param.clone(), factor));
        }
    }
}

/// An operation's entry in the registry.
pub struct OpInfo {
    /// Name, used in errors and profiles.
    pub name: &'static str,
    /// Whether gradients flow through it.
    pub differentiable: Differentiable,
    /// The form of its parameters' gradients.
    pub factor: FactorRule,
    /// Random cases for the checks; each call builds one.
    pub cases: &'static [fn(&mut Gen) -> Result<Case>],
}

/// Whether an operation has a backward rule.
pub enum Differentiable {
    /// The operation has a backward rule.
    Yes,
    /// The operation declares that it has none, and why.
    No(&'static str),
}

/// How the gradients of an operation's parameters are factored.
pub enum FactorRule {
    /// Names of the [`Factor`](crate::Factor) kinds that it returns.
    Kinds(&'static [&'static str]),
    /// The operation has no parameters, and the reason.
    None(&'static str),
}

/// The reason given by operations on plain tensors.
pub(crate) const NO_PARAMS: FactorRule = FactorRule::None("takes tensors only; parameters enter through factored ops");
