//! Losses. Each returns one value per sample, `[B]`; the training step computes the mean over the batch.

pub(crate) mod cpu;
pub(crate) mod cuda;

use crate::array::Array;
use crate::autograd::{
    Case, Cotangents, Differentiable, Gen, NO_PARAMS, OpInfo, Owner, Rule, Whose, one, samples_or_leading,
};
use crate::base::{DType, Element, Error, Float, Result};
use crate::device::spans;
use crate::kernels::elementwise as ew;
use crate::kernels::{Exact, Half, dispatch};
use crate::{Samples, Tensor, with_float};
use smallvec::SmallVec;

/// The reduction of rows to a sample's loss.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Reduce {
    /// The mean over the sample's values that are not ignored.
    #[default]
    Mean,
    /// Their sum.
    Sum,
}

/// Options of [`cross_entropy`].
#[derive(Clone, Debug)]
pub struct CrossEntropy {
    /// Rows with this target are ignored. −100 by default, as in PyTorch; among u32 targets, which cannot be negative, u32::MAX
    /// ([`data::IGNORE`](crate::data::IGNORE)) stands for −100.
    pub ignore_index: Option<i64>,
    /// Share of the target that is distributed evenly over all classes, in [0, 1).
    pub label_smoothing: f64,
    /// The reduction of rows to a sample's loss.
    pub reduce: Reduce,
    /// The sample map of the rows; by default dimension 0 counts samples.
    pub samples: Option<Samples>,
}

impl Default for CrossEntropy {
    fn default() -> Self {
        CrossEntropy { ignore_index: Some(-100), label_smoothing: 0.0, reduce: Reduce::Mean, samples: None }
    }
}

static CROSS_ENTROPY: OpInfo = OpInfo {
    name: "cross_entropy",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[
        |g: &mut Gen| {
            let (b, t, c) = (g.extent(1, 3), g.extent(0, 4), g.extent(1, 6));
            let targets = g.ids(&[b, t], c);
            // Rows of a sample need not be consecutive.
            let owner: Vec<u32> = (0..b * t).map(|_| g.size(0, b - 1) as u32).collect();
            let samples = if g.chance(0.3) { Some(Samples::owners(owner, b)?) } else { None };
            let options = CrossEntropy {
                ignore_index: g.chance(0.5).then_some(0),
                label_smoothing: if g.chance(0.5) { 0.1 } else { 0.0 },
                reduce: if g.chance(0.5) { Reduce::Mean } else { Reduce::Sum },
                samples,
            };
            Ok(Case::new(vec![g.array(&[b, t, c])], move |x| cross_entropy(&x[0], &targets, &options)))
        },
        |g| {
            // Targets in i64, some of which are ignored.
            let (b, t, c) = (g.extent(1, 3), g.extent(0, 4), g.extent(1, 6));
            let ignore_index = g.chance(0.7).then_some(-100);
            let targets: Vec<i64> = (0..b * t)
                .map(|_| if ignore_index.is_some() && g.chance(0.3) { -100 } else { g.size(0, c - 1) as i64 })
                .collect();
            let targets = Array::from_slice(&targets, &[b, t])?;
            let options = CrossEntropy { ignore_index, ..CrossEntropy::default() };
            Ok(Case::new(vec![g.array(&[b, t, c])], move |x| {
                cross_entropy(&x[0], targets.to(&x[0].device())?, &options)
            }))
        },
    ],
};
static BCE: OpInfo = OpInfo {
    name: "binary_cross_entropy",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[
        |g: &mut Gen| {
            let s = g.shape(2);
            let t = Tensor::new(g.array_in(&s, 0.0, 1.0));
            Ok(Case::new(vec![g.array(&s)], move |x| binary_cross_entropy_with_logits(&x[0], &t, Reduce::Mean)))
        },
        // Targets that have a gradient as well.
        |g| {
            let s = g.shape(2);
            let inputs = vec![g.array(&s), g.array_in(&s, 0.1, 0.9)];
            Ok(Case::new(inputs, |x| binary_cross_entropy_with_logits(&x[0], &x[1], Reduce::Sum)))
        },
    ],
};

static KL: OpInfo = OpInfo {
    name: "kl_divergence",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[
        |g: &mut Gen| {
            let s = [g.extent(0, 3), g.extent(2, 4)];
            let t = Tensor::new(g.array_in(&s, 0.0, 1.0));
            Ok(Case::new(vec![g.array(&s)], move |x| {
                kl_divergence(&x[0].log_softmax(-1)?, &t.to(&x[0].device())?, Reduce::Mean)
            }))
        },
        // Targets that have a gradient as well.
        |g| {
            let s = [g.extent(0, 3), g.extent(2, 4)];
            let inputs = vec![g.array(&s), g.array_in(&s, 0.1, 0.9)];
            Ok(Case::new(inputs, |x| kl_divergence(&x[0].log_softmax(-1)?, &x[1], Reduce::Mean)))
        },
    ],
};

/// The registry entries of this family.
pub static OPS: &[&OpInfo] = &[&CROSS_ENTROPY, &BCE, &KL];

/// The row information that the backward pass needs.
enum Rows {
    Cpu { targets: Vec<usize>, weight: Vec<f64> },
    Gpu(Box<cuda::Targets>),
}

struct Back {
    logits: Array,
    /// For each row the largest logit m, and ln Σ exp(x − m).
    lse: Array,
    rows: Rows,
    samples: Samples,
    smoothing: f64,
}

impl Rule for Back {
    fn info(&self) -> &'static OpInfo {
        &CROSS_ENTROPY
    }
    fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
        let c = *self.logits.shape().last().unwrap_or(&1);
        let own = matches!(y.owner, Owner::Every { run: 1 }) && self.samples.count() == y.count;
        one(match own {
            true => Owner::rows(&self.samples, c),
            false if self.samples.is_on_host() => y.sent(self.samples.count(), &self.samples.owner_ids(), c),
            false => Owner::Unknown,
        })
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        let d = *self.logits.shape().last().unwrap_or(&1);
        let dx = dispatch(
            [self.logits.clone(), self.lse.clone(), grad],
            Half::Native,
            |[logits, lse, grad]| {
                let Rows::Cpu { targets, weight } = &self.rows else {
                    return Err(Error::device("cross_entropy", "the targets are on a GPU, the gradient on the CPU"));
                };
                let g = grad.to_f64();
                let mut dx = Array::uninit(logits.shape(), logits.dtype());
                with_float!("cross_entropy", logits.dtype(), |T| {
                    let f = <T as Element>::from_f64;
                    let w: Vec<T> = weight.iter().enumerate().map(|(r, w)| f(w * g[self.samples.owner(r)])).collect();
                    cpu::cross_entropy_backward::<T>(
                        (logits.as_slice()?, lse.as_slice()?),
                        d,
                        targets,
                        f(self.smoothing),
                        &w,
                        dx.fresh_mut(),
                    );
                    Ok(dx)
                })
            },
            |_, [logits, lse, grad]| match &self.rows {
                Rows::Gpu(targets) => cuda::cross_entropy_grad((&logits, &lse), targets, &grad, self.smoothing),
                Rows::Cpu { .. } => {
                    Err(Error::device("cross_entropy", "the targets are on the CPU, the gradient on a GPU"))
                }
            },
        )?;
        back.input(0, dx);
        Ok(())
    }
}

/// Cross-entropy of `logits [B, …, C]` with integer `targets [B, …]` (u32 or i64), fused with log-softmax; returns one loss per sample,
/// `[B]`, in nats. It saves the logits and two numbers per row. A sample whose rows are all ignored has loss 0 and no gradient.
///
/// Targets on the CPU are validated; a target on a GPU that is not a class gives a loss of NaN, since no error can be returned without
/// waiting for the GPU.
pub fn cross_entropy(logits: &Tensor, targets: impl AsRef<Array>, options: &CrossEntropy) -> Result<Tensor> {
    let targets = targets.as_ref();
    let _op = spans::op("cross_entropy");
    spans::cost(0.0, (logits.numel() * logits.dtype().size()) as f64);
    const OP: &str = "cross_entropy";
    logits.dtype().expect_float(OP)?;
    let Some((&c, lead)) = logits.shape().split_last() else {
        return Err(Error::shape(OP, "scalar logits; they must be [B, …, classes]"));
    };
    if targets.shape() != lead || !matches!(targets.dtype(), DType::U32 | DType::I64) {
        let (s, d) = (targets.shape(), targets.dtype());
        return Err(Error::shape(
            OP,
            format!("targets {s:?} {d} for logits {:?}: they must be {lead:?}, u32 or i64", logits.shape()),
        ));
    }
    if !(0.0..1.0).contains(&options.label_smoothing) {
        let message = format!("label smoothing {}; it must lie in [0, 1)", options.label_smoothing);
        return Err(Error::invalid(OP, message));
    }
    let samples = samples_or_leading(options.samples.as_ref(), logits.shape(), 1);
    let (n, smoothing) = (targets.numel(), options.label_smoothing);
    if samples.rows() != n {
        return Err(Error::shape(OP, format!("the samples map {} rows, there are {n}", samples.rows())));
    }
    // Targets on the CPU are validated before anything is queued.
    let ids = if targets.device().is_cpu() { class_ids(targets)? } else { Vec::new() };
    let outside = |&(_, &id): &(usize, &i64)| Some(id) != options.ignore_index && !(0..c as i64).contains(&id);
    if let Some((r, id)) = ids.iter().enumerate().find(outside) {
        return Err(Error::invalid(OP, format!("target {id} at row {r}, of only {c} classes")));
    }
    let x = logits.array().contiguous();
    // Losses and the sums over rows stay in f32, whatever the dtype of the logits.
    let Exact((out, lse, rows)) = dispatch(
        [x.clone()],
        Half::Native,
        |[x]| {
            let ids = if ids.is_empty() { class_ids(targets)? } else { ids };
            let mut counts = vec![0usize; samples.count()];
            let mut rows = Vec::with_capacity(n);
            for (r, id) in ids.into_iter().enumerate() {
                let counted = Some(id) != options.ignore_index;
                rows.push(if counted { id as usize } else { usize::MAX });
                counts[samples.owner(r)] += counted as usize;
            }
            let weight = |r: usize| match options.reduce {
                Reduce::Mean => 1.0 / counts[samples.owner(r)].max(1) as f64,
                Reduce::Sum => 1.0,
            };
            let weight: Vec<f64> = (0..n).map(weight).collect();
            let mut lse = Array::uninit(&[2 * n], x.dtype());
            let out = with_float!(OP, x.dtype(), |T| {
                let f = <T as Element>::from_f64;
                let mut loss = vec![<T as Float>::ZERO; n];
                cpu::cross_entropy::<T>(x.as_slice()?, c, &rows, f(smoothing), &mut loss, lse.fresh_mut());
                let mut sums = vec![0.0f64; samples.count()];
                for (r, l) in loss.iter().enumerate() {
                    sums[samples.owner(r)] += l.to_f64() * weight[r];
                }
                let sums: Vec<T> = sums.into_iter().map(f).collect();
                Array::from_slice(&sums, &[samples.count()])
            })?;
            Ok(Exact((out, lse, Rows::Cpu { targets: rows, weight })))
        },
        |gpu, [x]| {
            let targets = cuda::Targets::new(gpu, targets, samples.on_gpu(gpu)?, options.ignore_index)?;
            let (out, lse, targets) = cuda::cross_entropy(&x, targets, options.reduce == Reduce::Mean, smoothing)?;
            Ok(Exact((out, lse, Rows::Gpu(Box::new(targets)))))
        },
    )?;
    Ok(Tensor::record(out, &[logits], &[], || Back { logits: x, lse, rows, samples, smoothing }))
}

/// Targets on the host as i64; u32::MAX becomes −100.
fn class_ids(targets: &Array) -> Result<Vec<i64>> {
    match targets.dtype() {
        DType::I64 => targets.to_vec::<i64>(),
        _ => Ok(targets.to_vec::<u32>()?.into_iter().map(|t| if t == u32::MAX { -100 } else { t as i64 }).collect()),
    }
}

/// Reduces all dimensions except dimension 0.
fn per_sample(x: &Tensor, reduce: Reduce) -> Result<Tensor> {
    let Some(&b) = x.shape().first() else {
        return Err(Error::shape("loss", "a scalar has no sample axis"));
    };
    let each = x.numel().checked_div(b).unwrap_or(0);
    let rows = x.reshape(&[b, each])?;
    match reduce {
        Reduce::Mean if each > 0 => rows.mean(&[1], false),
        _ => rows.sum(&[1], false),
    }
}

/// Binary cross-entropy max(x, 0) − x·t + ln(1 + e^{−|x|}) of logits x and targets t in [0, 1], both `[B, …]`; returns one loss per sample,
/// `[B]`. Both inputs have gradients.
pub fn binary_cross_entropy_with_logits(logits: &Tensor, targets: &Tensor, reduce: Reduce) -> Result<Tensor> {
    let _op = spans::op("binary_cross_entropy");
    if logits.shape() != targets.shape() {
        let message = format!("logits {:?} and targets {:?} differ", logits.shape(), targets.shape());
        return Err(Error::shape("binary_cross_entropy", message));
    }
    struct Bce {
        x: Array,
        t: Array,
    }
    impl Rule for Bce {
        fn info(&self) -> &'static OpInfo {
            &BCE
        }
        fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
            [y.same(), y.same()].into_iter().collect()
        }
        fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
            if back.needs(1) {
                back.input(1, Tensor::new(self.x.clone()).neg()?.mul(&Tensor::new(grad.clone()))?.into_array());
            }
            if !back.needs(0) {
                return Ok(());
            }
            let dx = dispatch(
                [self.x.clone(), self.t.clone(), grad],
                Half::Native,
                |[x, t, grad]| {
                    with_float!("binary_cross_entropy", x.dtype(), |T| {
                        let d = ew::zip::<T, T, T>("binary_cross_entropy", &x, &t, |x, t| x.sigmoid() - t)?;
                        ew::zip_owned::<T, T>("binary_cross_entropy", d, &grad, |d, g| d * g)
                    })
                },
                |gpu, [x, t, grad]| cuda::bce_grad(gpu, &x, &t, &grad),
            )?;
            back.input(0, dx);
            Ok(())
        }
    }
    // A loss is an f32 number: 16-bit logits and targets are widened before the computation, not after it.
    let compute = logits.dtype().compute();
    let (x, t) = (logits.cast(compute)?, targets.cast(compute)?);
    let y = dispatch(
        [x.array().clone(), t.array().clone()],
        Half::Native,
        |[x, t]| {
            with_float!("binary_cross_entropy", x.dtype(), |T| {
                ew::zip::<T, T, T>("binary_cross_entropy", &x, &t, |x: T, t| x.softplus() - x * t)
            })
        },
        |gpu, [x, t]| cuda::bce(gpu, &x, &t),
    )?;
    let y = Tensor::record(y, &[&x, &t], &[], || Bce { x: x.array().clone(), t: t.array().clone() });
    per_sample(&y, reduce)
}

/// Squared error (x − t)² of `[B, …]`; returns one loss per sample, `[B]`.
pub fn mse_loss(x: &Tensor, targets: &Tensor, reduce: Reduce) -> Result<Tensor> {
    if x.shape() != targets.shape() {
        return Err(Error::shape("mse_loss", format!("{:?} and targets {:?} differ", x.shape(), targets.shape())));
    }
    let (x, targets) = (x.cast(x.dtype().compute())?, targets.cast(targets.dtype().compute())?);
    per_sample(&x.sub(&targets)?.square()?, reduce)
}

/// KL divergence Σ t·(ln t − log_probs) over the last dimension, where terms with t = 0 are 0; the rows are reduced to one loss per sample,
/// `[B]`.
pub fn kl_divergence(log_probs: &Tensor, targets: &Tensor, reduce: Reduce) -> Result<Tensor> {
    let _op = spans::op("kl_divergence");
    if log_probs.shape() != targets.shape() {
        let message = format!("{:?} and targets {:?} differ", log_probs.shape(), targets.shape());
        return Err(Error::shape("kl_divergence", message));
    }
    let log_probs = &log_probs.cast(log_probs.dtype().compute())?;
    let t = targets.cast(DType::F64)?;
    let t_log_t = match Tensor::would_record(&[targets], &[]) {
        // The derivative ln t + 1 of the targets comes from autograd; t·ln t is 0 where t is 0.
        true => t.clamp(f64::MIN_POSITIVE, f64::INFINITY)?.log()?.mul(&t)?,
        false => Tensor::new(dispatch(
            [t.into_array()],
            Half::Native,
            |[t]| ew::map::<f64, f64>(&t, |t| if t > 0.0 { t * t.ln() } else { 0.0 }),
            |gpu, [t]| cuda::xlogx(gpu, &t),
        )?),
    };
    let terms = t_log_t.cast(log_probs.dtype())?.sub(&targets.cast(log_probs.dtype())?.mul(log_probs)?)?;
    per_sample(&terms.sum(&[-1], true)?, reduce)
}
