//! Matrix products of strided operands, in any transposition without copies.
//!
//! Operands are packed into panels once per stretch of K (shared by all threads), then tiles of the result are computed in parallel. K is
//! never split between threads, so that results have the same bits at any thread count. A product takes 2·m·n·k FLOPs; traffic beyond the
//! cache is about one read of each operand and one write of the result per stretch of K.
//!
//! A left operand whose rows are contiguous along K (a layer's input, a gradient of its output) is not packed if the micro-kernel can read
//! its rows in place: packing costs as much as 30 to 60 multiply-adds per element, which is more than narrow layers compute.
//!
//! Layout of the packed memory, for one span of K that is cut into equal stretches of kc ≤ 512:
//!
//! ```text
//! stretch 0: A panel 0 [kc][mr]   A panel 1 …   A panel mp−1   B panel 0 [kc][nr]   …   B panel np−1
//! stretch 1: the same, …
//! ```
//!
//! A panel holds the values in the order in which the micro-kernel reads them: for each k the `mr` values of a column of A (or the `nr` of
//! a row of B), with zeros beyond the edge of the matrix. With AVX-512 in f32, mr × nr = 12 × 32: 24 accumulators of 16 lanes, 2 registers
//! for B and 1 broadcast value of A fill 27 of the 32 registers, and each k takes 24 fused multiply-adds for 2 loads and 12 broadcasts, so
//! that the multiplication units and not the loads are the limit. A panel of A over one stretch is 12 · 512 · 4 = 24 KiB: it stays in the
//! first-level cache (32 to 48 KiB) while the panels of B (64 KiB each) come from the second level.

pub(crate) mod blas;
pub(crate) mod cuda;

pub mod half;
pub mod kernel;
pub mod norms;
pub(crate) mod pack;
pub mod panels;

use crate::device::cpu::par::par_chunks;
use crate::device::cpu::pool::Buffer;
use crate::device::cpu::shared::Shared;
use crate::device::cpu::simd::simd;
use crate::kernels::Activation;
use kernel::{Kernel, MAX_TILE};
use pack::{pack_b, pack_rows, scale_columns};
use std::sync::Mutex;

/// A strided matrix.
#[derive(Clone, Copy)]
pub struct Mat<'a, T> {
    /// The data from the first element on.
    pub data: &'a [T],
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Step between rows.
    pub rs: usize,
    /// Step between columns.
    pub cs: usize,
}

impl<'a, T> Mat<'a, T> {
    /// A row-major matrix.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Self {
        Mat { data, rows, cols, rs: cols, cs: 1 }
    }
    /// A range of consecutive rows.
    pub fn rows_of(self, r: &std::ops::Range<usize>) -> Self {
        let data = if r.is_empty() { &self.data[..0] } else { &self.data[r.start * self.rs..] };
        Mat { data, rows: r.len(), ..self }
    }
    /// The transposed view.
    pub fn t(self) -> Self {
        Mat { data: self.data, rows: self.cols, cols: self.rows, rs: self.cs, cs: self.rs }
    }
}

/// Operations fused into the product when a result is written.
pub struct Epilogue<'a, T> {
    /// Whether the product is added to the output instead of replacing it.
    pub accumulate: bool,
    /// Column k of `a` is multiplied by `scale[k]`.
    pub scale: Option<&'a [T]>,
    /// The rows of `a` that are multiplied, in this order, repeats allowed; all of them if not given.
    pub gather: Option<&'a [u32]>,
    /// Added to every row.
    pub bias: Option<&'a [T]>,
    /// Applied last.
    pub act: Activation,
    /// Receives the values before the activation, in the layout of the output.
    pub pre: Option<&'a mut [T]>,
}

impl<T> Default for Epilogue<'_, T> {
    fn default() -> Self {
        Epilogue { accumulate: false, scale: None, gather: None, bias: None, act: Activation::None, pre: None }
    }
}

/// Steps of K per panel: an A panel of 12 rows stays in the first-level cache while B panels stream from the second level.
pub(crate) const KC: usize = 512;
/// Rows and columns of one task, in tiles. With 12 × 32 tiles in f32 a task is 192 × 256 results (192 KiB), and one stretch of its
/// operands is 384 KiB of A and 512 KiB of B: together they fit a second-level cache of 1 to 2 MiB, and a panel of B that was loaded is
/// used for 16 tiles.
const TASK_ROWS: usize = 16;
const TASK_COLS: usize = 8;
/// Limit in bytes on packed operands; a longer K is split.
const PACK_BYTES: usize = 8 << 20;

/// The memory into which operands are packed, reused from product to product. Products that run at the same time allocate their own.
static SCRATCH: Mutex<Option<Buffer>> = Mutex::new(None);

/// At least `bytes`, from [`SCRATCH`] if it is free.
fn take_scratch(bytes: usize) -> Buffer {
    let kept = SCRATCH.lock().unwrap_or_else(|e| e.into_inner()).take();
    match kept {
        Some(mut b) if b.len() >= bytes => {
            b.count_as(bytes);
            b
        }
        _ => Buffer::uninit(bytes),
    }
}

/// Keeps the larger of the stored buffer and `buffer`; the buffer of a very large product returns to the pool instead.
fn put_scratch(mut buffer: Buffer) {
    if buffer.len() > 4 * PACK_BYTES {
        return;
    }
    let mut kept = SCRATCH.lock().unwrap_or_else(|e| e.into_inner());
    if kept.as_ref().is_none_or(|k| k.len() < buffer.len()) {
        // Memory that is only kept for later does not count as in use.
        buffer.count_as(0);
        *kept = Some(buffer);
    }
}

/// out = a·b, or out += a·b, row-major `out`.
pub fn matmul<T: kernel::Kernels>(a: Mat<T>, b: Mat<T>, accumulate: bool, out: &mut [T]) {
    gemm(a, b, Epilogue { accumulate, ..Epilogue::default() }, out)
}

/// out = act(a·b + bias) and variations; row-major `out [a.rows, b.cols]`, or one row for each index in `gather`.
pub fn gemm<T: kernel::Kernels>(a: Mat<T>, b: Mat<T>, mut e: Epilogue<T>, out: &mut [T]) {
    let (m, n, k) = (e.gather.map_or(a.rows, <[u32]>::len), b.cols, a.cols);
    if m == 0 || n == 0 {
        return;
    }
    let kern = T::kernel();
    let (mp, np) = (m.div_ceil(kern.mr), n.div_ceil(kern.nr));
    // K is divided into equal stretches that depend on its length alone; several are packed at a time.
    let kc = k.div_ceil(k.div_ceil(KC).max(1)).max(1);
    // Rows that are contiguous along K need no packing, except those of an incomplete last tile.
    let from_rows = kern.from_rows.filter(|_| a.cs == 1 && e.gather.is_none() && e.scale.is_none());
    let whole = if from_rows.is_some() { m / kern.mr } else { 0 };
    let ap = mp - whole;
    let lanes = ap * kern.mr + np * kern.nr;
    let span = (PACK_BYTES / T::DTYPE.size() / (lanes * kc)).max(1) * kc;
    let mut packed = take_scratch(lanes * span.min(k.max(1)) * T::DTYPE.size());
    let out = Shared::new(&mut out[..m * n]);
    let pre = e.pre.as_mut().map(|p| Shared::new(&mut p[..m * n]));
    let store = Store { m, n, kern, bias: e.bias, act: e.act };
    let plain = e.bias.is_none() && e.act == Activation::None && pre.is_none();
    let small = m * n * k < 1 << 18;
    let mut k0 = 0;
    // One span of K at a time, such that both packed operands stay below PACK_BYTES; nearly always all of K at once.
    loop {
        let len = span.min(k - k0);
        let last = k0 + len == k;
        let stretches = len.div_ceil(kc).max(1);
        let stretch = |s: usize| (k0 + s * kc, kc.min(len - s * kc));
        // The place of packed panel p of stretch s, A's panels first.
        let place = |s: usize, p: usize| {
            let (from, kc) = (s * kc * lanes, stretch(s).1);
            if p < ap {
                from + p * kern.mr * kc..from + (p + 1) * kern.mr * kc
            } else {
                let (from, p) = (from + ap * kern.mr * kc, p - ap);
                from + p * kern.nr * kc..from + (p + 1) * kern.nr * kc
            }
        };
        // Packing reads each operand once, in the order of its memory, and writes as much: (m + n)·k elements, 1 / (2·min(m, n)) of the
        // product's FLOPs. Threads process whole panels, so that no two write to one cache line.
        {
            let to = Shared::new(packed.as_mut_slice::<T>());
            let grain = if small { usize::MAX } else { ((1 << 14) / (kern.nr * kc)).max(1) };
            par_chunks(stretches * (ap + np), grain, |r| {
                for t in r {
                    let (s, p) = (t / (ap + np), t % (ap + np));
                    let (k, kc) = stretch(s);
                    // SAFETY: each panel is written once.
                    let to = unsafe { to.slice(place(s, p)) };
                    if p < ap {
                        pack_rows(&a, e.gather, (whole + p) * kern.mr, kern.mr, k, kc, to);
                        scale_columns(kern.mr, k, e.scale, to);
                    } else {
                        pack_b(&b, (p - ap) * kern.nr, kern.nr, k, kc, to);
                    }
                }
            });
        }
        // Products: a task is a block of the result. Within it, stretches of K are outermost, so that one stretch of the task's panels is
        // in the second-level cache while all its tiles use it; then panels of B, and innermost panels of A, which are the small ones. The
        // tiles of the result are read and written once per stretch, 2·4 bytes for 2·512 FLOPs an element.
        let panels = packed.as_slice::<T>();
        let (rows, cols) = task_shape(mp, np);
        let (tm, tn) = (mp.div_ceil(rows), np.div_ceil(cols));
        par_chunks(tm * tn, if small { usize::MAX } else { 1 }, |r| {
            for task in r {
                let (i, j) = (task % tm * rows, task / tm * cols);
                for s in 0..stretches {
                    let (k, kc) = stretch(s);
                    let (add, finish) = (e.accumulate || k > 0, last && s + 1 == stretches && !plain);
                    for jp in j..(j + cols).min(np) {
                        let pb = &panels[place(s, ap + jp)];
                        for ip in i..(i + rows).min(mp) {
                            let pa = match from_rows {
                                Some(f) if ip < whole => Left::Rows(f, &a.data[ip * kern.mr * a.rs + k..], a.rs),
                                _ => Left::Panel(&panels[place(s, ip - whole)]),
                            };
                            // SAFETY: the operands are whole, and tiles are disjoint.
                            unsafe { store.tile(kc, pa, pb, (ip, jp), (add, finish), &out, pre.as_ref()) };
                        }
                    }
                }
            }
        });
        k0 += len;
        if last {
            break;
        }
    }
    put_scratch(packed);
}

/// Panels of A and B per task; fewer of them where there would otherwise be few tasks.
fn task_shape(mp: usize, np: usize) -> (usize, usize) {
    let (mut rows, mut cols) = (TASK_ROWS, TASK_COLS);
    while mp.div_ceil(rows) * np.div_ceil(cols) < 32 && rows * cols > 8 {
        if rows >= cols { rows /= 2 } else { cols /= 2 }
    }
    (rows, cols)
}

/// Copies a row of a tile or panel; the usual widths are copied without a call.
#[inline(always)]
pub(crate) fn copy_row<T: Copy>(from: &[T], to: &mut [T]) {
    #[inline(always)]
    fn fixed<T: Copy, const N: usize>(from: &[T], to: &mut [T]) {
        if let (Some(a), Some(b)) = (from.first_chunk::<N>(), to.first_chunk_mut::<N>()) {
            *b = *a;
        }
    }
    match from.len() {
        32 => fixed::<T, 32>(from, to),
        24 => fixed::<T, 24>(from, to),
        16 => fixed::<T, 16>(from, to),
        12 => fixed::<T, 12>(from, to),
        8 => fixed::<T, 8>(from, to),
        _ => to.copy_from_slice(from),
    }
}

/// The left operand of a tile.
#[derive(Clone, Copy)]
enum Left<'a, T> {
    /// Packed: kc·mr elements.
    Panel(&'a [T]),
    /// In place: mr rows from the first element on, separated by this stride, for this kernel.
    Rows(kernel::FromRows<T>, &'a [T], usize),
}

impl<T> Left<'_, T> {
    /// Computes the tile at `c`, whose rows are `ldc` apart.
    ///
    /// # Safety
    /// The operands hold kc steps of mr and nr elements, `c` a whole tile.
    #[inline(always)]
    unsafe fn times(self, kern: &Kernel<T>, kc: usize, pb: &[T], (c, ldc): (*mut T, usize), add: bool) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Left::Panel(pa) => (kern.into)(kc, pa.as_ptr(), pb.as_ptr(), c, ldc, add),
                Left::Rows(f, a, lda) => f(kc, (a.as_ptr(), lda), pb.as_ptr(), c, ldc, add),
            }
        }
    }
}

/// Computes tiles into the result.
struct Store<'a, T> {
    m: usize,
    n: usize,
    kern: Kernel<T>,
    bias: Option<&'a [T]>,
    act: Activation,
}

impl<T: kernel::Kernels> Store<'_, T> {
    /// Computes one tile from its panels, which is added to the result or replaces it; if the sum is complete (`finish`), applies bias and
    /// activation.
    ///
    /// # Safety
    /// `pa` and `pb` hold kc steps of mr and nr elements; no other thread writes this tile.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    unsafe fn tile(
        &self,
        kc: usize,
        pa: Left<T>,
        pb: &[T],
        (ip, jp): (usize, usize),
        (add, finish): (bool, bool),
        out: &Shared<T>,
        pre: Option<&Shared<T>>,
    ) {
        let (i0, j0, nr) = (ip * self.kern.mr, jp * self.kern.nr, self.kern.nr);
        let (rows, cols) = (self.kern.mr.min(self.m - i0), nr.min(self.n - j0));
        let at = |i: usize| (i0 + i) * self.n + j0..(i0 + i) * self.n + j0 + cols;
        if rows == self.kern.mr && cols == nr {
            // SAFETY: the whole tile lies in the result, and no other thread writes it.
            unsafe { pa.times(&self.kern, kc, pb, (out.ptr().add(at(0).start), self.n), add) };
        } else {
            let mut tile = [T::ZERO; MAX_TILE];
            // SAFETY: as promised; the tile is large enough.
            unsafe { pa.times(&self.kern, kc, pb, (tile.as_mut_ptr(), nr), false) };
            for i in 0..rows {
                // SAFETY: rows of disjoint tiles are disjoint.
                let o = unsafe { out.slice(at(i)) };
                let t = &tile[i * nr..i * nr + cols];
                if add {
                    o.iter_mut().zip(t).for_each(|(o, &t)| *o += t);
                } else {
                    copy_row(t, o);
                }
            }
        }
        if finish {
            simd(
                #[inline(always)]
                || {
                    for i in 0..rows {
                        // SAFETY: rows of disjoint tiles are disjoint.
                        let (t, p) = unsafe { (out.slice(at(i)), pre.map(|p| p.slice(at(i)))) };
                        let b = self.bias.map(|b| &b[j0..j0 + cols]);
                        match self.act {
                            Activation::None => finish_row(t, b, p, |x| x),
                            Activation::Gelu => finish_row(t, b, p, |x| x.gelu()),
                            Activation::GeluTanh => finish_row(t, b, p, |x| x.gelu_tanh()),
                            Activation::Relu => finish_row(t, b, p, |x| x.larger(T::ZERO)),
                            other => finish_row(t, b, p, |x| other.of(x)),
                        }
                    }
                },
            );
        }
    }
}

/// Bias and activation of a row of a tile; `pre` receives the input of the activation.
#[inline(always)]
fn finish_row<T: kernel::Kernels>(t: &mut [T], bias: Option<&[T]>, pre: Option<&mut [T]>, act: impl Fn(T) -> T) {
    if let Some(b) = bias {
        t.iter_mut().zip(b).for_each(|(t, &b)| *t += b);
    }
    if let Some(p) = pre {
        p.copy_from_slice(t);
    }
    t.iter_mut().for_each(|x| *x = act(*x));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(n: usize, seed: u64) -> Vec<f32> {
        (0..n as u64)
            .map(|i| ((i.wrapping_mul(2654435761).wrapping_add(seed * 97) % 1000) as f32) / 500.0 - 1.0)
            .collect()
    }

    #[test]
    fn any_size_and_layout() {
        for (m, n, k) in
            [(1, 1, 1), (13, 33, 257), (5, 70, 600), (97, 300, 256), (200, 31, 0), (0, 4, 3), (12, 32, 513)]
        {
            for layout in 0..8 {
                let (a, b) = (noise(m * k, 1), noise(k * n, 2));
                let ma = if layout & 1 == 0 { Mat::new(&a, m, k) } else { Mat::new(&a, k, m).t() };
                let mb = if layout & 2 == 0 { Mat::new(&b, k, n) } else { Mat::new(&b, n, k).t() };
                let scale = if layout < 4 { noise(k, 3) } else { vec![1.0; k] };
                let mut out = noise(m * n, 4);
                let mut want = out.clone();
                for i in 0..m {
                    for j in 0..n {
                        let s: f64 = (0..k)
                            .map(|p| (a[i * ma.rs + p * ma.cs] * scale[p]) as f64 * b[p * mb.rs + j * mb.cs] as f64)
                            .sum();
                        want[i * n + j] += s as f32;
                    }
                }
                let given = (layout < 4).then_some(&scale[..]);
                let mut packed = out.clone();
                gemm(ma, mb, Epilogue { accumulate: true, scale: given, ..Epilogue::default() }, &mut out);
                // A scale of ones makes the left operand be packed; the result must have the same bits.
                if layout >= 4 {
                    gemm(
                        ma,
                        mb,
                        Epilogue { accumulate: true, scale: Some(&scale), ..Epilogue::default() },
                        &mut packed,
                    );
                    assert!(packed == out, "{m}x{k}x{n} layout {layout}");
                }
                for (o, w) in out.iter().zip(&want) {
                    assert!((o - w).abs() < 1e-4 * (k as f32).sqrt().max(1.0), "{m}x{k}x{n} layout {layout}: {o} {w}");
                }
            }
        }
    }

    #[test]
    fn norms_and_clipped_sums_of_long_samples() {
        for (t, rd, cd) in [(40, 70, 33), (300, 20, 40), (7, 100, 90), (1, 5, 9), (300, 190, 150)] {
            let (l, r) = (noise(2 * t * rd, 5), noise(2 * t * cd, 6));
            let grad = |b: usize| {
                let mut g = vec![0f64; rd * cd];
                for n in b * t..(b + 1) * t {
                    for i in 0..rd {
                        for j in 0..cd {
                            g[i * cd + j] += l[n * rd + i] as f64 * r[n * cd + j] as f64;
                        }
                    }
                }
                g
            };
            let (g0, g1) = (grad(0), grad(1));
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
            let scale = dot(&g0, &g0);
            let half = |x: &Vec<f32>, d: usize, b: usize| x[b * t * d..(b + 1) * t * d].to_vec();
            let (l0, l1, r0, r1) = (half(&l, rd, 0), half(&l, rd, 1), half(&r, cd, 0), half(&r, cd, 1));
            for got in [norms::sq_norm(&l0, &r0, t).value, norms::inner(&l0, &r0, &l0, &r0, (t, t)).value] {
                assert!((got - scale).abs() < 1e-5 * scale, "{t} {rd} {cd}: {got} {scale}");
            }
            let mut formed = vec![7f32; 2 * rd * cd];
            let sq = norms::per_sample(&l, &r, (rd, cd), &[0..t, t..2 * t], &mut formed);
            for (b, g) in [&g0, &g1].into_iter().enumerate() {
                assert!((sq[b] - dot(g, g)).abs() < 1e-5 * dot(g, g), "{t} {rd} {cd}: {} {}", sq[b], dot(g, g));
                for (o, w) in formed[b * rd * cd..].iter().zip(g) {
                    assert!((*o as f64 - w).abs() < 1e-5 * dot(g, g).sqrt(), "{o} {w}");
                }
            }
            let empty = norms::per_sample(&l, &r, (rd, cd), &[0..0, 0..t, 5..5], &mut vec![7f32; 3 * rd * cd]);
            // The number of samples determines how tiles are divided into tasks, and so the order in which the f64 sums are added.
            assert!(empty[0] == 0.0 && empty[2] == 0.0 && (empty[1] - sq[0]).abs() <= 1e-14 * sq[0]);
            let cross = norms::inner(&l0, &r0, &l1, &r1, (t, t)).value;
            assert!((cross - dot(&g0, &g1)).abs() < 1e-5 * scale);
            let mut out = vec![1f32; rd * cd];
            let totals = norms::clipped_add(&l, &r, (rd, cd), &[0..t, t..2 * t], &[0.5, 0.25], &|s| 1.0 / s, &mut out);
            assert!((totals[0] - scale - 0.5).abs() < 1e-5 * scale);
            for (i, o) in out.iter().enumerate() {
                let want = 1.0 + g0[i] / totals[0] + g1[i] / totals[1];
                assert!((*o as f64 - want).abs() < 1e-5, "{o} {want}");
            }
        }
    }
}
