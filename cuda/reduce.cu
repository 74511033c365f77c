#include "prelude.cuh"
// Reductions over one axis of a contiguous [outer, n, inner] (inner 1: by rows; several axes: move them together first, or
// reduce one after another), and scans (sorts are in sort.cu). Block 256 throughout; sizes n > 0; sums in acc_t<T> in a fixed order.
//
// SUMS. scale multiplies the result (1/n for a mean).
//   sum_rows_{f32,f64,bf16,f16} (const T* x, T* y, i64 rows, i64 cols, f64 scale)            grid by the row rule (prelude.cuh)
//   sum_cols_{..}      (const T* x, T* y, i64 outer, i64 n, i64 inner, f64 scale)            grid outer·ceil(inner / 32)
//   sum_rows_part_{..} (const T* x, acc_t<T>* part, i64 rows, i64 cols, i64 chunk)           grid rows·ceil(cols / chunk)
//       part [rows, ceil(cols / chunk)]: the first level for long rows (a full sum is one row; chunk 16384, a multiple of 4).
//   sum_cols_part_{..} (const T* x, acc_t<T>* part, i64 outer, i64 n, i64 inner, i64 chunk)  grid outer·ceil(n / chunk)·ceil(inner / 32)
//       part [outer, ceil(n / chunk), inner]: the first level for tall columns (chunk 256).
//   sum_rows_last_{f32,f64,bf16,f16}, sum_cols_last_{..}: as sum_rows, sum_cols, from acc_t<T>* to T*: the second level.
// EXTREMES. mode 0: maximum, NaN counts as largest; 1: minimum, NaN counts as smallest; 2: maximum, a NaN only at position 0
//   (argmax). The first of equal values.
//   max_rows_{..} (const T* x, T* y, u32* index, i64 rows, i64 cols, i32 mode)               row rule; y or index may be null
//   unpick_{b2,b4,b8} (const T* g, const u32* index, T* dx, i64 count, i64 k, i64 n, i64 inner)  grid ceil(count / 1024)
//       dx[o, index[o, j, i], i] = g[o, j, i], for count = outer·k·inner selected elements, into zeros: backward of max, sort, topk.
// LOGSUMEXP
//   logsumexp_rows_{..} (const T* x, T* y, i64 rows, i64 cols)                               row rule
//   logsumexp_grad_{..} (const T* x, const T* y, const T* g, T* dx, i64 n, Strided3 sxyg)    grid ceil(n / 1024); exp(x − y)·g
// SCANS
//   cumsum_rows_{..} (const T* x, T* y, i64 rows, i64 cols, i32 reverse)                     row rule
//   cumsum_cols_{..} (const T* x, T* y, i64 outer, i64 n, i64 inner, i32 reverse)            grid ceil(outer·inner / 256)

// ---------------------------------------------------------------- sums
template <class S, class D> DEV void sum_rows_body(const S* x, D* y, i64 rows, i64 cols, double scale) {
    typedef acc_t<S> A;
    SHARED(A, red, [8]);
    Team t = row_team(rows, cols);
    if (!t.in) return;
    x += t.row * cols;
    A s = 0;
    if (aligned4(x)) {
        i64 full = cols / 4 * 4;
        for (i64 i = t.rank * 4; i < full; i += t.size * 4) {
            Pack4<S> v = ld_vec<Pack4<S>>(x + i);
            s += (to_acc(v.v[0]) + to_acc(v.v[1])) + (to_acc(v.v[2]) + to_acc(v.v[3]));
        }
        if (full + t.rank < cols) s += to_acc(x[full + t.rank]);
    } else {
        // The same assignment of elements to threads as above, so that alignment does not change the bits.
        i64 full = cols / 4 * 4;
        for (i64 i = t.rank * 4; i < full; i += t.size * 4)
            s += (to_acc(x[i]) + to_acc(x[i + 1])) + (to_acc(x[i + 2]) + to_acc(x[i + 3]));
        if (full + t.rank < cols) s += to_acc(x[full + t.rank]);
    }
    s = team_sum(t, s, red);
    if (t.rank == 0) y[t.row] = from_acc<D>(s * (A)scale);
}
template <class T> DEV void sum_part_body(const T* x, acc_t<T>* part, i64 rows, i64 cols, i64 chunk) {
    typedef acc_t<T> A;
    SHARED(A, red, [8]);
    i64 pieces = cdiv(cols, chunk), row = blockIdx.x / pieces, c0 = (blockIdx.x - row * pieces) * chunk;
    i64 c1 = min64(c0 + chunk, cols);
    x += row * cols;
    A s0 = 0, s1 = 0;
    i64 i = c0 + threadIdx.x;
    for (; i + 256 < c1; i += 512) {
        s0 += to_acc(x[i]);
        s1 += to_acc(x[i + 256]);
    }
    if (i < c1) s0 += to_acc(x[i]);
    Team t = {0, (int)threadIdx.x, 256, true};
    A s = team_sum(t, s0 + s1, red);
    if (threadIdx.x == 0) part[blockIdx.x] = s;
}
// 32 columns × 8 lanes: lane l sums every eighth of the rows r0 .. r1, then the lanes are added in order.
template <class S, class D>
DEV void sum_cols_body(const S* x, D* y, i64 n, i64 inner, i64 o, i64 tile, i64 r0, i64 r1, i64 out, double scale) {
    typedef acc_t<S> A;
    SHARED(A, lanes, [8][33]);
    i64 c = tile * 32 + threadIdx.x % 32;
    int lane = threadIdx.x / 32;
    A s = 0;
    if (c < inner) {
        const S* p = x + o * n * inner + c;
#pragma unroll 4
        for (i64 r = r0 + lane; r < r1; r += 8) s += to_acc(p[r * inner]);
    }
    lanes[lane][threadIdx.x % 32] = s;
    __syncthreads();
    if (lane == 0 && c < inner) {
#pragma unroll
        for (int l = 1; l < 8; l++) s += lanes[l][threadIdx.x];
        y[out * inner + c] = from_acc<D>(s * (A)scale);
    }
}
#define SUMS_FROM(NAME, S_, D_)                                                                                \
    KERNEL sum_rows##NAME(const S_* x, D_* y, i64 rows, i64 cols, double scale) {                              \
        sum_rows_body(x, y, rows, cols, scale);                                                                \
    }                                                                                                          \
    KERNEL sum_cols##NAME(const S_* x, D_* y, i64 outer, i64 n, i64 inner, double scale) {                     \
        i64 tiles = cdiv(inner, 32), o = blockIdx.x / tiles;                                                   \
        sum_cols_body(x, y, n, inner, o, blockIdx.x - o * tiles, 0, n, o, scale);                              \
    }
#define SUMS(T, S)                                                                                             \
    SUMS_FROM(_##S, T, T)                                                                                      \
    SUMS_FROM(_last_##S, acc_t<T>, T)                                                                          \
    KERNEL sum_rows_part_##S(const T* x, acc_t<T>* part, i64 rows, i64 cols, i64 chunk) {                      \
        sum_part_body(x, part, rows, cols, chunk);                                                             \
    }                                                                                                          \
    KERNEL sum_cols_part_##S(const T* x, acc_t<T>* part, i64 outer, i64 n, i64 inner, i64 chunk) {             \
        i64 tiles = cdiv(inner, 32), pieces = cdiv(n, chunk), op = blockIdx.x / tiles, o = op / pieces;        \
        i64 r0 = (op - o * pieces) * chunk;                                                                    \
        sum_cols_body(x, part, n, inner, o, blockIdx.x - op * tiles, r0, min64(r0 + chunk, n), op, 1.0);       \
    }
FOR_FLOATS(SUMS)

// ---------------------------------------------------------------- extremes
// Maximum and minimum: NaN counts as the extreme. Argmax: a NaN is chosen only if it comes first.
enum { EXTREME_LARGEST, EXTREME_SMALLEST, EXTREME_ARGMAX };
// A value and its position; -1 means none yet.
template <class A> struct Best {
    A v;
    i32 at;
};
// Whether (v, at) is ordered before b: by value, then by position. With EXTREME_ARGMAX a NaN is ordered after everything except a later
// NaN.
template <class A> DEV bool before(int mode, A v, i32 at, const Best<A>& b) {
    if (at < 0) return false;
    if (b.at < 0) return true;
    bool nv = is_nan(v), nb = is_nan(b.v);
    if (nv || nb) return nv != nb ? (mode == EXTREME_ARGMAX ? nb : nv) : at < b.at;
    bool least = mode == EXTREME_SMALLEST, better = least ? v < b.v : v > b.v, worse = least ? b.v < v : b.v > v;
    return better || (!worse && at < b.at);
}
template <class T> DEV void max_rows_body(const T* x, T* y, u32* index, i64 rows, i64 cols, int mode) {
    typedef acc_t<T> A;
    SHARED(A, values, [8]);
    SHARED(i32, places, [8]);
    Team t = row_team(rows, cols);
    if (!t.in) return;
    x += t.row * cols;
    Best<A> b = {A(0), -1};
    for (i64 i = t.rank; i < cols; i += t.size) {
        A v = to_acc(x[i]);
        if (before(mode, v, (i32)i, b)) b = {v, (i32)i};
    }
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        A v = __shfl_xor_sync(FULL_MASK, b.v, o);
        i32 at = __shfl_xor_sync(FULL_MASK, b.at, o);
        if (before(mode, v, at, b)) b = {v, at};
    }
    if (t.size == 256) {
        if (threadIdx.x % 32 == 0) {
            values[threadIdx.x / 32] = b.v;
            places[threadIdx.x / 32] = b.at;
        }
        __syncthreads();
        for (int w = 0; w < 8; w++)
            if (before(mode, values[w], places[w], b)) b = {values[w], places[w]};
    }
    if (t.rank == 0) {
        if (mode == EXTREME_ARGMAX && is_nan(to_acc(x[0]))) b.at = 0;
        if (y) y[t.row] = x[b.at];
        if (index) index[t.row] = (u32)b.at;
    }
}
#define EXTREMES(T, S)                                                                                         \
    KERNEL max_rows_##S(const T* x, T* y, u32* index, i64 rows, i64 cols, i32 mode) {                          \
        max_rows_body(x, y, index, rows, cols, mode);                                                          \
    }
FOR_FLOATS(EXTREMES)

#define UNPICK(T, S)                                                                                           \
    KERNEL unpick_##S(const T* g, const u32* index, T* dx, i64 count, i64 k, i64 n, i64 inner) {               \
        i64 p = (i64)blockIdx.x * 1024 + threadIdx.x;                                                          \
        for (int q = 0; q < 4 && p < count; q++, p += 256)                                                     \
            dx[(p / (k * inner) * n + index[p]) * inner + p % inner] = g[p];                                   \
    }
UNPICK(u16, b2)
UNPICK(u32, b4)
UNPICK(u64, b8)

// ---------------------------------------------------------------- logsumexp
// Maximum in which NaN counts as largest, so that the row's result is NaN; an infinite maximum is the result itself.
template <class A> DEV A larger(A a, A b) { return is_nan(a) || a > b ? a : b; }
template <class A> DEV A finish_lse(A m, A s) { return m - m == A(0) ? m + log_of(s) : m; }
template <class T> DEV void lse_rows_body(const T* x, T* y, i64 rows, i64 cols) {
    typedef acc_t<T> A;
    SHARED(A, red, [8]);
    Team t = row_team(rows, cols);
    if (!t.in) return;
    x += t.row * cols;
    A m = -inf_of(A(0)), s = 0;
    for (i64 i = t.rank; i < cols; i += t.size) m = larger(to_acc(x[i]), m);
    m = team_reduce(t, m, red, [](A a, A b) { return larger(a, b); });
    for (i64 i = t.rank; i < cols; i += t.size) s += exp_of(to_acc(x[i]) - m);
    s = team_sum(t, s, red);
    if (t.rank == 0) y[t.row] = from_acc<T>(finish_lse(m, s));
}
template <class T> DEV void lse_grad_body(const T* x, const T* y, const T* g, T* dx, i64 n, const Strided3& s) {
    i64 i;
    int count = quad_of(n, i);
    if (!count) return;
    Quad<Strided3, 3> at;
    locate<3>(s, i, count, at);
    T a[4], b[4], c[4];
    load4(x, s, at, 0, count, a);
    load4(y, s, at, 1, count, b);
    load4(g, s, at, 2, count, c);
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (k < count) a[k] = from_acc<T>(exp_of(to_acc(a[k]) - to_acc(b[k])) * to_acc(c[k]));
    store4(dx, i, count, a);
}
#define LSE(T, S)                                                                                              \
    KERNEL logsumexp_rows_##S(const T* x, T* y, i64 rows, i64 cols) { lse_rows_body(x, y, rows, cols); }       \
    KERNEL logsumexp_grad_##S(const T* x, const T* y, const T* g, T* dx, i64 n, STRIDED(3) sxyg) {             \
        lse_grad_body(x, y, g, dx, n, sxyg);                                                                   \
    }
FOR_FLOATS(LSE)

// ---------------------------------------------------------------- cumulative sums
template <class T> DEV void cumsum_rows_body(const T* x, T* y, i64 rows, i64 cols, int reverse) {
    typedef acc_t<T> A;
    SHARED(A, sums, [8]);
    Team t = row_team(rows, cols);
    if (!t.in) return;
    x += t.row * cols;
    y += t.row * cols;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    A carry = 0;
    // Every thread of the team runs the same number of iterations: the loop contains shuffles and barriers.
    for (i64 i0 = 0; i0 < cols; i0 += t.size) {
        i64 i = i0 + t.rank, at = reverse ? cols - 1 - i : i;
        A s = i < cols ? to_acc(x[at]) : A(0);
#pragma unroll
        for (int o = 1; o < 32; o <<= 1) {
            A up = __shfl_up_sync(FULL_MASK, s, o);
            if (lane >= o) s += up;
        }
        if (t.size == 32) {
            s += carry;
            carry = __shfl_sync(FULL_MASK, s, 31);
        } else {
            __syncthreads();
            if (lane == 31) sums[warp] = s;
            __syncthreads();
            A below = carry;
            for (int w = 0; w < 8; w++) {
                if (w == warp) s += below;
                below += sums[w];
            }
            carry = below;
        }
        if (i < cols) y[at] = from_acc<T>(s);
    }
}
template <class T> DEV void cumsum_cols_body(const T* x, T* y, i64 outer, i64 n, i64 inner, int reverse) {
    i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
    if (i >= outer * inner) return;
    i64 at = i / inner * n * inner + i % inner, step = inner;
    if (reverse) {
        at += (n - 1) * inner;
        step = -inner;
    }
    acc_t<T> s = 0;
    for (i64 r = 0; r < n; r++, at += step) {
        s += to_acc(x[at]);
        y[at] = from_acc<T>(s);
    }
}
#define CUMSUM(T, S)                                                                                           \
    KERNEL cumsum_rows_##S(const T* x, T* y, i64 rows, i64 cols, i32 reverse) {                                \
        cumsum_rows_body(x, y, rows, cols, reverse);                                                           \
    }                                                                                                          \
    KERNEL cumsum_cols_##S(const T* x, T* y, i64 outer, i64 n, i64 inner, i32 reverse) {                       \
        cumsum_cols_body(x, y, outer, n, inner, reverse);                                                      \
    }
FOR_FLOATS(CUMSUM)
