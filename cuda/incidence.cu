#include "prelude.cuh"
// Sums over the members of sets, and the gradient of their weights. Block 256, no atomics: each output is written by one thread or warp,
// with its terms in the order of the incidences. offsets [targets + 1]: start of the incidences of each target; members [n]: the source of
// each incidence; owner [n]: the target of each; places [n]: the position of its weights, or null if that is the incidence itself. heads
// divides d.
//
//   incidence_sum_{f32,f64,bf16,f16} (const T* x, const A* w, const i64* offsets, const u32* members, const u32* places, T* out,
//                                     i64 targets, i64 d, i64 heads)
//       out[t, c] = Σ over t's incidences i of w[places[i], c / (d / heads)]·x[members[i], c]; w null: all 1.
//                                                                                           grid ceil(targets·d / 1024)
//   incidence_dot_{f32,f64,bf16,f16} (const T* g, const T* x, const u32* owner, const u32* members, A* dw, i64 n, i64 d, i64 heads)
//       dw[i, h] = ⟨g[owner[i]], x[members[i]]⟩ over the columns of head h, one warp for each of n = incidences·heads.
//                                                                                           grid ceil(n / 8)
//
// A is f32, or f64 for f64.

template <class T>
DEV void incidence_sum_body(const T* x, const acc_t<T>* w, const i64* offsets, const u32* members, const u32* places, T* out,
                            i64 targets, i64 d, i64 heads) {
    i64 i = (i64)blockIdx.x * 1024 + threadIdx.x, width = d / heads;
    for (int q = 0; q < 4 && i < targets * d; q++, i += 256) {
        i64 t = i / d, c = i - t * d, h = c / width;
        acc_t<T> sum = 0;
        for (i64 k = offsets[t]; k < offsets[t + 1]; k++) {
            acc_t<T> v = to_acc(x[members[k] * d + c]);
            sum += w ? w[(places ? (i64)places[k] : k) * heads + h] * v : v;
        }
        out[i] = from_acc<T>(sum);
    }
}
template <class T>
DEV void incidence_dot_body(const T* g, const T* x, const u32* owner, const u32* members, acc_t<T>* dw, i64 n, i64 d, i64 heads) {
    i64 pair = (i64)blockIdx.x * 8 + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (pair >= n) return;
    i64 i = pair / heads, h = pair - i * heads, width = d / heads;
    g += owner[i] * d + h * width;
    x += members[i] * d + h * width;
    acc_t<T> sum = 0;
    for (i64 c = lane; c < width; c += 32) sum += to_acc(g[c]) * to_acc(x[c]);
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) sum += __shfl_xor_sync(FULL_MASK, sum, o);
    if (lane == 0) dw[pair] = sum;
}
#define INCIDENCE(T, S)                                                                                        \
    KERNEL incidence_sum_##S(const T* x, const acc_t<T>* w, const i64* offsets, const u32* members,            \
                             const u32* places, T* out, i64 targets, i64 d, i64 heads) {                       \
        incidence_sum_body(x, w, offsets, members, places, out, targets, d, heads);                            \
    }                                                                                                          \
    KERNEL incidence_dot_##S(const T* g, const T* x, const u32* owner, const u32* members, acc_t<T>* dw,       \
                             i64 n, i64 d, i64 heads) {                                                        \
        incidence_dot_body(g, x, owner, members, dw, n, d, heads);                                             \
    }
FOR_FLOATS(INCIDENCE)
