#include "prelude.cuh"
// Softmin of rows of d, forward and backward. Grid by the row rule (prelude.cuh), block 256.
//
//   softmin_{f32,f64,bf16,f16}      (const T* x, T* y, i64 rows, i64 d)                exp(−x)/Σ exp(−x); y may be x
//   softmin_grad_{f32,f64,bf16,f16} (const T* y, const T* dy, T* dx, i64 rows, i64 d)  dx = y·(Σ y·dy − dy); dx may be dy
//
// Forward reads x three times, from the caches except for the first, and writes y once. A row with a NaN or −∞, or with only ∞, gives NaN.

template <class T> DEV void softmin_body(const T* x, T* y, i64 rows, i64 d) {
    typedef acc_t<T> A;
    SHARED(A, red, [8]);
    Team t = row_team(rows, d);
    if (!t.in) return;
    x += t.row * d;
    y += t.row * d;
    // NaN propagates through the sum.
    A least = inf_of(A(0)), s = 0;
    for (i64 i = t.rank * 4; i < d; i += t.size * 4) {
        int count = (int)min64(d - i, 4);
        T v[4];
        load4(x, i, count, v);
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (k < count && to_acc(v[k]) < least) least = to_acc(v[k]);
    }
    least = team_reduce(t, least, red, [](A a, A b) { return a < b ? a : b; });
    for (i64 i = t.rank * 4; i < d; i += t.size * 4) {
        int count = (int)min64(d - i, 4);
        T v[4];
        load4(x, i, count, v);
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (k < count) s += exp_of(least - to_acc(v[k]));
    }
    A inv = A(1) / team_sum(t, s, red);
    for (i64 i = t.rank * 4; i < d; i += t.size * 4) {
        int count = (int)min64(d - i, 4);
        T v[4];
        load4(x, i, count, v);
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (k < count) v[k] = from_acc<T>(exp_of(least - to_acc(v[k])) * inv);
        store4(y, i, count, v);
    }
}
template <class T> DEV void softmin_grad_body(const T* y, const T* dy, T* dx, i64 rows, i64 d) {
    typedef acc_t<T> A;
    SHARED(A, red, [8]);
    Team t = row_team(rows, d);
    if (!t.in) return;
    y += t.row * d;
    dy += t.row * d;
    dx += t.row * d;
    A s = 0;
    for (i64 i = t.rank * 4; i < d; i += t.size * 4) {
        int count = (int)min64(d - i, 4);
        T v[4], g[4];
        load4(y, i, count, v);
        load4(dy, i, count, g);
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (k < count) s += to_acc(v[k]) * to_acc(g[k]);
    }
    s = team_sum(t, s, red);
    for (i64 i = t.rank * 4; i < d; i += t.size * 4) {
        int count = (int)min64(d - i, 4);
        T v[4], g[4];
        load4(y, i, count, v);
        load4(dy, i, count, g);
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (k < count) g[k] = from_acc<T>(to_acc(v[k]) * (s - to_acc(g[k])));
        store4(dx, i, count, g);
    }
}
#define INSTANCES(T, S)                                                                                        \
    KERNEL softmin_##S(const T* x, T* y, i64 rows, i64 d) { softmin_body(x, y, rows, d); }                     \
    KERNEL softmin_grad_##S(const T* y, const T* dy, T* dx, i64 rows, i64 d) {                                 \
        softmin_grad_body(y, dy, dx, rows, d);                                                                 \
    }
FOR_FLOATS(INSTANCES)
