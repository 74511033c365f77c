//! [`ParamGrad`]: a parameter's factored gradient and the queries on it.

use super::{Factor, Param};
use crate::array::Array;
use crate::autograd::factor::Norm;
use crate::autograd::factor::{cpu, cuda as gpu_factored};
use crate::base::{DType, Error, Result};
use crate::device::Device;
use crate::device::cpu::shared::Shared;
use crate::device::cuda::Gpu;
use crate::kernels::gemm::kernel::Kernels;
use crate::kernels::gemm::norms::{Bounded, UNCERTAIN, sum_sq, upwards};
use crate::with_float;
use smallvec::SmallVec;
use std::sync::Arc;

/// The gradient of one parameter over a batch, as the sum of one factor per use. The queries and their FLOPs:
///
/// | query | cost (linear layer, N rows in B samples of T rows, d × p) |
/// |---|---|
/// | [`sum`](ParamGrad::sum) | the ordinary 2·N·d·p |
/// | [`weighted_sum`](ParamGrad::weighted_sum) | the same |
/// | [`sample_sq_norms`](ParamGrad::sample_sq_norms) | the smaller of N·T·(d + p) and 2·N·d·p, O(B) memory |
/// | [`clipped_sum`](ParamGrad::clipped_sum) | norms and sum in one pass: 2·N·d·p |
/// | [`per_sample`](ParamGrad::per_sample) | 2·N·d·p, and B·d·p memory |
/// | [`gram`](ParamGrad::gram) | 2·T²·(d + p) per pair |
#[derive(Clone, Debug)]
pub struct ParamGrad {
    param: Param,
    samples: usize,
    factors: SmallVec<[Factor; 1]>,
    device: Device,
}

impl ParamGrad {
    /// A zero gradient over `samples` samples; add factors with [`ParamGrad::push`].
    pub fn new(param: Param, samples: usize) -> ParamGrad {
        let device = param.device();
        ParamGrad { param, samples, factors: SmallVec::new(), device }
    }
    /// Adds the factor of one use, moved to the parameter's device.
    pub fn push(&mut self, factor: Factor) -> Result<()> {
        let factor = factor.checked(self.param.name(), self.param.shape(), self.dtype())?;
        self.factors.push(factor.to(&self.device)?);
        Ok(())
    }
    /// The parameter.
    pub fn param(&self) -> &Param {
        &self.param
    }
    /// The factors, one per use.
    pub fn factors(&self) -> &[Factor] {
        &self.factors
    }
    /// Whether norms and clipped sum can be computed in one pass: possible with a single factor only.
    pub(crate) fn fuses(&self) -> bool {
        matches!(&self.factors[..], [one] if one.fuses())
    }
    /// FLOPs of a (weighted) sum.
    pub(crate) fn sum_flops(&self) -> f64 {
        self.factors.iter().map(Factor::flops).sum()
    }
    /// Number of samples of the batch: the length of the losses.
    pub fn samples(&self) -> usize {
        self.samples
    }
    /// Bytes held by the operands.
    pub fn bytes(&self) -> usize {
        self.factors.iter().map(Factor::bytes).sum()
    }
    fn dtype(&self) -> DType {
        self.param.dtype().compute()
    }
    fn gpu(&self) -> Option<&Arc<Gpu>> {
        self.device.gpu()
    }
    fn numel(&self) -> usize {
        self.param.numel()
    }
    /// Returns an error that names the parameter if some factor cannot separate this batch's samples.
    pub fn expect_samples(&self) -> Result<()> {
        for f in &self.factors {
            match f.samples() {
                Some(n) if n == self.samples => {}
                Some(n) => {
                    return Err(Error::privacy(format!(
                        "{} saw {n} samples where the losses have {}: give the layer a Samples map, or return one loss per sample",
                        self.param.name(),
                        self.samples
                    )));
                }
                None => {
                    return Err(Error::privacy(format!(
                        "{} entered as a dense tensor, which has no per-sample gradient: use a factored layer, \
                         Param::per_sample, or freeze it",
                        self.param.name()
                    )));
                }
            }
        }
        Ok(())
    }

    /// The batch gradient, in the parameter's shape (f32, or f64 for f64 parameters).
    pub fn sum(&self) -> Result<Array> {
        if let Some(gpu) = self.gpu() {
            return self.sum_on(gpu, None);
        }
        let mut out = Array::zeros(self.param.shape(), self.dtype());
        with_float!("sum", self.dtype(), |T| self.add_sum::<T>(None, out.as_mut_slice::<T>()?))?;
        Ok(out)
    }
    fn sum_on(&self, gpu: &Arc<Gpu>, weights: Option<&Array>) -> Result<Array> {
        let out = Array::zeros(&[self.numel()], (self.dtype(), gpu));
        self.add_on(weights, &out)?;
        out.reshape(self.param.shape())
    }
    /// Adds Σᵢ wᵢ·gᵢ (or the plain sum) to `out [numel]`, on the GPU; `weights [B]` has the dtype of `out`.
    pub(crate) fn add_on(&self, weights: Option<&Array>, out: &Array) -> Result<()> {
        let gpu = out.gpu().ok_or_else(|| Error::autograd("sum", "the gradient is on the CPU"))?;
        self.factors.iter().try_for_each(|f| f.add_on(gpu, weights, out))
    }
    /// Upper bounds on |gᵢ|² per sample in the GPU's memory, `[B]` f64, added to `base` if it is given.
    pub(crate) fn sq_bounds_on(&self, gpu: &Arc<Gpu>, base: Option<Array>) -> Result<Array> {
        self.expect_samples()?;
        gpu_factored::sq_bounds(gpu, &self.factors, (self.samples, self.numel()), base)
    }
    /// Adds Σᵢ wᵢ·gᵢ (or the plain sum) to a slice of the parameter's size.
    pub(crate) fn add_sum<T: Kernels>(&self, weights: Option<&[f64]>, out: &mut [T]) -> Result<()> {
        self.factors.iter().try_for_each(|f| f.add_to::<T>(weights, out))
    }
    /// Σᵢ wᵢ·gᵢ, one weight per sample, in the parameter's shape. A zero weight removes a sample, even a non-finite one.
    pub fn weighted_sum(&self, weights: &[f64]) -> Result<Array> {
        if let Some(gpu) = self.gpu() {
            self.expect_weights(weights)?;
            return self.sum_on(gpu, Some(&gpu_factored::weights(gpu, weights, self.dtype())?));
        }
        let mut out = Array::zeros(self.param.shape(), self.dtype());
        with_float!("weighted_sum", self.dtype(), |T| self.add_weighted::<T>(weights, out.as_mut_slice::<T>()?))?;
        Ok(out)
    }
    pub(crate) fn add_weighted<T: Kernels>(&self, weights: &[f64], out: &mut [T]) -> Result<()> {
        self.expect_weights(weights)?;
        self.add_sum(Some(weights), out)
    }
    fn expect_weights(&self, weights: &[f64]) -> Result<()> {
        self.expect_samples()?;
        if weights.len() != self.samples {
            return Err(Error::shape(
                "weighted_sum",
                format!("{} weights for {} samples of {}", weights.len(), self.samples, self.param.name()),
            ));
        }
        Ok(())
    }
    /// |gᵢ|² per sample, `B` values; exact also for parameters that are used twice or tied.
    pub fn sample_sq_norms(&self) -> Result<Vec<f64>> {
        if let Some(gpu) = self.gpu() {
            self.expect_samples()?;
            let mut sq: Vec<f64> =
                gpu_factored::sq_norms(gpu, &self.factors, (self.samples, self.numel()))?.to_vec()?;
            sq.iter_mut().filter(|s| **s < 0.0).for_each(|s| *s = 0.0);
            return Ok(sq);
        }
        Ok(self.norms()?.iter().map(|n| if n.sq.value < 0.0 { 0.0 } else { n.sq.value }).collect())
    }
    /// Squared norms per sample with their error bounds, on the CPU.
    fn norms(&self) -> Result<Vec<Norm>> {
        self.expect_samples()?;
        let factors = self.sorted()?;
        with_float!("sample_sq_norms", self.dtype(), |T| {
            cpu::collect(self.samples, |i| match &factors[..] {
                [one] => one.norm::<T>(i, self.numel()),
                all => self.norm_of_uses::<T>(all, i),
            })
        })
    }
    /// The norm of sample `i` of a parameter with several uses: from the inner products of all pairs of uses, or from the gradient if that
    /// is cheaper to form or the inner products cancel.
    fn norm_of_uses<T: Kernels>(&self, factors: &[Factor], i: usize) -> Result<Norm> {
        let rows: usize = factors.iter().map(|f| f.rows_of(i)).sum();
        let widths = factors.iter().map(Factor::widths).max().unwrap_or(0);
        let mut norm = Norm { rows, ..Norm::default() };
        let pairs = rows * rows / 2 * widths > rows * self.numel() + 2 * self.numel();
        if !pairs {
            for (k, f) in factors.iter().enumerate() {
                let own = f.norm::<T>(i, self.numel())?;
                norm.sq += own.sq;
                norm.reach += own.reach;
                for other in &factors[k + 1..] {
                    let cross = f.inner::<T>(i, other, i, self.numel())?;
                    norm.sq += Bounded { value: 2.0 * cross.value, error: 2.0 * cross.error };
                }
            }
            let sizes = norm.reach * norm.reach;
            norm.sq.error += f64::EPSILON * factors.len() as f64 * sizes;
            if norm.sq.error <= UNCERTAIN * norm.sq.value {
                return Ok(norm);
            }
        } else {
            for f in factors {
                norm.reach += f.norm::<T>(i, self.numel())?.reach;
            }
        }
        let mut x = vec![T::ZERO; self.numel()];
        factors.iter().try_for_each(|f| f.sample_add::<T>(i, &mut x))?;
        Ok(Norm { sq: Bounded { value: sum_sq(&x), error: 0.0 }, ..norm })
    }
    /// Upper bounds on the squared norms of the samples' contributions to a weighted sum, on the CPU: the norms by which clipping divides.
    fn sq_bounds(&self) -> Result<Vec<f64>> {
        let chain = self.factors.iter().map(Factor::chain).sum();
        let norms = self.norms()?;
        with_float!("sample_sq_norms", self.dtype(), |T| Ok(norms.iter().map(|n| n.bound::<T>(chain)).collect()))
    }
    /// Norms and clipped sum in one pass, for a clipping group whose other members' squared norms are already in `base`: totalᵢ = baseᵢ +
    /// |gᵢ|², and Σᵢ clip(totalᵢ)·gᵢ. Returns the sum and the totals.
    pub fn clipped_sum(&self, base: &[f64], clip: &(dyn Fn(f64) -> f64 + Sync)) -> Result<(Array, Vec<f64>)> {
        if let Some(gpu) = self.gpu() {
            self.expect_base(base)?;
            let bounds: Vec<f64> = self.sq_bounds_on(gpu, None)?.to_vec()?;
            let totals: Vec<f64> = bounds.iter().zip(base).map(|(n, b)| n + b).collect();
            let weights: Vec<f64> = totals.iter().map(|&t| clip(t)).collect();
            let weights = gpu_factored::weights(gpu, &weights, self.dtype())?;
            return Ok((self.sum_on(gpu, Some(&weights))?, totals));
        }
        let mut out = Array::zeros(self.param.shape(), self.dtype());
        let totals =
            with_float!("clipped_sum", self.dtype(), |T| self.add_clipped::<T>(base, clip, out.as_mut_slice::<T>()?))?;
        Ok((out, totals))
    }
    pub(crate) fn add_clipped<T: Kernels>(
        &self,
        base: &[f64],
        clip: &(dyn Fn(f64) -> f64 + Sync),
        out: &mut [T],
    ) -> Result<Vec<f64>> {
        self.expect_base(base)?;
        if let [one] = &self.factors[..]
            && let Some(totals) = one.clipped_add::<T>(base, clip, out)?
        {
            return Ok(totals);
        }
        let totals: Vec<f64> = self.sq_bounds()?.iter().zip(base).map(|(n, b)| n + b).collect();
        let weights: Vec<f64> = totals.iter().map(|&t| clip(t)).collect();
        self.add_sum(Some(&weights), out)?;
        Ok(totals)
    }
    fn expect_base(&self, base: &[f64]) -> Result<()> {
        self.expect_samples()?;
        if base.len() != self.samples {
            return Err(Error::shape("clipped_sum", format!("{} norms for {} samples", base.len(), self.samples)));
        }
        Ok(())
    }
    /// The gradient in the form in which it is best kept until the samples' weights are known, and an upper bound on |gᵢ|² per sample.
    ///
    /// If the per-sample gradients of a single use take no more memory than its operands, they are formed: the norms need them anyway, and
    /// the weighted sum is then one pass over them instead of a second product. The same is done for a parameter that is used several
    /// times.
    pub(crate) fn kept(self) -> Result<(ParamGrad, Vec<f64>)> {
        let formed = self.samples * self.numel() * self.dtype().size();
        let single = self.factors.len() == 1;
        if let [one] = &self.factors[..]
            && one.forms_for_norms()
            && formed <= self.bytes()
        {
            self.expect_samples()?;
            let shape: Vec<usize> = std::iter::once(self.samples).chain(self.param.shape().iter().copied()).collect();
            let mut grads = Array::uninit(&shape, self.dtype());
            let norms = with_float!("sample_sq_norms", self.dtype(), |T| {
                let mut norms = one.form::<T>(grads.fresh_mut::<T>())?;
                norms.iter_mut().for_each(|n| *n *= upwards(T::UNIT));
                Ok(norms)
            })?;
            return Ok((ParamGrad { factors: smallvec::smallvec![Factor::PerSample { grads }], ..self }, norms));
        }
        let sums = self.factors.iter().all(Factor::forms_as_it_sums) && 2 * formed <= self.bytes();
        let kept = match sums || (!single && formed <= self.bytes()) {
            true => {
                let grads = self.per_sample()?;
                ParamGrad { factors: smallvec::smallvec![Factor::PerSample { grads }], ..self }
            }
            false => self,
        };
        let norms = kept.sq_bounds()?;
        Ok((kept, norms))
    }
    /// Every sample's gradient: `[B, shape…]`. Takes B times the parameter's memory.
    pub fn per_sample(&self) -> Result<Array> {
        self.expect_samples()?;
        let shape: Vec<usize> = std::iter::once(self.samples).chain(self.param.shape().iter().copied()).collect();
        if let Some(gpu) = self.gpu() {
            if self.factors.is_empty() {
                return Ok(Array::zeros(&shape, (self.dtype(), gpu)));
            }
            return gpu_factored::per_sample(gpu, &self.factors, 0..self.samples, self.numel())?.reshape(&shape);
        }
        let factors = self.sorted()?;
        let mut out = Array::zeros(&shape, self.dtype());
        with_float!("per_sample", self.dtype(), |T| {
            let all = Shared::new(out.as_mut_slice::<T>()?);
            cpu::collect(self.samples, |i| {
                // SAFETY: each sample has its own part.
                let g = unsafe { all.slice(i * self.numel()..(i + 1) * self.numel()) };
                factors.iter().try_for_each(|f| f.sample_add::<T>(i, g))
            })
        })?;
        Ok(out)
    }
    /// ⟨gᵢ, g′ⱼ⟩ for every sample i of this batch and j of `other`'s (the same parameter): `[B, B′]` f64, without forming a gradient.
    /// Influence functions and data attribution use it.
    pub fn gram(&self, other: &ParamGrad) -> Result<Array> {
        if self.param != other.param {
            return Err(Error::invalid("gram", format!("{} against {}", self.param.name(), other.param.name())));
        }
        self.expect_samples()?;
        other.expect_samples()?;
        if let Some(gpu) = self.gpu() {
            let counts = (self.samples, other.samples);
            return gpu_factored::gram(gpu, &self.factors, &other.factors, counts, self.numel());
        }
        let (a, b, n) = (self.sorted()?, other.sorted()?, other.samples);
        let pairs = with_float!("gram", self.dtype(), |T| {
            cpu::collect(self.samples * n, |k| {
                let mut sum = 0.0;
                for f in &a {
                    for h in &b {
                        sum += f.inner::<T>(k / n, h, k % n, self.numel())?.value;
                    }
                }
                Ok(sum)
            })
        })?;
        Array::from_slice(&pairs, &[self.samples, n])
    }
    fn sorted(&self) -> Result<SmallVec<[Factor; 1]>> {
        self.factors.iter().map(Factor::sorted).collect()
    }
}
