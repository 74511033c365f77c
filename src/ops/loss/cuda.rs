//! Launches of `cuda/loss.cu`.

use crate::array::cuda::{launch_elementwise, on, strided, suffix};
use crate::array::{Arguments, Array};
use crate::autograd::Owners;
use crate::base::{DType, Error, Result};
use crate::device::cuda::{Gpu, Launch};
use crate::kernels::sums::cuda::blocks;
use std::sync::Arc;

/// The targets of the rows of logits, and the rows' owners, in a GPU's memory.
pub(crate) struct Targets {
    /// `[rows]` u32.
    ids: Array,
    /// `[rows]`: the weight of each row in its sample's loss; empty until the loss has been computed.
    weight: Option<Array>,
    owners: Owners,
    /// The target that is ignored; −1 for none.
    ignore: i64,
}

impl Targets {
    /// Targets moved to the GPU. The kernels take u32, where u32::MAX stands for −100: i64 targets are converted.
    pub fn new(gpu: &Arc<Gpu>, ids: &Array, owners: Owners, ignore: Option<i64>) -> Result<Targets> {
        let ids = on(gpu, ids)?.contiguous();
        if ids.dtype() == DType::I64 {
            let (n, out) = (ids.numel(), Array::uninit_on(gpu, ids.shape(), DType::U32)?);
            launch_elementwise(gpu, "loss", "class_ids", n, |l| {
                l.array(&ids).array(&out).val(n as i64).val(ignore.unwrap_or(i64::MIN))
            })?;
            return Ok(Targets { ids: out, weight: None, owners, ignore: ignore.map_or(-1, |_| u32::MAX as i64) });
        }
        let ignore = ignore.map_or(-1, |i| if i == -100 { u32::MAX as i64 } else { i.max(-1) });
        Ok(Targets { ids, weight: None, owners, ignore })
    }
}

/// Cross-entropy of contiguous logits `[…, d]` with targets, summed or averaged per sample. Returns the losses `[samples]`; for every row
/// the largest logit m and ln Σ exp(x − m); and the targets with the weights that the backward pass needs.
pub(crate) fn cross_entropy(
    x: &Array,
    mut targets: Targets,
    mean: bool,
    smoothing: f64,
) -> Result<(Array, Array, Targets)> {
    let gpu = targets.ids.gpu().ok_or_else(|| Error::device("cross_entropy", "targets are on the CPU"))?;
    let (rows, d, count) = (targets.ids.numel(), *x.shape().last().unwrap_or(&1), targets.owners.count);
    let fresh = |n: usize| Array::uninit_on(gpu, &[n], x.dtype().compute());
    let (loss, lse, weight) = (fresh(rows)?, fresh(2 * rows)?, fresh(rows)?);
    if rows == 0 {
        let out = Array::zeros(&[count], (x.dtype().compute(), gpu));
        targets.weight = Some(weight);
        return Ok((out, lse, targets));
    }
    let out = fresh(count)?;
    let l = Launch::new(gpu, "loss", &format!("cross_entropy_{}", suffix(x.dtype())))?.grid(blocks(rows, d), 1, 1);
    let l = l.array(x).array(&targets.ids).array(&loss).array(&lse).val(rows as i64).val(d as i64);
    l.val(smoothing).val(targets.ignore).run()?;
    let name = format!("sample_loss_{}", suffix(loss.dtype()));
    let l = Launch::new(gpu, "loss", &name)?.grid(count.div_ceil(8), 1, 1).array(&loss).array(&targets.ids);
    let l = l.optional(targets.owners.offsets.as_ref()).optional(targets.owners.order.as_ref());
    let l = l.array(&out).array(&weight).val(count as i64).val(targets.owners.each as i64);
    l.val(targets.ignore).val(mean as i32).run()?;
    targets.weight = Some(weight);
    Ok((out, lse, targets))
}

/// The gradient of the logits, given `grad [samples]`.
pub(crate) fn cross_entropy_grad(
    (x, lse): (&Array, &Array),
    targets: &Targets,
    grad: &Array,
    smoothing: f64,
) -> Result<Array> {
    let op = "cross_entropy";
    let (Some(gpu), Some(weight)) = (x.gpu(), &targets.weight) else {
        return Err(Error::device(op, "the gradient was asked for before the loss"));
    };
    let grad = grad.contiguous();
    let (rows, d) = (targets.ids.numel(), *x.shape().last().unwrap_or(&1));
    let out = Array::uninit_on(gpu, x.shape(), x.dtype())?;
    if rows > 0 {
        let name = format!("cross_entropy_grad_{}", suffix(x.dtype()));
        let l = Launch::new(gpu, "loss", &name)?.grid(blocks(rows, d), 1, 1);
        let l = l.array(x).array(lse).array(&targets.ids).array(weight).array(&grad);
        let l = l.optional(targets.owners.owner.as_ref()).array(&out).val(rows as i64).val(d as i64);
        l.val(targets.owners.each as i64).val(smoothing).val(targets.ignore).run()?;
    }
    Ok(out)
}

/// softplus(x) − x·t, element by element.
pub(crate) fn bce(gpu: &Arc<Gpu>, x: &Array, t: &Array) -> Result<Array> {
    let out = Array::uninit_on(gpu, x.shape(), x.dtype())?;
    let n = out.numel();
    let s: [i64; 19] = strided("binary_cross_entropy", x.shape(), [x.strides(), t.strides()])?;
    let l = Launch::new(gpu, "loss", &format!("bce_{}", suffix(x.dtype())))?.grid(n.div_ceil(1024), 1, 1);
    l.array(x).array(t).array(&out).val(n as i64).val(s).run()?;
    Ok(out)
}

/// (sigmoid(x) − t)·g.
pub(crate) fn bce_grad(gpu: &Arc<Gpu>, x: &Array, t: &Array, g: &Array) -> Result<Array> {
    let out = Array::uninit_on(gpu, x.shape(), x.dtype())?;
    let n = out.numel();
    let s: [i64; 25] = strided("binary_cross_entropy", x.shape(), [x.strides(), t.strides(), g.strides()])?;
    let l = Launch::new(gpu, "loss", &format!("bce_grad_{}", suffix(x.dtype())))?.grid(n.div_ceil(1024), 1, 1);
    l.array(x).array(t).array(g).array(&out).val(n as i64).val(s).run()?;
    Ok(out)
}

/// x·ln x, 0 where x is not positive.
pub(crate) fn xlogx(gpu: &Arc<Gpu>, x: &Array) -> Result<Array> {
    let out = Array::uninit_on(gpu, x.shape(), x.dtype())?;
    let n = out.numel();
    let s: [i64; 13] = strided("kl_divergence", x.shape(), [x.strides()])?;
    let l = Launch::new(gpu, "loss", &format!("xlogx_{}", suffix(x.dtype())))?.grid(n.div_ceil(1024), 1, 1);
    l.array(x).array(&out).val(n as i64).val(s).run()?;
    Ok(out)
}
