//! The output of attention and the log-sum-exp of its scores.

use super::*;

/// Writes the output `[B, T, H, D]` and the log-sum-exp `[B, H, T]` per query; rows of no part are not written.
///
/// A task is one head of one part and a stretch of its query panels. It packs the keys that the stretch sees once (K by rows, so that the
/// scores sum over D; V by columns, so that the output sums over keys), which reads each of them once from memory, and then processes its
/// panels. For a panel it keeps, in the first-level cache, the packed queries (nr·D), the scores of up to [`KEYS`] keys and the output so
/// far (D·nr, transposed); the running maximum m and sum z of each query are in two arrays with one lane per query. A pass over up to
/// [`KEYS`] keys
///
/// 1. computes the scores tile by tile, masks them, and updates the maximum: m' = max(m, s),
/// 2. rescales z and the output so far by exp(m − m'),
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
    // A task packs its keys once and then processes a stretch of query panels; long sequences are split for load balance.
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
                        // A query that has not seen a key yet keeps a shift of 0, so that −∞ − −∞ never occurs.
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
                    // Rows of the last panel past the keys hold exp(−∞) = 0 and belong to the padding of V: only those of whole words are
                    // read.
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
