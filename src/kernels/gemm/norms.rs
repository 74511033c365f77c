//! Norms and inner products of sums of outer products, and the fused clipped sum: computations on per-sample gradients that are never
//! stored for a whole batch.

use crate::device::cpu::par::par_chunks;
use crate::device::cpu::pool::Buffer;
use crate::device::cpu::shared::Shared;
use crate::device::cpu::simd::simd;
use crate::kernels::gemm::kernel::{Kernels, MAX_TILE};
use crate::kernels::gemm::pack::{pack_a, pack_b};
use crate::kernels::gemm::{KC, Mat, put_scratch, take_scratch};

/// A number and a bound on its rounding error.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bounded {
    /// The computed value.
    pub value: f64,
    /// |computed − exact| is at most this.
    pub error: f64,
}

impl std::ops::AddAssign for Bounded {
    fn add_assign(&mut self, other: Bounded) {
        *self = Bounded { value: self.value + other.value, error: self.error + other.error };
    }
}

/// If the error bound of a Gram form is at most this share of its value, the bound is added to the value; otherwise the gradient is formed.
pub const UNCERTAIN: f64 = 2e-3;

/// |Σₜ lₜ ⊗ rₜ|² for `l [t, r]`, `r [t, c]`, on one thread, by the cheaper of the two forms.
///
/// The Gram form may lose all digits to cancellation: where its error could exceed [`UNCERTAIN`] of its value, the gradient is formed tile
/// by tile, and the result is the squared norm of those tiles, with error 0.
pub fn sq_norm<T: Kernels>(l: &[T], r: &[T], t: usize) -> Bounded {
    if t == 0 {
        return Bounded::default();
    }
    let (rd, cd) = (l.len() / t, r.len() / t);
    if t == 1 {
        return Bounded { value: sum_sq(l) * sum_sq(r), error: 0.0 };
    }
    // Multiply-adds of each form, with packing converted to the same unit: Gram operands are packed twice, the second time transposed.
    let gram = (t * (t + 32) / 2 + 10 * t) * (rd + cd);
    let direct = t * rd * cd + 4 * t * (rd + cd);
    if gram < direct || t * rd.max(cd) > 1 << 26 {
        let sq = inner(l, r, l, r, (t, t));
        if sq.error <= UNCERTAIN * sq.value || t * rd.max(cd) > 1 << 26 {
            return sq;
        }
    }
    Bounded { value: direct_sq_norm(l, r, t), error: 0.0 }
}

/// Σₜ |lₜ|·|rₜ|: an upper bound on the norm of any sum of the terms.
pub fn reach<T: Kernels>(l: &[T], r: &[T], t: usize) -> f64 {
    if t == 0 {
        return 0.0;
    }
    let (rd, cd) = (l.len() / t, r.len() / t);
    (0..t).map(|i| (sum_sq(&l[i * rd..(i + 1) * rd]) * sum_sq(&r[i * cd..(i + 1) * cd])).sqrt()).sum()
}

/// Largest value of T that is at most `w`: clip factors are rounded towards zero.
pub fn toward_zero<T: Kernels>(w: f64) -> T {
    let below = [T::from_f64(w), T::from_f64(w - w * 2.0 * T::UNIT)];
    below.into_iter().find(|x| x.to_f64() <= w).unwrap_or(T::ZERO)
}

/// Factor for a squared norm computed from rounded numbers, which makes it no less than the exact one.
pub const fn upwards(unit: f64) -> f64 {
    1.0 + 16.0 * unit
}

/// Σ x².
pub fn sum_sq<T: Kernels>(x: &[T]) -> f64 {
    simd(
        #[inline(always)]
        || {
            let mut lanes = [0.0f64; 16];
            let chunks = x.chunks_exact(16);
            let tail = chunks.remainder();
            for c in chunks {
                for i in 0..16 {
                    let v = c[i].to_f64();
                    lanes[i] += v * v;
                }
            }
            lanes.iter().sum::<f64>() + tail.iter().map(|v| v.to_f64() * v.to_f64()).sum::<f64>()
        },
    )
}

/// Direct form: tiles of lᵀ·r are squared at once and never stored. 2·t·r·c FLOPs.
fn direct_sq_norm<T: Kernels>(l: &[T], r: &[T], t: usize) -> f64 {
    let kern = T::kernel();
    let (rd, cd) = (l.len() / t, r.len() / t);
    let (a, b) = (Mat::new(l, t, rd).t(), Mat::new(r, t, cd));
    let (mp, np) = (rd.div_ceil(kern.mr), cd.div_ceil(kern.nr));
    let mut pb = Buffer::uninit(np * kern.nr * t * T::DTYPE.size());
    let mut pa = Buffer::uninit(kern.mr * t * T::DTYPE.size());
    let pb = pb.as_mut_slice::<T>();
    for (j, p) in pb.chunks_exact_mut(kern.nr * t).enumerate() {
        pack_b(&b, j * kern.nr, kern.nr, 0, t, p);
    }
    let mut total = 0.0;
    for i in 0..mp {
        let pa = pa.as_mut_slice::<T>();
        pack_a(&a, i * kern.mr, kern.mr, 0, t, None, pa);
        for j in 0..np {
            let mut tile = [T::ZERO; MAX_TILE];
            // SAFETY: panels hold t·mr and t·nr elements.
            unsafe { kern.run(t, pa.as_ptr(), pb.as_ptr().add(j * kern.nr * t), tile.as_mut_ptr()) };
            total += sum_sq(&tile[..kern.mr * kern.nr]);
        }
    }
    total
}

/// Number of columns over which a dot product of a Gram form is summed in T; the sums of such stretches are added in f64, so that the
/// rounding error is that of one stretch.
const STRETCH: usize = 128;

/// Sums over the pairs of a tile: the products, and the quantities that bound their error.
#[derive(Clone, Copy, Default)]
struct Pairs {
    /// Σ p·q.
    product: f64,
    /// Σ |p·q|.
    size: f64,
    /// Σ |p|, Σ |q|.
    least: [f64; 2],
    /// Σ |q|·(norms of the rows of p), Σ |p|·(norms of the rows of q).
    reach: [f64; 2],
}

/// Σₜₛ (l1ₜ·l2ₛ)(r1ₜ·r2ₛ) by tiles of both Gram matrices, which are never stored. If both pairs are the same, tiles above the diagonal are
/// skipped and those below counted twice. t²·(r + c) multiply-adds, or half of that.
///
/// A dot product p of rows of norms a, a′ has an error of at most γ·a·a′ with γ = (stretch + 2)·u, whatever its value (Higham 2002, section
/// 3.1), and a product p·q of two of them an error of γ(a·a′·|q| + b·b′·|p|) plus a term of second order. These bounds are summed in the
/// same pass.
pub fn inner<T: Kernels>(l1: &[T], r1: &[T], l2: &[T], r2: &[T], (t, s): (usize, usize)) -> Bounded {
    if t == 0 || s == 0 {
        return Bounded::default();
    }
    let same = std::ptr::eq(l1, l2) && std::ptr::eq(r1, r2);
    let kern = T::kernel();
    let (rd, cd) = (l1.len() / t, r1.len() / t);
    let (mp, np) = (t.div_ceil(kern.mr), s.div_ceil(kern.nr));
    let pack = |x: &[T], y: &[T], d: usize, pa: &mut [T], pb: &mut [T]| {
        let (a, b) = (Mat::new(x, t, d), Mat::new(y, s, d).t());
        for (i, p) in pa.chunks_exact_mut((kern.mr * d).max(1)).enumerate().take(mp) {
            pack_a(&a, i * kern.mr, kern.mr, 0, d, None, p);
        }
        for (j, p) in pb.chunks_exact_mut((kern.nr * d).max(1)).enumerate().take(np) {
            pack_b(&b, j * kern.nr, kern.nr, 0, d, p);
        }
    };
    let size = T::DTYPE.size();
    let (na, nb) = (mp * kern.mr, np * kern.nr);
    let mut buffers = [(na, rd), (nb, rd), (na, cd), (nb, cd)].map(|(n, d)| Buffer::uninit((n * d).max(1) * size));
    let [la, lb, ra, rb] = &mut buffers;
    pack(l1, l2, rd, la.as_mut_slice(), lb.as_mut_slice());
    pack(r1, r2, cd, ra.as_mut_slice(), rb.as_mut_slice());
    let (la, lb, ra, rb) = (la.as_slice::<T>(), lb.as_slice::<T>(), ra.as_slice::<T>(), rb.as_slice::<T>());
    // Norms of the rows, zeros for padding.
    let norms = |x: &[T], d: usize, n: usize| {
        let mut all = vec![0.0f64; n];
        if d > 0 {
            all.iter_mut().zip(x.chunks_exact(d)).for_each(|(a, row)| *a = sum_sq(row).sqrt());
        }
        all
    };
    let (al, ar, bl, br) = (norms(l1, rd, na), norms(r1, cd, na), norms(l2, rd, nb), norms(r2, cd, nb));
    let mut sums = Pairs::default();
    let (mut p, mut q) = ([0.0f64; MAX_TILE], [0.0f64; MAX_TILE]);
    for j in 0..np {
        for i in 0..mp {
            let ((i0, i1), (j0, j1)) = ((i * kern.mr, (i + 1) * kern.mr), (j * kern.nr, (j + 1) * kern.nr));
            if same && i1 <= j0 {
                continue;
            }
            // SAFETY: panels hold d·mr and d·nr elements.
            unsafe {
                gram_tile::<T>(rd, &la[i * kern.mr * rd..], &lb[j * kern.nr * rd..], &mut p);
                gram_tile::<T>(cd, &ra[i * kern.mr * cd..], &rb[j * kern.nr * cd..], &mut q);
            }
            if same && i0 < j1 {
                // On the diagonal, pairs above it get weight 0 and those below it weight 2.
                for a in 0..kern.mr {
                    for b in 0..kern.nr {
                        let (row, col) = (i0 + a, j0 + b);
                        let w = if row > col { 2.0 } else { (row == col) as u8 as f64 };
                        p[a * kern.nr + b] *= w;
                        q[a * kern.nr + b] *= (w > 0.0) as u8 as f64;
                    }
                }
            }
            let twice = if same && i0 >= j1 { 2.0 } else { 1.0 };
            // Pairs of a tile on the diagonal have their weight in p but not in q.
            let reach = if same { [2.0, twice] } else { [1.0; 2] };
            let (al, ar, bl, br) = (&al[i0..i1], &ar[i0..i1], &bl[j0..j1], &br[j0..j1]);
            let tile = pair_sums(kern.nr, (&p, &q), (al, ar), (bl, br));
            sums.product += twice * tile.product;
            sums.size += twice * tile.size;
            for k in 0..2 {
                sums.least[k] += twice * tile.least[k];
                sums.reach[k] += reach[k] * tile.reach[k];
            }
        }
    }
    let dot = |d: usize| ((d.min(STRETCH) + 2) as f64 * T::UNIT, d as f64 * T::LEAST);
    let ((gr, er), (gc, ec)) = (dot(rd), dot(cd));
    let reach = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let second = (gr * gc) * reach(&al, &ar) * reach(&bl, &br);
    let adding = (t * s / 8 + 64) as f64 * f64::EPSILON * sums.size;
    let least = er * sums.least[1] + ec * sums.least[0];
    let error = 1.01 * (gr * sums.reach[0] + gc * sums.reach[1] + 2.0 * least + second + adding);
    Bounded { value: sums.product, error }
}

/// A tile of dot products over `d` columns, added in f64 from stretch to stretch.
///
/// # Safety
/// The panels hold d·mr and d·nr elements.
unsafe fn gram_tile<T: Kernels>(d: usize, a: &[T], b: &[T], out: &mut [f64; MAX_TILE]) {
    let kern = T::kernel();
    let n = kern.mr * kern.nr;
    let mut tile = [T::ZERO; MAX_TILE];
    let mut k = 0;
    while k == 0 || k < d {
        let len = STRETCH.min(d - k);
        // SAFETY: the caller's promise.
        unsafe { kern.run(len, a.as_ptr().add(k * kern.mr), b.as_ptr().add(k * kern.nr), tile.as_mut_ptr()) };
        simd(
            #[inline(always)]
            || match k {
                0 => out[..n].iter_mut().zip(&tile[..n]).for_each(|(o, x)| *o = x.to_f64()),
                _ => out[..n].iter_mut().zip(&tile[..n]).for_each(|(o, x)| *o += x.to_f64()),
            },
        );
        k += len.max(1);
    }
}

/// The sums of a tile of `nr` columns, given the norms of the rows of both operands on either side.
fn pair_sums(
    nr: usize,
    (p, q): (&[f64; MAX_TILE], &[f64; MAX_TILE]),
    (al, ar): (&[f64], &[f64]),
    (bl, br): (&[f64], &[f64]),
) -> Pairs {
    simd(
        #[inline(always)]
        || {
            const L: usize = 4;
            let mut lanes = [[0.0f64; L]; 6];
            for (i, (&al, &ar)) in al.iter().zip(ar).enumerate() {
                let (p, q) = (&p[i * nr..(i + 1) * nr], &q[i * nr..(i + 1) * nr]);
                for (((p, q), bl), br) in
                    p.chunks_exact(L).zip(q.chunks_exact(L)).zip(bl.chunks_exact(L)).zip(br.chunks_exact(L))
                {
                    for k in 0..L {
                        let (u, v) = (p[k].abs(), q[k].abs());
                        lanes[0][k] += p[k] * q[k];
                        lanes[1][k] += u * v;
                        lanes[2][k] += u;
                        lanes[3][k] += v;
                        lanes[4][k] += al * bl[k] * v;
                        lanes[5][k] += ar * br[k] * u;
                    }
                }
            }
            let [product, size, u, v, a, b] = lanes.map(|l| l.iter().sum::<f64>());
            Pairs { product, size, least: [u, v], reach: [a, b] }
        },
    )
}

/// Limit in bytes on the packed operands of the samples that are processed together.
const TOGETHER: usize = 8 << 20;

/// Writes every sample's lᵀ·g into `out [B, r, c]` and returns |lᵀ·g|²: 2·rows·r·c FLOPs and one write of the result, whose squares are
/// summed while it is still in the cache. Sample b has rows `ranges[b]` of `l [N, r]`, `g [N, c]`.
pub fn per_sample<T: Kernels>(
    l: &[T],
    g: &[T],
    (rd, cd): (usize, usize),
    ranges: &[std::ops::Range<usize>],
    out: &mut [T],
) -> Vec<f64> {
    let kern = T::kernel();
    let (mp, np) = (rd.div_ceil(kern.mr), cd.div_ceil(kern.nr));
    let lanes = mp * kern.mr + np * kern.nr;
    let longest = ranges.iter().map(|r| r.len()).max().unwrap_or(0);
    let together = (TOGETHER / T::DTYPE.size() / (lanes * longest).max(1)).clamp(1, ranges.len().max(1));
    let mut packed = take_scratch(together * lanes * longest.max(1) * T::DTYPE.size());
    // A sample's columns are split so that there are tasks for every thread; the split depends on the shape alone.
    let cols = np.div_ceil(16usize.div_ceil(together)).max(1);
    let tasks = np.div_ceil(cols);
    let mut part = vec![0.0f64; ranges.len() * tasks];
    let (out, sums) = (Shared::new(out), Shared::new(&mut part));
    for (batch, some) in ranges.chunks(together).enumerate() {
        let first = batch * together;
        // The place of panel p of the batch's sample b, left panels first.
        let place = |b: usize, p: usize| {
            let (from, t) = (b * lanes * longest, some[b].len());
            if p < mp {
                from + p * kern.mr * t..from + (p + 1) * kern.mr * t
            } else {
                let (from, p) = (from + mp * kern.mr * t, p - mp);
                from + p * kern.nr * t..from + (p + 1) * kern.nr * t
            }
        };
        let matrices = |b: usize| (Mat::new(l, 0, rd).rows_of(&some[b]).t(), Mat::new(g, 0, cd).rows_of(&some[b]));
        {
            let to = Shared::new(packed.as_mut_slice::<T>());
            par_chunks(some.len() * (mp + np), 8, |r| {
                for task in r {
                    let (b, p) = (task / (mp + np), task % (mp + np));
                    let (t, (a, e)) = (some[b].len(), matrices(b));
                    // SAFETY: each panel is written once.
                    let to = unsafe { to.slice(place(b, p)) };
                    if p < mp {
                        pack_a(&a, p * kern.mr, kern.mr, 0, t, None, to);
                    } else {
                        pack_b(&e, (p - mp) * kern.nr, kern.nr, 0, t, to);
                    }
                }
            });
        }
        let panels = packed.as_slice::<T>();
        par_chunks(some.len() * tasks, 1, |r| {
            for task in r {
                let (b, j) = (task / tasks, task % tasks * cols);
                let (t, at) = (some[b].len(), (first + b) * rd * cd);
                let mut sum = 0.0;
                for jp in j..(j + cols).min(np) {
                    let (j0, wide) = (jp * kern.nr, kern.nr.min(cd - jp * kern.nr));
                    for ip in 0..mp {
                        let (i0, tall) = (ip * kern.mr, kern.mr.min(rd - ip * kern.mr));
                        let from = at + i0 * cd + j0;
                        // SAFETY: panels of t steps, split at the kernel's stretch; tiles are disjoint.
                        unsafe {
                            let (pa, pb) = (&panels[place(b, ip)], &panels[place(b, mp + jp)]);
                            let whole = tall == kern.mr && wide == kern.nr;
                            let mut tile = [T::ZERO; MAX_TILE];
                            let (to, step) =
                                if whole { (out.ptr().add(from), cd) } else { (tile.as_mut_ptr(), kern.nr) };
                            let mut k = 0;
                            while k < t || k == 0 {
                                let len = KC.min(t - k);
                                let (pa, pb) = (pa[k * kern.mr..].as_ptr(), pb[k * kern.nr..].as_ptr());
                                (kern.into)(len, pa, pb, to, step, k > 0);
                                k += len.max(1);
                            }
                            for i in 0..tall {
                                let row = out.slice(from + i * cd..from + i * cd + wide);
                                if !whole {
                                    row.copy_from_slice(&tile[i * kern.nr..i * kern.nr + wide]);
                                }
                            }
                        }
                    }
                    for i in 0..rd {
                        let from = at + i * cd + j0;
                        // SAFETY: this task's columns.
                        sum += sum_sq(unsafe { out.slice(from..from + wide) });
                    }
                }
                // SAFETY: one per task.
                unsafe {
                    sums.slice((first + b) * tasks + task % tasks..(first + b) * tasks + task % tasks + 1)[0] = sum
                };
            }
        });
    }
    put_scratch(packed);
    part.chunks_exact(tasks.max(1)).map(|p| p.iter().sum()).collect()
}

/// Number of fixed lanes over which samples are divided when each is too small to be computed by several threads.
const SAMPLE_LANES: usize = 8;
/// Multiply-adds of a sample's gradient from which all threads work on one sample together.
const LARGE: usize = 1 << 23;

/// [`clipped_add`] for small samples: each lane processes a fixed share of them into a sum of its own, and the lanes' sums are added in
/// order.
fn clipped_add_lanes<T: Kernels>(
    l: &[T],
    g: &[T],
    (rd, cd): (usize, usize),
    ranges: &[std::ops::Range<usize>],
    base: &[f64],
    clip: &(dyn Fn(f64) -> f64 + Sync),
    out: &mut [T],
) -> Vec<f64> {
    let kern = T::kernel();
    let (mp, np) = (rd.div_ceil(kern.mr), cd.div_ceil(kern.nr));
    let (tile_len, tiles) = (kern.mr * kern.nr, mp * np);
    let lanes = SAMPLE_LANES.min(ranges.len());
    let each = ranges.len().div_ceil(lanes);
    let mut sums = Buffer::zeroed(lanes * tiles * tile_len * T::DTYPE.size());
    let mut totals = vec![0.0f64; ranges.len()];
    let longest = ranges.iter().map(|r| r.len()).max().unwrap_or(0);
    {
        let (sums, totals) = (Shared::new(sums.as_mut_slice::<T>()), Shared::new(&mut totals));
        par_chunks(lanes, 1, |lane| {
            let lane = lane.start;
            let mine = lane * each..((lane + 1) * each).min(ranges.len());
            // SAFETY: each lane has its own sum and its own samples.
            let sum = unsafe { sums.slice(lane * tiles * tile_len..(lane + 1) * tiles * tile_len) };
            let size = T::DTYPE.size();
            let mut scratch = Buffer::uninit(tiles * tile_len * size);
            let mut ap = Buffer::uninit((mp * kern.mr * longest).max(1) * size);
            let mut bp = Buffer::uninit((np * kern.nr * longest).max(1) * size);
            for b in mine {
                let (range, t) = (ranges[b].clone(), ranges[b].len());
                // SAFETY: as above.
                let total = unsafe { &mut totals.slice(b..b + 1)[0] };
                *total = base[b];
                if t == 0 {
                    continue;
                }
                let a = Mat::new(&l[range.start * rd..range.end * rd], t, rd).t();
                let e = Mat::new(&g[range.start * cd..range.end * cd], t, cd);
                let (pa, pb, x) = (ap.as_mut_slice::<T>(), bp.as_mut_slice::<T>(), scratch.as_mut_slice::<T>());
                (0..mp).for_each(|p| pack_a(&a, p * kern.mr, kern.mr, 0, t, None, &mut pa[p * kern.mr * t..]));
                (0..np).for_each(|p| pack_b(&e, p * kern.nr, kern.nr, 0, t, &mut pb[p * kern.nr * t..]));
                for (i, tile) in x.chunks_exact_mut(tile_len).enumerate() {
                    let (ip, jp) = (i % mp, i / mp);
                    // SAFETY: panels hold t·mr and t·nr elements.
                    unsafe {
                        kern.run(
                            t,
                            pa.as_ptr().add(ip * kern.mr * t),
                            pb.as_ptr().add(jp * kern.nr * t),
                            tile.as_mut_ptr(),
                        )
                    };
                }
                *total += upwards(T::UNIT) * sum_sq(x);
                let w = toward_zero::<T>(clip(*total));
                if w != T::ZERO {
                    simd(
                        #[inline(always)]
                        || sum.iter_mut().zip(&*x).for_each(|(s, &x)| *s += w * x),
                    );
                }
            }
        });
    }
    let sums = sums.as_slice::<T>();
    let out = Shared::new(out);
    par_chunks(tiles, 8, |r| {
        for i in r {
            let (i0, j0) = (i % mp * kern.mr, i / mp * kern.nr);
            let cols = kern.nr.min(cd - j0);
            for row in 0..kern.mr.min(rd - i0) {
                let at = (i0 + row) * cd + j0;
                // SAFETY: tiles are disjoint.
                let o = unsafe { out.slice(at..at + cols) };
                for lane in 0..lanes {
                    let from = (lane * tiles + i) * tile_len + row * kern.nr;
                    o.iter_mut().zip(&sums[from..from + cols]).for_each(|(o, &s)| *o += s);
                }
            }
        }
    });
    totals
}

/// For each sample b (rows `ranges[b]` of `l [N, r]`, `g [N, c]`): G = lᵀ·g, total = `base[b]` + |G|², out += clip(total)·G. The G that is
/// added is the same G whose norm was computed, and its squared norm is rounded upwards, so that the rounding error of G itself does not
/// matter. One pass over the samples. All threads work together on each large sample, with one scratch matrix of the parameter's size;
/// small samples are divided over lanes, with a few such matrices. Returns the totals.
pub fn clipped_add<T: Kernels>(
    l: &[T],
    g: &[T],
    (rd, cd): (usize, usize),
    ranges: &[std::ops::Range<usize>],
    base: &[f64],
    clip: &(dyn Fn(f64) -> f64 + Sync),
    out: &mut [T],
) -> Vec<f64> {
    let rows: usize = ranges.iter().map(|r| r.len()).sum();
    if rows == 0 {
        return base.to_vec();
    }
    if rows / ranges.len().max(1) * rd * cd < LARGE {
        return clipped_add_lanes(l, g, (rd, cd), ranges, base, clip, out);
    }
    let kern = T::kernel();
    let (mp, np) = (rd.div_ceil(kern.mr), cd.div_ceil(kern.nr));
    let tile_len = kern.mr * kern.nr;
    let tiles = mp * np;
    // The last sample's gradient in tiles; each tile is added to the weighted sum just before the next sample's overwrites it.
    let mut scratch = Buffer::uninit(tiles * tile_len * T::DTYPE.size());
    let mut totals = Vec::with_capacity(ranges.len());
    let mut weight = T::ZERO;
    let mut part = vec![0.0f64; tiles];
    let longest = ranges.iter().map(|r| r.len()).max().unwrap_or(0);
    let mut ap = Buffer::uninit((mp * kern.mr * longest).max(1) * T::DTYPE.size());
    let mut bp = Buffer::uninit((np * kern.nr * longest).max(1) * T::DTYPE.size());
    for b in 0..=ranges.len() {
        let range = ranges.get(b).cloned().unwrap_or(0..0);
        let t = range.len();
        let a = Mat::new(&l[range.start * rd..range.end * rd], t, rd).t();
        let e = Mat::new(&g[range.start * cd..range.end * cd], t, cd);
        if t > 0 {
            let (pa, pb) = (Shared::new(ap.as_mut_slice::<T>()), Shared::new(bp.as_mut_slice::<T>()));
            par_chunks(mp + np, 8, |r| {
                for p in r {
                    // SAFETY: each panel is written once.
                    unsafe {
                        if p < mp {
                            let to = pa.slice(p * kern.mr * t..(p + 1) * kern.mr * t);
                            pack_a(&a, p * kern.mr, kern.mr, 0, t, None, to);
                        } else {
                            let p = p - mp;
                            pack_b(&e, p * kern.nr, kern.nr, 0, t, pb.slice(p * kern.nr * t..(p + 1) * kern.nr * t));
                        }
                    }
                }
            });
        }
        let (pa, pb) = (ap.as_slice::<T>(), bp.as_slice::<T>());
        let (store, sums, acc) =
            (Shared::new(scratch.as_mut_slice::<T>()), Shared::new(&mut part), Shared::new(&mut *out));
        par_chunks(tiles, 16, |r| {
            for i in r {
                let (ip, jp) = (i % mp, i / mp);
                // SAFETY: tiles are disjoint, in the scratch and in the output.
                let (tile, sum) = unsafe { (store.slice(i * tile_len..(i + 1) * tile_len), sums.slice(i..i + 1)) };
                if weight != T::ZERO {
                    simd(
                        #[inline(always)]
                        || {
                            let (i0, j0) = (ip * kern.mr, jp * kern.nr);
                            let cols = kern.nr.min(cd - j0);
                            for (row, x) in tile.chunks_exact(kern.nr).enumerate().take(kern.mr.min(rd - i0)) {
                                let at = (i0 + row) * cd + j0;
                                // SAFETY: as above.
                                let o = unsafe { acc.slice(at..at + cols) };
                                for (o, &x) in o.iter_mut().zip(x) {
                                    *o += weight * x;
                                }
                            }
                        },
                    );
                }
                if t > 0 {
                    // SAFETY: panels hold t·mr and t·nr elements.
                    unsafe {
                        kern.run(
                            t,
                            pa.as_ptr().add(ip * kern.mr * t),
                            pb.as_ptr().add(jp * kern.nr * t),
                            tile.as_mut_ptr(),
                        )
                    };
                    sum[0] = sum_sq(tile);
                } else {
                    sum[0] = 0.0;
                }
            }
        });
        if b < ranges.len() {
            let total = base[b] + upwards(T::UNIT) * part.iter().sum::<f64>();
            totals.push(total);
            weight = if t > 0 { toward_zero(clip(total)) } else { T::ZERO };
        }
    }
    totals
}

/// out += Σₙ wₙ·lₙ ⊗ rₙ; rows of zero weight are skipped, even if they are not finite.
pub fn outer_add<T: Kernels>(l: &[T], r: &[T], n: usize, w: Option<&[T]>, out: &mut [T]) {
    if n == 0 {
        return;
    }
    let (rd, cd) = (l.len() / n, r.len() / n);
    let mut add = |rows: std::ops::Range<usize>| {
        let k = rows.len();
        let a = Mat::new(&l[rows.start * rd..rows.end * rd], k, rd).t();
        let b = Mat::new(&r[rows.start * cd..rows.end * cd], k, cd);
        let e = super::Epilogue { accumulate: true, scale: w.map(|w| &w[rows]), ..super::Epilogue::default() };
        super::gemm(a, b, e, out)
    };
    match w {
        Some(w) if w.contains(&T::ZERO) => {
            let mut at = 0;
            while at < n {
                let start = at;
                let zero = w[at] == T::ZERO;
                while at < n && (w[at] == T::ZERO) == zero {
                    at += 1;
                }
                if !zero {
                    add(start..at);
                }
            }
        }
        _ => add(0..n),
    }
}
