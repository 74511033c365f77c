#include "prelude.cuh"
// y = x + Σ wᵢ·dᵢ over up to eight arrays at once, summed in f64 for every dtype and rounded once.
//
//   add_scaled_{f32,f64,bf16,f16} (const T* x, double* sums, T* y, i64 n, const T* d0 … d7, Weights8 w, i32 terms)
//       starts with x or, if that is null, with sums; writes y or, if that is null, sums
//
// Grid ceil(n / 1024), block 256, 4 elements per thread, no shared memory, n > 0, contiguous arrays. More than eight terms take several
// launches, with the sums in memory between them. One launch reads x and each d once and writes y once.

struct Weights8 { double w[8]; };

template <class T>
DEV void add_scaled_body(const T* x, double* sums, T* y, i64 n, const T* const (&d)[8], const Weights8& w, i32 terms) {
    i64 i;
    int count = quad_of(n, i);
    if (!count) return;
    double s[4] = {0, 0, 0, 0};
    T v[4];
    if (x) {
        load4(x, i, count, v);
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (k < count) s[k] = (double)to_acc(v[k]);
    } else {
        load4(sums, i, count, s);
    }
#pragma unroll
    for (int t = 0; t < 8; t++) {
        if (t >= terms) break;
        load4(d[t], i, count, v);
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (k < count) s[k] += w.w[t] * (double)to_acc(v[k]);
    }
    if (!y) {
        store4(sums, i, count, s);
        return;
    }
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (k < count) v[k] = from_acc<T>((acc_t<T>)s[k]);
    store4(y, i, count, v);
}
#define INSTANCES(T, S)                                                                                        \
    KERNEL add_scaled_##S(const T* x, double* sums, T* y, i64 n, const T* d0, const T* d1, const T* d2,        \
                          const T* d3, const T* d4, const T* d5, const T* d6, const T* d7,                     \
                          const __grid_constant__ Weights8 w, i32 terms) {                                     \
        const T* const d[8] = {d0, d1, d2, d3, d4, d5, d6, d7};                                                \
        add_scaled_body(x, sums, y, n, d, w, terms);                                                           \
    }
FOR_FLOATS(INSTANCES)
