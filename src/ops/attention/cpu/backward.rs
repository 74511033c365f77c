//! The gradients of Q, K and V.

use super::*;

/// Queries that are processed together. The products dK = dSᵀ·Q and dV = Pᵀ·dO sum over queries, and a micro-kernel call over only one
/// panel of 32 would spend as much time on loading and storing its tile as on multiplying; over 128 it is a quarter of that.
const QUERIES: usize = 128;
/// The most panels that are processed together.
const MOST_PANELS: usize = 8;

/// Gradients of Q, K and V, with the probabilities recomputed from the log-sum-exp; rows of no part are not written.
///
/// With P = exp(S − lse), δᵢ = Σ outᵢ·gradᵢ and dS = P ⊙ (grad·Vᵀ − δ)·scale: dV = Pᵀ·grad, dQ = dS·K, dK = dSᵀ·Q (Dao et al. 2022,
/// algorithm 4). These are five products of 2·pairs·D FLOPs. A task is one key head of one part with all query heads that share it, so that
/// dK and dV are summed by one thread, in order. It packs K by rows (for S), V by rows (for grad·Vᵀ) and K by columns (for dQ) once, and
/// keeps dK and dV of all its keys in `ksum` and `vsum`, as tiles. Then, for the panels of [`QUERIES`] queries at a time and up to [`KEYS`]
/// keys:
///
/// 1. For each tile of `mr` keys and each panel, two micro-kernel calls over D compute S and grad·Vᵀ; P and dS follow in the same tile.
/// 2. Both are transposed (queries become the packed steps of a sum: `pt` and `dst`), and one call over all queries for each tile of D
///    adds to dV and dK of these keys.
/// 3. dS of all panels is kept for the pass; at its end one call over up to [`KEYS`] keys for each tile of D adds to dQ of each panel.
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
    let together = (QUERIES / nr).clamp(1, MOST_PANELS);
    let wide = together * nr;
    let (scale, zero) = (Sum::<E>::from_f64(p.scale), Sum::<E>::ZERO);
    let [dq, dk, dv] = grads;
    let tile_len = mr * nr;
    let wide_words = kern.words(wide);
    par_chunks(parts.len() * p.kv_heads, 1, |tasks| {
        let mut buf = [kp * mr * dw, kp * mr * dw, dp * mr * kern.words(longest), wide * dw, wide * dw]
            .map(Scratch::new::<Word<E>>);
        let mut rows = [dn * nr * wide_words, dn * nr * wide_words].map(Scratch::new::<Word<E>>);
        let mut sums = [kp * mr * dn * nr, kp * mr * dn * nr].map(Scratch::new::<Sum<E>>);
        let keys_max = KEYS.div_ceil(mr) * mr;
        let mut dsbuf = Scratch::new::<Sum<E>>(wide * keys_max);
        let mut packed = Scratch::new::<Word<E>>(keys_max * nr);
        let mut qsum = Scratch::new::<Sum<E>>(together * dp * tile_len);
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
            let mut seen = vec![Seen::new(sinks); together];
            for h in kv * group..(kv + 1) * group {
                let distances = Distances::new(p, h);
                let (qm, gm) = (q.mat(part, h, part.queries), grad.mat(part, h, part.queries));
                let mut i0 = 0;
                while i0 < part.queries {
                    let live = wide.min(part.queries - i0);
                    let (panels, live_words) = (live.div_ceil(nr), kern.words(live));
                    let [qrow, grow] = &mut rows;
                    let (qrow, grow) = (qrow.get::<Word<E>>(), grow.get::<Word<E>>());
                    // Queries along K, D along the panel: a padding query is either not read or zero.
                    let mut special = special
                        | kern.right(&qm, 0..dn, i0..i0 + live, qrow)
                        | kern.right(&gm, 0..dn, i0..i0 + live, grow);
                    let mut stats = [[zero; 64]; 2 * MOST_PANELS];
                    let mut reach = Vec::with_capacity(together);
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

/// A row of sums, rounded to the element type.
fn round_row<E: Packed>(sums: &[Sum<E>], row: &mut [E]) {
    simd(
        #[inline(always)]
        || row.iter_mut().zip(sums).for_each(|(o, &s)| *o = E::rounded(s)),
    );
}

/// Σ aᵢ·bᵢ, with eight partial sums.
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

/// sum += a·b over the given number of packed words, through a temporary tile.
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
