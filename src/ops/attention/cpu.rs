//! Attention by blocks: scores are tiles in the cache, never a T × T matrix.
//!
//! Everything is computed transposed, with queries along the vector. A panel is `nr` queries (32 in f32 with AVX-512), the width of
//! the micro-kernel of `gemm`, and a tile is `mr` keys (12) by one panel, row-major, so that a row of it is one key against all
//! queries of the panel. Maximum, exponential and sum over the keys then go lane by lane, without sums across a vector, and the
//! probabilities of some keys, row after row, are what the micro-kernel takes as its packed right operand: P goes into P·V without
//! being rearranged. Spans are loop bounds: tiles that no query of a panel sees are not computed. FLOPs 4·pairs·D forward,
//! 10·pairs·D backward. Forward is parallel over (document, head, query block), backward over (document, key head).
//!
//! Operands in bf16 are multiplied as such and summed in f32 ([`panels`](crate::kernels::gemm::panels)); scores, probabilities and their sums are
//! f32, and probabilities and dS are rounded to bf16 where they are multiplied.

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

/// What is computed on its own: a document, or a sequence where there are none. Its queries and keys are counted from its start, and
/// nothing outside is read: a NaN in one document cannot reach another, as it would by way of 0 · NaN in a tile that has both.
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub struct Part {
    pub sequence: usize,
    pub start: usize,
    pub queries: usize,
    pub keys: usize,
}

impl Problem {
    /// All documents that are not empty, or all sequences.
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
    /// Whether some positions are in no part.
    pub fn has_padding(&self) -> bool {
        self.documents.as_ref().is_some_and(|d| d.has_padding(self.batch, self.queries))
    }
    /// Keys at the start of a part of so many that every later query sees, besides those in its window.
    pub fn sinks(&self, keys: usize) -> usize {
        match self.span {
            Span::Sinks { sinks, .. } => sinks.min(keys),
            _ => 0,
        }
    }
    /// Keys that query `i` of a part sees, but for the [sinks](Problem::sinks).
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
            // All sequences are alike.
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

/// Where a gradient goes: position t (of all sequences in a row) and head h at `t·step + offset + h·D`.
#[derive(Clone, Copy)]
pub struct Target<'a, T> {
    /// The array, perhaps shared with other targets that take other places of it.
    pub data: Shared<'a, T>,
    /// From one position to the next.
    pub step: usize,
    /// First element.
    pub offset: usize,
}

impl<'a, T> Target<'a, T> {
    /// # Safety
    /// Nobody else holds this row.
    unsafe fn row(&self, t: usize, h: usize, d: usize) -> &'a mut [T] {
        let at = t * self.step + self.offset + h * d;
        // SAFETY: the caller's promise.
        unsafe { self.data.slice(at..at + d) }
    }
}

/// Keys of one pass over a query panel: 240 · 32 probabilities of f32 are 30 KiB and stay in the first-level cache between the softmax
/// and the product with V. It is a multiple of every `mr`.
const KEYS: usize = 240;
/// Query panels handled together in backward. The products dK = dSᵀ·Q and dV = Pᵀ·dO sum over queries, and a micro-kernel call over only
/// one panel of 32 would spend as much on loading and storing its tile as on multiplying; over 128 it is a quarter of that.
const PANELS: usize = 4;

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
    /// Keys that any of the queries `i0..i1` of a part sees.
    fn visible_to(&self, part: &Part, i0: usize, i1: usize) -> Range<usize> {
        // Bounds never fall with the query, so the ends decide; queries that see nothing in between cannot occur.
        let (a, b) = (self.visible(part, i0), self.visible(part, i1 - 1));
        a.start.min(b.start)..b.end.max(a.end)
    }
    /// Stretches of keys, of whole tiles but for the end, that queries go through who see `any` and so many sinks.
    fn stretches(any: &Range<usize>, sinks: usize, mr: usize) -> [Range<usize>; 2] {
        let start = any.start / mr * mr;
        [0..(sinks.div_ceil(mr) * mr).min(start), start..any.end]
    }
}

/// What ALiBi takes from the scores of a tile: slope · (number of positions between query and key).
struct Distances<T> {
    slope: T,
    /// Positions between the sinks, which are so many, and the next key.
    skipped: usize,
    sinks: usize,
    /// 0, 1, 2, …: the queries of a panel.
    lanes: [T; 64],
}

impl<T: Float> Distances<T> {
    fn new(p: &Problem, h: usize) -> Option<Distances<T>> {
        let lanes = std::array::from_fn(|c| T::from_f64(c as f64));
        let slope = T::from_f64(alibi_slope(h, p.heads));
        p.alibi.then(|| Distances { slope, skipped: p.skipped, sinks: p.sinks(p.keys), lanes })
    }
    /// Query `i` of the part is the first of the panel, key `j` the first of the tile.
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

/// The keys that each query of a panel sees, `from..to`: side by side, so that a row of a tile is masked by whole vectors.
#[derive(Clone)]
struct Seen {
    from: [u32; 64],
    to: [u32; 64],
    /// The first keys that all see besides, so many.
    sinks: usize,
}

impl Seen {
    fn new(sinks: usize) -> Seen {
        Seen { from: [0; 64], to: [0; 64], sinks }
    }
    /// Row by row, `yes` of an element whose query sees its key, `no` of the others; the first key is `j0`.
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

/// Scores of `mr` keys from `j0` against a query panel: tile ← scale·K·Qᵀ, −∞ where a query does not see a key.
#[inline(always)]
fn mask_tile<T: Float>(tile: &mut [T], nr: usize, scale: T, j0: usize, seen: &Seen, whole: bool) {
    if whole {
        tile.iter_mut().for_each(|s| *s *= scale);
    } else {
        seen.select(tile, nr, j0, |s| s * scale, T::NEG_INFINITY);
    }
}

/// Zeros where a query does not see a key, whatever stands there: a NaN of a key stays with the queries that see it.
#[inline(always)]
fn clear_unseen<T: Float>(tile: &mut [T], nr: usize, j0: usize, seen: &Seen) {
    seen.select(tile, nr, j0, |s| s, T::ZERO);
}

/// What every query of a panel sees, and what all of them see.
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

/// Output `[B, T, H, D]` and log-sum-exp `[B, H, T]` per query; rows of no part are not written.
///
/// A task is one head of one part and a stretch of its query panels. It packs the keys that the stretch sees once (K by rows, so that the
/// scores sum over D; V by columns, so that the output sums over keys), which reads each of them once from memory, and then goes
/// through its panels. For a panel it keeps, in the first-level cache, the packed queries (nr·D), the scores of up to [`KEYS`] keys and the
/// output so far (D·nr, transposed); the running maximum m and sum z of each query are in two arrays of a lane each. A pass over up
/// to [`KEYS`] keys
///
/// 1. computes the scores tile by tile, masks them, and raises the maximum: m' = max(m, s),
/// 2. rescales what there is: z and the output by exp(m − m'),
/// 3. replaces the scores by exp(s − m') and adds them to z,
/// 4. adds Pᵀ·V, tile by tile of D, to the output.
///
/// At the end the output is divided by z. This is the online softmax of FlashAttention (Dao et al. 2022, algorithm 1).
pub fn forward<E: Packed>(p: &Problem, (q, k, v): (View<E>, View<E>, View<E>), (out, lse): (&mut [E], &mut [Sum<E>])) {
    let (d, group, kern) = (p.dim, p.heads / p.kv_heads.max(1), E::panels());
    let (mr, nr, dw) = (kern.mr(), kern.nr(), kern.words(p.dim));
    let dp = d.div_ceil(mr);
    let (out, lse) = (Shared::new(out), Shared::new(lse));
    let scale = Sum::<E>::from_f64(p.scale);
    // A task packs its keys once and then takes a stretch of query panels; long sequences are cut for balance.
    let parts = p.parts();
    let mut all = vec![];
    for part in &parts {
        let qp = part.queries.div_ceil(nr);
        let stretch = qp.div_ceil((64 / (parts.len() * p.heads).max(1)).clamp(1, qp.max(1))).max(1);
        for h in 0..p.heads {
            all.extend((0..qp).step_by(stretch).map(|panel| (part, h, panel..(panel + stretch).min(qp))));
        }
    }
    let longest = parts.iter().map(|part| part.keys).max().unwrap_or(0);
    par_chunks(all.len(), 1, |tasks| {
        let mut kbuf = Scratch::new::<Word<E>>(longest.div_ceil(mr) * mr * dw);
        let mut vbuf = Scratch::new::<Word<E>>(dp * mr * kern.words(longest));
        let mut qbuf = Scratch::new::<Word<E>>(nr * dw);
        let keys_max = KEYS.div_ceil(mr) * mr;
        let mut sbuf = Scratch::new::<Sum<E>>(keys_max * nr);
        let mut pbuf = Scratch::new::<Word<E>>(keys_max * nr);
        let mut obuf = Scratch::new::<Sum<E>>(dp * mr * nr);
        let (mut tile, mut stage) = (Scratch::new::<Sum<E>>(mr * nr), Scratch::new::<Sum<E>>(nr * d));
        let (tile, stage) = (tile.get::<Sum<E>>(), stage.get::<Sum<E>>());
        for (part, h, panels) in &all[tasks] {
            let (b, h) = (part.sequence, *h);
            let (km, vm) = (k.mat(part, h / group, part.keys), v.mat(part, h / group, part.keys));
            let qm = q.mat(part, h, part.queries);
            // Only the keys this stretch can see are packed.
            let range = p.visible_to(part, panels.start * nr, (panels.end * nr).min(part.queries));
            let (sinks, behind) = (p.sinks(part.keys), p.keys.saturating_sub(p.queries) as f64);
            let distances = Distances::new(p, h);
            let mut seen = Seen::new(sinks);
            let base = if sinks > 0 { 0 } else { range.start / mr * mr };
            let r = base..range.end.min(part.keys).max(base);
            let (ks, vs) = (km.rows_of(&r), vm.rows_of(&r));
            let special = kern.left(&ks, 0..d, kbuf.get()) | kern.left(&vs.t(), 0..vs.rows, vbuf.get());
            let (kpk, vpk) = (&*kbuf.get::<Word<E>>(), &*vbuf.get::<Word<E>>());
            for panel in panels.clone() {
                let i0 = panel * nr;
                let (any, all) = panel_ranges(p, part, i0, nr, &mut seen);
                let qpk = qbuf.get::<Word<E>>();
                let special = special | kern.right(&qm.t(), panel..panel + 1, 0..d, qpk);
                let kern = if special { kern.careful() } else { kern };
                let acc = obuf.get::<Sum<E>>();
                acc.fill(Sum::<E>::ZERO);
                let mut m = [Sum::<E>::NEG_INFINITY; 64];
                let mut z = [Sum::<E>::ZERO; 64];
                let mut begun = false;
                let stretches = Problem::stretches(&any, sinks, mr);
                let passes = stretches.iter().flat_map(|r| {
                    let end = r.end.div_ceil(mr) * mr;
                    (r.start..r.end).step_by(keys_max).map(move |j0| (j0, (j0 + keys_max).min(end)))
                });
                for (j0, j1) in passes {
                    let s = &mut sbuf.get::<Sum<E>>()[..(j1 - j0) * nr];
                    let mut top = m;
                    for (t, tile) in s.chunks_exact_mut(mr * nr).enumerate() {
                        let j = j0 + t * mr;
                        let keys = kpk[(j - base) * dw..].as_ptr();
                        // SAFETY: panels hold the words of D, the tile mr·nr.
                        unsafe { kern.multiply(dw, keys, qpk.as_ptr(), tile.as_mut_ptr(), false) };
                        simd(
                            #[inline(always)]
                            || {
                                let whole = j >= all.start && j + mr <= all.end;
                                mask_tile(tile, nr, scale, j, &seen, whole);
                                if let Some(distances) = &distances {
                                    distances.take_from(tile, nr, i0 as f64 + behind, j);
                                }
                                for row in tile.chunks_exact(nr) {
                                    for (m, &s) in top.iter_mut().zip(row) {
                                        *m = if s > *m { s } else { *m };
                                    }
                                }
                            },
                        );
                    }
                    let mut alpha = [Sum::<E>::ZERO; 64];
                    let mut shift = [Sum::<E>::ZERO; 64];
                    for c in 0..nr {
                        // A query that has seen nothing yet keeps a shift of 0, so that −∞ − −∞ never occurs.
                        shift[c] = if top[c] == Sum::<E>::NEG_INFINITY { Sum::<E>::ZERO } else { top[c] };
                        alpha[c] =
                            if m[c] == Sum::<E>::NEG_INFINITY { Sum::<E>::ZERO } else { (m[c] - shift[c]).exp() };
                        z[c] *= alpha[c];
                    }
                    simd(
                        #[inline(always)]
                        || {
                            for row in s.chunks_exact_mut(nr) {
                                for ((s, &m), z) in row.iter_mut().zip(&shift).zip(&mut z) {
                                    *s = (*s - m).exp();
                                    *z += *s;
                                }
                            }
                            if begun {
                                for row in acc.chunks_exact_mut(nr) {
                                    row.iter_mut().zip(&alpha).for_each(|(o, &a)| *o *= a);
                                }
                            }
                        },
                    );
                    m = top;
                    begun = true;
                    if p.dropout.is_some() {
                        drop_probabilities(p, s, (b, h), (part.start + i0, nr), part.start + j0);
                    }
                    let probabilities = simd(
                        #[inline(always)]
                        || kern.rows_as_right(s, pbuf.get()),
                    );
                    // Rows of the last panel past the keys hold exp(−∞) = 0 and are padding of V: only those of whole words are read.
                    let live = kern.words(j1.min(base + vs.rows) - j0);
                    for (t, o) in acc.chunks_exact_mut(mr * nr).enumerate() {
                        let values = vpk[t * mr * kern.words(vs.rows) + kern.words(j0 - base) * mr..].as_ptr();
                        // SAFETY: the V panel is read from key j0 on, the probabilities hold `live`·nr words.
                        unsafe { kern.multiply(live, values, probabilities.as_ptr(), tile.as_mut_ptr(), false) };
                        simd(
                            #[inline(always)]
                            || o.iter_mut().zip(&*tile).for_each(|(o, &t)| *o += t),
                        );
                    }
                }
                columns(acc, (nr, d), stage);
                for c in 0..nr.min(part.queries - i0) {
                    let i = part.start + i0 + c;
                    let at = ((b * p.queries + i) * p.heads + h) * d;
                    let row = (b * p.heads + h) * p.queries + i;
                    // SAFETY: each (b, h, i) belongs to one task.
                    let (o, l) = unsafe { (out.slice(at..at + d), lse.slice(row..row + 1)) };
                    let empty = m[c] == Sum::<E>::NEG_INFINITY;
                    let inv = if empty { Sum::<E>::ZERO } else { Sum::<E>::ONE / z[c] };
                    simd(
                        #[inline(always)]
                        || o.iter_mut().zip(&stage[c * d..]).for_each(|(o, &x)| *o = E::rounded(x * inv)),
                    );
                    l[0] = if empty { Sum::<E>::ZERO } else { m[c] + z[c].ln() };
                }
            }
        }
    });
}

/// Multiplies probabilities by their dropout factors.
fn drop_probabilities<T: Float>(p: &Problem, s: &mut [T], (b, h): (usize, usize), (i0, nr): (usize, usize), j0: usize) {
    for (r, row) in s.chunks_exact_mut(nr).enumerate() {
        for (c, s) in row.iter_mut().enumerate() {
            *s *= T::from_f64(p.keep(b, h, i0 + c, j0 + r));
        }
    }
}

/// Gradients of Q, K and V, recomputing the probabilities from the log-sum-exp; rows of no part are not written.
///
/// With P = exp(S − lse), δᵢ = Σ outᵢ·gradᵢ and dS = P ⊙ (grad·Vᵀ − δ)·scale: dV = Pᵀ·grad, dQ = dS·K, dK = dSᵀ·Q (Dao et al. 2022,
/// algorithm 4). Five products of 2·pairs·D FLOPs. A task is one key head of one part with all query heads that share it, so that dK and dV are
/// summed by one thread, in order. It packs K by rows (for S), V by rows (for grad·Vᵀ) and K by columns (for dQ) once, and keeps dK and dV
/// of all its keys in `ksum` and `vsum`, as tiles. Then, for [`PANELS`] panels of queries at a time and up to [`KEYS`] keys:
///
/// 1. for each tile of `mr` keys and each panel, S and grad·Vᵀ by two micro-kernel calls over D, then P and dS in the same tile,
/// 2. both are turned (queries become the packed steps of a sum: `pt` and `dst`), and dV and dK of these keys grow by one call over all
///    queries for each tile of D,
/// 3. dS of all panels is kept for the pass; at its end dQ of each panel grows by one call over up to [`KEYS`] keys for each tile of D.
///
/// All tiles of one pass are in the first two cache levels: 4·240·32 values of dS are 120 KiB in f32.
pub fn backward<E: Packed>(
    p: &Problem,
    (q, k, v): (View<E>, View<E>, View<E>),
    (out, lse, grad): (View<E>, &[Sum<E>], View<E>),
    grads: [Target<E>; 3],
) {
    let (d, group, kern) = (p.dim, p.heads / p.kv_heads.max(1), E::panels());
    let (mr, nr, dw) = (kern.mr(), kern.nr(), kern.words(p.dim));
    let (dp, dn) = (d.div_ceil(mr), d.div_ceil(nr));
    let parts = p.parts();
    let longest = parts.iter().map(|part| part.keys).max().unwrap_or(0);
    let kp = longest.div_ceil(mr);
    let wide = PANELS * nr;
    let (scale, zero) = (Sum::<E>::from_f64(p.scale), Sum::<E>::ZERO);
    let [dq, dk, dv] = grads;
    let tile_len = mr * nr;
    let wide_words = kern.words(wide);
    par_chunks(parts.len() * p.kv_heads, 1, |tasks| {
        let mut buf = [kp * mr * dw, kp * mr * dw, dp * mr * kern.words(longest), PANELS * nr * dw, PANELS * nr * dw]
            .map(Scratch::new::<Word<E>>);
        let mut rows = [dn * nr * wide_words, dn * nr * wide_words].map(Scratch::new::<Word<E>>);
        let mut sums = [kp * mr * dn * nr, kp * mr * dn * nr].map(Scratch::new::<Sum<E>>);
        let keys_max = KEYS.div_ceil(mr) * mr;
        let mut dsbuf = Scratch::new::<Sum<E>>(PANELS * keys_max * nr);
        let mut packed = Scratch::new::<Word<E>>(keys_max * nr);
        let mut qsum = Scratch::new::<Sum<E>>(PANELS * dp * tile_len);
        let mut turned = [wide_words * mr, wide_words * mr].map(Scratch::new::<Word<E>>);
        let mut tiles = [tile_len, tile_len, tile_len].map(Scratch::new::<Sum<E>>);
        let mut stage = Scratch::new::<Sum<E>>(nr * d);
        let stage = stage.get::<Sum<E>>();
        let [prob, kept, room] = &mut tiles;
        let (prob, kept, room) = (prob.get::<Sum<E>>(), kept.get::<Sum<E>>(), room.get::<Sum<E>>());
        for task in tasks {
            let (part, kv) = (&parts[task / p.kv_heads], task % p.kv_heads);
            let (b, start) = (part.sequence, part.start);
            let (km, vm) = (k.mat(part, kv, part.keys), v.mat(part, kv, part.keys));
            let [kpk, vpk, kdim, qpk, gpk] = &mut buf;
            let mut special = kern.left(&km, 0..d, kpk.get()) | kern.left(&vm, 0..d, vpk.get());
            special |= kern.left(&km.t(), 0..part.keys, kdim.get());
            let (kpk, vpk, kdim) = (&*kpk.get::<Word<E>>(), &*vpk.get::<Word<E>>(), &*kdim.get::<Word<E>>());
            let (qpk, gpk) = (qpk.get::<Word<E>>(), gpk.get::<Word<E>>());
            let [ksum, vsum] = &mut sums;
            let (ksum, vsum) = (ksum.get::<Sum<E>>(), vsum.get::<Sum<E>>());
            ksum.fill(zero);
            vsum.fill(zero);
            let (sinks, behind) = (p.sinks(part.keys), p.keys.saturating_sub(p.queries) as f64);
            let mut seen = vec![Seen::new(sinks); PANELS];
            for h in kv * group..(kv + 1) * group {
                let distances = Distances::new(p, h);
                let (qm, gm) = (q.mat(part, h, part.queries), grad.mat(part, h, part.queries));
                let mut i0 = 0;
                while i0 < part.queries {
                    let live = wide.min(part.queries - i0);
                    let (panels, live_words) = (live.div_ceil(nr), kern.words(live));
                    let [qrow, grow] = &mut rows;
                    let (qrow, grow) = (qrow.get::<Word<E>>(), grow.get::<Word<E>>());
                    // Queries along K, D along the panel: a padding query is never read, or is zeros.
                    let mut special = special
                        | kern.right(&qm, 0..dn, i0..i0 + live, qrow)
                        | kern.right(&gm, 0..dn, i0..i0 + live, grow);
                    let mut stats = [[zero; 64]; 2 * PANELS];
                    let mut reach = Vec::with_capacity(PANELS);
                    for c in 0..panels {
                        let panel = i0 / nr + c..i0 / nr + c + 1;
                        special |= kern.right(&qm.t(), panel.clone(), 0..d, &mut qpk[c * nr * dw..]);
                        special |= kern.right(&gm.t(), panel, 0..d, &mut gpk[c * nr * dw..]);
                        reach.push(panel_ranges(p, part, i0 + c * nr, nr, &mut seen[c]));
                        for x in 0..nr.min(part.queries - i0 - c * nr) {
                            let i = start + i0 + c * nr + x;
                            stats[2 * c][x] = lse[(b * p.heads + h) * p.queries + i];
                            stats[2 * c + 1][x] = dot::<E>(grad.row(b, i, h), out.row(b, i, h));
                        }
                    }
                    let kern = if special { kern.careful() } else { kern };
                    let any = p.visible_to(part, i0, i0 + live);
                    let qsum = &mut qsum.get::<Sum<E>>()[..panels * dp * tile_len];
                    qsum.fill(zero);
                    let stretches = Problem::stretches(&any, sinks, mr);
                    let passes = stretches.iter().flat_map(|r| {
                        let end = r.end.div_ceil(mr) * mr;
                        (r.start..r.end).step_by(keys_max).map(move |j0| (j0, (j0 + keys_max).min(end)))
                    });
                    for (j0, j1) in passes {
                        let ds_all = dsbuf.get::<Sum<E>>();
                        for j in (j0..j1).step_by(mr) {
                            let [pt, dst] = &mut turned;
                            let (pt, dst) = (pt.get::<Word<E>>(), dst.get::<Word<E>>());
                            let mut hit = false;
                            for c in 0..panels {
                                let (reach_any, all) = &reach[c];
                                let at = (c * keys_max + j - j0) * nr;
                                let ds = &mut ds_all[at..at + tile_len];
                                let cols = nr.min(live - c * nr);
                                if (j >= sinks && j + mr <= reach_any.start) || j >= reach_any.end {
                                    ds.fill(zero);
                                    kern.tile_as_left(ds, c, cols, pt);
                                    kern.tile_as_left(ds, c, cols, dst);
                                    continue;
                                }
                                hit = true;
                                let (keys, values) = (kpk[j * dw..].as_ptr(), vpk[j * dw..].as_ptr());
                                let (queries, grads) = (qpk[c * nr * dw..].as_ptr(), gpk[c * nr * dw..].as_ptr());
                                // SAFETY: panels hold the words of D, tiles mr·nr.
                                unsafe {
                                    kern.multiply(dw, keys, queries, prob.as_mut_ptr(), false);
                                    kern.multiply(dw, values, grads, ds.as_mut_ptr(), false);
                                }
                                let (lse, delta) = (&stats[2 * c], &stats[2 * c + 1]);
                                let whole = j >= all.start && j + mr <= all.end;
                                let seen = &seen[c];
                                simd(
                                    #[inline(always)]
                                    || {
                                        mask_tile(prob, nr, scale, j, seen, whole);
                                        if let Some(distances) = &distances {
                                            let i = (i0 + c * nr) as f64 + behind;
                                            distances.take_from(prob, nr, i, j);
                                        }
                                        for row in prob.chunks_exact_mut(nr) {
                                            for (s, &l) in row.iter_mut().zip(lse) {
                                                *s = (*s - l).exp();
                                            }
                                        }
                                        if !whole {
                                            clear_unseen(prob, nr, j, seen);
                                        }
                                    },
                                );
                                let kept: &[Sum<E>] = if p.dropout.is_some() {
                                    kept.copy_from_slice(prob);
                                    let (i, j) = (start + i0 + c * nr, start + j);
                                    drop_probabilities(p, kept, (b, h), (i, nr), j);
                                    drop_probabilities(p, ds, (b, h), (i, nr), j);
                                    kept
                                } else {
                                    prob
                                };
                                simd(
                                    #[inline(always)]
                                    || {
                                        for (row, pr) in ds.chunks_exact_mut(nr).zip(prob.chunks_exact(nr)) {
                                            for ((s, &pr), &dl) in row.iter_mut().zip(pr).zip(delta) {
                                                *s = pr * (*s - dl) * scale;
                                            }
                                        }
                                        if !whole {
                                            clear_unseen(ds, nr, j, seen);
                                        }
                                        kern.tile_as_left(kept, c, cols, pt);
                                        kern.tile_as_left(ds, c, cols, dst);
                                    },
                                );
                            }
                            if hit {
                                for x in 0..dn {
                                    let at = (j / mr * dn + x) * tile_len;
                                    let from = x * nr * live_words;
                                    let sums = (&mut vsum[at..at + tile_len], &mut *room);
                                    add_product(kern, live_words, pt, &grow[from..], sums);
                                    let sums = (&mut ksum[at..at + tile_len], &mut *room);
                                    add_product(kern, live_words, dst, &qrow[from..], sums);
                                }
                            }
                        }
                        let keys = kern.words(j1.min(part.keys) - j0);
                        for c in 0..panels {
                            let ds = simd(
                                #[inline(always)]
                                || kern.rows_as_right(&ds_all[c * keys_max * nr..][..(j1 - j0) * nr], packed.get()),
                            );
                            for x in 0..dp {
                                let at = (c * dp + x) * tile_len;
                                let a = &kdim[x * mr * kern.words(part.keys) + kern.words(j0) * mr..];
                                add_product(kern, keys, a, ds, (&mut qsum[at..at + tile_len], room));
                            }
                        }
                    }
                    for i in 0..live {
                        if i % nr == 0 {
                            columns(&qsum[i / nr * dp * tile_len..], (nr, d), stage);
                        }
                        // SAFETY: each (b, h, i) belongs to one task.
                        let o = unsafe { dq.row(b * p.queries + start + i0 + i, h, d) };
                        round_row::<E>(&stage[i % nr * d..], o);
                    }
                    i0 += live;
                }
            }
            for j in 0..part.keys {
                let t = b * p.keys + start + j;
                // SAFETY: each (part, key head) belongs to one task.
                let (ok, ov) = unsafe { (dk.row(t, kv, d), dv.row(t, kv, d)) };
                for x in 0..dn {
                    let from = (j / mr * dn + x) * tile_len + j % mr * nr;
                    let n = nr.min(d - x * nr);
                    for (o, sums) in [(&mut *ok, &*ksum), (&mut *ov, &*vsum)] {
                        round_row::<E>(&sums[from..], &mut o[x * nr..x * nr + n]);
                    }
                }
            }
        }
    });
}

/// to[c·d + x] = from[x·nr + c]: the columns of sums of D, as rows.
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

/// A row of sums as elements.
fn round_row<E: Packed>(sums: &[Sum<E>], row: &mut [E]) {
    simd(
        #[inline(always)]
        || row.iter_mut().zip(sums).for_each(|(o, &s)| *o = E::rounded(s)),
    );
}

/// Σ aᵢ·bᵢ, in eight sums at a time.
#[inline(always)]
fn dot<E: Packed>(a: &[E], b: &[E]) -> Sum<E> {
    let (a, a_rest) = a.as_chunks::<8>();
    let (b, b_rest) = b.as_chunks::<8>();
    let mut sums = [Sum::<E>::ZERO; 8];
    simd(
        #[inline(always)]
        || {
            for (a, b) in a.iter().zip(b) {
                for (s, (&a, &b)) in sums.iter_mut().zip(a.iter().zip(b)) {
                    *s += a.wide() * b.wide();
                }
            }
        },
    );
    let rest = a_rest.iter().zip(b_rest).fold(Sum::<E>::ZERO, |s, (&a, &b)| s + a.wide() * b.wide());
    sums.iter().fold(rest, |s, &x| s + x)
}

/// sum += a·b over so many packed words, by way of a tile.
#[inline(always)]
fn add_product<P: Panels>(
    kern: P,
    words: usize,
    a: &[P::Word],
    b: &[P::Word],
    (sum, tile): (&mut [P::Sum], &mut [P::Sum]),
) {
    debug_assert!(a.len() >= words * kern.mr() && b.len() >= words * kern.nr());
    // SAFETY: the panels hold words·mr and words·nr, both tiles mr·nr.
    unsafe { kern.multiply(words, a.as_ptr(), b.as_ptr(), tile.as_mut_ptr(), false) };
    simd(
        #[inline(always)]
        || sum.iter_mut().zip(tile).for_each(|(s, &mut t)| *s += t),
    );
}
