#include "prelude.cuh"
// Losses: cross-entropy fused with log-softmax, one value per sample; and the elementwise terms of the others.
//
//   cross_entropy_{f32,f64,bf16,f16} (const T* x, const u32* targets, acc_t<T>* loss, acc_t<T>* lse, i64 rows, i64 d,
//                                     f64 smoothing, i64 ignore)               row rule, block 256
//       Per row: lse[2] = m = max x and z = ln Σ exp(x − m), kept apart because m + z would lose precision if m is large;
//       loss = z − (1 − s)·(x[target] − m) − s·mean(x − m). Rows with target = ignore (−1: none) give 0, 0 and 0; a
//       target ≥ d gives NaN (ids_u32 in move.cu reports it).
//   class_ids (const i64* targets, u32* out, i64 n, i64 ignore)                grid ceil(n / 1024), block 256
//       A target = ignore becomes u32::MAX; a target that is not a u32 becomes u32::MAX − 1, which is not a class either. 12 bytes a row.
//   sample_loss_{f32,f64} (const A* loss, const u32* targets, const i64* offsets, const u32* order, A* out, A* weight,
//                          i64 samples, i64 each, i64 ignore, i32 mean)        grid ceil(samples / 8), block 256
//       A sample's rows: positions offsets[s] .. offsets[s + 1] (null: s·each .. (s + 1)·each) of order (null: themselves).
//       out[s] = Σ weight·loss in f64; weight[r] = 1 / (rows that are not ignored), or 1 without mean. If all rows are ignored: 0.
//   cross_entropy_grad_{f32,f64,bf16,f16} (const T* x, const acc_t<T>* lse, const u32* targets, const acc_t<T>* weight,
//                          const acc_t<T>* g, const u32* owner, T* dx, i64 rows, i64 d, i64 each, f64 smoothing, i64 ignore)
//                                                                              row rule, block 256; dx may be x
//       dx = weight[r]·g[sample]·(softmax(x) − (1 − s)·onehot − s/d); the sample is owner[r], or r / each if owner is null.
//   bce_{f32,f64}      (const T* x, const T* t, T* y, i64 n, Strided2 sxt)                grid ceil(n / 1024), block 256
//       softplus(x) − x·t
//   bce_grad_{..}               (const T* x, const T* t, const T* g, T* dx, i64 n, Strided3 sxtg)  (sigmoid(x) − t)·g
//   xlogx_f64                   (const T* x, T* y, i64 n, Strided1 sx)                             x > 0 ? x·ln x : 0 (KL)

template <class T>
DEV void cross_entropy_body(const T* x, const u32* targets, acc_t<T>* loss, acc_t<T>* lse, i64 rows, i64 d,
                            double smoothing, i64 ignore) {
    typedef acc_t<T> A;
    SHARED(A, red, [8]);
    Team t = row_team(rows, d);
    if (!t.in) return;
    i64 target = targets[t.row];
    if (target == ignore) { // taken by the whole team
        if (t.rank == 0) loss[t.row] = lse[2 * t.row] = lse[2 * t.row + 1] = A(0);
        return;
    }
    x += t.row * d;
    // NaN propagates through the sum. Rows of tens of thousands of classes are read twice, the second time from the second-level cache.
    A m = -inf_of(A(0)), s = 0, all = 0;
    for (i64 i = t.rank * 4; i < d; i += t.size * 4) {
        int count = (int)min64(d - i, 4);
        T v[4];
        load4(x, i, count, v);
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (k < count && to_acc(v[k]) > m) m = to_acc(v[k]);
    }
    m = team_reduce(t, m, red, [](A a, A b) { return a > b ? a : b; });
    for (i64 i = t.rank * 4; i < d; i += t.size * 4) {
        int count = (int)min64(d - i, 4);
        T v[4];
        load4(x, i, count, v);
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (k < count) {
                s += exp_of(to_acc(v[k]) - m);
                all += to_acc(v[k]) - m;
            }
    }
    s = team_sum(t, s, red);
    A even = (A)smoothing;
    if (even != A(0)) all = team_sum(t, all, red);
    if (t.rank == 0) {
        A z = log_of(s), l = target < d ? z - (A(1) - even) * (to_acc(x[target]) - m) : (A)NAN;
        if (even != A(0)) l -= even / (A)d * all;
        loss[t.row] = l;
        lse[2 * t.row] = m;
        lse[2 * t.row + 1] = z;
    }
}
template <class T>
DEV void cross_entropy_grad_body(const T* x, const acc_t<T>* lse, const u32* targets, const acc_t<T>* weight,
                                 const acc_t<T>* g, const u32* owner, T* dx, i64 rows, i64 d, i64 each, double smoothing,
                                 i64 ignore) {
    typedef acc_t<T> A;
    Team t = row_team(rows, d);
    if (!t.in) return;
    i64 target = targets[t.row];
    bool none = target == ignore;
    A w = weight[t.row] * g[owner ? (i64)owner[t.row] : t.row / each], m = lse[2 * t.row], z = lse[2 * t.row + 1];
    A even = (A)smoothing / (A)d, hit = A(1) - (A)smoothing;
    x += t.row * d;
    dx += t.row * d;
    for (i64 i = t.rank * 4; i < d; i += t.size * 4) {
        int count = (int)min64(d - i, 4);
        T v[4];
        load4(x, i, count, v);
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (k < count) {
                A p = exp_of(to_acc(v[k]) - m - z) - even;
                if (i + k == target) p -= hit;
                v[k] = from_acc<T>(none ? A(0) : w * p);
            }
        store4(dx, i, count, v);
    }
}
#define CROSS(T, S)                                                                                            \
    KERNEL cross_entropy_##S(const T* x, const u32* targets, acc_t<T>* loss, acc_t<T>* lse, i64 rows, i64 d,   \
                             double smoothing, i64 ignore) {                                                   \
        cross_entropy_body(x, targets, loss, lse, rows, d, smoothing, ignore);                                 \
    }                                                                                                          \
    KERNEL cross_entropy_grad_##S(const T* x, const acc_t<T>* lse, const u32* targets, const acc_t<T>* weight, \
                                  const acc_t<T>* g, const u32* owner, T* dx, i64 rows, i64 d, i64 each,       \
                                  double smoothing, i64 ignore) {                                              \
        cross_entropy_grad_body(x, lse, targets, weight, g, owner, dx, rows, d, each, smoothing, ignore);      \
    }
FOR_FLOATS(CROSS)

KERNEL class_ids(const i64* targets, u32* out, i64 n, i64 ignore) {
    for (i64 i = (i64)blockIdx.x * 1024 + threadIdx.x, k = 0; k < 4 && i < n; k++, i += 256) {
        i64 t = targets[i];
        out[i] = t == ignore ? 0xffffffffu : t < 0 || t >= 0xfffffffell ? 0xfffffffeu : (u32)t;
    }
}

// One warp per sample. The sum is f64 on both devices, so that its order has hardly any effect.
template <class A>
DEV void sample_loss_body(const A* loss, const u32* targets, const i64* offsets, const u32* order, A* out, A* weight,
                          i64 samples, i64 each, i64 ignore, int mean) {
    i64 s = (i64)blockIdx.x * 8 + threadIdx.x / 32;
    if (s >= samples) return;
    int lane = threadIdx.x % 32;
    i64 a = offsets ? offsets[s] : s * each, b = offsets ? offsets[s + 1] : a + each;
    double sum = 0, count = 0;
    for (i64 i = a + lane; i < b; i += 32) {
        i64 r = order ? (i64)order[i] : i;
        if ((i64)targets[r] == ignore) continue;
        sum += (double)loss[r];
        count += 1;
    }
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        sum += __shfl_xor_sync(FULL_MASK, sum, o);
        count += __shfl_xor_sync(FULL_MASK, count, o);
    }
    double w = mean ? 1.0 / (count > 1 ? count : 1.0) : 1.0;
    for (i64 i = a + lane; i < b; i += 32) weight[order ? (i64)order[i] : i] = (A)w;
    if (lane == 0) out[s] = (A)(sum * w);
}
#define SAMPLES(T, S)                                                                                          \
    KERNEL sample_loss_##S(const T* loss, const u32* targets, const i64* offsets, const u32* order, T* out,    \
                           T* weight, i64 samples, i64 each, i64 ignore, i32 mean) {                           \
        sample_loss_body(loss, targets, offsets, order, out, weight, samples, each, ignore, mean);             \
    }
SAMPLES(float, f32)
SAMPLES(double, f64)

// ---------------------------------------------------------------- elementwise terms
template <class T> DEV void bce_body(const T* x, const T* t, T* y, i64 n, const Strided2& s) {
    typedef acc_t<T> A;
    i64 i;
    int count = quad_of(n, i);
    if (!count) return;
    Quad<Strided2, 2> at;
    locate<2>(s, i, count, at);
    T a[4], b[4];
    load4(x, s, at, 0, count, a);
    load4(t, s, at, 1, count, b);
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (k < count) {
            A v = to_acc(a[k]);
            a[k] = from_acc<T>((v < A(0) ? A(0) : v) + log1p_of(exp_of(-abs_of(v))) - v * to_acc(b[k]));
        }
    store4(y, i, count, a);
}
template <class T> DEV void bce_grad_body(const T* x, const T* t, const T* g, T* dx, i64 n, const Strided3& s) {
    typedef acc_t<T> A;
    i64 i;
    int count = quad_of(n, i);
    if (!count) return;
    Quad<Strided3, 3> at;
    locate<3>(s, i, count, at);
    T a[4], b[4], c[4];
    load4(x, s, at, 0, count, a);
    load4(t, s, at, 1, count, b);
    load4(g, s, at, 2, count, c);
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (k < count) {
            A v = to_acc(a[k]);
            a[k] = from_acc<T>((A(1) / (A(1) + exp_of(-v)) - to_acc(b[k])) * to_acc(c[k]));
        }
    store4(dx, i, count, a);
}
template <class T> DEV void xlogx_body(const T* x, T* y, i64 n, const Strided1& s) {
    typedef acc_t<T> A;
    i64 i;
    int count = quad_of(n, i);
    if (!count) return;
    Quad<Strided1, 1> at;
    locate<1>(s, i, count, at);
    T a[4];
    load4(x, s, at, 0, count, a);
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (k < count) {
            A v = to_acc(a[k]);
            a[k] = from_acc<T>(v > A(0) ? v * log_of(v) : A(0));
        }
    store4(y, i, count, a);
}
#define TERMS(T, S)                                                                                            \
    KERNEL bce_##S(const T* x, const T* t, T* y, i64 n, STRIDED(2) sxt) { bce_body(x, t, y, n, sxt); }         \
    KERNEL bce_grad_##S(const T* x, const T* t, const T* g, T* dx, i64 n, STRIDED(3) sxtg) {                   \
        bce_grad_body(x, t, g, dx, n, sxtg);                                                                   \
    }
FOR_FULL(TERMS)
KERNEL xlogx_f64(const double* x, double* y, i64 n, STRIDED(1) sx) { xlogx_body(x, y, n, sx); }
