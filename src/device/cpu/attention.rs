//! Attention on strided operands.

use super::par::par_chunks;
use super::shared::Shared;
use crate::ops::attention::Span;
use crate::tensor::{Array, Float};
use std::ops::Range;
use std::sync::Arc;

/// Sizes and options of one call.
#[derive(Clone)]
#[allow(missing_docs)]
pub struct Problem {
    pub batch: usize,
    pub queries: usize,
    pub keys: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
    pub span: Span,
    pub scale: f64,
    pub documents: Option<Arc<Vec<usize>>>,
    pub dropout: Option<(f64, u64)>,
}

impl Problem {
    /// Keys that query `i` sees.
    pub fn visible(&self, i: usize) -> Range<usize> {
        let p = i + self.keys.saturating_sub(self.queries);
        let mut r = match self.span {
            Span::Full => 0..self.keys,
            Span::Causal => 0..p + 1,
            Span::Window(w) => (p + 1).saturating_sub(w)..p + 1,
            Span::Block(b) => p / b * b..p + 1,
        };
        if let Some(o) = &self.documents {
            let d = o.partition_point(|&x| x <= p) - 1;
            r = r.start.max(o[d])..r.end.min(o[d + 1]);
        }
        r
    }
    /// Dropout factor of probability (b, h, i, j): 0 or 1/(1 − p).
    pub fn keep(&self, b: usize, h: usize, i: usize, j: usize) -> f64 {
        match self.dropout {
            None => 1.0,
            Some((p, seed)) => {
                let index = ((b * self.heads + h) * self.queries + i) * self.keys + j;
                if uniform(seed, index as u64) < p { 0.0 } else { 1.0 / (1.0 - p) }
            }
        }
    }
}

fn uniform(seed: u64, index: u64) -> f64 {
    let mut z = seed ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}

/// A `[B, T, H, D]` operand with unit stride along D.
#[derive(Clone, Copy)]
pub struct View<'a, T> {
    data: &'a [T],
    strides: [usize; 3],
    dim: usize,
}

/// The strided view of an array.
pub fn view<T: Float>(a: &Array) -> View<'_, T> {
    let s = a.strides();
    View { data: a.raw::<T>(), strides: [s[0], s[1], s[2]], dim: a.shape()[3] }
}

impl<'a, T> View<'a, T> {
    fn row(&self, b: usize, t: usize, h: usize) -> &'a [T] {
        let o = b * self.strides[0] + t * self.strides[1] + h * self.strides[2];
        &self.data[o..o + self.dim]
    }
}

fn dot<T: Float>(a: &[T], b: &[T]) -> T {
    a.iter().zip(b).fold(T::ZERO, |s, (&x, &y)| s + x * y)
}

/// Output and log-sum-exp per query.
pub fn forward<T: Float>(p: &Problem, (q, k, v): (View<T>, View<T>, View<T>), (out, lse): (&mut [T], &mut [T])) {
    let (d, group, scale) = (p.dim, p.heads / p.kv_heads, T::from_f64(p.scale));
    let (out, lse) = (Shared::new(out), Shared::new(lse));
    par_chunks(p.batch * p.heads, 1, |r| {
        let mut s = vec![T::ZERO; p.keys];
        for bh in r {
            let (b, h) = (bh / p.heads, bh % p.heads);
            for i in 0..p.queries {
                let (keys, qi) = (p.visible(i), q.row(b, i, h));
                let o = ((b * p.queries + i) * p.heads + h) * d;
                // SAFETY: each (b, h, i) is written once.
                let (o, l) = unsafe { (out.slice(o..o + d), lse.slice(bh * p.queries + i..bh * p.queries + i + 1)) };
                o.fill(T::ZERO);
                let mut m = T::NEG_INFINITY;
                for j in keys.clone() {
                    s[j] = dot(qi, k.row(b, j, h / group)) * scale;
                    m = m.maximum(s[j]);
                }
                let mut z = T::ZERO;
                for j in keys.clone() {
                    s[j] = (s[j] - m).exp();
                    z += s[j];
                }
                l[0] = if keys.is_empty() { T::ZERO } else { m + z.ln() };
                for j in keys {
                    let w = s[j] / z * T::from_f64(p.keep(b, h, i, j));
                    o.iter_mut().zip(v.row(b, j, h / group)).for_each(|(o, &v)| *o += w * v);
                }
            }
        }
    });
}

/// Gradients of Q, K and V, recomputing the probabilities from the log-sum-exp.
pub fn backward<T: Float>(
    p: &Problem,
    (q, k, v): (View<T>, View<T>, View<T>),
    (out, lse, grad): (View<T>, &[T], View<T>),
    (dq, dk, dv): (&mut [T], &mut [T], &mut [T]),
) {
    let (d, group, scale) = (p.dim, p.heads / p.kv_heads, T::from_f64(p.scale));
    dq.fill(T::ZERO);
    dk.fill(T::ZERO);
    dv.fill(T::ZERO);
    let (dq, dk, dv) = (Shared::new(dq), Shared::new(dk), Shared::new(dv));
    par_chunks(p.batch * p.kv_heads, 1, |r| {
        for bk in r {
            let (b, kv) = (bk / p.kv_heads, bk % p.kv_heads);
            for h in kv * group..(kv + 1) * group {
                for i in 0..p.queries {
                    let (qi, gi) = (q.row(b, i, h), grad.row(b, i, h));
                    let delta = dot(gi, out.row(b, i, h));
                    let at = ((b * p.queries + i) * p.heads + h) * d;
                    for j in p.visible(i) {
                        let (kj, vj) = (k.row(b, j, kv), v.row(b, j, kv));
                        let prob = (dot(qi, kj) * scale - lse[(b * p.heads + h) * p.queries + i]).exp();
                        let keep = T::from_f64(p.keep(b, h, i, j));
                        let ds = prob * (dot(gi, vj) * keep - delta) * scale;
                        let to = ((b * p.keys + j) * p.kv_heads + kv) * d;
                        // SAFETY: all rows of (b, kv head) belong to this chunk.
                        let (dqi, dkj, dvj) = unsafe { (dq.slice(at..at + d), dk.slice(to..to + d), dv.slice(to..to + d)) };
                        for c in 0..d {
                            dqi[c] += ds * kj[c];
                            dkj[c] += ds * qi[c];
                            dvj[c] += prob * keep * gi[c];
                        }
                    }
                }
            }
        }
    });
}
