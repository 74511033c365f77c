#include "prelude.cuh"
// Reductions over segments: rows offsets[s] .. offsets[s + 1] (i64) of [N, width], column by column; any length, also 0.
// owner[r] (u32) is the segment of row r. Block 256; S, N, width > 0.
//
// SEGMENT RULE, for the kernels marked "segment rule": width ≥ 32: one thread per (segment, column), grid ceil(S·width / 256), sums in row
// order; width < 32: one warp per (segment, column), grid ceil(S·width / 8), so that long narrow segments (attention weights of a
// hyperedge) are divided among lanes.
//
//   segment_sum_{f32,f64,bf16,f16} (const T* x, const i64* offsets, T* y, i64 segments, i64 width, i32 mean)      segment rule
//       An empty segment gives 0. Also the backward pass of segment_repeat (mean 0).
//   segment_spread_{..} (const T* g, const i64* offsets, const u32* owner, T* dx, i64 rows, i64 width, i32 mean)
//       grid ceil(rows·width / 1024): dx[r] = g[owner[r]], divided by the length with mean. (segment_repeat is take.)
//   segment_max_{..} (const T* x, const i64* offsets, T* y, u32* index, i64 segments, i64 width)                  segment rule
//       First of equal values, NaN counts as largest, empty: 0. index is the row (unused for an empty segment).
//   segment_max_grad_{b2,b4,b8} (const T* g, const u32* index, const u32* owner, T* dx, i64 rows, i64 width)
//       grid ceil(rows·width / 1024): g where the row has the maximum, 0 elsewhere.
//   segment_softmax_{..} (const T* x, const i64* offsets, T* y, i64 segments, i64 width)                          segment rule
//       A column with only −∞ gives zeros.
//   segment_softmax_grad_{..} (const T* y, const T* g, const i64* offsets, T* dx, i64 segments, i64 width)        segment rule

// The threads of one (segment, column): rows begin + rank, + size, …; `size` is 1 or 32.
struct Column {
    i64 segment, col, begin, end;
    int rank, size;
    bool in;
};
DEV Column column_of(const i64* offsets, i64 segments, i64 width) {
    Column c;
    bool thread = width >= 32;
    i64 i = thread ? (i64)blockIdx.x * 256 + threadIdx.x : (i64)blockIdx.x * 8 + threadIdx.x / 32;
    c.rank = thread ? 0 : threadIdx.x % 32;
    c.size = thread ? 1 : 32;
    c.in = i < segments * width;
    if (c.in) {
        c.segment = i / width;
        c.col = i - c.segment * width;
        c.begin = offsets[c.segment];
        c.end = offsets[c.segment + 1];
    }
    return c;
}
template <class V, class F> DEV V column_reduce(const Column& c, V v, F f) {
    if (c.size == 1) return v;
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) v = f(v, __shfl_xor_sync(FULL_MASK, v, o));
    return v;
}
template <class V> DEV V column_sum(const Column& c, V v) {
    return column_reduce(c, v, [](V a, V b) { return a + b; });
}

template <class T> DEV void sum_body(const T* x, const i64* offsets, T* y, i64 segments, i64 width, int mean) {
    typedef acc_t<T> A;
    Column c = column_of(offsets, segments, width);
    if (!c.in) return;
    A s = 0;
#pragma unroll 4
    for (i64 r = c.begin + c.rank; r < c.end; r += c.size) s += to_acc(x[r * width + c.col]);
    s = column_sum(c, s);
    i64 n = c.end - c.begin;
    if (mean && n > 1) s *= A(1) / (A)n;
    if (c.rank == 0) y[c.segment * width + c.col] = from_acc<T>(s);
}
template <class T>
DEV void spread_body(const T* g, const i64* offsets, const u32* owner, T* dx, i64 rows, i64 width, int mean) {
    typedef acc_t<T> A;
    i64 i = (i64)blockIdx.x * 1024 + threadIdx.x;
    for (int q = 0; q < 4 && i < rows * width; q++, i += 256) {
        i64 r = i / width, s = owner[r];
        A f = mean ? A(1) / (A)(offsets[s + 1] - offsets[s]) : A(1);
        dx[i] = from_acc<T>(f * to_acc(g[s * width + (i - r * width)]));
    }
}
template <class T>
DEV void max_body(const T* x, const i64* offsets, T* y, u32* index, i64 segments, i64 width) {
    typedef acc_t<T> A;
    Column c = column_of(offsets, segments, width);
    if (!c.in) return;
    A best = 0;
    i64 at = -1;
    for (i64 r = c.begin + c.rank; r < c.end; r += c.size) {
        A v = to_acc(x[r * width + c.col]);
        if (at < 0 || v > best || (is_nan(v) && !is_nan(best))) {
            best = v;
            at = r;
        }
    }
    if (c.size == 32)
#pragma unroll
        for (int o = 16; o > 0; o >>= 1) {
            A v = __shfl_xor_sync(FULL_MASK, best, o);
            i64 w = __shfl_xor_sync(FULL_MASK, at, o);
            if (w < 0) continue;
            bool better = v > best || (is_nan(v) && !is_nan(best)), worse = best > v || (is_nan(best) && !is_nan(v));
            if (at < 0 || better || (!worse && w < at)) {
                best = v;
                at = w;
            }
        }
    if (c.rank == 0) {
        y[c.segment * width + c.col] = from_acc<T>(best);
        index[c.segment * width + c.col] = at < 0 ? 0u : (u32)at;
    }
}
template <class T> DEV void softmax_body(const T* x, const i64* offsets, T* y, i64 segments, i64 width) {
    typedef acc_t<T> A;
    Column c = column_of(offsets, segments, width);
    if (!c.in) return;
    A top = -inf_of(A(0)), s = 0;
    for (i64 r = c.begin + c.rank; r < c.end; r += c.size) {
        A v = to_acc(x[r * width + c.col]);
        top = is_nan(top) || top > v ? top : v;
    }
    top = column_reduce(c, top, [](A a, A b) { return is_nan(a) || a > b ? a : b; });
    if (top == -inf_of(A(0))) top = 0; // any finite maximum makes the terms of −∞ zero
    for (i64 r = c.begin + c.rank; r < c.end; r += c.size) s += exp_of(to_acc(x[r * width + c.col]) - top);
    s = column_sum(c, s);
    A inv = s == A(0) ? A(0) : A(1) / s;
    for (i64 r = c.begin + c.rank; r < c.end; r += c.size) {
        i64 i = r * width + c.col;
        y[i] = from_acc<T>(exp_of(to_acc(x[i]) - top) * inv);
    }
}
template <class T>
DEV void softmax_grad_body(const T* y, const T* g, const i64* offsets, T* dx, i64 segments, i64 width) {
    typedef acc_t<T> A;
    Column c = column_of(offsets, segments, width);
    if (!c.in) return;
    A dot = 0;
    for (i64 r = c.begin + c.rank; r < c.end; r += c.size) {
        i64 i = r * width + c.col;
        dot += to_acc(y[i]) * to_acc(g[i]);
    }
    dot = column_sum(c, dot);
    for (i64 r = c.begin + c.rank; r < c.end; r += c.size) {
        i64 i = r * width + c.col;
        dx[i] = from_acc<T>(to_acc(y[i]) * (to_acc(g[i]) - dot));
    }
}
#define SEGMENTS(T, S)                                                                                         \
    KERNEL segment_sum_##S(const T* x, const i64* offsets, T* y, i64 segments, i64 width, i32 mean) {          \
        sum_body(x, offsets, y, segments, width, mean);                                                        \
    }                                                                                                          \
    KERNEL segment_spread_##S(const T* g, const i64* offsets, const u32* owner, T* dx, i64 rows, i64 width,    \
                              i32 mean) {                                                                      \
        spread_body(g, offsets, owner, dx, rows, width, mean);                                                 \
    }                                                                                                          \
    KERNEL segment_max_##S(const T* x, const i64* offsets, T* y, u32* index, i64 segments, i64 width) {        \
        max_body(x, offsets, y, index, segments, width);                                                       \
    }                                                                                                          \
    KERNEL segment_softmax_##S(const T* x, const i64* offsets, T* y, i64 segments, i64 width) {                \
        softmax_body(x, offsets, y, segments, width);                                                          \
    }                                                                                                          \
    KERNEL segment_softmax_grad_##S(const T* y, const T* g, const i64* offsets, T* dx, i64 segments,           \
                                    i64 width) {                                                               \
        softmax_grad_body(y, g, offsets, dx, segments, width);                                                 \
    }
FOR_FLOATS(SEGMENTS)

#define MAX_GRAD(T, S)                                                                                         \
    KERNEL segment_max_grad_##S(const T* g, const u32* index, const u32* owner, T* dx, i64 rows, i64 width) {  \
        i64 i = (i64)blockIdx.x * 1024 + threadIdx.x;                                                          \
        for (int q = 0; q < 4 && i < rows * width; q++, i += 256) {                                            \
            i64 r = i / width, at = (i64)owner[r] * width + (i - r * width);                                   \
            dx[i] = index[at] == (u32)r ? g[at] : (T)0;                                                        \
        }                                                                                                      \
    }
MAX_GRAD(u16, b2)
MAX_GRAD(u32, b4)
MAX_GRAD(u64, b8)
