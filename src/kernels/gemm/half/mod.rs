//! Products of bf16 operands, summed in f32: with matrix tiles (Intel AMX), with dot products of pairs (AVX-512 BF16), or otherwise with
//! the f32 kernel on operands rounded to bf16.
//!
//! An operand is bf16, or f32 that is rounded to bf16 (to nearest, ties to even) while it is packed. A product of two bf16 numbers is exact
//! in f32, so the result differs from that of the rounded operands only by the rounding of its sums: |error| ≤ (K + 2)·2⁻²⁴·Σ|a|·|b|
//! (Higham 2002, section 3.1), plus K·2⁻¹²⁶ where the processor treats denormal numbers as zeros. Rows and columns with infinities or NaN
//! are computed in f32, because replacing a denormal number by zero would change their results; no other rows or columns are, even if they
//! share a tile. The processor determines which of the three methods is used, and with it the last bits. On one machine the bits do not
//! depend on the number of threads, because no sum is split between threads.
//!
//! Packed operands are 32-bit words. With tiles and dot products a word holds two neighbours along K (the first in the low half), so that
//! an odd K is padded with a zero; on other processors it holds one number in f32.
//!
//! ```text
//! right panel                  word (p, j) at p·nr + j              what each kernel reads in order
//! left panel, dot products     word (p, i) at p·mr + i
//! left panel, tiles            word (p, i) at (p / 16)·16·mr + i·16 + p % 16: rows of 16 words, which are rows of a tile
//! ```
//!
//! A tile instruction multiplies 16 rows of 32 by 32 × 16 numbers in 16 cycles. Four accumulators of 16 × 16, two tiles of the left and two
//! of the right operand fill the eight tile registers: 4 loads of 1 KiB for 4 products, which the first-level cache (two loads of 64 bytes
//! per cycle) can deliver. A stretch of 256 words is 32 KiB per panel: the left panel stays in the first-level cache.

mod kernels;
mod pack;
mod panels;

pub use panels::HalfPanels;

use super::{Mat, copy_row, put_scratch, take_scratch};
use crate::base::Float;
use crate::base::dtype::to_bf16;
use crate::device::cpu::par::par_chunks;
use crate::device::cpu::pool::Buffer;
use crate::device::cpu::shared::Shared;
use crate::device::cpu::simd::simd;
use crate::kernels::Activation;
use half::bf16;
use kernels::{Kernel, MAX_TILE, WIDE, kernel};
use pack::{Part, pack};
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// A matrix that enters a product as bf16.
#[derive(Clone, Copy)]
pub enum Operand<'a> {
    /// Unchanged.
    Half(Mat<'a, bf16>),
    /// Rounded while it is packed.
    Full(Mat<'a, f32>),
}

impl Operand<'_> {
    fn rows(&self) -> usize {
        match self {
            Operand::Half(m) => m.rows,
            Operand::Full(m) => m.rows,
        }
    }
    fn cols(&self) -> usize {
        match self {
            Operand::Half(m) => m.cols,
            Operand::Full(m) => m.cols,
        }
    }
    /// The transposed view.
    pub fn t(self) -> Self {
        match self {
            Operand::Half(m) => Operand::Half(m.t()),
            Operand::Full(m) => Operand::Full(m.t()),
        }
    }
}

/// The output of a product, row-major.
pub enum Out<'a> {
    /// Rounded to bf16.
    Half(&'a mut [bf16]),
    /// The f32 sums.
    Full(&'a mut [f32]),
}

/// Operations fused into the product when a result is written.
#[derive(Default)]
pub struct Epilogue<'a> {
    /// Whether the product is added to the output, which must be f32, instead of replacing it.
    pub accumulate: bool,
    /// K is split into these ranges, in order, and the sum of each is multiplied by its weight in f32; steps of K in none of them are
    /// skipped.
    pub weights: Option<&'a [(Range<usize>, f32)]>,
    /// Whether denormal numbers of the operands count as zeros on every processor, as they do with tiles and dot products: for sums whose
    /// norms are computed.
    pub denormals_are_zeros: bool,
    /// The rows of the left operand that are multiplied, in this order, repeats allowed; all of them if not given.
    pub gather: Option<&'a [u32]>,
    /// Added to every row.
    pub bias: Option<&'a [f32]>,
    /// Applied last.
    pub act: Activation,
    /// Receives the values before the activation, in the layout and dtype of the output.
    pub pre: Option<Out<'a>>,
}

/// Words along K that are multiplied while the panels stay in the first-level cache.
const STRETCH: usize = 256;
/// Rows and columns of a task, in tiles: with 32 × 32 results per tile, the sums of a task are 128 KiB.
const TASK: (usize, usize) = (8, 4);
/// Panels that are packed together: how much of a row is read at a time where an operand is contiguous across panels.
const GROUP: usize = 8;
/// Limit on the packed words of each operand that are in memory at a time, unless a single panel is larger.
const PACK_WORDS: usize = 1 << 20;
/// out = act(a·b + bias) and variations; row-major `out [a.rows, b.cols]`, or one row for each index in `gather`. 2·m·n·k FLOPs.
pub fn product(a: Operand, b: Operand, mut e: Epilogue, out: Out) {
    let (m, n, k) = (e.gather.map_or(a.rows(), <[u32]>::len), b.cols(), a.cols());
    debug_assert_eq!(k, b.rows());
    if m == 0 || n == 0 {
        return;
    }
    let kern = kernel();
    let mut parts = Vec::new();
    let mut words = 0;
    let mut part = |from: usize, len: usize, weight| {
        let w = len.div_ceil(kern.per).next_multiple_of(kern.step);
        parts.push(Part { from, len, at: words, words: w, weight, zeros: e.denormals_are_zeros });
        words += w;
    };
    match e.weights {
        Some(given) => {
            given.iter().filter(|(r, w)| !r.is_empty() && *w != 0.0).for_each(|(r, w)| part(r.start, r.len(), Some(*w)))
        }
        None => {
            // K is divided into equal stretches.
            let pieces = k.div_ceil(STRETCH * kern.per).max(1);
            let each = k.div_ceil(pieces).next_multiple_of(kern.step * kern.per);
            let mut at = 0;
            while at < k {
                part(at, each.min(k - at), None);
                at += each;
            }
        }
    }
    let (mp, np) = (m.div_ceil(kern.mr), n.div_ceil(kern.nr));
    let fit = |width: usize, panels: usize| (PACK_WORDS / (width * words).max(1)).clamp(1, panels);
    let (ma, nb) = (fit(kern.mr, mp), fit(kern.nr, np));
    let mut packed = take_scratch((ma * kern.mr + nb * kern.nr) * words * 4);
    let small = m * n * k < 1 << 18;
    // The rows of the left and the columns of the right panels that have non-finite numbers, as bits.
    let special = [ma, nb].map(|n| (0..n).map(|_| AtomicU32::new(0)).collect::<Vec<_>>());
    let rest = Finish {
        kern,
        size: (m, n),
        accumulate: e.accumulate,
        bias: e.bias,
        act: e.act,
        out: Target::new(out, m * n),
        pre: e.pre.take().map(|p| Target::new(p, m * n)),
    };
    for i in (0..mp).step_by(ma) {
        let rows = i..(i + ma).min(mp);
        for j in (0..np).step_by(nb) {
            let cols = j..(j + nb).min(np);
            let (left, right) = packed.as_mut_slice::<u32>().split_at_mut(ma * kern.mr * words);
            {
                let (left, right) = (Shared::new(left), Shared::new(right));
                let clear = |rows: &[AtomicU32]| rows.iter().for_each(|r| r.store(0, Relaxed));
                if j == 0 {
                    clear(&special[0]);
                }
                clear(&special[1]);
                // The left operand is packed once for all stretches of the right one.
                let lefts = if j == 0 { rows.len().div_ceil(GROUP) } else { 0 };
                let tasks = (lefts + cols.len().div_ceil(GROUP)) * parts.len();
                let each = kern.nr * GROUP * words.div_ceil(parts.len().max(1));
                par_chunks(tasks, if small { usize::MAX } else { ((1 << 13) / each.max(1)).max(1) }, |r| {
                    for t in r {
                        let (part, g) = (&parts[t % parts.len()], t / parts.len());
                        let found = |side: usize| {
                            let panels = &special[side];
                            move |p: usize, rows| _ = panels[p].fetch_or(rows, Relaxed)
                        };
                        // SAFETY: each part of a panel is written once.
                        unsafe {
                            if g < lefts {
                                let some = g * GROUP..((g + 1) * GROUP).min(rows.len());
                                let how = (kern, kern.tiles, words);
                                pack((&a, e.gather), (i, some), kern.mr, part, how, &left, found(0))
                            } else {
                                let g = g - lefts;
                                let some = g * GROUP..((g + 1) * GROUP).min(cols.len());
                                pack((&b.t(), None), (j, some), kern.nr, part, (kern, false, words), &right, found(1))
                            }
                        }
                    }
                });
            }
            let (left, right) = packed.as_slice::<u32>().split_at(ma * kern.mr * words);
            let task = task_shape(rows.len(), cols.len());
            let (tm, tn) = (rows.len().div_ceil(task.0), cols.len().div_ceil(task.1));
            par_chunks(tm * tn, if small { usize::MAX } else { 1 }, |r| {
                let len = kern.mr * kern.nr;
                let mut sums = Buffer::uninit(task.0 * task.1 * len * 4);
                let sums = sums.as_mut_slice::<f32>();
                for t in r {
                    let (i0, j0) = (t % tm * task.0, t / tm * task.1);
                    let (i1, j1) = ((i0 + task.0).min(rows.len()), (j0 + task.1).min(cols.len()));
                    if parts.is_empty() {
                        sums.fill(0.0);
                    }
                    for (s, part) in parts.iter().enumerate() {
                        for jp in j0..j1 {
                            let pb = right[(jp * words + part.at) * kern.nr..].as_ptr();
                            for ip in i0..i1 {
                                if s + 1 == parts.len() {
                                    rest.fetch(i + ip, j + jp);
                                }
                                let pa = left[(ip * words + part.at) * kern.mr..].as_ptr();
                                let tile = &mut sums[((jp - j0) * task.0 + ip - i0) * len..][..len];
                                // SAFETY: panels hold `words` from there on, the tile mr × nr results.
                                unsafe { add_part(kern, part, s == 0, pa, pb, tile) };
                            }
                        }
                    }
                    for ip in i0..i1 {
                        for jp in j0..j1 {
                            let tile = &mut sums[((jp - j0) * task.0 + ip - i0) * len..][..len];
                            let (rows, cols) = (special[0][ip].load(Relaxed), special[1][jp].load(Relaxed));
                            if rows | cols != 0 {
                                let panels = (&left[ip * words * kern.mr..], &right[jp * words * kern.nr..]);
                                again(kern.careful(), &parts, panels, (rows, cols), tile);
                            }
                            // SAFETY: no other thread writes this tile of the result.
                            unsafe { rest.tile(tile, i + ip, j + jp) };
                        }
                    }
                }
            });
        }
    }
    put_scratch(packed);
}

/// Replaces those rows and columns of a tile of sums (one bit each) by sums in f32. The others stay: a result depends on its own row and
/// column alone, so that a non-finite number in one sample changes nothing of another.
#[cold]
fn again(kern: Kernel, parts: &[Part], (left, right): (&[u32], &[u32]), (rows, cols): (u32, u32), tile: &mut [f32]) {
    let mut sums = [0.0f32; MAX_TILE];
    for (s, part) in parts.iter().enumerate() {
        let (pa, pb) = (left[part.at * kern.mr..].as_ptr(), right[part.at * kern.nr..].as_ptr());
        // SAFETY: panels hold all words of these rows and columns, the tile mr × nr results.
        unsafe { add_part(kern, part, s == 0, pa, pb, &mut sums) };
    }
    for (at, (o, s)) in tile.iter_mut().zip(sums).enumerate() {
        if (rows >> (at / kern.nr) | cols >> (at % kern.nr)) & 1 == 1 {
            *o = s;
        }
    }
}

/// |Σₜ lₜ ⊗ rₜ|² of each range of rows of `l [N, r]` and `r [N, c]`, computed from exactly the sums that a weighted [`product`] with these
/// ranges adds: 2·N·r·c FLOPs, and nothing is stored.
pub fn sq_norms(l: Operand, r: Operand, ranges: &[Range<usize>]) -> Vec<f64> {
    let (m, n) = (l.cols(), r.cols());
    let kern = kernel();
    let (mp, np) = (m.div_ceil(kern.mr), n.div_ceil(kern.nr));
    let mut sums = vec![0.0; ranges.len()];
    let out = Shared::new(&mut sums);
    par_chunks(ranges.len(), 1, |some| {
        for b in some {
            let range = &ranges[b];
            let words = range.len().div_ceil(kern.per).next_multiple_of(kern.step);
            if words == 0 || m == 0 || n == 0 {
                continue;
            }
            let part = Part { from: range.start, len: range.len(), at: 0, words, weight: None, zeros: true };
            let (mut left, mut right) = (Buffer::uninit(kern.mr * words * 4), Buffer::uninit(np * kern.nr * words * 4));
            let mut special = false;
            {
                let to = Shared::new(right.as_mut_slice());
                // SAFETY: a buffer of this thread, of np panels.
                unsafe {
                    pack((&r.t(), None), (0, 0..np), kern.nr, &part, (kern, false, words), &to, |_, _| special = true)
                };
            }
            let right = right.as_slice::<u32>();
            let mut total = 0.0;
            for i in 0..mp {
                let mut special = special;
                let to = Shared::new(left.as_mut_slice());
                let how = (kern, kern.tiles, words);
                // SAFETY: as above, of one panel.
                unsafe { pack((&l.t(), None), (i, 0..1), kern.mr, &part, how, &to, |_, _| special = true) };
                let kern = if special { kern.careful() } else { kern };
                let left = left.as_slice::<u32>();
                for j in 0..np {
                    let mut tile = [0.0f32; MAX_TILE];
                    let pb = right[j * kern.nr * words..].as_ptr();
                    // SAFETY: panels hold `words` words of each row.
                    unsafe { (kern.into)(words, left.as_ptr().cast(), pb.cast(), tile.as_mut_ptr(), kern.nr, false) };
                    total += super::norms::sum_sq(&tile[..kern.mr * kern.nr]);
                }
            }
            // SAFETY: each sum is written once.
            let sum = unsafe { out.slice(b..b + 1) };
            sum[0] = total;
        }
    });
    sums
}

/// Rows and columns of a task, in tiles; fewer where there would otherwise be few tasks.
fn task_shape(mp: usize, np: usize) -> (usize, usize) {
    let (mut rows, mut cols) = TASK;
    while mp.div_ceil(rows) * np.div_ceil(cols) < 8 && rows * cols > 2 {
        if rows >= cols { rows /= 2 } else { cols /= 2 }
    }
    (rows, cols)
}

/// Writes the sums of a part of K into a tile, or adds them; multiplies them by the part's weight, if it has one.
///
/// # Safety
/// The panels hold the words of the part, the tile mr × nr results.
#[inline(always)]
unsafe fn add_part(kern: Kernel, part: &Part, first: bool, pa: *const u32, pb: *const u32, tile: &mut [f32]) {
    let Some(w) = part.weight else {
        // SAFETY: the caller's promise.
        return unsafe { (kern.into)(part.words, pa.cast(), pb.cast(), tile.as_mut_ptr(), kern.nr, !first) };
    };
    let mut own = [0.0f32; MAX_TILE];
    // SAFETY: the caller's promise; the tile is large enough.
    unsafe { (kern.into)(part.words, pa.cast(), pb.cast(), own.as_mut_ptr(), kern.nr, false) };
    simd(
        #[inline(always)]
        || match first {
            true => tile.iter_mut().zip(&own).for_each(|(t, &x)| *t = w * x),
            false => tile.iter_mut().zip(&own).for_each(|(t, &x)| *t += w * x),
        },
    );
}

/// A result to which several threads write tiles.
enum Target<'a> {
    Half(Shared<'a, bf16>),
    Full(Shared<'a, f32>),
}

impl<'a> Target<'a> {
    fn new(out: Out<'a>, len: usize) -> Self {
        match out {
            Out::Half(x) => Target::Half(Shared::new(&mut x[..len])),
            Out::Full(x) => Target::Full(Shared::new(&mut x[..len])),
        }
    }
    /// The first `len` numbers of a row, rounded where the result is bf16.
    ///
    /// # Safety
    /// No other thread uses this range.
    #[inline(always)]
    unsafe fn put(&self, at: Range<usize>, row: &[f32; WIDE], add: bool) {
        match self {
            Target::Half(x) => {
                let mut narrow = [bf16::ZERO; WIDE];
                narrow.iter_mut().zip(row).for_each(|(o, &v)| *o = to_bf16(v));
                // SAFETY: the caller's promise.
                let o = unsafe { x.slice(at) };
                copy_row(&narrow[..o.len()], o);
            }
            Target::Full(x) => {
                // SAFETY: the caller's promise.
                let o = unsafe { x.slice(at) };
                match (add, o.first_chunk_mut::<WIDE>()) {
                    (true, Some(o)) => o.iter_mut().zip(row).for_each(|(o, &v)| *o += v),
                    (true, None) => o.iter_mut().zip(row).for_each(|(o, &v)| *o += v),
                    (false, _) => copy_row(&row[..o.len()], o),
                }
            }
        }
    }
}

/// The steps from a tile of complete sums to the output.
struct Finish<'a> {
    kern: Kernel,
    size: (usize, usize),
    accumulate: bool,
    bias: Option<&'a [f32]>,
    act: Activation,
    out: Target<'a>,
    pre: Option<Target<'a>>,
}

impl Finish<'_> {
    /// Prefetches the cache lines of the result to which tile (ip, jp) is written, so that they have arrived when its sums are complete.
    #[inline(always)]
    fn fetch(&self, ip: usize, jp: usize) {
        #[cfg(target_arch = "x86_64")]
        for i in ip * self.kern.mr..((ip + 1) * self.kern.mr).min(self.size.0) {
            use std::arch::x86_64::*;
            let at = i * self.size.1 + jp * self.kern.nr;
            let lines = |target: &Target| match target {
                Target::Half(x) => [x.ptr().wrapping_add(at).cast::<i8>(); 2],
                Target::Full(x) => [x.ptr().wrapping_add(at).cast(), x.ptr().wrapping_add(at + 16).cast()],
            };
            for line in std::iter::once(&self.out).chain(&self.pre).flat_map(lines) {
                // SAFETY: a prefetch may name any address; SSE is part of x86-64.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(line) };
            }
        }
    }
    /// Writes tile (ip, jp).
    ///
    /// # Safety
    /// No other thread writes this tile.
    unsafe fn tile(&self, sums: &[f32], ip: usize, jp: usize) {
        let ((m, n), (mr, nr)) = (self.size, (self.kern.mr, self.kern.nr));
        let (i0, j0) = (ip * mr, jp * nr);
        let (rows, cols) = (mr.min(m - i0), nr.min(n - j0));
        let mut bias = [0.0; WIDE];
        if let Some(b) = self.bias {
            bias[..cols].copy_from_slice(&b[j0..j0 + cols]);
        }
        let part = ((i0, rows), (j0, cols));
        // SAFETY: rows of disjoint tiles are disjoint.
        unsafe {
            match self.act {
                Activation::None => self.rows(sums, part, &bias, |x| x),
                Activation::Gelu => self.rows(sums, part, &bias, Float::gelu),
                Activation::GeluTanh => self.rows(sums, part, &bias, Float::gelu_tanh),
                Activation::Relu => self.rows(sums, part, &bias, |x| Float::larger(x, 0.0)),
                other => self.rows(sums, part, &bias, move |x| other.of(x)),
            }
        }
    }
    /// Rows are processed as whole vectors, including the padding beyond the last column of the result.
    #[inline(always)]
    unsafe fn rows(
        &self,
        sums: &[f32],
        ((i0, rows), (j0, cols)): ((usize, usize), (usize, usize)),
        bias: &[f32; WIDE],
        act: impl Fn(f32) -> f32,
    ) {
        let (n, nr) = (self.size.1, self.kern.nr);
        simd(
            #[inline(always)]
            || {
                for i in 0..rows {
                    let at = (i0 + i) * n + j0..(i0 + i) * n + j0 + cols;
                    let mut row = [0.0f32; WIDE];
                    copy_row(&sums[i * nr..(i + 1) * nr], &mut row[..nr]);
                    row.iter_mut().zip(bias).for_each(|(x, &b)| *x += b);
                    // SAFETY: the caller's promise.
                    unsafe {
                        if let Some(pre) = &self.pre {
                            pre.put(at.clone(), &row, false);
                        }
                        row.iter_mut().for_each(|x| *x = act(*x));
                        self.out.put(at, &row, self.accumulate);
                    }
                }
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(n: usize, seed: u64) -> Vec<f32> {
        (0..n as u64)
            .map(|i| ((i.wrapping_mul(2654435761).wrapping_add(seed * 97) % 1009) as f32) / 500.0 - 1.0)
            .collect()
    }
    fn halves(x: &[f32]) -> Vec<bf16> {
        x.iter().map(|&x| bf16::from_f32(x)).collect()
    }

    #[test]
    fn rounds_as_the_crate_does() {
        for bits in (0..u32::MAX - 70_001).step_by(65_537 / 3).chain([
            0x7f7f_ffff,
            0x7f80_0001,
            0xff80_0000,
            0x3f80_8000,
            0x3f81_8000,
        ]) {
            let x = f32::from_bits(bits);
            let (own, want) = (to_bf16(x), bf16::from_f32(x));
            assert!(own == want || (own.is_nan() && want.is_nan()), "{x} {own} {want}");
        }
    }

    /// Checks |computed − exact product of the rounded operands| against the bound for sums in f32, in every layout, dtype and remainder.
    #[test]
    fn any_size_and_layout() {
        for (m, n, k) in [
            (1, 1, 1),
            (13, 33, 257),
            (5, 70, 600),
            (97, 300, 255),
            (200, 31, 0),
            (0, 4, 3),
            (32, 32, 32),
            (33, 65, 1031),
            (64, 32, 17),
        ] {
            for layout in 0..8 {
                let (a, b) = (noise(m * k, 1), noise(k * n, 2));
                let (ha, hb) = (halves(&a), halves(&b));
                let (ta, tb) = (layout & 1 == 1, layout & 2 == 2);
                fn mat<T>(x: &[T], r: usize, c: usize, turned: bool) -> Mat<'_, T> {
                    if turned { Mat::new(x, c, r).t() } else { Mat::new(x, r, c) }
                }
                let (oa, ob) = match layout & 4 {
                    0 => (Operand::Half(mat(&ha, m, k, ta)), Operand::Half(mat(&hb, k, n, tb))),
                    _ => (Operand::Full(mat(&a, m, k, ta)), Operand::Full(mat(&b, k, n, tb))),
                };
                let (xa, xb) = (mat(&ha, m, k, ta), mat(&hb, k, n, tb));
                let bias = noise(n, 3);
                let mut full = noise(m * n, 4);
                let before = full.clone();
                let mut half = vec![bf16::ZERO; m * n];
                let cuts: Vec<_> = [(0..k / 3, 0.5f32), (k / 3..k / 2, 0.0), (k / 2..k, 2.0)].into_iter().collect();
                let mut weighted = vec![7.0f32; m * n];
                let e = || Epilogue { accumulate: true, ..Epilogue::default() };
                product(oa, ob, e(), Out::Full(&mut full));
                product(
                    oa,
                    ob,
                    Epilogue { bias: Some(&bias), act: Activation::Relu, ..Epilogue::default() },
                    Out::Half(&mut half),
                );
                product(oa, ob, Epilogue { weights: Some(&cuts), ..Epilogue::default() }, Out::Full(&mut weighted));
                for i in 0..m {
                    for j in 0..n {
                        let terms: Vec<f64> = (0..k)
                            .map(|p| xa.data[i * xa.rs + p * xa.cs].to_f64() * xb.data[p * xb.rs + j * xb.cs].to_f64())
                            .collect();
                        let (sum, size) = (terms.iter().sum::<f64>(), terms.iter().map(|x| x.abs()).sum::<f64>());
                        let bound = (k + 2) as f64 * 2f64.powi(-24) * (size + 1.0);
                        let at = i * n + j;
                        let what = format!("{m}x{k}x{n} layout {layout} ({i}, {j})");
                        assert!(
                            (full[at] as f64 - before[at] as f64 - sum).abs() <= bound + 1e-7,
                            "{what}: {} {sum}",
                            full[at]
                        );
                        let want = (sum + bias[j] as f64).max(0.0);
                        assert!(
                            (half[at].to_f64() - want).abs() <= bound + want / 256.0 + 1e-7,
                            "{what}: {} {want}",
                            half[at]
                        );
                        let cut = 0.5 * terms[..k / 3].iter().sum::<f64>() + 2.0 * terms[k / 2..].iter().sum::<f64>();
                        assert!(
                            (weighted[at] as f64 - cut).abs() <= 2.0 * bound + 1e-7,
                            "{what}: {} {cut}",
                            weighted[at]
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn norms_are_those_of_the_sums() {
        let (rows, rd, cd) = (150, 70, 41);
        let (l, r) = (noise(rows * rd, 5), noise(rows * cd, 6));
        let (lo, ro) = (Operand::Full(Mat::new(&l, rows, rd)), Operand::Full(Mat::new(&r, rows, cd)));
        let ranges = [0..31, 31..32, 32..32, 32..150];
        for (range, sq) in ranges.iter().zip(sq_norms(lo, ro, &ranges)) {
            let mut sum = vec![0.0f32; rd * cd];
            let cut = [(range.clone(), 1.0f32)];
            product(lo.t(), ro, Epilogue { weights: Some(&cut), ..Epilogue::default() }, Out::Full(&mut sum));
            let want: f64 = sum.iter().map(|&x| x as f64 * x as f64).sum();
            assert!((sq - want).abs() <= 1e-12 * want, "{range:?}: {sq} {want}");
        }
    }

    /// Rows and columns without such numbers keep their bits: in a private step they may belong to other samples.
    #[test]
    fn what_is_not_finite_changes_its_own_rows_and_columns_alone() {
        let (m, n, k) = (70, 75, 700);
        let (a, b) = (noise(m * k, 1), noise(k * n, 2));
        let (mut special_a, mut special_b) = (a.clone(), b.clone());
        special_a[33 * k + 5] = f32::INFINITY;
        special_a[2 * k + 699] = f32::NAN;
        special_b[640 * n + 41] = f32::NEG_INFINITY;
        for turned in [false, true] {
            let run = |a: &[f32], b: &[f32]| {
                let mut out = vec![0.0f32; m * n];
                let (a, b) = match turned {
                    false => (a.to_vec(), b.to_vec()),
                    true => (transposed(a, m, k), transposed(b, k, n)),
                };
                let mat = |x, r, c| if turned { Mat::new(x, c, r).t() } else { Mat::new(x, r, c) };
                let operands = (Operand::Full(mat(&a, m, k)), Operand::Full(mat(&b, k, n)));
                product(operands.0, operands.1, Epilogue::default(), Out::Full(&mut out));
                out
            };
            let (plain, special) = (run(&a, &b), run(&special_a, &special_b));
            for (at, (x, y)) in plain.iter().zip(&special).enumerate() {
                let (i, j) = (at / n, at % n);
                let own = [2, 33].contains(&i) || j == 41;
                assert_eq!(own, !y.is_finite(), "({i}, {j})");
                assert!(own || x.to_bits() == y.to_bits(), "({i}, {j}): {x} {y}");
            }
        }
    }

    fn transposed(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
        (0..cols * rows).map(|at| x[at % rows * cols + at / rows]).collect()
    }

    #[test]
    fn what_is_not_finite_stays() {
        let mut a = noise(4 * 40, 1);
        (a[3], a[45], a[90]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
        let b = vec![1.0f32; 40 * 3];
        let mut out = vec![0.0f32; 12];
        product(
            Operand::Full(Mat::new(&a, 4, 40)),
            Operand::Full(Mat::new(&b, 40, 3)),
            Epilogue::default(),
            Out::Full(&mut out),
        );
        assert!(out[..3].iter().all(|x| x.is_nan()) && out[3..6].iter().all(|&x| x == f32::INFINITY));
        assert!(out[6..9].iter().all(|&x| x == f32::NEG_INFINITY) && out[9..].iter().all(|x| x.is_finite()));
        // A denormal number times infinity is infinity.
        a.fill(0.0);
        a[45] = f32::INFINITY;
        let tiny = vec![1e-39f32; 40 * 3];
        let operands = (Operand::Full(Mat::new(&a, 4, 40)), Operand::Full(Mat::new(&tiny, 40, 3)));
        product(operands.0, operands.1, Epilogue::default(), Out::Full(&mut out));
        assert!(out[3..6].iter().all(|&x| x == f32::INFINITY), "{out:?}");
    }
}
