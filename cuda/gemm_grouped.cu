#include "prelude.cuh"
// Grouped products: rows sorted by group, with one matrix for each group (the experts of a mixture). Group e has rows offsets[e] ..
// offsets[e + 1], which only the device has; empty groups are allowed and cost nothing.
//
//   grouped_rows_{n,t}_{f32,f64} (x, w, y, bias, pre, offsets, index, GroupedRows)
//       y[r] = act(x[r]·W_e + bias_e) for every row r of every group: the forward pass (W_e is k × n) and, with W read
//       transposed, the input's gradient. n: unit stride along n (w_cs = 1), t: along k (w_rs = 1).
//       index (const u32*, or null): row r of x is x[index[r]] (dispatch without a copy). bias [groups, n] and pre as in
//       gemm.cu, or null.
//       Grid x: any number of blocks; tiles are found by a scan of the offsets and processed in a block-stride loop, so that the host
//       need not have a count. With (⌈N/TILE⌉ + groups)·⌈n/TILE⌉ blocks each block has its own tile; with a few blocks per
//       multiprocessor the kernel is persistent. Finding a tile costs ⌈groups/32⌉ warp scans.
//   grouped_weight_{f32,f64} (left, right, out, w, owner, offsets, lindex, rindex, GroupedWeight)
//       out[e] (+)= Σ over rows r of e of w_r·left[r] ⊗ right[r], r × c each: the weight's gradient, or its clipped sum with
//       weights w as in gemm.cu (by row number; null = 1). A group without rows gets zeros (or is unchanged when
//       accumulating). lindex, rindex as index above.
//       Grid x: ⌈rd/TILE⌉·⌈cd/TILE⌉ or fewer (strided), y: groups or fewer (strided).
//
// Tensor cores: grouped_rows_{n,t}_{bf16,f16,tf32} (all of one type; tf32 is f32 outside), grouped_weight_{bf16,f16,tf32} (out f32).
//
// Block 256, TILE and dynamic shared memory as in gemm.cu: f32 128, f64 64, both 33 792 bytes; tensor cores 128, 65 536. 2·N·k·n FLOPs
// whatever the number of groups; a group's last row tile is masked, which wastes the work of TILE/2 rows per group on average. No register
// spills; grouped_rows_* use at most 128 registers, with two blocks per multiprocessor (n_tf32 one), grouped_weight_* one block.

struct GroupedRows {
    i64 groups, n, k;
    i64 x_rs, y_rs;       // strides between rows; y and pre have unit stride along columns
    i64 w_s, w_rs, w_cs;  // strides between groups, along k, along n
    i32 act, accumulate;
};
struct GroupedWeight {
    i64 groups, rd, cd;
    i64 l_rs, r_rs;       // strides between rows
    i64 o_s, o_rs;        // strides of out between groups and between rows
    i64 each;             // as KScale
    i32 accumulate, reserved;
};

// Finds the group of tile number `tile`, and the tile's number within it; false past the last tile. Every warp computes the same.
DEV bool find_tile(const i64* offsets, i64 groups, i64 m, i64 columns, i64& tile, i64& group) {
    int lane = threadIdx.x % 32;
    for (i64 e0 = 0; e0 < groups; e0 += 32) {
        i64 e = e0 + lane, mine = e < groups ? cdiv(offsets[e + 1] - offsets[e], m) * columns : 0, upto = mine;
#pragma unroll
        for (int o = 1; o < 32; o <<= 1) {
            i64 v = __shfl_up_sync(FULL_MASK, upto, o);
            if (lane >= o) upto += v;
        }
        u32 past = __ballot_sync(FULL_MASK, upto > tile);
        if (past) {
            int at = __ffs((int)past) - 1;
            tile -= __shfl_sync(FULL_MASK, upto - mine, at);
            group = e0 + at;
            return true;
        }
        tile -= __shfl_sync(FULL_MASK, upto, 31);
    }
    return false;
}

template <class Tile, class O>
DEV void grouped_rows_body(const typename Tile::T* x, const typename Tile::T* w, O* y, const O* bias, O* pre, const i64* offsets,
                           const u32* index, const GroupedRows& s) {
    typedef typename Tile::T T;
    DYN_SHARED(char, smem);
    SHARED(i64, place, [4]);
    const KScale<typename Tile::Acc> plain = {nullptr, nullptr, 1};
    i64 columns = cdiv(s.n, Tile::N);
    for (i64 number = blockIdx.x;; number += gridDim.x) {
        i64 tile = number, e = 0;
        if (!find_tile(offsets, s.groups, Tile::M, columns, tile, e)) break;
        i64 begin = offsets[e], rows = offsets[e + 1] - begin, strips = cdiv(rows, Tile::M);
        i64 m0 = tile % strips * Tile::M, n0 = tile / strips * Tile::N; // row tiles first: they share W's strip
        Operand<T> a = {index ? x : x + (begin + m0) * s.x_rs, s.x_rs, 1, rows - m0, index ? index + begin + m0 : nullptr, nullptr};
        Operand<T> b = {w + e * s.w_s + n0 * s.w_cs, s.w_cs, s.w_rs, s.n - n0, nullptr, nullptr};
        // The values that the epilogue needs are stored in shared memory, as in gemm.cu.
        __syncthreads();
        if (threadIdx.x == 0) {
            place[0] = begin + m0;
            place[1] = begin + rows;
            place[2] = n0;
            place[3] = e * s.n;
        }
        Tile t;
        t.zero();
        t.run(smem, a, b, 0, s.k, plain);
        t.each(smem, [&](int r, int j, typename Tile::Acc v) {
            i64 row = place[0] + r, col = place[2] + j;
            if (row >= place[1] || col >= s.n) return;
            i64 at = row * s.y_rs + col;
            if (s.accumulate) v += to_acc(y[at]);
            if (bias) v += to_acc(bias[place[3] + col]);
            if (pre) pre[at] = from_acc<O>(v);
            y[at] = from_acc<O>(activate(s.act, v));
        });
    }
}

template <class Tile, class O>
DEV void grouped_weight_body(const typename Tile::T* left, const typename Tile::T* right, O* out, const acc_t<O>* w, const u32* owner,
                             const i64* offsets, const u32* lindex, const u32* rindex, const GroupedWeight& s) {
    typedef typename Tile::T T;
    DYN_SHARED(char, smem);
    const KScale<typename Tile::Acc> scale = {w, owner, s.each};
    i64 tn = cdiv(s.cd, Tile::N), tiles = cdiv(s.rd, Tile::M) * tn;
    for (i64 e = blockIdx.y; e < s.groups; e += gridDim.y) {
        i64 begin = offsets[e], end = offsets[e + 1];
        if (begin == end && s.accumulate) continue;
        for (i64 x = blockIdx.x; x < tiles; x += gridDim.x) {
            i64 m0 = x / tn * Tile::M, n0 = x % tn * Tile::N;
            Operand<T> a = {left + m0, 1, s.l_rs, s.rd - m0, nullptr, lindex}, b = {right + n0, 1, s.r_rs, s.cd - n0, nullptr, rindex};
            Tile t;
            t.zero();
            t.run(smem, a, b, begin, end, scale);
            t.each(smem, [&](int r, int j, typename Tile::Acc v) {
                if (m0 + r >= s.rd || n0 + j >= s.cd) return;
                i64 at = e * s.o_s + (m0 + r) * s.o_rs + n0 + j;
                if (s.accumulate) v += to_acc(out[at]);
                out[at] = from_acc<O>(v);
            });
        }
    }
}

#define COMMA ,
#define GROUPED_ROWS(NAME, TILE, T, O, BLOCKS) \
    extern "C" __global__ void __launch_bounds__(256, BLOCKS) NAME(const T *__restrict__ x, const T *__restrict__ w, O *y, const O *__restrict__ bias, O *pre, \
        const i64 *__restrict__ offsets, const u32 *__restrict__ index, GroupedRows s) { grouped_rows_body<TILE, O>(x, w, y, bias, pre, offsets, index, s); }
#define GROUPED_WEIGHT(NAME, TILE, T, O) \
    extern "C" __global__ void __launch_bounds__(256, 1) NAME(const T *__restrict__ left, const T *__restrict__ right, O *out, const acc_t<O> *__restrict__ w, \
        const u32 *__restrict__ owner, const i64 *__restrict__ offsets, const u32 *__restrict__ lindex, const u32 *__restrict__ rindex, GroupedWeight s) { \
        grouped_weight_body<TILE, O>(left, right, out, w, owner, offsets, lindex, rindex, s); }
GROUPED_ROWS(grouped_rows_n_f32, SimtTile<float COMMA true COMMA false>, float, float, 2)
GROUPED_ROWS(grouped_rows_t_f32, SimtTile<float COMMA true COMMA true>, float, float, 2)
GROUPED_ROWS(grouped_rows_n_f64, SimtTile<double COMMA true COMMA false>, double, double, 2)
GROUPED_ROWS(grouped_rows_t_f64, SimtTile<double COMMA true COMMA true>, double, double, 2)
GROUPED_WEIGHT(grouped_weight_f32, SimtTile<float COMMA false COMMA false>, float, float)
GROUPED_WEIGHT(grouped_weight_f64, SimtTile<double COMMA false COMMA false>, double, double)
GROUPED_ROWS(grouped_rows_n_bf16, MmaTile<bf16 COMMA true COMMA false>, bf16, bf16, 2)
GROUPED_ROWS(grouped_rows_t_bf16, MmaTile<bf16 COMMA true COMMA true>, bf16, bf16, 2)
GROUPED_ROWS(grouped_rows_n_f16, MmaTile<f16 COMMA true COMMA false>, f16, f16, 2)
GROUPED_ROWS(grouped_rows_t_f16, MmaTile<f16 COMMA true COMMA true>, f16, f16, 2)
GROUPED_ROWS(grouped_rows_n_tf32, MmaTile<float COMMA true COMMA false>, float, float, 1)
GROUPED_ROWS(grouped_rows_t_tf32, MmaTile<float COMMA true COMMA true>, float, float, 2)
