//! A check of backward rules against central differences.

use super::{Case, Gen};
use crate::array::Array;
use crate::base::{DType, Error, Result};
use crate::{Gradients, Tensor};

/// The largest disagreement found.
#[derive(Debug, Clone)]
pub struct GradientReport {
    /// max over directions of |analytic − numeric| / (1 + |numeric|).
    pub worst: f64,
    /// Number of (input or parameter, direction) pairs compared.
    pub compared: usize,
}

/// Compares backward with central differences along `directions` random directions per input and parameter, in f64.
///
/// For output y = f(x), a random v shaped like y and a random direction u, the backward pass's ⟨vᵀ∂f/∂x, u⟩ must equal the derivative of s
/// ↦ ⟨v, f(x + su)⟩ at 0, computed by central differences of fourth order. Returns an error that names the input if the difference exceeds
/// `tolerance`.
pub fn gradients(case: &Case, seed: u64, directions: usize, tolerance: f64) -> Result<GradientReport> {
    let mut g = Gen::new(seed ^ 0x5eed);
    let leaves: Vec<Tensor> = case.inputs.iter().map(|a| Tensor::leaf(a.clone())).collect();
    let y = (case.run)(&leaves)?;
    let v = Array::generate(y.shape(), DType::F64, |_| 0.0);
    let weights: Vec<f64> = (0..v.numel()).map(|_| g.normal()).collect();
    let seed_grad = Array::from_slice(&weights, y.shape())?.cast(y.dtype()).to(&y.device())?;
    let mut grads = Gradients::default();
    if y.requires_grad() {
        y.backward_from(seed_grad, false, &mut grads)?;
    } else if !case.inputs.is_empty() && y.numel() > 0 {
        return Err(Error::autograd("check::gradients", "the function's output has no history"));
    }
    let value = |inputs: &[Array]| -> Result<f64> {
        let t: Vec<Tensor> = inputs.iter().map(|a| Tensor::new(a.clone())).collect();
        let y = crate::autograd::no_grad(|| (case.run)(&t))?;
        Ok(y.array().to_f64().iter().zip(&weights).map(|(a, b)| a * b).sum())
    };
    let mut report = GradientReport { worst: 0.0, compared: 0 };
    let mut compare = |what: &str, analytic: f64, numeric: f64| -> Result<()> {
        let error = (analytic - numeric).abs() / (1.0 + numeric.abs());
        report.compared += 1;
        report.worst = report.worst.max(error);
        if error > tolerance || error.is_nan() {
            return Err(Error::autograd(
                "check::gradients",
                format!(
                    "{what}: backward says {analytic:.10}, central differences say {numeric:.10} (error {error:.2e})"
                ),
            ));
        }
        Ok(())
    };
    for i in 0..case.inputs.len() {
        let Some(got) = grads.of(&leaves[i]) else {
            if case.inputs[i].numel() == 0 || y.numel() == 0 {
                continue;
            }
            return Err(Error::autograd("check::gradients", format!("input {i} received no gradient")));
        };
        if got.shape() != case.inputs[i].shape() || got.dtype() != case.inputs[i].dtype() {
            return Err(Error::shape(
                "check::gradients",
                format!("input {i} is {:?}, its gradient {:?} {}", case.inputs[i].shape(), got.shape(), got.dtype()),
            ));
        }
        let got = got.to_f64();
        for _ in 0..directions {
            let u: Vec<f64> = got.iter().map(|_| g.normal()).collect();
            let moved = |s: f64| -> Result<f64> {
                let mut inputs = case.inputs.clone();
                inputs[i] = shifted(&inputs[i], &u, s)?;
                value(&inputs)
            };
            compare(&format!("input {i}"), dot(&got, &u), derivative(moved)?)?;
        }
    }
    for p in &case.params {
        let got = match grads.param(p) {
            Some(pg) => pg.sum()?.to_f64(),
            None if y.numel() == 0 => continue,
            None => return Err(Error::autograd("check::gradients", format!("{} received no gradient", p.name()))),
        };
        let original = p.value();
        for _ in 0..directions {
            let u: Vec<f64> = got.iter().map(|_| g.normal()).collect();
            let moved = |s: f64| -> Result<f64> {
                p.set(shifted(&original, &u, s)?)?;
                value(&case.inputs)
            };
            let numeric = derivative(moved);
            p.set(original.clone())?;
            compare(p.name(), dot(&got, &u), numeric?)?;
        }
    }
    Ok(report)
}

/// f′(0) from four points: the error decreases with the fourth power of the step.
fn derivative(f: impl Fn(f64) -> Result<f64>) -> Result<f64> {
    let h = 1e-4;
    let near = f(h)? - f(-h)?;
    let far = f(2.0 * h)? - f(-2.0 * h)?;
    Ok((8.0 * near - far) / (12.0 * h))
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

fn shifted(a: &Array, u: &[f64], s: f64) -> Result<Array> {
    let v: Vec<f64> = a.to_f64().iter().zip(u).map(|(x, d)| x + s * d).collect();
    Array::from_slice(&v, a.shape())?.to(&a.device())
}
