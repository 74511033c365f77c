#include "prelude.cuh"
// Attention in bf16 and f16 on the tensor cores (mma.sync m16n8k16, f32 inside); semantics, arguments and grids are those
// of attention.cu, lse and delta are f32.
//
//   T              fwd ROWS, dynamic shared memory, threads    dq, dkv ROWS, dynamic shared memory, threads
//   bf16, f16 d64       128    49 152    256                        64    49 152    128
//   bf16, f16 d128      128    98 304    256                        64    65 536    128     (raise the limit first)
//
// ROWS are queries in fwd and dq, keys in dkv. Rows and pointers that are 16-byte aligned are copied by cp.async, others element by
// element. FLOPs 4·pairs·D forward, 14·pairs·D backward. P and its gradient are rounded to T between the products. No register spills: fwd
// uses 177 (d64) and 214 registers, dq 234 and 211, dkv 252 and 255.

// A warp computes 16 rows of a score tile (queries, or keys in dkv) with all its columns, so that softmax rows stay within four lanes and a
// tile of probabilities becomes an operand of the next product without leaving registers. Operand tiles are row-major, with 16-byte chunks
// permuted by the row, so that an ldmatrix uses every bank once. The tiles over which a block loops have two stages: the next one is copied
// while the current one is used, with one barrier per tile.
DEV u32 pack2(float lo, float hi, bf16) { return pack_bf16x2(lo, hi); }
DEV u32 pack2(float lo, float hi, f16) { return (u32)to_f16(lo).x | (u32)to_f16(hi).x << 16; }

template <class T_, int DP_, int KEYS_, int THREADS_> struct Mma {
    typedef T_ T;
    // KEYS: rows of a tile in the block's loop; N8: its columns of eight in a score tile.
    enum { DP = DP_, KEYS = KEYS_, THREADS = THREADS_, ROWS = THREADS_ / 2, N8 = KEYS_ / 8, O8 = DP_ / 8 };
    struct __align__(16) Chunk { T v[8]; };
    static DEVM int at(int row, int col) { return row * DP + ((col / 8 ^ (row & 7)) * 8) + col % 8; }

    // Loads `count` rows from `t0` on; rows past `rows` and columns past `dim` become zero.
    static DEVM void load(T* tile, const T* x, i64 step, int t0, int count, int rows, int dim) {
        bool vec = step % 8 == 0 && (u64)x % 16 == 0;
        for (int e = threadIdx.x; e < count * (DP / 8); e += THREADS) {
            int r = e / (DP / 8), c = e % (DP / 8) * 8, n = t0 + r < rows ? min(max(dim - c, 0), 8) : 0;
            T* to = tile + at(r, c);
            const T* from = n ? x + (t0 + r) * step + c : x;
            if (vec) cp_async16(to, from, n * 2);
            else {
                Chunk k;
#pragma unroll
                for (int i = 0; i < 8; i++) k.v[i] = i < n ? from[i] : from_f32<T>(0.f);
                st_vec(to, k);
            }
        }
    }
    // s += rows a0 .. a0 + 16 of A times the transpose of all rows of B.
    static DEVM void scores(float (&s)[N8][4], const T* a, int a0, const T* b) {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int kk = 0; kk < DP; kk += 16) {
            u32 fa[4];
            ldmatrix_x4(fa, a + at(a0 + lane % 16, kk + lane / 16 * 8));
#pragma unroll
            for (int j = 0; j < N8 / 2; j++) {
                u32 fb[4];
                ldmatrix_x4(fb, b + at(j * 16 + lane % 8 + lane / 16 * 8, kk + (lane >> 3 & 1) * 8));
                u32 b0[2] = {fb[0], fb[1]}, b1[2] = {fb[2], fb[3]};
                mma_step(s[j * 2], fa, b0, T());
                mma_step(s[j * 2 + 1], fa, b1, T());
            }
        }
    }
    // o += P (16 × KEYS, in the accumulators' layout) times the tile (KEYS × DP).
    static DEVM void mix(float (&o)[O8][4], const float (&p)[N8][4], const T* b) {
        int lane = threadIdx.x % 32;
#pragma unroll
        for (int kk = 0; kk < N8 / 2; kk++) {
            u32 fa[4];
#pragma unroll
            for (int i = 0; i < 4; i++) fa[i] = pack2(p[kk * 2 + i / 2][i % 2 * 2], p[kk * 2 + i / 2][i % 2 * 2 + 1], T());
#pragma unroll
            for (int j = 0; j < O8 / 2; j++) {
                u32 fb[4];
                ldmatrix_x4_trans(fb, b + at(kk * 16 + lane % 16, j * 16 + lane / 16 * 8));
                u32 b0[2] = {fb[0], fb[1]}, b1[2] = {fb[2], fb[3]};
                mma_step(o[j * 2], fa, b0, T());
                mma_step(o[j * 2 + 1], fa, b1, T());
            }
        }
    }
    // Stores rows t0 + lane / 4 (+ 8) of the output, times f.
    static DEVM void store(T* out, i64 step, int t0, int rows, int dim, const float (&o)[O8][4], float f0, float f1) {
        int lane = threadIdx.x % 32;
        bool pairs = step % 2 == 0 && (u64)out % 4 == 0;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            int t = t0 + lane / 4 + h * 8;
            if (t >= rows) continue;
            T* to = out + t * step;
            float f = h ? f1 : f0;
#pragma unroll
            for (int j = 0; j < O8; j++) {
                int c = j * 8 + lane % 4 * 2;
                float x = o[j][h * 2] * f, y = o[j][h * 2 + 1] * f;
                if (pairs && c + 1 < dim) st_vec<u32>(to + c, pack2(x, y, T()));
                else {
                    if (c < dim) to[c] = from_f32<T>(x);
                    if (c + 1 < dim) to[c + 1] = from_f32<T>(y);
                }
            }
        }
    }
};
#define LOG2E 1.4426950408889634f
DEV float quad_max(float v) {
    v = fmaxf(v, __shfl_xor_sync(FULL_MASK, v, 1));
    return fmaxf(v, __shfl_xor_sync(FULL_MASK, v, 2));
}
DEV float quad_sum(float v) {
    v += __shfl_xor_sync(FULL_MASK, v, 1);
    return v + __shfl_xor_sync(FULL_MASK, v, 2);
}

template <class K>
DEV void mma_fwd(const typename K::T* q, const typename K::T* k, const typename K::T* v, typename K::T* out, float* lse, const i64* tiles,
                 const AttentionShape& s) {
    typedef typename K::T T;
    DYN_SHARED(T, smem);
    enum { ROWS = K::ROWS, KEYS = K::KEYS, DP = K::DP };
    T *qs = smem, *kv = qs + ROWS * DP;
    AttentionTile tile = tile_of<ROWS, true>(s, tiles, s.queries, s.heads);
    i64 b = tile.b, h = tile.h, bh = b * s.heads + h, hk = h / (s.heads / s.kv_heads);
    int dim = (int)s.dim, i0 = tile.row, lo = tile.lo, T_ = tile.hi, S = s.tiles ? tile.hi : (int)s.keys; // rows and keys end at hi
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = i0 + warp * 16 + lane / 4;
    k += b * s.k[0] + hk * s.k[2];
    v += b * s.v[0] + hk * s.v[2];
    Seen first = visible(s, lo, S, i0), last = visible(s, lo, S, (int)min64(i0 + ROWS, T_) - 1);
    Seen seen[2] = {row < T_ ? visible(s, lo, S, row) : Seen{0, 0}, row + 8 < T_ ? visible(s, lo, S, row + 8) : Seen{0, 0}};
    float o[K::O8][4] = {}, top[2] = {-INFINITY, -INFINITY}, z[2] = {0.f, 0.f}, sl2 = (float)s.scale * LOG2E;
    K::load(qs, q + b * s.q[0] + h * s.q[2], s.q[1], i0, ROWS, T_, dim);
    float slope2 = alibi_slope<float>(s, h) * LOG2E;
    KeyTiles<KEYS> walk(s, lo, S, i0);
    int j0 = walk.first, st = 0;
    auto fetch = [&](int j, int stage) {
        if (j < last.hi) {
            K::load(kv + stage * 2 * KEYS * DP, k, s.k[1], j, KEYS, S, dim);
            K::load(kv + (stage * 2 + 1) * KEYS * DP, v, s.v[1], j, KEYS, S, dim);
        }
        cp_async_commit();
    };
    fetch(j0, 0);
    for (; j0 < last.hi; j0 = walk.after(j0), st ^= 1) {
        cp_async_wait<0>();
        __syncthreads(); // this stage has arrived, the other is no longer read
        fetch(walk.after(j0), st ^ 1);
        const T *ks = kv + st * 2 * KEYS * DP, *vs = ks + KEYS * DP;
        float x[K::N8][4] = {};
        K::scores(x, qs, warp * 16, ks);
        bool whole = j0 >= last.lo && j0 + KEYS <= first.hi; // every row sees every key: no mask
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float m = top[r];
#pragma unroll
            for (int j = 0; j < K::N8; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    int col = j0 + j * 8 + lane % 4 * 2 + e;
                    float y = x[j][r * 2 + e] * sl2;
                    if (s.alibi) y -= slope2 * (distance<float>(place_of(s, row + r * 8), col) + (col < s.sinks ? (float)s.skipped : 0.f));
                    if (!whole && !sees(seen[r], walk.sink, col)) y = -INFINITY;
                    x[j][r * 2 + e] = y;
                    m = fmaxf(m, y);
                }
            m = quad_max(m);
            float shift = m == -INFINITY ? 0.f : m, alpha = exp2f(top[r] - shift), sum = 0.f;
#pragma unroll
            for (int j = 0; j < K::N8; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float p = exp2f(x[j][r * 2 + e] - shift);
                    sum += p;
                    x[j][r * 2 + e] = p;
                }
            z[r] = z[r] * alpha + quad_sum(sum);
            top[r] = m;
#pragma unroll
            for (int j = 0; j < K::O8; j++) {
                o[j][r * 2] *= alpha;
                o[j][r * 2 + 1] *= alpha;
            }
        }
        if (s.drop > 0.) {
#pragma unroll
            for (int j = 0; j < K::N8; j++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (x[j][e] != 0.f) x[j][e] *= kept<float>(s, bh * s.queries + row + e / 2 * 8, j0 + j * 8 + lane % 4 * 2 + e % 2);
        }
        K::mix(o, x, vs);
    }
    cp_async_wait<0>();
    float inv[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        bool empty = top[r] == -INFINITY;
        inv[r] = empty ? 0.f : 1.f / z[r];
        if (row + r * 8 < T_ && lane % 4 == 0) lse[bh * s.queries + row + r * 8] = empty ? 0.f : top[r] * 0.6931471805599453f + logf(z[r]);
    }
    K::store(out + b * s.out[0] + h * s.out[2], s.out[1], i0 + warp * 16, T_, dim, o, inv[0], inv[1]);
}

// As back_one, with the log-sum-exp to base 2.
DEV void back_one2(const AttentionShape& s, bool in, i64 row, int j, float lse2, float delta, float& x, float& dp) {
    float p = in ? exp2f(x * ((float)s.scale * LOG2E) - lse2) : 0.f, keep = 1.f;
    if (s.drop > 0. && in) keep = kept<float>(s, row, j);
    dp = in ? p * (dp * keep - delta) * (float)s.scale : 0.f;
    x = p * keep;
}

template <class K>
DEV void mma_dq(const typename K::T* q, const typename K::T* k, const typename K::T* v, const typename K::T* grad, const float* lse,
                const float* delta, const i64* tiles, typename K::T* dq, const AttentionShape& s) {
    typedef typename K::T T;
    DYN_SHARED(T, smem);
    enum { ROWS = K::ROWS, KEYS = K::KEYS, DP = K::DP };
    T *qs = smem, *gs = qs + ROWS * DP, *kv = gs + ROWS * DP;
    AttentionTile tile = tile_of<ROWS, true>(s, tiles, s.queries, s.heads);
    i64 b = tile.b, h = tile.h, bh = b * s.heads + h, hk = h / (s.heads / s.kv_heads);
    int dim = (int)s.dim, i0 = tile.row, lo = tile.lo, T_ = tile.hi, S = s.tiles ? tile.hi : (int)s.keys;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = i0 + warp * 16 + lane / 4;
    k += b * s.k[0] + hk * s.k[2];
    v += b * s.v[0] + hk * s.v[2];
    float slope = alibi_slope<float>(s, h) / (float)s.scale;
    int place = place_of(s, row);
    KeyTiles<KEYS> walk(s, lo, S, i0);
    int end = visible(s, lo, S, (int)min64(i0 + ROWS, T_) - 1).hi, j0 = walk.first, st = 0;
    Seen seen[2];
    float l[2], d[2], o[K::O8][4] = {};
#pragma unroll
    for (int r = 0; r < 2; r++) {
        bool in = row + r * 8 < T_;
        seen[r] = in ? visible(s, lo, S, row + r * 8) : Seen{0, 0};
        l[r] = in ? lse[bh * s.queries + row + r * 8] * LOG2E : 0.f;
        d[r] = in ? delta[bh * s.queries + row + r * 8] : 0.f;
    }
    K::load(qs, q + b * s.q[0] + h * s.q[2], s.q[1], i0, ROWS, T_, dim);
    K::load(gs, grad + b * s.grad[0] + h * s.grad[2], s.grad[1], i0, ROWS, T_, dim);
    auto fetch = [&](int j, int stage) {
        if (j < end) {
            K::load(kv + stage * 2 * KEYS * DP, k, s.k[1], j, KEYS, S, dim);
            K::load(kv + (stage * 2 + 1) * KEYS * DP, v, s.v[1], j, KEYS, S, dim);
        }
        cp_async_commit();
    };
    fetch(j0, 0);
    for (; j0 < end; j0 = walk.after(j0), st ^= 1) {
        cp_async_wait<0>();
        __syncthreads();
        fetch(walk.after(j0), st ^ 1);
        const T *ks = kv + st * 2 * KEYS * DP, *vs = ks + KEYS * DP;
        float x[K::N8][4] = {}, dp[K::N8][4] = {};
        K::scores(x, qs, warp * 16, ks);
        K::scores(dp, gs, warp * 16, vs);
#pragma unroll
        for (int j = 0; j < K::N8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int col = j0 + j * 8 + lane % 4 * 2 + e % 2, r = e / 2;
                if (s.alibi) x[j][e] -= slope * fabsf((float)(place + r * 8 - col));
                back_one2(s, sees(seen[r], walk.sink, col), bh * s.queries + row + r * 8, col, l[r], d[r], x[j][e], dp[j][e]);
            }
        K::mix(o, dp, ks);
    }
    cp_async_wait<0>();
    K::store(dq + b * s.dq[0] + h * s.dq[2], s.dq[1], i0 + warp * 16, T_, dim, o, 1.f, 1.f);
}

// KEYS of K is here the number of queries of a tile; a warp processes 16 keys.
template <class K>
DEV void mma_dkv(const typename K::T* q, const typename K::T* k, const typename K::T* v, const typename K::T* grad, const float* lse,
                 const float* delta, const i64* tiles, typename K::T* dk, typename K::T* dv, const AttentionShape& s) {
    typedef typename K::T T;
    DYN_SHARED(T, smem);
    enum { ROWS = K::ROWS, KEYS = K::KEYS, DP = K::DP };
    SHARED(float, lsd, [2][2][K::KEYS]);
    SHARED(int, bounds, [2][2][K::KEYS]);
    // For the bias by distance: the position of the first query of a tile, and the slope divided by the scale, so that the bias can be
    // subtracted before the multiplication with the scale, which saves a register.
    SHARED(int, places, [2]);
    SHARED(float, slopes, [2]);
    T *ks = smem, *vs = ks + ROWS * DP, *qg = vs + ROWS * DP;
    AttentionTile tile = tile_of<ROWS, false>(s, tiles, s.keys, s.kv_heads);
    i64 b = tile.b, hk = tile.h, group = s.heads / s.kv_heads;
    int dim = (int)s.dim, j0 = tile.row, lo = tile.lo, S = tile.hi, T_ = s.tiles ? tile.hi : (int)s.queries;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, key = j0 + warp * 16 + lane / 4;
    int from = lo + (first_past<true>(s, lo, S, lo, T_, j0) - lo) / KEYS * KEYS;
    int end = j0 < lo + (int)s.sinks ? T_ : first_past<false>(s, lo, S, lo, T_, (int)min64(j0 + ROWS, S) - 1);
    int steps = end > from ? (int)cdiv(end - from, KEYS) : 0;
    float sk[K::O8][4] = {}, sv[K::O8][4] = {};
    K::load(ks, k + b * s.k[0] + hk * s.k[2], s.k[1], j0, ROWS, S, dim);
    K::load(vs, v + b * s.v[0] + hk * s.v[2], s.v[1], j0, ROWS, S, dim);
    auto fetch = [&](i64 n, int stage) {
        if (n < group * steps) {
            i64 h = hk * group + n / steps;
            int i0 = from + (int)(n % steps) * KEYS, c = threadIdx.x;
            if (s.alibi && c == 0) {
                places[stage] = place_of(s, i0);
                slopes[stage] = alibi_slope<float>(s, h) / (float)s.scale;
            }
            K::load(qg + stage * 2 * KEYS * DP, q + b * s.q[0] + h * s.q[2], s.q[1], i0, KEYS, T_, dim);
            K::load(qg + (stage * 2 + 1) * KEYS * DP, grad + b * s.grad[0] + h * s.grad[2], s.grad[1], i0, KEYS, T_, dim);
            if (c < KEYS) {
                bool in = i0 + c < T_;
                i64 r = (b * s.heads + h) * s.queries + i0 + c;
                Seen w = in ? visible(s, lo, S, i0 + c) : Seen{0, 0};
                lsd[stage][0][c] = in ? lse[r] * LOG2E : 0.f;
                lsd[stage][1][c] = in ? delta[r] : 0.f;
                bounds[stage][0][c] = w.lo;
                bounds[stage][1][c] = w.hi;
            }
        }
        cp_async_commit();
    };
    fetch(0, 0);
    int st = 0;
    for (i64 n = 0; n < group * steps; n++, st ^= 1) {
        cp_async_wait<0>();
        __syncthreads();
        fetch(n + 1, st ^ 1);
        i64 rows = (b * s.heads + hk * group + n / steps) * s.queries + from + n % steps * KEYS;
        const T *qs = qg + st * 2 * KEYS * DP, *gs = qs + KEYS * DP;
        float x[K::N8][4] = {}, dp[K::N8][4] = {};
        K::scores(x, ks, warp * 16, qs);
        K::scores(dp, vs, warp * 16, gs);
#pragma unroll
        for (int j = 0; j < K::N8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int c = j * 8 + lane % 4 * 2 + e % 2, col = key + e / 2 * 8;
                Seen seen = {bounds[st][0][c], bounds[st][1][c]};
                if (s.alibi) x[j][e] -= slopes[st] * fabsf((float)(places[st] + c - col));
                back_one2(s, sees(seen, lo + (int)s.sinks, col), rows + c, col, lsd[st][0][c], lsd[st][1][c], x[j][e], dp[j][e]);
            }
        K::mix(sv, x, gs);
        K::mix(sk, dp, qs);
    }
    cp_async_wait<0>();
    K::store(dk + b * s.dk[0] + hk * s.dk[2], s.dk[1], j0 + warp * 16, S, dim, sk, 1.f, 1.f);
    K::store(dv + b * s.dv[0] + hk * s.dv[2], s.dv[1], j0 + warp * 16, S, dim, sv, 1.f, 1.f);
}

#define FWD_ARGS(T) const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v, T *__restrict__ out, \
    acc_t<T> *__restrict__ lse, const i64 *__restrict__ tiles, AttentionShape s
#define BACK_ARGS(T) const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v, const T *__restrict__ grad, \
    const acc_t<T> *__restrict__ lse, const acc_t<T> *__restrict__ delta, const i64 *__restrict__ tiles
#define MMA_ATTENTION(SUFFIX, T, DP, KB) \
    extern "C" __global__ void __launch_bounds__(256, 1) attention_fwd_##SUFFIX(FWD_ARGS(T)) { mma_fwd<Mma<T, DP, 64, 256>>(q, k, v, out, lse, tiles, s); } \
    extern "C" __global__ void __launch_bounds__(128, 1) attention_dq_##SUFFIX(BACK_ARGS(T), T* dq, AttentionShape s) { mma_dq<Mma<T, DP, KB, 128>>(q, k, v, grad, lse, delta, tiles, dq, s); } \
    extern "C" __global__ void __launch_bounds__(128, 1) attention_dkv_##SUFFIX(BACK_ARGS(T), T* dk, T* dv, AttentionShape s) { mma_dkv<Mma<T, DP, KB, 128>>(q, k, v, grad, lse, delta, tiles, dk, dv, s); }
MMA_ATTENTION(d64_bf16, bf16, 64, 64)
MMA_ATTENTION(d128_bf16, bf16, 128, 32)
MMA_ATTENTION(d64_f16, f16, 64, 64)
MMA_ATTENTION(d128_f16, f16, 128, 32)
