#include "prelude.cuh"
// Optimizers over flat buffers: one launch whatever the number of parameters. Grid ceil(n / 1024), block 256, n > 0.
//
//   adamw_{f32,f64} (T* p, const T* g, T* m, T* v, i64 n, const i64* ends, const u8* decays, i32 pieces, AdamW a, const f64* live,
//                   const u64* stop)
//       m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g², p ← keep·p − scale·m/(√v·root + ε)
//       AdamW, f64 each: beta1, one_minus_beta1, beta2, one_minus_beta2, scale = lr/(1−β₁ᵗ), root = 1/√(1−β₂ᵗ), eps, keep = 1−lr·λ.
//   sgd_{f32,f64}   (T* p, const T* g, T* b, i64 n, const i64* ends, const u8* decays, i32 pieces, f64 lr, f64 momentum, f64 keep,
//                    const f64* live, const u64* stop)
//       b ← μb + g, p ← keep·p − lr·b; without b (null) p ← keep·p − lr·g.
//   Stretch k of the buffer ends at ends[k] (ascending, the last is n) and is decayed (keep) if decays[k] is not 0; the table
//   is made once, together with the flat buffer. pieces 0: nothing is decayed.
//   live, if not null, holds the numbers that change from step to step, so that a captured graph can be replayed: AdamW [scale, root,
//   keep], SGD [lr, keep].
//   stop, if not null: if it is not 0, nothing is updated (step.cu).
//
// Bytes per f32 element: AdamW reads 16 and writes 12, SGD with momentum 12 and 8.

struct AdamW {
    double beta1, gain1, beta2, gain2, scale, root, eps, keep;
};

// The first stretch that ends after i; a few cached reads for four elements.
DEV i32 piece_of(const i64* ends, i32 pieces, i64 i) {
    i32 a = 0, b = pieces - 1;
    while (a < b) {
        i32 m = (a + b) / 2;
        if (ends[m] <= i) a = m + 1;
        else b = m;
    }
    return a;
}
// Calls f(k, keep of element i + k) for the thread's elements.
template <class T, class F>
DEV void each_decayed(i64 i, int count, const i64* ends, const u8* decays, i32 pieces, T keep, F f) {
    i32 k = pieces ? piece_of(ends, pieces, i) : 0;
    i64 end = pieces ? ends[k] : i + 4;
    bool decayed = pieces && decays[k];
#pragma unroll
    for (int q = 0; q < 4; q++)
        if (q < count) {
            while (i + q >= end && k + 1 < pieces) {
                end = ends[++k];
                decayed = decays[k];
            }
            f(q, decayed ? keep : T(1));
        }
}
template <class T>
DEV void adamw_body(T* p, const T* g, T* m, T* v, i64 n, const i64* ends, const u8* decays, i32 pieces, const AdamW& a,
                    const double* live, const u64* stop) {
    if (stop && *stop) return;
    i64 i;
    int count = quad_of(n, i);
    if (!count) return;
    T b1 = (T)a.beta1, a1 = (T)a.gain1, b2 = (T)a.beta2, a2 = (T)a.gain2, eps = (T)a.eps;
    T scale = (T)(live ? live[0] : a.scale), root = (T)(live ? live[1] : a.root), keep = (T)(live ? live[2] : a.keep);
    T pv[4], gv[4], mv[4], vv[4];
    load4(p, i, count, pv);
    load4(g, i, count, gv);
    load4(m, i, count, mv);
    load4(v, i, count, vv);
    each_decayed(i, count, ends, decays, pieces, keep, [&](int k, T kept) {
        mv[k] = b1 * mv[k] + a1 * gv[k];
        vv[k] = b2 * vv[k] + a2 * (gv[k] * gv[k]);
        pv[k] = kept * pv[k] - scale * mv[k] / (sqrt_of(vv[k]) * root + eps);
    });
    store4(p, i, count, pv);
    store4(m, i, count, mv);
    store4(v, i, count, vv);
}
template <class T>
DEV void sgd_body(T* p, const T* g, T* b, i64 n, const i64* ends, const u8* decays, i32 pieces, double lr, double momentum,
                  double keep, const double* live, const u64* stop) {
    if (stop && *stop) return;
    i64 i;
    int count = quad_of(n, i);
    if (!count) return;
    T rate = (T)(live ? live[0] : lr), kept_ = (T)(live ? live[1] : keep), mu = (T)momentum;
    T pv[4], gv[4], bv[4];
    load4(p, i, count, pv);
    load4(g, i, count, gv);
    if (b) {
        load4((const T*)b, i, count, bv);
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (k < count) gv[k] = mu * bv[k] + gv[k];
        store4(b, i, count, gv);
    }
    each_decayed(i, count, ends, decays, pieces, kept_, [&](int k, T kept) { pv[k] = kept * pv[k] - rate * gv[k]; });
    store4(p, i, count, pv);
}
#define INSTANCES(T, S)                                                                                        \
    KERNEL adamw_##S(T* p, const T* g, T* m, T* v, i64 n, const i64* ends, const u8* decays, i32 pieces,       \
                     const __grid_constant__ AdamW a, const double* live, const u64* stop) {                   \
        adamw_body(p, g, m, v, n, ends, decays, pieces, a, live, stop);                                        \
    }                                                                                                          \
    KERNEL sgd_##S(T* p, const T* g, T* b, i64 n, const i64* ends, const u8* decays, i32 pieces, double lr,    \
                   double momentum, double keep, const double* live, const u64* stop) {                        \
        sgd_body(p, g, b, n, ends, decays, pieces, lr, momentum, keep, live, stop);                            \
    }
INSTANCES(float, f32)
INSTANCES(double, f64)
