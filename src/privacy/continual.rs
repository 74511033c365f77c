//! Continual private pre-training with limited public data (Bu et al. 2024): curvature measured during training, and what it implies for
//! batch size, noise and the share of public data.
//!
//! A private gradient is g = (Σ Cᵢgᵢ + σ·N(0, I))/B. With c = E(Cᵢ), G the mean gradient, H the Hessian of the mean loss and Σ the
//! covariance of the gᵢ, the gain per sample of a step with the best learning rate is
//!
//! J(B) = ½·|G|⁴/(B·GᵀHG + tr(HΣ) + D(B)), D(B) = σ²·tr(H)/(B·c²),
//!
//! where D, the *decelerator*, is the only term that depends on the noise. The best batch size is B* = √(σ²·tr(H)/(c²·GᵀHG)). Public
//! training decreases tr(H) faster than GᵀHG; afterwards private training is nearly as fast as training without privacy.

use crate::array::Array;
use crate::autograd::{GradHook, Param, ParamGrad, Tensor};
use crate::base::{Error, Result, philox};
use crate::privacy::ClipFn;

/// The method that estimates traces.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Probes {
    /// Every coordinate and every sample: exact, for small models.
    Exact,
    /// Hutchinson's estimate from this number of random sign vectors, with this seed.
    Random(usize, u64),
}

/// Curvature of a loss at the current parameters. Measured on public data it costs no privacy; measured on private data it is not private.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Curvature {
    /// Mean loss.
    pub loss: f64,
    /// |G|².
    pub grad_sq: f64,
    /// GᵀHG.
    pub ghg: f64,
    /// tr(H), and its standard error if it is an estimate.
    pub trace_h: (f64, f64),
    /// tr(HΣ), and its standard error if it is an estimate.
    pub trace_h_sigma: (f64, f64),
    /// c, the mean clip factor.
    pub clip: f64,
    /// E|gᵢ|, the mean norm of per-sample gradients.
    pub mean_norm: f64,
}

impl Curvature {
    /// The decelerator D(B) = σ²·tr(H)/(B·c²).
    pub fn decelerator(&self, sigma: f64, batch: f64) -> f64 {
        sigma * sigma * self.trace_h.0 / (batch * self.clip * self.clip)
    }
    /// B* = √(σ²·tr(H)/(c²·GᵀHG)) at fixed σ: the private batch size with the best gain per sample. It is NaN if GᵀHG or tr(H) is negative:
    /// then there is none.
    pub fn best_batch(&self, sigma: f64) -> f64 {
        (sigma * sigma * self.trace_h.0 / (self.clip * self.clip * self.ghg)).sqrt()
    }
    /// B* and its standard error, computed from that of tr(H).
    pub fn best_batch_with_error(&self, sigma: f64) -> (f64, f64) {
        let b = self.best_batch(sigma);
        (b, 0.5 * b * self.trace_h.1 / self.trace_h.0)
    }
    /// J(B), the gain per sample of a private step at its best learning rate.
    pub fn gain_private(&self, sigma: f64, batch: f64) -> f64 {
        0.5 * self.grad_sq.powi(2) / (self.without_noise(batch) + self.decelerator(sigma, batch))
    }
    /// The same without privacy.
    pub fn gain_public(&self, batch: f64) -> f64 {
        0.5 * self.grad_sq.powi(2) / self.without_noise(batch)
    }
    /// The factor by which a private step needs more samples than a step without noise.
    pub fn slowdown(&self, sigma: f64, batch: f64) -> f64 {
        1.0 + self.decelerator(sigma, batch) / self.without_noise(batch)
    }
    /// The learning rate with the best gain of a private step, for sums that are divided by B.
    pub fn best_lr(&self, sigma: f64, batch: f64) -> f64 {
        self.grad_sq * batch / (self.clip * (self.without_noise(batch) + self.decelerator(sigma, batch)))
    }
    fn without_noise(&self, batch: f64) -> f64 {
        batch * self.ghg + self.trace_h_sigma.0
    }
}

/// Measures the curvature of the mean of `losses` (one per sample, the same samples at every call) with respect to the trainable `params`;
/// c is the mean factor of `clip` at threshold `r`.
///
/// Hessian-vector products are central differences of gradients along the vector, with a step that changes the parameters by 10⁻³ of their
/// size in f32 and 10⁻⁵ in f64. Each takes two gradients. Exact traces need one product per coordinate and one per sample.
pub fn curvature(
    losses: &dyn Fn() -> Result<Tensor>,
    params: &[Param],
    (clip, r): (ClipFn, f64),
    probes: Probes,
) -> Result<Curvature> {
    let model = Model { losses, params: params.iter().filter(|p| p.trainable()).collect() };
    let y = losses()?;
    let n = y.numel();
    if y.rank() != 1 || n == 0 {
        return Err(Error::shape("curvature", format!("losses must be one per sample, got {:?}", y.shape())));
    }
    let loss = y.array().to_f64().iter().sum::<f64>() / n as f64;
    let mut kept = Kept(Vec::new());
    y.backward_into(&mut kept)?;
    let grads = model.ordered(kept.0)?;
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    // Σ wᵢ·gᵢ over all parameters.
    let weighted = |w: &[f64]| -> Result<Vec<f64>> {
        let mut out = Vec::new();
        for g in &grads {
            out.extend(g.weighted_sum(w)?.to_f64());
        }
        Ok(out)
    };
    let mut sq = vec![0.0; n];
    for g in &grads {
        sq.iter_mut().zip(g.sample_sq_norms()?).for_each(|(s, g)| *s += g);
    }
    let mean = weighted(&vec![1.0 / n as f64; n])?;
    let grad_sq = dot(&mean, &mean);
    let ghg = dot(&mean, &model.hessian_times(&mean, n)?);
    let clip = sq.iter().map(|&s| clip.factor(s, r)).sum::<f64>() / n as f64;
    let mean_norm = sq.iter().map(|s| s.sqrt()).sum::<f64>() / n as f64;
    let p = mean.len();
    let (mut h, mut hs) = (Vec::new(), Vec::new());
    match probes {
        Probes::Exact => {
            let mut v = vec![0.0; p];
            let (mut trace, mut samples) = (0.0, 0.0);
            for i in 0..p {
                v[i] = 1.0;
                trace += model.hessian_times(&v, n)?[i];
                v[i] = 0.0;
            }
            for i in 0..n {
                let g = weighted(&(0..n).map(|j| (i == j) as u8 as f64).collect::<Vec<f64>>())?;
                samples += dot(&g, &model.hessian_times(&g, n)?);
            }
            h.push(trace);
            hs.push(samples / n as f64);
        }
        Probes::Random(count, seed) => {
            if count == 0 {
                return Err(Error::invalid("curvature", "0 probes; 100 give the trace to about a tenth"));
            }
            let sign = |stream: u64, i: usize| if philox::bits(seed, stream, i as u64) & 1 == 1 { 1.0 } else { -1.0 };
            for k in 0..count as u64 {
                let v: Vec<f64> = (0..p).map(|i| sign(2 * k, i)).collect();
                h.push(dot(&v, &model.hessian_times(&v, n)?));
                // E[(Σ ξᵢgᵢ)ᵀH(Σ ξᵢgᵢ)] = Σ gᵢᵀHgᵢ.
                let xi: Vec<f64> = (0..n).map(|i| sign(2 * k + 1, i) / (n as f64).sqrt()).collect();
                let v = weighted(&xi)?;
                hs.push(dot(&v, &model.hessian_times(&v, n)?));
            }
        }
    }
    let estimate = |x: &[f64]| {
        let m = x.iter().sum::<f64>() / x.len() as f64;
        let var = x.iter().map(|v| (v - m).powi(2)).sum::<f64>() / (x.len() as f64 - 1.0).max(1.0);
        (m, if x.len() > 1 { (var / x.len() as f64).sqrt() } else { 0.0 })
    };
    let (second, error) = estimate(&hs);
    // Σ is the covariance about the mean: E[gᵢᵀHgᵢ] − GᵀHG.
    Ok(Curvature { loss, grad_sq, ghg, trace_h: estimate(&h), trace_h_sigma: (second - ghg, error), clip, mean_norm })
}

struct Kept(Vec<(Param, ParamGrad)>);

impl GradHook for Kept {
    fn param(&mut self, param: &Param, grad: ParamGrad) -> Result<()> {
        self.0.push((param.clone(), grad));
        Ok(())
    }
}

struct Model<'a> {
    losses: &'a dyn Fn() -> Result<Tensor>,
    params: Vec<&'a Param>,
}

impl Model<'_> {
    fn ordered(&self, kept: Vec<(Param, ParamGrad)>) -> Result<Vec<ParamGrad>> {
        let mut kept: Vec<Option<(Param, ParamGrad)>> = kept.into_iter().map(Some).collect();
        let mut out = Vec::new();
        for p in &self.params {
            let at = kept.iter_mut().find(|k| k.as_ref().is_some_and(|(q, _)| q == *p)).and_then(Option::take);
            let (_, g) = at.ok_or_else(|| {
                Error::autograd("curvature", format!("{} does not reach the loss; freeze it or leave it out", p.name()))
            })?;
            out.push(g);
        }
        Ok(out)
    }
    /// Gradient of the sum of the losses, flat.
    fn gradient(&self) -> Result<Vec<f64>> {
        let mut kept = Kept(Vec::new());
        (self.losses)()?.backward_into(&mut kept)?;
        let mut out = Vec::new();
        for g in self.ordered(kept.0)? {
            out.extend(g.sum()?.to_f64());
        }
        Ok(out)
    }
    /// H·v for the mean loss over n samples.
    fn hessian_times(&self, v: &[f64], n: usize) -> Result<Vec<f64>> {
        let size = v.iter().map(|x| x * x).sum::<f64>().sqrt();
        if size == 0.0 {
            return Ok(vec![0.0; v.len()]);
        }
        let before: Vec<Array> = self.params.iter().map(|p| p.value()).collect();
        let wide = before.iter().all(|a| a.dtype() == crate::DType::F64);
        let norm = before.iter().flat_map(Array::to_f64).map(|x| x * x).sum::<f64>().sqrt();
        let h = if wide { 1e-5 } else { 1e-3 } * norm.max(1.0) / size;
        let at = |s: f64| -> Result<Vec<f64>> {
            let mut from = 0;
            for (p, a) in self.params.iter().zip(&before) {
                let moved: Vec<f64> = a.to_f64().iter().zip(&v[from..]).map(|(x, d)| x + s * d).collect();
                from += moved.len();
                p.set(Array::from_slice(&moved, a.shape())?.cast(a.dtype()).to(&a.device())?)?;
            }
            self.gradient()
        };
        let both = at(h).and_then(|up| Ok((up, at(-h)?)));
        // The parameters are restored, even after an error.
        for (p, a) in self.params.iter().zip(before) {
            p.set(a)?;
        }
        let (up, down) = both?;
        Ok(up.iter().zip(&down).map(|(u, d)| (u - d) / (2.0 * h * n as f64)).collect())
    }
}

/// The decision when to switch from public to private data. It depends on public losses alone and therefore costs no privacy.
#[derive(Clone, Debug, PartialEq)]
pub struct Switch {
    patience: usize,
    best: f64,
    since: usize,
}

impl Switch {
    /// Switches after `patience` consecutive public validation losses that do not improve on the best one before them.
    pub fn new(patience: usize) -> Switch {
        Switch { patience: patience.max(1), best: f64::INFINITY, since: 0 }
    }
    /// Adds the next public validation loss; returns true if it is time to switch.
    pub fn observe(&mut self, public_loss: crate::privacy::Public<f64>) -> bool {
        if public_loss.0 < self.best {
            (self.best, self.since) = (public_loss.0, 0);
        } else {
            self.since += 1;
        }
        self.since >= self.patience
    }
}
