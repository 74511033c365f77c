#include "prelude.cuh"
// Factored gradients: squared norms of per-sample gradients that are never stored, clip factors, weighted row sums.
// (The weighted sum of an outer-product factor is gemm_tn_* with weights; that of a lookup is the backward pass of the embedding.)
//
// A sample's rows are offsets[i] .. offsets[i + 1], or i·each .. (i + 1)·each if offsets is null; row n of that list is row order[n] of the
// operands, or n itself if order is null. Samples may be empty, of any length, in any number. offsets: const i64*, order: const u32*. Norms
// are f64: tiles are computed in the operands' accumulation type, products of two tiles and squares are added in f64.
//
// Every norm kernel writes partial sums part[y·gridDim.x + x] (f64, one for each block and sample) and norms_sum adds each sample's in
// order, so that results have the same bits on every run with the same grid. Grid x: the work of one sample, with any number of blocks (in
// a block-stride loop; surplus blocks write zeros, so that the host need not have the lengths of ragged samples); grid y: samples, at most
// 65535 (strided). part must hold count·gridDim.x values. Block 256.
//
//   factor_gram_{f32,f64} (l1, r1, l2, r2, ids1, ids2, off1, off2, ord1, ord2, part, GramShape)
//       dynamic shared memory 34 880 bytes. x: tiles of 128 (f64: 64) squared of a pair of samples, ⌈T/TILE⌉·(⌈T/TILE⌉+1)/2
//       when same, ⌈T₁/TILE⌉·⌈T₂/TILE⌉ else.
//       Σ over rows t of sample i of 1 and s of sample j of 2 of (l1ₜ·l2ₛ)·qₜₛ, where qₜₛ is
//         PAIR_PRODUCT   r1ₜ·r2ₛ                    outer product; with ids also only where ids1[t] = ids2[s] (grouped)
//         PAIR_ONE       1                          lookup: ids1[t] = ids2[s]
//         PAIR_GATHER    r2[s, ids1[t]]             lookup (1) against outer product (2: l2 = right, r2 = left)
//       nl1, nr1, nl2, nr2: the rows' norms (factor_row_norms), if `off` is not null: it receives, in the layout of part, a bound on the
//       errors of the dot products. A dot product over d columns has an error of at most gamma = (d + 2)·u times the norms of both rows.
//       same = 1: 1 and 2 are one factor and i = j: tiles above the diagonal are skipped, those below count twice.
//       all_pairs = 1: y runs over count1·count2 pairs (i, j); else i = j = y.
//       FLOPs T₁·T₂·2(r + c), half of it when same; a tile without equal ids costs 64 comparisons per thread.
//   factor_direct_{f32,f64} (left, right, group, offsets, order, part, DirectShape)
//       dynamic shared memory 33 856 bytes. x: tiles of the r × c gradient. |Σₜ leftₜ ⊗ rightₜ|²; with group (const u32*, of row
//       n of the operands) one such term for each run of equal groups: a sample's rows of one group must be consecutive.
//       FLOPs 2·T·r·c: the better form if T(r + c) > 2·r·c. If sq is not null, samples with off[i] ≤ share·sq[i] are skipped;
//       norms_replace replaces the norms of the others by the sums of their parts.
//   factor_rows_{f32,f64,bf16,f16} (grad, scale, offsets, order, part, RowsShape)
//       128 bytes of shared memory. x: columns / 256. |Σₜ gradₜ (⊙ scaleₜ)|²; scale may be null. Per-sample factors are
//       the same with each = 1. Reads its operands once.
//   norms_sum (part, sq, count, width, factor, accumulate): sq[i] (+)= factor·Σ part[i·width ..]. Any grid (one warp per sample).
//   norms_replace (part, sq, off, count, width, share): if off[i] > share·sq[i] or either is NaN, sq[i] = Σ part[i·width ..] and
//       off[i] = 0. Any grid (one warp per sample).
//   factor_row_norms_{f32,f64} (x, scale, out, rows, width): out[n] = |xₙ (⊙ scaleₙ)|, f64; scale may be null. Any grid (one warp per row).
//   factor_reach (nl, nr, offsets, order, reach, count, each, accumulate): reach[i] (+)= Σₜ nl[t]·nr[t] over the sample's rows; nr may be
//       null, which stands for ones. Any grid (one warp per sample).
//   norms_bound (sq, off, reach, out, BoundShape): out[i] (+)= up·(√(sq + off + second·reach²) + gamma·reach)². Any grid.
//   clip_weights_{f32,f64} (sq, w, stats, ClipShape): one block of 256. wᵢ as privacy::ClipFn::factor; a non-finite norm
//       gives 0. stats (u64[3], or null) += samples, clipped ones, non-finite ones.
//   factor_rowsum_{f32,f64,bf16,f16} (grad, scale, w, owner, part, RowSumShape): grid (⌈p/32⌉, chunks ≤ 65535), block 256, 1 KiB (f64 2)
//       shared. part[chunk, p] = Σ over the chunk's rows of w·grad (⊙ scale); w (acc*) null = 1; rows of weight 0 are skipped.
//   factor_rowsum_add_{f32,f64} (part, out, chunks, p, accumulate): out[p] (+)= Σ of chunks in order. Any grid.

enum { PAIR_PRODUCT, PAIR_ONE, PAIR_GATHER };
struct GramShape {
    i64 rd, cd;                     // columns of l and of r (PAIR_PRODUCT)
    i64 l1_rs, r1_rs, l2_rs, r2_rs; // strides between rows
    i64 count1, count2, each1, each2;
    i32 kind, same, all_pairs, reserved;
    double gamma_l, gamma_r, least_l, least_r; // gamma: error of dot products over l and r, relative to the rows' norms; least: absolute
};
struct DirectShape { i64 rd, cd, l_rs, r_rs, count, each; double share; };
struct BoundShape { i64 count; double up, gamma, second; i64 accumulate; };
struct RowsShape { i64 width, g_rs, s_rs, count, each; };
struct ClipShape { i64 count; double threshold, gamma; i32 kind, reserved; };
struct RowSumShape { i64 rows, width, chunk, g_rs, s_rs, each; }; // chunk: rows of one partial sum; each: as KScale
enum { CLIP_ABADI, CLIP_REPARAMETERISED, CLIP_AUTO_V, CLIP_AUTO_S, CLIP_GLOBAL };

// The rows of one sample.
struct Sample {
    i64 begin, rows;
    const u32* order; // from its first row on, or null
    DEVM i64 row(i64 t) const { return order ? (i64)order[t] : begin + t; }
    // Its rows from `from` on, as one side of a product over columns, and as the contraction of one.
    template <class T> DEVM Operand<T> outer(const T* p, i64 rs, i64 from) const {
        return {order ? p : p + (begin + from) * rs, rs, 1, rows - from, order ? order + from : nullptr, nullptr};
    }
    template <class T> DEVM Operand<T> inner(const T* p, i64 rs, i64 col, i64 cols) const {
        return {order ? p + col : p + begin * rs + col, 1, rs, cols - col, nullptr, order};
    }
};
DEV Sample sample(const i64* offsets, i64 each, const u32* order, i64 i) {
    i64 a = offsets ? offsets[i] : i * each, b = offsets ? offsets[i + 1] : a + each;
    return {a, b - a, order ? order + a : nullptr};
}

// Dynamic shared memory of a block, in bytes: a tile's, the ids of its rows, and eight numbers of a sum.
constexpr int GRAM_SHARED = 34880;
constexpr int DIRECT_SHARED = 33856;

template <class Tile>
DEV void gram_body(const typename Tile::T* l1, const typename Tile::T* r1, const typename Tile::T* l2, const typename Tile::T* r2,
                   const u32* ids1, const u32* ids2, const i64* off1, const i64* off2, const u32* ord1, const u32* ord2,
                   double* part, const double* nl1, const double* nr1, const double* nl2, const double* nr2, double* off,
                   const GramShape& s) {
    typedef typename Tile::T T;
    typedef typename Tile::Acc Acc;
    enum { M = Tile::M, N = Tile::N, R = M / N };
    static_assert(Tile::SMEM + 8 * M + 64 <= GRAM_SHARED, "GRAM_SHARED is too small");
    DYN_SHARED(char, smem);
    u32 *id1 = (u32*)(smem + Tile::SMEM), *id2 = id1 + M;
    double* red = (double*)(smem + Tile::SMEM + 8 * M);
    const KScale<Acc> plain = {nullptr, nullptr, 1};
    bool match = ids1 && s.kind != PAIR_GATHER;
    for (i64 y = blockIdx.y; y < (s.all_pairs ? s.count1 * s.count2 : s.count1); y += gridDim.y) {
        Sample a = sample(off1, s.each1, ord1, s.all_pairs ? y / s.count2 : y);
        Sample b = sample(off2, s.each2, ord2, s.all_pairs ? y % s.count2 : y);
        i64 n1 = cdiv(a.rows, M), n2 = cdiv(b.rows, N);
        // Same factor: row i of the triangle has R(i + 1) tiles; the last row may have fewer.
        i64 tiles = s.same ? n1 * (n1 - 1) / 2 * R + n2 : n1 * n2;
        double sum = 0, error = 0;
        for (i64 x = blockIdx.x; x < tiles; x += gridDim.x) {
            i64 ti = s.same ? 0 : x / n2, tj = s.same ? x : x % n2;
            if (s.same)
                while (tj >= (ti + 1) * R) tj -= ++ti * R;
            i64 t0 = ti * M, s0 = tj * N;
            if (ids1) {
                __syncthreads();
                int e = threadIdx.x;
                if (e < M) id1[e] = t0 + e < a.rows ? ids1[a.row(t0 + e)] : 0u;
                else if (e < M + N && match) id2[e - M] = s0 + e - M < b.rows ? ids2[b.row(s0 + e - M)] : 0u;
                __syncthreads();
                if (match) {
                    int any = 0, i = e % M, live1 = (int)min64(M, a.rows - t0), live2 = (int)min64(N, b.rows - s0);
                    if (i < live1)
                        for (int j = e / M; j < live2; j += 256 / M) any |= id1[i] == id2[j];
                    if (!__syncthreads_or(any)) continue;
                }
            }
            Tile p, q;
            p.zero();
            q.zero();
            p.run(smem, a.outer(l1, s.l1_rs, t0), b.outer(l2, s.l2_rs, s0), 0, s.rd, plain);
            if (s.kind == PAIR_PRODUCT) q.run(smem, a.outer(r1, s.r1_rs, t0), b.outer(r2, s.r2_rs, s0), 0, s.cd, plain);
            p.with(q, [&](int i, int j, Acc u, Acc v) {
                i64 t = t0 + i, w = s0 + j;
                if (t >= a.rows || w >= b.rows || (s.same && w > t) || (match && id1[i] != id2[j])) return;
                double f = s.kind == PAIR_ONE ? 1. : (double)v;
                if (s.kind == PAIR_GATHER) f = (double)to_acc(r2[b.row(w) * s.r2_rs + id1[i]]);
                double twice = s.same && w < t ? 2. : 1.;
                sum += twice * (double)u * f;
                if (off) {
                    double size = fabs((double)u), e = (s.gamma_l * nl1[a.row(t)] * nl2[b.row(w)] + s.least_l) * fabs(f);
                    if (s.kind == PAIR_PRODUCT) e += (s.gamma_r * nr1[a.row(t)] * nr2[b.row(w)] + s.least_r) * size;
                    error += twice * (1.01 * e + 1e-13 * size * fabs(f));
                }
            });
        }
        sum = block_sum_256(sum, red);
        if (threadIdx.x == 0) part[y * gridDim.x + blockIdx.x] = sum;
        if (off) {
            error = block_sum_256(error, red);
            if (threadIdx.x == 0) off[y * gridDim.x + blockIdx.x] = error;
        }
    }
}

template <class Tile>
DEV void direct_body(const typename Tile::T* left, const typename Tile::T* right, const u32* group, const i64* offsets,
                     const u32* order, double* part, const double* sq, const double* off, const DirectShape& s) {
    typedef typename Tile::Acc Acc;
    static_assert(Tile::SMEM + 64 <= DIRECT_SHARED, "DIRECT_SHARED is too small");
    DYN_SHARED(char, smem);
    double* red = (double*)(smem + Tile::SMEM);
    const KScale<Acc> plain = {nullptr, nullptr, 1};
    i64 tn = cdiv(s.cd, Tile::N), tiles = cdiv(s.rd, Tile::M) * tn;
    for (i64 y = blockIdx.y; y < s.count; y += gridDim.y) {
        if (sq && off[y] <= s.share * sq[y]) continue;
        Sample a = sample(offsets, s.each, order, y);
        double sum = 0;
        for (i64 x = blockIdx.x; x < tiles; x += gridDim.x) {
            Operand<typename Tile::T> l = a.inner(left, s.l_rs, x / tn * Tile::M, s.rd), r = a.inner(right, s.r_rs, x % tn * Tile::N, s.cd);
            for (i64 k = 0; k < a.rows;) {
                i64 end = a.rows;
                if (group) {
                    u32 g = group[a.row(k)];
                    for (end = k + 1; end < a.rows && group[a.row(end)] == g;) end++;
                }
                Tile t;
                t.zero();
                t.run(smem, l, r, k, end, plain);
                t.with(t, [&](int, int, Acc u, Acc) { sum += (double)u * (double)u; }); // beyond the edges the tile is zero
                k = end;
            }
        }
        sum = block_sum_256(sum, red);
        if (threadIdx.x == 0) part[y * gridDim.x + blockIdx.x] = sum;
    }
}

template <class T>
DEV void rows_body(const T* grad, const T* scale, const i64* offsets, const u32* order, double* part, const RowsShape& s) {
    SHARED(double, red, [8]);
    for (i64 y = blockIdx.y; y < s.count; y += gridDim.y) {
        Sample a = sample(offsets, s.each, order, y);
        double sum = 0;
        for (i64 c = (i64)blockIdx.x * 256 + threadIdx.x; c < s.width; c += (i64)gridDim.x * 256) {
            acc_t<T> v = 0;
            for (i64 t = 0; t < a.rows; t++) {
                i64 row = a.row(t);
                acc_t<T> g = to_acc(grad[row * s.g_rs + c]);
                v += scale ? g * to_acc(scale[row * s.s_rs + c]) : g;
            }
            sum += (double)v * (double)v;
        }
        sum = block_sum_256(sum, red);
        if (threadIdx.x == 0) part[y * gridDim.x + blockIdx.x] = sum;
    }
}

#define GRAM(NAME, TILE, T) \
    extern "C" __global__ void __launch_bounds__(256, 1) NAME(const T *__restrict__ l1, const T *__restrict__ r1, const T *__restrict__ l2, const T *__restrict__ r2, \
        const u32 *__restrict__ ids1, const u32 *__restrict__ ids2, const i64 *__restrict__ off1, const i64 *__restrict__ off2, \
        const u32 *__restrict__ ord1, const u32 *__restrict__ ord2, double *__restrict__ part, const double *__restrict__ nl1, const double *__restrict__ nr1, \
        const double *__restrict__ nl2, const double *__restrict__ nr2, double *__restrict__ off, GramShape s) { \
        gram_body<TILE>(l1, r1, l2, r2, ids1, ids2, off1, off2, ord1, ord2, part, nl1, nr1, nl2, nr2, off, s); }
#define DIRECT(NAME, TILE, T) \
    extern "C" __global__ void __launch_bounds__(256, 1) NAME(const T *__restrict__ left, const T *__restrict__ right, const u32 *__restrict__ group, \
        const i64 *__restrict__ offsets, const u32 *__restrict__ order, double *__restrict__ part, const double *__restrict__ sq, \
        const double *__restrict__ off, DirectShape s) { direct_body<TILE>(left, right, group, offsets, order, part, sq, off, s); }
#define COMMA ,
GRAM(factor_gram_f32, SimtTile<float COMMA true COMMA true>, float)
GRAM(factor_gram_f64, SimtTile<double COMMA true COMMA true>, double)
DIRECT(factor_direct_f32, SimtTile<float COMMA false COMMA false>, float)
DIRECT(factor_direct_f64, SimtTile<double COMMA false COMMA false>, double)
#define ROWS(S, T) \
    extern "C" __global__ void __launch_bounds__(256) factor_rows_##S(const T *__restrict__ grad, const T *__restrict__ scale, const i64 *__restrict__ offsets, \
        const u32 *__restrict__ order, double *__restrict__ part, RowsShape s) { rows_body<T>(grad, scale, offsets, order, part, s); }
ROWS(f32, float)
ROWS(f64, double)

extern "C" __global__ void __launch_bounds__(256) norms_sum(const double* __restrict__ part, double* sq, i64 count, i64 width, double factor, i32 accumulate) {
    int lane = threadIdx.x % 32;
    for (i64 i = ((i64)blockIdx.x * 256 + threadIdx.x) / 32; i < count; i += (i64)gridDim.x * 8) {
        double v = 0;
        for (i64 x = lane; x < width; x += 32) v += part[i * width + x];
#pragma unroll
        for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(FULL_MASK, v, o);
        if (lane == 0) sq[i] = factor * v + (accumulate ? sq[i] : 0.);
    }
}

extern "C" __global__ void __launch_bounds__(256) norms_replace(const double* __restrict__ part, double* sq, double* off, i64 count, i64 width, double share) {
    int lane = threadIdx.x % 32;
    for (i64 i = ((i64)blockIdx.x * 256 + threadIdx.x) / 32; i < count; i += (i64)gridDim.x * 8) {
        if (off[i] <= share * sq[i]) continue;
        double v = 0;
        for (i64 x = lane; x < width; x += 32) v += part[i * width + x];
#pragma unroll
        for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(FULL_MASK, v, o);
        __syncwarp();
        if (lane == 0) {
            sq[i] = v;
            off[i] = 0.;
        }
    }
}
template <class T> DEV void row_norms_body(const T* x, const T* scale, double* out, i64 rows, i64 width) {
    int lane = threadIdx.x % 32;
    for (i64 n = ((i64)blockIdx.x * 256 + threadIdx.x) / 32; n < rows; n += (i64)gridDim.x * 8) {
        double v = 0;
        for (i64 c = lane; c < width; c += 32) {
            double g = (double)x[n * width + c] * (scale ? (double)scale[n * width + c] : 1.);
            v += g * g;
        }
#pragma unroll
        for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(FULL_MASK, v, o);
        if (lane == 0) out[n] = sqrt(v);
    }
}
extern "C" __global__ void __launch_bounds__(256) factor_row_norms_f32(const float* __restrict__ x, const float* __restrict__ scale, double* __restrict__ out, i64 rows, i64 width) { row_norms_body(x, scale, out, rows, width); }
extern "C" __global__ void __launch_bounds__(256) factor_row_norms_f64(const double* __restrict__ x, const double* __restrict__ scale, double* __restrict__ out, i64 rows, i64 width) { row_norms_body(x, scale, out, rows, width); }
extern "C" __global__ void __launch_bounds__(256) factor_reach(const double* __restrict__ nl, const double* __restrict__ nr, const i64* __restrict__ offsets,
        const u32* __restrict__ order, double* reach, i64 count, i64 each, i32 accumulate) {
    int lane = threadIdx.x % 32;
    for (i64 i = ((i64)blockIdx.x * 256 + threadIdx.x) / 32; i < count; i += (i64)gridDim.x * 8) {
        Sample a = sample(offsets, each, order, i);
        double v = 0;
        for (i64 t = lane; t < a.rows; t += 32) v += nl[a.row(t)] * (nr ? nr[a.row(t)] : 1.);
#pragma unroll
        for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(FULL_MASK, v, o);
        if (lane == 0) reach[i] = v + (accumulate ? reach[i] : 0.);
    }
}
// As autograd::factor::Norm::bound on the CPU. A NaN norm stays NaN.
extern "C" __global__ void __launch_bounds__(256) norms_bound(const double* __restrict__ sq, const double* __restrict__ off, const double* __restrict__ reach,
        double* out, BoundShape s) {
    for (i64 i = (i64)blockIdx.x * 256 + threadIdx.x; i < s.count; i += (i64)gridDim.x * 256) {
        double far = reach[i], v = sq[i] < 0. ? 0. : sq[i];
        double n = sqrt(v + off[i] + s.second * far * far) + s.gamma * far;
        out[i] = s.up * n * n + (s.accumulate ? out[i] : 0.);
    }
}

// A weight is rounded towards zero, so that no clipped gradient exceeds the clipping threshold.
DEV double toward_zero(double f, double) { return f; }
DEV float toward_zero(double f, float) {
    float w = (float)f;
    return (double)w > f ? __uint_as_float(bits_of(w) - 1) : w;
}
// B values in, B out: the launch dominates. Rounding of a cross term may leave a square slightly below zero, which counts as zero. A NaN
// stays NaN and is counted.
template <class A> DEV void clip_body(const double* sq, A* w, u64* stats, const ClipShape& s) {
    SHARED(double, red, [8]);
    double clipped = 0, broken = 0;
    for (i64 i = threadIdx.x; i < s.count; i += 256) {
        double x = sq[i] < 0. ? 0. : sq[i], n = sqrt(x), f = 0;
        if (n - n == 0.) { // finite
            switch (s.kind) {
            case CLIP_ABADI: f = n <= s.threshold ? 1. : s.threshold / n; break;
            case CLIP_REPARAMETERISED: f = 1. / (n > s.threshold ? n : s.threshold); break;
            case CLIP_AUTO_V: f = n == 0. ? 0. : s.threshold / n; f = f < 1e30 ? f : 1e30; break;
            case CLIP_AUTO_S: f = s.threshold / (n + s.gamma); break;
            default: f = n <= s.threshold ? 1. : 0.;
            }
            clipped += n > s.threshold;
        } else broken += 1;
        w[i] = toward_zero(f, A());
    }
    clipped = block_sum_256(clipped, red);
    broken = block_sum_256(broken, red);
    if (stats && threadIdx.x == 0) {
        stats[0] += (u64)s.count;
        stats[1] += (u64)clipped;
        stats[2] += (u64)broken;
    }
}
extern "C" __global__ void __launch_bounds__(256) clip_weights_f32(const double* __restrict__ sq, float* __restrict__ w, u64* stats, ClipShape s) { clip_body<float>(sq, w, stats, s); }
extern "C" __global__ void __launch_bounds__(256) clip_weights_f64(const double* __restrict__ sq, double* __restrict__ w, u64* stats, ClipShape s) { clip_body<double>(sq, w, stats, s); }

template <class T>
DEV void rowsum_body(const T* grad, const T* scale, const acc_t<T>* w, const u32* owner, acc_t<T>* part, const RowSumShape& s) {
    typedef acc_t<T> A;
    SHARED(A, red, [8][32]);
    const KScale<A> weight = {w, owner, s.each};
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    i64 c = (i64)blockIdx.x * 32 + lane, from = blockIdx.y * s.chunk, end = min64(from + s.chunk, s.rows);
    A v = 0;
    for (i64 r = from + warp; r < end && c < s.width; r += 8) {
        A f = w ? weight.at(r) : A(1);
        if (f == A(0)) continue;
        A g = to_acc(grad[r * s.g_rs + c]);
        v += f * (scale ? g * to_acc(scale[r * s.s_rs + c]) : g);
    }
    red[warp][lane] = v;
    __syncthreads();
    if (warp == 0 && c < s.width) {
        for (int i = 1; i < 8; i++) v += red[i][lane];
        part[blockIdx.y * s.width + c] = v;
    }
}
#define ROWSUM(S, T) \
    extern "C" __global__ void __launch_bounds__(256) factor_rowsum_##S(const T *__restrict__ grad, const T *__restrict__ scale, const acc_t<T> *__restrict__ w, \
        const u32 *__restrict__ owner, acc_t<T> *__restrict__ part, RowSumShape s) { rowsum_body<T>(grad, scale, w, owner, part, s); }
ROWSUM(f32, float)
ROWSUM(f64, double)

template <class A> DEV void rowsum_add(const A* part, A* out, i64 chunks, i64 width, i32 accumulate) {
    for (i64 c = (i64)blockIdx.x * 256 + threadIdx.x; c < width; c += (i64)gridDim.x * 256) {
        A v = accumulate ? out[c] : A(0);
        for (i64 i = 0; i < chunks; i++) v += part[i * width + c];
        out[c] = v;
    }
}
extern "C" __global__ void __launch_bounds__(256) factor_rowsum_add_f32(const float* __restrict__ part, float* out, i64 chunks, i64 width, i32 accumulate) { rowsum_add(part, out, chunks, width, accumulate); }
extern "C" __global__ void __launch_bounds__(256) factor_rowsum_add_f64(const double* __restrict__ part, double* out, i64 chunks, i64 width, i32 accumulate) { rowsum_add(part, out, chunks, width, accumulate); }
