#include "prelude.cuh"
// Gather and scatter-add by index. Ids are u32, already checked (ids_u32, ids_i64 in move.cu). Block 256; sizes > 0. Widths b1 … b8 as in
// move.cu: any dtype.
//
//   gather_{b1,b2,b4,b8} (const T* x, const u32* ids, T* y, i64 count, i64 k, i64 n, i64 inner)      grid ceil(count / 1024)
//       x [outer, n, inner], ids and y [outer, k, inner], count elements: y[o, j, i] = x[o, ids[o, j, i], i].
//   scatter_add_{f32,f64} (acc_t<T>* out, const u32* ids, const T* src, i64 outer, i64 k, i64 n, i64 inner)
//       out[o, ids[o, j, i], i] += src[o, j, i] in ascending j: grid ceil(outer·inner / 256), one thread per (o, i). Fast if
//       outer·inner is large; for one long column use radix sort and rows_add with p = 1.
//   take_{b1,b2,b4,b8} (const T* src, const u32* ids, T* y, i64 outer, i64 k, i64 n, i64 p)      grid ceil(outer·k·p / 1024)
//       y[o, j, :] = src[o, ids[j], :], rows of p units. Used for lookup, index_select, and repeating rows by segment.
//   rows_add: out[o, ids[t], :] += w[t]·src[o, t, :] without atomics, from ids sorted with their positions (sort.cu: sorted,
//   order). Two launches; sums run in ascending t within pieces of 32 sorted positions, and pieces are added in order:
//   rows_add_{f32,f64} (const T* src, const u32* sorted, const u32* order, const acc_t<T>* w, acc_t<T>* out,
//                                acc_t<T>* part, i64 outer, i64 k, i64 n, i64 p)   grid outer·ceil(k / 32)·ceil(p / 256)
//   rows_add_last_{f32,f64} (const A* part, const u32* sorted, A* out, i64 outer, i64 k, i64 n, i64 p)            same grid
//       part [outer, ceil(k / 32), 2, p] of acc_t<T>. w may be null; a row of weight exactly 0 is skipped, even if it is not finite.
//       A run within one piece is added at once; a run that crosses pieces leaves partial sums, which are added by the piece where
//       it begins. An id that fills half of 64k positions costs 1000 steps, not 32k.

#define GATHER(T, S)                                                                                           \
    KERNEL gather_##S(const T* x, const u32* ids, T* y, i64 count, i64 k, i64 n, i64 inner) {                  \
        i64 i = (i64)blockIdx.x * 1024 + threadIdx.x;                                                          \
        for (int q = 0; q < 4 && i < count; q++, i += 256)                                                     \
            y[i] = x[(i / (k * inner) * n + ids[i]) * inner + i % inner];                                      \
    }
GATHER(u8, b1)
GATHER(u16, b2)
GATHER(u32, b4)
GATHER(u64, b8)

template <class T>
DEV void scatter_add_body(acc_t<T>* out, const u32* ids, const T* src, i64 outer, i64 k, i64 n, i64 inner) {
    i64 c = (i64)blockIdx.x * 256 + threadIdx.x;
    if (c >= outer * inner) return;
    i64 o = c / inner, i = c - o * inner;
    acc_t<T>* to = out + o * n * inner + i;
    i64 at = o * k * inner + i;
    for (i64 j = 0; j < k; j++, at += inner) to[ids[at] * inner] += to_acc(src[at]);
}
#define SCATTER(T, S)                                                                                          \
    KERNEL scatter_add_##S(acc_t<T>* out, const u32* ids, const T* src, i64 outer, i64 k, i64 n, i64 inner) {  \
        scatter_add_body(out, ids, src, outer, k, n, inner);                                                   \
    }
FOR_FULL(SCATTER)

// Neighbouring threads process neighbouring units; the division is 32-bit if the numbers allow it.
template <class T> DEV void take_body(const T* src, const u32* ids, T* y, i64 outer, i64 k, i64 n, i64 p) {
    i64 count = outer * k * p, i = (i64)blockIdx.x * 1024 + threadIdx.x;
    for (int q = 0; q < 4 && i < count; q++, i += 256) {
        i64 row, o;
        if (((u64)i | (u64)p | (u64)k) >> 32 == 0) {
            row = (u32)i / (u32)p;
            o = (u32)row / (u32)k;
        } else {
            row = i / p;
            o = row / k;
        }
        y[i] = src[(o * n + ids[row - o * k]) * p + (i - row * p)];
    }
}
#define TAKE(T, S)                                                                                             \
    KERNEL take_##S(const T* src, const u32* ids, T* y, i64 outer, i64 k, i64 n, i64 p) {                      \
        take_body(src, ids, y, outer, k, n, p);                                                                \
    }
TAKE(u8, b1)
TAKE(u16, b2)
TAKE(u32, b4)
TAKE(u64, b8)

// ---------------------------------------------------------------- sums of rows by id
template <class T>
DEV void rows_add_body(const T* src, const u32* sorted, const u32* order, const acc_t<T>* w, acc_t<T>* out, acc_t<T>* part,
                       i64 outer, i64 k, i64 n, i64 p) {
    typedef acc_t<T> A;
    SHARED(u32, id, [34]); // one more on either side; an id that differs from all stands for a missing neighbour
    SHARED(u32, at, [32]);
    SHARED(A, f, [32]);
    i64 across = cdiv(p, 256), pieces = cdiv(k, 32), b = blockIdx.x / across, o = b / pieces, piece = b - o * pieces;
    i64 c = (blockIdx.x - b * across) * 256 + threadIdx.x, t0 = piece * 32;
    int count = (int)min64(k - t0, 32);
    bool open_left = t0 > 0, open_right = t0 + count < k;
    if (threadIdx.x < count) {
        u32 t = order[t0 + threadIdx.x];
        id[threadIdx.x + 1] = sorted[t0 + threadIdx.x];
        at[threadIdx.x] = t;
        f[threadIdx.x] = w ? w[t] : A(1);
    }
    if (threadIdx.x == 32 && open_left) id[0] = sorted[t0 - 1];
    if (threadIdx.x == 64 && open_right) id[count + 1] = sorted[t0 + count];
    __syncthreads();
    if (c >= p) return;
    src += o * k * p + c;
    A* parts = part + (o * pieces + piece) * 2 * p + c;
    bool from_left = open_left && id[0] == id[1];
    A s = 0;
    for (int i = 0; i < count; i++) {
        if (f[i] != A(0)) s += f[i] * to_acc(src[at[i] * p]);
        bool last = i + 1 == count;
        if (!last && id[i + 2] == id[i + 1]) continue;
        bool goes_on = last && open_right && id[i + 2] == id[i + 1];
        if (from_left) parts[0] = s; // the middle or the end of a longer run
        else if (goes_on) parts[p] = s; // the beginning of one
        else out[(o * n + id[i + 1]) * p + c] += s;
        from_left = false;
        s = 0;
    }
}
template <class A>
DEV void rows_add_last_body(const A* part, const u32* sorted, A* out, i64 outer, i64 k, i64 n, i64 p) {
    i64 across = cdiv(p, 256), pieces = cdiv(k, 32), b = blockIdx.x / across, o = b / pieces, piece = b - o * pieces;
    i64 c = (blockIdx.x - b * across) * 256 + threadIdx.x, end = (piece + 1) * 32;
    if (c >= p || end >= k) return;
    u32 id = sorted[end - 1];
    if (sorted[end] != id) return;                                              // nothing crosses into the next piece
    if (piece > 0 && sorted[piece * 32] == id && sorted[piece * 32 - 1] == id) return; // it began in an earlier piece
    const A* from = part + (o * pieces + piece) * 2 * p + c;
    A s = from[p];
    for (i64 q = piece + 1; q * 32 < k && sorted[q * 32] == id; q++) s += part[(o * pieces + q) * 2 * p + c];
    out[(o * n + id) * p + c] += s;
}
#define ROWS_ADD(T, S)                                                                                         \
    KERNEL rows_add_##S(const T* src, const u32* sorted, const u32* order, const acc_t<T>* w, acc_t<T>* out,   \
                        acc_t<T>* part, i64 outer, i64 k, i64 n, i64 p) {                                      \
        rows_add_body(src, sorted, order, w, out, part, outer, k, n, p);                                       \
    }
FOR_FULL(ROWS_ADD)
#define ROWS_LAST(T, S)                                                                                        \
    KERNEL rows_add_last_##S(const T* part, const u32* sorted, T* out, i64 outer, i64 k, i64 n, i64 p) {       \
        rows_add_last_body(part, sorted, out, outer, k, n, p);                                                 \
    }
ROWS_LAST(float, f32)
ROWS_LAST(double, f64)
