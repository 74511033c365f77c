//! Layer, RMS and group norm.
//!
//! y = (x − mean)/√(var + ε)·gain + bias. The forward pass is one pass over memory; the backward pass reads x and dy once, and only the
//! mean and the reciprocal standard deviation of each row are saved for it. The factors of gains are scaled row sums, those of biases row
//! sums: both are exact per sample.

pub(crate) mod cpu;
pub(crate) mod cuda;

use crate::array::Array;
use crate::autograd::{
    Case, Cotangents, Differentiable, Factor, FactorRule, Gen, OpInfo, Owner, Rule, Whose, one, samples_or_leading,
};
use crate::base::{DType, Element, Error, Result};
use crate::device::cpu::shared::Shared;
use crate::device::spans;
use crate::kernels::lanes::bf16_blocks;
use crate::kernels::{Exact, Half, dispatch};
use crate::{Param, Samples, Tensor, with_float};
use smallvec::SmallVec;

fn case(g: &mut Gen, rms: bool) -> Result<Case> {
    // With only two values per row, layer norm gives ±1 whatever they are, and their gradient is a difference of rounding errors.
    let (b, t, d) = (g.count(0, 3), g.extent(0, 3), g.extent(3, 6));
    let (gain, bias) = (Param::new("gain", g.ordinary(&[d])), Param::new("bias", g.array(&[d])));
    let (x, params) = (g.array(&[b, t, d]), if rms { vec![gain.clone()] } else { vec![gain.clone(), bias.clone()] });
    Ok(Case::new(vec![x], move |x| match rms {
        true => rms_norm(&x[0], Some(&gain), 1e-5, None),
        false => layer_norm(&x[0], Some(&gain), Some(&bias), 1e-5, None),
    })
    .params(params)
    .samples(b))
}

macro_rules! info {
    ($id:ident, $name:literal, $kinds:expr, $case:expr) => {
        static $id: OpInfo = OpInfo {
            name: $name,
            differentiable: Differentiable::Yes,
            factor: FactorRule::Kinds($kinds),
            cases: &[$case],
        };
    };
}
info!(LAYER_NORM, "layer_norm", &["scaled row sum", "row sum"], |g| case(g, false));
info!(RMS_NORM, "rms_norm", &["scaled row sum"], |g| case(g, true));
info!(GROUP_NORM, "group_norm", &["scaled row sum", "row sum"], |g| {
    let (b, groups, each, s) = (g.count(0, 3), g.size(1, 2), g.extent(1, 3), g.extent(3, 4));
    let c = groups * each;
    let (gain, bias) = (Param::new("gain", g.ordinary(&[c])), Param::new("bias", g.array(&[c])));
    let (x, params) = (g.array(&[b, c, s]), vec![gain.clone(), bias.clone()]);
    Ok(Case::new(vec![x], move |x| group_norm(&x[0], groups, Some(&gain), Some(&bias), 1e-3)).params(params).samples(b))
});

/// The registry entries of this family.
pub static OPS: &[&OpInfo] = &[&LAYER_NORM, &RMS_NORM, &GROUP_NORM];

struct Back {
    info: &'static OpInfo,
    x: Array,
    stats: Array,
    gain: Option<Param>,
    bias: Option<Param>,
    center: bool,
    samples: Samples,
}

impl Rule for Back {
    fn info(&self) -> &'static OpInfo {
        self.info
    }
    fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
        one(y.mixing(y.shape.len() - 1, y.shape))
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        let d = *self.x.shape().last().unwrap_or(&1);
        let flat = [self.samples.rows(), d];
        let dy = grad.contiguous().reshape(&flat)?;
        let needs_xhat = self.gain.as_ref().is_some_and(|g| g.trainable());
        let wanted = (back.needs(0), needs_xhat);
        let factors = [&self.gain, &self.bias].into_iter().flatten().any(|p| p.trainable());
        let gain = self.gain.as_ref().map(|g| g.value().cast(self.stats.dtype()));
        let (name, center) = (self.info.name, self.center);
        // x̂ and dy are factors of the gradients of gain and bias: they are kept in f32.
        let (dx, Exact((xhat, dy))) = dispatch(
            [self.x.clone(), self.stats.clone(), dy],
            Half::Bf16,
            |[x, stats, dy]| {
                let half = (x.dtype(), dy.dtype()) == (DType::BF16, DType::BF16);
                if half && !factors {
                    let mut dx = wanted.0.then(|| Array::uninit(x.shape(), DType::BF16));
                    let gain = gain.as_ref().map(|g| g.as_slice::<f32>()).transpose()?;
                    let stats = stats.as_slice()?;
                    let operands = [x.as_slice()?, dy.as_slice()?];
                    bf16_blocks(d, operands, dx.as_mut().map(|a| a.fresh_mut()), |r, [x, dy], dx| {
                        cpu::norm_backward((x, &stats[2 * r.start..2 * r.end], dy), (d, center), gain, dx, None);
                    });
                    return Ok((dx, Exact((None, dy))));
                }
                let (x, dy) = (if half { x } else { x.cast(stats.dtype()) }, dy.cast(stats.dtype()));
                let dtype = dy.dtype();
                if half {
                    let mut dx = wanted.0.then(|| Array::uninit(x.shape(), DType::BF16));
                    let mut xhat = wanted.1.then(|| Array::uninit(&flat, dtype));
                    let gain = gain.as_ref().map(|g| g.as_slice::<f32>()).transpose()?;
                    let (stats, wide) = (stats.as_slice()?, dy.as_slice::<f32>()?);
                    let rows_of_xhat = xhat.as_mut().map(|a| Shared::new(a.fresh_mut::<f32>()));
                    bf16_blocks(d, [x.as_slice()?], dx.as_mut().map(|a| a.fresh_mut()), |r, [x], dx| {
                        let at = r.start * d..r.end * d;
                        // SAFETY: blocks are disjoint.
                        let xhat = rows_of_xhat.as_ref().map(|a| unsafe { a.slice(at.clone()) });
                        let operands = (x, &stats[2 * r.start..2 * r.end], &wide[at]);
                        cpu::norm_backward(operands, (d, center), gain, dx, xhat);
                    });
                    return Ok((dx, Exact((xhat, dy))));
                }
                let mut dx = wanted.0.then(|| Array::uninit(x.shape(), dtype));
                let mut xhat = wanted.1.then(|| Array::uninit(&flat, dtype));
                with_float!(name, dtype, |T| {
                    cpu::norm_backward::<T>(
                        (x.as_slice()?, stats.as_slice()?, dy.as_slice()?),
                        (d, center),
                        gain.as_ref().map(|g| g.as_slice::<T>()).transpose()?,
                        dx.as_mut().map(|a| a.fresh_mut()),
                        xhat.as_mut().map(|a| a.fresh_mut()),
                    );
                    Ok((dx, Exact((xhat, dy))))
                })
            },
            |gpu, [x, stats, dy]| {
                let wide = dy.dtype().is_half() && factors;
                let wanted = (wanted.0, wanted.1, wide);
                let (dx, xhat, wide) = cuda::norm_grad(gpu, (&x, &stats, &dy), gain.as_ref(), center, wanted)?;
                Ok((dx, Exact((xhat, wide.unwrap_or(dy)))))
            },
        )?;
        if let Some(dx) = dx {
            back.input(0, dx);
        }
        if let (Some(g), Some(scale)) = (&self.gain, xhat) {
            back.param(g, Factor::ScaledRowSum { grad: dy.clone(), scale, samples: self.samples.clone() });
        }
        if let Some(b) = &self.bias {
            back.param(b, Factor::RowSum { grad: dy, samples: self.samples.clone() });
        }
        Ok(())
    }
}

fn norm(
    info: &'static OpInfo,
    x: &Tensor,
    (gain, bias): (Option<&Param>, Option<&Param>),
    eps: f64,
    samples: Option<&Samples>,
) -> Result<Tensor> {
    x.dtype().expect_float(info.name)?;
    let Some(&d) = x.shape().last() else {
        return Err(Error::shape(info.name, "a scalar has no last dimension to normalise over"));
    };
    for p in [gain, bias].into_iter().flatten() {
        if p.shape() != [d] {
            let message = format!("{} is {:?}, the input {:?} needs [{d}]", p.name(), p.shape(), x.shape());
            return Err(Error::shape(info.name, message));
        }
    }
    if !(eps >= 0.0 && eps.is_finite()) {
        return Err(Error::invalid(info.name, format!("ε = {eps}; use a small positive number")));
    }
    let samples = samples_or_leading(samples, x.shape(), 1);
    let n = x.numel().checked_div(d).unwrap_or(0);
    if samples.rows() != n {
        return Err(Error::shape(info.name, format!("the samples map {} rows, the input has {n}", samples.rows())));
    }
    let (compute, center) = (x.dtype().compute(), info.name != "rms_norm");
    let xa = x.array().contiguous();
    let (g, b) = (gain.map(|p| p.value().cast(compute)), bias.map(|p| p.value().cast(compute)));
    let (y, Exact(stats)) = dispatch(
        [xa.clone()],
        Half::Bf16,
        |[x]| {
            let (mut y, mut stats) = (Array::uninit(x.shape(), x.dtype()), Array::uninit(&[n, 2], compute));
            if x.dtype() == DType::BF16 {
                let g = g.as_ref().map(|a| a.as_slice::<f32>()).transpose()?;
                let b = b.as_ref().map(|a| a.as_slice::<f32>()).transpose()?;
                let all = Shared::new(stats.fresh_mut::<f32>());
                bf16_blocks(d, [x.as_slice()?], Some(y.fresh_mut()), |r, [x], y| {
                    // SAFETY: blocks are disjoint.
                    let stats = unsafe { all.slice(2 * r.start..2 * r.end) };
                    if let Some(y) = y {
                        cpu::norm_forward(x, (d, center, eps as f32), (g, b), y, stats);
                    }
                });
                return Ok((y, Exact(stats)));
            }
            with_float!(info.name, compute, |T| {
                let g = g.as_ref().map(|a| a.as_slice::<T>()).transpose()?;
                let b = b.as_ref().map(|a| a.as_slice::<T>()).transpose()?;
                let options = (d, center, <T as Element>::from_f64(eps));
                cpu::norm_forward(x.as_slice::<T>()?, options, (g, b), y.fresh_mut(), stats.fresh_mut());
                Ok((y, Exact(stats)))
            })
        },
        |gpu, [x]| {
            let (y, stats) = cuda::norm(gpu, &x, (g.as_ref(), b.as_ref()), (eps, center))?;
            Ok((y, Exact(stats)))
        },
    )?;
    let params: Vec<&Param> = [gain, bias].into_iter().flatten().collect();
    let back = || Back { info, x: xa, stats, gain: gain.cloned(), bias: bias.cloned(), center, samples };
    Ok(Tensor::record(y, &[x], &params, back))
}

/// Layer norm over the last dimension of `x [B, …, d]` (Ba et al. 2016); gain and bias are `[d]`. Dimension 0 counts samples unless
/// `samples` maps the rows otherwise.
pub fn layer_norm(
    x: &Tensor,
    gain: Option<&Param>,
    bias: Option<&Param>,
    eps: f64,
    samples: Option<&Samples>,
) -> Result<Tensor> {
    let _op = spans::op("layer_norm");
    spans::cost(0.0, (2 * x.numel() * x.dtype().size()) as f64);
    norm(&LAYER_NORM, x, (gain, bias), eps, samples)
}

/// RMS norm x/√(mean(x²) + ε)·gain over the last dimension of `x [B, …, d]` (Zhang & Sennrich 2019); the gain is `[d]`.
pub fn rms_norm(x: &Tensor, gain: Option<&Param>, eps: f64, samples: Option<&Samples>) -> Result<Tensor> {
    let _op = spans::op("rms_norm");
    spans::cost(0.0, (2 * x.numel() * x.dtype().size()) as f64);
    norm(&RMS_NORM, x, (gain, None), eps, samples)
}

/// Group norm of `x [B, C, …]` over each of `groups` groups of channels (Wu & He 2018); gain and bias are `[C]`. Samples are dimension 0.
pub fn group_norm(x: &Tensor, groups: usize, gain: Option<&Param>, bias: Option<&Param>, eps: f64) -> Result<Tensor> {
    let _op = spans::op("group_norm");
    spans::cost(0.0, (2 * x.numel() * x.dtype().size()) as f64);
    let [b, c, ..] = x.shape()[..] else {
        return Err(Error::shape("group_norm", format!("input {:?}; it must be [B, C, …]", x.shape())));
    };
    if groups == 0 || !c.is_multiple_of(groups) {
        return Err(Error::invalid("group_norm", format!("{c} channels do not divide into {groups} groups")));
    }
    for p in [gain, bias].into_iter().flatten() {
        if p.shape() != [c] {
            return Err(Error::shape("group_norm", format!("{} is {:?}, not [{c}]", p.name(), p.shape())));
        }
    }
    if x.dtype().is_half() {
        return group_norm(&x.cast(DType::F32)?, groups, gain, bias, eps)?.cast(x.dtype());
    }
    let positions: usize = x.shape()[2..].iter().product();
    let flat = x.reshape(&[b, groups, c / groups * positions])?;
    let y = norm(&GROUP_NORM, &flat, (None, None), eps, None)?;
    // Channels are moved last, so that gain and bias act on rows of C elements; each row is a position of its sample.
    let rows = y.reshape(&[b, c, positions])?.transpose(1, 2)?;
    let z = affine(&rows, gain, bias)?;
    z.transpose(1, 2)?.reshape(x.shape())
}

/// x·gain + bias over the last dimension of `[B, rows, C]`, factored.
fn affine(x: &Tensor, gain: Option<&Param>, bias: Option<&Param>) -> Result<Tensor> {
    struct Affine {
        x: Array,
        gain: Option<Param>,
        bias: Option<Param>,
    }
    impl Rule for Affine {
        fn info(&self) -> &'static OpInfo {
            &GROUP_NORM
        }
        fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
            one(y.same())
        }
        fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
            let (c, samples) = (*grad.shape().last().unwrap_or(&1), Samples::leading(grad.shape(), 1));
            let dy = grad.contiguous().reshape(&[samples.rows(), c])?;
            let dy = dy.cast(dy.dtype().compute());
            if back.needs(0) {
                let dx = match &self.gain {
                    Some(g) => Tensor::new(g.value().cast(grad.dtype())).mul(&Tensor::new(grad))?.into_array(),
                    None => grad,
                };
                back.input(0, dx);
            }
            if let Some(g) = &self.gain {
                let scale = self.x.contiguous().reshape(&[samples.rows(), c])?.cast(dy.dtype());
                back.param(g, Factor::ScaledRowSum { grad: dy.clone(), scale, samples: samples.clone() });
            }
            if let Some(b) = &self.bias {
                back.param(b, Factor::RowSum { grad: dy, samples });
            }
            Ok(())
        }
    }
    let value = |p: &Param| Tensor::new(p.value().cast(x.dtype()));
    let mut y = x.detach();
    if let Some(g) = gain {
        y = y.mul(&value(g))?;
    }
    if let Some(b) = bias {
        y = y.add(&value(b))?;
    }
    let params: Vec<&Param> = [gain, bias].into_iter().flatten().collect();
    Ok(Tensor::record(y.into_array(), &[x], &params, || Affine {
        x: x.array().clone(),
        gain: gain.cloned(),
        bias: bias.cloned(),
    }))
}
