#include "prelude.cuh"
// Combination of experts' rows into tokens. Block 256, no atomics: each output is written by one thread, with its terms in the order of the
// token's choices. place [tokens, k]: the row of each choice; pairs [n]: the pair token·k + choice of each row.
//
//   combine_{f32,f64,bf16,f16}         (const T* y, const A* w, const u32* place, T* out, i64 tokens, i64 k, i64 d)
//       out[t] = Σ over s of w[t, s]·y[place[t, s]]; w null: all 1.                         grid ceil(tokens·d / 1024)
//   combine_rows_{f32,f64,bf16,f16}    (const T* g, const A* w, const u32* pairs, T* dy, i64 n, i64 k, i64 d)
//       dy[row] = w[pair]·g[pair / k].                                                      grid ceil(n·d / 1024)
//   combine_weights_{f32,f64,bf16,f16} (const T* g, const T* y, const u32* place, A* dw, i64 n, i64 k, i64 d)
//       dw[pair] = ⟨g[pair / k], y[place[pair]]⟩, one warp for each of n pairs.             grid ceil(n / 8)
//
// A is f32, or f64 for f64.

template <class T> DEV void combine_body(const T* y, const acc_t<T>* w, const u32* place, T* out, i64 tokens, i64 k, i64 d) {
    i64 i = (i64)blockIdx.x * 1024 + threadIdx.x;
    for (int q = 0; q < 4 && i < tokens * d; q++, i += 256) {
        i64 t = i / d, c = i - t * d;
        acc_t<T> sum = 0;
        for (i64 s = 0; s < k; s++) {
            acc_t<T> v = to_acc(y[place[t * k + s] * d + c]), f = w ? w[t * k + s] : acc_t<T>(1);
            sum = s == 0 ? f * v : sum + f * v;
        }
        out[i] = from_acc<T>(sum);
    }
}
template <class T> DEV void combine_rows_body(const T* g, const acc_t<T>* w, const u32* pairs, T* dy, i64 n, i64 k, i64 d) {
    i64 i = (i64)blockIdx.x * 1024 + threadIdx.x;
    for (int q = 0; q < 4 && i < n * d; q++, i += 256) {
        i64 row = i / d, pair = pairs[row];
        dy[i] = from_acc<T>(w[pair] * to_acc(g[pair / k * d + (i - row * d)]));
    }
}
template <class T> DEV void combine_weights_body(const T* g, const T* y, const u32* place, acc_t<T>* dw, i64 n, i64 k, i64 d) {
    i64 pair = (i64)blockIdx.x * 8 + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (pair >= n) return;
    g += pair / k * d;
    y += place[pair] * d;
    acc_t<T> sum = 0;
    for (i64 c = lane; c < d; c += 32) sum += to_acc(g[c]) * to_acc(y[c]);
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) sum += __shfl_xor_sync(FULL_MASK, sum, o);
    if (lane == 0) dw[pair] = sum;
}
#define COMBINE(T, S)                                                                                          \
    KERNEL combine_##S(const T* y, const acc_t<T>* w, const u32* place, T* out, i64 tokens, i64 k, i64 d) {    \
        combine_body(y, w, place, out, tokens, k, d);                                                          \
    }                                                                                                          \
    KERNEL combine_rows_##S(const T* g, const acc_t<T>* w, const u32* pairs, T* dy, i64 n, i64 k, i64 d) {     \
        combine_rows_body(g, w, pairs, dy, n, k, d);                                                           \
    }                                                                                                          \
    KERNEL combine_weights_##S(const T* g, const T* y, const u32* place, acc_t<T>* dw, i64 n, i64 k, i64 d) {  \
        combine_weights_body(g, y, place, dw, n, k, d);                                                        \
    }
FOR_FLOATS(COMBINE)
