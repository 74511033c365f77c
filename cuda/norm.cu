#include "prelude.cuh"
// Layer and RMS norm of rows of d (group norm: rows are (image, group), without gain and bias). Row rule, block 256.
//
//   norm_{f32,f64,bf16,f16} (const T* x, const acc_t<T>* gain, const acc_t<T>* bias, T* y, acc_t<T>* stats,
//                            i64 rows, i64 d, f64 eps, i32 center)
//       y = (x − mean)·rstd·gain + bias; with center 0 the mean is not subtracted (RMS). gain, bias [d] may be null.
//       stats [rows, 2]: mean and rstd, kept for backward.
//   norm_grad_{f32,f64,bf16,f16} (const T* x, const acc_t<T>* stats, const T* dy, const acc_t<T>* gain, T* dx, acc_t<T>* xhat, acc_t<T>* wide,
//                            i64 rows, i64 d, i32 center)
//       dx = rstd·(h − mean(h) − x̂·mean(h·x̂)) with h = dy·gain; x̂ for the gain's factor (a scaled row sum of dy by x̂; the
//       bias's is the row sum of dy). wide: dy in acc_t<T>. gain, dx, xhat, wide may be null; dx may be dy.
//
// The variance about the mean is computed in a second pass, as on the CPU: by then the row is in the cache (d ≤ 1024 in the first level,
// longer rows in the second), so that memory is read once and written once.

template <class T>
DEV void norm_body(const T* x, const acc_t<T>* gain, const acc_t<T>* bias, T* y, acc_t<T>* stats, i64 rows, i64 d,
                   double eps, int center) {
    typedef acc_t<T> A;
    SHARED(A, red, [8]);
    Team t = row_team(rows, d);
    if (!t.in) return;
    x += t.row * d;
    y += t.row * d;
    A inv = A(1) / (A)d, mean = 0, var = 0;
    if (center) {
        for (i64 i = t.rank * 4; i < d; i += t.size * 4) {
            int count = (int)min64(d - i, 4);
            T v[4];
            load4(x, i, count, v);
#pragma unroll
            for (int k = 0; k < 4; k++)
                if (k < count) mean += to_acc(v[k]);
        }
        mean = team_sum(t, mean, red) * inv;
    }
    for (i64 i = t.rank * 4; i < d; i += t.size * 4) {
        int count = (int)min64(d - i, 4);
        T v[4];
        load4(x, i, count, v);
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (k < count) {
                A c = to_acc(v[k]) - mean;
                var += c * c;
            }
    }
    var = team_sum(t, var, red) * inv;
    A rstd = A(1) / sqrt_of(var + (A)eps);
    for (i64 i = t.rank * 4; i < d; i += t.size * 4) {
        int count = (int)min64(d - i, 4);
        T v[4];
        A g[4], b[4];
        load4(x, i, count, v);
        if (gain) load4(gain, i, count, g);
        if (bias) load4(bias, i, count, b);
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (k < count) {
                A a = (to_acc(v[k]) - mean) * rstd;
                if (gain) a *= g[k];
                if (bias) a += b[k];
                v[k] = from_acc<T>(a);
            }
        store4(y, i, count, v);
    }
    if (t.rank == 0) {
        stats[2 * t.row] = mean;
        stats[2 * t.row + 1] = rstd;
    }
}
template <class T>
DEV void norm_grad_body(const T* x, const acc_t<T>* stats, const T* dy, const acc_t<T>* gain, T* dx, acc_t<T>* xhat, acc_t<T>* wide, i64 rows,
                        i64 d, int center) {
    typedef acc_t<T> A;
    SHARED(A, red, [8]);
    Team t = row_team(rows, d);
    if (!t.in) return;
    x += t.row * d;
    dy += t.row * d;
    A inv = A(1) / (A)d, mean = stats[2 * t.row], rstd = stats[2 * t.row + 1], a = 0, b = 0;
    if (dx) {
        for (i64 i = t.rank * 4; i < d; i += t.size * 4) {
            int count = (int)min64(d - i, 4);
            T v[4], w[4];
            A g[4];
            load4(x, i, count, v);
            load4(dy, i, count, w);
            if (gain) load4(gain, i, count, g);
#pragma unroll
            for (int k = 0; k < 4; k++)
                if (k < count) {
                    A h = to_acc(w[k]) * (gain ? g[k] : A(1));
                    a += h;
                    b += h * (to_acc(v[k]) - mean);
                }
        }
        a = center ? team_sum(t, a, red) * inv : A(0);
        b = team_sum(t, b, red) * inv * rstd;
    }
    for (i64 i = t.rank * 4; i < d; i += t.size * 4) {
        int count = (int)min64(d - i, 4);
        T v[4], w[4];
        A g[4], h[4], u[4];
        load4(x, i, count, v);
        if (dx || wide) load4(dy, i, count, w);
        if (dx && gain) load4(gain, i, count, g);
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (k < count) {
                A c = (to_acc(v[k]) - mean) * rstd;
                if (wide) u[k] = to_acc(w[k]);
                if (dx) w[k] = from_acc<T>(rstd * (to_acc(w[k]) * (gain ? g[k] : A(1)) - a - c * b));
                h[k] = c;
            }
        if (dx) store4(dx + t.row * d, i, count, w);
        if (xhat) store4(xhat + t.row * d, i, count, h);
        if (wide) store4(wide + t.row * d, i, count, u);
    }
}
#define INSTANCES(T, S)                                                                                        \
    KERNEL norm_##S(const T* x, const acc_t<T>* gain, const acc_t<T>* bias, T* y, acc_t<T>* stats, i64 rows,   \
                    i64 d, double eps, i32 center) {                                                           \
        norm_body(x, gain, bias, y, stats, rows, d, eps, center);                                              \
    }                                                                                                          \
    KERNEL norm_grad_##S(const T* x, const acc_t<T>* stats, const T* dy, const acc_t<T>* gain, T* dx, acc_t<T>* xhat, acc_t<T>* wide, \
                         i64 rows, i64 d, i32 center) {                                                        \
        norm_grad_body(x, stats, dy, gain, dx, xhat, wide, rows, d, center);                                         \
    }
FOR_FLOATS(INSTANCES)
