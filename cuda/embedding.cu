#include "prelude.cuh"
// Embedding: masks for padding, and bags of ids. The lookup is take (index.cu); the table's gradient is rows_add over sorted ids (sort.cu,
// index.cu). Block 256; sizes > 0. Bag s is ids offsets[s] .. offsets[s + 1] (i64); owner[t] is the bag of id t.
//
//   zero_rows_{b4,b8} (const T* g, const u32* ids, T* y, i64 rows, i64 p, u32 padding)   grid ceil(rows·p / 1024)
//       y = g, except for the rows whose id is `padding`, which become 0. y may be g.
//   embedding_bag_{f32,f64,bf16,f16} (const T* w, const u32* ids, const i64* offsets, const acc_t<T>* scale, T* y,
//                                     i64 bags, i64 p, i32 mean)                            grid ceil(bags·p / 256)
//       y[s] = Σ f·scale[t]·w[ids[t]] in ascending t, f = 1/length with mean, otherwise 1. scale may be null. Empty bags give 0.
//   bag_rows_{f32,f64} (const T* g, const u32* owner, const i64* offsets, const acc_t<T>* scale, T* rows, i64 n,
//                                i64 p, i32 mean)                                           grid ceil(n·p / 1024)
//       rows[t] = f·scale[t]·g[owner[t]]: the lookup factor of the table's gradient.
//   bag_dots_{f32,f64} (const T* g, const T* w, const u32* ids, const u32* owner, const i64* offsets, acc_t<T>* d,
//                                i64 n, i64 p, i32 mean)                                    row rule with rows n, d p
//       d[t] = f·⟨g[owner[t]], w[ids[t]]⟩: the gradient of scale.

#define ZERO_ROWS(T, S)                                                                                        \
    KERNEL zero_rows_##S(const T* g, const u32* ids, T* y, i64 rows, i64 p, u32 padding) {                     \
        i64 i = (i64)blockIdx.x * 1024 + threadIdx.x;                                                          \
        for (int q = 0; q < 4 && i < rows * p; q++, i += 256) y[i] = ids[i / p] == padding ? (T)0 : g[i];      \
    }
ZERO_ROWS(u32, b4)
ZERO_ROWS(u64, b8)

template <class A> DEV A bag_factor(const i64* offsets, i64 bag, int mean) {
    i64 n = offsets[bag + 1] - offsets[bag];
    return mean && n > 0 ? A(1) / (A)n : A(1);
}
// One thread per element of the result: neighbouring threads read neighbouring columns of one row.
template <class T>
DEV void bag_body(const T* w, const u32* ids, const i64* offsets, const acc_t<T>* scale, T* y, i64 bags, i64 p, int mean) {
    typedef acc_t<T> A;
    i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
    if (i >= bags * p) return;
    i64 bag = i / p, c = i - bag * p, end = offsets[bag + 1];
    A f = bag_factor<A>(offsets, bag, mean), s = 0;
    for (i64 t = offsets[bag]; t < end; t++) s += (scale ? f * scale[t] : f) * to_acc(w[(i64)ids[t] * p + c]);
    y[i] = from_acc<T>(s);
}
template <class T>
DEV void bag_rows_body(const T* g, const u32* owner, const i64* offsets, const acc_t<T>* scale, T* rows, i64 n, i64 p,
                       int mean) {
    typedef acc_t<T> A;
    i64 i = (i64)blockIdx.x * 1024 + threadIdx.x;
    for (int q = 0; q < 4 && i < n * p; q++, i += 256) {
        i64 t = i / p, bag = owner[t];
        A f = bag_factor<A>(offsets, bag, mean) * (scale ? scale[t] : A(1));
        rows[i] = from_acc<T>(f * to_acc(g[bag * p + (i - t * p)]));
    }
}
template <class T>
DEV void bag_dots_body(const T* g, const T* w, const u32* ids, const u32* owner, const i64* offsets, acc_t<T>* d, i64 n,
                       i64 p, int mean) {
    typedef acc_t<T> A;
    SHARED(A, red, [8]);
    Team t = row_team(n, p);
    if (!t.in) return;
    i64 bag = owner[t.row];
    g += bag * p;
    w += (i64)ids[t.row] * p;
    A s = 0;
    for (i64 c = t.rank; c < p; c += t.size) s += to_acc(g[c]) * to_acc(w[c]);
    s = team_sum(t, s, red);
    if (t.rank == 0) d[t.row] = s * bag_factor<A>(offsets, bag, mean);
}
#define BAGS(T, S)                                                                                             \
    KERNEL embedding_bag_##S(const T* w, const u32* ids, const i64* offsets, const acc_t<T>* scale, T* y,      \
                             i64 bags, i64 p, i32 mean) {                                                      \
        bag_body(w, ids, offsets, scale, y, bags, p, mean);                                                    \
    }
FOR_FLOATS(BAGS)
#define BAG_GRADIENTS(T, S)                                                                                     \
    KERNEL bag_rows_##S(const T* g, const u32* owner, const i64* offsets, const acc_t<T>* scale, T* rows,      \
                        i64 n, i64 p, i32 mean) {                                                              \
        bag_rows_body(g, owner, offsets, scale, rows, n, p, mean);                                             \
    }                                                                                                          \
    KERNEL bag_dots_##S(const T* g, const T* w, const u32* ids, const u32* owner, const i64* offsets,          \
                        acc_t<T>* d, i64 n, i64 p, i32 mean) {                                                 \
        bag_dots_body(g, w, ids, owner, offsets, d, n, p, mean);                                               \
    }
FOR_FULL(BAG_GRADIENTS)
