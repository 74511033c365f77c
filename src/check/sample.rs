//! Checks of per-sample gradients against each sample's loss alone, and of the independence of samples.

use super::{Case, Gen};
use crate::array::Array;
use crate::base::{Error, Result};
use crate::{Gradients, Param, Tensor};

/// The largest disagreements found, relative to the largest entry of the true per-sample gradients.
#[derive(Debug, Clone, Default)]
pub struct PerSampleReport {
    /// Error of `per_sample`.
    pub per_sample: f64,
    /// Error of `sample_sq_norms`.
    pub sq_norms: f64,
    /// Error of `weighted_sum`.
    pub weighted_sum: f64,
    /// Error of `gram` of the batch with itself.
    pub gram: f64,
    /// Error of `clipped_sum`, which fuses norms and sum.
    pub clipped_sum: f64,
}

impl PerSampleReport {
    /// The largest of all.
    pub fn worst(&self) -> f64 {
        [self.per_sample, self.sq_norms, self.weighted_sum, self.gram, self.clipped_sum].into_iter().fold(0.0, f64::max)
    }
}

/// Compares every query of every parameter's factored gradient with the gradient of each sample's loss alone (a backward pass seeded with
/// that sample only, then an ordinary sum).
///
/// `losses` runs the model and returns one loss per sample. Returns an error that names the parameter and the query if a difference exceeds
/// `tolerance`.
pub fn per_sample(
    losses: &dyn Fn() -> Result<Tensor>,
    params: &[Param],
    seed: u64,
    tolerance: f64,
) -> Result<PerSampleReport> {
    let mut g = Gen::new(seed ^ 0xa10e);
    let y = losses()?;
    if y.rank() != 1 {
        return Err(Error::shape("check::per_sample", format!("losses must be one per sample, got {:?}", y.shape())));
    }
    let b = y.shape()[0];
    let all = y.backward()?;
    let mut report = PerSampleReport::default();
    // The reference, computed sample by sample.
    let mut alone: Vec<Vec<Vec<f64>>> = vec![Vec::new(); params.len()];
    for i in 0..b {
        let y = losses()?;
        let seed = Array::generate(&[b], y.dtype(), |j| (i == j) as u8 as f64).to(&y.device())?;
        let mut grads = Gradients::default();
        y.backward_from(seed, false, &mut grads)?;
        for (k, p) in params.iter().enumerate() {
            let got = match grads.param(p) {
                Some(pg) => pg.sum()?.to_f64(),
                None => vec![0.0; p.numel()],
            };
            alone[k].push(got);
        }
    }
    for (k, p) in params.iter().enumerate() {
        let truth = &alone[k];
        let Some(pg) = all.param(p) else {
            return Err(Error::autograd("check::per_sample", format!("{} received no gradient", p.name())));
        };
        let scale = truth.iter().flatten().fold(1e-300f64, |m, x| m.max(x.abs()));
        let sq = scale * scale * p.numel().max(1) as f64;
        let dot = |a: &[f64], c: &[f64]| a.iter().zip(c).map(|(x, y)| x * y).sum::<f64>();
        let mut check =
            |query: &'static str, got: &[f64], want: &[f64], scale: f64, slot: fn(&mut PerSampleReport) -> &mut f64| {
                let error = got.iter().zip(want).fold(0.0f64, |m, (a, b)| m.max((a - b).abs() / scale));
                let worst = slot(&mut report);
                *worst = worst.max(error);
                if got.len() != want.len() || error.is_nan() || error > tolerance {
                    return Err(Error::autograd(
                        "check::per_sample",
                        format!(
                            "{query} of {}: off by {error:.2e} of the largest entry ({} values, {} expected)",
                            p.name(),
                            got.len(),
                            want.len()
                        ),
                    ));
                }
                Ok(())
            };
        let flat: Vec<f64> = truth.iter().flatten().copied().collect();
        check("per_sample", &pg.per_sample()?.to_f64(), &flat, scale, |r| &mut r.per_sample)?;
        let norms: Vec<f64> = truth.iter().map(|t| dot(t, t)).collect();
        check("sample_sq_norms", &pg.sample_sq_norms()?, &norms, sq, |r| &mut r.sq_norms)?;
        let c: Vec<f64> = (0..b).map(|_| g.uniform()).collect();
        let mix = |c: &[f64]| -> Vec<f64> {
            (0..p.numel()).map(|j| truth.iter().zip(c).map(|(t, c)| t[j] * c).sum()).collect()
        };
        let wide = scale * b.max(1) as f64;
        check("weighted_sum", &pg.weighted_sum(&c)?.to_f64(), &mix(&c), wide, |r| &mut r.weighted_sum)?;
        let pairs: Vec<f64> = truth.iter().flat_map(|x| truth.iter().map(|y| dot(x, y)).collect::<Vec<_>>()).collect();
        check("gram", &pg.gram(pg)?.to_f64(), &pairs, sq, |r| &mut r.gram)?;
        let base: Vec<f64> = (0..b).map(|_| g.uniform()).collect();
        let clip = |sq: f64| 1.0 / (1.0 + sq.sqrt());
        let (sum, got_norms) = pg.clipped_sum(&base, &clip)?;
        let c: Vec<f64> = norms.iter().zip(&base).map(|(n, b)| clip(n + b)).collect();
        check("clipped_sum", &sum.to_f64(), &mix(&c), wide, |r| &mut r.clipped_sum)?;
        let with_base: Vec<f64> = norms.iter().zip(&base).map(|(n, b)| n + b).collect();
        check("clipped_sum norms", &got_norms, &with_base, sq.max(1.0), |r| &mut r.clipped_sum)?;
    }
    Ok(report)
}

impl Case {
    /// Losses for the per-sample check: the output with random weights, summed within each sample.
    pub fn losses(&self, seed: u64) -> Result<Tensor> {
        let inputs: Vec<Tensor> = self.inputs.iter().map(|a| Tensor::new(a.clone())).collect();
        let y = (self.run)(&inputs)?;
        let b = self.samples.unwrap_or(1);
        let mut g = Gen::new(seed);
        let w: Vec<f64> = (0..y.numel()).map(|_| g.normal()).collect();
        let w = Tensor::new(Array::from_slice(&w, y.shape())?.to(&y.device())?);
        let each = y.numel().checked_div(b).unwrap_or(0);
        y.mul(&w)?.reshape(&[b, each])?.sum(&[1], false)
    }
}

/// Measures whether changing sample `j` of the batch changes sample `i`'s loss: a numeric check for anything that couples samples (batch
/// norm, batch-wide balance losses). `losses(x)` maps inputs with the sample axis first to one loss per sample. Returns the largest change
/// of a loss whose own sample did not change, relative to 1 + |loss|.
pub fn independence(losses: &dyn Fn(&Tensor) -> Result<Tensor>, inputs: &Array, seed: u64) -> Result<f64> {
    let mut g = Gen::new(seed ^ 0x1de9);
    let base = crate::autograd::no_grad(|| losses(&Tensor::new(inputs.clone())))?.array().to_f64();
    let b = inputs.shape().first().copied().unwrap_or(0);
    if base.len() != b {
        return Err(Error::shape(
            "check::independence",
            format!("{b} samples went in, {} losses came out", base.len()),
        ));
    }
    let each = inputs.numel().checked_div(b).unwrap_or(0);
    let values = inputs.to_f64();
    let mut worst = 0.0f64;
    for j in 0..b {
        let mut moved = values.clone();
        moved[j * each..(j + 1) * each].iter_mut().for_each(|x| *x += g.normal());
        let moved = Array::from_slice(&moved, inputs.shape())?.cast(inputs.dtype()).to(&inputs.device())?;
        let now = crate::autograd::no_grad(|| losses(&Tensor::new(moved)))?.array().to_f64();
        for i in (0..b).filter(|&i| i != j) {
            worst = worst.max((now[i] - base[i]).abs() / (1.0 + base[i].abs()));
        }
    }
    Ok(worst)
}
