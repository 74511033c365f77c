//! Losses. Each returns one value per sample, `[B]`: the mean over the batch is the step's business.

pub(crate) mod cpu;
pub(crate) mod cuda;

use crate::array::Array;
use crate::autograd::{Case, Differentiable, Flow, Gen, NO_PARAMS, OpInfo, Rule, samples_or_leading};
use crate::base::{DType, Element, Error, Float, Result};
use crate::device::spans;
use crate::kernels::elementwise as ew;
use crate::{Samples, Tensor, with_float};

/// How rows become a sample's loss.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Reduce {
    /// The mean over the sample's values that count.
    #[default]
    Mean,
    /// Their sum.
    Sum,
}

/// Options of [`cross_entropy`].
#[derive(Clone, Debug)]
pub struct CrossEntropy {
    /// Rows with this target do not count.
    pub ignore_index: Option<u32>,
    /// Share of the target spread evenly over all classes, in [0, 1).
    pub label_smoothing: f64,
    /// How rows become a sample's loss.
    pub reduce: Reduce,
    /// Whose rows, if not dimension 0's.
    pub samples: Option<Samples>,
}

impl Default for CrossEntropy {
    fn default() -> Self {
        CrossEntropy { ignore_index: Some(u32::MAX), label_smoothing: 0.0, reduce: Reduce::Mean, samples: None }
    }
}

static CROSS_ENTROPY: OpInfo = OpInfo {
    name: "cross_entropy",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[|g: &mut Gen| {
        let (b, t, c) = (g.size(1, 3), g.size(1, 4), g.size(1, 6));
        let targets = g.ids(&[b, t], c);
        let options = CrossEntropy {
            ignore_index: g.chance(0.5).then_some(0),
            label_smoothing: if g.chance(0.5) { 0.1 } else { 0.0 },
            reduce: if g.chance(0.5) { Reduce::Mean } else { Reduce::Sum },
            samples: None,
        };
        Ok(Case::new(vec![g.array(&[b, t, c])], move |x| cross_entropy(&x[0], &targets, &options)))
    }],
};
static BCE: OpInfo = OpInfo {
    name: "binary_cross_entropy",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[|g: &mut Gen| {
        let s = g.shape(2);
        let t = Tensor::new(g.array_in(&s, 0.0, 1.0));
        Ok(Case::new(vec![g.array(&s)], move |x| binary_cross_entropy_with_logits(&x[0], &t, Reduce::Mean)))
    }],
};

/// This family's entries.
pub static OPS: &[&OpInfo] = &[&CROSS_ENTROPY, &BCE];

/// What the backward needs of the rows.
enum Rows {
    Cpu { targets: Vec<usize>, weight: Vec<f64> },
    Gpu(Box<cuda::Targets>),
}

struct Back {
    logits: Array,
    lse: Array,
    rows: Rows,
    samples: Samples,
    smoothing: f64,
}

impl Rule for Back {
    fn info(&self) -> &'static OpInfo {
        &CROSS_ENTROPY
    }
    fn backward(&self, grad: Array, flow: &mut Flow) -> Result<()> {
        let d = *self.logits.shape().last().unwrap_or(&1);
        let (targets, weight) = match &self.rows {
            Rows::Cpu { targets, weight } => (targets, weight),
            Rows::Gpu(targets) => {
                let dx = cuda::cross_entropy_grad((&self.logits, &self.lse), targets, &grad, self.smoothing)?;
                flow.input(0, dx);
                return Ok(());
            }
        };
        let g = grad.to_f64();
        let mut dx = Array::uninit(self.logits.shape(), grad.dtype());
        with_float!("cross_entropy", grad.dtype(), T => {
            let f = <T as Element>::from_f64;
            let w: Vec<T> = weight.iter().enumerate().map(|(r, w)| f(w * g[self.samples.owner(r)])).collect();
            cpu::cross_entropy_backward::<T>(
                (self.logits.as_slice()?, self.lse.as_slice()?),
                d,
                targets,
                f(self.smoothing),
                &w,
                dx.fresh_mut(),
            );
            Ok(())
        })?;
        flow.input(0, dx);
        Ok(())
    }
}

/// Cross-entropy of `logits [B, …, C]` with integer `targets [B, …]` (u32), fused with log-softmax: one loss per sample.
/// Saves the logits and one number per row. A sample without a row that counts has loss 0 and no gradient.
///
/// Targets on the CPU are checked; one on a GPU that is no class gives a loss of NaN, since nothing waits for it.
pub fn cross_entropy(logits: &Tensor, targets: &Array, options: &CrossEntropy) -> Result<Tensor> {
    let _op = spans::op("cross_entropy");
    spans::cost(0.0, (logits.numel() * logits.dtype().size()) as f64);
    const OP: &str = "cross_entropy";
    logits.dtype().expect_float(OP)?;
    if logits.dtype().is_half() {
        return cross_entropy(&logits.cast(DType::F32)?, targets, options);
    }
    let Some((&c, lead)) = logits.shape().split_last() else {
        return Err(Error::shape(OP, "scalar logits; they must be [B, …, classes]"));
    };
    if targets.shape() != lead || targets.dtype() != DType::U32 {
        let (s, d) = (targets.shape(), targets.dtype());
        return Err(Error::shape(
            OP,
            format!("targets {s:?} {d} for logits {:?}: they must be {lead:?} u32", logits.shape()),
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
    let x = logits.array().contiguous();
    let gpu = x.gpu().cloned();
    let ids = match &gpu {
        Some(_) if targets.gpu().is_some() => Vec::new(),
        _ => targets.to_vec::<u32>()?,
    };
    if let Some((r, id)) = ids.iter().enumerate().find(|&(_, &id)| Some(id) != options.ignore_index && id as usize >= c)
    {
        return Err(Error::invalid(OP, format!("target {id} at row {r}, of only {c} classes")));
    }
    if let Some(gpu) = &gpu {
        let targets = cuda::Targets::new(gpu, targets, samples.on_gpu(gpu)?, options.ignore_index)?;
        let mean = options.reduce == Reduce::Mean;
        let (out, lse, targets) = cuda::cross_entropy(&x, targets, mean, smoothing)?;
        let back = || Back { logits: x, lse, rows: Rows::Gpu(Box::new(targets)), samples, smoothing };
        return Ok(Tensor::record(out, &[logits], &[], back));
    }
    let mut counts = vec![0usize; samples.count()];
    let mut rows = Vec::with_capacity(n);
    for (r, &id) in ids.iter().enumerate() {
        let counted = Some(id) != options.ignore_index;
        rows.push(if counted { id as usize } else { usize::MAX });
        counts[samples.owner(r)] += counted as usize;
    }
    let weight: Vec<f64> = (0..rows.len())
        .map(|r| match options.reduce {
            Reduce::Mean => 1.0 / counts[samples.owner(r)].max(1) as f64,
            Reduce::Sum => 1.0,
        })
        .collect();
    let mut lse = Array::uninit(&[rows.len()], x.dtype());
    let out = with_float!(OP, x.dtype(), T => {
        let f = <T as Element>::from_f64;
        let mut loss = vec![<T as Float>::ZERO; rows.len()];
        cpu::cross_entropy::<T>(x.as_slice()?, c, &rows, f(options.label_smoothing), &mut loss, lse.fresh_mut());
        let mut sums = vec![0.0f64; samples.count()];
        for (r, l) in loss.iter().enumerate() {
            sums[samples.owner(r)] += l.to_f64() * weight[r];
        }
        let sums: Vec<T> = sums.into_iter().map(f).collect();
        Array::from_slice(&sums, &[samples.count()])
    })?;
    let rows = Rows::Cpu { targets: rows, weight };
    Ok(Tensor::record(out, &[logits], &[], || Back { logits: x, lse, rows, samples, smoothing }))
}

/// Everything but dimension 0 reduced.
fn per_sample(x: &Tensor, reduce: Reduce) -> Result<Tensor> {
    let Some(&b) = x.shape().first() else {
        return Err(Error::shape("loss", "a scalar has no sample axis"));
    };
    let each = x.numel().checked_div(b).unwrap_or(0);
    let sum = x.reshape(&[b, each])?.sum(&[1], false)?;
    match reduce {
        Reduce::Sum => Ok(sum),
        Reduce::Mean => sum.mul_scalar(1.0 / each.max(1) as f64),
    }
}

/// max(x, 0) − x·t + ln(1 + e^{−|x|}) of logits x and targets t in [0, 1], both `[B, …]`: one loss per sample.
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
        fn backward(&self, grad: Array, flow: &mut Flow) -> Result<()> {
            if let Some(gpu) = grad.gpu() {
                flow.input(0, cuda::bce_grad(gpu, &self.x, &self.t, &grad)?);
                return Ok(());
            }
            with_float!("binary_cross_entropy", grad.dtype(), T => {
                let d = ew::zip::<T, T, T>("binary_cross_entropy", &self.x, &self.t, |x, t| x.sigmoid() - t)?;
                flow.input(0, ew::zip_owned::<T, T>("binary_cross_entropy", d, &grad, |d, g| d * g)?);
                Ok(())
            })
        }
    }
    let (x, t) = (logits.cast(logits.dtype().compute())?, targets.cast(logits.dtype().compute())?);
    let y = match x.array().gpu() {
        Some(gpu) => cuda::bce(gpu, x.array(), t.array())?,
        None => with_float!("binary_cross_entropy", x.dtype(), T => {
            ew::zip::<T, T, T>("binary_cross_entropy", x.array(), t.array(), |x: T, t| x.softplus() - x * t)
        })?,
    };
    let y = Tensor::record(y, &[&x], &[], || Bce { x: x.array().clone(), t: t.array().clone() });
    per_sample(&y, reduce)
}

/// (x − t)², `[B, …]`: one loss per sample.
pub fn mse_loss(x: &Tensor, targets: &Tensor, reduce: Reduce) -> Result<Tensor> {
    if x.shape() != targets.shape() {
        return Err(Error::shape("mse_loss", format!("{:?} and targets {:?} differ", x.shape(), targets.shape())));
    }
    let (x, targets) = (x.cast(x.dtype().compute())?, targets.cast(targets.dtype().compute())?);
    per_sample(&x.sub(&targets)?.square()?, reduce)
}

/// Σ t·(ln t − log_probs) over the last dimension, terms with t = 0 being 0; rows reduced per sample.
pub fn kl_divergence(log_probs: &Tensor, targets: &Tensor, reduce: Reduce) -> Result<Tensor> {
    if log_probs.shape() != targets.shape() {
        let message = format!("{:?} and targets {:?} differ", log_probs.shape(), targets.shape());
        return Err(Error::shape("kl_divergence", message));
    }
    let log_probs = &log_probs.cast(log_probs.dtype().compute())?;
    let t = targets.cast(DType::F64)?;
    let t_log_t = Tensor::new(match t.array().gpu() {
        Some(gpu) => cuda::xlogx(gpu, t.array())?,
        None => ew::map::<f64, f64>(t.array(), |t| if t > 0.0 { t * t.ln() } else { 0.0 })?,
    });
    let terms = t_log_t.cast(log_probs.dtype())?.sub(&targets.cast(log_probs.dtype())?.mul(log_probs)?)?;
    per_sample(&terms.sum(&[-1], true)?, reduce)
}
