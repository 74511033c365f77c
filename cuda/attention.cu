#include "prelude.cuh"
// softmax(scale·Q·Kᵀ + mask)·V by tiles, forward and backward, never a T × T matrix (FlashAttention-2 order of loops).
//
// Q [B, T, H, D], K and V [B, S, H_kv, D], unit stride along D, every other stride free (parts of one fused projection are
// read and written in place). Spans, packed documents, grouped queries and dropout as ops::attention; a query that sees no
// key gives zeros and a log-sum-exp of 0. Bounds of what a query sees never fall from query to query, so a tile's loop
// runs from the first bound of its first row to the last bound of its last row, whatever the span.
//
// Kernels (block and shared memory below; grid x only, everything else 1):
//   attention_fwd_d{64,128}_T  (q, k, v, out, lse, docs, s)                       grid ⌈T/ROWS⌉·B·H
//   attention_delta_T          (out, grad, delta, s)                              grid any, one warp a row, strided; block 256
//   attention_dq_d{64,128}_T   (q, k, v, grad, lse, delta, docs, dq, s)           grid ⌈T/ROWS⌉·B·H
//   attention_dkv_d{64,128}_T  (q, k, v, grad, lse, delta, docs, dk, dv, s)       grid ⌈S/ROWS⌉·B·H_kv
// d64 takes D ≤ 64, d128 D ≤ 128 (padded with zeros inside). delta first, then dq and dkv in any order.
//
//   T            fwd ROWS, dynamic shared memory      dq, dkv ROWS, dynamic shared memory     threads
//   f32 d64      64    52 224                         64    87 040                            256
//   f32 d128     64    84 992                         32    72 192                            256
//   f64 d64      32    42 496                         32    76 288                            256
//   f64 d128     32    75 264                         16    68 864                            256
//
// Arguments: q, k, v, out, grad (of out), dq, dk, dv: const T* / T*, advanced to their first element; lse, delta: acc*
// [B, H, T]; docs: const i64* offsets 0 … T of s.documents documents, or null with s.documents = 0; s: AttentionShape by
// value. Everything is written, nothing accumulated; dk and dv are summed over a group's query heads in registers.
//
// FLOPs 4·pairs·D forward, 14·pairs·D backward (scores and their gradients are computed in both passes, which is what
// doing without atomics costs; 10 would be the least). Bytes: Q and O once, K and V once per query tile, mostly from L2.

struct AttentionShape {
    i64 batch, queries, keys; // B, T, S
    i64 heads, kv_heads, dim;
    i64 width;                // of a window or block span
    u64 seed;                 // of dropout
    double scale, drop;       // drop: probability of dropping, 0 = none
    i32 span;                 // SPAN_*
    i32 documents;            // number of documents, 0 = one
    // Steps between sequences, positions and heads.
    i64 q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h;
    i64 o_b, o_t, o_h;        // out
    i64 g_b, g_t, g_h;        // grad of out
    i64 dq_b, dq_t, dq_h, dk_b, dk_t, dk_h, dv_b, dv_t, dv_h;
};
enum { SPAN_FULL, SPAN_CAUSAL, SPAN_WINDOW, SPAN_BLOCK };

struct Seen { int lo, hi; };
// Keys lo..hi that query i sees.
DEV Seen visible(const AttentionShape& s, const i64* docs, int i) {
    i64 p = i + (s.keys > s.queries ? s.keys - s.queries : 0), lo = 0, hi = p + 1;
    if (s.span == SPAN_FULL) hi = s.keys;
    if (s.span == SPAN_WINDOW) lo = p + 1 > s.width ? p + 1 - s.width : 0;
    if (s.span == SPAN_BLOCK) lo = p / s.width * s.width;
    if (s.documents) { // the last document that begins at or before p
        int a = 0, b = s.documents;
        while (b - a > 1) {
            int m = (a + b) / 2;
            if (docs[m] <= p) a = m; else b = m;
        }
        lo = lo > docs[a] ? lo : docs[a];
        hi = hi < docs[a + 1] ? hi : docs[a + 1];
    }
    return {(int)lo, (int)hi};
}
// First query whose bound (lo or hi) exceeds j; T if none does.
template <bool HI> DEV int first_past(const AttentionShape& s, const i64* docs, int j) {
    int a = 0, b = (int)s.queries;
    while (a < b) {
        int m = (a + b) / 2;
        Seen v = visible(s, docs, m);
        if ((HI ? v.hi : v.lo) > j) b = m; else a = m + 1;
    }
    return a;
}

// The bits of random::philox::dropout_uniform: one Philox 4×32-10 block serves four elements. True: keep.
DEV bool dropout_keeps(u64 seed, u64 index, float p) {
    u32 c0 = (u32)(index >> 2), c1 = (u32)(index >> 34), c2 = 0x64726f70u, c3 = 0, k0 = (u32)seed, k1 = (u32)(seed >> 32);
#pragma unroll
    for (int r = 0; r < 10; r++) {
        u64 a = (u64)0xd2511f53u * c0, b = (u64)0xcd9e8d57u * c2;
        c0 = (u32)(b >> 32) ^ c1 ^ k0;
        c1 = (u32)b;
        c2 = (u32)(a >> 32) ^ c3 ^ k1;
        c3 = (u32)a;
        k0 = (u32)((u64)k0 + 0x9e3779b9u);
        k1 = (u32)((u64)k1 + 0xbb67ae85u);
    }
    u32 h = index & 3, x = h == 0 ? c0 : h == 1 ? c1 : h == 2 ? c2 : c3;
    return !((float)(x >> 8) * (1.f / 16777216.f) < p);
}
// Factor of the probability of (row of lse, key): 0 or 1/(1 − p).
template <class A> DEV A kept(const AttentionShape& s, i64 row, int j) {
    return dropout_keeps(s.seed, (u64)(row * s.keys + j), (float)s.drop) ? A(1. / (1. - s.drop)) : A(0);
}

template <class A> DEV A minus_infinity() { return (A)-INFINITY; }

// ------------------------------------------------------------------ f32 and f64, on the ordinary units
// 256 threads as 16 × 16; thread (ty, tx) holds rows ty + 16i and columns tx + 16j of a score tile of 16·TM squared, and
// columns in runs of VEC of an output tile of 16·TM × DP. Operand tiles lie row-major with VEC elements of padding, so a
// 16-byte read at one column by eight rows meets every bank once.
template <class T_, int DP_, int TM_> struct Simt {
    typedef T_ T;
    enum { DP = DP_, TM = TM_, ROWS = 16 * TM, VEC = 16 / sizeof(T), LD = DP + VEC, LP = ROWS + VEC, NC = DP / 16 };
    enum { TILE = ROWS * LD, PTILE = ROWS * LP };
    struct __align__(16) Vec { T v[VEC]; };

    // ROWS rows of D elements from row `t0` on into a padded tile; rows past `rows` and columns past D become zero.
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
// Over the 16 threads that share a row.
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
                  const i64* docs, const AttentionShape& s) {
    typedef typename K::T T;
    enum { TM = K::TM, ROWS = K::ROWS };
    DYN_SHARED(T, smem);
    T *qs = smem, *ks = qs + K::TILE, *ps = ks + K::TILE;
    int blocks = (int)cdiv(s.queries, ROWS), dim = (int)s.dim, T_ = (int)s.queries, S = (int)s.keys;
    i64 bh = blockIdx.x / blocks, b = bh / s.heads, h = bh % s.heads, hk = h / (s.heads / s.kv_heads);
    int i0 = (blocks - 1 - (int)(blockIdx.x % blocks)) * ROWS; // the longest rows of a causal span first
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    k += b * s.k_b + hk * s.k_h;
    v += b * s.v_b + hk * s.v_h;
    K::load(qs, q + b * s.q_b + h * s.q_h, s.q_t, i0, T_, dim);
    Seen seen[TM];
    T top[TM], z[TM], acc[TM][K::NC];
#pragma unroll
    for (int i = 0; i < TM; i++) {
        int row = i0 + ty + 16 * i;
        seen[i] = row < T_ ? visible(s, docs, row) : Seen{0, 0};
        top[i] = minus_infinity<T>();
        z[i] = 0;
#pragma unroll
        for (int c = 0; c < K::NC; c++) acc[i][c] = 0;
    }
    int j0 = visible(s, docs, i0).lo / ROWS * ROWS, end = visible(s, docs, (int)min64(i0 + ROWS, T_) - 1).hi;
    for (; j0 < end; j0 += ROWS) {
        __syncthreads(); // V of the round before is no longer read
        K::load(ks, k, s.k_t, j0, S, dim);
        cp_async_wait<0>();
        __syncthreads();
        T x[TM][TM] = {};
        K::scores(x, qs, ks);
        __syncthreads();
        K::load(ks, v, s.v_t, j0, S, dim); // V takes K's place while the softmax runs
#pragma unroll
        for (int i = 0; i < TM; i++) {
            T m = top[i];
#pragma unroll
            for (int j = 0; j < TM; j++) {
                int col = j0 + tx + 16 * j;
                x[i][j] = col >= seen[i].lo && col < seen[i].hi ? x[i][j] * (T)s.scale : minus_infinity<T>();
                m = x[i][j] > m ? x[i][j] : m;
            }
            m = row_max(m);
            // A row that has seen nothing keeps a shift of 0, so that −∞ − −∞ never occurs.
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
    K::store(out + b * s.o_b + h * s.o_h, s.o_t, i0, T_, dim, acc, inv);
}

// x: scores and dp: products grad·V of one element become the probability (dropped out: `p`) and the score's gradient.
template <class A>
DEV void back_one(const AttentionShape& s, bool in, i64 row, int j, A lse, A delta, A& x, A& dp) {
    A p = in ? exp_of(x * (A)s.scale - lse) : A(0), keep = 1;
    if (s.drop > 0. && in) keep = kept<A>(s, row, j);
    dp = in ? p * (dp * keep - delta) * (A)s.scale : A(0);
    x = p * keep;
}

template <class K>
DEV void simt_dq(const typename K::T* q, const typename K::T* k, const typename K::T* v, const typename K::T* grad,
                 const typename K::T* lse, const typename K::T* delta, const i64* docs, typename K::T* dq, const AttentionShape& s) {
    typedef typename K::T T;
    enum { TM = K::TM, ROWS = K::ROWS };
    DYN_SHARED(T, smem);
    T *qs = smem, *gs = qs + K::TILE, *ks = gs + K::TILE, *vs = ks + K::TILE, *ps = vs + K::TILE;
    int blocks = (int)cdiv(s.queries, ROWS), dim = (int)s.dim, T_ = (int)s.queries, S = (int)s.keys;
    i64 bh = blockIdx.x / blocks, b = bh / s.heads, h = bh % s.heads, hk = h / (s.heads / s.kv_heads);
    int i0 = (blocks - 1 - (int)(blockIdx.x % blocks)) * ROWS, ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    K::load(qs, q + b * s.q_b + h * s.q_h, s.q_t, i0, T_, dim);
    K::load(gs, grad + b * s.g_b + h * s.g_h, s.g_t, i0, T_, dim);
    k += b * s.k_b + hk * s.k_h;
    v += b * s.v_b + hk * s.v_h;
    Seen seen[TM];
    T l[TM], d[TM], one[TM], acc[TM][K::NC] = {};
#pragma unroll
    for (int i = 0; i < TM; i++) {
        int row = i0 + ty + 16 * i;
        seen[i] = row < T_ ? visible(s, docs, row) : Seen{0, 0};
        l[i] = row < T_ ? lse[bh * s.queries + row] : T(0);
        d[i] = row < T_ ? delta[bh * s.queries + row] : T(0);
        one[i] = 1;
    }
    int j0 = visible(s, docs, i0).lo / ROWS * ROWS, end = visible(s, docs, (int)min64(i0 + ROWS, T_) - 1).hi;
    for (; j0 < end; j0 += ROWS) {
        __syncthreads();
        K::load(ks, k, s.k_t, j0, S, dim);
        K::load(vs, v, s.v_t, j0, S, dim);
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
                back_one(s, col >= seen[i].lo && col < seen[i].hi, bh * s.queries + i0 + ty + 16 * i, col, l[i], d[i], x[i][j], dp[i][j]);
            }
        K::put(ps, dp);
        __syncthreads();
        K::mix(acc, ps, ks);
    }
    cp_async_wait<0>();
    K::store(dq + b * s.dq_b + h * s.dq_h, s.dq_t, i0, T_, dim, acc, one);
}

template <class K>
DEV void simt_dkv(const typename K::T* q, const typename K::T* k, const typename K::T* v, const typename K::T* grad,
                  const typename K::T* lse, const typename K::T* delta, const i64* docs, typename K::T* dk, typename K::T* dv,
                  const AttentionShape& s) {
    typedef typename K::T T;
    enum { TM = K::TM, ROWS = K::ROWS };
    DYN_SHARED(T, smem);
    T *qs = smem, *gs = qs + K::TILE, *ks = gs + K::TILE, *vs = ks + K::TILE, *ps = vs + K::TILE;
    int blocks = (int)cdiv(s.keys, ROWS), dim = (int)s.dim, T_ = (int)s.queries, S = (int)s.keys;
    i64 bk = blockIdx.x / blocks, b = bk / s.kv_heads, hk = bk % s.kv_heads, group = s.heads / s.kv_heads;
    int j0 = (int)(blockIdx.x % blocks) * ROWS, ty = threadIdx.x / 16, tx = threadIdx.x % 16;
    K::load(ks, k + b * s.k_b + hk * s.k_h, s.k_t, j0, S, dim);
    K::load(vs, v + b * s.v_b + hk * s.v_h, s.v_t, j0, S, dim);
    // Queries that see any key of this tile: from the first whose end lies past the tile's start to the last that
    // begins before the tile's end.
    int from = first_past<true>(s, docs, j0), end = first_past<false>(s, docs, (int)min64(j0 + ROWS, S) - 1);
    T one[TM], sk[TM][K::NC] = {}, sv[TM][K::NC] = {};
#pragma unroll
    for (int i = 0; i < TM; i++) one[i] = 1;
    for (i64 h = hk * group; h < (hk + 1) * group; h++) {
        i64 bh = b * s.heads + h;
        for (int i0 = from / ROWS * ROWS; i0 < end; i0 += ROWS) {
            __syncthreads();
            K::load(qs, q + b * s.q_b + h * s.q_h, s.q_t, i0, T_, dim);
            K::load(gs, grad + b * s.g_b + h * s.g_h, s.g_t, i0, T_, dim);
            cp_async_wait<0>();
            __syncthreads();
            T x[TM][TM] = {}, dp[TM][TM] = {}; // rows are keys, columns queries
            K::scores(x, ks, qs);
            K::scores(dp, vs, gs);
#pragma unroll
            for (int j = 0; j < TM; j++) {
                int row = i0 + tx + 16 * j;
                Seen seen = row < T_ ? visible(s, docs, row) : Seen{0, 0};
                T l = row < T_ ? lse[bh * s.queries + row] : T(0), d = row < T_ ? delta[bh * s.queries + row] : T(0);
#pragma unroll
                for (int i = 0; i < TM; i++) {
                    int col = j0 + ty + 16 * i;
                    back_one(s, col >= seen.lo && col < seen.hi, bh * s.queries + row, col, l, d, x[i][j], dp[i][j]);
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
    K::store(dk + b * s.dk_b + hk * s.dk_h, s.dk_t, j0, S, dim, sk, one);
    K::store(dv + b * s.dv_b + hk * s.dv_h, s.dv_t, j0, S, dim, sv, one);
}

// ------------------------------------------------------------------ bf16 and f16, on the tensor cores
// A warp owns 16 rows of a score tile (queries, or keys in dkv) and all its columns, so softmax rows stay within four
// lanes and a tile of probabilities becomes an operand of the next product without leaving registers. Operand tiles lie
// row-major, 16-byte chunks permuted by the row, so that an ldmatrix meets every bank once. Two stages of the tiles a
// block walks over; the next is copied while one is used, one barrier a tile.
DEV u32 pack2(float lo, float hi, bf16) { return pack_bf16x2(lo, hi); }
DEV u32 pack2(float lo, float hi, f16) { return (u32)to_f16(lo).x | (u32)to_f16(hi).x << 16; }

template <class T_, int DP_, int KEYS_, int THREADS_> struct Mma {
    typedef T_ T;
    // KEYS: rows of a tile walked over; N8: its columns of eight in a score tile.
    enum { DP = DP_, KEYS = KEYS_, THREADS = THREADS_, ROWS = THREADS_ / 2, N8 = KEYS_ / 8, O8 = DP_ / 8 };
    struct __align__(16) Chunk { T v[8]; };
    static DEVM int at(int row, int col) { return row * DP + ((col / 8 ^ (row & 7)) * 8) + col % 8; }

    // `count` rows from `t0` on; rows past `rows` and columns past `dim` become zero.
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
    // s += rows a0 .. a0 + 16 of A times all rows of B, transposed.
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
    // o += P (16 × KEYS, as the accumulators hold it) times the tile (KEYS × DP).
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
    // Rows t0 + lane / 4 (+ 8) of the output, times f.
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
DEV void mma_fwd(const typename K::T* q, const typename K::T* k, const typename K::T* v, typename K::T* out, float* lse, const i64* docs,
                 const AttentionShape& s) {
    typedef typename K::T T;
    DYN_SHARED(T, smem);
    enum { ROWS = K::ROWS, KEYS = K::KEYS, DP = K::DP };
    T *qs = smem, *kv = qs + ROWS * DP;
    int blocks = (int)cdiv(s.queries, ROWS), dim = (int)s.dim, T_ = (int)s.queries, S = (int)s.keys;
    i64 bh = blockIdx.x / blocks, b = bh / s.heads, h = bh % s.heads, hk = h / (s.heads / s.kv_heads);
    int i0 = (blocks - 1 - (int)(blockIdx.x % blocks)) * ROWS; // the longest rows of a causal span first
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = i0 + warp * 16 + lane / 4;
    k += b * s.k_b + hk * s.k_h;
    v += b * s.v_b + hk * s.v_h;
    Seen first = visible(s, docs, i0), last = visible(s, docs, (int)min64(i0 + ROWS, T_) - 1);
    Seen seen[2] = {row < T_ ? visible(s, docs, row) : Seen{0, 0}, row + 8 < T_ ? visible(s, docs, row + 8) : Seen{0, 0}};
    float o[K::O8][4] = {}, top[2] = {-INFINITY, -INFINITY}, z[2] = {0.f, 0.f}, sl2 = (float)s.scale * LOG2E;
    K::load(qs, q + b * s.q_b + h * s.q_h, s.q_t, i0, ROWS, T_, dim);
    int j0 = first.lo / KEYS * KEYS, st = 0;
    auto fetch = [&](int j, int stage) {
        if (j < last.hi) {
            K::load(kv + stage * 2 * KEYS * DP, k, s.k_t, j, KEYS, S, dim);
            K::load(kv + (stage * 2 + 1) * KEYS * DP, v, s.v_t, j, KEYS, S, dim);
        }
        cp_async_commit();
    };
    fetch(j0, 0);
    for (; j0 < last.hi; j0 += KEYS, st ^= 1) {
        cp_async_wait<0>();
        __syncthreads(); // this stage has arrived, the other is no longer read
        fetch(j0 + KEYS, st ^ 1);
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
                    if (!whole && (col < seen[r].lo || col >= seen[r].hi)) y = -INFINITY;
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
    K::store(out + b * s.o_b + h * s.o_h, s.o_t, i0 + warp * 16, T_, dim, o, inv[0], inv[1]);
}

// As back_one, with the log-sum-exp in base 2.
DEV void back_one2(const AttentionShape& s, bool in, i64 row, int j, float lse2, float delta, float& x, float& dp) {
    float p = in ? exp2f(x * ((float)s.scale * LOG2E) - lse2) : 0.f, keep = 1.f;
    if (s.drop > 0. && in) keep = kept<float>(s, row, j);
    dp = in ? p * (dp * keep - delta) * (float)s.scale : 0.f;
    x = p * keep;
}

template <class K>
DEV void mma_dq(const typename K::T* q, const typename K::T* k, const typename K::T* v, const typename K::T* grad, const float* lse,
                const float* delta, const i64* docs, typename K::T* dq, const AttentionShape& s) {
    typedef typename K::T T;
    DYN_SHARED(T, smem);
    enum { ROWS = K::ROWS, KEYS = K::KEYS, DP = K::DP };
    T *qs = smem, *gs = qs + ROWS * DP, *kv = gs + ROWS * DP;
    int blocks = (int)cdiv(s.queries, ROWS), dim = (int)s.dim, T_ = (int)s.queries, S = (int)s.keys;
    i64 bh = blockIdx.x / blocks, b = bh / s.heads, h = bh % s.heads, hk = h / (s.heads / s.kv_heads);
    int i0 = (blocks - 1 - (int)(blockIdx.x % blocks)) * ROWS;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = i0 + warp * 16 + lane / 4;
    k += b * s.k_b + hk * s.k_h;
    v += b * s.v_b + hk * s.v_h;
    int end = visible(s, docs, (int)min64(i0 + ROWS, T_) - 1).hi, j0 = visible(s, docs, i0).lo / KEYS * KEYS, st = 0;
    Seen seen[2];
    float l[2], d[2], o[K::O8][4] = {};
#pragma unroll
    for (int r = 0; r < 2; r++) {
        bool in = row + r * 8 < T_;
        seen[r] = in ? visible(s, docs, row + r * 8) : Seen{0, 0};
        l[r] = in ? lse[bh * s.queries + row + r * 8] * LOG2E : 0.f;
        d[r] = in ? delta[bh * s.queries + row + r * 8] : 0.f;
    }
    K::load(qs, q + b * s.q_b + h * s.q_h, s.q_t, i0, ROWS, T_, dim);
    K::load(gs, grad + b * s.g_b + h * s.g_h, s.g_t, i0, ROWS, T_, dim);
    auto fetch = [&](int j, int stage) {
        if (j < end) {
            K::load(kv + stage * 2 * KEYS * DP, k, s.k_t, j, KEYS, S, dim);
            K::load(kv + (stage * 2 + 1) * KEYS * DP, v, s.v_t, j, KEYS, S, dim);
        }
        cp_async_commit();
    };
    fetch(j0, 0);
    for (; j0 < end; j0 += KEYS, st ^= 1) {
        cp_async_wait<0>();
        __syncthreads();
        fetch(j0 + KEYS, st ^ 1);
        const T *ks = kv + st * 2 * KEYS * DP, *vs = ks + KEYS * DP;
        float x[K::N8][4] = {}, dp[K::N8][4] = {};
        K::scores(x, qs, warp * 16, ks);
        K::scores(dp, gs, warp * 16, vs);
#pragma unroll
        for (int j = 0; j < K::N8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int col = j0 + j * 8 + lane % 4 * 2 + e % 2, r = e / 2;
                back_one2(s, col >= seen[r].lo && col < seen[r].hi, bh * s.queries + row + r * 8, col, l[r], d[r], x[j][e], dp[j][e]);
            }
        K::mix(o, dp, ks);
    }
    cp_async_wait<0>();
    K::store(dq + b * s.dq_b + h * s.dq_h, s.dq_t, i0 + warp * 16, T_, dim, o, 1.f, 1.f);
}

// KEYS of K is here the number of queries of a tile; a warp owns 16 keys.
template <class K>
DEV void mma_dkv(const typename K::T* q, const typename K::T* k, const typename K::T* v, const typename K::T* grad, const float* lse,
                 const float* delta, const i64* docs, typename K::T* dk, typename K::T* dv, const AttentionShape& s) {
    typedef typename K::T T;
    DYN_SHARED(T, smem);
    enum { ROWS = K::ROWS, KEYS = K::KEYS, DP = K::DP };
    SHARED(float, lsd, [2][2][K::KEYS]);
    SHARED(int, bounds, [2][2][K::KEYS]);
    T *ks = smem, *vs = ks + ROWS * DP, *qg = vs + ROWS * DP;
    int blocks = (int)cdiv(s.keys, ROWS), dim = (int)s.dim, T_ = (int)s.queries, S = (int)s.keys;
    i64 bk = blockIdx.x / blocks, b = bk / s.kv_heads, hk = bk % s.kv_heads, group = s.heads / s.kv_heads;
    int j0 = (int)(blockIdx.x % blocks) * ROWS, lane = threadIdx.x % 32, warp = threadIdx.x / 32, key = j0 + warp * 16 + lane / 4;
    int from = first_past<true>(s, docs, j0) / KEYS * KEYS, end = first_past<false>(s, docs, (int)min64(j0 + ROWS, S) - 1);
    int tiles = end > from ? (int)cdiv(end - from, KEYS) : 0;
    float sk[K::O8][4] = {}, sv[K::O8][4] = {};
    K::load(ks, k + b * s.k_b + hk * s.k_h, s.k_t, j0, ROWS, S, dim);
    K::load(vs, v + b * s.v_b + hk * s.v_h, s.v_t, j0, ROWS, S, dim);
    auto fetch = [&](i64 n, int stage) {
        if (n < group * tiles) {
            i64 h = hk * group + n / tiles;
            int i0 = from + (int)(n % tiles) * KEYS, c = threadIdx.x;
            K::load(qg + stage * 2 * KEYS * DP, q + b * s.q_b + h * s.q_h, s.q_t, i0, KEYS, T_, dim);
            K::load(qg + (stage * 2 + 1) * KEYS * DP, grad + b * s.g_b + h * s.g_h, s.g_t, i0, KEYS, T_, dim);
            if (c < KEYS) {
                bool in = i0 + c < T_;
                i64 r = (b * s.heads + h) * s.queries + i0 + c;
                Seen w = in ? visible(s, docs, i0 + c) : Seen{0, 0};
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
    for (i64 n = 0; n < group * tiles; n++, st ^= 1) {
        cp_async_wait<0>();
        __syncthreads();
        fetch(n + 1, st ^ 1);
        i64 rows = (b * s.heads + hk * group + n / tiles) * s.queries + from + n % tiles * KEYS;
        const T *qs = qg + st * 2 * KEYS * DP, *gs = qs + KEYS * DP;
        float x[K::N8][4] = {}, dp[K::N8][4] = {};
        K::scores(x, ks, warp * 16, qs);
        K::scores(dp, vs, warp * 16, gs);
#pragma unroll
        for (int j = 0; j < K::N8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
                int c = j * 8 + lane % 4 * 2 + e % 2, col = key + e / 2 * 8;
                back_one2(s, col >= bounds[st][0][c] && col < bounds[st][1][c], rows + c, col, lsd[st][0][c], lsd[st][1][c], x[j][e], dp[j][e]);
            }
        K::mix(sv, x, gs);
        K::mix(sk, dp, qs);
    }
    cp_async_wait<0>();
    K::store(dk + b * s.dk_b + hk * s.dk_h, s.dk_t, j0 + warp * 16, S, dim, sk, 1.f, 1.f);
    K::store(dv + b * s.dv_b + hk * s.dv_h, s.dv_t, j0 + warp * 16, S, dim, sv, 1.f, 1.f);
}

// Σ out·grad of every query: reads 2·D elements a row, writes one.
template <class T> DEV void delta_body(const T* out, const T* grad, acc_t<T>* delta, const AttentionShape& s) {
    i64 rows = s.batch * s.heads * s.queries, step = (i64)gridDim.x * (blockDim.x / 32);
    int lane = threadIdx.x % 32;
    for (i64 r = (i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32; r < rows; r += step) {
        i64 t = r % s.queries, h = r / s.queries % s.heads, b = r / s.queries / s.heads;
        const T *o = out + b * s.o_b + t * s.o_t + h * s.o_h, *g = grad + b * s.g_b + t * s.g_t + h * s.g_h;
        acc_t<T> sum = 0;
        for (i64 c = lane; c < s.dim; c += 32) sum += to_acc(o[c]) * to_acc(g[c]);
#pragma unroll
        for (int m = 16; m > 0; m >>= 1) sum += __shfl_xor_sync(FULL_MASK, sum, m);
        if (lane == 0) delta[r] = sum;
    }
}

#define FWD_ARGS(T) const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v, T *__restrict__ out, \
    acc_t<T> *__restrict__ lse, const i64 *__restrict__ docs, AttentionShape s
#define BACK_ARGS(T) const T *__restrict__ q, const T *__restrict__ k, const T *__restrict__ v, const T *__restrict__ grad, \
    const acc_t<T> *__restrict__ lse, const acc_t<T> *__restrict__ delta, const i64 *__restrict__ docs
#define SIMT_ATTENTION(SUFFIX, T, DP, TF, TB) \
    extern "C" __global__ void __launch_bounds__(256, 1) attention_fwd_##SUFFIX(FWD_ARGS(T)) { simt_fwd<Simt<T, DP, TF>>(q, k, v, out, lse, docs, s); } \
    extern "C" __global__ void __launch_bounds__(256, 1) attention_dq_##SUFFIX(BACK_ARGS(T), T* dq, AttentionShape s) { simt_dq<Simt<T, DP, TB>>(q, k, v, grad, lse, delta, docs, dq, s); } \
    extern "C" __global__ void __launch_bounds__(256, 1) attention_dkv_##SUFFIX(BACK_ARGS(T), T* dk, T* dv, AttentionShape s) { simt_dkv<Simt<T, DP, TB>>(q, k, v, grad, lse, delta, docs, dk, dv, s); }
SIMT_ATTENTION(d64_f32, float, 64, 4, 4)
SIMT_ATTENTION(d128_f32, float, 128, 4, 2)
SIMT_ATTENTION(d64_f64, double, 64, 2, 2)
SIMT_ATTENTION(d128_f64, double, 128, 2, 1)
#define MMA_ATTENTION(SUFFIX, T, DP, KB) \
    extern "C" __global__ void __launch_bounds__(256, 1) attention_fwd_##SUFFIX(FWD_ARGS(T)) { mma_fwd<Mma<T, DP, 64, 256>>(q, k, v, out, lse, docs, s); } \
    extern "C" __global__ void __launch_bounds__(128, 1) attention_dq_##SUFFIX(BACK_ARGS(T), T* dq, AttentionShape s) { mma_dq<Mma<T, DP, KB, 128>>(q, k, v, grad, lse, delta, docs, dq, s); } \
    extern "C" __global__ void __launch_bounds__(128, 1) attention_dkv_##SUFFIX(BACK_ARGS(T), T* dk, T* dv, AttentionShape s) { mma_dkv<Mma<T, DP, KB, 128>>(q, k, v, grad, lse, delta, docs, dk, dv, s); }
MMA_ATTENTION(d64_bf16, bf16, 64, 64)
MMA_ATTENTION(d128_bf16, bf16, 128, 32)
MMA_ATTENTION(d64_f16, f16, 64, 64)
MMA_ATTENTION(d128_f16, f16, 128, 32)
#define DELTA(S, T) \
    extern "C" __global__ void __launch_bounds__(256) attention_delta_##S(const T *__restrict__ out, const T *__restrict__ grad, acc_t<T> *__restrict__ delta, AttentionShape s) { delta_body<T>(out, grad, delta, s); }
DELTA(f32, float)
DELTA(f64, double)
DELTA(bf16, bf16)
DELTA(f16, f16)
