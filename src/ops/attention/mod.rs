//! Scaled dot-product attention with spans, grouped queries and packed documents; neither forward nor backward stores a T × T matrix.
//!
//! softmax(Q·Kᵀ·scale + mask)·V, with the mask given by [`Span`]. FLOPs 4·pairs·D forward and 10·pairs·D backward, where pairs is the
//! number of visible (query, key) pairs: a narrower span costs proportionally less. Scores may decrease with distance (ALiBi).

pub(crate) mod cpu;
pub(crate) mod cuda;
mod documents;

pub use documents::Documents;

use crate::array::{Array, Dims};
use crate::autograd::{Case, Cotangents, Differentiable, Gen, NO_PARAMS, OpInfo, Owner, Rule, Whose, one};
use crate::base::{DType, Error, Result};
use crate::device::cpu::shared::Shared;
use crate::device::cuda::Gpu;
use crate::device::spans;
use crate::kernels::gemm::panels::Packed;
use crate::kernels::{Exact, Half, dispatch};
use crate::random::masks;
use crate::{Tensor, with_computed};
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;
use std::sync::Arc;

/// The keys that a query attends to. Positions are aligned at the end: with S keys and T queries, query i has position i + S − T.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Span {
    /// All keys.
    Full,
    /// Keys at or before the query.
    Causal,
    /// The last w keys up to and including the query's position (sliding window).
    Window(usize),
    /// Keys at or before the query within its block of b positions.
    Block(usize),
    /// The last `window` keys up to and including the query's position, and the first `sinks` keys of its document (attention sinks, Xiao
    /// et al. 2024).
    Sinks {
        /// Number of keys up to the query's position, which is included.
        window: usize,
        /// Number of keys at the start of the document.
        sinks: usize,
    },
}

impl Span {
    /// Number of (query, key) pairs that one head computes over a sequence of `tokens`: the forward pass takes 4·pairs·D FLOPs.
    ///
    /// ```
    /// use prismgrad::ops::attention::Span;
    /// assert_eq!([Span::Causal, Span::Block(4), Span::Window(3)].map(|s| s.pairs(8)), [36, 20, 21]);
    /// ```
    pub fn pairs(self, tokens: usize) -> u64 {
        let n = tokens as u64;
        let triangle = |n: u64| n * (n + 1) / 2;
        let window = |w: u64| triangle(n.min(w)) + n.saturating_sub(w) * w;
        match self {
            Span::Full => n * n,
            Span::Causal => triangle(n),
            Span::Window(w) => window(w as u64),
            Span::Block(b) => n.checked_div(b as u64).map_or(0, |k| k * triangle(b as u64) + triangle(n % b as u64)),
            // Besides its window, query p sees the sinks before the window: min(sinks, p + 1 − window).
            Span::Sinks { window: w, sinks } => {
                let before = n.saturating_sub(w as u64);
                window(w as u64)
                    + triangle(before.min(sinks as u64))
                    + before.saturating_sub(sinks as u64) * sinks as u64
            }
        }
    }
    /// The most keys that a query sees, which bounds the size of a cache; `None` if it grows with the sequence.
    pub fn reach(self) -> Option<usize> {
        match self {
            Span::Full | Span::Causal => None,
            Span::Window(n) | Span::Block(n) => Some(n),
            Span::Sinks { window, sinks } => Some(window.saturating_add(sinks)),
        }
    }
    /// Returns an error for a width of 0.
    pub fn validate(self) -> Result<()> {
        match self {
            Span::Window(0) | Span::Block(0) | Span::Sinks { window: 0, .. } => {
                Err(Error::invalid("attention", "a span of 0 positions; use 1 or more"))
            }
            _ => Ok(()),
        }
    }
}

/// Slope of a head's bias by distance, ALiBi (Press et al. 2022): 2^(−8(h + 1)/H) for head h if the number of heads H is a power of two.
/// For other numbers of heads, the first heads have the slopes of the largest power of two below H, and the rest have every other slope of
/// twice that power.
pub fn alibi_slope(head: usize, heads: usize) -> f64 {
    let most = (1usize << heads.max(1).ilog2()) as f64;
    match (head as f64, most) {
        (h, m) if h < m => (-8.0 * (h + 1.0) / m).exp2(),
        (h, m) => (-4.0 * (2.0 * (h - m) + 1.0) / m).exp2(),
    }
}

/// Options of attention.
#[derive(Clone, Debug)]
pub struct AttentionOptions {
    /// The keys that a query attends to.
    pub span: Span,
    /// Factor of the scores; 1/√D by default.
    pub scale: Option<f64>,
    /// Whether scores decrease with distance: [`alibi_slope`] · |query − key| is subtracted from each.
    pub alibi: bool,
    /// Number of positions between the sinks of a [`Span::Sinks`] and the key after them that a cache has dropped; `alibi` adds them to the
    /// distance of the sinks. Forward pass only.
    pub skipped: usize,
    /// Documents of packed sequences, or lengths of padded ones; by default each sequence is one document. With documents the numbers of
    /// keys and queries must be equal. [`Span::Block`] counts positions from the start of the sequence. Several samples in one sequence
    /// must be separate documents: a private step refuses samples that only blocks or windows separate.
    pub documents: Option<Documents>,
    /// Dropout probability, applied to the attention probabilities, and the seed of its mask.
    pub dropout: Option<(f64, u64)>,
}

impl AttentionOptions {
    /// Options with this span, the usual scale, one document and no dropout.
    pub fn new(span: Span) -> Self {
        AttentionOptions { span, scale: None, alibi: false, skipped: 0, documents: None, dropout: None }
    }
}

static ATTENTION: OpInfo = OpInfo {
    name: "attention",
    differentiable: Differentiable::Yes,
    factor: NO_PARAMS,
    cases: &[
        |g: &mut Gen| {
            let (b, t, d) = (g.count(0, 2), g.side(0, 9), [g.size(1, 4), g.size(5, 64)][g.size(0, 1)]);
            let (kv, group) = (g.size(1, 2), g.size(1, 2));
            let s = t + g.size(0, 3);
            let span = [Span::Full, Span::Causal, Span::Window(g.size(1, t.max(4))), Span::Block(g.size(1, t.max(4)))]
                [g.size(0, 3)];
            let inputs = vec![g.array(&[b, t, kv * group, d]), g.array(&[b, s, kv, d]), g.array(&[b, s, kv, d])];
            Ok(Case::new(inputs, move |x| attention(&x[0], &x[1], &x[2], &AttentionOptions::new(span))))
        },
        // Heads of more than 64 elements, which use other kernels.
        |g: &mut Gen| {
            let (t, d, o) = (g.side(1, 3), g.size(65, 128), AttentionOptions::new(Span::Causal));
            let inputs = (0..3).map(|_| g.array(&[1, t, 1, d])).collect();
            Ok(Case::new(inputs, move |x| attention(&x[0], &x[1], &x[2], &o)))
        },
        // A fused projection.
        |g: &mut Gen| {
            let (b, t, h, d) = (g.size(1, 2), g.side(1, 6), g.size(1, 2), g.extent(1, 4).min(128));
            let o = AttentionOptions::new([Span::Full, Span::Causal, Span::Window(2)][g.size(0, 2)]);
            Ok(Case::new(vec![g.array(&[b, t, 3, h, d])], move |x| attention_qkv(&x[0], &o)))
        },
        // Packed documents, dropout, a custom scale.
        |g: &mut Gen| {
            let (b, t, d, h) = (g.size(1, 2), g.side(2, 9), g.extent(1, 4).min(128), g.size(1, 2));
            let cut = g.size(0, t);
            let o = AttentionOptions {
                span: [Span::Full, Span::Causal, Span::Window(3), Span::Block(2)][g.size(0, 3)],
                scale: Some(0.4),
                alibi: false,
                skipped: 0,
                documents: Some(Documents::packed(&[0, cut, t])),
                dropout: g.chance(0.5).then_some((0.3, g.bits())),
            };
            let inputs = (0..3).map(|_| g.array(&[b, t, h, d])).collect();
            Ok(Case::new(inputs, move |x| attention(&x[0], &x[1], &x[2], &o)))
        },
        // Padded sequences, and sequences with individual packing.
        |g: &mut Gen| {
            let (b, t, d) = (g.size(1, 3), g.side(2, 9), g.extent(1, 4).min(128));
            let (kv, group) = (g.size(1, 2), g.size(1, 2));
            let documents = match g.chance(0.5) {
                true => Documents::lengths(&(0..b).map(|_| g.size(0, t)).collect::<Vec<_>>()),
                false => Documents::packed_each((0..b).map(|_| vec![0, g.size(0, t / 2), g.size(t / 2, t)]).collect()),
            };
            let span = [Span::Full, Span::Causal, Span::Window(3), Span::Block(2)][g.size(0, 3)];
            let o = AttentionOptions { documents: Some(documents), ..AttentionOptions::new(span) };
            if kv * group == 1 {
                return Ok(Case::new(vec![g.array(&[b, t, 3, 1, d])], move |x| attention_qkv(&x[0], &o)));
            }
            let inputs = vec![g.array(&[b, t, kv * group, d]), g.array(&[b, t, kv, d]), g.array(&[b, t, kv, d])];
            Ok(Case::new(inputs, move |x| attention(&x[0], &x[1], &x[2], &o)))
        },
        // Sinks in addition to a window, and biases by distance.
        |g: &mut Gen| {
            let (b, t, d) = (g.size(1, 2), g.side(2, 9), g.extent(1, 4).min(128));
            let (kv, group, cut) = (g.size(1, 2), g.size(1, 3), g.size(0, t));
            let packed = g.chance(0.4);
            let s = if packed { t } else { t + g.size(0, 3) };
            let spans =
                [Span::Sinks { window: g.size(1, 4), sinks: g.size(0, 4) }, Span::Full, Span::Causal, Span::Block(3)];
            let o = AttentionOptions {
                alibi: g.chance(0.6),
                documents: packed.then(|| Documents::packed(&[0, cut, t])),
                dropout: g.chance(0.3).then_some((0.3, g.bits())),
                ..AttentionOptions::new(spans[[0, 0, 1, 2, 3][g.size(0, 4)]])
            };
            let inputs = vec![g.array(&[b, t, kv * group, d]), g.array(&[b, s, kv, d]), g.array(&[b, s, kv, d])];
            Ok(Case::new(inputs, move |x| attention(&x[0], &x[1], &x[2], &o)))
        },
    ],
};

/// The registry entries of this family.
pub static OPS: &[&OpInfo] = &[&ATTENTION];

struct Back {
    q: Array,
    k: Array,
    v: Array,
    out: Array,
    lse: Array,
    options: AttentionOptions,
}

/// The largest head size that the kernels support.
const LARGEST_HEAD: usize = 128;

impl Back {
    fn has_padding(&self) -> bool {
        problem(&self.q, &self.k, &self.options).has_padding()
    }
    /// The target of the gradient of Q, K or V if it has an array of its own.
    fn target<T: Packed>(a: &mut Array) -> cpu::Target<'_, T> {
        let step = a.shape()[2] * a.shape()[3];
        cpu::Target { data: Shared::new(a.fresh_mut::<T>()), step, offset: 0 }
    }
    /// The operands of the backward pass: Q, K, V, the output, its log-sum-exp and its gradient.
    fn operands(&self, grad: Array) -> [Array; 6] {
        let [q, k, v] = [&self.q, &self.k, &self.v].map(Array::clone);
        [q, k, v, self.out.clone(), self.lse.clone(), unit_last(&grad)]
    }
    fn on_gpu(&self, gpu: &Arc<Gpu>, [q, k, v, out, lse, grad]: &[Array; 6], targets: [&Array; 3]) -> Result<()> {
        let p = problem(q, k, &self.options);
        cost(&p, 10.0, 2 * q.dtype().size());
        cuda::backward(gpu, &p, [q, k, v], (out, lse, grad), targets)
    }
    fn on_cpu<T: Packed>(&self, [q, k, v, out, lse, grad]: &[Array; 6], targets: [cpu::Target<T>; 3]) -> Result<()> {
        let p = problem(q, k, &self.options);
        cost(&p, 10.0, 2 * T::DTYPE.size());
        // All operands get the dtype of the queries: a gradient from outside may have another.
        let (out, grad) = (out.cast(T::DTYPE), grad.cast(T::DTYPE));
        cpu::backward::<T>(
            &p,
            (cpu::view::<T>(q)?, cpu::view(k)?, cpu::view(v)?),
            (cpu::view(&out)?, lse.as_slice::<cpu::Sum<T>>()?, cpu::view(&grad)?),
            targets,
        );
        Ok(())
    }
}

impl Rule for Back {
    fn info(&self) -> &'static OpInfo {
        &ATTENTION
    }
    fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
        if matches!(y.mixing(3, y.shape), Owner::Mixed) {
            return SmallVec::new();
        }
        let keys = keys_of(y, &problem(&self.q, &self.k, &self.options), self.k.shape(), Some);
        SmallVec::from_iter([y.same(), keys.clone(), keys])
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        let gradients = dispatch(
            self.operands(grad),
            Half::Bf16,
            |operands| {
                let [mut dq, mut dk, mut dv] =
                    [0, 1, 2].map(|i| fresh(operands[i].shape(), operands[i].dtype(), self.has_padding()));
                with_computed!("attention", operands[0].dtype(), |T| {
                    let targets = [Back::target(&mut dq), Back::target(&mut dk), Back::target(&mut dv)];
                    self.on_cpu::<T>(&operands, targets)
                })?;
                Ok([dq, dk, dv])
            },
            |gpu, operands| {
                // Without queries or keys no launched kernel would write the other gradients, and no kernel writes padding: use zeros then.
                let none = operands.iter().any(|a| a.numel() == 0) || self.has_padding();
                let target = |i: usize| match none {
                    true => Ok(Array::zeros(operands[i].shape(), (operands[i].dtype(), gpu))),
                    false => Array::uninit_on(gpu, operands[i].shape(), operands[i].dtype()),
                };
                let d = [target(0)?, target(1)?, target(2)?];
                self.on_gpu(gpu, &operands, [&d[0], &d[1], &d[2]])?;
                Ok(d)
            },
        )?;
        gradients.into_iter().enumerate().for_each(|(i, d)| back.input(i, d));
        Ok(())
    }
}

/// The same for Q, K and V that are slices of one array: their gradients are written directly into its slices.
struct FusedBack {
    inner: Back,
    shape: Dims,
}

impl Rule for FusedBack {
    fn info(&self) -> &'static OpInfo {
        &ATTENTION
    }
    fn owners(&self, y: &Whose) -> SmallVec<[Owner; 3]> {
        let p = problem(&self.inner.q, &self.inner.k, &self.inner.options);
        if matches!(y.mixing(3, y.shape), Owner::Mixed) {
            return SmallVec::new();
        }
        one(keys_of(y, &p, &self.shape, |d| Some(if d < 2 { d } else { d + 1 })))
    }
    fn backward(&self, grad: Array, back: &mut Cotangents) -> Result<()> {
        let (h, d) = (self.shape[3], self.shape[4]);
        let dx = dispatch(
            self.inner.operands(grad),
            Half::Bf16,
            |operands| {
                let mut dx = fresh(&self.shape, operands[0].dtype(), self.inner.has_padding());
                with_computed!("attention", dx.dtype(), |T| {
                    let data = Shared::new(dx.fresh_mut::<T>());
                    let targets = [0, 1, 2].map(|i| cpu::Target { data, step: 3 * h * d, offset: i * h * d });
                    self.inner.on_cpu::<T>(&operands, targets)
                })?;
                Ok(dx)
            },
            |gpu, operands| {
                let dx = match self.inner.has_padding() {
                    true => Array::zeros(&self.shape, (operands[0].dtype(), gpu)),
                    false => Array::uninit_on(gpu, &self.shape, operands[0].dtype())?,
                };
                let part = |i: usize| dx.slice(2, i..i + 1)?.squeeze(2);
                self.inner.on_gpu(gpu, &operands, [&part(0)?, &part(1)?, &part(2)?])?;
                Ok(dx)
            },
        )?;
        back.input(0, dx);
        Ok(())
    }
}

/// Self-attention of a fused projection `qkv [B, T, 3, H, D]`; returns `[B, T, H, D]`. As [`attention`] of its three slices, but backward
/// writes one gradient array.
pub fn attention_qkv(qkv: &Tensor, options: &AttentionOptions) -> Result<Tensor> {
    let _op = spans::op("attention");
    let [_, _, 3, _, _] = qkv.shape()[..] else {
        return Err(Error::shape("attention", format!("qkv {:?}; it must be [B, T, 3, H, D]", qkv.shape())));
    };
    let part = |i: usize| -> Result<Tensor> { Ok(Tensor::new(qkv.array().slice(2, i..i + 1)?.squeeze(2)?)) };
    let (q, k, v) = (part(0)?, part(1)?, part(2)?);
    check(&q, &k, &v, options)?;
    let inner = forward(&q, &k, &v, &masked(options))?;
    Ok(Tensor::record(inner.out.clone(), &[qkv], &[], || FusedBack { inner, shape: qkv.shape().into() }))
}

/// The owner of the keys, or of a whole fused projection: an array whose first dimensions are sequences and positions, and whose other
/// dimensions correspond to those of the output `[B, T, H, D]` by `from`.
fn keys_of(y: &Whose, p: &cpu::Problem, input: &[usize], from: fn(usize) -> Option<usize>) -> Owner {
    // If a sequence has one owner, its keys have the same.
    let whole = y.by_leading(input);
    if !matches!(whole, Owner::Mixed | Owner::Unknown) {
        return whole;
    }
    // Samples that are separated by head.
    if p.heads == p.kv_heads
        && let own @ (Owner::Every { .. } | Owner::All) = y.apart_from(1, input, from)
    {
        return own;
    }
    let (Some(of), true) = (y.owners_of(p.batch * p.queries), p.queries == p.keys) else {
        return Owner::Unknown;
    };
    let mixed = p.parts().iter().any(|part| {
        let first = part.sequence * p.queries + part.start;
        of[first..first + part.queries].windows(2).any(|w| w[0] != w[1])
    });
    // Tiles do not keep the samples of one part apart: a tile has keys of several samples, and 0 · ∞ would carry one sample's infinity to
    // the others.
    if mixed {
        return Owner::Mixed;
    }
    let to: Vec<u32> = (0..of.len() as u32).collect();
    y.sent(of.len(), &to, input[2..].iter().product())
}

/// An array on the CPU whose non-padding rows are written next; if there is padding, it is initialised with zeros.
fn fresh(shape: &[usize], dtype: DType, padding: bool) -> Array {
    if padding { Array::zeros(shape, dtype) } else { Array::uninit(shape, dtype) }
}

fn problem(q: &Array, k: &Array, o: &AttentionOptions) -> cpu::Problem {
    let [b, t, h, d] = [q.shape()[0], q.shape()[1], q.shape()[2], q.shape()[3]];
    cpu::Problem {
        batch: b,
        queries: t,
        keys: k.shape()[1],
        heads: h,
        kv_heads: k.shape()[2],
        dim: d,
        span: o.span,
        scale: o.scale.unwrap_or(1.0 / (d.max(1) as f64).sqrt()),
        alibi: o.alibi,
        skipped: o.skipped,
        documents: o.documents.clone(),
        dropout: o.dropout,
    }
}

/// Reports the FLOPs of the spans to the profiler: 4 (forward) or 10 (backward) · pairs · D.
fn cost(p: &cpu::Problem, each: f64, size: usize) {
    if spans::is_on() {
        let pairs = p.pairs() * p.heads as u64;
        let elements = p.batch * p.dim * 2 * (p.queries * p.heads + p.keys * p.kv_heads);
        spans::cost(each * (pairs * p.dim as u64) as f64, (elements * size) as f64);
    }
}

/// Makes the stride along D one, as kernels require; other strides are free.
fn unit_last(a: &Array) -> Array {
    if a.shape().last() == Some(&1) || a.strides().last() == Some(&1) { a.clone() } else { a.contiguous() }
}

/// Scaled dot-product attention (Vaswani et al. 2017, equation 1): softmax(q·kᵀ·scale)·v over the keys that each query sees.
///
/// Attention of `q [B, T, H, D]` over `k, v [B, S, H_kv, D]`, where H is a multiple of H_kv; returns `[B, T, H, D]`. Slices of a fused
/// projection are read in place. The output of a query that sees no key is zero.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, options: &AttentionOptions) -> Result<Tensor> {
    let _op = spans::op("attention");
    check(q, k, v, options)?;
    if options.skipped > 0 && Tensor::would_record(&[q, k, v], &[]) {
        return Err(Error::invalid(
            "attention",
            "skipped positions are for generation and have no gradient; use no_grad",
        ));
    }
    let saved = forward(q, k, v, &masked(options))?;
    Ok(Tensor::record(saved.out.clone(), &[q, k, v], &[], || saved))
}

/// The options with the dropout seed of the current step.
fn masked(options: &AttentionOptions) -> AttentionOptions {
    let dropout = options.dropout.and_then(|(p, seed)| masks::seed(seed).map(|seed| (p, seed)));
    AttentionOptions { dropout, ..options.clone() }
}

/// Returns an error for operands whose shapes or dtypes do not match.
fn check(q: &Tensor, k: &Tensor, v: &Tensor, options: &AttentionOptions) -> Result<()> {
    q.dtype().expect_float("attention")?;
    let bad = |why: String| {
        Err(Error::shape("attention", format!("q {:?}, k {:?}, v {:?}: {why}", q.shape(), k.shape(), v.shape())))
    };
    if q.rank() != 4 || k.rank() != 4 || k.shape() != v.shape() {
        return bad("q is [B, T, H, D], k and v are [B, S, H_kv, D]".into());
    }
    if q.shape()[0] != k.shape()[0] || q.shape()[3] != k.shape()[3] {
        return bad("batch and head dimension must agree".into());
    }
    if k.shape()[2] == 0 || !q.shape()[2].is_multiple_of(k.shape()[2]) {
        return bad("the query heads must be a multiple of the key heads".into());
    }
    if q.dtype() != k.dtype() || q.dtype() != v.dtype() {
        return Err(Error::dtype("attention", format!("{}, {} and {} differ", q.dtype(), k.dtype(), v.dtype())));
    }
    let (t, s) = (q.shape()[1], k.shape()[1]);
    if options.span != Span::Full && s < t {
        return bad("a causal span needs at least as many keys as queries".into());
    }
    options.span.validate()?;
    if let Some(scale) = options.scale.filter(|s| !s.is_finite()) {
        return Err(Error::invalid("attention", format!("a scale of {scale}; it must be finite, such as 1/√D")));
    }
    if let Some(documents) = &options.documents {
        if s != t {
            return bad("documents need as many keys as queries".into());
        }
        documents.check(q.shape()[0], t)?;
    }
    if let Some((p, _)) = options.dropout
        && !(0.0..1.0).contains(&p)
    {
        return Err(Error::invalid("attention", format!("dropout {p}; it must lie in [0, 1)")));
    }
    let d = q.shape()[3];
    let gpu = [q, k, v].iter().find_map(|t| t.array().gpu());
    if let (Some(_), true) = (gpu, d > LARGEST_HEAD) {
        return bad(format!("heads of {d} on a GPU, whose kernels take up to {LARGEST_HEAD}; use more, smaller heads"));
    }
    if let (Some(gpu), Some(_)) = (gpu, options.dropout) {
        gpu.refuse_in_capture("draw a dropout mask (it would be the same in every replay)")?;
    }
    Ok(())
}

/// The output, and the backward rule.
fn forward(q: &Tensor, k: &Tensor, v: &Tensor, options: &AttentionOptions) -> Result<Back> {
    let (qa, ka, va) = (unit_last(q.array()), unit_last(k.array()), unit_last(v.array()));
    let p = problem(&qa, &ka, options);
    cost(&p, 4.0, qa.dtype().size());
    // The log-sum-exp of the scores stays in f32.
    let (out, Exact(lse)) = dispatch(
        [qa.clone(), ka.clone(), va.clone()],
        Half::Bf16,
        |[q, k, v]| {
            let mut out = fresh(q.shape(), q.dtype(), p.has_padding());
            let mut lse = fresh(&[p.batch, p.heads, p.queries], q.dtype().compute(), p.has_padding());
            with_computed!("attention", q.dtype(), |T| {
                let operands = (cpu::view::<T>(&q)?, cpu::view(&k)?, cpu::view(&v)?);
                cpu::forward::<T>(&p, operands, (out.fresh_mut(), lse.fresh_mut()));
                Ok((out, Exact(lse)))
            })
        },
        |gpu, [q, k, v]| {
            let (out, lse) = cuda::forward(gpu, &p, &q, &k, &v)?;
            Ok((out, Exact(lse)))
        },
    )?;
    Ok(Back { q: qa, k: ka, v: va, out, lse, options: options.clone() })
}
