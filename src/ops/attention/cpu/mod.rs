//! Attention by blocks: scores are tiles in the cache, and no T × T matrix is stored.
//!
//! Everything is computed transposed, with queries along the vector. A panel is `nr` queries (32 in f32 with AVX-512), the width of the
//! micro-kernel of `gemm`, and a tile is `mr` keys (12) by one panel, row-major, so that a row of it is one key against all queries of the
//! panel. Maximum, exponential and sum over the keys are then computed lane by lane, without sums across a vector, and the rows of
//! probabilities have the layout of the micro-kernel's packed right operand: P enters P·V without a rearrangement. Spans are loop bounds:
//! tiles that no query of a panel sees are not computed. FLOPs 4·pairs·D forward, 10·pairs·D backward. The forward pass is parallel over
//! (document, head, query block), the backward pass over (document, key head).
//!
//! Operands in bf16 are multiplied in bf16 and summed in f32 ([`panels`](crate::kernels::gemm::panels)); scores, probabilities and their
//! sums are f32, and probabilities and dS are rounded to bf16 before they are multiplied.

mod backward;
mod forward;

pub use backward::backward;
pub use forward::forward;

use crate::array::Array;
use crate::base::philox::dropout_uniform;
use crate::base::{Computed, DType, Element, Float};
use crate::device::cpu::par::par_chunks;
use crate::device::cpu::pool::Buffer;
use crate::device::cpu::shared::Shared;
use crate::device::cpu::simd::simd;
use crate::kernels::gemm::Mat;
use crate::kernels::gemm::pack::turn;
use crate::kernels::gemm::panels::{Packed, Panels};
use crate::ops::attention::{Documents, Span, alibi_slope};
use std::ops::Range;

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
    pub alibi: bool,
    pub skipped: usize,
    pub documents: Option<Documents>,
    pub dropout: Option<(f64, u64)>,
}

/// A part is an independent unit of computation: a document, or a sequence if there are no documents. Its queries and keys are counted from
/// its start, and nothing outside it is read, so that a NaN in one document cannot reach another through 0 · NaN in a shared tile.
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct Part {
    pub sequence: usize,
    pub start: usize,
    pub queries: usize,
    pub keys: usize,
}

impl Problem {
    /// All non-empty documents, or all sequences.
    pub fn parts(&self) -> Vec<Part> {
        match &self.documents {
            Some(documents) => {
                let part = |(sequence, start, n)| Part { sequence, start, queries: n, keys: n };
                documents.parts(self.batch).map(part).collect()
            }
            None => {
                let part = |sequence| Part { sequence, start: 0, queries: self.queries, keys: self.keys };
                (0..self.batch).map(part).collect()
            }
        }
    }
    /// Whether some positions belong to no part.
    pub fn has_padding(&self) -> bool {
        self.documents.as_ref().is_some_and(|d| d.has_padding(self.batch, self.queries))
    }
    /// Number of keys at the start of a part of `keys` keys that every later query sees in addition to its window.
    pub fn sinks(&self, keys: usize) -> usize {
        match self.span {
            Span::Sinks { sinks, .. } => sinks.min(keys),
            _ => 0,
        }
    }
    /// Keys that query `i` of a part sees, without the [sinks](Problem::sinks).
    pub fn visible(&self, part: &Part, i: usize) -> Range<usize> {
        let p = part.start + i + self.keys.saturating_sub(self.queries);
        let (start, end) = match self.span {
            Span::Full => (0, self.keys),
            Span::Causal => (0, p + 1),
            Span::Window(w) | Span::Sinks { window: w, .. } => ((p + 1).saturating_sub(w), p + 1),
            Span::Block(b) => (p / b * b, p + 1),
        };
        start.max(part.start) - part.start..end.min(part.start + part.keys) - part.start
    }
    /// Number of (query, key) pairs of one head, over all parts.
    pub fn pairs(&self) -> u64 {
        let of = |part: &Part| -> u64 {
            let sinks = self.sinks(part.keys);
            let seen = |i| {
                let range = self.visible(part, i);
                range.len() + sinks.min(range.start)
            };
            (0..part.queries).map(|i| seen(i) as u64).sum()
        };
        match &self.documents {
            // All sequences have the same number.
            None => self.parts().first().map_or(0, of) * self.batch as u64,
            Some(_) => self.parts().iter().map(of).sum(),
        }
    }
    /// Dropout factor of probability (b, h, i, j): 0 or 1/(1 − p).
    pub fn keep(&self, b: usize, h: usize, i: usize, j: usize) -> f64 {
        match self.dropout {
            None => 1.0,
            Some((p, seed)) => {
                let index = ((b * self.heads + h) * self.queries + i) * self.keys + j;
                if dropout_uniform(seed, index as u64) < p as f32 { 0.0 } else { 1.0 / (1.0 - p) }
            }
        }
    }
}

/// A `[B, T, H, D]` operand with unit stride along D.
#[derive(Clone, Copy)]
pub struct View<'a, T> {
    data: &'a [T],
    strides: [usize; 3],
    dim: usize,
}

/// The strided view of an array.
pub fn view<T: Element>(a: &Array) -> crate::Result<View<'_, T>> {
    let s = a.strides();
    Ok(View { data: a.raw::<T>()?, strides: [s[0], s[1], s[2]], dim: a.shape()[3] })
}

/// Elements of packed panels and results.
type Word<E> = <<E as Packed>::Panels as Panels>::Word;
/// Elements of results: f32 for operands in bf16.
pub type Sum<E> = <E as Computed>::Wide;

impl<'a, T> View<'a, T> {
    fn row(&self, b: usize, t: usize, h: usize) -> &'a [T] {
        let o = b * self.strides[0] + t * self.strides[1] + h * self.strides[2];
        &self.data[o..o + self.dim]
    }
    /// The first `rows` rows of one (part, head) as a matrix.
    fn mat(&self, part: &Part, h: usize, rows: usize) -> Mat<'a, T> {
        let o = part.sequence * self.strides[0] + part.start * self.strides[1] + h * self.strides[2];
        let data = if rows == 0 { &[] } else { &self.data[o..] };
        Mat { data, rows, cols: self.dim, rs: self.strides[1], cs: 1 }
    }
}

/// The target of a gradient: position t (numbered over all sequences) and head h are at `t·step + offset + h·D`.
#[derive(Clone, Copy)]
pub struct Target<'a, T> {
    /// The array, which may be shared with other targets that write other positions of it.
    pub data: Shared<'a, T>,
    /// Distance from one position to the next.
    pub step: usize,
    /// Offset of the first element.
    pub offset: usize,
}

impl<'a, T> Target<'a, T> {
    /// # Safety
    /// No other thread holds this row.
    unsafe fn row(&self, t: usize, h: usize, d: usize) -> &'a mut [T] {
        let at = t * self.step + self.offset + h * d;
        // SAFETY: the caller's promise.
        unsafe { self.data.slice(at..at + d) }
    }
}

/// Keys of one pass over a query panel: 240 · 32 probabilities in f32 are 30 KiB and stay in the first-level cache between the softmax and
/// the product with V. It is a multiple of every `mr`.
const KEYS: usize = 240;

/// A scratch buffer of elements.
struct Scratch(Buffer);
impl Scratch {
    fn new<T: Element>(n: usize) -> Scratch {
        Scratch(Buffer::uninit(n.max(1) * T::DTYPE.size()))
    }
    fn get<T: Element>(&mut self) -> &mut [T] {
        self.0.as_mut_slice()
    }
}

impl Problem {
    /// The range of keys that any of the queries `i0..i1` of a part sees.
    fn visible_to(&self, part: &Part, i0: usize, i1: usize) -> Range<usize> {
        // Bounds never decrease with the query, so the first and the last query determine the range.
        let (a, b) = (self.visible(part, i0), self.visible(part, i1 - 1));
        a.start.min(b.start)..b.end.max(a.end)
    }
    /// The ranges of keys, in whole tiles except at the end, for queries that see the range `any` and the first `sinks` keys.
    fn stretches(any: &Range<usize>, sinks: usize, mr: usize) -> [Range<usize>; 2] {
        let start = any.start / mr * mr;
        [0..(sinks.div_ceil(mr) * mr).min(start), start..any.end]
    }
}

/// The ALiBi bias of a tile, which is subtracted from its scores: slope · (number of positions between query and key).
struct Distances<T> {
    slope: T,
    /// Number of dropped positions between the sinks and the next key.
    skipped: usize,
    sinks: usize,
    /// 0, 1, 2, …: the index of each query in its panel.
    lanes: [T; 64],
}

impl<T: Float> Distances<T> {
    fn new(p: &Problem, h: usize) -> Option<Distances<T>> {
        let lanes = std::array::from_fn(|c| T::from_f64(c as f64));
        let slope = T::from_f64(alibi_slope(h, p.heads));
        p.alibi.then(|| Distances { slope, skipped: p.skipped, sinks: p.sinks(p.keys), lanes })
    }
    /// Subtracts the bias. Query `i` of the part is the first of the panel, key `j` the first of the tile.
    #[inline(always)]
    fn take_from(&self, tile: &mut [T], nr: usize, i: f64, j: usize) {
        for (r, row) in tile.chunks_exact_mut(nr).enumerate() {
            let further = if j + r < self.sinks { self.skipped } else { 0 };
            let from = T::from_f64(i - (j + r) as f64 + further as f64);
            for (s, &lane) in row.iter_mut().zip(&self.lanes) {
                let d = from + lane;
                *s = *s - self.slope * d.abs();
            }
        }
    }
}

/// The keys that each query of a panel sees, `from..to`, as two arrays, so that a row of a tile is masked with whole vectors.
#[derive(Clone)]
struct Seen {
    from: [u32; 64],
    to: [u32; 64],
    /// Number of keys at the start of the part that all queries see in addition.
    sinks: usize,
}

impl Seen {
    fn new(sinks: usize) -> Seen {
        Seen { from: [0; 64], to: [0; 64], sinks }
    }
    /// Replaces each element by `yes` of it if its query sees its key, and by `no` otherwise; the first key is `j0`.
    #[inline(always)]
    fn select<T: Float>(&self, tile: &mut [T], nr: usize, j0: usize, yes: impl Fn(T) -> T, no: T) {
        for (r, row) in tile.chunks_exact_mut(nr).enumerate() {
            let j = (j0 + r) as u32;
            if j0 + r < self.sinks {
                for (s, &to) in row.iter_mut().zip(&self.to) {
                    *s = if j < to { yes(*s) } else { no };
                }
            } else {
                for (s, (&from, &to)) in row.iter_mut().zip(self.from.iter().zip(&self.to)) {
                    *s = if (j >= from) & (j < to) { yes(*s) } else { no };
                }
            }
        }
    }
}

/// Masks the scores of `mr` keys from `j0` against a query panel: tile ← scale·K·Qᵀ, and −∞ where a query does not see a key.
#[inline(always)]
fn mask_tile<T: Float>(tile: &mut [T], nr: usize, scale: T, j0: usize, seen: &Seen, whole: bool) {
    if whole {
        tile.iter_mut().for_each(|s| *s *= scale);
    } else {
        seen.select(tile, nr, j0, |s| s * scale, T::NEG_INFINITY);
    }
}

/// Sets elements to zero where a query does not see a key, even if they are NaN: a key's NaN reaches only the queries that see it.
#[inline(always)]
fn clear_unseen<T: Float>(tile: &mut [T], nr: usize, j0: usize, seen: &Seen) {
    seen.select(tile, nr, j0, |s| s, T::ZERO);
}

/// The range of keys that any query of a panel sees, and the range that all of them see.
fn panel_ranges(p: &Problem, part: &Part, i0: usize, nr: usize, seen: &mut Seen) -> (Range<usize>, Range<usize>) {
    let live = nr.min(part.queries - i0);
    (seen.from, seen.to) = ([0; 64], [0; 64]);
    let (mut start, mut end) = (0, usize::MAX);
    for c in 0..live {
        let range = p.visible(part, i0 + c);
        (seen.from[c], seen.to[c]) = (range.start as u32, range.end as u32);
        (start, end) = (start.max(range.start), end.min(range.end));
    }
    let any = p.visible_to(part, i0, i0 + live);
    let all = if live < nr { 0..0 } else { start..end };
    (any, all)
}

/// Multiplies probabilities by their dropout factors.
fn drop_probabilities<T: Float>(p: &Problem, s: &mut [T], (b, h): (usize, usize), (i0, nr): (usize, usize), j0: usize) {
    for (r, row) in s.chunks_exact_mut(nr).enumerate() {
        for (c, s) in row.iter_mut().enumerate() {
            *s *= T::from_f64(p.keep(b, h, i0 + c, j0 + r));
        }
    }
}

/// to[c·d + x] = from[x·nr + c]: transposes columns of D sums into rows.
fn columns<T: Element>(from: &[T], (nr, d): (usize, usize), to: &mut [T]) {
    let mut done = 0;
    if T::DTYPE == DType::F32 && nr.is_multiple_of(16) {
        done = d / 16 * 16;
        let (from, to): (&[u32], &mut [u32]) = (bytemuck::cast_slice(from), bytemuck::cast_slice_mut(to));
        for (x, c) in (0..done).step_by(16).flat_map(|x| (0..nr).step_by(16).map(move |c| (x, c))) {
            turn(&from[x * nr + c..], nr, &mut to[c * d + x..], d);
        }
    }
    for x in done..d {
        from[x * nr..(x + 1) * nr].iter().enumerate().for_each(|(c, &v)| to[c * d + x] = v);
    }
}
