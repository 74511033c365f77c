#include "prelude.cuh"
// softmax(scale·Q·Kᵀ + mask)·V by tiles, forward and backward, without a T × T matrix in memory (loop order of FlashAttention-2).
//
// Q [B, T, H, D], K and V [B, S, H_kv, D], unit stride along D, every other stride free (slices of one fused projection are read and
// written in place). Spans, packed documents, grouped queries and dropout are those of ops::attention; a query that sees no key gives zeros
// and a log-sum-exp of 0. The bounds of the visible keys never decrease from query to query, so a tile's loop runs from the first bound of
// its first row to the last bound of its last row, whatever the span; before that it processes the tiles with the sinks, if a window has
// any (KeyTiles in prelude.cuh).
//
// Kernels (block and shared memory below; grid x only, everything else 1):
//   attention_fwd_d{64,128}_T  (q, k, v, out, lse, tiles, s)                      grid ⌈T/ROWS⌉·B·H
//   attention_delta_T          (out, grad, delta, s)                              any grid, one warp per row, grid-stride; block 256
//   attention_dq_d{64,128}_T   (q, k, v, grad, lse, delta, tiles, dq, s)          grid ⌈T/ROWS⌉·B·H
//   attention_dkv_d{64,128}_T  (q, k, v, grad, lse, delta, tiles, dk, dv, s)      grid ⌈S/ROWS⌉·B·H_kv
// d64 is for D ≤ 64, d128 for D ≤ 128 (padded with zeros inside). delta runs first, then dq and dkv in any order.
//
//   T            fwd ROWS, dynamic shared memory      dq, dkv ROWS, dynamic shared memory     threads
//   f32 d64      64    52 224                         64    87 040                            256
//   f32 d128     64    84 992                         32    72 192                            256
//   f64 d64      32    42 496                         32    76 288                            256
//   f64 d128     32    75 264                         16    68 864                            256
//   bf16 and f16: attention_mma.cu (delta is here for every type)
//
// Arguments: q, k, v, out, grad (of out), dq, dk, dv: const T* / T*, pointing to their first element; lse, delta: acc* [B, H, T]; tiles:
// list of the tiles of packed or padded sequences (AttentionTile in prelude.cuh; the grid is then s.tiles · heads), or null with s.tiles =
// 0; s: AttentionShape (prelude.cuh) by value. Rows of no tile are not written, all others are. Results are written, not accumulated; dk
// and dv are summed over a group's query heads in registers.
//
// FLOPs 4·pairs·D forward, 14·pairs·D backward (scores and their gradients are computed in both passes, which avoids atomics; the minimum
// would be 10). Bytes: Q and O once, K and V once per query tile, mostly from L2.

template <class A> DEV A minus_infinity() { return (A)-INFINITY; }

// ------------------------------------------------------------------ f32 and f64, without tensor cores
// 256 threads as 16 × 16; thread (ty, tx) holds rows ty + 16i and columns tx + 16j of a score tile of 16·TM squared, and columns in runs of
// VEC of an output tile of 16·TM × DP. Operand tiles are row-major with VEC elements of padding, so that a 16-byte read of one column by
// eight rows uses every bank once.
template <class T_, int DP_, int TM_> struct Simt {
    typedef T_ T;
    enum { DP = DP_, TM = TM_, ROWS = 16 * TM, VEC = 16 / sizeof(T), LD = DP + VEC, LP = ROWS + VEC, NC = DP / 16 };
    enum { TILE = ROWS * LD, PTILE = ROWS * LP };
    struct __align__(16) Vec { T v[VEC]; };

    // Loads ROWS rows of D elements from row `t0` on into a padded tile; rows past `rows` and columns past D become zero.
    static DEVM void load(T* tile, const T* x, i64 step, int t0, int rows, int dim) {
        bool vec = step % VEC == 0 && dim % VEC == 0 && (u64)x % 16 == 0;
        int w = vec ? VEC : 1, per = DP / w;
        for (int e = threadIdx.x; e < ROWS * per; e += 256) {
            int r = e / per, c = e % per * w;
            bool in = t0 + r < rows && c < dim;
            const T* from = in ? x + (t0 + r) * step + c : x;
            if (vec) cp_async16(tile + r * LD + c, from, in ? 16 : 0);
            else cp_async_one(tile + r * LD + c, from, in);
        }
        cp_async_commit();
    }
    // acc[i][j] += Σ_c X[ty + 16i][c]·Y[tx + 16j][c]
    static DEVM void scores(T (&acc)[TM][TM], const T* x, const T* y) {
        int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
#pragma unroll 2
        for (int c = 0; c < DP; c += VEC) {
            Vec a[TM], b[TM];
#pragma unroll
            for (int i = 0; i < TM; i++) a[i] = ld_vec<Vec>(x + (ty + 16 * i) * LD + c);
#pragma unroll
            for (int i = 0; i < TM; i++) b[i] = ld_vec<Vec>(y + (tx + 16 * i) * LD + c);
#pragma unroll
            for (int i = 0; i < TM; i++)
#pragma unroll
                for (int j = 0; j < TM; j++)
#pragma unroll
                    for (int v = 0; v < VEC; v++) acc[i][j] += a[i].v[v] * b[j].v[v];
        }
    }
    // acc[i][·] += Σ_r P[ty + 16i][r]·Y[r][·]
    static DEVM void mix(T (&acc)[TM][NC], const T* p, const T* y) {
        int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
#pragma unroll 2
        for (int r = 0; r < ROWS; r += VEC) {
            Vec a[TM];
#pragma unroll
            for (int i = 0; i < TM; i++) a[i] = ld_vec<Vec>(p + (ty + 16 * i) * LP + r);
#pragma unroll
            for (int v = 0; v < VEC; v++)
#pragma unroll
                for (int g = 0; g < NC / VEC; g++) {
                    Vec b = ld_vec<Vec>(y + (r + v) * LD + g * 16 * VEC + tx * VEC);
#pragma unroll
                    for (int i = 0; i < TM; i++)
#pragma unroll
                        for (int e = 0; e < VEC; e++) acc[i][g * VEC + e] += a[i].v[v] * b.v[e];
                }
        }
    }
    static DEVM void put(T* p, const T (&x)[TM][TM]) {
        int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
#pragma unroll
        for (int i = 0; i < TM; i++)
#pragma unroll
            for (int j = 0; j < TM; j++) p[(ty + 16 * i) * LP + tx + 16 * j] = x[i][j];
    }
    static DEVM void store(T* out, i64 step, int t0, int rows, int dim, const T (&acc)[TM][NC], const T (&f)[TM]) {
        int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
#pragma unroll
        for (int i = 0; i < TM; i++) {
            int t = t0 + ty + 16 * i;
            if (t >= rows) continue;
#pragma unroll
            for (int c = 0; c < NC; c++) {
                int col = c / VEC * 16 * VEC + tx * VEC + c % VEC;
                if (col < dim) out[t * step + col] = acc[i][c] * f[i];
            }
        }
    }
};
// Maximum over the 16 threads that share a row.
template <class A> DEV A row_max(A v) {
#pragma unroll
    for (int o = 8; o > 0; o >>= 1) {
        A w = __shfl_xor_sync(FULL_MASK, v, o);
        v = w > v ? w : v;
    }
    return v;
}
template <class A> DEV A row_sum(A v) {
#pragma unroll
    for (int o = 8; o > 0; o >>= 1) v += __shfl_xor_sync(FULL_MASK, v, o);
    return v;
}

template <class K>
DEV void simt_fwd(const typename K::T* q, const typename K::T* k, const typename K::T* v, typename K::T* out, typename K::T* lse,
                  const i64* tiles, const AttentionShape& s) {
    typedef typename K::T T;
    enum { TM = K::TM, ROWS = K::ROWS };
    DYN_SHARED(T, smem);
    T *qs = smem, *ks = qs + K::TILE, *ps = ks + K::TILE;
    AttentionTile tile = tile_of<ROWS, true>(s, tiles, s.queries, s.heads);
    i64 b = tile.b, h = tile.h, bh = b * s.heads + h, hk = h / (s.heads / s.kv_heads);
    int dim = (int)s.dim, i0 = tile.row, lo = tile.lo, T_ = tile.hi, S = s.tiles ? tile.hi : (int)s.keys; // rows and keys end at hi
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    k += b * s.k[0] + hk * s.k[2];
    v += b * s.v[0] + hk * s.v[2];
    K::load(qs, q + b * s.q[0] + h * s.q[2], s.q[1], i0, T_, dim);
    Seen seen[TM];
    T top[TM], z[TM], acc[TM][K::NC];
#pragma unroll
    for (int i = 0; i < TM; i++) {
        int row = i0 + ty + 16 * i;
        seen[i] = row < T_ ? visible(s, lo, S, row) : Seen{0, 0};
        top[i] = minus_infinity<T>();
        z[i] = 0;
#pragma unroll
        for (int c = 0; c < K::NC; c++) acc[i][c] = 0;
    }
    T slope = alibi_slope<T>(s, h);
    KeyTiles<ROWS> walk(s, lo, S, i0);
    int end = visible(s, lo, S, (int)min64(i0 + ROWS, T_) - 1).hi;
    for (int j0 = walk.first; j0 < end; j0 = walk.after(j0)) {
        __syncthreads(); // V of the round before is no longer read
        K::load(ks, k, s.k[1], j0, S, dim);
        cp_async_wait<0>();
        __syncthreads();
        T x[TM][TM] = {};
        K::scores(x, qs, ks);
        __syncthreads();
        K::load(ks, v, s.v[1], j0, S, dim); // V is loaded over K while the softmax runs
#pragma unroll
        for (int i = 0; i < TM; i++) {
            T m = top[i];
#pragma unroll
            for (int j = 0; j < TM; j++) {
                int col = j0 + tx + 16 * j;
                T score = x[i][j] * (T)s.scale;
                if (s.alibi) score -= slope * (distance<T>(place_of(s, i0 + ty + 16 * i), col) + (col < s.sinks ? T(s.skipped) : T(0)));
                x[i][j] = sees(seen[i], walk.sink, col) ? score : minus_infinity<T>();
                m = x[i][j] > m ? x[i][j] : m;
            }
            m = row_max(m);
            // A row that has not seen a key yet keeps a shift of 0, so that −∞ − −∞ never occurs.
            T shift = m == minus_infinity<T>() ? T(0) : m, alpha = exp_of(top[i] - shift), sum = 0;
#pragma unroll
            for (int j = 0; j < TM; j++) {
                x[i][j] = exp_of(x[i][j] - shift);
                sum += x[i][j];
                if (s.drop > 0. && x[i][j] != T(0)) x[i][j] *= kept<T>(s, bh * s.queries + i0 + ty + 16 * i, j0 + tx + 16 * j);
            }
            z[i] = z[i] * alpha + row_sum(sum);
            top[i] = m;
#pragma unroll
            for (int c = 0; c < K::NC; c++) acc[i][c] *= alpha;
        }
        K::put(ps, x);
        cp_async_wait<0>();
        __syncthreads();
        K::mix(acc, ps, ks);
    }
    cp_async_wait<0>();
    T inv[TM];
#pragma unroll
    for (int i = 0; i < TM; i++) {
        int row = i0 + ty + 16 * i;
        bool empty = top[i] == minus_infinity<T>();
        inv[i] = empty ? T(0) : T(1) / z[i];
        if (row < T_ && tx == 0) lse[bh * s.queries + row] = empty ? T(0) : top[i] + log_of(z[i]);
    }
    K::store(out + b * s.out[0] + h * s.out[2], s.out[1], i0, T_, dim, acc, inv);
}

// Replaces x (the score) and dp (the product grad·V) of query i and key j by the probability (after dropout: `p`) and the score's gradient.
template <class A>
DEV void back_one(const AttentionShape& s, bool in, i64 bh, int i, int j, A slope, A lse, A delta, A& x, A& dp) {
    A score = x * (A)s.scale, keep = 1;
    if (s.alibi) score -= slope * distance<A>(place_of(s, i), j);
    A p = in ? exp_of(score - lse) : A(0);
    if (s.drop > 0. && in) keep = kept<A>(s, bh * s.queries + i, j);
    dp = in ? p * (dp * keep - delta) * (A)s.scale : A(0);
    x = p * keep;
}

template <class K>
DEV void simt_dq(const typename K::T* q, const typename K::T* k, const typename K::T* v, const typename K::T* grad,
                 const typename K::T* lse, const typename K::T* delta, const i64* tiles, typename K::T* dq, const AttentionShape& s) {
    typedef typename K::T T;
    enum { TM = K::TM, ROWS = K::ROWS };
    DYN_SHARED(T, smem);
    T *qs = smem, *gs = qs + K::TILE, *ks = gs + K::TILE, *vs = ks + K::TILE, *ps = vs + K::TILE;
    AttentionTile tile = tile_of<ROWS, true>(s, tiles, s.queries, s.heads);
    i64 b = tile.b, h = tile.h, bh = b * s.heads + h, hk = h / (s.heads / s.kv_heads);
    int dim = (int)s.dim, i0 = tile.row, lo = tile.lo, T_ = tile.hi, S = s.tiles ? tile.hi : (int)s.keys;
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    K::load(qs, q + b * s.q[0] + h * s.q[2], s.q[1], i0, T_, dim);
    K::load(gs, grad + b * s.grad[0] + h * s.grad[2], s.grad[1], i0, T_, dim);
    k += b * s.k[0] + hk * s.k[2];
    v += b * s.v[0] + hk * s.v[2];
    Seen seen[TM];
    T l[TM], d[TM], one[TM], acc[TM][K::NC] = {};
#pragma unroll
    for (int i = 0; i < TM; i++) {
        int row = i0 + ty + 16 * i;
        seen[i] = row < T_ ? visible(s, lo, S, row) : Seen{0, 0};
        l[i] = row < T_ ? lse[bh * s.queries + row] : T(0);
        d[i] = row < T_ ? delta[bh * s.queries + row] : T(0);
        one[i] = 1;
    }
    T slope = alibi_slope<T>(s, h);
    KeyTiles<ROWS> walk(s, lo, S, i0);
    int end = visible(s, lo, S, (int)min64(i0 + ROWS, T_) - 1).hi;
    for (int j0 = walk.first; j0 < end; j0 = walk.after(j0)) {
        __syncthreads();
        K::load(ks, k, s.k[1], j0, S, dim);
        K::load(vs, v, s.v[1], j0, S, dim);
        cp_async_wait<0>();
        __syncthreads();
        T x[TM][TM] = {}, dp[TM][TM] = {};
        K::scores(x, qs, ks);
        K::scores(dp, gs, vs);
#pragma unroll
        for (int i = 0; i < TM; i++)
#pragma unroll
            for (int j = 0; j < TM; j++) {
                int col = j0 + tx + 16 * j;
                back_one(s, sees(seen[i], walk.sink, col), bh, i0 + ty + 16 * i, col, slope, l[i], d[i], x[i][j], dp[i][j]);
            }
        K::put(ps, dp);
        __syncthreads();
        K::mix(acc, ps, ks);
    }
    cp_async_wait<0>();
    K::store(dq + b * s.dq[0] + h * s.dq[2], s.dq[1], i0, T_, dim, acc, one);
}

template <class K>
DEV void simt_dkv(const typename K::T* q, const typename K::T* k, const typename K::T* v, const typename K::T* grad,
                  const typename K::T* lse, const typename K::T* delta, const i64* tiles, typename K::T* dk, typename K::T* dv,
                  const AttentionShape& s) {
    typedef typename K::T T;
    enum { TM = K::TM, ROWS = K::ROWS };
    DYN_SHARED(T, smem);
    T *qs = smem, *gs = qs + K::TILE, *ks = gs + K::TILE, *vs = ks + K::TILE, *ps = vs + K::TILE;
    AttentionTile tile = tile_of<ROWS, false>(s, tiles, s.keys, s.kv_heads);
    i64 b = tile.b, hk = tile.h, group = s.heads / s.kv_heads;
    int dim = (int)s.dim, j0 = tile.row, lo = tile.lo, S = tile.hi, T_ = s.tiles ? tile.hi : (int)s.queries;
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    K::load(ks, k + b * s.k[0] + hk * s.k[2], s.k[1], j0, S, dim);
    K::load(vs, v + b * s.v[0] + hk * s.v[2], s.v[1], j0, S, dim);
    // Queries that see any key of this tile: from the first query whose upper bound exceeds the tile's start to the last query whose lower
    // bound is before the tile's end; to the very last query if the tile has sinks.
    int from = first_past<true>(s, lo, S, lo, T_, j0), sink = lo + (int)s.sinks;
    int end = j0 < sink ? T_ : first_past<false>(s, lo, S, lo, T_, (int)min64(j0 + ROWS, S) - 1);
    T one[TM], sk[TM][K::NC] = {}, sv[TM][K::NC] = {};
#pragma unroll
    for (int i = 0; i < TM; i++) one[i] = 1;
    for (i64 h = hk * group; h < (hk + 1) * group; h++) {
        i64 bh = b * s.heads + h;
        T slope = alibi_slope<T>(s, h);
        for (int i0 = lo + (from - lo) / ROWS * ROWS; i0 < end; i0 += ROWS) {
            __syncthreads();
            K::load(qs, q + b * s.q[0] + h * s.q[2], s.q[1], i0, T_, dim);
            K::load(gs, grad + b * s.grad[0] + h * s.grad[2], s.grad[1], i0, T_, dim);
            cp_async_wait<0>();
            __syncthreads();
            T x[TM][TM] = {}, dp[TM][TM] = {}; // rows are keys, columns queries
            K::scores(x, ks, qs);
            K::scores(dp, vs, gs);
#pragma unroll
            for (int j = 0; j < TM; j++) {
                int row = i0 + tx + 16 * j;
                Seen seen = row < T_ ? visible(s, lo, S, row) : Seen{0, 0};
                T l = row < T_ ? lse[bh * s.queries + row] : T(0), d = row < T_ ? delta[bh * s.queries + row] : T(0);
#pragma unroll
                for (int i = 0; i < TM; i++) {
                    int col = j0 + ty + 16 * i;
                    back_one(s, sees(seen, sink, col), bh, row, col, slope, l, d, x[i][j], dp[i][j]);
                }
            }
            K::put(ps, x);
            __syncthreads();
            K::mix(sv, ps, gs);
            __syncthreads();
            K::put(ps, dp);
            __syncthreads();
            K::mix(sk, ps, qs);
        }
    }
    cp_async_wait<0>();
    K::store(dk + b * s.dk[0] + hk * s.dk[2], s.dk[1], j0, S, dim, sk, one);
    K::store(dv + b * s.dv[0] + hk * s.dv[2], s.dv[1], j0, S, dim, sv, one);
}

// delta: Σ out·grad of every query; reads 2·D elements per row, writes one.
template <class T> DEV void delta_body(const T* out, const T* grad, acc_t<T>* delta, const AttentionShape& s) {
    i64 rows = s.batch * s.heads * s.queries, step = (i64)gridDim.x * (blockDim.x / 32);
    int lane = threadIdx.x % 32;
    for (i64 r = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; r < rows; r += step) {
        i64 t = r % s.queries, h = r / s.queries % s.heads, b = r / s.queries / s.heads;
        const T *o = out + b * s.out[0] + t * s.out[1] + h * s.out[2], *g = grad + b * s.grad[0] + t * s.grad[1] + h * s.grad[2];
        acc_t<T> sum = 0;
        for (i64 c = lane; c < s.dim; c += 32) sum += to_acc(o[c]) * to_acc(g[c]);
#pragma unroll
        for (int m = 16; m > 0; m >>= 1) sum += __shfl_xor_sync(FULL_MASK, sum, m);
        if (lane == 0) delta[r] = sum;
    }
}

#define FWD_ARGS(T) const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v, T *__restrict__ out, \
    acc_t<T> *__restrict__ lse, const i64 *__restrict__ tiles, AttentionShape s
#define BACK_ARGS(T) const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v, const T *__restrict__ grad, \
    const acc_t<T> *__restrict__ lse, const acc_t<T> *__restrict__ delta, const i64 *__restrict__ tiles
#define SIMT_ATTENTION(SUFFIX, T, DP, TF, TB) \
    extern "C" __global__ void __launch_bounds__(256, 1) attention_fwd_##SUFFIX(FWD_ARGS(T)) { simt_fwd<Simt<T, DP, TF>>(q, k, v, out, lse, tiles, s); } \
    extern "C" __global__ void __launch_bounds__(256, 1) attention_dq_##SUFFIX(BACK_ARGS(T), T* dq, AttentionShape s) { simt_dq<Simt<T, DP, TB>>(q, k, v, grad, lse, delta, tiles, dq, s); } \
    extern "C" __global__ void __launch_bounds__(256, 1) attention_dkv_##SUFFIX(BACK_ARGS(T), T* dk, T* dv, AttentionShape s) { simt_dkv<Simt<T, DP, TB>>(q, k, v, grad, lse, delta, tiles, dk, dv, s); }
SIMT_ATTENTION(d64_f32, float, 64, 4, 4)
SIMT_ATTENTION(d128_f32, float, 128, 4, 2)
SIMT_ATTENTION(d64_f64, double, 64, 2, 2)
SIMT_ATTENTION(d128_f64, double, 128, 2, 1)
#define DELTA(S, T) \
    extern "C" __global__ void __launch_bounds__(256) attention_delta_##S(const T *__restrict__ out, const T *__restrict__ grad, acc_t<T> *__restrict__ delta, AttentionShape s) { delta_body<T>(out, grad, delta, s); }
DELTA(f32, float)
DELTA(f64, double)
DELTA(bf16, bf16)
DELTA(f16, f16)
