//! The in-batch contrastive loss.

use crate::array::Array;
use crate::base::{DType, Error, Result};
use crate::ops::loss::{CrossEntropy, Reduce, cross_entropy};
use crate::random::masks;
use crate::{Samples, Tensor};

/// InfoNCE (van den Oord et al. 2018) of two views `a` and `b` `[n, d]` of the same n things, from `a` to `b`. With rows scaled to length
/// 1, the loss of row i is −log softmax over j of ⟨aᵢ, bⱼ⟩ / temperature, at j = i. The result `[samples]` has the mean over each sample's
/// rows.
///
/// Every row is compared with those of all samples, so a private step refuses this loss by name.
pub fn contrastive_loss(a: &Tensor, b: &Tensor, temperature: f64, samples: &Samples) -> Result<Tensor> {
    let op = "contrastive_loss";
    if masks::in_private_step() {
        return Err(Error::privacy(
            "the contrastive loss compares each sample's rows with those of all other samples, so that one record moves the \
             gradients of others, and clipping does not bound what it does. Use an objective over a sample's own rows, such as \
             the detection of corrupted cells",
        ));
    }
    let &[n, _] = a.shape() else {
        return Err(Error::shape(op, format!("views {:?} must be [n, d]", a.shape())));
    };
    if a.shape() != b.shape() || samples.rows() != n {
        let message = format!("views {:?} and {:?} of {} rows of samples", a.shape(), b.shape(), samples.rows());
        return Err(Error::shape(op, message));
    }
    if !temperature.is_finite() || temperature <= 0.0 {
        return Err(Error::invalid(op, format!("temperature {temperature}; it must be a positive number")));
    }
    let unit = |x: &Tensor| x.div(&x.square()?.sum(&[1], true)?.add_scalar(1e-12)?.sqrt()?);
    let logits = unit(a)?.matmul(&unit(b)?.transpose(0, 1)?)?.mul_scalar(1.0 / temperature)?;
    let targets = Array::arange(n, DType::U32);
    let options = CrossEntropy { samples: Some(samples.clone()), reduce: Reduce::Mean, ..CrossEntropy::default() };
    cross_entropy(&logits, targets, &options)
}
