//! Stochastic gradient descent.

use super::{Optimizer, Update, check};
use crate::base::Result;
use crate::device::cpu::par::par_chunks;
use crate::device::cpu::shared::Shared;
use crate::device::cpu::simd::simd;
use crate::with_float;

/// SGD with momentum and decoupled weight decay: b ← μb + g, p ← p − lr·(b + λp).
#[derive(Clone, Debug, Default)]
pub struct Sgd {
    /// Momentum μ; 0 for none.
    pub momentum: f64,
    /// Weight decay λ, applied only to parameters with two or more dimensions.
    pub weight_decay: f64,
}

impl Optimizer for Sgd {
    fn describe(&self) -> String {
        format!("SGD(momentum {}, weight decay {})", self.momentum, self.weight_decay)
    }
    fn slots(&self) -> &'static [&'static str] {
        if self.momentum == 0.0 { &[] } else { &["momentum_buffer"] }
    }
    fn step_scalars(&self, _step: u64, lr: f64) -> Option<Vec<f64>> {
        Some(vec![lr, 1.0 - lr * self.weight_decay])
    }
    fn validate(&self) -> Result<()> {
        let decay = self.weight_decay;
        check("SGD", "momentum", self.momentum, (0.0..1.0).contains(&self.momentum), "lie in [0, 1)")?;
        check("SGD", "weight_decay", decay, decay >= 0.0 && decay.is_finite(), "be 0 or more, and finite")
    }
    fn update(&self, u: Update) -> Result<()> {
        self.validate()?;
        let keep = 1.0 - u.lr * self.weight_decay;
        if let Some(gpu) = &u.expect("SGD", self.slots())? {
            let buffers = [Some(&*u.params), Some(u.grads), u.state.first()];
            return u.launch(gpu, "sgd", &buffers, |l| l.val(u.lr).val(self.momentum).val(keep));
        }
        let (params, grads, state, lr) = (u.params, u.grads, u.state, u.lr);
        with_float!("SGD", params.dtype(), |T| {
            let g = grads.as_slice::<T>()?;
            let p = Shared::new(params.as_mut_slice::<T>()?);
            let f = <T as crate::Element>::from_f64;
            let (lr_t, mu) = (f(lr), f(self.momentum));
            let buffer = match state.first_mut() {
                Some(b) => Some(Shared::new(b.as_mut_slice::<T>()?)),
                None => None,
            };
            for (range, decay) in u.layout.pieces() {
                let keep = f(if *decay { keep } else { 1.0 });
                par_chunks(range.len(), 1 << 14, |r| {
                    let r = range.start + r.start..range.start + r.end;
                    // SAFETY: chunks are disjoint.
                    let p = unsafe { p.slice(r.clone()) };
                    let g = &g[r.clone()];
                    match buffer {
                        Some(b) => {
                            // SAFETY: chunks are disjoint.
                            let b = unsafe { b.slice(r) };
                            simd(
                                #[inline(always)]
                                || {
                                    for ((p, b), &g) in p.iter_mut().zip(b).zip(g) {
                                        *b = mu * *b + g;
                                        *p = keep * *p - lr_t * *b;
                                    }
                                },
                            )
                        }
                        None => simd(
                            #[inline(always)]
                            || p.iter_mut().zip(g).for_each(|(p, &g)| *p = keep * *p - lr_t * g),
                        ),
                    }
                });
            }
            Ok(())
        })
    }
}
