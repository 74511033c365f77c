#include "prelude.cuh"
// Routing of tokens to experts. Block 256; every kernel may be launched with more blocks than it needs.
//
//   route_{f32,f64}      (const T* logits, const T* bias, u32* choices, T* weights, RouteShape)       grid ceil(tokens / 8)
//       The k largest of each token's logits (with a bias [experts]: of score + bias) in descending order, among equal ones the
//       lower expert first; their scores, divided by their sum if `renormalise`. A NaN is chosen last and makes all weights NaN.
//   route_grad_{f32,f64} (const T* logits, const u32* choices, const T* g, T* dx, RouteShape)         grid ceil(tokens / 8)
//   route_places (const u32* order, u32* token, u32* place, i64 n, i64 k)                             grid ceil(n / 256)
//       order: the pair token·k + choice of each row. token[row] = pair / k, place[pair] = row.
//   route_owners (const u32* token, const u32* old_owner, const i64* old_offsets, u32* owner, i64* offsets, i64 n, i64 count,
//                 i64 each, i64 k)                                                       grid ceil(max(n, count + 1) / 256)
//       The sample of each row, and the start of each sample among rows sorted by sample; old_* are those of tokens, null if uniform.
//   route_load   (const u32* choices, const i64* offsets, const u32* order, float* load, i64 count, i64 experts, i64 each, i64 k)
//       load[b, e] = number of choices of sample b that are e; offsets and order of tokens as above, or null.
//                                                                                        grid count = samples·experts
//   route_within (const u32* choices, const u32* place, const i64* offsets, float* kept, i64 n, i64 capacity)  grid ceil(n / 256)
//
// One warp for each token: 2 + k reads of its logits, from the caches except for the first.

struct RouteShape {
    i64 tokens, experts, k;
    i32 sigmoid, renormalise;
};

template <class A> DEV A warp_all(A v) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(FULL_MASK, v, o);
    return v;
}
// The quantities that all scores of one token share: the largest logit, and Σ exp(x − largest) or the sum of the scores.
template <class A> struct Gates {
    A largest, total;
    int sigmoid;
};
template <class A> DEV A raw(const Gates<A>& g, A x) { return g.sigmoid ? A(1) / (A(1) + exp_of(-x)) : exp_of(x - g.largest); }
template <class A> DEV A score(const Gates<A>& g, A x) { return g.sigmoid ? raw(g, x) : raw(g, x) / g.total; }
template <class A> DEV Gates<A> gates_of(const A* x, const RouteShape& s, int lane) {
    Gates<A> g = {-inf_of(A(0)), A(0), s.sigmoid};
    for (i64 e = lane; e < s.experts; e += 32)
        if (x[e] > g.largest) g.largest = x[e];
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        A v = __shfl_xor_sync(FULL_MASK, g.largest, o);
        if (v > g.largest) g.largest = v;
    }
    A sum = 0;
    for (i64 e = lane; e < s.experts; e += 32) sum += raw(g, x[e]);
    g.total = warp_all(sum);
    return g;
}
// Whether (a, i) is ordered before (b, j): larger first, NaN last, among equal ones the lower number first.
template <class A> DEV bool before(A a, i64 i, A b, i64 j) {
    bool na = is_nan(a), nb = is_nan(b);
    if (na != nb) return nb;
    if (!na && a != b) return a > b;
    return i < j;
}
template <class A> DEV void route_body(const A* logits, const A* bias, u32* choices, A* weights, const RouteShape& s) {
    i64 t = (i64)blockIdx.x * 8 + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (t >= s.tokens) return;
    const A* x = logits + t * s.experts;
    Gates<A> g = gates_of(x, s, lane);
    A last = 0, sum = 0;
    i64 chosen = -1;
    for (i64 c = 0; c < s.k; c++) {
        A best = 0;
        i64 at = s.experts;
        for (i64 e = lane; e < s.experts; e += 32) {
            A key = bias ? score(g, x[e]) + bias[e] : x[e];
            // Only elements ordered after the last chosen one.
            if (chosen >= 0 && !before(last, chosen, key, e)) continue;
            if (at == s.experts || before(key, e, best, at)) {
                best = key;
                at = e;
            }
        }
#pragma unroll
        for (int o = 16; o > 0; o >>= 1) {
            A v = __shfl_xor_sync(FULL_MASK, best, o);
            i64 j = __shfl_xor_sync(FULL_MASK, at, o);
            if (j < s.experts && (at == s.experts || before(v, j, best, at))) {
                best = v;
                at = j;
            }
        }
        last = best;
        chosen = at;
        A w = score(g, x[at]);
        sum += w;
        if (lane == 0) {
            choices[t * s.k + c] = (u32)at;
            weights[t * s.k + c] = w;
        }
    }
    A scale = s.renormalise ? A(1) / sum : A(1);
    bool spoiled = is_nan(g.total);
    if (lane == 0)
        for (i64 c = 0; c < s.k; c++) weights[t * s.k + c] = spoiled ? g.total : weights[t * s.k + c] * scale;
}
template <class A> DEV void route_grad_body(const A* logits, const u32* choices, const A* g, A* dx, const RouteShape& s) {
    i64 t = (i64)blockIdx.x * 8 + threadIdx.x / 32;
    int lane = threadIdx.x % 32;
    if (t >= s.tokens) return;
    const A* x = logits + t * s.experts;
    choices += t * s.k;
    g += t * s.k;
    dx += t * s.experts;
    Gates<A> gate = gates_of(x, s, lane);
    A sum = 0, inner = 0;
    for (i64 c = 0; c < s.k; c++) {
        A w = score(gate, x[choices[c]]);
        sum += w;
        inner += w * g[c];
    }
    bool all = !s.sigmoid && !s.renormalise;
    for (i64 e = lane; e < s.experts; e += 32) {
        A w = score(gate, x[e]), d = all ? -w * inner : A(0);
        for (i64 c = 0; c < s.k; c++) {
            if (choices[c] != (u32)e) continue;
            A slope = s.sigmoid ? w * (A(1) - w) : w;
            d += s.renormalise ? slope / sum * (g[c] - inner / sum) : slope * g[c];
        }
        dx[e] = is_nan(gate.total) ? gate.total : d;
    }
}
#define ROUTE(T, S)                                                                                            \
    KERNEL route_##S(const T* logits, const T* bias, u32* choices, T* weights, RouteShape s) {                 \
        route_body(logits, bias, choices, weights, s);                                                         \
    }                                                                                                          \
    KERNEL route_grad_##S(const T* logits, const u32* choices, const T* g, T* dx, RouteShape s) {              \
        route_grad_body(logits, choices, g, dx, s);                                                            \
    }
FOR_FULL(ROUTE)

KERNEL route_places(const u32* order, u32* token, u32* place, i64 n, i64 k) {
    i64 row = (i64)blockIdx.x * 256 + threadIdx.x;
    if (row >= n) return;
    u32 pair = order[row];
    token[row] = (u32)(pair / k);
    place[pair] = (u32)row;
}
KERNEL route_owners(const u32* token, const u32* old_owner, const i64* old_offsets, u32* owner, i64* offsets, i64 n, i64 count,
                    i64 each, i64 k) {
    i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
    if (i < n) owner[i] = old_owner ? old_owner[token[i]] : (u32)(token[i] / each);
    if (i <= count) offsets[i] = (old_offsets ? old_offsets[i] : i * each) * k;
}
KERNEL route_load(const u32* choices, const i64* offsets, const u32* order, float* load, i64 count, i64 experts, i64 each, i64 k) {
    SHARED(i64, red, [8]);
    i64 b = (i64)blockIdx.x / experts, e = blockIdx.x - b * experts;
    if (blockIdx.x >= count) return;
    i64 begin = offsets ? offsets[b] : b * each, end = offsets ? offsets[b + 1] : begin + each, found = 0;
    for (i64 i = threadIdx.x; i < (end - begin) * k; i += 256) {
        i64 at = begin + i / k, token = order ? order[at] : at;
        if (choices[token * k + i % k] == (u32)e) found++;
    }
    Team t = {0, (int)threadIdx.x, 256, true};
    found = team_sum(t, found, red);
    if (threadIdx.x == 0) load[blockIdx.x] = (float)found;
}
KERNEL route_within(const u32* choices, const u32* place, const i64* offsets, float* kept, i64 n, i64 capacity) {
    i64 i = (i64)blockIdx.x * 256 + threadIdx.x;
    if (i < n) kept[i] = place[i] - offsets[choices[i]] < capacity ? 1.f : 0.f;
}
