//! AdamW (Loshchilov & Hutter 2019, algorithm 2).

use super::{Optimizer, Update, check};
use crate::base::{Float, Result};
use crate::device::cpu::par::par_chunks;
use crate::device::cpu::shared::Shared;
use crate::device::cpu::simd::simd;
use crate::device::cuda::layouts;
use crate::with_float;

/// Adam with decoupled weight decay.
///
/// m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g², p ← p − lr·(m̂/(√v̂ + ε) + λp). A step reads 16 and writes 12 bytes per f32 parameter.
#[derive(Clone, Debug)]
pub struct AdamW {
    /// β₁, the decay rate of the first moment.
    pub beta1: f64,
    /// β₂, the decay rate of the second moment.
    pub beta2: f64,
    /// ε, added to the square root of the second moment.
    pub eps: f64,
    /// Weight decay λ, applied only to parameters with two or more dimensions.
    pub weight_decay: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }
    }
}

impl AdamW {
    /// lr/(1 − β₁ᵗ) and 1/√(1 − β₂ᵗ).
    fn corrections(&self, step: u64, lr: f64) -> [f64; 2] {
        let t = step.max(1) as i32;
        [lr / (1.0 - self.beta1.powi(t)), 1.0 / (1.0 - self.beta2.powi(t)).sqrt()]
    }
}

impl Optimizer for AdamW {
    fn describe(&self) -> String {
        format!(
            "AdamW(beta1 {}, beta2 {}, eps {}, weight decay {})",
            self.beta1, self.beta2, self.eps, self.weight_decay
        )
    }
    fn slots(&self) -> &'static [&'static str] {
        &["exp_avg", "exp_avg_sq"]
    }
    fn step_scalars(&self, step: u64, lr: f64) -> Option<Vec<f64>> {
        let [scale, root] = self.corrections(step, lr);
        Some(vec![scale, root, 1.0 - lr * self.weight_decay])
    }
    fn validate(&self) -> Result<()> {
        let decay = self.weight_decay;
        check("AdamW", "beta1", self.beta1, (0.0..1.0).contains(&self.beta1), "lie in [0, 1)")?;
        check("AdamW", "beta2", self.beta2, (0.0..1.0).contains(&self.beta2), "lie in [0, 1)")?;
        check("AdamW", "eps", self.eps, self.eps > 0.0 && self.eps.is_finite(), "be positive and finite")?;
        check("AdamW", "weight_decay", decay, decay >= 0.0 && decay.is_finite(), "be 0 or more, and finite")
    }
    fn update(&self, u: Update) -> Result<()> {
        self.validate()?;
        let gpu = u.expect("AdamW", self.slots())?;
        let [scale, root] = self.corrections(u.step, u.lr);
        let keep = 1.0 - u.lr * self.weight_decay;
        if let Some(gpu) = &gpu {
            let numbers = layouts::AdamW {
                beta1: self.beta1,
                gain1: 1.0 - self.beta1,
                beta2: self.beta2,
                gain2: 1.0 - self.beta2,
                scale,
                root,
                eps: self.eps,
                keep,
            };
            let buffers = [Some(&*u.params), Some(u.grads), u.state.first(), u.state.get(1)];
            return u.launch(gpu, "adamw", &buffers, |l| l.val(numbers));
        }
        let [m, v] = u.state else { return Ok(()) };
        let (params, grads) = (u.params, u.grads);
        with_float!("AdamW", params.dtype(), |T| {
            let g = grads.as_slice::<T>()?;
            let p = Shared::new(params.as_mut_slice::<T>()?);
            let (m, v) = (Shared::new(m.as_mut_slice::<T>()?), Shared::new(v.as_mut_slice::<T>()?));
            let f = <T as crate::Element>::from_f64;
            let (b1, a1, b2, a2) = (f(self.beta1), f(1.0 - self.beta1), f(self.beta2), f(1.0 - self.beta2));
            let (scale, root, eps) = (f(scale), f(root), f(self.eps));
            for (range, decay) in u.layout.pieces() {
                let keep = if *decay { f(keep) } else { <T as Float>::ONE };
                par_chunks(range.len(), 1 << 14, |r| {
                    let r = range.start + r.start..range.start + r.end;
                    // SAFETY: chunks are disjoint.
                    let (p, m, v) = unsafe { (p.slice(r.clone()), m.slice(r.clone()), v.slice(r.clone())) };
                    let g = &g[r];
                    simd(
                        #[inline(always)]
                        || {
                            for (((p, m), v), &g) in p.iter_mut().zip(m).zip(v).zip(g) {
                                *m = b1 * *m + a1 * g;
                                *v = b2 * *v + a2 * (g * g);
                                *p = keep * *p - scale * *m / ((*v).sqrt() * root + eps);
                            }
                        },
                    );
                });
            }
            Ok(())
        })
    }
}
