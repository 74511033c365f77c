#include "prelude.cuh"
// Softmax and log-softmax of rows of d, forward and backward. Grid by the row rule (prelude.cuh), block 256.
//
//   {softmax,log_softmax}_{f32,f64,bf16,f16}      (const T* x, T* y, i64 rows, i64 d)                y may be x
//   {softmax,log_softmax}_grad_{f32,f64,bf16,f16} (const T* y, const T* dy, T* dx, i64 rows, i64 d)  dx may be dy
//
// Forward reads x twice (the second time from the cache if the row fits) and writes y: maximum and sum are computed in one pass, and the
// sum is rescaled whenever the maximum increases. A row with a NaN or ∞, or with only −∞, gives NaN.

// Maximum so far and Σ exp(x − m), four elements at a time, with at most five exponentials. ∞ makes the sum NaN through ∞ − ∞.
template <class A> struct Online {
    A m, s;
};
template <class A> DEV void push(Online<A>& o, const A (&v)[4], int count) {
    A m = o.m;
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (k < count && v[k] > m) m = v[k];
    if (m != o.m) o.s *= exp_of(o.m - m);
    o.m = m;
    bool nothing = m == -inf_of(A(0)); // only −∞ and NaN so far
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (k < count) o.s += nothing ? (is_nan(v[k]) ? v[k] : A(0)) : exp_of(v[k] - m);
}
// Sums are combined at the larger maximum; nothing is rescaled by exp(−∞ + ∞).
template <class A> DEV Online<A> join(Online<A> a, Online<A> b) {
    A m = a.m > b.m ? a.m : b.m;
    if (m == -inf_of(A(0))) return {m, a.s + b.s};
    return {m, a.s * exp_of(a.m - m) + b.s * exp_of(b.m - m)};
}
template <class A> DEV Online<A> team_join(const Team& t, Online<A> v, A* ms, A* ss) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        Online<A> w = {__shfl_xor_sync(FULL_MASK, v.m, o), __shfl_xor_sync(FULL_MASK, v.s, o)};
        // The same order of operands in both lanes, so that all lanes get the same bits.
        v = threadIdx.x & o ? join(w, v) : join(v, w);
    }
    if (t.size == 32) return v;
    if (threadIdx.x % 32 == 0) {
        ms[threadIdx.x / 32] = v.m;
        ss[threadIdx.x / 32] = v.s;
    }
    __syncthreads();
    v = {ms[0], ss[0]};
    for (int w = 1; w < 8; w++) v = join(v, {ms[w], ss[w]});
    return v;
}
template <bool LOG, class T> DEV void softmax_body(const T* x, T* y, i64 rows, i64 d) {
    typedef acc_t<T> A;
    SHARED(A, ms, [8]);
    SHARED(A, ss, [8]);
    Team t = row_team(rows, d);
    if (!t.in) return;
    x += t.row * d;
    y += t.row * d;
    Online<A> o = {-inf_of(A(0)), A(0)};
    for (i64 i = t.rank * 4; i < d; i += t.size * 4) {
        int count = (int)min64(d - i, 4);
        T v[4];
        A a[4];
        load4(x, i, count, v);
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (k < count) a[k] = to_acc(v[k]);
        push(o, a, count);
    }
    o = team_join(t, o, ms, ss);
    A inv = A(1) / o.s, z = log_of(o.s);
    // Every thread overwrites only elements that it has read itself; the block has passed a barrier since.
    for (i64 i = t.rank * 4; i < d; i += t.size * 4) {
        int count = (int)min64(d - i, 4);
        T v[4];
        load4(x, i, count, v);
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (k < count) v[k] = from_acc<T>(LOG ? to_acc(v[k]) - o.m - z : exp_of(to_acc(v[k]) - o.m) * inv);
        store4(y, i, count, v);
    }
}
template <bool LOG, class T> DEV void softmax_grad_body(const T* y, const T* dy, T* dx, i64 rows, i64 d) {
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
        T g[4], v[4];
        load4(dy, i, count, g);
        if (!LOG) load4(y, i, count, v);
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (k < count) s += LOG ? to_acc(g[k]) : to_acc(g[k]) * to_acc(v[k]);
    }
    s = team_sum(t, s, red);
    for (i64 i = t.rank * 4; i < d; i += t.size * 4) {
        int count = (int)min64(d - i, 4);
        T g[4], v[4];
        load4(dy, i, count, g);
        load4(y, i, count, v);
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (k < count) {
                A a = to_acc(g[k]), b = to_acc(v[k]);
                g[k] = from_acc<T>(LOG ? a - exp_of(b) * s : b * (a - s));
            }
        store4(dx, i, count, g);
    }
}
#define INSTANCES(T, S)                                                                                        \
    KERNEL softmax_##S(const T* x, T* y, i64 rows, i64 d) { softmax_body<false>(x, y, rows, d); }              \
    KERNEL log_softmax_##S(const T* x, T* y, i64 rows, i64 d) { softmax_body<true>(x, y, rows, d); }           \
    KERNEL softmax_grad_##S(const T* y, const T* dy, T* dx, i64 rows, i64 d) {                                 \
        softmax_grad_body<false>(y, dy, dx, rows, d);                                                          \
    }                                                                                                          \
    KERNEL log_softmax_grad_##S(const T* y, const T* dy, T* dx, i64 rows, i64 d) {                             \
        softmax_grad_body<true>(y, dy, dx, rows, d);                                                           \
    }
FOR_FLOATS(INSTANCES)
